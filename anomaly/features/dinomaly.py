"""Dinomaly (Guo et al., CVPR 2025, https://arxiv.org/abs/2405.14325)."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from anomaly.base import AnomalyMap
from anomaly.examples import smooth_pictures, smooth_volumes
from anomaly.features.targets import FrozenEncoder, cosine_distance, frozen_encoder
from anomaly.learning import LearnedDetector, device_of, seeded
from anomaly.maps import outside_is_nan, smooth, upsample, valid_patches
from anomaly.selection import Selection
from anomaly.valid import WholeImage, largest, maps_by_size
from medssl.data.sample import Batch, Sample
from medssl.models.encoder import Encoder
from medssl.models.linear_attention import NoisyDecoder
from medssl.schedule import Clock
from medssl.training import Trainable, TrainingPlan

_TOP = 0.01  # share of a map whose mean is the score

_PLAN = TrainingPlan(
    total_samples=160_000,  # 10,000 batches
    batch_size=16,
    learning_rate=5e-4,
    final_learning_rate=5e-5,
    warmup_samples=1600,
    weight_decay=(1e-4, 1e-4),
    gradient_clip=0.1,
)


class Dinomaly(LearnedDetector):
    """How far a decoder's tokens are from the encoder's, having learnt only normal ones.

    One model serves many kinds of objects or organs. Three things keep it from giving back
    anomalies too: noise in the bottleneck, attention that cannot focus on a place, and a loss that
    asks for the mean of several layers only, and little where that is good already.

    encoder: a vision transformer of pictures or volumes, or the folder of one that `medssl
        pretrain` wrote; it stays frozen.
    layers: its blocks to give back, shallowest first; the paper takes the middle eight of twelve,
        blocks.2 to blocks.9.
    num_groups: groups of neighbouring layers; their means are compared (sec. 3.4).
    dropout: of the bottleneck (sec. 3.2).
    num_heads: of the decoder's attention; 12 is that of the paper's ViT-B.
    easy_share: of the positions of a batch, the best ones, whose gradients are shrunk.
    easy_factor: what they are shrunk by.
    ramp: share of the training over which easy_share rises from 0.
    sigma: of the Gaussian on the maps, in pixels.
    plan, selection, seed: as of `LearnedDetector`; without a plan, the paper's 10 000 batches.
    The map is the mean over groups of 1 - cosine, at most 2; the score is the mean of the largest
    percent of its values.
    Differs from the paper: the decoder does not see class and register tokens; AdamW with a
    quarter of the learning rate, not StableAdamW at 2e-3; as many decoder blocks as layers; the
    score is of the map at the size of the picture, not of one resized to 256 pixels; under torchrun
    each process finds the easy positions of its own share of a batch.
    """

    unbounded = False

    def __init__(
        self,
        encoder: Encoder | Path,
        *,
        layers: list[str],
        num_groups: int = 2,
        dropout: float = 0.2,
        num_heads: int = 12,
        easy_share: float = 0.9,
        easy_factor: float = 0.1,
        ramp: float = 0.1,
        sigma: float = 4.0,
        plan: TrainingPlan | None = None,
        selection: Selection | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(plan=_PLAN if plan is None else plan, selection=selection, seed=seed)
        if not 1 <= num_groups <= len(layers):
            raise ValueError(
                f"num_groups must lie between 1 and the number of layers ({len(layers)}), "
                f"got {num_groups}"
            )
        if not 0 <= easy_share < 1:
            raise ValueError(f"easy_share must lie in [0, 1), got {easy_share}")
        self.encoder = frozen_encoder(encoder)
        self.layers, self.num_groups, self.num_heads = list(layers), num_groups, num_heads
        self.dropout, self.sigma = dropout, sigma
        self.easy_share, self.easy_factor, self.ramp = easy_share, easy_factor, ramp
        self.teacher = FrozenEncoder(self.encoder, self.layers)
        shapes = set(self.teacher.shapes())
        if len(shapes) != 1:
            raise ValueError(
                f"layers must be blocks of one width and grid, got {sorted(shapes)}; take a "
                "vision transformer, or ReverseDistillation for other networks"
            )
        (self.shape,) = shapes
        self.axes = self.encoder.axes
        self.trainable: GroupedDecoder = self.new_trainable()

    def new_trainable(self) -> "GroupedDecoder":
        """As of `LearnedDetector`."""
        decoder = NoisyDecoder(
            self.shape[0],
            depth=len(self.layers),
            num_heads=self.num_heads,
            dropout=self.dropout,
        )
        return GroupedDecoder(
            self.teacher,
            decoder,
            num_groups=self.num_groups,
            easy_share=self.easy_share,
            easy_factor=self.easy_factor,
            ramp=self.ramp,
        )

    def train(self, mode: bool = True) -> Self:
        """The encoder stays in evaluation mode."""
        super().train(mode)
        self.encoder.eval()
        return self

    @torch.no_grad()
    def predict(self, batch: Batch) -> AnomalyMap:
        """Scores and maps of images; an item without a valid pixel scores NaN."""
        self.check_fitted()
        maps = maps_by_size(batch.images["image"].to(device_of(self)), self._maps)
        return AnomalyMap(score=largest(maps, _TOP), maps={"image": maps})

    def _maps(self, images: Tensor, valid: Tensor) -> Tensor:
        given, shown = self.trainable(images)
        pairs = zip(given, shown, strict=True)
        distance = torch.stack([cosine_distance(own, target) for own, target in pairs]).mean(0)
        distance = outside_is_nan(distance, valid_patches(valid, distance.shape[1:]))
        maps = upsample(distance, valid.shape[1:])  # a patch looks at its own cell
        return smooth(outside_is_nan(maps, valid), self.sigma)

    @classmethod
    def example(cls) -> tuple[Self, list[Sample]]:
        """Two narrow blocks over pictures and a few steps on smooth ones."""
        from medssl.models.vit import ViTEncoder

        with seeded(0):
            encoder = ViTEncoder("test_vit", image_size=64)
            return cls._tiny(encoder), smooth_pictures()

    @classmethod
    def example_volume(cls) -> tuple[Self, list[Sample]]:
        """Two narrow blocks over volumes and a few steps on smooth ones."""
        from medssl.models.vit3d import ViT3DEncoder

        with seeded(0):
            encoder = ViT3DEncoder(
                (16, 32, 24), patch_size=(4, 8, 8), embedding_dim=32, depth=2, num_heads=2
            )
            return cls._tiny(encoder), smooth_volumes()

    @classmethod
    def _tiny(cls, encoder: Encoder) -> Self:
        # A token points elsewhere when its patch gets brighter only if something is added to it.
        nn.init.normal_(encoder.get_parameter("network.pos_embed"), std=2.0)
        plan = TrainingPlan(total_samples=60, batch_size=4, learning_rate=3e-3)
        layers = ["blocks.0", "blocks.1"]
        return cls(encoder, layers=layers, num_heads=2, sigma=1.0, plan=plan)


class GroupedDecoder(Trainable):
    """The decoder of `Dinomaly` and its loss; the parameters are as there."""

    views = WholeImage()
    easy_share: float

    def __init__(
        self,
        teacher: FrozenEncoder,
        decoder: NoisyDecoder,
        *,
        num_groups: int,
        easy_share: float,
        easy_factor: float,
        ramp: float,
    ) -> None:
        super().__init__()
        self.teacher, self.decoder, self.num_groups = teacher, decoder, num_groups
        self.easy_share, self.easy_factor, self.ramp = easy_share, easy_factor, ramp
        self.register_buffer("progress", torch.zeros(()))  # share of the training that is done
        self.progress: Tensor

    def forward(self, images: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """What the decoder gives and the encoder shows, (B, E, *grid) per group, for images
        (B, C, *spatial); the shallowest group first."""
        maps = self.teacher(images)
        grid = maps[0].shape[2:]
        tokens = torch.stack(maps).mean(0).flatten(2).mT  # (B, N, E)
        decoded = [found.mT.unflatten(2, grid) for found in self.decoder(tokens)]
        return self._groups(decoded[::-1]), self._groups(maps)  # the last block is the shallowest

    def _groups(self, maps: Sequence[Tensor]) -> list[Tensor]:
        parts = torch.arange(len(maps)).tensor_split(self.num_groups)
        return [torch.stack([maps[i] for i in part.tolist()]).mean(0) for part in parts]

    def loss(self, views: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The mean over groups of the loose loss."""
        given, shown = self(views["image"])
        valid = valid_patches(views["valid"], shown[0].shape[2:])
        ramped = float(self.progress) / self.ramp if self.ramp > 0 else 1.0
        easy_share = self.easy_share * min(1.0, ramped)
        losses = [
            loose_loss(own, target, valid, easy_share=easy_share, easy_factor=self.easy_factor)
            for own, target in zip(given, shown, strict=True)
        ]
        return {"loss": torch.stack(losses).mean()}

    def after_step(self, clock: Clock) -> None:
        """Keep how far the training is, for the ramp."""
        self.progress.fill_(clock.progress)


def loose_loss(
    given: Tensor, target: Tensor, valid: Tensor, *, easy_share: float, easy_factor: float
) -> Tensor:
    """1 - cosine of all features of an image together, little of it from what is good (sec. 3.4).

    given, target: (B, E, *grid). valid: (B, *grid) bool; what is not valid does not count.
    easy_share: the gradient by the best positions of the batch, that share of the valid ones, is
        multiplied by easy_factor; the value is not changed. At least the worst one stays.
    Returns the mean over the images with a valid position, 0 where there is none.
    """
    distance = cosine_distance(given.detach(), target)  # (B, *grid)
    known = distance[valid]
    if len(known) == 0:
        return 0 * given.sum()
    hard = max(1, int(len(known) * (1 - easy_share)))
    easy = distance < known.topk(hard).values[-1]
    shrunk = given.detach() + easy_factor * (given - given.detach())
    own = torch.where(easy[:, None], shrunk, given)
    own, target = (torch.where(valid[:, None], one, 0.0).flatten(1) for one in (own, target))
    counts = valid.flatten(1).any(1)
    return (1 - F.cosine_similarity(own[counts], target[counts], dim=1)).mean()
