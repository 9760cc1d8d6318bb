"""Losses that more than one method is built from."""

import torch
from torch import Tensor


def entropy(probabilities: Tensor) -> Tensor:
    """Entropy in nats over the last axis; 0 log 0 counts as 0. (..., K) -> (...)."""
    return torch.special.entr(probabilities).sum(-1)


def distillation_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean cross-entropy of every student view against every other view of the teacher.

    Eq. 3 of DINO (https://arxiv.org/abs/2104.14294): the first G student views are the crops the
    teacher saw, in the same order, and a crop is never compared with itself.

    student: (V, B, K) log-probabilities.
    teacher: (G, B, K) probabilities, G <= V and V >= 2.
    Returns a scalar, the mean over pairs and items.
    """
    views, batch, _ = student.shape
    if len(teacher) > views or teacher.shape[1:] != student.shape[1:] or views < 2:
        raise ValueError(
            "student (V, B, K) must begin with the teacher's views (G, B, K) and hold at least "
            f"two: got {tuple(student.shape)} and {tuple(teacher.shape)}"
        )
    pairs = -torch.einsum("gbk,vbk->gv", teacher, student) / batch  # (G, V) cross-entropies
    other = ~torch.eye(len(teacher), views, dtype=torch.bool, device=pairs.device)
    return pairs[other].mean()
