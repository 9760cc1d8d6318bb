import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter, gaussian_filter1d

from anomaly.maps import outside_is_nan, smooth, smooth_across, upsample, valid_patches


def test_a_ramp_of_patches_becomes_a_ramp_of_pixels():
    patches = torch.arange(4.0).expand(1, 3, 4)  # patch centres at pixels 3.5, 11.5, ...
    pixels = upsample(patches, (24, 32))
    expected = ((torch.arange(32) - 3.5) / 8).clamp(0, 3)
    torch.testing.assert_close(pixels[0], expected.expand(24, 32))


def test_patches_that_look_beside_their_cells_are_laid_where_they_look():
    patches = torch.stack([torch.arange(4.0).expand(3, 4), torch.arange(3.0)[:, None].expand(3, 4)])
    pixels = upsample(patches, (24, 32), offset=(2.0, -3.5))  # centres at pixels 5.5 and 0, ...
    columns = (torch.arange(32) / 8).clamp(0, 3)
    rows = ((torch.arange(24) - 5.5) / 8).clamp(0, 2)
    torch.testing.assert_close(pixels[0], columns.expand(24, 32))
    torch.testing.assert_close(pixels[1], rows[:, None].expand(24, 32))


def test_a_missing_patch_changes_no_pixel_into_a_smaller_score():
    patches = torch.full((1, 4, 4), 5.0)
    patches[0, 1, 2] = torch.nan
    pixels = upsample(patches, (16, 16))
    assert not pixels[0, :4].isnan().any()
    known = pixels[~pixels.isnan()]
    torch.testing.assert_close(known, torch.full_like(known, 5.0))


def test_pixels_surrounded_by_missing_patches_are_nan():
    patches = torch.full((1, 8, 8), torch.nan)
    patches[0, 0, 0] = 1.0
    pixels = upsample(patches, (32, 32))
    assert pixels[0, 0, 0] == 1
    assert pixels[0, 16:, 16:].isnan().all()


def test_smoothing_away_from_the_border_is_that_of_scipy():
    maps = torch.rand(1, 80, 60, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    expected = gaussian_filter(maps[0].numpy(), 3.0, mode="constant", truncate=4.0)
    inside = np.s_[12:-12, 12:-12]
    np.testing.assert_allclose(smooth(maps, 3.0)[0].numpy()[inside], expected[inside], atol=1e-12)


def test_smoothing_keeps_a_constant_map_up_to_its_border_and_its_gaps():
    maps = torch.full((2, 20, 30), 7.0)
    maps[0, 5:9, 10:14] = torch.nan
    smoothed = smooth(maps, 2.0)
    assert smoothed.isnan().equal(maps.isnan())
    torch.testing.assert_close(smoothed.nan_to_num(7.0), torch.full((2, 20, 30), 7.0))


def test_smoothing_with_no_width_changes_nothing():
    maps = torch.rand(1, 5, 6)
    assert smooth(maps, 0.0).equal(maps)
    with pytest.raises(ValueError, match="negative"):
        smooth(maps, -1.0)


def test_a_patch_is_valid_with_its_first_valid_pixel():
    valid = torch.zeros(1, 16, 24, dtype=torch.bool)
    valid[0, 7, 8] = True
    expected = torch.zeros(1, 2, 3, dtype=torch.bool)
    expected[0, 0, 1] = True
    assert valid_patches(valid, (2, 3)).equal(expected)


def test_outside_of_valid_is_nan_and_inside_is_untouched():
    maps, valid = torch.rand(2, 4, 4), torch.rand(2, 4, 4) > 0.5
    marked = outside_is_nan(maps, valid)
    assert marked.isnan().equal(~valid)
    assert marked[valid].equal(maps[valid])


def test_smoothing_across_slices_is_scipys_over_the_pixels_that_are_not_nan():
    generator = torch.Generator().manual_seed(3)
    maps = torch.rand(2, 7, 4, 5, generator=generator)
    maps[0, 2, 1, 1] = torch.nan
    maps[1, 5:] = torch.nan
    known = (~maps.isnan()).double().numpy()
    filled = maps.nan_to_num(0).double().numpy()
    both = [
        gaussian_filter1d(each, 1.2, axis=1, mode="constant", truncate=4)
        for each in (filled, known)
    ]
    expected = np.where(known > 0, both[0] / np.maximum(both[1], 1e-9), np.nan)
    found = smooth_across(maps, 1.2)
    np.testing.assert_allclose(found.numpy(), expected, atol=1e-5)
