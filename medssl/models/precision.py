"""Where half the bits do not do."""

import torch
from torch import Tensor


def full_precision(like: Tensor) -> torch.autocast:
    """A context in which products of float32 stay float32 on the device of `like`.

    Under bf16 training a matrix product is rounded to 8 bits, and cosines that differ by less than
    .004 become one: too coarse for neighbours, duplicates and softmaxes at a low temperature.
    """
    return torch.autocast(like.device.type, enabled=False)
