"""A head as tissues in HU: skull, folded cortex, ventricles, deep nuclei, base, normal variants.

Not an atlas: shapes are ellipsoids and level sets of random fields, varied from head to head in
size, thickness, age (atrophy), asymmetry, folding, calcification and pneumatization.
Lengths in mm, values in HU, the head's frame is right, anterior, superior with its origin in the
middle of the brain. Sides are mirrored through |x|.
"""

from dataclasses import dataclass

import numpy as np

from medssl.data.synthetic.canvas import Canvas, Point, ellipsoid_distance
from medssl.data.synthetic.fields import Field, ramp, smooth_field

AIR_HU, FAT_HU, MUSCLE_HU = -1000.0, -80.0, 45.0
BRAIN_RANGE_HU = (0.0, 42.0)
"""From the CSF to the densest grey matter: what normal brain and its fluid take, before noise."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Anatomy:
    """What differs between heads.

    brain_mm: semi-axes of the inner table (right, anterior, superior).
    age: 0 young to 1 old; widens ventricles and sulci and thins white matter's density.
    bone_hu, grey_hu, white_hu, csf_hu: mean values of the tissues.
    sulcus_mm: depth of the folds.
    ventricle_mm: semi-axes of the lateral ventricles' cross section (x, z).
    tilt: left-right asymmetry of the ventricles, share.
    calcified: present calcifications: pineal, choroid right, choroid left, falx, basal ganglia.
    sinus_mm: size of the frontal sinus, 0 where it is not pneumatized.
    """

    brain_mm: Point
    age: float
    skull_mm: float
    scalp_mm: float
    bone_hu: float
    grey_hu: float
    white_hu: float
    csf_hu: float
    sulcus_mm: float
    ventricle_mm: tuple[float, float]
    tilt: float
    calcified: tuple[bool, ...]
    sinus_mm: float


def sample_anatomy(rng: np.random.Generator) -> Anatomy:
    """Draw a head."""
    age = float(rng.uniform())
    size = np.clip(rng.normal(1.0, 0.045, size=4), 0.9, 1.1)
    widening = 0.75 + 0.85 * age + rng.uniform(0.0, 0.35)
    white = float(rng.uniform(25.5, 28.5) - 1.5 * age)
    right, anterior, superior = np.array([65.0, 82.0, 66.0]) * size[0] ** 0.5 * size[1:]
    return Anatomy(
        brain_mm=(float(right), float(anterior), float(superior)),
        age=age,
        skull_mm=float(rng.uniform(4.5, 8.5)),
        scalp_mm=float(rng.uniform(4.0, 8.5)),
        bone_hu=float(rng.uniform(900, 1500)),
        grey_hu=white + float(rng.uniform(9.0, 11.5)),
        white_hu=white,
        csf_hu=float(rng.uniform(3.0, 8.0)),
        sulcus_mm=float(rng.uniform(12, 20)),
        ventricle_mm=(float(4.2 * widening), float(6.5 * widening**0.7)),
        tilt=float(rng.normal(0, 0.12)),
        calcified=tuple(bool(on) for on in rng.uniform(size=5) < (0.65, 0.5, 0.5, 0.2, 0.12)),
        sinus_mm=float(rng.uniform(5, 16)) if rng.uniform() < 0.8 else 0.0,
    )


def head_distance(canvas: Canvas, anatomy: Anatomy) -> tuple[Field, Field]:
    """Signed distance to the inner table (mm, negative inside) and the mm a voxel spans across it.

    The outline is an egg, wider behind, that runs on downwards as a cylinder would.
    """
    right, anterior, superior = anatomy.brain_mm
    across = right * (1 - 0.1 * np.clip(canvas.y / anterior, -1.0, 1.0))
    upward = np.where(canvas.z > 0, superior, 1.75 * superior)
    distance, tilt = ellipsoid_distance((canvas.x, canvas.y, canvas.z), (across, anterior, upward))
    return distance, canvas.spans(tilt)


def paint_shell(
    canvas: Canvas, anatomy: Anatomy, distance: Field, span: Field, rng: np.random.Generator
) -> None:
    """Scalp, temporal muscle and a skull of two tables around the diploe; CSF inside."""
    thickness = anatomy.skull_mm * (
        1 + 0.16 * np.clip(smooth_field(rng, canvas.shape, canvas.spacing, 40.0), -2.5, 2.5)
    )
    skin = distance - thickness - anatomy.scalp_mm
    muscle = ramp(np.abs(canvas.y - 12) - 32, 15.0) * ramp(canvas.z - 18, 15.0)
    scalp = FAT_HU + (MUSCLE_HU - FAT_HU) * np.maximum(muscle, ramp(-skin - 2.0, span))
    canvas.hu += ramp(skin, span) * (scalp - canvas.hu)
    diploe = ramp(np.abs(distance - thickness / 2) - thickness / 5, span)
    bone = anatomy.bone_hu * (1.05 - 0.4 * diploe)
    canvas.hu += ramp(distance - thickness, span) * (bone - canvas.hu)


def paint_brain(
    canvas: Canvas, anatomy: Anatomy, distance: Field, span: Field, rng: np.random.Generator
) -> None:
    """Folded cortex over white matter, the midline cleft and CSF between brain and bone."""
    folds = smooth_field(rng, canvas.shape, canvas.spacing, 10.5)
    np.abs(folds, out=folds)
    depth = -distance - (0.4 + 1.8 * anatomy.age)  # below the surface of the brain
    inner_x, inner_z = 0.7 * anatomy.brain_mm[1], 0.62 * anatomy.brain_mm[2]
    bridged = 1 - (canvas.y / inner_x) ** 2 - (canvas.z / inner_z) ** 2  # > 0: no cleft
    midline = np.abs(canvas.x) + 60 * np.maximum(bridged, 0)
    wall = 7.0 * folds + np.maximum(depth - anatomy.sulcus_mm, 0)
    wall = np.minimum(np.minimum(wall, midline), depth)  # mm to the nearest pial surface
    in_plane = canvas.spacing[1]
    white = anatomy.white_hu - 2.5 * anatomy.age * ramp(wall - 14, 20.0)
    tissue = white + (anatomy.grey_hu - white) * ramp(wall - 5.0, in_plane)
    fluid = ramp(wall - (0.2 + 1.5 * anatomy.age), in_plane + 0.4)
    tissue += fluid * (anatomy.csf_hu - tissue)
    falx = ramp(np.abs(canvas.x) - 0.7, in_plane + 0.6) * (bridged < 0) * (canvas.z > -20)
    tissue += falx * (52 - tissue)
    canvas.hu += ramp(distance, span) * (tissue - canvas.hu)


def paint_depths(canvas: Canvas, anatomy: Anatomy, rng: np.random.Generator) -> None:
    """Deep nuclei, ventricles and cisterns, then the calcifications many normal heads have."""
    grey, csf = anatomy.grey_hu, anatomy.csf_hu
    wide = anatomy.ventricle_mm[0]
    for side in (-1.0, 1.0):
        canvas.paint_ellipsoid((side * (8 + wide), 20, 9), (5.5, 9, 9), grey)  # caudate
        canvas.paint_ellipsoid((side * 27, 4, 3), (8, 17, 12), grey - 0.5)  # lentiform
        canvas.paint_ellipsoid((side * 11, -10, 4), (9, 14, 10), grey - 1.0)  # thalamus
        canvas.paint_ellipsoid((side * 43, 12, 2), (3 + 2.5 * anatomy.age, 14, 8), csf)  # Sylvian
        canvas.paint_ellipsoid((side * 31, -12, -20), (2 + 0.3 * wide, 8, 4), csf)  # temporal horn
    _paint_lateral_ventricles(canvas, anatomy)
    canvas.paint_ellipsoid((0, -6, -2), (0.8 + 0.45 * wide, 14, 9), csf)  # third ventricle
    canvas.paint_ellipsoid((0, -24, -7), (9, 5, 4), csf)  # quadrigeminal cistern
    spots: tuple[Point, ...] = (
        (0, -19, 4), (20, -30, 9), (-20, -30, 9), (0, 45, 38), (22, 5, 2)
    )  # fmt: skip
    for point, present in zip(spots, anatomy.calcified, strict=True):
        radius, hu = float(rng.uniform(1.8, 3.6)), float(rng.uniform(90, 260))
        if present:
            canvas.paint_ellipsoid(point, (radius, radius, radius + 1.5), hu)


def paint_base(
    canvas: Canvas, anatomy: Anatomy, distance: Field, span: Field, rng: np.random.Generator
) -> None:
    """Posterior fossa, petrous bones with mastoid cells, orbits, frontal sinus, venous sinus."""
    grey, csf = anatomy.grey_hu, anatomy.csf_hu
    right, anterior, superior = anatomy.brain_mm
    behind = -0.55 * anterior
    canvas.paint_ellipsoid((0, behind, -42), (0.78 * right, 35, 26), csf)
    canvas.paint_ellipsoid((0, behind, -43), (0.74 * right, 32, 24), grey - 2.5)  # cerebellum
    canvas.paint_ellipsoid((0, -12, -34), (22, 19, 22), csf)  # basal cisterns
    canvas.paint_ellipsoid((0, -15, -34), (15, 12, 24), anatomy.white_hu + 2)  # brain stem
    canvas.paint_ellipsoid((0, -32, -32), (6, 4, 6), csf)  # fourth ventricle
    canvas.paint_ellipsoid((0, -anterior + 2, 5), (4.5, 4.5, 0.75 * superior), 54)  # sagittal sinus
    cells = smooth_field(rng, canvas.shape, canvas.spacing, 5.0)
    for side in (-1.0, 1.0):
        for step in np.linspace(0, 1, 4):
            center = (side * (20 + 36 * step), 4 - 20 * step, -46)
            canvas.paint_ellipsoid(center, (9, 7, 8 + 4 * step), 1.05 * anatomy.bone_hu)
        box, share = canvas.ellipsoid((side * 60, -26, -44), (8, 10, 11))
        canvas.paint(box, share, np.where(cells[box] > -0.2, -750.0, 500.0))  # mastoid
    if anatomy.sinus_mm:
        size = anatomy.sinus_mm
        center = (float(rng.normal(0, 3)), anterior + 0.45 * anatomy.skull_mm, -20)
        canvas.paint_ellipsoid(center, (1.5 * size, 0.45 * anatomy.skull_mm + 1, size), -900)
    _paint_orbits(canvas, anatomy)


def _paint_lateral_ventricles(canvas: Canvas, anatomy: Anatomy) -> None:
    """Two tubes that part towards the back, bent down at both ends."""
    wide, tall = anatomy.ventricle_mm
    box = canvas.box((0, 0, 9), (34, 46, 1.6 * tall + 6))
    x, y, z = canvas.x[box], canvas.y[box], canvas.z[box]
    center_x = 4 + wide * 0.8 + 0.0062 * (y - 14) ** 2
    center_z = 13 - 0.007 * (y - 2) ** 2
    side = np.where(x > 0, wide * (1 + anatomy.tilt), wide * (1 - anatomy.tilt))
    offsets = (np.abs(x) - center_x, y - 1, z - center_z)
    distance, upward = ellipsoid_distance(offsets, (side, 38 + 4 * anatomy.age, tall))
    canvas.paint(box, ramp(distance, canvas.spans(upward)), anatomy.csf_hu)


def _paint_orbits(canvas: Canvas, anatomy: Anatomy) -> None:
    """Below the sloping floor of the anterior fossa: a bony roof, fat, globes, ethmoid air."""
    anterior = anatomy.brain_mm[1]
    box = canvas.box((0, 0.65 * anterior, -50), (45, 0.35 * anterior, 22))
    floor = canvas.z[box] + 30 + 0.28 * (0.75 * anterior - canvas.y[box])  # mm above the floor
    region = ramp(np.abs(canvas.x[box]) - 46, 4.0) * ramp(14 - canvas.y[box], 6.0)
    region *= ramp(canvas.y[box] - anterior + 4, 4.0)
    canvas.paint(box, region * ramp(floor - 3, canvas.spacing[0]), 0.8 * anatomy.bone_hu)
    canvas.paint(box, region * ramp(floor, canvas.spacing[0]), FAT_HU)
    for side in (-1.0, 1.0):
        canvas.paint_ellipsoid((side * 30, anterior - 14, -46), (12, 12, 12), 14)
    canvas.paint_ellipsoid((0, 0.72 * anterior, -48), (11, 20, 13), -880)
