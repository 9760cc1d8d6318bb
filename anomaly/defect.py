"""One kind of defect: where it lies, which pixels it replaces, and what it is made of."""

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from medssl.data.image import Image
from medssl.data.sample import Sample

_VISIBLE = 0.01  # standard deviations of the valid pixels; a smaller change is no defect
_TRIES = 20  # draws of a place, before an item is said to be too small or too plain


@dataclass(frozen=True, kw_only=True)
class Defect:
    """One kind of defect on the image of role "image", a picture (HW) or a volume (DHW).

    A call changes valid, finite pixels only and returns a new sample of label 1. Its `mask` lies on
    the image's grid, 1 exactly on the pixels that changed by more than 1 % of the standard
    deviation of these; all others are bit for bit what they were. Where they are all alike, but
    for rounding, 1 stands for the deviation. Equal generators, equal defects.

    size: smallest and largest side of the box around the defect, as a share of the image's side;
        drawn evenly, in a volume along D, H and W alike.
    aspect: how many times the longest of these shares is the shortest, at most.
    """

    size: tuple[float, float] = (0.05, 0.3)
    aspect: float = 3.3

    def __post_init__(self) -> None:
        low, high = self.size
        if not 0 < low <= high <= 1:
            raise ValueError(f"size must hold two rising shares of a side, got {low} and {high}")
        if self.aspect < 1:
            raise ValueError(f"aspect must be at least 1, got {self.aspect}")

    def __call__(self, sample: Sample, donor: Sample, generator: torch.Generator) -> Sample:
        """The sample with one defect, made of pixels of the donor, which may be the sample itself.

        Raises ValueError where one of them has no valid pixel, where their axes or channels
        differ, and where no draw changes the image (it is as plain as the donor).
        """
        made = self.attempt(sample, donor, generator)
        if made is None:
            raise ValueError(
                f"item {sample.item}: {_TRIES} draws of {type(self).__name__} changed nothing; the "
                f"item and its donor {donor.item} are alike, or it is too small for this kind; "
                "take another kind or another donor"
            )
        return made

    def attempt(self, sample: Sample, donor: Sample, generator: torch.Generator) -> Sample | None:
        """As a call, but None where no draw changes the image."""
        _check(sample, donor)
        host, other = _known(sample.images["image"]), _known(donor.images["image"])
        valid, spread = _valid(host), _spread(host)  # (*spatial), (C, 1, ..., 1)
        for _ in range(_TRIES):
            patch = self._patch(host, other, generator)
            piece = self.change(Pair(host, other, patch, spread), generator)
            before = host.pixels[(slice(None), *patch.there)]
            piece = piece if host.value_range is None else piece.clamp(*host.value_range)
            changed = ((piece - before).abs() > _VISIBLE * spread).any(0)
            changed &= valid[patch.there]
            if changed.any():
                return _with_defect(sample, patch.there, piece, changed)
        return None

    def change(self, pair: "Pair", generator: torch.Generator) -> Tensor:
        """The pixels (C, *box) that replace those of `pair.host` in the patch."""
        raise NotImplementedError

    def _patch(self, host: Image, donor: Image, generator: torch.Generator) -> "Patch":
        """A box around a valid pixel of the host, and an equal one in the donor, both inside."""
        shape = host.spatial_shape
        stretch = (2 * uniform(len(shape), generator) - 1) * math.log(self.aspect) / 2
        low, high = self.size
        share = low + (high - low) * uniform(1, generator)
        sides = share * (stretch - stretch.mean()).exp() * torch.tensor(shape)
        to = _valid_pixel(_valid(host), generator)
        source = _valid_pixel(_valid(donor), generator)
        there, here, offsets = [], [], []
        for axis, side in enumerate(sides.clamp_min(1).round().long().tolist()):
            start = max(-(side // 2), -to[axis], -source[axis])
            stop = min(
                side - side // 2, shape[axis] - to[axis], donor.spatial_shape[axis] - source[axis]
            )
            there.append(slice(to[axis] + start, to[axis] + stop))
            here.append(slice(source[axis] + start, source[axis] + stop))
            offsets.append((torch.arange(start, stop) + 0.5 * (side % 2 == 0)) * 2 / side)
        return Patch(tuple(there), tuple(here), tuple(torch.meshgrid(*offsets, indexing="ij")))


@dataclass(frozen=True)
class Patch:
    """A box in the host (`there`) and one of the same shape in the donor (`here`).

    places: per axis the distance of each pixel from the middle, (*box); 1 at the uncut border.
    """

    there: tuple[slice, ...]
    here: tuple[slice, ...]
    places: tuple[Tensor, ...]

    @property
    def radius(self) -> Tensor:
        """1 on the ellipsoid that fills the box, 0 in its middle; (*box)."""
        return torch.stack(self.places).square().sum(0).sqrt()


@dataclass(frozen=True)
class Pair:
    """What a kind of defect works on; pixels of both images that are not finite are not valid.

    spread: standard deviation of the host, (C, 1, ..., 1).
    """

    host: Image
    donor: Image
    patch: Patch
    spread: Tensor

    @property
    def before(self) -> Tensor:
        """Pixels of the host in the box, (C, *box)."""
        return self.host.pixels[(slice(None), *self.patch.there)]

    @property
    def given(self) -> Tensor:
        """Pixels of the donor in its box, those of the host where they are not valid."""
        pixels = self.donor.pixels[(slice(None), *self.patch.here)]
        return torch.where(_valid(self.donor)[self.patch.here], pixels, self.before)

    @property
    def valid(self) -> Tensor:
        """Where both are valid, (*box)."""
        return _valid(self.host)[self.patch.there] & _valid(self.donor)[self.patch.here]


def has_valid_pixel(sample: Sample) -> bool:
    """Whether there is a place for a defect: a pixel that is valid and finite in every channel."""
    return bool(_valid(_known(sample.images["image"])).any())


def _check(sample: Sample, donor: Sample) -> None:
    host, other = sample.images["image"], donor.images["image"]
    if host.axes not in ("HW", "DHW"):
        raise ValueError(f"item {sample.item}: defects take axes HW or DHW, got {host.axes}")
    if other.axes != host.axes or len(other.pixels) != len(host.pixels):
        raise ValueError(
            f"a donor must be of the same kind: item {sample.item} has axes {host.axes} and "
            f"{len(host.pixels)} channels, donor {donor.item} {other.axes} and {len(other.pixels)}"
        )
    for one in (sample, donor):
        if not has_valid_pixel(one):
            raise ValueError(
                f"item {one.item} has no valid pixel that is finite, so no defect can be made of it"
            )


def _with_defect(sample: Sample, box: tuple[slice, ...], piece: Tensor, changed: Tensor) -> Sample:
    """The sample with `piece` (C, *box) where `changed` (*box)."""
    host = sample.images["image"]
    pixels, mask = host.pixels.clone(), torch.zeros(1, *host.spatial_shape)
    inside = (slice(None), *box)
    pixels[inside] = torch.where(changed, piece, host.pixels[inside])
    mask[inside] = changed.float()
    return replace(
        sample,
        images={**sample.images, "image": replace(host, pixels=pixels)},
        mask=replace(host, pixels=mask, channels=(), units="mask", value_range=None),
        label=1,
    )


def _known(image: Image) -> Image:
    """The image with its NaN and infinite pixels marked as not valid."""
    finite = image.pixels.isfinite().all(0)
    return image if finite.all() else replace(image, valid=finite & _valid(image))


def _valid(image: Image) -> Tensor:
    """(*spatial) bool."""
    if image.valid is None:
        return torch.ones((), dtype=torch.bool).expand(image.spatial_shape)
    return image.valid


def mean_of(image: Image) -> Tensor:
    """Of the valid pixels of each channel, (C, 1, ..., 1)."""
    values = image.pixels[:, _valid(image)].double().mean(1).float()
    return values.reshape(-1, *[1] * len(image.spatial_shape))


def _spread(image: Image) -> Tensor:
    """Standard deviation of the valid pixels of each channel, (C, 1, ..., 1); 1 where it is below
    the rounding of the largest of them."""
    pixels = image.pixels[:, _valid(image)]  # (C, n)
    values = pixels.double().std(1, correction=0).float()
    rounding = torch.finfo(pixels.dtype).eps * pixels.abs().amax(1)
    values = torch.where(values > rounding, values, 1.0)
    return values.reshape(-1, *[1] * len(image.spatial_shape))


def uniform(count: int, generator: torch.Generator) -> Tensor:
    """Draws from [0, 1), (count,)."""
    return torch.rand(count, generator=generator)


def _valid_pixel(valid: Tensor, generator: torch.Generator) -> list[int]:
    """Index of a valid pixel, all of them equally likely."""
    index: list[int] = []
    while valid.ndim:
        counts = valid.reshape(len(valid), -1).sum(1).double()
        index.append(int(torch.multinomial(counts, 1, generator=generator)))
        valid = valid[index[-1]]
    return index
