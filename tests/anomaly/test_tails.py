"""Thresholds for pixels: what a tail keeps, and that the expected share of pixels holds."""

import math

import numpy as np
import pytest
import torch

from anomaly.calibration import Calibration, required_normals
from anomaly.tails import SHARES, MapTail, controlled_level

STEP = 10**0.2  # from one share of a tail to the next


def maps(rng, count, pixels):
    """Maps of normals that differ in how much of them is high, as real ones do."""
    spread = rng.gamma(2.0, size=(count, 1))
    return rng.normal(size=(count, pixels)) * spread


def exact_level(values, rate):
    """The lowest of all map values that controls the mean exact share, by trying each."""
    count = len(values)
    for level in np.unique(values):
        total = (values > level).mean(1).sum()
        if (total + 1) / (count + 1) <= rate:
            return level
    return None


@pytest.mark.parametrize("pixels", [1, 7, 1000, 100_000])
def test_a_tail_bounds_every_share_from_above_by_less_than_a_step(pixels):
    values = np.random.default_rng(0).normal(size=pixels).astype(np.float32)
    tail = MapTail.of(torch.from_numpy(values))
    for level in [*np.quantile(values, np.linspace(0, 1, 50)), *tail.values, -9.0, 9.0]:
        exact = float((values > level).mean())
        assert exact <= tail.share_above(level)
        assert tail.share_above(level) <= max(exact, SHARES[1]) * STEP + 1e-12 or pixels < 1000
    assert tail.share_above(float(values.max())) == 0
    assert tail.share_above(float(values.min()) - 1) == 1


def test_each_value_of_a_tail_is_the_lowest_with_its_share_above_it():
    values = torch.arange(100.0)  # k of them lie above 99 - k
    tail = MapTail.of(values)
    allowed = [math.floor(round(share * 100, 9)) for share in SHARES]
    assert tail.values == tuple(99.0 - most for most in allowed)


def test_tied_values_are_above_or_below_together():
    tail = MapTail.of(torch.tensor([0.0] * 90 + [1.0] * 10))
    assert [tail.share_above(level) for level in (-0.5, 0.0, 0.5, 1.0)] == pytest.approx(
        [1.0, 0.1, 0.1, 0.0]
    )
    assert set(MapTail.of(torch.full((3, 4), 2.5)).values) == {2.5}


def test_what_is_outside_the_source_has_no_part_in_a_tail():
    values = torch.rand(2, 20, 30)
    holed = torch.full((4, 20, 30), torch.nan)
    holed[1:3] = values
    assert MapTail.of(holed) == MapTail.of(values)
    with pytest.raises(ValueError, match="no value anywhere"):
        MapTail.of(torch.full((3, 3), torch.nan))
    with pytest.raises(ValueError, match="not finite"):
        MapTail.of(torch.tensor([1.0, torch.inf]))


@pytest.mark.parametrize("rate", [0.05, 0.1, 0.3])
def test_the_level_is_at_or_just_above_the_one_found_by_trying_every_value(rate):
    rng = np.random.default_rng(1)
    values = maps(rng, 60, 400)
    tails = [MapTail.of(torch.from_numpy(one)) for one in values]
    level, exact = controlled_level(tails, rate), exact_level(values.astype(np.float32), rate)
    assert level >= exact
    kept = ((values > level).mean(1).sum() + 1) / 61
    assert rate / STEP - 0.02 <= kept <= rate  # 0.02: the items' own, one in 61


def test_maps_whose_shares_are_kept_get_exactly_the_level_found_by_trying_every_value():
    shares = (SHARES[-10], SHARES[-5])  # 1 % and 10 %: of 100 pixels, 1 and 10 are high
    assert shares == pytest.approx((0.01, 0.1))
    rng = np.random.default_rng(2)
    values = np.zeros((40, 100))
    for row, one in enumerate(values):
        one[:10] = 1 + rng.random()
        one[:1] = 5 + rng.random() + row % 2
    tails = [MapTail.of(torch.from_numpy(one)) for one in values]
    for rate in (0.033, 0.043, 0.072, 0.095, 0.147):  # none is met exactly
        assert controlled_level(tails, rate) == exact_level(values.astype(np.float32), rate)


@pytest.mark.parametrize("rate", [0.02, 0.1])
def test_over_300_draws_the_expected_share_of_a_new_normal_is_at_most_the_rate(rate):
    rng = np.random.default_rng(3)
    shares = []
    for _ in range(300):
        drawn = maps(rng, 60 + 20, 200)
        tails = [MapTail.of(torch.from_numpy(one)) for one in drawn[:60]]
        level = controlled_level(tails, rate)
        shares.append((drawn[60:] > level).mean())
    error = np.std(shares) / math.sqrt(len(shares))
    assert np.mean(shares) <= rate + 3 * error
    assert np.mean(shares) >= (rate - 1 / 61) / STEP - 3 * error  # not needlessly strict


@pytest.mark.parametrize("rate", [0.01, 0.05, 0.07, 0.29])
def test_a_pixel_rate_takes_as_many_normals_as_an_item_rate(rate):
    needed = required_normals(rate)
    tail = MapTail.of(torch.full((50,), 49.0))
    assert controlled_level([tail] * needed, rate) == 49.0
    assert controlled_level([tail] * (needed - 1), rate) is None


def test_the_pixel_threshold_of_a_calibration_is_far_below_that_of_whole_maps():
    rng = np.random.default_rng(4)
    values = maps(rng, 99, 500)
    calibration = Calibration.from_scores(
        values.max(1).tolist(),
        values.max(1).tolist(),
        rate=0.05,
        method="split",
        tails=[MapTail.of(torch.from_numpy(one)) for one in values],
    )
    assert calibration.pixel_threshold(0.02) < calibration.map_threshold
    assert calibration.pixel_threshold(0.02) > calibration.pixel_threshold(0.1)
    assert calibration.pixel_threshold(0.009) is None
    with pytest.raises(ValueError, match="between 0 and 1"):
        calibration.pixel_threshold(0.0)


def test_a_calibration_without_tails_says_so():
    plain = Calibration.from_scores([1.0] * 19, [1.0] * 19, rate=0.05, method="split")
    with pytest.raises(ValueError, match="no map tails; calibrate again"):
        plain.pixel_threshold(0.05)
    with pytest.raises(ValueError, match="19 scores and 1 tails"):
        Calibration.from_scores(
            [1.0] * 19, [1.0] * 19, rate=0.05, method="split", tails=[MapTail.of(torch.ones(3))]
        )
