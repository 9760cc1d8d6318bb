"""The minimum of a function whose minimum is known."""

import torch

from medssl.probes.lbfgs import minimize


def test_the_minimum_of_rosenbrock_is_found():
    """A curved valley in which steps down the slope take tens of thousands (Rosenbrock, 1960)."""
    point = torch.tensor([-1.2, 1.0])
    minimize(lambda: (1 - point[0]) ** 2 + 100 * (point[1] - point[0] ** 2) ** 2, [point])
    torch.testing.assert_close(point, torch.ones(2), atol=1e-3, rtol=0)
    assert not point.requires_grad
