import math

import numpy as np
import pytest
import torch

from medssl.metrics import (
    Interval,
    OneClassError,
    auroc,
    auroc_of_draws,
    average_precision,
    bootstrap,
    draws_of_groups,
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
