"""Small networks that objectives put on top of an encoder."""

import torch.nn.functional as F
from torch import Tensor, nn


class DINOHead(nn.Module):
    """Projector and prototypes of DINO (https://arxiv.org/abs/2104.14294, sec. 3.1 and app. C).

    A three-layer perceptron with GELU, a bottleneck of unit length, and a linear layer whose rows
    (the prototypes) have unit length, so that every logit is a cosine.

    embedding_dim: E of the encoder.
    prototypes: K, outputs.
    hidden_dim, bottleneck_dim: widths of the perceptron and of its last layer.
    """

    def __init__(
        self,
        embedding_dim: int,
        *,
        prototypes: int,
        hidden_dim: int = 2048,
        bottleneck_dim: int = 256,
    ) -> None:
        super().__init__()
        self.projector = nn.Sequential(
            nn.Linear(embedding_dim, hidden_dim),
            nn.GELU(),
            nn.Linear(hidden_dim, hidden_dim),
            nn.GELU(),
            nn.Linear(hidden_dim, bottleneck_dim),
        )
        for layer in self.projector:
            if isinstance(layer, nn.Linear):
                nn.init.trunc_normal_(layer.weight, std=0.02)
                nn.init.zeros_(layer.bias)
        self.prototypes = nn.Linear(bottleneck_dim, prototypes, bias=False)

    def forward(self, embedding: Tensor) -> Tensor:
        """embedding: (B, E). Returns logits (B, K) in [-1, 1]."""
        direction = F.normalize(self.projector(embedding), dim=-1)
        return F.linear(direction, F.normalize(self.prototypes.weight, dim=-1))
