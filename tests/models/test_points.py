"""Operators on clouds, against loops over points in float64."""

import numpy as np
import pytest
import torch
from torch import Tensor

from medssl.models import neighbors
from medssl.models.points import (
    ball_query,
    estimate_normals,
    farthest_point_sampling,
    interpolate,
    nearest_points,
    point_spacing,
)


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def lattice(side: int) -> Tensor:
    """(1, side^3, 3): every point has many equally distant neighbours."""
    axis = torch.arange(side, dtype=torch.float32)
    return torch.cartesian_prod(axis, axis, axis)[None]


def nearest_by_hand(queries: Tensor, points: Tensor, count: int) -> tuple[Tensor, Tensor]:
    distances, indices = [], []
    for query in queries.double().numpy():
        gap = np.array([np.linalg.norm(query - point) for point in points.double().numpy()])
        order = np.lexsort((np.arange(len(gap)), gap))[:count]
        distances.append(gap[order])
        indices.append(order)
    return torch.from_numpy(np.array(distances)), torch.from_numpy(np.array(indices))


def farthest_by_hand(points: Tensor, count: int) -> list[int]:
    cloud = points.double().numpy()
    picks = [int(np.argmax(np.linalg.norm(cloud - cloud.mean(0), axis=1)))]
    while len(picks) < count:
        gap = [min(np.linalg.norm(point - cloud[pick]) for pick in picks) for point in cloud]
        for pick in picks:
            gap[pick] = -1
        picks.append(int(np.argmax(gap)))
    return picks


@pytest.fixture(params=["tree", "blocks"])
def route(request, monkeypatch):
    """Small clouds would all be searched in blocks."""
    monkeypatch.setattr(neighbors, "_SMALL", 0 if request.param == "tree" else 2**40)


# Farthest-point sampling


def test_each_pick_is_the_farthest_from_those_before():
    points = noise(2, 80, 3)
    picks = farthest_point_sampling(points, 20)
    assert picks.dtype == torch.int64
    assert picks.tolist() == [farthest_by_hand(cloud, 20) for cloud in points]


def test_corners_of_a_box_far_from_the_origin_are_picked_by_index():
    corners = lattice(2) * 3 + 4096.0
    assert farthest_point_sampling(corners, 3)[0].tolist() == [0, 7, 1]


def test_of_equally_far_points_the_lowest_index_is_picked():
    points = lattice(5)[:, :121]  # with a centroid that no float holds
    assert farthest_point_sampling(points, 60)[0].tolist() == farthest_by_hand(points[0], 60)


def test_invalid_points_are_not_picked_and_move_nothing():
    points = noise(2, 40, 3)
    valid = torch.arange(40).expand(2, 40) % 3 != torch.tensor([[0], [1]])
    spoilt = points.masked_fill(~valid[..., None], torch.nan)
    picks = farthest_point_sampling(spoilt, 10, valid=valid)
    for item in range(2):
        kept = valid[item].nonzero()[:, 0]
        assert picks[item].tolist() == kept[farthest_by_hand(points[item, kept], 10)].tolist()


def test_duplicates_are_picked_once_each_and_last():
    points = torch.tensor([[[0.0, 0, 0]] * 3 + [[1.0, 0, 0]] * 3])
    picks = farthest_point_sampling(points, 6)[0].tolist()
    assert picks == [0, 3, 1, 2, 4, 5]


def test_more_picks_than_points_are_refused():
    valid = torch.tensor([[True] * 5, [True] * 2 + [False] * 3])
    with pytest.raises(ValueError, match="2 valid points, fewer than count"):
        farthest_point_sampling(noise(2, 5, 3), 3, valid=valid)
    with pytest.raises(ValueError, match="0 valid points"):
        farthest_point_sampling(torch.empty(1, 0, 3), 1)


def test_a_single_point_is_picked():
    assert farthest_point_sampling(torch.ones(1, 1, 3), 1).tolist() == [[0]]


def test_sampling_leaves_the_number_of_threads_alone():
    before = torch.get_num_threads()
    farthest_point_sampling(noise(1, 9, 3), 3)
    assert torch.get_num_threads() == before


# Nearest points


@pytest.mark.parametrize("count", [1, 4, 30])
def test_nearest_points_are_those_of_a_loop(route, count):
    queries, points = noise(2, 13, 3), noise(2, 30, 3, seed=1)
    distance, index = nearest_points(queries, points, count)
    for item in range(2):
        expected = nearest_by_hand(queries[item], points[item], count)
        torch.testing.assert_close(distance[item].double(), expected[0], atol=1e-6, rtol=0)
        assert torch.equal(index[item], expected[1])


