"""How alike two images are in structure, pixel by pixel; pictures (H, W) and volumes (D, H, W).

SSIM: Wang et al., IEEE TIP 2004, https://doi.org/10.1109/TIP.2003.819861. MS-SSIM: Wang, Simoncelli
& Bovik, Asilomar 2003, https://doi.org/10.1109/ACSSC.2003.1292216.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

_K1, _K2 = 0.01, 0.03
_EXPONENTS = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)  # of MS-SSIM, finest scale first
_LEAST = 1e-2  # of a term that is raised to a power below 1, whose slope at 0 is infinite


def ssim_map(
    x: Tensor,
    y: Tensor,
    *,
    data_range: float | Tensor,
    window: int = 11,
    valid: Tensor | None = None,
) -> Tensor:
    """SSIM of the windows around each pixel, mean over the channels: (B, *spatial) in [-1, 1].

    Larger is more alike; 1 is equal. Weights are Gaussian, sigma 1.5 for a window of 11; at the
    border and beside invalid pixels, whose values count nowhere, they are shared by the valid
    pixels inside. Invalid pixels get 1.

    x, y: (B, C, *spatial), from 0 upwards: the luminance term compares ratios of means.
    data_range: of the values, for all items or (B,).
    window: side in pixels, odd; a shorter D axis cuts it off.
    valid: (B, *spatial) bool; None is everywhere.
    Raises ValueError for shapes that differ and for a window that does not fit in the plane.
    """
    dtype = x.dtype
    x, y, known = _checked(x, y, valid, window)
    luminance, contrast = _terms(x, y, known, _constants(data_range, x), window)
    return torch.where(known, luminance * contrast, 1.0).mean(1).to(dtype)


def multi_scale_ssim_map(
    x: Tensor,
    y: Tensor,
    *,
    data_range: float | Tensor,
    window: int = 11,
    scales: int | None = None,
    valid: Tensor | None = None,
) -> Tensor:
    """MS-SSIM of the windows around each pixel, mean over the channels: (B, *spatial) in (0, 1].

    The product over scales, each half as fine as the one before, of the contrast-structure terms
    raised to the exponents of the paper, which are made to sum to 1 over the scales in use; of the
    luminance terms only the coarsest. Coarse terms are interpolated linearly. Arguments as of
    `ssim_map`.

    scales: at most `largest_scales`, which is None's.
    Differs from the paper: a map, where the paper takes the mean of each scale first; terms below
    0.01, and so negative ones, count as 0.01; D is halved only while it stays as long as the
    window.
    """
    dtype = x.dtype
    x, y, known = _checked(x, y, valid, window)
    size = tuple(x.shape[2:])
    most = largest_scales(size, window)
    count = most if scales is None else scales
    if not 1 <= count <= most:
        raise ValueError(
            f"images of {size} pixels have 1 to {most} scales with a window of {window}, got "
            f"{count}; take fewer scales or a smaller window"
        )
    constants, everywhere = _constants(data_range, x), known
    product, factors = torch.ones_like(x), [1] * len(size)
    for scale, exponent in enumerate(_EXPONENTS[:count]):
        if scale > 0:
            halved = _halves(x.shape[2:], window)
            x, y, known = _pooled(x, y, known, halved)
            factors = [factor * half for factor, half in zip(factors, halved, strict=True)]
        luminance, contrast = _terms(x, y, known, constants, window)
        term = contrast.clamp_min(_LEAST)
        if scale == count - 1:
            term = term * luminance.clamp_min(_LEAST)
        term = term ** (exponent / sum(_EXPONENTS[:count]))
        product = product * _enlarged(term, known, factors, size)
    return torch.where(everywhere, product, 1.0).mean(1).to(dtype)


def largest_scales(size: Sequence[int], window: int = 11) -> int:
    """Most scales, up to the 5 of the paper, at which H and W are as long as the window.

    size: (H, W) or (D, H, W) in pixels. Raises ValueError where one scale is too many.
    """
    _check_window(size, window)
    side, scales = min(size[-2:]), 1
    while scales < len(_EXPONENTS) and _half(side) >= window:
        side, scales = _half(side), scales + 1
    return scales


def _check_window(size: Sequence[int], window: int) -> None:
    if window < 3 or window % 2 == 0:
        raise ValueError(f"window is an odd number of pixels from 3 on, got {window}")
    if window > min(size[-2:]):
        raise ValueError(
            f"a window of {window} pixels does not fit in images of {tuple(size)}; take a smaller "
            "one or larger images"
        )


def _checked(
    x: Tensor, y: Tensor, valid: Tensor | None, window: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Both images, 0 where not valid, and where they are: (B, 1, *spatial) bool.

    In float64: a variance is a small difference of large means of squares.
    """
    if x.shape != y.shape or x.ndim not in (4, 5):
        raise ValueError(
            "expected two images of one shape, (B, C, H, W) or (B, C, D, H, W), got "
            f"{tuple(x.shape)} and {tuple(y.shape)}"
        )
    shape = (len(x), *x.shape[2:])
    if valid is not None and valid.shape != shape:
        raise ValueError(f"valid must be {shape} for such images, got {tuple(valid.shape)}")
    _check_window(x.shape[2:], window)
    if valid is None:
        valid = torch.ones(shape, dtype=torch.bool, device=x.device)
    known = valid[:, None]
    return torch.where(known, x, 0.0).double(), torch.where(known, y, 0.0).double(), known


