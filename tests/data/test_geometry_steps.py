from dataclasses import replace

import pytest
import torch

from medssl.data.geometry_steps import Geometry
from medssl.data.image import Image, PointCloud, pixel_affine
from medssl.data.modality import Modality
from medssl.data.preprocess import Preprocessing
from medssl.data.sample import Sample


def scene(unit: str = "mm", scale: float = 1.0) -> Image:
    """A box of 20 mm on a tilted table 500 mm away, a crumb beside it, and missing pixels."""
    rows, columns = torch.meshgrid(torch.arange(60.0), torch.arange(80.0), indexing="ij")
    z = 500 + 0.1 * columns
    z[20:40, 30:60] -= 20
    z[5:7, 5:7] -= 10
    z += 0.05 * torch.randn(60, 80, generator=torch.Generator().manual_seed(0))
    valid = torch.ones(60, 80, dtype=torch.bool)
    valid[25:28, 40:44] = False  # on the box
    valid[50:53, 40:44] = False  # on the table
    pixels = torch.where(valid, torch.stack([columns, rows, z]), 0.0)
    return Image(
        pixels=pixels * scale,
        axes="HW",
        modality=Modality.DEPTH,
        affine=pixel_affine(),
        frame="sensor",
        valid=valid,
        channels=("x", "y", "z"),
        units=unit,
    )


def box(image: Image) -> torch.Tensor:
    expected = torch.zeros(60, 80, dtype=torch.bool)
    expected[20:40, 30:60] = True
    assert image.valid is not None
    return expected & image.valid


STEPS = Geometry(plane_distance=0.5, cluster_distance=3.0)


def test_the_box_alone_stays_on_the_grid():
    seen = STEPS.of_image(scene(), None)
    assert seen.valid is not None
    assert seen.valid.equal(box(scene()))
    assert seen.pixels[:, seen.valid].equal(scene().pixels[:, seen.valid])


def test_without_clusters_the_crumb_stays_too():
    seen = Geometry(plane_distance=0.5).of_image(scene(), None)
    assert seen.valid is not None
    assert int(seen.valid.sum()) == int(box(scene()).sum()) + 4


def test_the_plane_is_on_record():
    plane = STEPS.of_image(scene(), None).provenance["geometry"]["plane"]
    tilt = torch.tensor([-0.1, 0.0, 1.0]).double() / 1.01**0.5
    normal = torch.tensor(plane["normal"], dtype=torch.float64)
    torch.testing.assert_close(normal, tilt, atol=1e-3, rtol=0)


def test_a_free_cloud_keeps_its_points_and_their_order():
    image = scene()
    assert image.valid is not None
    points = image.pixels.flatten(1).T[image.valid.flatten()]
    cloud = PointCloud(points=points, unit="mm")
    seen = STEPS.of_cloud(cloud)
    assert seen.points.equal(points)
    assert seen.looked_at.equal(box(image).flatten()[image.valid.flatten()])


def test_metres_become_millimetres_and_the_factor_is_on_record():
    steps = replace(STEPS, unit="mm")
    seen = steps.of_image(scene("m", 1e-3), None)
    torch.testing.assert_close(seen.pixels, steps.of_image(scene(), None).pixels)
    assert seen.units == "mm"
    assert seen.provenance["geometry"]["factor"] == pytest.approx(1000)
    cloud = PointCloud(points=torch.ones(4, 3), unit="m")
    assert Geometry(unit="mm").of_cloud(cloud).points.equal(torch.full((4, 3), 1000.0))


def test_an_unknown_unit_is_refused_where_one_is_asked_for():
    with pytest.raises(ValueError, match="unit of the points is 'unknown'"):
        Geometry(unit="mm").of_cloud(PointCloud(points=torch.ones(4, 3), unit="unknown"))


def test_a_smaller_grid_takes_measurements_and_no_means():
    seen = Geometry().of_image(scene(), (30, 40))
    every = {tuple(point) for point in scene().pixels.flatten(1).T.tolist()}
    assert seen.valid is not None
    assert {tuple(p) for p in seen.pixels[:, seen.valid].T.tolist()} <= every
    assert seen.spatial_shape == (30, 40)


def test_nothing_left_is_an_error():
    flat = scene()
    flat.pixels[2] = 500
    with pytest.raises(ValueError, match="no point is left"):
        Geometry(plane_distance=1.0).of_image(flat, None)


def rgbd() -> Sample:
    picture = Image(
        pixels=torch.full((3, 60, 80), 128.0),
        axes="HW",
        modality=Modality.PICTURE,
        affine=pixel_affine(),
        frame="pixel",
        value_range=(0.0, 255.0),
    )
    return Sample(item="a", images={"image": picture, "xyz": scene()})


def test_the_background_is_left_out_of_the_picture_too_and_holes_go_with_their_surroundings():
    steps = Preprocessing(size=(60, 80), intensity="range", geometry=STEPS)
    seen = steps.sample(rgbd()).images
    whole = torch.zeros(60, 80, dtype=torch.bool)
    whole[20:40, 30:60] = True
    assert seen["image"].valid is not None
    assert seen["xyz"].valid is not None
    assert seen["image"].valid.equal(whole)
    assert seen["xyz"].valid.equal(box(scene()))


def test_steps_come_back_from_their_plain_values():
    steps = Preprocessing(size=(60, 80), intensity="range", geometry=STEPS)
    assert Preprocessing.from_dict(steps.to_dict()) == steps


def test_a_preprocessing_of_clouds_takes_no_picture():
    with pytest.raises(ValueError, match="takes no picture; give its size"):
        Preprocessing(geometry=Geometry())(rgbd().images["image"])
    with pytest.raises(ValueError, match="size and intensity"):
        Preprocessing()
