"""Made-up defects on normal items: pieces of other items, textures and lesion-like blobs.

After CutPaste (Li et al., CVPR 2021, https://arxiv.org/abs/2104.04015), DRAEM (Zavrtanik et al.,
ICCV 2021, https://arxiv.org/abs/2108.07610), FPI (Tan et al., 2020,
https://arxiv.org/abs/2011.04197), PII (Tan et al., MICCAI 2021, https://arxiv.org/abs/2107.02622)
and NSA (Schlueter et al., ECCV 2022, https://arxiv.org/abs/2109.15222).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from anomaly.defect import Defect, Pair, mean_of, uniform
from anomaly.defect import has_valid_pixel as has_valid_pixel
from anomaly.poisson import BlendError, blend
from medssl.data.sample import Sample

_DONORS = 5  # draws of a donor, before an item is left as it is
_OCTAVES = 3  # of the smooth noise, each half as wide and half as strong as the one before


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

    def change(self, pair: Pair, generator: torch.Generator) -> Tensor:
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

    def change(self, pair: Pair, generator: torch.Generator) -> Tensor:
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

    def change(self, pair: Pair, generator: torch.Generator) -> Tensor:
        """A blend in a blot with a ragged border."""
        box = pair.before.shape[1:]
        blot = _smooth_noise(box, 2, generator) + 1.5 * (1 - pair.patch.radius)
        channels = [_smooth_noise(box, 6, generator) for _ in range(len(pair.before))]
        mean = mean_of(pair.host)
        texture = mean + 1.5 * pair.spread * torch.stack(channels)
        if float(uniform(1, generator)) < 0.5:
            texture = pair.given
        low, high = self.opacity
        share = low + (high - low) * uniform(1, generator)
        return torch.where(blot > 0, torch.lerp(pair.before, texture, share), pair.before)


@dataclass(frozen=True, kw_only=True)
class Interpolation(Defect):
    """A box in between the item and a donor (FPI): before + share * (donor - before).

    share: smallest and largest share of the donor.
    Differs from the paper: the donor's box may lie elsewhere, and the mask does not tell the share.
    """

    share: tuple[float, float] = (0.05, 0.95)

    def change(self, pair: Pair, generator: torch.Generator) -> Tensor:
        """The blend in the whole box."""
        low, high = self.share
        share = low + (high - low) * uniform(1, generator)
        return torch.lerp(pair.before, pair.given, share)


@dataclass(frozen=True, kw_only=True)
class Poisson(Defect):
    """The donor's structure without a seam (PII and NSA): see `anomaly.poisson.blend`.

    Differs from the papers: always mixed gradients in a box, solved to 1e-8 where both are valid;
    NSA also resizes the patch, looks for places on the object and grades its labels.
    """

    size: tuple[float, float] = (0.1, 0.3)

    def change(self, pair: Pair, generator: torch.Generator) -> Tensor:
        """The blend inside of the box; its rim stays the host's, and all of a box that has none."""
        try:
            return blend(pair.before, pair.given, pair.valid)
        except BlendError:
            return pair.before  # so that another box is drawn, or another kind


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

    def change(self, pair: Pair, generator: torch.Generator) -> Tensor:
        """The host's pixels plus the contrast, which falls to 0 at the border of the box."""
        physical = pair.host.units == "HU"
        low, high = self.contrast_hu if physical else self.contrast
        contrast = low + (high - low) * uniform(1, generator)
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

    Real sets hold plain images: an empty tray, the last slices of a scan. Some kinds cannot change
    them (a mix with a plain donor, a blend without a gradient, a box on a few valid pixels), so
    where the kind that was drawn does not, the others are tried.

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
        """The sample with one defect, or the sample itself where no kind changes it.

        Raises ValueError as `Defect` does, but not for plain images.
        """
        first = int(torch.randint(len(self.kinds), (1,), generator=generator))
        for name in self.kinds[first:] + self.kinds[:first]:
            made = _KINDS[name](size=self.size).attempt(sample, donor, generator)
            if made is not None:
                return made
        return sample

    def with_any(
        self, sample: Sample, donors: Sequence[Sample], generator: torch.Generator
    ) -> Sample:
        """As a call, with a donor drawn from several, and up to four more where one will not do."""
        for _ in range(min(_DONORS, len(donors))):
            row = int(torch.randint(len(donors), (1,), generator=generator))
            made = self(sample, donors[row], generator)
            if made is not sample:
                return made
        return sample


def _jittered(pair: Pair, jitter: float, generator: torch.Generator) -> Tensor:
    """The donor's pixels (C, *box) where both are valid, of up to `jitter` another brightness and
    contrast."""
    brightness, contrast = (jitter * (2 * uniform(2, generator) - 1)).tolist()
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
