"""The bound of a variational autoencoder against torch.distributions, and scores without draws."""

import pytest
import torch
from torch.distributions import Laplace, Normal, kl_divergence

from anomaly.base import NormalData
from anomaly.examples import smooth_pictures
from anomaly.reconstruction.vae import VAE, VariationalReconstruction, gaussian_kl
from anomaly.valid import WholeImage
from medssl.data.sample import collate
from medssl.models.conv_autoencoder import AutoencoderShape
from medssl.training import TrainingPlan

SPATIAL = AutoencoderShape(channels=(8, 16), latent_dim=4)
DENSE = AutoencoderShape(channels=(8, 16), latent_dim=4, size=(64, 48))
PLAN = TrainingPlan(total_samples=400, batch_size=8, learning_rate=3e-3, weight_decay=(0.0, 0.0))


def views_of(samples):
    rows = [WholeImage()(sample, torch.Generator()) for sample in samples]
    return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}


def normal(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def test_the_divergence_is_that_of_torch_distributions():
    mean, log_variance = normal(3, 4, 2, 5), normal(3, 4, 2, 6)[..., :5]
    posterior = Normal(mean.double(), (log_variance.double() / 2).exp())
    expected = kl_divergence(posterior, Normal(0.0, 1.0)).sum((1, 2, 3))
    torch.testing.assert_close(gaussian_kl(mean, log_variance).double(), expected)


def test_the_standard_gaussian_does_not_diverge_from_itself():
    assert gaussian_kl(torch.zeros(2, 7), torch.zeros(2, 7)).tolist() == [0.0, 0.0]


@pytest.mark.parametrize("network", [SPATIAL, DENSE])
def test_the_loss_is_the_bound_of_laplacian_pixels_per_pixel(network):
    views = views_of(smooth_pictures(3))
    trainable = VariationalReconstruction(network, kl_weight=1.0)
    torch.manual_seed(3)
    found = trainable.loss(views)

    mean, log_variance = trainable.posterior(views["image"])
    posterior = Normal(mean, (log_variance / 2).exp())
    torch.manual_seed(3)
    latent = posterior.loc + posterior.scale * torch.randn(mean.shape)
    pixels = Laplace(trainable.decoder(latent, (64, 48)), 1.0)
    per_pixel = []
    for i, valid in enumerate(views["valid"]):
        likelihood = pixels.log_prob(views["image"])[i, 0][valid].sum()
        own = Normal(posterior.loc[i], posterior.scale[i])
        divergence = kl_divergence(own, Normal(0.0, 1.0)).sum()
        per_pixel.append((divergence - likelihood) / valid.sum())
    expected = torch.stack(per_pixel).mean() - torch.tensor(2.0).log()  # Laplace's own constant
    torch.testing.assert_close(found["loss"], expected, rtol=1e-4, atol=1e-5)


def test_the_weight_scales_the_divergence_alone():
    views = views_of(smooth_pictures(2)[1:])
    found = {}
    for weight in (0.0, 1.0, 3.0):
        torch.manual_seed(0)
        trainable = VariationalReconstruction(SPATIAL, kl_weight=weight)
        found[weight] = {name: v.detach() for name, v in trainable.loss(views).items()}
    assert found[0.0]["loss"].equal(found[0.0]["error"])
    one, three = (float(found[w]["loss"] - found[0.0]["loss"]) for w in (1.0, 3.0))
    assert one == pytest.approx(float(found[1.0]["divergence"]) / (64 * 48), rel=1e-2)
    assert three == pytest.approx(3 * one, rel=1e-2)


def test_scores_are_at_the_mean_and_draw_nothing():
    detector, samples = VAE.example()
    detector.fit(NormalData(samples))
    batch = collate(samples)
    torch.manual_seed(1)
    before, state = detector.predict(batch), torch.get_rng_state()
    torch.manual_seed(2)
    with torch.no_grad():
        detector.trainable.encoder.to_latent[-1].bias[4:] += 5.0  # wider, around the same mean
    after = detector.predict(batch)
    assert before.score.equal(after.score)
    torch.manual_seed(1)
    assert torch.get_rng_state().equal(state)


def test_a_strong_divergence_makes_the_latent_forget_the_image():
    """With a huge weight every posterior becomes the prior, whatever the image."""
    samples = smooth_pictures(8)
    weak, strong = (
        VAE(network=SPATIAL, kl_weight=weight, plan=PLAN).fit(NormalData(samples))
        for weight in (1e-3, 1e3)
    )
    images = views_of(samples)["image"]
    with torch.no_grad():
        nats = [gaussian_kl(*one.trainable.posterior(images)).mean() for one in (weak, strong)]
    assert nats[1] < 0.05 * nats[0]


def test_a_negative_weight_is_refused():
    with pytest.raises(ValueError, match="kl_weight must not be negative, got -1"):
        VAE(kl_weight=-1)
