"""What a network costs, against a count by hand."""

import torch
from torch import Tensor, nn

from medssl.models.cost import cost_of
from medssl.models.encoder import Encoder


class OneConvolution(Encoder):
    in_channels, embedding_dim = 2, 4

    def __init__(self) -> None:
        super().__init__()
        self.network = nn.Conv2d(2, 4, 3, padding=1, bias=False)

    def forward(self, images: Tensor) -> Tensor:
        return self.network(images).mean((2, 3))


def test_parameters_and_arithmetic_are_those_of_the_layers():
    encoder = OneConvolution().train()
    found = cost_of(encoder, (8, 6))
    assert found.parameters == 2 * 4 * 9
    assert found.gflop == 2 * 9 * 2 * 4 * 8 * 6 / 1e9  # a product and a sum for each weight
    assert found.images_per_second > 0
    assert encoder.training
    assert torch.is_grad_enabled()
