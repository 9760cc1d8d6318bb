import math

import numpy as np
import pytest
import torch
from monai.metrics.regression import compute_ssim_and_cs
from skimage.metrics import structural_similarity

from anomaly.structure import largest_scales, multi_scale_ssim_map, ssim_map


def pair(*shape: int, noise: float = 0.3) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(shape, generator=generator, dtype=torch.float64)
    return x, x + noise * torch.rand(shape, generator=generator, dtype=torch.float64)


def luminance_of(a: float, b: float, data_range: float) -> float:
    c1 = (0.01 * data_range) ** 2
    return (2 * a * b + c1) / (a**2 + b**2 + c1)


def brute_force(x, y, valid, at, *, data_range, window):
    """Luminance, and contrast-structure, of one pixel of (H, W) or (D, H, W), by loops."""
    sigma, radius = 1.5 * window / 11, window // 2
    weights, first, second = [], [], []
    for place in np.ndindex(*x.shape):
        offset = np.subtract(place, at)
        if valid[place] and abs(offset).max() <= radius:
            weights.append(math.exp(-(offset**2).sum() / (2 * sigma**2)))
            first.append(x[place])
            second.append(y[place])
    w, a, b = np.array(weights) / sum(weights), np.array(first), np.array(second)
    mean_a, mean_b = w @ a, w @ b
    covariance = w @ ((a - mean_a) * (b - mean_b))
    spread = w @ (a - mean_a) ** 2 + w @ (b - mean_b) ** 2
    c2 = (0.03 * data_range) ** 2
    return luminance_of(mean_a, mean_b, data_range), (2 * covariance + c2) / (spread + c2)


def test_away_from_the_border_ssim_is_that_of_skimage():
    x, y = pair(2, 3, 40, 33)
    found = ssim_map(x, y, data_range=1.5)
    for i in range(2):
        _, expected = structural_similarity(
            x[i].numpy(),
            y[i].numpy(),
            channel_axis=0,
            data_range=1.5,
            full=True,
            gaussian_weights=True,
            use_sample_covariance=False,
        )
        inside = np.s_[5:-5, 5:-5]
        np.testing.assert_allclose(found[i].numpy()[inside], expected.mean(0)[inside], atol=1e-12)


def test_away_from_the_border_ssim_of_volumes_is_that_of_monai():
    x, y = pair(2, 1, 13, 20, 24)
    expected, _ = compute_ssim_and_cs(x, y, 3, (7,) * 3, (1.5 * 7 / 11,) * 3, data_range=1.0)
    found = ssim_map(x, y, data_range=1.0, window=7)
    torch.testing.assert_close(
        found[:, 3:-3, 3:-3, 3:-3], expected[:, 0].double(), atol=2e-5, rtol=0
    )


@pytest.mark.parametrize("at", [(0, 0), (4, 6), (5, 7), (11, 3)])
def test_windows_share_their_weights_among_the_valid_pixels_inside(at):
    x, y = pair(1, 1, 12, 13)
    valid = torch.ones(1, 12, 13, dtype=torch.bool)
    valid[0, 2:4, 5:9] = False
    luminance, contrast = brute_force(
        x[0, 0].numpy(), y[0, 0].numpy(), valid[0].numpy(), at, data_range=0.7, window=7
    )
    found = ssim_map(x, y, data_range=0.7, window=7, valid=valid)
    assert found[0][at].item() == pytest.approx(luminance * contrast, abs=1e-12)


def test_a_short_d_axis_cuts_the_window_off():
    x, y = pair(1, 1, 3, 9, 10)
    luminance, contrast = brute_force(
        x[0, 0].numpy(), y[0, 0].numpy(), np.ones((3, 9, 10)), (0, 4, 9), data_range=1.0, window=7
    )
    found = ssim_map(x, y, data_range=1.0, window=7)
    assert found[0, 0, 4, 9].item() == pytest.approx(luminance * contrast, abs=1e-12)


@pytest.mark.parametrize("measure", [ssim_map, multi_scale_ssim_map])
@pytest.mark.parametrize("shape", [(2, 2, 48, 37), (2, 1, 7, 24, 21)])
def test_equal_images_are_alike_by_one_everywhere(measure, shape):
    x, _ = pair(*shape)
    found = measure(x, x.clone(), data_range=1.0)
    torch.testing.assert_close(found, torch.ones_like(found), atol=1e-12, rtol=0)


