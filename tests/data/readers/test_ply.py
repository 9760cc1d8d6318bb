"""PLY against trimesh, and against files written byte by byte."""

import io
import struct
from pathlib import Path

import numpy as np
import pytest
import trimesh

from medssl.data.image import PointCloud
from medssl.data.readers.errors import CorruptFileError, UnsupportedFormatError
from medssl.data.readers.points import points_header, read_points
from medssl.data.readers.points_stored import EmptyCloudError

RNG = np.random.default_rng(0)
XYZ = RNG.normal(size=(20, 3)).astype(np.float32)
ORDERS = {"binary_little_endian": "<", "binary_big_endian": ">"}
ENCODINGS = ["ascii", *ORDERS]
KINDS = {"float": "f4", "double": "f8", "uchar": "u1", "short": "i2", "int": "i4"}
XYZ_FIELDS = {"x": "float", "y": "float", "z": "float"}


def write(path: Path, body: bytes, *lines: str, encoding: str = "ascii", end: str = "\n") -> Path:
    header = ["ply", f"format {encoding} 1.0", "comment end_header", *lines, "end_header", ""]
    path.write_bytes(end.join(header).encode() + body)
    return path


def properties(fields: dict[str, str]) -> list[str]:
    return [f"property {kind} {name}" for name, kind in fields.items()]


def rows(columns: np.ndarray, fields: dict[str, str], encoding: str) -> bytes:
    """columns: (P, F)."""
    if encoding == "ascii":
        return "".join(" ".join(f"{v:.9g}" for v in row) + "\n" for row in columns).encode()
    kinds = [(name, ORDERS[encoding] + KINDS[kind]) for name, kind in fields.items()]
    return np.array([tuple(row) for row in columns], kinds).tobytes()


def write_columns(path: Path, columns: np.ndarray, fields: dict[str, str], encoding: str) -> Path:
    lines = [f"element vertex {len(columns)}", *properties(fields)]
    return write(path, rows(columns, fields, encoding), *lines, encoding=encoding)


def read(path: Path) -> PointCloud:
    cloud = read_points(path)
    assert isinstance(cloud, PointCloud)
    assert points_header(path).num_points == len(cloud.points) + cloud.provenance["missing"]
    return cloud


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_coordinates_are_those_written_in_every_encoding(tmp_path, encoding):
    path = write_columns(tmp_path / "a.ply", XYZ, XYZ_FIELDS, encoding)
    cloud = read(path)
    np.testing.assert_array_equal(cloud.points, XYZ)
    assert (cloud.unit, cloud.colors, cloud.normals) == ("unknown", None, None)
    assert (cloud.provenance["format"], cloud.provenance["encoding"]) == ("ply", encoding)
    header = points_header(path)
    assert (header.width, header.height, header.fields) == (20, 1, ("x", "y", "z"))


def test_every_encoding_of_a_cloud_has_one_pixel_hash(tmp_path):
    found = [
        read_points(
            write_columns(tmp_path / "a.ply", XYZ, XYZ_FIELDS, encoding), hashes=True
        ).provenance
        for encoding in ENCODINGS
    ]
    assert len({each["pixel_sha256"] for each in found}) == 1
    assert len({each["file_sha256"] for each in found}) == 3


@pytest.mark.parametrize("encoding", ["ascii", "binary"])
def test_a_mesh_equals_trimesh(tmp_path, encoding):
    mesh = trimesh.creation.icosphere(subdivisions=2)
    mesh.visual.vertex_colors = RNG.integers(0, 256, (len(mesh.vertices), 4), dtype=np.uint8)
    path = tmp_path / "a.ply"
    path.write_bytes(trimesh.exchange.ply.export_ply(mesh, encoding=encoding, vertex_normal=True))
    expected = trimesh.load(io.BytesIO(path.read_bytes()), file_type="ply", process=False)
    cloud = read(path)
    np.testing.assert_array_equal(cloud.points, expected.vertices.astype(np.float32))
    np.testing.assert_array_equal(
        cloud.colors, expected.visual.vertex_colors[:, :3].astype(np.float32) / 255
    )
    np.testing.assert_allclose(cloud.normals, mesh.vertex_normals, atol=1e-6)


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_extra_numbers_are_skipped_whatever_their_type(tmp_path, encoding):
    fields = {"id": "short", "x": "float", "quality": "double", "y": "float", "t": "uchar",
              "z": "double"}  # fmt: skip
    columns = RNG.integers(1, 200, (9, 6)).astype(float)
    cloud = read(write_columns(tmp_path / "a.ply", columns, fields, encoding))
    np.testing.assert_array_equal(cloud.points, columns[:, [1, 3, 5]])


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("kind", ["uchar", "float", "double"])
def test_colors_are_scaled_to_0_to_1_and_normals_kept(tmp_path, encoding, kind):
    fields = XYZ_FIELDS | {"nx": "float", "ny": "float", "nz": "float"}
    fields |= {"red": kind, "green": kind, "blue": kind}
    colors = RNG.integers(0, 256, (20, 3)) if kind == "uchar" else RNG.random((20, 3))
    columns = np.hstack([XYZ, XYZ[::-1], colors])
    cloud = read(write_columns(tmp_path / "a.ply", columns, fields, encoding))
    np.testing.assert_allclose(
        cloud.colors, colors / 255 if kind == "uchar" else colors, rtol=1e-6, atol=1e-9
    )
    np.testing.assert_array_equal(cloud.normals, XYZ[::-1])


