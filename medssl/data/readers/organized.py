"""Organized points: xyz or depth in the sensor's own pixel grid, and which pixels were measured."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from medssl.data.image import Image, pixel_affine
from medssl.data.modality import Modality
from medssl.data.readers.points_stored import Unit, check_measured, extent_suspicious

_DEPTH_RANGES = (None, (0.0, 65535.0), (-32768.0, 32767.0))  # floats and 16 bits


def as_organized(image: Image, *, unit: Unit | None) -> Image:
    """A picture as `read_picture` gives it, taken for what a depth camera measured.

    Three float channels are x, y and z (frame "sensor"), as MVTec 3D-AD stores them in TIFF; a
    pixel is missing where one of them is NaN or infinite, or all three are zero. One float or
    16-bit channel is depth (frame "pixel"), missing where it is zero, NaN or infinite.
    Pixels keep their stored values, the missing ones too: only `valid` tells them apart.
    unit: of one count, as files do not say; None gives units "unknown".
    Raises ValueError for any other image, and EmptyCloudError where no pixel is measured.
    """
    channels = len(image.pixels)
    if image.axes != "HW" or image.frame != "pixel" or channels not in (1, 3):
        raise ValueError(
            "expected a picture of 1 channel (depth) or 3 (xyz) in the pixel frame, got "
            f"{channels} channels with axes {image.axes} in the {image.frame} frame"
        )
    if image.value_range not in (_DEPTH_RANGES if channels == 1 else (None,)):
        raise ValueError(
            f"expected {'floats or 16 bits for depth' if channels == 1 else 'floats for xyz'}, got "
            f"integers of {image.value_range}; this is a photograph, read it as a picture"
        )
    if channels == 3:
        return xyz_image(image.pixels, unit=unit, provenance=image.provenance)
    return replace(
        image,
        modality=Modality.DEPTH,
        valid=_valid(image.pixels),
        channels=("depth",),
        units=unit or "unknown",
        value_range=None,
    )


def xyz_image(pixels: Tensor, *, unit: Unit | None, provenance: Mapping[str, Any]) -> Image:
    """The image of an organized cloud. pixels: (3, H, W) x, y, z as stored.

    Raises EmptyCloudError where no pixel is measured.
    """
    valid = check_measured(pixels.numpy())
    if unit is not None and extent_suspicious(pixels.numpy()[:, valid], unit):
        provenance = {**provenance, "extent_suspicious": True}
    return Image(
        pixels=pixels,
        axes="HW",
        modality=Modality.DEPTH,
        affine=pixel_affine(),
        frame="sensor",
        valid=_valid(pixels),
        channels=("x", "y", "z"),
        units=unit or "unknown",
        provenance=provenance,
    )


def _valid(pixels: Tensor) -> Tensor | None:
    """(H, W) of (C, H, W); None where all pixels are measured."""
    valid = check_measured(pixels.numpy())
    return None if valid.all() else torch.from_numpy(valid)
