"""Autoencoders with an absolute error (Baur et al., Medical Image Analysis 2021,
https://arxiv.org/abs/2004.03271) or a structural one (Bergmann et al., VISIGRAPP 2019,
https://arxiv.org/abs/1807.02011).
"""

from collections.abc import Mapping, Sequence
from typing import Self

import torch
from torch import Tensor, nn

from anomaly.examples import smooth_pictures, smooth_volumes
from anomaly.reconstruction.residual import ReconstructionDetector, intensity_limits
from anomaly.selection import Selection
from anomaly.structure import ssim_map
from anomaly.valid import WholeImage, mean_over_valid
from medssl.data.sample import Sample
from medssl.models.conv_autoencoder import AutoencoderShape, ConvDecoder, ConvEncoder
from medssl.models.precision import full_precision
from medssl.training import Trainable, TrainingPlan

_NETWORK = AutoencoderShape()
_SSIM_NETWORK = AutoencoderShape(latent_dim=100)
_PLAN = TrainingPlan(
    total_samples=50_000, batch_size=32, learning_rate=1e-3, weight_decay=(0.0, 0.0)
)
_TINY_PLAN = TrainingPlan(total_samples=20, batch_size=4, learning_rate=5e-3)


class Autoencoder(ReconstructionDetector):
    """The absolute difference between an image and what a narrow latent keeps of it.

    network: channels, latent and size of the encoder and its decoder. The default keeps 16 numbers
        per position and takes any size; with a size it keeps 16 of the whole image, as in
        MedIAnomaly (Cai et al., 2024, https://arxiv.org/abs/2404.04518).
    sigma: of the Gaussian on the maps, in pixels, for all axes or one for each.
    top: share of the valid pixels, those with the largest values, whose mean is the score; the
        default is the mean of all, as in MedIAnomaly.
    plan, selection, seed: as of `LearnedDetector`.
    Both the loss and the map are |x - x_hat|, the mean over channels.
    Differs from the paper: the network, AdamW with a cosine of the learning rate, and no
    processing of the maps that knows of brains; no augmentation.
    """

    def __init__(
        self,
        *,
        network: AutoencoderShape = _NETWORK,
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
        self.network = network
        self.trainable: AbsoluteReconstruction = self.new_trainable()

    def new_trainable(self) -> "AbsoluteReconstruction":
        """As of `LearnedDetector`."""
        return AbsoluteReconstruction(self.network)

    def residual(self, images: Tensor, valid: Tensor) -> Tensor:
        """|x - x_hat|."""
        return self.trainable.errors(images)

    @classmethod
    def example(cls) -> tuple[Self, list[Sample]]:
        """Two levels and a few steps on smooth pictures of one size."""
        network = AutoencoderShape(channels=(8, 16), latent_dim=4, size=(64, 48))
        return cls(network=network, plan=_TINY_PLAN), smooth_pictures()

    @classmethod
    def example_volume(cls) -> tuple[Self, list[Sample]]:
        """Two levels and a few steps on smooth volumes, with a latent at each position."""
        network = AutoencoderShape(channels=(8, 16), latent_dim=4, dims=3)
        return cls(network=network, sigma=1.0, top=0.5, plan=_TINY_PLAN), smooth_volumes()


class SSIMAutoencoder(ReconstructionDetector):
    """What structure of an image a narrow latent does not keep.

    The structural similarity compares mean, contrast and correlation in a window around each
    pixel, so that an edge that is rebuilt a little beside its place counts less than a
    structure that is missing.

    network: as of `Autoencoder`, with 100 numbers.
    window: side of the window in pixels, odd; see `anomaly.structure.ssim_map`.
    sigma, top: as of `Autoencoder`; the paper scores pixels only.
    plan, selection, seed: as of `LearnedDetector`.
    The loss and the map are 1 - SSIM (eq. 8), from 0 to 2.
    Differs from the paper: the loss is a mean over pixels, not a sum; the constants of SSIM are
    taken on the span of normal intensities, whose lower end is 0 for it; the network; AdamW with
    a cosine of the learning rate.
    """

    unbounded = False

    def __init__(
        self,
        *,
        network: AutoencoderShape = _SSIM_NETWORK,
        window: int = 11,
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
        self.network, self.window = network, window
        self.trainable: StructuralReconstruction = self.new_trainable()

    def new_trainable(self) -> "StructuralReconstruction":
        """As of `LearnedDetector`."""
        return StructuralReconstruction(self.network, window=self.window)

    def residual(self, images: Tensor, valid: Tensor) -> Tensor:
        """1 - SSIM."""
        return self.trainable.errors(images, valid)

    @classmethod
    def example(cls) -> tuple[Self, list[Sample]]:
        """Two levels and a few steps on smooth pictures."""
        network = AutoencoderShape(channels=(8, 16), latent_dim=4)
        return cls(network=network, window=5, plan=_TINY_PLAN), smooth_pictures()

    @classmethod
    def example_volume(cls) -> tuple[Self, list[Sample]]:
        """Two levels and a few steps on smooth volumes."""
        network = AutoencoderShape(channels=(8, 16), latent_dim=4, dims=3)
        return cls(network=network, window=5, plan=_TINY_PLAN), smooth_volumes()


class AbsoluteReconstruction(Trainable):
    """The networks of `Autoencoder` and their loss."""

    views = WholeImage()
    accumulation = "exact"

    def __init__(self, network: AutoencoderShape) -> None:
        super().__init__()
        self.autoencoder = _Autoencoder(network)

    def errors(self, images: Tensor) -> Tensor:
        """|x - x_hat| (B, *spatial) of images (B, C, *spatial), the mean over channels."""
        return (images - self.autoencoder(images)).abs().mean(1)

    def loss(self, views: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Mean absolute difference over the valid pixels."""
        return {"loss": mean_over_valid(self.errors(views["image"]), views["valid"]).mean()}


class StructuralReconstruction(Trainable):
    """The networks of `SSIMAutoencoder` and their loss."""

    views = WholeImage()
    accumulation = "exact"

    def __init__(self, network: AutoencoderShape, *, window: int) -> None:
        super().__init__()
        self.autoencoder = _Autoencoder(network)
        self.window = window
        self.register_buffer("limits_", torch.empty(0))  # (2,) of the normal intensities
        self.limits_: Tensor

    def prepare(self, samples: Sequence[Sample]) -> None:
        """Learn the limits of the intensities."""
        self.limits_ = torch.tensor(intensity_limits(samples))

    def errors(self, images: Tensor, valid: Tensor) -> Tensor:
        """1 - SSIM (B, *spatial) of images (B, C, *spatial) and what is rebuilt of them."""
        low, high = self.limits_
        shown, rebuilt = (one.double() - low for one in (images, self.autoencoder(images)))
        with full_precision(images):  # a variance is a small difference of large squares
            similarity = ssim_map(
                shown, rebuilt, data_range=high - low, window=self.window, valid=valid
            )
        return (1 - similarity).float()

    def loss(self, views: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Mean of 1 - SSIM over the valid pixels."""
        errors = self.errors(views["image"], views["valid"])
        return {"loss": mean_over_valid(errors, views["valid"]).mean()}


class _Autoencoder(nn.Module):
    """An encoder and its decoder."""

    def __init__(self, shape: AutoencoderShape) -> None:
        super().__init__()
        self.encoder, self.decoder = ConvEncoder(shape), ConvDecoder(shape)

    def forward(self, images: Tensor) -> Tensor:
        return self.decoder(self.encoder(images), images.shape[2:])
