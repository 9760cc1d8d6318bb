"""An epoch that decodes beside one that maps what the first kept, each in a process of its own.

    python benchmarks/decode_once.py [FOLDER] [--repeats 5] [--size 256 256]

Without a folder, a CT of 300 slices of 512 x 512 is written first. Prints one JSON line: seconds of
the first epoch (which also fills the cache) and of a second one in a fresh process that touches
every value, medians over the repeats, and their ratio.
"""

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from dicom_reading import written

from medssl.data.cache import DecodedCache
from medssl.data.dataset import PreparedSamples
from medssl.data.manifest import build_manifest
from medssl.data.preprocess import Preprocessing


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", nargs="?", type=Path)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--size", type=int, nargs=2, default=[256, 256])
    parser.add_argument("--epoch-with", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.epoch_with is not None:
        print(epoch(given.folder, given.epoch_with, tuple(given.size)))
        return
    with tempfile.TemporaryDirectory() as work:
        folder = given.folder or written(Path(work, "ct"))
        first, second = [], []
        for _ in range(given.repeats):
            first.append(timed(folder, Path(work, "cache"), given.size))
            second.append(timed(folder, Path(work, "cache"), given.size))
            shutil.rmtree(Path(work, "cache"))
    one, two = statistics.median(first), statistics.median(second)
    print(json.dumps({"first_s": one, "second_s": two, "ratio": round(one / two, 1)}))


def timed(folder: Path, cache: Path, size: list[int]) -> float:
    """Seconds of an epoch, without the imports and the manifest."""
    command = [sys.executable, __file__, folder, "--epoch-with", cache, "--size", *map(str, size)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return float(done.stdout)


def epoch(folder: Path, cache: Path, size: tuple[int, int]) -> float:
    """Read and prepare every item, and add up its values."""
    manifest = build_manifest(folder)
    preprocessing = Preprocessing(size=size, intensity="percentile", channels=1)
    samples = PreparedSamples(manifest, manifest.images, preprocessing, cache=DecodedCache(cache))
    started = time.perf_counter()
    for sample in samples:
        sample.images["image"].pixels.sum().item()
    return round(time.perf_counter() - started, 4)


if __name__ == "__main__":
    main()
