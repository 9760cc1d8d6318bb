"""What a frozen encoder says of a picture, as the target that a student learns to match."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from anomaly.maps import outside_is_nan
from medssl.data.sample import ImageBatch, Sample
from medssl.models.encoder import Encoder, frozen
from medssl.models.folder import load_encoder

_SIDE = 224  # pixels of the picture that layers are measured on: whole patches of 14, 16 and 32


@dataclass(frozen=True, slots=True)
class WholeImage:
    """The image of a sample as it is, for a training on images of one size."""

    def __call__(self, sample: Sample, generator: torch.Generator) -> dict[str, Tensor]:
        """Returns "image" (C, *spatial), 0 where it is not valid, and "valid" (*spatial) bool."""
        image = sample.images["image"]
        valid = image.valid
        if valid is None:
            valid = torch.ones(image.spatial_shape, dtype=torch.bool)
        return {"image": torch.where(valid, image.pixels, 0.0), "valid": valid}


class FrozenEncoder:
    """An encoder that is asked and never trained, and the layers it is asked for.

    It is no module, so a network that learns from it neither trains nor saves it again.

    encoder: frozen; of pictures or volumes. layers: modules of its network.
    """

    def __init__(self, encoder: Encoder, layers: Sequence[str]) -> None:
        if not layers:
            raise ValueError("layers must name at least one module of the encoder's network")
        self.encoder = encoder
        self.layers = list(layers)

    @torch.no_grad()
    def __call__(self, images: Tensor) -> list[Tensor]:
        """Feature maps (B, E, *grid) of images (B, C, *spatial), one per layer."""
        if images.shape[1] != self.encoder.in_channels:
            raise ValueError(
                f"the encoder takes {self.encoder.in_channels} channels, got {images.shape[1]}; "
                "set channels in the preprocessing"
            )
        if next(self.encoder.parameters()).device != images.device:  # of another process's share
            self.encoder.to(images.device)
        return self.encoder.feature_maps(images, self.layers)

    def shapes(self) -> list[tuple[int, ...]]:
        """(E, *grid) of each layer, for a picture of 224 pixels or the encoder's own volume."""
        size = self.encoder.selftest_shape((_SIDE, _SIDE))
        device = next(self.encoder.parameters()).device
        return [tuple(found.shape[1:]) for found in self(torch.zeros(1, *size[1:], device=device))]


def frozen_encoder(encoder: Encoder | Path) -> Encoder:
    """The encoder, or that of the folder `medssl pretrain` wrote, ready to be asked only."""
    return frozen(load_encoder(encoder) if isinstance(encoder, Path) else encoder)


def filled(images: ImageBatch) -> Tensor:
    """The pixels (B, C, *spatial) of a batch, 0 where they are not valid, as of `WholeImage`."""
    return torch.where(images.valid[:, None], images.pixels, 0.0)


def maps_by_size(images: ImageBatch, found: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """Maps (B, *spatial) of images that are scored without their padding, NaN outside `valid`.

    found: pixels (b, C, *size), 0 where they are not valid, and valid (b, *size) to maps
        (b, *size); called once per size.
    """
    maps = torch.full(images.valid.shape, torch.nan, device=images.pixels.device)
    for size in dict.fromkeys(images.sizes):
        rows = [i for i, own in enumerate(images.sizes) if own == size]
        inside: tuple[Any, ...] = (..., *(slice(side) for side in size))
        valid = images.valid[rows][inside]
        own = found(torch.where(valid[:, None], images.pixels[rows][inside], 0.0), valid)
        part = maps[inside]  # a view
        part[rows] = outside_is_nan(own, valid)
    return maps


def cosine_distance(student: Tensor, teacher: Tensor) -> Tensor:
    """1 - cosine of the features (B, E, *grid) at each position: (B, *grid) within [0, 2]."""
    return 1 - F.cosine_similarity(student, teacher, dim=1)


def mean_over_valid(values: Tensor, valid: Tensor) -> Tensor:
    """Mean of the values (B, *grid) at the positions that `valid`, bool, has: (B,), 0 at none."""
    total = torch.where(valid, values, 0.0).flatten(1).sum(1)
    return total / valid.flatten(1).sum(1).clamp(min=1)


def largest(maps: Tensor, share: float = 0.0) -> Tensor:
    """Mean of the largest values of each map (B, *spatial), NaN left out: (B,), NaN where all are.

    share: of the values that are not NaN, rounded down; at least the largest one counts.
    """
    known = (~maps.isnan()).flatten(1).sum(1, keepdim=True)  # (B, 1)
    counts = (share * known).long().clamp(min=1)
    order = maps.flatten(1).nan_to_num(-torch.inf).topk(int(counts.max()), dim=1).values
    taken = torch.arange(order.shape[1], device=maps.device) < counts
    mean = torch.where(taken, order, 0.0).sum(1, keepdim=True) / counts
    return torch.where(known > 0, mean, torch.nan)[:, 0]
