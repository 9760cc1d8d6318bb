"""Normals of surfaces whose normals are known: a plane seen obliquely, and a sphere."""

import dataclasses

import pytest
import torch

from medssl.data.image import Image, pixel_affine
from medssl.data.modality import Modality
from medssl.data.normals import normals


def rays(size: int = 41, angle: float = 0.2) -> torch.Tensor:
    """(3, H, W): directions of a pinhole camera, z = 1."""
    slope = torch.linspace(-angle, angle, size, dtype=torch.float64)
    y, x = torch.meshgrid(slope, slope[: size - 4], indexing="ij")
    return torch.stack([x, y, torch.ones_like(x)])


def cloud(points: torch.Tensor, valid: torch.Tensor | None = None) -> Image:
    return Image(
        pixels=points.float(),
        axes="HW",
        modality=Modality.DEPTH,
        affine=pixel_affine(),
        frame="sensor",
        valid=valid,
        channels=("x", "y", "z"),
        units="m",
    )


def plane() -> Image:
    """z = 0.5 + 0.3 x - 0.7 y, where each ray meets it."""
    ray = rays()
    return cloud(ray * 0.5 / (ray[2] - 0.3 * ray[0] + 0.7 * ray[1]))


def inner(values: torch.Tensor) -> torch.Tensor:
    return values[..., 1:-1, 1:-1]


def test_a_plane_has_one_normal_towards_the_sensor():
    found = normals(plane())
    expected = torch.tensor([0.3, -0.7, -1.0]) / (1 + 0.3**2 + 0.7**2) ** 0.5
    off = inner(found.pixels) - expected[:, None, None]
    assert off.abs().max() < 1e-4
    assert inner(found.valid).all()
    assert int(found.valid.sum()) == inner(found.valid).numel()
    assert found.pixels[:, ~found.valid].isnan().all()


@pytest.mark.parametrize("mirrored", [False, True])
def test_the_normals_of_a_sphere_point_away_from_its_centre(mirrored):
    ray, centre, radius = rays(), torch.tensor([0.0, 0.0, 4.0]).double(), 1.5
    along = ray[2] * 4.0
    square = ray.square().sum(0)
    distance = (along - (along**2 - square * (16 - radius**2)).sqrt()) / square
    points = ray * distance
    expected = (points - centre[:, None, None]) / radius
    if mirrored:  # a camera whose columns run the other way
        points, expected = points.flip(-1), expected.flip(-1)
    found = normals(cloud(points))
    torch.testing.assert_close(inner(found.pixels), inner(expected).float(), atol=2e-3, rtol=0)
    torch.testing.assert_close(inner(found.pixels).norm(dim=0), torch.ones(39, 35))


def test_a_missing_pixel_takes_its_four_neighbors_with_it():
    full = plane()
    valid = torch.ones(full.spatial_shape, dtype=torch.bool)
    valid[10, 20] = False
    points = full.pixels.clone()
    points[:, 10, 20] = 0  # what a camera writes where it measured nothing
    found = normals(dataclasses.replace(full, pixels=points, valid=valid))
    lost = inner(~found.valid).nonzero() + 1
    assert lost.tolist() == [[9, 20], [10, 19], [10, 20], [10, 21], [11, 20]]
    kept = found.valid
    torch.testing.assert_close(found.pixels[:, kept], normals(full).pixels[:, kept])


def test_points_that_coincide_have_no_normal():
    assert not normals(cloud(torch.ones(3, 5, 5))).valid.any()


@pytest.mark.parametrize(
    "wrong", [{"channels": ()}, {"frame": "pixel"}, {"pixels": torch.ones(3, 2, 9)}]
)
def test_anything_but_xyz_of_a_sensor_is_refused(wrong):
    with pytest.raises(ValueError, match="in the sensor frame, got"):
        normals(dataclasses.replace(plane(), **wrong))
