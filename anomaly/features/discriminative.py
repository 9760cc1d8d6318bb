"""A segmentation head on frozen features, trained on made-up defects.

After SimpleNet (Liu et al., CVPR 2023, https://arxiv.org/abs/2303.15140) and SuperSimpleNet (Rolih
et al., ICPR 2024, https://arxiv.org/abs/2408.03143).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from anomaly.base import AnomalyMap, NormalData
from anomaly.examples import smooth_pictures, smooth_volumes
from anomaly.features.patches import patch_offset, side_by_side
from anomaly.features.targets import FrozenEncoder, frozen_encoder
from anomaly.learning import LearnedDetector, device_of, seeded
from anomaly.maps import outside_is_nan, pixel_maps, valid_patches
from anomaly.selection import Selection
from anomaly.synthetic import Defects, has_valid_pixel
from anomaly.valid import filled, largest, maps_by_size
from medssl.data.sample import Batch, Sample, collate
from medssl.models.encoder import Encoder
from medssl.training import Trainable, TrainingPlan

_PLAN = TrainingPlan(
    total_samples=20_000, batch_size=32, learning_rate=2e-4, weight_decay=(1e-5, 1e-5)
)
_DONORS = 64  # most normal items that defects are cut from
_GAMMA = 2.0  # of the focal loss
_SLOPE = 0.2  # of the leaky rectifier


class DiscriminativeHead(LearnedDetector):
    """The logit that a place was changed, learnt from normal items with and without a defect.

    encoder: of pictures or volumes, or the folder of one that `medssl pretrain` wrote; it stays
        frozen.
    layers: modules of the encoder's network; their maps are brought to the grid of the first.
    width: channels of the head.
    defects: which are made up, and how large. What is not like any of them may be missed.
    noise: standard deviation of Gaussian noise on the adapted features, whose places count as
        changed (SimpleNet, sec. 3.3); 0 leaves it out. It teaches the head that what is far from
        normal in any direction is anomalous, which defects alone do not.
    share: of the map, whose largest values are averaged into the score; 0 takes the largest.
    sigma: of the Gaussian on the maps, in pixels.
    plan, selection, seed: as of `LearnedDetector`; without a plan, 20 000 samples with the papers'
        learning rate of the head.
    Scores and maps are logits, which are not calibrated and may be negative. What is far from all
    that was trained on scores high where there was noise; nothing guarantees it.
    Differs from the papers: besides the noise, defects are made in pixels, by `Defects`, in every
    second image; the features are standardized with the training items' mean and deviation, without
    batch statistics, so the noise has another unit than the papers' 0.015; one focal loss (exponent
    2, a cell is changed if any of its pixels is) instead of truncated L1 terms; the score comes
    from the map, without a second head; adaptor and head have one learning rate.
    """

    unbounded = False

    def __init__(
        self,
        encoder: Encoder | Path,
        *,
        layers: list[str],
        width: int = 256,
        defects: Defects | None = None,
        noise: float = 0.1,
        share: float = 0.001,
        sigma: float = 4.0,
        plan: TrainingPlan | None = None,
        selection: Selection | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(plan=_PLAN if plan is None else plan, selection=selection, seed=seed)
        self.encoder = frozen_encoder(encoder)
        self.axes = self.encoder.axes
        self.layers, self.width, self.noise = list(layers), width, noise
        self.defects = Defects() if defects is None else defects
        self.share, self.sigma = share, sigma
        self.frozen = FrozenEncoder(self.encoder, self.layers)
        self.register_buffer("offset_", torch.empty(0))  # (axes,) in pixels
        self.offset_: Tensor
        self.trainable: Head = self.new_trainable()

    def new_trainable(self) -> "Head":
        """As of `LearnedDetector`."""
        return Head(self.frozen, MadeUp(self.defects), width=self.width, noise=self.noise)

    def train(self, mode: bool = True) -> Self:
        """The encoder stays in evaluation mode."""
        super().train(mode)
        self.encoder.eval()
        return self

    def after_training(self, normal: NormalData) -> None:
        """Where the first layer looks."""
        self.trainable.views = MadeUp(self.defects)  # lets go of the donors
        size = normal[0].images["image"].spatial_shape
        self.offset_ = patch_offset(self.encoder, self.layers[0], size).to(device_of(self))

    @torch.no_grad()
    def predict(self, batch: Batch) -> AnomalyMap:
        """Scores and maps of images; an item without a valid pixel scores NaN."""
        self.check_fitted()
        maps = maps_by_size(batch.images["image"].to(device_of(self)), self._maps)
        return AnomalyMap(score=largest(maps, self.share), maps={"image": maps})

    def _maps(self, images: Tensor, valid: Tensor) -> Tensor:
        logits = self.trainable(images)
        logits = outside_is_nan(logits, valid_patches(valid, logits.shape[1:]))
        return pixel_maps(logits, valid, offset=self.offset_, sigma=self.sigma)

    @classmethod
    def example(cls) -> tuple[Self, list[Sample]]:
        """A random residual network and a few steps on smooth pictures."""
        from medssl.models.timm_encoder import TimmEncoder

        with seeded(0):
            encoder = TimmEncoder("test_resnet", in_channels=1)
        plan = TrainingPlan(total_samples=64, batch_size=4, learning_rate=1e-2)
        return cls(encoder, layers=["layer1", "layer2"], width=16, plan=plan), smooth_pictures()

    @classmethod
    def example_volume(cls) -> tuple[Self, list[Sample]]:
        """A narrow transformer over smooth volumes."""
        from medssl.models.vit3d import ViT3DEncoder

        with seeded(0):
            encoder = ViT3DEncoder(
                (16, 32, 24), patch_size=(4, 8, 8), embedding_dim=16, depth=2, num_heads=2
            )
        plan = TrainingPlan(total_samples=64, batch_size=4, learning_rate=1e-2)
        detector = cls(encoder, layers=["blocks.0", "blocks.1"], width=16, sigma=1.0, plan=plan)
        return detector, smooth_volumes()


@dataclass(frozen=True)
class MadeUp:
    """The image of a sample, every second time with a defect.

    donors: what defects are cut from; without any, the sample itself.
    """

    defects: Defects
    donors: Sequence[Sample] = field(default=(), repr=False)

    def __call__(self, sample: Sample, generator: torch.Generator) -> dict[str, Tensor]:
        """Returns "image" (C, *spatial), `filled`, "valid" and "changed" (*spatial)."""
        changed = bool(torch.rand((), generator=generator) < 0.5)
        if changed and has_valid_pixel(sample):
            plain = replace(sample, mask=None)
            sample = self.defects.with_any(plain, self.donors or [sample], generator)
        else:
            sample = replace(sample, mask=None)
        batch = collate([sample])
        images = batch.images["image"]
        mask = torch.zeros_like(images.valid) if batch.masks is None else batch.masks
        image = filled(images.pixels, images.valid)[0]
        return {"image": image, "valid": images.valid[0], "changed": mask[0]}


class Head(Trainable):
    """Adaptor and segmentation head of `DiscriminativeHead`, cell by cell of the features."""

    accumulation = "exact"
    views: MadeUp

    def __init__(self, frozen: FrozenEncoder, views: MadeUp, *, width: int, noise: float) -> None:
        super().__init__()
        self.frozen, self.views, self.noise = frozen, views, noise
        channels = sum(shape[0] for shape in frozen.shapes())
        self.adaptor = nn.Linear(channels, channels)
        self.head = nn.Sequential(
            nn.Linear(channels, width), nn.LeakyReLU(_SLOPE), nn.Linear(width, 1)
        )
        self.register_buffer("mean", torch.zeros(channels))
        self.register_buffer("deviation", torch.ones(channels))
        self.mean: Tensor
        self.deviation: Tensor

    @torch.no_grad()
    def prepare(self, samples: Sequence[Sample]) -> None:
        """Mean and deviation of the features over valid cells, and the donors of the defects."""
        count, total, square = 0, torch.zeros(()), torch.zeros(())
        donors = []
        every = max(1, 2 * len(samples) // _DONORS)  # half as many at least
        for row in range(len(samples)):
            sample = samples[row]
            if row % every == 0 and has_valid_pixel(sample):
                donors.append(sample)
            images = collate([sample]).images["image"].to(self.mean.device)
            cells = self.features(filled(images.pixels, images.valid))  # (1, *grid, E)
            cells = cells[valid_patches(images.valid, cells.shape[1:-1])].double()
            count, total = count + len(cells), total + cells.sum(0).cpu()
            square = square + cells.square().sum(0).cpu()
        if count == 0:
            raise ValueError(f"none of the {len(samples)} normal items has a valid pixel")
        self.mean.copy_(total / count)
        self.deviation.copy_((square / count - (total / count).square()).clamp_min(0).sqrt())
        self.deviation.clamp_min_(1e-3 * float(self.deviation.max()) + 1e-12)
        self.views = replace(self.views, donors=donors)

    @torch.no_grad()
    def features(self, images: Tensor) -> Tensor:
        """Means of each neighbourhood of 3 cells a side, all layers side by side: (B, *grid, E)."""
        return side_by_side(self.frozen(images), window=3)

    def forward(self, images: Tensor) -> Tensor:
        """Logits (B, *grid) of images (B, C, *spatial)."""
        return self.head(self._adapted(images))[..., 0]

    def loss(self, views: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Focal loss over the valid cells, and over those of the normal ones with noise."""
        adapted = self._adapted(views["image"])
        grid = adapted.shape[1:-1]
        valid = valid_patches(views["valid"], grid)
        changed = valid_patches(views["changed"], grid)
        loss = _focal(self.head(adapted)[..., 0], changed, valid)
        if self.noise > 0:
            noisy = adapted + self.noise * torch.randn_like(adapted)
            loss = loss + _focal(self.head(noisy)[..., 0], torch.ones_like(changed), valid)
        return {"loss": loss}

    def _adapted(self, images: Tensor) -> Tensor:
        return self.adaptor((self.features(images) - self.mean) / self.deviation)


def _focal(logits: Tensor, changed: Tensor, valid: Tensor) -> Tensor:
    """Focal loss (Lin et al., ICCV 2017, eq. 4) of (B, *grid): mean of the images' means over the
    valid cells."""
    entropy = F.binary_cross_entropy_with_logits(logits, changed.float(), reduction="none")
    weighted = (1 - (-entropy).exp()) ** _GAMMA * entropy
    weighted = torch.where(valid, weighted, 0.0).flatten(1).sum(1)
    return (weighted / valid.flatten(1).sum(1).clamp_min(1)).mean()
