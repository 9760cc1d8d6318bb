"""Attentive probe: learnt queries look among frozen tokens for the places that tell the class.

As in CAE (Chen et al., IJCV 2024, https://arxiv.org/abs/2202.03026) and V-JEPA (Bardes et al., TMLR
2024, https://arxiv.org/abs/2404.08471).
"""

from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor

from medssl.probes.base import Probe
from medssl.probes.lbfgs import minimize
from medssl.probes.linear import check_rows


class AttentiveProbe(Probe):
    """Cross-attention from one learnt query to the tokens, and a linear classifier on the answer.

    A head of such attention weighs the tokens by the softmax of their product with one vector, its
    query behind the projection of the keys, and answers with a projection of their weighted mean,
    which the classifier can take up. So a head is a vector (E,), and the classifier reads the
    weighted means of all heads (H E,).

    heads: H, each of which can look elsewhere; 12 in V-JEPA.
    penalty: times half the squared length of queries and classifier, in units of standardized
        features, is added to the mean cross-entropy; larger is simpler.
    seed: of the queries from which the search for the best ones begins.

    Differs from the papers: no layers between attention and classifier, no batch norm, and no limit
    of a head's answer to E / H dimensions; L-BFGS on all items instead of steps on batches.
    """

    def __init__(self, *, heads: int = 12, penalty: float = 0.01, seed: int = 0) -> None:
        super().__init__()
        if heads < 1 or penalty <= 0:
            raise ValueError(
                f"heads must be at least 1 and penalty positive, got {heads} and {penalty}"
            )
        self.heads, self.penalty, self.seed = heads, penalty, seed
        self.register_buffer("queries_", torch.empty(0))  # (H, E)
        self.register_buffer("weight_", torch.empty(0))  # (K, H, E)
        self.register_buffer("bias_", torch.empty(0))  # (K,)
        self.queries_: Tensor
        self.weight_: Tensor
        self.bias_: Tensor

    def fit(self, features: Tensor, labels: Tensor, *, groups: Tensor | None = None) -> Self:
        """Learn from tokens (S, N, E) and labels (S,), with every class from 0 to K - 1 among them.

        groups: count for nothing here.
        """
        if features.ndim != 3:
            raise ValueError(
                f"expected tokens (S, N, E), got {tuple(features.shape)}; for one embedding per "
                "item take another probe"
            )
        classes = check_rows(features.flatten(1), labels)
        features, labels = features.float(), labels.long()
        std, mean = torch.std_mean(features.flatten(0, 1), dim=0, correction=0)
        std = std.clamp(min=1e-6)
        width = features.shape[2]
        generator = torch.Generator().manual_seed(self.seed)
        queries = torch.randn(self.heads, width, generator=generator).to(features) / width**0.5
        weight = features.new_zeros(classes, self.heads, width)
        bias = features.new_zeros(classes)

        def loss() -> Tensor:
            # a constant in all products of a query is none to the softmax
            centred = bias - (weight / std * mean).sum((1, 2))
            logits = _logits(features, queries / std, weight / std, centred)
            size = queries.square().sum() + weight.square().sum()
            return F.cross_entropy(logits, labels) + self.penalty / 2 * size

        minimize(loss, [queries, weight, bias])
        self.queries_, self.weight_ = queries / std, weight / std
        self.bias_ = bias - (self.weight_ * mean).sum((1, 2))
        return self

    def scores(self, features: Tensor) -> Tensor:
        """features: tokens (S, N, E). Returns probabilities (S, K); rows sum to 1."""
        self.check_fitted()
        return _logits(features.float(), self.queries_, self.weight_, self.bias_).softmax(1)

    @classmethod
    def example(cls) -> tuple[Self, Tensor, Tensor]:
        """Five tokens, one of which is marked and says the class."""
        generator = torch.Generator().manual_seed(0)
        labels = torch.tensor([0, 1] * 6)
        features = torch.randn(12, 5, 4, generator=generator)
        places = torch.randint(5, (12,), generator=generator)
        features[torch.arange(12), places, 0] = 5
        features[torch.arange(12), places, 1] = 4 * labels - 2.0
        return cls(heads=2), features, labels


def _logits(features: Tensor, queries: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """(S, N, E), (H, E), (K, H, E) and (K,) to (S, K)."""
    attention = (features @ queries.mT).mT.softmax(-1)  # (S, H, N)
    return (attention @ features).flatten(1) @ weight.flatten(1).mT + bias
