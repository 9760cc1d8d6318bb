import pytest
import torch

from medssl.data.planes import find_plane


def tilted(count: int, *, noise: float, seed: int = 0) -> torch.Tensor:
    """Points on the plane (1, 2, 2) / 3 . p = 6."""
    generator = torch.Generator().manual_seed(seed)
    normal = torch.tensor([1.0, 2.0, 2.0]) / 3
    flat = 40 * torch.randn(count, 3, generator=generator)
    flat -= (flat @ normal)[:, None] * normal
    off = 6 + noise * torch.randn(count, 1, generator=generator)
    return flat + off * normal


def clutter(count: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(9)
    return 100 * torch.rand(count, 3, generator=generator) - 50


@pytest.mark.parametrize("share", [0.95, 0.5])
def test_a_plane_among_clutter_is_found_where_it_is(share: float):
    count = int(4000 * share)
    plane = find_plane(torch.cat([tilted(count, noise=0.1), clutter(4000 - count)]), 0.4)
    assert plane is not None
    torch.testing.assert_close(
        plane.normal, torch.tensor([1.0, 2.0, 2.0]).double() / 3, atol=5e-4, rtol=0
    )
    assert plane.offset == pytest.approx(6, abs=0.02)
    assert plane.share == pytest.approx(share, abs=0.03)


def test_clutter_alone_is_no_plane():
    assert find_plane(clutter(3000), 1.0) is None


def test_points_on_one_line_or_too_few_are_no_plane():
    line = torch.arange(50.0)[:, None] * torch.tensor([1.0, 2.0, 3.0])
    assert find_plane(line[:2], 1.0) is None
    assert find_plane(torch.ones(20, 3), 1.0) is None


def test_map_coordinates_of_a_million_keep_their_millimetres():
    shift = torch.tensor([512_000.0, 640_000.0, 0.0]).double()
    near = tilted(3000, noise=0.0).double()
    plane = find_plane(near + shift, 0.01)
    assert plane is not None
    assert plane.distance(near + shift).abs().max() < 1e-4


def test_equal_points_give_an_equal_plane():
    points = torch.cat([tilted(500, noise=0.1), clutter(400)])
    first, second = find_plane(points, 0.3), find_plane(points, 0.3)
    assert first is not None
    assert second is not None
    assert first.normal.equal(second.normal)
    assert first.offset == second.offset
