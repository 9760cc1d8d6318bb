"""What one scanner or camera does to an image and another does not, by modality.

Each kind goes through the general changes of `Augmentation` first and through its own after. All
take (C, H, W), in any unit, and change no geometry. Nothing here is a jitter of colors.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from medssl.data.augment import Augmentation, blur

_ORDER = 3  # of the polynomial of a bias field


@dataclass(frozen=True, kw_only=True)
class MRAugmentation(Augmentation):
    """Coils, motion, electronics and sequences of MR.

    bias: largest coefficient of the logarithm of the bias field, a polynomial of third order.
    ghosting: largest share that is taken off every second to fourth line of k-space.
    spike: largest size of one wrong point of k-space, relative to its centre: stripes.
    gibbs: smallest share of k-space that is kept, in each direction: ringing at edges.
    each happens with `artefact_probability`; inversion_probability: how often bright and dark
    change places, as between T1 and T2 weighting.
    """

    bias: float = 0.3
    ghosting: float = 0.3
    spike: float = 0.1
    gibbs: float = 0.5
    artefact_probability: float = 0.2
    inversion_probability: float = 0.0

    def __call__(self, pixels: Tensor, generator: torch.Generator) -> Tensor:
        """pixels: (C, H, W)."""
        pixels = super().__call__(pixels, generator)
        draws = torch.rand(12, generator=generator).tolist()
        often = self.artefact_probability
        if draws[0] < self.inversion_probability:
            pixels = inverted(pixels)
        if draws[1] < often:
            coefficients = 2 * torch.rand(10, generator=generator) - 1
            pixels = with_bias_field(pixels, self.bias * coefficients)
        if draws[2] < often:
            every, along = 2 + int(3 * draws[4]), int(2 * draws[5])
            pixels = with_ghosts(pixels, self.ghosting * draws[3], every=every, along=along)
        if draws[6] < often:
            pixels = with_stripes(pixels, self.spike * draws[7], (draws[8], draws[9]))
        if draws[10] < often:
            pixels = with_ringing(pixels, self.gibbs + draws[11] * (1 - self.gibbs))
        return pixels


@dataclass(frozen=True, kw_only=True)
class CTAugmentation(Augmentation):
    """Dose and reconstruction kernel of CT: noise with the grain of its kernel, and sharpness.

    quantum: largest standard deviation of the noise, in those of the image.
    grain: its largest correlation length, in pixels.
    sharpening: how much of what a blur of one pixel takes away is added at most, as by a kernel
        for bone.
    each happens with `kernel_probability`.
    """

    quantum: float = 0.2
    grain: float = 1.5
    sharpening: float = 1.0
    kernel_probability: float = 0.5

    def __call__(self, pixels: Tensor, generator: torch.Generator) -> Tensor:
        """pixels: (C, H, W)."""
        pixels = super().__call__(pixels, generator)
        draws = torch.rand(5, generator=generator).tolist()
        if draws[0] < self.kernel_probability:
            pixels = pixels + self.sharpening * draws[1] * (pixels - blur(pixels, 1.0))
        if draws[2] < self.kernel_probability:
            noise = grain(pixels.shape, 0.1 + self.grain * draws[3], generator).to(pixels)
            pixels = pixels + noise * (self.quantum * draws[4] * pixels.std(correction=0))
        return pixels


@dataclass(frozen=True, kw_only=True)
class XRayAugmentation(Augmentation):
    """Collimation of projection X-rays; exposure is the gamma, gain and offset of all kinds.

    collimation: largest share of a side that a shutter covers, on each of the four.
    collimation_probability: how often.
    """

    collimation: float = 0.15
    collimation_probability: float = 0.3

    def __call__(self, pixels: Tensor, generator: torch.Generator) -> Tensor:
        """pixels: (C, H, W)."""
        pixels = super().__call__(pixels, generator)
        draws = torch.rand(5, generator=generator)
        if draws[0] < self.collimation_probability:
            pixels = collimated(pixels, (self.collimation * draws[1:]).tolist())
        return pixels


@dataclass(frozen=True, kw_only=True)
class UltrasoundAugmentation(Augmentation):
    """Speckle and time-gain compensation of ultrasound; depth runs down the rows.

    speckle: largest standard deviation of the multiplicative noise. speckle_size: in pixels.
    depth_gain: largest change of the logarithm of the brightness from the top to the bottom.
    each happens with `echo_probability`.
    """

    speckle: float = 0.3
    speckle_size: float = 1.0
    depth_gain: float = 0.5
    echo_probability: float = 0.5

    def __call__(self, pixels: Tensor, generator: torch.Generator) -> Tensor:
        """pixels: (C, H, W)."""
        pixels = super().__call__(pixels, generator)
        draws = torch.rand(4, generator=generator).tolist()
        if draws[0] < self.echo_probability:
            pixels = with_depth_gain(pixels, self.depth_gain * (2 * draws[1] - 1))
        if draws[2] < self.echo_probability:
            field = grain((1, *pixels.shape[1:]), self.speckle_size, generator).to(pixels)
            pixels = _scaled(pixels, (1 + self.speckle * draws[3] * field).clamp(min=0))
        return pixels


@dataclass(frozen=True, kw_only=True)
class PartAugmentation(Augmentation):
    """Focus and light on parts before a camera; exposure is the gain and offset of all kinds.

    defocus: largest radius of the blur disk in pixels.
    glare: largest height of a specular spot, in the range of the image. glare_size: its largest
        radius, as a share of the shorter side.
    each happens with `optics_probability`.
    """

    defocus: float = 2.0
    glare: float = 0.5
    glare_size: float = 0.3
    optics_probability: float = 0.3

    def __call__(self, pixels: Tensor, generator: torch.Generator) -> Tensor:
        """pixels: (C, H, W)."""
        pixels = super().__call__(pixels, generator)
        draws = torch.rand(7, generator=generator).tolist()
        if draws[0] < self.optics_probability:
            pixels = defocused(pixels, self.defocus * draws[1])
        if draws[2] < self.optics_probability:
            radius = self.glare_size * (0.2 + 0.8 * draws[3]) * min(pixels.shape[1:])
            pixels = with_glare(pixels, self.glare * draws[4], (draws[5], draws[6]), radius)
        return pixels


def inverted(pixels: Tensor) -> Tensor:
    """Bright and dark change places; the range stays."""
    return pixels.amin() + pixels.amax() - pixels


def with_bias_field(pixels: Tensor, coefficients: Tensor) -> Tensor:
    """Multiply what lies above the darkest pixel by exp of a polynomial of third order.

    coefficients: (10,) of y^i x^j with i + j <= 3, y and x from -1 to 1, in the order of i, then
    j; as Van Leemput et al., IEEE TMI 1999, model the field.
    """
    height, width = pixels.shape[1:]
    y = torch.linspace(-1, 1, height).to(pixels)[:, None]
    x = torch.linspace(-1, 1, width).to(pixels)[None]
    powers = [(i, j) for i in range(_ORDER + 1) for j in range(_ORDER + 1 - i)]
    pairs = zip(coefficients.tolist(), powers, strict=True)
    logarithm = sum((c * y**i * x**j for c, (i, j) in pairs), torch.zeros_like(y * x))
    return _scaled(pixels, logarithm.exp())


def with_ghosts(pixels: Tensor, share: float, *, every: int, along: int) -> Tensor:
    """Take `share` off each `every`-th line of k-space but the central one: faint copies.

    along: 0 for phase encoding down the rows, 1 across the columns.
    """
    axis = 1 + along
    spectrum = torch.fft.fft(pixels, dim=axis)
    weight = torch.ones(pixels.shape[axis], device=pixels.device)
    weight[every::every] = 1 - share
    shape = [-1 if dim == axis else 1 for dim in range(3)]
    return torch.fft.ifft(spectrum * weight.view(shape), dim=axis).real.to(pixels)


def with_stripes(pixels: Tensor, size: float, where: tuple[float, float]) -> Tensor:
    """Add a wave: what one wrong point of k-space does.

    size: of that point, relative to the centre of k-space of what lies above the darkest pixel.
    where: two numbers in [0, 1], from no to the highest frequency down and across.
    """
    height, width = pixels.shape[1:]
    y = torch.arange(height).to(pixels)[:, None] / height
    x = torch.arange(width).to(pixels)[None] / width
    waves = round(where[0] * height / 2) * y + round(where[1] * width / 2) * x
    return pixels + size * (pixels - pixels.amin()).mean() * torch.cos(2 * torch.pi * waves)


def with_ringing(pixels: Tensor, share: float) -> Tensor:
    """Keep the central `share` of k-space in each direction: ringing beside edges (Gibbs)."""
    spectrum = torch.fft.fft2(pixels)
    kept = [torch.fft.fftfreq(side, device=pixels.device).abs() <= share / 2
            for side in pixels.shape[1:]]  # fmt: skip
    return torch.fft.ifft2(spectrum * (kept[0][:, None] & kept[1][None])).real.to(pixels)


def grain(shape: tuple[int, ...], size: float, generator: torch.Generator) -> Tensor:
    """(C, H, W) noise of mean 0 and deviation 1 whose neighbours are alike over `size` pixels."""
    noise = blur(torch.randn(shape, generator=generator), size)
    return noise / noise.std(correction=0).clamp(min=1e-6)


def collimated(pixels: Tensor, shares: list[float]) -> Tensor:
    """Set to the darkest pixel what shutters cover: a share of the side from the top, the bottom,
    the left and the right."""
    height, width = pixels.shape[1:]
    top, bottom = round(shares[0] * height), height - round(shares[1] * height)
    left, right = round(shares[2] * width), width - round(shares[3] * width)
    covered = torch.full_like(pixels, float(pixels.amin()))
    covered[:, top:bottom, left:right] = pixels[:, top:bottom, left:right]
    return covered


def with_depth_gain(pixels: Tensor, change: float) -> Tensor:
    """Scale brightness by exp(-change / 2) in the top row to exp(change / 2) in the bottom one."""
    gain = torch.exp(change * torch.linspace(-0.5, 0.5, pixels.shape[1]).to(pixels))
    return _scaled(pixels, gain[:, None])


def defocused(pixels: Tensor, radius: float) -> Tensor:
    """Mean over a disk of `radius` pixels, edges replicated."""
    reach = int(radius) + 1
    offsets = torch.arange(-reach, reach + 1).to(pixels)
    distance = (offsets[:, None].square() + offsets[None].square()).sqrt()
    kernel = (radius + 0.5 - distance).clamp(0, 1)  # the rim counts by how much of it is covered
    kernel = kernel / kernel.sum()
    planes = F.pad(pixels[:, None], (reach, reach, reach, reach), mode="replicate")
    return F.conv2d(planes, kernel[None, None])[:, 0]


def with_glare(pixels: Tensor, height: float, where: tuple[float, float], radius: float) -> Tensor:
    """Add a Gaussian spot of `height` times the range, in the middle of shares `where` of the
    sides, with a deviation of `radius` / 2 pixels; no brighter than the brightest pixel."""
    rows, columns = pixels.shape[1:]
    y = torch.arange(rows).to(pixels)[:, None] - where[0] * (rows - 1)
    x = torch.arange(columns).to(pixels)[None] - where[1] * (columns - 1)
    spot = torch.exp(-2 * (y.square() + x.square()) / radius**2)
    low, high = torch.aminmax(pixels)
    return (pixels + height * (high - low) * spot).clamp(max=high)


def _scaled(pixels: Tensor, field: Tensor) -> Tensor:
    """Multiply what lies above the darkest pixel."""
    low = pixels.amin()
    return low + (pixels - low) * field
