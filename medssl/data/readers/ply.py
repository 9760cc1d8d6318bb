"""The points of PLY, the Stanford polygon format (http://paulbourke.net/dataformats/ply/)."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from medssl.data.readers.errors import CorruptFileError, UnsupportedFormatError
from medssl.data.readers.ply_rows import PlyElement, PlyProperty, binary_columns, text_columns
from medssl.data.readers.points_stored import (
    HEADER_BYTES,
    PointsHeader,
    StoredPoints,
    as_stored,
    check_end,
    check_points,
    check_room,
    parsed_count,
    stacked,
    text_lines,
    unit_colors,
)

_ORDERS = {"ascii": "<", "binary_little_endian": "<", "binary_big_endian": ">"}
_TYPES = {
    "char": "i1", "uchar": "u1", "short": "i2", "ushort": "u2", "int": "i4", "uint": "u4",
    "float": "f4", "double": "f8", "int8": "i1", "uint8": "u1", "int16": "i2", "uint16": "u2",
    "int32": "i4", "uint32": "u4", "int64": "i8", "uint64": "u8", "float32": "f4", "float64": "f8",
}  # fmt: skip
_XYZ = ("x", "y", "z")
_COLORS = ("red", "green", "blue")
_NORMALS = ("nx", "ny", "nz")
_USED = (*_XYZ, *_COLORS, *_NORMALS)


@dataclass(frozen=True, slots=True, kw_only=True)
class PlyHeader:
    """The header of a PLY file.

    vertex: the element with the points. length: bytes of the header, after which rows begin.
    """

    public: PointsHeader
    elements: tuple[PlyElement, ...]
    vertex: PlyElement
    length: int


def is_ply(start: bytes) -> bool:
    """Whether the first bytes of a file begin a PLY."""
    return start.startswith((b"ply\n", b"ply\r"))


def read_ply(content: bytes) -> StoredPoints:
    """Columns of the element "vertex"; faces and all other elements are checked and left out.

    Kept are x, y, z, red, green, blue and nx, ny, nz.
    Raises CorruptFileError, EmptyCloudError and UnsupportedFormatError.
    """
    header = ply_header(content, len(content))
    ascii_text = header.public.encoding == "ascii"
    columns = _from_text(content, header) if ascii_text else _from_binary(content, header)
    xyz, colors = stacked(columns, *_XYZ), stacked(columns, *_COLORS)
    assert xyz is not None  # the header was refused otherwise
    return StoredPoints(
        header=header.public,
        xyz=xyz,
        colors=None if colors is None else unit_colors(colors),
        normals=stacked(columns, *_NORMALS),
    )


def ply_header(start: bytes, size: int) -> PlyHeader:
    """The header alone. start: at least the first 64 KiB of the file, of `size` bytes in all.

    Raises what `read_ply` raises about it, also where it announces more than the file can hold.
    """
    lines, length = _lines(start)
    encoding = _encoding(next(lines, []))
    elements = _elements(lines, _ORDERS[encoding])
    vertices = [element for element in elements if element.name == "vertex"]
    if len(vertices) != 1:
        raise UnsupportedFormatError(
            f'a PLY of points must have one element "vertex", got {len(vertices)}; convert it first'
        )
    vertex = vertices[0]
    _check(elements, vertex, encoding, size - length)
    public = PointsHeader(
        format="ply",
        encoding=encoding,
        num_points=vertex.num_rows,
        width=vertex.num_rows,
        height=1,
        fields=tuple(entry.name for entry in vertex.properties),
    )
    return PlyHeader(public=public, elements=elements, vertex=vertex, length=length)


def _lines(start: bytes) -> tuple[Iterator[list[str]], int]:
    """The words of each line between the first and the last, and the header's length."""
    end_of_line = b"\n" if b"\n" in start[:5] else b"\r"
    end = start.find(end_of_line + b"end_header", 0, HEADER_BYTES)
    length = start.find(end_of_line, end + 1, HEADER_BYTES) + 1
    if end < 0 or length == 0 or start[end:length].strip() != b"end_header":
        raise CorruptFileError("the PLY header has no end_header line in its first 64 KiB")
    lines = [line.decode("latin-1").split() for line in start[:end].split(end_of_line)[1:]]
    return (line for line in lines if line and line[0] not in ("comment", "obj_info")), length


