"""Made-up defects on normal items: pieces of other items, textures and lesion-like blobs.

After CutPaste (Li et al., CVPR 2021, https://arxiv.org/abs/2104.04015), DRAEM (Zavrtanik et al.,
ICCV 2021, https://arxiv.org/abs/2108.07610), FPI (Tan et al., 2020,
https://arxiv.org/abs/2011.04197), PII (Tan et al., MICCAI 2021, https://arxiv.org/abs/2107.02622)
and NSA (Schlueter et al., ECCV 2022, https://arxiv.org/abs/2109.15222).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from anomaly.poisson import blend
from medssl.data.image import Image
from medssl.data.sample import Sample

_VISIBLE = 0.01  # standard deviations of the valid pixels; a smaller change is no defect
_TRIES = 20  # draws of a place, before an item is said to be too small or too plain
_OCTAVES = 3  # of the smooth noise, each half as wide and half as strong as the one before


@dataclass(frozen=True, kw_only=True)
class Defect:
    """One kind of defect on the image of role "image", a picture (HW) or a volume (DHW).

    A call changes valid pixels only and returns a new sample of label 1. Its `mask` lies on the
    image's grid, 1 exactly on the pixels that changed by more than 1 % of the standard deviation
    of the valid ones; all others are bit for bit what they were. Equal generators, equal defects.

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
        host, other = sample.images["image"], donor.images["image"]
        _check(sample, donor)
        valid, spread = _valid(host), _spread(host)  # (*spatial), (C, 1, ..., 1)
        for _ in range(_TRIES):
            patch = self._patch(host, other, generator)
            piece = self.change(_Pair(host, other, patch, spread), generator)
            before = host.pixels[(slice(None), *patch.there)]
            piece = piece if host.value_range is None else piece.clamp(*host.value_range)
            changed = ((piece - before).abs() > _VISIBLE * spread).any(0)
            changed &= valid[patch.there]
            if changed.any():
                return _with_defect(sample, patch.there, piece, changed)
        raise ValueError(
            f"item {sample.item}: {_TRIES} draws of {type(self).__name__} changed nothing; the "
            f"item and its donor {donor.item} are alike, take another kind or another donor"
        )

    def change(self, pair: "_Pair", generator: torch.Generator) -> Tensor:
        """The pixels (C, *box) that replace those of `pair.host` in the patch."""
        raise NotImplementedError

    def _patch(self, host: Image, donor: Image, generator: torch.Generator) -> "_Patch":
        """A box around a valid pixel of the host, and an equal one in the donor, both inside."""
        shape = host.spatial_shape
        stretch = (2 * _uniform(len(shape), generator) - 1) * math.log(self.aspect) / 2
        low, high = self.size
        share = low + (high - low) * _uniform(1, generator)
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
        return _Patch(tuple(there), tuple(here), tuple(torch.meshgrid(*offsets, indexing="ij")))


@dataclass(frozen=True)
class _Patch:
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
class _Pair:
    """What a kind of defect works on. spread: standard deviation of the host, (C, 1, ..., 1)."""

    host: Image
    donor: Image
    patch: _Patch
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


@dataclass(frozen=True, kw_only=True)
class CutPaste(Defect):
    """A box of the donor pasted elsewhere (CutPaste, sec. 2.2).

    size: the default is the paper's area of 2 to 15 %.
    jitter: largest change of the pasted brightness, in standard deviations of the host, and of its
        contrast, as a share.
    Differs from the paper: the piece may come from another item, the jitter knows no hue, and the
    aspect is drawn in between its limits rather than far from 1.
    """

    size: tuple[float, float] = (0.14, 0.39)
    jitter: float = 0.1

    def change(self, pair: _Pair, generator: torch.Generator) -> Tensor:
        """The donor's box, a little brighter or darker."""
        return _jittered(pair, self.jitter, generator)


