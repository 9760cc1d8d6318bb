"""New normals against a calibration: false alarms stay rare, and shifts are found."""

import math
from itertools import pairwise, product

import numpy as np
import pytest
from scipy.stats import kstest

from anomaly.calibration import Calibration
from anomaly.drift import check_drift, sequential_p_values, simple_jumper


def calibrated(scores, rate=0.05):
    return Calibration.from_scores(scores, scores, rate=rate, method="split")


def test_p_values_without_ties_lie_in_the_gap_that_their_rank_leaves():
    p_values = sequential_p_values([1.0, 2.0, 3.0], [2.5, 9.0, 0.0], seed=0)
    lowest = [1 / 4, 0 / 5, 5 / 6]  # larger ones among those before, of all so far
    for p, low, size in zip(p_values, lowest, (4, 5, 6), strict=True):
        assert low <= p <= low + 1 / size


def test_p_values_of_exchangeable_scores_are_uniform_and_independent_even_with_ties():
    rng = np.random.default_rng(0)
    found = np.array(
        [
            sequential_p_values(rng.integers(0, 4, 9).tolist(), rng.integers(0, 4, 4), seed=seed)
            for seed in range(3000)
        ]
    )
    for place in range(4):
        assert kstest(found[:, place], "uniform").pvalue > 0.001
    correlated = np.corrcoef(found.T) - np.eye(4)
    assert np.abs(correlated).max() < 4 / math.sqrt(3000)


def test_early_p_values_do_not_change_when_more_items_follow():
    rng = np.random.default_rng(1)
    held_out, scores = rng.normal(size=30).tolist(), rng.normal(size=20).tolist()
    whole = sequential_p_values(held_out, scores, seed=3)
    assert sequential_p_values(held_out, scores[:7], seed=3) == whole[:7]


def test_the_jumper_is_the_mean_over_all_ways_to_bet():
    # brute force: every sequence of slopes, with its chance as a Markov chain
    p_values, jump, slopes = [0.1, 0.9, 0.02, 0.3], 0.2, (-1, 0, 1)
    expected = []
    for length in range(1, 5):
        total = 0.0
        for way in product(slopes, repeat=length):
            chance = 1 / 3
            for before, after in pairwise(way):
                chance *= (1 - jump) * (before == after) + jump / 3
            bets = [1 + slope * (p - 0.5) for slope, p in zip(way, p_values, strict=False)]
            total += chance * math.prod(bets)
        expected.append(math.log10(total))
    assert simple_jumper(p_values, jump=jump) == pytest.approx(expected)


def test_the_expected_wealth_is_one_after_any_number_of_uniform_p_values():
    rng = np.random.default_rng(2)
    wealth = [10 ** simple_jumper(rng.uniform(size=10))[-1] for _ in range(3000)]
    assert np.mean(wealth) == pytest.approx(1, abs=4 * np.std(wealth) / math.sqrt(3000))


def test_small_and_large_p_values_both_pay():
    assert simple_jumper([0.01] * 30)[-1] > 3
    assert simple_jumper([0.99] * 30)[-1] > 3
    assert simple_jumper([0.5] * 30)[-1] == pytest.approx(0)


def test_a_very_long_drift_stays_a_finite_number():
    assert (
        900 < simple_jumper([0.001] * 6000)[-1] < 1100
    )  # 6000 times log10 of about 1.5, less jumps


@pytest.mark.parametrize("decimals", [None, 0])  # 0: heavy ties
@pytest.mark.parametrize(("count", "new"), [(100, 60), (30, 200)])
def test_without_drift_alarms_are_as_rare_as_alpha(count, new, decimals):
    rng = np.random.default_rng(4)
    alarms, sequence = 0, 0
    for seed in range(150):
        scores = rng.normal(size=count + new)
        scores = (scores if decimals is None else scores.round(decimals)).tolist()
        found = check_drift(calibrated(scores[:count]), scores[count:], alpha=0.2, seed=seed)
        alarms += found.drift
        sequence += found.alarm_at is not None
    assert alarms <= 150 * 0.2 + 3 * math.sqrt(150 * 0.2 * 0.8)
    assert sequence <= 150 * 0.1 + 3 * math.sqrt(150 * 0.1 * 0.9)


@pytest.mark.parametrize(("shift", "reason"), [(1.5, "higher"), (-1.5, "lower")])
def test_a_shift_is_found_with_its_direction_and_in_time(shift, reason):
    rng = np.random.default_rng(5)
    found = [
        check_drift(
            calibrated(rng.normal(size=200).tolist()),
            (rng.normal(size=60) + shift).tolist(),
            alpha=0.01,
        )
        for _ in range(20)
    ]
    assert all(reason in one.reasons and "sequence" in one.reasons for one in found)
    assert not any({"higher", "lower"} <= set(one.reasons) for one in found)
    assert all(one.alarm_at is not None and one.alarm_at < 50 for one in found)
    assert all(("alarms" in one.reasons) == (shift > 0) for one in found)


def test_what_changes_late_is_noticed_after_the_change():
    rng = np.random.default_rng(6)
    scores = np.concatenate([rng.normal(size=150), rng.normal(2.0, size=80)]).tolist()
    found = check_drift(calibrated(rng.normal(size=300).tolist()), scores, alpha=0.01)
    assert found.alarm_at is not None
    assert 150 < found.alarm_at < 200
    assert found.largest_log10_wealth >= math.log10(200)


def two_above_all(held_out: int, new: int) -> float:
    """Chance that at least two of `new` exchangeable scores lie above all held-out ones."""
    total = held_out + new
    ways = sum(
        math.comb(total - above - 1, held_out - 1)  # the `above` largest are new, the next is not
        for above in range(2, new + 1)
    )
    return ways / math.comb(total, new)


def test_the_numbers_of_a_small_check_are_those_by_hand():
    held_out = [float(i) for i in range(1, 20)]
    found = check_drift(calibrated(held_out), [30.0, 31.0, 5.0], alpha=0.1)
    assert (found.num_calibration, found.num_new, found.num_alarms) == (19, 3, 2)
    assert found.alarms == pytest.approx(two_above_all(19, 3))  # the threshold is the largest


def test_with_too_few_held_out_normals_alarms_are_left_out():
    found = check_drift(calibrated([1.0, 2.0, 3.0]), [1.5, 2.5], alpha=0.1)
    assert (found.num_alarms, found.alarms, found.drift) == (None, None, False)


def test_what_cannot_be_compared_is_refused():
    with pytest.raises(ValueError, match="0 new and 3 held-out"):
        check_drift(calibrated([1.0, 2.0, 3.0]), [], alpha=0.1)
    with pytest.raises(ValueError, match="1 new and 0 held-out"):
        check_drift(calibrated([]), [1.0], alpha=0.1)
    with pytest.raises(ValueError, match="not finite"):
        check_drift(calibrated([1.0]), [math.nan], alpha=0.1)
    with pytest.raises(ValueError, match="between 0 and 1"):
        check_drift(calibrated([1.0]), [1.0], alpha=1.0)
