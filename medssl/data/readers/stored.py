"""Bytes and stored values: read once, hashed, and widened to float32 without loss."""

import gzip
import hashlib
import io
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

from medssl.data.readers.errors import CorruptFileError, ReadError, UnsupportedFormatError

GZIP = b"\x1f\x8b"
_EXACT = 1 << 24  # beyond this, float32 skips integers


@contextmanager
def opened(path: Path) -> Iterator[BinaryIO]:
    """The file as a stream. Raises ReadError, without the path, where it cannot be opened."""
    try:
        stream = path.open("rb")
    except OSError as error:
        raise ReadError(f"the file cannot be opened: {error.strerror}") from None
    with stream:
        yield stream


def read_bytes(path: Path) -> bytes:
    """All bytes of a file. Raises ReadError, without the path, where it cannot be opened."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise ReadError(f"the file cannot be opened: {error.strerror}") from None


def read_text(path: Path) -> str:
    """A report in UTF-8. Raises ReadError, without the path, where it is none."""
    try:
        return read_bytes(path).decode("utf-8-sig")
    except UnicodeDecodeError:
        raise CorruptFileError("the report is not text in UTF-8; save it so") from None


def first_bytes(path: Path, length: int) -> bytes:
    """The first bytes of a file, unzipped where it is gzipped; fewer where it is damaged."""
    try:
        with path.open("rb") as stream:
            start = stream.read(2)
            stream.seek(0)
            if start != GZIP:
                return stream.read(length)
            try:
                with gzip.GzipFile(fileobj=stream) as unzipped:
                    return unzipped.read(length)
            except (EOFError, zlib.error, gzip.BadGzipFile):
                return b""
    except OSError as error:
        raise ReadError(f"the file cannot be opened: {error.strerror}") from None


def unzipped(content: bytes, limit: int = 4 << 30) -> bytes:
    """What was gzipped, or the bytes as they are.

    Raises CorruptFileError, also where it would be more than `limit` bytes.
    """
    if not content.startswith(GZIP):
        return content
    try:
        with gzip.GzipFile(fileobj=io.BytesIO(content)) as stream:
            whole = stream.read(limit + 1)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise CorruptFileError("the gzip stream is truncated or damaged; copy it again") from error
    if len(whole) > limit:
        raise CorruptFileError(f"the gzip stream holds over {limit >> 30} GiB; unzip it if true")
    return whole


@contextmanager
def decoding(what: str) -> Iterator[None]:
    """Turn what a decoding package raises into CorruptFileError; a ReadError passes.

    Over damaged bytes these packages raise kinds of every sort, none of them documented.
    what: the part that is damaged if so, to begin the message with.
    """
    try:
        yield
    except (ReadError, MemoryError):
        raise
    except Exception as error:
        raise CorruptFileError(f"{what} cannot be decoded; copy the file again") from error


def file_sha256(content: bytes) -> str:
    """The hex digest of one file's bytes."""
    return hashlib.sha256(content).hexdigest()


def combined_sha256(digests: Sequence[str]) -> str:
    """The `file_sha256` of an item of several files, whatever their names and order.

    Of one digest it is that digest; of more, the digest over the sorted hex digests.
    """
    if len(digests) == 1:
        return digests[0]
    return hashlib.sha256("".join(sorted(digests)).encode()).hexdigest()


class PixelDigest:
    """The hash of an image's shape (C, *axes) and stored values, whatever file they came in.

    Values are hashed before any rescale: integers as little-endian int32 (int64 where they need
    it), floats as float32 (float64 stays).
    """

    def __init__(self, shape: Sequence[int]) -> None:
        self._digest = hashlib.sha256(",".join(map(str, shape)).encode())

    def update(self, stored: NDArray) -> None:
        """Add the next values in C order."""
        self._digest.update(np.ascontiguousarray(stored, dtype=_hashed_as(stored.dtype)).data)

    def hexdigest(self) -> str:
        """The `pixel_sha256` of all values added."""
        return self._digest.hexdigest()


def pixel_sha256(stored: NDArray) -> str:
    """The digest of one array (C, *axes), as `PixelDigest`."""
    digest = PixelDigest(stored.shape)
    digest.update(stored)
    return digest.hexdigest()


def to_float32(stored: NDArray) -> NDArray[np.float32]:
    """The same values as float32.

    Raises UnsupportedFormatError where float32 cannot hold them: integers beyond 2^24, floats
    beyond 3.4e38, complex and structured values.
    """
    if stored.dtype.kind not in "biuf":
        raise UnsupportedFormatError(
            f"pixels of type {stored.dtype.name} are not supported; save real numbers, one per "
            "channel"
        )
    if stored.dtype.kind in "iu" and stored.dtype.itemsize > 2 and stored.size:
        reach = max(abs(int(stored.min())), abs(int(stored.max())))
        if reach > _EXACT:
            raise UnsupportedFormatError(
                f"integers up to {reach} do not fit into float32 exactly; rescale them below 2^24"
            )
    with np.errstate(over="ignore"):
        values = np.asarray(stored, dtype=np.float32)
    if stored.dtype.itemsize > 4 and (np.isinf(values) & np.isfinite(stored)).any():
        raise UnsupportedFormatError("values beyond 3.4e38 do not fit into float32; rescale them")
    return values


def _hashed_as(dtype: np.dtype) -> np.dtype:
    if dtype.kind == "f":
        return np.dtype("<f8" if dtype.itemsize > 4 else "<f4")
    return np.dtype("<i8" if dtype.kind in "iu" and not np.can_cast(dtype, np.int32) else "<i4")
