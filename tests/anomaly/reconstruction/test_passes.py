import numpy as np
import pytest
import torch
from torch import nn

from anomaly.examples import smooth_pictures, smooth_volumes
from anomaly.maps import smooth
from anomaly.reconstruction.passes import (
    MaskedImage,
    MaskedReconstruction,
    StructureError,
    hidden_parts,
    scored,
)
from anomaly.structure import multi_scale_ssim_map
from medssl.data.image import Image, pixel_affine
from medssl.data.modality import Modality
from medssl.data.sample import Sample, collate
from medssl.models.masked_transformer import grid_of, patchify, unpatchify


class Said(nn.Module):
    """A network that says of every patch which call this is; it keeps what was hidden."""

    def __init__(self, patch_size):
        super().__init__()
        self.patch_size = list(patch_size)
        self.mask_token = nn.Parameter(torch.zeros(1))
        self.hidden = []

    def grid(self, size):
        return grid_of(size, self.patch_size)

    def forward(self, images, hidden):
        self.hidden.append(hidden.clone())
        return torch.full_like(patchify(images, self.patch_size), float(len(self.hidden) - 1))


def saying(patch_size=(2, 2), *, mask_ratio=0.75) -> MaskedReconstruction:
    trained = MaskedReconstruction(Said(patch_size), mask_ratio=mask_ratio)
    trained.low_, trained.data_range_ = torch.tensor([1.0]), torch.tensor([4.0])
    return trained


def picture(pixels, *, valid=None, item="p") -> Sample:
    image = Image(
        pixels=pixels,
        axes="HW",
        modality=Modality.UNKNOWN,
        affine=pixel_affine(),
        frame="pixel",
        valid=valid,
    )
    return Sample(item=item, images={"image": image}, label=0)


@pytest.mark.parametrize(("count", "parts"), [(16, 4), (18, 4), (9, 2), (4, 4)])
def test_each_patch_is_shown_once_in_every_partition(count, parts):
    hidden = torch.stack(list(hidden_parts(count, parts, num_partitions=3, seed=0)))
    assert hidden.shape == (3 * parts, count)
    assert ((~hidden).unflatten(0, (3, parts)).sum(1) == 1).all()
    shown = (~hidden).sum(1)
    assert shown.max() - shown.min() <= 1


def test_partitions_are_drawn_anew_from_a_seed():
    first, second = torch.stack(list(hidden_parts(16, 4, num_partitions=2, seed=0))).chunk(2)
    assert not first.equal(second)
    assert torch.stack(list(hidden_parts(16, 4, num_partitions=1, seed=0))).equal(first)
    assert not torch.stack(list(hidden_parts(16, 4, num_partitions=1, seed=1))).equal(first)


def test_more_parts_than_patches_are_refused():
    with pytest.raises(ValueError, match="3 patches cannot be shown in 4 parts"):
        next(hidden_parts(3, 4, num_partitions=1, seed=0))


@pytest.mark.parametrize(("ratio", "parts"), [(0.5, 2), (0.75, 4), (0.8, 5), (0.9, 10)])
def test_a_pass_shows_what_the_mask_ratio_leaves(ratio, parts):
    assert saying(mask_ratio=ratio).parts == parts


@pytest.mark.parametrize("ratio", [0.3, 1.0])
def test_a_mask_ratio_without_complementary_passes_is_refused(ratio):
    with pytest.raises(ValueError, match=r"mask_ratio must lie in \[0.5, 1\)"):
        saying(mask_ratio=ratio)


@pytest.mark.parametrize(("size", "patch_size"), [((6, 8), (2, 2)), ((4, 4, 6), (2, 2, 3))])
def test_a_pixel_is_the_mean_of_what_was_said_while_it_was_hidden(size, patch_size):
    trained = saying(patch_size)
    rebuilt = trained.rebuilt(torch.rand(2, 3, *size), num_partitions=2, seed=5)
    hidden = torch.stack(trained.network.hidden)[:, 0].numpy()  # (8, N)
    expected = [np.arange(8)[column].mean() for column in hidden.T]
    patches = torch.tensor(expected, dtype=torch.float32)[None, :, None].expand(2, -1, 3 * 4)
    if len(size) == 3:
        patches = patches[..., :1].expand(2, -1, 3 * 12)
    expected_image = unpatchify(patches, patch_size, grid_of(size, patch_size))
    torch.testing.assert_close(rebuilt, expected_image)


def test_what_is_hidden_in_training_depends_on_the_generator_alone():
    view = MaskedImage((8, 8), 0.75)
    hidden = [view(s, torch.Generator().manual_seed(3))["hidden"] for s in smooth_pictures(2)]
    assert hidden[0].equal(hidden[1])
    assert hidden[0].shape == (48,)
    assert hidden[0].sum() == 36
    other = view(smooth_pictures(1)[0], torch.Generator().manual_seed(4))["hidden"]
    assert not hidden[0].equal(other)


def test_every_patch_is_hidden_about_as_often_as_the_ratio_says():
    view, sample = MaskedImage((4, 8, 8), 0.75), smooth_volumes(1)[0]
    generator = torch.Generator().manual_seed(0)
    rate = torch.stack([view(sample, generator)["hidden"] for _ in range(400)]).float().mean(0)
    assert (rate - 0.75).abs().max() < 5 * (0.75 * 0.25 / 400) ** 0.5


