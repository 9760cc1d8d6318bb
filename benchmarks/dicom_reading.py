"""Reading a DICOM series, beside what pydicom alone needs to read and decode the same files.

python benchmarks/dicom_reading.py [FOLDER ...] [--repeats 5]

Without a folder, a CT of 300 slices of 512 x 512 is written first. Prints one JSON line per folder:
CPU seconds of each (the median over alternating repeats), their ratio, and the peak of memory of
the reading, in multiples of the float32 volume, in a process of its own.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pydicom
import torch

from medssl.data.image import Image
from medssl.data.modality import Modality
from medssl.data.readers.any import read_image
from medssl.data.readers.dicom_memo import forget
from medssl.data.synthetic.dicom_series import write_dicom_series

SHAPE = (300, 512, 512)


def main() -> None:
    """Measure every folder."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folders", type=Path, nargs="*")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--memory-of", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    torch.set_num_threads(1)
    if given.memory_of is not None:
        print(json.dumps(memory(given.memory_of)))
        return
    with tempfile.TemporaryDirectory() as place:
        for folder in given.folders or [written(Path(place) / "ct")]:
            print(json.dumps(measured(folder, given.repeats)), flush=True)


def written(folder: Path) -> Path:
    """A CT of noise."""
    noise = np.random.default_rng(0).integers(-1000, 2000, (1, *SHAPE)).astype(np.float32)
    affine = torch.zeros(4, 4, dtype=torch.float64)
    affine[2, 0], affine[1, 1], affine[0, 2], affine[3, 3] = 2.0, 0.5, 0.5, 1.0
    image = Image(
        pixels=torch.from_numpy(noise),
        axes="DHW",
        modality=Modality.CT,
        affine=affine,
        frame="patient",
        spacing=(2.0, 0.5, 0.5),
        units="HU",
    )
    write_dicom_series(image, folder, name="ct", syntax="uncompressed", stored="signed16")
    return folder


def measured(folder: Path, repeats: int) -> dict[str, object]:
    """Both sides in turn, so that they share what else the machine does."""
    files = [file for file in sorted(folder.rglob("*")) if file.is_file() and _is_dicom(file)]
    bare, ours, again = [], [], []
    for _ in range(repeats):
        bare.append(seconds(lambda: [pydicom.dcmread(file).pixel_array for file in files]))
        forget()
        ours.append(seconds(lambda: read_image(folder)))
        again.append(seconds(lambda: read_image(folder)))
    command = [sys.executable, __file__, "--memory-of", str(folder)]
    peak = json.loads(subprocess.run(command, capture_output=True, check=True).stdout)
    return {
        "files": len(files),
        "pydicom_s": round(statistics.median(bare), 3),
        "ours_s": round(statistics.median(ours), 3),
        "second_time_s": round(statistics.median(again), 3),
        "ratio": round(statistics.median(ours) / statistics.median(bare), 2),
        **peak,
    }


def memory(folder: Path) -> dict[str, float]:
    """Growth of the peak over the reading, against the volume's own bytes."""
    read_image_warm()
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
    before = peak_kib()
    image = read_image(folder)
    grown = 1024 * (peak_kib() - before)
    return {"peak_per_volume": round(grown / (4 * image.pixels.numel()), 2)}


def peak_kib() -> int:
    """The largest resident memory of this process (Linux)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))


def read_image_warm() -> None:
    """Import what a reading imports."""
    import pydicom.pixels  # noqa: F401


def seconds(work: Callable[[], object]) -> float:
    """CPU time of one call, all of it on one thread, so that other work does not count."""
    start = time.process_time()
    work()
    return time.process_time() - start


def _is_dicom(file: Path) -> bool:
    return file.read_bytes()[128:132] == b"DICM"


if __name__ == "__main__":
    main()
