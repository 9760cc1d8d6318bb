"""AUPIMO (Bertoldo et al., BMVC 2024, https://arxiv.org/abs/2401.01984)."""

import math
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from anomaly.pixel_bins import check_grid, keys_of
from medssl.metrics import OneClassError

FPR_BOUNDS = (1e-5, 1e-4)
_MOST_KEPT = 1 << 22  # highest normal pixels; enough for 4e10 of them
_MISSED = keys_of(np.array([-np.inf], np.float32))[0]


def aupimo(
    maps: Iterable[Tensor],
    masks: Iterable[Tensor | None],
    *,
    fpr_bounds: tuple[float, float] = FPR_BOUNDS,
) -> Tensor:
    """Recall of each anomalous image's pixels, averaged over very small false-positive rates.

    The rate is that of the images without an anomalous pixel alone: the mean over them of the share
    of their pixels at or above the threshold (eq. 4), each image counting the same. The mean over
    the bounds is taken on a logarithmic scale (eq. 6).

    maps, masks: one per image, of any spatial shape, as `anomaly.metrics.PixelScores` takes them;
        iterated twice, so that they may be read from disk. NaN counts as there.
    fpr_bounds: lower and upper rate (L and U).
    Returns (S,) float64 in [0, 1], larger is better; NaN for normal images.
    Raises OneClassError where there is no normal or no anomalous image, or where the normal ones
    have too few pixels to tell rates as small as the lower bound; ValueError where they have more
    than 4e6 and the upper bound is too large for the highest of them.

    Differs from the paper: every distinct score is a threshold, where the paper takes 300 000 of
    equal distance; a rise that begins below L is taken to begin at L.
    """
    low, high = fpr_bounds
    if not 0 < low < high <= 1:
        raise ValueError(f"fpr_bounds must be 0 < lower < upper <= 1, got {fpr_bounds}")
    tail = _NormalTail(maps, masks)
    tail.check(low, high)
    found = [
        math.nan if mask is None or not mask.any() else tail.recall(scores, mask, low, high)
        for scores, mask in zip(maps, masks, strict=True)
    ]
    if all(map(math.isnan, found)):
        raise OneClassError("AUPIMO needs an image with anomalous pixels")
    return torch.tensor(found, dtype=torch.float64)


class _NormalTail:
    """The highest pixels of the normal images, each weighing 1 / pixels of its image.

    keys: (n,) ascending. rates: (n + 1,) share of the normal images at or above the pixel of this
    place, 0 after the last.
    """

    def __init__(self, maps: Iterable[Tensor], masks: Iterable[Tensor | None]) -> None:
        self.images, self.largest = 0, 0.0  # number, and largest weight of a pixel
        self.lowest = np.uint32(0)  # key below which pixels were dropped
        self.parts: list[tuple[Any, Any]] = []  # keys and weights
        for scores, mask in zip(maps, masks, strict=True):
            values = scores[~scores.isnan()].float().cpu().numpy()
            if (mask is not None and mask.any()) or len(values) == 0:
                continue
            self.images += 1
            self.largest = max(self.largest, 1 / len(values))
            self.parts.append((keys_of(values), np.full(len(values), 1 / len(values))))
            if sum(len(keys) for keys, _ in self.parts) > 2 * _MOST_KEPT:
                self.parts = [self._highest()]
        keys, weights = self._highest() if self.parts else (np.zeros(0, np.uint32), np.zeros(0))
        order = np.argsort(keys)
        self.keys = keys[order]
        self.rates = np.append(weights[order][::-1].cumsum()[::-1], 0) / max(1, self.images)

    def _highest(self) -> tuple[Any, Any]:
        """The highest of the pixels so far, in any order; those tied for the lowest place as one,
        or some of them would be dropped."""
        keys, weights = map(np.concatenate, zip(*self.parts, strict=True))
        if len(keys) > _MOST_KEPT:
            self.lowest = max(self.lowest, np.partition(keys, -_MOST_KEPT)[-_MOST_KEPT])
        above, tied = keys > self.lowest, keys == self.lowest
        return (
            np.append(keys[above], self.lowest),
            np.append(weights[above], weights[tied].sum()),
        )

    def check(self, low: float, high: float) -> None:
        if self.images == 0:
            raise OneClassError("AUPIMO needs a normal image: its rates are of normal images alone")
        if self.largest / self.images > low:
            raise OneClassError(
                f"{self.images} normal images of at least {round(1 / self.largest)} pixels cannot "
                f"tell a false-positive rate of {low:g}; that takes {math.ceil(1 / low)} pixels"
            )
        if self.rates[0] < high * (1 - 1e-9):
            raise ValueError(
                f"of so many normal pixels only the {len(self.keys)} highest are kept, which tell "
                f"rates up to {self.rates[0]:.2g}; take a lower upper bound than {high:g}"
            )

    def recall(self, scores: Tensor, mask: Tensor, low: float, high: float) -> float:
        check_grid(scores, mask)
        values = scores[mask != 0].float().cpu().numpy()
        keys = np.where(np.isnan(values), _MISSED, keys_of(values))
        above = self.rates[self.keys.searchsorted(keys, "right")]
        reached = self.rates[self.keys.searchsorted(keys, "left")]
        return float(_log_area(above, reached, low, high).mean())


def _log_area(above: Any, reached: Any, low: float, high: float) -> Any:
    """Mean over log rate in [low, high] of a rise from 0 to 1 between `above` and `reached`."""
    start, end = (np.log(np.maximum(rate, low) / low) for rate in (above, reached))
    full = math.log(high / low)
    width = np.maximum(end - start, 1e-300)
    risen = np.clip((full - start) / width, 0, 1)  # share of the rise before the upper bound
    return (risen * (np.minimum(end, full) - start) / 2 + np.maximum(full - end, 0)) / full
