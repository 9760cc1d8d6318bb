"""Patch scores to pixel maps; NaN marks what is not valid, and it counts nowhere."""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def upsample(
    patches: Tensor, size: Sequence[int], *, offset: Sequence[float] | Tensor = (0.0, 0.0)
) -> Tensor:
    """Patch scores (B, h, w) to pixels (B, H, W), bilinear between the patches that are not NaN.

    offset: how far the patches look beside the middle of their cells, in pixels (row, column);
        see `medssl.models.alignment.grid_offset`. Beyond the outermost patches these go on.
    A pixel all of whose neighbouring patches are NaN becomes NaN.
    """
    row, column = (2 * float(pixels) / length for pixels, length in zip(offset, size, strict=True))
    theta = patches.new_tensor([[1, 0, -column], [0, 1, -row]]).expand(len(patches), 2, 3)
    places = F.affine_grid(theta, [len(patches), 1, *size], align_corners=False)

    def interpolate(values: Tensor) -> Tensor:
        return F.grid_sample(values, places, padding_mode="border", align_corners=False)

    return _weighted(patches, interpolate)


def smooth(maps: Tensor, sigma: float) -> Tensor:
    """Gaussian mean of the pixels around each one, over those inside the map and not NaN.

    maps: (B, H, W); sigma: in pixels, 0 changes nothing. NaN stays NaN.
    """
    if sigma < 0:
        raise ValueError(f"sigma must not be negative, got {sigma}")
    if sigma == 0:
        return maps
    row = _gaussian(sigma, maps).reshape(1, 1, 1, -1)
    radius = row.numel() // 2

    def blur(values: Tensor) -> Tensor:
        values = F.conv2d(values, row, padding=(0, radius))
        return F.conv2d(values, row.mT, padding=(radius, 0))

    return torch.where(maps.isnan(), maps, _weighted(maps, blur))


def smooth_across(maps: Tensor, sigma: float) -> Tensor:
    """As `smooth`, along D only. maps: (B, D, H, W); sigma: in slices."""
    column = _gaussian(sigma, maps).reshape(1, 1, -1, 1)
    lines = maps.flatten(2)  # (B, D, H W)
    smoothed = _weighted(lines, lambda v: F.conv2d(v, column, padding=(column.numel() // 2, 0)))
    return torch.where(lines.isnan(), lines, smoothed).reshape(maps.shape)


def valid_patches(valid: Tensor, grid: Sequence[int]) -> Tensor:
    """Patches (B, h, w) that hold at least one valid pixel of `valid` (B, H, W), both bool."""
    return F.adaptive_max_pool2d(valid[:, None].float(), tuple(grid))[:, 0] > 0


def outside_is_nan(maps: Tensor, valid: Tensor) -> Tensor:
    """The maps with NaN wherever `valid`, of the same shape, is False."""
    return torch.where(valid, maps, torch.nan)


def _gaussian(sigma: float, like: Tensor) -> Tensor:
    """Weights of sum 1 out to four standard deviations, (2 r + 1,)."""
    radius = int(4 * sigma + 0.5)
    offsets = torch.arange(-radius, radius + 1, dtype=like.dtype, device=like.device)
    kernel = torch.exp(-0.5 * (offsets / sigma).square())
    return kernel / kernel.sum()


def _weighted(values: Tensor, linear: Callable[[Tensor], Tensor]) -> Tensor:
    """A linear filter of (B, 1, h, w) applied to (B, h, w), its weights shared by the non-NaN."""
    known = (~values.isnan()).to(values.dtype)[:, None]
    weight = linear(known)
    total = linear(values.nan_to_num(0.0)[:, None])
    return torch.where(weight > 1e-6, total / weight, torch.nan)[:, 0]
