"""Conformal thresholds and p-values from held-out normal scores.

Split conformal: Vovk et al., Algorithmic Learning in a Random World, 2005; as p-values of an
anomaly test: Bates et al., Annals of Statistics 2023, https://arxiv.org/abs/2104.08279.
The folds of "cross" and what they do not promise: Barber et al., Annals of Statistics 2021,
https://arxiv.org/abs/1905.02928.
"""

import math
from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, Self

Method = Literal["split", "cross", "path", "none"]


@dataclass(frozen=True)
class Calibration:
    """What held-out normals say about a score; larger scores are more anomalous.

    The unit is the item that gets a verdict, never a pixel or a slice. Uncalibrated, every
    question is answered with None.

    rate: the chosen false-alarm rate, in (0, 1).
    method: where the held-out normals came from.
    scores: their raw scores, sorted.
    map_maxima: the largest value of each one's map on its source grid, sorted.
    fitted_on: pixel hashes that `fit` saw and calibration must not.
    guarantee: what the threshold promises, in words.
    """

    rate: float
    method: Method
    scores: tuple[float, ...]
    map_maxima: tuple[float, ...]
    fitted_on: tuple[str, ...]
    guarantee: str

    def __post_init__(self) -> None:
        _check_rate(self.rate)
        for name in ("scores", "map_maxima"):
            object.__setattr__(self, name, tuple(_sorted_finite(getattr(self, name), name)))
        if len(self.scores) != len(self.map_maxima):
            raise ValueError(
                f"one map maximum per score: got {len(self.scores)} scores "
                f"and {len(self.map_maxima)} maxima"
            )

    @classmethod
    def from_scores(
        cls,
        scores: Sequence[float],
        map_maxima: Sequence[float],
        *,
        rate: float,
        method: Method,
        fitted_on: Iterable[str] = (),
        num_groups: int | None = None,
    ) -> Self:
        """A calibration with the promise that belongs to its method.

        num_groups: patients or parts among the held-out items; None where each is its own.
        Raises ValueError for a score that is not finite.
        """
        return cls(
            rate=rate,
            method=method,
            scores=tuple(scores),
            map_maxima=tuple(map_maxima),
            fitted_on=tuple(sorted(set(fitted_on))),
            guarantee=_guarantee(method, rate, len(scores), num_groups),
        )

    @property
    def calibrated(self) -> bool:
        """Whether there are enough held-out normals for the rate."""
        return self.missing == 0

    @property
    def missing(self) -> int:
        """How many more held-out normals the rate needs; 0 when calibrated."""
        return max(0, required_normals(self.rate) - len(self.scores))

    @property
    def threshold(self) -> float | None:
        """A score above it is anomalous."""
        return conformal_threshold(self.scores, self.rate)

    @property
    def map_threshold(self) -> float | None:
        """At most the chosen share of normal items has any place of its map above it."""
        return conformal_threshold(self.map_maxima, self.rate)

    def p_value(self, score: float) -> float | None:
        """Share of normals at least as anomalous, this one counted; smaller is more anomalous.

        It is at most `rate` exactly where `anomalous` says True.
        """
        _check_score(score)
        if not self.calibrated:
            return None
        as_high = len(self.scores) - bisect_left(self.scores, score)
        return (1 + as_high) / (len(self.scores) + 1)

    def anomalous(self, score: float) -> bool | None:
        """Whether the score lies above the threshold."""
        _check_score(score)
        threshold = self.threshold
        return None if threshold is None else score > threshold

    def to_dict(self) -> dict[str, Any]:
        """Plain values for calibration.json, thresholds included for readers of the file."""
        derived = {"threshold": self.threshold, "map_threshold": self.map_threshold}
        return {**asdict(self), **derived, "missing": self.missing}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """The inverse of `to_dict`; the thresholds are computed anew."""
        return cls(
            rate=values["rate"],
            method=values["method"],
            scores=tuple(values["scores"]),
            map_maxima=tuple(values["map_maxima"]),
            fitted_on=tuple(values["fitted_on"]),
            guarantee=values["guarantee"],
        )