@pytest.mark.parametrize("count", [1, 5, 7, 20])
def test_of_equally_distant_points_the_lowest_index_comes_first(route, count):
    points = lattice(4)[:, torch.randperm(64, generator=torch.Generator().manual_seed(3))]
    index = nearest_points(points, points, count)[1][0]
    assert torch.equal(index, nearest_by_hand(points[0], points[0], count)[1])


def test_of_duplicates_the_lowest_index_comes_first(route):
    points = noise(1, 20, 3)[:, torch.arange(60) % 20]
    index = nearest_points(points, points, 2)[1][0]
    assert index.tolist() == [[row % 20, row % 20 + 20] for row in range(60)]


def test_a_tree_and_blocks_find_the_same_in_a_larger_cloud():
    points = (noise(3000, 3) * 20).round().double()  # with many ties and duplicates
    tree = neighbors.in_tree(points[:500], points, 12)
    blocks = neighbors.in_blocks(points[:500], points, 12)
    assert torch.equal(tree[1], blocks[1])
    torch.testing.assert_close(tree[0], blocks[0], atol=1e-12, rtol=0)


def test_blocks_are_put_together_in_order(monkeypatch):
    points = noise(50, 3).double()
    whole = neighbors.in_blocks(points, points, 3)[1]
    monkeypatch.setattr(neighbors, "_CELLS", 350)  # 7 queries at a time
    assert torch.equal(neighbors.in_blocks(points, points, 3)[1], whole)


def test_places_beyond_the_valid_points_are_infinitely_far(route):
    points, valid = noise(1, 5, 3), torch.tensor([[False, True, False, True, False]])
    points[0, 0] = torch.nan
    distance, index = nearest_points(noise(1, 6, 3, seed=1), points, 4, valid=valid)
    assert distance[..., :2].isfinite().all()
    assert distance[..., 2:].isinf().all()
    assert set(index.flatten().tolist()) == {1, 3}
    assert torch.equal(index[..., 2:], index[..., :1].expand(-1, -1, 2))


def test_coordinates_far_from_the_origin_keep_what_was_stored(route):
    near = (noise(1, 40, 3) * 8).round() / 4  # multiples of 1/4 are exact beside 2^21
    far = near + 2**21
    for here, there in zip(nearest_points(near, near, 6), nearest_points(far, far, 6), strict=True):
        assert torch.equal(here, there)


def test_distances_have_the_gradient_of_finite_differences():
    queries = noise(1, 4, 3).double().requires_grad_()
    points = noise(1, 9, 3, seed=1).double().requires_grad_()
    assert torch.autograd.gradcheck(lambda a, b: nearest_points(a, b, 3)[0], (queries, points))


def test_the_gradient_of_distance_0_is_0():
    points = noise(1, 5, 3).requires_grad_()
    nearest_points(points, points, 1)[0].sum().backward()
    assert torch.equal(points.grad, torch.zeros_like(points))


def test_nothing_to_search_is_an_error_and_nothing_to_ask_is_not():
    with pytest.raises(ValueError, match=r"items \[0\] have no valid point"):
        nearest_points(torch.zeros(1, 2, 3), torch.empty(1, 0, 3), 1)
    valid = torch.tensor([[True, True], [False, False]])
    with pytest.raises(ValueError, match=r"items \[1\] have no valid point"):
        nearest_points(noise(2, 2, 3), noise(2, 2, 3), 1, valid=valid)
    distance, index = nearest_points(torch.empty(1, 0, 3), torch.empty(1, 0, 3), 2)
    assert distance.shape == index.shape == (1, 0, 2)
    assert nearest_points(torch.empty(0, 4, 3), torch.empty(0, 5, 3), 2)[1].shape == (0, 4, 2)


@pytest.mark.parametrize(
    "call",
    [
        lambda points: farthest_point_sampling(points, 2),
        lambda points: nearest_points(torch.zeros(1, 1, 3), points, 2),
        lambda points: ball_query(torch.zeros(1, 1, 3), points, 1.0, 2),
        lambda points: interpolate(torch.zeros(1, 5, 1), points, torch.zeros(1, 1, 3)),
        estimate_normals,
    ],
)
def test_points_that_are_not_finite_are_refused_with_the_way_out(call):
    points = noise(1, 5, 3)
    points[0, 2, 1] = torch.nan
    with pytest.raises(ValueError, match="1 of 5 points are not finite; leave them out with valid"):
        call(points)


