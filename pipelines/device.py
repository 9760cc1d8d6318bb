"""Which processor a job runs on."""

import torch


def choose_device(name: str) -> torch.device:
    """auto takes a GPU where there is one. Raises ValueError for one that this machine lacks."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"device must be auto, cpu, cuda or cuda:N, got {name!r}") from error
    count = torch.cuda.device_count()
    if device.type == "cuda" and (device.index or 0) >= count:
        raise ValueError(f"no such GPU: {name}; this machine has {count}. Take auto or cpu")
    return device
