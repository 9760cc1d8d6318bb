"""Small point clouds in every encoding, whole or with one fault, and the truth about them."""

import io
import struct
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Encoding = Literal[
    "ply_ascii", "ply_little_endian", "ply_big_endian", "pcd_ascii", "pcd_binary",
    "pcd_compressed", "xyz", "tiff",
]  # fmt: skip
Fault = Literal["none", "missing_points", "truncated", "lying_count", "nothing_measured"]
SUFFIXES: dict[Encoding, str] = {
    "ply_ascii": ".ply",
    "ply_little_endian": ".ply",
    "ply_big_endian": ".ply",
    "pcd_ascii": ".pcd",
    "pcd_binary": ".pcd",
    "pcd_compressed": ".pcd",
    "xyz": ".xyz",
    "tiff": ".tiff",
}
HEIGHT, WIDTH = 5, 8  # of organized points, which PCD and TIFF hold
MISSING = (3, 17)  # the points that are NaN, and zero


def true_points() -> NDArray[np.float32]:
    """(40, 3): points of a bent sheet, row by row, none of them at the origin."""
    rows, columns = np.meshgrid(np.arange(HEIGHT), np.arange(WIDTH), indexing="ij")
    x, y = columns / 4 - 1, rows / 4 - 0.5
    return np.stack([x, y, 2 + x * x / 8], -1).reshape(-1, 3).astype(np.float32)


def write_points(path: Path, encoding: Encoding, fault: Fault = "none") -> None:
    """Write the points; `path` should end as `SUFFIXES` says.

    "missing_points" has a NaN and a zero point at `MISSING`, "nothing_measured" only those,
    "truncated" three quarters of the bytes, and "lying_count" a header that announces 10^9 points.
    """
    points = true_points()
    if fault == "missing_points":
        points[MISSING[0]], points[MISSING[1]] = np.nan, 0
    if fault == "nothing_measured":
        points[:] = 0
        points[::2] = np.nan
    count = 10**9 if fault == "lying_count" else len(points)
    if encoding.startswith("ply"):
        content = _ply(points, encoding, count)
    elif encoding.startswith("pcd"):
        content = _pcd(points, encoding, count)
    else:
        content = _text(points) if encoding == "xyz" else _tiff(points)
    path.write_bytes(content[: 3 * len(content) // 4] if fault == "truncated" else content)


def _ply(points: NDArray, encoding: str, count: int) -> bytes:
    names = {"ply_ascii": "ascii", "ply_little_endian": "binary_little_endian"}
    lines = ["ply", f"format {names.get(encoding, 'binary_big_endian')} 1.0"]
    lines += [f"element vertex {count}", *(f"property float {axis}" for axis in "xyz")]
    head = "\n".join([*lines, "end_header", ""]).encode()
    if encoding == "ply_ascii":
        return head + _text(points)
    return head + points.astype(">f4" if encoding == "ply_big_endian" else "<f4").tobytes()


def _pcd(points: NDArray, encoding: str, count: int) -> bytes:
    """Organized, in rows of `WIDTH`."""
    height = count // WIDTH
    data = {"pcd_ascii": "ascii", "pcd_binary": "binary"}.get(encoding, "binary_compressed")
    head = (
        "# .PCD v0.7\nVERSION 0.7\nFIELDS x y z\nSIZE 4 4 4\nTYPE F F F\nCOUNT 1 1 1\n"
        f"WIDTH {WIDTH}\nHEIGHT {height}\nVIEWPOINT 0 0 0 1 0 0 0\nPOINTS {count}\nDATA {data}\n"
    ).encode()
    if data == "ascii":
        return head + _text(points)
    if data == "binary":
        return head + points.astype("<f4").tobytes()
    import lzf

    columns = points.T.astype("<f4").tobytes()  # field after field
    packed = lzf.compress(columns, 2 * len(columns))
    return head + struct.pack("<II", len(packed), len(columns)) + packed


def _text(points: NDArray) -> bytes:
    return "".join(" ".join(f"{value:.9g}" for value in row) + "\n" for row in points).encode()


def _tiff(points: NDArray) -> bytes:
    import tifffile

    buffer = io.BytesIO()
    xyz = points.reshape(HEIGHT, WIDTH, 3).astype(np.float32)
    tifffile.imwrite(buffer, xyz, photometric="rgb", metadata=None)
    return buffer.getvalue()
