"""Crossmodal feature mapping (Costanzino et al., CVPR 2024, https://arxiv.org/abs/2312.04521)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from anomaly.base import AnomalyMap, NormalData
from anomaly.examples import relief_pictures
from anomaly.learning import LearnedDetector, Trial
from anomaly.maps import outside_is_nan
from anomaly.multimodal.modalities import (
    ColorFeatures,
    FeatureGrid,
    cell_maps,
    example_features,
    has_color,
    has_geometry,
    noise_shape,
    rgbd_noise,
    same_grid,
    valid_pixels,
)
from anomaly.multimodal.relief import Geometry
from anomaly.selection import Selection
from anomaly.valid import largest
from medssl.data.image import Image, pixel_affine
from medssl.data.modality import Modality
from medssl.data.sample import Batch, Sample
from medssl.training import Trainable, TrainingPlan

_PLAN = TrainingPlan(
    total_samples=12_500,  # 50 epochs of 250 items
    batch_size=4,
    learning_rate=1e-3,
    weight_decay=(0.0, 0.0),
)


class CrossmodalMapping(LearnedDetector):
    """How far what one modality says of a cell is from what the other makes one expect.

    Two small networks learn on normal items to give a cell's color features from its geometry and
    its geometry from its color. A cell's distance is the product of the two Euclidean distances
    between its own features and the expected ones, all brought to length 1, so it is large where
    both are unexpected, and at most 4.

    Both modalities are needed: an item without one is an error, and a pixel where one of them was
    not measured is NaN.

    color, geometry: what describes the cells, on one grid; both stay frozen.
    sigma: of the Gaussian on the map, in pixels.
    plan, selection, seed: as of `LearnedDetector`; without a plan, the authors' 50 epochs (of 250
        items), batch and learning rate.
    The score is the largest value of the map.
    Differs from the paper: FPFH or a relief takes the place of Point-MAE unless `geometry` has a
    descriptor; the networks see features divided by their root mean square over the normal cells,
    as those of FPFH are large; AdamW with a cosine of the learning rate, not Adam with a constant
    one; a Gaussian, not the repeated boxes that approximate one. The authors' code divides each map
    by its mean and each score by the root of the map's mean, so that they do not grow with an
    anomaly that covers the item; we do not.
    """

    unbounded = False

    def __init__(
        self,
        *,
        color: ColorFeatures,
        geometry: Geometry,
        sigma: float = 4.0,
        plan: TrainingPlan | None = None,
        selection: Selection | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(plan=_PLAN if plan is None else plan, selection=selection, seed=seed)
        same_grid(color, geometry)
        self.color, self.geometry, self.sigma = color, geometry, sigma
        self.trainable: Mappings = self.new_trainable()

    def new_trainable(self) -> "Mappings":
        """As of `LearnedDetector`."""
        return Mappings(self.color.width, self.geometry.width)

    def train(self, mode: bool = True) -> Self:
        """The encoder and the descriptor stay in evaluation mode."""
        super().train(mode)
        self.color.eval()
        self.geometry.eval()
        return self

    def fit(self, normal: NormalData, *, workdir: Path | None = None) -> Self:
        """As of `LearnedDetector`. Raises ValueError where an item has not both modalities."""
        self.color.fit(normal)
        self.geometry.fit(normal)
        return super().fit(normal, workdir=workdir)

    def _train(self, normal: NormalData, workdir: Path, trial: Trial | None) -> None:
        """On the features of the items, each described once, since nothing changes them."""
        described: list[Sample] = []
        with torch.no_grad():
            for batch in normal.batches():
                described += self._described(batch)
        super()._train(NormalData(described, workers=normal.workers), workdir, trial)

    def _described(self, batch: Batch) -> list[Sample]:
        """The items with features in place of pixels."""
        color, geometry = self._both(batch)
        valid = color.valid & geometry.valid
        return [
            Sample(
                item=item,
                images={
                    "color": _as_image(color.features[i], valid[i]),
                    "geometry": _as_image(geometry.features[i], valid[i]),
                },
                group=batch.groups[i],
                study=batch.studies[i],
            )
            for i, item in enumerate(batch.items)
        ]

    @torch.no_grad()
    def predict(self, batch: Batch) -> AnomalyMap:
        """Scores and maps; an item no pixel of which is valid in both scores NaN.

        Raises ValueError for an item without color or without geometry.
        """
        self.check_fitted()
        color, geometry = self._both(batch)
        both = color.valid & geometry.valid
        away = self.trainable.distances(color.features, geometry.features)
        product = outside_is_nan(away[0] * away[1], both)
        valid = valid_pixels(batch, "color") & valid_pixels(batch, "geometry")
        maps = cell_maps(product, batch, valid.to(product.device), sigma=self.sigma)
        return AnomalyMap(score=largest(maps), maps={"image": maps})

    def selftest_shape(self, image: Sequence[int]) -> tuple[int, ...]:
        """The channels of a picture and a relief."""
        return noise_shape(self.color, image)

    def selftest(self, noise: Tensor) -> Tensor:
        """As of `Detector`, with points at the distance that was normal."""
        return self.predict(rgbd_noise(noise, self.geometry.spacing)).score

    def _both(self, batch: Batch) -> tuple[FeatureGrid, FeatureGrid]:
        lacking = (~(has_color(batch) & has_geometry(batch))).tolist()
        if any(lacking):
            named = ", ".join(item for item, one in zip(batch.items, lacking, strict=True) if one)
            raise ValueError(
                "CrossmodalMapping compares color and geometry and needs both, a picture and an "
                f"xyz image beside it; one of them is missing in {named}. DoublePatchCore and "
                "ColoredFPFH score items with one of them"
            )
        return self.color(batch), self.geometry(batch)

    @classmethod
    def example(cls) -> tuple[Self, list[Sample]]:
        """A random residual network, FPFH of a few hundred points, and a few steps."""
        color, geometry = example_features()
        plan = TrainingPlan(
            total_samples=40, batch_size=4, learning_rate=1e-3, weight_decay=(0.0, 0.0)
        )
        return cls(color=color, geometry=geometry, plan=plan), relief_pictures()


@dataclass(frozen=True, slots=True)
class _Features:
    """The views of items whose pixels are features."""

    def __call__(self, sample: Sample, generator: torch.Generator) -> dict[str, Tensor]:
        """Returns "color" and "geometry" (h, w, E), and "valid" (h, w) bool."""
        color, geometry = sample.images["color"], sample.images["geometry"]
        assert color.valid is not None
        return {
            "color": color.pixels.movedim(0, -1),
            "geometry": geometry.pixels.movedim(0, -1),
            "valid": color.valid,
        }


class Mappings(Trainable):
    """The two networks of `CrossmodalMapping` and their loss.

    color, geometry: numbers of features of a cell.
    """

    views = _Features()
    accumulation = "refused"  # each cell weighs the same, and batches have unequal numbers of them

    def __init__(self, color: int, geometry: int) -> None:
        super().__init__()
        self.to_geometry = _mapping(color, geometry)
        self.to_color = _mapping(geometry, color)
        self.register_buffer("scales", torch.ones(2))  # root mean squares of color and geometry
        self.scales: Tensor

    def prepare(self, samples: Sequence[Sample]) -> None:
        """Learn the scale of each modality over the valid cells.

        Raises ValueError where no cell has both.
        """
        squares, number = torch.zeros(2, dtype=torch.float64), 0
        for sample in samples:
            views = self.views(sample, torch.Generator())
            number += int(views["valid"].sum())
            for i, name in enumerate(("color", "geometry")):
                cells = views[name][views["valid"]].double()
                squares[i] += cells.square().mean(1).sum()
        if number == 0:
            raise ValueError(
                f"none of the {len(samples)} normal items has color and geometry at one place"
            )
        self.scales.copy_((squares / number).sqrt().clamp_min(1e-12))

    def expected(self, color: Tensor, geometry: Tensor) -> tuple[Tensor, Tensor]:
        """Color (..., E) as geometry makes one expect it, and geometry (..., F) from color."""
        return self.to_color(geometry / self.scales[1]), self.to_geometry(color / self.scales[0])

    def loss(self, views: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """1 - cosine of given and expected features, the mean over the cells, both ways."""
        valid = views["valid"]
        color, geometry = views["color"][valid], views["geometry"][valid]  # (n, E), (n, F)
        from_geometry, from_color = self.expected(color, geometry)
        number = max(1, len(color))
        to_color = (1 - F.cosine_similarity(from_geometry, color, dim=1)).sum() / number
        to_geometry = (1 - F.cosine_similarity(from_color, geometry, dim=1)).sum() / number
        return {"loss": to_color + to_geometry, "color": to_color, "geometry": to_geometry}

    def distances(self, color: Tensor, geometry: Tensor) -> tuple[Tensor, Tensor]:
        """Of color (..., E) and geometry (..., F) to what is expected, at most 2 each (...)."""
        from_geometry, from_color = self.expected(color, geometry)
        return _apart(from_geometry, color), _apart(from_color, geometry)


def _mapping(given: int, wanted: int) -> nn.Sequential:
    """Three layers, as wide in between as the mean of both ends."""
    width = (given + wanted) // 2
    return nn.Sequential(
        nn.Linear(given, width),
        nn.GELU(),
        nn.Linear(width, width),
        nn.GELU(),
        nn.Linear(width, wanted),
    )


def _apart(one: Tensor, other: Tensor) -> Tensor:
    return (F.normalize(one, dim=-1) - F.normalize(other, dim=-1)).norm(dim=-1)


def _as_image(features: Tensor, valid: Tensor) -> Image:
    """Features (h, w, E) of cells."""
    return Image(
        pixels=features.movedim(-1, 0).cpu(),
        axes="HW",
        modality=Modality.OTHER,
        affine=pixel_affine(),
        frame="pixel",
        valid=valid.cpu(),
        units="features",
    )
