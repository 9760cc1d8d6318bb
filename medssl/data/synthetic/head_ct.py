"""Head-CT-like phantoms: normal anatomy with its nuisances, and lesions with exact masks."""

from dataclasses import dataclass

import numpy as np
import torch

from medssl.data.image import Image
from medssl.data.modality import Modality
from medssl.data.synthetic import ct_scanner, head_anatomy, head_lesions
from medssl.data.synthetic.canvas import Canvas, coordinates
from medssl.data.synthetic.ct_scanner import Scan
from medssl.data.synthetic.fields import Field, ramp, smooth_field
from medssl.data.synthetic.head_anatomy import Anatomy
from medssl.data.synthetic.head_lesions import KINDS, Lesion

DEVELOPMENT_NORMAL_SEEDS = range(160)
DEVELOPMENT_LESION_SEEDS = range(1_000, 1_060)
TRAIN_SEEDS = range(10_000, 10_200)
TEST_NORMAL_SEEDS = range(20_000, 20_100)
TEST_LESION_SEEDS = range(30_000, 30_060)

HU_LIMITS = (-1024, 3071)
"""What 12 stored bits hold, as scanners write it."""

_HEAP_BYTES = 31 << 20
"""Once a block of this size was freed, glibc keeps the memory of our temporaries instead of giving
it back after each operation, which takes half of the time."""

_WARP_MM = (2.2, 2.2, 1.5)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Phantom:
    """A made-up head CT.

    image: (1, D, H, W) whole HU, patient frame, slices ascending.
    mask: (1, D, H, W), 1 inside a lesion, on the image's grid; None where there is no lesion.
    lesions: what was painted, in the order of painting.
    noise_hu: standard deviation of the scan's noise in the middle of the head.
    """

    image: Image
    mask: Image | None
    lesions: tuple[Lesion, ...]
    noise_hu: float
    seed: int


def head_ct(seed: int, *, lesion: bool) -> Phantom:
    """The phantom of a seed, the same in every process.

    With `lesion` the head, the scan and its noise are those of the same seed without: only the
    lesion and the tissue it pushes differ. Kinds of lesion go round with the seed, and three of ten
    heads have a second one.
    """
    np.empty(_HEAP_BYTES, np.uint8)
    rng = _stream(seed, 0)
    anatomy = head_anatomy.sample_anatomy(rng)
    scan = ct_scanner.sample_scan(rng)
    lesions = _sample_lesions(seed, anatomy) if lesion else ()
    hu, weights = _render(anatomy, scan, lesions, seed)
    pixels = np.clip(np.rint(hu), *HU_LIMITS).astype(np.float32)
    return Phantom(
        image=_image(pixels, scan, Modality.CT, "HU"),
        mask=_image(weights > 0.5, scan, Modality.OTHER, "mask") if lesion else None,
        lesions=lesions,
        noise_hu=scan.noise_hu,
        seed=seed,
    )


def _stream(seed: int, use: int) -> np.random.Generator:
    """Random numbers of one use, so that drawing more for one use does not change another."""
    return np.random.Generator(np.random.PCG64([seed, use]))


def _sample_lesions(seed: int, anatomy: Anatomy) -> tuple[Lesion, ...]:
    rng = _stream(seed, 1)
    lesions = [head_lesions.sample_lesion(rng, KINDS[seed % len(KINDS)], anatomy)]
    if rng.uniform() < 0.3:
        kind = KINDS[int(rng.integers(len(KINDS)))]
        lesions.append(head_lesions.sample_lesion(rng, kind, anatomy))
    return tuple(lesions)


def _render(
    anatomy: Anatomy, scan: Scan, lesions: tuple[Lesion, ...], seed: int
) -> tuple[Field, Field]:
    """The scan in HU and the lesions' largest weight, (D, H, W) each."""
    rng, lesion_rng = _stream(seed, 2), _stream(seed, 3)
    canvas = _blank(scan, rng)
    distance, span = head_anatomy.head_distance(canvas, anatomy)
    head_anatomy.paint_shell(canvas, anatomy, distance, span, rng)
    inside = ramp(distance, span)
    points = (canvas.x.copy(), canvas.y.copy(), canvas.z.copy())
    for lesion in lesions:
        head_lesions.push(canvas, lesion)
    head_anatomy.paint_brain(canvas, anatomy, distance, span, rng)
    head_anatomy.paint_depths(canvas, anatomy, rng)
    head_anatomy.paint_base(canvas, anatomy, distance, span, rng)
    room = ramp(distance + span, span)
    weights = np.zeros(scan.shape)
    for lesion in lesions:
        weight = head_lesions.paint_lesion(canvas, lesion, anatomy, room, points, lesion_rng)
        np.maximum(weights, weight, out=weights)
    back = anatomy.brain_mm[1] + anatomy.skull_mm + anatomy.scalp_mm
    ct_scanner.paint_couch(canvas, scan, back)
    return ct_scanner.acquire(canvas, scan, inside, rng), weights


def _blank(scan: Scan, rng: np.random.Generator) -> Canvas:
    """Air, with the head's coordinates bent a little by low-frequency fields."""
    head_from_index = np.linalg.inv(scan.head) @ scan.affine
    x, y, z = (
        straight + amplitude * smooth_field(rng, scan.shape, scan.spacing, 45.0)
        for straight, amplitude in zip(
            coordinates(head_from_index, scan.shape), _WARP_MM, strict=True
        )
    )
    hu = np.full(scan.shape, head_anatomy.AIR_HU)
    return Canvas(hu, x, y, z, head_from_index, scan.spacing)


def _image(voxels: np.ndarray, scan: Scan, modality: Modality, units: str) -> Image:
    return Image(
        pixels=torch.from_numpy(voxels.astype(np.float32))[None],
        axes="DHW",
        modality=modality,
        affine=torch.from_numpy(scan.affine.copy()),
        frame="patient",
        spacing=scan.spacing,
        units=units,
    )
