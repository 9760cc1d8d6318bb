"""Residual networks of MONAI over volumes."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from medssl.models.encoder import Encoder
from medssl.models.weights import fit_weights, read_state_dict

DEPTHS = (10, 18, 34, 50, 101, 152, 200)


class MONAIEncoder(Encoder):
    """A 3D residual network of MONAI (as of Med3D, https://arxiv.org/abs/1904.00625); its embedding
    is the mean of the last feature map.

    depth: 10, 18, 34, 50, 101, 152 or 200 layers.
    in_channels: channels of the volumes it takes.
    size: voxels (D, H, W) that its self-test is run on; it takes others too.
    weights: a local state dict, .safetensors or .pth, by MONAI's names or MedicalNet's, which begin
        with "module."; a classifier in it is left out.
    """

    born_from: ClassVar[frozenset[str]] = frozenset({"weights"})
    axes: ClassVar[str] = "DHW"
    network: Any

    def __init__(
        self,
        depth: int,
        *,
        in_channels: int = 1,
        size: tuple[int, int, int] = (32, 96, 96),
        weights: Path | None = None,
    ) -> None:
        super().__init__()
        from monai.networks import nets

        if depth not in DEPTHS:
            raise ValueError(f"depth must be one of {DEPTHS}, got {depth}")
        self.depth, self.in_channels, self.size = depth, in_channels, tuple(size)
        make = getattr(nets, f"resnet{depth}")
        self.network = make(
            spatial_dims=3, n_input_channels=in_channels, feed_forward=False, shortcut_type="B"
        )
        self.embedding_dim = int(self.network.bn1.num_features) * 8 * (1 if depth < 50 else 4)
        if weights is not None:
            state = {k.removeprefix("module."): v for k, v in read_state_dict(weights).items()}
            fit_weights(self.network, state, name=weights.name, ignore=("fc.", "conv_seg."))

    def forward(self, images: Tensor) -> Tensor:
        """images: (B, C, D, H, W), preprocessed. Returns the mean of the last map (B, E)."""
        return self.embed_with_map(images)[0]

    def embed_with_map(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """As of `Encoder`; the map is (B, E, d, h, w)."""
        (features,) = self.feature_maps(images, ["layer4"])
        return features.mean((2, 3, 4)), features

    def selftest_shape(self, size: Sequence[int]) -> tuple[int, ...]:
        """As of `Encoder`; volumes of the size that was given."""
        return (2, self.in_channels, *self.size)

    def _as_grid(self, output: Tensor, images: Tensor) -> Tensor:
        return output

    @classmethod
    def example(cls) -> tuple[Self, Tensor]:
        """The shallowest, on one-channel noise."""
        return cls(10, size=(8, 32, 32)), torch.randn(2, 1, 8, 32, 32)
