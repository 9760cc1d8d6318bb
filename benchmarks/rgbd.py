"""Detectors of pictures with depth on the frozen set of made-up castings, see `rgbd_set.py`.

python benchmarks/rgbd.py --weights FILE --out DIR [--methods NAME ...] [--seeds 3] [--development]

FILE: a state dict of timm's mobilenetv2_100, ImageNet. 80 normal parts fit a detector, 20 of them
for its scales; 60 normal parts and 20 with each of seven defects test it. What describes the cells
is computed once, as nothing changes it. Scores land in DIR, one file per method and seed; what is
there is not made again, so take another DIR for other weights. Prints the table of all that is
there: image AUROC, mean over seeds, with a 95 % bootstrap of parts; how far LSFA is ahead, in the
same draws; image AUROC and pixel AUROC of each defect against the normal parts. --development: the
other seeds, on which settings were chosen.
"""

import argparse
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Self, cast

import numpy as np
import torch
from detector_settings import FEATURES
from detectors import Ahead, bootstrapped, mean_of
from rgbd_set import DEFECTS, PartSet, development_set, frozen_set
from torch import Tensor, nn

from anomaly.base import Detector, NormalData
from anomaly.multimodal.adaptation import Terms
from anomaly.multimodal.colored_fpfh import ColoredFPFH
from anomaly.multimodal.crossmodal import CrossmodalMapping
from anomaly.multimodal.double_patchcore import DoublePatchCore
from anomaly.multimodal.lsfa import LSFA
from anomaly.multimodal.modalities import ColorFeatures, FeatureGrid, GeometryFeatures
from anomaly.multimodal.relief import ReliefFeatures
from medssl.data.geometry_steps import Geometry
from medssl.data.sample import Batch, Sample, collate
from medssl.metrics import auroc
from medssl.models.timm_encoder import TimmEncoder

PREPARE = replace(FEATURES, geometry=Geometry(unit="mm", plane_distance=1.0))
GRID, LAYERS = (64, 64), ["blocks.1", "blocks.2"]
BANK: dict[str, Any] = {"coreset_ratio": 0.05, "sigma": 4.0}
KINDS = [f"{defect}_{seen_in}" for defect, seen_in, _ in DEFECTS]


class Described(nn.Module):
    """The cells of all items of a set, described before.

    name: of the modality. grid, width: as of what described them.
    """

    def __init__(self, name: str, grid: list[int], width: int) -> None:
        super().__init__()
        self.name, self.grid, self.width = name, grid, width
        self.known: dict[str, FeatureGrid] = {}  # by item

    def fit(self, normal: NormalData) -> Self:
        """They are described already."""
        return self

    def forward(self, batch: Batch) -> FeatureGrid:
        found = [self.known[item] for item in batch.items]
        return FeatureGrid(
            features=torch.cat([one.features for one in found]),
            valid=torch.cat([one.valid for one in found]),
        )


def lsfa(seen: dict[str, Any], seed: int) -> Detector:
    color, geometry = seen["color"], seen["relief"]
    terms = Terms(local_alignment=10.0, global_alignment=1.0, temperature=0.2)
    return LSFA(color=color, geometry=geometry, num_heads=4, terms=terms, seed=seed, **BANK)


def crossmodal(seen: dict[str, Any], seed: int) -> Detector:
    color, geometry = seen["color"], seen["relief"]
    return CrossmodalMapping(color=color, geometry=geometry, sigma=4.0, seed=seed)


METHODS: dict[str, Callable[[dict[str, Any], int], Detector]] = {
    "LSFA, color and relief": lsfa,
    "DoublePatchCore, color and relief": lambda seen, seed: DoublePatchCore(
        color=seen["color"], geometry=seen["relief"], seed=seed, **BANK
    ),
    "DoublePatchCore, color": lambda seen, seed: DoublePatchCore(
        color=seen["color"], geometry=None, seed=seed, **BANK
    ),
    "DoublePatchCore, relief": lambda seen, seed: DoublePatchCore(
        color=None, geometry=seen["relief"], seed=seed, **BANK
    ),
    "DoublePatchCore, FPFH": lambda seen, seed: DoublePatchCore(
        color=None, geometry=seen["fpfh"], seed=seed, **BANK
    ),
    "DoublePatchCore, color and FPFH": lambda seen, seed: DoublePatchCore(
        color=seen["color"], geometry=seen["fpfh"], seed=seed, **BANK
    ),
    "ColoredFPFH (BTF)": lambda seen, seed: ColoredFPFH(
        color=seen["color"], geometry=seen["fpfh"], seed=seed, **BANK
    ),
    "CrossmodalMapping, color and relief": crossmodal,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--weights", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--development", action="store_true")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    given.out /= "development" if given.development else "frozen"
    given.out.mkdir(parents=True, exist_ok=True)
    wanted = [(name, seed) for name in given.methods for seed in range(given.seeds)]
    missing = [one for one in wanted if not _place(given.out, *one).exists()]
    if missing:
        measure(given, missing)
    print("\n".join(table(given.out, given.seeds)))


