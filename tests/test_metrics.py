import math

import numpy as np
import pytest
import torch
from sklearn.metrics import f1_score

from medssl.metrics import (
    Interval,
    OneClassError,
    auroc,
    auroc_of_draws,
    average_precision,
    bootstrap,
    draws_of_groups,
    f1,
    f1_max,
    interval,
    intervals,
    paired_bootstrap,
)


def test_auroc_counts_the_pairs_in_order_and_half_the_ties():
    scores = torch.tensor([0.1, 0.4, 0.4, 0.9])
    labels = torch.tensor([0, 0, 1, 1])
    assert auroc(scores, labels) == pytest.approx((1 + 0.5 + 1 + 1) / 4)
    assert auroc(-scores, labels) == pytest.approx(0.5 / 4)


def test_average_precision_by_hand():
    scores, labels = torch.tensor([4.0, 3, 2, 1]), torch.tensor([1, 0, 1, 0])
    assert average_precision(scores, labels) == pytest.approx((1 / 1 + 2 / 3) / 2)


@pytest.mark.parametrize("labels", [[0, 0, 0], [1, 1, 1], [0, 1, -1]])
def test_labels_must_be_of_two_kinds(labels):
    with pytest.raises(OneClassError, match="0 and 1"):
        auroc(torch.rand(3), torch.tensor(labels))


def test_scores_that_are_nan_are_refused():
    with pytest.raises(ValueError, match="1 of 2 scores are NaN"):
        auroc(torch.tensor([0.0, torch.nan]), torch.tensor([0, 1]))


def mean(values: torch.Tensor) -> float:
    return float(values.double().mean())


def test_the_interval_of_a_mean_is_that_of_the_normal_approximation():
    values = torch.randn(400, generator=torch.Generator().manual_seed(0))
    found = bootstrap(mean, values, groups=[None] * 400, repeats=4000)
    error = 1.96 * float(values.std()) / math.sqrt(400)
    assert found.value == pytest.approx(mean(values))
    assert found.low == pytest.approx(found.value - error, abs=0.01)
    assert found.high == pytest.approx(found.value + error, abs=0.01)


def test_items_of_one_group_are_drawn_together():
    """Copies of an item in its group tell nothing new, so the interval keeps its width."""
    values = torch.randn(50, generator=torch.Generator().manual_seed(0))
    groups = [f"patient{i}" for i in range(50)]
    single = bootstrap(mean, values, groups=groups, repeats=4000)
    copied = bootstrap(mean, values.repeat(9), groups=groups * 9, repeats=4000)
    assert copied.high - copied.low == pytest.approx(single.high - single.low, rel=1e-6)
    alone = bootstrap(mean, values.repeat(9), groups=[None] * 450, repeats=4000)
    assert alone.high - alone.low < 0.5 * (single.high - single.low)


def test_fewer_groups_than_items_are_refused():
    values = torch.arange(10.0)
    with pytest.raises(ValueError, match=r"3 groups for \[10\] items"):
        bootstrap(mean, values, groups=[None] * 3)
    with pytest.raises(ValueError, match="3 groups"):
        paired_bootstrap(mean_score, values, values, values, [None] * 3)


def test_rows_of_all_arrays_stay_together():
    scores = torch.arange(40.0)
    labels = (scores >= 20).long()
    found = bootstrap(auroc, scores, labels, groups=[None] * 40, repeats=50)
    assert (found.value, found.low, found.high) == (1.0, 1.0, 1.0)


def test_a_draw_of_one_class_is_drawn_again():
    scores, labels = torch.tensor([1.0, 2, 3, 4]), torch.tensor([0, 0, 0, 1])
    found = bootstrap(auroc, scores, labels, groups=[None] * 4, repeats=200)
    assert found == Interval(1.0, 1.0, 1.0)


def test_an_interval_that_hardly_a_draw_allows_is_refused():
    def of_all(values: torch.Tensor) -> float:
        if len(values.unique()) < 15:  # 15! / 15**15, three of a million draws, hold every item
            raise OneClassError("one class")
        return 0.0

    with pytest.raises(OneClassError, match="too few groups"):
        bootstrap(of_all, torch.arange(15.0), groups=[None] * 15, repeats=10)


def test_the_seed_decides_the_interval():
    values = torch.randn(30, generator=torch.Generator().manual_seed(0))
    first = bootstrap(mean, values, groups=[None] * 30, seed=1)
    assert first == bootstrap(mean, values, groups=[None] * 30, seed=1)
    assert first != bootstrap(mean, values, groups=[None] * 30, seed=2)
    assert np.isfinite(list(first.to_dict().values())).all()


