"""What becomes of each point cloud, in every encoding: the true points, or the error by name."""

import numpy as np
import pytest
import tifffile
import trimesh
from pypcd4 import PointCloud as Pcd

from medssl.data.image import Image
from medssl.data.modality import Modality
from medssl.data.readers.any import read_image
from medssl.data.readers.errors import CorruptFileError, EmptyCloudError, UnsupportedFormatError
from medssl.data.readers.points import read_points
from medssl.data.synthetic.faulty_points import (
    HEIGHT,
    MISSING,
    SUFFIXES,
    WIDTH,
    true_points,
    write_points,
)

LYING = (CorruptFileError, UnsupportedFormatError)


def read(path):
    if path.suffix == ".tiff":
        return read_image(path, modality=Modality.DEPTH, unit="m")
    return read_points(path, unit="m")


@pytest.mark.parametrize("encoding", SUFFIXES)
def test_whole_points_are_the_true_ones(tmp_path, encoding):
    path = tmp_path / f"a{SUFFIXES[encoding]}"
    write_points(path, encoding)
    found = read(path)
    if isinstance(found, Image):
        np.testing.assert_array_equal(
            found.pixels.numpy(), true_points().T.reshape(3, HEIGHT, WIDTH)
        )
        assert (found.units, found.frame, found.valid) == ("m", "sensor", None)
    else:
        np.testing.assert_array_equal(found.points.numpy(), true_points())
        assert (found.unit, found.provenance["missing"]) == ("m", 0)


@pytest.mark.parametrize("encoding", SUFFIXES)
def test_missing_points_are_no_coordinates(tmp_path, encoding):
    path = tmp_path / f"a{SUFFIXES[encoding]}"
    write_points(path, encoding, "missing_points")
    found = read(path)
    if isinstance(found, Image):
        assert (~found.valid).flatten().nonzero()[:, 0].tolist() == list(MISSING)
    else:
        np.testing.assert_array_equal(found.points.numpy(), np.delete(true_points(), MISSING, 0))
        assert found.provenance["missing"] == 2


@pytest.mark.parametrize("encoding", SUFFIXES)
@pytest.mark.parametrize("fault", ["truncated", "lying_count", "nothing_measured"])
def test_what_is_not_whole_is_refused_by_name(tmp_path, encoding, fault):
    path = tmp_path / f"a{SUFFIXES[encoding]}"
    write_points(path, encoding, fault)
    if fault == "lying_count" and encoding in ("xyz", "tiff"):
        pytest.skip("these announce no count of points")
    expected = {"truncated": CorruptFileError, "nothing_measured": EmptyCloudError}
    if fault == "truncated" and encoding == "xyz":
        pytest.skip("text that ends between two lines is whole, in a line it is the next case")
    with pytest.raises(expected.get(fault, LYING)):
        read(path)


def test_other_programs_read_the_same_points(tmp_path):
    for encoding in ("ply_ascii", "ply_little_endian", "ply_big_endian"):
        write_points(tmp_path / "a.ply", encoding)
        cloud = trimesh.load(tmp_path / "a.ply", process=False)
        np.testing.assert_allclose(cloud.vertices, true_points(), atol=1e-7)
    for encoding in ("pcd_ascii", "pcd_binary", "pcd_compressed"):
        write_points(tmp_path / "a.pcd", encoding)
        np.testing.assert_allclose(
            Pcd.from_path(tmp_path / "a.pcd").numpy(("x", "y", "z")), true_points(), atol=1e-6
        )
    write_points(tmp_path / "a.tiff", "tiff")
    assert tifffile.imread(tmp_path / "a.tiff").shape == (HEIGHT, WIDTH, 3)
