"""FPFH against a loop over pairs in float64, and against numbers that open3d gave."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from medssl.models import neighbors
from medssl.models.fpfh import fpfh
from medssl.models.points import estimate_normals


def bumpy_sphere(count: int, size: float = 1.0) -> tuple[Tensor, Tensor]:
    """A spiral of points (1, P, 3), without chance, and normals that are not quite its own."""
    row = torch.arange(count, dtype=torch.float64)
    height, around = 1 - (2 * row + 1) / count, row * math.pi * (3 - math.sqrt(5))
    ring = (1 - height.square()).sqrt()
    sphere = torch.stack([ring * around.cos(), ring * around.sin(), height], -1)
    bumps = 1 + 0.1 * torch.sin(5 * sphere[:, :1]) * torch.cos(7 * sphere[:, 1:2])
    normals = F.normalize(sphere + 0.3 * torch.sin(4 * sphere.roll(1, 1)), dim=-1)
    return (size * bumps * sphere).float()[None], normals.float()[None]


def rotation() -> Tensor:
    turn = torch.linalg.qr(torch.tensor([[2.0, 1, 0], [0, 1, 3], [1, 0, 1]], dtype=torch.float64)).Q
    return turn * torch.linalg.det(turn)


def pair_by_hand(place, normal, other_place, other_normal) -> tuple[float, float, float]:
    line = other_place - place
    distance = np.linalg.norm(line)
    if distance == 0:
        return 0.0, 0.0, 0.0
    line = line / distance
    if abs(normal @ line) < abs(other_normal @ line):
        line, normal, other_normal = -line, other_normal, normal
    v = np.cross(line, normal)
    if np.linalg.norm(v) == 0:
        return 0.0, 0.0, 0.0
    v /= np.linalg.norm(v)
    w = np.cross(normal, v)
    return math.atan2(w @ other_normal, normal @ other_normal), v @ other_normal, normal @ line


def by_hand(points: Tensor, normals: Tensor, radius: float, max_neighbors: int) -> np.ndarray:
    cloud, axes = points.double().numpy(), normals.double().numpy()
    lowest, highest = (-math.pi, -1, -1), (math.pi, 1, 1)
    simple, around = np.zeros((len(cloud), 33)), []
    for row, place in enumerate(cloud):
        gap = np.linalg.norm(cloud - place, axis=1)
        order = np.lexsort((np.arange(len(gap)), gap))[:max_neighbors]
        near = [which for which in order if gap[which] < radius and which != row]
        around.append([(which, gap[which]) for which in near])
        for which in near:
            angles = pair_by_hand(place, axes[row], cloud[which], axes[which])
            for angle, value in enumerate(angles):
                share = (value - lowest[angle]) / (highest[angle] - lowest[angle])
                simple[row, 11 * angle + min(10, max(0, int(11 * share)))] += 100 / len(near)
    described = simple.copy()
    for row, near in enumerate(around):
        mean = sum((simple[which] / gap**2 for which, gap in near if gap > 0), np.zeros(33))
        for angle in range(3):
            part = slice(11 * angle, 11 * angle + 11)
            if mean[part].sum() > 0:
                described[row, part] += 100 * mean[part] / mean[part].sum()
    return described


@pytest.mark.parametrize(("radius", "most"), [(0.5, 100), (0.8, 12), (0.16, 100)])
def test_histograms_are_those_of_a_loop_over_pairs(radius, most):
    points, normals = bumpy_sphere(250)
    found = fpfh(points, normals, radius=radius, max_neighbors=most)[0]
    expected = by_hand(points[0], normals[0], radius, most)
    np.testing.assert_allclose(found.numpy(), expected, atol=1e-4)


GOLDEN = {
    0: [
        0.0,
        0.0,
        0.0,
        0.0,
        0.0,
        60.40795,
        129.34433,
        10.24772,
        0.0,
        0.0,
        0.0,
        0.0,
        0.0,
        4.35147,
        39.7428,
        65.75111,
        66.72124,
        20.52316,
        2.91021,
        0.0,
        0.0,
        0.0,
        0.27254,
        15.66375,
        53.44702,
        69.31659,
        54.38502,
        6.91507,
        0.0,
        0.0,
        0.0,
        0.0,
        0.0,
    ],
    77: [
        0.0,
        0.0,
        0.0,
        0.0,
        0.0,
        52.47418,
        144.85829,
        2.66752,
        0.0,
        0.0,
        0.0,
        0.0,
        0.0,
        13.20715,
        25.09095,
        39.18752,
        53.50647,
        49.80425,
        16.7055,
        2.49818,
        0.0,
        0.0,
        0.0,
        17.15921,
        74.70066,
        72.85132,
        35.01663,
        0.27217,
        0.0,
        0.0,
        0.0,
        0.0,
        0.0,
    ],
    150: [
        0.0,
        0.0,
        0.0,
        0.0,
        0.0,
        66.43962,
        130.58243,
        2.97795,
        0.0,
        0.0,
        0.0,
        0.0,
        0.0,
        5.12188,
        27.36685,
        46.73522,
        63.0813,
        29.23395,
        20.14633,
        8.31448,
        0.0,
        0.0,
        0.0,
        19.48251,
        49.519,
        87.97579,
        42.64589,
        0.37682,
        0.0,
        0.0,
        0.0,
        0.0,
        0.0,
    ],
}


@pytest.mark.parametrize("row", sorted(GOLDEN))
def test_histograms_are_those_that_open3d_gave(row):
    """open3d 0.20.0, compute_fpfh_feature, KDTreeSearchParamHybrid(radius=0.6, max_nn=30)."""
    points, normals = bumpy_sphere(200)
    found = fpfh(points, normals, radius=0.6, max_neighbors=30)[0, row]
    assert found.tolist() == pytest.approx(GOLDEN[row], abs=1e-4)


def test_open3d_gives_the_same_for_a_whole_cloud():
    o3d = pytest.importorskip("open3d")
    points, _ = bumpy_sphere(3000)
    normals = estimate_normals(points)
    cloud = o3d.geometry.PointCloud(o3d.utility.Vector3dVector(points[0].double().numpy()))
    cloud.estimate_normals(o3d.geometry.KDTreeSearchParamKNN(30))
    cosine = (np.asarray(cloud.normals) * normals[0].double().numpy()).sum(1)
    np.testing.assert_allclose(np.abs(cosine), 1, atol=1e-6)
    cloud.normals = o3d.utility.Vector3dVector(normals[0].double().numpy())
    search = o3d.geometry.KDTreeSearchParamHybrid(0.2, 100)
    expected = np.asarray(o3d.pipelines.registration.compute_fpfh_feature(cloud, search).data).T
    np.testing.assert_allclose(fpfh(points, normals, radius=0.2)[0].numpy(), expected, atol=1e-3)


def test_a_turned_and_moved_cloud_has_the_same_histograms():
    points, _ = bumpy_sphere(600)
    moved = (points.double() @ rotation().T + torch.tensor([0.3, -2.0, 1.0])).float()
    first = fpfh(points, estimate_normals(points), radius=0.4)
    second = fpfh(moved, estimate_normals(moved), radius=0.4)
    relative = (first - second).norm(dim=-1) / first.norm(dim=-1)
    assert relative.max() < 1e-3


def test_a_cloud_far_from_the_origin_keeps_its_histograms():
    points, normals = bumpy_sphere(300)
    points = (points * 2**12).round() / 2**12
    there = points.double() + torch.tensor([5e5, 5e6, 100.0])
    assert torch.equal(
        fpfh(there, normals.double(), radius=0.5).float(), fpfh(points, normals, radius=0.5)
    )


def test_another_unit_of_length_changes_nothing():
    points, normals = bumpy_sphere(200)
    small = fpfh(points * 2**-40, normals, radius=0.5 * 2**-40)
    assert torch.equal(small, fpfh(points, normals, radius=0.5))


def test_the_length_of_a_normal_changes_nothing():
    points, normals = bumpy_sphere(200)
    assert torch.equal(fpfh(points, 4 * normals, radius=0.5), fpfh(points, normals, radius=0.5))


def test_a_tree_and_blocks_of_pairs_lead_to_the_same(monkeypatch):
    points, normals = bumpy_sphere(400)
    whole = fpfh(points, normals, radius=0.4)
    monkeypatch.setattr(neighbors, "_SMALL", 2**40)
    monkeypatch.setattr("medssl.models.fpfh._PAIRS", 700)
    assert torch.equal(fpfh(points, normals, radius=0.4), whole)


def test_every_angle_of_a_point_with_neighbours_adds_up_to_200():
    points, normals = bumpy_sphere(300)
    total = fpfh(points, normals, radius=0.5).view(-1, 3, 11).sum(-1)
    torch.testing.assert_close(total, torch.full_like(total, 200))


def test_a_plane_has_all_its_angles_in_the_middle():
    points = torch.cartesian_prod(torch.arange(12.0), torch.arange(9.0), torch.zeros(1))[None]
    found = fpfh(points, estimate_normals(points), radius=2.1)[0].view(-1, 3, 11)
    assert torch.equal(found, torch.zeros_like(found).index_fill(2, torch.tensor([5]), 200.0))


def test_lines_along_the_normal_count_as_angles_of_0_however_turned():
    column = torch.stack([torch.zeros(6), torch.zeros(6), torch.arange(6.0)], -1).double()
    up = torch.tensor([0.0, 0, 1]).double().expand(6, 3)
    for turn in (torch.eye(3).double(), rotation()):
        cloud, normals = (column @ turn.T).float()[None], (up @ turn.T).float()[None]
        found = fpfh(cloud, normals, radius=10.0)[0].view(-1, 3, 11)
        torch.testing.assert_close(found[..., 5], torch.full((6, 3), 200.0))
    np.testing.assert_allclose(by_hand(column, up, 10.0, 100)[:, 5::11], 200)


def test_a_line_without_normals_has_all_its_angles_in_the_middle():
    line = torch.linspace(0, 1, 30)[:, None] * torch.tensor([1.0, 2.0, 3.0])
    found = fpfh(line[None], estimate_normals(line[None]), radius=0.5)[0].view(-1, 3, 11)
    torch.testing.assert_close(found[..., 5], torch.full((30, 3), 200.0))


def test_duplicates_are_pairs_of_angles_0_without_a_say_in_the_mean():
    points, normals = bumpy_sphere(120)
    points = torch.cat([points, points[:, :40]], 1)
    normals = torch.cat([normals, -normals[:, :40]], 1)
    found = fpfh(points, normals, radius=0.6, max_neighbors=50)[0]
    np.testing.assert_allclose(found.numpy(), by_hand(points[0], normals[0], 0.6, 50), atol=1e-4)


def test_points_that_are_all_one_have_their_own_half_only():
    points, normals = torch.full((1, 7, 3), 0.3), bumpy_sphere(7)[1]
    found = fpfh(points, normals, radius=1.0, max_neighbors=4)[0].view(-1, 3, 11)
    torch.testing.assert_close(found[..., 5], torch.full((7, 3), 100.0))
    torch.testing.assert_close(found.sum(-1), torch.full((7, 3), 100.0))


def test_a_point_without_neighbours_has_no_histogram():
    points, normals = torch.tensor([[[0.0, 0, 0], [1, 0, 0], [9, 0, 0]]]), bumpy_sphere(3)[1]
    found = fpfh(points, normals, radius=2.0)[0]
    assert not found[2].any()
    assert found[:2].sum().item() == pytest.approx(2 * 600)
    assert not fpfh(points[:, :1], normals[:, :1], radius=2.0).any()


def test_invalid_points_have_no_histogram_and_change_none():
    points, normals = (torch.cat([part, part.flip(1)]) for part in bumpy_sphere(150))
    valid = (torch.arange(150) % 7 != 3).expand(2, 150).contiguous()
    valid[1, :20] = False
    hidden = ~valid[..., None]
    found = fpfh(
        points.masked_fill(hidden, torch.nan),
        normals.masked_fill(hidden, torch.nan),
        radius=0.6,
        valid=valid,
    )
    assert found[~valid].isnan().all()
    for item, kept in enumerate(valid):
        alone = fpfh(points[item, kept][None], normals[item, kept][None], radius=0.6)[0]
        assert torch.equal(found[item, kept], alone)
    assert fpfh(points, normals, radius=0.6, valid=torch.zeros_like(valid)).isnan().all()


def test_an_empty_cloud_has_no_histograms():
    nothing = torch.empty(2, 0, 3)
    assert fpfh(nothing, nothing, radius=1.0).shape == (2, 0, 33)


def test_arguments_that_cannot_be_meant_are_refused():
    points, normals = bumpy_sphere(10)
    with pytest.raises(ValueError, match="one normal per point"):
        fpfh(points, normals[:, :9], radius=1.0)
    with pytest.raises(ValueError, match="normals of valid points must be finite"):
        fpfh(points, normals * torch.nan, radius=1.0)
    with pytest.raises(ValueError, match="not finite; leave them out with valid"):
        fpfh(points * torch.nan, normals, radius=1.0)
    for radius, most in ((0.0, 100), (math.nan, 100), (1.0, 1)):
        with pytest.raises(ValueError, match="radius must be positive and max_neighbors"):
            fpfh(points, normals, radius=radius, max_neighbors=most)
