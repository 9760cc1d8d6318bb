"""What a detector has to beat: rules that look at intensities alone."""

import torch
from torch import Tensor

from medssl.data.geometry import resample
from medssl.data.image import Image


def brightest(image: Image) -> float:
    """The largest value of an image; larger is taken as more anomalous."""
    return float(image.pixels.max())


class MeanNormal:
    """How far an image departs, voxel by voxel, from the mean of the normal ones.

    quantile: of the departures of one image that is its score; 1 is the largest.
    """

    def __init__(self, *, quantile: float = 0.999) -> None:
        self.quantile = quantile
        self.count = 0
        self.grid: Image | None = None
        self._sum = torch.zeros(0)
        self._squares = torch.zeros(0)

    def add(self, image: Image) -> None:
        """Learn from one normal image; the first one's grid is the common one."""
        if self.grid is None:
            self.grid = image
            self._sum = torch.zeros_like(image.pixels)
            self._squares = torch.zeros_like(image.pixels)
        pixels = self._on_grid(image)
        self._sum += pixels
        self._squares += pixels.square()
        self.count += 1

    def score(self, image: Image) -> float:
        """The quantile of |value - mean| / standard deviation; larger is more anomalous."""
        mean = self._sum / self.count
        deviation = (self._squares / self.count - mean.square()).clamp_min(1.0).sqrt()
        departure = ((self._on_grid(image) - mean) / deviation).abs().flatten()
        rank = max(1, round(self.quantile * departure.numel()))
        return float(departure.kthvalue(rank).values)

    def _on_grid(self, image: Image) -> Tensor:
        assert self.grid is not None
        return resample(image, to=self.grid, outside=float(image.pixels.min())).pixels
