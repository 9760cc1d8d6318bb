"""Reliefs whose normals are known, and a network that says the mean color of 4 x 4 pixels."""

from dataclasses import replace
from math import tanh

import pytest
import torch
from rgbd_scenes import MeanColor, color_image, noise, peak, reloaded, scene, without, xyz_image

from anomaly.base import NormalData
from anomaly.multimodal.double_patchcore import DoublePatchCore
from anomaly.multimodal.modalities import ColorFeatures, GeometryFeatures
from anomaly.multimodal.relief import ReliefFeatures
from medssl.data.sample import Sample, collate


def relief(**arguments: object) -> ReliefFeatures:
    made = ReliefFeatures(MeanColor(), **({"layers": ["0"], "grid": (8, 6)} | arguments))
    return made.fit(NormalData([scene(0)]))


def turned(z: torch.Tensor) -> torch.Tensor:
    """xyz (3, H, W) of heights before the sensor, turned by 0.3 about an axis far from any."""
    x, y, z = xyz_image(z).pixels
    c, s = torch.cos(torch.tensor(0.3)), torch.sin(torch.tensor(0.3))
    y, z = c * y - s * (z - 100), s * y + c * (z - 100) + 100
    return torch.stack([c * x - s * (z - 100), y, s * x + c * (z - 100) + 100])


def everywhere(xyz: torch.Tensor) -> torch.Tensor:
    return torch.ones(xyz.shape[1:], dtype=torch.bool)


def test_a_plane_is_flat_however_it_lies():
    xyz = turned(torch.full((32, 24), 100.0))
    picture = relief().picture(xyz, everywhere(xyz))
    torch.testing.assert_close(picture, torch.zeros(3, 32, 24), atol=2e-3, rtol=0)


@pytest.mark.parametrize(("axis", "channel"), [(1, 0), (0, 1)])
def test_the_tilt_of_a_ramp_beside_a_plane_is_its_sine(axis, channel):
    """z grows by 0.05 a step in the last third: the normal leans by the sine of atan 0.05."""
    z = torch.full((48, 48), 100.0)
    step = 0.05 * (torch.arange(48.0) - 32).clamp_min(0)
    z += step if axis else step[:, None]
    features = relief(slope=0.2)
    picture = features.picture(xyz_image(z).pixels, torch.ones(48, 48, dtype=torch.bool))
    sine = 0.05 / (1 + 0.05**2) ** 0.5
    inner = picture if axis else picture.mT
    assert inner[channel, 8:40, 40:44].mean().item() == pytest.approx(
        2 * tanh(sine / 0.2), rel=1e-3
    )
    torch.testing.assert_close(inner[channel, 8:40, 8:24], torch.zeros(32, 16), atol=1e-3, rtol=0)
    torch.testing.assert_close(
        inner[1 - channel, 8:40, 8:44], torch.zeros(32, 36), atol=1e-2, rtol=0
    )


def test_height_is_towards_the_sensor_above_the_median():
    z = torch.full((32, 24), 100.0)
    z[:8] -= 3
    features = relief()
    picture = features.picture(xyz_image(z).pixels, torch.ones(32, 24, dtype=torch.bool))
    assert picture[2, 2, 12].item() == pytest.approx(
        2 * tanh(3 / features.height_.item()), rel=0.01
    )
    assert picture[2, 20:].abs().max() < 0.01


def test_flying_points_do_not_flatten_the_heights():
    """One point in a hundred and twenty lies far away."""
    z = 100 + 2 * noise(64, 64, seed=6)
    features = relief()
    plane = Sample(item="rough", images={"image": xyz_image(z)})
    clean = features.fit(NormalData([plane])).height_.item()
    assert clean == pytest.approx(2, rel=0.05)
    z.view(-1)[::120] = 9000
    flying = Sample(item="flying", images={"image": xyz_image(z)})
    assert features.fit(NormalData([flying])).height_.item() == pytest.approx(clean, rel=0.1)


def test_a_surface_that_looks_along_x_has_tilts():
    """Seen at a grazing angle; a groove across it leans by the sine of atan 0.05."""
    step = 0.05 * (torch.arange(48.0) - 32).clamp_min(0)
    y, z = torch.meshgrid(torch.arange(48.0), 100 + torch.arange(48.0), indexing="ij")
    xyz = torch.stack([200 + step.expand(48, 48), y, z])
    picture = relief(slope=0.2).picture(xyz, everywhere(xyz))
    sine = 0.05 / (1 + 0.05**2) ** 0.5
    across, along = picture[:2, 8:40, 40:44].mean(dim=(1, 2)).tolist()
    assert along == pytest.approx(2 * tanh(sine / 0.2), rel=1e-2)
    assert across == pytest.approx(0, abs=0.02)


def test_items_of_two_sizes_in_one_batch_are_those_alone():
    features = relief()
    small, large = scene(4), scene(5, size=(40, 32))
    both = features(collate([small, large]))
    for i, item in enumerate((small, large)):
        alone = features(collate([item]))
        torch.testing.assert_close(both.features[i], alone.features[0])
        assert both.valid[i].equal(alone.valid[0])


def test_a_valid_point_that_is_nan_is_named_at_once():
    item = scene(7)
    xyz = item.images["xyz"]
    pixels = xyz.pixels.clone()
    pixels[2, 3, 3] = torch.nan
    spoilt = item.with_image(replace(xyz, pixels=pixels), "xyz")
    with pytest.raises(ValueError, match="item scene7 has valid points that are NaN"):
        relief().fit(NormalData([spoilt]))
    with pytest.raises(ValueError, match="item scene7 has valid points that are NaN"):
        relief()(collate([scene(8), spoilt]))


