"""Metrics of scores where an item may have several labels, or none, and some are not known.

Everywhere scores are (S, L), larger is more likely, and labels (S, L) of any dtype: 1 present,
0 absent, -1 unknown. An unknown entry counts nowhere, neither as present nor as absent.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from medssl.metrics import OneClassError, average_precision

_UNKNOWN = -1


def average_precisions(scores: Tensor, labels: Tensor) -> Tensor:
    """Average precision of each label, (L,) float64; NaN without a known present and absent one."""
    _check(scores, labels)
    found = scores.new_full((scores.shape[1],), torch.nan, dtype=torch.float64)
    for label, (of_scores, of_labels) in enumerate(_known(scores, labels)):
        if len(of_labels.unique()) == 2:
            found[label] = average_precision(of_scores, of_labels)
    return found


def mean_average_precision(scores: Tensor, labels: Tensor) -> float:
    """Mean of `average_precisions` over the labels that have one, each counting alike.

    Raises OneClassError where no label is present in one item and absent from another.
    """
    found = average_precisions(scores, labels)
    if found.isnan().all():
        raise OneClassError("no label is known to be present in one item and absent from another")
    return float(found.nanmean())


def real_accuracy(scores: Tensor, labels: Tensor) -> float:
    """Share of items whose highest score belongs to one of their valid labels.

    ReaL accuracy (Beyer et al., "Are we done with ImageNet?", https://arxiv.org/abs/2006.07159,
    sec. 2). Left out are items without a valid label, and those of whose best label it is unknown
    whether it is valid. Of equal scores the first label's counts.

    Raises ValueError where no item is left.
    """
    _check(scores, labels)
    best = labels.gather(1, scores.argmax(1, keepdim=True))[:, 0]  # (S,)
    kept = (labels == 1).any(1) & (best != _UNKNOWN)
    if not kept.any():
        raise ValueError(f"none of the {len(labels)} items has a valid label; check the labels")
    return float((best[kept] == 1).double().mean())


def subset_accuracy(scores: Tensor, labels: Tensor, thresholds: Tensor) -> float:
    """Share of items whose known labels are all called rightly.

    thresholds: (L,); a label is called present at or above its own. Items of which nothing is known
    are left out. Raises ValueError where no item is left.
    """
    _check(scores, labels)
    known = labels != _UNKNOWN
    kept = known.any(1)
    if not kept.any():
        raise ValueError(f"no label of the {len(labels)} items is known; check the labels")
    right = (scores >= thresholds) == (labels == 1)
    return float((right | ~known).all(1)[kept].double().mean())


def calibration_errors(probabilities: Tensor, labels: Tensor, *, bins: int = 15) -> Tensor:
    """Expected calibration error of each label, (L,) float64; NaN where nothing is known.

    How far the mean probability of a bin lies from the share of items in it that have the label,
    weighted by the items (Guo et al., ICML 2017, https://arxiv.org/abs/1706.04599, eq. 3); the bins
    have equal width in [0, 1] and hold their upper end.

    Differs from the paper: each label is a question of its own, and what is binned is the
    probability that the label is present, not that of the called class.
    """
    edges = torch.linspace(0, 1, bins + 1, dtype=torch.float64)[1:-1]

    def bin_of(values: Tensor) -> Tensor:
        return torch.bucketize(values, edges.to(values.device))

    return _calibration(probabilities, labels, bin_of)


def adaptive_calibration_errors(probabilities: Tensor, labels: Tensor, *, bins: int = 15) -> Tensor:
    """As `calibration_errors`, with bins of equally many items, so that none is nearly empty.

    Adaptive calibration error (Nixon et al., https://arxiv.org/abs/1904.01685); items of one
    probability share a bin.
    """

    def bin_of(values: Tensor) -> Tensor:
        first = [-(-len(values) * n // bins) for n in range(1, bins)]  # where bin n begins
        edges = values.sort().values[[item for item in first if item < len(values)]]
        return torch.bucketize(values, edges, right=True)

    return _calibration(probabilities, labels, bin_of)


def best_f1_thresholds(scores: Tensor, labels: Tensor) -> Tensor:
    """The threshold (L,) of each label with the highest F1; of equally good ones the highest.

    Choose on items that neither trained the model nor test it. A label is called present at or
    above its threshold, which is one of its scores; a label that is never known to be present gets
    inf and is never called.
    """
    return _thresholds(scores, labels, lambda hits, called: 2 * hits / (called + hits[-1]))


def thresholds_for_precision(scores: Tensor, labels: Tensor, precision: float) -> Tensor:
    """The threshold (L,) of each label that finds most with at least this precision, in (0, 1].

    Of those that find equally many the highest; inf where none is as precise. See
    `best_f1_thresholds`.
    """
    _check_share("precision", precision)
    return _thresholds(
        scores,
        labels,
        lambda hits, called: torch.where(hits / called >= precision, hits, 0),
    )


def thresholds_for_sensitivity(scores: Tensor, labels: Tensor, sensitivity: float) -> Tensor:
    """The highest threshold (L,) of each label with at least this sensitivity, in (0, 1].

    inf for a label that is never known to be present. See `best_f1_thresholds`.
    """
    _check_share("sensitivity", sensitivity)
    return _thresholds(scores, labels, lambda hits, _: hits / hits[-1] >= sensitivity)


def _thresholds(
    scores: Tensor, labels: Tensor, quality: Callable[[Tensor, Tensor], Tensor]
) -> Tensor:
    """The score of each label, (L,), from which on calling it is best; inf where none is of use.

    quality: takes from the highest to the lowest score of a label how many items are called there,
    (U,), and how many of these have it, both float64; 0 or False where calling is of no use.
    """
    _check(scores, labels)
    found = scores.new_full((scores.shape[1],), torch.inf)
    for label, (of_scores, of_labels) in enumerate(_known(scores, labels)):
        if not of_labels.any():
            continue
        values, place = of_scores.unique(return_inverse=True)  # from the lowest on
        size = len(values)
        hits = torch.bincount(place, of_labels, size).flip(0).cumsum(0)
        called = torch.bincount(place, minlength=size).flip(0).cumsum(0).double()
        worth = quality(hits, called)
        if worth.any():
            found[label] = values.flip(0)[worth.double().argmax()]  # the first of equal ones
    return found


def _calibration(
    probabilities: Tensor, labels: Tensor, bin_of: Callable[[Tensor], Tensor]
) -> Tensor:
    """bin_of: takes the probabilities of one label and gives the number of the bin of each."""
    _check(probabilities, labels)
    if ((probabilities < 0) | (probabilities > 1)).any():
        raise ValueError("expected probabilities in [0, 1]; apply a sigmoid to logits first")
    found = [
        torch.bincount(bin_of(values), values - of_labels).abs().sum() / len(values)
        for values, of_labels in _known(probabilities.double(), labels)
    ]
    return torch.stack(found)


def _known(scores: Tensor, labels: Tensor) -> list[tuple[Tensor, Tensor]]:
    """For each label the scores and the labels, float64, of the items of which it is known."""
    return [
        (of_scores[of_labels != _UNKNOWN], of_labels[of_labels != _UNKNOWN].double())
        for of_scores, of_labels in zip(scores.T, labels.T, strict=True)
    ]


def _check(scores: Tensor, labels: Tensor) -> None:
    if scores.shape != labels.shape or scores.ndim != 2:
        raise ValueError(
            f"scores and labels need one shape (S, L): got {tuple(scores.shape)} and "
            f"{tuple(labels.shape)}"
        )
    if not ((labels == 0) | (labels == 1) | (labels == _UNKNOWN)).all():
        raise ValueError(
            f"labels must be 1 present, 0 absent or -1 unknown, got {labels.unique().tolist()[:10]}"
        )
    if scores.isnan().any():
        raise ValueError(f"{int(scores.isnan().sum())} of {scores.numel()} scores are NaN")


def _check_share(name: str, value: float) -> None:
    if not 0 < value <= 1:
        raise ValueError(f"{name} must lie in (0, 1], got {value}")
