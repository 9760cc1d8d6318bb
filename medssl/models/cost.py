"""What a network costs: weights, arithmetic and time."""

import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.utils.flop_counter import FlopCounterMode

from medssl.models.encoder import Encoder

_BATCH, _SECONDS = 8, 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """Of one encoder.

    parameters: how many numbers it holds.
    gflop: 10^9 multiplications and additions for one image; a product and its sum are two.
    images_per_second: on `device`, in batches of 8; changes with the machine.
    """

    parameters: int
    gflop: float
    images_per_second: float
    device: str


@torch.inference_mode()
def cost_of(encoder: Encoder, size: Sequence[int], *, device: str = "cpu") -> Cost:
    """Measure an encoder on noise of `size`, (H, W) or (D, H, W)."""
    training = encoder.training
    encoder.eval().to(device)
    images = torch.randn(_BATCH, encoder.in_channels, *size, device=device)
    with FlopCounterMode(display=False) as counter:
        encoder(images)
    rounds, started = 0, time.perf_counter()
    while time.perf_counter() - started < _SECONDS:
        encoder(images)
        if images.is_cuda:
            torch.cuda.synchronize()
        rounds += 1
    seconds = time.perf_counter() - started
    encoder.train(training)
    return Cost(
        parameters=sum(parameter.numel() for parameter in encoder.parameters()),
        gflop=counter.get_total_flops() / _BATCH / 1e9,
        images_per_second=rounds * _BATCH / seconds,
        device=str(device),
    )
