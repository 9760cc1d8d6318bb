"""Random boxes of volumes in mm, for networks that take volumes."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from medssl.data.augment import Augmentation
from medssl.data.geometry import crop, resize
from medssl.data.image import Image
from medssl.data.sample import Sample
from medssl.data.views import between, check_sides, mirror, place, spacing_of


@dataclass(frozen=True, slots=True, kw_only=True)
class Boxes:
    """Random boxes of a volume, each resized to one grid.

    count: boxes per volume.
    size: (D, H, W) of the result in voxels.
    side_mm: smallest and largest side in mm, drawn log-uniformly: a box is a cube in the patient or
        part whatever the spacing of slices and pixels, and as much of it as the volume holds.
    flip: how often the box is mirrored left to right.
    """

    count: int
    size: tuple[int, int, int]
    side_mm: tuple[float, float]
    flip: float = 0.5

    def __post_init__(self) -> None:
        check_sides(self.side_mm)
        if self.count < 0 or len(self.size) != 3 or min(self.size) < 1:
            raise ValueError(
                f"a count of boxes and three sizes in voxels are needed, got {self.count} and "
                f"{tuple(self.size)}"
            )

    def __call__(self, volume: Image, generator: torch.Generator) -> list[Image]:
        """`count` boxes; the affine of each leads to the volume's own frame."""
        return [self.once(volume, generator) for _ in range(self.count)]

    def once(self, volume: Image, generator: torch.Generator) -> Image:
        """One of them."""
        draws = torch.rand(5, generator=generator).tolist()
        side = between(*self.side_mm, draws[0])
        axes = list(zip(volume.spatial_shape, spacing_of(volume), strict=True))
        box = [min(length, max(1, round(side / step))) for length, step in axes]
        start = [
            int(draw * (length - inside + 1))
            for draw, (length, _), inside in zip(draws[1:4], axes, box, strict=True)
        ]
        result = resize(crop(volume, start, box), self.size)
        return mirror(result) if draws[4] < self.flip else result


@dataclass(frozen=True, slots=True, kw_only=True)
class MultiBox:
    """A few large boxes of a volume and many small ones, each changed on its own.

    The augmentation takes the slices of a box as its channels, so that what is drawn (a gain, a
    bias field, a blur within the slice) is the same for all of them; noise is each voxel's own.
    """

    large: Boxes
    small: Boxes
    augmentation: Augmentation

    def __call__(self, sample: Sample, generator: torch.Generator) -> dict[str, Tensor]:
        """Returns "global" (V, C, D, H, W) and, where there are small boxes, "local" (V, C, d, h,
        w); with each the places of its boxes, "global_place" and "local_place" (V, 3, 4), see
        `medssl.data.views.place`.
        """
        volume = sample.images["image"]
        if volume.axes != "DHW":
            raise ValueError(
                f"item {sample.item}: boxes need a volume with axes DHW, got {volume.axes}; for "
                "pictures use medssl.data.views.MultiCrop"
            )
        volume = replace(volume, valid=None)  # preprocessing has filled what is not valid
        views: dict[str, Tensor] = {}
        for name, boxes in (("global", self.large), ("local", self.small)):
            if boxes.count:
                cut = boxes(volume, generator)
                views[name] = torch.stack([self._changed(box, generator) for box in cut])
                views[f"{name}_place"] = torch.stack([place(box, volume) for box in cut])
        return views

    def _changed(self, box: Image, generator: torch.Generator) -> Tensor:
        slices = box.pixels.flatten(0, 1)  # (C D, H, W)
        return self.augmentation(slices, generator).view_as(box.pixels)
