"""Random views of an image: crops that keep their coordinates, and the slice they come from."""

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from medssl.data.augment import Augmentation, random_window
from medssl.data.geometry import crop, resize
from medssl.data.image import Image
from medssl.data.sample import Sample

_EMPTY_SLICE = 0.01  # a slice whose values span less than this share of the volume's is empty


@dataclass(frozen=True, slots=True, kw_only=True)
class Crops:
    """Random boxes of a picture, each resized to a square.

    count: crops per picture.
    size: side of the result in pixels.
    scale: smallest and largest share of the picture's area.
    aspect: smallest and largest width / height of the box, drawn log-uniformly.
    flip: how often the crop is mirrored left to right.
    side_mm: smallest and largest side of the box in mm, drawn log-uniformly, instead of a share: a
        square on the patient or part (but for `aspect`) whatever the spacing of rows and columns,
        and as much of it as the picture holds. It needs a spacing.
    """

    count: int
    size: int
    scale: tuple[float, float] = (1.0, 1.0)
    aspect: tuple[float, float] = (3 / 4, 4 / 3)
    flip: float = 0.5
    side_mm: tuple[float, float] | None = None

    def __post_init__(self) -> None:
        if not 0 < self.scale[0] <= self.scale[1] <= 1:
            raise ValueError(
                f"scale is (smallest, largest) share of the area within (0, 1], got {self.scale}"
            )
        if self.side_mm is not None:
            check_sides(self.side_mm)
        if self.count < 0 or self.size < 1:
            raise ValueError(f"got {self.count} crops of {self.size} pixels; both are counts")

    def __call__(self, image: Image, generator: torch.Generator) -> list[Image]:
        """`count` crops of a 2D image; the affine of each leads to the image's own frame."""
        return [self.once(image, generator) for _ in range(self.count)]

    def once(self, image: Image, generator: torch.Generator) -> Image:
        """One of them."""
        draws = torch.rand(5, generator=generator).tolist()
        height, width = image.spatial_shape
        aspect = between(*self.aspect, draws[1])
        if self.side_mm is None:
            area = height * width * (self.scale[0] + draws[0] * (self.scale[1] - self.scale[0]))
            sides = (math.sqrt(area / aspect), math.sqrt(area * aspect))
        else:
            side = between(*self.side_mm, draws[0])
            rows_mm, columns_mm = spacing_of(image)
            sides = (side / math.sqrt(aspect) / rows_mm, side * math.sqrt(aspect) / columns_mm)
        box = (min(height, max(1, round(sides[0]))), min(width, max(1, round(sides[1]))))
        start = (int(draws[2] * (height - box[0] + 1)), int(draws[3] * (width - box[1] + 1)))
        result = resize(crop(image, start, box), (self.size, self.size))
        return mirror(result) if draws[4] < self.flip else result


@dataclass(frozen=True, slots=True, kw_only=True)
class MultiCrop:
    """The views of SwAV and DINO: a few large crops and many small ones, each changed on its own.

    A volume gives one slice per call, drawn along D among the slices that hold something.

    neighbours_mm: the large crops after the first are cut from slices up to so far from the first
        one's, so that neighbours in a volume belong together as crops of one slice do; 0 for the
        same slice. It needs a spacing in mm, and means nothing for pictures.
    window_share: (smallest, largest) share of the intensities of the whole picture or volume that a
        crop shows, before the augmentation; each crop draws its own (see
        `medssl.data.augment.random_window`). It is a window in HU where a CT reaches both ends of
        the wide window of its preprocessing, as one with air and bone does. None shows all.
    """

    large: Crops
    small: Crops
    augmentation: Augmentation
    neighbours_mm: float = 0.0
    window_share: tuple[float, float] | None = None

    def __post_init__(self) -> None:
        if self.neighbours_mm < 0:
            raise ValueError(f"neighbours_mm must not be negative, got {self.neighbours_mm}")
        share = self.window_share
        if share is not None and not 0 < share[0] <= share[1] <= 1:
            raise ValueError(
                f"window_share is (smallest, largest) share of a window within (0, 1], got {share}"
            )

    def __call__(self, sample: Sample, generator: torch.Generator) -> dict[str, Tensor]:
        """Returns "global" (V, C, H, W) and, where there are small crops, "local" (V, C, h, w);
        with each the places of its crops, "global_place" and "local_place" (V, 2, 3), see `place`.
        """
        image = sample.images["image"]
        limits = None
        if self.window_share is not None:
            low, high = torch.aminmax(image.pixels)  # of the volume: a slice may hold no air
            limits = (low.item(), high.item())
        if image.axes not in ("HW", "DHW"):
            raise ValueError(
                f"item {sample.item}: views need axes HW or DHW, got {image.axes}; a time series "
                "has to be cut into its frames first"
            )
        image = replace(image, valid=None)  # preprocessing has filled what is not valid
        slices = [image] * self.large.count
        if image.axes == "DHW":
            slices = near_slices(image, self.large.count, self.neighbours_mm, generator)
        cut = [self.large.once(one, generator) for one in slices]
        views = self._changed("global", cut, slices, generator, limits)
        if self.small.count:
            cut = self.small(slices[0], generator)
            views |= self._changed("local", cut, slices[:1] * len(cut), generator, limits)
        return views

    def _changed(
        self,
        name: str,
        cut: list[Image],
        sources: list[Image],
        generator: torch.Generator,
        limits: tuple[float, float] | None,
    ) -> dict[str, Tensor]:
        views = [view.pixels for view in cut]
        if self.window_share is not None and limits is not None:
            share = self.window_share
            views = [random_window(view, generator, limits=limits, share=share) for view in views]
        return {
            name: torch.stack([self.augmentation(view, generator) for view in views]),
            f"{name}_place": torch.stack(
                [place(view, source) for view, source in zip(cut, sources, strict=True)]
            ),
        }


