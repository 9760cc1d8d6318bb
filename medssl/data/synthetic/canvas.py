"""A grid of voxels seen from the head: where structures given in mm are painted in HU."""

from dataclasses import dataclass

import numpy as np

from medssl.data.synthetic.fields import Field, ramp

Point = tuple[float, float, float]
Box = tuple[slice, slice, slice]

_MARGIN_MM = 10.0  # what warp and partial volume may move a surface
_TINY = 1e-12  # keeps the very center, which has no direction, finite


def coordinates(matrix: Field, shape: tuple[int, int, int]) -> tuple[Field, Field, Field]:
    """The three coordinates of every voxel centre, (D, H, W) each; matrix: index -> coordinates."""
    d, h, w = (np.arange(length, dtype=np.float64) for length in shape)
    x, y, z = (
        (row[0] * d + row[3])[:, None, None] + ((row[1] * h)[:, None] + row[2] * w)
        for row in matrix[:3]
    )
    return x, y, z


@dataclass(slots=True, eq=False)
class Canvas:
    """HU on a grid with the head's own coordinates at every voxel.

    hu: (D, H, W), painted in place.
    x, y, z: (D, H, W) mm in the head's frame (right, anterior, superior), warped by anatomy.
    head_from_index: (4, 4), before the warp.
    spacing: mm between slices, rows and columns.
    """

    hu: Field
    x: Field
    y: Field
    z: Field
    head_from_index: Field
    spacing: tuple[float, float, float]

    @property
    def shape(self) -> tuple[int, int, int]:
        """(D, H, W)."""
        depth, height, width = self.hu.shape
        return depth, height, width

    def box(self, center: Point, radii: Point) -> Box:
        """The index range that holds an ellipsoid with these semi-axes, warp included."""
        index_from_head = np.linalg.inv(self.head_from_index)
        middle = index_from_head[:3] @ (*center, 1.0)
        reach = np.sqrt((index_from_head[:3, :3] ** 2) @ (np.array(radii) + _MARGIN_MM) ** 2)
        low = np.floor(middle - reach).astype(int)
        high = np.ceil(middle + reach).astype(int) + 1
        limits = zip(low, high, self.shape, strict=True)
        first, second, third = (slice(max(0, a), min(max(0, b), n)) for a, b, n in limits)
        return first, second, third

    def spans(self, upward: Field) -> Field:
        """Mm a voxel spans across a surface; upward: |z| share of the surface normal, in [0, 1]."""
        between, row, column = self.spacing
        in_plane = (row + column) / 2
        return in_plane + upward * (between - in_plane)

    def ellipsoid(self, center: Point, radii: Point) -> tuple[Box, Field]:
        """The box of an ellipsoid and its share of each voxel there."""
        box = self.box(center, radii)
        offsets = (self.x[box] - center[0], self.y[box] - center[1], self.z[box] - center[2])
        square, slope, upward = _level(offsets, radii)
        # (square - 1) / (2 slope) is the distance to first order, and wrong only far away
        return box, ramp(square - 1, 2 * slope * self.spans(upward))

    def paint(self, box: Box, share: Field, hu: Field | float) -> None:
        """Blend a value into the box."""
        view = self.hu[box]
        view += share * (hu - view)

    def paint_ellipsoid(self, center: Point, radii: Point, hu: float) -> None:
        """Blend an ellipsoid of one value."""
        self.paint(*self.ellipsoid(center, radii), hu)


def ellipsoid_distance(
    offsets: tuple[Field, Field, Field], radii: tuple[Field | float, ...]
) -> tuple[Field, Field]:
    """First-order signed distance (mm, negative inside) to an ellipsoid and its normal's |z| share.

    offsets: coordinates relative to the center; radii: semi-axes, which may vary by voxel.
    """
    square, slope, upward = _level(offsets, radii)
    level = np.sqrt(square + _TINY)
    return (level - 1) * level / slope, upward


def _level(
    offsets: tuple[Field, Field, Field], radii: tuple[Field | float, ...]
) -> tuple[Field, Field, Field]:
    """The sum of the squared relative coordinates (1 on the surface), half the size of its gradient
    (1/mm) and the gradient's |z| share."""
    x, y, z = (offset / radius for offset, radius in zip(offsets, radii, strict=True))
    square = x * x + y * y + z * z
    x /= radii[0]
    y /= radii[1]
    z /= radii[2]
    slope = np.sqrt(x * x + y * y + z * z + _TINY)
    return square, slope, np.abs(z) / slope
