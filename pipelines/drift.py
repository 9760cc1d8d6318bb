"""`medssl drift`: do new normals still look like those that a model was calibrated with?"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from anomaly.calibration import Calibration
from anomaly.drift import Drift, check_drift
from medssl.data.manifest import Manifest, NoDataError, build_manifest
from medssl.models.folder import digest
from pipelines.console import say
from pipelines.journal import write_whole
from pipelines.leakage import overlap_with
from pipelines.record import resolve
from pipelines.score import Row, read_rows, refuse_model_folder, score_again, sites_of
from pipelines.scoring import check_ranks_anomalies, read_calibration

_WHY = {
    "higher": "scores are higher",
    "lower": "scores are lower",
    "alarms": "too many are above the threshold",
    "sequence": "scores changed in the course of time",
}


def drift(
    path: Path,
    model: str,
    out: Path,
    *,
    alpha: float = 0.01,
    select: str | None = None,
    groups: str | None = None,
    site: str | None = None,
    device: str = "auto",
) -> dict[str, Any]:
    """Check whether new normal items still look like those that the model was calibrated with.

    Where they do not, the false-alarm rate is not what it was: calibrate again, or find out what
    changed. Drift is no failure of the job and leaves the exit code at 0; `drift` in drift.json,
    and under --json, has the answer.

    Their order, which is that of their relative paths or of the table, is taken for that of time:
    name files by their date. A folder that grows may be checked every day, into a new --out each:
    what "sequence" says holds however often one looks, the other tests for one look. Images that
    the model has seen are refused, but a table of scores has no pixels to tell them by; several of
    one patient or part look like drift where there is none.

    Args:
        path: a folder, file or manifest of normal items (anomalous and training ones in it are left
            out), or the scores.parquet of normal items that `medssl score` wrote.
        model: folder of a fitted model, or models:/NAME@champion, or models:/NAME/3.
        out: folder for the scores, or one that `medssl score` filled; drift.json is added.
        alpha: the chance of calling it drift when there is none, in (0, 1).
        select: only items for which this expression over manifest columns holds.
        groups: FILE:COLUMN that names each picture's patient or part.
        site: FILE:COLUMN that names the site of each item, as for `medssl score`; each site is
            checked by itself, with its share of alpha.
        device: "auto", "cpu", "cuda" or "cuda:1".
    """
    folder = resolve(model)
    check_ranks_anomalies(folder)
    calibration = read_calibration(folder)
    if calibration is None or not calibration.scores:
        raise ValueError(
            "the model was not calibrated, so there is nothing to compare with; calibrate it with "
            "medssl calibrate"
        )
    refuse_model_folder(out)
    if _is_scores(path):
        if (select, groups, site) != (None, None, None):
            raise ValueError(
                "a table of scores takes no --select, no --groups and no --site; it is what it is"
            )
        rows = _table(path, digest(folder))
    else:
        manifest = build_manifest(path, groups=groups)
        chosen = manifest if select is None else manifest.select(select)
        sites = None if site is None else sites_of(manifest, site, path)
        rows = _scored(chosen, folder, out, sites, device)
    found = checked(calibration, [row for row in rows if row["status"] == "ok"], alpha=alpha)
    found["model"] = digest(folder)
    found["failed"] = sum(row["status"] != "ok" for row in rows)
    out.mkdir(parents=True, exist_ok=True)
    write_whole(out / "drift.json", json.dumps(found, indent=1, allow_nan=False))
    say(_verdict(found, calibration))
    told = {name: found[name] for name in ("drift", "reasons", "num_new", "failed", "model")}
    return {**told, "result": str((out / "drift.json").absolute())}


def new_normals(manifest: Manifest) -> Manifest:
    """The images that are neither labelled anomalous nor on the training side.

    Raises NoDataError where none is left.
    """
    kept = tuple(item for item in manifest.images if item.label != 1 and item.split != "train")
    if not kept:
        raise NoDataError(
            f"none of the {len(manifest.images)} images is a new normal one; give images that are "
            "not labelled anomalous and not for training"
        )
    return replace(manifest, items=kept)


def checked(
    calibration: Calibration, rows: Sequence[Row], *, alpha: float = 0.01
) -> dict[str, Any]:
    """What drift.json says: every check, and whether one of them found drift.

    rows: of scored items, in the order of time. Calibrated by site, each site's items are held
        against its own calibration, at alpha divided by the number of sites. Sites are named as
        in the tables, so the file is for this machine only, as they are.
    Raises NoDataError where nothing can be compared, and ValueError where a row of a model
    calibrated by site has no column for it.
    """
    if calibration.by is not None and any("site" not in row for row in rows):
        raise ValueError(
            f"the model was calibrated for each {calibration.by} by itself; name it with --site"
        )
    scores: dict[str | None, list[float]] = {}
    for row in rows:
        name = None if calibration.by is None else row["site"]
        scores.setdefault(name, []).append(row["score"])
    known = {name: calibration.of_site(name) for name in scores}
    compared = [name for name in scores if known[name].scores]
    if not compared:
        raise NoDataError(f"no scored item can be compared with the {len(rows)} given")
    share = alpha / len(compared)
    checks = {name: check_drift(known[name], scores[name], alpha=share) for name in compared}
    left_out = [
        {"site": name, "num_new": len(scores[name]), "reason": known[name].guarantee}
        for name in scores
        if name not in checks
    ]
    return {
        "drift": any(check.drift for check in checks.values()),
        "reasons": [name for name in _WHY if any(name in one.reasons for one in checks.values())],
        "alpha": alpha,
        "num_new": sum(check.num_new for check in checks.values()),
        "by": calibration.by,
        "checks": [{"site": name, **_told(check)} for name, check in checks.items()],
        "left_out": left_out,
    }


def _told(check: Drift) -> dict[str, Any]:
    return {"drift": check.drift, "reasons": check.reasons, **asdict(check)}


def _scored(
    manifest: Manifest, folder: Path, out: Path, sites: Mapping[str, str] | None, device: str
) -> list[Row]:
    """Rows of the new normals, scored now or before, in the manifest's order.

    Raises LeakageError where the model has seen one of them, and what `score_again` raises.
    """
    normals = new_normals(manifest)
    overlap_with(folder, normals).refuse("the normal items", "leave them out with --select")
    score_again(manifest, normals, folder, out, sites=sites, device=device)
    wanted = {item.item for item in normals.images}
    return [row for row in read_rows(out) if row["item"] in wanted]


def _is_scores(path: Path) -> bool:
    if path.suffix != ".parquet" or not path.is_file():
        return False
    from pyarrow import parquet

    return "score" in parquet.read_schema(path).names


def _table(path: Path, model: str) -> list[Row]:
    """The rows of a table of scores; raises ValueError where another model gave them."""
    from pyarrow import parquet

    rows = parquet.read_table(path).to_pylist()
    if any(row["model"] != model for row in rows):
        raise ValueError(
            "the scores are of another model, so they cannot be held against the calibration of "
            "this one; score the items with it"
        )
    return rows


def _verdict(found: Mapping[str, Any], calibration: Calibration) -> str:
    """One line; it names no site."""
    drifting = sum(check["drift"] for check in found["checks"])
    where = f" ({drifting} of {len(found['checks'])} sites)" if found["by"] is not None else ""
    why = " and ".join(_WHY[name] for name in found["reasons"])
    if found["drift"]:
        text = f"drift{where}: of {found['num_new']} new normal items, {why}"
    else:
        text = (
            f"no drift found: {found['num_new']} new normal items look like the held-out ones "
            f"(alpha {found['alpha']:g})"
        )
    if calibration.method == "cross":
        text += "; the held-out scores are of fold models, so that lower ones need not mean drift"
    return text