def test_float_colors_beyond_1_are_of_255_and_beyond_that_refused(tmp_path):
    fields = XYZ_FIELDS | {"red": "float", "green": "float", "blue": "float"}
    columns = np.hstack([XYZ, np.full((20, 3), 1.5)])
    cloud = read(write_columns(tmp_path / "a.ply", columns, fields, "ascii"))
    np.testing.assert_allclose(cloud.colors, 1.5 / 255)
    for wrong in (256.0, -1.0):
        columns[3, 4] = wrong
        with pytest.raises(UnsupportedFormatError, match="0 to 255"):
            read(write_columns(tmp_path / "a.ply", columns, fields, "ascii"))


LISTS = [
    "element material 2", "property list ushort double weights",
    "element vertex 3", "property float x", "property list uchar int neighbors",
    "property float y", "property list int short more", "property float z",
    "element face 2", "property list uchar int vertex_indices",
]  # fmt: skip
WEIGHTS = [[1.5], []]
VERTICES = [(1, [7, 8, 9], 2, [], 3), (4, [], 5, [1, 2], 6), (7, [3], 8, [4], 9)]
FACES = [[0, 1, 2], [0, 1, 2, 0]]


def list_bytes(order: str) -> bytes:
    body = b"".join(struct.pack(f"{order}H{len(w)}d", len(w), *w) for w in WEIGHTS)
    for x, near, y, more, z in VERTICES:
        body += struct.pack(f"{order}fB{len(near)}i", x, len(near), *near)
        body += struct.pack(f"{order}fi{len(more)}hf", y, len(more), *more, z)
    return body + b"".join(struct.pack(f"{order}B{len(f)}i", len(f), *f) for f in FACES)


def list_text() -> bytes:
    rows = [[len(w), *w] for w in WEIGHTS]
    rows += [[x, len(near), *near, y, len(more), *more, z] for x, near, y, more, z in VERTICES]
    rows += [[len(f), *f] for f in FACES]
    return "".join(" ".join(map(str, row)) + "\n" for row in rows).encode()


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_lists_of_changing_length_are_skipped_before_within_and_after_the_points(
    tmp_path, encoding
):
    body = list_text() if encoding == "ascii" else list_bytes(ORDERS[encoding])
    cloud = read(write(tmp_path / "a.ply", body, *LISTS, encoding=encoding))
    np.testing.assert_array_equal(cloud.points, [[1, 2, 3], [4, 5, 6], [7, 8, 9]])
    cuts = range(len(body)) if encoding != "ascii" else [body.rindex(b"\n", 0, -1), 9, 0]
    for cut in cuts:
        with pytest.raises(CorruptFileError):
            read(write(tmp_path / "a.ply", body[:cut], *LISTS, encoding=encoding))


