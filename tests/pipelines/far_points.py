"""Detectors whose answers are known: on free clouds, and on pictures with xyz beside them."""

from pathlib import Path
from typing import Self

import torch
from torch import Tensor

import medssl.models.folder
from anomaly.base import AnomalyMap, Detector, NormalData
from medssl.data.modality import Modality
from medssl.data.sample import Batch

medssl.models.folder.TRUSTED = (*medssl.models.folder.TRUSTED, "far_points")


class FarPoints(Detector):
    """Distance from the origin less the largest of all normal points; the score is the largest."""

    axes = "points"
    radius_: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("radius_", torch.empty(0))

    def fit(self, normal: NormalData, *, workdir: Path | None = None) -> Self:
        clouds = [cloud for batch in normal.batches() for cloud in batch.points]
        self.radius_ = torch.stack([one.points.norm(dim=1).max() for one in clouds]).max()[None]
        return self

    def predict(self, batch: Batch) -> AnomalyMap:
        self.check_fitted()
        maps = [
            torch.where(one.looked_at, one.points.norm(dim=1) - self.radius_, torch.nan)
            for one in batch.points
        ]
        return AnomalyMap(
            score=torch.stack([one[~one.isnan()].max() for one in maps]), maps={"points": maps}
        )


class DarkAndDeep(Detector):
    """How much darker a picture and how much farther its xyz is than normal, on average."""

    level_: Tensor
    depth_: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("level_", torch.empty(0))
        self.register_buffer("depth_", torch.empty(0))

    def fit(self, normal: NormalData, *, workdir: Path | None = None) -> Self:
        batches = list(normal.batches())
        self.level_ = torch.cat([one.images["image"].pixels.flatten() for one in batches]).mean()[
            None
        ]
        self.depth_ = torch.cat(
            [one.images["xyz"].pixels[:, 2].flatten() for one in batches]
        ).mean()[None]
        return self

    def predict(self, batch: Batch) -> AnomalyMap:
        self.check_fitted()
        image = batch.images["image"]
        colored = image.modalities[0] is not Modality.DEPTH
        xyz = batch.images.get("xyz", None if colored else image)
        maps = torch.zeros(image.valid.shape)
        if colored:
            maps = maps + self.level_ - image.pixels.mean(1)
        if xyz is not None:
            maps = maps + xyz.pixels[:, 2] - self.depth_
        found = {"color": colored, "geometry": xyz is not None}
        lacks = tuple(name for name, there in found.items() if not there)
        return AnomalyMap(
            score=maps.flatten(1).mean(1),
            maps={"image": maps},
            missing=(lacks,) * len(batch) if lacks else (),
        )

    def selftest(self, noise: Tensor) -> Tensor:
        return noise.flatten(1).mean(1)
