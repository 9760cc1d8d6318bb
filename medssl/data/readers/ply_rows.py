"""Rows of a PLY element, in bytes or text, with lists of any length among the properties."""

import struct
from collections import deque
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from itertools import chain, islice

import numpy as np
from numpy.typing import NDArray

from medssl.data.readers.errors import CorruptFileError
from medssl.data.readers.points_stored import check_room, text_values

_FORMATS = {
    "i1": "b", "u1": "B", "i2": "h", "u2": "H", "i4": "i", "u4": "I", "i8": "q", "u8": "Q"
}  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class PlyProperty:
    """A number per row or, where `length` is the type of its count, a list of them.

    type, length: in the file's byte order.
    """

    name: str
    type: np.dtype
    length: np.dtype | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class PlyElement:
    """`num_rows` rows of the same properties."""

    name: str
    num_rows: int
    properties: tuple[PlyProperty, ...]

    @property
    def smallest_bytes(self) -> int:
        """Bytes of a binary row whose lists are empty."""
        return sum((entry.length or entry.type).itemsize for entry in self.properties)


def binary_columns(
    content: bytes, start: int, element: PlyElement, wanted: Collection[str]
) -> tuple[dict[str, NDArray], int]:
    """The wanted columns (num_rows,) of an element, and the byte after it.

    start: the element's first byte. Raises CorruptFileError where the rows leave the file.
    """
    if element.num_rows == 0:
        return {}, start
    check_room(element.num_rows, element.smallest_bytes, len(content) - start)
    offsets, row_bytes = _first_row(content, start, element)
    end = start + element.num_rows * row_bytes
    if end > len(content):
        return _walked(content, start, element, wanted)
    columns = {}
    for entry, offset in zip(element.properties, offsets, strict=True):
        column: NDArray = np.ndarray(
            (element.num_rows,), entry.length or entry.type, content, start + offset, (row_bytes,)
        )
        if entry.length is not None:
            if (column != column[0]).any():
                return _walked(content, start, element, wanted)
        elif entry.name in wanted:
            columns[entry.name] = column
    return columns, end


def text_columns(
    lines: Iterator[bytes], element: PlyElement, wanted: Collection[str]
) -> dict[str, NDArray[np.float64]]:
    """The wanted columns (num_rows,) of an element, one row per line; its lines are consumed.

    Raises CorruptFileError where lines or numbers are missing.
    """
    if element.num_rows == 0 or not element.properties:
        return {}
    if not wanted:
        if sum(1 for _ in islice(lines, element.num_rows)) < element.num_rows:
            raise CorruptFileError("the file has fewer lines than its header says; copy it again")
        return {}
    names = [entry.name for entry in element.properties if entry.length is None]
    if len(names) == len(element.properties):
        values = text_values(lines, (element.num_rows, len(names)))
    else:
        numbers = (_numbers(line, element) for line in islice(lines, element.num_rows))
        values = np.fromiter(chain.from_iterable(numbers), np.float64).reshape(-1, len(names))
    if len(values) < element.num_rows:
        raise CorruptFileError(
            f"expected {element.num_rows} points, got {len(values)}; copy the file again"
        )
    return {name: values[:, index] for index, name in enumerate(names) if name in wanted}


def _first_row(content: bytes, start: int, element: PlyElement) -> tuple[list[int], int]:
    """Offset of each property, and the bytes of the first row."""
    offsets, size = [], 0
    for entry in element.properties:
        offsets.append(size)
        if entry.length is None:
            size += entry.type.itemsize
        else:
            check_room(1, size + entry.length.itemsize, len(content) - start)
            length = int(np.frombuffer(content, entry.length, 1, start + size)[0])
            size += entry.length.itemsize + _checked(length) * entry.type.itemsize
    return offsets, size


def _walked(
    content: bytes, start: int, element: PlyElement, wanted: Collection[str]
) -> tuple[dict[str, NDArray], int]:
    """As `binary_columns`, where a list's length changes from row to row."""
    if not wanted:
        return {}, deque(_runs(content, start, element), maxlen=1)[0]
    starts = np.fromiter(_runs(content, start, element), np.int64)
    num_runs = 1 + sum(entry.length is not None for entry in element.properties)
    buffer = np.frombuffer(content, np.uint8)
    columns, run, offset = {}, 0, 0
    for entry in element.properties:
        if entry.length is not None:
            run, offset = run + 1, 0
            continue
        if entry.name in wanted:
            at = starts[run:-1:num_runs] + offset
            columns[entry.name] = _gathered(buffer, at, entry.type)
        offset += entry.type.itemsize
    return columns, int(starts[-1])


def _runs(content: bytes, position: int, element: PlyElement) -> Iterator[int]:
    """Where each run of single numbers begins: row by row, and in a row before and after each list.

    The last one is the end of the element.
    """
    plan, single = [], 0  # (bytes before the list, its length's format, bytes of an item)
    for entry in element.properties:
        if entry.length is None:
            single += entry.type.itemsize
        else:
            order = ">" if entry.length.str[0] == ">" else "<"
            length = struct.Struct(order + _FORMATS[entry.length.str[1:]])
            plan.append((single, length, entry.type.itemsize))
            single = 0
    try:
        for _ in range(element.num_rows):
            for before, length, item_bytes in plan:
                yield position
                (items,) = length.unpack_from(content, position + before)
                position += before + length.size + _checked(items) * item_bytes
            yield position
            position += single
    except struct.error:
        position = len(content) + 1
    if position > len(content):
        raise CorruptFileError(
            "the lists of the file are longer than the file; it is truncated or damaged, copy it "
            "again"
        )
    yield position


def _gathered(buffer: NDArray[np.uint8], starts: NDArray[np.int64], kind: np.dtype) -> NDArray:
    """The numbers that begin at these bytes."""
    found = np.empty((len(starts), kind.itemsize), np.uint8)
    for byte in range(kind.itemsize):
        found[:, byte] = buffer[starts + byte]
    return found.view(kind)[:, 0]


def _numbers(line: bytes, element: PlyElement) -> list[float]:
    """The single numbers of one line, its lists skipped."""
    words, position, numbers = line.split(), 0, []
    try:
        for entry in element.properties:
            if entry.length is None:
                numbers.append(float(words[position]))
                position += 1
            else:
                position += 1 + _checked(int(words[position]))
    except (IndexError, ValueError):
        position = -1
    if position != len(words):
        raise CorruptFileError(
            "a line of the file does not hold the numbers that the header says; copy it again"
        )
    return numbers


def _checked(length: int) -> int:
    if length < 0:
        raise CorruptFileError(f"a list has {length} entries; the file is damaged, copy it again")
    return length
