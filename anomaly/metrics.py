"""How well maps find defects and lesions, pixel by pixel, on raw scores."""

from collections.abc import Iterable, Sequence

import numpy as np
from torch import Tensor

from anomaly.pixel_bins import ItemPixels, scores_of
from anomaly.pixel_bins import lesions as lesions
from anomaly.streaming import (
    FPR_LIMITS,
    CountedPixels,
    area,
    aupro_name,
    check_both_kinds,
    check_limit,
)
from anomaly.tails import most_above
from medssl.metrics import Interval

_MISSED = -np.inf


def pixel_auroc(maps: Iterable[Tensor], masks: Iterable[Tensor | None]) -> float:
    """Chance that an anomalous pixel scores above a normal one; see `PixelScores`."""
    return PixelScores(maps, masks).auroc()


def pixel_average_precision(maps: Iterable[Tensor], masks: Iterable[Tensor | None]) -> float:
    """Mean precision over the anomalous pixels; see `PixelScores`."""
    return PixelScores(maps, masks).average_precision()


def aupro(maps: Iterable[Tensor], masks: Iterable[Tensor | None], fpr_limit: float = 0.3) -> float:
    """Mean overlap with the lesions up to a false-positive rate; see `PixelScores`."""
    return PixelScores(maps, masks).aupro(fpr_limit)


class PixelScores:
    """The pixels of all test items, sorted once; every normal pixel counts, of whichever item.

    Takes some 10 bytes per pixel; `anomaly.streaming.StreamingPixelScores` takes none.

    maps: one of any spatial shape per item, larger is more anomalous. A normal pixel that is NaN is
        left out; an anomalous one was not looked at, and counts as missed at every threshold.
    masks: of the same shapes, non-zero on the defect; None for an item without one.
    Raises OneClassError where there is no anomalous or no normal pixel.
    """

    def __init__(self, maps: Iterable[Tensor], masks: Iterable[Tensor | None]) -> None:
        self.items = [ItemPixels.of(*pair) for pair in zip(maps, masks, strict=True)]
        check_both_kinds(
            sum(len(item.defect) for item in self.items),
            sum(len(item.normal) for item in self.items),
        )
        defect = np.concatenate([item.defect for item in self.items])
        every = np.sort(np.concatenate([item.normal for item in self.items]))
        order = np.argsort(defect)[::-1]  # searching in order stays in the cache
        defect = defect[order]
        self.normal = every
        self.share = np.concatenate([item.share for item in self.items])[order]
        self.missed = scores_of(defect) == _MISSED
        self.found = len(defect) - defect[::-1].searchsorted(defect, "left")  # at or above each
        self.false = len(every) - every.searchsorted(defect, "left")  # normal ones at or above
        self.reached = self.false / len(every)
        self.above = 1 - every.searchsorted(defect, "right") / len(every)

    def auroc(self) -> float:
        """Area under the pixels' ROC curve, ties counting half."""
        return float(area(self.above, self.reached, 1.0).mean())

    def average_precision(self) -> float:
        """Mean, over the anomalous pixels, of the precision at the score of each; 0 if missed."""
        precision = self.found / (self.found + self.false)
        return float(np.where(self.missed, 0, precision).mean())

    def aupro(self, fpr_limit: float = 0.3) -> float:
        """Area under the per-region overlap curve up to `fpr_limit`, divided by it.

        At each threshold the overlap is the mean, over connected lesions (touching by corners
        counts), of the share of the lesion found (Bergmann et al., IJCV 2021,
        https://doi.org/10.1007/s11263-020-01400-4). Every distinct score is a threshold, and the
        curve is linear between them, also at the limit.
        """
        check_limit(fpr_limit)
        return float(np.average(area(self.above, self.reached, fpr_limit), weights=self.share))

    def best_pooled_dice(self) -> float:
        """The largest Dice (which is F1) of all pixels together; an oracle, masks choose it."""
        dice = 2 * self.found / (self.found + self.false + len(self.found))
        return float(np.where(self.missed, 0, dice).max())

    def level(self, fpr: float) -> float:
        """The lowest score that at most this share of the normal pixels lies above."""
        place = len(self.normal) - 1 - most_above(fpr, len(self.normal))
        return float(scores_of(self.normal[place]))

    def intervals(
        self, groups: Sequence[str | None], *, repeats: int = 1000, seed: int = 0
    ) -> dict[str, Interval]:
        """Every pixel metric with its bootstrap interval by group, as `Curves.all` names them.

        groups: patient or part of each item; an item without one is its own.
        The values are exact, but for `dice_oracle`, whose thresholds are the edges of bins. In the
        draws, pixels are counted in bins, as `StreamingPixelScores` does.
        """
        exact = {
            "pixel_auroc": self.auroc(),
            "pixel_average_precision": self.average_precision(),
            **{aupro_name(limit): self.aupro(limit) for limit in FPR_LIMITS},
            "dice_pooled_oracle": self.best_pooled_dice(),
        }
        return self.counted().intervals(exact, groups, repeats=repeats, seed=seed)

    def counted(self) -> CountedPixels:
        """The same pixels in bins."""
        return CountedPixels(self.items)
