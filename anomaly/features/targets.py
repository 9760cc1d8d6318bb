"""What a frozen encoder says of a picture, as the target that a student learns to match."""

from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from medssl.models.encoder import Encoder, frozen
from medssl.models.folder import load_encoder

_SIDE = 224  # pixels of the picture that layers are measured on: whole patches of 14, 16 and 32


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


def cosine_distance(student: Tensor, teacher: Tensor) -> Tensor:
    """1 - cosine of the features (B, E, *grid) at each position: (B, *grid) within [0, 2]."""
    return 1 - F.cosine_similarity(student, teacher, dim=1)
