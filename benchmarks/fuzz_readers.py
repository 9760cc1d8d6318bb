"""Damage files in many ways: each must end in data or a typed error, soon and in little memory.

    python benchmarks/fuzz_readers.py [--files 5000] [--seed 0] [--workers 2]

Mutants of DICOM (slices, multi-frame, cine, five packings), NIfTI, PCD, PLY, TIFF, PNG and zip
files, made from seeds. Prints one JSON line: how many were read, how many refused by which error,
and the failures: any other exception, a process that died, over 10 s, or over 2 GiB of memory. A
mutant is made again with --only SEED.
"""

import argparse
import collections
import json
import multiprocessing
import resource
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import Any

import numpy as np

from medssl.data.synthetic.sample_files import sample_files

SECONDS = 10.0
MEMORY_KIB = 2 << 20
_BATCH = 50


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--files", type=int, default=5000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--only", type=int)
    given = parser.parse_args()
    if given.only is not None:
        print(json.dumps(outcome(given.only)))
        return
    seeds = range(given.seed, given.seed + given.files)
    batches = [list(seeds[i : i + _BATCH]) for i in range(0, len(seeds), _BATCH)]
    told: list[dict[str, Any]] = []
    started = time.perf_counter()
    with multiprocessing.get_context("spawn").Pool(given.workers) as pool:
        pending = [(batch, pool.apply_async(outcomes, (batch,))) for batch in batches]
        for batch, result in pending:
            try:
                told += result.get(timeout=SECONDS * _BATCH)
            except multiprocessing.TimeoutError:
                told.append({"seed": batch[0], "failure": "a process died or hung in this batch"})
    refused = collections.Counter(one["refused"] for one in told if "refused" in one)
    print(
        json.dumps(
            {
                "files": len(told),
                "read": sum("read" in one for one in told),
                "refused": dict(refused.most_common()),
                "failures": [one for one in told if "failure" in one],
                "slowest_s": max(one.get("seconds", 0) for one in told),
                "largest_growth_mib": max(one.get("grown_kib", 0) for one in told) // 1024,
                "seconds": round(time.perf_counter() - started),
            }
        )
    )


def outcomes(seeds: list[int]) -> list[dict[str, Any]]:
    """In one process, one after the other."""
    return [outcome(seed) for seed in seeds]


def outcome(seed: int) -> dict[str, Any]:
    """What became of the mutant of a seed."""
    from medssl.data.manifest import Item, Manifest, load_sample
    from medssl.data.readers.any import sniff
    from medssl.data.readers.dicom_memo import forget
    from medssl.data.readers.errors import ReadError

    name, content = mutant(seed)
    told: dict[str, Any] = {"seed": seed, "kind": name}
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, name)
        file.write_bytes(content)
        forget()
        try:
            kind = sniff(file)
            if kind is None:
                told["refused"] = "unknown kind"
            else:
                item = Item(item="i", path=str(file), kind=kind)
                load_sample(Manifest(items=(item,), key=""), item, hashes=True)
                told["read"] = True
        except ReadError as error:
            told["refused"] = type(error).__name__
        except Exception:
            told["failure"] = traceback.format_exc(limit=-3)
    told["seconds"] = round(time.perf_counter() - started, 3)
    told["grown_kib"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    if told["seconds"] > SECONDS:
        told["failure"] = "too slow"
    if told["grown_kib"] > MEMORY_KIB:
        told["failure"] = "too much memory"
    return told


def mutant(seed: int) -> tuple[str, bytes]:
    """A file name and the damaged content."""
    rng = np.random.default_rng(seed)
    files = sample_files()
    names = sorted(files)
    name = names[int(rng.integers(len(names)))]
    content = bytearray(files[name])
    for _ in range(int(rng.integers(1, 5))):
        damage(content, rng)
    return name, bytes(content)


def damage(content: bytearray, rng: np.random.Generator) -> None:
    """One change in place, mostly near the beginning, where the headers are."""
    size = len(content)
    if size < 8:
        return
    reach = size if rng.random() < 0.5 else min(size, 1024)
    at = int(rng.integers(reach - 4))
    length = int(rng.integers(1, min(64, size - at)))
    match int(rng.integers(8)):
        case 0:
            content[at] ^= 1 << int(rng.integers(8))
        case 1:
            content[at] = int(rng.integers(256))
        case 2:
            content[at : at + 4] = b"\xff\xff\xff\xff"
        case 3:
            content[at : at + 4] = rng.integers(0, 256, 4, dtype=np.uint8).tobytes()
        case 4:
            del content[at : at + length]
        case 5:
            content[at:at] = content[at : at + length]
        case 6:
            del content[at:]
        case _:
            content[at : at + length] = bytes(length)


if __name__ == "__main__":
    sys.exit(main())
