"""Seamless blending: the equation it solves, and what it leaves alone."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from anomaly.poisson import blend


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
