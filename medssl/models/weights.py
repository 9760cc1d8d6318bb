"""State dicts from local files, without unpickling."""

from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn


def read_state_dict(file: Path) -> dict[str, Tensor]:
    """The tensors of a .safetensors file or of a .pth state dict (read with weights_only=True)."""
    if not file.is_file():
        raise FileNotFoundError(f"no weight file at {file}")
    try:
        if file.suffix == ".safetensors":
            return load_file(file)
        state = torch.load(file, map_location="cpu", weights_only=True)
    except (SafetensorError, RuntimeError, EOFError, OSError, ValueError) as error:
        raise ValueError(f"{file.name} is not a readable state dict") from error
    except Exception as error:  # pickle.UnpicklingError, and whatever a hostile file provokes
        raise ValueError(
            f"{file.name} holds more than tensors and is not unpickled; save its state_dict()"
        ) from error
    if not isinstance(state, dict) or not all(isinstance(v, Tensor) for v in state.values()):
        raise ValueError(f"{file.name} is not a plain state dict of tensors; save its state_dict()")
    return dict(state)


def load_weights(network: nn.Module, file: Path, *, ignore: tuple[str, ...] = ()) -> None:
    """Load a state dict from a file, as `fit_weights` does."""
    fit_weights(network, read_state_dict(file), name=file.name, ignore=ignore)


def fit_weights(
    network: nn.Module, state: dict[str, Tensor], *, name: str, ignore: tuple[str, ...] = ()
) -> None:
    """Take a state dict strictly; keys that begin with one of `ignore` may be extra.

    name: of the file, for messages.
    Raises ValueError naming the first keys that are missing, unknown or of another shape.
    """
    wanted = network.state_dict()
    missing = [key for key in wanted if key not in state]
    unknown = [key for key in state if key not in wanted and not key.startswith(ignore)]
    shapes = [
        f"{key} {tuple(state[key].shape)} for {tuple(wanted[key].shape)}"
        for key in wanted
        if key in state and state[key].shape != wanted[key].shape
    ]
    if missing or unknown or shapes:
        raise ValueError(
            f"{name} does not fit {type(network).__name__}: "
            f"missing {missing[:3]}, unknown {unknown[:3]}, of another shape {shapes[:3]}"
        )
    network.load_state_dict({key: state[key] for key in wanted})
