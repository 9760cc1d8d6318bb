"""Conformal thresholds and p-values from held-out normal scores.

Split conformal, and by group ("Mondrian"): Vovk et al., Algorithmic Learning in a Random World,
2005; as p-values of an anomaly test: Bates et al., Annals of Statistics 2023,
https://arxiv.org/abs/2104.08279.
The folds of "cross" and what they do not promise: Barber et al., Annals of Statistics 2021,
https://arxiv.org/abs/1905.02928.
"""

import math
from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import compress
from typing import Any, Literal, Self

from anomaly.tails import MapTail, controlled_level, most_above
from medssl.data.privacy import key_fingerprint, salted

Method = Literal["split", "cross", "path", "none"]


@dataclass(frozen=True)
class Calibration:
    """What held-out normals say about a score; larger scores are more anomalous.

    The unit is the item that gets a verdict, never a pixel or a slice. Uncalibrated, every
    question is answered with None.

    Calibrated by site (or scanner, or line), `of_site` gives the calibration that an item's
    verdict comes from. The thresholds of the whole are then those of all sites together; they hold
    on average over their mix and no further, so that no item gets a verdict from them.

    rate: the chosen false-alarm rate, in (0, 1).
    method: where the held-out normals came from.
    scores: their raw scores, sorted.
    map_maxima: the largest value of each one's map on its source grid, sorted.
    fitted_on: pixel hashes that `fit` saw and calibration must not.
    guarantee: what the threshold promises, in words.
    tails: of each one's map, for `pixel_threshold`; empty where nobody asked for it.
    by: the column that names the sites; None where all items have one threshold.
    sites: the calibration of each site, under its salted name.
    key: fingerprint of the key that salted the names.
    """

    rate: float
    method: Method
    scores: tuple[float, ...]
    map_maxima: tuple[float, ...]
    fitted_on: tuple[str, ...]
    guarantee: str
    tails: tuple[MapTail, ...] = ()
    by: str | None = None
    sites: Mapping[str, "Calibration"] = field(default_factory=dict)
    key: str | None = None

    def __post_init__(self) -> None:
        _check_rate(self.rate)
        for name in ("scores", "map_maxima"):
            object.__setattr__(self, name, tuple(_sorted_finite(getattr(self, name), name)))
        if len(self.scores) != len(self.map_maxima):
            raise ValueError(
                f"one map maximum per score: got {len(self.scores)} scores "
                f"and {len(self.map_maxima)} maxima"
            )
        if self.tails and len(self.tails) != len(self.scores):
            raise ValueError(
                f"one map tail per score: got {len(self.scores)} scores and {len(self.tails)} tails"
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
        tails: Sequence[MapTail] | None = None,
        sites: Sequence[str | None] | None = None,
        by: str | None = None,
    ) -> Self:
        """A calibration with the promise that belongs to its method.

        num_groups: patients or parts among the held-out items; None where each is its own.
        tails: of each item's map on its source grid.
        sites: the site of each item as the table names it, None where it has none: it is salted
            here, for a name may tell a hospital. Each site gets a calibration of its own.
        by: the column that the sites are from.
        Raises ValueError for a score that is not finite, and for sites without `by`.
        """
        whole = cls(
            rate=rate,
            method=method,
            scores=tuple(scores),
            map_maxima=tuple(map_maxima),
            fitted_on=tuple(sorted(set(fitted_on))),
            guarantee=_guarantee(method, rate, len(scores), num_groups),
            tails=tuple(sorted(tails or ())),
        )
        if sites is None and by is None:
            return whole
        if sites is None or by is None or len(sites) != len(scores):
            raise ValueError(
                f"by site takes one site per score and the name of their column: got {by!r}, "
                f"{len(scores)} scores and {'no' if sites is None else len(sites)} sites"
            )
        related = num_groups is not None and num_groups < len(scores)
        parts = {}
        for name in sorted({name for name in sites if name is not None}, key=salted):
            of_name = [site == name for site in sites]
            chosen = (list(compress(values, of_name)) for values in (scores, map_maxima))
            of_tails = None if tails is None else list(compress(tails, of_name))
            part = cls.from_scores(*chosen, rate=rate, method=method, tails=of_tails)
            promise = _guarantee_of_site(part, by, related=related)
            parts[salted(name)] = replace(part, guarantee=promise)
        promise = _guarantee_by_site(whole, list(parts.values()), by)
        return replace(whole, guarantee=promise, by=by, sites=parts, key=key_fingerprint())

    def of_site(self, site: str | None) -> "Calibration":
        """What the verdict on an item of this site comes from; `guarantee` says why there is none.

        That is this calibration itself where it is not by site. Else it is the site's own, and
        nothing replaces it: an item of no site, of one without held-out normals, or of one with
        too few for the rate gets no verdict, for no threshold is known to hold there.

        site: as the table names it, not salted.
        Raises ValueError where the sites were salted with another key.
        """
        if self.by is None:
            return self
        self.check_key()
        if site is not None and salted(site) in self.sites:
            return self.sites[salted(site)]
        which = (
            f"no {self.by} is known" if site is None else f"its {self.by} has no held-out normal"
        )
        nothing = Calibration.from_scores((), (), rate=self.rate, method=self.method)
        return replace(nothing, guarantee=f"No promise for this item: {which}.")

    def check_key(self) -> None:
        """Raises ValueError where the names of the sites were salted with another key."""
        if self.key is not None and self.key != key_fingerprint():
            raise ValueError(
                f"the sites of this calibration were salted with the key {self.key} and yours is "
                f"{key_fingerprint()}, so they cannot be compared; let MEDSSL_KEY_FILE name that "
                "key, or calibrate again"
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

    def pixel_threshold(self, rate: float) -> float | None:
        """A normal item has, in expectation, at most this share of its map above it.

        Not the share of all pixels together: each item counts the same, however large. Far lower
        than `map_threshold`, which keeps every place of an item's map below it. See
        `anomaly.tails.controlled_level` for the promise.

        rate: in (0, 1), of its own; the rate of the verdicts has no part in it.
        None with fewer than `required_normals(rate)` held-out normals.
        Raises ValueError where the calibration was made without tails.
        """
        _check_rate(rate)
        if self.scores and not self.tails:
            raise ValueError("the calibration holds no map tails; calibrate again to keep them")
        return controlled_level(self.tails, rate)

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
        return {
            "rate": self.rate,
            "method": self.method,
            "scores": self.scores,
            "map_maxima": self.map_maxima,
            "fitted_on": self.fitted_on,
            "guarantee": self.guarantee,
            "tails": [tail.values for tail in self.tails],
            "by": self.by,
            "sites": {name: site.to_dict() for name, site in self.sites.items()},
            "key": self.key,
            "threshold": self.threshold,
            "map_threshold": self.map_threshold,
            "missing": self.missing,
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """The inverse of `to_dict`; the thresholds are computed anew.

        A dictionary without tails, sites and key, as earlier versions wrote it, is one without.
        """
        return cls(
            rate=values["rate"],
            method=values["method"],
            scores=tuple(values["scores"]),
            map_maxima=tuple(values["map_maxima"]),
            fitted_on=tuple(values["fitted_on"]),
            guarantee=values["guarantee"],
            tails=tuple(MapTail(tuple(tail)) for tail in values.get("tails", ())),
            by=values.get("by"),
            sites={name: cls.from_dict(site) for name, site in values.get("sites", {}).items()},
            key=values.get("key"),
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
    alarms = _alarms(num_calibration, num_test, rate)
    low, high = alarms.ppf([(1 - level) / 2, (1 + level) / 2])
    return float(low) / num_test, float(high) / num_test


def alarm_chance(num_calibration: int, num_test: int, rate: float, num_alarms: int) -> float:
    """The chance of so many false alarms or more among `num_test` new normals.

    Raises ValueError as `false_alarm_interval`, whose beta-binomial it is; with tied scores the
    chance is smaller yet.
    """
    return float(_alarms(num_calibration, num_test, rate).sf(num_alarms - 1))


def _alarms(num_calibration: int, num_test: int, rate: float) -> Any:
    """The count of false alarms as a SciPy distribution."""
    from scipy.stats import betabinom

    k = _rank(num_calibration, rate)
    if k > num_calibration:
        raise ValueError(
            f"a rate of {rate} needs {required_normals(rate)} calibration normals, "
            f"got {num_calibration}"
        )
    return betabinom(num_test, num_calibration + 1 - k, k)


def _rank(count: int, rate: float) -> int:
    """k = ceil((count + 1)(1 - rate)), without its rounding; count + 1 where out of reach.

    The largest m with m / (count + 1) <= rate, compared as `p_value` compares, gives k by
    count + 1 - m; so threshold and p-value cannot disagree.
    """
    _check_rate(rate)
    return count + 1 - most_above(rate, count + 1)


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


def _guarantee_of_site(site: Calibration, by: str, *, related: bool) -> str:
    """related: whether several of the held-out items come from one patient or part."""
    if not site.calibrated:
        return (
            f"No promise for items of this {by}: it has {len(site.scores)} held-out normal items, "
            f"and the rate takes {required_normals(site.rate)}."
        )
    text = f"For items of this {by} only. {site.guarantee}"
    if related:
        text += (
            " Several held-out items come from one patient or part, so the promise is approximate "
            "and varies more than the count suggests."
        )
    return text


def _guarantee_by_site(whole: Calibration, sites: Sequence[Calibration], by: str) -> str:
    needed = required_normals(whole.rate)
    enough = sum(site.calibrated for site in sites)
    takes = f"the {needed} held-out normal items that the rate takes"
    if not enough:
        return f"No promise: none of {len(sites)} values of {by} has {takes}."
    text = (
        f"Calibrated for each {by} by itself: {enough} of {len(sites)} have {takes}, and items of "
        f"any other {by} get no verdict. "
    )
    if whole.method == "cross":
        return text + f"Weaker than held-out sets, without a bound: see the promise of each {by}."
    return text + (
        f"On average over draws of the held-out normal items of one {by}, a normal item of it is "
        f"called anomalous with probability at most {whole.rate:g}, if new normal items of it are "
        "exchangeable with them."
    )


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
