"""Benjamini-Hochberg: how many of the items called anomalous in a batch may be normal.

Benjamini and Hochberg, JRSS B 1995, https://doi.org/10.1111/j.2517-6161.1995.tb02031.x.
Conformal p-values of one calibration set depend on each other, and the procedure still keeps its
promise: Bates et al., Annals of Statistics 2023, https://arxiv.org/abs/2104.08279.
"""

import math
from collections.abc import Sequence


def adjusted_p_values(p_values: Sequence[float]) -> list[float]:
    """The adjusted p-value of each: the lowest false-discovery rate at which it is discovered.

    Of the items with an adjusted p-value of at most q, the expected share of normal ones is at
    most q, if the normal items of the batch are exchangeable with the held-out normals and the
    others do not depend on them. It is about the batch as a whole: with other items beside it, an
    item gets another value. Never smaller than the p-value itself.

    p_values: in [0, 1], smaller is more anomalous. Returns them in the same order.
    Raises ValueError for a value outside.
    """
    broken = [p for p in p_values if math.isnan(p) or not 0 <= p <= 1]
    if broken:
        raise ValueError(
            f"p-values lie between 0 and 1, got {broken[0]}; leave out items without one"
        )
    count = len(p_values)
    adjusted, lowest = [1.0] * count, 1.0
    falling = sorted(range(count), key=lambda place: -p_values[place])
    for larger, place in enumerate(falling):
        rank = count - larger  # from the smallest, counted from one
        lowest = min(lowest, p_values[place] * (count / rank))  # p itself at the last rank
        adjusted[place] = lowest
    return adjusted
