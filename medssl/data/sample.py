"""One item as a method sees it, and many of them side by side."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor

from medssl.data.image import Frame, Image, PointCloud
from medssl.data.modality import Modality


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Sample:
    """One item: its images by role, what is known about it, and whom it belongs to.

    item: the manifest's id; the only name of it that may leave this machine.
    images: by role: "image", "flair", ...; "xyz" is the organized geometry beside a picture, on
        its grid. Geometry without a picture is the "image" itself (modality DEPTH).
    points: a free cloud; then there are no images.
    label: 0 normal, 1 anomalous, None unknown.
    mask: 1 on the lesion or defect, with its own affine; None where there is none.
    point_labels: (P,) bool of the free cloud, True on a defect; None where not known.
    group: salted patient or part; items of one group never lie on both sides of a split.
    study: salted study, or None.
    """

    item: str
    images: Mapping[str, Image] = field(default_factory=dict)
    points: PointCloud | None = None
    report: str | None = None
    label: int | None = None
    mask: Image | None = None
    point_labels: Tensor | None = None
    group: str | None = None
    study: str | None = None

    def __post_init__(self) -> None:
        labels, cloud = self.point_labels, self.points
        if labels is not None and (cloud is None or labels.shape != cloud.points.shape[:1]):
            raise ValueError(
                f"item {self.item}: {len(labels)} point labels for "
                f"{'no cloud' if cloud is None else f'{len(cloud.points)} points'}; give one each"
            )

    @property
    def subject(self) -> Image | PointCloud:
        """What the item is: its image, or its free cloud."""
        return self.images["image"] if self.points is None else self.points

    def with_image(self, image: Image, role: str = "image") -> "Sample":
        """The same item with the image of one role replaced."""
        return replace(self, images={**self.images, role: image})


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ImageBatch:
    """Images of one role, padded to a common size at the end of each axis.

    pixels: (B, C, *axes) float32.
    valid: (B, *spatial axes) bool, False on padding and wherever the image is not valid.
    affines: (B, 4, 4) float64.
    sizes: the spatial shape of each image before padding.
    """

    pixels: Tensor
    axes: str
    valid: Tensor
    affines: Tensor
    spacings: tuple[tuple[float, ...] | None, ...]
    sizes: tuple[tuple[int, ...], ...]
    frames: tuple[Frame, ...]
    modalities: tuple[Modality, ...]

    def to(self, device: torch.device | str) -> "ImageBatch":
        """The same images with pixels and valid on `device`."""
        return replace(self, pixels=self.pixels.to(device), valid=self.valid.to(device))

    def pin_memory(self) -> "ImageBatch":
        """The same images in page-locked memory, for a fast copy to a GPU."""
        return replace(self, pixels=self.pixels.pin_memory(), valid=self.valid.pin_memory())


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Batch:
    """Samples side by side; the order is the samples' order.

    images: by role.
    labels: (B,) int64, -1 where unknown.
    masks: (B, *spatial axes) bool on the grid of the role "image", or None where no item has one.
    """

    items: tuple[str, ...]
    images: Mapping[str, ImageBatch]
    points: tuple[PointCloud | None, ...]
    reports: tuple[str | None, ...]
    labels: Tensor
    masks: Tensor | None
    groups: tuple[str | None, ...]
    studies: tuple[str | None, ...]

    def __len__(self) -> int:
        return len(self.items)

    def to(self, device: torch.device | str) -> Self:
        """The same batch with its tensors on `device`."""
        return replace(
            self,
            images={role: images.to(device) for role, images in self.images.items()},
            points=tuple(cloud and cloud.to(device) for cloud in self.points),
            labels=self.labels.to(device),
            masks=None if self.masks is None else self.masks.to(device),
        )

    def pin_memory(self) -> Self:
        """The same batch in page-locked memory; a torch DataLoader calls this."""
        return replace(
            self, images={role: images.pin_memory() for role, images in self.images.items()}
        )


def collate(samples: Sequence[Sample]) -> Batch:
    """Put samples side by side, padding images at the end of each spatial axis.

    Raises ValueError where roles, axes or channel counts differ between samples.
    """
    roles = list(samples[0].images)
    for sample in samples:
        if list(sample.images) != roles:
            raise ValueError(
                f"all items of a batch need the same roles {roles}; "
                f"item {sample.item} has {list(sample.images)}"
            )
    images = {role: collate_images([sample.images[role] for sample in samples]) for role in roles}
    labels = [-1 if sample.label is None else sample.label for sample in samples]
    return Batch(
        items=tuple(sample.item for sample in samples),
        images=images,
        points=tuple(sample.points for sample in samples),
        reports=tuple(sample.report for sample in samples),
        labels=torch.tensor(labels),
        masks=_collate_masks(samples, images),
        groups=tuple(sample.group for sample in samples),
        studies=tuple(sample.study for sample in samples),
    )


def collate_images(images: Sequence[Image]) -> ImageBatch:
    """Pad images of equal axes and channels to the largest size of each axis."""
    kinds = {(image.axes, image.pixels.shape[0]) for image in images}
    if len(kinds) > 1:
        raise ValueError(
            f"images of a batch need equal axes and channels, got {sorted(kinds)}; "
            "score them apart or select one kind"
        )
    size = [max(sizes) for sizes in zip(*(image.pixels.shape[1:] for image in images), strict=True)]
    spatial = size[-len(images[0].spatial_shape) :]
    valid = torch.zeros(len(images), *spatial, dtype=torch.bool)
    for row, image in zip(valid, images, strict=True):
        inside = row[tuple(slice(length) for length in image.spatial_shape)]
        inside.copy_(torch.tensor(True) if image.valid is None else image.valid)
    return ImageBatch(
        pixels=torch.stack([_pad(image.pixels, size) for image in images]),
        axes=images[0].axes,
        valid=valid,
        affines=torch.stack([image.affine for image in images]),
        spacings=tuple(image.spacing for image in images),
        sizes=tuple(image.spatial_shape for image in images),
        frames=tuple(image.frame for image in images),
        modalities=tuple(image.modality for image in images),
    )


def _pad(pixels: Tensor, size: Sequence[int]) -> Tensor:
    amounts: list[int] = []
    for have, want in zip(reversed(pixels.shape[1:]), reversed(size), strict=True):
        amounts += [0, want - have]
    return F.pad(pixels, amounts) if any(amounts) else pixels


def _collate_masks(samples: Sequence[Sample], images: Mapping[str, ImageBatch]) -> Tensor | None:
    if "image" not in images or all(sample.mask is None for sample in samples):
        return None
    masks = torch.zeros_like(images["image"].valid)
    for row, sample in zip(masks, samples, strict=True):
        if sample.mask is None:
            continue
        shape = sample.images["image"].spatial_shape
        if sample.mask.spatial_shape != shape:
            raise ValueError(
                f"item {sample.item}: mask {sample.mask.spatial_shape} does not lie on the image's "
                f"grid {shape}; bring it there with geometry.resample(mask, to=image)"
            )
        row[tuple(slice(length) for length in shape)] = sample.mask.pixels[0] > 0.5
    return masks
