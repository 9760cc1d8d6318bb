"""How a head is scanned: pose and grid, couch, reconstruction kernel, noise and artefacts."""

from dataclasses import dataclass

import numpy as np
from scipy.fft import irfft2
from scipy.ndimage import gaussian_filter1d
from scipy.spatial.transform import Rotation

from medssl.data.synthetic.canvas import Canvas, coordinates
from medssl.data.synthetic.fields import Field, ramp, smooth_field

_COVERAGE_MM = 104.0


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Scan:
    """What differs between scans of one head.

    shape: (D, H, W); spacing: mm between slices, rows and columns.
    affine: (4, 4) index -> patient mm, RAS+; slices ascend, rows go back, columns go left.
    head: (4, 4) head's frame -> patient mm.
    noise_hu: standard deviation in the middle of the head.
    sharpness: 0 smooth to 1 sharp kernel; sets the texture of the noise and the edges.
    offset_hu, gain: error of the HU calibration.
    cupping_hu: rise from the middle of the head to its border (beam hardening), may be negative.
    streak_hu: amplitude of the streaks between the petrous bones.
    couch_mm: gap between the back of the head and the couch.
    """

    shape: tuple[int, int, int]
    spacing: tuple[float, float, float]
    affine: Field
    head: Field
    noise_hu: float
    sharpness: float
    offset_hu: float
    gain: float
    cupping_hu: float
    streak_hu: float
    couch_mm: float


def sample_scan(rng: np.random.Generator) -> Scan:
    """Draw a scan; a quarter have unequal row and column spacing, a quarter oblique slices."""
    between = float(rng.uniform(6.5, 8.0))
    fov = float(rng.uniform(236, 254))
    columns = 96 if rng.uniform() < 0.25 else 112
    shape = (round(_COVERAGE_MM / between), 112, columns)
    spacing = (between, fov / 112, fov / columns)
    tilt = float(rng.uniform(6, 20)) * rng.choice((-1.0, 1.0)) if rng.uniform() < 0.25 else 0.0
    planned = Rotation.from_euler("x", tilt, degrees=True)  # slices follow a tilted head
    residual = Rotation.from_euler("xyz", rng.normal(0, (4.0, 2.5, 4.0)), degrees=True)
    head = np.eye(4)
    head[:3, :3] = (planned * residual).as_matrix()
    head[:3, 3] = rng.normal(0, (4.0, 4.0, 3.0))
    middle = np.array([0.0, -9.0, 12.5]) + rng.normal(0, (2.0, 2.0, 3.0))
    return Scan(
        shape=shape,
        spacing=spacing,
        affine=_affine(shape, spacing, planned, planned.apply(middle)),
        head=head,
        noise_hu=float(np.exp(rng.uniform(np.log(1.4), np.log(4.0)))),
        sharpness=float(rng.uniform()),
        offset_hu=float(rng.uniform(-3, 3)),
        gain=float(rng.uniform(0.985, 1.015)),
        cupping_hu=float(rng.uniform(-3, 5)),
        streak_hu=float(rng.uniform(0, 6)),
        couch_mm=float(rng.uniform(2, 10)),
    )


def paint_couch(canvas: Canvas, scan: Scan, back_mm: float) -> None:
    """A curved headrest of foam between two thin shells, fixed to the scanner and not the head.

    back_mm: from the middle of the head to its back.
    """
    first = scan.shape[1] // 2  # the front half of the field holds no couch
    below = scan.affine.copy()
    below[:, 3] += first * below[:, 1]
    x, y, _ = coordinates(below, (scan.shape[0], scan.shape[1] - first, scan.shape[2]))
    surface = y - scan.head[1, 3] + back_mm + scan.couch_mm - x * x / 260
    span = scan.spacing[1]
    depth = -surface
    shells = ramp(np.abs(depth - 2) - 1.5, span) + ramp(np.abs(depth - 19) - 1.5, span)
    foam = ramp(np.abs(depth - 10.5) - 8, span)
    side = ramp(np.abs(x) - 98, span)
    view = canvas.hu[:, first:]
    np.maximum(view, -1000 + side * (90 * foam + 700 * shells), out=view)


def acquire(canvas: Canvas, scan: Scan, inside: Field, rng: np.random.Generator) -> Field:
    """The HU a scanner shows of the canvas: blurred or sharpened, shaded, noisy. (D, H, W).

    inside: share of each voxel inside the skull.
    """
    sigma = 0.75 - 0.3 * scan.sharpness  # pixels
    hu = _blur(canvas.hu, sigma)
    if scan.sharpness > 0.5:
        hu += (scan.sharpness - 0.5) * (hu - _blur(hu, 1.0))
    x, y, _ = coordinates(np.linalg.inv(scan.head) @ scan.affine, scan.shape)
    radius = (x / 70) ** 2 + (y / 88) ** 2
    shading = scan.offset_hu + scan.cupping_hu * (radius - 0.4)
    shading += 1.2 * smooth_field(rng, scan.shape, scan.spacing, 60.0)
    streaks = _blur_rows(rng.standard_normal((*scan.shape[:2], 1)))
    low = ramp(canvas.z.mean(axis=(1, 2), keepdims=True) + 22, 22.0)
    shading += scan.streak_hu * low * streaks * np.exp(-((y + 8) ** 2) / 30**2)
    hu += inside * ((scan.gain - 1) * hu + shading)
    strength = scan.noise_hu * (1.15 - 0.45 * np.clip(radius, 0, 1.4))
    return hu + strength * _noise(rng, scan)


def _affine(
    shape: tuple[int, int, int],
    spacing: tuple[float, float, float],
    planned: Rotation,
    middle: Field,
) -> Field:
    """Index -> RAS+ mm with the centre of the grid at `middle`."""
    between, row, column = spacing
    axes = np.array([[0.0, 0.0, -column], [0.0, -row, 0.0], [between, 0.0, 0.0]])
    affine = np.eye(4)
    affine[:3, :3] = planned.as_matrix() @ axes
    affine[:3, 3] = middle - affine[:3, :3] @ ((np.array(shape) - 1) / 2)
    return affine


def _blur(hu: Field, sigma: float) -> Field:
    """Gaussian in the plane, (D, H, W)."""
    blurred: Field = gaussian_filter1d(
        gaussian_filter1d(hu, sigma, axis=2, radius=2), sigma, axis=1, radius=2
    )
    return blurred


def _blur_rows(noise: Field) -> Field:
    blurred: Field = gaussian_filter1d(noise, 1.2, axis=1, radius=4) * 2.0
    return blurred


def _noise(rng: np.random.Generator, scan: Scan) -> Field:
    """CT noise of standard deviation 1: a ramp filter's rise, cut off by the kernel."""
    depth, height, width = scan.shape
    spectrum = rng.standard_normal((depth, height, width // 2 + 1, 2)).view(np.complex128)[..., 0]
    rows, columns = np.fft.fftfreq(height), np.fft.rfftfreq(width)
    frequency = np.hypot(rows[:, None], columns)
    transfer = np.sqrt(frequency + 0.01) * np.exp(
        -((frequency / (0.16 + 0.26 * scan.sharpness)) ** 2)
    )
    power = 2 * (transfer**2).sum() - (transfer[:, 0] ** 2).sum()  # of the full plane
    noise: Field = irfft2(spectrum * transfer, s=(height, width))
    return noise * (height * width / np.sqrt(2 * power))
