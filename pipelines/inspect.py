"""Job: what images are here, and what is wrong with them?"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from medssl.data.layouts.placed import placed
from medssl.data.layouts.plain import Entry, Listing, find_images
from medssl.data.manifest import NoDataError
from medssl.data.modality import Modality
from medssl.data.privacy import salted
from medssl.data.readers.dicom_series import Series
from medssl.data.readers.errors import CorruptFileError, ReadError
from pipelines.console import say, table

_COLUMNS = (
    *("item", "path", "role", "series", "modality", "shape", "spacing"),
    *("orientation", "transfer_syntax", "problems"),
)

_NAMED = 5  # images that a note names


def inspect(path: Path) -> dict[str, Any]:
    """Show every series, volume, picture and cloud under a path, and what would stop its reading.

    Only headers are read, so damage inside the pixels does not show. Nothing that identifies a
    patient is shown, but paths are, since they are yours.

    Args:
        path: a folder, searched with its subfolders, or a file.

    Returns:
        `images`: a row per image, with shape and spacing (mm, None where unknown) per array axis,
        orientation as the letters that each axis (D, H, W) grows towards, `role` (image, mask, xyz
        beside a picture; None without a place in the folder's layout) and `unit` of points as the
        layout says, `problems` with the
        argument of `read_image` that would resolve each, and `notes`;
        `others`: files that are no image; `failed`: images with problems.
    """
    if not path.exists():
        raise FileNotFoundError(f"expected a folder or an image; there is no {path}")
    listing = find_images(path)
    places, num_texts = _placed(path, listing)
    rows = [row for one in listing.entries for row in _rows(places.get(one.key, one))]
    others = listing.skipped - num_texts
    _beside_others(rows)
    _out_of_place(rows, places)
    if not rows:
        raise NoDataError(
            f"no image found in {path}: expected DICOM, NIfTI, pictures or points, "
            f"found {others} other files"
        )
    failed = sum(bool(row["problems"]) for row in rows)
    table(_COLUMNS, [[_cell(row[column]) for column in _COLUMNS] for row in rows])
    for row in rows:
        for problem in row["problems"]:
            way = f" [{problem['argument']}]" if problem["argument"] else ""
            say(f"{row['path']}: {problem['error']}: {problem['message']}{way}")
    _tell_notes(rows)
    say(f"{len(rows)} images, {failed} with problems, {others} other files")
    return {"images": rows, "others": others, "failed": failed}


def _tell_notes(rows: Sequence[dict[str, Any]]) -> None:
    """Each note with its images, by their number where they are many."""
    paths: dict[str, list[str]] = {}
    for row in rows:
        for note in row["notes"]:
            paths.setdefault(note, []).append(row["path"])
    for note, told in paths.items():
        for path in told if len(told) <= _NAMED else [f"{len(told)} images"]:
            say(f"{path}: {note}")


def _placed(path: Path, listing: Listing) -> tuple[dict[str, Entry], int]:
    """By key what the layout says of each image, and the number of files of reports and labels.

    A layout that contradicts itself is told, and then says nothing.
    """
    try:
        entries = placed(path, listing).entries
    except ValueError as error:
        say(f"the folder's layout: {error}")
        return {}, 0
    texts = {entry.path for entry in entries if entry.kind == "text"}
    return {entry.key: entry for entry in entries}, len(texts)


def _out_of_place(rows: Sequence[dict[str, Any]], places: Mapping[str, Entry]) -> None:
    """Tell the images that a manifest of the folder would leave out."""
    kept = {salted(key) for key in places}
    for row in rows:
        if places and row["item"] not in kept:
            row["role"] = None
            row["notes"].append("the folder's layout has no place for it; no manifest will hold it")


def _rows(entry: Entry) -> Iterator[dict[str, Any]]:
    try:
        if entry.kind == "picture":
            yield _picture(entry)
        elif entry.kind == "nifti":
            yield _nifti(entry)
        elif entry.kind == "points":
            yield _points(entry)
        elif entry.kind == "video":
            yield _video(entry)
        elif entry.volume is None or not entry.volume.shape:
            yield _damaged(entry)
        else:
            yield _dicom(entry, entry.volume)
    except ReadError as error:
        yield _row(entry, problems=[error])


def _picture(entry: Entry) -> dict[str, Any]:
    from medssl.data.readers.picture import picture_shape

    channels, *shape = picture_shape(entry.path)
    notes = [_of_unit("xyz", entry)] if entry.modality is Modality.DEPTH else []
    return _row(entry, channels=channels, shape=shape, notes=notes)


def _nifti(entry: Entry) -> dict[str, Any]:
    from medssl.data.geometry import orientation
    from medssl.data.readers.nifti import nifti_header

    header = nifti_header(entry.path)
    notes = []
    if header.qform_differs_mm is not None:
        notes.append(
            f"sform and qform put a corner {header.qform_differs_mm:g} mm apart; the sform counts"
        )
    if header.affine_from == "none":
        notes.append("neither sform nor qform is set: the volume has no known place in a patient")
    if header.sheared:
        notes.append("the axes are sheared against each other")
    return _row(
        entry,
        channels=header.channels,
        shape=header.shape,
        spacing=header.spacing,
        orientation=None if header.affine_from == "none" else orientation(header.affine),
        notes=notes,
    )


def _points(entry: Entry) -> dict[str, Any]:
    from medssl.data.readers.points import points_header

    header = points_header(entry.path)
    shape = (header.height, header.width) if header.height > 1 else (header.num_points,)
    what = f"{'organized' if header.height > 1 else 'free'} points"
    return _row(entry, channels=3, shape=shape, notes=[_of_unit(what, entry)])


def _of_unit(what: str, entry: Entry) -> str:
    """The unit as the layout says it; otherwise whoever knows it has to."""
    known = f"in {entry.unit}, as their layout says"
    return f"{what} {known}" if entry.unit else f"{what}; their unit is not in the file"


def _video(entry: Entry) -> dict[str, Any]:
    from medssl.data.readers.video import video_header

    header = video_header(entry.path)
    count = () if header.num_frames is None else (header.num_frames,)
    notes = [] if count else ["the number of frames is not announced"]
    return _row(entry, channels=header.channels, shape=(*count, *header.shape), notes=notes)


def _damaged(entry: Entry) -> dict[str, Any]:
    """A DICOM file or archive that does not open, or whose name alone says DICOM."""
    if entry.volume is not None:
        return _row(entry, problems=list(entry.volume.problems))
    from medssl.data.readers.archive import members, unpacking
    from medssl.data.readers.dicom_header import read_headers

    read_headers(entry.path)
    with unpacking():
        for stream in members(entry.path):
            stream.read()
    raise ReadError("the file is named as DICOM and does not begin like it; copy it again")


def _dicom(entry: Entry, volume: Series) -> dict[str, Any]:
    return _row(
        entry,
        channels=3 if volume.color else 1,
        shape=volume.shape,
        spacing=volume.spacing,
        orientation=volume.orientation,
        transfer_syntax=volume.transfer_syntax or None,
        problems=list(volume.problems),
        notes=_notes(volume),
    )


def _notes(volume: Series) -> list[str]:
    """What does not stop anybody, and should be known."""
    notes = []
    if volume.varies:
        notes.append(f"several volumes, told apart by {', '.join(volume.varies)}")
    if volume.sheared:
        notes.append("gantry tilt: the affine is sheared; resample_tilt=True makes it rectangular")
    if volume.spacing is None and not volume.problems:
        notes.append("no pixel spacing: nothing can be measured in mm")
    if volume.burned_in_text is not None:
        said = "is declared" if volume.burned_in_text == "declared" else "cannot be ruled out"
        notes.append(f"text in the pixels {said}; it may name the patient")
    if volume.doubts:
        notes.append(f"the parser warned: {'; '.join(sorted(volume.doubts))}")
    if volume.shows_face:
        notes.append("a face can be rendered from a volume of the head; deface it before sharing")
    return notes


def _beside_others(rows: list[dict[str, Any]]) -> None:
    """Tell volumes that share a folder or file from each other, and from damaged files."""
    damaged = {row["folder"] for row in rows if row["kind"] == "dicom" and row["shape"] is None}
    for row in rows:
        if row["kind"] != "dicom" or row["shape"] is None:
            continue
        num_here = sum(other["path"] == row["path"] for other in rows)
        if num_here > 1:
            row["notes"].append(f"one of {num_here} volumes here; choose it with series=")
        if row["path"] in damaged:
            row["problems"].append(
                _told(
                    CorruptFileError(
                        "a damaged DICOM file lies in the same folder and may be one of the "
                        "slices; copy it again, or take it away"
                    )
                )
            )


def _row(
    entry: Entry,
    *,
    channels: int = 1,
    shape: Any = None,
    spacing: Any = None,
    orientation: str | None = None,
    transfer_syntax: str | None = None,
    problems: Sequence[ReadError] = (),
    notes: Sequence[str] = (),
) -> dict[str, Any]:
    return {
        "item": salted(entry.key),
        "path": str(entry.relative),
        "folder": str(entry.relative.parent),
        "kind": entry.kind,
        "role": entry.role,
        "unit": entry.unit,
        "series": entry.series,
        "modality": entry.modality.value,
        "channels": channels,
        "shape": list(shape) if shape else None,
        "spacing": None if spacing is None else [round(mm, 6) for mm in spacing],
        "orientation": orientation,
        "transfer_syntax": transfer_syntax,
        "problems": [_told(problem) for problem in problems],
        "notes": list(notes),
    }


def _told(problem: ReadError) -> dict[str, Any]:
    return {
        "error": type(problem).__name__,
        "message": str(problem),
        "argument": problem.argument,
    }


def _cell(value: Any) -> Any:
    if isinstance(value, list) and value and isinstance(value[0], dict):
        return ", ".join(problem["error"] for problem in value)
    if isinstance(value, list):
        return " x ".join(f"{number:.4g}" for number in value) or None
    return value
