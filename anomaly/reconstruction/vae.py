"""Variational autoencoder (Kingma & Welling, ICLR 2014, https://arxiv.org/abs/1312.6114), as used
on brains by Baur et al., Medical Image Analysis 2021, https://arxiv.org/abs/2004.03271.
"""

from collections.abc import Mapping
from typing import Self

import torch
from torch import Tensor

from anomaly.examples import smooth_pictures, smooth_volumes
from anomaly.reconstruction.residual import ReconstructionDetector
from anomaly.selection import Selection
from anomaly.valid import WholeImage, mean_over_valid
from medssl.data.sample import Sample
from medssl.models.conv_autoencoder import AutoencoderShape, ConvDecoder, ConvEncoder
from medssl.training import Trainable, TrainingPlan

_NETWORK = AutoencoderShape(latent_dim=128)
_PLAN = TrainingPlan(
    total_samples=50_000, batch_size=32, learning_rate=1e-3, weight_decay=(0.0, 0.0)
)


class VAE(ReconstructionDetector):
    """The absolute difference between an image and what the mean of its latent gives back.

    The latent is drawn from a Gaussian that is kept near the standard one, so that all of it stands
    for normal images.

    network: channels, latent and size of the encoder and its decoder. The default keeps 128 numbers
        per position and takes any size; with a size it keeps 128 of the whole image, as the dense
        VAE of the paper keeps one vector.
    kl_weight: of the divergence from the standard Gaussian in the loss; 1 is the evidence lower
        bound where pixels follow a Laplace distribution of scale 1.
    sigma: of the Gaussian on the maps, in pixels, for all axes or one for each.
    top: share of the valid pixels, those with the largest values, whose mean is the score.
    plan, selection, seed: as of `LearnedDetector`.
    Nothing is drawn when scoring: the map is |x - x_hat| at the mean of the latent, the mean over
    channels.
    Differs from the paper: the network, AdamW with a cosine of the learning rate, and no processing
    of the maps that knows of brains.
    """

    def __init__(
        self,
        *,
        network: AutoencoderShape = _NETWORK,
        kl_weight: float = 1.0,
        sigma: float | list[float] = 0.0,
        top: float = 1.0,
        plan: TrainingPlan = _PLAN,
        selection: Selection | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(
            dims=network.dims,
            size=network.size,
            sigma=sigma,
            top=top,
            plan=plan,
            selection=selection,
            seed=seed,
        )
        if kl_weight < 0:
            raise ValueError(f"kl_weight must not be negative, got {kl_weight}")
        self.network, self.kl_weight = network, kl_weight
        self.trainable: VariationalReconstruction = self.new_trainable()

    def new_trainable(self) -> "VariationalReconstruction":
        """As of `LearnedDetector`."""
        return VariationalReconstruction(self.network, kl_weight=self.kl_weight)

    def residual(self, images: Tensor, valid: Tensor) -> Tensor:
        """|x - x_hat| at the mean of the latent."""
        mean, _ = self.trainable.posterior(images)
        return (images - self.trainable.decoder(mean, images.shape[2:])).abs().mean(1)

    @classmethod
    def example(cls) -> tuple[Self, list[Sample]]:
        """Two levels and a few steps on smooth pictures of one size."""
        network = AutoencoderShape(channels=(8, 16), latent_dim=4, size=(64, 48))
        plan = TrainingPlan(total_samples=20, batch_size=4, learning_rate=5e-3)
        return cls(network=network, plan=plan), smooth_pictures()

    @classmethod
    def example_volume(cls) -> tuple[Self, list[Sample]]:
        """Two levels and a few steps on smooth volumes."""
        network = AutoencoderShape(channels=(8, 16), latent_dim=4, dims=3)
        plan = TrainingPlan(total_samples=20, batch_size=4, learning_rate=5e-3)
        return cls(network=network, plan=plan), smooth_volumes()


class VariationalReconstruction(Trainable):
    """The networks of `VAE` and their loss; splitting a batch is exact but for the draws."""

    views = WholeImage()
    accumulation = "exact"

    def __init__(self, network: AutoencoderShape, *, kl_weight: float) -> None:
        super().__init__()
        self.encoder = ConvEncoder(network, outputs=2 * network.latent_dim)
        self.decoder = ConvDecoder(network)
        self.kl_weight = kl_weight

    def posterior(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log variance of the latent, each (B, latent_dim) or (B, latent_dim, *grid)."""
        mean, log_variance = self.encoder(images).float().chunk(2, dim=1)
        return mean, log_variance

    def loss(self, views: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Negative evidence lower bound per number of the image, the mean over items.

        "error" is its share of the reconstruction; "divergence" the KL of an item, in nats.
        """
        images, valid = views["image"], views["valid"]
        mean, log_variance = self.posterior(images)
        latent = mean + (log_variance / 2).exp() * torch.randn_like(mean)
        rebuilt = self.decoder(latent, images.shape[2:])

        error = mean_over_valid((images - rebuilt).abs().mean(1), valid)  # (B,)
        divergence = gaussian_kl(mean, log_variance)
        numbers = images.shape[1] * valid.flatten(1).sum(1)  # (B,), 0 has no bound
        share = torch.where(numbers > 0, divergence / numbers.clamp(min=1), 0.0)
        loss = (error + self.kl_weight * share).mean()
        return {"loss": loss, "error": error.mean(), "divergence": divergence.mean()}


def gaussian_kl(mean: Tensor, log_variance: Tensor) -> Tensor:
    """Divergence KL(N(mean, variance) || N(0, 1)) in nats, summed over the latent: (B,).

    mean, log_variance: (B, ...). Appendix B of Kingma & Welling.
    """
    each = (mean.square() + log_variance.exp() - 1 - log_variance) / 2
    return each.flatten(1).sum(1)
