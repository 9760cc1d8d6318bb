"""2D vision transformers of timm whose patches can be hidden, and DINOv2's weights for them."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, Self, cast

import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from medssl.models.encoder import Encoder
from medssl.models.weights import fit_weights, read_state_dict


class ViTEncoder(Encoder):
    """Any plain vision transformer of timm; its embedding is the normalized class token.

    name: timm's, such as vit_small_patch16_224 or vit_base_patch14_dinov2.
    in_channels: channels of the pictures it takes.
    image_size: pixels, the side whose patches have a learnt position each; for others positions are
        interpolated, so pictures may have any size that is whole patches.
    weights: a local state dict, .safetensors or .pth, by the names of timm, of DINOv2's authors or
        of Hugging Face's Dinov2Model (as RAD-DINO's); of color pictures too, see `with_channels`.
    drop_path: largest rate of stochastic depth, reached in the last block.
    options: further arguments of timm.create_model.

    Real DINOv2 and RAD-DINO files were not at hand: names and values are tested against randomly
    initialized models of transformers.
    """

    born_from: ClassVar[frozenset[str]] = frozenset({"weights"})

    def __init__(
        self,
        name: str,
        *,
        in_channels: int = 1,
        image_size: int = 224,
        weights: Path | None = None,
        drop_path: float = 0.0,
        options: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        import timm

        self.name, self.in_channels, self.image_size = name, in_channels, image_size
        self.drop_path, self.options = drop_path, options or {}
        if not timm.is_model(name):
            near = ", ".join(timm.list_models(f"*{name[:6]}*")[:8])
            raise ValueError(f"timm has no network {name!r}; near names: {near or 'none'}")
        network = timm.create_model(
            name,
            pretrained=False,
            num_classes=0,
            in_chans=in_channels,
            img_size=image_size,
            dynamic_img_size=True,
            drop_path_rate=drop_path,
            **self.options,
        )
        if type(network) is not VisionTransformer or network.cls_token is None:
            raise ValueError(f"{name} is no plain vision transformer with a class token")
        network.__class__ = _PlainPositions
        self.network = network
        self.embedding_dim = int(network.num_features)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, self.embedding_dim))
        if weights is not None:
            self._load(weights)

    @property
    def depth(self) -> int:
        """Number of blocks."""
        return len(cast(Any, self.network).blocks)

    def forward(self, images: Tensor) -> Tensor:
        """images: (B, C, H, W), preprocessed. Returns the class token (B, E)."""
        return self.tokens(images)[0]

    def tokens(self, images: Tensor, hidden: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The class token (B, E) and the patch tokens (B, N, E), normalized.

        hidden: (B, N) bool, patches that the network does not see; row by row.
        """
        network = cast(Any, self.network)
        self._check_size(images)
        patches = network.patch_embed(images)  # (B, h, w, E)
        if hidden is not None:
            covered = hidden.view(*patches.shape[:3], 1)
            patches = torch.where(covered, self.mask_token.to(patches.dtype), patches)
        found = network.norm_pre(network.patch_drop(network._pos_embed(patches)))
        for block in network.blocks:
            found = block(found)
        found = network.norm(found)
        return found[:, 0], found[:, network.num_prefix_tokens :]

    def grid(self, size: Sequence[int]) -> tuple[int, int]:
        """Patches (h, w) of a picture of `size` (H, W) pixels."""
        patch = int(cast(Any, self.network).patch_embed.patch_size[0])
        height, width = size
        return height // patch, width // patch

    def embed_with_map(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """As of `Encoder`."""
        token, patches = self.tokens(images)
        return token, patches.mT.unflatten(2, self.grid(images.shape[2:]))

    def _check_size(self, images: Tensor) -> None:
        patch = int(cast(Any, self.network).patch_embed.patch_size[0])
        if any(side % patch for side in images.shape[-2:]):
            raise ValueError(
                f"{self.name} takes sizes that are multiples of {patch} pixels, got "
                f"{tuple(images.shape[-2:])}; change the size of preprocessing or of the crops"
            )

    def _load(self, file: Path) -> None:
        state = as_timm(read_state_dict(file))
        mask = state.pop("mask_token", None)
        key = "patch_embed.proj.weight"
        if key in state:
            state[key] = with_channels(state[key], self.in_channels)
        ignored = ("head.", "fc_norm.", "norm_pre.")
        fit_weights(self.network, state, name=file.name, ignore=ignored)
        if mask is not None:
            with torch.no_grad():
                self.mask_token.copy_(mask.reshape(1, 1, -1))

    @classmethod
    def example(cls) -> tuple[Self, Tensor]:
        """timm's smallest transformer on one-channel noise."""
        return cls("test_vit", image_size=64), torch.randn(2, 1, 64, 64)


def as_timm(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A vision transformer's state by timm's names, from those of transformers' Dinov2Model
    (published files, and of version 5) or of DINOv2's authors."""
    renamed: dict[str, Tensor] = {}
    parts: dict[str, dict[str, Tensor]] = {}
    for name, tensor in state.items():
        new = name.removeprefix("dinov2.")
        for pattern, replacement in _NAMES:
            new = re.sub(pattern, replacement, new)
        found = re.match(r"(.*\.qkv)_(query|key|value)\.(weight|bias)$", new)
        if found is None:
            renamed[new] = tensor
        else:
            parts.setdefault(f"{found[1]}.{found[3]}", {})[found[2]] = tensor
    for name, of in parts.items():
        if set(of) != {"query", "key", "value"}:
            raise ValueError(f"the weights hold only {sorted(of)} of {name}; the file is not whole")
        renamed[name] = torch.cat([of[part] for part in ("query", "key", "value")])
    return renamed


def with_channels(weight: Tensor, channels: int) -> Tensor:
    """A first convolution (E, 3, h, w) for another number of channels, (E, channels, h, w).

    The colors are added and spread evenly, so that a picture that repeats one grey channel gives
    what the three equal colors gave.
    """
    if weight.shape[1] == channels:
        return weight
    return weight.sum(1, keepdim=True).repeat(1, channels, 1, 1) / channels


class _PlainPositions(VisionTransformer):
    """Interpolates positions as DINOv2 and transformers do: bicubic, without antialiasing, which
    timm's own way has, and which matters where a picture has fewer patches than positions."""

    def _pos_embed(self, x: Tensor) -> Tensor:
        batch, height, width, _ = x.shape
        position = cast(Tensor, self.pos_embed)
        prefix = 0 if self.no_embed_class else self.num_prefix_tokens
        before, of_patches = position[:, :prefix], position[:, prefix:]
        if (height, width) != self.patch_embed.grid_size:
            grid = of_patches.mT.unflatten(2, self.patch_embed.grid_size).float()
            grid = F.interpolate(grid, (height, width), mode="bicubic", align_corners=False)
            of_patches = grid.flatten(2).mT.to(position.dtype)
        tokens = [
            token.expand(batch, -1, -1)
            for token in (self.cls_token, self.reg_token)
            if token is not None
        ]
        patches = x.flatten(1, 2)
        if self.no_embed_class:
            return self.pos_drop(torch.cat([*tokens, patches + of_patches], dim=1))
        return self.pos_drop(
            torch.cat([*tokens, patches], dim=1) + torch.cat([before, of_patches], dim=1)
        )


_NAMES = (
    (r"^embeddings\.(cls_token|mask_token)", r"\1"),
    (r"^embeddings\.register_tokens|^register_tokens", "reg_token"),
    (r"^embeddings\.position_embeddings", "pos_embed"),
    (r"^embeddings\.patch_embeddings\.projection", "patch_embed.proj"),
    (r"^encoder\.layer\.", "blocks."),
    (r"\.attention\.attention\.(query|key|value)\.", r".attn.qkv_\1."),
    (r"\.attention\.q_proj\.", ".attn.qkv_query."),
    (r"\.attention\.k_proj\.", ".attn.qkv_key."),
    (r"\.attention\.v_proj\.", ".attn.qkv_value."),
    (r"\.attention\.(output\.dense|o_proj)\.", ".attn.proj."),
    (r"\.layer_scale([12])\.lambda1", r".ls\1.gamma"),
    (r"^layernorm\.", "norm."),
)
