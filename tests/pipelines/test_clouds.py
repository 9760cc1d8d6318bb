from dataclasses import replace

import numpy as np
import pytest
import torch

from medssl.data.geometry_steps import Geometry
from medssl.data.image import PointCloud
from medssl.data.preprocess import Preprocessing
from medssl.data.sample import Sample
from pipelines.clouds import PointMap, in_own_unit, read_values, regions_of_points
from pipelines.report.cloud_view import view_of_cloud


def plate(side=20, z=0.0):
    """Points one unit apart, z up."""
    y, x = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    return torch.stack([x.flatten(), y.flatten(), torch.full((side * side,), z)], 1).float()


def found(points, values):
    return PointMap(PointCloud(points=points, unit="mm"), values)


def test_points_above_the_threshold_are_boxed_in_their_own_coordinates():
    points = plate() + torch.tensor([100.0, -50.0, 7.0])
    values = torch.zeros(400)
    values[[0, 1, 20]] = 2.0  # around (0, 0)
    values[[399, 398, 379, 378]] = 3.0  # around (19, 19)
    assert regions_of_points(found(points, values), 1.0) == (
        (118.0, -32.0, 7.0, 119.0, -31.0, 7.0),  # of four points: the first
        (100.0, -50.0, 7.0, 101.0, -49.0, 7.0),
    )


@pytest.mark.parametrize(("gap", "count"), [(2, 1), (4, 2)])
def test_points_are_linked_within_three_spacings(gap, count):
    values = torch.zeros(400)
    values[[5, 5 + gap]] = 1.0
    assert len(regions_of_points(found(plate(), values), 0.5)) == count


def test_a_point_that_is_not_looked_at_is_in_no_region_and_does_not_set_the_spacing():
    dense = torch.rand(2000, 3, generator=torch.Generator().manual_seed(0)) - 30
    values = torch.cat([torch.zeros(400), torch.full((2000,), torch.nan)])
    values[[5, 7]] = 1.0
    assert len(regions_of_points(found(torch.cat([plate(), dense]), values), 0.5)) == 1
    assert regions_of_points(found(plate(), torch.zeros(400)), 0.0) == ()  # equal is not above


def test_values_come_back_from_disk(tmp_path):
    values = torch.randn(400)
    values[7] = torch.nan
    found(plate(), values).write(tmp_path / "a.ply")
    assert torch.equal(read_values(tmp_path / "a.ply").nan_to_num(9), values.nan_to_num(9))
    assert {file.name for file in tmp_path.iterdir()} == {"a.ply", "a.csv"}


@pytest.mark.parametrize("up", [True, False])
def test_the_picture_is_taken_from_the_side_of_the_anomaly(up):
    points = torch.cat([plate(30), plate(30, z=10.0)])
    values = torch.zeros(1800)
    values[900 + 435 if up else 435] = 5.0
    shown = view_of_cloud(found(points, values))
    z = float(shown.where.rpartition("z ")[2])
    assert z > 0 if up else z < 0
    assert shown.heat.max() == 5.0


def test_the_picture_is_the_same_wherever_the_cloud_lies_and_whatever_its_unit():
    points = torch.cat([plate(30), plate(30, z=10.0)])
    values = torch.zeros(1800)
    values[[435, 436, 465]] = 5.0
    one = view_of_cloud(found(points, values))
    other = view_of_cloud(found(0.5 * points + 64.0, values))
    assert one.where == other.where
    assert np.array_equal(one.heat, other.heat)


def test_heat_lies_where_the_eye_sees_the_point():
    """Along z a corner of the plate is a corner of the picture; what lies behind has no heat."""
    values = torch.zeros(800)
    values[0] = 1.0
    hidden = found(torch.cat([plate(), plate(z=-10.0)]), values)
    shown = view_of_cloud(hidden)
    assert shown.picture.shape[:2] == shown.heat.shape
    assert max(shown.heat.shape) == 448
    assert 0 < (shown.heat == 1.0).sum() < 0.1 * np.isfinite(shown.heat).sum()
    bright = shown.picture[np.isfinite(shown.heat)].astype(int).mean()
    assert bright > shown.picture[~np.isfinite(shown.heat)].astype(int).mean()


def test_points_that_are_not_looked_at_are_not_shown():
    table = plate(40, z=-1.0) - 10
    values = torch.cat([torch.rand(400), torch.full((1600,), torch.nan)])
    whole = view_of_cloud(found(torch.cat([plate(), table]), values))
    alone = view_of_cloud(found(plate(), values[:400]))
    assert np.array_equal(whole.picture, alone.picture)


def test_colors_are_kept_in_the_picture():
    colors = torch.tensor([1.0, 0.0, 0.0]).expand(400, 3)
    cloud = PointCloud(points=plate(), unit="mm", colors=colors)
    shown = view_of_cloud(PointMap(cloud, torch.rand(400)))
    seen = shown.picture[np.isfinite(shown.heat)]
    assert (seen[:, 0] > 0).all()
    assert (seen[:, 1:] == 0).all()


def test_points_are_brought_to_the_unit_that_a_model_knows():
    sample = Sample(item="a", points=PointCloud(points=plate(), unit="m"))
    to_mm = Preprocessing(geometry=Geometry(unit="mm"))
    assert torch.equal(in_own_unit(sample, to_mm).points.points, 1000 * plate())
    assert in_own_unit(sample, Preprocessing(geometry=Geometry())) is sample
    unknown = replace(sample, points=replace(sample.points, unit="unknown"))
    with pytest.raises(ValueError, match="cannot become 'mm'"):
        in_own_unit(unknown, to_mm)
