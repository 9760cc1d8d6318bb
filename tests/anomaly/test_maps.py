import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter, gaussian_filter1d

from anomaly.maps import outside_is_nan, smooth, upsample, valid_patches


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
    found = smooth(maps, (1.2, 0.0, 0.0))
    np.testing.assert_allclose(found.numpy(), expected, atol=1e-5)


def noise(*shape: int) -> torch.Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_a_ramp_of_patches_becomes_a_ramp_of_voxels_along_its_own_axis(axis):
    size, patch, beside = (24, 32, 20), (8, 4, 5), (2.0, -1.5, 0.5)
    grid = [length // side for length, side in zip(size, patch, strict=True)]
    shape = [-1 if each == axis else 1 for each in range(3)]
    patches = torch.arange(float(grid[axis])).reshape(shape).expand(1, *grid)
    centre = (patch[axis] - 1) / 2 + beside[axis]  # where the first patch looks
    ramp = ((torch.arange(size[axis]) - centre) / patch[axis]).clamp(0, grid[axis] - 1)
    voxels = upsample(patches, size, offset=beside)
    torch.testing.assert_close(voxels[0], ramp.reshape(shape).expand(size), atol=1e-5, rtol=0)


def test_voxels_between_patches_are_the_weighted_mean_of_those_that_are_known():
    patches = noise(1, 3, 4, 5)
    patches[0, 1, 2, 3] = torch.nan
    patches[0, 0, 0, :2] = torch.nan
    size = (9, 8, 15)
    found = upsample(patches, size)[0]
    weights = [
        np.stack(
            [np.interp((np.arange(n) + 0.5) * g / n - 0.5, np.arange(g), row) for row in np.eye(g)]
        )
        for n, g in zip(size, (3, 4, 5), strict=True)
    ]  # of patch i for voxel j, (g, n) for each axis

    def mixed(values: np.ndarray) -> np.ndarray:
        return np.einsum("abc,ai,bj,ck->ijk", values, *weights)

    known = (~patches[0].isnan()).double().numpy()
    share = mixed(known)
    expected = mixed(patches[0].nan_to_num(0).numpy()) / np.where(share > 1e-6, share, np.nan)
    assert np.isnan(expected).any()
    np.testing.assert_allclose(found.numpy(), expected, atol=1e-9)


@pytest.mark.parametrize("sigma", [1.5, (0.8, 2.0, 1.2), (0.0, 1.0, 0.0)])
def test_smoothing_a_volume_is_scipys_over_the_voxels_that_are_known(sigma):
    maps = noise(2, 9, 14, 11)
    maps[0, 2:4, 5, :6] = torch.nan
    maps[1, :, 10:] = torch.nan
    known = (~maps.isnan()).double().numpy()
    both = [
        np.stack([gaussian_filter(item, sigma, mode="constant", truncate=4) for item in each])
        for each in (maps.nan_to_num(0).numpy(), known)
    ]
    expected = np.where(known > 0, both[0] / np.maximum(both[1], 1e-9), np.nan)
    np.testing.assert_allclose(smooth(maps, sigma).numpy(), expected, atol=1e-12)


def test_a_volumes_patch_is_valid_with_its_first_valid_voxel():
    valid = torch.zeros(1, 8, 16, 24, dtype=torch.bool)
    valid[0, 3, 8, 23] = True
    expected = torch.zeros(1, 4, 2, 3, dtype=torch.bool)
    expected[0, 1, 1, 2] = True
    assert valid_patches(valid, (4, 2, 3)).equal(expected)


def test_another_number_of_axes_is_refused():
    with pytest.raises(ValueError, match="need 3 sigmas, got 2"):
        smooth(torch.zeros(1, 4, 4, 4), (1.0, 1.0))
    with pytest.raises(ValueError, match="need 3 sizes"):
        upsample(torch.zeros(1, 4, 4, 4), (8, 8))
