"""Ridge regression onto classes, with its leave-out errors in closed form.

Regularized least-squares classification: "Notes on regularized least squares" (Rifkin & Lippert,
MIT-CSAIL-TR-2007-025, http://hdl.handle.net/1721.1/37318).
"""

from collections.abc import Iterator
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor

from medssl.probes.base import Probe
from medssl.probes.linear import check_rows

_SHARES = tuple(10 ** (2 - step / 2) for step in range(21))  # 1e2 to 1e-8, strongest first
_UNTOLD = 1.0  # scikit-learn's default


class Ridge(Probe):
    """Minimizes the squared errors of one-hot targets plus strength times the squared weights.

    strength: of the penalty, larger shrinks more; the intercept is free. None takes, of 21 shares
        from 1e2 to 1e-8 of the largest squared singular value of the centred features, the one
        whose squared error is least on groups left out one at a time (without groups, on rows),
        and 1 where there is one group only; `strength_` tells which.
    """

    def __init__(self, *, strength: float | None = None) -> None:
        super().__init__()
        if strength is not None and strength <= 0:
            raise ValueError(f"strength must be positive, got {strength}")
        self.strength = strength
        self.register_buffer("weight_", torch.empty(0))  # (E, K) float64
        self.register_buffer("bias_", torch.empty(0))  # (K,) float64
        self.register_buffer("strength_", torch.empty(0))  # () float64
        self.weight_: Tensor
        self.bias_: Tensor
        self.strength_: Tensor

    @torch.no_grad()
    def fit(self, features: Tensor, labels: Tensor, *, groups: Tensor | None = None) -> Self:
        """Learn from features (S, E) and labels (S,), with every class from 0 to K - 1 among them.

        groups: (S,), whom a row belongs to; counts where the strength is chosen.
        """
        check_rows(features, labels, groups)
        rows, targets = features.double(), F.one_hot(labels.long()).double()
        centre, shares = rows.mean(0), targets.mean(0)
        left, lengths, right = torch.linalg.svd(rows - centre, full_matrices=False)
        if self.strength is None:
            strength = _chosen(left, lengths, targets - shares, groups)
        else:
            strength = lengths.new_tensor(self.strength)
        shrunk = lengths / (lengths**2 + strength)
        self.weight_ = right.mT @ (shrunk[:, None] * (left.mT @ (targets - shares)))
        self.bias_ = shares - centre @ self.weight_
        self.strength_ = strength
        return self

    @torch.no_grad()
    def scores(self, features: Tensor) -> Tensor:
        """features: (S, E). Returns the regressed targets (S, K) float64; rows sum to 1."""
        self.check_fitted()
        return features.double() @ self.weight_ + self.bias_

    @classmethod
    def example(cls) -> tuple[Self, Tensor, Tensor]:
        """Two opposite directions with a little noise."""
        labels = torch.tensor([0, 1] * 6)
        noise = torch.randn(12, 4, generator=torch.Generator().manual_seed(0))
        return cls(), F.one_hot(labels, 4) + 0.1 * noise, labels


def _chosen(left: Tensor, lengths: Tensor, targets: Tensor, groups: Tensor | None) -> Tensor:
    if groups is None:
        groups = torch.arange(len(left), device=left.device)
    if len(groups.unique()) < 2:
        return lengths.new_tensor(_UNTOLD)
    largest = (lengths.max() ** 2).clamp(min=torch.finfo(lengths.dtype).tiny)
    strengths = [largest * share for share in _SHARES]
    errors = [left_out_error(left, lengths, targets, strength, groups) for strength in strengths]
    return strengths[int(torch.stack(errors).argmin())]


def left_out_error(
    left: Tensor, lengths: Tensor, targets: Tensor, strength: Tensor, groups: Tensor
) -> Tensor:
    """Mean squared error of the rows of each group in a fit to all others, without fitting again.

    With H the matrix that makes predictions of targets, the errors of a group are the solution of
    (I - H of the group) e = targets - predictions.

    left (S, R), lengths (R,): left singular vectors and singular values of the centred features.
    targets: (S, K), centred. groups: (S,), two at least.
    """
    kept = lengths**2 / (lengths**2 + strength)
    residual = targets - left @ (kept[:, None] * (left.mT @ targets))
    total = residual.new_zeros(())
    for rows in _of_one_size(groups):
        block = left[rows]  # (groups, size, R)
        hat = (block * kept) @ block.mT + 1 / len(left)  # the free intercept adds 1 / S
        identity = torch.eye(rows.shape[1], dtype=hat.dtype, device=hat.device)
        total += (torch.linalg.solve(identity - hat, residual[rows]) ** 2).sum()
    return total / targets.numel()


def _of_one_size(groups: Tensor) -> Iterator[Tensor]:
    """Row numbers (groups, size) of all groups of one size, for each size."""
    order = groups.argsort(stable=True)
    sizes = groups.unique(return_counts=True)[1]  # in the order of the sorted groups
    starts = sizes.cumsum(0) - sizes
    for size in sizes.unique().tolist():
        places = torch.arange(size, device=groups.device)
        yield order[starts[sizes == size][:, None] + places]
