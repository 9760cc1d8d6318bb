"""Standings over tests, against scipy and by hand."""

import pytest
import torch
from scipy.stats import rankdata, zscore

from medssl.probes.standings import standings


def test_z_scores_and_ranks_are_scipys():
    values = torch.rand(3, 5, 4, generator=torch.Generator().manual_seed(0)).double()
    values[:, 0, 1] = values[:, 0, 2]  # equals share a place
    found = {one.name: one for one in standings(values, ["a", "b", "c", "d"])}
    z = zscore(values[0].numpy(), axis=1).mean(0)
    rank = rankdata(-values[0].numpy(), axis=1).mean(0)
    for place, name in enumerate("abcd"):
        assert found[name].z.value == pytest.approx(z[place])
        assert found[name].rank.value == pytest.approx(rank[place])


def test_the_best_comes_first_and_intervals_hold_the_draws():
    values = torch.zeros(101, 1, 2)
    values[0, 0, 1] = 1  # b is ahead as measured
    values[1:81, 0, 1] = 1  # and in 80 of 100 draws
    values[81:, 0, 0] = 1
    first, second = standings(values, ["a", "b"])
    assert (first.name, second.name) == ("b", "a")
    assert (first.z.value, first.z.low, first.z.high) == (1, -1, 1)
    assert (first.rank.value, first.rank.low, first.rank.high) == (1, 1, 2)


def test_a_draw_that_cannot_be_measured_counts_nowhere():
    values = torch.tensor([[[1.0, 0.0], [1.0, 0.0]]]).repeat(4, 1, 1)
    values[1, 0] = values[2] = torch.nan
    (first, _) = standings(values, ["a", "b"])
    assert (first.z.low, first.z.high) == (1, 1)


def test_encoders_that_are_all_equal_have_no_z():
    (first, second) = standings(torch.ones(2, 3, 2), ["a", "b"])
    assert (first.z.value, second.z.value) == (0, 0)
    assert (first.rank.value, second.rank.value) == (1.5, 1.5)


def test_what_is_no_battle_is_refused():
    with pytest.raises(ValueError, match=r"got \(2, 3, 1\) for 1 names"):
        standings(torch.ones(2, 3, 1), ["a"])
