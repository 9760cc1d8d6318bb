"""Any folder: every image found in it, recursively, with nothing said about it."""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Literal

from medssl.data.readers.any import Kind, sniff
from medssl.data.readers.dicom import scan
from medssl.data.readers.dicom_series import Series
from medssl.data.readers.errors import ReadError

SUFFIXES: dict[str, Kind] = {
    ".png": "picture",
    ".jpg": "picture",
    ".jpeg": "picture",
    ".tif": "picture",
    ".tiff": "picture",
    ".nii": "nifti",
    ".nii.gz": "nifti",
    ".dcm": "dicom",
    ".ima": "dicom",
}
"""What a file claims to be; asked only where its content says nothing."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """One image of a folder, before it gets its salted name.

    path: the picture, the NIfTI file, the folder of a DICOM series, or its only file.
    relative: `path` within the root.
    series: what the headers of a DICOM series say; None for other kinds.
    of: the `key` of the image that a mask belongs to.
    split, label, category, defect: as in `medssl.data.manifest.Item`.
    """

    path: Path
    relative: PurePosixPath
    kind: Kind
    series: Series | None = None
    role: Literal["image", "mask"] = "image"
    of: str | None = None
    split: Literal["train", "test"] | None = None
    label: int | None = None
    category: str | None = None
    defect: str | None = None

    @property
    def key(self) -> str:
        """Unique within the root and the same wherever the root lies."""
        uid = self.series.series_uid if self.series else ""
        return f"{uid} {self.relative}" if uid else str(self.relative)


@dataclass(frozen=True, slots=True, kw_only=True)
class Listing:
    """What a folder holds: the images in the order of their relative paths.

    skipped: number of visible files without an image in them, or where the layout has no place.
    """

    entries: tuple[Entry, ...]
    skipped: int


def find_images(path: Path) -> Listing:
    """Every image in a folder and its subfolders, or the one image that a file is.

    A file counts by its content; one that no reader knows still counts if its name claims to be an
    image, so that reading it later gives an error and it is not lost. Hidden files are left out.
    """
    root = path if path.is_dir() else path.parent
    entries: list[Entry] = []
    num_files = 0
    used = 0
    for files in _folders(path) if path.is_dir() else [[path]]:
        num_files += len(files)
        dicom = []
        for file in files:
            content = _content(file)
            kind = content or _claim(file)
            if content == "dicom":
                dicom.append(file)
            elif kind is not None:
                entries.append(_entry(file, root, kind))
                used += 1
        found = scan(dicom) if dicom else []
        entries += _volumes(found, root)
        used += len({file for series in found for file in series.files})
    entries.sort(key=lambda entry: (entry.relative.parts, entry.key))
    return Listing(entries=tuple(entries), skipped=num_files - used)


def _folders(root: Path) -> Iterator[list[Path]]:
    """The visible files of each folder; a linked folder is followed once."""
    seen = set()
    for folder, names, files in os.walk(root, followlinks=True):
        state = os.stat(folder)
        if (state.st_dev, state.st_ino) in seen:
            names.clear()
            continue
        seen.add((state.st_dev, state.st_ino))
        names[:] = sorted(name for name in names if not name.startswith("."))
        yield [Path(folder, name) for name in sorted(files) if not name.startswith(".")]


def _content(file: Path) -> Kind | None:
    """The kind that a file's first bytes show; None where they show none or cannot be read."""
    try:
        return sniff(file) if file.is_file() else None
    except ReadError:
        return None


def _claim(file: Path) -> Kind | None:
    """The kind that a file's name claims."""
    name = file.name.lower()
    return next((kind for suffix, kind in SUFFIXES.items() if name.endswith(suffix)), None)


def _entry(path: Path, root: Path, kind: Kind, series: Series | None = None) -> Entry:
    relative = PurePosixPath(path.relative_to(root).as_posix())
    return Entry(path=path, relative=relative, kind=kind, series=series)


def _volumes(found: Sequence[Series], root: Path) -> list[Entry]:
    """One entry per series UID of a folder, or per file where the file is all of it.

    A radiograph is named by its file, so that its folder is not searched again for each of them.
    Volumes that share a series UID and a folder are one entry, whose reading says so.
    """
    entries: dict[str, Entry] = {}
    for series in found:
        path = series.files[0] if len(series.files) == 1 else series.files[0].parent
        entry = _entry(path, root, "dicom", series)
        entries.setdefault(entry.key, entry)
    return list(entries.values())