@pytest.mark.parametrize("order", "<>")
def test_lists_of_one_length_and_long_counts_are_skipped(tmp_path, order):
    lines = ["element vertex 4", "property list int64 uchar extra", *properties(XYZ_FIELDS)]
    encoding = {kind: name for name, kind in ORDERS.items()}[order]
    for lengths in ((2, 2, 2, 2), (2, 0, 1, 2)):
        body = b"".join(
            struct.pack(f"{order}q{n}B3f", n, *range(n), *XYZ[row]) for row, n in enumerate(lengths)
        )
        cloud = read(write(tmp_path / "a.ply", body, *lines, encoding=encoding))
        np.testing.assert_array_equal(cloud.points, XYZ[:4])


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("encoding", ENCODINGS)
def test_lines_end_as_on_any_system(tmp_path, end, encoding):
    columns = XYZ.copy()
    columns[0, 0] = np.frombuffer(b"\n\n\r\r", "f4")[0]  # what could be taken for a line's end
    body = rows(columns, XYZ_FIELDS, encoding)
    body = body.replace(b"\n", end.encode()) if encoding == "ascii" else body
    lines = ["element vertex 20", *properties(XYZ_FIELDS)]
    cloud = read(write(tmp_path / "a.ply", body, *lines, encoding=encoding, end=end))
    np.testing.assert_array_equal(cloud.points, columns)


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("share", [0.1, 0.5, 0.95])
def test_a_truncated_file_is_corrupt(tmp_path, encoding, share):
    path = write_columns(tmp_path / "a.ply", XYZ, XYZ_FIELDS, encoding)
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    for function in (read_points, points_header):
        if function is read_points or encoding != "ascii":
            with pytest.raises(CorruptFileError):
                function(path)


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("count", [10**12, 10**18 - 1, 21, 10**30])
def test_a_header_that_announces_more_than_the_file_holds_is_corrupt(tmp_path, encoding, count):
    body = rows(XYZ, XYZ_FIELDS, encoding)
    for lines in (
        [f"element vertex {count}", *properties(XYZ_FIELDS)],
        ["element vertex 20", *properties(XYZ_FIELDS), f"element face {count}", LISTS[-1]],
    ):
        with pytest.raises(CorruptFileError):
            read_points(write(tmp_path / "a.ply", body, *lines, encoding=encoding))


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_a_header_that_announces_less_than_the_file_holds_is_corrupt(tmp_path, encoding):
    body, lines = rows(XYZ, XYZ_FIELDS, encoding), properties(XYZ_FIELDS)
    path = write(tmp_path / "a.ply", body, "element vertex 19", *lines, encoding=encoding)
    with pytest.raises(CorruptFileError, match="goes on"):
        read_points(path)
    write(path, body + b"\r\n\n", "element vertex 20", *lines, encoding=encoding)
    np.testing.assert_array_equal(read(path).points, XYZ)


@pytest.mark.parametrize("length", [2**32 - 1, 2**31])
def test_a_list_longer_than_the_file_is_corrupt(tmp_path, length):
    lines = ["element vertex 1", "property list uint double w", *properties(XYZ_FIELDS)]
    body = struct.pack("<I3f", length, 1, 2, 3)
    with pytest.raises(CorruptFileError):
        read_points(write(tmp_path / "a.ply", body, *lines, encoding="binary_little_endian"))
    lines[1] = "property list int double w"
    body = struct.pack("<i3f", -1, 1, 2, 3)
    with pytest.raises(CorruptFileError, match="-1 entries"):
        read_points(write(tmp_path / "a.ply", body, *lines, encoding="binary_little_endian"))


@pytest.mark.parametrize(
    ("lines", "error"),
    [
        (["element vertex 0", *properties(XYZ_FIELDS)], EmptyCloudError),
        (["element face 1", *properties(XYZ_FIELDS)], UnsupportedFormatError),
        (["element vertex 1", "property float x", "property float y"], UnsupportedFormatError),
        (["element vertex 1", *properties(XYZ_FIELDS), "property float x"], CorruptFileError),
        (["element vertex 1", "property list float int x"], CorruptFileError),
        (["element vertex 1", "property text x"], CorruptFileError),
        (["element vertex 1", "property"], CorruptFileError),
        (["element vertex -1", *properties(XYZ_FIELDS)], CorruptFileError),
        (["element vertex 1e3", *properties(XYZ_FIELDS)], CorruptFileError),
        (["property float x", "element vertex 1"], CorruptFileError),
        (["format secret"], CorruptFileError),
    ],
)
def test_other_headers_are_refused_without_their_text(tmp_path, lines, error):
    for function in (read_points, points_header):
        with pytest.raises(error) as caught:
            function(write(tmp_path / "a.ply", b"1 2 3 4\n" * 20, *lines))
        assert "secret" not in str(caught.value)
        assert str(tmp_path) not in str(caught.value)


def test_a_number_too_large_for_its_type_is_corrupt(tmp_path):
    fields = XYZ_FIELDS | {"red": "uchar", "green": "uchar", "blue": "uchar"}
    columns = np.hstack([XYZ, np.full((20, 3), 300.0)])
    with pytest.raises(CorruptFileError, match="integers"):
        read(write_columns(tmp_path / "a.ply", columns, fields, "ascii"))


@pytest.mark.parametrize(
    "content", [b"ply\n", b"ply\r\nformat ascii 1.0\r\n", b"ply\nend_header\n", b"ply\n" * 40_000]
)
def test_a_header_without_its_parts_is_corrupt(tmp_path, content):
    (tmp_path / "a.ply").write_bytes(content)
    with pytest.raises(CorruptFileError):
        read_points(tmp_path / "a.ply")
