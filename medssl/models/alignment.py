"""Where in the picture the units of a feature map look."""

import torch
from torch import Tensor

from medssl.models.encoder import Encoder

_PICTURES = 4


@torch.inference_mode(False)
@torch.enable_grad()
def grid_offset(encoder: Encoder, layer: str, size: tuple[int, int]) -> Tensor:
    """How far the units of a layer look beside the middle of their cell: (2,) pixels, row, column.

    A feature map of h x w units divides a picture of `size` pixels into cells. A convolution of
    stride 2 whose padding is symmetric looks at the first pixels of each cell, not at its middle:
    after k of them the offset is -(2^k - 1) / 2 pixels in both directions.

    Measured, not derived, so that it holds for any network and for what its weights have learnt:
    the centre of mass of the squared gradients of the middle units by the pixels of generated
    noise (the effective receptive field: Luo et al., NeurIPS 2016,
    https://arxiv.org/abs/1701.04128). Where a unit sees the whole picture (attention, squeeze and
    excitation) the far pixels balance each other and weaken the offset.
    """
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(_PICTURES, encoder.in_channels, *size, generator=generator)
    noise = noise.to(next(encoder.parameters()).device).requires_grad_()
    (features,) = encoder.feature_maps(noise, [layer])  # (B, E, h, w)
    h, w = features.shape[-2:]
    middle = [(row, column) for row in _middle(h) for column in _middle(w)]
    signs = torch.randint(0, 2, features.shape[:2], generator=generator).to(features) * 2 - 1
    offsets = []
    for row, column in middle:
        unit = (signs * features[..., row, column]).sum()
        (gradient,) = torch.autograd.grad(unit, noise, retain_graph=True)
        weight = gradient.square().sum((0, 1))  # (H, W)
        cell = (row + 0.5) * size[0] / h - 0.5, (column + 0.5) * size[1] / w - 0.5
        offsets.append([_centre(weight.sum(1)) - cell[0], _centre(weight.sum(0)) - cell[1]])
    return torch.tensor(offsets, device=noise.device).mean(0)


def _middle(count: int) -> range:
    """The middle unit, or the middle two, whose cells lie evenly about the picture's centre."""
    return range((count - 1) // 2, count // 2 + 1)


def _centre(weight: Tensor) -> float:
    """Centre of mass of (N,) weights, in pixels; the middle where there is no mass."""
    position = torch.arange(len(weight), device=weight.device, dtype=weight.dtype)
    total = float(weight.sum())
    return float(weight @ position) / total if total > 0 else (len(weight) - 1) / 2
