"""Weighted k-nearest-neighbour classifier (Wu et al., CVPR 2018, arXiv:1805.01978), as DINO's."""

from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor

from medssl.probes.base import Probe

_BLOCK = 4096  # queries at a time


class KNN(Probe):
    """Each of the k most similar training features votes for its class with exp(cos / T).

    neighbours: k; all training features where there are fewer.
    temperature: T; smaller lets the nearest decide alone.
    """

    def __init__(self, *, neighbours: int = 20, temperature: float = 0.07) -> None:
        super().__init__()
        if neighbours < 1 or temperature <= 0:
            raise ValueError(
                "neighbours must be at least 1 and temperature positive, "
                f"got {neighbours} and {temperature}"
            )
        self.neighbours = neighbours
        self.temperature = temperature
        self.register_buffer("features_", torch.empty(0))  # (S, E), unit length
        self.register_buffer("labels_", torch.empty(0, dtype=torch.int64))  # (S,)
        self.features_: Tensor
        self.labels_: Tensor

    def fit(self, features: Tensor, labels: Tensor, *, groups: Tensor | None = None) -> Self:
        """Keep the features (S, E), at unit length, and their labels (S,)."""
        if len(features) != len(labels) or features.ndim != 2 or len(features) == 0:
            raise ValueError(
                f"one label per row of features (S, E): got {tuple(features.shape)} and "
                f"{tuple(labels.shape)}"
            )
        self.features_ = F.normalize(features.float(), dim=-1)
        self.labels_ = labels.long()
        return self

    def scores(self, features: Tensor) -> Tensor:
        """features: (S, E). Returns each class's share of the vote (S, K); rows sum to 1."""
        self.check_fitted()
        queries = F.normalize(features.float(), dim=-1)
        return torch.cat([self._vote(block) for block in queries.split(_BLOCK)])

    def _vote(self, queries: Tensor) -> Tensor:
        similarity = queries @ self.features_.T
        count = min(self.neighbours, len(self.features_))
        nearest, index = similarity.topk(count, dim=1)  # (S, k)
        weights = F.softmax(nearest / self.temperature, dim=1)
        votes = weights.new_zeros(len(queries), int(self.labels_.max()) + 1)
        return votes.scatter_add_(1, self.labels_[index], weights)

    @classmethod
    def example(cls) -> tuple[Self, Tensor, Tensor]:
        """Two opposite directions with a little noise."""
        labels = torch.tensor([0, 1] * 6)
        direction = torch.nn.functional.one_hot(labels, 4).float()
        noise = torch.randn(12, 4, generator=torch.Generator().manual_seed(0))
        return cls(neighbours=3), direction + 0.1 * noise, labels
