"""PCD against pypcd4, and against files written byte by byte."""

import struct
from pathlib import Path

import lzf
import numpy as np
import pypcd4
import pytest
import torch

from medssl.data.image import Image, PointCloud
from medssl.data.modality import Modality
from medssl.data.readers.errors import CorruptFileError, ReadError, UnsupportedFormatError
from medssl.data.readers.points import points_header, points_kind, read_points
from medssl.data.readers.points_stored import EmptyCloudError

RNG = np.random.default_rng(0)
XYZ = RNG.normal(size=(24, 3)).astype(np.float32)
ENCODINGS = ["ascii", "binary", "binary_compressed"]
CODES = {"f": "F", "u": "U", "i": "I"}


def lines(table: np.ndarray, counts: list[int], height: int) -> dict[str, str]:
    kinds = [table.dtype[name].base for name in table.dtype.names or ()]
    return {
        "VERSION": "0.7",
        "FIELDS": " ".join("_" if n.startswith("_") else n for n in table.dtype.names or ()),
        "SIZE": " ".join(str(kind.itemsize) for kind in kinds),
        "TYPE": " ".join(CODES[kind.kind] for kind in kinds),
        "COUNT": " ".join(map(str, counts)),
        "WIDTH": str(len(table) // height),
        "HEIGHT": str(height),
        "VIEWPOINT": "1 2 3 1 0 0 0",
        "POINTS": str(len(table)),
    }


def body_of(table: np.ndarray, encoding: str) -> bytes:
    names = table.dtype.names or ()
    if encoding == "binary":
        return table.tobytes()
    if encoding == "ascii":
        rows = [np.concatenate([np.ravel(row[name]) for name in names]) for row in table]
        return "".join(" ".join(f"{v:.17g}" for v in row) + "\n" for row in rows).encode()
    content = b"".join(table[name].tobytes() for name in names)
    packed = lzf.compress(content, 2 * len(content) + 100)
    return struct.pack("<II", len(packed), len(content)) + packed


def write(
    path: Path, table: np.ndarray, encoding: str, *, height: int = 1, **changed: str | None
) -> Path:
    """A structured array as PCD; `changed` replaces lines of the header, None leaves one out."""
    counts = [int(np.prod(table.dtype[name].shape)) for name in table.dtype.names or ()]
    header = lines(table, counts, height) | {"DATA": encoding} | changed
    text = "".join(f"{key} {value}\n" for key, value in header.items() if value is not None)
    path.write_bytes(b"# .PCD v0.7\n" + text.encode() + body_of(table, encoding))
    return path


def xyz_table(xyz: np.ndarray, kind: str = "f4") -> np.ndarray:
    return np.array([tuple(row) for row in xyz], [(name, kind) for name in "xyz"])


def cloud_of(path: Path) -> PointCloud:
    cloud = read_points(path)
    assert isinstance(cloud, PointCloud)
    return cloud


def image_of(path: Path, unit=None) -> Image:
    image = read_points(path, unit=unit)
    assert isinstance(image, Image)
    return image


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_every_encoding_equals_pypcd4(tmp_path, encoding):
    rgb = pypcd4.PointCloud.encode_rgb(RNG.integers(0, 256, (24, 3)))
    fields = ("x", "y", "z", "rgb", "normal_x", "normal_y", "normal_z", "label")
    types = (np.float32,) * 7 + (np.uint16,)
    columns = [*XYZ.T, np.ravel(rgb), *XYZ[::-1].T, np.arange(24)]
    expected = pypcd4.PointCloud.from_points(columns, fields, types)
    expected.save(tmp_path / "a.pcd", encoding=pypcd4.Encoding(encoding))

    cloud = cloud_of(tmp_path / "a.pcd")
    exact = encoding != "ascii"  # pypcd4 writes ten decimals
    atol = 0 if exact else 1e-6
    np.testing.assert_allclose(cloud.points, expected.numpy(("x", "y", "z")), rtol=0, atol=atol)
    np.testing.assert_allclose(cloud.normals, expected.numpy(fields[4:7]), rtol=0, atol=atol)
    if exact:  # which loses packed colors in text
        colors = pypcd4.PointCloud.decode_rgb(expected.numpy(("rgb",)))
        np.testing.assert_array_equal(cloud.colors, colors.astype("f4") / 255)
    header = points_header(tmp_path / "a.pcd")
    assert (header.num_points, header.width, header.height) == (24, 24, 1)
    assert (header.fields, header.format, header.encoding) == (fields, "pcd", encoding)


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize(("name", "kind"), [("rgb", "f4"), ("rgb", "u4"), ("rgba", "u4")])
def test_packed_colors_are_red_green_blue(tmp_path, encoding, name, kind):
    table = np.zeros(2, [(n, "f4") for n in "xyz"] + [(name, kind)])
    table["x"] = 1, 2
    bits = np.array([0x00FF8000, 0x3F010203], "u4")
    table[name] = bits.view(kind)
    cloud = cloud_of(write(tmp_path / "a.pcd", table, encoding))
    expected = np.array([[255, 128, 0], [1, 2, 3]], "f4") / 255
    np.testing.assert_array_equal(cloud.colors, expected)


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_padding_and_fields_of_many_values_are_skipped(tmp_path, encoding):
    table = np.zeros(
        5, [("_a", "u1", (3,)), ("x", "f4"), ("fpfh", "f4", (33,)), ("y", "f8"), ("_b", "i8"),
            ("z", "i2")]
    )  # fmt: skip
    for name in ("x", "y", "z"):
        table[name] = RNG.integers(-99, 99, 5)
    for name in ("_a", "fpfh", "_b"):
        table[name] = 7
    cloud = cloud_of(write(tmp_path / "a.pcd", table, encoding))
    np.testing.assert_array_equal(cloud.points, np.stack([table[n] for n in "xyz"], 1))


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_an_organized_cloud_is_an_image_of_xyz(tmp_path, encoding):
    grid = XYZ.copy()
    grid[5], grid[7], grid[9, 1], grid[11, 2] = np.nan, 0, np.inf, 0
    image = image_of(write(tmp_path / "a.pcd", xyz_table(grid), encoding, height=4), unit="mm")
    np.testing.assert_array_equal(image.pixels, grid.reshape(4, 6, 3).transpose(2, 0, 1))
    assert image.valid is not None
    assert (~image.valid).nonzero().tolist() == [[0, 5], [1, 1], [1, 3]]
    assert (image.axes, image.frame, image.modality) == ("HW", "sensor", Modality.DEPTH)
    assert (image.channels, image.units, image.spacing) == (("x", "y", "z"), "mm", None)
    assert torch.equal(image.affine, torch.eye(4, dtype=torch.float64))
    header = points_header(tmp_path / "a.pcd")
    assert (header.num_points, header.width, header.height) == (24, 6, 4)


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_the_encoding_does_not_change_the_pixel_hash_and_the_grid_does(tmp_path, encoding):
    hashes = [
        read_points(write(tmp_path / "a.pcd", xyz_table(XYZ), each, height=h), hashes=True)
        .provenance["pixel_sha256"]
        for each, h in (("binary", 4), (encoding, 4), (encoding, 6), (encoding, 1))
    ]  # fmt: skip
    assert hashes[0] == hashes[1]
    assert len(set(hashes)) == 3


def test_optional_lines_may_be_absent_and_lines_end_with_a_carriage_return(tmp_path):
    path = write(tmp_path / "a.pcd", xyz_table(XYZ), "binary", COUNT=None, VIEWPOINT=None,
                 POINTS=None, VERSION=None)  # fmt: skip
    np.testing.assert_array_equal(cloud_of(path).points, XYZ)
    write(path, xyz_table(XYZ), "ascii")
    path.write_bytes(path.read_bytes().replace(b"\n", b"\r\n"))
    np.testing.assert_array_equal(cloud_of(path).points, XYZ)


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("share", [0.02, 0.3, 0.6, 0.9, 0.97])
def test_a_truncated_file_is_corrupt(tmp_path, encoding, share):
    path = write(tmp_path / "a.pcd", xyz_table(np.tile(XYZ, (10, 1))), encoding)
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    with pytest.raises(CorruptFileError):
        read_points(path)


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("count", [10**12, 10**18 - 1, 10**25])
def test_a_header_that_announces_more_than_the_file_holds_is_corrupt(tmp_path, encoding, count):
    changes = [
        {"WIDTH": str(count), "POINTS": str(count)},
        {"WIDTH": str(count), "HEIGHT": str(count), "POINTS": str(count * count)},
        {"COUNT": f"1 1 {count}"},
        {"WIDTH": "25", "POINTS": "25"},
    ]
    for changed in changes:
        path = write(tmp_path / "a.pcd", xyz_table(XYZ), encoding, **changed)
        with pytest.raises(CorruptFileError):
            read_points(path)
        if changed != changes[-1] or encoding == "binary":
            with pytest.raises(CorruptFileError):
                points_header(path)


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_a_header_that_announces_less_than_the_file_holds_is_corrupt(tmp_path, encoding):
    path = write(tmp_path / "a.pcd", xyz_table(XYZ), encoding, WIDTH="23", POINTS="23")
    with pytest.raises(CorruptFileError):
        read_points(path)
    path.write_bytes(write(path, xyz_table(XYZ), encoding).read_bytes() + b"\n\0\n")
    np.testing.assert_array_equal(cloud_of(path).points, XYZ)


def test_a_block_that_cannot_unpack_to_what_it_says_is_refused_before_any_memory_is(tmp_path):
    num_points = 300_000_000  # 3.6 GB out of 50 MB at best, and out of 100 bytes never
    path = write(tmp_path / "a.pcd", xyz_table(XYZ), "binary_compressed",
                 WIDTH=str(num_points), POINTS=str(num_points))  # fmt: skip
    start = path.read_bytes()
    start = start[: start.index(b"compressed\n") + 11]
    path.write_bytes(start + struct.pack("<II", 100, 2**32 - 1) + bytes(100))
    with pytest.raises(CorruptFileError, match="left"):
        read_points(path)
    content = write(path, xyz_table(XYZ), "binary_compressed").read_bytes()
    at = content.index(b"compressed\n") + 11
    for packed, size in (
        (100, 288),
        (10**9, 288),
        (250, 289),
        (250, 2**32 - 1),
        (0, 288),
        (3, 288),
    ):
        path.write_bytes(content[:at] + struct.pack("<II", packed, size) + content[at + 8 :])
        with pytest.raises(CorruptFileError):
            read_points(path)


def test_a_run_of_equal_points_unpacks_though_it_is_packed_88_to_1(tmp_path):
    table = xyz_table(np.full((20_000, 3), 1.0))
    path = write(tmp_path / "a.pcd", table, "binary_compressed")
    assert len(path.read_bytes()) < table.nbytes / 60
    assert read_points(path).provenance["duplicates"] == 19_999


@pytest.mark.parametrize(
    ("changed", "error"),
    [
        ({"WIDTH": "0", "POINTS": "0"}, EmptyCloudError),
        ({"POINTS": "23"}, CorruptFileError),
        ({"FIELDS": "x y secret"}, UnsupportedFormatError),
        ({"FIELDS": "x y y"}, ReadError),
        ({"FIELDS": "x y z x"}, CorruptFileError),
        (
            {
                "FIELDS": "x y z x",
                "SIZE": "4 4 4 4",
                "TYPE": "F F F F",
                "COUNT": "1 1 1 1",
                "WIDTH": "18",
                "POINTS": "18",
            },
            CorruptFileError,
        ),
        (
            {
                "FIELDS": "x y z rgb",
                "SIZE": "4 4 4 8",
                "TYPE": "F F F U",
                "COUNT": "1 1 1 1",
                "WIDTH": "12",
                "POINTS": "12",
            },
            UnsupportedFormatError,
        ),
        ({"SIZE": "4 4 3"}, CorruptFileError),
        ({"SIZE": "4 4 2"}, CorruptFileError),
        ({"SIZE": None}, CorruptFileError),
        ({"TYPE": "F F secret"}, CorruptFileError),
        ({"COUNT": "1 1 0"}, CorruptFileError),
        ({"COUNT": "1 1 2"}, CorruptFileError),
        ({"WIDTH": "-24"}, CorruptFileError),
        ({"WIDTH": "24 24"}, CorruptFileError),
        ({"DATA": "secret"}, UnsupportedFormatError),
        ({"DATA": None}, CorruptFileError),
        ({"VERSION": "0.7\nSECRET 1"}, CorruptFileError),
        ({"VERSION": "0.7\nWIDTH 24"}, CorruptFileError),
    ],
)
def test_other_headers_are_refused_without_their_text(tmp_path, changed, error):
    path = write(tmp_path / "a.pcd", xyz_table(XYZ), "binary", **changed)
    for function in (read_points, points_header):
        with pytest.raises(error) as caught:
            function(path)
        assert "secret" not in str(caught.value).lower()


def test_the_first_bytes_tell_a_pcd(tmp_path):
    content = write(tmp_path / "a.pcd", xyz_table(XYZ), "binary").read_bytes()
    assert points_kind(content[:100]) == "pcd"
    assert points_kind(content[12:112]) == "pcd"  # without its comment
    assert points_kind(b"# by hand\nFIELDS x y z\n") == "pcd"
    for other in (b"", b"VERSION 1.0\nBEGIN\n", b"# FIELDS x\n", b"%PDF-1.4\n", b"plyx", b"ply "):
        assert points_kind(other) is None
    assert points_kind(b"ply\n") == points_kind(b"ply\r\n") == "ply"
