"""BTF: "Back to the feature" (Horwitz and Hoshen, CVPR workshops 2023,
https://arxiv.org/abs/2203.05550)."""

from collections.abc import Sequence
from pathlib import Path
from typing import Self

import torch
from torch import Tensor

from anomaly.base import AnomalyMap, Detector, NormalData
from anomaly.examples import relief_pictures
from anomaly.memory import nearest
from anomaly.multimodal.bank import bank_of, check_share
from anomaly.multimodal.fusion import missing
from anomaly.multimodal.modalities import (
    ColorFeatures,
    FeatureGrid,
    GeometryFeatures,
    cell_maps,
    example_features,
    noise_shape,
    rgbd_noise,
    same_grid,
    valid_pixels,
)
from anomaly.valid import largest
from medssl.data.sample import Batch, Sample


class ColoredFPFH(Detector):
    """Distance of each cell to the nearest normal one, color and FPFH in one row of one bank.

    Both are centered and divided by their root mean square over the normal cells, so that each
    makes up half of the squared distances, however many numbers it has. A cell that has one of the
    two only is compared in that one's columns, and its squared distance is doubled to stand for
    both (the partial distance of Dixon 1979, https://doi.org/10.1109/TSMC.1979.4310090); so an item
    without color or without geometry is scored too, and `AnomalyMap.missing` says so.

    color, geometry: what describes the cells, on one grid.
    coreset_ratio: share of the normal cells, with both, that the bank keeps.
    sigma: of the Gaussian on the map, in pixels.
    seed: of the first pick of the coreset.
    The score is the largest distance of a cell.
    Differs from the paper: the authors' code puts the two side by side as they are, so that the one
    of larger numbers decides; FPFH is described where there are points and averaged over those of a
    cell, where missing points took part as zeros; the score is not weighed by the neighborhood.
    """

    def __init__(
        self,
        *,
        color: ColorFeatures,
        geometry: GeometryFeatures,
        coreset_ratio: float = 0.1,
        sigma: float = 4.0,
        seed: int = 0,
    ) -> None:
        super().__init__()
        check_share(coreset_ratio=coreset_ratio)
        same_grid(color, geometry)
        self.color, self.geometry = color, geometry
        self.coreset_ratio, self.sigma, self.seed = coreset_ratio, sigma, seed
        self.register_buffer("bank_", torch.empty(0))  # (M, E), color's columns first
        self.register_buffer("mean_", torch.empty(0))  # (E,) of the normal cells
        self.register_buffer("scale_", torch.empty(0))  # (E,) one value for each of the two
        self.bank_: Tensor
        self.mean_: Tensor
        self.scale_: Tensor

    @torch.no_grad()
    def fit(self, normal: NormalData, *, workdir: Path | None = None) -> Self:
        """Keep a coreset of the normal cells that have both.

        Raises ValueError where there is none.
        """
        self.color.fit(normal)
        self.geometry.fit(normal)
        rows = []
        for batch in normal.batches():
            color, geometry = self.color(batch), self.geometry(batch)
            both = color.valid & geometry.valid
            rows.append(torch.cat([color.features[both], geometry.features[both]], dim=1))
        cells = torch.cat(rows)
        if len(cells) == 0:
            raise ValueError(
                f"none of the {len(normal)} normal items has color and geometry at one place; give "
                "an xyz image beside each picture"
            )
        self.mean_ = cells.mean(0)
        cells -= self.mean_
        scales = [part.square().sum(1).mean().sqrt() for part in self._split(cells)]
        self.scale_ = torch.cat(
            [
                scale.clamp_min(1e-12).expand(width)
                for scale, width in zip(scales, self._widths(), strict=True)
            ]
        )
        cells /= self.scale_
        self.bank_ = bank_of(cells, self.coreset_ratio, seed=self.seed)
        return self

    @torch.no_grad()
    def predict(self, batch: Batch) -> AnomalyMap:
        """Scores and maps; an item without a valid pixel in either scores NaN."""
        self.check_fitted()
        color, geometry = self.color(batch), self.geometry(batch)
        distance = self._distance(color, geometry)
        valid = valid_pixels(batch, "color") | valid_pixels(batch, "geometry")
        silent = {
            "color": ~color.valid.flatten(1).any(1),
            "geometry": ~geometry.valid.flatten(1).any(1),
        }
        return AnomalyMap(
            score=largest(distance),
            maps={"image": cell_maps(distance, batch, valid.to(distance.device), sigma=self.sigma)},
            missing=missing(silent),
        )

    def selftest_shape(self, image: Sequence[int]) -> tuple[int, ...]:
        """The channels of a picture and a relief."""
        return noise_shape(self.color, image)

    def selftest(self, noise: Tensor) -> Tensor:
        """As of `Detector`, with points at the distance that was normal."""
        return self.predict(rgbd_noise(noise, self.geometry.spacing)).score

    def _distance(self, color: FeatureGrid, geometry: FeatureGrid) -> Tensor:
        """(B, h, w) of each cell to the bank, NaN where neither is valid."""
        rows = (torch.cat([color.features, geometry.features], dim=3) - self.mean_) / self.scale_
        distance = torch.full(color.valid.shape, torch.nan, device=rows.device)
        only_color, only_geometry = self._split(rows)
        bank_color, bank_geometry = self._split(self.bank_)
        for cells, here, bank, factor in (
            (rows, color.valid & geometry.valid, self.bank_, 1.0),
            (only_color, color.valid & ~geometry.valid, bank_color, 2.0**0.5),
            (only_geometry, geometry.valid & ~color.valid, bank_geometry, 2.0**0.5),
        ):
            if here.any():
                distance[here] = factor * nearest(cells[here], bank)[0][:, 0]
        return distance

    def _widths(self) -> list[int]:
        return [self.color.width, self.geometry.width]

    def _split(self, rows: Tensor) -> tuple[Tensor, ...]:
        """Color's and geometry's columns of rows (..., E)."""
        return rows.split(self._widths(), dim=-1)

    @classmethod
    def example(cls) -> tuple[Self, list[Sample]]:
        """A random residual network and FPFH of a few hundred points of smooth reliefs."""
        color, geometry = example_features()
        return cls(color=color, geometry=geometry, coreset_ratio=0.2), relief_pictures()
