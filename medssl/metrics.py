"""How well scores tell normal from anomalous, with bootstrap intervals."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

_CONFIDENCE = 0.95
_CHUNK = 50  # draws measured at once


class OneClassError(ValueError):
    """A metric that compares two classes met only one."""


@dataclass(frozen=True, slots=True)
class Interval:
    """A metric's value and its central 95 % bootstrap interval."""

    value: float
    low: float
    high: float

    def to_dict(self) -> dict[str, float]:
        """Plain values for JSON."""
        return asdict(self)


@dataclass(frozen=True, slots=True)
class Difference:
    """A metric of two detectors on the same items, in the same draws.

    a, b: its values. difference: a - b, with its interval.
    a_larger: share of the draws in which a is larger, ties counting half. Where larger is better,
        that is how often a wins; it is no p-value.
    """

    a: float
    b: float
    difference: Interval
    a_larger: float

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)


def auroc(scores: Tensor, labels: Tensor) -> float:
    """Chance that an anomalous item scores above a normal one, ties counting half.

    scores: (S,), larger is more anomalous; labels: (S,), 0 normal, 1 anomalous.
    Raises OneClassError where one of the two is missing.
    """
    from sklearn.metrics import roc_auc_score

    return float(roc_auc_score(*_checked(scores, labels)))


def average_precision(scores: Tensor, labels: Tensor) -> float:
    """Mean precision over the recalls of the anomalous items; see `auroc` for the arguments."""
    from sklearn.metrics import average_precision_score

    return float(average_precision_score(*_checked(scores, labels)))


def f1_max(scores: Tensor, labels: Tensor) -> float:
    """Largest F1 of all thresholds; an oracle, for these labels choose the threshold.

    See `auroc` for the arguments.
    """
    known, values = _checked(scores, labels)
    order = np.argsort(-values, kind="stable")
    found = known[order].cumsum()
    above = np.arange(1, len(order) + 1)
    falling = values[order]
    last = np.append(falling[1:] != falling[:-1], True)  # of equal scores
    return float((2 * found / (above + known.sum()))[last].max())


def f1(above: Tensor, labels: Tensor) -> float:
    """Harmonic mean of precision and recall; 0 where nothing anomalous is above the threshold.

    above: (S,) bool; labels: (S,), 0 normal, 1 anomalous.
    Raises OneClassError where nothing is anomalous.
    """
    _check_pairs(above, labels)
    anomalous = labels == 1
    if not anomalous.any():
        raise OneClassError("F1 needs an anomalous item")
    return float(2 * (above & anomalous).sum() / (above.sum() + anomalous.sum()))


def auroc_of_draws(scores: Tensor, labels: Tensor, counts: Tensor) -> Tensor:
    """`auroc` of many draws at once, (R,) float64; NaN where a draw misses a class.

    scores, labels: (S,) as of `auroc`. counts: (R, S), how often each draw holds each item.
    """
    _check_known(scores)
    values, place = scores.double().unique(return_inverse=True)  # from the smallest on
    weights = counts.double()
    sides = []
    for side in (0, 1):
        of_side = weights * (labels == side)
        total = weights.new_zeros(len(weights), len(values))
        sides.append(total.index_add_(1, place, of_side))  # (R, U)
    normal, anomalous = sides
    below = normal.cumsum(1) - normal / 2  # ties count half
    return (anomalous * below).sum(1) / (normal.sum(1) * anomalous.sum(1))


def draws_of_groups(groups: Sequence[str | None], repeats: int, seed: int) -> Tensor:
    """How often each of `repeats` draws of whole groups holds each item, (R, S) int64."""
    drawn = _resampled(groups, seed)
    return torch.stack([next(drawn) for _ in range(repeats)])


def bootstrap(
    metric: Callable[..., float],
    *arrays: Tensor,
    groups: Sequence[str | None],
    repeats: int = 1000,
    seed: int = 0,
) -> Interval:
    """The metric of the arrays, and its spread when whole groups are drawn with replacement.

    arrays: each (S, ...), row i of each belonging to item i; given to `metric` in this order.
    groups: patient or part of each item; an item without one is its own.
    A draw in which the metric raises OneClassError is drawn again.
    """

    def draw(counts: Tensor) -> float:
        rows = torch.arange(len(counts)).repeat_interleave(counts)
        return metric(*(array[rows] for array in arrays))

    _check_rows(arrays, groups)
    value = metric(*arrays)
    return interval(value, draw, groups=groups, repeats=repeats, seed=seed)


def paired_bootstrap(
    metric: Callable[[Tensor, Tensor], float],
    scores_a: Tensor,
    scores_b: Tensor,
    labels: Tensor,
    groups: Sequence[str | None],
    *,
    repeats: int = 1000,
    seed: int = 0,
) -> Difference:
    """How far apart two detectors are on the same items; both are measured in the same draws.

    metric: of scores (S, ...) and labels (S,).
    scores_a, scores_b: (S, ...), row i of each belonging to item i.
    groups: patient or part of each item; an item without one is its own.
    """

    def draw(counts: Tensor) -> Any:
        rows = torch.arange(len(counts)).repeat_interleave(counts)
        return np.array([metric(scores[rows], labels[rows]) for scores in (scores_a, scores_b)])

    _check_rows((scores_a, scores_b, labels), groups)
    values = np.array([metric(scores, labels) for scores in (scores_a, scores_b)])
    drawn = _collected(_one_by_one(draw), groups, repeats, seed)
    return difference_of(values, drawn)


