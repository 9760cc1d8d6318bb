from dataclasses import replace

import highdicom
import numpy as np
import pydicom
import pytest
import torch
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, JPEG2000Lossless, JPEGLSLossless

from medssl.data.readers.any import read_image
from medssl.data.synthetic.dicom_series import write_dicom_series
from medssl.data.synthetic.head_ct import head_ct

LPS = np.diag([-1.0, -1.0, 1.0, 1.0])
OBLIQUE_SEED = 50  # with unequal row and column spacing
FORMS = {
    ("uncompressed", "unsigned12"): ExplicitVRLittleEndian,
    ("uncompressed", "signed16"): ExplicitVRLittleEndian,
    ("jpeg_ls", "unsigned12"): JPEGLSLossless,
    ("jpeg_2000", "unsigned12"): JPEG2000Lossless,
}


@pytest.fixture(scope="module")
def image():
    image = head_ct(OBLIQUE_SEED, lesion=False).image
    assert abs(image.affine[2, 1]) > 0.1, "the tests need oblique slices"
    return image


@pytest.fixture(params=FORMS, ids="-".join)
def series(request, image, tmp_path):
    """The folder of a series and the transfer syntax it must have."""
    syntax, stored = request.param
    write_dicom_series(image, tmp_path / "series", name="a", syntax=syntax, stored=stored)
    return tmp_path / "series", FORMS[request.param]


def test_pydicom_reads_back_the_hu_of_each_slice(image, series):
    folder, transfer_syntax = series
    files = [pydicom.dcmread(file) for file in folder.iterdir()]
    assert len(files) == image.spatial_shape[0]
    for dataset in files:
        assert dataset.file_meta.TransferSyntaxUID == transfer_syntax
        assert dataset.SOPClassUID == CTImageStorage
        hu = dataset.pixel_array * dataset.RescaleSlope + dataset.RescaleIntercept
        expected = image.pixels[0, dataset.InstanceNumber - 1].numpy()
        assert np.array_equal(hu, expected)


def test_highdicom_finds_the_geometry(image, series):
    files = [pydicom.dcmread(file) for file in sorted(series[0].iterdir())]
    volume = highdicom.get_volume_from_series(files)
    ours = np.linalg.inv(volume.affine) @ LPS @ image.affine.numpy()  # our index -> its index
    turn = np.rint(ours)
    assert np.allclose(ours, turn, atol=1e-6), "the grids are the same up to the order of slices"
    d, h, w = 2, 17, 40
    there = tuple((turn @ (d, h, w, 1))[:3].astype(int))
    assert volume.array[there] == image.pixels[0, d, h, w]
    assert np.allclose(volume.spacing, image.spacing, atol=1e-9)


def test_our_reader_gives_back_the_image(image, series):
    read = read_image(series[0])
    assert torch.equal(read.pixels, image.pixels)
    assert torch.allclose(read.affine, image.affine, atol=1e-8, rtol=0)
    assert read.spacing == pytest.approx(image.spacing)
    assert (read.modality, read.frame, read.axes) == ("CT", "patient", "DHW")


def test_the_order_of_the_file_names_is_not_the_order_of_the_slices(series):
    numbers = [pydicom.dcmread(file).InstanceNumber for file in sorted(series[0].iterdir())]
    assert numbers not in (sorted(numbers), sorted(numbers, reverse=True))


def test_files_conform_where_readers_are_strict(series):
    files = [pydicom.dcmread(file) for file in series[0].iterdir()]
    for name in ("StudyInstanceUID", "SeriesInstanceUID", "FrameOfReferenceUID", "PatientID"):
        assert len({dataset[name].value for dataset in files}) == 1
    assert len({dataset.SOPInstanceUID for dataset in files}) == len(files)
    for dataset in files:
        assert dataset.file_meta.MediaStorageSOPInstanceUID == dataset.SOPInstanceUID
        assert dataset.SOPInstanceUID.is_valid
        for name in ("ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing"):
            assert all(len(str(value)) <= 16 for value in dataset[name].value)


def test_equal_names_give_equal_files_and_other_names_other_identities(image, tmp_path):
    for folder, name in (("first", "a"), ("again", "a"), ("other", "b")):
        write_dicom_series(image, tmp_path / folder, name=name)
    first, again, other = (
        {file.name: file.read_bytes() for file in (tmp_path / folder).iterdir()}
        for folder in ("first", "again", "other")
    )
    assert first == again
    assert not first.keys() & other.keys()


def test_an_image_that_is_no_ct_volume_is_refused(image, tmp_path):
    flat = replace(image, pixels=image.pixels[:, 0], axes="HW", spacing=image.spacing[1:])
    with pytest.raises(ValueError, match="needs a DHW CT volume"):
        write_dicom_series(flat, tmp_path, name="a")


def test_hu_that_the_stored_type_cannot_hold_are_refused(image, tmp_path):
    bright = replace(image, pixels=image.pixels + 3000)
    with pytest.raises(ValueError, match="unsigned12 holds 0 to 4095"):
        write_dicom_series(bright, tmp_path / "series", name="a")
    assert not (tmp_path / "series").exists()


def test_compressed_signed_pixels_are_refused(image, tmp_path):
    with pytest.raises(ValueError, match="unsigned12"):
        write_dicom_series(image, tmp_path, name="a", syntax="jpeg_ls", stored="signed16")
