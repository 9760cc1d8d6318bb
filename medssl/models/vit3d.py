"""3D vision transformers of timm's blocks, and 2D weights inflated for them."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar, Self

import torch
import torch.nn.functional as F
from timm.layers import LayerNorm, resample_patch_embed
from timm.models.vision_transformer import Block, init_weights_vit_timm
from torch import Tensor, nn

from medssl.models.encoder import Encoder
from medssl.models.vit import as_timm, with_channels
from medssl.models.weights import fit_weights, read_state_dict

Sides = tuple[int, int, int]
_KERNEL = "patch_embed.proj.weight"


class ViT3DEncoder(Encoder):
    """A plain vision transformer over volumes; its embedding is the normalized class token.

    image_size: voxels (D, H, W), whose patches have a learnt position each; for others positions
        are interpolated, so volumes may have any size that is whole patches.
    patch_size: voxels (D, H, W); thin along D where slices are thick.
    in_channels: channels of the volumes it takes.
    depth, num_heads: blocks, and heads of each; num_heads divides embedding_dim.
    registers: tokens that belong to no patch (Darcet et al., https://arxiv.org/abs/2309.16588).
    layer_scale: what LayerScale begins with, such as DINOv2's 1e-5; None is without.
    drop_path: largest rate of stochastic depth, reached in the last block.
    weights: a local state dict, .safetensors or .pth: of this class, or of a 2D vision transformer
        by the names that `medssl.models.vit.ViTEncoder` takes; see `inflated`.
    """

    born_from: ClassVar[frozenset[str]] = frozenset({"weights"})
    axes: ClassVar[str] = "DHW"
    network: "_ViT3D"

    def __init__(
        self,
        image_size: Sides,
        *,
        patch_size: Sides = (8, 16, 16),
        in_channels: int = 1,
        embedding_dim: int = 384,
        depth: int = 12,
        num_heads: int = 6,
        registers: int = 0,
        layer_scale: float | None = None,
        drop_path: float = 0.0,
        weights: Path | None = None,
    ) -> None:
        super().__init__()
        self.image_size = _sides("image_size", image_size)
        self.patch_size = _sides("patch_size", patch_size)
        self.in_channels, self.embedding_dim = in_channels, embedding_dim
        self.depth, self.num_heads, self.registers = depth, num_heads, registers
        self.layer_scale, self.drop_path = layer_scale, drop_path
        blocks = [
            Block(embedding_dim, num_heads, qkv_bias=True, init_values=layer_scale, drop_path=rate)
            for rate in torch.linspace(0, drop_path, depth).tolist()
        ]
        patch_embed = _PatchEmbed(in_channels, embedding_dim, self.patch_size)
        self.network = _ViT3D(patch_embed, blocks, patch_embed.grid(self.image_size), registers)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, embedding_dim))
        if weights is not None:
            self._load(weights)

    def forward(self, images: Tensor) -> Tensor:
        """images: (B, C, D, H, W), preprocessed. Returns the class token (B, E)."""
        return self.tokens(images)[0]

    def tokens(self, images: Tensor, hidden: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The class token (B, E) and the patch tokens (B, N, E), normalized.

        hidden: (B, N) bool, patches that the network does not see; slab by slab, row by row.
        """
        patches = self.network.patch_embed(images)  # (B, E, d, h, w)
        if hidden is not None:
            covered = hidden.view(len(patches), 1, *patches.shape[2:])
            mask_token = self.mask_token.view(1, -1, 1, 1, 1).to(patches.dtype)
            patches = torch.where(covered, mask_token, patches)
        found = self.network.transform(patches)
        return found[:, 0], found[:, self.network.num_prefix_tokens :]

    def grid(self, size: Sequence[int]) -> Sides:
        """Patches (d, h, w) of a volume of `size` (D, H, W) voxels."""
        return self.network.patch_embed.grid(size)

    def embed_with_map(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """As of `Encoder`; the map is (B, E, d, h, w)."""
        token, patches = self.tokens(images)
        return token, patches.mT.unflatten(2, self.grid(images.shape[2:]))

    def selftest_shape(self, size: Sequence[int]) -> tuple[int, ...]:
        """As of `Encoder`; volumes of the size whose patches have learnt positions."""
        return (2, self.in_channels, *self.image_size)

    def _as_grid(self, output: Tensor, images: Tensor) -> Tensor:
        if output.ndim != 3:
            return output
        patches = output[:, self.network.num_prefix_tokens :]  # (B, N, E)
        return patches.mT.unflatten(2, self.grid(images.shape[2:]))

    def _load(self, file: Path) -> None:
        read = read_state_dict(file)
        state = as_timm({name.removeprefix("network."): read[name] for name in read})
        mask = state.pop("mask_token", None)
        if _KERNEL in state and state[_KERNEL].ndim == 4:
            state[_KERNEL] = with_channels(state[_KERNEL], self.in_channels)
            state = inflated(state, patch_size=self.patch_size, grid=self.network.grid)
        fit_weights(self.network, state, name=file.name, ignore=("head.",))
        if mask is not None:
            with torch.no_grad():
                self.mask_token.copy_(mask.reshape(1, 1, -1))

    @classmethod
    def example(cls) -> tuple[Self, Tensor]:
        """Two narrow blocks on one-channel noise."""
        encoder = cls((16, 32, 32), embedding_dim=32, depth=2, num_heads=2)
        return encoder, torch.randn(2, 1, 16, 32, 32)


def inflated(state: dict[str, Tensor], *, patch_size: Sides, grid: Sides) -> dict[str, Tensor]:
    """The state of a 2D vision transformer, by timm's names, for volumes of patches (d, h, w).

    The kernel (E, C, p, p) is repeated along D and divided by the depth of a patch, so that a
    volume that repeats a slice has the slice's patch embeddings (I3D: Carreira & Zisserman, CVPR
    2017, https://arxiv.org/abs/1705.07750, sec. 2.1). In the plane it is resampled so that a patch
    that is resized (bicubic) keeps its embedding (FlexiViT: Beyer et al., CVPR 2023,
    https://arxiv.org/abs/2212.08013). Positions are interpolated in the plane as of `ViTEncoder`
    and repeated along D; the class token takes up its own. Where d is 1 the network is the 2D one.
    Raises ValueError for positions that are of no square picture.
    """
    kernel = resample_patch_embed(state[_KERNEL], list(patch_size[1:]))
    kernel = kernel[:, :, None].repeat(1, 1, patch_size[0], 1, 1) / patch_size[0]
    found = {**state, _KERNEL: kernel}
    if not {"pos_embed", "cls_token"} <= state.keys():
        return found  # whoever loads it names what is missing
    position = state["pos_embed"]  # (1, 0 or 1 of the class token + N, E)
    side = math.isqrt(position.shape[1])
    of_class = position.shape[1] - side**2
    if of_class > 1:
        raise ValueError(
            "expected positions of a square of patches, with or without one of the class token, "
            f"got {position.shape[1]}; take the weights of a network for square pictures"
        )
    if of_class:
        found["cls_token"] = state["cls_token"] + position[:, :1]
    plane = position[:, of_class:].mT.unflatten(2, (side, side)).float()  # (1, E, side, side)
    if grid[1:] != (side, side):
        plane = F.interpolate(plane, grid[1:], mode="bicubic", align_corners=False)
    found["pos_embed"] = plane[:, :, None].expand(-1, -1, grid[0], -1, -1).flatten(2).mT
    return found


class _PatchEmbed(nn.Module):
    """Volumes (B, C, D, H, W) to the embeddings of their patches (B, E, d, h, w)."""

    def __init__(self, in_channels: int, embedding_dim: int, patch_size: Sides) -> None:
        super().__init__()
        self.patch_size = patch_size
        self.proj = nn.Conv3d(in_channels, embedding_dim, patch_size, patch_size)

    def forward(self, images: Tensor) -> Tensor:
        self.grid(images.shape[2:])  # a convolution would drop what is no whole patch
        return self.proj(images)

    def grid(self, size: Sequence[int]) -> Sides:
        d, h, w = _sides("the size of a volume", size)
        depth, height, width = self.patch_size
        if d % depth or h % height or w % width:
            raise ValueError(
                f"expected volumes (D, H, W) of whole patches of {self.patch_size} voxels, got "
                f"{(d, h, w)}; change the size of preprocessing or of the crops, or patch_size"
            )
        return d // depth, h // height, w // width


class _ViT3D(nn.Module):
    """The transformer, its parameters by timm's names; only patches have a position.

    grid: patches (d, h, w) with a learnt position each.
    """

    def __init__(
        self, patch_embed: _PatchEmbed, blocks: Sequence[nn.Module], grid: Sides, registers: int
    ) -> None:
        super().__init__()
        width = patch_embed.proj.out_channels
        self.grid, self.num_prefix_tokens = grid, 1 + registers
        self.patch_embed = patch_embed
        self.cls_token = nn.Parameter(1e-6 * torch.randn(1, 1, width))
        self.reg_token = (
            nn.Parameter(1e-6 * torch.randn(1, registers, width)) if registers else None
        )
        self.pos_embed = nn.Parameter(torch.empty(1, math.prod(grid), width))
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        self.blocks = nn.Sequential(*blocks).apply(init_weights_vit_timm)
        self.norm = LayerNorm(width)

    def forward(self, images: Tensor) -> Tensor:
        return self.transform(self.patch_embed(images))

    def transform(self, patches: Tensor) -> Tensor:
        """(B, E, d, h, w) to class, register and patch tokens (B, 1 + R + N, E), normalized."""
        d, h, w = patches.shape[2:]
        tokens = [
            token.expand(len(patches), -1, -1)
            for token in (self.cls_token, self.reg_token)
            if token is not None
        ]
        placed = patches.flatten(2).mT + self._positions((d, h, w))
        return self.norm(self.blocks(torch.cat([*tokens, placed], dim=1)))

    def _positions(self, grid: Sides) -> Tensor:
        if grid == self.grid:
            return self.pos_embed
        volume = self.pos_embed.mT.unflatten(2, self.grid).float()  # (1, E, d, h, w)
        volume = F.interpolate(volume, grid, mode="trilinear", align_corners=False)
        return volume.flatten(2).mT.to(self.pos_embed.dtype)


def _sides(name: str, sides: Sequence[int]) -> Sides:
    """As a tuple: a saved model's description gives a list."""
    if len(sides) != 3:
        raise ValueError(f"{name} is (D, H, W), three sides in voxels, got {tuple(sides)}")
    d, h, w = sides
    return d, h, w