def _constants(data_range: float | Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
    """C1 and C2 of the paper, as they meet (B, C, *spatial)."""
    span = torch.as_tensor(data_range, dtype=like.dtype, device=like.device)
    if not (span > 0).all():
        raise ValueError(f"data_range must be positive, got {data_range}")
    span = span.reshape(-1, *[1] * (like.ndim - 1))
    return (_K1 * span).square(), (_K2 * span).square()


def _terms(
    x: Tensor, y: Tensor, known: Tensor, constants: tuple[Tensor, Tensor], window: int
) -> tuple[Tensor, Tensor]:
    """Luminance, and contrast times structure, of the window around each pixel."""
    kernel = _gaussian(window, x)
    axes = x.ndim - 2
    weight = _summed(known.to(x.dtype), kernel, axes)
    weight = torch.where(known, weight, 1.0)  # an invalid pixel may see no valid one
    moments = torch.stack([x, y, x * x, y * y, x * y])
    mean_x, mean_y, xx, yy, xy = _summed(moments, kernel, axes) / weight
    luminance = (2 * mean_x * mean_y + constants[0]) / (
        mean_x.square() + mean_y.square() + constants[0]
    )
    # rounding may leave a variance below 0 and a covariance above it, where values are large
    spread = (xx - mean_x.square()).clamp_min(0) + (yy - mean_y.square()).clamp_min(0)
    shared = torch.maximum(torch.minimum(2 * (xy - mean_x * mean_y), spread), -spread)
    return luminance, (shared + constants[1]) / (spread + constants[1])


def _gaussian(window: int, like: Tensor) -> Tensor:
    """Weights of sum 1, (window,)."""
    offsets = torch.arange(window, dtype=like.dtype, device=like.device) - window // 2
    kernel = torch.exp(-0.5 * (offsets / (1.5 * window / 11)).square())
    return kernel / kernel.sum()


def _summed(values: Tensor, kernel: Tensor, axes: int) -> Tensor:
    """Filtered along each of the last axes with a symmetric kernel (2 r + 1,); zeros lie outside.

    As products with band matrices: in float64 they are faster than convolutions.
    """
    radius = len(kernel) // 2
    for axis in range(-axes, 0):
        index = torch.arange(values.shape[axis], device=values.device)
        offset = index[:, None] - index
        band = torch.where(
            offset.abs() <= radius, kernel[offset.clamp(-radius, radius) + radius], 0
        )
        values = (values.movedim(axis, -1) @ band).movedim(-1, axis)
    return values


def _halves(size: Sequence[int], window: int) -> list[int]:
    """By what each axis is divided for the next scale: 1 for a D that would become too short."""
    return [2 if _half(side) >= window else 1 for side in size[:-2]] + [2, 2]


def _half(side: int) -> int:
    """Of an odd side, the last cell is of one pixel."""
    return (side + 1) // 2


def _pooled(
    x: Tensor, y: Tensor, known: Tensor, factors: Sequence[int]
) -> tuple[Tensor, Tensor, Tensor]:
    """Means of the valid pixels of each cell, and which cells have any."""
    pool, cell = F.avg_pool2d if len(factors) == 2 else F.avg_pool3d, list(factors)
    share = pool(known.to(x.dtype), cell, ceil_mode=True)
    divisor = torch.where(share > 0, share, 1.0)
    return (
        pool(x, cell, ceil_mode=True) / divisor,
        pool(y, cell, ceil_mode=True) / divisor,
        share > 0,
    )


def _enlarged(values: Tensor, known: Tensor, factors: Sequence[int], size: Sequence[int]) -> Tensor:
    """Coarse terms (B, C, *coarse) on the pixels, linear between the cells that are valid."""
    if max(factors) == 1:
        return values
    whole = [side * factor for side, factor in zip(values.shape[2:], factors, strict=True)]
    mode = "bilinear" if len(size) == 2 else "trilinear"
    inside: tuple[Any, ...] = (..., *(slice(side) for side in size))
    weight = F.interpolate(known.to(values.dtype), whole, mode=mode)[inside]
    total = F.interpolate(torch.where(known, values, 0.0), whole, mode=mode)[inside]
    return total / weight.clamp_min(0.1)  # at least 1/8 where a pixel is valid
