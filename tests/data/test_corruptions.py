"""Corruptions against their closed forms; every severity is worse than the one before."""

import math

import numpy as np
import PIL.Image
import pytest
import torch
from scipy.fft import dctn

from medssl.data.corruptions import CORRUPTIONS, corrupt, corruptions_for, relative_drop
from medssl.data.modality import Modality

every_corruption = pytest.mark.parametrize("name", CORRUPTIONS)


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def picture(seed: int = 1, channels: int = 1) -> torch.Tensor:
    """Coarse and fine structure, 60 x 84 pixels, not all of it positive."""
    generator = rng(seed)
    coarse = torch.rand(1, channels, 6, 7, generator=generator)
    fine = torch.randn(channels, 60, 84, generator=generator)
    return torch.nn.functional.interpolate(coarse, (60, 84), mode="bilinear")[0] * 4 + 0.3 * fine


@every_corruption
@pytest.mark.parametrize("seed", range(5))
def test_each_severity_is_further_from_the_original_than_the_one_before(name, seed):
    pixels = picture(seed)
    distances = [
        (corrupt(pixels, name, severity, rng(seed)) - pixels).square().mean().item()
        for severity in range(1, 6)
    ]
    assert distances[0] > 0
    assert distances == sorted(set(distances))


@every_corruption
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_shape_and_type_stay_and_every_pixel_is_a_number(name, dtype):
    for pixels in (picture(channels=2).to(dtype), torch.full((1, 16, 24), 3.0, dtype=dtype)):
        before = pixels.clone()
        changed = corrupt(pixels, name, 5, rng())
        assert changed.shape == pixels.shape
        assert changed.dtype == dtype
        assert changed.isfinite().all()
        assert torch.equal(pixels, before)


@every_corruption
def test_pixels_in_another_unit_are_corrupted_alike(name):
    pixels = picture()
    plain = corrupt(pixels, name, 3, rng(2))
    scaled = corrupt(pixels * 500 - 1000, name, 3, rng(2))
    torch.testing.assert_close((scaled + 1000) / 500, plain, rtol=1e-3, atol=5e-3)


@every_corruption
def test_the_seed_decides_what_happens(name):
    pixels = picture()
    assert torch.equal(corrupt(pixels, name, 3, rng(4)), corrupt(pixels, name, 3, rng(4)))
    drawn = {tuple(corrupt(pixels, name, 3, rng(seed)).flatten().tolist()) for seed in range(6)}
    fixed = {"blur", "resolution", "contrast", "compression", "ringing", "defocus"}
    assert (len(drawn) == 1) == (name in fixed)


@pytest.mark.parametrize("name", ["noise", "dose", "quantum"])
def test_noise_has_its_share_of_the_images_deviation(name):
    pixels = picture()
    noise = corrupt(pixels, name, 4, rng()) - pixels
    assert noise.std().item() == pytest.approx(0.55 * pixels.std().item(), rel=0.05)


def test_photons_are_missed_most_where_a_radiograph_is_bright():
    """exp(-3) of the photons of the darkest pixel: exp(3 / 2) of its noise."""
    pixels = torch.zeros(1, 100, 200)
    pixels[..., 100:] = 1
    noise = (corrupt(pixels, "quantum", 3, rng()) - pixels)[0]
    ratio = (noise[:, 100:].std() / noise[:, :100].std()).item()
    assert ratio == pytest.approx(math.exp(1.5), rel=0.05)


def test_the_noise_of_a_dose_has_grain_and_that_of_photons_has_none():
    pixels = torch.linspace(0, 1, 200)[None, None].expand(1, 200, 200)
    for name, correlated in (("dose", math.exp(-1 / 4)), ("quantum", 0)):
        noise = (corrupt(pixels, name, 3, rng()) - pixels)[0]
        pairs = torch.stack([noise[1:].flatten(), noise[:-1].flatten()])
        assert torch.corrcoef(pairs)[0, 1].item() == pytest.approx(correlated, abs=0.03)


def test_contrast_is_lost_about_the_mean():
    pixels = picture()
    changed = corrupt(pixels, "contrast", 5, rng())
    torch.testing.assert_close(changed - pixels.mean(), 0.2 * (pixels - pixels.mean()))


def test_exposure_is_an_exponent_or_one_over_it():
    pixels = torch.linspace(0, 1, 101).reshape(1, 1, 101)
    found = {round(corrupt(pixels, "exposure", 5, rng(s))[0, 0, 50].item(), 4) for s in range(8)}
    assert found == {round(0.5**3, 4), round(0.5 ** (1 / 3), 4)}


