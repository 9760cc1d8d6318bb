from dataclasses import replace

import numpy as np
import pytest
import torch

from anomaly.base import noise_batch
from anomaly.examples import smooth_pictures
from anomaly.features.targets import (
    FrozenEncoder,
    WholeImage,
    cosine_distance,
    filled,
    largest,
    maps_by_size,
    mean_over_valid,
)
from medssl.data.sample import collate
from medssl.models.timm_encoder import TimmEncoder
from medssl.models.vit3d import ViT3DEncoder


def test_the_view_is_the_image_with_zeros_where_it_is_not_valid():
    sample = smooth_pictures(1)[0]
    image = sample.images["image"]
    pixels = image.pixels.masked_fill(~image.valid, torch.nan)
    view = WholeImage()(sample.with_image(replace(image, pixels=pixels)), torch.Generator())
    assert view["valid"].equal(image.valid)
    assert view["image"][:, image.valid].equal(image.pixels[:, image.valid])
    assert not view["image"][:, ~image.valid].any()


def test_the_view_of_a_training_is_what_is_scored():
    samples = smooth_pictures(3)
    views = [WholeImage()(sample, torch.Generator())["image"] for sample in samples]
    assert torch.stack(views).equal(filled(collate(samples).images["image"]))


def test_equal_features_have_distance_0_orthogonal_ones_1_and_opposite_ones_2():
    features = torch.tensor([[3.0, 0.0], [0.0, 2.0], [-1.0, 0.0]]).T[None]  # (1, E, positions)
    one = torch.tensor([5.0, 0.0])[None, :, None].expand(1, 2, 3)
    torch.testing.assert_close(cosine_distance(features, one), torch.tensor([[0.0, 1.0, 2.0]]))


def test_the_mean_is_over_valid_positions_of_each_item():
    values = torch.tensor([[1.0, 2.0, torch.nan], [4.0, 4.0, 7.0], [1.0, 1.0, 1.0]])
    valid = torch.tensor([[True, True, False], [False, True, True], [False, False, False]])
    assert mean_over_valid(values, valid).tolist() == [1.5, 5.5, 0.0]


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 1.0])
def test_the_largest_values_are_those_of_a_sort(share):
    maps = torch.randn(3, 9, 11)
    maps[0, :4] = torch.nan
    maps[2] = torch.nan
    found = largest(maps, share)
    for one, score in zip(maps[:2], found[:2], strict=True):
        known = np.sort(one[~one.isnan()].numpy())[::-1]
        expected = known[: max(1, int(share * len(known)))].mean()
        assert score.item() == pytest.approx(expected, abs=1e-6)
    assert found[2].isnan()


def test_images_are_scored_without_their_padding():
    samples = [smooth_pictures(2, size)[1] for size in ((8, 6), (5, 9), (8, 6))]
    images = collate(samples).images["image"]
    shapes = []

    def found(pixels, valid):
        shapes.append(tuple(pixels.shape))
        return pixels[:, 0]

    maps = maps_by_size(images, found)
    assert shapes == [(2, 1, 8, 6), (1, 1, 5, 9)]
    assert maps.isnan().equal(~images.valid)
    assert maps[images.valid].equal(images.pixels[:, 0][images.valid])


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
