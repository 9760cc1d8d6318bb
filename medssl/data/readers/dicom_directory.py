"""DICOMDIR: the files that a medium's directory lists (PS3.10, PS3.3 F.3)."""

from pathlib import Path
from typing import Any

from medssl.data.readers.dicom_header import DIRECTORY, is_dicom
from medssl.data.readers.doubts import hearing
from medssl.data.readers.errors import CorruptFileError, ReadError
from medssl.data.readers.stored import decoding


@hearing()
def listed_files(path: Path) -> list[Path] | None:
    """The files that a DICOMDIR lists, and None for any other file.

    Only what lies below the DICOMDIR's own folder is taken, whatever the letter case on disk.
    Raises CorruptFileError where a listed file is missing.
    """
    try:
        with path.open("rb") as stream:
            start = stream.read(512)
    except OSError as error:
        raise ReadError(f"the file cannot be opened: {error.strerror}") from None
    if not is_dicom(start) or DIRECTORY.encode() not in start:
        return None
    from pydicom import dcmread

    with decoding("the DICOMDIR"):
        records = dcmread(path, force=True).get("DirectoryRecordSequence") or ()
        names = [record.get("ReferencedFileID") for record in records]
        wanted = [_parts(name) for name in names if name]
    found = [_below(path.parent, parts) for parts in wanted]
    missing = sum(file is None for file in found)
    if missing:
        raise CorruptFileError(
            f"{missing} of the {len(found)} files that the DICOMDIR lists are not there; copy the "
            "whole medium, or give the folder instead"
        )
    return [file for file in found if file is not None]


def _parts(name: Any) -> list[str]:
    return [name] if isinstance(name, str) else [str(part) for part in name]


def _below(root: Path, parts: list[str]) -> Path | None:
    here = root
    for part in parts:
        if part in ("", ".", "..") or "/" in part or "\\" in part:
            return None
        here = _child(here, part)
        if not here.exists():
            return None
    return here if here.is_file() and here.resolve().is_relative_to(root.resolve()) else None


def _child(folder: Path, name: str) -> Path:
    if (folder / name).exists() or not folder.is_dir():
        return folder / name
    alike = (entry for entry in folder.iterdir() if entry.name.upper() == name.upper())
    return next(alike, folder / name)
