"""Point clouds: PLY, PCD and XYZ text, free or organized; missing points are told, never filled."""

from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from medssl.data.image import Image, PointCloud
from medssl.data.readers.errors import ReadError, UnsupportedFormatError
from medssl.data.readers.organized import xyz_image
from medssl.data.readers.pcd import is_pcd, pcd_header, read_pcd
from medssl.data.readers.ply import is_ply, ply_header, read_ply
from medssl.data.readers.points_stored import (
    HEADER_BYTES,
    MAX_BYTES,
    PointsHeader,
    StoredPoints,
    Unit,
    check_measured,
    extent_suspicious,
)
from medssl.data.readers.stored import (
    decoding,
    file_sha256,
    pixel_sha256,
    read_bytes,
    to_float32,
)
from medssl.data.readers.xyz import read_xyz, xyz_header

_MAX_SHIFT = 1e-4  # of the extent


def points_kind(start: bytes) -> Literal["ply", "pcd"] | None:
    """What a file is by its first bytes (512 are enough); XYZ text has no such mark."""
    if is_ply(start):
        return "ply"
    return "pcd" if is_pcd(start) else None


def is_xyz_name(path: Path) -> bool:
    """Whether a name ends as XYZ text does; .txt may be anything and is not taken."""
    return path.suffix.lower() == ".xyz"


def points_header(path: Path) -> PointsHeader:
    """Size, fields and encoding from the header alone; the lines of XYZ text are counted.

    Raises what `read_points` raises about it, also where it announces more than the file holds.
    """
    size = _check_size(path)
    try:
        with path.open("rb") as stream:  # as it is: `read_points` does not unzip either
            start = stream.read(HEADER_BYTES)
    except OSError as error:
        raise ReadError(f"the file cannot be opened: {error.strerror}") from None
    with decoding("the header of the points"):
        kind = points_kind(start)
        if kind == "ply":
            return ply_header(start, size).public
        if kind == "pcd":
            return pcd_header(start, size).public
        _check_xyz(path)
        return xyz_header(read_bytes(path))


def read_points(
    path: Path, *, unit: Unit | None = None, hashes: bool = False
) -> PointCloud | Image:
    """The points of a PLY, PCD or XYZ file, by its content (XYZ by its name).

    A PCD with HEIGHT over 1 is organized and becomes an `Image`: (3, H, W) xyz as stored, `valid`
    False where a point is missing; colors and normals are left out. Anything else becomes a
    `PointCloud` without its missing points. A point is missing where a coordinate is NaN or
    infinite, or all three are zero.
    unit: of one count, as files do not say; None gives "unknown".
    hashes: put "file_sha256" and "pixel_sha256" into `provenance`; the second is over the stored
        xyz, (3, P) or (3, H, W), missing points included.
    `provenance` holds "extent_suspicious": True where the extent makes the unit doubtful, and for
    a cloud the number of "missing" and of "duplicates", which are kept.
    Raises EmptyCloudError without a measured point; CorruptFileError; UnsupportedFormatError, also
    where rounding to float32 may change a distance by over 1e-4 of the bounding box's diagonal, as
    with UTM coordinates of a small scene.
    """
    _check_size(path)
    content = read_bytes(path)
    with decoding("the points"):
        stored = _read(content, path)
    provenance: dict[str, Any] = {
        "reader": "points",
        "format": stored.header.format,
        "encoding": stored.header.encoding,
    }
    height = stored.header.height
    if hashes:
        shape = (3, -1) if height == 1 else (3, height, stored.header.width)
        provenance["file_sha256"] = file_sha256(content)
        provenance["pixel_sha256"] = pixel_sha256(stored.xyz.reshape(shape))
    valid = check_measured(stored.xyz)
    xyz = _narrowed(stored.xyz, valid)
    if height > 1:
        pixels = torch.from_numpy(xyz.reshape(3, height, stored.header.width))
        return xyz_image(pixels, unit=unit, provenance=provenance)
    return _cloud(stored, xyz, valid, unit, provenance)


def _read(content: bytes, path: Path) -> StoredPoints:
    kind = points_kind(content[:HEADER_BYTES])
    if kind == "ply":
        return read_ply(content)
    if kind == "pcd":
        return read_pcd(content)
    _check_xyz(path)
    return read_xyz(content)


def _check_size(path: Path) -> int:
    try:
        size = path.stat().st_size
    except OSError as error:
        raise ReadError(f"the file cannot be opened: {error.strerror}") from None
    if size > MAX_BYTES:
        raise UnsupportedFormatError(
            f"a file of {size} bytes is too large, {MAX_BYTES} are supported; cut the cloud up or "
            "thin it out"
        )
    return size


def _check_xyz(path: Path) -> None:
    if not is_xyz_name(path):
        raise UnsupportedFormatError(
            "the file begins neither as PLY nor as PCD and is not named .xyz; convert the points "
            "to one of these, and unzip them if they are gzipped"
        )


def _narrowed(stored: NDArray, valid: NDArray[np.bool_]) -> NDArray[np.float32]:
    """xyz (3, P) as float32, refused where that would bend the cloud.

    The distance of two points changes by no more than the rounding of one differs from the other's.
    """
    with np.errstate(over="ignore", invalid="ignore"):
        xyz = stored.astype(np.float32)
        exact = stored[:, valid].astype(np.float64)
        bent = np.linalg.norm(np.ptp(xyz[:, valid] - exact, axis=1))
        extent = np.linalg.norm(np.ptp(exact, axis=1))
    if not bent <= _MAX_SHIFT * extent:  # also where float32 overflows
        raise UnsupportedFormatError(
            f"rounding the coordinates to float32 may change distances by {bent:.2g} in an extent "
            f"of {extent:.2g}; subtract an offset near their mean before saving them"
        )
    return xyz


def _cloud(
    stored: StoredPoints,
    xyz: NDArray[np.float32],
    valid: NDArray[np.bool_],
    unit: Unit | None,
    provenance: dict[str, Any],
) -> PointCloud:
    """Without the missing points. xyz: (3, P). valid: (P,)."""
    xyz = xyz[:, valid]
    provenance["missing"] = int((~valid).sum())
    provenance["duplicates"] = _num_duplicates(xyz)
    if unit is not None and extent_suspicious(xyz, unit):
        provenance["extent_suspicious"] = True
    return PointCloud(
        points=_rows(xyz),
        unit=unit or "unknown",
        colors=None if stored.colors is None else _rows(stored.colors[:, valid]),
        normals=None if stored.normals is None else _rows(stored.normals[:, valid]),
        provenance=provenance,
    )


def _rows(columns: NDArray) -> Tensor:
    """(3, P) of any type -> (P, 3) float32."""
    return torch.from_numpy(np.ascontiguousarray(to_float32(columns).T))


def _num_duplicates(xyz: NDArray[np.float32]) -> int:
    """Points equal to an earlier one."""
    ordered = xyz[:, np.lexsort(xyz)]
    return int((ordered[:, 1:] == ordered[:, :-1]).all(0).sum())
