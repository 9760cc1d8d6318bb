"""How a metric grows with the number of items, and what more of them would bring.

By a logarithmic law, which Sun et al., ICCV 2017, https://arxiv.org/abs/1707.02968 find up to 300
million pictures, and by a power law that levels off, as Hestness et al., 2017,
https://arxiv.org/abs/1712.00409 find of errors.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from medssl.metrics import Interval

_EXPONENTS = torch.logspace(math.log10(0.02), math.log10(3), 300, dtype=torch.float64)
_STRAIGHT = torch.tensor([torch.nan], dtype=torch.float64)
_FEWEST_SIZES = 4  # three parameters, and one size to be left out
_TAIL = 0.025


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Law:
    """value = a + b log10(n) of n items; or a - b n^-c, which levels off at a.

    coefficients: (1 + R, 3) float64, a, b and c: as fitted, then from R resampled sets of draws; c
        is NaN in the logarithmic law.
    error: root mean square error of the mean values of sizes that were left out of the fit, one at
        a time.
    """

    name: str
    coefficients: Tensor
    error: float

    @property
    def parameters(self) -> dict[str, Interval]:
        """Of a, b and, in the power law, c."""
        columns = zip("abc", self.coefficients.mT, strict=True)
        return {name: _interval(column) for name, column in columns if not column.isnan().any()}

    def at(self, size: float) -> Interval:
        """The mean value of sets of `size` items."""
        return _interval(self.values(size))

    def gain(self, size: float, larger: float) -> Interval:
        """How much more `larger` items bring than `size` items."""
        return _interval(self.values(larger) - self.values(size))

    def values(self, size: float) -> Tensor:
        """The value of `size` items by each row of the coefficients, (1 + R,)."""
        a, b, c = self.coefficients.mT
        return a + b * _growth(self.coefficients.new_tensor([size]), c)[:, 0]

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        parameters = {name: interval.to_dict() for name, interval in self.parameters.items()}
        return {"name": self.name, "parameters": parameters, "error": self.error}


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ScalingReport:
    """Both laws, the one that tells left-out sizes better first, and the largest size seen."""

    laws: tuple[Law, Law]
    largest: int

    @property
    def answer(self) -> str:
        """In words: whether twice the data would help, and by how much."""
        gains = [law.gain(self.largest, 2 * self.largest) for law in self.laws]
        helps = "would help" if min(gain.low for gain in gains) > 0 else "may not help"
        foretold = " and ".join(
            f"{_words(gain)} more by the {law.name} law, whose error on sizes left out is "
            f"{law.error:.2g}"
            for gain, law in zip(gains, self.laws, strict=True)
        )
        found = self.laws[0].parameters
        bent = "c" in found and found["c"].low > _EXPONENTS[0]
        level = f" It levels off at {_words(found['a'])}." if bent else ""
        return f"Twice the data, {2 * self.largest} items, {helps}: {foretold}.{level}"

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        gains = {law.name: law.gain(self.largest, 2 * self.largest).to_dict() for law in self.laws}
        return {
            "laws": [law.to_dict() for law in self.laws],
            "largest": self.largest,
            "gain_of_twice": gains,
            "answer": self.answer,
        }


def scaling(
    sizes: Sequence[int], values: Tensor, *, seed: int, repeats: int = 1000
) -> ScalingReport:
    """Fit both laws to the values of several draws of items at each of several sizes.

    sizes: number of items of each draw. values: (M,), what training on it reached; larger is
    better. repeats: of the bootstrap.

    Least squares: given c, the best a and b have a closed form, and c is taken from 300 exponents
    between 0.02 (nearly logarithmic) and 3. The 95 % intervals come from draws taken again with
    replacement within every size, their deviations widened for the few draws there are. They cover
    which items happened to be drawn, so draws must be independent of one another and no size may
    exhaust the items; they do not cover the choice of test items, nor that no law may hold further
    out. Where the data cannot tell the laws apart, what they foretell still differs: trust no more
    than both say.

    Raises ValueError for fewer than four sizes, or fewer than two draws of a size.
    """
    n = torch.tensor(sizes, dtype=torch.float64)
    found, counts = n.unique(return_counts=True)
    if values.shape != n.shape or not values.isfinite().all() or len(n) == 0 or n.min() < 1:
        raise ValueError(
            "one finite value for every size of at least one item: got values "
            f"{tuple(values.shape)} for {len(n)} sizes"
        )
    if len(found) < _FEWEST_SIZES or counts.min() < 2:
        raise ValueError(
            f"at least {_FEWEST_SIZES} sizes of two draws or more are needed, got "
            f"{dict(zip(found.int().tolist(), counts.tolist(), strict=True))} draws of sizes"
        )
    measured = values.detach().cpu().double()
    draws = torch.cat([measured[None], _resampled(n, measured, repeats, seed)])  # (1 + R, M)
    laws = [_law("logarithmic", _STRAIGHT, n, draws), _law("power", _EXPONENTS, n, draws)]
    better, other = sorted(laws, key=lambda law: law.error)
    return ScalingReport(laws=(better, other), largest=max(sizes))


def _growth(sizes: Tensor, exponents: Tensor) -> Tensor:
    """-n^-c, or log10(n) where c is NaN, of sizes (M,) and exponents (G,): (G, M)."""
    c = exponents[:, None]
    return torch.where(c.isnan(), sizes.log10(), -(sizes**-c))


def _law(name: str, exponents: Tensor, sizes: Tensor, draws: Tensor) -> Law:
    errors = []
    for size in sizes.unique():
        rest = sizes != size
        told = _fitted(sizes[rest], draws[:1, rest], exponents)
        without = Law(name=name, coefficients=told, error=math.nan)
        errors.append(without.values(size.item()) - draws[0, ~rest].mean())
    error = torch.cat(errors).square().mean().sqrt().item()
    return Law(name=name, coefficients=_fitted(sizes, draws, exponents), error=error)


def _fitted(sizes: Tensor, draws: Tensor, exponents: Tensor) -> Tensor:
    """The a, b and c of least squares to each of the draws (R, M): (R, 3)."""
    growth = _growth(sizes, exponents)  # (G, M)
    middle = growth.mean(1, keepdim=True)
    centred = growth - middle
    power = centred.square().sum(1)
    slopes = draws @ centred.mT / power  # (R, G)
    best = (slopes.square() * power).argmax(1)  # explains most of the squares
    b = slopes.gather(1, best[:, None])[:, 0]
    return torch.stack([draws.mean(1) - b * middle[best, 0], b, exponents[best]], 1)


def _resampled(sizes: Tensor, values: Tensor, repeats: int, seed: int) -> Tensor:
    """The values drawn again with replacement within every size, (R, M).

    Two corrections, without which intervals of few draws are too narrow: r draws vary about their
    own mean by (r - 1) / r of their variance, and the normal quantile is to be Student's.
    """
    from scipy.stats import norm, t

    generator = torch.Generator().manual_seed(seed)
    found = sizes.unique()
    heavier = t.ppf(_TAIL, len(sizes) - len(found)) / norm.ppf(_TAIL)
    drawn = torch.empty(repeats, len(sizes), dtype=torch.float64)
    for size in found:
        rows = (sizes == size).nonzero()[:, 0]
        count = len(rows)
        mean = values[rows].mean()
        widened = (values[rows] - mean) * (heavier * math.sqrt(count / (count - 1)))
        drawn[:, rows] = mean + widened[torch.randint(count, (repeats, count), generator=generator)]
    return drawn


def _interval(values: Tensor) -> Interval:
    """values: (1 + R,), as fitted and from the draws."""
    low, high = values[1:].quantile(values.new_tensor([_TAIL, 1 - _TAIL])).tolist()
    return Interval(values[0].item(), low, high)


def _words(interval: Interval) -> str:
    return f"{interval.value:.3g} ({interval.low:.3g} to {interval.high:.3g})"
