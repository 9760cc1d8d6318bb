"""Which detector finds defects on free clouds: object and point AUROC, and seconds per cloud.

python benchmarks/clouds.py DATA [--methods NAME ...]

DATA is a folder in the layout of Real3D-AD or Anomaly-ShapeNet. Each category has a detector of its
own, fitted on its train clouds with default settings; one thread. Point AUROC is over all points of
a category's test clouds, pooled; a normal cloud has no labelled point. "mean" is that of the
categories. Intervals are 95 %, from draws of test clouds, all metrics in the same draws. Seconds
are processor time of `predict` per cloud.
"""

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from anomaly.base import Detector, NormalData
from anomaly.points.descriptors import LocalShape, Place, RegisteredPlace
from anomaly.points.point_banks import PointBanks
from anomaly.points.registered_surface import RegisteredSurface
from medssl.data.manifest import Manifest, build_manifest, load_sample
from medssl.data.sample import collate
from medssl.metrics import Interval, auroc_of_draws, intervals

DRAWS = 500
METHODS: dict[str, Callable[[], Detector]] = {
    "RegisteredSurface": RegisteredSurface,
    "PointBanks, FPFH and registered xyz": lambda: PointBanks(
        descriptors=[LocalShape(), RegisteredPlace()]
    ),
    "PointBanks, registered xyz": lambda: PointBanks(descriptors=[RegisteredPlace()]),
    "PointBanks, FPFH": lambda: PointBanks(descriptors=[LocalShape()]),
    "PointBanks, xyz as it comes": lambda: PointBanks(descriptors=[Place()]),
}


@dataclass(frozen=True, kw_only=True, eq=False)
class Scored:
    """The test clouds of one category.

    scores, labels: (S,). points, marked: (P,) of all their points; owner: (P,) which cloud's.
    defects: (S,) the kind of each, "" where normal.
    """

    scores: Tensor
    labels: Tensor
    points: Tensor
    marked: Tensor
    owner: Tensor
    defects: list[str]
    fit_s: float
    cloud_s: float

    def metrics(self, counts: Tensor) -> Tensor:
        """Object and point AUROC (R, 2) of draws (R, S)."""
        per_object = auroc_of_draws(self.scores, self.labels, counts)
        per_point = auroc_of_draws(self.points, self.marked, counts[:, self.owner])
        return torch.stack([per_object, per_point], dim=1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", type=Path)
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS))
    given = parser.parse_args()
    torch.set_num_threads(1)
    manifest = build_manifest(given.data)
    categories = sorted({str(item.category) for item in manifest.images})
    heads = [*categories, "mean"]
    print(f"| method | AUROC | {' | '.join(heads)} | fit s | s per cloud |")
    print("|---|---|" + "---|" * (len(heads) + 2), flush=True)
    kinds = []
    for name in given.methods:
        parts = [
            scored(METHODS[name](), manifest.where(category=category)) for category in categories
        ]
        print("\n".join(rows(name, parts)), flush=True)
        kinds.append(by_defect(name, parts))
    print("\n| method | " + " | ".join(defects_of(parts)) + " |")
    print("|---|" + "---|" * len(defects_of(parts)))
    print("\n".join(kinds))


def scored(detector: Detector, manifest: Manifest) -> Scored:
    """Fit on the train clouds of a category and score its test clouds."""
    train = [load_sample(manifest, item) for item in manifest.where(split="train").images]
    items = manifest.where(split="test").images
    start = time.process_time()
    detector.eval().fit(NormalData(train))
    fit_s = time.process_time() - start
    scores, points, marked, seconds = [], [], [], 0.0
    for item in items:
        sample = load_sample(manifest, item)
        batch = collate([sample])
        start = time.process_time()
        found = detector.predict(batch)
        seconds += time.process_time() - start
        values = found.maps["points"][0]
        known = ~values.isnan()
        label = sample.point_labels
        label = torch.zeros_like(known) if label is None else label
        scores.append(found.score[0])
        points.append(values[known])
        marked.append(label[known])
    sizes = torch.tensor([len(values) for values in points])
    return Scored(
        scores=torch.stack(scores),
        labels=torch.tensor([item.label for item in items]),
        points=torch.cat(points),
        marked=torch.cat(marked).long(),
        owner=torch.arange(len(items)).repeat_interleave(sizes),
        defects=[item.defect or "" for item in items],
        fit_s=fit_s,
        cloud_s=seconds / len(items),
    )


def rows(name: str, parts: list[Scored]) -> list[str]:
    """The two lines of a method: object and point AUROC of each category, and their means."""
    sizes = [len(part.scores) for part in parts]

    def draw(counts: Tensor) -> Tensor:
        each = torch.stack(
            [
                part.metrics(own)
                for part, own in zip(parts, counts.split(sizes, dim=1), strict=True)
            ],
            dim=1,
        )  # (R, categories, 2)
        return torch.cat([each, each.mean(1, keepdim=True)], dim=1).flatten(1)

    whole = draw(torch.ones(1, sum(sizes), dtype=torch.int64))[0].tolist()
    values = {str(place): value for place, value in enumerate(whole)}
    found = intervals(values, draw, groups=[None] * sum(sizes), repeats=DRAWS, seed=0)
    told = list(found.values())
    fit_s = sum(part.fit_s for part in parts) / len(parts)
    cloud_s = sum(part.cloud_s for part in parts) / len(parts)
    return [
        f"| {name} | object | {line(told[0::2])} | {fit_s:.1f} | {cloud_s:.2f} |",
        f"| | point | {line(told[1::2])} | | |",
    ]


def line(told: list[Interval]) -> str:
    return " | ".join(f"{one.value:.3f} ({one.low:.3f} to {one.high:.3f})" for one in told)


def defects_of(parts: list[Scored]) -> list[str]:
    return sorted({defect for part in parts for defect in part.defects if defect})


def by_defect(name: str, parts: list[Scored]) -> str:
    """Object and point AUROC of each defect against the normal clouds, mean of the categories."""
    cells = []
    for defect in defects_of(parts):
        each = []
        for part in parts:
            kept = torch.tensor([[one in ("", defect) for one in part.defects]])
            each.append(part.metrics(kept.long())[0])
        mean = torch.stack(each).mean(0).tolist()
        cells.append(f"{mean[0]:.3f}, {mean[1]:.3f}")
    return f"| {name} | {' | '.join(cells)} |"


if __name__ == "__main__":
    main()