def test_the_loss_is_the_squared_error_of_hidden_valid_pixels():
    trained = saying()
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(2, 2, 4, 4, generator=generator)
    valid = torch.ones(2, 4, 4, dtype=torch.bool)
    valid[0, 0, 1] = valid[1, 2:, :] = False
    hidden = torch.tensor([[True, True, False, True], [False, True, True, True]])
    expected = []
    for item in range(2):
        errors = []
        for row in range(4):
            for column in range(4):
                if valid[item, row, column] and hidden[item, 2 * (row // 2) + column // 2]:
                    # the network says 0, and the range is 1 to 5
                    errors += [((v - 1) / 4) ** 2 for v in images[item, :, row, column].tolist()]
        expected.append(np.mean(errors))
    images[0, :, 0, 1] = torch.nan
    found = trained.loss({"image": images, "valid": valid, "hidden": hidden})["loss"]
    assert found.item() == pytest.approx(np.mean(expected), rel=1e-5)


def test_an_image_with_nothing_hidden_that_is_valid_has_no_loss():
    views = {
        "image": torch.rand(1, 1, 4, 4),
        "valid": torch.zeros(1, 4, 4, dtype=torch.bool),
        "hidden": torch.tensor([[True, True, True, False]]),
    }
    assert saying().loss(views)["loss"] == 0


def test_the_range_of_the_normals_is_that_of_numpys_percentiles():
    values = torch.rand(3, 2, 20, 32, generator=torch.Generator().manual_seed(0))
    valid = torch.ones(20, 32, dtype=torch.bool)
    valid[:, :12] = False
    samples = [picture(each, valid=valid) for each in values]
    for sample in samples:
        sample.images["image"].pixels[:, ~valid] = 99.0
    low, high = np.percentile(values[..., 12:].double().numpy(), [0.5, 99.5])
    trained = saying()
    trained.prepare(samples)
    assert trained.low_.item() == pytest.approx(low, rel=1e-5)
    assert trained.data_range_.item() == pytest.approx(high - low, rel=1e-5)


def test_a_nan_that_is_not_marked_is_refused_before_the_training():
    pixels = torch.rand(1, 4, 4, generator=torch.Generator().manual_seed(0))
    pixels[0, 1, 2] = torch.nan
    with pytest.raises(ValueError, match="mark NaN pixels as not valid"):
        saying().prepare([picture(pixels)])


def test_the_error_mixes_structure_and_absolute_difference():
    generator = torch.Generator().manual_seed(0)
    x, y = torch.rand(2, 2, 2, 24, 24, generator=generator)
    valid = torch.ones(2, 24, 24, dtype=torch.bool)
    valid[0, 5:9] = False
    structure = 1 - multi_scale_ssim_map(x, y, data_range=1.0, window=7, scales=2, valid=valid)
    absolute = (x - y).abs().mean(1)
    for weight in (0.0, 0.3, 1.0):
        error = StructureError(weight=weight, window=7, scales=2, sigma=0.0)
        found = error.maps(x, y, valid)
        assert found.isnan().equal(~valid)
        expected = weight * structure + (1 - weight) * absolute
        torch.testing.assert_close(found[valid], expected[valid])


def test_the_error_is_smoothed_over_valid_pixels_only():
    x, y = torch.rand(2, 1, 1, 24, 24, generator=torch.Generator().manual_seed(0))
    valid = torch.ones(1, 24, 24, dtype=torch.bool)
    valid[0, :, :8] = False
    rough = StructureError(weight=0.5, sigma=0.0).maps(x, y, valid)
    found = StructureError(weight=0.5, sigma=[2.0, 1.0]).maps(x, y, valid)
    torch.testing.assert_close(found, smooth(rough, (2.0, 1.0)), equal_nan=True)


@pytest.mark.parametrize("top", [1.0, 0.25])
def test_the_score_is_the_mean_of_the_largest_share_of_the_map(top):
    trained = saying()
    batch = collate([picture(torch.rand(1, 8, 8)), picture(torch.rand(1, 8, 8))])
    error = StructureError(window=5, top=top)
    found = scored(batch.images["image"], trained, error, num_partitions=1, seed=0)
    for score, pixels in zip(found.score, found.maps["image"], strict=True):
        largest = np.sort(pixels.numpy(), axis=None)[::-1][: int(top * 64)]
        assert score.item() == pytest.approx(largest.mean(), rel=1e-5)


class MeanOfShown(Said):
    """A network that takes every patch to be the mean of those that are shown."""

    def forward(self, images, hidden):
        patches = patchify(images, self.patch_size)
        shown = torch.where(hidden[..., None], torch.nan, patches)
        return shown.nanmean(1, keepdim=True).expand_as(patches)


def test_items_of_other_sizes_do_not_change_an_item():
    trained = saying()
    trained.network = MeanOfShown((2, 2))
    generator = torch.Generator().manual_seed(0)
    sizes = ((8, 8), (12, 10), (8, 8), (24, 24))
    samples = [picture(torch.rand(1, *size, generator=generator)) for size in sizes]
    error = StructureError(window=5)

    def look(*seen):
        images = collate(list(seen)).images["image"]
        return scored(images, trained, error, num_partitions=1, seed=0)

    together = look(*samples)
    for row, (sample, (height, width)) in enumerate(zip(samples, sizes, strict=True)):
        alone, maps = look(sample), together.maps["image"][row]
        torch.testing.assert_close(together.score[row], alone.score[0])
        torch.testing.assert_close(maps[:height, :width], alone.maps["image"][0])
        assert maps.isfinite().sum() == height * width


def test_settings_that_mean_nothing_are_refused():
    with pytest.raises(ValueError, match=r"weight must lie in \[0, 1\], got 1.5"):
        StructureError(weight=1.5)
    with pytest.raises(ValueError, match=r"top must lie in \(0, 1\], got 0"):
        StructureError(top=0.0)
