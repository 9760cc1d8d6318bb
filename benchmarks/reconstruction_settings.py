"""The methods that `reconstruction.py` compares, and how the images are prepared."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Self

import torch

from anomaly.base import AnomalyMap, Detector, NormalData
from anomaly.maps import outside_is_nan
from anomaly.reconstruction.autoencoder import Autoencoder
from anomaly.reconstruction.masked_autoencoder import MaskedAutoencoder
from anomaly.reconstruction.memmc_mae import MemMCMAE
from anomaly.reconstruction.passes import StructureError
from medssl.data.preprocess import Preprocessing
from medssl.data.sample import Batch
from medssl.models.conv_autoencoder import AutoencoderShape
from medssl.training import TrainingPlan
from pipelines.demo import PREPARE as DEMO

PREPARE = {
    "slices": DEMO,
    "volumes": replace(DEMO, size=(16, 64, 64)),
    "ms": Preprocessing(size=(128, 112), intensity="percentile", channels=1),
}


class Intensity(Detector):
    """How bright a voxel is: what lesions of FLAIR are found by at once."""

    axes = "DHW"

    def fit(self, normal: NormalData, *, workdir: Path | None = None) -> Self:
        """Nothing to learn."""
        return self

    def predict(self, batch: Batch) -> AnomalyMap:
        """The first channel; the mean of its brightest thousandth is the score."""
        images = batch.images["image"]
        maps = outside_is_nan(images.pixels[:, 0], images.valid)
        scores = [row[~row.isnan()].sort().values for row in maps]
        largest = [row[-max(1, len(row) // 1000) :].mean() for row in scores]
        return AnomalyMap(score=torch.stack(largest), maps={"image": maps})


def plan(samples: int, rate: float = 1e-3, batch_size: int = 32) -> TrainingPlan:
    return TrainingPlan(
        total_samples=samples,
        batch_size=batch_size,
        learning_rate=rate,
        warmup_samples=samples // 20,
        weight_decay=(0.05, 0.05),
    )


NETWORK: dict[str, Any] = {
    "embedding_dim": 128,
    "depth": 4,
    "num_heads": 4,
    "decoder_dim": 96,
    "decoder_depth": 2,
}
Make = Callable[[int], Detector]


def methods(
    patch_size: Sequence[int],
    samples: int,
    batch_size: int,
    error: StructureError,
    network: AutoencoderShape,
) -> dict[str, Make]:
    """The three that are compared, with equal samples, and brightness alone."""
    masked = {**NETWORK, "patch_size": patch_size, "error": error}
    masked["plan"] = plan(samples, batch_size=batch_size)
    return {
        "MemMC-MAE": lambda seed: MemMCMAE(**masked, seed=seed),
        "masked autoencoder": lambda seed: MaskedAutoencoder(**masked, seed=seed),
        "autoencoder": lambda seed: Autoencoder(
            network=network,
            sigma=error.sigma,
            top=error.top,
            plan=plan(samples, batch_size=batch_size),
            seed=seed,
        ),
        "intensity": lambda seed: Intensity(),
    }


SLICES = StructureError(weight=0.0, sigma=3.0, top=0.02)
VOLUMES = StructureError(weight=0.0, sigma=[1.0, 2.0, 2.0], top=0.02)
CHANNELS = (16, 32, 64, 64)


def bottleneck(*size: int) -> AutoencoderShape:
    """16 numbers of the whole image."""
    return AutoencoderShape(channels=CHANNELS, latent_dim=16, size=size, dims=len(size))


METHODS: dict[str, dict[str, Make]] = {
    "slices": methods([8, 8], 20_000, 32, SLICES, bottleneck(96, 96)),
    "volumes": methods([4, 8, 8], 4_000, 16, VOLUMES, bottleneck(16, 64, 64)),
    "ms": methods([8, 8], 10_000, 32, SLICES, bottleneck(128, 112)),
}
