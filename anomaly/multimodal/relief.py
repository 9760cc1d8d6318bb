"""Organized points as a network of pictures sees them: their normals for colors.

Point clouds drawn as pictures for networks of pictures are the second half of CPMF (Cao et al.,
Pattern Recognition 2024, https://arxiv.org/abs/2303.13194).
"""

from collections.abc import Sequence
from math import ceil
from pathlib import Path
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from anomaly.base import NormalData
from anomaly.features.patches import check_finite
from anomaly.maps import valid_patches
from anomaly.multimodal.modalities import (
    ColorFeatures,
    FeatureGrid,
    GeometryFeatures,
    organized,
    sensor_normals,
    usual_spacing,
)
from medssl.data.sample import Batch
from medssl.models.encoder import Encoder
from medssl.models.points import point_spacing

_GAIN = 2.0  # of the picture's values, about that of a standardized photograph


class ReliefFeatures(nn.Module):
    """A frozen network's features of a picture of the points' normals, on the grid of cells.

    The three channels are the tilts along the sensor's x and y, against the median normal of the
    item, and the height along it above the median. What was not measured is flat.

    encoder, layers, grid: as of `ColorFeatures`; of three channels.
    slope: sine of the tilt that is shown at tanh(1); about three times that of normal noise.
    num_neighbors: points that a normal is estimated from.
    Differs from the paper: one picture from where the sensor stands instead of 27 turned views, and
    no FPFH beside it, for which there are banks of their own.
    """

    def __init__(
        self,
        encoder: Encoder | Path,
        *,
        layers: Sequence[str],
        grid: Sequence[int],
        slope: float = 0.1,
        num_neighbors: int = 25,
    ) -> None:
        super().__init__()
        if slope <= 0:
            raise ValueError(f"slope must be positive, got {slope}")
        if num_neighbors < 3:
            raise ValueError(f"a normal takes at least 3 points, got num_neighbors {num_neighbors}")
        self.seen = ColorFeatures(encoder, layers=layers, grid=grid)
        if self.encoder.in_channels != 3:
            raise ValueError(
                f"a relief has 3 channels, the encoder takes {self.encoder.in_channels}"
            )
        self.slope, self.num_neighbors = slope, num_neighbors
        self.width = self.seen.width
        self.register_buffer("spacing_", torch.empty(0))  # (1,) in the unit of the points
        self.register_buffer("height_", torch.empty(0))  # (1,) that is shown at tanh(1), likewise
        self.spacing_: Tensor
        self.height_: Tensor

    @property
    def encoder(self) -> Encoder:
        """The frozen network."""
        return self.seen.encoder

    @property
    def layers(self) -> list[str]:
        """Modules of the network."""
        return self.seen.layers

    @property
    def grid(self) -> list[int]:
        """h and w of the cells."""
        return self.seen.grid

    @property
    def spacing(self) -> Tensor:
        """(1,) distance of neighboring points in normal items."""
        return self.spacing_

    @torch.no_grad()
    def fit(self, normal: NormalData) -> Self:
        """Learn the scale of heights, and where the units look in images of the first's size.

        Raises ValueError where no normal item has two valid points.
        """
        device = self.spacing_.device
        self.seen.fit(normal)
        spacings, heights = [], []
        for batch in normal.batches():
            for xyz, valid in organized(batch):
                points = xyz[:, valid].mT.to(device)
                spacings.append(point_spacing(points))
                if spacings[-1] > 0:
                    heights.append(_trimmed_rms(self._frame(points)[1]))
        self.spacing_ = usual_spacing(spacings)
        height = torch.stack(heights).median()[None]
        self.height_ = height.clamp_min(1e-3 * self.spacing_)
        return self

    @torch.no_grad()
    def forward(self, batch: Batch) -> FeatureGrid:
        """Of the organized points; nothing is valid in an item that has none.

        Raises RuntimeError before `fit`, ValueError where a valid point is not finite.
        """
        if self.height_.numel() == 0:
            raise RuntimeError("ReliefFeatures is not fitted (height_ is empty); call fit first")
        device = self.height_.device
        features = torch.zeros(len(batch), *self.grid, self.width, device=device)
        known = torch.zeros(features.shape[:3], dtype=torch.bool, device=device)
        for i, (xyz, valid) in enumerate(organized(batch)):
            if valid.any():
                picture = self.picture(xyz.to(device), valid.to(device))
                known[i] = valid_patches(valid[None].to(device), self.grid)[0]
                features[i] = self.seen.described(picture[None])[0]
        features = torch.where(known[..., None], features, 0.0)
        check_finite(features, batch.items)
        return FeatureGrid(features=features, valid=known)

    def picture(self, xyz: Tensor, valid: Tensor) -> Tensor:
        """What the network sees of organized points xyz (3, H, W): (3, H, W), 0 where not valid.

        valid: (H, W) bool.
        """
        points = xyz[:, valid].mT
        tilts, heights = self._frame(points)
        shown = torch.cat([tilts / self.slope, heights[:, None] / self.height_], dim=1)
        picture = torch.zeros_like(xyz)
        picture[:, valid] = _GAIN * shown.tanh().mT
        return picture

    def _frame(self, points: Tensor) -> tuple[Tensor, Tensor]:
        """Tilts (P, 2) along x and y of the sensor, as sines, and heights (P,) of points (P, 3)."""
        places, owner = points.unique(dim=0, return_inverse=True)  # see `sensor_normals`
        normals = sensor_normals(places, self.num_neighbors)[owner]
        middle = F.normalize(normals.median(0).values, dim=0)
        across = torch.zeros_like(middle)
        across[int(middle[0].abs() > 0.99)] = 1.0  # of a surface that looks along x it is y
        across = F.normalize(across - across.dot(middle) * middle, dim=0)
        along = torch.linalg.cross(across, middle)  # y where the middle looks at the sensor
        heights = (points - points.mean(0)) @ middle
        tilts = torch.stack([normals @ across, normals @ along], dim=1)
        return tilts, heights - heights.median()


def _trimmed_rms(heights: Tensor) -> Tensor:
    """Root mean square () of heights (P,), but for the hundredth that lies farthest out: a few
    flying points do not count."""
    nearest = heights.abs().sort().values[: ceil(0.99 * len(heights))]
    return nearest.square().mean().sqrt()


Geometry = GeometryFeatures | ReliefFeatures
"""What describes organized points."""
