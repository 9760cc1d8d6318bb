"""Denoising autoencoder (Kascenas et al., MIDL 2022, https://openreview.net/forum?id=Bm8-t_ggzPD)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor

from anomaly.examples import smooth_pictures, smooth_volumes
from anomaly.reconstruction.residual import ReconstructionDetector, intensity_limits
from anomaly.selection import Selection
from anomaly.valid import WholeImage, mean_over_valid
from medssl.data.sample import Sample
from medssl.models.conv_autoencoder import UNet
from medssl.training import Trainable, TrainingPlan

_PLAN = TrainingPlan(
    total_samples=1_075_200,  # 67 200 steps
    batch_size=16,
    learning_rate=1e-4,
    weight_decay=(1e-5, 1e-5),
)


class DenoisingAutoencoder(ReconstructionDetector):
    """What a network that removes coarse noise takes off an image.

    No bottleneck: the U-Net sees the image in full resolution, so normal detail is given back, and
    what differs from normal images as coarse noise does is not. Nothing is added when scoring.

    in_channels: of the images. dims: 2 for pictures, 3 for volumes.
    channels: of each level of the U-Net.
    noise_std: standard deviation of the noise, as a share of the span of normal intensities.
    noise_cells: cells of the noise along the longest side of the image; the other sides have as
        many as make cells of equal sides. The paper has 16 x 16 on 128 x 128 pixels.
    sigma: of the Gaussian on the maps, in pixels, for all axes or one for each.
    top: share of the valid pixels, those with the largest values, whose mean is the score.
    plan, selection, seed: as of `LearnedDetector`; the plan has the steps, batch and learning rate
        of the authors' code.
    The map is |x - x_hat|, the mean over channels; the loss is squared.
    Differs from the paper: its foreground is what is not 0 in a brain that was cut out, here it is
    what is valid, and no border of it is left out; the maps have a Gaussian for a median filter of
    5 x 5 pixels; plain convolutions filled up with zeros, for weight-standardized ones filled up
    with reflections; AdamW with one cosine of the learning rate.
    """

    def __init__(
        self,
        *,
        in_channels: int = 1,
        channels: Sequence[int] = (64, 128, 256, 512),
        dims: int = 2,
        noise_std: float = 0.2,
        noise_cells: int = 16,
        sigma: float | list[float] = 1.5,
        top: float = 1.0,
        plan: TrainingPlan = _PLAN,
        selection: Selection | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(
            dims=dims, size=None, sigma=sigma, top=top, plan=plan, selection=selection, seed=seed
        )
        if noise_std <= 0 or noise_cells < 1:
            raise ValueError(
                f"noise needs a positive std and at least one cell, got {noise_std} and "
                f"{noise_cells}"
            )
        self.in_channels, self.channels, self.dims = in_channels, list(channels), dims
        self.noise_std, self.noise_cells = noise_std, noise_cells
        self.trainable: Denoising = self.new_trainable()

    def new_trainable(self) -> "Denoising":
        """As of `LearnedDetector`."""
        network = UNet(self.in_channels, channels=self.channels, dims=self.dims)
        return Denoising(network, NoisyImage(self.noise_cells), noise_std=self.noise_std)

    def residual(self, images: Tensor, valid: Tensor) -> Tensor:
        """|x - x_hat| of the image as it is."""
        return (images - self.trainable.network(images)).abs().mean(1)

    @classmethod
    def example(cls) -> tuple[Self, list[Sample]]:
        """Two levels and a few steps on smooth pictures."""
        plan = TrainingPlan(total_samples=20, batch_size=4, learning_rate=5e-3)
        return cls(channels=(8, 16), sigma=1.0, plan=plan), smooth_pictures()

    @classmethod
    def example_volume(cls) -> tuple[Self, list[Sample]]:
        """Two levels and a few steps on smooth volumes."""
        plan = TrainingPlan(total_samples=20, batch_size=4, learning_rate=5e-3)
        return cls(channels=(4, 8), dims=3, sigma=1.0, plan=plan), smooth_volumes()


@dataclass(frozen=True, slots=True)
class NoisyImage:
    """The image of a sample and coarse noise for it; see `coarse_noise`."""

    cells: int

    def __call__(self, sample: Sample, generator: torch.Generator) -> dict[str, Tensor]:
        """Returns "image" and "valid" as `WholeImage`, and "noise" of the image's shape."""
        views = WholeImage()(sample, generator)
        noise = coarse_noise(views["image"].shape, self.cells, generator)
        return {**views, "noise": noise}


def coarse_noise(shape: Sequence[int], cells: int, generator: torch.Generator) -> Tensor:
    """Gaussian noise of unit variance on a coarse grid, enlarged linearly and rolled at random.

    shape: (C, *spatial). cells: along the longest side. Returns that shape; between the points of
    the grid the variance is smaller.
    """
    spatial = list(shape[1:])
    grid = [min(side, max(1, round(cells * side / max(spatial)))) for side in spatial]
    coarse = torch.randn(1, shape[0], *grid, generator=generator)
    mode = "bilinear" if len(spatial) == 2 else "trilinear"
    noise = F.interpolate(coarse, spatial, mode=mode, align_corners=True)[0]
    shifts = [int(torch.randint(side, (1,), generator=generator)) for side in spatial]
    return noise.roll(shifts, dims=list(range(1, len(shape))))


class Denoising(Trainable):
    """The network of `DenoisingAutoencoder` and its loss.

    noise_std: as a share of the span of normal intensities, which is learnt before the first step.
    """

    accumulation = "exact"

    def __init__(self, network: UNet, views: NoisyImage, *, noise_std: float) -> None:
        super().__init__()
        self.network, self.views, self.noise_std = network, views, noise_std
        self.register_buffer("span_", torch.empty(0))  # (1,) of the normal intensities
        self.span_: Tensor

    def prepare(self, samples: Sequence[Sample]) -> None:
        """Learn the span of the intensities."""
        low, high = intensity_limits(samples)
        self.span_ = torch.tensor([high - low])

    def loss(self, views: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Mean squared error over the valid pixels, of the image rebuilt from a noisy one."""
        images, valid = views["image"], views["valid"]
        noise = self.noise_std * self.span_ * views["noise"]
        rebuilt = self.network(images + torch.where(valid[:, None], noise, 0.0))
        return {"loss": mean_over_valid((images - rebuilt).square().mean(1), valid).mean()}
