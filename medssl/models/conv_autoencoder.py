"""Convolutional encoder, decoder and U-Net of pictures and volumes, for detectors that reconstruct.

Nothing here looks across a batch: features are normalized within groups of channels (Wu & He, ECCV
2018, https://arxiv.org/abs/1803.08494), so an image is rebuilt alike whatever lies beside it.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_GROUP = 8  # channels that are normalized together


@dataclass(frozen=True, kw_only=True)
class AutoencoderShape:
    """What an encoder and its decoder are built from.

    in_channels: of the images.
    channels: of each level; a level halves every axis.
    latent_dim: numbers that are kept of the whole image, or of each position.
    size: of the images, in pixels, for one latent vector of the whole image; such a network takes
        no other size. None keeps a latent vector at each position of the coarsest level and takes
        images of any size.
    dims: 2 for pictures, 3 for volumes.
    """

    in_channels: int = 1
    channels: Sequence[int] = (16, 32, 64, 64)
    latent_dim: int = 16
    size: Sequence[int] | None = None
    dims: int = 2

    def __post_init__(self) -> None:
        _check_dims(self.dims, self.channels)
        if min(self.in_channels, self.latent_dim) < 1:
            raise ValueError(
                f"in_channels and latent_dim must be at least 1, got {self.in_channels} and "
                f"{self.latent_dim}"
            )
        if self.size is not None and len(self.size) != self.dims:
            raise ValueError(
                f"size must hold {self.dims} sides, got {list(self.size)}; or set dims"
            )

    @property
    def grid(self) -> tuple[int, ...]:
        """Positions of the coarsest level per axis, where the size is set."""
        assert self.size is not None
        return tuple(-(-side // 2 ** len(self.channels)) for side in self.size)


class ConvEncoder(nn.Module):
    """Strided convolutions from an image to its latent.

    shape: of the network. outputs: numbers per latent vector, `latent_dim` where it is None.
    """

    def __init__(self, shape: AutoencoderShape, *, outputs: int | None = None) -> None:
        super().__init__()
        self.shape = shape
        outputs = shape.latent_dim if outputs is None else outputs
        widths = [shape.in_channels, *shape.channels]
        self.levels = nn.Sequential(*(_halving(a, b, shape.dims) for a, b in pairwise(widths)))
        if shape.size is None:
            self.to_latent: nn.Module = _layer("Conv", shape.dims)(widths[-1], outputs, 1)
        else:
            inputs = widths[-1] * math.prod(shape.grid)
            self.to_latent = nn.Sequential(nn.Flatten(), nn.Linear(inputs, outputs))

    def forward(self, images: Tensor) -> Tensor:
        """images: (B, C, *spatial). Returns (B, outputs), or (B, outputs, *grid) without a size.

        Sides that are no multiple of 2 ** levels are filled up with zeros at their end. Raises
        ValueError for other channels or another size than the network takes.
        """
        shape = self.shape
        _check_images(images, shape.in_channels, shape.dims)
        if shape.size is not None and tuple(images.shape[2:]) != tuple(shape.size):
            raise ValueError(
                f"the network takes images of {tuple(shape.size)} pixels, got "
                f"{tuple(images.shape[2:])}; set size in the preprocessing"
            )
        return self.to_latent(self.levels(_filled_up(images, 2 ** len(shape.channels))))


class ConvDecoder(nn.Module):
    """From a latent back to the image, repeating pixels and convolving.

    Repeated pixels leave no checkerboard, as transposed convolutions do (Odena et al., Distill
    2016, https://distill.pub/2016/deconv-checkerboard).
    """

    def __init__(self, shape: AutoencoderShape) -> None:
        super().__init__()
        self.shape = shape
        deepest = shape.channels[-1]
        if shape.size is None:
            self.from_latent: nn.Module = _layer("Conv", shape.dims)(shape.latent_dim, deepest, 1)
        else:
            self.from_latent = nn.Sequential(
                nn.Linear(shape.latent_dim, deepest * math.prod(shape.grid)),
                nn.Unflatten(1, (deepest, *shape.grid)),
            )
        widths = [*reversed(shape.channels), shape.channels[0]]
        self.levels = nn.Sequential(*(_doubling(a, b, shape.dims) for a, b in pairwise(widths)))
        self.out = _layer("Conv", shape.dims)(widths[-1], shape.in_channels, 3, padding=1)

    def forward(self, latent: Tensor, size: Sequence[int]) -> Tensor:
        """latent: as of `ConvEncoder`; size: of the image it came from. Returns (B, C, *size)."""
        return _cut(self.out(self.levels(self.from_latent(latent))), size)


class UNet(nn.Module):
    """From an image to one of the same channels and size, with skip connections.

    After Ronneberger et al., MICCAI 2015, https://arxiv.org/abs/1505.04597.

    channels: of each level; the first has the image's own grid, each further one half of it.
    dims: 2 for pictures, 3 for volumes.
    """

    def __init__(
        self, in_channels: int, *, channels: Sequence[int] = (64, 128, 256, 512), dims: int = 2
    ) -> None:
        super().__init__()
        _check_dims(dims, channels)
        self.in_channels, self.channels, self.dims = in_channels, list(channels), dims
        widths = [in_channels, *channels]
        pairs = list(pairwise(channels))  # of a level and the next coarser
        self.down = nn.ModuleList(_twice(a, b, dims) for a, b in pairwise(widths))
        self.enlarge = nn.ModuleList(
            _layer("ConvTranspose", dims)(coarse, fine, 2, stride=2) for fine, coarse in pairs
        )
        self.up = nn.ModuleList(_twice(2 * fine, fine, dims) for fine, _ in pairs)
        self.out = _layer("Conv", dims)(channels[0], in_channels, 1)

    def forward(self, images: Tensor) -> Tensor:
        """images: (B, C, *spatial) of any size. Returns the same shape."""
        _check_images(images, self.in_channels, self.dims)
        found = self.down[0](_filled_up(images, 2 ** (len(self.channels) - 1)))
        skips = []
        halve = F.avg_pool2d if self.dims == 2 else F.avg_pool3d
        for down in self.down[1:]:
            skips.append(found)
            found = down(halve(found, 2))
        for skip, enlarge, up in reversed(list(zip(skips, self.enlarge, self.up, strict=True))):
            found = up(torch.cat([enlarge(found), skip], dim=1))
        return _cut(self.out(found), images.shape[2:])


def _halving(inputs: int, outputs: int, dims: int) -> nn.Sequential:
    """Every pixel lies under as many places of the kernel of 4 as any other."""
    return nn.Sequential(
        _layer("Conv", dims)(inputs, outputs, 4, stride=2, padding=1, bias=False),
        _norm(outputs),
        nn.LeakyReLU(0.2),
    )


def _doubling(inputs: int, outputs: int, dims: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Upsample(scale_factor=2, mode="nearest"),
        _layer("Conv", dims)(inputs, outputs, 3, padding=1, bias=False),
        _norm(outputs),
        nn.LeakyReLU(0.2),
    )


def _twice(inputs: int, outputs: int, dims: int) -> nn.Sequential:
    """The two convolutions of a level of the U-Net."""
    steps: list[nn.Module] = []
    for before in (inputs, outputs):
        convolution = _layer("Conv", dims)(before, outputs, 3, padding=1, bias=False)
        steps += [convolution, _norm(outputs), nn.SiLU()]
    return nn.Sequential(*steps)


def _norm(channels: int) -> nn.GroupNorm:
    """Groups of 8 channels, or of more where the channels cannot be split so."""
    return nn.GroupNorm(math.gcd(channels, max(1, channels // _GROUP)), channels)


def _layer(name: str, dims: int) -> Any:
    """torch's class of a layer for pictures (2) or volumes (3)."""
    return getattr(nn, f"{name}{dims}d")


def _filled_up(images: Tensor, multiple: int) -> Tensor:
    """Zeros at the end of each axis, up to the next multiple."""
    missing = [-side % multiple for side in images.shape[2:]]
    return F.pad(images, [part for amount in reversed(missing) for part in (0, amount)])


def _cut(images: Tensor, size: Sequence[int]) -> Tensor:
    inside: tuple[Any, ...] = (..., *(slice(side) for side in size))
    return images[inside]


def _check_dims(dims: int, channels: Sequence[int]) -> None:
    if dims not in (2, 3):
        raise ValueError(f"dims must be 2 for pictures or 3 for volumes, got {dims}")
    if not channels or min(channels) < 1:
        raise ValueError(f"channels must name a positive width per level, got {list(channels)}")


def _check_images(images: Tensor, channels: int, dims: int) -> None:
    if images.ndim != dims + 2 or images.shape[1] != channels:
        raise ValueError(
            f"the network takes images of {channels} channels and {dims} axes, got "
            f"{tuple(images.shape)} with the batch in front; set channels in the preprocessing, or "
            "in_channels and dims of the network"
        )
