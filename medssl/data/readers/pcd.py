"""PCD, the point cloud format of PCL (https://pointclouds.org/documentation/tutorials/pcd_file_format.html)."""

import struct
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from medssl.data.readers.errors import CorruptFileError, UnsupportedFormatError
from medssl.data.readers.points_stored import (
    HEADER_BYTES,
    MAX_BYTES,
    PointsHeader,
    StoredPoints,
    as_stored,
    check_end,
    check_points,
    check_room,
    parsed_count,
    stacked,
    text_lines,
    text_values,
)
from medssl.data.readers.stored import decoding

_KEYS = {
    "VERSION", "FIELDS", "SIZE", "TYPE", "COUNT", "WIDTH", "HEIGHT", "VIEWPOINT", "POINTS", "DATA"
}  # fmt: skip
_TYPES = {"I1", "I2", "I4", "I8", "U1", "U2", "U4", "U8", "F4", "F8"}
_ENCODINGS = ("ascii", "binary", "binary_compressed")
_LZF_RATIO = 88  # three bytes of LZF stand for 264 at most
_XYZ = ("x", "y", "z")
_NORMALS = ("normal_x", "normal_y", "normal_z")
_COLORS = ("rgb", "rgba")


@dataclass(frozen=True, slots=True, kw_only=True)
class PcdHeader:
    """The header of a PCD file.

    types: numpy's little-endian type of each field. counts: values of each field in one point.
    length: bytes of the header, after which the points begin.
    """

    public: PointsHeader
    types: tuple[np.dtype, ...]
    counts: tuple[int, ...]
    length: int

    @property
    def point_bytes(self) -> int:
        """Bytes of one point in a binary file."""
        return sum(kind.itemsize * n for kind, n in zip(self.types, self.counts, strict=True))


def is_pcd(start: bytes) -> bool:
    """Whether the first bytes of a file, some hundred, begin a PCD."""
    if start.startswith(b"# .PCD"):
        return True
    lines = [line.split() for line in start.split(b"\n")]
    keys = [line[0] for line in lines if len(line) > 1 and not line[0].startswith(b"#")]
    return keys[:1] == [b"FIELDS"] or keys[:2] == [b"VERSION", b"FIELDS"]


def read_pcd(content: bytes) -> StoredPoints:
    """Columns of a PCD file; VIEWPOINT is left out.

    Kept are x, y, z, normal_x, normal_y, normal_z, and rgb or rgba, packed in a float or integer
    of four bytes. Raises CorruptFileError, EmptyCloudError and UnsupportedFormatError.
    """
    header = pcd_header(content, len(content))
    encoding = header.public.encoding
    if encoding == "ascii":
        columns = _ascii(content, header)
    elif encoding == "binary":
        columns = _interleaved(content, header)
    else:
        columns = _one_after_another(_unpacked(content, header), header)
    colors = [_colors(columns[name], encoding) for name in _COLORS if name in columns]
    xyz = stacked(columns, *_XYZ)
    assert xyz is not None  # the header was refused otherwise
    return StoredPoints(
        header=header.public,
        xyz=xyz,
        colors=colors[0] if colors else None,
        normals=stacked(columns, *_NORMALS),
    )


def pcd_header(start: bytes, size: int) -> PcdHeader:
    """The header alone. start: at least the first 64 KiB of the file, of `size` bytes in all.

    Raises what `read_pcd` raises about it, also where it announces more than the file can hold.
    """
    entries, length = _entries(start)
    fields = tuple(entries["FIELDS"])
    counts = tuple(map(parsed_count, entries.get("COUNT", ["1"] * len(fields))))
    codes = ["".join(code) for code in zip(entries["TYPE"], entries["SIZE"], strict=False)]
    if not len(fields) == len(counts) == len(entries["SIZE"]) == len(entries["TYPE"]):
        raise CorruptFileError("FIELDS, SIZE, TYPE and COUNT must have one entry per field")
    if not set(codes) <= _TYPES or 0 in counts:
        raise CorruptFileError("a field of the header is no integer or float with 1 to 8 bytes")
    width, height = (_single(entries, key) for key in ("WIDTH", "HEIGHT"))
    if "POINTS" in entries and _single(entries, "POINTS") != width * height:
        raise CorruptFileError("POINTS of the header must be WIDTH times HEIGHT; copy it again")
    public = PointsHeader(
        format="pcd",
        encoding=_encoding(entries["DATA"]),
        num_points=width * height,
        width=width,
        height=height,
        fields=fields,
    )
    types = tuple(np.dtype("<" + code.lower()) for code in codes)
    header = PcdHeader(public=public, types=types, counts=counts, length=length)
    _check(header, size - length)
    return header


