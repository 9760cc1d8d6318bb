"""Smooth random fields and soft edges: what the phantoms are painted with."""

import numpy as np
from numpy.typing import NDArray

Field = NDArray[np.float64]

_SPLINE_STD = (151 / 315) ** 1.5
"""Standard deviation of a cubic B-spline field over three axes with unit normal coefficients."""


def ramp(distance: Field, width: Field | float) -> Field:
    """Share of a voxel on the inner side of a surface: the box partial volume, in [0, 1].

    distance: signed, mm, negative inside; width: mm the voxel spans along the surface normal.
    """
    share = distance / width
    np.subtract(0.5, share, out=share)
    return np.clip(share, 0.0, 1.0, out=share)


def smooth_field(
    rng: np.random.Generator,
    shape: tuple[int, int, int],
    spacing: tuple[float, float, float],
    knot_mm: float,
) -> Field:
    """A (D, H, W) random field of mean 0 and standard deviation 1, cubic B-splines in mm.

    knot_mm: distance between knots; zero crossings lie about 1.7 knots apart.
    """
    bases = [_spline_basis(n, step / knot_mm) for n, step in zip(shape, spacing, strict=True)]
    knots = rng.standard_normal(tuple(basis.shape[1] for basis in bases)) / _SPLINE_STD
    slices = np.tensordot(bases[0], knots, axes=1)  # (D, knots of H, knots of W)
    field: Field = bases[1] @ (slices @ bases[2].T)
    return field


def _spline_basis(count: int, step: float) -> Field:
    """(count, knots): the cubic B-spline weights of `count` points, `step` knots apart."""
    position = np.arange(count) * step
    first = np.floor(position).astype(int)
    t = position - first
    weights = (
        (1 - t) ** 3 / 6,
        (3 * t**3 - 6 * t**2 + 4) / 6,
        (-3 * t**3 + 3 * t**2 + 3 * t + 1) / 6,
        t**3 / 6,
    )
    basis = np.zeros((count, first[-1] + 4))
    for offset, weight in enumerate(weights):
        basis[np.arange(count), first + offset] = weight
    return basis
