"""A metric by site, scanner, sex or age band, and the gap between the groups.

Such gaps are what Goyal et al., 2022, https://arxiv.org/abs/2202.08360 report of self-supervised
encoders.
"""

import math
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from medssl.metrics import Interval, OneClassError, draws_of_groups

_CONFIDENCE = 0.95
_TAILS = ((1 - _CONFIDENCE) / 2, (1 + _CONFIDENCE) / 2)

Metric = Callable[..., float]


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupValue:
    """The metric of one group.

    value: None where `reason` says why there is none. Its interval is that of a group which was
        chosen before its value was known.
    """

    name: str
    items: int
    patients: int
    value: Interval | None
    reason: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Extremes:
    """The worst and the best of several groups, and the gap between them.

    lowest: the worst group's value. Chosen for being the smallest, it tends to lie below the truth;
        its interval allows for the choice and covers the smallest true value of all groups,
        whichever group has it.
    gap: the best group's value less the worst's, which is above zero by chance alone; its interval
        allows for that and covers the largest difference of two true values. Where it starts at
        zero, the groups may well be alike.
    """

    worst: str
    best: str
    lowest: Interval
    gap: Interval


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupReport:
    """The metric of every group, in the order of their names.

    extremes: None where fewer than two groups have a value.
    unknown: number of items without a group; they count nowhere.
    """

    groups: tuple[GroupValue, ...]
    extremes: Extremes | None
    unknown: int

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)


def by_group(
    metric: Metric,
    *arrays: Tensor,
    column: Sequence[str | None],
    patients: Sequence[str | None],
    repeats: int = 1000,
    seed: int = 0,
    minimum: int = 10,
) -> GroupReport:
    """The metric of every group of `column`, with 95 % bootstrap intervals by patient.

    metric: larger is better; raises OneClassError where it has no value.
    arrays: each (S, ...), row i of each belonging to item i; given to `metric` in this order.
    column: the group of each item, None where unknown.
    patients: whom each item belongs to; an item without one is its own.
    minimum: patients that a group needs to be measured.

    All groups are drawn together. The half-width of the intervals of `Extremes` is the 95 %
    quantile, over the draws, of the largest error of a group and of the largest difference of two
    errors, so that one small group widens both; a larger `minimum` leaves it out.
    """
    lengths = [len(array) for array in (*arrays, column, patients)]
    if len(set(lengths)) != 1 or not arrays:
        raise ValueError(
            f"arrays, column and patients need one entry per item, got {lengths} entries"
        )
    names = sorted({name for name in column if name is not None})
    rows = {name: _rows(column, name) for name in names}
    sizes = {name: _number_of_patients(patients, rows[name]) for name in names}
    large = {name: rows[name] for name in names if sizes[name] >= minimum}
    values, reasons = _measured(metric, arrays, large)
    counts = draws_of_groups(patients, repeats, seed)
    measured = {name: rows[name] for name in values}
    draws = np.array([_drawn(metric, arrays, measured, count) for count in counts])  # (R, G)
    intervals = {
        name: Interval(value, *np.nanquantile(draws[:, place], _TAILS).tolist())
        for place, (name, value) in enumerate(values.items())
    }
    reasons |= {n: f"{sizes[n]} of {minimum} patients needed" for n in names if n not in large}
    groups = tuple(
        GroupValue(
            name=name,
            items=len(rows[name]),
            patients=sizes[name],
            value=intervals.get(name),
            reason=reasons.get(name),
        )
        for name in names
    )
    extremes = _extremes(values, draws) if len(values) > 1 else None
    return GroupReport(groups=groups, extremes=extremes, unknown=list(column).count(None))


def age_band(age_years: float | None, edges: Sequence[int] = (18, 40, 60, 80)) -> str | None:
    """The band of an age in completed years: "under 18", "18-39", ..., "80 and over".

    None where the age is unknown. edges: first year of every band but the lowest, increasing.
    """
    if not edges or list(edges) != sorted(set(edges)):
        raise ValueError(f"edges must be one year or several that increase, got {edges}")
    if age_years is None:
        return None
    if not 0 <= age_years < math.inf:
        raise ValueError(f"an age must be a number of years from 0 on, or None; got {age_years}")
    place = bisect_right(edges, age_years)
    if place == 0:
        return f"under {edges[0]}"
    if place == len(edges):
        return f"{edges[-1]} and over"
    return f"{edges[place - 1]}-{edges[place] - 1}"


def _rows(column: Sequence[str | None], name: str) -> Tensor:
    return torch.tensor([row for row, other in enumerate(column) if other == name])


def _number_of_patients(patients: Sequence[str | None], rows: Tensor) -> int:
    found = [patients[row] for row in rows.tolist()]
    return len({patient for patient in found if patient is not None}) + found.count(None)


def _measured(
    metric: Metric, arrays: Sequence[Tensor], rows: dict[str, Tensor]
) -> tuple[dict[str, float], dict[str, str]]:
    """The metric of every group that has one, and why the others have none."""
    values, reasons = {}, {}
    for name, group in rows.items():
        try:
            values[name] = metric(*(array[group] for array in arrays))
        except OneClassError as error:
            reasons[name] = str(error)
    return values, reasons


def _drawn(
    metric: Metric, arrays: Sequence[Tensor], rows: dict[str, Tensor], counts: Tensor
) -> list[float]:
    """The metric of every group in one draw; NaN where a draw misses the group or a class of it."""
    values = []
    for group in rows.values():
        drawn = group.repeat_interleave(counts[group])
        try:
            values.append(metric(*(array[drawn] for array in arrays)) if len(drawn) else math.nan)
        except OneClassError:
            values.append(math.nan)
    return values


def _extremes(values: dict[str, float], draws: np.ndarray) -> Extremes:
    """draws: (R, G), a column per value.

    The smallest of several numbers moves by no more than the largest of their errors, and their
    range by no more than the range of the errors: hence the half-widths.
    """
    worst, best = min(values, key=values.__getitem__), max(values, key=values.__getitem__)
    errors = draws - list(values.values())
    errors = errors[~np.isnan(errors).all(1)]
    off = float(np.quantile(np.nanmax(np.abs(errors), axis=1), _CONFIDENCE))
    spread = np.nanmax(errors, axis=1) - np.nanmin(errors, axis=1)
    apart = float(np.quantile(spread, _CONFIDENCE))
    lowest, gap = values[worst], values[best] - values[worst]
    return Extremes(
        worst=worst,
        best=best,
        lowest=Interval(lowest, lowest - off, lowest + off),
        gap=Interval(gap, max(0.0, gap - apart), gap + apart),
    )
