"""Reverse distillation (Deng & Li, CVPR 2022, https://arxiv.org/abs/2201.10703)."""

from collections.abc import Mapping
from pathlib import Path
from typing import Self

import torch
from torch import Tensor, nn

from anomaly.base import AnomalyMap, NormalData
from anomaly.examples import smooth_pictures, smooth_volumes
from anomaly.features.patches import patch_offset
from anomaly.features.targets import FrozenEncoder, cosine_distance, frozen_encoder
from anomaly.learning import LearnedDetector, device_of, seeded
from anomaly.maps import outside_is_nan, smooth, upsample, valid_patches
from anomaly.selection import Selection
from anomaly.valid import WholeImage, largest, maps_by_size, mean_over_valid
from medssl.data.sample import Batch, Sample
from medssl.models.distillation import ReverseStudent
from medssl.models.encoder import Encoder
from medssl.training import Trainable, TrainingPlan

_PLAN = TrainingPlan(
    total_samples=40_000,  # 200 epochs of 200 pictures
    batch_size=16,
    learning_rate=5e-3,
    weight_decay=(0.0, 0.0),
)


class ReverseDistillation(LearnedDetector):
    """How far a student's features are from its teacher's, having learnt only normal ones.

    The student sees the teacher's feature maps through a bottleneck that has room for what is
    normal, and gives them back from the deepest to the shallowest.

    encoder: the teacher, a network of pictures or volumes, or the folder of one that `medssl
        pretrain` wrote; it stays frozen.
    layers: modules of the encoder's network, shallowest first.
    width: channels of the bottleneck; None is twice those of the deepest layer.
    sigma: of the Gaussian on the maps, in pixels.
    plan, selection, seed: as of `LearnedDetector`; without a plan, the paper's 200 epochs (of 200
        pictures), batch and learning rate.
    The map is the sum over layers of 1 - cosine (eq. 1), at most 2 per layer; the score is its
    largest value (sec. 3.3).
    Differs from the paper: the loss is the mean over the valid positions of 1 - cosine at each, as
    in eq. 2 (the authors' code has one cosine of a whole flattened map); AdamW with the betas of
    torch and a cosine of the learning rate, not Adam with betas (0.5, 0.999) and a constant one;
    maps are laid where each layer's units look; see `ReverseStudent` for the network.
    """

    unbounded = False

    def __init__(
        self,
        encoder: Encoder | Path,
        *,
        layers: list[str],
        width: int | None = None,
        sigma: float = 4.0,
        plan: TrainingPlan | None = None,
        selection: Selection | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(plan=_PLAN if plan is None else plan, selection=selection, seed=seed)
        self.encoder = frozen_encoder(encoder)
        self.layers, self.width, self.sigma = list(layers), width, sigma
        self.teacher = FrozenEncoder(self.encoder, self.layers)
        self.shapes = self.teacher.shapes()
        self.axes = self.encoder.axes
        self.register_buffer("offset_", torch.empty(0))  # (layers, axes) in pixels
        self.offset_: Tensor
        self.trainable: StudentOfMaps = self.new_trainable()

    def new_trainable(self) -> "StudentOfMaps":
        """As of `LearnedDetector`."""
        return StudentOfMaps(self.teacher, ReverseStudent(self.shapes, width=self.width))

    def train(self, mode: bool = True) -> Self:
        """The encoder stays in evaluation mode."""
        super().train(mode)
        self.encoder.eval()
        return self

    def after_training(self, normal: NormalData) -> None:
        """Where the teacher's layers look."""
        size = normal[0].images["image"].spatial_shape
        offsets = [patch_offset(self.encoder, layer, size) for layer in self.layers]
        self.offset_ = torch.stack(offsets).to(device_of(self))

    @torch.no_grad()
    def predict(self, batch: Batch) -> AnomalyMap:
        """Scores and maps of images; an item without a valid pixel scores NaN."""
        self.check_fitted()
        maps = maps_by_size(batch.images["image"].to(device_of(self)), self._maps)
        return AnomalyMap(score=largest(maps), maps={"image": maps})

    def _maps(self, images: Tensor, valid: Tensor) -> Tensor:
        total = torch.zeros(valid.shape, device=images.device)
        for distance, offset in zip(self.trainable.distances(images), self.offset_, strict=True):
            known = outside_is_nan(distance, valid_patches(valid, distance.shape[1:]))
            total += upsample(known, valid.shape[1:], offset=offset)
        return smooth(outside_is_nan(total, valid), self.sigma)

    @classmethod
    def example(cls) -> tuple[Self, list[Sample]]:
        """A random residual network and a few steps on smooth pictures."""
        from medssl.models.timm_encoder import TimmEncoder

        with seeded(0):
            encoder = TimmEncoder("test_resnet", in_channels=1)
        plan = TrainingPlan(total_samples=40, batch_size=4, learning_rate=5e-3)
        return cls(encoder, layers=["layer1", "layer2"], plan=plan), smooth_pictures()

    @classmethod
    def example_volume(cls) -> tuple[Self, list[Sample]]:
        """Two narrow blocks of a transformer over smooth volumes."""
        from medssl.models.vit3d import ViT3DEncoder

        with seeded(0):
            encoder = ViT3DEncoder(
                (16, 32, 24), patch_size=(4, 8, 8), embedding_dim=16, depth=2, num_heads=2
            )
            # Without it a token does not turn when its patch gets brighter.
            nn.init.normal_(encoder.network.pos_embed, std=2.0)
        plan = TrainingPlan(total_samples=120, batch_size=4, learning_rate=5e-3)
        detector = cls(encoder, layers=["blocks.0", "blocks.1"], sigma=1.0, plan=plan)
        return detector, smooth_volumes()


class StudentOfMaps(Trainable):
    """The student of `ReverseDistillation` and its loss."""

    views = WholeImage()

    def __init__(self, teacher: FrozenEncoder, student: ReverseStudent) -> None:
        super().__init__()
        self.teacher = teacher
        self.student = student

    def distances(self, images: Tensor) -> list[Tensor]:
        """1 - cosine of student and teacher for images (B, C, *spatial), (B, *grid) per layer."""
        shown = self.teacher(images)
        given = self.student(shown)
        return [cosine_distance(own, target) for own, target in zip(given, shown, strict=True)]

    def loss(self, views: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Sum over layers of the mean distance over the valid positions (eq. 2)."""
        total = views["image"].new_zeros(())
        for distance in self.distances(views["image"]):
            valid = valid_patches(views["valid"], distance.shape[1:])
            total = total + mean_over_valid(distance, valid).mean()
        return {"loss": total}
