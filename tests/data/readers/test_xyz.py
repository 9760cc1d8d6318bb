"""XYZ text against numbers written here."""

from pathlib import Path

import numpy as np
import pytest

from medssl.data.image import PointCloud
from medssl.data.readers.errors import CorruptFileError, ReadError, UnsupportedFormatError
from medssl.data.readers.points import is_xyz_name, points_header, read_points
from medssl.data.readers.points_stored import EmptyCloudError

XYZ = np.random.default_rng(0).normal(size=(8, 3)).round(6)


def read(path: Path, text: str) -> PointCloud:
    (path / "a.xyz").write_text(text)
    cloud = read_points(path / "a.xyz")
    assert isinstance(cloud, PointCloud)
    header = points_header(path / "a.xyz")
    assert header.num_points == len(cloud.points) + cloud.provenance["missing"]
    assert (header.format, header.encoding, header.height) == ("xyz", "ascii", 1)
    return cloud


def text_of(columns: np.ndarray, separator: str = " ") -> str:
    return "".join(separator.join(f"{v:.8g}" for v in row) + "\n" for row in columns)


@pytest.mark.parametrize("separator", [" ", "\t", ",", ", ", "   "])
def test_numbers_stand_between_blanks_or_commas(tmp_path, separator):
    np.testing.assert_array_equal(
        read(tmp_path, text_of(XYZ, separator)).points, XYZ.astype(np.float32)
    )


def test_comments_and_blank_lines_are_skipped(tmp_path):
    text = "# x y z\n\n// mm\n" + text_of(XYZ).replace("\n", "\r\n\r\n") + "  # the end"
    np.testing.assert_array_equal(read(tmp_path, text).points, XYZ.astype(np.float32))


@pytest.mark.parametrize("first", ["x y z", "X,Y,Z", "1 2 z", "1;2;3", "1.0f 2.0f 3.0f"])
def test_a_header_of_words_is_refused_with_what_to_do(tmp_path, first):
    with pytest.raises(UnsupportedFormatError, match=r"first line.*begin it with #") as caught:
        read(tmp_path, f"{first}\n" + text_of(XYZ))
    assert first not in str(caught.value)


def test_six_columns_are_normals_where_all_have_length_1(tmp_path):
    normals = XYZ / np.linalg.norm(XYZ, axis=1, keepdims=True)
    cloud = read(tmp_path, text_of(np.hstack([XYZ, normals])))
    np.testing.assert_allclose(cloud.normals, normals, rtol=1e-6)
    assert cloud.colors is None


def test_the_normals_of_missing_points_need_no_length(tmp_path):
    normals = XYZ / np.linalg.norm(XYZ, axis=1, keepdims=True)
    columns = np.hstack([XYZ, normals])
    columns[3] = 0
    cloud = read(tmp_path, text_of(columns))
    np.testing.assert_allclose(cloud.normals, np.delete(normals, 3, 0), rtol=1e-6)


@pytest.mark.parametrize(
    ("colors", "top"),
    [([[0, 128, 255]], 255), ([[0, 1, 0], [1, 1, 1]], 255), ([[0.5, 0.25, 1]], 1),
     ([[0.5, 0.25, 200]], 255)],
)  # fmt: skip
def test_six_columns_are_colors_otherwise(tmp_path, colors, top):
    colors = np.resize(colors, (8, 3))
    cloud = read(tmp_path, text_of(np.hstack([XYZ, colors])))
    np.testing.assert_allclose(cloud.colors, colors / top, rtol=1e-6)
    assert cloud.normals is None


@pytest.mark.parametrize("extra", [-0.5, 256, np.nan])
def test_six_columns_that_are_neither_are_refused(tmp_path, extra):
    with pytest.raises(UnsupportedFormatError, match="neither"):
        read(tmp_path, text_of(np.hstack([XYZ, np.full((8, 3), extra)])))


@pytest.mark.parametrize("text", ["8\n", "1 2\n", "1 2 3 4\n", "1,5 2,5 3,5\n", "1 2 3 4 5 6 7\n"])
def test_other_numbers_of_columns_are_refused(tmp_path, text):
    with pytest.raises(UnsupportedFormatError):
        read(tmp_path, text)


@pytest.mark.parametrize("text", ["1 2 3\n4 5\n", "1 2 3\n4 5 6 7\n", "1 2 3\n4 five 6\n",
                                  "1,2,3\n4 5 6\n", "1 2 3\n" + "4" * 70_000])  # fmt: skip
def test_lines_that_differ_from_the_first_are_corrupt(tmp_path, text):
    with pytest.raises(CorruptFileError):
        read(tmp_path, text)


@pytest.mark.parametrize("text", ["", "\n\n", "# nothing\n", "0 0 0\nnan 1 2\n"])
def test_nothing_measured_is_an_empty_cloud(tmp_path, text):
    with pytest.raises(EmptyCloudError):
        read(tmp_path, text)


def test_only_the_name_tells_xyz_and_txt_is_not_taken(tmp_path):
    assert is_xyz_name(Path("a.XYZ"))
    assert not is_xyz_name(Path("a.txt"))
    (tmp_path / "a.txt").write_text(text_of(XYZ))
    for function in (read_points, points_header):
        with pytest.raises(UnsupportedFormatError, match="named .xyz"):
            function(tmp_path / "a.txt")


def test_bytes_that_are_no_text_are_a_read_error(tmp_path):
    (tmp_path / "a.xyz").write_bytes(bytes(range(256)) * 10)
    with pytest.raises(ReadError):
        read_points(tmp_path / "a.xyz")
