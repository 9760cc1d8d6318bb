"""Coarse noise, where it is added, and what a network does that learnt to remove it."""

import numpy as np
import pytest
import torch
from torch import nn

from anomaly.base import NormalData
from anomaly.examples import smooth_pictures, smooth_volumes
from anomaly.reconstruction.denoising import (
    Denoising,
    DenoisingAutoencoder,
    NoisyImage,
    coarse_noise,
)
from anomaly.reconstruction.residual import intensity_limits
from medssl.data.sample import collate
from medssl.models.conv_autoencoder import UNet
from medssl.training import TrainingPlan


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def views_of(samples, cells=8):
    rows = [NoisyImage(cells)(sample, seeded(i)) for i, sample in enumerate(samples)]
    return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}


class Recording(nn.Module):
    """Keeps what it is shown and answers what it was told to."""

    def __init__(self, answer=None):
        super().__init__()
        self.answer = answer

    def forward(self, images):
        self.shown = images
        return images if self.answer is None else self.answer


def prepared(network, samples, noise_std=0.2):
    trainable = Denoising(network, NoisyImage(8), noise_std=noise_std)
    trainable.prepare(samples)
    return trainable


def test_noise_is_linear_between_the_points_of_its_grid():
    noise = coarse_noise((1, 128, 128), 16, seeded())[0].double().numpy()
    for axis in (0, 1):
        bends = np.abs(np.diff(noise, n=2, axis=axis)) > 1e-5
        per_line = bends.sum(axis).max()
        assert 14 <= per_line <= 2 * 16 + 2  # a bend may lie between two pixels; and the seam


def test_noise_has_unit_variance_at_its_points_and_less_between():
    noise = coarse_noise((4000, 9, 9), 9, seeded())  # a cell per pixel
    assert float(noise.std()) == pytest.approx(1.0, abs=0.01)
    assert float(noise.mean()) == pytest.approx(0.0, abs=0.01)
    coarse = coarse_noise((400, 64, 64), 16, seeded())
    assert 0.5 < float(coarse.std()) < 0.8  # 2 / 3 per axis of the variance, on average
    assert float(coarse.std()) == pytest.approx(2 / 3, abs=0.04)


def test_cells_have_equal_sides_in_an_image_that_is_not_square():
    noise = coarse_noise((1, 32, 128), 16, seeded())[0]
    bends = [(noise.diff(n=2, dim=axis).abs() > 1e-5).sum(axis).max() for axis in (0, 1)]
    assert bends[0] <= 2 * 4 + 2
    assert 14 <= bends[1] <= 2 * 16 + 2


def test_noise_is_moved_at_random():
    seams = set()
    for seed in range(20):
        noise = coarse_noise((1, 64, 64), 4, seeded(seed))[0]
        jump = (noise - noise.roll(1, 0)).abs().mean(1)  # of each row to the one before
        seams.add(int(jump.argmax()))
    assert len(seams) > 10


@pytest.mark.parametrize("shape", [(2, 20, 13), (1, 6, 20, 13)])
def test_noise_has_the_shape_of_the_image(shape):
    noise = coarse_noise(shape, 16, seeded())
    assert noise.shape == shape
    assert noise.equal(coarse_noise(shape, 16, seeded()))
    assert not noise.equal(coarse_noise(shape, 16, seeded(1)))


@pytest.mark.parametrize("make", [smooth_pictures, smooth_volumes])
def test_noise_is_a_share_of_the_intensities_and_on_valid_pixels_only(make):
    samples = make(3)
    low, high = intensity_limits(samples)
    views, network = views_of(samples), Recording()
    prepared(network, samples, noise_std=0.3).loss(views)
    valid = views["valid"][:, None]
    assert not valid.all()
    added = network.shown - views["image"]
    expected = torch.where(valid, 0.3 * (high - low) * views["noise"], 0.0)
    torch.testing.assert_close(added, expected, rtol=1e-3, atol=1e-5)


def test_the_loss_compares_with_the_image_without_noise():
    samples = smooth_pictures(3)
    views = views_of(samples)
    assert prepared(Recording(views["image"]), samples).loss(views)["loss"] == 0
    given_back = prepared(Recording(), samples)
    low, high = intensity_limits(samples)
    noise = (0.2 * (high - low) * views["noise"][:, 0]).square()
    means = [noise[i][valid].mean() for i, valid in enumerate(views["valid"])]
    torch.testing.assert_close(given_back.loss(views)["loss"], torch.stack(means).mean())


def test_halves_of_a_batch_have_its_gradient_on_average():
    samples = smooth_pictures(4)
    trainable = prepared(UNet(1, channels=(8, 16)), samples)
    views = views_of(samples)

    def gradient(rows):
        trainable.zero_grad()
        trainable.loss({name: view[rows] for name, view in views.items()})["loss"].backward()
        return trainable.network.out.weight.grad.clone()

    halves = (gradient(slice(0, 2)) + gradient(slice(2, 4))) / 2
    torch.testing.assert_close(gradient(slice(None)), halves, rtol=1e-3, atol=1e-6)


def test_nothing_is_added_when_scoring():
    detector, samples = DenoisingAutoencoder.example()
    detector.fit(NormalData(samples))
    detector.trainable.network = Recording()
    found = detector.predict(collate(samples[1:]))
    assert (found.score == 0).all()
    pixels = torch.stack([sample.images["image"].pixels for sample in samples[1:]])
    assert detector.trainable.network.shown.equal(pixels)


def test_a_trained_network_takes_noise_off_and_leaves_normal_detail():
    samples = smooth_pictures(20)[1:]
    plan = TrainingPlan(total_samples=400, batch_size=8, learning_rate=3e-3)
    detector = DenoisingAutoencoder(channels=(8, 16), noise_cells=32, plan=plan)
    detector.fit(NormalData(samples[:-3]))
    views = views_of(samples[-3:], cells=32)
    noise = 0.2 * detector.trainable.span_ * views["noise"]
    with torch.no_grad():
        rebuilt = detector.trainable.network(views["image"] + noise)
    assert (rebuilt - views["image"]).square().mean() < 0.7 * noise.square().mean()
    assert detector.predict(collate(samples[-3:])).score.max() < 0.7 * noise.abs().mean()


def test_settings_that_add_nothing_are_refused():
    with pytest.raises(ValueError, match="noise needs a positive std and at least one cell"):
        DenoisingAutoencoder(noise_std=0.0)
