"""The state of a training on disk: written whole or not at all, read without unpickling."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

_NAME = "checkpoint.pt"


class CheckpointError(ValueError):
    """A checkpoint that is damaged or belongs to another training."""


def write_checkpoint(workdir: Path, state: Mapping[str, Any], identity: Mapping[str, Any]) -> None:
    """Replace the checkpoint in `workdir`; a crash at any moment leaves the old or the new one.

    state: tensors, numbers, strings and nested dicts and lists of them.
    identity: what must be the same for the training to go on, as plain values.
    """
    unfinished = workdir / f"{_NAME}.unfinished"
    with unfinished.open("wb") as file:
        torch.save({**state, "identity": dict(identity)}, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(unfinished, workdir / _NAME)
    folder = os.open(workdir, os.O_RDONLY)
    try:
        os.fsync(folder)  # the new name itself has to reach the disk
    finally:
        os.close(folder)


def read_checkpoint(workdir: Path, identity: Mapping[str, Any]) -> dict[str, Any] | None:
    """The state last written; None where there is none.

    Raises CheckpointError where `identity` is not what the checkpoint was written with.
    """
    file = workdir / _NAME
    if not file.exists():
        return None
    try:
        state = torch.load(file, map_location="cpu", weights_only=True)
        written = state.pop("identity")
    except Exception as error:  # whatever a damaged or hostile file provokes
        raise CheckpointError(
            "the checkpoint is damaged; remove the work folder and start anew"
        ) from error
    different = sorted(
        name for name in {*written, *identity} if written.get(name) != identity.get(name)
    )
    if different:
        changes = ", ".join(
            f"{name} was {written.get(name)} and is {identity.get(name)}" for name in different
        )
        raise CheckpointError(
            f"the checkpoint belongs to another training: {changes}; resume with the same "
            "arguments, or remove the work folder and start anew"
        )
    return state
