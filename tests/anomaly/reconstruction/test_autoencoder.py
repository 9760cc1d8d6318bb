"""Absolute and structural errors of an autoencoder: losses, maps and what they find."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from skimage.metrics import structural_similarity
from torch import Tensor, nn

from anomaly.base import NormalData
from anomaly.examples import smooth_pictures, smooth_volumes
from anomaly.reconstruction.autoencoder import (
    AbsoluteReconstruction,
    Autoencoder,
    SSIMAutoencoder,
    StructuralReconstruction,
)
from anomaly.valid import WholeImage
from medssl.data.sample import collate
from medssl.metrics import auroc
from medssl.models.conv_autoencoder import AutoencoderShape
from medssl.training import TrainingPlan

TINY = AutoencoderShape(channels=(8, 16), latent_dim=4)
PLAN = TrainingPlan(total_samples=400, batch_size=8, learning_rate=3e-3, weight_decay=(0.0, 0.0))


class Changed(nn.Module):
    """Gives back the image with a change that does not depend on it."""

    def __init__(self, change: Tensor):
        super().__init__()
        self.change = change

    def forward(self, images):
        return images + self.change


def views_of(samples):
    rows = [WholeImage()(sample, torch.Generator()) for sample in samples]
    return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}


def gradients(trainable, views):
    trainable.zero_grad()
    trainable.loss(views)["loss"].backward()
    return [parameter.grad.clone() for parameter in trainable.parameters()]


def with_blob(sample, strength):
    """A bright disk in the middle, and where it is."""
    image = sample.images["image"]
    places = torch.meshgrid(*(torch.arange(n) - n / 2 for n in image.spatial_shape), indexing="ij")
    inside = torch.stack(places).square().sum(0) < 5**2
    return sample.with_image(replace(image, pixels=image.pixels + strength * inside)), inside


@pytest.mark.parametrize("make", [smooth_pictures, smooth_volumes])
def test_the_absolute_loss_is_the_mean_difference_of_each_items_valid_pixels(make):
    samples = make(3)
    views = views_of(samples)
    assert not views["valid"].all()
    change = torch.rand(views["image"].shape, generator=torch.Generator().manual_seed(1)) - 0.5
    trainable = AbsoluteReconstruction(TINY)
    trainable.autoencoder = Changed(change)
    each = [
        change[i, 0][views["valid"][i]].abs().double().mean().item() for i in range(len(samples))
    ]
    assert float(trainable.loss(views)["loss"]) == pytest.approx(np.mean(each), rel=1e-5)


def test_channels_are_averaged_in_the_map():
    trainable = AbsoluteReconstruction(TINY)
    change = torch.tensor([1.0, -3.0]).reshape(1, 2, 1, 1)
    trainable.autoencoder = Changed(change)
    assert (trainable.errors(torch.zeros(1, 2, 4, 4)) == 2).all()


def test_the_structural_map_is_one_minus_skimages_ssim():
    sample = smooth_pictures(2)[1]
    image = sample.images["image"].pixels
    generator = torch.Generator().manual_seed(1)
    change = 0.3 * torch.randn(image.shape, generator=generator)
    low, high = -1.5, 2.5
    trainable = StructuralReconstruction(TINY, window=11)
    trainable.autoencoder = Changed(change)
    trainable.limits_ = torch.tensor([low, high])
    found = trainable.errors(image[None], torch.ones(1, *image.shape[1:], dtype=torch.bool))
    _, expected = structural_similarity(
        (image[0] - low).double().numpy(),
        (image[0] + change[0] - low).double().numpy(),
        data_range=high - low,
        gaussian_weights=True,
        sigma=1.5,
        use_sample_covariance=False,
        full=True,
    )
    inner = (slice(5, -5), slice(5, -5))
    np.testing.assert_allclose(found[0][inner], 1 - expected[inner], rtol=1e-3, atol=1e-5)


def test_structural_errors_do_not_depend_on_where_zero_lies():
    samples = smooth_pictures(4)
    change = 0.3 * torch.randn(64, 48, generator=torch.Generator().manual_seed(1))
    maps = []
    for level in (0.0, 50.0):
        moved = [
            s.with_image(replace(s.images["image"], pixels=s.images["image"].pixels + level))
            for s in samples
        ]
        trainable = StructuralReconstruction(TINY, window=7)
        trainable.autoencoder = Changed(change)
        trainable.prepare(moved)
        views = views_of(moved)
        maps.append(trainable.errors(views["image"], views["valid"])[views["valid"]])
    torch.testing.assert_close(maps[0], maps[1], rtol=1e-3, atol=1e-4)


def test_what_is_rebuilt_exactly_costs_nothing():
    samples = smooth_pictures(3)
    for trainable in (AbsoluteReconstruction(TINY), StructuralReconstruction(TINY, window=5)):
        trainable.prepare(samples)
        trainable.autoencoder = Changed(torch.zeros(()))
        assert float(trainable.loss(views_of(samples))["loss"]) == pytest.approx(0.0, abs=1e-6)


@pytest.mark.parametrize(
    "trainable", [AbsoluteReconstruction(TINY), StructuralReconstruction(TINY, window=5)]
)
def test_halves_of_a_batch_have_its_gradient_on_average(trainable):
    samples = smooth_pictures(4)
    trainable.prepare(samples)
    whole = gradients(trainable, views_of(samples))
    halves = [gradients(trainable, views_of(samples[i : i + 2])) for i in (0, 2)]
    for together, first, second in zip(whole, *halves, strict=True):
        torch.testing.assert_close(together, (first + second) / 2, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("kind", [Autoencoder, SSIMAutoencoder])
def test_a_disk_on_an_unseen_normal_stands_out(kind):
    samples = smooth_pictures(20)
    detector = kind(network=TINY, plan=PLAN, sigma=1.0).fit(NormalData(samples[1:-3]))
    for sample in samples[-3:]:
        changed, inside = with_blob(sample, 4.0)
        found = detector.predict(collate([sample, changed]))
        assert found.score[1] > found.score[0]
        assert auroc(found.maps["image"][1].flatten(), inside.flatten()) > 0.8


def test_a_wrong_size_says_what_to_set():
    detector, samples = Autoencoder.example()
    detector.fit(NormalData(samples))
    with pytest.raises(ValueError, match="set size in the preprocessing"):
        detector.predict(collate(smooth_pictures(1, (32, 32))))