@dataclass(frozen=True, kw_only=True)
class Scar(Defect):
    """A thin stroke of the donor's pixels in any direction (CutPaste-Scar, sec. 2.3).

    width: of the stroke, as a share of its box.
    Differs from the paper: the stroke may come from another item, and turns by any angle instead
    of by at most 45 degrees; in a volume it is a rod.
    """

    aspect: float = 1.0
    width: float = 0.15
    jitter: float = 0.1

    def change(self, pair: _Pair, generator: torch.Generator) -> Tensor:
        """The donor's pixels near a line through the middle of the box."""
        places = torch.stack(pair.patch.places)  # (axes, *box)
        direction = F.normalize(torch.randn(len(places), generator=generator), dim=0)
        along = torch.einsum("a,a...->...", direction, places)
        across = (places.square().sum(0) - along.square()).clamp_min(0).sqrt()
        half_pixel = 1 / min(places.shape[1:])  # so that a thin stroke does not slip through
        inside = (along.abs() <= 1) & (across <= max(self.width, half_pixel))
        return torch.where(inside, _jittered(pair, self.jitter, generator), pair.before)


@dataclass(frozen=True, kw_only=True)
class Texture(Defect):
    """A texture blended in where smooth noise is high (DRAEM, sec. 3.3).

    opacity: smallest and largest share of the texture in the blend.
    Differs from the paper: no photographs of textures; half of the time the texture is the
    donor's, else noise of the host's mean and spread. The noise is a sum of interpolated random
    grids, not Perlin's, and one box holds the whole defect.
    """

    opacity: tuple[float, float] = (0.1, 1.0)

    def change(self, pair: _Pair, generator: torch.Generator) -> Tensor:
        """A blend in a blot with a ragged border."""
        box = pair.before.shape[1:]
        blot = _smooth_noise(box, 2, generator) + 1.5 * (1 - pair.patch.radius)
        channels = [_smooth_noise(box, 6, generator) for _ in range(len(pair.before))]
        mean = _mean(pair.host)
        texture = mean + 1.5 * pair.spread * torch.stack(channels)
        if float(_uniform(1, generator)) < 0.5:
            texture = pair.given
        low, high = self.opacity
        share = low + (high - low) * _uniform(1, generator)
        return torch.where(blot > 0, torch.lerp(pair.before, texture, share), pair.before)


@dataclass(frozen=True, kw_only=True)
class Interpolation(Defect):
    """A box in between the item and a donor (FPI): before + share * (donor - before).

    share: smallest and largest share of the donor.
    Differs from the paper: the donor's box may lie elsewhere, and the mask does not tell the share.
    """

    share: tuple[float, float] = (0.05, 0.95)

    def change(self, pair: _Pair, generator: torch.Generator) -> Tensor:
        """The blend in the whole box."""
        low, high = self.share
        share = low + (high - low) * _uniform(1, generator)
        return torch.lerp(pair.before, pair.given, share)


@dataclass(frozen=True, kw_only=True)
class Poisson(Defect):
    """The donor's structure without a seam (PII and NSA): see `anomaly.poisson.blend`.

    Differs from the papers: always mixed gradients in a box, solved to 1e-8 where both are valid;
    NSA also resizes the patch, looks for places on the object and grades its labels.
    """

    size: tuple[float, float] = (0.1, 0.3)

    def change(self, pair: _Pair, generator: torch.Generator) -> Tensor:
        """The blend inside of the box; its rim stays the host's."""
        return blend(pair.before, pair.given, pair.valid)


@dataclass(frozen=True, kw_only=True)
class Blob(Defect):
    """An ellipsoid that is brighter or darker, with a soft border, as a lesion or a bleeding is.

    contrast_hu: smallest and largest change in the middle where the image is in HU.
    contrast: the same, in standard deviations of the valid pixels, elsewhere.
    softness: share of the radius over which the border fades.
    """

    contrast_hu: tuple[float, float] = (-40.0, 80.0)
    contrast: tuple[float, float] = (-1.5, 1.5)
    softness: float = 0.4

    def change(self, pair: _Pair, generator: torch.Generator) -> Tensor:
        """The host's pixels plus the contrast, which falls to 0 at the border of the box."""
        physical = pair.host.units == "HU"
        low, high = self.contrast_hu if physical else self.contrast
        contrast = low + (high - low) * _uniform(1, generator)
        inside = ((1 - pair.patch.radius) / max(self.softness, 1e-6)).clamp(0, 1)
        profile = inside.square() * (3 - 2 * inside)  # smooth at both ends
        return pair.before + contrast * profile * (1.0 if physical else pair.spread)


