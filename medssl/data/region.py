"""Which part of an image is looked at."""

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from medssl.data.geometry import crop
from medssl.data.image import Image
from medssl.data.modality import Modality

Mask = npt.NDArray[np.bool_]

_BONE_HU = 150.0
_SEAM = 2  # pixels; gaps of the skull up to twice this are closed
_RIM = 2  # pixels next to the skull, which bone still brightens
_SHARE = 0.5  # of the largest cross-section that a slice must have

_SMOOTH = 1.0  # pixels; standard deviation of the Gaussian that takes the noise out of the air
_HAS_AIR = frozenset({Modality.MR, Modality.PT, Modality.UNKNOWN})


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


def foreground(image: Image) -> Tensor:
    """The body in an MR or PET image, without the air around it: (*spatial axes) bool.

    The mean over channels and times, smoothed in each slice by a Gaussian of one pixel, is split by
    Otsu's threshold (IEEE Trans. Syst. Man Cybern. 9, 1979) of its square root over the smallest
    value: the root keeps a few very bright pixels (fat, a bladder in PET) from being split off
    instead of the air. One pixel of rim is taken away in each slice, where air and body mix; the
    largest connected part is kept, and the holes of its slices are filled. Of two legs, that is
    one: this is for statistics of the body, not for what is looked at.
    Raises ValueError for modalities other than MR, PT and UNKNOWN, and for a constant image.
    """
    from scipy import ndimage
    from skimage.filters import threshold_otsu

    if image.modality not in _HAS_AIR:
        raise ValueError(
            f"a foreground is found in MR and PT, got {image.modality}; CT has HU for that"
        )
    usable = _usable(image)
    values = image.pixels.mean(tuple(range(image.pixels.ndim - usable.ndim))).numpy()
    if not usable.any() or np.ptp(values[usable]) == 0:
        raise ValueError("an image without two different valid values has no foreground")
    above = np.where(usable, values - values[usable].min(), 0)
    root = np.sqrt(ndimage.gaussian_filter(above, (0,) * (above.ndim - 2) + (_SMOOTH, _SMOOTH)))
    cross = ndimage.generate_binary_structure(2, 1).reshape((1,) * (root.ndim - 2) + (3, 3))
    labels, _ = ndimage.label(ndimage.binary_erosion(root > threshold_otsu(root[usable]), cross))
    largest = 1 + int(np.bincount(labels.ravel(), minlength=2)[1:].argmax())
    return torch.from_numpy(_filled(labels == largest) & usable)


def crop_ultrasound(image: Image) -> Image:
    """The box around the ultrasound regions that the DICOM header declares (PS3.3 C.8.5.5).

    They are read from `provenance["ultrasound_regions"]`, [[x0, y0, x1, y1], ...] in pixels of the
    source, both ends included; what reaches beyond the picture is left out.
    Raises ValueError where there are none, because they are not guessed from pixels.
    """
    regions = image.provenance.get("ultrasound_regions")
    if not regions:
        raise ValueError(
            f"no ultrasound region is declared in the header of this {image.modality} image; use "
            "region 'all', or cut the pictures beforehand"
        )
    if image.frame != "pixel":
        raise ValueError(f"ultrasound regions are in frame 'pixel', the image in {image.frame!r}")
    x0, y0, x1, y1 = torch.tensor(regions, dtype=torch.float64).T
    edges = torch.tensor(  # (d, h, w, 1) in the source, at the outer edges of the border pixels
        [[0, y0.min() - 0.5, x0.min() - 0.5, 1], [0, y1.max() + 0.5, x1.max() + 0.5, 1]],
        dtype=torch.float64,
    )
    index = (torch.linalg.solve(image.affine, edges.T)[1:3] + 0.5).round(decimals=6)
    *depth, height, width = image.spatial_shape
    first = index.amin(1).floor().long().clamp(min=0)
    size = torch.minimum(index.amax(1).ceil().long(), torch.tensor([height, width])) - first
    if size.min() < 1:
        raise ValueError(
            f"the ultrasound regions {regions} lie outside of the picture of {height} x {width}"
        )
    return crop(image, [*(0 for _ in depth), *first.tolist()], [*depth, *size.tolist()])


def _usable(image: Image) -> Mask:
    """(*spatial axes): valid, and finite in every channel and at every time."""
    usable = image.pixels.isfinite()
    usable = usable.flatten(0, usable.ndim - len(image.spatial_shape) - 1).all(0)
    mask: Mask = (usable if image.valid is None else usable & image.valid).numpy()
    return mask


def _filled(mask: Mask) -> Mask:
    """The mask with the holes of each slice filled."""
    from scipy import ndimage

    slices = mask.reshape(-1, *mask.shape[-2:])
    return np.stack([ndimage.binary_fill_holes(each) for each in slices]).reshape(mask.shape)
