"""Augmentation: every change against its closed form, on any unit and any number of channels."""

import math

import pytest
import torch

from medssl.data.augment import (
    Augmentation,
    add_noise,
    apply_gain,
    apply_gamma,
    blur,
    random_window,
)


def picture(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


def test_gain_keeps_the_mean_and_multiplies_the_spread():
    pixels = picture(2, 30, 40)
    changed = apply_gain(pixels, 1.3)
    assert changed.mean().item() == pytest.approx(pixels.mean().item(), abs=1e-5)
    assert changed.std().item() == pytest.approx(1.3 * pixels.std().item(), rel=1e-5)


def test_offset_counts_in_standard_deviations():
    pixels = 50 * picture(1, 20, 20) + 1000
    changed = apply_gain(pixels, 1.0, offset=-0.5)
    expected = pixels - 0.5 * pixels.std(correction=0)
    torch.testing.assert_close(changed, expected, rtol=1e-5, atol=1e-2)


def test_gamma_keeps_both_ends_and_squares_what_lies_between():
    pixels = torch.tensor([[[-2.0, 0.0, 2.0]]])  # 0, 1/2 and 1 of its range
    assert apply_gamma(pixels, 2.0).flatten().tolist() == pytest.approx([-2.0, -1.0, 2.0])


def test_gamma_leaves_a_constant_picture_finite():
    assert torch.equal(apply_gamma(torch.full((1, 4, 4), 3.0), 1.7), torch.full((1, 4, 4), 3.0))


def test_blur_spreads_a_point_as_a_gaussian_of_that_sigma():
    pixels = torch.zeros(1, 41, 41)
    pixels[0, 20, 20] = 1
    blurred = blur(pixels, 2.0)[0]
    offsets = torch.arange(41.0) - 20
    assert blurred.sum().item() == pytest.approx(1, abs=1e-5)
    variance = (blurred.sum(0) * offsets**2).sum()
    assert variance.sqrt().item() == pytest.approx(2.0, rel=0.03)  # the kernel ends at 3 sigma
    ratio = blurred[20, 21] / blurred[20, 20]
    assert ratio.item() == pytest.approx(math.exp(-0.5 * (1 / 2.0) ** 2), rel=1e-4)


def test_blur_does_not_mix_channels_and_keeps_constants_to_the_edge():
    pixels = torch.stack([torch.zeros(9, 9), torch.full((9, 9), 7.0)])
    torch.testing.assert_close(blur(pixels, 1.5), pixels)


def test_noise_is_a_share_of_the_pixels_own_spread():
    pixels = 100 * picture(1, 200, 200)
    added = add_noise(pixels, 0.2, torch.Generator().manual_seed(0)) - pixels
    assert (added.std() / pixels.std()).item() == pytest.approx(0.2, rel=0.02)


def test_the_unit_of_the_pixels_does_not_matter():
    """HU or normalized: the same draw gives the same picture in either unit."""
    pixels, augmentation = picture(3, 24, 24), Augmentation()
    for seed in range(5):
        small = augmentation(pixels, torch.Generator().manual_seed(seed))
        large = augmentation(500 * pixels - 100, torch.Generator().manual_seed(seed))
        torch.testing.assert_close(large, 500 * small - 100, rtol=1e-3, atol=0.5)


def test_the_generator_alone_decides():
    pixels, augmentation = picture(1, 16, 16), Augmentation()
    first, again, other = (
        augmentation(pixels, torch.Generator().manual_seed(seed)) for seed in (3, 3, 4)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_probability_zero_leaves_the_picture_alone():
    still = Augmentation(intensity_probability=0, noise_probability=0, blur_probability=0)
    pixels = picture(1, 16, 16)
    assert torch.equal(still(pixels, torch.Generator().manual_seed(0)), pixels)


@pytest.mark.parametrize("wrong", [{"gain": 1.0}, {"offset": -0.1}, {"blur": 0.0}])
def test_amounts_without_meaning_are_refused(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        Augmentation(**wrong)


def test_a_random_window_is_the_window_that_ct_would_have_had():
    """-160 to 240 HU as [0, 1], windowed again, against the narrower window of the HU."""
    hu = torch.linspace(-300, 400, 7001)
    wide = ((hu + 160) / 400).clamp(0, 1)
    draws = torch.rand(2, generator=torch.Generator().manual_seed(4)).tolist()
    width = 400 * (0.2 + 0.3 * draws[0])
    start = -160 + draws[1] * (400 - width)
    narrow = random_window(
        wide, torch.Generator().manual_seed(4), limits=(0.0, 1.0), share=(0.2, 0.5)
    )
    torch.testing.assert_close(narrow, ((hu - start) / width).clamp(0, 1), atol=1e-5, rtol=0)


def test_random_windows_have_the_asked_widths_and_reach_both_ends():
    ramp, generator = torch.linspace(-2, 2, 4001), torch.Generator().manual_seed(0)
    widths, starts, ends = [], [], []
    for _ in range(400):
        view = random_window(ramp, generator, limits=(-2.0, 2.0), share=(0.5, 0.75))
        assert (view.min(), view.max()) == (-2, 2)
        shown = ramp[(view > -2) & (view < 2)]
        widths.append((shown.max() - shown.min()).item() / 4)
        starts.append(shown.min().item())
        ends.append(shown.max().item())
        assert starts[-1] < 0 < ends[-1]  # the centre is always inside from a half on
    assert 0.498 < min(widths) < 0.51
    assert 0.74 < max(widths) < 0.751
    assert min(starts) < -1.95
    assert max(ends) > 1.95


def test_the_whole_window_changes_nothing():
    pixels = picture(1, 6, 6)
    limits = (pixels.min().item(), pixels.max().item())
    same = random_window(pixels, torch.Generator(), limits=limits, share=(1.0, 1.0))
    torch.testing.assert_close(same, pixels)
