"""NIfTI-1 and NIfTI-2 (https://nifti.nimh.nih.gov), plain or gzipped, in one file or two."""

import gzip
import hashlib
import io
import math
import zlib
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray

from medssl.data.image import Image
from medssl.data.modality import Modality
from medssl.data.readers.errors import CorruptFileError, UnsupportedFormatError
from medssl.data.readers.nifti_header import (
    HEADER_BYTES,
    NiftiHeader,
    in_two_files,
    parse_header,
)
from medssl.data.readers.stored import (
    GZIP,
    combined_sha256,
    decoding,
    first_bytes,
    opened,
    pixel_sha256,
    to_float32,
)

_TRAILING_BYTES = 1 << 20  # that may follow the voxels of a gzipped file


def read_nifti(path: Path, *, hashes: bool = False) -> Image:
    """A volume, or several over time, NIfTI's (i, j, k, t, c) as (c, t, k, j, i).

    The sform is the affine where its code says it is set, else the qform; `provenance` tells which,
    and by how many mm they differ. Where neither is set, the volume has no place in a patient: it
    lies in the pixel frame, with the spacing of pixdim where that has a unit. The fourth axis is
    time, NaN in `times_s` where the header gives no step in seconds, the fifth channels; RGB and
    RGBA become three channels, and voxels of alpha 0 are invalid. scl_slope and scl_inter are
    applied in float64. NaN and infinite voxels are kept and marked invalid.
    Raises CorruptFileError, UnsupportedFormatError and InconsistentGeometryError.
    """
    header = nifti_header(path)
    with decoding("the volume"):
        stored, visible = _channels(_voxels(_voxel_file(path), header), header)
        pixels = torch.from_numpy(_scaled(stored, header))
    provenance: dict[str, Any] = {"reader": "nifti", "affine_from": header.affine_from}
    provenance |= {
        name: value for name in ("qform_differs_mm", "sheared") if (value := getattr(header, name))
    }
    if visible is not None:
        provenance["alpha"] = "mask"
    if hashes:
        files = {path, _voxel_file(path)}
        provenance["file_sha256"] = combined_sha256([_file_sha256(file) for file in files])
        provenance["pixel_sha256"] = pixel_sha256(stored)
    return Image(
        pixels=pixels,
        axes=header.axes,
        modality=Modality.UNKNOWN,
        affine=header.affine,
        frame="pixel" if header.affine_from == "none" else "patient",
        spacing=header.spacing,
        valid=_valid(pixels, header, visible),
        times_s=header.times_s,
        channels=("red", "green", "blue") if header.dtype.names else (),
        value_range=(0.0, 255.0) if header.dtype.names else None,
        provenance=provenance,
    )


def nifti_header(path: Path) -> NiftiHeader:
    """The header alone, without reading the voxels; raises what `read_nifti` raises about it."""
    return parse_header(first_bytes(path, HEADER_BYTES))


def _voxel_file(path: Path) -> Path:
    """The file itself, or the .img beside a .hdr."""
    if not in_two_files(first_bytes(path, HEADER_BYTES)):
        return path
    name = path.name.lower()
    stem = path.name[: name.rfind(".hdr")] if ".hdr" in name else path.stem
    beside = (path.with_name(stem + ending) for ending in (".img", ".img.gz", ".IMG"))
    found = next((file for file in beside if file.is_file()), None)
    if found is None:
        raise UnsupportedFormatError(
            "this header's voxels lie in a second file of the same name ending in .img, which is "
            "not there; copy both"
        )
    return found


def _voxels(file: Path, header: NiftiHeader) -> NDArray:
    """(C, [T], [D], H, W) as stored; a plain file is mapped and not read."""
    with opened(file) as stream:
        zipped = stream.read(2) == GZIP
    needed = header.offset + header.num_bytes
    if not zipped:
        have = file.stat().st_size
        if have < needed:
            raise CorruptFileError(
                f"the header asks for {needed} bytes and the file has {have}; copy it again"
            )
        return np.memmap(file, header.dtype, "r", header.offset, header.stored_shape)
    content = _unzipped(file, needed)
    return np.frombuffer(
        content, header.dtype, math.prod(header.stored_shape), header.offset
    ).reshape(header.stored_shape)


def _unzipped(file: Path, needed: int) -> bytes:
    """As many bytes as the header announces, however many the stream would give."""
    try:
        with gzip.open(file) as stream:
            content = stream.read(needed)
            rest = stream.read(_TRAILING_BYTES + 1)  # to its end, where the checksum is
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise CorruptFileError(
            "the gzip stream is truncated or damaged; copy the file again"
        ) from error
    if len(content) < needed or len(rest) > _TRAILING_BYTES:
        more = len(content) + len(rest)
        raise CorruptFileError(
            f"the header asks for {needed} bytes and the gzip stream has "
            f"{'over ' if len(rest) > _TRAILING_BYTES else ''}{more}; copy the file again"
        )
    return content


def _channels(stored: NDArray, header: NiftiHeader) -> tuple[NDArray, NDArray[np.bool_] | None]:
    """Colors as the first axis, and where alpha is not 0; None where nothing is transparent."""
    if not header.dtype.names:
        return stored, None
    red, green, blue, *alpha = (stored[0][name] for name in header.dtype.names)
    visible = alpha[0] > 0 if alpha and (alpha[0] < 255).any() else None
    return np.stack([red, green, blue]), visible


def _scaled(stored: NDArray, header: NiftiHeader) -> NDArray[np.float32]:
    """Values in the file's unit, a writable copy; computed in float64 by pieces, then rounded."""
    if header.dtype.names or (header.slope, header.inter) == (1, 0):
        values = to_float32(stored)
        return np.array(values) if np.may_share_memory(values, stored) else values
    if stored.dtype.kind not in "biuf":
        raise UnsupportedFormatError("only real numbers can be scaled; save the volume anew")
    values = np.empty(stored.shape, dtype=np.float32)
    source, target = (a.reshape(-1, *a.shape[-2:]) for a in (stored, values))
    with np.errstate(over="ignore"):
        for piece, out in zip(source, target, strict=True):
            out[:] = piece.astype(np.float64) * header.slope + header.inter
    return values


def _valid(
    pixels: torch.Tensor, header: NiftiHeader, visible: NDArray[np.bool_] | None
) -> torch.Tensor | None:
    """([D], H, W) bool: finite in every channel and at every time, and not transparent."""
    finite = pixels.isfinite().all(0)
    usable = finite if visible is None else finite & torch.from_numpy(visible)
    usable = usable.all(0) if "T" in header.axes else usable
    return None if usable.all() else usable


def _file_sha256(path: Path) -> str:
    with opened(path) as stream:
        return hashlib.file_digest(cast(io.BufferedReader, stream), "sha256").hexdigest()
