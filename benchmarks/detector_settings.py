"""The detectors that `detectors.py` compares; one setting each, the same on every set."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from anomaly.base import Detector
from anomaly.features.dinomaly import Dinomaly
from anomaly.features.discriminative import DiscriminativeHead
from anomaly.features.efficient_student import EfficientStudent
from anomaly.features.few_shot import FewShotNearest
from anomaly.features.padim import PaDiM
from anomaly.features.patchcore import PatchCore
from anomaly.features.reverse_distillation import ReverseDistillation
from anomaly.reconstruction.autoencoder import Autoencoder, SSIMAutoencoder
from anomaly.reconstruction.denoising import DenoisingAutoencoder
from anomaly.reconstruction.masked_autoencoder import MaskedAutoencoder
from anomaly.reconstruction.memae import MemAE
from anomaly.reconstruction.memmc_mae import MemMCMAE
from anomaly.reconstruction.vae import VAE
from medssl.data.geometry import resize
from medssl.data.image import Image
from medssl.data.preprocess import Preprocessing
from medssl.models.conv_autoencoder import AutoencoderShape
from medssl.models.encoder import Encoder
from medssl.models.timm_encoder import TimmEncoder
from medssl.training import TrainingPlan

FEATURES = Preprocessing(
    size=(256, 256),
    intensity="range",
    channels=3,
    mean=(0.485, 0.456, 0.406),
    std=(0.229, 0.224, 0.225),
)
PIXELS = Preprocessing(size=(96, 96), intensity="range", channels=3)


@dataclass(frozen=True, kw_only=True)
class Setting:
    """make: from the encoder's weight file and a seed."""

    make: Callable[[Path, int], Detector]
    preprocessing: Preprocessing


def GRID(source: Image) -> Image:  # noqa: N802
    """Where pixel metrics are taken: 256 x 256 pixels over the source."""
    empty = torch.zeros(1, *source.spatial_shape)
    plain = Image(
        pixels=empty, axes="HW", modality=source.modality, affine=source.affine, frame=source.frame
    )
    return resize(plain, (256, 256))


def mobilenet(weights: Path) -> Encoder:
    return TimmEncoder("mobilenetv2_100", weights=weights)


def plan(samples: int, rate: float, batch_size: int = 8, **more: Any) -> TrainingPlan:
    return TrainingPlan(
        total_samples=samples,
        batch_size=batch_size,
        learning_rate=rate,
        warmup_samples=samples // 20,
        weight_decay=(1e-4, 1e-4),
        **more,
    )


def on_features(make: Callable[[Encoder, int], Detector]) -> Setting:
    def made(weights: Path, seed: int) -> Detector:
        return make(mobilenet(weights), seed)

    return Setting(make=made, preprocessing=FEATURES)


def on_pixels(make: Callable[[int], Detector]) -> Setting:
    return Setting(make=lambda weights, seed: make(seed), preprocessing=PIXELS)


LAYERS = ["blocks.2", "blocks.4"]
DEEP = ["blocks.2", "blocks.4", "blocks.6"]
CONV = AutoencoderShape(in_channels=3, channels=(16, 32, 64, 64), latent_dim=16)
MAE: dict[str, Any] = {
    "in_channels": 3,
    "patch_size": [8, 8],
    "embedding_dim": 128,
    "depth": 4,
    "num_heads": 4,
    "decoder_dim": 96,
    "decoder_depth": 2,
}

SETTINGS: dict[str, Setting] = {
    "PatchCore": on_features(
        lambda encoder, seed: PatchCore(encoder, layers=LAYERS, coreset_ratio=0.1, seed=seed)
    ),
    "PatchCore, whitened": on_features(
        lambda encoder, seed: PatchCore(
            encoder, layers=LAYERS, coreset_ratio=0.1, whiten=True, seed=seed
        )
    ),
    "PaDiM": on_features(
        lambda encoder, seed: PaDiM(encoder, layers=LAYERS, num_features=100, seed=seed)
    ),
    "Few-shot nearest, all normals": on_features(
        lambda encoder, seed: FewShotNearest(encoder, layers=["blocks.4"], rotations=1)
    ),
    "Reverse distillation": on_features(
        lambda encoder, seed: ReverseDistillation(
            encoder, layers=DEEP, plan=plan(800, 2e-3), seed=seed
        )
    ),
    "Efficient student": on_features(
        lambda encoder, seed: EfficientStudent(
            encoder,
            layers=LAYERS,
            teacher_plan=plan(1000, 1e-3, batch_size=2),
            plan=plan(2000, 5e-4, batch_size=1),
            seed=seed,
        )
    ),
    "Dinomaly": on_features(
        lambda encoder, seed: Dinomaly(
            encoder,
            layers=["blocks.3.0", "blocks.3.1", "blocks.3.2", "blocks.3.3"],
            num_heads=4,
            plan=plan(1000, 5e-4, gradient_clip=0.1),
            seed=seed,
        )
    ),
    "Discriminative head": on_features(
        lambda encoder, seed: DiscriminativeHead(
            encoder, layers=LAYERS, plan=plan(1000, 5e-4), seed=seed
        )
    ),
    "Autoencoder": on_pixels(
        lambda seed: Autoencoder(network=CONV, sigma=2.0, plan=plan(3000, 1e-3), seed=seed)
    ),
    "SSIM autoencoder": on_pixels(
        lambda seed: SSIMAutoencoder(network=CONV, sigma=2.0, plan=plan(2400, 1e-3), seed=seed)
    ),
    "VAE": on_pixels(lambda seed: VAE(network=CONV, sigma=2.0, plan=plan(3000, 1e-3), seed=seed)),
    "MemAE": on_pixels(
        lambda seed: MemAE(
            network=CONV, num_memory=500, sigma=2.0, plan=plan(3000, 1e-3), seed=seed
        )
    ),
    "Denoising autoencoder": on_pixels(
        lambda seed: DenoisingAutoencoder(
            in_channels=3, channels=(16, 32, 64), sigma=2.0, plan=plan(1600, 1e-3), seed=seed
        )
    ),
    "Masked autoencoder": on_pixels(
        lambda seed: MaskedAutoencoder(**MAE, plan=plan(4800, 1e-3, batch_size=16), seed=seed)
    ),
    "MemMC-MAE": on_pixels(
        lambda seed: MemMCMAE(**MAE, plan=plan(4800, 1e-3, batch_size=16), seed=seed)
    ),
}