_KINDS = {
    "cut_paste": CutPaste,
    "scar": Scar,
    "texture": Texture,
    "interpolation": Interpolation,
    "poisson": Poisson,
    "blob": Blob,
}


@dataclass(frozen=True, kw_only=True)
class Defects:
    """Which defects are made up, and how large; every call draws one kind.

    kinds: of cut_paste, scar, texture, interpolation, poisson and blob.
    size: smallest and largest side of the box around one, as a share of the image's side.
    """

    kinds: tuple[str, ...] = ("cut_paste", "scar", "texture", "poisson", "blob")
    size: tuple[float, float] = (0.05, 0.3)

    def __post_init__(self) -> None:
        object.__setattr__(self, "kinds", tuple(self.kinds))  # lists come out of files
        object.__setattr__(self, "size", tuple(self.size))
        unknown = sorted(set(self.kinds) - set(_KINDS))
        if unknown or not self.kinds:
            raise ValueError(
                f"kinds must name at least one of {', '.join(_KINDS)}, got "
                f"{', '.join(unknown) or 'none'}"
            )
        Defect(size=self.size)  # refuses sizes that are none

    def __call__(self, sample: Sample, donor: Sample, generator: torch.Generator) -> Sample:
        """The sample with one defect; see `Defect`."""
        row = int(torch.randint(len(self.kinds), (1,), generator=generator))
        return _KINDS[self.kinds[row]](size=self.size)(sample, donor, generator)


def has_valid_pixel(sample: Sample) -> bool:
    """Whether there is a place for a defect."""
    return bool(_valid(sample.images["image"]).any())


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
            raise ValueError(f"item {one.item} has no valid pixel, so no defect can be made of it")


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


def _jittered(pair: _Pair, jitter: float, generator: torch.Generator) -> Tensor:
    """The donor's pixels (C, *box) where both are valid, of up to `jitter` another brightness and
    contrast."""
    brightness, contrast = (jitter * (2 * _uniform(2, generator) - 1)).tolist()
    mean = pair.given[:, pair.valid].mean(1).reshape(pair.spread.shape)
    piece = mean + (pair.given - mean) * (1 + contrast) + brightness * pair.spread
    return torch.where(pair.valid, piece, pair.before)


def _smooth_noise(box: Sequence[int], cells: int, generator: torch.Generator) -> Tensor:
    """Sum of interpolated random grids of `cells`, 2 `cells`, ... per side; (*box), spread ~1."""
    total = torch.zeros(1, 1, *box)
    mode = "bilinear" if len(box) == 2 else "trilinear"
    for octave in range(_OCTAVES):
        grid = torch.randn(1, 1, *[cells * 2**octave + 1] * len(box), generator=generator)
        total += F.interpolate(grid, tuple(box), mode=mode, align_corners=True) / 2**octave
    return total[0, 0]


def _valid(image: Image) -> Tensor:
    """(*spatial) bool."""
    if image.valid is None:
        return torch.ones((), dtype=torch.bool).expand(image.spatial_shape)
    return image.valid


def _mean(image: Image) -> Tensor:
    """Of the valid pixels of each channel, (C, 1, ..., 1)."""
    values = image.pixels[:, _valid(image)].double().mean(1).float()
    return values.reshape(-1, *[1] * len(image.spatial_shape))


def _spread(image: Image) -> Tensor:
    """Standard deviation of the valid pixels of each channel, (C, 1, ..., 1); 1 instead of 0."""
    values = image.pixels[:, _valid(image)].double().std(1, correction=0).float()
    values = torch.where(values > 0, values, 1.0)
    return values.reshape(-1, *[1] * len(image.spatial_shape))


def _uniform(count: int, generator: torch.Generator) -> Tensor:
    return torch.rand(count, generator=generator)


def _valid_pixel(valid: Tensor, generator: torch.Generator) -> list[int]:
    """Index of a valid pixel, all of them equally likely."""
    index: list[int] = []
    while valid.ndim:
        counts = valid.reshape(len(valid), -1).sum(1).double()
        index.append(int(torch.multinomial(counts, 1, generator=generator)))
        valid = valid[index[-1]]
    return index
