"""From slice positions and orientations (LPS) to one affine (RAS+), or the reason there is none."""

import math
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from medssl.data.readers.dicom_gaps import Line, OnGap, step
from medssl.data.readers.dicom_header import Header
from medssl.data.readers.errors import InconsistentGeometryError

_LPS_TO_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])
_LEAST_MM = 0.01  # positions closer than this are one position


def sorted_slices(headers: Sequence[Header]) -> list[list[Header]]:
    """Headers by their position along the slice normal; those of one position together.

    The normal is row x column; file names and instance numbers play no part.
    """
    along = (_positions(headers) @ _normal(headers[0])).tolist()
    ordered = sorted(zip(along, headers, strict=True), key=lambda one: (one[0], one[1].path))
    places: list[list[Header]] = []
    first = -math.inf  # of the last place
    for where, header in ordered:
        if where - first < _LEAST_MM:
            places[-1].append(header)
        else:
            places.append([header])
            first = where
    return places


def line_of(slices: Sequence[Header]) -> Line:
    """Where the slices lie along their normal; slices sorted, one per position."""
    positions = _positions(slices)
    return Line(positions, (positions - positions[0]) @ _normal(slices[0]))


def volume_affine(slices: Sequence[Header], *, on_gap: OnGap = "error") -> Tensor:
    """(4, 4) from the index (slice, row, column) to RAS+ mm; slices sorted, one per position.

    A gantry tilt stays in it as a shear. on_gap: of which volume, as `dicom_gaps.filled` makes it
    of slices at uneven distances. A single slice gets its thickness, or 1 mm where there is
    none, along the normal, so that the matrix has an inverse.
    Raises MissingSlicesError and InconsistentGeometryError.
    """
    first = slices[0]
    if first.pixel_spacing is None or not min(first.pixel_spacing) > 0:
        raise InconsistentGeometryError(
            "the slices have no positive pixel spacing; correct the header"
        )
    assert first.orientation is not None
    line = line_of(slices)
    affine = np.eye(4)
    affine[:3, 0] = step(line, on_gap) if len(slices) > 1 else _normal(first) * _thickness(first)
    affine[:3, 1] = np.array(first.orientation[3:]) * first.pixel_spacing[0]
    affine[:3, 2] = np.array(first.orientation[:3]) * first.pixel_spacing[1]
    affine[:3, 3] = line.positions[0]
    return torch.from_numpy(_LPS_TO_RAS @ affine)


def is_sheared(affine: Tensor) -> bool:
    """Whether the slices are shifted against each other (gantry tilt), by over 0.1 degree."""
    axes = affine[:3, :3] / affine[:3, :3].norm(dim=0)
    return bool((axes.T @ axes - torch.eye(3)).abs().max() > 1.7e-3)


def same_plane(one: Header, other: Header) -> bool:
    """Whether two slices can lie in one volume, by orientation and spacing (to 1e-4)."""
    for a, b in ((one.orientation, other.orientation), (one.pixel_spacing, other.pixel_spacing)):
        if (a is None) != (b is None):
            return False
        if a is not None and b is not None and not _close(a, b):
            return False
    return True


def _close(one: Sequence[float], other: Sequence[float]) -> bool:
    return len(one) == len(other) and all(
        abs(a - b) <= 1e-4 for a, b in zip(one, other, strict=True)
    )


def _normal(header: Header) -> NDArray:
    """The unit vector (LPS) along which slices follow each other."""
    cosines = np.array(header.orientation, dtype=np.float64).reshape(2, 3)
    lengths = np.linalg.norm(cosines, axis=1)
    skew = abs(float(cosines[0] @ cosines[1]))
    if not np.isfinite(cosines).all() or np.abs(lengths - 1).max() > 1e-3 or skew > 1e-3:
        raise InconsistentGeometryError(
            "the image orientation is not two perpendicular unit vectors; correct the header"
        )
    return np.cross(cosines[0], cosines[1]) / lengths.prod()


def _positions(headers: Sequence[Header]) -> NDArray[np.float64]:
    """(N, 3) mm (LPS)."""
    positions = np.array([header.position for header in headers], dtype=np.float64)
    if not np.isfinite(positions).all():
        raise InconsistentGeometryError("an image position is not finite; correct the header")
    return positions


def _thickness(header: Header) -> float:
    return header.thickness if header.thickness and header.thickness > 0 else 1.0
