"""How well maps find defects and lesions, pixel by pixel, on raw scores."""

from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any

import numpy as np
from torch import Tensor

from medssl.metrics import Interval, OneClassError, interval

_BINS = 4096  # of equal shares of the normal pixels, for bootstrap draws only


def pixel_auroc(maps: Iterable[Tensor], masks: Iterable[Tensor | None]) -> float:
    """Chance that an anomalous pixel scores above a normal one; see `PixelScores`."""
    return PixelScores(maps, masks).auroc()


def aupro(maps: Iterable[Tensor], masks: Iterable[Tensor | None], fpr_limit: float = 0.3) -> float:
    """Mean overlap with the lesions up to a false-positive rate; see `PixelScores`."""
    return PixelScores(maps, masks).aupro(fpr_limit)


class PixelScores:
    """The pixels of all test items, sorted once; every normal pixel counts, of whichever item.

    maps: one of any spatial shape per item, larger is more anomalous. A normal pixel that is NaN is
        left out; an anomalous one was not looked at, and counts as missed at every threshold.
    masks: of the same shapes, non-zero on the defect; None for an item without one.
    Raises OneClassError where there is no anomalous or no normal pixel.
    """

    def __init__(self, maps: Iterable[Tensor], masks: Iterable[Tensor | None]) -> None:
        pairs = [_split(*pair) for pair in zip(maps, masks, strict=True)]
        self.normal = [normal for normal, _, _ in pairs]  # sorted, per item
        self.defect = np.concatenate([defect for _, defect, _ in pairs])
        self.share = np.concatenate([share for _, _, share in pairs])  # 1 / size of its lesion
        self.owner = np.repeat(np.arange(len(pairs)), [len(defect) for _, defect, _ in pairs])
        every = np.sort(np.concatenate(self.normal))
        if len(self.defect) == 0 or len(every) == 0:
            raise OneClassError(
                f"pixel metrics need both kinds, got {len(self.defect)} anomalous and "
                f"{len(every)} normal pixels with a score"
            )
        order = np.argsort(self.defect)  # searching in order stays in the cache
        self.above = np.empty(len(order))  # share of the normal pixels above each anomalous one
        self.reached = np.empty(len(order))  # ... above it or equal
        self.above[order] = 1 - every.searchsorted(self.defect[order], "right") / len(every)
        self.reached[order] = 1 - every.searchsorted(self.defect[order], "left") / len(every)
        self.edges = np.unique(every[:: max(1, len(every) // _BINS)])

    def auroc(self) -> float:
        """Area under the pixels' ROC curve, ties counting half."""
        return float(_area(self.above, self.reached, 1.0).mean())

    def aupro(self, fpr_limit: float = 0.3) -> float:
        """Area under the per-region overlap curve up to `fpr_limit`, divided by it.

        At each threshold the overlap is the mean, over connected lesions (touching by corners
        counts), of the share of the lesion found (Bergmann et al., IJCV 2021). Every distinct
        score is a threshold, and the curve is linear between them, also at the limit.
        """
        _check_limit(fpr_limit)
        return float(np.average(_area(self.above, self.reached, fpr_limit), weights=self.share))

    def intervals(
        self,
        groups: Sequence[str | None],
        *,
        fpr_limit: float = 0.3,
        repeats: int = 1000,
        seed: int = 0,
    ) -> dict[str, Interval]:
        """`pixel_auroc` and `aupro` with bootstrap intervals by group.

        groups: patient or part of each item; an item without one is its own.
        The values are exact. In the draws, normal pixels are counted in bins of equal share, and
        scores within a bin tie, which moves a draw by less than 0.001.
        """
        _check_limit(fpr_limit)
        if len(groups) != len(self.normal):
            raise ValueError(f"one group per item: got {len(groups)} for {len(self.normal)} items")
        normal = np.stack([self._histogram(scores) for scores in self.normal])  # (S, bins)
        found = {}
        for name, value, weights, limit in (
            ("pixel_auroc", self.auroc(), np.ones_like(self.share), 1.0),
            ("aupro", self.aupro(fpr_limit), self.share, fpr_limit),
        ):
            defect = np.zeros_like(normal)
            np.add.at(defect, (self.owner, self.edges.searchsorted(self.defect, "right")), weights)
            found[name] = interval(
                value,
                partial(_drawn_area, normal, defect, limit),
                groups=groups,
                repeats=repeats,
                seed=seed,
            )
        return found

    def _histogram(self, scores: Any) -> Any:
        """How many of the sorted scores lie in each bin, (bins,)."""
        below = scores.searchsorted(self.edges, "left")
        return np.diff(below, prepend=0, append=len(scores)).astype(float)


def lesions(mask: Any) -> tuple[Any, int]:
    """Number the connected parts of a bool array, 1 to n, 0 outside; touching by corners counts."""
    from scipy.ndimage import label

    return label(mask, structure=np.ones((3,) * mask.ndim))


def _split(scores: Tensor, mask: Tensor | None) -> tuple[Any, Any, Any]:
    """Sorted normal scores, anomalous scores, and 1 / size of the lesion of each of those."""
    if mask is not None and mask.shape != scores.shape:
        raise ValueError(
            f"a mask must lie on its map's grid: got {tuple(mask.shape)} for {tuple(scores.shape)}"
        )
    values = scores.float().cpu().numpy()
    known = ~np.isnan(values)
    if mask is None:
        return np.sort(values[known]), values[:0].ravel(), np.zeros(0)
    anomalous = mask.cpu().numpy() != 0
    owner = lesions(anomalous)[0][anomalous]
    found = np.where(known, values, -np.inf)[anomalous]
    return np.sort(values[known & ~anomalous]), found, 1 / np.bincount(owner)[owner]


def _area(above: Any, reached: Any, limit: float) -> Any:
    """What each anomalous pixel adds to the area up to a false-positive rate, divided by it.

    The curve rises linearly while the rate goes from `above` to `reached`, both in [0, 1].
    """
    width = np.maximum(reached - above, 1e-300)
    risen = np.clip((limit - above) / width, 0, 1)  # share of the rise before the limit
    end = above + risen * (reached - above)
    return (risen * (end - above) / 2 + np.maximum(limit - end, 0)) / limit


def _drawn_area(normal: Any, defect: Any, limit: float, counts: Tensor) -> float:
    """The area from weights (S, bins) per item, ascending, with each item `counts` (S,) times."""
    normal, defect = counts.numpy() @ normal, counts.numpy() @ defect
    if normal.sum() == 0 or defect.sum() == 0:
        raise OneClassError("a draw without normal or without anomalous pixels")
    reached = normal[::-1].cumsum()[::-1] / normal.sum()
    above = np.append(reached[1:], 0.0)
    return float(np.average(_area(above, reached, limit), weights=defect))


def _check_limit(fpr_limit: float) -> None:
    if not 0 < fpr_limit <= 1:
        raise ValueError(f"fpr_limit must lie in (0, 1], got {fpr_limit}")
