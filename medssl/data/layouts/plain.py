"""Any folder: every image found in it, recursively, with nothing said about it."""

import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import Literal

from medssl.data.modality import Modality
from medssl.data.privacy import salted
from medssl.data.readers.any import Kind, sniff
from medssl.data.readers.archive import is_archive, unpacked
from medssl.data.readers.dicom_directory import listed_files
from medssl.data.readers.dicom_find import is_known, scan
from medssl.data.readers.dicom_series import Series
from medssl.data.readers.errors import ReadError
from medssl.data.readers.points_stored import Unit
from medssl.data.readers.stored import first_bytes

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
    ".ply": "points",
    ".pcd": "points",
    ".xyz": "points",
    ".mp4": "video",
    ".mov": "video",
    ".mkv": "video",
    ".webm": "video",
    ".avi": "video",
}
"""What a file claims to be; asked only where its content says nothing."""

_PICTURES = ("picture", "video")


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """One image of a folder, before it gets its salted name.

    path: the picture, the NIfTI file, the folder of a DICOM series, its only file or its archive.
    relative: `path` within the root.
    of: the `key` of the image that a mask, report or xyz belongs to.
    series, group, study, modality, unit: as in `medssl.data.manifest.Item`.
    split, label, category, defect: as there.
    volume: what the headers of a DICOM series say, or None.
    """

    path: Path
    relative: PurePosixPath
    kind: Kind | Literal["text"]
    series: str | None = None
    group: str | None = None
    study: str | None = None
    modality: Modality = Modality.UNKNOWN
    unit: Unit | None = None
    role: Literal["image", "mask", "report", "xyz"] = "image"
    of: str | None = None
    split: Literal["train", "test"] | None = None
    label: int | None = None
    category: str | None = None
    defect: str | None = None
    volume: Series | None = field(default=None, repr=False, compare=False)

    @property
    def key(self) -> str:
        """Unique within the root and the same wherever the root lies."""
        return f"{self.series} {self.relative}" if self.series else str(self.relative)


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
    return joined(list_folder(files, root) for files in folders(path))


def joined(listings: Iterable[Listing]) -> Listing:
    """The listings of single folders as one, in the order of relative paths."""
    parts = list(listings)
    entries = [entry for part in parts for entry in part.entries]
    entries.sort(key=lambda entry: (entry.relative.parts, entry.key))
    return Listing(entries=tuple(entries), skipped=sum(part.skipped for part in parts))


def list_folder(files: Sequence[Path], root: Path) -> Listing:
    """The images among the files of one folder, which no series leaves."""
    entries: list[Entry] = []
    dicom: list[Path] = []
    used = 0
    for file in files:
        content = _content(file)
        kind = content or _claim(file)
        if content == "dicom" and is_archive(first_bytes(file, 262)):
            entries += _packed(file, root)
            used += 1
        elif content == "dicom":
            dicom.append(file)
        elif kind is not None:
            entries.append(_entry(file, root, kind))
            used += 1
    found = scan(dicom) if dicom else []
    entries += _volumes(found, root)
    used += len({file for series in found for file in series.files})
    return Listing(entries=tuple(entries), skipped=len(files) - used)


def folders(path: Path) -> Iterator[list[Path]]:
    """The visible files of a folder, then of each folder in it; of a file, it or what it lists.

    Raises ReadError where a DICOMDIR lists what is not there.
    """
    if path.is_dir():
        return _walk(path)
    listed = listed_files(path)
    if listed is None:
        return iter([[path]])
    by_folder: dict[Path, list[Path]] = {}
    for file in listed:
        by_folder.setdefault(file.parent, []).append(file)
    return iter(by_folder.values())


def _packed(archive: Path, root: Path) -> list[Entry]:
    """The volumes in an archive; the archive itself, to say so later, where it is damaged."""
    try:
        with unpacked(archive) as folder:
            return _volumes(scan(folder.iterdir()), root, archive)
    except ReadError:
        return [_entry(archive, root, "dicom")]


def _walk(root: Path) -> Iterator[list[Path]]:
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
    if is_known(file):
        return "dicom"
    try:
        return sniff(file) if file.is_file() else None
    except ReadError:
        return None


def _claim(file: Path) -> Kind | None:
    """The kind that a file's name claims."""
    name = file.name.lower()
    return next((kind for suffix, kind in SUFFIXES.items() if name.endswith(suffix)), None)


def _entry(path: Path, root: Path, kind: Kind, volume: Series | None = None) -> Entry:
    relative = PurePosixPath(path.relative_to(root).as_posix())
    plain = Entry(path=path, relative=relative, kind=kind)
    if volume is None:
        return replace(plain, modality=Modality.PICTURE) if kind in _PICTURES else plain
    # where the header names no patient, the study is what no split may tear either
    group = volume.patient_id or volume.study_uid
    return replace(
        plain,
        series=volume.series or None,
        group=salted(group) if group else None,
        study=salted(volume.study_uid) if volume.study_uid else None,
        modality=volume.modality,
        volume=volume,
    )


def _volumes(found: Sequence[Series], root: Path, archive: Path | None = None) -> list[Entry]:
    """One entry per volume: its folder, or its file where that is all of it, or its archive.

    A radiograph is named by its file, so that its folder is not searched again for each of them.
    """
    entries = []
    for series in found:
        path = series.files[0] if len(series.files) == 1 else series.files[0].parent
        entries.append(_entry(archive or path, root, "dicom", series))
    return entries
