"""Pixels as sortable keys, and bins of scores so narrow where it matters that they may be counted.

Within a bin the order of normal and anomalous pixels is lost. What that costs depends on how many
normal pixels lie above it: of the 1e-4 that decide AUPRO at a small limit, few may share a bin.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

_FINE_BITS = 10
_COARSE = 1 << (32 - _FINE_BITS)  # buckets of the first pass
_FINE = 1 << _FINE_BITS  # float32 numbers in each of them
_STEP = 1e-3  # normal pixels that share a bin, as a share of those above it
_PARTS = 4000  # that the anomalous pixels are cut into at least
_MISSED = 0x007FFFFF  # key of minus infinity


@dataclass(frozen=True, slots=True, eq=False)
class ItemPixels:
    """The pixels of one item as keys; see `keys_of`.

    normal: (n,) uint32, sorted, without pixels that are NaN.
    defect: (d,) uint32; one that is NaN was not looked at, and lies below every score.
    share: (d,) 1 / pixels of the lesion that each belongs to.
    """

    normal: Any
    defect: Any
    share: Any

    @classmethod
    def of(cls, scores: Tensor, mask: Tensor | None) -> "ItemPixels":
        """scores and mask (*spatial); the mask is non-zero on the defect, None without one."""
        check_grid(scores, mask)
        values = scores.float().cpu().numpy()
        known = ~np.isnan(values)
        if mask is None:
            return cls(np.sort(keys_of(values[known])), keys_of(values[:0].ravel()), np.zeros(0))
        anomalous = mask.cpu().numpy() != 0
        owner = lesions(anomalous)[0][anomalous]
        found = np.where(known, values, -np.inf)[anomalous]
        normal = np.sort(keys_of(values[known & ~anomalous]))
        return cls(normal, keys_of(found), 1 / np.bincount(owner)[owner])


def check_grid(scores: Tensor, mask: Tensor | None) -> None:
    """Raises ValueError for a mask of another shape than its map's."""
    if mask is not None and mask.shape != scores.shape:
        raise ValueError(
            f"a mask must lie on its map's grid: got {tuple(mask.shape)} for {tuple(scores.shape)}"
        )


def lesions(mask: Any) -> tuple[Any, int]:
    """Number the connected parts of a bool array, 1 to n, 0 outside; touching by corners counts."""
    from scipy.ndimage import label

    return label(mask, structure=np.ones((3,) * mask.ndim))


def keys_of(scores: Any) -> Any:
    """uint32 keys in the order of float32 scores; both zeros have one key."""
    bits = (scores.astype(np.float32) + np.float32(0)).view(np.uint32)
    return np.where(bits >> 31, ~bits, bits | np.uint32(1 << 31))


def scores_of(keys: Any) -> Any:
    """The inverse of `keys_of`."""
    keys = np.asarray(keys, np.uint32)
    bits = np.where(keys >> 31, keys & np.uint32((1 << 31) - 1), ~keys)
    return bits.view(np.float32)


@dataclass(frozen=True, slots=True, eq=False)
class Bins:
    """Adjoining ranges of keys, from the highest on; the last holds the missed pixels alone.

    starts: (K,) uint32, the lowest key of each, descending.
    single: (K,) bool, whether its pixels all have one score, so that sharing it is a true tie.
    """

    starts: Any
    single: Any

    def normal(self, item: ItemPixels) -> Any:
        """Normal pixels of an item in each bin, (K,)."""
        below = item.normal.searchsorted(self.starts, "left")
        return np.diff(len(item.normal) - below, prepend=0)

    def defect(self, item: ItemPixels, weights: Any) -> Any:
        """Weights (d,) of its anomalous pixels, summed in each bin, (K,)."""
        place = len(self.starts) - self.starts[::-1].searchsorted(item.defect, "right")
        return np.bincount(place, weights, minlength=len(self.starts))


def find_bins(passes: Callable[[], Iterable[ItemPixels]]) -> Bins:
    """Bins for these pixels; asks for them once, and again where one bucket holds too much.

    A bin holds either one score, or at most 0.002 of the normal pixels down to its end together
    with 1/2000 of the anomalous ones; each of the 1000 highest normal pixels is alone. Memory does
    not grow with the number of pixels, and the number of bins with its logarithm: some 7000 for
    each factor of 1000.
    """
    normal, defect = (np.zeros(_COARSE, np.int64) for _ in range(2))
    for item in passes():
        np.add.at(normal, item.normal >> _FINE_BITS, 1)
        np.add.at(defect, item.defect >> _FINE_BITS, 1)
    above = normal[::-1].cumsum()[::-1] - normal
    crowded = (normal > _STEP * above) | (defect * _PARTS > defect.sum())
    heavy = np.flatnonzero((defect > 0) & crowded)
    coarse = np.flatnonzero((normal + defect > 0) & ~np.isin(np.arange(_COARSE), heavy))
    fine_keys, fine_normal, fine_defect = _refined(heavy, passes)
    return _joined(
        np.concatenate([coarse << _FINE_BITS, fine_keys]),
        np.concatenate([normal[coarse], fine_normal]),
        np.concatenate([defect[coarse], fine_defect]),
        np.arange(len(coarse) + len(fine_keys)) >= len(coarse),
    )


def _refined(heavy: Any, passes: Callable[[], Iterable[ItemPixels]]) -> tuple[Any, Any, Any]:
    """Every score in the heavy buckets, with its normal and anomalous pixels."""
    counts = np.zeros((2, len(heavy), _FINE), np.int64)
    if len(heavy) == 0:
        return heavy, *counts.reshape(2, 0)
    row = np.full(_COARSE, -1, np.int32)
    row[heavy] = np.arange(len(heavy))
    for item in passes():
        for count, keys in zip(counts, (item.normal, item.defect), strict=True):
            rows = row[keys >> _FINE_BITS]
            inside = rows >= 0
            np.add.at(count, (rows[inside], keys[inside] & (_FINE - 1)), 1)
    keys = (heavy[:, None] << _FINE_BITS) + np.arange(_FINE)
    present = counts.sum(0) > 0
    return keys[present], counts[0][present], counts[1][present]


def _joined(keys: Any, normal: Any, defect: Any, single: Any) -> Bins:
    """Neighbouring cells put together, as long as little comes together.

    keys: (U,) the lowest key of each cell. single: whether it has one score only.
    """
    order = np.argsort(-keys)
    keys, normal, defect, single = (each[order] for each in (keys, normal, defect, single))
    reached = normal.cumsum()
    depth = np.where(  # 1 for each of the first, then for each `_STEP` of those above
        reached * _STEP <= 1, reached, (1 + np.log(np.maximum(reached * _STEP, 1))) / _STEP
    )
    depth = depth + _PARTS * defect.cumsum() / max(1, defect.sum())
    size = np.diff(depth, prepend=0)
    full = size > 0.99  # rounded; such a cell has a bin to itself
    begins = (np.diff(np.floor(depth), prepend=-1) > 0) | full
    begins[1:] |= full[:-1]
    begins |= keys <= _MISSED
    ends = np.flatnonzero(np.append(begins, True)[1:])
    starts, alone = keys[ends], single[ends] & begins[ends]
    if not (starts <= _MISSED).any():  # nothing was missed: an empty bin
        starts, alone = np.append(starts, 0), np.append(alone, True)
    return Bins(starts.astype(np.uint32), alone)
