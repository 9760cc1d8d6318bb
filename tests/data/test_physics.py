"""Changes of acquisition against their closed forms; none moves anything."""

import math

import numpy as np
import pytest
import torch

from medssl.data import physics
from medssl.data.augment import Augmentation
from medssl.data.physics import (
    CTAugmentation,
    MRAugmentation,
    PartAugmentation,
    UltrasoundAugmentation,
    XRayAugmentation,
)

STILL = {"intensity_probability": 0.0, "noise_probability": 0.0, "blur_probability": 0.0}
KINDS = {
    MRAugmentation: {"artefact_probability": 1.0, "inversion_probability": 0.5},
    CTAugmentation: {"kernel_probability": 1.0},
    XRayAugmentation: {"collimation_probability": 1.0},
    UltrasoundAugmentation: {"echo_probability": 1.0},
    PartAugmentation: {"optics_probability": 1.0},
}


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def picture(*shape: int) -> torch.Tensor:
    return torch.randn(shape or (2, 24, 32), generator=rng(1))


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("scale", [1.0, 1000.0])
def test_every_kind_changes_pixels_in_any_unit_and_keeps_their_shape(kind, scale):
    """The same draws on pixels in another unit give the same change."""
    pixels = picture(1, 24, 32)
    plain = kind(**STILL, **KINDS[kind])(pixels, rng(3))
    scaled = kind(**STILL, **KINDS[kind])(pixels * scale + 5 * scale, rng(3))
    assert plain.shape == pixels.shape
    assert plain.isfinite().all()
    assert not torch.allclose(plain, pixels)
    torch.testing.assert_close((scaled - 5 * scale) / scale, plain, rtol=1e-3, atol=2e-3)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_what_never_happens_leaves_the_general_changes(kind):
    off = dict.fromkeys(KINDS[kind], 0.0)
    pixels = picture()
    general = Augmentation()(pixels, rng(4))
    assert torch.equal(kind(**off)(pixels, rng(4)), general)


def test_inversion_turns_the_range_over():
    pixels = torch.tensor([[[-1.0, 0.0, 3.0]]])
    assert physics.inverted(pixels).flatten().tolist() == [3.0, 2.0, -1.0]


def test_a_bias_field_is_the_exponential_of_its_polynomial():
    pixels = torch.rand(1, 9, 11, generator=rng()) + 2
    pixels[0, 0, 0] = 0  # the darkest, about which nothing changes
    coefficients = torch.linspace(-0.4, 0.5, 10)
    y, x = np.meshgrid(np.linspace(-1, 1, 9), np.linspace(-1, 1, 11), indexing="ij")
    powers = [(0, 0), (0, 1), (0, 2), (0, 3), (1, 0), (1, 1), (1, 2), (2, 0), (2, 1), (3, 0)]
    terms = zip(coefficients.numpy(), powers, strict=True)
    field = np.exp(sum(c * y**i * x**j for c, (i, j) in terms))
    changed = physics.with_bias_field(pixels, coefficients)
    np.testing.assert_allclose(changed[0].numpy(), pixels[0].numpy() * field, rtol=1e-5)


@pytest.mark.parametrize("along", [0, 1])
def test_ghosts_are_copies_at_even_distances_along_phase_encoding(along):
    """A point, with every second line halved, keeps 3/4 and appears half a picture away as -1/4;
    the central line, which is not halved, adds half of the mean to all."""
    pixels = torch.zeros(1, 16, 16)
    pixels[0, 3, 5] = 1.0
    changed = physics.with_ghosts(pixels, 0.5, every=2, along=along)[0]
    there = (11, 5) if along == 0 else (3, 13)
    assert changed[3, 5].item() == pytest.approx(0.75 + 0.5 / 16, abs=1e-6)
    assert changed[there].item() == pytest.approx(-0.25 + 0.5 / 16, abs=1e-6)
    assert changed.sum().item() == pytest.approx(1, abs=1e-5)  # the centre of k-space stays


def test_a_spike_is_one_frequency():
    pixels = torch.rand(1, 16, 16, generator=rng())
    changed = physics.with_stripes(pixels, 0.2, (0.5, 0.25))
    difference = torch.fft.fft2(changed - pixels)[0].abs()
    size = 0.2 * float((pixels - pixels.min()).sum()) / 2
    found = (difference > 1e-3).nonzero().tolist()
    assert found == [[4, 2], [12, 14]]
    assert difference[4, 2].item() == pytest.approx(size, rel=1e-4)


def test_ringing_overshoots_an_edge_by_nine_percent():
    """Gibbs: a truncated series overshoots a step by 8.95 % of its height."""
    pixels = torch.zeros(1, 8, 512)
    pixels[..., 128:384] = 1
    changed = physics.with_ringing(pixels, 0.25)
    assert changed.max().item() == pytest.approx(1.0895, abs=0.01)
    assert torch.allclose(physics.with_ringing(pixels, 1.0), pixels, atol=1e-5)


def test_grain_is_correlated_over_its_size():
    for size in (1.0, 2.0):
        noise = physics.grain((1, 200, 200), size, rng())[0]
        lag = (noise[:, 2:] * noise[:, :-2]).mean().item()  # two Gaussians: sqrt(2) as wide
        assert lag == pytest.approx(math.exp(-(2**2) / (4 * size**2)), abs=0.05)
        assert noise.std().item() == pytest.approx(1, abs=1e-3)


def test_shutters_cover_their_shares():
    pixels = picture(1, 20, 40)
    changed = physics.collimated(pixels, [0.1, 0.2, 0.05, 0.25])
    assert (changed[:, :2] == pixels.min()).all()
    assert (changed[:, 16:] == pixels.min()).all()
    assert (changed[:, :, :2] == pixels.min()).all()
    assert (changed[:, :, 30:] == pixels.min()).all()
    assert torch.equal(changed[:, 2:16, 2:30], pixels[:, 2:16, 2:30])


def test_depth_gain_grows_from_the_top_to_the_bottom():
    pixels = torch.ones(1, 5, 3)
    pixels[0, 0, 0] = 0
    changed = physics.with_depth_gain(pixels, 1.0)[0, :, 1]
    wanted = [math.exp(change) for change in (-0.5, -0.25, 0, 0.25, 0.5)]
    assert changed.tolist() == pytest.approx(wanted, rel=1e-5)


def test_defocus_spreads_a_point_over_a_disk():
    pixels = torch.zeros(1, 21, 21)
    pixels[0, 10, 10] = 1
    changed = physics.defocused(pixels, 4.0)[0]
    assert changed.sum().item() == pytest.approx(1, abs=1e-5)
    assert changed[10, 10].item() == pytest.approx(1 / (math.pi * 4.0**2), rel=0.03)
    assert changed[10, 5].item() == 0  # 5 pixels away
    assert torch.equal(physics.defocused(pixels, 0.0), pixels)


def test_glare_is_highest_in_its_middle_and_saturates():
    pixels = torch.linspace(0, 1, 41 * 41).reshape(1, 41, 41)
    changed = physics.with_glare(pixels, 0.2, (0.25, 0.5), 8.0)
    gain = (changed - pixels)[0]
    assert divmod(int(gain.argmax()), 41) == (10, 20)
    assert gain[10, 20].item() == pytest.approx(0.2, rel=1e-4)
    assert gain[10, 24].item() == pytest.approx(0.2 * math.exp(-2 * 16 / 64), rel=1e-3)
    assert physics.with_glare(pixels, 5.0, (1.0, 1.0), 8.0).max() == 1
