"""A made-up machined part on a conveyor as an RGB-D camera sees it, with defects and exact masks.

The shape is in `rgbd_surface`, the picture in `rgbd_light`, the defects in `rgbd_defects`. The
camera is a pinhole above the table: focal length 3 x the shorter side in pixels, center in the
middle of the grid, 300 mm away; the picture and the xyz share its grid.

The light is soft, and a defect that is seen in depth only leaves the picture exactly as it was, as
matt paint under a dome light does: only what is seen in both is lit by its changed height.

The seed alone decides an item. With a defect the part, its light and both cameras' noise are those
of the same seed without, and inside the mask alone anything differs.
"""

from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from medssl.data.image import Image, pixel_affine
from medssl.data.modality import Modality
from medssl.data.readers.organized import xyz_image
from medssl.data.sample import Sample
from medssl.data.synthetic.fields import Field
from medssl.data.synthetic.rgbd_defects import SEEN_IN, Change, Defect, SeenIn, make_defect
from medssl.data.synthetic.rgbd_light import camera_noise, picture
from medssl.data.synthetic.rgbd_surface import Surface, part_surface, steepness, stream
from medssl.data.writers.picture import write_png, write_tiff

MASK_MM = 0.05
"""Height that a masked pixel has changed by at least; half to all of the sensor's noise."""

MASK_LEVELS = 3.0
"""Grey levels that some channel of a masked pixel has changed by; below the grain of any face."""

NOISE_MM = (0.05, 0.1)

_STEEP = (1.0, 4.0)  # mm per mm from which on pixels are lost, and where nearly all are
_BASELINE = 0.15  # of the projector, of its distance: what it does not light is not measured


def rgbd_part(
    seed: int,
    *,
    defect: Defect | None = None,
    seen_in: SeenIn | None = None,
    size: tuple[int, int] = (128, 128),
) -> Sample:
    """One part: images "image" (RGB, whole grey levels) and "xyz" (mm), label, mask and group.

    seen_in: which of the two a defect changes; None without a defect. What a defect can be seen in
        is in `SEEN_IN`.
    size: height and width in pixels; the field of view stays about 100 mm along the shorter side.
    The mask holds the pixels whose height has changed by more than `MASK_MM` or whose color by
    more than `MASK_LEVELS`, before noise and rounding. Pixels that are not measured may lie in it.
    The group is the part's: the same with and without a defect.
    Raises ValueError for a defect that is not seen in `seen_in`.
    """
    _check(defect, seen_in)
    surface = part_surface(seed, size)
    height, color = surface.height, picture(seed, surface, surface.height)
    measured = _measured(seed, surface, height)
    mask = None
    if defect is not None:
        change = make_defect(seed, surface, color, defect)
        height_after, color_after = _changed(seed, surface, color, change, seen_in)
        inside = np.abs(height_after - height) > MASK_MM
        inside |= (np.abs(color_after - color) > MASK_LEVELS).any(0)
        measured = np.where(inside, _measured(seed, surface, height_after), measured)
        height = np.where(inside, height_after, height)
        color = np.where(inside, color_after, color)
        mask = _mask(inside)
    return Sample(
        item=f"part{seed}" if defect is None else f"part{seed}-{defect}-{seen_in}",
        images={
            "image": _picture(color + camera_noise(seed, size)),
            "xyz": _xyz(surface, height + _sensor_noise(seed, size), measured),
        },
        label=0 if defect is None else 1,
        mask=mask,
        group=f"part{seed}",
    )


def write_mvtec_3d(
    folder: Path,
    *,
    train: Iterable[Sample],
    validation: Iterable[Sample],
    test: Iterable[Sample],
    anomalous: Mapping[str, Iterable[Sample]],
) -> None:
    """Write samples as one category of MVTec 3D-AD: PNG, float32 TIFF in mm, 8-bit masks.

    anomalous: by kind, which names the folder; the kind "good" is the normal parts'.
    What is not measured is zero in the TIFF. In a folder that has the name of one of the set's own
    ten categories the reader would take mm for m.
    """
    sets = {"train/good": train, "validation/good": validation, "test/good": test}
    sets |= {f"test/{kind}": samples for kind, samples in anomalous.items()}
    for place, samples in sets.items():
        for index, sample in enumerate(samples):
            _write(folder / place, f"{index:03}", sample)


