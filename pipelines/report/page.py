"""The page of a run: one HTML file that needs no network and names items only by their id."""

import base64
import io
import json
import shutil
from collections import Counter
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from pipelines.journal import write_whole
from pipelines.report.overlay import COLORS, View, heat_scale, side_by_side
from pipelines.scoring import read_calibration

Row = Mapping[str, Any]
MOST_PICTURES = 200
"""Pictures on the page; those with the highest scores."""
_BINS = 40
METRICS = {
    "image_auroc": ("Image AUROC", "chance that an anomalous item scores above a normal one"),
    "image_average_precision": ("Image average precision", "area under precision and recall"),
    "image_f1": ("Image F1", "of precision and recall at the calibrated threshold"),
    "image_f1_max_oracle": ("Image F1-max (oracle)", "at the best threshold for these labels"),
    "false_alarm_rate": ("False-alarm rate", "share of normal items above the threshold"),
    "recall": ("Recall", "share of anomalous items above the threshold"),
    "pixel_auroc": ("Pixel AUROC", "as of images, for single pixels against the masks"),
    "pixel_average_precision": ("Pixel average precision", "the same area for single pixels"),
    "point_auroc": ("Point AUROC", "as of items, for single points against their labels"),
    "point_average_precision": ("Point average precision", "the same area for single points"),
    "aupro": ("AUPRO, FPR ≤ 0.3", "overlap with each marked region; 1 is perfect"),
    "aupro_0.05": ("AUPRO, FPR ≤ 0.05", "the same with fewer false pixels"),
    "aupro_0.01": ("AUPRO, FPR ≤ 0.01", "the same with very few"),
    "aupimo": ("AUPIMO", "recall of pixels per image at 1e-5 to 1e-4 false ones in normal images"),
    "dice": ("Dice", "mean of the marked items at the calibrated map threshold"),
    "dice_oracle": ("Dice (oracle)", "the same at the best threshold for these masks"),
    "dice_pooled": ("Dice, pooled", "of all pixels together, at the calibrated map threshold"),
    "dice_pooled_oracle": ("Dice, pooled (oracle)", "the same at the best threshold"),
    "lesion_recall": ("Lesion recall", "share of marked regions touched above the map threshold"),
    "false_findings": ("False findings", "regions per item above it that touch no marked one"),
    "froc_mean_recall": ("FROC, mean lesion recall", "at 1/8 to 8 false findings per item"),
}
"""Key in metrics.json -> shown name and meaning; in an oracle the labels chose the threshold."""


def write_overlays(out: Path, rows: Sequence[Row], model_folder: Path) -> None:
    """overlays/<item>.png for every scored item: the original, and beside it the coloured one.

    An item without a map has the original alone.
    The views kept while scoring are removed at the end; done once, this does nothing.
    """
    from PIL import Image as Pillow

    views, done = out / "journal" / "views", out / "journal" / "overlays.json"
    if not done.is_file():
        calibration = read_calibration(model_folder)
        mapped = {row["item"]: row["map_path"] is not None for row in rows if row["status"] == "ok"}
        scale = heat_scale(
            (View.load(views / f"{item}.npz") for item in mapped),
            None if calibration is None else calibration.map_threshold,
        )
        where = {}
        for item, has_map in mapped.items():
            one = View.load(views / f"{item}.npz")
            where[item] = one.where
            picture = Pillow.fromarray(side_by_side(one, scale) if has_map else one.picture)
            picture.save(out / "overlays" / f"{item}.png")
        write_whole(done, json.dumps({"scale": scale.to_dict(), "where": where}))
    shutil.rmtree(views, ignore_errors=True)


def write_report(
    out: Path,
    rows: Sequence[Row],
    model_folder: Path,
    labels: Mapping[str, int | None],
    evaluation: Mapping[str, Any] | None = None,
) -> None:
    """report.html of a run whose tables and overlays are written.

    labels: item -> 0, 1 or None, where the truth is known.
    evaluation: what `medssl evaluate` found, with its intervals.
    """
    import jinja2

    overlays = json.loads((out / "journal" / "overlays.json").read_text())
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["short"] = _short
    scored = sorted(
        (row for row in rows if row["status"] == "ok"), key=lambda row: -float(row["score"])
    )
    written = (out / "scores.parquet").stat().st_mtime
    model = _model_facts(model_folder, rows)
    page = environment.get_template("template.html.j2").render(
        date=datetime.fromtimestamp(written).strftime("%d %B %Y, %H:%M"),
        model=model,
        counts=_counts(rows),
        predicted=predicted_counts(rows),
        cases=[
            _case(row, rank, out, overlays["where"], labels, model["normal"])
            for rank, row in enumerate(scored)
        ],
        most_pictures=MOST_PICTURES,
        clouds=any((row["map_path"] or "").endswith(".ply") for row in scored),
        volumes=any(row["volume_mm3"] is not None for row in scored),
        problems=[row for row in rows if row["status"] != "ok"],
        labelled=any(labels.get(row["item"]) is not None for row in scored),
        histogram=histogram(scored, labels) if scored else None,
        scale=overlays["scale"],
        colors=[f"rgb{color}" for color in COLORS],
        metrics=_metrics(evaluation),
        evaluation=evaluation,
    )
    write_whole(out / "report.html", page)


