"""Masked autoencoders (MAE: He et al., CVPR 2022, https://arxiv.org/abs/2111.06377).

The encoder sees the patches that are shown and nothing else; a small decoder gives those that are
hidden. Pictures (H, W) and volumes (D, H, W) alike.
"""

from collections.abc import Sequence
from math import prod

import torch
import torch.nn.functional as F
from torch import Tensor, nn

NORM_EPS = 1e-6  # of every LayerNorm, as in MAE


class MaskedTransformer(nn.Module):
    """An encoder over the shown patches and a decoder over all of them.

    in_channels: channels of the images. patch_size: pixels, one per axis.
    encoder: blocks (B, n, E) -> (B, n, E). E is embedding_dim.
    decoder: (B, N, E') and a list of levels (B, n, E) -> (B, N, E'). E' is decoder_dim.
    levels: encoder blocks, counted from 0, whose outputs the decoder gets besides that of the last.
    Differs from MAE: no class token; sizes may vary, since positions are computed for the grid.
    """

    def __init__(
        self,
        *,
        in_channels: int,
        patch_size: Sequence[int],
        embedding_dim: int,
        decoder_dim: int,
        encoder: Sequence[nn.Module],
        decoder: nn.Module,
        levels: Sequence[int] = (),
    ) -> None:
        super().__init__()
        self.patch_size, self.levels = list(patch_size), list(levels)
        width = in_channels * prod(patch_size)
        self.in_channels = in_channels
        self.embed = nn.Linear(width, embedding_dim)
        self.encoder = nn.ModuleList(encoder)
        self.norm = nn.LayerNorm(embedding_dim, eps=NORM_EPS)
        self.decoder_embed = nn.Linear(embedding_dim, decoder_dim)
        self.mask_token = nn.Parameter(0.02 * torch.randn(decoder_dim))
        self.decoder = decoder
        self.decoder_norm = nn.LayerNorm(decoder_dim, eps=NORM_EPS)
        self.head = nn.Linear(decoder_dim, width)
        self.apply(_xavier)

    def grid(self, size: Sequence[int]) -> tuple[int, ...]:
        """Patches per axis of an image of `size` pixels. Raises ValueError where not whole."""
        return grid_of(size, self.patch_size)

    def forward(self, images: Tensor, hidden: Tensor) -> Tensor:
        """What every patch is taken to be, whether it was hidden or shown.

        images: (B, C, *spatial). hidden: (B, N) bool, row by row, as many True in each row.
        Returns patches (B, N, C p p), as of `patchify`.
        """
        if images.shape[1] != self.in_channels:
            raise ValueError(
                f"expected {self.in_channels} channels, got {images.shape[1]}; set channels in the "
                "preprocessing or in_channels"
            )
        grid = self.grid(images.shape[2:])
        shown = shown_patches(hidden)  # (B, n)
        tokens, levels = self._encoded(patchify(images, self.patch_size), shown, grid)
        return self._decoded(tokens, levels, shown, grid)

    def _encoded(
        self, patches: Tensor, shown: Tensor, grid: Sequence[int]
    ) -> tuple[Tensor, list[Tensor]]:
        """The shown patches' tokens after the last block, and those of the levels, (B, n, E)."""
        tokens = self.embed(_picked(patches, shown))
        tokens = tokens + sincos_positions(grid, tokens.shape[-1], tokens)[shown]
        levels = []
        for i, block in enumerate(self.encoder):
            tokens = block(tokens)
            if i in self.levels:
                levels.append(tokens)
        return self.norm(tokens), levels

    def _decoded(
        self, tokens: Tensor, levels: list[Tensor], shown: Tensor, grid: Sequence[int]
    ) -> Tensor:
        found = self.decoder_embed(tokens)  # (B, n, E')
        every = self.mask_token.to(found.dtype).expand(len(found), prod(grid), -1)
        every = every.scatter(1, shown[..., None].expand_as(found), found)
        every = every + sincos_positions(grid, found.shape[-1], found)
        return self.head(self.decoder_norm(self.decoder(every, levels)))


