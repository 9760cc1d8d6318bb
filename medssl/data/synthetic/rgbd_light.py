"""The color picture of a surface: paint, brushed metal and a rubber belt under a soft light."""

import numpy as np

from medssl.data.synthetic.fields import Field
from medssl.data.synthetic.rgbd_surface import Surface, field, stream

_PAINT = np.array([78.0, 108.0, 112.0])
_METAL = np.array([158.0, 158.0, 160.0])
_BELT = np.array([50.0, 51.0, 55.0])
_AMBIENT = 0.7  # share of the light that comes from all sides
_BRUSH_MM = (0.45, 7.0)  # a scratch of the brush, across and along


def picture(seed: int, surface: Surface, height: Field) -> Field:
    """(3, H, W) grey levels, without the camera's noise and before rounding.

    height: (H, W) mm, what the light falls on: `surface.height`, or that with a defect.
    """
    rng = stream(seed, 2)
    part = surface.solid
    metal = part * surface.metal
    paint = part - metal
    belt = _BELT + rng.normal(0, 2, 3)
    coat = _PAINT + rng.normal(0, 4) + rng.normal(0, 2.5, 3)
    bare = _METAL + rng.normal(0, 5) + rng.normal(0, 1.5, 3)
    glare = np.exp(-(((surface.along - rng.uniform(-20, 20)) / 14) ** 2))
    levels = (1 - part) * belt[:, None, None] + paint * coat[:, None, None]
    levels = levels + metal * (bare[:, None, None] + 22 * glare)
    levels = levels + _texture(seed, surface, paint, metal)
    return levels * _light(rng, surface, height)


def camera_noise(seed: int, size: tuple[int, int]) -> Field:
    """(3, H, W) grey levels of noise, independent from pixel to pixel."""
    rng = stream(seed, 4)
    return rng.uniform(1.5, 3) * rng.standard_normal((3, *size))


def _light(rng: np.random.Generator, surface: Surface, height: Field) -> Field:
    """(3, H, W) factors: exposure, tint, gradient across the picture, slope and cast shadow."""
    from scipy.ndimage import gaussian_filter

    azimuth = np.deg2rad(-120 + rng.uniform(-15, 15))
    slope_y, slope_x = np.gradient(height, surface.pitch)
    towards = np.cos(azimuth) * slope_x + np.sin(azimuth) * slope_y
    lit = (1 - 0.7 * towards) / np.sqrt(1 + slope_x**2 + slope_y**2)  # 1 on the flat
    lit = _AMBIENT + (1 - _AMBIENT) * np.clip(lit, 0, 2)
    high = np.clip(gaussian_filter(surface.height, 3.0 / surface.pitch) - surface.height, 0, 6)
    shadow = 1 - 0.07 * high  # less of the sky is seen beside a wall
    gradient = rng.uniform(-0.12, 0.12, 2)
    x, y = surface.rays / surface.rays.max()
    exposure = rng.uniform(0.92, 1.08) * (1 + rng.uniform(-0.03, 0.03, 3))
    return exposure[:, None, None] * (1 + gradient[0] * x + gradient[1] * y) * lit * shadow


def _texture(seed: int, surface: Surface, paint: Field, metal: Field) -> Field:
    """(H, W) grey levels: grain and mottling of paint, streaks of the brush, weave of the belt."""
    from scipy.ndimage import gaussian_filter

    rng = stream(seed, 3)
    size = paint.shape
    grain = gaussian_filter(rng.standard_normal(size), 0.6)
    grain *= rng.uniform(4, 6) / grain.std()
    mottled = rng.uniform(2, 4) * field(rng, size, surface.pitch, 4.5)
    streaks = rng.uniform(6, 9) * _brushed(rng, surface)
    weave = 3 * np.sin(2 * np.pi * (surface.along + surface.across) / 3.1)
    belt = (1 - paint - metal) * (weave + 0.6 * grain)
    return paint * (grain + mottled) + metal * (streaks + 0.5 * mottled + 0.5 * grain) + belt


def _brushed(rng: np.random.Generator, surface: Surface) -> Field:
    """(H, W) streaks along the part's long axis, of standard deviation about 1."""
    from scipy.ndimage import map_coordinates

    fine = (surface.along / _BRUSH_MM[0], surface.across / _BRUSH_MM[1])
    start = [np.floor(axis.min()) for axis in fine]
    counts = [int(axis.max() - low) + 3 for axis, low in zip(fine, start, strict=True)]
    noise = rng.standard_normal(counts)
    place = np.stack([axis - low for axis, low in zip(fine, start, strict=True)])
    return 1.5 * map_coordinates(noise, place, order=1)  # two thirds are lost between the knots
