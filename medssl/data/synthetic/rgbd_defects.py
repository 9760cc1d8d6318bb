"""Defects of the made-up casting: what they do to its height and to its color.

Contrasts are drawn log-uniformly, from just visible to clear. Depth: the sensor's noise is 0.05 to
0.1 mm in a pixel and a dent covers tens of pixels, so that a known one of 0.15 mm would stand out
of the noise; but castings differ by waves of about its size. Color likewise: 6 grey levels against
grain and brush marks of 4 to 9 and mottling of 2 to 4 as large as a stain.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from medssl.data.synthetic.fields import Field
from medssl.data.synthetic.rgbd_surface import Surface, field, steepness, stream

Defect = Literal["dent", "bump", "missing", "scratch", "stain"]
SeenIn = Literal["color", "depth", "both"]
SEEN_IN: dict[Defect, tuple[SeenIn, ...]] = {
    "dent": ("depth", "both"),
    "bump": ("depth", "both"),
    "missing": ("both",),
    "scratch": ("color", "depth", "both"),
    "stain": ("color",),
}

DENT_MM = (0.15, 1.5)  # deepest point; bumps likewise
DENT_RADIUS_MM = (3.5, 9.0)
SCRATCH_MM = (0.15, 0.8)  # deepest point
SCRATCH_LEVELS = (8.0, 40.0)
SCRATCH_LENGTH_MM = (10.0, 30.0)
SCRATCH_WIDTH_MM = (1.6, 3.2)  # where the groove begins; half as wide at half of its depth
STAIN_LEVELS = (6.0, 40.0)
STAIN_RADIUS_MM = (3.5, 9.0)
MISSING_MM = (0.5, 4.0)  # deepest point of what broke off
MISSING_RADIUS_MM = (4.0, 8.0)

_FRACTURE = (128.0, 124.0, 120.0)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Change:
    """What a defect does, everywhere.

    height: (H, W) mm, negative where material is gone.
    levels: (3, H, W) grey levels of its own color; the light on the changed height comes on top.
    """

    height: Field
    levels: Field


def make_defect(seed: int, surface: Surface, picture: Field, defect: Defect) -> Change:
    """The change of a seed; the same however it is seen. picture: (3, H, W) grey levels."""
    rng = stream(seed, 5)
    if defect == "missing":
        return _missing(rng, surface, picture)
    at = _place(rng, surface)
    if defect == "stain":
        levels = _stain(rng, surface, at)
        return Change(height=np.zeros_like(surface.height), levels=levels)
    if defect == "scratch":
        return _scratch(rng, surface, at)
    peak = _log_uniform(rng, DENT_MM) * (-1 if defect == "dent" else 1)
    shape = _bowl(_ellipse(rng, surface, at, _log_uniform(rng, DENT_RADIUS_MM)))
    return Change(height=peak * shape * surface.solid, levels=np.zeros_like(picture))


def _place(rng: np.random.Generator, surface: Surface) -> tuple[float, float]:
    """A point of the part, (across, along) in mm, on a face and off walls."""
    flat = (surface.solid > 0.999) & (surface.inside < -2.5)
    flat &= steepness(surface.height, surface.pitch) < 0.3
    return _pick(rng, surface, flat)


def _pick(
    rng: np.random.Generator, surface: Surface, where: NDArray[np.bool_]
) -> tuple[float, float]:
    pixels = np.flatnonzero(where)
    pixel = pixels[int(rng.uniform() * len(pixels))]
    across, along = surface.across.flat[pixel], surface.along.flat[pixel]
    shift = rng.uniform(-0.5, 0.5, 2) * surface.pitch
    return across + shift[0], along + shift[1]


def _ellipse(
    rng: np.random.Generator, surface: Surface, at: tuple[float, float], radius: float
) -> Field:
    """(H, W) distance from a point, 1 on an ellipse whose longer half axis is `radius` mm."""
    turn, flattening = rng.uniform(0, np.pi), rng.uniform(0.6, 1)
    x, y = surface.across - at[0], surface.along - at[1]
    along = np.cos(turn) * x + np.sin(turn) * y
    across = np.cos(turn) * y - np.sin(turn) * x
    return np.hypot(along, across / flattening) / radius


def _bowl(distance: Field) -> Field:
    """1 in the middle, falling smoothly to 0 at distance 1."""
    return np.maximum(1 - distance**2, 0) ** 2


def _scratch(rng: np.random.Generator, surface: Surface, at: tuple[float, float]) -> Change:
    """A bent groove of a V, lighter or darker than its surroundings."""
    length = _log_uniform(rng, SCRATCH_LENGTH_MM)
    width = rng.uniform(*SCRATCH_WIDTH_MM)
    turn, bend = rng.uniform(0, 2 * np.pi), rng.uniform(-0.15, 0.15)
    share = np.linspace(-0.5, 0.5, 25)
    along, across = length * share, length * bend * (1 - 4 * share**2)
    x = at[0] + np.cos(turn) * along - np.sin(turn) * across
    y = at[1] + np.sin(turn) * along + np.cos(turn) * across
    offsets = np.hypot(surface.across[..., None] - x, surface.along[..., None] - y)  # (H, W, 25)
    groove = np.maximum(1 - offsets.min(-1) / (width / 2), 0) * surface.solid
    groove /= groove.max()  # the middle line may pass between pixels
    depth = _log_uniform(rng, SCRATCH_MM)
    sign = rng.choice([-1.0, 1.0], p=[0.4, 0.6])
    levels = sign * _log_uniform(rng, SCRATCH_LEVELS) * groove
    return Change(height=-depth * groove, levels=np.stack([levels, levels, levels]))


def _stain(rng: np.random.Generator, surface: Surface, at: tuple[float, float]) -> Field:
    """(3, H, W): a blot with a ragged outline, brownish and mostly darker."""
    distance = _ellipse(rng, surface, at, _log_uniform(rng, STAIN_RADIUS_MM))
    distance = distance * (1 + 0.12 * field(rng, distance.shape, surface.pitch, 2.0))
    blot = np.clip((1 - distance) / 0.35, 0, 1)
    blot = blot * blot * (3 - 2 * blot) * surface.solid
    sign = rng.choice([-1.0, 1.0], p=[0.75, 0.25])
    share = np.array([rng.uniform(0.6, 1), rng.uniform(0.7, 1), 1.0])  # blue changes most
    peak = sign * _log_uniform(rng, STAIN_LEVELS) / blot.max()
    return peak * share[:, None, None] * blot


def _missing(rng: np.random.Generator, surface: Surface, picture: Field) -> Change:
    """A piece broken out of the outer edge, with a rough fracture."""
    edge = np.abs(surface.inside) < surface.pitch
    at = _pick(rng, surface, edge)
    distance = _ellipse(rng, surface, at, _log_uniform(rng, MISSING_RADIUS_MM))
    distance = distance * (1 + 0.15 * field(rng, distance.shape, surface.pitch, 1.5))
    bite = np.clip((1 - distance) / 0.4, 0, 1) * surface.solid
    rough = bite * (1 + 0.12 * field(rng, distance.shape, surface.pitch, 1.0))
    depth = _log_uniform(rng, MISSING_MM) * rough / rough.max()
    grain = 7 * rng.standard_normal(distance.shape)
    color = (np.array(_FRACTURE) + rng.normal(0, 8))[:, None, None] + grain
    return Change(
        height=-np.minimum(depth, surface.height),
        levels=np.clip(2 * bite, 0, 1) * (color - picture),
    )


def _log_uniform(rng: np.random.Generator, limits: tuple[float, float]) -> float:
    return float(np.exp(rng.uniform(np.log(limits[0]), np.log(limits[1]))))