class PlainDecoder(nn.Module):
    """The decoder of MAE: blocks of self-attention over all patches, and no further levels."""

    def __init__(self, blocks: Sequence[nn.Module]) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)

    def forward(self, tokens: Tensor, levels: list[Tensor]) -> Tensor:
        """tokens: (B, N, E'). Returns as many."""
        for block in self.blocks:
            tokens = block(tokens)
        return tokens


def grid_of(size: Sequence[int], patch_size: Sequence[int]) -> tuple[int, ...]:
    """Patches per axis of an image. Raises ValueError where they are not whole."""
    whole = len(size) == len(patch_size) and not any(
        side % patch for side, patch in zip(size, patch_size, strict=True)
    )
    if not whole:
        raise ValueError(
            f"expected images of whole patches of {tuple(patch_size)} pixels, got {tuple(size)}; "
            "change the size of preprocessing, or patch_size"
        )
    return tuple(side // patch for side, patch in zip(size, patch_size, strict=True))


def patchify(images: Tensor, patch_size: Sequence[int]) -> Tensor:
    """Images (B, C, *spatial) cut into patches (B, N, C p p), row by row; channels come first."""
    grid = grid_of(images.shape[2:], patch_size)
    axes = len(grid)
    sides = [side for pair in zip(grid, patch_size, strict=True) for side in pair]
    cut = images.reshape(*images.shape[:2], *sides)  # (B, C, h, p, w, p)
    places, inside = range(2, 2 + 2 * axes, 2), range(3, 3 + 2 * axes, 2)
    return cut.permute(0, *places, 1, *inside).flatten(1 + axes).flatten(1, axes)


def unpatchify(patches: Tensor, patch_size: Sequence[int], grid: Sequence[int]) -> Tensor:
    """The inverse of `patchify`: (B, N, C p p) on a grid (h, w) to (B, C, *spatial)."""
    axes = len(grid)
    cut = patches.reshape(len(patches), *grid, -1, *patch_size)  # (B, h, w, C, p, p)
    order = [axis for i in range(axes) for axis in (1 + i, 2 + axes + i)]
    whole = [cells * side for cells, side in zip(grid, patch_size, strict=True)]
    return cut.permute(0, 1 + axes, *order).reshape(len(patches), -1, *whole)


def shown_patches(hidden: Tensor) -> Tensor:
    """Numbers (B, n) of the patches that `hidden`, (B, N) bool, leaves, in order.

    Raises ValueError where the rows do not leave equally many, or none.
    """
    counts = (~hidden).sum(1)
    count = int(counts[0])
    if count == 0 or (counts != count).any():
        raise ValueError(
            "every image must show equally many patches, at least one, got "
            f"{counts.unique().tolist()}"
        )
    return hidden.to(torch.uint8).argsort(dim=1, stable=True)[:, :count]


def sincos_positions(grid: Sequence[int], width: int, like: Tensor) -> Tensor:
    """Sine and cosine positions (N, width) of the cells of a grid, row by row, as in MAE.

    Each axis has an equal share of the width, half sines and half cosines; what is left over of a
    width that cannot be shared so is 0.
    """
    waves = width // (2 * len(grid))
    if waves == 0:
        raise ValueError(
            f"positions of {len(grid)} axes need {2 * len(grid)} channels, got {width}"
        )
    steps = torch.arange(max(waves, *grid), dtype=torch.float32, device=like.device)
    rates = 10_000 ** -(steps[:waves] / waves)
    cells = torch.cartesian_prod(*[steps[:side] for side in grid])
    phases = cells.reshape(-1, len(grid), 1) * rates  # (N, axes, waves)
    found = torch.cat([phases.sin(), phases.cos()], dim=2).flatten(1)
    return F.pad(found, (0, width - found.shape[1])).to(like.dtype)


def _picked(tokens: Tensor, chosen: Tensor) -> Tensor:
    """Rows `chosen`, (B, n), of tokens (B, N, E)."""
    return tokens.gather(1, chosen[..., None].expand(-1, -1, tokens.shape[-1]))


def _xavier(module: nn.Module) -> None:
    """The weights that MAE begins with."""
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