def histogram(scored: Sequence[Row], labels: Mapping[str, int | None]) -> dict[str, Any]:
    """Counts of scores in equal bins, per truth, with the places of axis and threshold in [0, 1].

    scored: at least one row with a score. Where their thresholds differ by site, none is shown.
    """
    values = [float(row["score"]) for row in scored]
    thresholds = {row["threshold"] for row in scored}
    threshold = thresholds.pop() if len(thresholds) == 1 else None
    ends = values if threshold is None else [*values, threshold]
    low, high = min(ends), max(ends)
    width = (high - low) or 1.0
    bins = [{"normal": 0, "anomalous": 0, "unknown": 0} for _ in range(_BINS)]
    names: dict[int | None, str] = {0: "normal", 1: "anomalous", None: "unknown"}
    for row, value in zip(scored, values, strict=True):
        place = min(int((value - low) / width * _BINS), _BINS - 1)
        bins[place][names[labels.get(row["item"])]] += 1
    return {
        "bins": bins,
        "highest": max(sum(one.values()) for one in bins),
        "ticks": [(step / 4, low + width * step / 4) for step in range(5)],
        "threshold": threshold,
        "threshold_place": None if threshold is None else (threshold - low) / width,
        "present": [name for name in names.values() if any(one[name] for one in bins)],
    }


def predicted_counts(rows: Sequence[Row]) -> dict[str, int]:
    """How many items a classifier gave each class, by name; empty of a detector."""
    found = Counter(row["predicted"] for row in rows if row.get("predicted") is not None)
    return dict(sorted(found.items()))


def _case(
    row: Row,
    rank: int,
    out: Path,
    where: Mapping[str, str],
    labels: Mapping[str, int | None],
    normal: str | None,
) -> dict[str, Any]:
    """What the table shows of one scored item; the first by score come with a picture.

    normal: a classifier's normal class; each other class counts as anomalous.
    """
    kind = {True: "anomalous", False: "normal", None: "no verdict"}[row["anomalous"]]
    if row.get("predicted") is not None and normal is not None:
        kind = "normal" if row["predicted"] == normal else "anomalous"
    truth = {1: "anomalous", 0: "normal", None: ""}[labels.get(row["item"])]
    return {
        "item": row["item"],
        "score": row["score"],
        "p_value": row["p_value"],
        "kind": kind,
        "verdict": row.get("predicted") or kind,
        "class_scores": row.get("class_scores"),
        "truth": truth,
        "modality": row["modality"],
        "missing": row.get("missing"),
        "regions": None if row["boxes"] is None else len(row["boxes"]),
        "volume_ml": None if row["volume_mm3"] is None else row["volume_mm3"] / 1000,
        "where": where[row["item"]],
        "picture": _inlined(out / "overlays" / f"{row['item']}.png")
        if rank < MOST_PICTURES
        else None,
    }


def _inlined(file: Path) -> str:
    """A picture as a JPEG data URI."""
    from PIL import Image as Pillow

    stream = io.BytesIO()
    with Pillow.open(file) as picture:
        picture.convert("RGB").save(stream, "JPEG", quality=82, subsampling=0)
    return "data:image/jpeg;base64," + base64.b64encode(stream.getvalue()).decode()


def _model_facts(model_folder: Path, rows: Sequence[Row]) -> dict[str, Any]:
    """What the page says of the model: kind, classes, digest, card, domain and promise."""
    import yaml

    description = yaml.safe_load((model_folder / "model.yaml").read_text())
    arguments = description["model"]["init_args"]
    card = model_folder / "card.md"
    return {
        "kind": _name(description["model"]),
        "classes": arguments.get("classes"),
        "normal": arguments.get("normal"),
        "digest": rows[0]["model"],
        "card": card.read_text() if card.is_file() else "",
        "calibration": read_calibration(model_folder),
        "preprocessing": description["preprocessing"],
    }


def _name(description: Mapping[str, Any]) -> str:
    """The model's class, and the one inside: "Slicewise PatchCore", "Classifier KNN"."""
    inside = description["init_args"]
    inner = inside.get("detector") or inside.get("probe")
    own = description["class_path"].rpartition(".")[2]
    return own if inner is None else f"{own} {_name(inner)}"


def _counts(rows: Sequence[Row]) -> dict[str, int]:
    counts = {"items": len(rows), "anomalous": 0, "normal": 0, "no verdict": 0}
    counts |= {"refused": 0, "error": 0}
    for row in rows:
        verdict = {True: "anomalous", False: "normal", None: "no verdict"}[row["anomalous"]]
        counts[verdict if row["status"] == "ok" else row["status"]] += 1
    return counts


def _metrics(evaluation: Mapping[str, Any] | None) -> list[dict[str, Any]]:
    """Name, meaning and interval of each metric that was computed, in a fixed order."""
    found = evaluation or {}
    return [
        {"name": name, "meaning": meaning, **found[key]}
        for key, (name, meaning) in METRICS.items()
        if key in found
    ]


def _short(value: float | None, digits: int = 4) -> str:
    """A number as people read it; nothing for None."""
    return "" if value is None else f"{value:.{digits}g}"
