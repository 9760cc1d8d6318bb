"""A decoder of tokens whose attention cannot look at one place only.

Linear attention is that of Katharopoulos et al., ICML 2020, https://arxiv.org/abs/2006.16236; its
use here, and the noisy bottleneck, are of Dinomaly (Guo et al., CVPR 2025,
https://arxiv.org/abs/2405.14325, sec. 3.2 and 3.3).
"""

import torch.nn.functional as F
from torch import Tensor, nn


def linear_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Attention with weights proportional to phi(q) . phi(k), phi = elu + 1, in linear time.

    All (..., N, E); the tokens beside the first of the pair share keys and values. Returns
    (..., N, E); its cost grows with N E^2, not N^2 E.
    """
    query, key = F.elu(query) + 1, F.elu(key) + 1  # positive
    total = key.sum(-2, keepdim=True)  # (..., 1, E)
    scale = (query * total).sum(-1, keepdim=True)  # (..., N, 1), sum of the weights
    return query @ (key.mT @ value) / scale


class LinearBlock(nn.Module):
    """A transformer block with linear attention: normalize, attend, normalize, two layers.

    width: E. num_heads: divides the width.
    """

    def __init__(self, width: int, *, num_heads: int, mlp_ratio: float = 4.0) -> None:
        super().__init__()
        if width % num_heads:
            raise ValueError(
                f"num_heads ({num_heads}) must divide the width of the tokens ({width})"
            )
        self.num_heads = num_heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.project = nn.Linear(width, 3 * width), nn.Linear(width, width)
        hidden = int(mlp_ratio * width)
        self.mlp = nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width))

    def forward(self, tokens: Tensor) -> Tensor:
        """tokens: (B, N, E), and so is what it returns."""
        query, key, value = (
            part.unflatten(2, (self.num_heads, -1)).transpose(1, 2)  # (B, heads, N, E / heads)
            for part in self.qkv(self.norm1(tokens)).chunk(3, dim=2)
        )
        attended = linear_attention(query, key, value).transpose(1, 2).flatten(2)
        tokens = tokens + self.project(attended)
        return tokens + self.mlp(self.norm2(tokens))


class NoisyDecoder(nn.Module):
    """Two layers with dropout, whose noise is the bottleneck, then blocks of linear attention.

    width: E. depth: blocks. dropout: of what enters each of the two layers, and of what leaves.
    """

    def __init__(self, width: int, *, depth: int, num_heads: int, dropout: float) -> None:
        super().__init__()
        self.bottleneck = nn.Sequential(
            nn.Dropout(dropout),
            nn.Linear(width, 4 * width),
            nn.GELU(),
            nn.Dropout(dropout),
            nn.Linear(4 * width, width),
            nn.Dropout(dropout),
        )
        self.blocks = nn.ModuleList(LinearBlock(width, num_heads=num_heads) for _ in range(depth))
        self.apply(_initialize)

    def forward(self, tokens: Tensor) -> list[Tensor]:
        """tokens: (B, N, E). Returns the same shape from each block, the first block's first."""
        found = self.bottleneck(tokens)
        given = []
        for block in self.blocks:
            found = block(found)
            given.append(found)
        return given


def _initialize(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.01, a=-0.03, b=0.03)
        nn.init.zeros_(module.bias)