def _check(defect: Defect | None, seen_in: SeenIn | None) -> None:
    if defect is not None and defect not in SEEN_IN:
        raise ValueError(f"defect is one of {', '.join(SEEN_IN)}, or None, got {defect!r}")
    expected = (None,) if defect is None else SEEN_IN[defect]
    if seen_in not in expected:
        raise ValueError(
            f"{defect or 'a part without a defect'} is seen in "
            f"{' or '.join(str(one) for one in expected)}, got seen_in={seen_in!r}"
        )


def _changed(
    seed: int, surface: Surface, color: Field, change: Change, seen_in: SeenIn | None
) -> tuple[Field, Field]:
    """Height (H, W) and color (3, H, W) with the defect."""
    height = surface.height + change.height
    if seen_in == "depth":
        return height, color
    if seen_in == "color":
        return surface.height, color + change.levels
    return height, picture(seed, surface, height) + change.levels


def _measured(seed: int, surface: Surface, height: Field) -> NDArray[np.bool_]:
    """(H, W): not on steep walls, in the projector's shadow, in single pixels and small holes."""
    rng = stream(seed, 6)
    luck = rng.uniform(size=height.shape)
    steep = steepness(height, surface.pitch)
    measured = luck > 0.9 * np.clip((steep - _STEEP[0]) / (_STEEP[1] - _STEEP[0]), 0.0, 1)
    for pixels in range(1, 1 + int(12 * _BASELINE / surface.pitch)):
        rise = height[:, :-pixels] - height[:, pixels:]
        measured[:, pixels:] &= rise * _BASELINE < pixels * surface.pitch
    measured &= luck < 0.997  # single pixels
    for _ in range(int(rng.integers(2, 6))):
        row, column = rng.uniform(0, 1, 2) * height.shape
        rows, columns = np.ogrid[: height.shape[0], : height.shape[1]]
        radius = rng.uniform(0.5, 1.6) / surface.pitch
        measured &= np.hypot(rows - row, columns - column) > radius
    return measured


def _sensor_noise(seed: int, size: tuple[int, int]) -> Field:
    rng = stream(seed, 7)
    return rng.uniform(*NOISE_MM) * rng.standard_normal(size)


def _picture(color: Field) -> Image:
    return Image(
        pixels=torch.from_numpy(np.clip(np.rint(color), 0, 255).astype(np.float32)),
        axes="HW",
        modality=Modality.PICTURE,
        affine=pixel_affine(),
        frame="pixel",
        value_range=(0.0, 255.0),
    )


def _xyz(surface: Surface, height: Field, measured: NDArray[np.bool_]) -> Image:
    depth = surface.table - height
    xyz = np.concatenate([surface.rays * depth, depth[None]]) * measured
    pixels = torch.from_numpy(xyz.astype(np.float32))
    return xyz_image(pixels, unit="mm", provenance={"reader": "synthetic"})


def _mask(inside: NDArray[np.bool_]) -> Image:
    return Image(
        pixels=torch.from_numpy(inside.astype(np.float32))[None],
        axes="HW",
        modality=Modality.OTHER,
        affine=pixel_affine(),
        frame="pixel",
        units="mask",
    )


def _write(place: Path, name: str, sample: Sample) -> None:
    for folder in ("rgb", "xyz"):
        (place / folder).mkdir(parents=True, exist_ok=True)
    write_png(sample.images["image"], place / "rgb" / f"{name}.png")
    write_tiff(sample.images["xyz"], place / "xyz" / f"{name}.tiff")
    if sample.mask is not None:
        (place / "gt").mkdir(exist_ok=True)
        scaled = torch.where(sample.mask.pixels > 0.5, 255.0, 0.0)
        write_png(replace(sample.mask, pixels=scaled), place / "gt" / f"{name}.png")
