"""Do new normals still look like the normals that a detector was calibrated with?

Looked at once: Kolmogorov-Smirnov between the two samples of scores, and the count of alarms.
Looked at again and again: a conformal test martingale (Vovk, Nouretdinov, Gammerman, "Testing
exchangeability on-line", ICML 2003), here the Simple Jumper of Vovk et al., "Retrain or not
retrain: conformal test martingales for change-point detection", COPA 2021,
https://arxiv.org/abs/2102.10439.
"""

import math
from bisect import bisect_left, bisect_right, insort
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from anomaly.calibration import Calibration, alarm_chance

SLOPES = (-1.0, 0.0, 1.0)
"""How the Simple Jumper bets: on small p-values, on none, on large ones."""


@dataclass(frozen=True, kw_only=True)
class Drift:
    """What new normals say of a calibration; every p-value is small where they differ from it.

    num_calibration, num_new: items on the two sides.
    alpha: the chance of a false `drift`, when a set of new normals is looked at once. The three
        tests and the martingale share it, so that each test has alpha / 6 and the martingale
        alpha / 2, which is all it ever takes, however often one looks.
    higher: p-value that the new scores are larger, and the false-alarm rate with them.
    lower: p-value that they are smaller.
    num_alarms, alarms: new normals above the threshold, and the p-value that they are too many;
        None where the calibration has no threshold.
    log10_wealth: of the martingale after the last item; it begins with 0.
    largest_log10_wealth: at its highest.
    alarm_at: the item, counted from 1, after which the wealth reached 2 / alpha; None where it did
        not.
    """

    num_calibration: int
    num_new: int
    alpha: float
    higher: float
    lower: float
    num_alarms: int | None
    alarms: float | None
    log10_wealth: float
    largest_log10_wealth: float
    alarm_at: int | None

    @property
    def reasons(self) -> tuple[str, ...]:
        """Which of "higher", "lower", "alarms" and "sequence" say that there is drift."""
        tests = {"higher": self.higher, "lower": self.lower, "alarms": self.alarms}
        found = [name for name, p in tests.items() if p is not None and p <= self.alpha / 6]
        return tuple(found if self.alarm_at is None else [*found, "sequence"])

    @property
    def drift(self) -> bool:
        """Whether anything says so."""
        return bool(self.reasons)


def check_drift(
    calibration: Calibration, scores: Sequence[float], *, alpha: float, seed: int = 0
) -> Drift:
    """Compare the scores of new normals, in their order of time, with those of a calibration.

    alpha: chance of a false alarm, in (0, 1), if the new normals are exchangeable with the
        held-out ones. Scores of fold models ("cross") are not those of the final model, and nothing
        is promised then.
    seed: of the random numbers that part ties.
    Raises ValueError where one side is empty, or a score is not finite.
    """
    from scipy.stats import ks_2samp

    if not 0 < alpha < 1:
        raise ValueError(f"alpha must lie between 0 and 1, got {alpha}")
    if not scores or not calibration.scores:
        raise ValueError(
            f"drift compares new normals with held-out ones: got {len(scores)} new and "
            f"{len(calibration.scores)} held-out; calibrate the model, and give normal items"
        )
    if not np.isfinite(scores).all():
        raise ValueError("a new score is not finite; leave out items the detector cannot score")
    threshold = calibration.threshold
    num_alarms = None if threshold is None else sum(score > threshold for score in scores)
    held_out = calibration.scores
    path = simple_jumper(sequential_p_values(held_out, scores, seed=seed))
    reached = [item for item, wealth in enumerate(path, start=1) if wealth >= math.log10(2 / alpha)]
    return Drift(
        num_calibration=len(held_out),
        num_new=len(scores),
        alpha=alpha,
        higher=float(ks_2samp(scores, held_out, alternative="less").pvalue),
        lower=float(ks_2samp(scores, held_out, alternative="greater").pvalue),
        num_alarms=num_alarms,
        alarms=None
        if num_alarms is None
        else alarm_chance(len(held_out), len(scores), calibration.rate, num_alarms),
        log10_wealth=path[-1],
        largest_log10_wealth=max(path),
        alarm_at=reached[0] if reached else None,
    )


def sequential_p_values(
    held_out: Sequence[float], scores: Sequence[float], *, seed: int
) -> list[float]:
    """Of each new score against the held-out ones and all new ones before it; small where large.

    Equal scores are parted at random, which makes the p-values independent and uniform on [0, 1]
    as long as all scores are exchangeable. (Against the held-out ones alone they would not be
    independent, and no martingale.) Those of the first items do not change when more follow.
    """
    generator = np.random.default_rng(seed)
    seen = sorted(held_out)
    p_values = []
    for score in scores:
        larger = len(seen) - bisect_right(seen, score)
        equal = len(seen) - larger - bisect_left(seen, score) + 1  # this one counted
        p_values.append((larger + generator.uniform() * equal) / (len(seen) + 1))
        insort(seen, score)
    return p_values


def simple_jumper(p_values: Sequence[float], *, jump: float = 0.01) -> list[float]:
    """log10 of the wealth, which begins with 1, of one who bets that p-values are not uniform.

    Returned after each of them.

    A third each is bet with the density 1 + slope (p - 1/2) for the slopes -1, 0 and 1, so small
    and large p-values both pay; before each bet the share `jump` of all is dealt out anew, so
    that it follows what changes late. If the p-values are independent and
    uniform, the wealth ever reaches c with probability at most 1 / c (Ville's inequality).
    """
    stakes = np.full(len(SLOPES), 1 / len(SLOPES))
    slopes = np.array(SLOPES)
    wealth, path = 0.0, []
    for p in p_values:
        stakes = (1 - jump) * stakes + jump * stakes.mean()
        stakes = stakes * (1 + slopes * (p - 0.5))
        wealth += math.log10(stakes.sum())
        stakes = stakes / stakes.sum()  # kept at a sum of 1: the wealth itself may overflow
        path.append(wealth)
    return path
