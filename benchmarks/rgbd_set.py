"""The frozen RGB-D test set of made-up castings, and its development twin on other seeds.

python benchmarks/rgbd_set.py [--picture OUT.png] [--folder DIR]

60 normal parts to train on, 20 to calibrate with, 60 to test on, and 20 with each of seven defects,
128 x 128 at 0.78 mm per pixel. Prints per kind the median and the 10 and 90 % points of what the
defects changed, measured between each part and the same part without its defect: area of the mask
in pixels, largest change of depth in mm and of color in grey levels, and the index below.
--picture writes a sheet of picture, depth and mask; --folder writes the set in the layout of MVTec
3D-AD.

How the difficulty was chosen: by contrast over noise, and no detector was run. An observer who
knows the defect, its place and the part without it has the index d = sqrt(sum of (change / noise)^2
over the pixels); at d = 3 he is right in 98 % of pairs of a defect and a normal part. Noise is
0.075 mm (the sensor's is 0.05 to 0.1) and 8 grey levels (grain, brush marks and camera). The
shallowest and smallest dent, 0.15 mm deep and 3.5 mm in radius, changes some 50 pixels by 0.07 mm
in the root mean square, d = 6; the faintest and smallest stain, 6 levels on 40 pixels, d = 3. So
nothing is impossible. What makes it hard is what that observer is spared: castings differ by waves
of 0.05 to 0.13 mm, lie turned and tilted under another light, are mottled by 2 to 4 levels over
the size of a stain, and lose pixels at walls; and no threshold on depth or color helps, as the
casting itself has steps of 2.6 to 9 mm and of 100 levels. Contrasts are log-uniform: as many dents
lie between 0.15 and 0.47 mm as between 0.47 and 1.5. Missing material is the easy kind, d > 20.

Detectors are tuned on `development_set`; `frozen_set` is for the final table.
"""

import argparse
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image as Pillow

from medssl.data.sample import Sample
from medssl.data.synthetic.rgbd_defects import Defect, SeenIn
from medssl.data.synthetic.rgbd_part import rgbd_part, write_mvtec_3d

TRAIN_SEEDS = range(710_000, 710_060)
VALIDATION_SEEDS = range(720_000, 720_020)
TEST_SEEDS = range(730_000, 730_060)
DEFECTS: tuple[tuple[Defect, SeenIn, range], ...] = (
    ("dent", "depth", range(740_000, 740_020)),
    ("bump", "depth", range(741_000, 741_020)),
    ("scratch", "color", range(742_000, 742_020)),
    ("scratch", "depth", range(743_000, 743_020)),
    ("scratch", "both", range(744_000, 744_020)),
    ("stain", "color", range(745_000, 745_020)),
    ("missing", "both", range(746_000, 746_020)),
)
DEVELOPMENT = 100_000
"""Added to each seed of the frozen set, it gives the seed of the development set."""

SIZE = (128, 128)
NOISE_MM, GRAIN_LEVELS = 0.075, 8.0
SHEET_COLUMNS = 4


@dataclass(frozen=True, kw_only=True)
class PartSet:
    """anomalous: by kind, as "dent_depth"."""

    train: list[Sample]
    validation: list[Sample]
    test: list[Sample]
    anomalous: Mapping[str, list[Sample]]


def frozen_set() -> PartSet:
    return _part_set(0)


def development_set() -> PartSet:
    return _part_set(DEVELOPMENT)


