"""Small NIfTI volumes with one peculiarity each, and the truth about them."""

import gzip
from collections.abc import Callable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

AFFINE = np.array([[0.8, 0, 0, -40], [0, 0.5, 0, 30], [0, 0, 2.0, 7], [0, 0, 0, 1]])
QFORM = np.array([[0.8, 0, 0, -37], [0, 0.5, 0, 34], [0, 0, 2.0, 7], [0, 0, 0, 1]])  # 5 mm beside
SHEARED = np.array([[0.8, 0, 0.3, -40], [0, 0.5, 0, 30], [0, 0, 2.0, 7], [0, 0, 0, 1]])
SLOPE, INTERCEPT = 0.25, -100.0
TIME_STEP_S = 2.5


def true_volume() -> NDArray[np.int16]:
    """(6, 5, 4) in NIfTI's order (i, j, k): every voxel different."""
    return np.arange(120, dtype=np.int16).reshape(6, 5, 4)


def write_case(path: Path, case: str = "clean") -> None:
    """Write a case of `CASES`; a name ending in .gz is gzipped, but for "not_gzipped".

    Raises ValueError for a case that is none.
    """
    if case not in CASES:
        raise ValueError(f"case must be one of {', '.join(CASES)}; got {case!r}")
    content = CASES[case]()
    if path.suffix == ".gz" and case != "not_gzipped":
        content = gzip.compress(content, mtime=0)
    path.write_bytes(content[: int(0.7 * len(content))] if case == "truncated" else content)


def _bytes(
    values: NDArray,
    *,
    sform: NDArray | None = AFFINE,
    qform: NDArray | None = AFFINE,
    big_endian: bool = False,
    units: tuple[str, str | None] = ("mm", None),
) -> bytes:
    import nibabel

    header = nibabel.Nifti1Header(endianness=">" if big_endian else "<")
    header.set_data_dtype(values.dtype)
    image = nibabel.Nifti1Image(values, None, header)
    image.header.set_xyzt_units(*units)
    image.header.set_zooms([0.8, 0.5, 2.0, 1.0, 1.0][: values.ndim])
    if sform is not None:
        image.set_sform(sform, code=2)
    if qform is not None:
        image.set_qform(qform, code=1)
    image.header["sform_code"] = 0 if sform is None else 2
    return bytes(image.to_bytes())


def _scaled() -> bytes:
    content = bytearray(_bytes(true_volume()))
    content[112:120] = np.array([SLOPE, INTERCEPT], "<f4").tobytes()  # scl_slope, scl_inter
    return bytes(content)


def _four_axes() -> bytes:
    values = np.stack([true_volume(), true_volume() + 500, true_volume() + 1000], axis=-1)
    content = bytearray(_bytes(values, units=("mm", "sec")))
    content[92:96] = np.array(TIME_STEP_S, "<f4").tobytes()  # pixdim[4]
    return bytes(content)


def _not_a_number() -> bytes:
    values = true_volume().astype(np.float32)
    values[1, 2, 3] = np.nan
    return _bytes(values)


def _colors() -> bytes:
    values = np.zeros(true_volume().shape, [("R", "u1"), ("G", "u1"), ("B", "u1")])
    values["R"], values["G"] = true_volume(), 255 - true_volume()
    return _bytes(values)


CASES: dict[str, Callable[[], bytes]] = {
    "clean": lambda: _bytes(true_volume()),
    "scaled": _scaled,
    "forms_differ": lambda: _bytes(true_volume(), qform=QFORM),
    "no_form": lambda: _bytes(true_volume(), sform=None, qform=None),
    "qform_only": lambda: _bytes(true_volume(), sform=None),
    "sheared_sform": lambda: _bytes(true_volume(), sform=SHEARED, qform=None),
    "four_axes": _four_axes,
    "five_axes": lambda: _bytes(np.stack([true_volume()] * 3, -1)[:, :, :, None]),
    "big_endian": lambda: _bytes(true_volume(), big_endian=True),
    "truncated": lambda: _bytes(true_volume()),
    "not_gzipped": lambda: _bytes(true_volume()),
    "colors": _colors,
    "not_a_number": _not_a_number,
    "two_axes": lambda: _bytes(true_volume()[:, :, 0]),
    "complex": lambda: _bytes(true_volume().astype(np.complex64)),
}
"""Name -> the bytes of the file, not yet gzipped."""
