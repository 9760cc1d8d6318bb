"""Every image among pydicom's own test files: the pixels pydicom decodes, after the modality."""

import warnings
from functools import cache
from pathlib import Path

import numpy as np
import pydicom
import pytest
from pydicom.pixels import apply_color_lut, apply_modality_lut

from medssl.data.readers.any import read_image
from medssl.data.readers.dicom_header import _TAGS
from medssl.data.readers.errors import ReadError

ROOT = Path(pydicom.__file__).parent / "data" / "test_files"
FILES = sorted(
    file.relative_to(ROOT).as_posix()
    for file in ROOT.rglob("*")
    if file.is_file() and file.suffix in ("", ".dcm")
)


WARNED = {
    "MR_small_padded.dcm": ["bytes follow the pixels"],
    "SC_rgb_jpeg.dcm": ["the header is encoded otherwise than it says"],
}


@cache
def decoded(file):
    """The dataset, pydicom's pixels and its warnings, or None where it decodes none."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            dataset = pydicom.dcmread(file, force=True)
            for keyword in _TAGS:
                dataset.get(keyword)
            return dataset, dataset.pixel_array, [str(warning.message) for warning in caught]
        except Exception:
            return None


def expected(dataset, pixels):
    """(C, *axes) in the modality's unit."""
    if dataset.PhotometricInterpretation == "PALETTE COLOR":
        pixels = apply_color_lut(pixels, dataset)[..., :3]
    elif dataset.get("SamplesPerPixel", 1) == 1:
        pixels = apply_modality_lut(pixels, dataset)
        if dataset.PhotometricInterpretation == "MONOCHROME1" and dataset.Modality == "CR":
            slope, intercept = (
                float(dataset.get(f"Rescale{name}", default))
                for name, default in (("Slope", 1), ("Intercept", 0))
            )
            top = 2**dataset.BitsStored - 1
            pixels = top * slope + 2 * intercept - pixels  # the same range, turned over
        return pixels[None]
    return np.moveaxis(pixels, -1, 0)


def read_or_refused(file):
    """The image, or the reason why there is none."""
    try:
        return read_image(file), None
    except ReadError as error:
        return None, str(error)


def test_there_are_many():
    assert len([file for file in FILES if decoded(ROOT / file)]) > 80


@pytest.mark.parametrize("file", FILES)
def test_a_file_that_pydicom_decodes_is_read_and_any_other_refused_with_a_reason(file):
    found = decoded(ROOT / file)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        image, reason = read_or_refused(ROOT / file)
    if found is None:  # we may have a decoder that pydicom does not choose by itself
        assert reason or image.pixels.isfinite().all()
        return
    assert reason is None
    dataset, pixels, warned = found
    assert image.provenance.get("doubts", []) == WARNED.get(Path(file).name, [])
    assert bool(warned) == (Path(file).name in WARNED)
    wanted, got = expected(dataset, pixels), image.pixels.numpy()
    assert got.shape == wanted.shape
    np.testing.assert_allclose(got, wanted, rtol=1e-6)
