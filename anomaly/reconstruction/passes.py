"""Images rebuilt from a few of their patches, over passes that hide each patch equally often.

What the detectors of masked autoencoders share: their training, their reconstruction and the error
of structure that they are scored with.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from anomaly.base import AnomalyMap
from anomaly.maps import outside_is_nan, smooth
from anomaly.reconstruction.residual import intensity_limits
from anomaly.structure import multi_scale_ssim_map
from anomaly.valid import WholeImage, largest, maps_by_size, mean_over_valid
from medssl.data.sample import ImageBatch, Sample
from medssl.models.masked_transformer import MaskedTransformer, grid_of, patchify, unpatchify
from medssl.training import Trainable, TrainingPlan

PLAN = TrainingPlan(
    total_samples=400_000,
    batch_size=64,
    learning_rate=1e-3,
    warmup_samples=20_000,
    weight_decay=(0.05, 0.05),
)
"""Of both detectors where none is given; the weight decay is that of MAE, the rate is higher, since
there are some 6,000 steps and not 500,000. With a quarter of them pictures are hardly rebuilt."""


@dataclass(frozen=True, kw_only=True)
class StructureError:
    """How an image and its reconstruction differ.

    The map is weight * (1 - MS-SSIM) + (1 - weight) * |x - y| / range, smoothed; the score is the
    mean of its largest values. See `anomaly.structure.multi_scale_ssim_map`.

    weight: share of the structural part, 0 to 1; the absolute part has no upper limit.
    window: pixels, odd. scales: None is as many as an image allows.
    sigma: of the Gaussian on the map, in pixels, one for all axes or one for each.
    top: share of the pixels that the score is the mean of, largest first; 1 is all.
    """

    weight: float = 1.0
    window: int = 11
    scales: int | None = None
    sigma: float | Sequence[float] = 4.0
    top: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.weight <= 1:
            raise ValueError(f"weight must lie in [0, 1], got {self.weight}")
        if not 0 < self.top <= 1:
            raise ValueError(f"top must lie in (0, 1], got {self.top}")

    def maps(self, images: Tensor, rebuilt: Tensor, valid: Tensor) -> Tensor:
        """Error (B, *spatial) of images (B, C, *spatial), NaN where not valid.

        Both in units of the range of the normals, as of `MaskedReconstruction.scaled`.
        """
        total = torch.zeros(valid.shape, device=images.device)
        if self.weight > 0:
            alike = multi_scale_ssim_map(
                images, rebuilt, data_range=1.0, window=self.window, scales=self.scales, valid=valid
            )
            total += self.weight * (1 - alike)
        if self.weight < 1:
            total += (1 - self.weight) * (images - rebuilt).abs().mean(1)
        return outside_is_nan(smooth(outside_is_nan(total, valid), self.sigma), valid)


STRUCTURE = StructureError()
"""Of both detectors where none is given."""


@dataclass(frozen=True, slots=True)
class MaskedImage:
    """The view of a sample whose patches are hidden at random.

    patch_size: pixels, one per axis. mask_ratio: share of the patches that are hidden.
    """

    patch_size: tuple[int, ...]
    mask_ratio: float

    def __call__(self, sample: Sample, generator: torch.Generator) -> dict[str, Tensor]:
        """Returns "image" and "valid" as of `WholeImage`, and "hidden" (N,) bool."""
        views = WholeImage()(sample, generator)
        count = prod(grid_of(views["valid"].shape, self.patch_size))
        order = torch.randperm(count, generator=generator)
        shown = max(1, round((1 - self.mask_ratio) * count))
        return {**views, "hidden": order >= shown}


class MaskedReconstruction(Trainable):
    """A masked autoencoder, its loss, and images rebuilt by it.

    network: takes images in units of the range of the normals: 0 is its low end, 1 its high end.
    mask_ratio: share of the patches that is hidden in training.
    """

    accumulation = "exact"

    def __init__(self, network: MaskedTransformer, *, mask_ratio: float) -> None:
        super().__init__()
        if not 0.5 <= mask_ratio < 1:
            raise ValueError(f"mask_ratio must lie in [0.5, 1), got {mask_ratio}")
        self.network = network
        self.parts = round(1 / (1 - mask_ratio))
        self.views = MaskedImage(tuple(network.patch_size), mask_ratio)
        self.register_buffer("low_", torch.empty(0))  # (1,)
        self.register_buffer("data_range_", torch.empty(0))  # (1,)
        self.low_: Tensor
        self.data_range_: Tensor

    def prepare(self, samples: Sequence[Sample]) -> None:
        """The range of the normals' values."""
        low, high = intensity_limits(samples)
        device = self.network.mask_token.device
        self.low_ = torch.tensor([low], device=device)
        self.data_range_ = torch.tensor([high - low], device=device)

    def loss(self, views: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Mean squared error over the valid pixels of the hidden patches, mean over the images."""
        images = self.scaled(views["image"], views["valid"])
        patch_size = self.network.patch_size
        error = (self.network(images, views["hidden"]) - patchify(images, patch_size)).square()
        valid = patchify(views["valid"][:, None].to(images.dtype), patch_size) > 0  # (B, N, p p)
        counted = (valid & views["hidden"][..., None]).repeat(1, 1, images.shape[1])
        return {"loss": mean_over_valid(error, counted).mean()}

    def scaled(self, pixels: Tensor, valid: Tensor) -> Tensor:
        """Pixels (B, C, *spatial) in units of the range, 0 where not valid."""
        return torch.where(valid[:, None], (pixels - self.low_) / self.data_range_, 0.0)

    def rebuilt(self, images: Tensor, *, num_partitions: int, seed: int) -> Tensor:
        """Scaled images (B, C, *spatial), each pixel the mean of what was said while it was hidden.

        In each partition the patches fall into as many parts as the mask ratio asks for (4 for
        0.75), and one part after the other is all that is shown.
        """
        grid = self.network.grid(images.shape[2:])
        total = torch.zeros_like(patchify(images, self.network.patch_size))
        for hidden in hidden_parts(
            prod(grid), self.parts, num_partitions=num_partitions, seed=seed
        ):
            rows = hidden.to(images.device).expand(len(images), -1)
            total += torch.where(rows[..., None], self.network(images, rows), 0.0)
        times_hidden = num_partitions * (self.parts - 1)
        return unpatchify(total / times_hidden, self.network.patch_size, grid)


def scored(
    images: ImageBatch,
    trained: MaskedReconstruction,
    error: StructureError,
    *,
    num_partitions: int,
    seed: int,
) -> AnomalyMap:
    """Scores and maps of a batch; items of different sizes are looked at without their padding."""

    def errors(pixels: Tensor, valid: Tensor) -> Tensor:
        scaled = trained.scaled(pixels, valid)
        rebuilt = trained.rebuilt(scaled, num_partitions=num_partitions, seed=seed)
        return error.maps(scaled, rebuilt, valid)

    maps = maps_by_size(images, errors)
    return AnomalyMap(score=largest(maps, error.top), maps={"image": maps})


def hidden_parts(count: int, parts: int, *, num_partitions: int, seed: int) -> Iterator[Tensor]:
    """Which of `count` patches a pass hides, (count,) bool, pass by pass.

    Over the `parts` passes of a partition each patch is shown once. Raises ValueError for fewer
    patches than parts.
    """
    if count < parts:
        raise ValueError(
            f"{count} patches cannot be shown in {parts} parts; take smaller patches, larger "
            "images or a lower mask_ratio"
        )
    generator = torch.Generator().manual_seed(seed)
    for _ in range(num_partitions):
        part = torch.randperm(count, generator=generator) % parts
        for shown in range(parts):
            yield part != shown
