"""Every image that nibabel ships with its tests is read as nibabel reads it, or refused by name."""

import gzip
import io
import warnings
from pathlib import Path

import nibabel
import numpy as np
import pydicom
import pytest

from medssl.data.readers.any import read_image
from medssl.data.readers.errors import ReadError, UnsupportedFormatError

ROOT = Path(nibabel.__file__).parent
FILES = sorted(
    file
    for folder in ("tests/data", "nicom/tests/data", "gifti/tests/data")
    for file in (ROOT / folder).iterdir()
    if file.is_file() and file.suffix and file.suffix not in (".py", ".m", ".rst", ".txt")
)
NIFTI = (".nii", ".nii.gz")
DICOM = (".dcm", ".dcm.gz")
OTHER_FORMATS = (".PAR", ".REC", ".HEAD", ".BRIK", ".BRIK.gz", ".mnc", ".mgz", ".v", ".trk", ".tck",
                 ".gii", ".gii.gz", ".gii.bz2", ".bin", ".bin.gz", ".dat")  # fmt: skip
REFUSED = {
    "analyze.hdr": "of no known kind",  # Analyze 7.5, whose orientation nobody laid down
    "nifti1.hdr": "second file",  # shipped without their voxels
    "nifti2.hdr": "second file",
    "row_major.dconn.nii": "6 axes",  # CIFTI: brain models, not a grid
}
NOT_IMAGES = {
    "0.dcm": "hold no image",  # headers alone
    "1.dcm": "hold no image",
    "csa_slice_norm.dcm": "",
    "decimal_rescale.dcm": "",
    "slicethickness_empty_string.dcm": "",
}


def read(file: Path):
    """The image; no warning gets out, and no other error than ours."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return read_image(file)


@pytest.mark.parametrize("file", [f for f in FILES if f.name.endswith(NIFTI)], ids=lambda f: f.name)
def test_a_nifti_equals_nibabels_reading(file):
    if file.name in REFUSED:
        with pytest.raises(UnsupportedFormatError, match=REFUSED[file.name]):
            read(file)
        return
    image, reference = read(file), nibabel.load(file)
    expected = reference.get_fdata().astype(np.float32).T
    np.testing.assert_array_equal(image.pixels[0].numpy(), expected)
    if image.provenance["affine_from"] != "none":
        np.testing.assert_allclose(
            image.affine.numpy(), reference.affine[:, [2, 1, 0, 3]], rtol=0, atol=1e-5
        )


@pytest.mark.parametrize("name", ["analyze.hdr", "nifti1.hdr", "nifti2.hdr"])
def test_a_header_without_voxels_is_refused(name):
    with pytest.raises(UnsupportedFormatError, match=REFUSED[name]):
        read(ROOT / "tests" / "data" / name)


@pytest.mark.parametrize(
    "file", [f for f in FILES if f.name.endswith(OTHER_FORMATS)], ids=lambda f: f.name
)
def test_another_format_is_of_no_known_kind(file):
    with pytest.raises(UnsupportedFormatError, match="of no known kind"):
        read(file)


@pytest.mark.parametrize("file", [f for f in FILES if f.name.endswith(DICOM)], ids=lambda f: f.name)
def test_a_dicom_equals_pydicoms_reading(file):
    content = file.read_bytes()
    content = gzip.decompress(content) if file.suffix == ".gz" else content
    dataset = pydicom.dcmread(io.BytesIO(content), force=True)
    try:
        expected = pydicom.pixels.apply_modality_lut(dataset.pixel_array, dataset)
    except (AttributeError, ValueError):  # pydicom finds no image either
        with pytest.raises(ReadError):
            read(file)
        return
    pixels = read(file).pixels[0].numpy()
    if pixels.ndim == 3 and expected.ndim == 2:  # a mosaic, whose tiles may run against the normal
        expected = cut(expected, pixels.shape)
        expected = expected if np.array_equal(expected, pixels) else expected[::-1]
    np.testing.assert_allclose(pixels, expected.astype(np.float32), rtol=1e-6)


def cut(sheet: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """The tiles of a sheet as (D, h, w), row by row."""
    depth, height, width = shape
    places = [divmod(index, sheet.shape[1] // width) for index in range(depth)]
    return np.stack([sheet[r * height :][:height, c * width :][:, :width] for r, c in places])


def test_no_file_is_left_out():
    endings = (*NIFTI, *DICOM, *OTHER_FORMATS)
    rest = {f.name for f in FILES if not f.name.endswith(endings)} - set(REFUSED)
    assert rest == set()
    assert sum(f.name.endswith(NIFTI) for f in FILES) >= 8
