import math

import numpy as np
import pytest

from medssl.data.synthetic.canvas import Canvas, coordinates, ellipsoid_distance


def canvas(turn_deg: float = 0.0) -> Canvas:
    """An empty grid of 3 x 1.5 x 1 mm voxels around the head's origin, turned about x."""
    shape = (40, 80, 120)
    angle = math.radians(turn_deg)
    turn = np.array(
        [[1, 0, 0], [0, math.cos(angle), -math.sin(angle)], [0, math.sin(angle), math.cos(angle)]]
    )
    matrix = np.eye(4)
    matrix[:3, :3] = turn @ np.array([[0, 0, -1.0], [0, -1.5, 0], [3.0, 0, 0]])
    matrix[:3, 3] = -matrix[:3, :3] @ ((np.array(shape) - 1) / 2)
    return Canvas(np.zeros(shape), *coordinates(matrix, shape), matrix, (3.0, 1.5, 1.0))


def test_coordinates_are_the_affine_times_the_index():
    matrix = np.random.default_rng(0).normal(size=(4, 4))
    x, y, z = coordinates(matrix, (3, 4, 5))
    assert (matrix @ (2, 1, 4, 1))[:3] == pytest.approx([a[2, 1, 4] for a in (x, y, z)])


@pytest.mark.parametrize("turn_deg", [0, 25])
def test_a_painted_ellipsoid_holds_its_volume_and_value(turn_deg):
    grid = canvas(turn_deg)
    grid.paint_ellipsoid((5, -8, 3), (20, 14, 11), 50.0)
    volume_mm3 = grid.hu.sum() / 50 * 4.5  # partial volume counts by its share
    assert volume_mm3 == pytest.approx(4 / 3 * math.pi * 20 * 14 * 11, rel=0.02)
    assert grid.hu.max() == 50
    centre = [np.average(axis, weights=grid.hu) for axis in (grid.x, grid.y, grid.z)]
    assert centre == pytest.approx([5, -8, 3], abs=0.2)


def test_voxels_share_a_ball_only_within_half_a_voxel_of_its_surface():
    grid = canvas()
    grid.paint_ellipsoid((0, 0, 0), (15, 15, 15), 1.0)
    radius = np.sqrt(grid.x**2 + grid.y**2 + grid.z**2)
    half_span = (1.25 + np.abs(grid.z) / radius * (3 - 1.25)) / 2
    shared = (grid.hu > 0) & (grid.hu < 1)
    assert shared[np.abs(radius - 15) < 0.85 * half_span].all()
    assert not shared[np.abs(radius - 15) > 1.15 * half_span].any()


def test_what_lies_beyond_the_grid_is_not_painted():
    grid = canvas()
    grid.paint_ellipsoid((0, 0, 500), (10, 10, 10), 50.0)
    assert not grid.hu.any()


def test_the_distance_to_a_ball_is_exact_and_its_normal_points_outwards():
    offsets = tuple(np.array([value]) for value in (3.0, 0.0, 4.0))
    distance, upward = ellipsoid_distance(offsets, (7.0, 7.0, 7.0))
    assert distance[0] == pytest.approx(-2)
    assert upward[0] == pytest.approx(0.8)
