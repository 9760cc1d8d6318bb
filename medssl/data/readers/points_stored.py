"""What the readers of points share: columns as stored, their limits, and numbers in text."""

import io
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import chain, islice
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from medssl.data.readers.errors import CorruptFileError, EmptyCloudError, UnsupportedFormatError

Unit = Literal["m", "mm"]

MAX_BYTES = 1 << 29
MAX_POINTS = 1 << 23
_MAX_VALUES = 1 << 27  # points times values per point, 1 GiB where all are parsed from text
HEADER_BYTES = 1 << 16  # a longer header is taken for damage
_LINE_BYTES = 1 << 16
_METRES = {"m": 1.0, "mm": 1e-3}
_PLAUSIBLE_M = (1e-3, 1e3)


@dataclass(frozen=True, slots=True, kw_only=True)
class PointsHeader:
    """What the header alone says about a file of points.

    num_points: stored points, the missing ones included; width times height.
    fields: names in the file's order; the columns of XYZ text are x, y, z and, if six, 4, 5, 6.
    encoding: "ascii", PLY's "binary_little_endian" and "binary_big_endian", PCD's "binary" and
        "binary_compressed".
    """

    format: Literal["ply", "pcd", "xyz"]
    encoding: str
    num_points: int
    width: int
    height: int
    fields: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class StoredPoints:
    """The columns of a cloud in file order, missing points included.

    xyz: (3, P) in the stored type.
    colors: (3, P) float32 in 0..1, or None. normals: (3, P) as stored, or None.
    """

    header: PointsHeader
    xyz: NDArray
    colors: NDArray[np.float32] | None
    normals: NDArray | None


def measured(xyz: NDArray) -> NDArray[np.bool_]:
    """(3, ...) -> (...): False where a coordinate is NaN or infinite, or all three are zero."""
    return np.isfinite(xyz).all(0) & (xyz != 0).any(0)


def check_measured(xyz: NDArray) -> NDArray[np.bool_]:
    """As `measured`. Raises EmptyCloudError where no point is."""
    valid = measured(xyz)
    if not valid.any():
        raise EmptyCloudError(
            f"none of the {valid.size} points is measured: all are zero or not finite; leave the "
            "file out"
        )
    return valid


def stacked(columns: Mapping[str, NDArray], *names: str) -> NDArray | None:
    """(3, P) of three columns of (P,); None where the file does not have all of them."""
    if not all(name in columns for name in names):
        return None
    return np.stack([columns[name] for name in names])


def extent_suspicious(xyz: NDArray, unit: Unit) -> bool:
    """Whether the bounding box's diagonal is under 1 mm or over 1 km in the declared unit.

    The two usual causes are millimetres declared as metres, and metres as millimetres.
    xyz: (3, P) measured points.
    """
    extent_m = float(np.linalg.norm(np.ptp(xyz.astype(np.float64), axis=1))) * _METRES[unit]
    return not _PLAUSIBLE_M[0] <= extent_m <= _PLAUSIBLE_M[1]


def unit_colors(stored: NDArray) -> NDArray[np.float32]:
    """(3, P) in 0..1 of integers 0..255, of floats 0..1, or of floats 0..255 if one is over 1.

    NaN stays. Raises UnsupportedFormatError beyond these ranges.
    """
    values = stored.astype(np.float32)
    finite = values[np.isfinite(values)]
    low, high = (finite.min(), finite.max()) if finite.size else (0, 0)
    if low < 0 or high > 255:
        raise UnsupportedFormatError(
            f"colors must be integers of 0 to 255 or floats of 0 to 1, got {low:g} to {high:g}; "
            "rescale them, or save the points without"
        )
    return values / np.float32(255) if stored.dtype.kind in "iu" or high > 1 else values


def check_room(rows: int, row_bytes: int, available: int) -> None:
    """Refuse a header that announces more than the file holds, before any memory is taken."""
    if rows * row_bytes > available:
        raise CorruptFileError(
            f"the header announces {rows} rows of at least {row_bytes} bytes, and only "
            f"{max(available, 0)} bytes are left; the file is truncated or damaged, copy it again"
        )


def check_end(rest: bytes) -> None:
    """Refuse a file that goes on after its last row with anything but blanks and zeros."""
    if rest.strip(b"\0 \t\r\n"):
        raise CorruptFileError(
            "the file goes on after the last point that its header announces; the header is "
            "damaged, copy the file again"
        )


def check_points(num_points: int, num_values: int) -> None:
    """Refuse an empty cloud, and one of more points (of `num_values` each) than fit in memory."""
    if num_points == 0:
        raise EmptyCloudError("the file announces no points; leave it out")
    if num_points > MAX_POINTS or num_points * num_values > _MAX_VALUES:
        raise UnsupportedFormatError(
            f"{num_points} points of {num_values} values are too many: up to {MAX_POINTS} points "
            f"and {_MAX_VALUES} values are supported; thin the cloud out or cut it up"
        )


def parsed_count(text: str) -> int:
    """A count in a header: digits only. Raises CorruptFileError."""
    if not (text.isascii() and text.isdigit() and len(text) <= 18):
        raise CorruptFileError(
            "a count in the header is not a whole number of at most 18 digits; copy the file again"
        )
    return int(text)


def text_lines(content: bytes, start: int = 0) -> Iterator[bytes]:
    """The lines of a text from the byte `start` on, but for blank ones."""
    stream = io.BytesIO(content)
    stream.seek(start)
    while line := stream.readline(_LINE_BYTES):
        if len(line) == _LINE_BYTES:
            raise CorruptFileError(
                f"a line of {_LINE_BYTES} bytes or more is not a point; one point per line"
            )
        if line.strip():
            yield line


def text_values(
    lines: Iterator[bytes], shape: tuple[int, int], delimiter: str | None = None
) -> NDArray[np.float64]:
    """The numbers of the next lines as (rows, columns) = `shape`. Raises CorruptFileError."""
    rows = islice(lines, shape[0])
    first = next(rows, None)
    if first is None:
        raise CorruptFileError("the file ends before its points begin; copy it again")
    try:
        values = np.loadtxt(
            chain([first], rows), comments=None, delimiter=delimiter, ndmin=2, max_rows=shape[0]
        )
    except ValueError as error:
        raise CorruptFileError(
            f"the lines do not all hold {shape[1]} numbers; copy the file again, or save the "
            "points anew"
        ) from error
    if values.shape != shape:
        raise CorruptFileError(
            f"expected {shape[0]} lines of {shape[1]} numbers, got {values.shape[0]} of "
            f"{values.shape[1]}; the file is truncated or damaged, copy it again"
        )
    return values


def as_stored(values: NDArray[np.float64], dtype: np.dtype) -> NDArray:
    """Numbers parsed from text in the type that the header gives. Raises CorruptFileError."""
    with np.errstate(over="ignore", invalid="ignore"):
        typed = values.astype(dtype)
    if dtype.kind != "f" and (typed != values).any():
        raise CorruptFileError(
            "the header announces integers, and a number is none or too large for its type; save "
            "the points anew"
        )
    return typed
