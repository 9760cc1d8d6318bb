"""Slices at uneven distances, made a volume only in the way that the caller chose."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from medssl.data.image import Image
from medssl.data.readers.errors import InconsistentGeometryError, MissingSlicesError

OnGap = Literal["error", "insert_nan", "resample", "keep"]

_LEAST_MM = 0.01


@dataclass(frozen=True, slots=True)
class Line:
    """Slices in their order along the normal.

    positions: (N, 3) mm. along: (N,) mm from the first.
    """

    positions: NDArray[np.float64]
    along: NDArray[np.float64]

    @property
    def usual(self) -> float:
        """The usual distance of two slices, mm."""
        return float(np.median(np.diff(self.along)))

    @property
    def tolerance(self) -> float:
        """How far a distance may be from the usual one, mm."""
        return max(0.01 * self.usual, _LEAST_MM)

    @property
    def is_even(self) -> bool:
        """Whether no slice is missing and none is shifted."""
        return bool(np.abs(np.diff(self.along) - self.usual).max() <= self.tolerance)

    @property
    def depth(self) -> int:
        """Slices that there would be at the usual distance."""
        return round(self.along[-1] / self.usual) + 1

    @property
    def places(self) -> NDArray[np.float64]:
        """(N,): each slice's index on an even grid of `depth` slices, not always whole."""
        return self.along / self.along[-1] * (self.depth - 1)


def check_even(line: Line) -> None:
    """Raises MissingSlicesError and InconsistentGeometryError where the slices are no even grid."""
    if not line.is_even:
        steps = np.diff(line.along)
        missing = line.depth - len(line.along)
        if missing > 0:
            are = "slice is" if missing == 1 else "slices are"
            raise MissingSlicesError(
                f"{missing} {are} missing between the {len(line.along)} that are there "
                f"(usual distance {line.usual:.3f} mm); copy the whole series, or choose with "
                "on_gap= what to do"
            )
        raise MissingSlicesError(
            f"the distance between slices varies from {steps.min():.3f} to {steps.max():.3f} mm; "
            "only evenly spaced slices form a volume, unless on_gap= says what to do"
        )
    _check_straight(line, np.linspace(0, 1, len(line.along)))


def step(line: Line, on_gap: OnGap) -> NDArray[np.float64]:
    """(3,) mm from one slice of the volume to the next, as `on_gap` makes it.

    Raises what `check_even` raises, but nothing about gaps where `on_gap` is a choice.
    """
    if on_gap == "error" or line.is_even:
        check_even(line)
        return (line.positions[-1] - line.positions[0]) / (len(line.along) - 1)
    _check_straight(line, line.along / line.along[-1])
    if on_gap == "insert_nan" and not _on_grid(line):
        raise MissingSlicesError(
            "the slices are not at whole multiples of one distance, so that none can be inserted; "
            'use on_gap="resample"'
        )
    count = len(line.along) if on_gap == "keep" else line.depth
    return (line.positions[-1] - line.positions[0]) / (count - 1)


def filled(image: Image, line: Line, on_gap: OnGap) -> Image:
    """The volume with its gaps as `on_gap` wants them; an even one as it is.

    image: pixels (C, [T], N, H, W), the slices as they came, with the affine of `step`.
    "insert_nan" adds NaN slices that are not valid, "resample" interpolates linearly between the
    neighbours onto even distances, "keep" leaves the slices with their mean distance in the affine
    and their true places in `provenance["slice_positions_mm"]`.
    """
    if on_gap == "error" or line.is_even:
        return image
    if on_gap == "keep":
        told = {"slice_positions_mm": [round(float(mm), 4) for mm in line.along]}
        return replace(image, provenance={**image.provenance, **told})
    present = torch.from_numpy(np.rint(line.places).astype(np.int64))
    missing = sorted(set(range(line.depth)) - set(present.tolist()))
    provenance = {**image.provenance, "slices_missing": missing}
    if on_gap == "resample":
        return replace(_interpolated(image, line), provenance=provenance)
    shape = (line.depth, *image.spatial_shape[1:])
    pixels = torch.full((*image.pixels.shape[:-3], *shape), math.nan)
    pixels[..., present, :, :] = image.pixels
    valid = torch.zeros(shape, dtype=torch.bool)
    valid[present] = True if image.valid is None else image.valid
    return replace(image, pixels=pixels, valid=valid, provenance=provenance)


def _interpolated(image: Image, line: Line) -> Image:
    """Each slice of the even grid from the two that enclose it; invalid where one of them is."""
    below = np.searchsorted(line.places, np.arange(line.depth) + 1e-9, side="right") - 1
    below = below.clip(0, len(line.places) - 2)
    width = line.places[below + 1] - line.places[below]
    share = torch.from_numpy(((np.arange(line.depth) - line.places[below]) / width).clip(0, 1))

    def between(values: Tensor) -> Tensor:
        weight = share.float()[:, None, None]
        return values[..., below, :, :] * (1 - weight) + values[..., below + 1, :, :] * weight

    valid = None
    if image.valid is not None:
        valid = between(image.valid.float()) > 1 - 1e-6
    return replace(image, pixels=between(image.pixels), valid=valid)


def _on_grid(line: Line) -> bool:
    nearest = np.rint(line.places)
    return bool(
        (np.abs(line.places - nearest) * line.usual).max() <= line.tolerance
        and len(set(nearest.tolist())) == len(nearest)
    )


def _check_straight(line: Line, shares: Sequence[float] | NDArray) -> None:
    """shares: (N,) of the way from the first slice to the last, where each should lie."""
    way = line.positions[-1] - line.positions[0]
    even = line.positions[0] + np.asarray(shares)[:, None] * way
    off = np.linalg.norm(line.positions - even, axis=1).max()
    if off > max(0.05 * line.usual, 2 * _LEAST_MM):
        raise InconsistentGeometryError(
            "the slice positions do not lie on one straight, even line; they form no single grid"
        )
