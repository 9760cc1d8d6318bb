import pytest
import torch
from torch import nn

from medssl.models.alignment import grid_offset
from medssl.models.encoder import Encoder
from medssl.models.timm_encoder import TimmEncoder


class Layers(Encoder):
    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.in_channels, self.embedding_dim = 1, 8
        self.network = nn.Sequential(*layers)


def strided(count: int, padding: int | str) -> Encoder:
    """Convolutions of 3 x 3 and stride 2 that weigh all they see alike."""
    layers = [nn.Conv2d(8 if i else 1, 8, 3, stride=2, padding=padding) for i in range(count)]
    for layer in layers:
        nn.init.ones_(layer.weight)
    return Layers(*layers)


@pytest.mark.parametrize("count", [1, 2, 3])
def test_units_of_padded_strided_convolutions_look_at_the_first_pixels_of_their_cells(count):
    offset = grid_offset(strided(count, padding=1), str(count - 1), (64, 96))
    expected = torch.full((2,), -(2**count - 1) / 2)  # unit i looks at pixel 2^count * i
    torch.testing.assert_close(offset, expected, atol=1e-4, rtol=0)


def test_units_of_a_patch_embedding_look_at_the_middle_of_their_cells():
    embedding = nn.Conv2d(1, 8, 8, stride=8)
    nn.init.ones_(embedding.weight)
    for size in ((64, 64), (56, 72)):
        offset = grid_offset(Layers(embedding), "0", size)
        torch.testing.assert_close(offset, torch.zeros(2), atol=1e-4, rtol=0)


def test_rows_and_columns_are_told_apart():
    rows_only = nn.Conv2d(1, 8, (3, 1), stride=(2, 1), padding=(1, 0))
    nn.init.ones_(rows_only.weight)
    offset = grid_offset(Layers(rows_only), "0", (32, 32))
    torch.testing.assert_close(offset, torch.tensor([-0.5, 0.0]), atol=1e-4, rtol=0)


def test_tensorflows_padding_looks_beyond_the_middle_and_symmetric_padding_before_it():
    torch.manual_seed(0)
    offsets = [
        grid_offset(
            TimmEncoder("mobilenetv2_050", options={"pad_type": kind}).eval(), "blocks.2", (96, 96)
        )
        for kind in ("", "same")
    ]
    torch.testing.assert_close(offsets[0], torch.full((2,), -3.5), atol=1.0, rtol=0)
    torch.testing.assert_close(offsets[1], torch.full((2,), 3.5), atol=1.0, rtol=0)


def test_the_answer_does_not_depend_on_the_state_of_the_random_generator():
    encoder = TimmEncoder("test_resnet", in_channels=1).eval()
    first = grid_offset(encoder, "layer1", (64, 64))
    torch.manual_seed(99)
    assert grid_offset(encoder, "layer1", (64, 64)).equal(first)
