import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from medssl.models.small_student import PatchNetwork, SmallAutoencoder

MOBILENET_V2 = 300e6 * (256 / 224) ** 2  # multiplications at 256 pixels; 300 M at 224 (table 4)


@pytest.mark.parametrize("size", [(64, 48), (62, 51)])
def test_the_maps_have_a_quarter_of_the_rows_and_columns(size):
    pictures = torch.randn(2, 3, *size)
    expected = (2, 5, size[0] // 4, size[1] // 4)
    assert PatchNetwork(3, 5, width=8)(pictures).shape == expected
    assert SmallAutoencoder(3, 5, width=8, latent=4)(pictures).shape == expected


def test_a_patch_feature_looks_at_26_pixels_about_the_middle_of_its_cell():
    picture = torch.zeros(1, 1, 64, 64, requires_grad=True)
    network = PatchNetwork(1, 4, width=8)
    for parameter in network.parameters():
        torch.nn.init.ones_(parameter)  # positive: no rectifier hides a pixel
    (gradient,) = torch.autograd.grad(network(picture)[0, :, 8, 5].sum(), picture)
    rows, columns = (gradient[0, 0].sum(axis).nonzero()[:, 0] for axis in (1, 0))
    assert (rows.min(), rows.max()) == (8 * 4 + 2 - 13, 8 * 4 + 1 + 13)
    assert (columns.min(), columns.max()) == (5 * 4 + 2 - 13, 5 * 4 + 1 + 13)


def test_the_autoencoder_sees_the_whole_picture_from_everywhere():
    picture = torch.randn(1, 1, 64, 64, requires_grad=True)
    network = SmallAutoencoder(1, 4).eval()
    (gradient,) = torch.autograd.grad(network(picture)[0, :, 0, 0].square().sum(), picture)
    assert (gradient != 0).double().mean() > 0.9


def test_teacher_student_and_autoencoder_cost_as_much_as_three_mobilenets():
    picture = torch.randn(1, 3, 256, 256)
    networks = [PatchNetwork(3, 64), PatchNetwork(3, 128), SmallAutoencoder(3, 64)]
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        for network in networks:
            network.eval()(picture)
    assert counter.get_total_flops() / 2 < 3.1 * MOBILENET_V2
