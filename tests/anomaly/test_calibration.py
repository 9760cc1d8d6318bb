import json
import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from anomaly.calibration import (
    Calibration,
    conformal_threshold,
    false_alarm_interval,
    required_normals,
)

RATES = ["0.01", "0.05", "0.07", "0.1", "0.2", "0.25", "0.29", "0.5", "0.9"]
few_values = st.lists(st.integers(0, 6).map(float), max_size=60)  # many ties
any_values = st.lists(st.floats(-1e6, 1e6, width=32), max_size=60)


def calibrated(scores, rate=0.05, method="split", **more):
    return Calibration.from_scores(scores, scores, rate=rate, method=method, **more)


@pytest.mark.parametrize(
    ("count", "rate", "k"),
    [(19, 0.05, 19), (20, 0.05, 20), (38, 0.05, 38), (39, 0.05, 38), (99, 0.01, 99), (9, 0.1, 9)],
)
def test_the_threshold_is_the_kth_smallest_score(count, rate, k):
    scores = np.random.default_rng(0).permutation(np.arange(1.0, count + 1))
    assert conformal_threshold(scores.tolist(), rate) == k


@pytest.mark.parametrize("rate", RATES)
def test_ranks_and_required_normals_match_exact_fractions(rate):
    exact = Fraction(rate)
    assert required_normals(float(rate)) == math.ceil(1 / exact) - 1
    for count in range(1, 300):
        k = math.ceil((count + 1) * (1 - exact))
        expected = k if k <= count else None
        assert conformal_threshold(range(1, count + 1), float(rate)) == expected


@pytest.mark.parametrize("rate", RATES)
def test_one_normal_fewer_than_required_leaves_it_uncalibrated(rate):
    needed = required_normals(float(rate))
    enough = calibrated([0.0] * needed, float(rate))
    assert (enough.calibrated, enough.missing, enough.threshold) == (True, 0, 0.0)

    short = calibrated([0.0] * (needed - 1), float(rate))
    assert (short.calibrated, short.missing) == (False, 1)
    assert short.threshold is None
    assert short.map_threshold is None
    assert short.p_value(1.0) is None
    assert short.anomalous(1.0) is None


@given(
    st.one_of(few_values, any_values),
    st.one_of(st.sampled_from(RATES).map(float), st.floats(0.02, 0.98)),
    st.data(),
)
def test_a_p_value_is_at_most_the_rate_exactly_where_the_score_is_anomalous(scores, rate, data):
    calibration = calibrated(scores, rate)
    near = [*scores, *np.nextafter(scores, np.inf).tolist(), -1e9, 1e9]
    score = data.draw(st.sampled_from(near))
    p_value = calibration.p_value(score)
    if not calibration.calibrated:
        assert p_value is None
        assert calibration.anomalous(score) is None
    else:
        assert calibration.anomalous(score) == (p_value <= rate)


def test_p_values_have_the_closed_form_with_ties():
    calibration = calibrated([3.0, 1.0, 2.0, 2.0], rate=0.25)
    answers = [calibration.p_value(score) for score in (0.5, 2.0, 2.5, 3.0, 3.5)]
    assert answers == [1.0, 4 / 5, 2 / 5, 2 / 5, 1 / 5]
    assert calibration.threshold == 3.0
    assert [calibration.anomalous(score) for score in (3.0, 3.5)] == [False, True]


@pytest.mark.parametrize("rate", [0.01, 0.05, 0.1])
@pytest.mark.parametrize("decimals", [None, 1])  # 1: heavy ties
def test_over_2000_splits_false_alarms_stay_within_the_rate(rate, decimals):
    rng = np.random.default_rng(1)
    shares = []
    for _ in range(2000):
        scores = rng.gamma(2.0, size=249 + 100)
        scores = scores if decimals is None else scores.round(decimals)
        threshold = conformal_threshold(scores[:249].tolist(), rate)
        shares.append((scores[249:] > threshold).mean())
    mean, error = np.mean(shares), np.std(shares) / math.sqrt(len(shares))
    assert mean <= rate + 3 * error
    if decimals is None:  # not needlessly strict either: rate - 1 / (n + 1) at least
        assert mean >= rate - 1 / 250 - 3 * error


