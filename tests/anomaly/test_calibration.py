import json
import math
from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from anomaly.calibration import (
    Calibration,
    alarm_chance,
    conformal_threshold,
    false_alarm_interval,
    required_normals,
)
from anomaly.tails import MapTail

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


@pytest.mark.parametrize("rate", [0.01, 0.05, 0.1])
@pytest.mark.parametrize("decimals", [None, 1])
def test_over_1000_splits_of_one_table_false_alarms_stay_within_the_rate(rate, decimals):
    # as benchmarks/conformal_promise.py does with a table of real scores
    rng = np.random.default_rng(10)
    table = rng.gamma(2.0, size=2 * 120)
    table = table if decimals is None else table.round(decimals)
    shares = []
    for _ in range(1000):
        held_out, new = np.split(rng.permutation(table), 2)
        shares.append((new > conformal_threshold(held_out.tolist(), rate)).mean())
    assert np.mean(shares) <= rate + 3 * np.std(shares) / math.sqrt(1000)
    low, high = false_alarm_interval(120, 120, rate)
    assert np.mean(np.array(shares) > high) <= 0.03
    if decimals is None:
        assert np.mean(np.array(shares) < low) <= 0.03


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


def by_site(counts, rate=0.1, **more):
    """A calibration of sites a, b, c ...: the scores of each begin with its own thousand."""
    sites, scores = [], []
    for place, count in enumerate(counts):
        sites += ["abcdefgh"[place]] * count
        scores += [1000.0 * place + number for number in range(count)]
    order = np.random.default_rng(7).permutation(len(scores))
    sites, scores = [sites[row] for row in order], [scores[row] for row in order]
    maxima = [-score for score in scores]
    return Calibration.from_scores(
        scores, maxima, rate=rate, method="split", sites=sites, by="scanner", **more
    )


def test_each_site_has_the_threshold_and_p_values_of_its_own_normals():
    calibration = by_site([19, 9, 40])
    assert calibration.of_site("a") == replace(
        calibrated([float(i) for i in range(19)], 0.1),
        map_maxima=tuple(-float(i) for i in reversed(range(19))),
        guarantee=calibration.of_site("a").guarantee,
    )
    assert [calibration.of_site(site).threshold for site in "abc"] == [17.0, 1008.0, 2036.0]
    assert [calibration.of_site(site).map_threshold for site in "abc"] == [-1.0, -1000.0, -2003.0]
    assert calibration.of_site("b").p_value(1005.0) == 5 / 10
    assert calibration.of_site("a").p_value(1005.0) == 1 / 20


@pytest.mark.parametrize(
    ("site", "reason"),
    [
        (None, "no scanner is known"),
        ("new", "scanner has no held-out normal"),
        ("b", "8 held-out normal items, and the rate takes 9"),
    ],
)
def test_an_item_of_no_unknown_or_small_site_gets_no_verdict_instead_of_the_pooled_one(
    site, reason
):
    calibration = by_site([19, 8])
    assert calibration.threshold is not None
    own = calibration.of_site(site)
    assert (own.calibrated, own.threshold, own.map_threshold) == (False, None, None)
    assert (own.anomalous(1e9), own.p_value(1e9)) == (None, None)
    assert own.guarantee.startswith("No promise")
    assert reason in own.guarantee


def test_without_sites_every_item_has_the_one_calibration():
    calibration = calibrated([float(i) for i in range(19)])
    assert calibration.of_site(None) is calibration
    assert calibration.of_site("a") is calibration


def test_the_promise_by_site_counts_the_sites_that_have_one():
    promise = by_site([19, 8, 9]).guarantee
    assert "each scanner by itself: 2 of 3 have the 9 held-out" in promise
    assert "probability at most 0.1" in promise
    assert "No promise: none of 2 values of scanner" in by_site([8, 8]).guarantee
    own = by_site([19, 9], num_groups=5).of_site("a").guarantee
    assert own.startswith("For items of this scanner only. On average over draws of the 19")
    assert "from one patient or part" in own
    assert "patient" not in by_site([19, 9], num_groups=28).of_site("a").guarantee


def test_items_without_a_site_count_for_no_site():
    scores = [float(i) for i in range(30)]
    sites = ["a"] * 20 + [None] * 10
    calibration = calibrated(scores, 0.1, sites=sites, by="line")
    assert len(calibration.scores) == 30
    assert calibration.of_site("a").scores == tuple(scores[:20])
    assert len(calibration.sites) == 1