def test_what_was_not_measured_is_flat_whatever_it_holds():
    valid = noise(32, 24, seed=5) > -0.5
    item = scene(1, xyz_valid=valid)
    xyz = item.images["xyz"]
    features = relief()
    picture = features.picture(xyz.pixels, valid)
    assert not picture[:, ~valid].any()
    spoiled = torch.where(valid, xyz.pixels, torch.nan)
    assert features.picture(spoiled, valid).equal(picture)
    again = item.with_image(replace(xyz, pixels=spoiled), "xyz")
    found, clean = features(collate([again])), features(collate([item]))
    assert found.features.equal(clean.features)
    assert found.valid.equal(clean.valid)


def test_a_grid_that_was_enlarged_shows_the_same_relief():
    xyz = scene(2).images["xyz"].pixels
    features = relief()
    large = xyz.repeat_interleave(2, 1).repeat_interleave(2, 2)
    expected = features.picture(xyz, everywhere(xyz))
    found = features.picture(large, everywhere(large))
    torch.testing.assert_close(found[:, ::2, ::2], expected)
    torch.testing.assert_close(found[:, 1::2, 1::2], expected)


def test_a_grid_that_was_enlarged_has_the_same_fpfh():
    item = scene(2)
    xyz = item.images["xyz"]
    large = replace(xyz, pixels=xyz.pixels.repeat_interleave(2, 1).repeat_interleave(2, 2))
    enlarged = Sample(item="large", images={"image": large})
    plain = without(item, "color")
    features = GeometryFeatures(grid=(8, 6)).fit(NormalData([enlarged]))
    expected = GeometryFeatures(grid=(8, 6)).fit(NormalData([plain]))
    torch.testing.assert_close(features.radius_, expected.radius_)
    torch.testing.assert_close(
        features(collate([enlarged])).features, expected(collate([plain])).features
    )


def test_the_cells_are_those_of_the_network_on_the_picture():
    item = scene(3)
    features = relief()
    found = features(collate([item]))
    silent = features(collate([without(item, "geometry")]))
    xyz = item.images["xyz"].pixels
    shown = Sample(
        item="shown", images={"image": color_image(features.picture(xyz, everywhere(xyz)))}
    )
    color = ColorFeatures(MeanColor(), layers=["0"], grid=(8, 6)).fit(NormalData([shown]))
    torch.testing.assert_close(found.features[0], color(collate([shown])).features[0])
    assert found.valid.all()
    assert not silent.valid.any()
    assert not silent.features.any()


def test_a_shallow_dent_is_found():
    """A cone 0.4 deep in a plane with noise of 0.02, one point each 1.0: a slope of 0.1."""
    plane = [xyz_image(100 + 0.02 * noise(32, 24, seed=i)) for i in range(16)]
    normal = [Sample(item=f"{i}", images={"image": one}, label=0) for i, one in enumerate(plane)]
    rows, columns = torch.meshgrid(torch.arange(32.0), torch.arange(24.0), indexing="ij")
    cone = (0.4 - 0.1 * torch.hypot(rows - 13.5, columns - 9.5)).clamp_min(0)
    last = plane[-1].pixels.clone()
    last[2] += cone
    dented = normal[-1].with_image(replace(plane[-1], pixels=last))
    geometry = ReliefFeatures(MeanColor(), layers=["0"], grid=(8, 6))
    detector = DoublePatchCore(color=None, geometry=geometry, coreset_ratio=1.0, sigma=1.0)
    detector.fit(NormalData(normal[:12]))
    found = detector.predict(collate([dented, *normal[12:15]]))
    assert found.score[0] > found.score[1:].max() + 5  # in units of the spread of normal scores
    row, column = peak(found.maps["image"][0])
    assert cone[4 * row : 4 * row + 4, 4 * column : 4 * column + 4].any()


@pytest.mark.parametrize("count", [1, 2])
def test_an_item_of_one_or_two_points_is_flat(count):
    valid = torch.zeros(32, 24, dtype=torch.bool)
    valid[3, 4 : 4 + count] = True
    found = relief()(collate([scene(1, xyz_valid=valid)]))
    assert found.features.isfinite().all()
    assert found.valid.sum() == 1


def test_a_model_folder_gives_it_back(tmp_path):
    geometry = relief(slope=0.3, num_neighbors=12)
    detector = DoublePatchCore(color=None, geometry=geometry, coreset_ratio=1.0, sigma=1.0)
    detector.fit(NormalData([scene(seed) for seed in range(6)]))
    again = reloaded(detector, tmp_path / "model", (32, 24))
    told = again.geometry
    assert (told.slope, told.num_neighbors, told.layers, told.grid) == (0.3, 12, ["0"], [8, 6])
    assert told.height_.equal(geometry.height_)
    batch = collate([scene(9)])
    assert again.predict(batch).score.equal(detector.predict(batch).score)


def test_errors_say_what_to_do():
    with pytest.raises(ValueError, match="slope must be positive"):
        relief(slope=0.0)
    with pytest.raises(ValueError, match="at least 3 points"):
        relief(num_neighbors=2)
    with pytest.raises(ValueError, match="organized points"):
        ReliefFeatures(MeanColor(), layers=["0"], grid=(8, 6)).fit(
            NormalData([without(scene(0), "geometry")])
        )
    with pytest.raises(RuntimeError, match="call fit first"):
        ReliefFeatures(MeanColor(), layers=["0"], grid=(8, 6))(collate([scene(0)]))