def _entries(start: bytes) -> tuple[dict[str, list[str]], int]:
    """The header's values by key, and its length."""
    entries: dict[str, list[str]] = {}
    position = 0
    while "DATA" not in entries:
        end = start.find(b"\n", position, HEADER_BYTES)
        if end < 0:
            raise CorruptFileError("the PCD header has no DATA line in its first 64 KiB")
        words = start[position:end].decode("latin-1").split()
        position = end + 1
        if not words or words[0].startswith("#"):
            continue
        key, *values = words
        if key not in _KEYS or key in entries:
            raise CorruptFileError("a line of the PCD header is unknown or comes twice")
        entries[key] = values
    missing = {"FIELDS", "SIZE", "TYPE", "WIDTH", "HEIGHT"} - entries.keys()
    if missing:
        raise CorruptFileError(f"the PCD header has no {' and no '.join(sorted(missing))}")
    return entries, position


def _single(entries: dict[str, list[str]], key: str) -> int:
    if len(entries[key]) != 1:
        raise CorruptFileError(f"{key} of the PCD header must be one number")
    return parsed_count(entries[key][0])


def _encoding(values: list[str]) -> str:
    if len(values) != 1 or values[0] not in _ENCODINGS:
        raise UnsupportedFormatError(f"DATA of a PCD must be one of {', '.join(_ENCODINGS)}")
    return values[0]


def _check(header: PcdHeader, available: int) -> None:
    public = header.public
    named = dict(zip(public.fields, zip(header.types, header.counts, strict=True), strict=True))
    used = [name for name in public.fields if name in (*_XYZ, *_NORMALS, *_COLORS)]
    if not {*_XYZ} <= named.keys():
        raise UnsupportedFormatError("a PCD must have the fields x, y and z; convert it first")
    if len(used) != len(set(used)) or any(named[name][1] != 1 for name in used):
        raise CorruptFileError("coordinates, normals and colors must come once, one value each")
    if any(named[name][0].itemsize != 4 for name in used if name in _COLORS):
        raise UnsupportedFormatError(
            "colors of a PCD must be packed in 4 bytes; save the points without"
        )
    if public.encoding == "ascii":
        check_room(public.num_points, 2 * sum(header.counts), available + 1)
    elif public.encoding == "binary":
        check_room(public.num_points, header.point_bytes, available)
    else:
        check_room(public.num_points, header.point_bytes, available * _LZF_RATIO)
    check_points(public.num_points, sum(header.counts))


def _ascii(content: bytes, header: PcdHeader) -> dict[str, NDArray]:
    count, width = header.public.num_points, sum(header.counts)
    lines = text_lines(content, header.length)
    values = text_values(lines, (count, width))
    check_end(next(lines, b""))
    columns, start = {}, 0
    for name, kind, length in zip(header.public.fields, header.types, header.counts, strict=True):
        if name in (*_XYZ, *_NORMALS, *_COLORS):
            columns[name] = as_stored(values[:, start], kind)
        start += length
    return columns


def _interleaved(content: bytes, header: PcdHeader) -> dict[str, NDArray]:
    """Columns of points that follow each other."""
    check_end(content[header.length + header.public.num_points * header.point_bytes :])
    columns, start = {}, header.length
    for name, kind, length in zip(header.public.fields, header.types, header.counts, strict=True):
        if length == 1:
            shape, strides = (header.public.num_points,), (header.point_bytes,)
            columns[name] = np.ndarray(shape, kind, content, start, strides)
        start += kind.itemsize * length
    return columns


def _one_after_another(content: bytes, header: PcdHeader) -> dict[str, NDArray]:
    """Columns of fields that follow each other."""
    columns, start, count = {}, 0, header.public.num_points
    for name, kind, length in zip(header.public.fields, header.types, header.counts, strict=True):
        if length == 1:
            columns[name] = np.frombuffer(content, kind, count, start)
        start += kind.itemsize * length * count
    return columns


def _unpacked(content: bytes, header: PcdHeader) -> bytes:
    """The LZF block; its sizes are held against the header and against what LZF can reach."""
    import lzf

    check_room(1, 8, len(content) - header.length)
    packed, size = struct.unpack_from("<II", content, header.length)
    check_room(1, packed, len(content) - header.length - 8)
    expected = header.public.num_points * header.point_bytes
    if size != expected or size > packed * _LZF_RATIO:
        raise CorruptFileError(
            f"the points must unpack from {packed} to {expected} bytes, and the file says {size}; "
            "copy it again"
        )
    if size > MAX_BYTES:
        raise UnsupportedFormatError(
            f"{size} bytes of points are too many, {MAX_BYTES} are supported; cut the cloud up"
        )
    start = header.length + 8
    check_end(content[start + packed :])
    with decoding("the LZF block"):
        unpacked = lzf.decompress(content[start : start + packed], size)
    if unpacked is None or len(unpacked) != size:
        raise CorruptFileError("the LZF block is shorter than it says; copy the file again")
    return unpacked


def _colors(stored: NDArray, encoding: str) -> NDArray[np.float32]:
    """(3, P) in 0..1 of bits 0xAARRGGBB; NaN where text has lost the bits of a NaN."""
    bits = np.ascontiguousarray(stored).view("<u4")
    channels = np.stack([(bits >> shift) & 255 for shift in (16, 8, 0)])
    colors = channels.astype(np.float32) / np.float32(255)
    if encoding == "ascii" and stored.dtype.kind == "f":
        colors[:, np.isnan(stored)] = np.nan
    return colors