def test_arguments_that_cannot_be_meant_are_refused():
    points = noise(1, 5, 3)
    with pytest.raises(ValueError, match="add the batch axis"):
        farthest_point_sampling(points[0], 2)
    with pytest.raises(ValueError, match="valid must be bool"):
        farthest_point_sampling(points, 2, valid=torch.ones(1, 5))
    with pytest.raises(ValueError, match="count must be at least 1"):
        nearest_points(points, points, 0)
    with pytest.raises(ValueError, match="radius must be positive"):
        ball_query(points, points, 0.0, 1)
    with pytest.raises(ValueError, match="queries must be"):
        nearest_points(points[0], points, 1)
    with pytest.raises(ValueError, match="queries must be finite"):
        nearest_points(points * torch.nan, points, 1)
    with pytest.raises(ValueError, match="a row for each"):
        interpolate(torch.zeros(1, 4, 2), points, points)


# Ball query


def test_a_ball_holds_the_nearest_points_closer_than_its_radius(route):
    queries, points = noise(1, 20, 3), noise(1, 50, 3, seed=1)
    index, within = ball_query(queries, points, 1.0, 5)
    assert 0 < within.float().mean() < 1  # some balls are not full
    expected_distance, expected = nearest_by_hand(queries[0], points[0], 5)
    assert torch.equal(within[0], expected_distance < 1)
    assert torch.equal(index[within], expected[within[0]])


def test_places_that_a_ball_does_not_fill_repeat_its_nearest_point(route):
    points = torch.tensor([[[9.0, 0, 0], [0, 0, 0], [1, 0, 0], [5, 0, 0]]])
    valid = torch.tensor([[False, True, True, True]])
    queries = torch.tensor([[[0.9, 0, 0], [20, 0, 0]]])
    index, within = ball_query(queries, points, 2.0, 3, valid=valid)
    assert index[0].tolist() == [[2, 1, 2], [1, 1, 1]]  # 1 is the first valid point
    assert within[0].tolist() == [[True, True, False], [False] * 3]


def test_a_point_on_the_sphere_is_outside(route):
    points = lattice(3)
    within = ball_query(torch.ones(1, 1, 3), points, 1.0, 7)[1]
    assert within[0, 0].tolist() == [True] + [False] * 6


# Interpolation


def test_values_are_weighted_by_inverse_squared_distance(route):
    values, points, queries = noise(2, 30, 4, seed=2), noise(2, 30, 3), noise(2, 7, 3, seed=1)
    found = interpolate(values, points, queries, count=4)
    for item in range(2):
        distance, index = nearest_by_hand(queries[item], points[item], 4)
        weight = 1 / distance**2
        expected = (weight[..., None] * values[item].double()[index]).sum(1) / weight.sum(1)[
            :, None
        ]
        torch.testing.assert_close(found[item].double(), expected, atol=1e-5, rtol=0)


def test_a_query_on_a_point_gets_its_value_and_on_duplicates_their_mean():
    points = torch.tensor([[[0.0, 0, 0], [1, 0, 0], [1, 0, 0], [7, 0, 0]]])
    values = torch.tensor([[[1.0], [2.0], [4.0], [9.0]]])
    assert interpolate(values, points, points)[0, :, 0].tolist() == [1, 3, 3, 9]


def test_with_fewer_points_than_asked_for_those_there_are_count():
    points, values = torch.tensor([[[0.0, 0, 0], [3, 0, 0]]]), torch.tensor([[[0.0], [5.0]]])
    found = interpolate(values, points, torch.tensor([[[1.0, 0, 0]]]))
    assert found.item() == pytest.approx(5 * (1 / 4) / (1 + 1 / 4))


def test_invalid_points_lend_no_value():
    points, values = noise(1, 12, 3), noise(1, 12, 2, seed=1)
    valid = torch.arange(12)[None] % 4 != 1
    spoilt = values.masked_fill(~valid[..., None], torch.nan)
    queries = noise(1, 5, 3, seed=2)
    kept = valid[0]
    expected = interpolate(values[:, kept], points[:, kept], queries)
    assert torch.equal(interpolate(spoilt, points, queries, valid=valid), expected)


def test_a_tiny_cloud_has_the_weights_of_a_large_one():
    values, points, queries = noise(1, 9, 2, seed=2), noise(1, 9, 3), noise(1, 4, 3, seed=1)
    tiny = interpolate(values, points * 2**-60, queries * 2**-60)
    assert torch.equal(tiny, interpolate(values, points, queries))


def test_interpolation_has_the_gradient_of_finite_differences():
    inputs = [
        part.double().requires_grad_()
        for part in (noise(1, 9, 2, seed=2), noise(1, 9, 3), noise(1, 4, 3, seed=1))
    ]
    assert torch.autograd.gradcheck(interpolate, inputs)


def test_interpolation_at_the_points_has_a_finite_gradient():
    points = noise(1, 6, 3).requires_grad_()
    values = noise(1, 6, 2, seed=1).requires_grad_()
    interpolate(values, points, points).sum().backward()
    assert torch.equal(values.grad, torch.ones_like(values))
    assert points.grad.isfinite().all()


