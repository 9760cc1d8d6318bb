"""Job: a folder of images as a table."""

import json
import os
import shutil
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from medssl.data.annotations import join_table
from medssl.data.duplicates import find_duplicates
from medssl.data.layouts.parallel import Parts, find_images_in_parallel
from medssl.data.layouts.plain import folders
from medssl.data.manifest import (
    Item,
    Manifest,
    check_any,
    manifest_of,
    read_item,
    read_manifest,
    with_groups,
    with_unit,
)
from medssl.data.modality import Modality
from medssl.data.privacy import salted
from medssl.data.readers.errors import ReadError
from medssl.data.readers.points_stored import Unit
from pipelines.console import progress, say

_HASHED_TOGETHER = 32

Hashes = dict[str, dict[str, str]]
"""By item: both hashes, or "error"."""


def manifest(
    path: Path,
    out: Path,
    *,
    hash: bool = False,  # noqa: A002 the option's name
    groups: str | None = None,
    table: str | None = None,
    unit: Unit | None = None,
    workers: int | None = None,
) -> dict[str, Any]:
    """Write the table of all images under a path, which every other job takes in its place.

    Headers are read, pixels only with --hash. Started again after an interruption, it goes on where
    it stopped. The table holds paths in the column `path` alone, and nothing else that identifies
    a patient.

    Args:
        path: a folder, a file, or a manifest to add to.
        out: the table, ending in .parquet.
        hash: read every image and add `file_sha256` and `pixel_sha256`, by which the same pixels
            are found again, also re-packed or re-anonymized.
        groups: FILE:COLUMN that names the patient or part of each image.
        table: a CSV table whose column `path` finds the images, and whose columns label, split,
            category, defect, group, modality, mask and report are joined.
        unit: of the coordinates of points, xyz and depth, m or mm, which no file says; without it
            what the folder's layout says.
        workers: processes; as many as there are cores by default.
    """
    if out.suffix != ".parquet":
        raise ValueError(f"the manifest is written as .parquet, got {out.name!r}")
    workers = workers or len(os.sched_getaffinity(0))
    work = out.with_name(f"{out.name}.work")
    started = time.monotonic()
    found = _listed(path, Parts(work / "list"), workers)
    told: dict[str, Any] = {"images": len(found.images), "others": found.skipped}
    told["with_xyz"] = sum(item.role == "xyz" for item in found.items)
    root = Path(os.path.abspath(path))
    root = root if root.is_dir() else root.parent
    if groups is not None:
        found = with_groups(found, groups, root)
    if table is not None:
        found, told["joined"] = join_table(found, table, root)
    if unit is not None:
        found = with_unit(found, unit)
    failed: dict[str, str] = {}
    if hash:
        found, failed = _hashed(found, work / "hash", workers)
        told["duplicates"] = _tell_duplicates(found)
    out.parent.mkdir(parents=True, exist_ok=True)
    found.write(out)
    shutil.rmtree(work, ignore_errors=True)
    for item, reason in failed.items():
        say(f"{item}: {reason}")
    depth = f" ({told['with_xyz']} with xyz)" if told["with_xyz"] else ""
    say(f"{len(found.images)} images{depth}, {found.skipped} other files; wrote {out}")
    seconds = time.monotonic() - started
    return {"manifest": out, **told, "failed": len(failed), "seconds": seconds}


def _listed(path: Path, parts: Parts, workers: int) -> Manifest:
    """The images under a path, from headers; of a manifest, what it says."""
    if not path.exists():
        raise FileNotFoundError(f"expected a folder, an image or a manifest; there is no {path}")
    if path.suffix == ".parquet":
        found = read_manifest(path)
    else:
        root = Path(os.path.abspath(path))
        with progress(sum(map(len, folders(root))), "reading headers") as bar:
            listing = find_images_in_parallel(
                root, workers=workers, parts=parts, on_part=bar.advance
            )
        found = manifest_of(root, listing)
    check_any(found, path)
    return found


def _hashed(found: Manifest, work: Path, workers: int) -> tuple[Manifest, dict[str, str]]:
    """The manifest with the hashes of all images, and by item why an image has none."""
    waiting = [item for item in found.images if item.pixel_sha256 is None]
    hashes: Hashes = {}
    with progress(len(waiting), "hashing") as bar:
        for part in _hashed_parts(waiting, work, workers):
            hashes |= part
            bar.advance(len(part))
    items = tuple(_with_hashes(item, hashes.get(item.item, {})) for item in found.items)
    failed = {item: told["error"] for item, told in hashes.items() if "error" in told}
    return replace(found, items=items), failed


def _with_hashes(item: Item, told: dict[str, str]) -> Item:
    if "pixel_sha256" not in told:
        return item
    return replace(item, file_sha256=told["file_sha256"], pixel_sha256=told["pixel_sha256"])


def _hashed_parts(items: Sequence[Item], work: Path, workers: int) -> Iterator[Hashes]:
    """Hashes in parts, each kept in `work` until all are there."""
    work.mkdir(parents=True, exist_ok=True)
    groups = [items[i : i + _HASHED_TOGETHER] for i in range(0, len(items), _HASHED_TOGETHER)]
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        files = [work / f"{salted(json.dumps(_names(group)))}.json" for group in groups]
        running = [
            None if file.is_file() else pool.submit(_hash, list(group))
            for file, group in zip(files, groups, strict=True)
        ]
        for file, future in zip(files, running, strict=True):
            if future is None:
                yield json.loads(file.read_text())
                continue
            part = future.result()
            fresh = file.with_suffix(".fresh")
            fresh.write_text(json.dumps(part))
            fresh.replace(file)
            yield part


def _names(items: Sequence[Item]) -> list[Any]:
    """What a part of the hashes depends on: a file that has changed is hashed again."""
    return [(item.item, item.path, _changed(Path(item.path))) for item in items]


def _changed(path: Path) -> int:
    return max((entry.stat().st_mtime_ns for entry in (path, *_inside(path))), default=0)


def _inside(path: Path) -> Sequence[Path]:
    return [entry for entry in path.iterdir() if entry.is_file()] if path.is_dir() else []


def _hash(items: Sequence[Item]) -> Hashes:
    hashes: Hashes = {}
    for item in items:
        try:
            stored = replace(item, modality=Modality.UNKNOWN)  # whatever a table says of it
            provenance = read_item(stored, hashes=True).provenance
            hashes[item.item] = {name: provenance[name] for name in ("file_sha256", "pixel_sha256")}
        except ReadError as error:
            hashes[item.item] = {"error": f"{type(error).__name__}: {error}"}
    return hashes


def _tell_duplicates(found: Manifest) -> list[dict[str, Any]]:
    same = find_duplicates(found.images)
    for what, items in (
        ("on both sides of the split", [one for one in same if one.across_splits]),
        ("of different patients or parts", [one for one in same if one.across_groups]),
    ):
        if items:
            say(f"{len(items)} images are there more than once, {what}: {_first_of(items)}")
    return [asdict(one) for one in same]


def _first_of(same: Sequence[Any]) -> str:
    named = ["=".join(one.items) for one in same[:5]]
    return ", ".join(named) + (", ..." if len(same) > 5 else "")