def test_tails_go_to_the_site_of_their_items():
    tails = [MapTail.of(torch.full((4,), float(i))) for i in range(30)]
    sites = ["a", "b"] * 15
    calibration = calibrated([0.0] * 30, 0.1, sites=sites, by="line", tails=tails[::-1])
    assert calibration.tails == tuple(tails)
    assert calibration.of_site("b").tails == tuple(tails[::2])
    assert calibration.of_site("b").pixel_threshold(0.0626) == 28.0
    assert calibration.of_site("a").pixel_threshold(0.0626) == 29.0


def test_sites_are_kept_under_salted_names_and_refused_under_another_key(tmp_path, monkeypatch):
    monkeypatch.setenv("MEDSSL_KEY_FILE", str(tmp_path / "key"))
    tails = [MapTail.of(torch.rand(5, 5)) for _ in range(20)]
    sites = ["St. Mary Hospital"] * 19 + ["Clinic North"]
    calibration = calibrated([1.0] * 20, sites=sites, by="site", tails=tails)
    text = json.dumps(calibration.to_dict())
    assert "Mary" not in text
    assert "Clinic" not in text
    again = Calibration.from_dict(json.loads(text))
    assert again == calibration
    assert again.of_site("St. Mary Hospital").threshold == 1.0
    monkeypatch.setenv("MEDSSL_KEY_FILE", str(tmp_path / "another"))
    with pytest.raises(ValueError, match="salted with the key"):
        again.of_site("St. Mary Hospital")
    with pytest.raises(ValueError, match="salted with the key"):
        again.of_site(None)


def test_a_calibration_that_an_earlier_version_wrote_still_loads():
    written = {
        "rate": 0.5, "method": "split", "scores": [1.0, 2.0], "map_maxima": [3.0, 4.0],
        "fitted_on": ["a"], "guarantee": "as it was", "threshold": 2.0, "map_threshold": 4.0,
        "missing": 0,
    }  # fmt: skip
    calibration = Calibration.from_dict(written)
    assert (calibration.threshold, calibration.map_threshold) == (2.0, 4.0)
    assert (calibration.tails, calibration.by, calibration.sites) == ((), None, {})
    assert calibration.of_site("anything").guarantee == "as it was"


def test_sites_need_the_name_of_their_column_and_one_per_score():
    with pytest.raises(ValueError, match="got None, 2 scores and 2 sites"):
        calibrated([1.0, 2.0], sites=["a", "b"])
    with pytest.raises(ValueError, match="got 'line', 2 scores and 1 sites"):
        calibrated([1.0, 2.0], sites=["a"], by="line")
    with pytest.raises(ValueError, match="got 'line', 2 scores and no sites"):
        calibrated([1.0, 2.0], by="line")


def test_the_rate_holds_at_each_site_where_the_pooled_threshold_breaks_it():
    rng = np.random.default_rng(8)
    shares = {"own": [], "pooled": []}
    for _ in range(400):
        scores = {"a": rng.normal(size=59 + 50), "b": rng.normal(2.0, 2.0, size=59 + 50)}
        held_out = np.concatenate([scores["a"][:59], scores["b"][:59]]).tolist()
        sites = ["a"] * 59 + ["b"] * 59
        calibration = calibrated(held_out, 0.1, sites=sites, by="site")
        shares["pooled"].append((scores["b"][59:] > calibration.threshold).mean())
        shares["own"].append((scores["b"][59:] > calibration.of_site("b").threshold).mean())
    error = np.std(shares["own"]) / math.sqrt(400)
    assert abs(np.mean(shares["own"]) - 0.1) <= 3 * error  # 0.1 exactly, for 60 is a multiple of 10
    assert np.mean(shares["pooled"]) > 0.15


@pytest.mark.parametrize(("count", "rate"), [(19, 0.05), (99, 0.1), (250, 0.01)])
def test_the_chance_of_many_alarms_is_that_of_drawing_ranks(count, rate):
    rng = np.random.default_rng(9)
    scores = rng.normal(size=(20_000, count + 30))
    k = math.ceil((1 - Fraction(str(rate))) * (count + 1))
    threshold = np.sort(scores[:, :count])[:, k - 1]
    alarms = (scores[:, count:] > threshold[:, None]).sum(1)
    for least in (0, 1, 2, 4, 8):
        assert alarm_chance(count, 30, rate, least) == pytest.approx(
            (alarms >= least).mean(), abs=0.012
        )
