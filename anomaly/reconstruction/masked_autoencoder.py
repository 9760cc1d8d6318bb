"""A masked autoencoder as a detector (MAE: He et al., CVPR 2022, https://arxiv.org/abs/2111.06377).

What MemMC-MAE (https://arxiv.org/abs/2203.11725) is without its memory and its further levels.
"""

from collections.abc import Sequence
from typing import Self

import torch
from torch import nn

from anomaly.base import AnomalyMap
from anomaly.examples import smooth_pictures, smooth_volumes
from anomaly.learning import LearnedDetector, device_of
from anomaly.reconstruction.passes import (
    PLAN,
    STRUCTURE,
    MaskedReconstruction,
    StructureError,
    scored,
)
from anomaly.selection import Selection
from medssl.data.sample import Batch, Sample
from medssl.models.masked_transformer import MaskedTransformer, PlainDecoder
from medssl.training import TrainingPlan


class MaskedAutoencoder(LearnedDetector):
    """How far an image differs in structure from what a masked autoencoder makes of a part of it.

    patch_size: pixels; two numbers are for pictures, three for volumes (D, H, W).
    embedding_dim, depth: of the encoder. decoder_dim, decoder_depth: of the decoder.
    num_heads: of each block; divides both widths.
    mask_ratio: share of the patches that is hidden in training; in scoring 1 / (1 - ratio), as a
        whole number, is the number of passes in which each patch is shown once.
    num_partitions: how many times the patches are partitioned so in scoring.
    error: how image and reconstruction are compared.
    plan, selection, seed: as of `LearnedDetector`; the seed is also that of the partitions.
    Differs from the paper: it is about representations, and the score is that of
    `anomaly.reconstruction.memmc_mae`. The loss is of the pixels, in units of the range of the
    normals' values, not of patches normalized each by itself; AdamW with the betas of torch; see
    `MaskedTransformer` for the network. The default network is smaller than a ViT-B.
    """

    def __init__(
        self,
        *,
        patch_size: Sequence[int] = (16, 16),
        in_channels: int = 1,
        embedding_dim: int = 256,
        depth: int = 6,
        num_heads: int = 8,
        decoder_dim: int = 128,
        decoder_depth: int = 2,
        mask_ratio: float = 0.75,
        num_partitions: int = 2,
        error: StructureError = STRUCTURE,
        plan: TrainingPlan = PLAN,
        selection: Selection | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(plan=plan, selection=selection, seed=seed)
        self.patch_size, self.in_channels = list(patch_size), in_channels
        self.embedding_dim, self.depth, self.num_heads = embedding_dim, depth, num_heads
        self.decoder_dim, self.decoder_depth = decoder_dim, decoder_depth
        self.mask_ratio, self.num_partitions, self.error = mask_ratio, num_partitions, error
        self.axes = "HW" if len(self.patch_size) == 2 else "DHW"
        self.unbounded = error.weight < 1
        self.trainable: MaskedReconstruction = self.new_trainable()

    def new_trainable(self) -> MaskedReconstruction:
        """As of `LearnedDetector`."""
        network = MaskedTransformer(
            in_channels=self.in_channels,
            patch_size=self.patch_size,
            embedding_dim=self.embedding_dim,
            decoder_dim=self.decoder_dim,
            encoder=_blocks(self.embedding_dim, self.num_heads, self.depth),
            decoder=PlainDecoder(_blocks(self.decoder_dim, self.num_heads, self.decoder_depth)),
        )
        return MaskedReconstruction(network, mask_ratio=self.mask_ratio)

    @torch.no_grad()
    def predict(self, batch: Batch) -> AnomalyMap:
        """Scores and maps of images; an item without a valid pixel scores NaN."""
        self.check_fitted()
        return scored(
            batch.images["image"].to(device_of(self)),
            self.trainable,
            self.error,
            num_partitions=self.num_partitions,
            seed=self.seed,
        )

    @classmethod
    def example(cls) -> tuple[Self, list[Sample]]:
        """Two narrow blocks and a few steps on smooth pictures."""
        return cls._tiny((8, 8), window=11), smooth_pictures()

    @classmethod
    def example_volume(cls) -> tuple[Self, list[Sample]]:
        """The same on smooth volumes."""
        return cls._tiny((4, 8, 8), window=5), smooth_volumes()

    @classmethod
    def _tiny(cls, patch_size: Sequence[int], *, window: int) -> Self:
        return cls(
            patch_size=patch_size,
            embedding_dim=32,
            depth=2,
            num_heads=2,
            decoder_dim=16,
            decoder_depth=1,
            num_partitions=1,
            error=StructureError(window=window, sigma=1.0),
            plan=TrainingPlan(total_samples=80, batch_size=4, learning_rate=5e-3),
        )


def _blocks(width: int, num_heads: int, depth: int) -> list[nn.Module]:
    from timm.models.vision_transformer import Block

    return [Block(width, num_heads, qkv_bias=True) for _ in range(depth)]
