"""Metrics by group against scikit-learn and the closed forms of normal means."""

import math

import pytest
import torch
from scipy.stats import norm, studentized_range
from sklearn.metrics import roc_auc_score

from medssl.metrics import auroc
from medssl.probes.groups import age_band, by_group


def mean(values: torch.Tensor) -> float:
    return float(values.mean())


def normal_groups(means: dict[str, float], size: int = 400):
    """`size` patients of one item in each group, whose sample has exactly the mean and deviation 1.

    Returns the items and their groups.
    """
    generator = torch.Generator().manual_seed(0)
    draws = torch.randn(len(means), size, generator=generator, dtype=torch.float64)
    draws = (draws - draws.mean(1, keepdim=True)) / draws.std(1, keepdim=True, correction=0)
    values = draws + torch.tensor(list(means.values()))[:, None]
    return values.flatten(), [name for name in means for _ in range(size)]


def alone(count: int) -> list[str | None]:
    return [None] * count


def scored(groups: list[str], seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(2, (len(groups),), generator=generator)
    return labels + torch.randn(len(groups), generator=generator), labels


def test_each_group_has_the_metric_of_its_own_items():
    column = ["a", "b", None, "c"] * 30
    scores, labels = scored(column)
    report = by_group(
        auroc, scores, labels, column=column, patients=alone(120), repeats=20, minimum=5
    )
    assert [group.name for group in report.groups] == ["a", "b", "c"]
    for group in report.groups:
        rows = [row for row, name in enumerate(column) if name == group.name]
        expected = roc_auc_score(labels[rows].numpy(), scores[rows].numpy())
        assert group.value.value == pytest.approx(expected)
        assert group.value.low < expected < group.value.high
        assert (group.items, group.patients) == (30, 30)
    assert report.unknown == 30


def test_the_extremes_are_the_smallest_and_the_largest_value():
    values, column = normal_groups({"b": 0.5, "a": 2.0, "c": -1.0})
    found = by_group(mean, values, column=column, patients=alone(1200), repeats=50).extremes
    assert (found.worst, found.best) == ("c", "a")
    assert found.lowest.value == pytest.approx(-1)
    assert found.gap.value == pytest.approx(3)


def test_intervals_of_means_have_their_closed_forms():
    """One group: 1.96 standard errors. The lowest of four: Sidak's. Their range: Tukey's."""
    values, column = normal_groups({"a": 0.0, "b": 1.0, "c": 2.0, "d": 3.0})
    report = by_group(mean, values, column=column, patients=alone(1600), repeats=4000)
    error = 1 / math.sqrt(400)
    for group in report.groups:
        assert group.value.high - group.value.low == pytest.approx(2 * 1.96 * error, rel=0.08)
    sidak = norm.ppf((1 + 0.95**0.25) / 2) * error
    tukey = studentized_range.ppf(0.95, 4, math.inf) * error
    found = report.extremes
    assert found.lowest.high - found.lowest.value == pytest.approx(sidak, rel=0.05)
    assert found.lowest.value - found.lowest.low == pytest.approx(sidak, rel=0.05)
    assert found.gap.high - found.gap.value == pytest.approx(tukey, rel=0.05)
    assert found.gap.value - found.gap.low == pytest.approx(tukey, rel=0.05)


def test_a_gap_of_chance_starts_at_zero():
    values, column = normal_groups({"a": 0.0, "b": 0.05, "c": 0.1})
    gap = by_group(mean, values, column=column, patients=alone(1200), repeats=200).extremes.gap
    assert gap.value == pytest.approx(0.1)
    assert gap.low == 0


def test_items_of_one_patient_count_once():
    """Every patient's item ten times over tells nothing new."""
    values, column = normal_groups({"a": 0.0, "b": 1.0}, size=50)
    patients = [str(row) for row in range(100)]
    once = by_group(mean, values, column=column, patients=patients, repeats=100)
    tenfold = by_group(
        mean, values.repeat(10), column=column * 10, patients=patients * 10, repeats=100
    )
    assert [group.patients for group in tenfold.groups] == [50, 50]
    assert [group.items for group in tenfold.groups] == [500, 500]
    assert tenfold.extremes.gap.high == pytest.approx(once.extremes.gap.high)
    assert tenfold.groups[0].value.low == pytest.approx(once.groups[0].value.low)


def test_a_group_without_a_value_says_why_and_counts_nowhere():
    column = ["large"] * 20 + ["normal only"] * 20 + ["small"] * 19
    scores, labels = scored(column)
    labels[20:40] = 0
    report = by_group(
        auroc, scores, labels, column=column, patients=alone(59), repeats=20, minimum=20
    )
    large, normal_only, small = report.groups
    assert large.value is not None
    assert large.reason is None
    assert normal_only.value is None
    assert "labels must hold 0 and 1" in normal_only.reason
    assert small.value is None
    assert small.reason == "19 of 20 patients needed"
    assert report.extremes is None


def test_a_draw_that_misses_a_class_of_a_group_counts_for_the_others_only():
    column = ["even"] * 30 + ["rare"] * 30
    scores, labels = scored(column)
    labels[30:] = 0
    labels[40] = 1  # every third draw lacks it
    scores[40] = 100
    report = by_group(auroc, scores, labels, column=column, patients=alone(60), repeats=200)
    without = by_group(
        auroc, scores, labels, column=column[:30] + [None] * 30, patients=alone(60), repeats=200
    )
    even, rare = report.groups
    assert even == without.groups[0]
    assert rare.value.low == pytest.approx(1)
    assert math.isfinite(report.extremes.gap.high)


def test_the_seed_decides_the_intervals():
    values, column = normal_groups({"a": 0.0, "b": 1.0}, size=20)
    first, again, other = (
        by_group(mean, values, column=column, patients=alone(40), repeats=50, seed=seed)
        for seed in (1, 1, 2)
    )
    assert first == again
    assert first != other


def test_one_entry_per_item_is_required():
    with pytest.raises(ValueError, match=r"\[3, 2, 3\]"):
        by_group(mean, torch.zeros(3), column=["a", "b"], patients=alone(3))


@pytest.mark.parametrize(
    ("age_years", "band"),
    [
        (0, "under 18"),
        (17.9, "under 18"),
        (18, "18-39"),
        (39.9, "18-39"),
        (40, "40-59"),
        (79, "60-79"),
        (80, "80 and over"),
        (None, None),
    ],
)
def test_an_age_belongs_to_the_band_of_its_completed_years(age_years, band):
    assert age_band(age_years) == band


@pytest.mark.parametrize("age_years", [-1, math.nan, math.inf])
def test_an_impossible_age_is_refused(age_years):
    with pytest.raises(ValueError, match="number of years"):
        age_band(age_years)


@pytest.mark.parametrize("edges", [(), (40, 18), (18, 18)])
def test_edges_must_increase(edges):
    with pytest.raises(ValueError, match="increase"):
        age_band(30, edges)
