"""NIfTI-1 and NIfTI-2 volumes (https://nifti.nimh.nih.gov), single file, plain or gzipped."""

import gzip
import io
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from medssl.data.image import Image
from medssl.data.modality import Modality
from medssl.data.readers.errors import (
    CorruptFileError,
    InconsistentGeometryError,
    ReadError,
    UnsupportedFormatError,
)
from medssl.data.readers.stored import decoding, file_sha256, pixel_sha256, read_bytes, to_float32

_HEADER_BYTES = 544  # NIfTI-2's header and the four extension bytes
_MM = {"unknown": 1.0, "mm": 1.0, "meter": 1e3, "micron": 1e-3}


@dataclass(frozen=True, slots=True, kw_only=True)
class NiftiHeader:
    """What the header alone says, in the order of our arrays.

    shape: (D, H, W) or (H, W). affine: (4, 4), RAS+ mm. affine_from: "sform" or "qform".
    """

    shape: tuple[int, ...]
    affine: Tensor
    spacing: tuple[float, ...]
    affine_from: str


def read_nifti(path: Path, *, hashes: bool = False) -> Image:
    """A volume in the patient frame: NIfTI's (i, j, k) become (w, h, d).

    The sform is the affine where its code says it is set, else the qform. scl_slope and scl_inter
    are applied in float32. NaN and infinite voxels are kept and marked invalid.
    Raises CorruptFileError, UnsupportedFormatError (4D, RGB, complex, two-file NIfTI) and
    InconsistentGeometryError (neither form set, or a broken one).
    """
    content = read_bytes(path)
    nifti = _parse(_unzipped(content))
    header = _described(nifti)
    with decoding("the volume"):  # most often it ends before the header says
        stored = np.asarray(nifti.dataobj.get_unscaled())
    stored = stored.reshape(header.shape[::-1]).T  # (d, h, w)
    pixels = np.ascontiguousarray(to_float32(stored))
    slope, inter = nifti.dataobj.slope, nifti.dataobj.inter
    if (slope, inter) != (1, 0):
        pixels = pixels * np.float32(slope) + np.float32(inter)
    provenance: dict[str, Any] = {"reader": "nifti", "affine_from": header.affine_from}
    if hashes:
        provenance["file_sha256"] = file_sha256(content)
        provenance["pixel_sha256"] = pixel_sha256(stored[None])
    tensor = torch.from_numpy(pixels)[None]
    finite = tensor[0].isfinite()
    return Image(
        pixels=tensor,
        axes="DHW"[-len(header.shape) :],
        modality=Modality.UNKNOWN,
        affine=header.affine,
        frame="patient",
        spacing=header.spacing,
        valid=None if finite.all() else finite,
        provenance=provenance,
    )


def nifti_header(path: Path) -> NiftiHeader:
    """The header alone, without reading the voxels; raises what `read_nifti` raises about it."""
    return _described(_parse(nifti_start(path)))


def nifti_start(path: Path, length: int = _HEADER_BYTES) -> bytes:
    """The first bytes of a file, unzipped where it is gzipped; fewer where it is damaged."""
    try:
        with path.open("rb") as stream:
            start = stream.read(2)
            stream.seek(0)
            if start != b"\x1f\x8b":
                return stream.read(length)
            try:
                with gzip.GzipFile(fileobj=stream) as unzipped:
                    return unzipped.read(length)
            except (EOFError, zlib.error, gzip.BadGzipFile):
                return b""
    except OSError as error:
        raise ReadError(f"the file cannot be opened: {error.strerror}") from None


def is_nifti(start: bytes) -> bool:
    """Whether unzipped bytes begin a NIfTI-1 or NIfTI-2 header, of one file or two."""
    return start[344:348] in (b"n+1\0", b"ni1\0") or start[4:8] in (b"n+2\0", b"ni2\0")


def _unzipped(content: bytes) -> bytes:
    if content[:2] != b"\x1f\x8b":
        return content
    try:
        return gzip.decompress(content)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise CorruptFileError(
            "the gzip stream is truncated or damaged; copy the file again"
        ) from error


@decoding("the NIfTI header")
def _parse(content: bytes) -> Any:
    """The nibabel image over unzipped bytes; its voxels are not touched."""
    import nibabel

    if content[344:348] == b"ni1\0" or content[4:8] == b"ni2\0":
        raise UnsupportedFormatError(
            "NIfTI in two files (.hdr and .img) is not supported; convert it to one .nii.gz"
        )
    if not is_nifti(content):
        raise CorruptFileError("the file does not begin with a whole NIfTI header; copy it again")
    kind = nibabel.Nifti2Image if content[4:8] == b"n+2\0" else nibabel.Nifti1Image
    return kind.from_stream(io.BytesIO(content))


@decoding("the NIfTI header")
def _described(nifti: Any) -> NiftiHeader:
    shape = tuple(int(n) for n in nifti.shape)
    while len(shape) > 3 and shape[-1] == 1:
        shape = shape[:-1]
    if nifti.get_data_dtype().kind not in "biuf":
        raise UnsupportedFormatError(
            "RGB and complex NIfTI are not supported; save one real number per voxel"
        )
    if len(shape) not in (2, 3):
        raise UnsupportedFormatError(
            f"NIfTI with {len(shape)} axes is not supported, only one volume or slice; "
            "split it into volumes"
        )
    if min(shape) < 1:
        raise CorruptFileError(f"the header gives the shape {shape}; copy the file again")
    affine, source = _affine(nifti.header)
    spacing = affine[:3, :3].norm(dim=0).tolist()[-len(shape) :]
    return NiftiHeader(shape=shape[::-1], affine=affine, spacing=tuple(spacing), affine_from=source)


def _affine(header: Any) -> tuple[Tensor, str]:
    """(4, 4) from the array index (d, h, w) to RAS+ mm, and which form it came from."""
    if int(header["sform_code"]) > 0:
        matrix, source = header.get_sform(), "sform"
    elif int(header["qform_code"]) > 0:
        matrix, source = header.get_qform(), "qform"
    else:
        raise InconsistentGeometryError(
            "the header sets neither sform nor qform, so the volume has no known place; set one, "
            "for example with nibabel's image.set_sform(affine, code=1)"
        )
    affine = torch.from_numpy(np.array(matrix, dtype=np.float64))[:, [2, 1, 0, 3]]
    affine[:3] *= _MM.get(header.get_xyzt_units()[0], 1.0)
    if not affine.isfinite().all() or torch.linalg.matrix_rank(affine[:3, :3]) < 3:
        raise InconsistentGeometryError(
            f"the {source} is not a finite invertible matrix; correct the header"
        )
    return affine, source
