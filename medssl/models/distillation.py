"""The student of reverse distillation: a bottleneck over feature maps, and a decoder back to them.

After Deng & Li, CVPR 2022, https://arxiv.org/abs/2201.10703, sec. 3.1 and 3.2.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class ReverseStudent(nn.Module):
    """Gives back the feature maps it is shown, through one small embedding.

    The maps are brought to the grid of the deepest and fused (MFF), halved to the one-class
    embedding (OCE), and decoded from the deepest to the shallowest, one stage per map.

    shapes: (E, h, w) or (E, d, h, w) of each map, shallowest first; a map has at least as many
        positions as the next. Other sizes of the same picture's proportions work too.
    width: channels of the embedding; None is twice those of the deepest map, as in the paper.
    Differs from the paper: a stage enlarges by repeating its input to the grid of its map, where
        the paper has a transposed convolution, so that any encoder's grids fit; a stage is one
        residual block of two 3 x 3 convolutions.
    """

    def __init__(self, shapes: Sequence[Sequence[int]], *, width: int | None = None) -> None:
        super().__init__()
        positions = [torch.Size(shape[1:]).numel() for shape in shapes]
        if positions != sorted(positions, reverse=True):
            raise ValueError(
                f"layers must go from fine to coarse, got grids {[tuple(s[1:]) for s in shapes]}; "
                "name them in the order of the network"
            )
        axes, deepest = len(shapes[0]) - 1, shapes[-1][0]
        width = 2 * deepest if width is None else width
        self.down = nn.ModuleList(_downward(shape, shapes[-1]) for shape in shapes)
        self.fuse = _convolution(deepest * len(shapes), deepest, axes, kernel=1)
        self.embed = _Residual(deepest, width, axes, stride=2)
        inputs = [shape[0] for shape in shapes[1:]] + [width]
        self.up = nn.ModuleList(
            _Residual(before, shape[0], axes) for before, shape in zip(inputs, shapes, strict=True)
        )
        self.out = nn.ModuleList(_layer("Conv", axes)(s[0], s[0], 1) for s in shapes)

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        """maps: (B, E, *grid) each, shallowest first. Returns as many of the same shapes."""
        grid = maps[-1].shape[2:]
        brought = [_to_grid(down(one), grid) for down, one in zip(self.down, maps, strict=True)]
        found = self.embed(self.fuse(torch.cat(brought, dim=1)))
        decoded: list[Tensor] = []
        for up, out, target in reversed(list(zip(self.up, self.out, maps, strict=True))):
            found = up(_to_grid(found, target.shape[2:]))
            decoded.append(out(found))
        return decoded[::-1]


class _Residual(nn.Module):
    """Two convolutions beside a shortcut, as in ResNet-18."""

    def __init__(self, inputs: int, outputs: int, axes: int, stride: int = 1) -> None:
        super().__init__()
        self.first = _convolution(inputs, outputs, axes, stride=stride)
        self.second = nn.Sequential(
            _layer("Conv", axes)(outputs, outputs, 3, padding=1, bias=False),
            _layer("BatchNorm", axes)(outputs),
        )
        self.shortcut = nn.Sequential(
            _layer("Conv", axes)(inputs, outputs, 1, stride=stride, bias=False),
            _layer("BatchNorm", axes)(outputs),
        )

    def forward(self, maps: Tensor) -> Tensor:
        return F.relu(self.second(self.first(maps)) + self.shortcut(maps))


def _downward(shape: Sequence[int], deepest: Sequence[int]) -> nn.Sequential:
    """Strided convolutions from a map to the grid of the deepest, and to its channels (MFF)."""
    axes, channels, grid = len(shape) - 1, shape[0], list(shape[1:])
    steps: list[nn.Module] = []
    while any(have > want for have, want in zip(grid, deepest[1:], strict=True)):
        stride = [2 if have > want else 1 for have, want in zip(grid, deepest[1:], strict=True)]
        steps.append(_convolution(channels, deepest[0], axes, stride=stride))
        grid = [-(-have // step) for have, step in zip(grid, stride, strict=True)]
        channels = deepest[0]
    if channels != deepest[0]:
        steps.append(_convolution(channels, deepest[0], axes, kernel=1))
    return nn.Sequential(*steps)


def _convolution(
    inputs: int, outputs: int, axes: int, *, kernel: int = 3, stride: int | Sequence[int] = 1
) -> nn.Sequential:
    """Convolution, batch normalization and rectifier."""
    stride = stride if isinstance(stride, int) else tuple(stride)
    return nn.Sequential(
        _layer("Conv", axes)(
            inputs, outputs, kernel, stride=stride, padding=kernel // 2, bias=False
        ),
        _layer("BatchNorm", axes)(outputs),
        nn.ReLU(),
    )


def _layer(name: str, axes: int) -> Any:
    """torch's class of a layer for pictures (2 axes) or volumes (3)."""
    return getattr(nn, f"{name}{axes}d")


def _to_grid(maps: Tensor, grid: torch.Size) -> Tensor:
    """Repeated, or left out, to another grid; nothing where it has that grid."""
    return maps if maps.shape[2:] == grid else F.interpolate(maps, tuple(grid), mode="nearest")
