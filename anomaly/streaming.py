"""Pixel metrics from counts in bins: memory does not grow with the pixels."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from anomaly.pixel_bins import ItemPixels, find_bins, scores_of
from medssl.metrics import (
    Difference,
    Interval,
    OneClassError,
    difference_of,
    drawn,
    intervals,
)

FPR_LIMITS = (0.3, 0.05, 0.01)


class StreamingPixelScores:
    """As `anomaly.metrics.PixelScores`, for more pixels than memory holds.

    maps, masks: as there, but iterated up to three times, and the same each time; one item is held
        at once. A list of tensors will do, and so will an object that reads from disk.

    Pixels are counted in bins of scores (see `anomaly.pixel_bins.find_bins`) that follow the tail
    of the normal pixels. Where a bin holds several scores, they are taken for evenly mixed. AUROC
    and AUPRO at any limit are at most 0.001 off, whatever the scores; average precision was never
    found further off than that.
    """

    def __init__(self, maps: Iterable[Tensor], masks: Iterable[Tensor | None]) -> None:
        self.counted = CountedPixels(_Pairs(maps, masks))
        self.curves = self.counted.curves(torch.ones(1, self.counted.num_items, dtype=torch.int64))

    def auroc(self) -> float:
        """Area under the pixels' ROC curve."""
        return float(self.curves.auroc()[0])

    def average_precision(self) -> float:
        """Mean precision over the anomalous pixels."""
        return float(self.curves.average_precision()[0])

    def aupro(self, fpr_limit: float = 0.3) -> float:
        """Area under the per-region overlap curve up to `fpr_limit`, divided by it."""
        return float(self.curves.aupro(fpr_limit)[0])

    def level(self, fpr: float) -> float:
        """The lowest score that at most this share of the normal pixels lies above."""
        return self.counted.level(fpr)

    def intervals(
        self, groups: Sequence[str | None], *, repeats: int = 1000, seed: int = 0
    ) -> dict[str, Interval]:
        """As `PixelScores.intervals`."""
        return self.counted.intervals({}, groups, repeats=repeats, seed=seed)


class CountedPixels:
    """How many pixels of each item lie in each bin.

    items: the pixels of each; iterated up to three times.
    Raises OneClassError where there is no anomalous or no normal pixel.
    """

    def __init__(self, items: Iterable[ItemPixels]) -> None:
        self.bins = find_bins(lambda: items)
        normal, defect, lesion, marked = [], [], [], []
        for place, item in enumerate(items):
            normal.append(self.bins.normal(item).astype(np.float32))
            if len(item.defect):
                marked.append(place)
                defect.append(self.bins.defect(item, np.ones_like(item.share)).astype(np.float32))
                lesion.append(self.bins.defect(item, item.share).astype(np.float32))
        check_both_kinds(int(sum(counts.sum() for counts in defect)), int(sum(map(np.sum, normal))))
        self.num_items = len(normal)
        self.marked = np.array(marked)  # (m,) items with an anomalous pixel
        self.normal = np.stack(normal)  # (S, K)
        self.defect = np.stack(defect)  # (m, K)
        self.lesion = np.stack(lesion)  # (m, K) the same, each lesion of weight 1
        self.dice = _dice(self.normal[self.marked], self.defect)  # (m, K) of each threshold

    def curves(self, counts: Tensor) -> "Curves":
        """What draws make of it; counts: (R, S), how often each holds each item."""
        weights = counts.numpy().astype(np.float32)
        marked = weights[:, self.marked]
        with np.errstate(invalid="ignore"):
            dice = (marked @ self.dice).astype(float) / marked.sum(1, keepdims=True)
        return Curves(
            normal=(weights @ self.normal).astype(float),
            defect=(marked @ self.defect).astype(float),
            lesion=(marked @ self.lesion).astype(float),
            dice=dice,
            single=self.bins.single,
        )

    def level(self, fpr: float) -> float:
        """The lowest edge of a bin that at most this share of the normal pixels lies above."""
        normal = self.normal.sum(0, dtype=float)
        above = normal.cumsum() - np.where(self.bins.single, normal, 0)
        inside = np.flatnonzero(above[:-1] / normal.sum() <= fpr)
        return float(scores_of(self.bins.starts[inside[-1] if len(inside) else 0]))

    def intervals(
        self,
        exact: Mapping[str, float],
        groups: Sequence[str | None],
        *,
        repeats: int,
        seed: int,
    ) -> dict[str, Interval]:
        """Every pixel metric with its interval; `exact` are values that are known better."""
        if len(groups) != self.num_items:
            raise ValueError(f"one group per item: got {len(groups)} for {self.num_items} items")
        once = torch.ones(1, self.num_items, dtype=torch.int64)
        values = {name: float(value[0]) for name, value in self.curves(once).all().items()}
        return intervals(
            {**values, **exact}, self.measured, groups=groups, repeats=repeats, seed=seed
        )

    def measured(self, counts: Tensor) -> Any:
        """All metrics of draws (R, S), as (R, M) in the order of `Curves.all`."""
        return np.stack(list(self.curves(counts).all().values()), 1)

    def differences(
        self, other: "CountedPixels", groups: Sequence[str | None], *, repeats: int, seed: int
    ) -> dict[str, Difference]:
        """Every pixel metric against that of other maps of the same items, in the same draws."""
        if len(groups) != self.num_items or other.num_items != self.num_items:
            raise ValueError(
                f"the same items are compared: got {self.num_items} and {other.num_items} of them, "
                f"and {len(groups)} groups"
            )

        def both(counts: Tensor) -> Any:
            return np.concatenate([self.measured(counts), other.measured(counts)], 1)  # (R, 2 M)

        once = torch.ones(1, self.num_items, dtype=torch.int64)
        names = list(self.curves(once).all())
        values = both(once)[0].reshape(2, -1)
        draws = drawn(both, groups=groups, repeats=repeats, seed=seed).reshape(repeats, 2, -1)
        return {
            name: difference_of(values[:, place], draws[:, :, place])
            for place, name in enumerate(names)
        }


