"""Dice of the pixels above a threshold that was chosen without them.

Of each case (macro), where small lesions count like large ones, and of all pixels together
(pooled); Maier-Hein et al., Nature Methods 2024, https://arxiv.org/abs/2206.01653. For the largest
Dice of any threshold see `anomaly.metrics.PixelScores`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from anomaly.pixel_bins import check_grid
from medssl.metrics import Interval, OneClassError, intervals


@dataclass(frozen=True, slots=True)
class Overlap:
    """Pixels of one item: above the threshold and marked, above it, and marked."""

    both: int
    above: int
    marked: int


def overlap(scores: Tensor, mask: Tensor | None, *, threshold: float) -> Overlap:
    """scores, mask (*spatial); the mask is non-zero on lesions. NaN is never above."""
    check_grid(scores, mask)
    above = scores > threshold
    if mask is None:
        return Overlap(0, int(above.sum()), 0)
    marked = mask != 0
    return Overlap(int((above & marked).sum()), int(above.sum()), int(marked.sum()))


def dice(overlaps: Sequence[Overlap]) -> tuple[float, float]:
    """Mean of the cases, and pooled.

    The mean is over items with a marked pixel alone: with none Dice is 0 or undefined, whatever the
    map, and what a normal item shows is in the rate of false alarms. Pooled, the pixels above the
    threshold in normal items count as false.
    Raises OneClassError where nothing is marked.
    """
    counts = _checked(overlaps)
    mean, pooled = _dice(np.ones((1, len(overlaps))), counts)[0]
    return float(mean), float(pooled)


def dice_intervals(
    overlaps: Sequence[Overlap], groups: Sequence[str | None], *, repeats: int, seed: int
) -> dict[str, Interval]:
    """`dice` and `dice_pooled` with intervals from drawn groups of items."""
    counts = _checked(overlaps)
    return intervals(
        dict(zip(("dice", "dice_pooled"), dice(overlaps), strict=True)),
        lambda draws: _dice(draws.numpy().astype(float), counts),
        groups=groups,
        repeats=repeats,
        seed=seed,
    )


def _checked(overlaps: Sequence[Overlap]) -> Any:
    """(S, 3) the counts."""
    rows = [[item.both, item.above, item.marked] for item in overlaps]
    counts = np.array(rows, float).reshape(-1, 3)
    if counts[:, 2].sum() == 0:
        raise OneClassError("Dice needs a marked pixel")
    return counts


def _dice(weights: Any, counts: Any) -> Any:
    """(R, 2) mean and pooled Dice; weights (R, S), how often each item counts."""
    both, above, marked = counts.T
    case = 2 * both / np.maximum(above + marked, 1)
    with_lesion = weights * (marked > 0)
    pooled = weights @ counts  # (R, 3)
    with np.errstate(invalid="ignore"):
        mean = with_lesion @ case / with_lesion.sum(1)
        total = 2 * pooled[:, 0] / (pooled[:, 1] + pooled[:, 2])
    return np.stack([mean, np.where(pooled[:, 2] > 0, total, np.nan)], 1)