def test_the_auroc_of_many_draws_is_that_of_each():
    generator = torch.Generator().manual_seed(0)
    scores = torch.randint(0, 6, (30,), generator=generator).float()  # with ties
    labels = torch.arange(30) % 3 // 2
    groups = [f"patient{n // 2}" for n in range(30)]
    counts = draws_of_groups(groups, 20, seed=1)
    assert counts.shape == (20, 30)
    assert torch.equal(counts[:, ::2], counts[:, 1::2])  # a patient comes whole
    found = auroc_of_draws(scores, labels, counts)
    for count, value in zip(counts, found, strict=True):
        rows = torch.arange(30).repeat_interleave(count)
        assert value.item() == pytest.approx(auroc(scores[rows], labels[rows]))
    one_class = torch.zeros(1, 30, dtype=torch.int64)
    one_class[0, 0] = 3
    assert auroc_of_draws(scores, labels, one_class).isnan().all()
    scores[3] = torch.nan
    with pytest.raises(ValueError, match="1 of 30 scores are NaN"):
        auroc_of_draws(scores, labels, counts)


@pytest.mark.parametrize("levels", [1, 4, 1000])
def test_f1_max_is_the_best_of_every_threshold(levels):
    generator = torch.Generator().manual_seed(levels)
    labels = (torch.rand(60, generator=generator) < 0.3).long()
    scores = torch.randint(0, levels, (60,), generator=generator) + 0.3 * levels * labels
    scores = scores.float()
    every = [f1_score(labels, scores >= t) for t in scores.unique()]
    assert f1_max(scores, labels) == pytest.approx(max(every))


def test_infinite_scores_are_tied_like_any_others():
    found = f1_max(torch.tensor([torch.inf, torch.inf, 0.0]), torch.tensor([1, 0, 0]))
    assert found == pytest.approx(2 / 3)


def test_f1_at_a_threshold_is_that_of_scikit_learn():
    labels = torch.tensor([0, 0, 1, 1, 1])
    above = torch.tensor([True, False, True, True, False])
    assert f1(above, labels) == pytest.approx(f1_score(labels, above))
    assert f1(torch.zeros(5, dtype=torch.bool), labels) == 0
    with pytest.raises(OneClassError, match="anomalous"):
        f1(above[:2], labels[:2])
    with pytest.raises(ValueError, match="one label per score"):
        f1(above, labels[2:3])


def test_many_draws_at_once_give_the_intervals_of_one_by_one():
    values = torch.randn(30, generator=torch.Generator().manual_seed(0)).double()

    def two(counts: torch.Tensor) -> np.ndarray:
        means = (counts * values).sum(1) / counts.sum(1)
        first = torch.where(counts[:, 0] == 0, torch.nan, means)  # asks for another draw
        return torch.stack([first, 2 * means], 1).numpy()

    def one(counts: torch.Tensor) -> float:
        if counts[0] == 0:
            raise OneClassError("without the first")
        return mean(values.repeat_interleave(counts))

    setting = {"groups": [None] * 30, "repeats": 120, "seed": 3}
    found = intervals({"mean": mean(values), "twice": 2 * mean(values)}, two, **setting)
    alone = interval(mean(values), one, **setting)
    for side in ("value", "low", "high"):
        assert getattr(found["mean"], side) == pytest.approx(getattr(alone, side), abs=1e-12)
        assert getattr(found["twice"], side) == pytest.approx(2 * getattr(alone, side), abs=1e-12)


def mean_score(scores: torch.Tensor, labels: torch.Tensor) -> float:
    return mean(scores)


def test_a_constant_lead_is_certain_however_the_items_vary():
    scores = 100 * torch.randn(40, generator=torch.Generator().manual_seed(0)).double()
    labels = torch.zeros(40)
    found = paired_bootstrap(mean_score, scores + 0.5, scores, labels, [None] * 40, repeats=200)
    ahead = found.difference
    assert (ahead.value, ahead.low, ahead.high) == pytest.approx((0.5, 0.5, 0.5))
    assert found.a_larger == 1.0
    assert (found.a, found.b) == (mean(scores + 0.5), mean(scores))
    back = paired_bootstrap(mean_score, scores, scores + 0.5, labels, [None] * 40, repeats=200)
    assert back.a_larger == 0.0


def test_the_interval_of_a_difference_is_that_of_the_normal_approximation():
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(400, generator=generator).double() for _ in range(2))
    found = paired_bootstrap(mean_score, a, b, torch.zeros(400), [None] * 400, repeats=4000)
    error = 1.96 * float((a - b).std()) / math.sqrt(400)
    assert found.difference.high - found.difference.value == pytest.approx(error, abs=0.015)
    assert found.difference.value - found.difference.low == pytest.approx(error, abs=0.015)
    z = float(found.difference.value) / (error / 1.96)
    assert found.a_larger == pytest.approx((1 + math.erf(z / math.sqrt(2))) / 2, abs=0.03)


def test_equal_detectors_share_the_draws():
    scores, labels = torch.rand(30), torch.arange(30) % 2
    found = paired_bootstrap(auroc, scores, scores, labels, [None] * 30, repeats=50)
    assert found.a_larger == 0.5
    assert found.to_dict()["difference"] == {"value": 0.0, "low": 0.0, "high": 0.0}
