"""Patch scores to maps of pixels or voxels; NaN marks what is not valid, and it counts nowhere.

Everything here takes pictures (H, W) and volumes (D, H, W) alike.
"""

from collections.abc import Callable, Sequence
from math import prod

import torch
import torch.nn.functional as F
from torch import Tensor


def upsample(
    patches: Tensor, size: Sequence[int], *, offset: Sequence[float] | Tensor | None = None
) -> Tensor:
    """Patch scores (B, h, w) to pixels (B, H, W), or (B, d, h, w) to voxels (B, D, H, W).

    Linear along each axis between the patches that are not NaN.
    size: pixels, one per axis.
    offset: how far the patches look beside the middle of their cells, in pixels, one per axis;
        see `medssl.models.alignment.grid_offset`. Beyond the outermost patches these go on.
    A pixel all of whose neighbouring patches are NaN becomes NaN.
    """
    axes = patches.ndim - 1
    if len(size) != axes or (offset is not None and len(offset) != axes):
        raise ValueError(
            f"patches {tuple(patches.shape)} need {axes} sizes and offsets, got size "
            f"{tuple(size)} and offset {offset}"
        )
    beside = [0.0] * axes if offset is None else [float(pixels) for pixels in offset]
    shift = [2 * pixels / length for pixels, length in zip(beside, size, strict=True)]
    rows = [  # x, y, z: the last axis first
        [*(float(i == j) for j in range(axes)), -pixels] for i, pixels in enumerate(shift[::-1])
    ]
    theta = patches.new_tensor(rows).expand(len(patches), axes, axes + 1)
    places = F.affine_grid(theta, [len(patches), 1, *size], align_corners=False)

    def interpolate(values: Tensor) -> Tensor:
        return F.grid_sample(values, places, padding_mode="border", align_corners=False)

    return _weighted(patches, interpolate)


def smooth(maps: Tensor, sigma: float | Sequence[float]) -> Tensor:
    """Gaussian mean of the pixels around each one, over those inside the map and not NaN.

    maps: (B, H, W) or (B, D, H, W); sigma: in pixels, one for all axes or one for each; along an
    axis of 0 nothing changes. NaN stays NaN.
    """
    axes = maps.ndim - 1
    sigmas = [float(sigma)] * axes if isinstance(sigma, (int, float)) else list(sigma)
    if len(sigmas) != axes:
        raise ValueError(f"maps {tuple(maps.shape)} need {axes} sigmas, got {len(sigmas)}")
    if min(sigmas) < 0:
        raise ValueError(f"sigma must not be negative, got {sigma}")
    if max(sigmas) == 0:
        return maps

    def blur(values: Tensor) -> Tensor:
        for axis in reversed(range(axes)):
            if sigmas[axis] > 0:
                values = _along(values, axis, _gaussian(sigmas[axis], maps))
        return values

    return torch.where(maps.isnan(), maps, _weighted(maps, blur))


def valid_patches(valid: Tensor, grid: Sequence[int]) -> Tensor:
    """Patches (B, *grid) that hold at least one valid pixel of `valid` (B, *spatial), both bool."""
    values = valid[:, None].float()
    if valid.ndim == 3:
        return F.adaptive_max_pool2d(values, tuple(grid))[:, 0] > 0
    return F.adaptive_max_pool3d(values, tuple(grid))[:, 0] > 0


def outside_is_nan(maps: Tensor, valid: Tensor) -> Tensor:
    """The maps with NaN wherever `valid`, of the same shape, is False."""
    return torch.where(valid, maps, torch.nan)


def pixel_maps(
    patches: Tensor, valid: Tensor, *, offset: Tensor | None = None, sigma: float | Sequence[float]
) -> Tensor:
    """Patch scores (B, *grid) upsampled to the grid of `valid` (B, *spatial) and smoothed.

    offset: as of `upsample`; sigma: as of `smooth`. NaN outside `valid`.
    """
    maps = smooth(upsample(patches, valid.shape[1:], offset=offset), sigma)
    return outside_is_nan(maps, valid)


def _gaussian(sigma: float, like: Tensor) -> Tensor:
    """Weights of sum 1 out to four standard deviations, (2 r + 1,)."""
    radius = int(4 * sigma + 0.5)
    offsets = torch.arange(-radius, radius + 1, dtype=like.dtype, device=like.device)
    kernel = torch.exp(-0.5 * (offsets / sigma).square())
    return kernel / kernel.sum()


def _along(values: Tensor, axis: int, kernel: Tensor) -> Tensor:
    """(B, 1, *spatial) filtered along one spatial axis with a kernel (2 r + 1,); zeros outside."""
    spatial, radius = values.shape[2:], len(kernel) // 2
    if axis == len(spatial) - 1:
        plane = values.reshape(len(values), 1, -1, spatial[-1])
        filtered = F.conv2d(plane, kernel.reshape(1, 1, 1, -1), padding=(0, radius))
    else:
        plane = values.reshape(-1, 1, spatial[axis], prod(spatial[axis + 1 :]))
        filtered = F.conv2d(plane, kernel.reshape(1, 1, -1, 1), padding=(radius, 0))
    return filtered.reshape(values.shape)


def _weighted(values: Tensor, linear: Callable[[Tensor], Tensor]) -> Tensor:
    """A linear filter of (B, 1, *grid) applied to (B, *grid), its weights shared by the non-NaN."""
    known = (~values.isnan()).to(values.dtype)[:, None]
    weight = linear(known)
    total = linear(values.nan_to_num(0.0)[:, None])
    return torch.where(weight > 1e-6, total / weight, torch.nan)[:, 0]
