"""Zip and tar archives, unpacked for as long as they are read; nothing in them is trusted."""

import tarfile
import tempfile
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from medssl.data.readers.errors import CorruptFileError, ReadError, UnsupportedFormatError

_ZIP = (b"PK\x03\x04", b"PK\x05\x06")
_GZIP = b"\x1f\x8b"
_MAX_MEMBERS = 1_000_000
_MAX_BYTES = 64 << 30
_MAX_RATIO = 200  # of unpacked to packed bytes; lossless images reach 20, all-zero ones a thousand
_FREE_BYTES = 1 << 30  # below this, no ratio is suspicious
_BLOCK = 1 << 20


def is_archive(start: bytes) -> bool:
    """Whether bytes begin a zip, or (unzipped, 262 of them) a tar."""
    return start.startswith(_ZIP) or start[257:262] == b"ustar"


def members(path: Path) -> Iterator[IO[bytes]]:
    """The files in an archive, one open stream after the other; folders and links are left out.

    Raises CorruptFileError, and UnsupportedFormatError for encrypted members.
    """
    with unpacking():
        if zipfile.is_zipfile(path):
            yield from _of_zip(path)
        else:
            yield from _of_tar(path)


@contextmanager
def unpacking() -> Iterator[None]:
    """Turn what unpacking raises into ReadErrors, also where a member's stream is read."""
    try:
        yield
    except (zipfile.BadZipFile, tarfile.TarError, zlib.error, EOFError, NotImplementedError) as e:
        raise CorruptFileError("the archive is damaged or incomplete; copy it again") from e
    except OSError as error:
        raise ReadError(f"the archive cannot be read: {error.strerror or 'damaged'}") from None


@contextmanager
def unpacked(path: Path) -> Iterator[Path]:
    """A private temporary folder with the files of an archive, removed afterwards.

    Files are numbered: the names in the archive are never used, so that none can lead out of the
    folder. Archives within are not opened.
    Raises what `members` raises, and CorruptFileError for over a million members, over 64 GiB, or
    more than 1 GiB out of less than a 200th of it.
    """
    allowed = min(_MAX_BYTES, max(_FREE_BYTES, _MAX_RATIO * path.stat().st_size))
    with tempfile.TemporaryDirectory(prefix="medssl-") as folder:
        with unpacking():
            for index, stream in enumerate(members(path)):
                if index >= _MAX_MEMBERS:
                    raise CorruptFileError(f"the archive has over {_MAX_MEMBERS} files; unpack it")
                with Path(folder, f"{index:06}").open("wb") as file:
                    allowed -= _copied(stream, file, allowed)
        yield Path(folder)


def _copied(source: IO[bytes], target: IO[bytes], allowed: int) -> int:
    """Bytes copied; what a member announces does not count."""
    copied = 0
    while block := source.read(_BLOCK):
        copied += len(block)
        if copied > allowed:
            raise CorruptFileError(
                "the archive unpacks to far more than images would; if that is true, unpack it"
            )
        target.write(block)
    return copied


def _of_zip(path: Path) -> Iterator[IO[bytes]]:
    with zipfile.ZipFile(path) as archive:
        for member in archive.infolist():
            if member.flag_bits & 1:
                raise UnsupportedFormatError("the archive is encrypted; unpack it first")
            if not member.is_dir():
                with archive.open(member) as stream:
                    yield stream


def _of_tar(path: Path) -> Iterator[IO[bytes]]:
    with tarfile.open(path, "r|*") as archive:  # as a stream: members in order, read once
        for member in archive:
            stream = archive.extractfile(member) if member.isreg() else None
            if stream is not None:
                yield stream
