"""Seamless blending by the Poisson equation with mixed gradients.

Perez et al., "Poisson image editing", SIGGRAPH 2003, https://doi.org/10.1145/882262.882269.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

_EXACT = 1e-8  # relative residual of the linear system


class BlendError(ValueError):
    """Images that cannot be blended: their valid pixels are not finite, or no answer was found."""


def blend(before: Tensor, given: Tensor, valid: Tensor) -> Tensor:
    """Give `before` the stronger of both images' gradients without moving its border.

    before, given: (C, *axes), two or three axes. valid: (*axes) bool.
    A pixel changes where it and its neighbours along the axes are valid and inside. There, the sum
    of its differences to its neighbours (eq. 7) becomes the sum of the differences that are larger
    in absolute value in `before` or in `given` (eq. 12).

    Raises BlendError where a valid pixel is NaN or infinite, and where the solver does not reach
    its accuracy or what it finds is no float32.
    """
    from scipy.ndimage import binary_erosion
    from scipy.sparse.linalg import cg

    wrong = ~(before.isfinite() & given.isfinite())[:, valid]
    if wrong.any():
        raise BlendError(
            f"blending takes finite pixels where valid, got {int(wrong.sum())} others; mark them "
            "as not valid"
        )
    inside = binary_erosion(valid.numpy())  # by the cross of neighbours; never at the rim
    result = before.clone()
    if not inside.any():
        return result
    matrix = _differences(inside)
    for channel, (old, new) in enumerate(zip(before, given, strict=True)):
        host, donor = old.double().numpy(), new.double().numpy()
        wanted = np.zeros(int(inside.sum()))
        for neighbor in _neighbors(host.ndim):
            steps = [image[inside] - neighbor(image)[inside] for image in (host, donor)]
            wanted += np.where(np.abs(steps[1]) > np.abs(steps[0]), steps[1], steps[0])
            wanted += neighbor(np.where(inside, 0.0, host))[inside]  # those that stay
        solved, failed = cg(matrix, wanted, x0=host[inside], rtol=_EXACT)
        values = torch.from_numpy(solved).float()
        if failed or not values.isfinite().all():
            raise BlendError(
                f"no blend of {len(wanted)} pixels was found to a residual of {_EXACT:g}; take a "
                "smaller box or images of smaller values"
            )
        result[channel][torch.from_numpy(inside)] = values
    return result


def _neighbors(axes: int) -> Iterator[Any]:
    """Per neighbour of a pixel, what gives its value in the pixel's place; wraps at the rim."""
    for axis in range(axes):
        for step in (1, -1):
            yield lambda image, axis=axis, step=step: np.roll(image, step, axis)


def _differences(inside: Any) -> Any:
    """Sum of the differences to the neighbours inside, and of the value itself for each other
    neighbour: (n, n), sparse, a row for each of the n pixels inside."""
    from scipy.sparse import csr_matrix, diags

    count = int(inside.sum())
    number = np.full(inside.shape, -1)
    number[inside] = np.arange(count)
    matrix = diags([np.full(count, 2.0 * inside.ndim)], [0], format="csr")
    for neighbor in _neighbors(inside.ndim):
        column = neighbor(number)[inside]
        row = np.flatnonzero(column >= 0)
        matrix -= csr_matrix((np.ones(len(row)), (row, column[row])), (count, count))
    return matrix