@pytest.mark.parametrize(("count", "rate"), [(19, 0.05), (99, 0.05), (150, 0.1), (250, 0.01)])
def test_realized_rates_follow_the_beta_binomial(count, rate):
    rng = np.random.default_rng(2)
    alarms = []
    for _ in range(4000):
        scores = rng.normal(size=count + 100)
        threshold = conformal_threshold(scores[:count].tolist(), rate)
        alarms.append((scores[count:] > threshold).mean())
    low, high = false_alarm_interval(count, 100, rate)
    inside = np.mean([low <= share <= high for share in alarms])
    assert 0.94 <= inside <= 0.995  # discrete: at least the level, not much more
    assert np.mean(np.array(alarms) < low) <= 0.03
    assert np.mean(np.array(alarms) > high) <= 0.03


def test_one_calibration_normal_at_one_half_makes_every_alarm_count_equally_likely():
    # n = 1, k = 1: the rate is uniform, so the count of 99 is uniform on 0..99 (100 values)
    low, high = false_alarm_interval(1, 99, 0.5)
    assert (low * 99, high * 99) == pytest.approx((2, 97))


def test_the_interval_refuses_a_rate_out_of_reach():
    with pytest.raises(ValueError, match="needs 19 calibration normals, got 18"):
        false_alarm_interval(18, 100, 0.05)


@pytest.mark.parametrize("broken", [math.nan, math.inf, -math.inf])
def test_scores_that_are_not_finite_are_refused(broken):
    with pytest.raises(ValueError, match="1 of 2 calibration scores are not finite"):
        Calibration.from_scores([1.0, broken], [1.0, 1.0], rate=0.5, method="split")
    with pytest.raises(ValueError, match="1 of 2 calibration map_maxima are not finite"):
        Calibration.from_scores([1.0, 1.0], [1.0, broken], rate=0.5, method="split")


def test_a_nan_score_gets_no_verdict():
    calibration = calibrated([1.0, 2.0, 3.0], rate=0.5)
    with pytest.raises(ValueError, match="NaN"):
        calibration.p_value(math.nan)
    with pytest.raises(ValueError, match="NaN"):
        calibration.anomalous(math.nan)


@pytest.mark.parametrize("rate", [0.0, 1.0, -0.1, 5, math.nan])
def test_a_rate_outside_zero_and_one_is_refused(rate):
    with pytest.raises(ValueError, match="between 0 and 1"):
        required_normals(rate)


def test_scores_and_map_maxima_have_their_own_thresholds():
    scores, maxima = [float(i) for i in range(19)], [100.0 - i for i in range(19)]
    calibration = Calibration.from_scores(scores, maxima, rate=0.1, method="path")
    assert (calibration.threshold, calibration.map_threshold) == (17.0, 99.0)
    with pytest.raises(ValueError, match="one map maximum per score"):
        Calibration.from_scores(scores, maxima[1:], rate=0.1, method="path")


def test_calibration_survives_json_bit_for_bit():
    scores = np.random.default_rng(3).normal(size=30).astype(np.float32).tolist()
    calibration = calibrated(scores, fitted_on=["b", "a", "b"])
    assert Calibration.from_dict(json.loads(json.dumps(calibration.to_dict()))) == calibration
    assert calibration.fitted_on == ("a", "b")


def test_each_method_promises_what_it_can():
    scores = [float(i) for i in range(40)]
    promise = {
        method: calibrated(scores, method=method).guarantee for method in ("split", "path", "cross")
    }
    assert "probability at most 0.05" in promise["split"]
    assert promise["path"] != promise["split"]
    assert "source of their own" in promise["path"]
    assert "at most" not in promise["cross"]
    assert "no bound" in promise["cross"]
    assert "about 0.1 " in promise["cross"]
    assert "not calibrated" in calibrated([], method="none").guarantee
    assert "come from 7 patients" in calibrated(scores, num_groups=7).guarantee
    assert "come from" not in promise["split"]
