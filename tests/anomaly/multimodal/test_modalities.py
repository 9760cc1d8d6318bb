from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rgbd_scenes import Heights, MeanColor, color_image, noise, peak, scene, without, xyz_image

from anomaly.base import NormalData
from anomaly.multimodal.modalities import (
    ColorFeatures,
    GeometryFeatures,
    cell_maps,
    has_color,
    has_geometry,
    same_grid,
    valid_pixels,
)
from medssl.data.geometry_steps import Geometry
from medssl.data.preprocess import Preprocessing
from medssl.data.sample import Sample, collate
from medssl.models.encoder import Encoder
from medssl.models.folder import describe, save_model, selftest_noise
from medssl.models.fpfh import fpfh
from medssl.models.point_transformer import PointTransformer
from medssl.models.points import estimate_normals
from medssl.models.timm_encoder import TimmEncoder


def colors(**arguments: object) -> ColorFeatures:
    made = ColorFeatures(MeanColor(), **({"layers": ["0"], "grid": (8, 6)} | arguments))
    return made.fit(NormalData([scene(0)]))


def heights(grid: tuple[int, int] = (8, 6), **arguments: object) -> GeometryFeatures:
    made = GeometryFeatures(grid=grid, descriptor=Heights(), **arguments)
    return made.fit(NormalData([scene(0)]))


def test_color_is_a_picture_and_geometry_is_xyz_beside_it_or_in_its_place():
    both = collate([scene(0)])
    picture, xyz = (collate([without(scene(0), name)]) for name in ("geometry", "color"))
    assert [has_color(batch).item() for batch in (both, picture, xyz)] == [True, True, False]
    assert [has_geometry(batch).item() for batch in (both, picture, xyz)] == [True, False, True]


def test_depth_of_one_channel_is_neither():
    depth = scene(0).images["xyz"]
    batch = collate(
        [Sample(item="depth", images={"image": replace(depth, pixels=depth.pixels[2:])})]
    )
    assert not has_color(batch).any()
    assert not has_geometry(batch).any()


def test_items_of_one_batch_may_have_different_modalities():
    batch = collate([without(scene(0), "geometry"), without(scene(1), "color")])
    assert has_color(batch).tolist() == [True, False]
    assert has_geometry(batch).tolist() == [False, True]
    color, geometry = colors()(batch), heights()(batch)
    assert color.valid.flatten(1).any(1).tolist() == [True, False]
    assert geometry.valid.flatten(1).any(1).tolist() == [False, True]
    assert not color.features[1].any()
    assert not geometry.features[0].any()


@pytest.mark.parametrize("first", [False, True])
def test_color_features_are_laid_in_the_middle_of_their_cells(first):
    """On a ramp the value in the middle of a cell is known, also of units that look at a corner."""
    rows, columns = torch.meshgrid(torch.arange(48.0), torch.arange(40.0), indexing="ij")
    ramp = Sample(item="ramp", images={"image": color_image(torch.stack([rows, columns, rows]))})
    features = ColorFeatures(MeanColor(first=first), layers=["0"], grid=(12, 10))
    grid = features.fit(NormalData([ramp]))(collate([ramp]))
    middle_rows, middle_columns = 4 * torch.arange(12.0) + 1.5, 4 * torch.arange(10.0) + 1.5
    inner = (slice(2, -2), slice(2, -2))  # the means of 3 x 3 units end at zeros
    torch.testing.assert_close(
        grid.features[0, *inner, 0], middle_rows[2:-2, None].expand(8, 6), atol=0.02, rtol=0
    )
    torch.testing.assert_close(
        grid.features[0, *inner, 1], middle_columns[2:-2].expand(8, 6), atol=0.02, rtol=0
    )


@pytest.mark.parametrize(("size", "grid"), [((32, 24), (8, 6)), ((9, 7), (4, 3)), ((3, 5), (4, 6))])
def test_a_cell_of_geometry_is_the_mean_of_the_valid_points_in_it(size, grid):
    valid = noise(*size, seed=3) > -0.5
    item = Sample(
        item="one",
        images={"image": color_image(noise(3, *size)), "xyz": xyz_image(noise(*size) + 9, valid)},
    )
    found = heights(grid)(collate([item]))
    total = torch.zeros(*grid, 3, dtype=torch.float64)
    count = torch.zeros(*grid)
    for row in range(size[0]):
        for column in range(size[1]):
            if valid[row, column]:
                cell = int((row + 0.5) / size[0] * grid[0]), int((column + 0.5) / size[1] * grid[1])
                total[cell] += item.images["xyz"].pixels[:, row, column]
                count[cell] += 1
    assert found.valid[0].equal(count > 0)
    expected = total / count.clamp_min(1)[..., None]
    torch.testing.assert_close(found.features[0].double(), expected)


