"""Listing a large folder: headers read by several processes, and finished folders not again."""

import json
import multiprocessing
import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any

from medssl.data.layouts.plain import Entry, Listing, folders, joined, list_folder
from medssl.data.modality import Modality
from medssl.data.privacy import salted
from medssl.data.readers.dicom_memo import Frames, Key, headers_of_files, remember

_PART_FILES = 1000  # folders are listed together up to so many files
_SLICE_FILES = 250  # that one process reads at a time
_AHEAD = 4  # parts whose headers are being read before they are planned

_Files = Sequence[Sequence[Path]]


@dataclass(frozen=True, slots=True)
class Parts:
    """Listings of folders as files, so that an interrupted listing goes on where it stopped.

    A part is named by a salted hash of the names, sizes and times of its files, so that a folder
    that has changed since is listed again.
    """

    folder: Path

    def load(self, name: str, root: Path) -> Listing | None:
        """A finished part, or None."""
        file = self.folder / f"{name}.json"
        if not file.is_file():
            return None
        part = json.loads(file.read_text())
        entries = tuple(_entry(row, root) for row in part["entries"])
        return Listing(entries=entries, skipped=part["skipped"])

    def save(self, name: str, listing: Listing) -> None:
        """Write a part whole or not at all."""
        self.folder.mkdir(parents=True, exist_ok=True)
        content = {"entries": [_row(e) for e in listing.entries], "skipped": listing.skipped}
        fresh = self.folder / f".{name}.{os.getpid()}"
        fresh.write_text(json.dumps(content))
        fresh.replace(self.folder / f"{name}.json")


def find_images_in_parallel(
    path: Path, *, workers: int, parts: Parts, on_part: Callable[[int], None]
) -> Listing:
    """As `plain.find_images`, with `workers` processes.

    on_part: called with the number of files of each part that is done.
    """
    root = path if path.is_dir() else path.parent
    listings = []
    context = multiprocessing.get_context("spawn")  # a fork would share torch's threads
    with ProcessPoolExecutor(workers, mp_context=context) as pool:
        for files, name, found, reading in _read_ahead(pool, path, root, parts):
            if found is None:
                for headers in reading:
                    remember(headers.result())
                found = joined(list_folder(folder, root) for folder in files)
                parts.save(name, found)
            listings.append(found)
            on_part(sum(map(len, files)))
    return joined(listings)


def _read_ahead(
    pool: ProcessPoolExecutor, path: Path, root: Path, parts: Parts
) -> Iterator[tuple[_Files, str, Listing | None, list[Future[dict[Key, Frames]]]]]:
    """Each part with its finished listing, or with its headers on their way."""
    waiting: deque[Any] = deque()
    for files in _in_parts(path):
        name = _name(files, root)
        found = parts.load(name, root)
        flat = [file for folder in files for file in folder] if found is None else []
        slices = [flat[i : i + _SLICE_FILES] for i in range(0, len(flat), _SLICE_FILES)]
        reading = [pool.submit(headers_of_files, piece) for piece in slices]
        waiting.append((files, name, found, reading))
        if len(waiting) > _AHEAD:
            yield waiting.popleft()
    yield from waiting


def _in_parts(path: Path) -> Iterator[list[list[Path]]]:
    part: list[list[Path]] = []
    for files in folders(path):
        part.append(files)
        if sum(map(len, part)) >= _PART_FILES:
            yield part
            part = []
    if part:
        yield part


def _name(part: _Files, root: Path) -> str:
    """Of what lies in the folders, without telling it."""
    told = []
    for files in part:
        for file in files:
            state = file.lstat()
            told.append((str(file.relative_to(root)), state.st_size, state.st_mtime_ns))
    return salted(json.dumps([str(root), *told]), length=32)


def _row(entry: Entry) -> dict[str, Any]:
    row = asdict(replace(entry, volume=None))
    del row["volume"]
    return {**row, "path": str(entry.path), "relative": str(entry.relative)}


def _entry(row: dict[str, Any], root: Path) -> Entry:
    relative = PurePosixPath(row.pop("relative"))
    path, modality = Path(row.pop("path")), Modality(row.pop("modality"))
    return Entry(path=path, relative=relative, modality=modality, **row)
