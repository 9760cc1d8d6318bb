"""`medssl compare`: is one detector better than another on the same items?"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from anomaly.streaming import StreamingPixelScores
from medssl.data.manifest import Item, Manifest, build_manifest
from medssl.metrics import (
    OneClassError,
    auroc,
    average_precision,
    f1_max,
    paired_bootstrap,
)
from pipelines.console import say, table
from pipelines.evaluate import judged_part
from pipelines.journal import write_whole
from pipelines.map_metrics import Draws, ScoredMaps, with_truth
from pipelines.record import recorded
from pipelines.report.page import METRICS
from pipelines.score import refuse_model_folder
from pipelines.tables import Row, why_no_verdict

REPEATS = 1000
_MOST_NAMED = 20
_NEEDED = {"item", "score", "anomalous", "map_path", "model", "status"}


@dataclass(frozen=True, slots=True, eq=False)
class Scores:
    """A table of scores: its rows by item, and the folder that its maps lie in."""

    rows: Mapping[str, Row]
    folder: Path


def compare(
    a: Path,
    b: Path,
    /,
    data: Path,
    out: Path | None = None,
    *,
    groups: str | None = None,
    seed: int = 0,
) -> dict[str, Any]:
    """Compare two tables of scores of the same items by a paired bootstrap.

    Whole patients or parts are drawn, and both tables are measured in the same draws, so that what
    is hard for both does not blur the difference. Every difference is A minus B.

    Only items of the split "test" count where the data has splits, else all with a label. One that
    has a score in but one table, or was another file in each, is named and left out, and the exit
    code is 1.

    Args:
        a: a folder that `medssl score` or `medssl evaluate` filled, or the scores.parquet in it.
        b: another one.
        data: the folder or manifest that was scored, with labels and perhaps masks.
        out: folder for compare.json.
        groups: FILE:COLUMN that names each picture's patient or part.
        seed: seeds the bootstrap.
    """
    arguments = dict(locals())
    if out is not None:
        refuse_model_folder(out)
    judged = judged_part(build_manifest(data, groups=groups))
    tables = (read_scores(a), read_scores(b))
    items, left_out = matched(judged, tables)
    with recorded("compare", arguments) as run:
        run.manifest(judged)
        found = differences(judged, items, tables, seed=seed)
        found |= {"left_out": left_out, "failed": len(left_out)}
        run.metrics({name: found[name] for name in METRICS if name in found})
        if out is not None:
            out.mkdir(parents=True, exist_ok=True)
            write_whole(out / "compare.json", json.dumps(found, indent=1, allow_nan=False))
            run.artifact(out / "compare.json")
    _tell(found)
    return found if out is None else {**found, "result": str((out / "compare.json").absolute())}


def read_scores(path: Path) -> Scores:
    """A table of scores, given by itself or by its folder.

    Raises FileNotFoundError where there is none, and ValueError where it is something else.
    """
    import pyarrow as pa
    from pyarrow import parquet

    file = path / "scores.parquet" if path.is_dir() else path
    if not file.is_file():
        raise FileNotFoundError(
            f"expected a folder that medssl score filled, or its scores.parquet; got {path}"
        )
    try:
        rows = parquet.read_table(file).to_pylist()
    except pa.ArrowInvalid:
        raise ValueError(f"{file.name} is no table in parquet; give one of medssl score") from None
    missing = _NEEDED - set(rows[0] if rows else ())
    if missing:
        raise ValueError(
            f"expected a table of scores, and {file.name} lacks {', '.join(sorted(missing))}; give "
            "one of medssl score"
        )
    return Scores({row["item"]: row for row in rows}, file.parent)


def matched(
    manifest: Manifest, tables: Sequence[Scores]
) -> tuple[list[Item], list[dict[str, str]]]:
    """The images with a score in both tables; and those that do not pair, each with the reason.

    Raises ValueError where fewer than two images are in both.
    """
    items, left_out = [], []
    for item in manifest.images:
        rows = [scores.rows.get(item.item) for scores in tables]
        states = [_state(row) for row in rows]
        if all(state == "scored" for state in states):
            if _one_file(rows):
                items.append(item)
            else:
                reason = "A and B scored different files under this name"
                left_out.append({"item": item.item, "reason": reason})
        elif any(state != "absent" for state in states):
            reason = ", ".join(f"{name}: {state}" for name, state in zip("AB", states, strict=True))
            left_out.append({"item": item.item, "reason": reason})
    if len(items) < 2:
        sizes = " and ".join(str(len(scores.rows)) for scores in tables)
        raise ValueError(
            f"{len(items)} of the {len(manifest.images)} labelled images have a score of one file "
            f"in both tables, of {sizes} rows, and a comparison takes two; score the same images "
            "with both models, and give these images as --data"
        )
    return items, left_out


def differences(
    manifest: Manifest, items: Sequence[Item], tables: Sequence[Scores], *, seed: int = 0
) -> dict[str, Any]:
    """Every metric that both tables allow, as `Difference`; "skipped" says why others are missing.

    items: with a score in both tables.
    """
    rows = [[scores.rows[item.item] for item in items] for scores in tables]
    groups = [item.group or item.item for item in items]
    draws = Draws(groups, REPEATS, seed)
    labels = torch.tensor([item.label for item in items])
    found: dict[str, Any] = {
        "model_a": rows[0][0]["model"],
        "model_b": rows[1][0]["model"],
        "num_normal": int((labels == 0).sum()),
        "num_anomalous": int((labels == 1).sum()),
        "num_groups": len(set(groups)),
        "repeats": REPEATS,
        "skipped": {},
    }
    scores = [torch.tensor([row["score"] for row in one], dtype=torch.float64) for one in rows]
    for name, metric in _OF_SCORES.items():
        found |= _paired(name, metric, scores, labels, draws, found["skipped"])
    above = [[row["anomalous"] for row in one] for one in rows]
    if any(None in one for one in above):
        reason = " and ".join(
            f"{name}: {why_no_verdict(one)}"
            for name, one, verdicts in zip("AB", rows, above, strict=True)
            if None in verdicts
        )
        found["skipped"] |= dict.fromkeys(_OF_VERDICTS, reason)
    else:
        flags = [torch.tensor(one) for one in above]
        for name, metric in _OF_VERDICTS.items():
            found |= _paired(name, metric, flags, labels, draws, found["skipped"])
    return found | _of_maps(manifest, items, tables, draws, found["skipped"])


def _state(row: Row | None) -> str:
    if row is None:
        return "absent"
    return "scored" if row["status"] == "ok" else row["status"]


def _one_file(rows: Sequence[Row | None]) -> bool:
    """Whether the tables scored the same bytes; those that do not tell may have."""
    files = {row.get("file_sha256") for row in rows if row is not None} - {None}
    return len(files) < 2


def _paired(
    name: str,
    metric: Callable[[Tensor, Tensor], float],
    values: Sequence[Tensor],
    labels: Tensor,
    draws: Draws,
    skipped: dict[str, str],
) -> dict[str, Any]:
    try:
        found = paired_bootstrap(
            metric,
            values[0],
            values[1],
            labels,
            draws.groups,
            repeats=draws.repeats,
            seed=draws.seed,
        )
    except OneClassError as error:
        skipped[name] = str(error)
        return {}
    return {name: found.to_dict()}


def _of_maps(
    manifest: Manifest,
    items: Sequence[Item],
    tables: Sequence[Scores],
    draws: Draws,
    skipped: dict[str, str],
) -> dict[str, Any]:
    """Pixel metrics, of pixels counted in bins."""
    counted = []
    places: list[int] = []
    for scores in tables:
        rows = [scores.rows[item.item] for item in items]
        places, reason = with_truth(manifest, items, rows)
        if reason is not None:
            skipped["pixel metrics"] = reason
            return {}
        chosen = [(items[place], rows[place]) for place in places]
        maps = ScoredMaps(manifest, chosen, scores.folder)
        try:
            counted.append(StreamingPixelScores(maps.maps, maps.masks).counted)
        except OneClassError as error:
            skipped["pixel metrics"] = str(error)
            return {}
    found = counted[0].differences(
        counted[1], draws.of(places).groups, repeats=draws.repeats, seed=draws.seed
    )
    return {name: difference.to_dict() for name, difference in found.items()}


def _share_of(label: int) -> Callable[[Tensor, Tensor], float]:
    """The share above the threshold among the items of this label."""

    def share(above: Tensor, labels: Tensor) -> float:
        chosen = above[labels == label]
        if len(chosen) == 0:
            raise OneClassError(f"there is no {'anomalous' if label else 'normal'} item")
        return float(chosen.double().mean())

    return share


_OF_SCORES: dict[str, Callable[[Tensor, Tensor], float]] = {
    "image_auroc": auroc,
    "image_average_precision": average_precision,
    "image_f1_max_oracle": f1_max,
}
_OF_VERDICTS = {"false_alarm_rate": _share_of(0), "recall": _share_of(1)}


def _tell(found: Mapping[str, Any]) -> None:
    rows = [
        (
            METRICS[name][0],
            *(found[name][side] for side in "ab"),
            *(found[name]["difference"][part] for part in ("value", "low", "high")),
            found[name]["a_larger"],
        )
        for name in METRICS
        if name in found
    ]
    title = f"{found['num_normal']} normal and {found['num_anomalous']} anomalous items in both"
    table(("metric", "A", "B", "A - B", "low", "high", "A larger in"), rows, title)
    for name, reason in found["skipped"].items():
        say(f"not computed: {name}, {reason}")
    for left_out in found["left_out"][:_MOST_NAMED]:
        say(f"left out: item {left_out['item']}, {left_out['reason']}")
