"""Permutation tests of items that belong together by patient (Good, Springer 2005)."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

_BLOCK = 1_000_000  # entries of permutations held at once


def by_chance(
    statistic: Callable[[Tensor], Tensor],
    codes: Tensor,
    owners: Tensor,
    strata: Tensor,
    *,
    repeats: int,
    generator: torch.Generator,
) -> tuple[float, float]:
    """A statistic of the codes, and how often it is as large when they are handed on: its p value.

    statistic: of codes (R, S) as R numbers; NaN counts as large. Others: see `handed_on`.
    """
    observed = statistic(codes[None])
    null = [
        statistic(block)
        for block in handed_on(codes, owners, strata, repeats=repeats, generator=generator)
    ]
    as_large = ~(torch.cat(null) < observed - 1e-12)  # rounding must not split equal values
    return observed.item(), (1 + int(as_large.sum())) / (1 + repeats)


def handed_on(
    codes: Tensor, owners: Tensor, strata: Tensor, *, repeats: int, generator: torch.Generator
) -> Iterator[Tensor]:
    """The codes handed on at random among the patients of a stratum, in blocks of (r, S).

    Every patient gets the codes of another, in their order but from a random one on, and from the
    first again after the last.

    codes: (S,). owners: (S,) from 0 to P - 1, whom an item belongs to; everyone has one or more.
    strata: (P,) int64.
    """
    sizes = torch.bincount(owners)
    by_owner = owners.argsort(stable=True)
    starts = sizes.cumsum(0) - sizes
    place = torch.empty_like(by_owner)  # of an item among its patient's
    place[by_owner] = torch.arange(len(by_owner)) - starts[owners[by_owner]]
    by_stratum = strata.argsort()
    most = max(1, _BLOCK // len(owners))
    for first in range(0, repeats, most):
        shape = (min(most, repeats - first), len(sizes))
        giver = torch.empty(shape, dtype=torch.int64)  # (r, P)
        draws = torch.rand(shape, generator=generator, dtype=torch.float64)
        giver[:, by_stratum] = (draws + strata).argsort(1)
        draws = torch.rand(shape, generator=generator, dtype=torch.float64)
        shift = (draws * sizes[giver]).long()
        shifted = (place + shift[:, owners]) % sizes[giver][:, owners]
        yield codes[by_owner[starts[giver][:, owners] + shifted]]