def measure(given: argparse.Namespace, missing: Sequence[tuple[str, int]]) -> None:
    parts = development_set() if given.development else frozen_set()
    normal, tested, labels = prepared(parts)
    fpfh = any("FPFH" in name for name, _ in missing)
    seen = described(given.weights, normal, [*normal, *tested], fpfh=fpfh)
    masks = torch.stack([_mask(one) for one in tested])
    measured = torch.stack([_measured(one) for one in tested])
    for name, seed in missing:
        detector = METHODS[name](seen, seed).fit(NormalData(normal)).eval()
        with torch.inference_mode():
            found = [detector.predict(collate([one])) for one in tested]
        maps = torch.cat([cast(Tensor, one.maps["image"]) for one in found])
        place = _place(given.out, name, seed)
        unfinished = place.with_suffix(".unfinished.npz")
        np.savez(
            unfinished,
            scores=torch.cat([one.score for one in found]).numpy(),
            labels=np.array(labels),
            pixels=np.array(pixel_aurocs(maps, masks, measured, labels)),
        )
        unfinished.rename(place)


def prepared(parts: PartSet) -> tuple[list[Sample], list[Sample], list[str]]:
    """Normal items, tested ones, and the kind of each of those, "" where normal."""
    tested = [(one, "") for one in parts.test]
    tested += [(one, kind) for kind in KINDS for one in parts.anomalous[kind]]
    normal = [PREPARE.sample(one) for one in (*parts.train, *parts.validation)]
    return normal, [PREPARE.sample(one) for one, _ in tested], [kind for _, kind in tested]


def described(
    weights: Path, normal: Sequence[Sample], every: Sequence[Sample], *, fpfh: bool
) -> dict[str, Any]:
    """Color, relief and, where it is asked for, FPFH of all items."""
    network = TimmEncoder("mobilenetv2_100", weights=weights)
    makers: dict[str, Any] = {
        "color": ColorFeatures(network, layers=LAYERS, grid=GRID),
        "relief": ReliefFeatures(network, layers=LAYERS, grid=GRID),
    }
    if fpfh:
        makers["fpfh"] = GeometryFeatures(grid=GRID, radius=8.0, max_neighbors=400)
    found = {}
    for name, features in makers.items():
        features.fit(NormalData(normal))
        found[name] = Described(name, features.grid, features.width)
        found[name].known = {one.item: features(collate([one])) for one in every}
    return found


def pixel_aurocs(
    maps: Tensor, masks: Tensor, measured: Tensor, labels: Sequence[str]
) -> list[float]:
    """Of each kind against the normal parts, over the pixels with both color and points.

    They are the same for all methods: one that a method says nothing of has its least value.
    """
    maps = torch.where(maps.isnan(), maps[~maps.isnan()].min(), maps)
    good = torch.tensor([not kind for kind in labels])
    found = []
    for kind in KINDS:
        rows = good | torch.tensor([one == kind for one in labels])
        known = measured[rows]
        found.append(auroc(maps[rows][known], masks[rows][known].long()))
    return found


def table(out: Path, seeds: int) -> Iterator[str]:
    scores, pixels = {}, {}
    for name in METHODS:
        paths = [_place(out, name, seed) for seed in range(seeds)]
        if all(path.exists() for path in paths):
            read = [np.load(path) for path in paths]
            scores[name] = torch.from_numpy(np.stack([one["scores"] for one in read], 1))
            pixels[name] = np.mean([one["pixels"] for one in read], 0)
            kinds = read[0]["labels"]
    labels = torch.from_numpy((kinds != "").astype(np.int64))
    groups = [str(i) for i in range(len(labels))]
    yield "| method | image AUROC | LSFA is ahead by | pixel AUROC |" + "".join(
        f" {kind.replace('_', ', ')} |" for kind in KINDS
    )
    yield "|---" * (4 + len(KINDS)) + "|"
    first = next(iter(METHODS))
    for name, own in scores.items():
        image = bootstrapped(mean_of(auroc), own, labels, groups=groups)
        ahead = "-"
        if name != first and first in scores:
            both = torch.cat([scores[first], own], dim=1)
            ahead = bootstrapped(Ahead(seeds), both, labels, groups=groups, sign="+")
        cells = []
        for kind, pixel in zip(KINDS, pixels[name], strict=True):
            rows = torch.from_numpy((kinds == "") | (kinds == kind))
            cells.append(f"{mean_of(auroc)(own[rows], labels[rows]):.2f} / {pixel:.2f}")
        yield f"| {name} | {image} | {ahead} | {pixels[name].mean():.3f} | {' | '.join(cells)} |"


def _place(out: Path, name: str, seed: int) -> Path:
    return out / f"{name}.{seed}.npz"


def _measured(sample: Sample) -> Tensor:
    """Where there are color and points: (H, W) bool."""
    found = torch.ones(sample.images["image"].spatial_shape, dtype=torch.bool)
    for image in sample.images.values():
        if image.valid is not None:
            found &= image.valid
    return found


def _mask(sample: Sample) -> Tensor:
    image = sample.images["image"]
    if sample.mask is None:
        return torch.zeros(image.spatial_shape, dtype=torch.bool)
    return sample.mask.pixels[0] > 0.5


if __name__ == "__main__":
    main()
