"""Nearest class mean, learnt class by class or sample by sample without keeping a sample.

Distance-based image classification (Mensink et al., TPAMI 2013,
https://inria.hal.science/hal-00817211); on frozen features as a baseline of continual learning:
Janson et al., 2022, https://arxiv.org/abs/2210.04428.
"""

from typing import Literal, Self

import torch
import torch.nn.functional as F
from torch import Tensor

from medssl.probes.base import Probe

_DIGITS = 9  # of 32 bits: from 2^-149, the last bit of the smallest float32, past the largest
_LAST_BIT = -149
_MASK = 2**32 - 1
_MOST_ROWS = 2**31 - 1  # of one class, so that no digit overflows its int64


class NearestMean(Probe):
    """Each class is the mean of its features; the nearest mean is the likeliest class.

    metric: "euclidean", or "cosine" for 1 - cosine.

    Sums are kept exactly, in integers: any order of classes and any cut of the samples into
    updates gives the same probe as one `fit` of all, bit for bit. Every finite float32 is in range
    (features of other types are rounded to it), and 2^31 - 1 rows of each class.
    Differs from the papers: the metric is not learnt (Mensink et al. learn a projection).
    """

    def __init__(self, *, metric: Literal["euclidean", "cosine"] = "euclidean") -> None:
        super().__init__()
        if metric not in ("euclidean", "cosine"):
            raise ValueError(f"metric must be 'euclidean' or 'cosine', got {metric!r}")
        self.metric = metric
        self.register_buffer("sums_", torch.empty(0, dtype=torch.int64))  # (K, E, digits)
        self.register_buffer("counts_", torch.empty(0, dtype=torch.int64))  # (K,)
        self.sums_: Tensor
        self.counts_: Tensor

    def fit(self, features: Tensor, labels: Tensor, *, groups: Tensor | None = None) -> Self:
        """Forget everything and `update`; groups count for nothing here."""
        fresh = NearestMean(metric=self.metric).update(features, labels)
        self.sums_, self.counts_ = fresh.sums_, fresh.counts_
        return self

    @torch.no_grad()
    def update(self, features: Tensor, labels: Tensor) -> Self:
        """Add features (S, E) of known or new classes, labels (S,) int64 from 0 on.

        Raises ValueError, and learns nothing, where a feature is not finite or does not fit.
        """
        self._check(features, labels)
        values, labels = features.float(), labels.long()
        known, num_classes = len(self.counts_), max(len(self.counts_), int(labels.max()) + 1)
        counts = torch.bincount(labels, minlength=num_classes)
        sums = values.new_zeros(num_classes, values.shape[1], _DIGITS, dtype=torch.int64)
        if known > 0:
            counts[:known] += self.counts_
            sums[:known] = self.sums_
        if counts.max() > _MOST_ROWS:
            raise ValueError(f"a class may have {_MOST_ROWS} rows, got {int(counts.max())}")
        _add_exactly(sums, values, labels)
        self.sums_, self.counts_ = sums, counts
        return self

    @torch.no_grad()
    def scores(self, features: Tensor) -> Tensor:
        """features: (S, E). Returns minus the distances (S, K) float64.

        A class that was never seen, below one that was, gets minus infinity.
        """
        self.check_fitted()
        queries, means = features.double(), self.means()
        if self.metric == "cosine":
            scores = F.normalize(queries, dim=1) @ F.normalize(means, dim=1).mT - 1
        else:  # by differences: the product of matrices would cancel
            scores = -torch.cdist(queries, means, compute_mode="donot_use_mm_for_euclid_dist")
        return scores.masked_fill(self.counts_ == 0, -torch.inf)

    def means(self) -> Tensor:
        """(K, E) float64; NaN for a class that was never seen."""
        self.check_fitted()
        return _rounded(self.sums_) / self.counts_[:, None]

    def selftest(self, noise: Tensor) -> Tensor:
        """What `load_model` compares: the scores of noise for the classes seen."""
        return self.scores(noise)[:, self.counts_ > 0]

    def _check(self, features: Tensor, labels: Tensor) -> None:
        if features.ndim != 2 or labels.shape != features.shape[:1] or len(labels) == 0:
            raise ValueError(
                f"one label per row of features (S, E): got {tuple(features.shape)} and "
                f"{tuple(labels.shape)}"
            )
        if len(self.counts_) > 0 and features.shape[1] != self.sums_.shape[1]:
            raise ValueError(
                f"expected features of {self.sums_.shape[1]} numbers as before, got "
                f"{features.shape[1]}"
            )
        if labels.min() < 0:
            raise ValueError(f"labels count from 0, got {int(labels.min())}")
        if not features.float().isfinite().all():
            raise ValueError("features must be finite and within float32; leave other rows out")

    @classmethod
    def example(cls) -> tuple[Self, Tensor, Tensor]:
        """Two opposite directions with a little noise."""
        labels = torch.tensor([0, 1] * 6)
        noise = torch.randn(12, 4, generator=torch.Generator().manual_seed(0))
        return cls(), F.one_hot(labels, 4) + 0.1 * noise, labels


def _add_exactly(sums: Tensor, values: Tensor, labels: Tensor) -> None:
    """Add float32 values (S, E) to the digits (K, E, digits) of their classes, in place.

    A value is an integer of 24 bits times a power of two, so that it touches two digits of 32 bits;
    integers add up to the same whatever the order. Digits are not carried: each is a plain sum.
    """
    bits = values.contiguous().view(torch.int32).long()
    exponent = (bits >> 23) & 0xFF
    mantissa = (bits & 0x7FFFFF) + ((exponent > 0).long() << 23)  # no hidden bit in subnormals
    shift = exponent.clamp(min=1) - 1  # the mantissa's last bit is 2^(shift - 149)
    moved = torch.where(bits < 0, -mantissa, mantissa) << (shift % 32)
    column = torch.arange(values.shape[1], device=values.device)
    place = (labels[:, None] * len(column) + column) * _DIGITS + shift // 32
    flat = sums.view(-1)
    flat.scatter_add_(0, place.flatten(), (moved & _MASK).flatten())
    flat.scatter_add_(0, place.flatten() + 1, (moved >> 32).flatten())  # rounds down: may be -1


def _rounded(sums: Tensor) -> Tensor:
    """Digits (K, E, digits) as float64 (K, E), right to a few units in the last place."""
    carry = torch.zeros_like(sums[..., 0])
    digits = []
    for digit in sums[..., :-1].unbind(-1):
        carry = carry + digit
        digits.append(carry & _MASK)
        carry = carry >> 32
    total = (sums[..., -1] + carry).double()
    for digit in reversed(digits):
        total = total * 2**32 + digit
    return total * 2.0**_LAST_BIT
