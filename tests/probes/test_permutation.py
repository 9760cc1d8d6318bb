"""Permutations by patient against enumeration."""

from itertools import permutations

import pytest
import torch

from medssl.probes.permutation import by_chance, handed_on


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def zeros(count: int) -> torch.Tensor:
    return torch.zeros(count, dtype=torch.int64)


def test_the_p_value_is_the_share_of_all_orders_that_reach_the_observed_value():
    codes = torch.tensor([2, 0, 1, 1, 0])
    weights = torch.tensor([5.0, 1.0, 2.0, 4.0, 3.0])
    observed = float(codes @ weights.long())
    orders = [float(torch.tensor(order) @ weights.long()) for order in permutations(codes.tolist())]
    exact = sum(value >= observed for value in orders) / len(orders)

    value, p = by_chance(
        lambda block: block.float() @ weights,
        codes,
        torch.arange(5),
        zeros(5),
        repeats=20_000,
        generator=rng(),
    )
    assert value == observed
    assert p == pytest.approx(exact, abs=0.01)


def test_the_smallest_p_value_is_one_of_all_draws_and_the_observed():
    codes = torch.arange(40)
    p = by_chance(
        lambda block: (block == codes).float().mean(1),  # 1 only where nothing moved
        codes,
        torch.arange(40),
        zeros(40),
        repeats=99,
        generator=rng(),
    )[1]
    assert p == pytest.approx(1 / 100)


def test_what_cannot_be_computed_counts_as_large():
    p = by_chance(
        lambda block: torch.full((len(block),), torch.nan),
        torch.arange(4),
        torch.arange(4),
        zeros(4),
        repeats=9,
        generator=rng(),
    )[1]
    assert p == 1


def test_codes_stay_within_their_stratum():
    codes = torch.arange(12)
    strata = torch.tensor([0, 1, 1, 0, 2, 2, 2, 0, 1, 2, 0, 1])
    blocks = list(handed_on(codes, torch.arange(12), strata, repeats=50, generator=rng()))
    handed = torch.cat(blocks)
    assert handed.shape == (50, 12)
    for stratum in (0, 1, 2):
        members = codes[strata == stratum]
        assert (handed[:, strata == stratum].sort(1).values == members).all()
        assert len(handed[:, strata == stratum].unique(dim=0)) > 10


def test_a_patient_gets_the_codes_of_one_other_in_their_order():
    """Patients 0, 1, 2 hold items 0-2, 3-4 and 5, in mixed rows."""
    owners = torch.tensor([1, 0, 2, 0, 1, 0])
    codes = torch.tensor([3, 0, 5, 1, 4, 2])
    circles = {0: [0, 1, 2], 1: [3, 4], 2: [5]}
    givers = set()
    for row in torch.cat(
        list(handed_on(codes, owners, zeros(3), repeats=200, generator=rng()))
    ).tolist():
        received = [
            [row[item] for item in range(6) if owners[item] == patient] for patient in range(3)
        ]
        giver = tuple(next(g for g in circles if got[0] in circles[g]) for got in received)
        assert sorted(giver) == [0, 1, 2]
        for got, of in zip(received, giver, strict=True):
            circle = circles[of]
            start = circle.index(got[0])
            assert got == [circle[(start + step) % len(circle)] for step in range(len(got))]
        givers.add((giver, received[2][0]))
    assert len(givers) == 12  # six orders, and every start of what patient 2 gets


def test_blocks_hold_all_repeats(monkeypatch):
    monkeypatch.setattr("medssl.probes.permutation._BLOCK", 20)
    blocks = list(
        handed_on(torch.arange(6), torch.arange(6), zeros(6), repeats=10, generator=rng())
    )
    assert [len(block) for block in blocks] == [3, 3, 3, 1]
