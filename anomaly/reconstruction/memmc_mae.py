"""MemMC-MAE (Tian et al., MLMI 2023, https://arxiv.org/abs/2203.11725)."""

from collections.abc import Sequence
from typing import Self

import torch

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
from medssl.models.memory_attention import MemoryBlock, MeshedDecoder
from medssl.training import TrainingPlan


class MemMCMAE(LearnedDetector):
    """How far an image differs in structure from what a masked autoencoder makes of a part of it.

    Most patches are hidden, an anomaly likely with them, and rebuilt from those that are shown and
    from a memory of normal ones, which every block of the encoder looks up; the decoder looks at
    several levels of the encoder.

    patch_size: pixels; two numbers are for pictures, three for volumes (D, H, W).
    embedding_dim, depth: of the encoder. decoder_dim, decoder_depth: of the decoder.
    num_heads: of each block; divides both widths.
    num_memory: rows of memory in each block of the encoder; 0 is without.
    num_levels: levels of the encoder that reach the decoder, evenly spread over its depth. The last
        comes as its tokens, the others by gated cross-attention. With 1, and no memory, the network
        is that of `MaskedAutoencoder`, weight for weight.
    mask_ratio: share of the patches that is hidden in training; in scoring 1 / (1 - ratio), as a
        whole number, is the number of passes in which each patch is shown once.
    num_partitions: how many times the patches are partitioned so in scoring.
    error: how image and reconstruction are compared.
    plan, selection, seed: as of `LearnedDetector`; the seed is also that of the partitions.
    Differs from the paper, which has no public code and leaves the following open: the form of
    memory and gates is that of Cornia et al. (see `medssl.models.memory_attention`), with
    self-attention before the cross-attention, norms first, and no gate for the last level, which
    the tokens of the decoder carry already; number and place of the levels, rows of memory, passes,
    window, scales, exponents and smoothing are arguments or choices of ours. Patches are hidden by
    partitions, each as often as any other, not by independent draws; the reconstruction is the mean
    of what was said of a patch while it was hidden, nothing of the image is pasted. Images are seen
    in units of the range of the normals' values. The default network is smaller than a ViT-B.
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
        num_memory: int = 128,
        num_levels: int = 3,
        mask_ratio: float = 0.75,
        num_partitions: int = 2,
        error: StructureError = STRUCTURE,
        plan: TrainingPlan = PLAN,
        selection: Selection | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(plan=plan, selection=selection, seed=seed)
        if not 1 <= num_levels <= depth:
            raise ValueError(f"num_levels must lie in 1 to depth ({depth}), got {num_levels}")
        self.patch_size, self.in_channels = list(patch_size), in_channels
        self.embedding_dim, self.depth, self.num_heads = embedding_dim, depth, num_heads
        self.decoder_dim, self.decoder_depth = decoder_dim, decoder_depth
        self.num_memory, self.num_levels = num_memory, num_levels
        self.mask_ratio, self.num_partitions, self.error = mask_ratio, num_partitions, error
        self.axes = "HW" if len(self.patch_size) == 2 else "DHW"
        self.unbounded = error.weight < 1
        self.trainable: MaskedReconstruction = self.new_trainable()

    def new_trainable(self) -> MaskedReconstruction:
        """As of `LearnedDetector`."""
        last = [round(self.depth * k / self.num_levels) - 1 for k in range(1, self.num_levels + 1)]
        network = MaskedTransformer(
            in_channels=self.in_channels,
            patch_size=self.patch_size,
            embedding_dim=self.embedding_dim,
            decoder_dim=self.decoder_dim,
            encoder=[
                MemoryBlock(self.embedding_dim, self.num_heads, num_memory=self.num_memory)
                for _ in range(self.depth)
            ],
            decoder=self._new_decoder(),
            levels=last[:-1],
        )
        return MaskedReconstruction(network, mask_ratio=self.mask_ratio)

    def _new_decoder(self) -> MeshedDecoder | PlainDecoder:
        if self.num_levels == 1:  # there is no other to look at
            return PlainDecoder(
                [
                    MemoryBlock(self.decoder_dim, self.num_heads, num_memory=0)
                    for _ in range(self.decoder_depth)
                ]
            )
        return MeshedDecoder(
            self.decoder_dim,
            self.embedding_dim,
            self.num_heads,
            depth=self.decoder_depth,
            num_levels=self.num_levels - 1,
        )

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
            num_memory=4,
            num_levels=2,
            num_partitions=1,
            error=StructureError(window=window, sigma=1.0),
            plan=TrainingPlan(total_samples=80, batch_size=4, learning_rate=5e-3),
        )
