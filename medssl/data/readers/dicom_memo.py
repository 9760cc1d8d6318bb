"""The headers of DICOM files, remembered; read in other processes perhaps."""

import os
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from pathlib import Path

from medssl.data.readers.dicom_header import Header, is_dicom, read_headers
from medssl.data.readers.errors import ReadError
from medssl.data.readers.stored import GZIP, first_bytes

_START_BYTES = 132
_MOST_FRAMES = 200_000

Frames = tuple[Header, ...]
Key = tuple[str, int, int, bool]
"""Path, size, nanosecond of the last change, and whether objects of any kind are images."""

_SEEN: "OrderedDict[Key, Frames]" = OrderedDict()
_NUM_FRAMES = [0]


def key_of(file: Path, *, any_object: bool = False) -> Key:
    """Under which a file's headers are remembered. Raises ReadError where there is no such file."""
    try:
        state = os.stat(file)
    except OSError as error:
        raise ReadError(f"a file cannot be opened: {error.strerror}") from None
    return str(file), state.st_size, state.st_mtime_ns, any_object


def recall(key: Key) -> Frames | None:
    """The headers of a file that has been read and has not changed since."""
    return _SEEN.get(key)


def remember(headers: Mapping[Key, Frames]) -> None:
    """Keep headers, and forget the oldest beyond some two hundred thousand frames."""
    for key, frames in headers.items():
        _SEEN[key] = frames
        _NUM_FRAMES[0] += max(1, len(frames))
    while _NUM_FRAMES[0] > _MOST_FRAMES and len(_SEEN) > 1:
        _, dropped = _SEEN.popitem(last=False)
        _NUM_FRAMES[0] -= max(1, len(dropped))


def forget() -> None:
    """As if no header had been read, to measure a first reading."""
    _SEEN.clear()
    _NUM_FRAMES[0] = 0


def dicom_start(file: Path) -> bytes | None:
    """The first bytes of a DICOM file, zipped perhaps; None of any other."""
    try:
        with file.open("rb") as stream:
            start = stream.read(_START_BYTES)
    except OSError as error:
        raise ReadError(f"a file cannot be opened: {error.strerror}") from None
    inside = first_bytes(file, _START_BYTES) if start.startswith(GZIP) else start
    return start if is_dicom(inside) else None


def headers_of_files(files: Sequence[Path]) -> dict[Key, Frames]:
    """The headers of the sound DICOM files among these; what is wrong with others is not said.

    This module imports no torch, so that a process that only reads headers starts quickly.
    """
    found = {}
    for file in files:
        try:
            start = dicom_start(file)
            if start is not None:
                frames = read_headers(file, zipped=start.startswith(GZIP))
                found[key_of(file)] = tuple(frames)
        except ReadError:
            continue
    return found
