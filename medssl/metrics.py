"""How well scores tell normal from anomalous, with bootstrap intervals."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

_CONFIDENCE = 0.95


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


def auroc_of_draws(scores: Tensor, labels: Tensor, counts: Tensor) -> Tensor:
    """`auroc` of many draws at once, (R,) float64; NaN where a draw misses a class.

    scores, labels: (S,) as of `auroc`. counts: (R, S), how often each draw holds each item.
    """
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

    value = metric(*arrays)
    return interval(value, draw, groups=groups, repeats=repeats, seed=seed)


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
    found: list[float] = []
    tries = 0
    for counts in _resampled(groups, seed):
        tries += 1
        if len(found) == repeats:
            break
        if tries > 100 * repeats:
            raise OneClassError(
                f"only {len(found)} of {tries} draws of groups held both classes; there are too "
                "few groups for an interval"
            )
        try:
            found.append(draw(counts))
        except OneClassError:
            continue
    tail = (1 - _CONFIDENCE) / 2
    low, high = np.quantile(found, [tail, 1 - tail])
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


def _checked(scores: Tensor, labels: Tensor) -> tuple[Any, Any]:
    """(labels, scores) as scikit-learn takes them."""
    if scores.shape != labels.shape or scores.ndim != 1:
        raise ValueError(
            f"one label per score: got scores {tuple(scores.shape)} and labels "
            f"{tuple(labels.shape)}"
        )
    if labels.unique().tolist() != [0, 1]:
        raise OneClassError(
            f"labels must hold 0 and 1, got {labels.unique().tolist()}; leave unknown items out"
        )
    if scores.isnan().any():
        raise ValueError(f"{int(scores.isnan().sum())} of {len(scores)} scores are NaN")
    return labels.cpu().numpy(), scores.cpu().numpy()
