"""A teacher that follows its student as an exponential moving average of the weights."""

import copy
from typing import Any, TypeVar, cast

import torch
from torch import nn

Network = TypeVar("Network", bound=nn.Module)


def teacher_of(student: Network) -> Network:
    """A copy of `student` without gradients and without dropout or stochastic depth."""
    teacher = copy.deepcopy(student).requires_grad_(False)
    for module in teacher.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.p = 0.0
        elif isinstance(module, nn.MultiheadAttention):
            module.dropout = 0.0
        elif hasattr(module, "drop_prob"):  # stochastic depth of timm and torchvision
            cast(Any, module).drop_prob = 0.0
    return teacher


@torch.no_grad()
def follow(teacher: nn.Module, student: nn.Module, momentum: float) -> None:
    """teacher = momentum * teacher + (1 - momentum) * student, for every parameter.

    Buffers stay the teacher's own: its batch normalization counts the views it has seen itself.
    """
    own = [parameter.detach() for parameter in teacher.parameters()]
    target = [parameter.detach() for parameter in student.parameters()]
    torch._foreach_lerp_(own, target, 1 - momentum)
