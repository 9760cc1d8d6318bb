"""Writes the gradients of the first step of every method: python first_gradients.py FILE [sharded],
also under torchrun. Dropout is off, and a batch is as large as a method's example allows. Beside
them are the weights after the step."""

import sys
import tempfile
from importlib import import_module
from pathlib import Path
from pkgutil import walk_packages

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

from medssl import objectives
from medssl.distributed import rank
from medssl.objectives.base import Objective
from medssl.sharded import whole
from medssl.stream import Stream
from medssl.training import TrainingPlan, train


def main(file: Path, *, sharded: bool) -> None:
    for module in walk_packages(objectives.__path__, "medssl.objectives."):
        import_module(module.name)
    found = {
        method.__name__: first_gradients(method, sharded=sharded)
        for method in Objective.__subclasses__()
    }
    if rank() == 0:
        torch.save(found, file)


def first_gradients(method: type[Objective], *, sharded: bool) -> dict[str, Tensor]:
    torch.manual_seed(0)
    objective, samples = method.example()
    for module in objective.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.p = 0.0
        elif isinstance(module, nn.MultiheadAttention):
            module.dropout = 0.0
        elif hasattr(module, "drop_prob"):
            module.drop_prob = 0.0
    units = Stream(samples, batch_size=1, one_per=objective.one_per, seed=0).per_epoch
    found: dict[str, Tensor] = {}

    def keep(optimizer: torch.optim.Optimizer, *_) -> None:
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        for name, parameter in zip(names, parameters, strict=True):
            if parameter.grad is not None:
                found[name] = whole(parameter.grad).clone()

    objective.prepare(samples)
    name_of = {id(parameter): name for name, parameter in objective.named_parameters()}
    groups = objective.parameter_groups()
    names = [name_of[id(parameter)] for group in groups for parameter in group["params"]]
    handle = register_optimizer_step_pre_hook(keep)
    batch = units - units % 2
    plan = TrainingPlan(total_samples=batch, batch_size=batch, gradient_clip=1e9)
    with tempfile.TemporaryDirectory() as folder:
        options = {"device": "cpu", "workers": 0, "sharded": sharded}
        train(objective, samples, plan, workdir=Path(folder), **options)
    handle.remove()
    return found | {f"{name} after": tensor for name, tensor in objective.named_parameters()}


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]), sharded="sharded" in sys.argv)
