"""Seamless blending: the equation it solves, and what it leaves alone."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from anomaly.poisson import BlendError, blend


def drawn(seed):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("shape", [(1, 14, 17), (2, 7, 8, 9)], ids=["2D", "3D"])
def test_the_blend_solves_the_poisson_equation_of_the_stronger_gradients(shape):
    before, given = torch.randn(shape, generator=drawn(0)), torch.randn(shape, generator=drawn(1))
    valid = torch.ones(shape[1:], dtype=torch.bool)
    valid[(2, 3, 4)[: valid.ndim]] = False
    found = blend(before, given, valid)
    checked = 0
    for index in np.ndindex(*shape):
        neighbors = [
            (index[0], *(place + step * (axis == moved) for axis, place in enumerate(index[1:])))
            for moved in range(valid.ndim)
            for step in (-1, 1)
        ]
        inside = all(
            0 <= place < side
            for one in neighbors
            for place, side in zip(one[1:], shape[1:], strict=True)
        )
        if not (valid[index[1:]] and inside and all(valid[one[1:]] for one in neighbors)):
            assert found[index] == before[index]
            continue
        guidance = 0.0
        for one in neighbors:
            steps = [float(image[index] - image[one]) for image in (before, given)]
            guidance += max(steps, key=abs)
        laplacian = sum(float(found[index] - found[one]) for one in neighbors)
        assert laplacian == pytest.approx(guidance, abs=1e-4)
        checked += 1
    assert checked > 60


def test_blending_a_shifted_copy_of_an_image_changes_nothing():
    before = F.interpolate(torch.randn(1, 1, 5, 5, generator=drawn(0)), (20, 20))[0]
    found = blend(before, before + 100, torch.ones(20, 20, dtype=torch.bool))
    torch.testing.assert_close(found, before, atol=1e-4, rtol=0)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("side", [0, 1], ids=["before", "given"])
def test_a_valid_pixel_that_is_not_finite_is_refused_and_one_that_is_not_valid_is_not_seen(
    value, side
):
    clean = [torch.randn(2, 9, 11, generator=drawn(seed)) for seed in (0, 1)]
    wrong = [image.clone() for image in clean]
    wrong[side][1, 4, 5] = value
    valid = torch.ones(9, 11, dtype=torch.bool)
    with pytest.raises(BlendError, match="finite pixels where valid, got 1 others"):
        blend(*wrong, valid)
    valid[4, 5] = False
    expected = blend(*clean, valid)
    found = blend(*wrong, valid)
    expected[:, 4, 5] = found[:, 4, 5] = 0.0
    assert found.equal(expected)


def test_a_solver_that_stops_early_is_an_error_and_no_picture(monkeypatch):
    from scipy.sparse.linalg import cg

    monkeypatch.setattr(
        "scipy.sparse.linalg.cg",
        lambda matrix, wanted, x0, rtol: cg(matrix, wanted, x0=x0, rtol=rtol, maxiter=2),
    )
    images = [torch.randn(1, 12, 12, generator=drawn(seed)) for seed in (0, 1)]
    with pytest.raises(BlendError, match="no blend of 100 pixels was found to a residual of 1e-08"):
        blend(*images, torch.ones(12, 12, dtype=torch.bool))


def test_values_that_leave_float32_are_an_error():
    before, given = torch.full((1, 9, 9), 3e38), torch.zeros(1, 9, 9)
    given[0, 4, 4] = 3e38  # a peak upon what is already there
    valid = torch.ones(9, 9, dtype=torch.bool)
    with pytest.raises(BlendError, match="images of smaller values"):
        blend(before, given, valid)
    assert blend(before / 2, given / 2, valid)[0, 4, 4] == pytest.approx(3e38, rel=1e-5)
