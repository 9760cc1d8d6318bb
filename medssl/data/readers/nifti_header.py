"""What the header of a NIfTI says: axes, geometry, times (https://nifti.nimh.nih.gov)."""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from medssl.data.image import pixel_affine
from medssl.data.readers.errors import (
    CorruptFileError,
    InconsistentGeometryError,
    UnsupportedFormatError,
)
from medssl.data.readers.stored import decoding

HEADER_BYTES = 544  # NIfTI-2's header and the four extension bytes
_MM = {"unknown": 1.0, "mm": 1.0, "meter": 1e3, "micron": 1e-3}
_SECONDS = {"sec": 1.0, "msec": 1e-3, "usec": 1e-6}
_TOLERANCE_MM = 1e-3
_MOST_TIMES = 1 << 20  # more is taken for a damaged header
_SHEAR = 1.7e-3  # cosine between axes: 0.1 degree


@dataclass(frozen=True, slots=True, kw_only=True)
class NiftiHeader:
    """What the header alone says, in the order of our arrays.

    axes: "HW", "DHW" or "TDHW". channels: values per voxel and time. shape: ([T], [D], H, W).
    affine: (4, 4) to RAS+ mm; the identity where `affine_from` is "none". spacing: mm per spatial
    axis, or None. times_s: of each volume, NaN where the header does not say.
    affine_from: "sform", "qform" or "none". qform_differs_mm: the largest distance of a corner by
    the qform from the same by the sform, where both are set and differ. sheared: the axes are not
    perpendicular.
    dtype, offset, slope, inter: of the stored values.
    """

    axes: str
    channels: int
    shape: tuple[int, ...]
    affine: Tensor
    spacing: tuple[float, ...] | None
    times_s: tuple[float, ...] | None
    affine_from: str
    qform_differs_mm: float | None
    sheared: bool
    dtype: np.dtype
    offset: int
    slope: float
    inter: float

    @property
    def stored_shape(self) -> tuple[int, ...]:
        """(C, [T], [D], H, W), last index fastest; colors in one value are one channel."""
        return (1 if self.dtype.names else self.channels, *self.shape)

    @property
    def num_bytes(self) -> int:
        """Of all stored values."""
        return math.prod(self.stored_shape) * self.dtype.itemsize


def is_nifti(start: bytes) -> bool:
    """Whether unzipped bytes begin a NIfTI-1 or NIfTI-2 header, of one file or two."""
    return start[344:348] in (b"n+1\0", b"ni1\0") or start[4:8] in (b"n+2\0", b"ni2\0")


def in_two_files(start: bytes) -> bool:
    """Whether the voxels lie in a file of their own."""
    return start[344:348] == b"ni1\0" or start[4:8] == b"ni2\0"


@decoding("the NIfTI header")
def parse_header(start: bytes) -> NiftiHeader:
    """The header in the first bytes of a file, unzipped.

    Raises CorruptFileError, UnsupportedFormatError (complex numbers, more than five axes) and
    InconsistentGeometryError (a chosen form that is no finite invertible matrix).
    """
    import nibabel

    if not is_nifti(start):
        raise CorruptFileError("the file does not begin with a whole NIfTI header; copy it again")
    second = start[4:8] in (b"n+2\0", b"ni2\0")
    if len(start) < (540 if second else 348):
        raise CorruptFileError("the file ends inside its NIfTI header; copy it again")
    header = (  # without its extensions, which may be long and say nothing that we need
        nibabel.Nifti2Header(start[:540], check=False)
        if second
        else nibabel.Nifti1Header(start[:348], check=False)
    )
    dtype = header.get_data_dtype()
    if dtype.kind == "c" or (dtype.names and len(dtype.names) not in (3, 4)):
        raise UnsupportedFormatError(
            "a NIfTI of complex numbers is not supported; save magnitude or phase"
        )
    axes, channels, shape = _axes(tuple(int(n) for n in header.get_data_shape()))
    if dtype.names:
        if channels > 1:
            raise UnsupportedFormatError("a NIfTI with several colors per voxel is not supported")
        channels = 3
    slope, inter = header.get_slope_inter()
    return NiftiHeader(
        axes=axes,
        channels=channels,
        shape=shape,
        times_s=_times(header, shape[0]) if "T" in axes else None,
        dtype=dtype,
        offset=0 if in_two_files(start) else int(header.get_data_offset()),
        slope=1.0 if slope is None else float(slope),
        inter=0.0 if inter is None else float(inter),
        **_geometry(header, shape[-len(axes.removeprefix("T")) :]),
    )


