"""`medssl evaluate`: how well scores and maps agree with labels and masks, with intervals."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from anomaly.calibration import Calibration
from medssl.data.manifest import Manifest, build_manifest
from medssl.metrics import OneClassError, auroc, average_precision, bootstrap, f1, f1_max
from pipelines.console import say, table
from pipelines.journal import write_whole
from pipelines.leakage import demand_new, overlap_with
from pipelines.map_metrics import (
    Draws,
    ScoredMaps,
    map_metrics,
    map_thresholds,
    point_metrics,
    spacing_in_mm,
    with_truth,
)
from pipelines.record import recorded, resolve
from pipelines.report.page import METRICS, write_report
from pipelines.score import Row, labels_of, read_rows, score_again, sites_of
from pipelines.scoring import check_ranks_anomalies, read_calibration
from pipelines.tables import why_no_verdict

REPEATS = 1000
_WILSON = "Wilson's 95 % interval"


def evaluate(
    path: Path,
    model: str,
    out: Path,
    *,
    select: str | None = None,
    groups: str | None = None,
    site: str | None = None,
    min_finding: float = 0.0,
    allow_seen: bool = False,
    device: str = "auto",
    seed: int = 0,
) -> dict[str, Any]:
    """Measure scores and maps against labels and masks; score first what is not scored yet.

    Only items of the split "test" count where the folder has splits, else all with a label.

    Args:
        path: a folder, a file, or a manifest written by `medssl manifest`.
        model: folder of a fitted model, or models:/NAME@champion, or models:/NAME/3.
        out: folder for the scores, or one that `medssl score` filled; metrics.json is added.
        select: only items for which this expression over manifest columns holds.
        groups: FILE:COLUMN that names each picture's patient or part.
        site: FILE:COLUMN that names the site of each item, as for `medssl score`.
        min_finding: findings of the map that are smaller count neither as a lesion found nor as a
            false one, in lesion recall and FROC; marked lesions all count. mm3 in volumes, mm2 in
            pictures with a distance between their pixels.
        allow_seen: go on where the model was fitted, pretrained or calibrated on some of the
            images, or on others of their patients or parts.
        device: "auto", "cpu", "cuda" or "cuda:1".
        seed: seeds the bootstrap.
    """
    arguments = dict(locals())
    if not min_finding >= 0:  # nor NaN
        raise ValueError(f"min_finding is a volume in mm3 or an area in mm2, got {min_finding}")
    manifest = build_manifest(path, groups=groups)
    sites = None if site is None else sites_of(manifest, site, path)
    if select is not None:
        manifest = manifest.select(select)
    folder = resolve(model)
    check_ranks_anomalies(folder)
    judged = judged_part(manifest)
    if min_finding > 0:
        spacing_in_mm(judged, judged.images[0])  # before hours of scoring
    overlap = overlap_with(folder, judged)
    demand_new(overlap, "images to evaluate on", allow_seen=allow_seen)
    with recorded("evaluate", arguments) as run:
        run.manifest(judged)
        summary = score_again(manifest, judged, folder, out, sites=sites, device=device)
        rows = read_rows(out)
        calibration = read_calibration(folder)
        found = measure(
            judged, rows, out, calibration=calibration, min_finding=min_finding, seed=seed
        )
        found["overlap"] = overlap.to_dict()
        write_whole(out / "metrics.json", json.dumps(found, indent=1))
        write_report(out, rows, folder, labels_of(manifest), found)
        run.metrics({name: found[name] for name in METRICS if name in found})
        run.artifact(out / "metrics.json")
    _tell(found)
    return {**summary, **found, "metrics": str((out / "metrics.json").resolve())}


def judged_part(manifest: Manifest) -> Manifest:
    """The items that count: labelled, and of the split "test" where there are splits.

    Raises ValueError where none is left.
    """
    split = any(item.split is not None for item in manifest.images)
    kept = {
        item.item
        for item in manifest.images
        if item.label is not None and (item.split == "test" or not split)
    }
    if not kept:
        wanted = 'no labelled item of the split "test"' if split else "no labelled item"
        raise ValueError(
            f"{wanted} among {len(manifest.images)} items; an MVTec-style folder has labels, as "
            "test/good and test/<kind of defect>"
        )
    items = tuple(item for item in manifest.items if (item.of or item.item) in kept)
    return replace(manifest, items=items)


def measure(
    manifest: Manifest,
    rows: Sequence[Row],
    out: Path,
    *,
    calibration: Calibration | None = None,
    min_finding: float = 0.0,
    seed: int = 0,
) -> dict[str, Any]:
    """Every metric that labels and masks allow, and under "skipped" why the others are missing.

    rows: of a finished run in `out`; those of other items are left aside.
    calibration: of the model, for what its map threshold finds. min_finding: as of `evaluate`.
    """
    by_item = {item.item: item for item in manifest.images}
    scored = [row for row in rows if row["item"] in by_item and row["status"] == "ok"]
    items = [by_item[row["item"]] for row in scored]
    labels = torch.tensor([item.label for item in items])
    groups = [item.group or item.item for item in items]
    found: dict[str, Any] = {
        "num_normal": int((labels == 0).sum()),
        "num_anomalous": int((labels == 1).sum()),
        "num_masked": sum(manifest.mask_of(item) is not None for item in items),
        "num_groups": len(set(groups)),
        "repeats": REPEATS,
        "min_finding": min_finding,
        "rate_interval": _WILSON
        if len(set(groups)) == len(groups)
        else "bootstrap of whole patients or parts",
        "skipped": {},
    }
    draws = Draws(groups, REPEATS, seed)
    found["num_without_verdict"] = sum(row["anomalous"] is None for row in scored)
    found |= _image_metrics(scored, labels, groups, seed, found["skipped"])
    found |= _rates(scored, labels, groups, seed, found["skipped"])
    places, reason = with_truth(manifest, items, scored)
    if reason is not None:
        found["skipped"]["pixel metrics"] = reason
        return found
    chosen = [(items[place], scored[place]) for place in places]
    maps = ScoredMaps(manifest, chosen, out, min_finding=min_finding)
    found |= _map_metrics(maps, calibration, draws.of(places), found["skipped"])
    return found


def _image_metrics(
    scored: Sequence[Row],
    labels: Tensor,
    groups: Sequence[str],
    seed: int,
    skipped: dict[str, str],
) -> dict[str, Any]:
    scores = torch.tensor([row["score"] for row in scored])
    draw = partial(bootstrap, groups=groups, repeats=REPEATS, seed=seed)
    try:
        found = {
            "image_auroc": draw(auroc, scores, labels).to_dict(),
            "image_average_precision": draw(average_precision, scores, labels).to_dict(),
            "image_f1_max_oracle": draw(f1_max, scores, labels).to_dict(),
        }
    except OneClassError as error:
        skipped["image metrics"] = str(error)
        return {}
    above = [row["anomalous"] for row in scored]
    if None in above:
        skipped["image_f1"] = why_no_verdict(scored)
    else:
        found["image_f1"] = draw(f1, torch.tensor(above), labels).to_dict()
    return found


def _rates(
    scored: Sequence[Row],
    labels: Tensor,
    groups: Sequence[str],
    seed: int,
    skipped: dict[str, str],
) -> dict[str, Any]:
    """Shares above the calibrated threshold among normal and among anomalous items.

    Items without a verdict, of a site that the model has no threshold for, do not count.
    """
    found = {}
    for name, label in (("false_alarm_rate", 0), ("recall", 1)):
        chosen = [place for place, known in enumerate(labels.tolist()) if known == label]
        with_verdict = [place for place in chosen if scored[place]["anomalous"] is not None]
        above = [scored[place]["anomalous"] for place in with_verdict]
        if not chosen:
            skipped[name] = f"there is no {'anomalous' if label else 'normal'} item"
        elif not above:
            skipped[name] = why_no_verdict([scored[place] for place in chosen])
        else:
            found[name] = _rate(above, [groups[place] for place in with_verdict], seed)
    return found


def _rate(above: Sequence[bool], groups: Sequence[str], seed: int) -> dict[str, float]:
    """A share with Wilson's interval, or a bootstrap of groups where groups have several items."""
    from scipy.stats import binomtest

    if len(set(groups)) == len(groups):
        test = binomtest(sum(above), len(above))
        low, high = test.proportion_ci(0.95, method="wilson")
        return {"value": test.statistic, "low": float(low), "high": float(high)}
    flags = torch.tensor(above, dtype=torch.float64)
    return bootstrap(_share, flags, groups=groups, repeats=REPEATS, seed=seed).to_dict()


def _share(flags: Tensor) -> float:
    return float(flags.mean())


def _map_metrics(
    maps: ScoredMaps, calibration: Calibration | None, draws: Draws, skipped: dict[str, str]
) -> dict[str, Any]:
    if any(item.kind == "points" for item, _ in maps.chosen):
        return point_metrics(maps, draws, skipped)
    thresholds = map_thresholds(calibration, [row for _, row in maps.chosen])
    return map_metrics(maps, thresholds, draws, skipped)


def _tell(found: Mapping[str, Any]) -> None:
    rows = [
        (METRICS[name][0], found[name]["value"], found[name]["low"], found[name]["high"])
        for name in METRICS
        if name in found
    ]
    title = f"{found['num_normal']} normal and {found['num_anomalous']} anomalous items"
    table(("metric", "value", "low", "high"), rows, title)
    if found["min_finding"] > 0 and "froc" in found:
        say(f"findings smaller than {found['min_finding']:g} mm3 (mm2 in pictures) do not count")
    if found.get("pixel_form") == "binned":
        say("pixel metrics are of pixels counted in bins, which moves them by less than 0.001")
    for name, reason in found["skipped"].items():
        say(f"not computed: {name}, {reason}")