@pytest.mark.parametrize("measure", [ssim_map, multi_scale_ssim_map])
def test_invalid_pixels_count_nowhere_and_get_one(measure):
    x, y = pair(2, 1, 45, 33)
    valid = torch.ones(2, 45, 33, dtype=torch.bool)
    valid[0, :, 20:] = False
    valid[1, 10:33, 3:30] = False
    expected = measure(x, y, data_range=1.0, valid=valid)
    x[~valid[:, None]] = torch.nan
    y[~valid[:, None]] = 1e9
    found = measure(x, y, data_range=1.0, valid=valid)
    assert found.equal(expected)
    assert (found[~valid] == 1).all()
    assert (found[valid] < 1).any()


@pytest.mark.parametrize("measure", [ssim_map, multi_scale_ssim_map])
def test_padding_at_the_end_changes_no_pixel(measure):
    x, y = pair(1, 1, 45, 48)
    valid = torch.zeros(1, 64, 80, dtype=torch.bool)
    valid[:, :45, :48] = True
    padded = [torch.nn.functional.pad(image, (0, 32, 0, 19), value=7.0) for image in (x, y)]
    options = {"scales": 3} if measure is multi_scale_ssim_map else {}
    expected = measure(x, y, data_range=1.0, **options)
    found = measure(*padded, data_range=1.0, valid=valid, **options)
    torch.testing.assert_close(found[:, :45, :48], expected)


@pytest.mark.parametrize("measure", [ssim_map, multi_scale_ssim_map])
def test_the_gradient_is_finite_where_pixels_are_equal_flat_or_invalid(measure):
    x = torch.zeros(1, 1, 24, 24)
    x[..., 12:] = torch.rand(12, generator=torch.Generator().manual_seed(0))
    y = x.clone()
    y[..., 18:, :] = 1 - y[..., 18:, :]
    valid = torch.ones(1, 24, 24, dtype=torch.bool)
    valid[:, :6] = False
    x[..., :6, :] = torch.nan
    y.requires_grad_()
    measure(x, y, data_range=1.0, valid=valid).mean().backward()
    assert y.grad is not None
    assert y.grad.isfinite().all()
    assert y.grad[..., 6:, :].any()
    assert not y.grad[..., :6, :].any()


def test_the_gradient_is_that_of_finite_differences():
    x, y = (image[..., :12, :12] for image in pair(1, 1, 12, 12))
    y.requires_grad_()
    assert torch.autograd.gradcheck(
        lambda y: multi_scale_ssim_map(x, y, data_range=1.0, window=5).mean(), (y,)
    )


def test_flat_images_differ_by_the_luminance_of_the_coarsest_scale():
    x, y = torch.full((1, 1, 64, 64), 0.5), torch.full((1, 1, 64, 64), 0.8)
    luminance = luminance_of(0.5, 0.8, 2.0)
    torch.testing.assert_close(
        ssim_map(x, y, data_range=2.0), torch.full((1, 64, 64), luminance), atol=1e-6, rtol=0
    )
    exponent = 0.3001 / (0.0448 + 0.2856 + 0.3001)  # of the third scale of three
    torch.testing.assert_close(
        multi_scale_ssim_map(x, y, data_range=2.0),
        torch.full((1, 64, 64), luminance**exponent),
        atol=1e-6,
        rtol=0,
    )


def test_what_half_the_resolution_cannot_see_counts_at_the_finest_scale_only():
    x, _ = pair(1, 1, 32, 32)
    sign = (-1.0) ** (torch.arange(32)[:, None] + torch.arange(32))
    y = x + 0.2 * sign  # the same after averaging 2 x 2
    exponent = 0.0448 / (0.0448 + 0.2856)
    found = multi_scale_ssim_map(x, y, data_range=1.0, scales=2)
    for at in ((16, 15), (0, 31)):
        _, contrast = brute_force(
            x[0, 0].numpy(), y[0, 0].numpy(), np.ones((32, 32)), at, data_range=1.0, window=11
        )
        assert found[0][at].item() == pytest.approx(contrast**exponent, abs=1e-9)


