"""How often a search finds what belongs to the query."""

import torch
from torch import Tensor


def recall_at(k: int, similarity: Tensor, relevant: Tensor) -> Tensor:
    """Whether one of the k most similar candidates belongs to the query, (S,) float 0 or 1.

    A tie is broken against the query: a relevant candidate ranks after every other of the same
    similarity, so that a model that gives all candidates one similarity finds nothing.

    similarity: (S, T), larger is nearer. relevant: (S, T) bool, at least one in every row.
    """
    if similarity.shape != relevant.shape or k < 1:
        raise ValueError(
            "similarity and relevant need one shape (S, T) and k at least 1: got "
            f"{tuple(similarity.shape)}, {tuple(relevant.shape)} and {k}"
        )
    if not relevant.any(1).all():
        raise ValueError("some queries have no relevant candidate; leave them out")
    best = similarity.masked_fill(~relevant, -torch.inf).amax(1, keepdim=True)
    before = ((similarity >= best) & ~relevant).sum(1)  # others that come no later
    return (before < k).float()
