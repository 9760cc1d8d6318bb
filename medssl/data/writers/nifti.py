"""An image as NIfTI-1, on the grid it lies on."""

import os
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from medssl.data.image import Image


def write_nifti(
    image: Image, path: Path, *, dtype: Literal["float32", "uint8"] = "float32"
) -> None:
    """Write an image whole; `path` ends in .nii or .nii.gz.

    Our index (d, h, w) becomes NIfTI's (k, j, i), time the fourth axis and channels the fifth; a
    2D image gets one slice. Of an image in the patient frame the affine goes into the sform and
    the qform with code 1; a sheared one only into the sform, since a qform cannot hold it. Any
    other image has no place in a patient: both codes are 0, and its spacing is in pixdim, whose
    unit is mm, or unknown where nobody knows the spacing. The time step is in seconds, 0 where it
    varies or is unknown.
    dtype "uint8" is for masks and refuses what is not an integer from 0 to 255.
    The file appears whole or not at all, and equal images give equal bytes.
    """
    import nibabel

    values = image.pixels
    if dtype == "uint8":
        if not ((values == values.round()) & (values >= 0) & (values <= 255)).all():
            raise ValueError("a uint8 mask needs integers from 0 to 255")
        values = values.to(torch.uint8)
    placed = image.frame == "patient"
    affine = image.affine[:, [2, 1, 0, 3]].numpy() if placed else None
    nifti = nibabel.Nifti1Image(_ordered(values, image).numpy(), affine)
    if affine is not None:
        nifti.set_sform(affine, code=1)
        nifti.set_qform(affine, code=1)
        if not np.allclose(nifti.get_qform(), affine, rtol=0, atol=1e-3):
            nifti.set_qform(None, code=0)
    _set_steps(nifti.header, image)
    partial = path.with_name(f".{os.getpid()}.{path.name}")
    nifti.to_filename(partial)
    partial.replace(path)


def _ordered(values: torch.Tensor, image: Image) -> torch.Tensor:
    """(C, [T], [D], H, W) as (W, H, D[, T[, C]]), with the trailing axes that are needed."""
    channels, *counted = values.shape
    time = counted.pop(0) if "T" in image.axes else 1
    depth = (1,) * (3 - len(counted))
    values = values.reshape(channels, time, *depth, *counted).permute(4, 3, 2, 1, 0)
    values = values[..., 0] if channels == 1 else values
    return values[..., 0] if channels == 1 and "T" not in image.axes else values


def _set_steps(header: Any, image: Image) -> None:
    """Units, the time step, and without an affine the spacing."""
    known = image.frame == "patient" or image.spacing is not None
    header.set_xyzt_units("mm" if known else None, "sec" if "T" in image.axes else None)
    if image.frame != "patient":
        if image.spacing is not None:
            header["pixdim"][1:4] = [*reversed(image.spacing), 1.0][:3]
        header["qform_code"] = header["sform_code"] = 0
    if "T" in image.axes:
        header["pixdim"][4] = _time_step(image)


def _time_step(image: Image) -> float:
    assert image.times_s is not None
    steps = np.diff(image.times_s)
    even = len(steps) > 0 and np.isfinite(steps).all() and np.ptp(steps) <= 1e-3 * steps.mean()
    return float(steps.mean()) if even else 0.0
