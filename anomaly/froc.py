"""Lesions found against false findings (free-response ROC).

The mean recall at 1/8 to 8 false findings per scan is that of LUNA16 (Setio et al., MedIA 2017,
https://arxiv.org/abs/1612.08012), with marked regions in place of its spheres.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from anomaly.pixel_bins import check_grid, lesions
from medssl.metrics import Interval, OneClassError, intervals

RATES = (0.125, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0)
_DEPTH = 4 * max(RATES)  # false findings per item that are looked at first; enough for most draws


@dataclass(frozen=True, slots=True, eq=False)
class Findings:
    """What a map shows above a threshold.

    lesion: (l,) largest score of each marked lesion within a finding; minus infinity where none
        reaches into it.
    false: (f,) largest score of each finding that touches no lesion.
    """

    lesion: Any
    false: Any


def find(
    scores: Tensor,
    mask: Tensor | None,
    *,
    threshold: float,
    spacing: Sequence[float] | None = None,
    min_volume_mm3: float = 0.0,
) -> Findings:
    """Compare the connected regions above `threshold` with the marked ones.

    Pixels that touch by a corner are connected: 8 neighbors in pictures, 26 in volumes. A finding
    and a lesion belong together where they share at least one pixel. NaN is never above.

    scores, mask: (*spatial), larger is more anomalous; the mask is non-zero on lesions, None
        without one.
    spacing: mm, one per axis; without it findings cannot be measured.
    min_volume_mm3: smaller findings are left out (mm2 in pictures).
    """
    if min_volume_mm3 > 0 and spacing is None:
        raise ValueError("min_volume_mm3 needs the spacing of the pixels; leave it out without")
    if spacing is not None and len(spacing) != scores.ndim:
        raise ValueError(f"spacing is one per axis of {tuple(scores.shape)}, got {tuple(spacing)}")
    check_grid(scores, mask)
    values = scores.float().cpu().numpy()
    regions, count = lesions(values > threshold)
    size = np.bincount(regions.ravel(), minlength=count + 1)
    kept = size * math.prod(spacing or ()) >= min_volume_mm3
    kept[0] = False
    above = kept[regions]
    region, value = regions[above], values[above]
    peak = np.full(count + 1, -np.inf, np.float32)
    np.maximum.at(peak, region, value)
    if mask is None:
        return Findings(np.zeros(0, np.float32), peak[kept])
    owner, num_lesions = lesions(mask.cpu().numpy() != 0)
    inside = owner[above]
    best = np.full(num_lesions + 1, -np.inf, np.float32)
    np.maximum.at(best, inside, value)
    kept[region[inside > 0]] = False
    return Findings(best[1:], peak[kept])


class FROC:
    """Recall of the lesions of all items against false findings per item.

    At a threshold t no lower than that of `find`, a lesion is found where a finding reaches t
    within it, and a finding that touches no lesion is one false finding where it reaches t. Above
    the threshold of `find` nothing is labeled anew: what is connected there stays one finding.

    findings: of each item, normal ones included.
    Raises OneClassError where no lesion is marked.

    Differs from LUNA16: recall is not interpolated between thresholds. It stays what it is at the
    threshold of `find` where that many false findings are never reached.
    """

    def __init__(self, findings: Sequence[Findings]) -> None:
        self.num_items = len(findings)
        self.num_lesions = np.array([len(item.lesion) for item in findings])  # (S,)
        if self.num_lesions.sum() == 0:
            raise OneClassError("FROC needs a marked lesion")
        self.num_found = np.array([int((item.lesion > -np.inf).sum()) for item in findings])
        self.num_false = np.array([len(item.false) for item in findings])
        scores = np.concatenate([*(i.lesion for i in findings), *(i.false for i in findings)])
        false = np.arange(len(scores)) >= self.num_lesions.sum()
        items = np.arange(self.num_items)
        owner = np.concatenate(
            [
                np.repeat(items, self.num_lesions),
                np.repeat(items, self.num_false),
            ]
        )
        order = np.argsort(-scores)
        order = order[scores[order] > -np.inf]
        self.scores, self.false, self.owner = scores[order], false[order], owner[order]  # (E,)
        self.ends = np.append(self.scores[1:] != self.scores[:-1], True)[: len(order)]
        enough = np.flatnonzero(self.false)[math.ceil(_DEPTH * self.num_items) - 1 :]
        lowest = self.scores[enough[0]] if len(enough) else -np.inf
        self.num_first = int((self.scores >= lowest).sum())  # those of `_DEPTH`, with their equals

    def curve(self) -> tuple[Any, Any]:
        """False findings per item and recall, (T,) each, from the highest threshold on."""
        return self._curve(np.ones(self.num_items), self.num_first)

    def recalls(self, rates: Sequence[float] = RATES) -> list[float]:
        """The largest recall with at most so many false findings per item."""
        return self._recalls(np.ones(self.num_items), rates).tolist()

    def mean_recall(self, rates: Sequence[float] = RATES) -> float:
        """The mean of `recalls`."""
        return float(np.mean(self.recalls(rates)))

    def last(self) -> tuple[float, float]:
        """Recall and false findings per item at the threshold of `find`."""
        recall, false = self._last(np.ones((1, self.num_items)))[0]
        return float(recall), float(false)

    def interval(self, groups: Sequence[str | None], *, repeats: int, seed: int) -> Interval:
        """`mean_recall` with an interval from drawn groups of items."""

        def draw(counts: Tensor) -> Any:
            return np.array([[self._recalls(row, RATES).mean()] for row in counts.numpy()])

        values = {"": self.mean_recall()}
        return intervals(values, draw, groups=groups, repeats=repeats, seed=seed)[""]

    def intervals_of_last(
        self, groups: Sequence[str | None], *, repeats: int, seed: int
    ) -> tuple[Interval, Interval]:
        """`last` with intervals from drawn groups of items."""
        values = dict(zip(("recall", "false"), self.last(), strict=True))
        found = intervals(
            values,
            lambda counts: self._last(counts.numpy()),
            groups=groups,
            repeats=repeats,
            seed=seed,
        )
        return found["recall"], found["false"]

    def _curve(self, weights: Any, count: int) -> tuple[Any, Any]:
        """Of the first scores; weights: (S,) how often each item counts.

        Recall is NaN where no lesion does.
        """
        counted, is_false, ends = weights[self.owner[:count]], self.false[:count], self.ends[:count]
        false = (counted * is_false).cumsum()[ends] / weights.sum()
        lesion_weight = float(weights @ self.num_lesions)
        found = (counted * ~is_false).cumsum()[ends]
        return false, found / lesion_weight if lesion_weight else np.full(len(found), np.nan)

    def _recalls(self, weights: Any, rates: Sequence[float]) -> Any:
        allowed = np.array(rates) + 1e-9
        false, recall = self._curve(weights, self.num_first)
        if self.num_first < len(self.scores) and false[-1] <= allowed.max():
            false, recall = self._curve(weights, len(self.scores))  # others had the false findings
        start = 0.0 if weights @ self.num_lesions else np.nan
        recall = np.append(start, recall)  # above every score
        return recall[false.searchsorted(allowed, "right")]

    def _last(self, weights: Any) -> Any:
        """(R, 2) recall and false findings per item; weights (R, S)."""
        with np.errstate(invalid="ignore"):
            recall = weights @ self.num_found / (weights @ self.num_lesions)
        return np.stack([recall, weights @ self.num_false / weights.sum(1)], 1)
