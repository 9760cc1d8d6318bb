"""Lesions of the head phantom: six kinds, each with its exact mask.

A lesion is a warped ellipsoid blended into the tissue with a soft border; its mask is where that
blend's own weight exceeds one half. Four of the six kinds take only values that normal brain or
its fluid takes elsewhere (`in_range`): what is wrong with them is the place, the shape or the
texture, so no threshold on intensity finds them.

Medians (and smallest to largest) over 45 development scans with one lesion. Change: root mean
square over the mask of the HU against the same scan without the lesion; over the noise of one
voxel; diameter of the ball of the mask's volume.

    kind       in range  cases  change, HU          over noise         diameter, mm
    haematoma  no        9      37.5 (28.0-46.5)    16.4 (10.3-26.6)   29.8 (26.1-41.7)
    infarct    yes       9      12.3 (9.8-14.9)     7.1 (3.4-8.3)      25.4 (20.3-36.0)
    cyst       yes       7      19.3 (15.8-22.2)    6.3 (5.4-10.6)     31.9 (26.3-36.8)
    mass       yes       7      9.6 (7.8-11.9)      3.5 (2.6-5.5)      34.6 (27.8-38.4)
    ring       no        6      14.8 (11.5-17.1)    5.8 (4.3-8.7)      27.0 (22.5-33.0)
    texture    yes       7      10.0 (8.4-13.8)     4.1 (3.1-6.0)      32.6 (25.8-36.2)
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np

from medssl.data.synthetic.canvas import Canvas, Point, ellipsoid_distance
from medssl.data.synthetic.fields import Field, ramp, smooth_field
from medssl.data.synthetic.head_anatomy import Anatomy

Kind = Literal["haematoma", "infarct", "cyst", "mass", "ring", "texture"]
KINDS: tuple[Kind, ...] = ("haematoma", "infarct", "cyst", "mass", "ring", "texture")
IN_RANGE: frozenset[Kind] = frozenset({"infarct", "cyst", "mass", "texture"})
_PUSHING = {"haematoma": 0.35, "mass": 0.3, "ring": 0.3, "cyst": 0.2}  # share of the radius
_LARGER = {"mass": 1.12, "texture": 1.18}  # the least conspicuous kinds


@dataclass(frozen=True, slots=True, kw_only=True)
class Lesion:
    """One lesion.

    center_mm: in the head's frame (right, anterior, superior).
    radii_mm: semi-axes before the warp, turned by `turn_rad` in the axial plane.
    hu: its main value (of the core, where there is a rim); of texture: the amplitude.
    in_range: whether all of its values are normal for brain or CSF elsewhere.
    """

    kind: Kind
    center_mm: Point
    radii_mm: Point
    turn_rad: float
    hu: float
    in_range: bool


def sample_lesion(rng: np.random.Generator, kind: Kind, anatomy: Anatomy) -> Lesion:
    """Draw a lesion of a kind, inside one hemisphere, off the midline and the ventricles."""
    radius = float(np.exp(rng.uniform(np.log(11.0), np.log(18.5))))
    radius *= _LARGER.get(kind, 1.0)
    right, back, up = (float(radius * scale) for scale in rng.uniform((0.8, 0.85, 0.9), 1.2))
    return Lesion(
        kind=kind,
        center_mm=_sample_center(rng, anatomy, radius),
        radii_mm=(right, back, up),
        turn_rad=float(rng.uniform(-np.pi, np.pi)),
        hu=_sample_hu(rng, kind, anatomy),
        in_range=kind in IN_RANGE,
    )


def push(canvas: Canvas, lesion: Lesion) -> None:
    """Mass effect: move the tissue around the lesion outwards, ventricles and midline with it."""
    strength = _PUSHING.get(lesion.kind, 0.0)
    if not strength:
        return
    radius = float(np.mean(lesion.radii_mm))
    x, y, z = _offsets(canvas, lesion)
    pull = strength * np.exp(-(x * x + y * y + z * z) / (2.0 * radius) ** 2)
    canvas.x -= x * pull
    canvas.y -= y * pull
    canvas.z -= z * pull


def paint_lesion(
    canvas: Canvas,
    lesion: Lesion,
    anatomy: Anatomy,
    room: Field,
    points: tuple[Field, Field, Field],
    rng: np.random.Generator,
) -> Field:
    """Blend the lesion in and return its weight, (D, H, W) in [0, 1]: the mask is weight > 0.5.

    room: share of each voxel that a lesion may take; 0 wherever bone takes part.
    points: the head's coordinates before `push`.
    """
    x, y, z = (p - c for p, c in zip(points, lesion.center_mm, strict=True))
    cos, sin = np.cos(lesion.turn_rad), np.sin(lesion.turn_rad)
    bulge = 1 + 0.13 * np.clip(smooth_field(rng, canvas.shape, canvas.spacing, 14.0), -2, 2)
    radii = tuple(radius * bulge for radius in lesion.radii_mm)
    distance, upward = ellipsoid_distance((cos * x + sin * y, cos * y - sin * x, z), radii)
    span = canvas.spans(upward)
    weight = room * ramp(distance, span + (3.0 if lesion.kind == "infarct" else 1.0))
    texture = smooth_field(rng, canvas.shape, canvas.spacing, float(rng.uniform(4.5, 6.5)))
    value = _values(lesion, anatomy, distance, span, texture)
    canvas.hu += weight * (value - canvas.hu)
    return weight


def _values(
    lesion: Lesion, anatomy: Anatomy, distance: Field, span: Field, texture: Field
) -> Field | float:
    """What the lesion shows at each voxel: uniform, layered from the border inwards or textured."""
    radius = float(np.mean(lesion.radii_mm))
    oedema = anatomy.white_hu - 12.0
    if lesion.kind == "mass":
        return oedema + (lesion.hu - oedema) * ramp(distance + 0.33 * radius, span)
    if lesion.kind == "ring":
        rim = oedema + (60.0 - oedema) * ramp(distance + 0.2 * radius, span)
        return rim + (lesion.hu - rim) * ramp(distance + 0.2 * radius + 5.0, span)
    if lesion.kind == "texture":
        middle = (anatomy.grey_hu + anatomy.white_hu) / 2 - 6
        return middle + lesion.hu * np.tanh(2.0 * texture)
    return lesion.hu + 1.5 * texture


def _sample_hu(rng: np.random.Generator, kind: Kind, anatomy: Anatomy) -> float:
    limits = {
        "haematoma": (60.0, 80.0),
        "infarct": (anatomy.white_hu - 14.0, anatomy.white_hu - 10.5),
        "cyst": (anatomy.csf_hu, anatomy.csf_hu + 2),
        "mass": (anatomy.grey_hu + 1, anatomy.grey_hu + 3),
        "ring": (13.0, 19.0),
        "texture": (15.0, 17.0),
    }
    return float(rng.uniform(*limits[kind]))


def _sample_center(rng: np.random.Generator, anatomy: Anatomy, radius: float) -> Point:
    """A point off the midline whose lesion stays mostly inside the brain; drawn by rejection."""
    right, anterior, superior = anatomy.brain_mm
    low = (14 + radius, -0.62 * anterior, -8.0)
    high = (0.72 * right, 0.62 * anterior, 0.62 * superior)
    while True:
        x, y, z = (float(value) for value in rng.uniform(low, high))
        reach = (x / right) ** 2 + (y / anterior) ** 2 + (z / superior) ** 2
        if reach < (1 - 0.6 * radius / right) ** 2:
            return (x if rng.uniform() < 0.5 else -x), y, z


def _offsets(canvas: Canvas, lesion: Lesion) -> tuple[Field, Field, Field]:
    x, y, z = lesion.center_mm
    return canvas.x - x, canvas.y - y, canvas.z - z