def _part_set(offset: int) -> PartSet:
    return PartSet(
        train=[rgbd_part(offset + seed, size=SIZE) for seed in TRAIN_SEEDS],
        validation=[rgbd_part(offset + seed, size=SIZE) for seed in VALIDATION_SEEDS],
        test=[rgbd_part(offset + seed, size=SIZE) for seed in TEST_SEEDS],
        anomalous={
            f"{defect}_{seen_in}": [
                rgbd_part(offset + seed, defect=defect, seen_in=seen_in, size=SIZE)
                for seed in seeds
            ]
            for defect, seen_in, seeds in DEFECTS
        },
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--picture", type=Path)
    parser.add_argument("--folder", type=Path)
    given = parser.parse_args()
    parts = frozen_set()
    print("\n".join(table(parts)))
    if given.picture:
        sheet(parts).save(given.picture)
    if given.folder:
        write_mvtec_3d(
            given.folder,
            train=parts.train,
            validation=parts.validation,
            test=parts.test,
            anomalous=parts.anomalous,
        )


def table(parts: PartSet) -> Iterator[str]:
    yield "median (10 % .. 90 %)"
    names = ("area, px", "depth, mm", "color, levels", "index, depth", "index, color")
    yield f"{'kind':14}" + "".join(f"{name:>24}" for name in names)
    for (_, _, seeds), (kind, samples) in zip(DEFECTS, parts.anomalous.items(), strict=True):
        found = np.array(
            [
                measured(sample, rgbd_part(seed, size=SIZE))
                for seed, sample in zip(seeds, samples, strict=True)
            ]
        )
        low, middle, high = np.quantile(found, (0.1, 0.5, 0.9), axis=0)
        cells = (f"{b:.3g} ({a:.3g} .. {c:.3g})" for a, b, c in zip(low, middle, high, strict=True))
        yield f"{kind:14}" + "".join(f"{cell:>24}" for cell in cells)


def measured(sample: Sample, twin: Sample) -> tuple[float, float, float, float, float]:
    """Area, largest change of depth and color, and the indices of both.

    Noise is the same in the twin, so the difference is the defect's, but for the picture's rounding
    to whole levels.
    """
    assert sample.mask is not None
    depth, color = changes(sample, twin)
    return (
        float(sample.mask.pixels.sum()),
        float(depth.max()),
        float(color.max()),
        float(np.sqrt((depth**2).sum()) / NOISE_MM),
        float(np.sqrt((color**2).sum()) / GRAIN_LEVELS),
    )


def changes(sample: Sample, twin: Sample) -> tuple[NDArray, NDArray]:
    """(H, W) |change| of depth in mm where both are measured, and of the mean channel in levels."""
    both = [one.images["xyz"] for one in (sample, twin)]
    pictures = [one.images["image"].pixels.double() for one in (sample, twin)]
    depth = (both[0].pixels[2].double() - both[1].pixels[2].double()).abs()
    known = both[0].pixels[2].ne(0) & both[1].pixels[2].ne(0)
    return (depth * known).numpy(), (pictures[0] - pictures[1]).mean(0).abs().numpy()


def sheet(parts: PartSet) -> Pillow.Image:
    """A row of parts per kind, the normal ones of the test first."""
    kinds = [parts.test, *parts.anomalous.values()]
    rows = [np.concatenate([tile(one) for one in kind[:SHEET_COLUMNS]], 1) for kind in kinds]
    return Pillow.fromarray(np.concatenate(rows))


def tile(sample: Sample) -> NDArray[np.uint8]:
    """Picture, depth and mask side by side, (H, 3 W, 3)."""
    picture = sample.images["image"].pixels.permute(1, 2, 0).numpy().astype(np.uint8)
    xyz = sample.images["xyz"].pixels.numpy()
    mask = np.zeros(SIZE) if sample.mask is None else sample.mask.pixels[0].numpy()
    grey = [relief(xyz), 255 * mask]
    return np.concatenate(
        [picture, *(np.repeat(one[..., None].astype(np.uint8), 3, 2) for one in grey)], 1
    )


def relief(xyz: NDArray) -> NDArray:
    """(H, W) 0 to 255: height over the table, from its plane through the border; missing is 0."""
    known = xyz[2] != 0
    border = known.copy()
    border[10:-10, 10:-10] = False
    equations = np.stack([xyz[0], xyz[1], np.ones_like(xyz[0])], -1)
    plane = np.linalg.lstsq(equations[border], xyz[2][border], rcond=None)[0]
    height = equations @ plane - xyz[2]
    return np.where(known, np.clip(40 + 19 * height, 10, 255), 0)


if __name__ == "__main__":
    main()