def test_the_features_of_geometry_are_fpfh_of_all_valid_points():
    item = scene(0)
    features = GeometryFeatures(grid=(8, 6), radius=2.5).fit(NormalData([item]))
    found = features(collate([item])).features[0]
    points = item.images["xyz"].pixels.flatten(1).T[None]
    normals = estimate_normals(points)
    normals = torch.where(normals[..., 2:] > 0, -normals, normals)  # the sensor is at z = 0
    described = fpfh(points, normals, radius=2.5)[0].reshape(8, 4, 6, 4, 33)
    torch.testing.assert_close(found, described.mean((1, 3)))


def test_normals_are_turned_towards_the_sensor():
    features = heights()
    features(collate([scene(0)]))
    (points,), (normals,) = features.descriptor.shown, features.descriptor.normals
    assert ((points * normals).sum(1) < 0).all()
    torch.testing.assert_close(normals.norm(dim=1), torch.ones(len(normals)))


@pytest.mark.parametrize("pitch", [1.0, 0.002])
def test_the_radius_is_five_spacings_of_the_normal_points_in_their_unit(pitch):
    flat = Sample(
        item="flat",
        images={
            "image": color_image(noise(3, 8, 8)),
            "xyz": xyz_image(torch.ones(8, 8), pitch=pitch),
        },
    )
    features = GeometryFeatures(grid=(2, 2)).fit(NormalData([flat]))
    torch.testing.assert_close(features.radius_, torch.tensor([5 * pitch]))


def test_a_radius_that_is_given_is_kept():
    assert GeometryFeatures(grid=(2, 2), radius=0.3).fit(NormalData([scene(0)])).radius_ == 0.3


