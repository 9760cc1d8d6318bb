"""A fast distilled student, after EfficientAD (Batzner et al., WACV 2024,
https://arxiv.org/abs/2303.14535)."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from anomaly.base import AnomalyMap, NormalData
from anomaly.examples import smooth_pictures
from anomaly.features.small_teacher import SmallTeacher, channel, chosen, moments, stacked
from anomaly.features.targets import FrozenEncoder, frozen_encoder
from anomaly.learning import LearnedDetector, StoppedError, Trial, device_of, seeded
from anomaly.maps import outside_is_nan, upsample, valid_patches
from anomaly.selection import Selection
from anomaly.valid import WholeImage, by_size, largest, maps_by_size, mean_over_valid
from medssl.data.sample import Batch, Sample
from medssl.models.encoder import Encoder
from medssl.models.layout import channels_last
from medssl.models.small_student import PatchNetwork, SmallAutoencoder
from medssl.training import Trainable, TrainingPlan, split_by_decay, train

_LOW, _HIGH, _AT_HIGH = 0.9, 0.995, 0.1  # quantiles of the normal maps that become 0 and 0.1

_TEACHER_PLAN = TrainingPlan(
    total_samples=40_000, batch_size=16, learning_rate=1e-3, weight_decay=(1e-5, 1e-5)
)
_PLAN = TrainingPlan(
    total_samples=70_000, batch_size=8, learning_rate=5e-4, weight_decay=(1e-5, 1e-5)
)


class EfficientStudent(LearnedDetector):
    """Where two small networks that learnt only normal pictures differ from a small teacher.

    First a small teacher learns to give what the encoder gives; then a student learns to give what
    the teacher gives, from its worst positions, and an autoencoder does, for what a student that
    sees patches only cannot know. The encoder is not asked when scoring.

    encoder: a network of pictures, or the folder of one that `medssl pretrain` wrote; frozen.
    layers: modules of its network; their maps are put side by side on the teacher's grid.
    num_features: channels of the teacher, at most those of the layers together.
    width: channels inside each small network.
    hard_quantile: the student learns from the squared differences of each picture at or above this
        quantile (p_hard, sec. 3.2).
    held_out: share of the normals, whole patients or parts, kept from both trainings; the maps are
        put on one scale by them. Where there is one patient or part, the training normals serve,
        whose maps are lower, and `notes` says so.
    teacher_plan: of the teacher; plan, selection, seed: of the student and the autoencoder, as of
        `LearnedDetector`. Without plans, 40 000 samples and the paper's 70 000.
    The map is the mean of both after 0.1 (map - q_a) / (q_b - q_a), with the quantiles a = .9 and
    b = .995 of normal maps (sec. 3.4): on normals most of it lies below 0, and more than 0.1 is
    rare. The score is its largest value.
    Differs from the paper: the networks are small, see `PatchNetwork` and `SmallAutoencoder`: a
    picture of 256 pixels takes 1.2 billion multiplications, EfficientAD-S 36 and a MobileNetV2
    0.4; in dense convolutions, so it takes less time than the latter. The teacher learns from
    the normals (`SmallTeacher`), not from ImageNet, and there is no penalty on ImageNet pictures
    either. The quantiles are those of the networks' grid, not of the enlarged maps. The changed
    picture has another brightness or contrast, never another saturation. AdamW with a cosine and
    batches of 8, each picture with its own hardest differences, not Adam and batches of one.
    """

    def __init__(
        self,
        encoder: Encoder | Path,
        *,
        layers: list[str],
        num_features: int = 64,
        width: int = 64,
        hard_quantile: float = 0.999,
        held_out: float = 0.1,
        teacher_plan: TrainingPlan | None = None,
        plan: TrainingPlan | None = None,
        selection: Selection | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(plan=_PLAN if plan is None else plan, selection=selection, seed=seed)
        if not 0 <= hard_quantile < 1:
            raise ValueError(f"hard_quantile must lie in [0, 1), got {hard_quantile}")
        if not 0 < held_out < 1:
            raise ValueError(f"held_out must be a share of the normals in (0, 1), got {held_out}")
        self.encoder = frozen_encoder(encoder)
        if self.encoder.axes != self.axes:
            raise ValueError(
                f"expected an encoder of pictures (HW), got one of {self.encoder.axes}; for "
                "volumes put this with an encoder of pictures in Slicewise"
            )
        self.layers, self.num_features, self.width = list(layers), num_features, width
        self.hard_quantile, self.held_out = hard_quantile, held_out
        self.teacher_plan = _TEACHER_PLAN if teacher_plan is None else teacher_plan
        self.register_buffer("quantiles_", torch.empty(0))  # (2 maps, low and high)
        self.quantiles_: Tensor
        self._for_scale: NormalData | None = None
        self.trainable: StudentAndAutoencoder = self.new_trainable()
        channels_last(self.trainable)

    def new_trainable(self) -> "StudentAndAutoencoder":
        """As of `LearnedDetector`; the teacher is in it."""
        encoder = FrozenEncoder(self.encoder, self.layers)
        teacher = SmallTeacher(encoder, num_features=self.num_features, width=self.width)
        return StudentAndAutoencoder(teacher, width=self.width, hard_quantile=self.hard_quantile)

    def train(self, mode: bool = True) -> Self:
        """The encoder stays in evaluation mode."""
        super().train(mode)
        self.encoder.eval()
        return self

    def fit(self, normal: NormalData, *, workdir: Path | None = None) -> Self:
        """As of `LearnedDetector`; first some of the normals are held out for the scale."""
        training = self._for_scale = normal
        if not of_one_part(normal):
            selection = Selection(share=self.held_out)
            training, self._for_scale = selection.split(normal, seed=self.seed)
        self.notes = {}
        super().fit(training, workdir=workdir)
        self.notes = {
            **self.notes,
            "scale_from": "training normals" if training is normal else "held-out normals",
            "num_scale": len(self._for_scale),
        }
        self._for_scale = None
        return self

    def _train(self, normal: NormalData, workdir: Path, trial: Trial | None) -> None:
        teacher = self.trainable.teacher
        result = train(
            teacher,
            normal.samples,
            self.teacher_plan,
            workdir=workdir / "teacher",
            resume=True,
            device=device_of(self).type,
            workers=normal.workers,
            seed=self.seed,
            identity=self._identity(),
        )
        if not result["finished"]:
            raise StoppedError("the teacher was stopped as asked, and saved; fit again to go on")
        teacher.eval().requires_grad_(False)
        super()._train(normal, workdir / "student", trial)

    def after_training(self, normal: NormalData) -> None:
        """The quantiles of both maps on the normals that were held out."""
        values: list[list[Tensor]] = [[], []]
        assert self._for_scale is not None
        for batch in self._for_scale.batches():
            for _, images, valid in by_size(batch.images["image"].to(device_of(self))):
                for found, maps in zip(values, self.trainable.maps(images), strict=True):
                    found.append(maps[valid_patches(valid, maps.shape[1:])].cpu())
        scale = torch.stack([quantiles(torch.cat(found), (_LOW, _HIGH)) for found in values])
        self.quantiles_ = scale.to(device_of(self))

    @torch.no_grad()
    def predict(self, batch: Batch) -> AnomalyMap:
        """Scores and maps of pictures; an item without a valid pixel scores NaN."""
        self.check_fitted()
        maps = maps_by_size(batch.images["image"].to(device_of(self)), self._maps)
        return AnomalyMap(score=largest(maps), maps={"image": maps})

    def _maps(self, images: Tensor, valid: Tensor) -> Tensor:
        found = torch.stack(self.trainable.maps(images))  # (2, B, h, w)
        patches = standardized(found, self.quantiles_).mean(0)
        patches = outside_is_nan(patches, valid_patches(valid, patches.shape[1:]))
        return upsample(patches, valid.shape[1:])

    @classmethod
    def example(cls) -> tuple[Self, list[Sample]]:
        """A random residual network, narrow students and a few steps on smooth pictures."""
        from medssl.models.timm_encoder import TimmEncoder

        plan = TrainingPlan(total_samples=40, batch_size=4, learning_rate=5e-3)
        with seeded(0):
            encoder = TimmEncoder("test_resnet", in_channels=1)
        detector = cls(
            encoder,
            layers=["layer1", "layer2"],
            num_features=8,
            width=8,
            held_out=0.25,
            teacher_plan=plan,
            plan=plan,
        )
        return detector, smooth_pictures()


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageAndChanged:
    """The image of a sample, and the same a little brighter, darker, flatter or sharper.

    strength: largest change of the contrast about the mean, and of the brightness in standard
        deviations of the picture.
    """

    strength: float = 0.2

    def __call__(self, sample: Sample, generator: torch.Generator) -> dict[str, Tensor]:
        """Returns "image" and "changed" (C, H, W), 0 where not valid, and "valid" (H, W)."""
        views = WholeImage()(sample, generator)
        pixels, valid = views["image"], views["valid"]
        which, size = torch.rand(2, generator=generator).tolist()
        change = self.strength * (2 * size - 1)
        inside = pixels[:, valid]
        if inside.numel() < 2:
            return {**views, "changed": pixels}
        if which < 0.5:
            changed = pixels + change * inside.std()
        else:
            changed = pixels + change * (pixels - inside.mean())
        return {**views, "changed": torch.where(valid, changed, 0.0)}


class StudentAndAutoencoder(Trainable):
    """The two networks that learn from a small teacher, which they hold (sec. 3.2 and 3.3).

    The student gives two descriptions: the first as the teacher's, the second as the autoencoder's.
    """

    views = ImageAndChanged()
    accumulation = "exact"

    def __init__(self, teacher: SmallTeacher, *, width: int, hard_quantile: float) -> None:
        super().__init__()
        channels, features = teacher.encoder.encoder.in_channels, teacher.num_features
        self.teacher = teacher
        self.student = PatchNetwork(channels, 2 * features, width=width)
        self.autoencoder = SmallAutoencoder(channels, features, width=width)
        self.hard_quantile = hard_quantile
        self.register_buffer("mean_", torch.empty(0))  # (features,) of the teacher
        self.register_buffer("std_", torch.empty(0))
        self.mean_: Tensor
        self.std_: Tensor

    def train(self, mode: bool = True) -> Self:
        """The teacher stays in evaluation mode."""
        super().train(mode)
        self.teacher.eval()
        return self

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Without the teacher."""
        return split_by_decay(self.student, self.autoencoder)

    @torch.no_grad()
    def prepare(self, samples: Sequence[Sample]) -> None:
        """The mean and spread of the teacher's channels."""
        self.mean_, self.std_ = moments(
            chosen(self.teacher(images), valid)
            for images, valid in stacked(samples, device_of(self))
        )

    def taught(self, images: Tensor) -> Tensor:
        """What the teacher gives, each channel standardized: (B, features, h, w)."""
        with torch.no_grad():
            return (self.teacher(images) - channel(self.mean_)) / channel(self.std_)

    def maps(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Mean squared difference of teacher and student, and of autoencoder and student: (B, h, w)
        each, for images (B, C, H, W)."""
        like_teacher, like_autoencoder = self.student(images).chunk(2, dim=1)
        return (
            (self.taught(images) - like_teacher).square().mean(1),
            (self.autoencoder(images) - like_autoencoder).square().mean(1),
        )

    def loss(self, views: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The student's hardest differences, and those among the three on the changed picture."""
        images, changed = views["image"], views["changed"]
        first = self.student(images).chunk(2, dim=1)[0]
        difference = (self.taught(images) - first).square()  # (B, features, h, w)
        valid = valid_patches(views["valid"], difference.shape[2:])
        hard = hard_feature_loss(difference, valid, self.hard_quantile)

        given, second = self.autoencoder(changed), self.student(changed).chunk(2, dim=1)[1]
        coded = mean_over_valid((self.taught(changed) - given).square().mean(1), valid).mean()
        followed = mean_over_valid((given - second).square().mean(1), valid).mean()
        return {
            "loss": hard + coded + followed,
            "student": hard.detach(),
            "autoencoder": coded.detach(),
        }


def hard_feature_loss(difference: Tensor, valid: Tensor, quantile: float) -> Tensor:
    """Mean of the differences at or above their quantile in each picture, then over the pictures.

    difference: (B, E, h, w), squared. valid: (B, h, w) bool; a picture with none gives 0.
    """
    found = []
    for one, known in zip(difference, valid, strict=True):
        values = one[:, known].flatten()
        count = values.numel()
        if count:
            values = values.topk(count - math.ceil(quantile * (count - 1))).values
        found.append(values.sum() / max(1, values.numel()))
    return torch.stack(found).mean()


def of_one_part(normal: NormalData) -> bool:
    """Whether all normals are of one patient or part; one without a group is its own."""
    first = normal[0]
    return all(
        one.item == first.item if one.group is None else one.group == first.group
        for one in (normal[i] for i in range(1, len(normal)))
    )


def quantiles(values: Tensor, shares: Sequence[float]) -> Tensor:
    """Of the values (N,), interpolated linearly; torch's own takes no more than 2^24 of them.

    Raises ValueError where there is no value.
    """
    if values.numel() == 0:
        raise ValueError("the normals that put the maps on one scale have no valid pixel")
    ordered = values.double().sort().values
    place = torch.tensor(shares, dtype=torch.float64) * (len(ordered) - 1)
    low = place.floor().long()
    high = (low + 1).clamp(max=len(ordered) - 1)
    return torch.lerp(ordered[low], ordered[high], place - low).float()


def standardized(maps: Tensor, scale: Tensor) -> Tensor:
    """Maps (K, B, h, w) with the low quantile of each kind at 0 and the high one at 0.1.

    scale: (K, 2), low and high.
    """
    low, high = scale.T[..., None, None, None]  # (K, 1, 1, 1) each
    return _AT_HIGH * (maps - low) / (high - low).clamp(min=1e-12)
