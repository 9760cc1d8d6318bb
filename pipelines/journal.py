"""Long work in a folder, cut into parts: each is written down whole or done again whole."""

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout


class Journal:
    """The finished parts of one piece of work, as files beside its results.

    A part appears under its name only when it is complete, so a process killed at any moment
    leaves finished parts and nothing else that is ever read.

    folder: of the journal; made where there is none.
    header: what the parts depend on; work begun with another header is not continued.
    Raises ValueError where the folder holds work with another header.
    """

    def __init__(self, folder: Path, header: Mapping[str, Any]) -> None:
        self.folder = folder
        found = read_header(folder)
        if found is None:
            folder.mkdir(parents=True, exist_ok=True)
            write_whole(folder / "header.json", json.dumps(header, indent=1))
        elif found != header:
            raise ValueError(_difference(found, header))

    def has(self, part: int) -> bool:
        """Whether a part is finished."""
        return self._file(part).is_file()

    def read(self, part: int) -> list[dict[str, Any]]:
        """The rows of a finished part, bit for bit as they were written."""
        return json.loads(self._file(part).read_text())

    def write(self, part: int, rows: Sequence[Mapping[str, Any]]) -> None:
        """Finish a part; whatever its rows name must be on disk already."""
        write_whole(self._file(part), json.dumps(list(rows), allow_nan=False))

    def _file(self, part: int) -> Path:
        return self.folder / f"part-{part:06d}.json"


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Keep other processes out of a folder of results while the block runs.

    Raises ValueError at once where another process is at work there.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / ".lock", timeout=0)
    try:
        lock.acquire()
    except Timeout as error:
        raise ValueError(
            "another process is writing into this output folder; wait until it is done, or choose "
            "another --out"
        ) from error
    try:
        yield
    finally:
        lock.release()


def read_header(folder: Path) -> dict[str, Any] | None:
    """What the work journalled in `folder` depends on; None where there is no journal."""
    file = folder / "header.json"
    return json.loads(file.read_text()) if file.is_file() else None


def write_whole(file: Path, content: str | bytes) -> None:
    """Write a file so that nobody ever sees half of it, not even after a power cut.

    One process at a time; see `alone`.
    """
    fresh = file.with_name(f".{file.name}.part")
    data = content.encode() if isinstance(content, str) else content
    with fresh.open("wb") as stream:
        stream.write(data)
        stream.flush()
        os.fsync(stream.fileno())
    os.replace(fresh, file)


def _difference(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> str:
    names = [name for name in {**found, **wanted} if found.get(name) != wanted.get(name)]
    told = ", ".join(f"{name} {found.get(name)} (now {wanted.get(name)})" for name in names)
    return (
        f"the output folder holds work with another {told}; choose another --out, or remove the "
        "folder to begin anew"
    )
