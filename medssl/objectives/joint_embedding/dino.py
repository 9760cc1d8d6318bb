"""DINO (Caron et al., ICCV 2021, https://arxiv.org/abs/2104.14294)."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medssl.data.augment import Augmentation
from medssl.data.boxes import MultiBox
from medssl.data.image import Image, pixel_affine
from medssl.data.modality import Modality
from medssl.data.sample import Sample
from medssl.data.views import Crops, MultiCrop
from medssl.distributed import mean_of_all
from medssl.models.encoder import Encoder
from medssl.models.folder import load_encoder
from medssl.models.heads import DINOHead
from medssl.models.momentum import follow, teacher_of
from medssl.objectives.base import Objective
from medssl.objectives.losses import distillation_loss
from medssl.objectives.teacher import teacher_statistics, teacher_verdict
from medssl.training import Clock, cosine, split_by_decay

_AUGMENTATION = Augmentation()


class DINO(Objective):
    """A student sees small and large crops and predicts what its own moving average, the teacher,
    says of the other large crops; centring keeps the teacher from naming one prototype always.

    encoder: the network to train, or an encoder folder to go on from.
    prototypes: K, outputs of the head; 64 to 256 where there are only thousands of images.
    hidden_dim, bottleneck_dim: of the head.
    teacher_temperature, student_temperature: smaller is sharper; the teacher's is the smaller.
    momentum: of the teacher at the start; it rises to 1 by a cosine.
    center_momentum: of the centre that is taken from the teacher's logits.
    frozen_prototypes: share of the training in which the prototypes stay as they are.
    global_size, global_scale: side in pixels, and share of the area, of the two large crops.
    local_crops, local_size, local_scale: number, side and share of the small ones.
    flip: how often a crop is mirrored left to right.
    augmentation: changes of exposure, contrast, sharpness and noise, drawn per crop.
    window_share: smallest and largest share of a wide CT window that a crop shows; None for all of
        it (see `medssl.data.views.MultiCrop`).
    neighbours_mm: the second large crop may come from a slice of the volume so near.
    views: the views themselves, instead of those that the arguments from global_size on describe: a
        `medssl.data.views.MultiCrop`, for crops in mm too, or, where the encoder takes volumes, a
        `medssl.data.boxes.MultiBox`.

    Differs from the paper: no color jitter, solarization or grey scale, which only mean something
    in photographs, but gain, offset, gamma and noise with one set of probabilities for all crops;
    bilinear resizing with antialiasing; the teacher's temperature has no warm-up; the norm of the
    prototypes is always fixed.
    """

    accumulation: Literal["exact", "refused"] = "exact"

    def __init__(
        self,
        encoder: Encoder | Path,
        *,
        prototypes: int = 65_536,
        hidden_dim: int = 2048,
        bottleneck_dim: int = 256,
        teacher_temperature: float = 0.04,
        student_temperature: float = 0.1,
        momentum: float = 0.996,
        center_momentum: float = 0.9,
        frozen_prototypes: float = 0.01,
        global_size: int = 224,
        global_scale: tuple[float, float] = (0.4, 1.0),
        local_crops: int = 8,
        local_size: int = 96,
        local_scale: tuple[float, float] = (0.05, 0.4),
        flip: float = 0.5,
        augmentation: Augmentation = _AUGMENTATION,
        window_share: tuple[float, float] | None = None,
        neighbours_mm: float = 0.0,
        views: MultiCrop | MultiBox | None = None,
    ) -> None:
        super().__init__()
        if not 0 < teacher_temperature <= student_temperature:
            raise ValueError(
                "the teacher must be at least as sharp as the student: got temperatures "
                f"{teacher_temperature} (teacher) and {student_temperature} (student)"
            )
        self.prototypes = prototypes
        self.hidden_dim, self.bottleneck_dim = hidden_dim, bottleneck_dim
        self.teacher_temperature = teacher_temperature
        self.student_temperature = student_temperature
        self.momentum, self.center_momentum = momentum, center_momentum
        self.frozen_prototypes = frozen_prototypes
        self.global_size, self.global_scale = global_size, global_scale
        self.local_crops, self.local_size, self.local_scale = local_crops, local_size, local_scale
        self.flip, self.augmentation = flip, augmentation
        self.window_share, self.neighbours_mm = window_share, neighbours_mm
        self.views: MultiCrop | MultiBox = views or MultiCrop(
            large=Crops(count=2, size=global_size, scale=global_scale, flip=flip),
            small=Crops(count=local_crops, size=local_size, scale=local_scale, flip=flip),
            augmentation=augmentation,
            window_share=window_share,
            neighbours_mm=neighbours_mm,
        )
        self.encoder = load_encoder(encoder) if isinstance(encoder, Path) else encoder
        self.encoder.requires_grad_(True)
        self.head = DINOHead(
            self.encoder.embedding_dim,
            prototypes=prototypes,
            hidden_dim=hidden_dim,
            bottleneck_dim=bottleneck_dim,
        )
        self.teacher = teacher_of(self.encoder)
        self.teacher_head = teacher_of(self.head)
        self.register_buffer("center", torch.zeros(prototypes))
        self.center: Tensor
        self._batch_means: list[Tensor] = []  # of the teacher's logits since the last step, (K,)

    def loss(self, views: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """views: "global" (B, 2, C, H, W) and "local" (B, V, C, h, w), or (..., C, D, H, W) of
        volumes; eq. 3 and alg. 1.

        Returns "loss", and what the collapse watch reads.
        """
        large = views["global"]
        with torch.no_grad():
            embedding = self.teacher(_one_by_one(large))  # (2 B, E), view by view
            logits = self.teacher_head(embedding).float().unflatten(0, (2, -1))  # (2, B, K)
            sharpened = F.softmax((logits - self.center) / self.teacher_temperature, dim=-1)
            self._batch_means.append(logits.mean((0, 1)))
        student = [self._student(views[name]) for name in ("global", "local") if name in views]
        loss = distillation_loss(torch.cat(student), sharpened)
        return {"loss": loss, **teacher_statistics(sharpened.flatten(0, 1), embedding.float())}

    def parameter_groups(self) -> list[dict[str, Any]]:
        """The student's; the prototypes apart, because they stay as they are at first."""
        prototypes = {
            "params": list(self.head.prototypes.parameters()),
            "frozen_until": self.frozen_prototypes,
        }
        return [*split_by_decay(self.encoder, self.head.projector), prototypes]

    def after_step(self, clock: Clock) -> None:
        """Move the teacher towards the student and the centre towards the teacher's mean logit."""
        momentum = cosine(self.momentum, 1.0, clock.progress)
        follow(self.teacher, self.encoder, momentum)
        follow(self.teacher_head, self.head, momentum)
        mean = mean_of_all(torch.stack(self._batch_means).mean(0))
        self.center.lerp_(mean, 1 - self.center_momentum)
        self._batch_means.clear()

    def collapsed(self, statistics: Mapping[str, float]) -> str | None:
        """Names a teacher that says the same of every image, or one that says nothing yet."""
        return teacher_verdict(statistics, self.prototypes)

    def export(self) -> dict[str, nn.Module]:
        """The teacher, which is the better of the two (sec. 5.2)."""
        return {"image": self.teacher}

    @classmethod
    def example(cls) -> tuple[Self, list[Sample]]:
        """A tiny network without batch statistics on one-channel noise, half of it brighter."""
        from medssl.models.timm_encoder import TimmEncoder

        objective = cls(
            TimmEncoder("test_convnext", in_channels=1),
            prototypes=16,
            hidden_dim=32,
            bottleneck_dim=16,
            momentum=0.9,
            global_size=64,
            local_crops=2,
            local_size=32,
        )
        generator = torch.Generator().manual_seed(0)
        return objective, [_example_sample(i, generator) for i in range(6)]

    def _student(self, views: Tensor) -> Tensor:
        """views: (B, V, C, [D,] H, W), one pass per size. Returns log-probabilities (V, B, K)."""
        logits = self.head(self.encoder(_one_by_one(views))).float()
        return F.log_softmax(logits / self.student_temperature, dim=-1).unflatten(
            0, (views.shape[1], -1)
        )


def _one_by_one(views: Tensor) -> Tensor:
    """(B, V, C, [D,] H, W) -> (V B, C, [D,] H, W), all of the first view first."""
    return views.transpose(0, 1).flatten(0, 1)


def _example_sample(index: int, generator: torch.Generator) -> Sample:
    pixels = torch.randn(1, 40, 48, generator=generator)
    pixels[:, :, : 8 * index] += 2
    image = Image(
        pixels=pixels,
        axes="HW",
        modality=Modality.PICTURE,
        affine=pixel_affine(),
        frame="pixel",
    )
    return Sample(item=f"item{index}", images={"image": image}, group=f"group{index // 2}")