def test_lost_resolution_is_pillows_resizing_down_and_up():
    pixels = picture()
    small = PIL.Image.fromarray(pixels[0].numpy()).resize((28, 20), PIL.Image.Resampling.BILINEAR)
    large = small.resize((84, 60), PIL.Image.Resampling.BILINEAR)  # 84 x 60 at a third
    changed = corrupt(pixels, "resolution", 3, rng())[0]
    torch.testing.assert_close(changed, torch.from_numpy(np.array(large)), rtol=0, atol=1e-4)


def test_compression_rounds_the_cosine_coefficients_of_blocks():
    pixels = picture()[:, :56, :80].double()
    low, high = pixels.amin(), pixels.amax()
    changed = (corrupt(pixels, "compression", 3, rng()) - low) / (high - low)
    frequency = torch.arange(8)
    steps = 0.02 * 8 * (1 + frequency[:, None] + frequency).double().numpy()
    for top in range(0, 56, 8):
        for left in range(0, 80, 8):
            block = changed[0, top : top + 8, left : left + 8].numpy()
            levels = dctn(block, norm="ortho") / steps
            assert abs(levels - levels.round()).max() < 1e-9


def test_a_side_that_is_no_multiple_of_a_block_is_compressed_as_well():
    pixels = picture()[:, :59, :83]
    whole = torch.nn.functional.pad(pixels, (0, 5, 0, 5), mode="replicate")
    assert torch.equal(
        corrupt(pixels, "compression", 2, rng()),
        corrupt(whole, "compression", 2, rng())[:, :59, :83],
    )


def test_speckle_is_largest_where_the_image_is_bright_and_spares_the_darkest():
    pixels = torch.linspace(0, 1, 100)[None, None].expand(1, 400, 100)
    spread = (corrupt(pixels, "speckle", 2, rng()) - pixels)[0].std(0)
    assert spread[0] == 0
    for brightness in (0.3, 0.5, 0.9):
        column = round(99 * brightness)
        near = spread[column - 2 : column + 3].mean().item()
        assert near == pytest.approx(0.2 * brightness, rel=0.1)


def test_shutters_reach_half_to_all_of_their_share():
    pixels = picture() + 10
    pixels[0, 30, 42] = 0  # the darkest
    for seed in range(10):
        covered = (corrupt(pixels, "collimation", 4, rng(seed)) == 0)[0]
        sides = [covered[:, 42].int().flip(0), covered[:, 42].int()]
        reach = [int(side.cumprod(0).sum()) / 60 for side in sides]
        assert all(0.08 <= share <= 0.21 for share in reach)


def test_a_modality_meets_what_its_machines_do():
    named = {name for modality in Modality for name in corruptions_for(modality)}
    assert named == set(CORRUPTIONS)
    assert {"bias_field", "ghosting", "ringing", "spike"} < set(corruptions_for(Modality.MR))
    assert {"collimation", "exposure"} < set(corruptions_for(Modality.XR))
    assert "ghosting" not in corruptions_for(Modality.XR)
    assert not {"contrast", "exposure"} & set(corruptions_for(Modality.CT))


@pytest.mark.parametrize("severity", [0, 6, -1, 2.5])
def test_a_severity_out_of_one_to_five_is_refused(severity):
    with pytest.raises(ValueError, match="severity must be 1, 2, 3, 4 or 5"):
        corrupt(picture(), "noise", severity, rng())


def test_unknown_names_and_pixels_that_cannot_change_are_refused():
    with pytest.raises(ValueError, match="no corruption is called 'snow'; there are noise, blur"):
        corrupt(picture(), "snow", 1, rng())
    with pytest.raises(ValueError, match=r"got \(60, 84\) torch.float32"):
        corrupt(picture()[0], "noise", 1, rng())
    with pytest.raises(ValueError, match="torch.int64"):
        corrupt(picture().long(), "noise", 1, rng())


def test_the_drop_is_the_share_of_the_metric_above_chance_that_is_lost():
    """One corruption costs 0.1 and 0.3 of the 0.4 above chance, the other nothing."""
    corrupted = {"noise": [0.8, 0.6], "blur": [0.9]}
    assert relative_drop(0.9, corrupted, chance=0.5) == pytest.approx((0.2 / 0.4 + 0) / 2)
    assert relative_drop(0.8, {"noise": [0.4]}) == pytest.approx(0.5)
    with pytest.raises(ValueError, match="above chance"):
        relative_drop(0.5, corrupted, chance=0.5)
    with pytest.raises(ValueError, match="one corruption or more"):
        relative_drop(0.9, {})
