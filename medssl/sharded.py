"""Weights, gradients and optimizer state shared out among the processes (FSDP), and put together.

Fully sharded data parallel training of torch (`fully_shard`; Zhao et al., VLDB 2023,
https://arxiv.org/abs/2304.11277): each process holds a part of every tensor and gathers a block's
weights while the block runs. What is written to disk is whole, so that a checkpoint can be gone on
from by any number of processes.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor


def shard(trainable: nn.Module, mesh: Any) -> nn.Module:
    """Share out each repeated block of the networks, and then the rest, in place.

    mesh: of Fabric's ModelParallelStrategy, with a dimension "data_parallel".
    """
    from torch.distributed.fsdp import fully_shard

    for block in list(_blocks(trainable)):
        fully_shard(block, mesh=mesh["data_parallel"])
    fully_shard(trainable, mesh=mesh["data_parallel"])
    return trainable


def whole(state: Any) -> Any:
    """A state dict with every shared tensor put together, on the CPU; all processes must ask.

    What is not shared stays the same object.
    """
    if isinstance(state, DTensor):
        return state.full_tensor().cpu()
    if isinstance(state, dict):
        return {name: whole(value) for name, value in state.items()}
    if isinstance(state, list):
        return [whole(value) for value in state]
    return state


def load_whole(trainable: nn.Module, state: dict[str, Any]) -> None:
    """Take a whole state dict; each process keeps its part of what it shares."""
    present = trainable.state_dict()
    trainable.load_state_dict(
        {name: _part(value, present.get(name)) for name, value in state.items()}
    )


def load_whole_optimizer(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """The same for the state dict of an optimizer."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    spread = {
        number: {name: _part(value, parameters[number]) for name, value in of_one.items()}
        for number, of_one in state["state"].items()
    }
    optimizer.load_state_dict({**state, "state": spread})


def _part(value: Any, like: Any) -> Any:
    """This process's part of a whole tensor, where `like` is shared and has its shape."""
    if not isinstance(like, DTensor) or not isinstance(value, Tensor) or value.shape != like.shape:
        return value
    # every process has read all of it, so that none has to send
    return distribute_tensor(value, like.device_mesh, like.placements, src_data_rank=None)


def _blocks(module: nn.Module) -> Iterator[nn.Module]:
    """The members of lists and sequences that are made of several layers, inner ones first."""
    for child in module.children():
        yield from _blocks(child)
        repeated = isinstance(module, (nn.ModuleList, nn.Sequential))
        if repeated and any(
            p is not None for inner in child.children() for p in inner.parameters()
        ):
            yield child
