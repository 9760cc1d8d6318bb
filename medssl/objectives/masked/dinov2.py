"""DINOv2 (Oquab et al., TMLR 2024, https://arxiv.org/abs/2304.07193)."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Self, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medssl.data.augment import Augmentation
from medssl.data.boxes import MultiBox
from medssl.data.sample import Sample
from medssl.data.synthetic.shapes import shape_samples
from medssl.data.views import Crops, MultiCrop
from medssl.distributed import mean_of_all, processes, rank
from medssl.models.folder import load_encoder
from medssl.models.heads import DINOHead
from medssl.models.masking import stratified_masks
from medssl.models.momentum import follow, teacher_of
from medssl.models.vit import ViTEncoder
from medssl.models.vit3d import ViT3DEncoder
from medssl.objectives.base import Objective
from medssl.objectives.losses import (
    distillation_loss,
    koleo,
    masked_distillation_loss,
    sinkhorn,
)
from medssl.objectives.teacher import teacher_statistics, teacher_verdict
from medssl.training import Clock, cosine, split_by_decay

_AUGMENTATION = Augmentation()


class DINOv2(Objective):
    """DINO on the class token, iBOT on hidden patches, and KoLeo, which spreads images evenly.

    The student sees half of the large crops with some patches hidden and predicts what the teacher,
    its moving average, says of the whole crops: of the image by the class token, of each hidden
    place by its patch token.

    encoder: the vision transformer to train, or an encoder folder to go on from.
    prototypes: K, of both heads; 64 to 256 where there are only thousands of images.
    hidden_dim, bottleneck_dim: of the heads.
    balance: "sinkhorn" (DINOv2's long recipe) or "centring" (its short one, and iBOT).
    teacher_temperature, student_temperature: smaller is sharper.
    momentum: of the teacher at the start; it rises to 1 by a cosine.
    patch_weight, koleo_weight: of these terms beside DINO's; with 1 and 0, and centring, it is iBOT
        (https://arxiv.org/abs/2111.07832).
    hidden_ratio: smallest and largest share of the patches of a crop that are hidden.
    hidden_probability: share of the large crops with hidden patches.
    frozen_prototypes: share of the training in which the prototypes stay as they are.
    frozen_encoder: share in which the encoder stays, so that fresh heads do not spoil one that has
        been trained before; 0.05 when going on from published weights.
    layer_decay: the learning rate of a block is this times that of the next; 0.9 in the paper.
    global_size, global_scale, local_crops, local_size, local_scale, flip, augmentation,
        window_share, views: as of `medssl.objectives.joint_embedding.dino.DINO`.

    Differs from the paper: the changes of intensity are those of scanners, not of photographs; the
    teacher's temperature has no warm-up; no patch is predicted by the crops that hide nothing.
    """

    def __init__(
        self,
        encoder: ViTEncoder | ViT3DEncoder | Path,
        *,
        prototypes: int = 65_536,
        hidden_dim: int = 2048,
        bottleneck_dim: int = 256,
        balance: Literal["sinkhorn", "centring"] = "sinkhorn",
        teacher_temperature: float = 0.04,
        student_temperature: float = 0.1,
        momentum: float = 0.992,
        patch_weight: float = 1.0,
        koleo_weight: float = 0.1,
        hidden_ratio: tuple[float, float] = (0.1, 0.5),
        hidden_probability: float = 0.5,
        frozen_prototypes: float = 0.01,
        frozen_encoder: float = 0.0,
        layer_decay: float = 0.9,
        global_size: int = 224,
        global_scale: tuple[float, float] = (0.32, 1.0),
        local_crops: int = 8,
        local_size: int = 96,
        local_scale: tuple[float, float] = (0.05, 0.32),
        flip: float = 0.5,
        augmentation: Augmentation = _AUGMENTATION,
        window_share: tuple[float, float] | None = None,
        views: MultiCrop | MultiBox | None = None,
    ) -> None:
        super().__init__()
        self.prototypes, self.hidden_dim = prototypes, hidden_dim
        self.bottleneck_dim, self.balance = bottleneck_dim, balance
        self.teacher_temperature = teacher_temperature
        self.student_temperature, self.momentum = student_temperature, momentum
        self.patch_weight, self.koleo_weight = patch_weight, koleo_weight
        self.hidden_ratio, self.hidden_probability = hidden_ratio, hidden_probability
        self.frozen_prototypes, self.frozen_encoder = frozen_prototypes, frozen_encoder
        self.layer_decay = layer_decay
        self.global_size, self.global_scale = global_size, global_scale
        self.local_crops, self.local_size, self.local_scale = local_crops, local_size, local_scale
        self.flip, self.augmentation, self.window_share = flip, augmentation, window_share
        self.views: MultiCrop | MultiBox = views or MultiCrop(
            large=Crops(count=2, size=global_size, scale=global_scale, flip=flip),
            small=Crops(count=local_crops, size=local_size, scale=local_scale, flip=flip),
            augmentation=augmentation,
            window_share=window_share,
        )
        self._check()
        self._build(load_encoder(encoder) if isinstance(encoder, Path) else encoder)

    def loss(self, views: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """views: "global" (B, 2, C, H, W) and "local" (B, V, C, h, w), or (..., C, D, H, W).

        Returns "loss", its parts, and what the collapse watch reads.
        """
        large = views["global"].transpose(0, 1).flatten(0, 1)  # (2 B, C, [D,] H, W), view by view
        hidden = self._masks(len(views["global"]), large.shape[2:]).to(large.device)  # (2 B, N)
        with torch.no_grad():
            token, patches = self.teacher.tokens(large)
            logits = self.teacher_head(token).float()
            answers = self._answers("center", logits).unflatten(0, (2, -1))  # (2, B, K)
            there = self._answers("patch_center", self.teacher_patch_head(patches[hidden]).float())
        own, own_patches = self.encoder.tokens(large, hidden)
        said = [self._said(self.head(own)).unflatten(0, (2, -1))]
        if "local" in views:
            small = views["local"].transpose(0, 1).flatten(0, 1)
            heard = self._said(self.head(self.encoder(small)))
            said.append(heard.unflatten(0, (views["local"].shape[1], -1)))
        of_class = distillation_loss(torch.cat(said), answers)
        of_patches = masked_distillation_loss(
            self._said(self.patch_head(own_patches[hidden])), there, hidden
        )
        spread = torch.stack([koleo(crop) for crop in own.chunk(2)]).mean()
        return {
            "loss": of_class + self.patch_weight * of_patches + self.koleo_weight * spread,
            "class_loss": of_class.detach(),
            "patch_loss": of_patches.detach(),
            "koleo": spread.detach(),
            **teacher_statistics(answers.flatten(0, 1), token.float()),
        }

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Block by block, the earlier the slower; the prototypes apart."""
        depth = self.encoder.depth
        by_depth: dict[int, list[nn.Parameter]] = {}
        for name, parameter in self.encoder.named_parameters():
            by_depth.setdefault(_depth_of(name, depth), []).append(parameter)
        groups: list[dict[str, Any]] = []
        for place, parameters in sorted(by_depth.items()):
            holder = nn.ParameterList(parameters)
            for group in split_by_decay(holder):
                rate = self.layer_decay ** (depth + 1 - place)
                groups.append({**group, "rate": rate, "frozen_until": self.frozen_encoder})
        groups += split_by_decay(self.head.projector, self.patch_head.projector)
        for head in (self.head, self.patch_head):
            prototypes = list(head.prototypes.parameters())
            groups.append({"params": prototypes, "frozen_until": self.frozen_prototypes})
        return [group for group in groups if group["params"]]

    def after_step(self, clock: Clock) -> None:
        """Move the teacher towards the student, and the centres towards its mean logits."""
        momentum = cosine(self.momentum, 1.0, clock.progress)
        follow(self.teacher, self.encoder, momentum)
        follow(self.teacher_head, self.head, momentum)
        follow(self.teacher_patch_head, self.patch_head, momentum)
        for name, mean in self._means.items():
            getattr(self, name).lerp_(mean_of_all(mean), 0.1)
        self._means.clear()
        self.steps.fill_(clock.step)

    def collapsed(self, statistics: Mapping[str, float]) -> str | None:
        """Names a teacher that says the same of every image, or one that says nothing yet."""
        of_class = {**statistics, "loss": statistics.get("class_loss", 0.0)}
        return teacher_verdict(of_class if statistics else {}, self.prototypes)

    def export(self) -> dict[str, nn.Module]:
        """The teacher."""
        return {"image": self.teacher}

    @classmethod
    def example(cls) -> tuple[Self, list[Sample]]:
        """timm's smallest transformer, and shapes."""
        return cls(
            ViTEncoder("test_vit", image_size=48),
            prototypes=16,
            hidden_dim=32,
            bottleneck_dim=16,
            momentum=0.9,
            global_size=48,
            local_crops=2,
            local_size=32,
        ), shape_samples(8, seed=1)

    def _check(self) -> None:
        if not 0 < self.teacher_temperature <= self.student_temperature:
            raise ValueError(
                "the teacher must be at least as sharp as the student: got temperatures "
                f"{self.teacher_temperature} (teacher) and {self.student_temperature} (student)"
            )
        low, high = self.hidden_ratio
        if not 0 < low <= high < 1 or not 0 <= self.hidden_probability <= 1:
            raise ValueError(
                "hidden_ratio is (smallest, largest) share within (0, 1) and hidden_probability "
                f"lies in [0, 1], got {self.hidden_ratio} and {self.hidden_probability}"
            )

    def _build(self, encoder: nn.Module) -> None:
        """The student's networks and the teacher's."""
        if not isinstance(encoder, (ViTEncoder, ViT3DEncoder)):
            raise ValueError(
                "patches can be hidden in a vision transformer only: give a "
                "medssl.models.vit.ViTEncoder or, for volumes, a medssl.models.vit3d.ViT3DEncoder"
            )
        self.encoder = encoder
        self.encoder.requires_grad_(True)
        self.head, self.patch_head = (
            DINOHead(
                encoder.embedding_dim,
                prototypes=self.prototypes,
                hidden_dim=self.hidden_dim,
                bottleneck_dim=self.bottleneck_dim,
            )
            for _ in range(2)
        )
        self.teacher = teacher_of(self.encoder)
        self.teacher_head, self.teacher_patch_head = (
            teacher_of(self.head),
            teacher_of(self.patch_head),
        )
        for name in ("center", "patch_center"):
            self.register_buffer(name, torch.zeros(self.prototypes))
        self.register_buffer("steps", torch.tensor(0))
        self.center: Tensor
        self.patch_center: Tensor
        self.steps: Tensor
        self._means: dict[str, Tensor] = {}  # of the teacher's logits at the last loss, (K,)

    def _masks(self, count: int, size: Sequence[int]) -> Tensor:
        """The patches that are hidden in large crops of `size`, (2 B, N) bool, view by view.

        The same whichever process draws which of them.
        """
        total = 2 * count * processes()
        views = []
        for view in range(2):  # (view, process, image) is the order of the whole batch
            first = view * count * processes() + count * rank()
            masks = stratified_masks(
                slice(first, first + count),
                total,
                self.encoder.grid(size),
                ratio=self.hidden_ratio,
                probability=self.hidden_probability,
                seed=int(self.steps),
            )
            views.append(masks.flatten(1))
        return torch.cat(views)

    def _answers(self, center: str, logits: Tensor) -> Tensor:
        """Probabilities (R, K) of the teacher's logits."""
        if self.balance == "sinkhorn":
            return sinkhorn(logits, self.teacher_temperature)
        if len(logits):
            self._means[center] = logits.mean(0)
        present = cast(Tensor, getattr(self, center))
        return F.softmax((logits - present) / self.teacher_temperature, dim=-1)

    def _said(self, logits: Tensor) -> Tensor:
        """Log-probabilities of the student."""
        return F.log_softmax(logits.float() / self.student_temperature, dim=-1)


def _depth_of(name: str, depth: int) -> int:
    """0 for what comes before the first block, depth + 1 for what comes after the last."""
    parts = name.split(".")
    if "blocks" in parts:
        return 1 + int(parts[parts.index("blocks") + 1])
    return depth + 1 if name.startswith("network.norm.") else 0
