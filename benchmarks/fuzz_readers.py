"""Damage files in many ways: each must end in data or a typed error, soon and in little memory.

    python benchmarks/fuzz_readers.py [--files 5000] [--seed 0] [--workers 2]

Mutants of DICOM (slices, multi-frame, cine, five packings), NIfTI, PCD, PLY, TIFF, PNG and zip
files, made from seeds. Prints one JSON line: how many were read, how many refused by which error,
and the failures: any other exception, a process that died, over 10 s, or over 2 GiB of memory. A
mutant is made again with --seed SEED --until SEED+1.
"""

import argparse
import collections
import json
import resource
import subprocess
import sys
import tempfile
import time
import traceback
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from medssl.data.synthetic.sample_files import sample_files

SECONDS = 10.0
MEMORY_KIB = 2 << 20
_BATCH = 250


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--files", type=int, default=5000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--until", type=int, help="only these seeds, a line each")
    given = parser.parse_args()
    if given.until is not None:
        for seed in range(given.seed, given.until):
            print(json.dumps(outcome(seed)), flush=True)
        return
    ends = range(given.seed, given.seed + given.files, _BATCH)
    batches = [(start, min(start + _BATCH, given.seed + given.files)) for start in ends]
    started = time.perf_counter()
    with ThreadPoolExecutor(given.workers) as pool:
        told = [one for part in pool.map(lambda ends: batch(*ends), batches) for one in part]
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


def batch(start: int, stop: int) -> list[dict[str, Any]]:
    """Outcomes of the seeds, in processes that may die: the next one goes on behind."""
    told: list[dict[str, Any]] = []
    while start < stop:
        command = [sys.executable, __file__, "--seed", str(start), "--until", str(stop)]
        limit = SECONDS * (stop - start)
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=limit)
            lines, end = done.stdout, f"the process ended with {done.returncode}"
        except subprocess.TimeoutExpired as error:
            lines, end = (error.stdout or b"").decode(), "the process hung"
        told += [json.loads(line) for line in lines.splitlines()]
        start = told[-1]["seed"] + 1 if lines else start
        if start < stop:
            told.append({"seed": start, "kind": mutant(start)[0], "failure": end})
            start += 1
    return told


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
