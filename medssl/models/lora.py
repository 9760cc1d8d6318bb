"""LoRA: low-rank adaptation (Hu et al., ICLR 2022, https://arxiv.org/abs/2106.09685)."""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_ATTENTION = ("attn.qkv", "attn.proj")


class LoRALinear(nn.Module):
    """A linear layer W that stays, and beside it a learnt update of low rank: W + (alpha / r) B A,
    eq. 3 and sec. 4.1.

    rank: r, of the update. alpha: its scale, so that the learning rate need not change with r.

    `down` is A (r, in), Gaussian; `up` is B (out, r), zero at the start, so that the layer then
    answers as it did. `weight` is that of the sum, for the networks that do not call the layer but
    take its weight.

    The paper leaves the width of the Gaussian open; here it is 1 / sqrt(in).
    """

    def __init__(self, linear: nn.Linear, *, rank: int, alpha: float) -> None:
        super().__init__()
        if rank < 1:
            raise ValueError(f"rank must be at least 1, got {rank}")
        self.linear = linear.requires_grad_(False)
        self.scale = alpha / rank
        outputs, inputs = linear.weight.shape
        self.down = nn.Parameter(linear.weight.new_empty(rank, inputs))
        nn.init.normal_(self.down, std=1 / math.sqrt(inputs))
        self.up = nn.Parameter(linear.weight.new_zeros(outputs, rank))

    @property
    def weight(self) -> Tensor:
        """(out, in), with the update."""
        return self.linear.weight + self.scale * self.up @ self.down

    @property
    def bias(self) -> Tensor | None:
        """(out,), as it was."""
        return self.linear.bias

    def forward(self, inputs: Tensor) -> Tensor:
        """inputs: (..., in). Returns (..., out)."""
        update = F.linear(F.linear(inputs, self.down), self.up)
        return self.linear(inputs) + self.scale * update


def add_lora(
    network: nn.Module,
    *,
    rank: int = 8,
    alpha: float = 16.0,
    layers: Sequence[str] = _ATTENTION,
) -> list[nn.Parameter]:
    """Freeze a network, and give some of its linear layers a learnt update, in place.

    network: an encoder, or any other; its answers do not change before the update is trained.
    layers: how their names end; these are qkv and proj of timm's attention, in networks for
        pictures and for volumes.
    Returns what is left to train. Raises ValueError where no layer has such a name.

    Differs from the paper: keys and the projection behind the attention are updated too, because
    timm has one layer for queries, keys and values.
    """
    found = [
        (name, module)
        for name, module in network.named_modules()
        if isinstance(module, nn.Linear) and name.endswith(tuple(layers))
    ]
    if not found:
        raise ValueError(
            f"expected linear layers whose names end in {' or '.join(layers)}, and "
            f"{type(network).__name__} has none (left); LoRA here is for transformers, of a "
            "convolutional network train all or the last layers"
        )
    network.requires_grad_(False)
    learnt: list[nn.Parameter] = []
    for name, linear in found:
        adapted = LoRALinear(linear, rank=rank, alpha=alpha)
        network.set_submodule(name, adapted)
        learnt += [adapted.down, adapted.up]
    return learnt


@torch.no_grad()
def merge_lora(network: nn.Module) -> None:
    """Add the updates to the weights and make the layers plain again, in place, so that the network
    can be saved as what it was; its answers stay, but for rounding."""
    for name, module in list(network.named_modules()):
        if isinstance(module, LoRALinear):
            module.linear.weight.copy_(module.weight)
            network.set_submodule(name, module.linear)
