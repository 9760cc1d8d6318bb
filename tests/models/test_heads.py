"""The head of DINO: logits are cosines."""

import torch

from medssl.models.heads import DINOHead


def test_logits_are_cosines_to_the_prototypes():
    head = DINOHead(6, prototypes=5, hidden_dim=16, bottleneck_dim=4)
    embedding = torch.randn(7, 6)
    hidden = head.projector(embedding)
    expected = torch.nn.functional.cosine_similarity(
        hidden[:, None], head.prototypes.weight[None], dim=-1
    )
    torch.testing.assert_close(head(embedding), expected)


def test_the_length_of_a_prototype_does_not_matter():
    head = DINOHead(6, prototypes=5, hidden_dim=16, bottleneck_dim=4)
    embedding = torch.randn(7, 6)
    before = head(embedding)
    with torch.no_grad():
        head.prototypes.weight.mul_(9)
    torch.testing.assert_close(head(embedding), before)