def difference_of(values: Any, draws: Any) -> Difference:
    """values: (2,), of a and of b; draws: (R, 2), the same in R draws."""
    apart = draws[:, 0] - draws[:, 1]
    larger = (apart > 0).mean() + (apart == 0).mean() / 2
    a, b = map(float, values)
    return Difference(a, b, _central(a - b, apart), float(larger))


def interval(
    value: float,
    draw: Callable[[Tensor], float],
    *,
    groups: Sequence[str | None],
    repeats: int,
    seed: int,
) -> Interval:
    """The interval around `value` of what `draw` makes of resampled groups.

    draw: takes how often each item was drawn, (S,) int64; its OneClassError asks for another draw.
    """
    found = _collected(_one_by_one(draw), groups, repeats, seed)
    return _central(value, found[:, 0])


def intervals(
    values: Mapping[str, float],
    draw: Callable[[Tensor], Any],
    *,
    groups: Sequence[str | None],
    repeats: int,
    seed: int,
) -> dict[str, Interval]:
    """`interval` for several metrics and many draws at once.

    draw: takes how often each of R draws holds each item, (R, S) int64, and gives (R, M), the
        metrics in the order of `values`; a row with NaN asks for another draw.
    """
    found = drawn(draw, groups=groups, repeats=repeats, seed=seed)
    return {
        name: _central(value, found[:, place]) for place, (name, value) in enumerate(values.items())
    }


def drawn(
    draw: Callable[[Tensor], Any], *, groups: Sequence[str | None], repeats: int, seed: int
) -> Any:
    """The metrics of `repeats` draws, (repeats, M) float64; see `intervals`."""
    return _collected(draw, groups, repeats, seed, chunk=_CHUNK)


def _collected(
    draw: Callable[[Tensor], Any],
    groups: Sequence[str | None],
    repeats: int,
    seed: int,
    chunk: int = 1,
) -> Any:
    """(repeats, M) of what `draw` makes of draws (chunk, S), without the rows that hold NaN."""
    found: list[Any] = []
    tries = 0
    draws = _resampled(groups, seed)
    while len(found) < repeats:
        if tries > 100 * repeats:
            raise OneClassError(
                f"only {len(found)} of {tries} draws of groups held both classes; there are too "
                "few groups for an interval"
            )
        measured = draw(torch.stack([next(draws) for _ in range(chunk)]))
        found += [row for row in measured if not np.isnan(row).any()]
        tries += chunk
    return np.stack(found[:repeats])


def _one_by_one(draw: Callable[[Tensor], Any]) -> Callable[[Tensor], Any]:
    """What measures one draw (S,) as what measures a stack of one; OneClassError becomes NaN."""

    def measure(counts: Tensor) -> Any:
        try:
            return np.atleast_1d(draw(counts[0]))[None].astype(float)
        except OneClassError:
            return np.full((1, 1), np.nan)

    return measure


def _central(value: float, draws: Any) -> Interval:
    tail = (1 - _CONFIDENCE) / 2
    low, high = np.quantile(draws, [tail, 1 - tail])
    return Interval(value, float(low), float(high))


def _resampled(groups: Sequence[str | None], seed: int) -> Iterator[Tensor]:
    """Endless draws of as many groups as there are; each says how often every item came, (S,)."""
    names = [(i,) if group is None else group for i, group in enumerate(groups)]
    number = {name: n for n, name in enumerate(dict.fromkeys(names))}
    owner = torch.tensor([number[name] for name in names])
    generator = torch.Generator().manual_seed(seed)
    while True:
        drawn = torch.randint(len(number), (len(number),), generator=generator)
        yield torch.bincount(drawn, minlength=len(number))[owner]


def _check_rows(arrays: Sequence[Tensor], groups: Sequence[str | None]) -> None:
    if any(len(array) != len(groups) for array in arrays):
        raise ValueError(
            f"one group per item: got {len(groups)} groups for {[len(array) for array in arrays]} "
            "items"
        )


def _check_pairs(scores: Tensor, labels: Tensor) -> None:
    if scores.shape != labels.shape or scores.ndim != 1:
        raise ValueError(
            f"one label per score: got scores {tuple(scores.shape)} and labels "
            f"{tuple(labels.shape)}"
        )


def _check_known(scores: Tensor) -> None:
    if scores.isnan().any():
        raise ValueError(f"{int(scores.isnan().sum())} of {len(scores)} scores are NaN")


def _checked(scores: Tensor, labels: Tensor) -> tuple[Any, Any]:
    """(labels, scores) as scikit-learn takes them."""
    _check_pairs(scores, labels)
    if labels.unique().tolist() != [0, 1]:
        raise OneClassError(
            f"labels must hold 0 and 1, got {labels.unique().tolist()}; leave unknown items out"
        )
    _check_known(scores)
    return labels.cpu().numpy(), scores.cpu().numpy()
