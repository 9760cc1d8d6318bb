"""A threshold for pixels by the share of them that may lie above it: conformal risk control.

Angelopoulos et al., ICLR 2024, https://arxiv.org/abs/2208.02814. The loss of an item is the share
of its map above the threshold, which falls as the threshold rises and never exceeds one.
"""

import math
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np
from torch import Tensor

SHARES = (0.0, *(10 ** (step / 5 - 6) for step in range(30)))
"""Where a tail is kept: 0, then five per decade from 1e-6 to 0.63. Saved files count on them."""


@dataclass(frozen=True, order=True)
class MapTail:
    """How much of one item's map lies above a level, kept as upper quantiles and never too low.

    Between two shares the larger one counts: at most a factor of 10 ** 0.2 (1.6) too much, and
    exact above the map's largest value, where it is 0.

    values: the lowest level that at most each of SHARES lies above, (31,), falling.
    """

    values: tuple[float, ...]

    def __post_init__(self) -> None:
        if len(self.values) != len(SHARES):
            raise ValueError(f"a tail has {len(SHARES)} values, got {len(self.values)}")
        if not all(map(math.isfinite, self.values)):
            raise ValueError("a tail of values that are not finite; look at the item's map")

    @classmethod
    def of(cls, values: Tensor) -> Self:
        """The tail of a map of any shape, leaving out NaN.

        Raises ValueError where no value is left, or one is infinite.
        """
        known = values[~values.isnan()].float().cpu().numpy()
        if len(known) == 0:
            raise ValueError("the anomaly map has no value anywhere")
        places = [len(known) - 1 - most_above(share, len(known)) for share in SHARES]
        ordered = np.partition(known, sorted(set(places)))
        return cls(tuple(float(ordered[place]) for place in places))

    def share_above(self, level: float) -> float:
        """An upper bound of the share of the map above a level."""
        reached = bisect_left(self.values, -level, key=lambda value: -value)
        return SHARES[reached] if reached < len(SHARES) else 1.0


def controlled_level(tails: Sequence[MapTail], rate: float) -> float | None:
    """The lowest level that keeps the expected share of a normal item's map above it to `rate`.

    With n held-out normals it is the lowest level at which (sum of their shares + 1) / (n + 1) is
    at most `rate` (theorem 1). The expectation is over draws of the held-out normals and of one new
    item that is exchangeable with them; a single item may have a larger share.

    None where n is too small for the rate: the added one alone takes 1 / (n + 1).
    """
    count = len(tails)
    levels = sorted({value for tail in tails for value in tail.values})

    def controlled(level: float) -> bool:
        total = math.fsum(tail.share_above(level) for tail in tails)
        return (total + 1) / (count + 1) <= rate

    lowest = bisect_left(levels, True, key=controlled)  # shares only fall as the level rises
    return levels[lowest] if lowest < len(levels) else None


def most_above(share: float, count: int) -> int:
    """The largest m below count with m / count <= share, without its rounding."""
    m = min(count - 1, math.floor(share * count) + 1)
    while m / count > share:
        m -= 1
    return m
