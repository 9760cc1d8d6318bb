from dataclasses import replace

import numpy as np
import pytest
import torch

from anomaly.examples import smooth_pictures
from anomaly.valid import (
    WholeImage,
    by_size,
    filled,
    largest,
    maps_by_size,
    mean_over_valid,
    scored_by_size,
)
from medssl.data.sample import collate


def test_the_view_is_the_image_and_its_low_end_where_it_is_not_valid():
    sample = smooth_pictures(1)[0]
    image = sample.images["image"]
    pixels = image.pixels.masked_fill(~image.valid, torch.nan)
    view = WholeImage()(sample.with_image(replace(image, pixels=pixels)), torch.Generator())
    assert view["valid"].equal(image.valid)
    assert view["image"][:, image.valid].equal(image.pixels[:, image.valid])
    low = image.pixels[:, image.valid].min()
    assert view["image"][:, ~image.valid].unique().tolist() == [low.item()]


def test_the_view_of_a_training_is_what_is_scored():
    samples = smooth_pictures(3)
    views = [WholeImage()(sample, torch.Generator())["image"] for sample in samples]
    images = collate(samples).images["image"]
    assert torch.stack(views).equal(filled(images.pixels, images.valid))


def test_each_channel_of_each_image_has_a_low_end_of_its_own_and_nothing_has_0():
    pixels = torch.tensor([[[3.0, 1.0, -9.0], [5.0, 7.0, 8.0]], [[torch.nan] * 3, [2.0] * 3]])
    valid = torch.tensor([[True, True, False], [False, False, False]])
    assert filled(pixels, valid).tolist() == [
        [[3.0, 1.0, 1.0], [5.0, 7.0, 5.0]],
        [[0.0] * 3, [0.0] * 3],
    ]


def test_the_mean_is_over_valid_positions_of_each_item():
    values = torch.tensor([[1.0, 2.0, torch.nan], [4.0, 4.0, 7.0], [1.0, 1.0, 1.0]])
    valid = torch.tensor([[True, True, False], [False, True, True], [False, False, False]])
    assert mean_over_valid(values, valid).tolist() == [1.5, 5.5, 0.0]


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 1 - 1e-8, 1.0])  # one is 1 in float32
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


def test_what_is_not_valid_is_the_low_end_whatever_it_held():
    sample = smooth_pictures(1)[0]
    image = sample.images["image"]
    image.pixels[:, ~image.valid] = torch.nan
    batch = collate([sample, smooth_pictures(1, (70, 40))[0]]).images["image"]
    (_, pixels, valid), _ = by_size(batch)
    assert valid.equal(image.valid[None])
    assert pixels[0, :, image.valid].equal(image.pixels[:, image.valid])
    low = image.pixels[:, image.valid].min()
    assert pixels[0, :, ~image.valid].unique().tolist() == [low.item()]


def test_scores_and_maps_go_back_to_the_rows_of_their_images():
    samples = [smooth_pictures(3, size)[i] for i, size in enumerate(((8, 6), (5, 9), (8, 6)))]
    images = collate(samples).images["image"]
    found = scored_by_size(images, lambda pixels, valid: (pixels.flatten(1).sum(1), pixels[:, 0]))
    expected = [
        torch.where(own, one, one[own].min())[: size[0], : size[1]].sum()
        for one, own, size in zip(images.pixels[:, 0], images.valid, images.sizes, strict=True)
    ]
    torch.testing.assert_close(found.score, torch.stack(expected))
    assert found.maps["image"].isnan().equal(~images.valid)
    assert found.maps["image"][images.valid].equal(images.pixels[:, 0][images.valid])
