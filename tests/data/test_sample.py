import dataclasses

import pytest
import torch

from medssl.data.image import Image, PointCloud, pixel_affine
from medssl.data.modality import Modality
from medssl.data.sample import Sample, collate


def sample(item, height, width, *, label=None, mask=None, valid=None, channels=1):
    image = Image(
        pixels=torch.full((channels, height, width), float(height)),
        axes="HW",
        modality=Modality.PICTURE,
        affine=pixel_affine(),
        frame="pixel",
        valid=valid,
    )
    if mask is not None:
        mask = dataclasses.replace(image, pixels=mask, valid=None)
    return Sample(item=item, images={"image": image}, label=label, mask=mask, group=f"g{item}")


def test_smaller_images_are_padded_at_the_end_and_marked_invalid():
    batch = collate([sample("a", 2, 5), sample("b", 4, 3)])
    images = batch.images["image"]
    assert images.pixels.shape == (2, 1, 4, 5)
    assert images.sizes == ((2, 5), (4, 3))
    assert images.valid[0].sum() == 10
    assert images.valid[0, :2].all()
    assert images.valid[1].sum() == 12
    assert images.valid[1, :, :3].all()
    assert (images.pixels[0, 0, 2:] == 0).all()
    assert (images.pixels[0, 0, :2] == 2).all()


def test_an_images_own_invalid_pixels_stay_invalid():
    valid = torch.ones(2, 3, dtype=torch.bool)
    valid[1, 2] = False
    images = collate([sample("a", 2, 3, valid=valid), sample("b", 3, 3)]).images["image"]
    assert torch.equal(images.valid[0, :2], valid)


def test_unknown_labels_are_minus_one_and_masks_lie_on_the_padded_grid():
    mask = torch.zeros(1, 2, 5)
    mask[0, 1, 4] = 1
    batch = collate([sample("a", 2, 5, label=1, mask=mask), sample("b", 4, 3)])
    assert batch.labels.tolist() == [1, -1]
    assert batch.masks.nonzero().tolist() == [[0, 1, 4]]
    assert batch.groups == ("ga", "gb")


def test_a_batch_without_masks_has_none():
    assert collate([sample("a", 2, 2)]).masks is None


def test_a_mask_off_the_images_grid_is_refused_by_item():
    wrong = sample("a", 2, 2, mask=torch.zeros(1, 2, 2))
    small = dataclasses.replace(wrong.mask, pixels=torch.zeros(1, 1, 2))
    with pytest.raises(ValueError, match="item a: mask"):
        collate([dataclasses.replace(wrong, mask=small)])


def test_channel_counts_must_agree():
    with pytest.raises(ValueError, match="equal axes and channels"):
        collate([sample("a", 2, 2), sample("b", 2, 2, channels=3)])


def test_roles_must_agree():
    other = Sample(item="b", images={"flair": sample("b", 2, 2).images["image"]})
    with pytest.raises(ValueError, match=r"item b has \['flair'\]"):
        collate([sample("a", 2, 2), other])


def test_moving_a_batch_keeps_its_ids():
    batch = collate([sample("a", 2, 2, label=0)]).to("cpu")
    assert batch.items == ("a",)
    assert len(batch) == 1


def test_point_labels_need_one_for_each_point_of_a_cloud():
    cloud = PointCloud(points=torch.zeros(5, 3), unit="mm")
    Sample(item="a", points=cloud, point_labels=torch.zeros(5, dtype=torch.bool))
    with pytest.raises(ValueError, match="item a: 4 point labels for 5 points"):
        Sample(item="a", points=cloud, point_labels=torch.zeros(4, dtype=torch.bool))
    with pytest.raises(ValueError, match="3 point labels for no cloud"):
        Sample(item="a", point_labels=torch.zeros(3, dtype=torch.bool))


def test_points_that_are_not_looked_at_keep_their_place_in_a_batch():
    cloud = PointCloud(
        points=torch.arange(12.0).reshape(4, 3), unit="mm", valid=torch.arange(4) > 1
    )
    batch = collate([Sample(item="a", points=cloud), Sample(item="b", points=cloud)]).to("cpu")
    first = batch.points[0]
    assert first is not None
    assert first.points.equal(cloud.points)
    assert first.looked_at.tolist() == [False, False, True, True]
    with pytest.raises(ValueError, match=r"valid must be \(4,\)"):
        PointCloud(points=cloud.points, unit="mm", valid=torch.ones(3, dtype=torch.bool))