def _encoding(words: list[str]) -> str:
    if len(words) != 3 or words[0] != "format":
        raise CorruptFileError("the second line of a PLY header must be its format; copy it again")
    if words[1] not in _ORDERS or words[2] != "1.0":
        raise UnsupportedFormatError(f"a PLY must be {', '.join(_ORDERS)}, all of version 1.0")
    return words[1]


def _elements(lines: Iterator[list[str]], order: str) -> tuple[PlyElement, ...]:
    elements: list[tuple[str, int, list[PlyProperty]]] = []
    for words in lines:
        if len(words) == 3 and words[0] == "element":
            elements.append((words[1], parsed_count(words[2]), []))
        elif words[0] == "property" and elements:
            elements[-1][2].append(_property(words[1:], order))
        else:
            raise CorruptFileError("a line of the PLY header is of no known kind; copy it again")
    return tuple(
        PlyElement(name=name, num_rows=num_rows, properties=tuple(properties))
        for name, num_rows, properties in elements
    )


def _property(words: list[str], order: str) -> PlyProperty:
    """words: TYPE NAME, or list LENGTH_TYPE TYPE NAME."""
    length = words[1] if len(words) == 4 and words[0] == "list" else None
    types = {words[-2], length or words[-2]} if len(words) == (2 if length is None else 4) else {""}
    if not types <= _TYPES.keys() or (length is not None and _TYPES[length][0] == "f"):
        raise CorruptFileError("a property of the PLY header has no known type; copy it again")
    return PlyProperty(
        name=words[-1],
        type=np.dtype(order + _TYPES[words[-2]]),
        length=None if length is None else np.dtype(order + _TYPES[length]),
    )


def _check(
    elements: tuple[PlyElement, ...], vertex: PlyElement, encoding: str, available: int
) -> None:
    names = [entry.name for entry in vertex.properties]
    single = {entry.name for entry in vertex.properties if entry.length is None}
    if not {*_XYZ} <= single:
        raise UnsupportedFormatError("a PLY must have the properties x, y and z; convert it first")
    if any(names.count(name) > 1 for name in _USED) or {*_USED} & {*names} - single:
        raise CorruptFileError("coordinates, colors and normals must come once, one number each")
    for element in elements:
        smallest = element.smallest_bytes
        if encoding == "ascii":
            smallest = 2 * len(element.properties)  # a digit and what parts it from the next
        check_room(element.num_rows, smallest, available + (encoding == "ascii"))
    check_points(vertex.num_rows, len(names))


def _from_binary(content: bytes, header: PlyHeader) -> dict[str, NDArray]:
    columns: dict[str, NDArray] = {}
    position = header.length
    for element in header.elements:
        wanted = _USED if element is header.vertex else ()
        found, position = binary_columns(content, position, element, wanted)
        columns |= found
    check_end(content[position:])
    return columns


def _from_text(content: bytes, header: PlyHeader) -> dict[str, NDArray]:
    if b"\n" not in content[:5]:  # as old Macintoshes ended lines
        content = content.replace(b"\r", b"\n")
    types = {entry.name: entry.type for entry in header.vertex.properties}
    lines = text_lines(content, header.length)
    columns: dict[str, NDArray] = {}
    for element in header.elements:
        wanted = _USED if element is header.vertex else ()
        for name, values in text_columns(lines, element, wanted).items():
            columns[name] = as_stored(values, types[name])
    check_end(next(lines, b""))
    return columns
