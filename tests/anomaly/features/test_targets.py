import pytest
import torch

from anomaly.base import noise_batch
from anomaly.features.targets import FrozenEncoder, cosine_distance
from medssl.models.timm_encoder import TimmEncoder
from medssl.models.vit3d import ViT3DEncoder


def test_equal_features_have_distance_0_orthogonal_ones_1_and_opposite_ones_2():
    features = torch.tensor([[3.0, 0.0], [0.0, 2.0], [-1.0, 0.0]]).T[None]  # (1, E, positions)
    one = torch.tensor([5.0, 0.0])[None, :, None].expand(1, 2, 3)
    torch.testing.assert_close(cosine_distance(features, one), torch.tensor([[0.0, 1.0, 2.0]]))


def test_shapes_are_those_of_the_maps():
    pictures = FrozenEncoder(TimmEncoder("test_resnet", in_channels=1).eval(), ["layer1", "layer3"])
    shown = pictures(torch.zeros(1, 1, 224, 224))
    assert pictures.shapes() == [tuple(one.shape[1:]) for one in shown]
    volumes, _ = ViT3DEncoder.example()
    assert FrozenEncoder(volumes, ["blocks.0"]).shapes() == [(32, 2, 2, 2)]


def test_other_channels_are_refused_with_what_to_do():
    encoder = FrozenEncoder(TimmEncoder("test_resnet", in_channels=3).eval(), ["layer1"])
    with pytest.raises(ValueError, match="takes 3 channels, got 1; set channels"):
        encoder(noise_batch(torch.zeros(1, 1, 32, 32), "HW").images["image"].pixels)


def test_no_layer_is_refused():
    with pytest.raises(ValueError, match="at least one module"):
        FrozenEncoder(TimmEncoder("test_resnet"), [])