def conformal_threshold(scores: Sequence[float], rate: float) -> float | None:
    """The k-th smallest of n held-out normal scores, k = ceil((n + 1)(1 - rate)).

    A new exchangeable normal lies above it with probability at most `rate`, and at least
    rate - 1 / (n + 1) where no scores are tied. None where n is too small for the rate.
    """
    ordered = _sorted_finite(scores, "scores")
    k = _rank(len(ordered), rate)
    return ordered[k - 1] if k <= len(ordered) else None


def required_normals(rate: float) -> int:
    """The fewest held-out normals that give a threshold: ceil(1 / rate) - 1."""
    _check_rate(rate)
    count = max(0, math.floor(1 / rate) - 2)  # below the answer, whatever the rounding
    while _rank(count, rate) > count:
        count += 1
    return count


def false_alarm_interval(
    num_calibration: int, num_test: int, rate: float, *, level: float = 0.95
) -> tuple[float, float]:
    """Where the false-alarm share of `num_test` new normals lies, centrally, with chance `level`.

    Given n held-out normals the true rate of a threshold is Beta(n + 1 - k, k) distributed, so
    the count of alarms is beta-binomial. Returns the lowest and highest share.
    Raises ValueError where the rate is out of reach of `num_calibration` normals.
    """
    from scipy.stats import betabinom

    k = _rank(num_calibration, rate)
    if k > num_calibration:
        raise ValueError(
            f"a rate of {rate} needs {required_normals(rate)} calibration normals, "
            f"got {num_calibration}"
        )
    alarms = betabinom(num_test, num_calibration + 1 - k, k)
    low, high = alarms.ppf([(1 - level) / 2, (1 + level) / 2])
    return float(low) / num_test, float(high) / num_test


def _rank(count: int, rate: float) -> int:
    """k = ceil((count + 1)(1 - rate)), without its rounding; count + 1 where out of reach.

    The largest m with m / (count + 1) <= rate, compared as `p_value` compares, gives k by
    count + 1 - m; so threshold and p-value cannot disagree.
    """
    _check_rate(rate)
    m = math.floor((count + 1) * rate) + 1
    while m / (count + 1) > rate:
        m -= 1
    return count + 1 - m


def _guarantee(method: Method, rate: float, count: int, num_groups: int | None) -> str:
    if count < required_normals(rate):
        return "No promise: the detector is not calibrated."
    text = (
        f"On average over draws of the {count} held-out normal items, a normal item is called "
        f"anomalous with probability at most {rate:g}, if new normal items are exchangeable with "
        f"them{' (they come from a source of their own)' if method == 'path' else ''}."
    )
    if method == "cross":
        text = (
            f"Weaker than a held-out set: the {count} scores come from fold models that stand in "
            "for the final one, which was fitted on all items. If it scores as they do, a normal "
            f"item is called anomalous with probability of about {rate:g}; without that "
            f"assumption there is no bound. The related CV+ bounds it by about {2 * rate:g} "
            "(Barber et al. 2021)."
        )
    if num_groups is not None and num_groups < count:
        text += (
            f" The {count} items come from {num_groups} patients or parts; items of one resemble "
            "each other, so the promise is approximate and varies more than the count suggests."
        )
    return text


def _sorted_finite(values: Sequence[float], name: str) -> list[float]:
    ordered = [float(value) for value in values]
    broken = sum(not math.isfinite(value) for value in ordered)
    if broken:
        raise ValueError(
            f"{broken} of {len(ordered)} calibration {name} are not finite; "
            "find the items the detector cannot score and leave them out"
        )
    return sorted(ordered)


def _check_rate(rate: float) -> None:
    if not 0 < rate < 1:
        raise ValueError(f"the false-alarm rate must lie between 0 and 1, got {rate}")


def _check_score(score: float) -> None:
    if math.isnan(score):
        raise ValueError("the score is NaN; an item without a score has no verdict")