class Curves:
    """R draws; every array is (R, K), from the bin of the highest scores on.

    Metrics are (R,), NaN where a draw has no normal or no anomalous pixel.

    dice: mean Dice of the items with a lesion, with everything down to a bin called anomalous.
    single: (K,) whether a bin has but one score.
    """

    def __init__(self, *, normal: Any, defect: Any, lesion: Any, dice: Any, single: Any) -> None:
        self.defect, self.lesion, self.dice, self.single = defect, lesion, dice, single
        self.normal = normal
        self.false, self.found = normal.cumsum(1), defect.cumsum(1)
        self.all_false, self.all_found = self.false[:, -1:], self.found[:, -1:]
        self.lacking = ((self.all_false == 0) | (self.all_found == 0))[:, 0]
        some = np.maximum(self.all_false, 1)
        self.above, self.reached = (self.false - normal) / some, self.false / some

    def all(self) -> dict[str, Any]:
        """Every metric by its name in metrics.json; "oracle" where labels chose the threshold."""
        return {
            "pixel_auroc": self.auroc(),
            "pixel_average_precision": self.average_precision(),
            **{aupro_name(limit): self.aupro(limit) for limit in FPR_LIMITS},
            "dice_oracle": self._known(self.dice[:, :-1].max(1)),
            "dice_pooled_oracle": self.best_pooled_dice(),
        }

    def auroc(self) -> Any:
        """Chance that an anomalous pixel scores above a normal one."""
        return self._mean(area(self.above, self.reached, 1.0), self.defect)

    def aupro(self, fpr_limit: float) -> Any:
        """Mean overlap with the lesions up to a false-positive rate."""
        check_limit(fpr_limit)
        return self._mean(area(self.above, self.reached, fpr_limit), self.lesion)

    def average_precision(self) -> Any:
        """Mean precision over the anomalous pixels; a missed one counts as 0."""
        tied = self.found / np.maximum(self.found + self.false, 1)
        false = self.false - self.normal / 2
        before = self.found - self.defect + false + 0.5
        rise = np.log1p(self.defect / before)  # of the sum over 1 / (before + 1/2), ...
        mixed = 1 - false * rise / np.maximum(self.defect, 1e-9)
        precision = np.where(self.single, tied, mixed)
        precision[:, -1] = 0
        return self._mean(precision, self.defect)

    def best_pooled_dice(self) -> Any:
        """The largest Dice of all pixels together, of every threshold that ends a bin."""
        dice = 2 * self.found / np.maximum(self.found + self.false + self.all_found, 1)
        return self._known(dice[:, :-1].max(1))

    def _mean(self, values: Any, weights: Any) -> Any:
        total = np.maximum(weights.sum(1), 1e-300)
        return self._known((values * weights).sum(1) / total)

    def _known(self, values: Any) -> Any:
        return np.where(self.lacking, np.nan, values)


class _Pairs:
    """The pixels of maps with their masks, as often as asked for."""

    def __init__(self, maps: Iterable[Tensor], masks: Iterable[Tensor | None]) -> None:
        self.maps, self.masks = maps, masks

    def __iter__(self) -> Any:
        pairs = zip(self.maps, self.masks, strict=True)
        return (ItemPixels.of(scores, mask) for scores, mask in pairs)


def aupro_name(fpr_limit: float) -> str:
    """What AUPRO up to this limit is called; without a number it is that at 0.3."""
    return "aupro" if fpr_limit == 0.3 else f"aupro_{fpr_limit:g}"


def area(above: Any, reached: Any, limit: float) -> Any:
    """What each anomalous pixel adds to the area up to a false-positive rate, divided by it.

    The curve rises linearly while the rate goes from `above` to `reached`, both in [0, 1].
    """
    width = np.maximum(reached - above, 1e-300)
    risen = np.clip((limit - above) / width, 0, 1)  # share of the rise before the limit
    end = above + risen * (reached - above)
    return (risen * (end - above) / 2 + np.maximum(limit - end, 0)) / limit


def check_limit(fpr_limit: float) -> None:
    """Raises ValueError for a limit that is no rate."""
    if not 0 < fpr_limit <= 1:
        raise ValueError(f"fpr_limit must lie in (0, 1], got {fpr_limit}")


def check_both_kinds(num_anomalous: int, num_normal: int) -> None:
    """Raises OneClassError unless there are anomalous and normal pixels."""
    if num_anomalous == 0 or num_normal == 0:
        raise OneClassError(
            f"pixel metrics need both kinds, got {num_anomalous} anomalous and "
            f"{num_normal} normal pixels with a score"
        )


def _dice(normal: Any, defect: Any) -> Any:
    """Dice of each item at each threshold, (m, K) float32."""
    found = defect.cumsum(1, dtype=float)
    false = normal.cumsum(1, dtype=float)
    return (2 * found / (found + false + found[:, -1:])).astype(np.float32)
