"""The step at which a training stopped being finite, kept so that it can be looked into."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from medssl.distributed import rank


def keep_failure(
    workdir: Path,
    weights: Mapping[str, Any],
    parts: Sequence[tuple[Sequence[str], Mapping[str, Tensor]]],
    *,
    step: int,
    seed: int,
) -> Path:
    """Write the state dict before the step, the batch and its random seed; returns the file.

    It holds pixels, so it belongs where the images belong.
    """
    file = workdir / f"not_finite_{step}_{rank()}.pt"
    kept = [{"items": list(items), "views": dict(views)} for items, views in parts]
    torch.save({"trainable": dict(weights), "parts": kept, "step": step, "seed": seed}, file)
    return file


def replay(trainable: nn.Module, file: Path) -> list[dict[str, float]]:
    """Do the failed step again, in place: what the loss reports of each part, and the largest
    absolute gradient of each parameter as "gradient of NAME".

    trainable: as it was made for the training that failed; its weights are replaced.
    """
    kept = torch.load(file, map_location="cpu", weights_only=True)
    trainable.load_state_dict(kept["trainable"])
    torch.manual_seed(kept["seed"])
    found = []
    for part in kept["parts"]:
        trainable.zero_grad()
        reported = trainable.loss(part["views"])  # type: ignore[operator]
        reported["loss"].backward()
        found.append({name: value.item() for name, value in reported.items()})
        found[-1] |= {
            f"gradient of {name}": parameter.grad.abs().max().item()
            for name, parameter in trainable.named_parameters()
            if parameter.grad is not None
        }
    return found


def not_finite(value: float, norm: float, items: Sequence[str], step: int, file: Path) -> str:
    """What to say of it."""
    what = f"the loss is {value}" if not math.isfinite(value) else f"the gradient's norm is {norm}"
    return (
        f"{what} at step {step} on the items {', '.join(items)}; the weights before it and the "
        f"batch are kept in {file} (medssl.failure.replay does the step again). Look for pixels "
        "that are not finite among the items, or lower the learning rate"
    )