def place(crop: Image, source: Image) -> Tensor:
    """Where a crop lies in its picture or volume: (2, 3) or (3, 4) float32.

    Takes (row, column, 1) in the crop to (down, right) in the picture, and (slice, row, column, 1)
    to (across, down, right) in a volume, from the centre of its first pixel and in units of its
    longest side, with the aspect ratio of its spacing. So places in crops of one picture can be
    compared, and roughly those in pictures of different sizes.
    """
    shape = source.spatial_shape
    steps = torch.tensor(source.spacing or (1.0,) * len(shape), dtype=torch.float64)
    unit = (torch.tensor(shape) * steps).max()
    first = 3 - len(shape)
    back = torch.linalg.solve(source.affine, crop.affine)[first:3, first:]  # in source pixels
    return (back * steps[:, None] / unit).float()


def spacing_of(image: Image) -> tuple[float, ...]:
    """mm between pixels. Raises ValueError where they have no physical distance."""
    if image.spacing is None:
        raise ValueError(
            "crops in mm need an image with a spacing, and this one has none; give shares of the "
            "area instead"
        )
    return image.spacing


def check_sides(sides_mm: tuple[float, float]) -> None:
    """Refuse what cannot be (smallest, largest) in mm."""
    if not 0 < sides_mm[0] <= sides_mm[1]:
        raise ValueError(f"side_mm is (smallest, largest), both above 0, got {sides_mm}")


def between(low: float, high: float, share: float) -> float:
    """From `low` at share 0 to `high` at 1, evenly in the logarithm."""
    return low * (high / low) ** share


def take_slice(volume: Image, index: int) -> Image:
    """Slice `index` along D of a DHW volume as a 2D image at its place in the volume's frame."""
    move = torch.eye(4, dtype=torch.float64)
    move[0, 3] = index
    return replace(
        volume,
        pixels=volume.pixels[:, index],
        axes="HW",
        affine=volume.affine @ move,
        spacing=None if volume.spacing is None else volume.spacing[1:],
        valid=None if volume.valid is None else volume.valid[index],
    )


def random_slice(volume: Image, generator: torch.Generator) -> Image:
    """A slice along D, drawn evenly among those that are not constant; any where all are."""
    return near_slices(volume, 1, 0.0, generator)[0]


def near_slices(
    volume: Image, count: int, reach_mm: float, generator: torch.Generator
) -> list[Image]:
    """`count` slices along D that are not constant: the first anywhere, the others drawn evenly
    among those at most `reach_mm` from it (any where all slices are constant).

    Raises ValueError for a reach in a volume without spacing.
    """
    spans = volume.pixels.amax((0, 2, 3)) - volume.pixels.amin((0, 2, 3))  # (D,)
    candidates = (spans > _EMPTY_SLICE * spans.max()).nonzero()[:, 0]
    if len(candidates) == 0:
        candidates = torch.arange(len(spans))
    first = candidates[torch.randint(len(candidates), (1,), generator=generator)]
    chosen = [int(first)] * count
    if reach_mm > 0:
        if volume.spacing is None:
            raise ValueError("neighbours within mm need a volume with a spacing; set none")
        near = candidates[(candidates - first).abs() * volume.spacing[0] <= reach_mm + 1e-6]
        picks = torch.randint(len(near), (count - 1,), generator=generator)
        chosen[1:] = near[picks].tolist()
    return [take_slice(volume, index) for index in chosen]


def mirror(image: Image) -> Image:
    """An image with its columns in reverse order; the affine still leads to the same places."""
    reverse = torch.eye(4, dtype=torch.float64)
    reverse[2, 2], reverse[2, 3] = -1, image.spatial_shape[-1] - 1
    return replace(
        image,
        pixels=image.pixels.flip(-1),
        affine=image.affine @ reverse,
        valid=None if image.valid is None else image.valid.flip(-1),
    )