# Normals


def ellipsoid(count: int) -> Tensor:
    return torch.nn.functional.normalize(noise(1, count, 3), dim=-1) * torch.tensor([1.0, 2.0, 3.0])


def test_normals_are_the_last_axis_of_a_neighbourhood_turned_outwards():
    points = ellipsoid(300)
    normals = estimate_normals(points, count=12)[0].double().numpy()
    cloud = points[0].double().numpy()
    _, index = nearest_by_hand(points[0], points[0], 12)
    for row, near in enumerate(index.numpy()):
        axis = np.linalg.svd(cloud[near] - cloud[near].mean(0))[2][-1]
        axis = axis * np.sign(axis @ (cloud[row] - cloud.mean(0)))
        np.testing.assert_allclose(normals[row], axis, atol=1e-4)


def rotation() -> Tensor:
    turn = torch.linalg.qr(noise(3, 3, seed=7).double()).Q
    return turn * torch.linalg.det(turn)


def test_normals_turn_with_the_cloud():
    points = ellipsoid(200).double()
    turned = estimate_normals(points @ rotation().T + 1e6)
    expected = estimate_normals(points) @ rotation().T
    torch.testing.assert_close(turned, expected, atol=1e-6, rtol=0)


def test_a_plane_has_one_normal_on_all_its_points():
    flat = torch.cat([noise(1, 200, 2), torch.full((1, 200, 1), 5.0)], -1).double()
    for cloud in (flat, flat @ rotation().T):
        normals = estimate_normals(cloud)[0]
        torch.testing.assert_close(normals, normals[:1].expand(200, 3), atol=1e-6, rtol=0)
        assert normals[0].norm().item() == pytest.approx(1)
    assert estimate_normals(flat)[0, 0].abs().tolist() == pytest.approx([0, 0, 1], abs=1e-6)


def test_a_nearly_flat_part_has_its_normals_on_the_side_of_its_longer_tail():
    spread = torch.cat([noise(1, 400, 2), 1e-3 * noise(1, 400, 1, seed=1)], -1)
    spread[0, :5, 2] -= 0.2
    normals = estimate_normals(spread)[0, 5:]
    assert (normals[:, 2] < -0.9).float().mean() > 0.97


def test_points_on_a_line_have_the_zero_vector():
    line = torch.linspace(0, 1, 50)[:, None] * torch.tensor([1.0, 2.0, 3.0]) + 7
    assert torch.equal(estimate_normals(line[None]), torch.zeros(1, 50, 3))


@pytest.mark.parametrize("count", [1, 2, 40])
def test_duplicates_and_too_few_points_have_the_zero_vector(count):
    assert torch.equal(estimate_normals(torch.full((1, count, 3), 0.3)), torch.zeros(1, count, 3))


def test_three_points_are_enough_for_a_normal():
    points = torch.tensor([[[0.0, 0, 0], [1, 0, 0], [0, 1, 0]]])
    assert estimate_normals(points).abs()[0].tolist() == [pytest.approx([0, 0, 1])] * 3


def test_invalid_points_have_no_normal_and_change_none():
    points = ellipsoid(60)
    valid = torch.arange(60)[None] % 5 != 2
    spoilt = points.masked_fill(~valid[..., None], torch.nan)
    normals = estimate_normals(spoilt, count=10, valid=valid)
    assert normals[~valid].isnan().all()
    assert torch.equal(normals[valid], estimate_normals(points[:, valid[0]], count=10)[0])
    nothing = torch.zeros_like(valid)
    assert estimate_normals(points, valid=nothing).isnan().all()


def test_an_empty_cloud_has_no_normals():
    assert estimate_normals(torch.empty(2, 0, 3)).shape == (2, 0, 3)


def test_answers_have_the_type_of_the_points():
    points = noise(1, 40, 3).double()
    assert estimate_normals(points).dtype == torch.float64
    assert nearest_points(points, points, 2)[0].dtype == torch.float64
    assert nearest_points(points.float(), points.float(), 2)[0].dtype == torch.float32


def test_the_spacing_is_of_places_and_not_of_copies():
    """Six points on a line at 0, 1, 3, 6, 10 and 15: 1, 1, 2, 3, 4, 5 to the nearest other."""
    points = torch.zeros(6, 3, dtype=torch.float64)
    points[:, 0] = torch.tensor([0, 1, 3, 6, 10, 15])
    assert point_spacing(points) == 2  # of an even number the lower middle
    assert point_spacing(points.repeat(2, 1)) == 2
    assert point_spacing(points[:1].repeat(4, 1)) == 0
    assert point_spacing(points[:0]) == 0