def _axes(shape: tuple[int, ...]) -> tuple[str, int, tuple[int, ...]]:
    """Our axes, channels and shape of NIfTI's (i, j, k, t, c)."""
    while len(shape) > 3 and shape[-1] == 1:
        shape = shape[:-1]
    if not 2 <= len(shape) <= 5:
        raise UnsupportedFormatError(
            f"a NIfTI with {len(shape)} axes is not supported, only 2 to 5; split it into volumes"
        )
    if min(shape) < 1:
        raise CorruptFileError(f"the header gives the shape {shape}; copy the file again")
    if len(shape) < 4:
        return "DHW"[-len(shape) :], 1, shape[::-1]
    if shape[3] > _MOST_TIMES:
        raise CorruptFileError(f"the header announces {shape[3]} volumes; copy the file again")
    channels = shape[4] if len(shape) == 5 else 1
    if shape[3] == 1:
        return "DHW", channels, shape[2::-1]
    return "TDHW", channels, shape[3::-1]


def _times(header: Any, count: int) -> tuple[float, ...]:
    seconds = _SECONDS.get(header.get_xyzt_units()[1], math.nan)
    step = float(header["pixdim"][4]) * seconds
    return tuple(index * step if step > 0 else math.nan for index in range(count))


def _geometry(header: Any, spatial: tuple[int, ...]) -> dict[str, Any]:
    """The fields of `NiftiHeader` that say where the voxels lie. spatial: ([D], H, W)."""
    codes = int(header["sform_code"]), int(header["qform_code"])
    if max(codes) <= 0:
        return _without_place(header, len(spatial))
    source = "sform" if codes[0] > 0 else "qform"
    affine = _form(header, source)
    if not affine.isfinite().all() or torch.linalg.matrix_rank(affine[:3, :3]) < 3:
        raise InconsistentGeometryError(
            f"the {source} is not a finite invertible matrix; correct the header"
        )
    cosines = affine[:3, :3] / affine[:3, :3].norm(dim=0)
    return {
        "affine": affine,
        "spacing": tuple(affine[:3, :3].norm(dim=0).tolist()[-len(spatial) :]),
        "affine_from": source,
        "qform_differs_mm": _difference(header, affine, spatial) if min(codes) > 0 else None,
        "sheared": bool((cosines.T @ cosines - torch.eye(3)).abs().max() > _SHEAR),
    }


def _form(header: Any, name: str) -> Tensor:
    """(4, 4) from the array index (d, h, w) to RAS+ mm."""
    from nibabel.spatialimages import HeaderDataError

    try:
        with np.errstate(all="ignore"):
            matrix = header.get_sform() if name == "sform" else header.get_qform()
    except (ValueError, HeaderDataError) as error:
        raise InconsistentGeometryError(
            f"the {name} of the header describes no rotation; correct it"
        ) from error
    affine = torch.from_numpy(np.array(matrix, dtype=np.float64))[:, [2, 1, 0, 3]]
    affine[:3] *= _MM.get(header.get_xyzt_units()[0], 1.0)
    return affine


def _difference(header: Any, affine: Tensor, spatial: tuple[int, ...]) -> float | None:
    """By how many mm the qform puts a corner elsewhere; None for as good as nothing."""
    try:
        other = _form(header, "qform")
    except InconsistentGeometryError:  # which nobody asked for
        return None
    size = torch.tensor([1] * (3 - len(spatial)) + list(spatial), dtype=torch.float64) - 1
    ends = torch.cartesian_prod(*(torch.stack([n * 0, n]) for n in size))
    index = torch.cat([ends, torch.ones(8, 1, dtype=torch.float64)], 1)
    apart = float(((affine - other)[:3] @ index.T).norm(dim=0).max())
    return round(apart, 3) if apart > _TOLERANCE_MM else None


def _without_place(header: Any, num_axes: int) -> dict[str, Any]:
    """Neither form is set: the volume lies in its own grid, with the spacing that pixdim gives."""
    unit = header.get_xyzt_units()[0]
    steps = [float(step) * _MM.get(unit, 1.0) for step in header["pixdim"][1:4]][num_axes - 1 :: -1]
    known = unit != "unknown" and all(0 < step < math.inf for step in steps)
    return {
        "affine": pixel_affine(),
        "spacing": tuple(steps) if known else None,
        "affine_from": "none",
        "qform_differs_mm": None,
        "sheared": False,
    }
