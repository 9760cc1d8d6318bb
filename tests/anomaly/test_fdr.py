"""Adjusted p-values of a batch: the procedure, and that the rate holds for conformal p-values."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import false_discovery_control

from anomaly.calibration import Calibration
from anomaly.fdr import adjusted_p_values

p_values = st.lists(st.one_of(st.floats(0, 1), st.sampled_from([0.0, 0.05, 0.5, 1.0])), max_size=40)


@given(p_values.filter(bool))
def test_adjusted_p_values_are_those_of_scipy(values):
    np.testing.assert_allclose(adjusted_p_values(values), false_discovery_control(values))


@given(p_values, st.sampled_from([0.01, 0.05, 0.11, 0.3]))
def test_those_at_most_q_are_what_the_step_up_procedure_rejects(values, q):
    ordered = sorted(values)
    passed = [rank for rank, p in enumerate(ordered, start=1) if p * (len(values) / rank) <= q]
    rejected = [p <= ordered[passed[-1] - 1] if passed else False for p in values]
    assert [one <= q for one in adjusted_p_values(values)] == rejected


def test_four_p_values_by_hand():
    # times 4/rank: 0.04, 0.06, 0.052, 0.2; then the least of those at least as large
    assert adjusted_p_values([0.2, 0.01, 0.039, 0.03]) == pytest.approx([0.2, 0.04, 0.052, 0.052])


@pytest.mark.parametrize("count", [3, 20, 49, 100])
def test_equal_p_values_stay_what_they_are(count):
    for normals in range(1, 100):
        p = normals / 100
        assert adjusted_p_values([p] * count) == [p] * count


def test_no_item_and_a_single_one():
    assert adjusted_p_values([]) == []
    assert adjusted_p_values([0.3]) == [0.3]


@pytest.mark.parametrize("broken", [math.nan, -0.1, 1.1])
def test_what_is_no_p_value_is_refused(broken):
    with pytest.raises(ValueError, match="between 0 and 1"):
        adjusted_p_values([0.5, broken])


def test_of_the_discoveries_in_a_batch_the_expected_share_of_normals_is_at_most_q():
    rng = np.random.default_rng(0)
    shares, found = [], []
    for _ in range(400):
        held_out = rng.normal(size=199).tolist()
        calibration = Calibration.from_scores(held_out, held_out, rate=0.05, method="split")
        scores = np.concatenate([rng.normal(size=60), rng.normal(3.0, size=20)])
        values = adjusted_p_values([calibration.p_value(score) for score in scores])
        called = np.array(values) <= 0.2
        shares.append(called[:60].sum() / max(1, called.sum()))
        found.append(called[60:].mean())
    error = np.std(shares) / math.sqrt(len(shares))
    assert np.mean(shares) <= 0.2 * 60 / 80 + 3 * error  # BH keeps q times the share of normals
    assert np.mean(found) > 0.5