def test_two_scales_are_those_of_the_image_and_of_its_halved_copy():
    x, y = pair(1, 1, 24, 24, noise=1.0)
    half = [torch.nn.functional.avg_pool2d(image, 2)[0, 0].numpy() for image in (x, y)]
    options = {"data_range": 1.0, "window": 5}
    _, fine = brute_force(x[0, 0].numpy(), y[0, 0].numpy(), np.ones((24, 24)), (0, 0), **options)
    luminance, coarse = brute_force(*half, np.ones((12, 12)), (0, 0), **options)
    weights = np.array([0.0448, 0.2856]) / 0.3304
    expected = max(fine, 0.01) ** weights[0] * (max(coarse, 0.01) * luminance) ** weights[1]
    found = multi_scale_ssim_map(x, y, **options, scales=2)
    assert found[0, 0, 0].item() == pytest.approx(expected, abs=1e-9)  # corners interpolate nothing


def test_coarse_terms_are_linear_between_their_cells():
    x, y = pair(1, 1, 24, 24)
    y[..., 12:] += 0.4
    smooth = multi_scale_ssim_map(x, y, data_range=1.0, window=5, scales=3)[0]
    fine = multi_scale_ssim_map(x, y, data_range=1.0, window=5, scales=1)[0]
    assert smooth.diff(dim=1).abs().max() < fine.diff(dim=1).abs().max()


def test_opposite_images_are_not_alike_however_the_signs_multiply():
    x, _ = pair(1, 1, 16, 16)
    found = multi_scale_ssim_map(x, -x, data_range=1.0, scales=1)
    torch.testing.assert_close(found, torch.full_like(found, 1e-4))  # 0.01 of each term


def test_slices_that_alternate_are_averaged_only_where_d_is_long_enough():
    def mean_of(depth: int) -> float:
        x, _ = pair(1, 1, depth, 16, 16)
        y = x + 0.5 * (-1.0) ** torch.arange(depth).reshape(-1, 1, 1)
        return multi_scale_ssim_map(x, y, data_range=1.0, window=5, scales=2).mean().item()

    assert mean_of(10) > 0.8  # halved to 5, as long as the window, and the difference is gone
    assert mean_of(8) < 0.5


def test_a_variance_survives_a_large_mean():
    x, y = pair(1, 1, 30, 30)
    x, y = x + 5000, y + 5000
    found = ssim_map(x.float(), y.float(), data_range=1.0)
    rounded = ssim_map(x.float().double(), y.float().double(), data_range=1.0)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, rounded.float())


def test_each_item_has_its_own_range():
    x, y = pair(2, 1, 20, 20)
    together = multi_scale_ssim_map(x, y, data_range=torch.tensor([1.0, 3.0]))
    for i, data_range in enumerate((1.0, 3.0)):
        alone = multi_scale_ssim_map(x[i : i + 1], y[i : i + 1], data_range=data_range)
        torch.testing.assert_close(together[i], alone[0])


@pytest.mark.parametrize(
    ("size", "window", "scales"),
    [
        ((64, 64), 11, 3),
        ((160, 300), 11, 4),  # 5 scales of an 11-pixel window need more than 160 pixels
        ((161, 300), 11, 5),
        ((2000, 2000), 11, 5),
        ((4, 64, 48), 11, 3),
        ((11, 11), 11, 1),
    ],
)
def test_so_many_scales_fit(size, window, scales):
    assert largest_scales(size, window) == scales


def test_an_image_of_64_pixels_has_a_finite_map():
    x, y = pair(1, 1, 64, 64)
    found = multi_scale_ssim_map(x, y, data_range=1.0)
    assert found.shape == (1, 64, 64)
    assert found.isfinite().all()


def test_what_cannot_be_compared_is_refused():
    x, y = pair(1, 1, 20, 20)
    with pytest.raises(ValueError, match="two images of one shape"):
        ssim_map(x, y[..., :-1], data_range=1.0)
    with pytest.raises(ValueError, match="odd number of pixels from 3 on, got 8"):
        ssim_map(x, y, data_range=1.0, window=8)
    with pytest.raises(ValueError, match=r"21 pixels does not fit in images of \(20, 20\)"):
        ssim_map(x, y, data_range=1.0, window=21)
    with pytest.raises(ValueError, match="1 to 1 scales with a window of 11, got 2"):
        multi_scale_ssim_map(x, y, data_range=1.0, scales=2)
    with pytest.raises(ValueError, match="data_range must be positive"):
        ssim_map(x, y, data_range=0.0)
    with pytest.raises(ValueError, match="valid must be"):
        ssim_map(x, y, data_range=1.0, valid=torch.ones(20, 20, dtype=torch.bool))
