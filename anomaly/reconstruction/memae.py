"""MemAE, a memory-augmented autoencoder (Gong et al., ICCV 2019, https://arxiv.org/abs/1904.02639)."""

import math
from collections.abc import Mapping
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from anomaly.examples import smooth_pictures, smooth_volumes
from anomaly.reconstruction.residual import ReconstructionDetector
from anomaly.selection import Selection
from anomaly.valid import WholeImage, mean_over_valid
from medssl.data.sample import Sample
from medssl.models.conv_autoencoder import AutoencoderShape, ConvDecoder, ConvEncoder
from medssl.models.precision import full_precision
from medssl.training import Trainable, TrainingPlan

_NETWORK = AutoencoderShape(latent_dim=64)
_PLAN = TrainingPlan(
    total_samples=50_000, batch_size=32, learning_rate=1e-4, weight_decay=(0.0, 0.0)
)
_EPSILON = 1e-12


class MemAE(ReconstructionDetector):
    """The squared difference between an image and what a few memorized normal latents give back.

    The decoder never sees a latent of the image itself, only a sparse mixture of learnt ones.

    network: channels, latent and size of the encoder and its decoder. Without a size each position
        of the coarsest level looks into the memory on its own, as the paper does for videos; with
        one, the whole image does once.
    num_memory: latents in the memory; the authors' code has 2000 for videos, the paper 500 and 100
        for small pictures.
    shrink_threshold: weights of the mixture up to this one become 0 (eq. 7); the paper has 1 to 3
        times 1 / num_memory, and None is the lowest of these.
    entropy_weight: of the mixture's entropy in the loss.
    sigma: of the Gaussian on the maps, in pixels, for all axes or one for each.
    top: share of the valid pixels, those with the largest values, whose mean is the score.
    plan, selection, seed: as of `LearnedDetector`; the plan has the learning rate of the authors'
        code.
    The map is the square of x - x_hat, the mean over channels.
    Differs from the paper: both terms of the loss are means, over pixels and over positions, as in
    the authors' code; the network; AdamW with a cosine of the learning rate. That code looks up by
    inner products and has a threshold of 0.0025 for 2000 latents, which hardly a weight could pass
    with the cosines that the paper has and that are taken here.
    """

    def __init__(
        self,
        *,
        network: AutoencoderShape = _NETWORK,
        num_memory: int = 2000,
        shrink_threshold: float | None = None,
        entropy_weight: float = 0.0002,
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
        self.network, self.num_memory = network, num_memory
        self.shrink_threshold, self.entropy_weight = shrink_threshold, entropy_weight
        self.trainable: MemorizedReconstruction = self.new_trainable()

    def new_trainable(self) -> "MemorizedReconstruction":
        """As of `LearnedDetector`."""
        memory = Memory(
            self.num_memory, self.network.latent_dim, shrink_threshold=self.shrink_threshold
        )
        return MemorizedReconstruction(self.network, memory, entropy_weight=self.entropy_weight)

    def residual(self, images: Tensor, valid: Tensor) -> Tensor:
        """(x - x_hat) ** 2."""
        return self.trainable.errors(images)[0]

    @classmethod
    def example(cls) -> tuple[Self, list[Sample]]:
        """Two levels, ten memorized latents and a few steps on smooth pictures."""
        network = AutoencoderShape(channels=(8, 16), latent_dim=4)
        plan = TrainingPlan(total_samples=20, batch_size=4, learning_rate=5e-3)
        return cls(network=network, num_memory=10, plan=plan), smooth_pictures()

    @classmethod
    def example_volume(cls) -> tuple[Self, list[Sample]]:
        """Two levels, ten memorized latents and a few steps on smooth volumes."""
        network = AutoencoderShape(channels=(8, 16), latent_dim=4, dims=3)
        plan = TrainingPlan(total_samples=20, batch_size=4, learning_rate=5e-3)
        return cls(network=network, num_memory=10, plan=plan), smooth_volumes()


class Memory(nn.Module):
    """Learnt latents, looked up by their cosine with a query.

    num_memory: rows of the memory. latent_dim: of the queries and of each row.
    shrink_threshold: mixture weights up to this become 0; None is 1 / num_memory.
    """

    def __init__(
        self, num_memory: int, latent_dim: int, *, shrink_threshold: float | None = None
    ) -> None:
        super().__init__()
        if num_memory < 2:
            raise ValueError(f"num_memory must be at least 2 to choose from, got {num_memory}")
        threshold = 1 / num_memory if shrink_threshold is None else shrink_threshold
        largest = math.exp(2) / (num_memory - 1 + math.exp(2))  # one cosine of 1, the rest -1
        if not 0 <= threshold < largest:
            raise ValueError(
                f"no weight of {num_memory} latents is above {largest:.2g}, got a shrink_threshold "
                f"of {shrink_threshold}; give one to three times 1 / num_memory"
            )
        self.shrink_threshold = threshold
        bound = latent_dim**-0.5
        self.rows = nn.Parameter(torch.empty(num_memory, latent_dim).uniform_(-bound, bound))

    def forward(self, queries: Tensor) -> tuple[Tensor, Tensor]:
        """queries: (B, E) or (B, E, *grid).

        Returns the mixtures, of the same shape, and their weights (B, M) or (B, *grid, M). Where no
        weight is above the threshold, all are 0 and so is the mixture.
        """
        with full_precision(queries):
            directions = F.normalize(queries.float().movedim(1, -1), dim=-1)  # (B, *grid, E)
            cosines = directions @ F.normalize(self.rows.float(), dim=-1).mT  # (B, *grid, M)
            weights = shrunk(cosines.softmax(-1), self.shrink_threshold)
            mixtures = weights @ self.rows.float()  # (B, *grid, E)
        return mixtures.movedim(-1, 1), weights


def shrunk(weights: Tensor, threshold: float) -> Tensor:
    """Weights (..., M) with those up to the threshold set to 0, and the rest of sum 1 (eq. 7)."""
    above = weights - threshold
    kept = F.relu(above) * weights / (above.abs() + _EPSILON)
    return F.normalize(kept, p=1, dim=-1)


def entropy(weights: Tensor) -> Tensor:
    """Mean over positions of the entropy of their weights (..., M), in nats; a scalar."""
    return -(weights * (weights + _EPSILON).log()).sum(-1).mean()


class MemorizedReconstruction(Trainable):
    """The networks and the memory of `MemAE` and their loss."""

    views = WholeImage()
    accumulation = "exact"

    def __init__(self, network: AutoencoderShape, memory: Memory, *, entropy_weight: float) -> None:
        super().__init__()
        self.encoder, self.decoder = ConvEncoder(network), ConvDecoder(network)
        self.memory = memory
        self.entropy_weight = entropy_weight

    def errors(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Squared errors (B, *spatial) of images (B, C, *spatial), and the mixtures' weights."""
        mixtures, weights = self.memory(self.encoder(images))
        rebuilt = self.decoder(mixtures, images.shape[2:])
        return (images - rebuilt).square().mean(1), weights

    def loss(self, views: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Mean squared error over the valid pixels, and the weighted entropy."""
        errors, weights = self.errors(views["image"])
        error, spread = mean_over_valid(errors, views["valid"]).mean(), entropy(weights)
        return {"loss": error + self.entropy_weight * spread, "error": error, "entropy": spread}
