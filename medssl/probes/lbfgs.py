"""L-BFGS on all data at once (Liu & Nocedal, Mathematical Programming 45, 1989,
https://doi.org/10.1007/BF01589116), for what is small and smooth enough to be fitted to its end."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

_ITERATIONS = 500


def minimize(loss: Callable[[], Tensor], learnt: Sequence[Tensor]) -> None:
    """Change the tensors in place until the loss does not fall any more, 500 iterations at most.

    loss: a differentiable scalar of `learnt`, the same at every call. Nothing is drawn, so the
    result is the same every time.
    """
    for tensor in learnt:
        tensor.requires_grad_()
    search = torch.optim.LBFGS(learnt, max_iter=_ITERATIONS, line_search_fn="strong_wolfe")

    def value() -> float:
        search.zero_grad()
        found = loss()
        found.backward()
        return found.item()

    search.step(value)
    for tensor in learnt:
        tensor.requires_grad_(False)
