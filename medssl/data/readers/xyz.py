"""XYZ text: one point per line, three numbers or six, between blanks or commas."""

from collections.abc import Iterator
from itertools import chain, islice

import numpy as np
from numpy.typing import NDArray

from medssl.data.readers.errors import UnsupportedFormatError
from medssl.data.readers.points_stored import (
    MAX_POINTS,
    PointsHeader,
    StoredPoints,
    check_points,
    measured,
    text_lines,
    text_values,
    unit_colors,
)

_UNIT_LENGTH = 0.01  # how far from 1 a normal with few digits may be


def read_xyz(content: bytes) -> StoredPoints:
    """Columns of XYZ text; coordinates are float64.

    Columns 4 to 6 are normals where every measured point's have length 1, else colors where all
    lie in 0..255 (or, with decimals, in 0..1). Lines that begin with # or // are comments.
    Raises CorruptFileError, EmptyCloudError and UnsupportedFormatError.
    """
    header = xyz_header(content)
    first, lines = _first(content)
    shape = header.num_points, len(header.fields)
    values = text_values(chain([first], lines), shape, _delimiter(first)).T  # (3 or 6, P)
    colors, normals = _extra(values[:3], values[3:]) if shape[1] == 6 else (None, None)
    return StoredPoints(header=header, xyz=values[:3], colors=colors, normals=normals)


def xyz_header(content: bytes) -> PointsHeader:
    """XYZ text has no header: its lines are counted, and the first is parsed."""
    first, lines = _first(content)
    fields = first.split(b"," if b"," in first else None)
    try:
        for field in fields:
            float(field)
    except ValueError:
        raise UnsupportedFormatError(
            "the first line of XYZ text must hold 3 or 6 numbers, between blanks or commas, and "
            "holds something else; delete the header line or begin it with #"
        ) from None
    if len(fields) not in (3, 6):
        raise UnsupportedFormatError(
            f"XYZ text must have 3 columns (x y z) or 6 (and colors or normals), got {len(fields)};"
            " save the points with 3"
        )
    count = 1 + sum(1 for _ in islice(lines, MAX_POINTS))
    check_points(count, len(fields))
    names = ("x", "y", "z", "4", "5", "6")[: len(fields)]
    return PointsHeader(
        format="xyz", encoding="ascii", num_points=count, width=count, height=1, fields=names
    )


def _first(content: bytes) -> tuple[bytes, Iterator[bytes]]:
    """The first line with a point, and the others to come."""
    lines = (line for line in text_lines(content) if not line.lstrip().startswith((b"#", b"//")))
    first = next(lines, None)
    if first is None:
        check_points(0, 3)
    return first or b"", lines


def _delimiter(first: bytes) -> str | None:
    return "," if b"," in first else None


def _extra(xyz: NDArray, extra: NDArray) -> tuple[NDArray[np.float32] | None, NDArray | None]:
    """Colors and normals, of which one is None. xyz, extra: (3, P)."""
    there = measured(xyz)
    seen = extra[:, there]
    with np.errstate(over="ignore"):
        lengths = np.linalg.norm(seen, axis=0)
    if (np.abs(lengths - 1) <= _UNIT_LENGTH).all():
        return None, extra
    if not ((seen >= 0) & (seen <= 255)).all():
        raise UnsupportedFormatError(
            "columns 4 to 6 of XYZ text must be normals of length 1 or colors of 0 to 255, and "
            "are neither; save the points with 3 columns"
        )
    colors = np.where(there, extra, np.nan).astype(np.float32)
    whole = (seen == np.rint(seen)).all()
    return (colors / np.float32(255) if whole else unit_colors(colors)), None
