"""Which part of an image is looked at."""

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from medssl.data.image import Image
from medssl.data.modality import Modality

Mask = npt.NDArray[np.bool_]

_BONE_HU = 150.0
_SEAM = 2  # pixels; gaps of the skull up to twice this are closed
_RIM = 2  # pixels next to the skull, which bone still brightens
_SHARE = 0.5  # of the largest cross-section that a slice must have


def intracranial(image: Image) -> Tensor:
    """What the skull encloses in an axial head CT: (*spatial axes) bool.

    In each slice, the pixels that bone (above 150 HU) surrounds, without a rim of two pixels;
    calcifications inside belong to it. The largest such region is kept, in 3D, and of it the
    slices with at least half of its largest cross-section: the skull base, where the skull is
    open, and the vertex, where most of a slice is rim, are left out.
    Raises ValueError for other modalities, because the threshold is in HU.
    """
    from scipy import ndimage

    if image.modality is not Modality.CT:
        raise ValueError(f"the intracranial region needs CT in HU, got {image.modality}")
    bone = (image.pixels[0] > _BONE_HU).numpy()
    in_slice = np.ones((1,) * (bone.ndim - 2) + (3, 3), dtype=bool)
    closed = ndimage.binary_closing(bone, in_slice, iterations=_SEAM) | bone
    labels, count = ndimage.label(_filled(closed) & ~closed)
    if count == 0:
        return torch.zeros(bone.shape, dtype=torch.bool)
    largest = 1 + int(np.bincount(labels.ravel())[1:].argmax())
    region = _filled(labels == largest)
    area = region.sum((-2, -1), keepdims=True)
    region &= area >= _SHARE * area.max()
    return torch.from_numpy(ndimage.binary_erosion(region, in_slice, iterations=_RIM))


def _filled(mask: Mask) -> Mask:
    """The mask with the holes of each slice filled."""
    from scipy import ndimage

    slices = mask.reshape(-1, *mask.shape[-2:])
    return np.stack([ndimage.binary_fill_holes(each) for each in slices]).reshape(mask.shape)
