import numpy as np
import pytest
import torch

from medssl.data.image import PointCloud
from medssl.data.readers.points import read_points
from medssl.data.writers.points import write_ply, write_points_csv


def cloud(**given):
    points = torch.randn(5, 3, generator=torch.Generator().manual_seed(0)) * 1000
    return PointCloud(points=points, unit="mm", **given)


VALUES = torch.tensor([0.1, -2.5, torch.nan, 1e-7, 3e8])


def test_a_ply_holds_every_point_with_its_color_and_normal(tmp_path):
    colors = torch.linspace(0, 1, 15).reshape(5, 3)
    normals = torch.nn.functional.normalize(torch.ones(5, 3), dim=1)
    given = cloud(colors=colors, normals=normals)
    write_ply(given, VALUES, tmp_path / "a.ply")
    found = read_points(tmp_path / "a.ply")
    assert torch.equal(found.points, given.points)
    assert torch.equal(found.normals, given.normals)
    assert (found.colors - colors).abs().max() <= 0.5 / 255 + 1e-6


def test_another_reader_finds_the_values_under_their_name(tmp_path):
    trimesh = pytest.importorskip("trimesh")
    write_ply(cloud(colors=torch.zeros(5, 3)), VALUES, tmp_path / "a.ply")
    raw = trimesh.load(tmp_path / "a.ply").metadata["_ply_raw"]["vertex"]["data"]
    assert np.array_equal(raw["anomaly"], VALUES.numpy(), equal_nan=True)
    assert np.array_equal(raw["z"], cloud().points[:, 2].numpy())


def test_the_rows_after_the_header_are_four_floats_each(tmp_path):
    write_ply(cloud(), VALUES, tmp_path / "a.ply")
    header, _, rows = (tmp_path / "a.ply").read_bytes().partition(b"end_header\n")
    assert b"property float anomaly" in header
    assert b"comment unit mm" in header
    table = np.frombuffer(rows, "<f4").reshape(5, 4)
    assert np.array_equal(table[:, 3], VALUES.numpy(), equal_nan=True)


def test_csv_gives_back_every_bit(tmp_path):
    write_points_csv(cloud(), VALUES, tmp_path / "a.csv")
    assert (tmp_path / "a.csv").read_text().startswith("x,y,z,anomaly\n")
    table = np.loadtxt(tmp_path / "a.csv", delimiter=",", skiprows=1, dtype=np.float32)
    assert np.array_equal(table[:, :3], cloud().points.numpy())
    assert np.array_equal(table[:, 3], VALUES.numpy(), equal_nan=True)


@pytest.mark.parametrize("write", [write_ply, write_points_csv])
def test_values_of_another_number_are_refused_and_leave_no_file(tmp_path, write):
    with pytest.raises(ValueError, match=r"one value per point: got \(4,\) for 5 points"):
        write(cloud(), VALUES[:4], tmp_path / "a")
    assert not list(tmp_path.iterdir())
