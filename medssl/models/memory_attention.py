"""Attention with learnt memory, and attention to several levels of an encoder at once.

Cornia et al., Meshed-Memory Transformer, CVPR 2020, https://arxiv.org/abs/1912.08226; in a masked
autoencoder by MemMC-MAE (Tian et al., MLMI 2023, https://arxiv.org/abs/2203.11725).
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medssl.models.masked_transformer import NORM_EPS


class MemoryAttention(nn.Module):
    """Self-attention whose keys and values go on with learnt ones, the same for every image.

    num_memory: rows M of memory; 0 is plain self-attention.
    The memory is joined after the projection and split among the heads like the rest. Keys begin
    as N(0, 1 / d) and values as N(0, 1 / M), where d is the width of a head, and are multiplied by
    sqrt(d) and sqrt(M) in use (the code of Cornia et al. takes these variances for deviations).
    """

    def __init__(self, width: int, num_heads: int, *, num_memory: int = 0) -> None:
        super().__init__()
        self.num_heads = _checked_heads(width, num_heads)
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        self.key_scale, self.value_scale = math.sqrt(width / num_heads), math.sqrt(num_memory)
        keys, values = torch.randn(num_memory, width), torch.randn(num_memory, width)
        self.memory_keys = nn.Parameter(keys / self.key_scale)
        self.memory_values = nn.Parameter(values / max(1.0, self.value_scale))

    def forward(self, tokens: Tensor) -> Tensor:
        """tokens: (B, N, E). Returns as many: the memory is looked up, it does not ask."""
        queries, keys, values = self.qkv(tokens).chunk(3, dim=-1)
        keys = _joined(keys, self.key_scale * self.memory_keys)
        values = _joined(values, self.value_scale * self.memory_values)
        return self.proj(_attend(queries, keys, values, self.num_heads))


class GatedLevels(nn.Module):
    """Attention to several levels of an encoder, each weighed by a gate.

    With C_l the attention of the tokens Y to level l, and a gate a_l = sigmoid(W_l [Y; C_l] + b_l)
    for each channel, the sum of a_l * C_l over the L levels, divided by sqrt(L) as in the code of
    Cornia et al. The projections are shared by the levels, the gates are not.

    width: of the tokens. level_width: of the levels' tokens. num_levels: L.
    """

    def __init__(self, width: int, level_width: int, num_heads: int, *, num_levels: int) -> None:
        super().__init__()
        self.num_heads = _checked_heads(width, num_heads)
        self.queries = nn.Linear(width, width)
        self.keys_values = nn.Linear(level_width, 2 * width)
        self.proj = nn.Linear(width, width)
        self.gates = nn.ModuleList(nn.Linear(2 * width, width) for _ in range(num_levels))

    def forward(self, tokens: Tensor, levels: list[Tensor]) -> Tensor:
        """tokens: (B, N, E'); levels: L of (B, n, E). Returns (B, N, E')."""
        queries = self.queries(tokens)
        total = torch.zeros_like(queries)
        for gate, level in zip(self.gates, levels, strict=True):
            keys, values = self.keys_values(level).chunk(2, dim=-1)
            found = self.proj(_attend(queries, keys, values, self.num_heads))
            total = total + gate(torch.cat([tokens, found], dim=-1)).sigmoid() * found
        return total / math.sqrt(len(levels))


class MemoryBlock(nn.Module):
    """A transformer block, norms first, whose self-attention has a memory.

    Its parameters have the names of timm's `Block`, which it equals where num_memory is 0.
    """

    def __init__(self, width: int, num_heads: int, *, num_memory: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=NORM_EPS)
        self.attn = MemoryAttention(width, num_heads, num_memory=num_memory)
        self.norm2 = nn.LayerNorm(width, eps=NORM_EPS)
        self.mlp = Perceptron(width)

    def forward(self, tokens: Tensor) -> Tensor:
        """tokens: (B, N, E). Returns as many."""
        tokens = tokens + self.attn(self.norm1(tokens))
        return tokens + self.mlp(self.norm2(tokens))


class MeshedBlock(nn.Module):
    """A decoder block: self-attention, gated attention to the levels, perceptron; norms first."""

    def __init__(self, width: int, level_width: int, num_heads: int, *, num_levels: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=NORM_EPS)
        self.attn = MemoryAttention(width, num_heads)
        self.norm_levels = nn.LayerNorm(width, eps=NORM_EPS)
        self.levels = GatedLevels(width, level_width, num_heads, num_levels=num_levels)
        self.norm2 = nn.LayerNorm(width, eps=NORM_EPS)
        self.mlp = Perceptron(width)

    def forward(self, tokens: Tensor, levels: list[Tensor]) -> Tensor:
        """tokens: (B, N, E'); levels: (B, n, E) each. Returns (B, N, E')."""
        tokens = tokens + self.attn(self.norm1(tokens))
        tokens = tokens + self.levels(self.norm_levels(tokens), levels)
        return tokens + self.mlp(self.norm2(tokens))


class MeshedDecoder(nn.Module):
    """Blocks over all patches that also look at the encoder's levels, each of which is normed.

    depth: blocks. Other arguments as of `GatedLevels`.
    """

    def __init__(
        self, width: int, level_width: int, num_heads: int, *, depth: int, num_levels: int
    ) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            MeshedBlock(width, level_width, num_heads, num_levels=num_levels) for _ in range(depth)
        )
        self.norms = nn.ModuleList(
            nn.LayerNorm(level_width, eps=NORM_EPS) for _ in range(num_levels)
        )

    def forward(self, tokens: Tensor, levels: list[Tensor]) -> Tensor:
        """tokens: (B, N, E'); levels: (B, n, E) each. Returns (B, N, E')."""
        levels = [norm(level) for norm, level in zip(self.norms, levels, strict=True)]
        for block in self.blocks:
            tokens = block(tokens, levels)
        return tokens


class Perceptron(nn.Module):
    """The two layers that end a block, four times as wide between them."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, 4 * width)
        self.fc2 = nn.Linear(4 * width, width)

    def forward(self, tokens: Tensor) -> Tensor:
        """tokens: (..., E). Returns as many."""
        return self.fc2(F.gelu(self.fc1(tokens)))


def _checked_heads(width: int, num_heads: int) -> int:
    if width % num_heads:
        raise ValueError(f"num_heads ({num_heads}) must divide the width of the tokens ({width})")
    return num_heads


def _joined(rows: Tensor, memory: Tensor) -> Tensor:
    """Rows (B, N, E) and then the memory (M, E): (B, N + M, E)."""
    return torch.cat([rows, memory.to(rows.dtype).expand(len(rows), -1, -1)], dim=1)


def _attend(queries: Tensor, keys: Tensor, values: Tensor, num_heads: int) -> Tensor:
    """Scaled dot-product attention of (B, N, E) to (B, n, E) in several heads: (B, N, E)."""
    split = [
        each.unflatten(-1, (num_heads, -1)).transpose(1, 2) for each in (queries, keys, values)
    ]
    return F.scaled_dot_product_attention(*split).transpose(1, 2).flatten(2)
