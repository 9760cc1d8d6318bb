"""Images with a table of their reports.

    reports.csv     columns path (relative to the table) and text; where they are there also
                    patient_id, study_id and split (train, val, validation or test)
    anywhere/*      the images

A row may hold several sentences; images of one study may share a text. What lies in the folder and
has no row is kept, without a report.
"""

from dataclasses import replace
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import Literal

from medssl.data.layouts.plain import Entry, Listing
from medssl.data.privacy import salted
from medssl.data.readers.errors import ReadError
from medssl.data.table import Row, Table, read_table

NAME = "reports.csv"
_SPLITS: dict[str, Literal["train", "test"]] = {
    "train": "train",
    "val": "train",
    "validation": "train",
    "test": "test",
}


def is_reports_csv(root: Path) -> bool:
    """Whether a folder has such a table at its top."""
    if not (root / NAME).is_file():
        return False
    with (root / NAME).open(encoding="utf-8-sig", errors="replace") as stream:
        columns = [name.strip().strip('"') for name in stream.readline().split(",")]
    return {"path", "text"} <= set(columns)


def place_reports_csv(root: Path, listing: Listing) -> Listing:
    """The images with what the table says of them, and a report tied to each that has one.

    Raises ValueError where the table disagrees with itself, names none of the images, or has a
    split that is none of the above.
    """
    table = read_table(NAME, root)
    paths = {entry.key: _place(entry.path) for entry in listing.entries}
    rows = table.by_item(paths)
    if not rows:
        raise ValueError(
            f"{NAME} has a row for none of the {len(paths)} images; its column path counts from "
            "the folder of the table"
        )
    images = [_told(entry, rows.get(entry.key, {})) for entry in listing.entries]
    reports = [
        Entry(
            path=table.file.absolute(),
            relative=PurePosixPath(f"report of {image.key}"),
            kind="text",
            role="report",
            of=image.key,
            split=image.split,
            group=image.group,
            study=image.study,
        )
        for image in images
        if rows.get(image.key, {}).get("text")
    ]
    return Listing(entries=(*images, *reports), skipped=max(0, listing.skipped - 1))


def report_of(table: Path, image: Path) -> str:
    """The text that a table has for an image. Raises ReadError where it has none any more."""
    try:
        found = _table(table, table.stat().st_mtime_ns).by_item({"": _place(image)})
    except (OSError, ValueError):
        raise ReadError(
            "the table of its report cannot be read; build the manifest again"
        ) from None
    if not found.get("", {}).get("text"):
        raise ReadError("the table has no report of it any more; build the manifest again")
    return found[""]["text"]


@lru_cache(maxsize=4)
def _table(file: Path, changed: int) -> Table:
    return read_table(file.name, file.parent)


def _place(path: Path) -> PurePosixPath:
    return PurePosixPath(path.absolute().as_posix())


def _told(entry: Entry, row: Row) -> Entry:
    said = (row.get("split") or "").lower()
    if said and said not in _SPLITS:
        raise ValueError(f"the split in {NAME} must be one of {', '.join(_SPLITS)}; got {said!r}")
    return replace(
        entry,
        split=_SPLITS.get(said, entry.split),
        group=salted(row["patient_id"]) if row.get("patient_id") else entry.group,
        study=salted(row["study_id"]) if row.get("study_id") else entry.study,
    )
