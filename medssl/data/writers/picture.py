"""Maps as float TIFF and overlays as 8-bit PNG, on the pixel grid of their picture."""

import os
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image as Pillow

from medssl.data.image import Image


def write_tiff(image: Image, path: Path) -> None:
    """Write (C, H, W) pixels as float32, NaN included; one page, channels interleaved."""
    import tifffile

    array = _interleaved(image)
    partial = path.with_name(f".{os.getpid()}.{path.name}")
    color = "rgb" if array.ndim == 3 and array.shape[-1] == 3 else "minisblack"
    tifffile.imwrite(partial, array, photometric=color, planarconfig="contig", metadata=None)
    partial.replace(path)


def write_png(image: Image, path: Path) -> None:
    """Write grey or RGB pixels from 0 to 255 with 8 bits, rounded to the nearest."""
    array = _interleaved(image)
    if len(image.pixels) not in (1, 3):
        raise ValueError(f"PNG takes 1 or 3 channels, got {len(image.pixels)}")
    if not ((image.pixels >= 0) & (image.pixels <= 255)).all():
        raise ValueError("an 8-bit PNG needs finite values from 0 to 255; scale them first")
    partial = path.with_name(f".{os.getpid()}.{path.name}")
    Pillow.fromarray(array.round().astype(np.uint8)).save(partial, format="PNG")
    partial.replace(path)


def _interleaved(image: Image) -> NDArray[np.float32]:
    """(H, W) of one channel, (H, W, C) of several."""
    if image.axes != "HW":
        raise ValueError(f"a picture has axes 'HW', got {image.axes!r}; volumes go to write_nifti")
    pixels = image.pixels.to(torch.float32).movedim(0, -1)
    return np.ascontiguousarray(pixels.squeeze(-1).numpy())