def test_of_many_points_an_even_choice_is_described():
    valid = torch.ones(32, 24, dtype=torch.bool)
    valid[4:8] = False
    valid[7, 23] = True  # the only one of its cell, and not the first of its square
    item = scene(0, xyz_valid=valid)
    features = heights(max_points=32 * 24 // 16)
    found = features(collate([item]))
    (points,) = features.descriptor.shown
    expected = valid.clone()
    expected[1::4] = expected[2::4] = expected[3::4] = False
    expected[:, 1::4] = expected[:, 2::4] = expected[:, 3::4] = False
    expected[7, 23] = True
    wanted = item.images["xyz"].pixels[:, expected].T
    assert sorted(points.tolist()) == sorted(wanted.tolist())
    assert found.valid[0, 1].tolist() == [False] * 5 + [True]


def test_the_radius_grows_with_the_distance_of_the_chosen_points():
    features = GeometryFeatures(grid=(8, 6), max_points=32 * 24 // 16)
    assert features.fit(NormalData([scene(0)])).radius_.item() == pytest.approx(5 * 4, rel=0.01)


@pytest.mark.parametrize("rubbish", [torch.nan, 1e9])
def test_invalid_pixels_change_no_feature(rubbish):
    valid = torch.ones(32, 24, dtype=torch.bool)
    valid[:10, :7] = False
    item = scene(0, color_valid=valid, xyz_valid=valid)
    spoilt = item
    for role, image in item.images.items():
        pixels = torch.where(valid, image.pixels, rubbish)
        spoilt = spoilt.with_image(replace(image, pixels=pixels), role)
    geometry = GeometryFeatures(grid=(8, 6)).fit(NormalData([item]))
    for features in (colors(), geometry):
        clean, found = features(collate([item])), features(collate([spoilt]))
        assert found.features.equal(clean.features)
        assert found.valid.equal(clean.valid)
        assert not found.features[~found.valid].any()
        assert (~found.valid).any()


def test_padding_to_a_larger_item_changes_no_feature():
    small, large = scene(0), scene(1, size=(40, 36))
    geometry = GeometryFeatures(grid=(8, 6)).fit(NormalData([small]))
    for features in (colors(), geometry):
        alone, beside = features(collate([small])), features(collate([small, large]))
        torch.testing.assert_close(beside.features[0], alone.features[0])
        assert beside.valid[0].equal(alone.valid[0])


def test_picture_and_xyz_on_different_grids_are_refused():
    item = scene(0)
    batch = collate([item.with_image(scene(0, size=(16, 12)).images["xyz"], "xyz")])
    with pytest.raises(ValueError, match=r"must lie on one grid, got .*give geometry"):
        heights()(batch)


def test_a_valid_point_that_is_not_finite_is_refused():
    item = scene(0)
    item.images["xyz"].pixels[2, 3, 3] = torch.nan
    features = GeometryFeatures(grid=(8, 6), radius=5.0).fit(NormalData([item]))
    with pytest.raises(ValueError, match="item scene0 has valid points that are NaN"):
        features(collate([scene(1), item]))


def test_normal_items_without_points_are_refused():
    normal = NormalData([without(scene(i), "geometry") for i in range(2)])
    with pytest.raises(ValueError, match="none of the 2 normal items has organized points"):
        GeometryFeatures(grid=(8, 6)).fit(normal)


@pytest.mark.parametrize(
    "features",
    [ColorFeatures(MeanColor(), layers=["0"], grid=(8, 6)), GeometryFeatures(grid=(8, 6))],
)
def test_features_before_fit_are_an_error_that_says_so(features):
    with pytest.raises(RuntimeError, match="not fitted .* call fit first"):
        features(collate([scene(0)]))


@pytest.mark.parametrize("cell", [(0, 0), (2, 5), (7, 1)])
def test_a_cell_lies_at_its_place_on_the_pixels_of_its_own_item(cell):
    batch = collate([scene(0), scene(1, size=(40, 36))])
    cells = torch.zeros(2, 8, 6)
    cells[0, *cell] = 1
    valid = valid_pixels(batch, "color")
    maps = cell_maps(cells, batch, valid, sigma=1.0)
    assert peak(maps[0]) == cell
    assert maps.isnan().equal(~valid)


def test_pixels_are_valid_by_modality():
    valid = torch.ones(32, 24, dtype=torch.bool)
    valid[:4] = False
    batch = collate([scene(0, xyz_valid=valid)])
    assert valid_pixels(batch, "color").all()
    assert valid_pixels(batch, "geometry")[0].equal(valid)
    assert not valid_pixels(collate([without(scene(0), "geometry")]), "geometry").any()


def test_grids_that_differ_are_refused():
    with pytest.raises(ValueError, match="must have one grid"):
        same_grid(colors(), heights((4, 6)))
    with pytest.raises(ValueError, match="at least one of them"):
        same_grid(None, None)


@pytest.mark.parametrize("arguments", [{"grid": (8,)}, {"grid": (0, 6)}])
def test_a_grid_is_two_positive_numbers(arguments):
    with pytest.raises(ValueError, match="grid is the two numbers"):
        GeometryFeatures(**arguments)


def saved(folder: Path, encoder: Encoder, noise: torch.Tensor) -> Path:
    return save_model(
        folder,
        encoder,
        kind="encoder",
        preprocessing=Preprocessing(size=(32, 32), intensity="range", geometry=Geometry()),
        domain={},
        card="",
        noise=selftest_noise(noise.shape),
    )


def test_the_folder_of_a_point_encoder_describes_as_the_encoder_itself(tmp_path):
    encoder, cloud = PointTransformer.example()
    folder = saved(tmp_path / "encoder", encoder.eval(), cloud)
    batch, normal = collate([scene(1)]), NormalData([scene(0)])
    given = GeometryFeatures(grid=(8, 6), descriptor=encoder).fit(normal)
    loaded = GeometryFeatures(grid=(8, 6), descriptor=folder).fit(normal)
    assert torch.equal(loaded(batch).features, given(batch).features)
    assert describe(loaded) == describe(given)
    assert not any(parameter.requires_grad for parameter in loaded.parameters())


def test_the_folder_of_a_picture_encoder_is_refused(tmp_path):
    encoder = TimmEncoder("test_resnet", in_channels=3).eval()
    folder = saved(tmp_path / "encoder", encoder, torch.randn(1, 3, 32, 32))
    with pytest.raises(ValueError, match="descriptor needs an encoder of points"):
        GeometryFeatures(grid=(8, 6), descriptor=folder)
