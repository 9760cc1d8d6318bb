"""Job: what images are here, and what is wrong with them?"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from medssl.data.layouts.plain import Entry, find_images
from medssl.data.manifest import NoDataError
from medssl.data.modality import Modality
from medssl.data.privacy import salted
from medssl.data.readers.errors import AmbiguousSeriesError, ReadError
from pipelines.console import say, table

_COLUMNS = (
    *("item", "path", "series", "modality", "shape", "spacing"),
    *("orientation", "transfer_syntax", "problems"),
)


def inspect(path: Path) -> dict[str, Any]:
    """Show every series, volume and picture under a path, and what would stop it from being read.

    Only headers are read, so damage inside the pixels does not show. Nothing that identifies a
    patient is shown, but paths are, since they are yours.

    Args:
        path: a folder, searched with its subfolders, or a file.

    Returns:
        `images`: a row per image, with shape and spacing (mm, None where unknown) per array axis,
        orientation as the letters that each axis (D, H, W) grows towards, and `problems`;
        `others`: files that are no image; `failed`: images with problems.
    """
    if not path.exists():
        raise FileNotFoundError(f"expected a folder or an image; there is no {path}")
    listing = find_images(path)
    rows = [row for entry in listing.entries for row in _rows(entry)]
    if not rows:
        raise NoDataError(
            f"no image found in {path}: expected DICOM, NIfTI or pictures, "
            f"found {listing.skipped} other files"
        )
    failed = sum(bool(row["problems"]) for row in rows)
    table(_COLUMNS, [[_cell(row[column]) for column in _COLUMNS] for row in rows])
    for row in rows:
        for problem in row["problems"]:
            say(f"{row['path']}: {problem['error']}: {problem['message']}")
    say(f"{len(rows)} images, {failed} with problems, {listing.skipped} other files")
    return {"images": rows, "others": listing.skipped, "failed": failed}


def _rows(entry: Entry) -> Iterator[dict[str, Any]]:
    try:
        if entry.kind == "picture":
            yield _picture(entry)
        elif entry.kind == "nifti":
            yield _nifti(entry)
        else:
            yield from _dicom(entry)
    except ReadError as error:
        yield _row(entry, problems=[error])


def _picture(entry: Entry) -> dict[str, Any]:
    from medssl.data.readers.picture import picture_shape

    channels, *shape = picture_shape(entry.path)
    return _row(entry, modality=Modality.PICTURE, channels=channels, shape=shape)


def _nifti(entry: Entry) -> dict[str, Any]:
    from medssl.data.geometry import orientation
    from medssl.data.readers.nifti import nifti_header

    header = nifti_header(entry.path)
    return _row(
        entry,
        shape=header.shape,
        spacing=header.spacing,
        orientation=orientation(header.affine),
    )


def _dicom(entry: Entry) -> Iterator[dict[str, Any]]:
    """One row per volume; the manifest knows volumes of one series UID and folder as one item."""
    from medssl.data.readers.dicom import scan
    from medssl.data.readers.dicom_header import read_headers

    if entry.series is None:  # only its name says DICOM
        read_headers(entry.path)
        raise ReadError("the file is named as DICOM and does not begin like it; copy it again")
    files = [entry.path]
    if entry.path.is_dir():
        files = [file for file in entry.path.iterdir() if file.is_file()]
    found = [s for s in scan(files) if s.series_uid == entry.series.series_uid]
    for series in found:
        problems = [*series.problems]
        if len(found) > 1:
            problems.append(
                AmbiguousSeriesError(
                    f"one of {len(found)} volumes of one series in one folder; put the files of "
                    "each into its own folder"
                )
            )
        yield _row(
            entry,
            series=series.series or None,
            modality=series.modality,
            shape=series.shape,
            spacing=series.spacing,
            orientation=series.orientation,
            transfer_syntax=series.transfer_syntax or None,
            problems=problems,
        )


def _row(
    entry: Entry,
    *,
    series: str | None = None,
    modality: Modality = Modality.UNKNOWN,
    channels: int = 1,
    shape: Any = None,
    spacing: Any = None,
    orientation: str | None = None,
    transfer_syntax: str | None = None,
    problems: list[ReadError] | None = None,
) -> dict[str, Any]:
    return {
        "item": salted(entry.key),
        "path": str(entry.relative),
        "kind": entry.kind,
        "series": series,
        "modality": modality.value,
        "channels": channels,
        "shape": list(shape) if shape else None,
        "spacing": None if spacing is None else [round(mm, 6) for mm in spacing],
        "orientation": orientation,
        "transfer_syntax": transfer_syntax,
        "problems": [
            {"error": type(problem).__name__, "message": str(problem)} for problem in problems or []
        ],
    }


def _cell(value: Any) -> Any:
    if isinstance(value, list) and value and isinstance(value[0], dict):
        return ", ".join(problem["error"] for problem in value)
    if isinstance(value, list):
        return " x ".join(f"{number:.4g}" for number in value) or None
    return value
