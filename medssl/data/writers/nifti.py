"""A volume or map as NIfTI-1, on the grid of the image it belongs to."""

import os
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from medssl.data.image import Image


def write_nifti(
    image: Image, path: Path, *, dtype: Literal["float32", "uint8"] = "float32"
) -> None:
    """Write one channel in the patient frame; `path` ends in .nii or .nii.gz.

    Our index (d, h, w) becomes NIfTI's (k, j, i); a 2D image gets one slice. The affine goes into
    the sform and the qform with code 1; a sheared one only into the sform, since a qform cannot
    hold it. dtype "uint8" is for masks and refuses what is not an integer from 0 to 255.
    The file appears whole or not at all, and equal images give equal bytes.
    """
    import nibabel

    if image.frame != "patient" or len(image.pixels) != 1 or "T" in image.axes:
        raise ValueError(
            f"NIfTI takes one channel in the patient frame, got {len(image.pixels)} channels of "
            f"axes {image.axes!r} in frame {image.frame!r}; pictures go to write_tiff"
        )
    volume = image.pixels.reshape((1,) * (3 - len(image.spatial_shape)) + image.spatial_shape)
    if dtype == "uint8":
        if not ((volume == volume.round()) & (volume >= 0) & (volume <= 255)).all():
            raise ValueError("a uint8 mask needs integers from 0 to 255")
        volume = volume.to(torch.uint8)
    affine = image.affine[:, [2, 1, 0, 3]].numpy()
    nifti = nibabel.Nifti1Image(volume.numpy().T, affine)
    nifti.set_sform(affine, code=1)
    nifti.set_qform(affine, code=1)
    if not np.allclose(nifti.get_qform(), affine, rtol=0, atol=1e-3):
        nifti.set_qform(None, code=0)
    nifti.header.set_xyzt_units("mm")
    partial = path.with_name(f".{os.getpid()}.{path.name}")
    nifti.to_filename(partial)
    partial.replace(path)
