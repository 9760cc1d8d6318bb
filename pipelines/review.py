"""`medssl review`: people judge every remaining mistake of a model."""

import base64
import hashlib
import io
import json
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from medssl.data.image import Image
from medssl.data.manifest import NoDataError, build_manifest, load_sample
from medssl.data.preprocess import Preprocessing
from medssl.data.readers.errors import ReadError
from pipelines.console import say, table
from pipelines.journal import write_whole
from pipelines.report.overlay import view
from pipelines.verdicts import CATEGORIES, VERDICTS, read_answers, share, summarize

LONGEST = 224
"""Pixels of the longer side of a picture on the page."""
_DISPLAY = Preprocessing(size=(LONGEST, LONGEST), intensity="range")


@dataclass(frozen=True, slots=True)
class Prediction:
    """A row of the table of predictions; the score, where there is one, is only shown."""

    item: str
    label: str
    predicted: str
    score: float | None


def review(
    predictions: Path,
    out: Path,
    *,
    images: Path | None = None,
    filled: list[Path] | None = None,
) -> dict[str, Any]:
    """Write a page on which people judge a model's mistakes, and sum up what they answered.

    The page is one file, review.html, that needs no network. Each reviewer opens it in a browser
    and gets a review.json back; comments stay in there. With these files given, summary.json is
    written instead: mistakes that most reviewers call right count as right.

    Args:
        predictions: a table (.csv or .parquet) of every item, right and wrong, with the columns
            item, label and predicted, and perhaps score; nothing else of it is shown.
        out: folder for review.html and summary.json.
        images: the folder or manifest of the images, to show the 2D ones on the page; items are
            named as there. Text in the pixels is shown too.
        filled: the review.json of each reviewer, each after its own --filled+.
    """
    rows = read_predictions(predictions)
    mistakes = [row for row in rows if row.label != row.predicted]
    if not mistakes:
        raise NoDataError(f"all {len(rows)} predictions are right; there is nothing to review")
    found: dict[str, Any] = {
        "items": len(rows),
        "mistakes": len(mistakes),
        "accuracy": share(len(rows) - len(mistakes), len(rows)),
    }
    page, items = identity(mistakes), [row.item for row in mistakes]
    if filled:
        answers = [read_answers(file, page) for file in filled]
        found |= summarize(items, len(rows), answers)
        out.mkdir(parents=True, exist_ok=True)
        write_whole(out / "summary.json", json.dumps(found, indent=1))
        _tell(found)
        return {**found, "summary": (out / "summary.json").resolve()}
    pictures: dict[str, str] = {}
    failed = 0
    if images is not None:
        pictures, failed = _pictures(images, set(items))
    out.mkdir(parents=True, exist_ok=True)
    _write_page(out / "review.html", page, mistakes, len(rows), pictures)
    _tell(found)
    say(f"wrote {out / 'review.html'}")
    told = {"pictures": len(pictures), "failed": failed, "page": (out / "review.html").resolve()}
    return {**found, **told}


def read_predictions(file: Path) -> list[Prediction]:
    """The rows of a table of predictions.

    Raises NoDataError where there is none, and ValueError where a column or a value is missing, or
    where an item comes twice.
    """
    rows = _rows(file)
    if not rows:
        raise NoDataError(f"{file.name} has no row")
    missing = {"item", "label", "predicted"} - set(rows[0])
    if missing:
        raise ValueError(
            f"expected the columns item, label and predicted; {file.name} lacks "
            f"{', '.join(sorted(missing))}"
        )
    found = [_prediction(row) for row in rows]
    item, count = Counter(row.item for row in found).most_common(1)[0]
    if count > 1:
        raise ValueError(f"item {item} comes {count} times; give every item one row")
    return found


def _rows(file: Path) -> list[dict[str, Any]]:
    if file.suffix == ".parquet":
        from pyarrow import parquet

        return parquet.read_table(file).to_pylist()
    if file.suffix == ".csv":
        import csv

        with file.open(newline="", encoding="utf-8-sig") as stream:
            return list(csv.DictReader(stream))
    raise ValueError(f"predictions are a .csv or .parquet file, got {file.name!r}")


def _prediction(row: Mapping[str, Any]) -> Prediction:
    names = [row[name] for name in ("item", "label", "predicted")]
    if not all(isinstance(name, (str, int)) and name != "" for name in names):
        raise ValueError(
            f"item, label and predicted are texts or whole numbers, got {names}; leave items out "
            "whose label is not known"
        )
    score = row.get("score")
    try:
        value = None if score in (None, "") else float(score)
    except ValueError:
        raise ValueError(f"item {names[0]}: expected a number as score, got {score!r}") from None
    return Prediction(str(names[0]), str(names[1]), str(names[2]), value)


def identity(mistakes: Sequence[Prediction]) -> str:
    """16 hex digits of the mistakes in any order, by which answers are known to belong to them."""
    told = sorted((row.item, row.label, row.predicted) for row in mistakes)
    return hashlib.sha256(json.dumps(told).encode()).hexdigest()[:16]


def _pictures(images: Path, items: Collection[str]) -> tuple[dict[str, str], int]:
    """Data URIs of the 2D images among the items, and how many images could not be read."""
    manifest = build_manifest(images)
    found, failed = {}, 0
    for item in manifest.images:
        if item.item not in items:
            continue
        try:
            image = load_sample(manifest, item).images.get("image")
        except ReadError as error:
            say(str(error))
            failed += 1
            continue
        if image is not None and image.axes == "HW":
            found[item.item] = _data_uri(image)
    return found, failed


def _data_uri(image: Image) -> str:
    """A small PNG, in the intensities in which the report of a run shows the image."""
    from PIL import Image as Pillow

    blank = replace(image, pixels=torch.zeros_like(image.pixels[:1]))
    picture = Pillow.fromarray(view(image, blank, _DISPLAY).picture)
    picture.thumbnail((LONGEST, LONGEST))
    stream = io.BytesIO()
    picture.save(stream, "PNG")
    return "data:image/png;base64," + base64.b64encode(stream.getvalue()).decode()


def _write_page(
    file: Path,
    page: str,
    mistakes: Sequence[Prediction],
    num_items: int,
    pictures: Mapping[str, str],
) -> None:
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent / "report"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    content = environment.get_template("review.html.j2").render(
        page=page,
        mistakes=mistakes,
        num_items=num_items,
        pictures=pictures,
        verdicts=VERDICTS,
        categories=CATEGORIES,
    )
    write_whole(file, content)


def _tell(found: Mapping[str, Any]) -> None:
    columns = ("accuracy", "value", "low", "high")
    rows = [("as labelled", *found["accuracy"].values())]
    title = f"{found['mistakes']} mistakes among {found['items']} items"
    if "counts" not in found:
        table(columns, rows, title)
        return
    rows.append(("as reviewed", *found["corrected_accuracy"].values()))
    table(columns, rows, title)
    table(
        ("category", "minor", "major", "undecided"),
        [(name, *of_category.values()) for name, of_category in found["counts"].items()],
        f"{found['reviewed']} judged, {found['called_right']} of them right; the others are",
    )
    if found["agreement"] is not None:
        (_, statistic), *values = found["agreement"].items()
        table(("agreement on", statistic), values)
