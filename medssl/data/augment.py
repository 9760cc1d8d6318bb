"""Changes of an image that leave what it shows as it is: exposure, contrast, noise, sharpness."""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

_BLUR_REACH = 3  # standard deviations the Gaussian kernel spans to each side


@dataclass(frozen=True, kw_only=True)
class Augmentation:
    """Random changes for one to N channels together, whatever their unit and scale.

    Nothing here assumes color: every amount is relative to the image's own mean, standard
    deviation or range, so HU, stored integers and normalized pixels are treated alike.

    gain: contrast about the mean is multiplied by a number in [1 - gain, 1 + gain].
    offset: up to this many standard deviations are added or taken away.
    gamma: the exponent lies in [1 / (1 + gamma), 1 + gamma], log-uniform.
    noise: Gaussian noise of up to this many standard deviations.
    blur: Gaussian blur with a standard deviation of 0.1 to this many pixels.
    intensity_probability, noise_probability, blur_probability: how often each happens.
    """

    gain: float = 0.4
    offset: float = 0.4
    gamma: float = 0.5
    noise: float = 0.1
    blur: float = 2.0
    intensity_probability: float = 0.8
    noise_probability: float = 0.5
    blur_probability: float = 0.5

    def __post_init__(self) -> None:
        if not 0 <= self.gain < 1:
            raise ValueError(f"gain must lie in [0, 1), got {self.gain}")
        for name in ("offset", "gamma", "noise"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")
        if self.blur < 0.1:
            raise ValueError(
                f"blur must be at least 0.1 pixels, got {self.blur}; to switch it off, set "
                "blur_probability to 0"
            )

    def __call__(self, pixels: Tensor, generator: torch.Generator) -> Tensor:
        """pixels: (C, H, W). Returns changed pixels of the same shape and dtype."""
        draws = torch.rand(8, generator=generator).tolist()
        if draws[0] < self.intensity_probability:
            exponent = (1 + self.gamma) ** (2 * draws[1] - 1)
            pixels = apply_gamma(pixels, exponent)
            gain = 1 + self.gain * (2 * draws[2] - 1)
            pixels = apply_gain(pixels, gain, offset=self.offset * (2 * draws[3] - 1))
        if draws[4] < self.blur_probability:
            pixels = blur(pixels, 0.1 + (self.blur - 0.1) * draws[5])
        if draws[6] < self.noise_probability:
            pixels = add_noise(pixels, self.noise * draws[7], generator)
        return pixels


def random_window(
    pixels: Tensor,
    generator: torch.Generator,
    *,
    limits: tuple[float, float],
    share: tuple[float, float] = (0.5, 1.0),
) -> Tensor:
    """Clip to a random part of `limits` and stretch it to all of them: another window of a CT.

    limits: both ends of the present window, in the pixels' own unit.
    share: smallest and largest width of the part, of that of `limits`; its place is drawn evenly.

    Preprocess with a wide window, say 400 HU about 40 HU, and give shares (0.2, 0.5): where
    `limits` are the ends of that window, the result is what a window of 80 to 200 HU anywhere
    within -160 to 240 HU would have given. From a share of a half on, the wide window's centre is
    always inside.
    """
    low, high = limits
    draws = torch.rand(2, generator=generator).tolist()
    width = share[0] + draws[0] * (share[1] - share[0])
    start = low + draws[1] * (1 - width) * (high - low)
    return low + ((pixels - start) / width).clamp(0, high - low)


def apply_gamma(pixels: Tensor, exponent: float) -> Tensor:
    """Raise the pixels, scaled to [0, 1] over their own range, to `exponent`; the range stays."""
    low, high = torch.aminmax(pixels)
    width = high - low
    if width <= 0:
        return pixels
    return low + width * ((pixels - low) / width) ** exponent


def apply_gain(pixels: Tensor, gain: float, *, offset: float = 0.0) -> Tensor:
    """Stretch the pixels about their mean by `gain` and add `offset` standard deviations."""
    std, mean = torch.std_mean(pixels, correction=0)
    return (pixels - mean) * gain + (mean + offset * std)


def add_noise(pixels: Tensor, amount: float, generator: torch.Generator) -> Tensor:
    """Add independent Gaussian noise of `amount` standard deviations of the pixels."""
    noise = torch.randn(pixels.shape, generator=generator, dtype=pixels.dtype).to(pixels)
    return pixels + noise * (amount * torch.std(pixels, correction=0))


def blur(pixels: Tensor, sigma: float) -> Tensor:
    """Gaussian blur of (C, H, W) with a standard deviation of `sigma` pixels, edges replicated."""
    radius = max(1, math.ceil(_BLUR_REACH * sigma))
    offsets = torch.arange(-radius, radius + 1, dtype=pixels.dtype)
    kernel = torch.exp(-0.5 * (offsets / sigma) ** 2)
    kernel = (kernel / kernel.sum()).to(pixels)
    planes = F.pad(pixels[:, None], (radius, radius, radius, radius), mode="replicate")
    planes = F.conv2d(planes, kernel.reshape(1, 1, -1, 1))
    return F.conv2d(planes, kernel.reshape(1, 1, 1, -1))[:, 0]
