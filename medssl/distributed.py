"""Several processes that train together, as torchrun starts them; one is the simple case."""

import atexit
import gc
import os
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor


def rank() -> int:
    """The number of this process, 0 for the one that writes."""
    return int(os.environ.get("RANK", 0))


def processes() -> int:
    """How many train together."""
    return int(os.environ.get("WORLD_SIZE", 1))


def processes_here() -> int:
    """How many of them run on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", processes()))


def started(device: str, precision: str, *, sharded: bool = False) -> Any:
    """A Fabric on one device, or on all those that torchrun has started.

    device: auto, cpu or cuda. precision: auto, fp32 or bf16.
    sharded: see `medssl.sharded`; otherwise each process holds all weights.
    """
    from lightning.fabric import Fabric

    join()
    here = processes_here()
    fabric = Fabric(
        accelerator=device,
        devices=here,
        num_nodes=max(1, processes() // here),
        strategy=_strategy(sharded),
        precision=_precision(precision, device),
    )
    fabric.launch()
    return fabric


def join() -> None:
    """Make one group of the processes that torchrun has started; alone, or in one, do nothing.

    Tensors on GPUs go by NCCL, where each process has a GPU, others by gloo.
    """
    if processes() > 1 and not dist.is_initialized():
        # imported after a group has begun, as DistributedDataParallel does, it keeps that group:
        # its threads then meet the end of the interpreter and abort the process now and then
        import torch._dynamo

        on_gpus = torch.cuda.device_count() >= processes_here()
        if on_gpus:
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
        dist.init_process_group("cpu:gloo,cuda:nccl" if on_gpus else "gloo")
        atexit.register(leave)


def leave() -> None:
    """End the group, if there is one and nobody has: its threads may not outlive a process.

    What still holds it, such as a wrapped network in a cycle of references, is let go first.
    """
    if dist.is_initialized():
        gc.collect()
        dist.destroy_process_group()


def gathered(rows: Tensor) -> Tensor:
    """The rows of all processes, (B, ...) -> (P B, ...), in the order of their numbers.

    The gradient is that of the sum of all processes' losses; DistributedDataParallel divides by
    their number, so a mean over own rows against everybody's becomes the mean over all.
    """
    if not _together():
        return rows
    return _Gather.apply(rows)


def gathered_unequal(rows: Tensor, *, into: Tensor | None = None) -> Tensor:
    """As `gathered` of a tensor whose number of rows differs from process to process; no gradient.

    rows: (n, ...), n of this process, 0 to any; the rest of the shape is everybody's.
    into: (at least the sum of all n, ...) where the rows are put, such as a mapped file; from its
        beginning. It may not share memory with `rows`.
    """
    if not _together():
        return rows if into is None else into[: len(rows)].copy_(rows)
    counts = gathered(torch.tensor([len(rows)], device=rows.device)).tolist()
    if into is None:
        into = rows.new_empty(sum(counts), *rows.shape[1:])
    start = 0
    for source, count in enumerate(counts):
        part = into[start : start + count]
        if source == dist.get_rank():
            part.copy_(rows)
        if count:
            dist.broadcast(part, source)
        start += count
    return into[:start]


def gathered_lists(values: list[Any]) -> list[Any]:
    """The plain values of all processes, one list after the other in the order of their numbers."""
    if not _together():
        return values
    parts: list[list[Any]] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(parts, values)
    return [value for part in parts for value in part]


def own_rows(everybodys: Tensor) -> slice:
    """Which rows of `gathered` are this process's."""
    if not _together():
        return slice(0, len(everybodys))
    size = len(everybodys) // dist.get_world_size()
    return slice(dist.get_rank() * size, (dist.get_rank() + 1) * size)


def mean_of_all(values: Tensor) -> Tensor:
    """The mean over the processes of a tensor of one shape, without gradient."""
    if not _together():
        return values
    total = values.detach().clone()
    dist.all_reduce(total)
    return total / dist.get_world_size()


def sum_of_all(values: Tensor) -> Tensor:
    """The sum over the processes of a tensor of one shape, without gradient."""
    return mean_of_all(values) * (dist.get_world_size() if _together() else 1)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor) -> Tensor:
        parts = [torch.empty_like(rows) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, rows.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        total = gradient.clone(memory_format=torch.contiguous_format)  # it may be shared
        dist.all_reduce(total)
        return total[own_rows(total)]


def _together() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def _strategy(sharded: bool) -> Any:
    from lightning.fabric.strategies import DDPStrategy, ModelParallelStrategy

    from medssl.sharded import shard

    if sharded:
        return ModelParallelStrategy(shard, data_parallel_size=processes(), tensor_parallel_size=1)
    # a mask token or a prompt that a step does not use has no gradient
    return DDPStrategy(find_unused_parameters=True) if processes() > 1 else "auto"


def _precision(precision: str, device: str) -> Literal["bf16-mixed", "32-true"]:
    """bf16 where the device is a GPU that has it, unless told."""
    if precision == "auto":
        gpu = device in ("auto", "cuda", "gpu") and torch.cuda.is_available()
        precision = "bf16" if gpu and torch.cuda.is_bf16_supported() else "fp32"
    return "bf16-mixed" if precision == "bf16" else "32-true"
