"""Registration finds poses that the test chose itself."""

import pytest
import torch
from torch import Tensor

from medssl.data.synthetic.point_part import point_part
from medssl.models.points import estimate_normals
from medssl.models.registration import Rigid, even_rotations, evenly, middle_of, register

SHAPES = ("bottle", "bracket", "box")


def shape(name: str) -> Tensor:
    """(600, 3) float64 points, about 100 large, of a thing without symmetry."""
    if name == "box":
        generator = torch.Generator().manual_seed(1)
        places = torch.rand(600, 3, generator=generator, dtype=torch.float64)
        side = torch.randint(6, (600,), generator=generator)
        places[torch.arange(600), side // 2] = (side % 2).double()
        places[places[:, 0] > 0.8, 2] *= 0.5  # a step at one end
        places[(places[:, 1] > 0.6) & (places[:, 0] < 0.3), 2] += 0.3
        return places * torch.tensor([100.0, 60.0, 30.0], dtype=torch.float64)
    points = point_part(name, 0, count=600).points.points.double()
    if name == "bottle":  # round about its axis but for a handle
        points[points[:, 0] > points[:, 0].quantile(0.85), 0] += 15
    return points


def normals_of(points: Tensor) -> Tensor:
    return estimate_normals(points[None], count=12)[0]


def pose(seed: int, spread: float = 50.0) -> Rigid:
    """Any rotation, from a random unit quaternion, and a shift."""
    generator = torch.Generator().manual_seed(seed)
    w, x, y, z = torch.nn.functional.normalize(
        torch.randn(4, generator=generator, dtype=torch.float64), dim=0
    )
    cross = torch.stack(
        [
            torch.stack([torch.zeros_like(w), -z, y]),
            torch.stack([z, torch.zeros_like(w), -x]),
            torch.stack([-y, x, torch.zeros_like(w)]),
        ]
    )
    rotation = torch.eye(3, dtype=torch.float64) + 2 * (w * cross + cross @ cross)
    shift = spread * torch.randn(3, generator=generator, dtype=torch.float64)
    return Rigid(rotation, shift, 0.0)


def check_found(found: Rigid, points: Tensor, target: Tensor) -> None:
    """All of the points, of an extent of about 100, lie where they came from."""
    assert (found(points) - target).norm(dim=1).max() < 1e-4


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("seed", range(3))
def test_any_pose_is_found(name, seed):
    target = shape(name)
    moved = pose(seed)(target)
    found = register(moved, target, normals_of(target))
    check_found(found, moved, target)
    assert found.residual < 1e-4


@pytest.mark.parametrize("name", SHAPES)
def test_the_pose_is_found_where_a_part_of_the_points_is_displaced(name):
    target = shape(name)
    generator = torch.Generator().manual_seed(0)
    bent = target.clone()
    near = (target - target[7]).norm(dim=1).argsort()[:90]  # a dent, and scattered points
    bent[near] += 8 * normals_of(target)[near]
    away = torch.randperm(len(target), generator=generator)[:30]
    bent[away] += 10 * torch.randn(30, 3, generator=generator, dtype=torch.float64)
    truth = pose(5)
    found = register(truth(bent), target, normals_of(target))
    check_found(found, truth(target), target)


def ball(seed: int) -> Tensor:
    """(1500, 3) noisy points of a bumpy ball; a half turn about x leaves it all but as it was."""
    generator = torch.Generator().manual_seed(seed)
    way = torch.nn.functional.normalize(torch.randn(1500, 3, generator=generator), dim=1)
    radius = 50 + 10 * (6 * way[:, 0]).sin() * (4 * way[:, 1]).cos() + 5 * way[:, 2]
    return (way * radius[:, None] + 0.1 * torch.randn(1500, 3, generator=generator)).double()


@pytest.mark.parametrize("seed", [1, 2, 3, 52])
def test_the_pose_of_a_thing_that_is_nearly_symmetric_is_found(seed):
    """Other points of the same surface; half as many starts end far from the last of these."""
    target, moved = ball(0), pose(seed)
    found = register(moved(ball(seed)), target, normals_of(target))
    turn = found.rotation @ moved.rotation
    assert torch.rad2deg(((turn.trace() - 1) / 2).clamp(-1, 1).acos()) < 2


@pytest.mark.parametrize("name", SHAPES)
def test_half_of_the_points_are_enough(name):
    target = shape(name)
    truth = pose(6)
    half = torch.randperm(len(target), generator=torch.Generator().manual_seed(0))[::2]
    found = register(truth(target[half]), target, normals_of(target))
    check_found(found, truth(target), target)


def test_the_unit_of_the_points_does_not_change_the_rotation():
    target = shape("bracket")
    moved = pose(2)(target)
    in_mm = register(moved, target, normals_of(target))
    in_m = register(moved / 1000, target / 1000, normals_of(target))
    torch.testing.assert_close(in_m.rotation, in_mm.rotation, rtol=0, atol=1e-6)
    torch.testing.assert_close(1000 * in_m.translation, in_mm.translation, rtol=0, atol=1e-3)


def test_the_rotation_is_one():
    target = shape("box")
    found = register(pose(1)(target)[::3], target, normals_of(target)).rotation
    torch.testing.assert_close(found @ found.T, torch.eye(3).double(), rtol=0, atol=1e-9)
    assert float(torch.linalg.det(found)) == pytest.approx(1)


def test_a_rigid_motion_is_applied_by_hand():
    quarter = torch.tensor([[0.0, -1, 0], [1, 0, 0], [0, 0, 1]], dtype=torch.float64)
    motion = Rigid(quarter, torch.tensor([10.0, 0, 0], dtype=torch.float64), 0.0)
    assert motion(torch.tensor([[1.0, 2.0, 3.0]])).tolist() == [[8.0, 1.0, 3.0]]


@pytest.mark.parametrize("count", [1, 2])
def test_too_few_points_on_either_side_are_refused(count):
    target = shape("box")
    normals = normals_of(target)
    with pytest.raises(ValueError, match=f"at least 3 points on both sides, got {count}"):
        register(target[:count], target, normals)
    with pytest.raises(ValueError, match=f"at least 3 points .* and {count}"):
        register(target, target[:count], normals[:count])


@pytest.mark.parametrize("what", ["one place", "a line"])
def test_points_that_leave_the_pose_open_still_give_a_rigid_motion(what):
    points = torch.zeros(20, 3, dtype=torch.float64)
    if what == "a line":
        points[:, 0] = torch.arange(20)
    target = shape("box")
    for source, onto in ((points, target), (target, points)):
        found = register(source, onto, normals_of(onto))
        torch.testing.assert_close(
            found.rotation @ found.rotation.T, torch.eye(3).double(), rtol=0, atol=1e-6
        )
        assert found.translation.isfinite().all()


def test_even_rotations_are_rotations_and_leave_no_pose_far_away():
    rotations = even_rotations(150)
    assert rotations.dtype == torch.float64
    eye = torch.eye(3).double().expand(150, 3, 3)
    torch.testing.assert_close(rotations @ rotations.mT, eye, rtol=0, atol=1e-12)
    torch.testing.assert_close(torch.linalg.det(rotations), torch.ones(150).double())

    def angles(one: Tensor, other: Tensor) -> Tensor:
        trace = torch.einsum("aij,bij->ab", one, other)
        return torch.rad2deg(((trace - 1) / 2).clamp(-1, 1).acos())

    apart = angles(rotations, rotations)
    apart.fill_diagonal_(torch.inf)
    nearest = apart.amin(1)
    # 150 caps of radius r degrees fill the group where 150 (2 r - sin 2 r) / 2 pi = 1, at r = 23
    assert nearest.min() > 15
    assert nearest.max() < 60
    anywhere = torch.stack([pose(seed).rotation for seed in range(500)])
    assert angles(anywhere, rotations).amin(1).max() < 60


def test_the_middle_is_the_geometric_median_and_few_far_points_hardly_move_it():
    points = torch.tensor([[-1.0, 0, 0], [1, 0, 0], [0, -1, 0], [0, 1, 0]], dtype=torch.float64)
    torch.testing.assert_close(middle_of(points), torch.zeros(3).double())
    cloud = shape("box")
    far = torch.cat([cloud, torch.full((12, 3), 1e4, dtype=torch.float64)])
    assert (far.mean(0) - cloud.mean(0)).norm() > 100
    assert (middle_of(far) - middle_of(cloud)).norm() < 3


def test_points_are_chosen_by_even_steps():
    points = torch.arange(30.0).reshape(10, 3)
    assert evenly(points, 4)[:, 0].tolist() == [0, 9, 18, 27]
    assert evenly(points, 10) is not points
    assert evenly(points, 99).equal(points)
