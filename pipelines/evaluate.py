"""`medssl evaluate`: how well scores and maps agree with labels and masks, with intervals."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import tee
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from anomaly.metrics import PixelScores
from medssl.data.geometry import resample
from medssl.data.manifest import Item, Manifest, build_manifest, load_sample
from medssl.data.readers.any import read_image
from medssl.metrics import OneClassError, auroc, average_precision, bootstrap
from pipelines.console import say, table
from pipelines.journal import read_header, write_whole
from pipelines.record import recorded, resolve
from pipelines.report.page import METRICS, write_report
from pipelines.score import Row, identity, labels_of, read_rows, score_manifest
from pipelines.scoring import check_ranks_anomalies

FPR_LIMIT = 0.3
REPEATS = 1000
_WILSON = "Wilson's 95 % interval"


def evaluate(
    path: Path,
    model: str,
    out: Path,
    *,
    select: str | None = None,
    groups: str | None = None,
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
        device: "auto", "cpu", "cuda" or "cuda:1".
        seed: seeds the bootstrap.
    """
    arguments = dict(locals())
    manifest = build_manifest(path, groups=groups)
    if select is not None:
        manifest = manifest.select(select)
    folder = resolve(model)
    check_ranks_anomalies(folder)
    judged = judged_part(manifest)
    with recorded("evaluate", arguments) as run:
        run.manifest(judged)
        summary = _score(manifest, judged, folder, out, device)
        rows = read_rows(out)
        found = measure(judged, rows, out, seed=seed)
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


def measure(manifest: Manifest, rows: Sequence[Row], out: Path, *, seed: int = 0) -> dict[str, Any]:
    """Every metric that labels and masks allow, and under "skipped" why the others are missing.

    rows: of a finished run in `out`; those of other items are left aside.
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
        "rate_interval": _WILSON
        if len(set(groups)) == len(groups)
        else "bootstrap of whole patients or parts",
        "skipped": {},
    }
    found |= _image_metrics(scored, labels, groups, seed, found["skipped"])
    found |= _rates(scored, labels, groups, seed, found["skipped"])
    found |= _pixel_metrics(manifest, items, scored, out, seed, found["skipped"])
    return found


def _score(
    manifest: Manifest, judged: Manifest, folder: Path, out: Path, device: str
) -> dict[str, Any]:
    """Continue or reuse what lies in `out`, be it of all items or of those that count."""
    begun = read_header(out / "journal")
    if begun is None:
        return score_manifest(judged, folder, out, device=device)
    whole = begun["manifest"] == identity(manifest)
    settings = {name: begun[name] for name in ("force", "batch_size")}
    return score_manifest(manifest if whole else judged, folder, out, device=device, **settings)


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
        return {
            "image_auroc": draw(auroc, scores, labels).to_dict(),
            "image_average_precision": draw(average_precision, scores, labels).to_dict(),
        }
    except OneClassError as error:
        skipped["image metrics"] = str(error)
        return {}


def _rates(
    scored: Sequence[Row],
    labels: Tensor,
    groups: Sequence[str],
    seed: int,
    skipped: dict[str, str],
) -> dict[str, Any]:
    """Shares above the calibrated threshold among normal and among anomalous items."""
    found = {}
    for name, label in (("false_alarm_rate", 0), ("recall", 1)):
        chosen = [place for place, known in enumerate(labels.tolist()) if known == label]
        above = [scored[place]["anomalous"] for place in chosen]
        if not chosen:
            skipped[name] = f"there is no {'anomalous' if label else 'normal'} item"
        elif None in above:
            skipped[name] = "the model is not calibrated"
        else:
            found[name] = _rate(above, [groups[place] for place in chosen], seed)
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


def _pixel_metrics(
    manifest: Manifest,
    items: Sequence[Item],
    scored: Sequence[Row],
    out: Path,
    seed: int,
    skipped: dict[str, str],
) -> dict[str, Any]:
    """On the source grid; normal items count as unmarked, anomalous ones without a mask do not."""
    if any(row["map_path"] is None for row in scored):
        skipped["pixel metrics"] = "a classifier gives no maps"
        return {}
    chosen = [
        (item, row)
        for item, row in zip(items, scored, strict=True)
        if item.label == 0 or manifest.mask_of(item) is not None
    ]
    if not any(item.label for item, _ in chosen):
        skipped["pixel metrics"] = "no anomalous item has a mask"
        return {}
    first, second = tee(_maps_and_masks(manifest, chosen, out))  # in step: one map at a time
    maps, masks = (values for values, _ in first), (mask for _, mask in second)
    groups = [item.group or item.item for item, _ in chosen]
    try:
        found = PixelScores(maps, masks).intervals(
            groups, fpr_limit=FPR_LIMIT, repeats=REPEATS, seed=seed
        )
    except OneClassError as error:
        skipped["pixel metrics"] = str(error)
        return {}
    return {name: interval.to_dict() for name, interval in found.items()}


def _maps_and_masks(
    manifest: Manifest, chosen: Sequence[tuple[Item, Row]], out: Path
) -> Iterator[tuple[Tensor, Tensor | None]]:
    """Raw map and mask of each item on the source's grid, one at a time."""
    for item, row in chosen:
        values = read_image(out / row["map_path"]).pixels[0]
        mask = None
        if manifest.mask_of(item) is not None:
            sample = load_sample(manifest, item)
            assert sample.mask is not None
            marked = resample(sample.mask, to=sample.images["image"], mode="nearest", outside=0.0)
            mask = marked.pixels[0].reshape(values.shape) > 0.5
        yield values, mask


def _tell(found: Mapping[str, Any]) -> None:
    rows = [
        (METRICS[name][0], found[name]["value"], found[name]["low"], found[name]["high"])
        for name in METRICS
        if name in found
    ]
    title = f"{found['num_normal']} normal and {found['num_anomalous']} anomalous items"
    table(("metric", "value", "low", "high"), rows, title)
    for name, reason in found["skipped"].items():
        say(f"not computed: {name}, {reason}")
