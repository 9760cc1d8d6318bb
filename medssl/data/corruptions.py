"""The same image, worse: what acquisition and storage do to it, at five severities.

After Hendrycks & Dietterich, ICLR 2019, https://arxiv.org/abs/1903.12261, with the artefacts of
each modality in place of weather and photography.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from medssl.data.augment import add_noise, apply_gain, apply_gamma, blur
from medssl.data.modality import Modality
from medssl.data.physics import (
    collimated,
    defocused,
    grain,
    with_bias_field,
    with_depth_gain,
    with_ghosts,
    with_glare,
    with_ringing,
    with_stripes,
)

_BLOCK = 8  # pixels of a side that JPEG compresses together
_ATTENUATION = 3.0  # of the brightest pixel of a radiograph: exp(-3) of the photons pass


@dataclass(frozen=True, slots=True)
class Corruption:
    """A change of pixels (C, H, W) by an amount, with what is random drawn from the generator.

    amounts: of severities 1 to 5. Random draws do not depend on the amount, so that of two
    severities with one seed the higher is further from the original.
    """

    change: Callable[[Tensor, float, torch.Generator], Tensor]
    amounts: tuple[float, float, float, float, float]


def corruptions_for(modality: Modality) -> tuple[str, ...]:
    """Names of the corruptions that images of a modality meet.

    HU and distances are calibrated: CT and DEPTH have no contrast or exposure that could be wrong.
    """
    if modality is Modality.DEPTH:
        return _ALWAYS
    if modality is Modality.CT:
        return (*_ALWAYS, "dose")
    return (*_ALWAYS, "contrast", "exposure", "compression", *_OWN.get(modality, ()))


def corrupt(pixels: Tensor, name: str, severity: int, generator: torch.Generator) -> Tensor:
    """pixels: (C, H, W), in any unit. Returns the same shape and dtype.

    name: of `CORRUPTIONS`. severity: 1 to 5, higher is worse. One name, severity and seed of the
    generator always give the same.
    """
    if name not in CORRUPTIONS:
        raise ValueError(f"no corruption is called {name!r}; there are {', '.join(CORRUPTIONS)}")
    if severity not in range(1, 6):
        raise ValueError(f"severity must be 1, 2, 3, 4 or 5, got {severity}")
    if pixels.ndim != 3 or not pixels.is_floating_point():
        raise ValueError(
            f"pixels must be (C, H, W) of floating point, got {tuple(pixels.shape)} {pixels.dtype}"
        )
    corruption = CORRUPTIONS[name]
    return corruption.change(pixels, corruption.amounts[severity - 1], generator)


def relative_drop(
    clean: float, corrupted: Mapping[str, Sequence[float]], *, chance: float = 0.0
) -> float:
    """Share of a metric that corruptions cost: 0 nothing, 1 all that it was above chance.

    clean: the metric, larger is better, on the original images. corrupted: on corrupted ones, at
    each severity. chance: the metric of a guess, 0.5 for AUROC. The mean over severities, then over
    corruptions, as in the relative mCE of the paper.

    Differs from the paper: relative to the metric on the original images, where the paper divides
    by the drop of AlexNet.
    """
    if clean <= chance or not corrupted:
        raise ValueError(
            f"a drop needs a metric above chance ({chance}) and one corruption or more, got "
            f"{clean} and {len(corrupted)}"
        )
    means = [sum(values) / len(values) for values in corrupted.values()]
    return (clean - sum(means) / len(means)) / (clean - chance)


def _blurred(pixels: Tensor, sigma: float, _: torch.Generator) -> Tensor:
    return blur(pixels, sigma)


def _coarse(pixels: Tensor, factor: float, _: torch.Generator) -> Tensor:
    """Pixels `factor` times as wide, interpolated back."""
    size = [max(1, round(side / factor)) for side in pixels.shape[1:]]
    small = F.interpolate(pixels[None], size=size, mode="bilinear", antialias=True)
    return F.interpolate(small, size=pixels.shape[1:], mode="bilinear")[0]


def _flat(pixels: Tensor, loss: float, _: torch.Generator) -> Tensor:
    """All but `loss` of the contrast about the mean."""
    return apply_gain(pixels, 1 - loss)


def _exposed(pixels: Tensor, gamma: float, generator: torch.Generator) -> Tensor:
    """Too bright or too dark: an exponent of 1 + gamma, or one over that."""
    return apply_gamma(pixels, (1 + gamma) ** _sign(generator))


def _compressed(pixels: Tensor, step: float, _: torch.Generator) -> Tensor:
    """Cosine coefficients of blocks rounded, as by JPEG.

    step: what the lowest frequency is rounded to, in the range of the image; others to a multiple
    that grows with their frequency.
    """
    height, width = pixels.shape[1:]
    padded = F.pad(pixels[None], (0, -width % _BLOCK, 0, -height % _BLOCK), mode="replicate")[0]
    blocks = padded.unfold(1, _BLOCK, _BLOCK).unfold(2, _BLOCK, _BLOCK)  # (C, h, w, 8, 8)
    place = torch.arange(_BLOCK).to(pixels)
    cosines = torch.cos(math.pi / _BLOCK * place[:, None] * (place + 0.5)) * (2 / _BLOCK) ** 0.5
    cosines[0] = _BLOCK**-0.5
    low, high = torch.aminmax(pixels)
    steps = step * _BLOCK * (high - low).clamp(min=1e-12) * (1 + place[:, None] + place)
    rounded = torch.round(cosines @ (blocks - low) @ cosines.mT / steps) * steps
    restored = cosines.mT @ rounded @ cosines + low
    return restored.transpose(2, 3).reshape(padded.shape)[:, :height, :width]


def _with_bias(pixels: Tensor, size: float, generator: torch.Generator) -> Tensor:
    return with_bias_field(pixels, size * (2 * torch.rand(10, generator=generator) - 1))


def _with_ghosts(pixels: Tensor, share: float, generator: torch.Generator) -> Tensor:
    every, along = torch.randint(2, (2,), generator=generator).tolist()
    return with_ghosts(pixels, share, every=2 + every, along=along)


def _with_spike(pixels: Tensor, size: float, generator: torch.Generator) -> Tensor:
    down, across = (0.1 + 0.8 * torch.rand(2, generator=generator)).tolist()
    return with_stripes(pixels, size, (down, across))


def _truncated(pixels: Tensor, loss: float, _: torch.Generator) -> Tensor:
    """Without the outer `loss` of k-space."""
    return with_ringing(pixels, 1 - loss)


def _dosed(pixels: Tensor, amount: float, generator: torch.Generator) -> Tensor:
    """Noise with the grain of a kernel of one pixel, in standard deviations of the image."""
    noise = grain(pixels.shape, 1.0, generator).to(pixels)
    return pixels + amount * pixels.std(correction=0) * noise


def _quantum(pixels: Tensor, amount: float, generator: torch.Generator) -> Tensor:
    """Noise of photons, in standard deviations of the image; most where it is bright.

    Bright is dense: few photons pass, and the logarithm of N photons varies by 1 / sqrt(N).
    """
    low, high = torch.aminmax(pixels)
    density = (pixels - low) / (high - low).clamp(min=1e-12)
    deviation = torch.exp(_ATTENUATION / 2 * density)
    deviation = deviation / deviation.square().mean().sqrt()
    noise = torch.randn(pixels.shape, generator=generator).to(pixels)
    return pixels + amount * pixels.std(correction=0) * deviation * noise


def _collimated(pixels: Tensor, share: float, generator: torch.Generator) -> Tensor:
    return collimated(pixels, (share * (0.5 + torch.rand(4, generator=generator) / 2)).tolist())


def _speckled(pixels: Tensor, amount: float, generator: torch.Generator) -> Tensor:
    """What lies above the darkest pixel times noise about 1, with a grain of one pixel."""
    field = grain((1, *pixels.shape[1:]), 1.0, generator).to(pixels)
    low = pixels.amin()
    return low + (pixels - low) * (1 + amount * field)


def _with_depth_gain(pixels: Tensor, change: float, generator: torch.Generator) -> Tensor:
    return with_depth_gain(pixels, change * _sign(generator))


def _defocused(pixels: Tensor, radius: float, _: torch.Generator) -> Tensor:
    return defocused(pixels, radius)


def _with_glare(pixels: Tensor, height: float, generator: torch.Generator) -> Tensor:
    down, across = torch.rand(2, generator=generator).tolist()
    return with_glare(pixels, height, (down, across), 0.3 * min(pixels.shape[1:]))


def _sign(generator: torch.Generator) -> int:
    return 1 - 2 * int(torch.randint(2, (), generator=generator))


CORRUPTIONS: Mapping[str, Corruption] = {
    "noise": Corruption(add_noise, (0.1, 0.2, 0.35, 0.55, 0.8)),  # standard deviations
    "blur": Corruption(_blurred, (0.6, 1.0, 1.5, 2.5, 4.0)),  # pixels
    "resolution": Corruption(_coarse, (1.5, 2.0, 3.0, 4.5, 7.0)),
    "contrast": Corruption(_flat, (0.2, 0.35, 0.5, 0.65, 0.8)),
    "exposure": Corruption(_exposed, (0.25, 0.5, 0.85, 1.3, 2.0)),
    "compression": Corruption(_compressed, (0.005, 0.01, 0.02, 0.04, 0.08)),
    "bias_field": Corruption(_with_bias, (0.2, 0.4, 0.6, 0.9, 1.3)),
    "ghosting": Corruption(_with_ghosts, (0.15, 0.3, 0.45, 0.6, 0.8)),
    "spike": Corruption(_with_spike, (0.1, 0.2, 0.4, 0.7, 1.1)),
    "ringing": Corruption(_truncated, (0.3, 0.5, 0.65, 0.75, 0.85)),
    "dose": Corruption(_dosed, (0.1, 0.2, 0.35, 0.55, 0.8)),  # standard deviations
    "quantum": Corruption(_quantum, (0.1, 0.2, 0.35, 0.55, 0.8)),  # standard deviations
    "collimation": Corruption(_collimated, (0.05, 0.1, 0.15, 0.2, 0.27)),  # of a side, at most
    "speckle": Corruption(_speckled, (0.1, 0.2, 0.35, 0.55, 0.8)),
    "depth_gain": Corruption(_with_depth_gain, (0.3, 0.6, 1.0, 1.5, 2.2)),
    "defocus": Corruption(_defocused, (1.0, 1.7, 2.5, 3.5, 5.0)),  # pixels
    "glare": Corruption(_with_glare, (0.15, 0.3, 0.5, 0.7, 1.0)),
}
_ALWAYS = ("noise", "blur", "resolution")
_OWN: Mapping[Modality, tuple[str, ...]] = {
    Modality.MR: ("bias_field", "ghosting", "spike", "ringing"),
    Modality.XR: ("quantum", "collimation"),
    Modality.US: ("speckle", "depth_gain"),
    Modality.PICTURE: ("defocus", "glare"),
}
