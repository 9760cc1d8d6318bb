"""What a file is, by its content."""

import gzip

import nibabel
import numpy as np
import pydicom
import pytest
import tifffile
import trimesh
from PIL import Image as Pillow

from medssl.data.manifest import build_manifest, load_sample
from medssl.data.modality import Modality
from medssl.data.readers.any import read_image, sniff
from medssl.data.readers.errors import CorruptFileError, UnsupportedFormatError
from medssl.data.region import crop_ultrasound


def test_content_decides_and_the_suffix_does_not(tmp_path, make_ct_slice, save_dicom):
    grey = np.zeros((4, 5), np.uint8)
    Pillow.fromarray(grey).save(tmp_path / "png.dcm", format="PNG")
    Pillow.fromarray(grey).save(tmp_path / "jpeg.nii", format="JPEG")
    tifffile.imwrite(tmp_path / "tiff.png", grey)
    tifffile.imwrite(tmp_path / "bigtiff", grey, bigtiff=True)
    save_dicom(make_ct_slice(grey), tmp_path / "dicom.png")
    nibabel.save(nibabel.Nifti1Image(np.zeros((2, 2, 2), np.int16), np.eye(4)), tmp_path / "a.nii")
    (tmp_path / "a.nii").rename(tmp_path / "nifti.tif")
    (tmp_path / "zipped").write_bytes(gzip.compress((tmp_path / "nifti.tif").read_bytes()))
    (tmp_path / "text.nii").write_text("hello" * 200)
    (tmp_path / "empty.dcm").touch()
    expected = {
        "png.dcm": "picture",
        "jpeg.nii": "picture",
        "tiff.png": "picture",
        "bigtiff": "picture",
        "dicom.png": "dicom",
        "nifti.tif": "nifti",
        "zipped": "nifti",
        "text.nii": None,
        "empty.dcm": None,
    }
    assert {name: sniff(tmp_path / name) for name in expected} == expected
    for name, kind in expected.items():
        if kind is None:
            with pytest.raises(UnsupportedFormatError):
                read_image(tmp_path / name)
        else:
            assert read_image(tmp_path / name).pixels.max() <= 0


def test_a_folder_is_dicom_only_with_a_dicom_file_in_it(tmp_path, write_ct_series):
    Pillow.fromarray(np.zeros((4, 5), np.uint8)).save(tmp_path / "a.png")
    assert sniff(tmp_path) is None
    write_ct_series(tmp_path / "deep" / "series")
    assert sniff(tmp_path) == "dicom"


def test_a_broken_gzip_named_nifti_is_corrupt_rather_than_unknown(tmp_path):
    (tmp_path / "a.nii.gz").write_bytes(b"\x1f\x8b\x08" + b"\0" * 20)
    assert sniff(tmp_path / "a.nii.gz") == "nifti"
    with pytest.raises(CorruptFileError):
        read_image(tmp_path / "a.nii.gz")


def test_series_means_nothing_for_a_picture(tmp_path):
    Pillow.fromarray(np.zeros((4, 5), np.uint8)).save(tmp_path / "a.png")
    with pytest.raises(ValueError, match="among DICOM volumes"):
        read_image(tmp_path / "a.png", series="abc")
    with pytest.raises(ValueError, match="shows DICOM images"):
        read_image(tmp_path / "a.png", voi_window="brain")


def test_a_modality_is_given_where_the_header_leaves_it_open_and_never_against_it(
    tmp_path, make_ct_slice, save_dicom
):
    Pillow.fromarray(np.zeros((4, 5), np.uint8)).save(tmp_path / "a.png")
    image = read_image(tmp_path / "a.png", modality=Modality.XR)
    assert (image.modality, image.provenance["modality"]) == (Modality.XR, "given")
    save_dicom(make_ct_slice(np.zeros((4, 5), np.uint16)), tmp_path / "a.dcm")
    assert read_image(tmp_path / "a.dcm", modality=Modality.CT).provenance.get("modality") is None
    with pytest.raises(ValueError, match="header says CT"):
        read_image(tmp_path / "a.dcm", modality=Modality.MR)


def test_an_ultrasound_is_cut_to_the_regions_its_header_declares(
    tmp_path, make_ct_slice, save_dicom
):
    region = pydicom.Dataset()
    region.RegionLocationMinX0, region.RegionLocationMinY0 = 3, 1
    region.RegionLocationMaxX1, region.RegionLocationMaxY1 = 9, 6
    dataset = make_ct_slice(
        np.arange(80, dtype=np.uint8).reshape(8, 10),
        Modality="US",
        SequenceOfUltrasoundRegions=[region],
        **dict.fromkeys(
            ("ImagePositionPatient", "ImageOrientationPatient", "RescaleSlope", "RescaleIntercept")
        ),
    )
    save_dicom(dataset, tmp_path / "a.dcm")
    image = read_image(tmp_path / "a.dcm")
    assert image.provenance["ultrasound_regions"] == [[3, 1, 9, 6]]
    assert image.provenance["burned_in_text"] == "possible"
    np.testing.assert_array_equal(
        crop_ultrasound(image).pixels[0].numpy(), np.arange(80).reshape(8, 10)[1:7, 3:10]
    )


def test_points_are_found_by_content_and_become_points_or_an_image(tmp_path):
    cloud = trimesh.PointCloud(np.array([[1.0, 2, 3], [4, 5, 6], [7, 8, 10]]))
    (tmp_path / "free.bin").write_bytes(cloud.export(file_type="ply"))
    grid = "VERSION .7\nFIELDS x y z\nSIZE 4 4 4\nTYPE F F F\nCOUNT 1 1 1\nWIDTH 2\nHEIGHT 2\n"
    rows = "DATA ascii\n1 0 5\n2 0 5\n0 0 0\n2 1 6\n"
    (tmp_path / "grid.dat").write_text(grid + rows)
    with pytest.raises(UnsupportedFormatError, match="free points"):
        read_image(tmp_path / "free.bin")
    image = read_image(tmp_path / "grid.dat", unit="mm")
    assert (image.modality, image.units, image.channels) == (Modality.DEPTH, "mm", ("x", "y", "z"))
    assert image.valid.tolist() == [[True, True], [False, True]]
    manifest = build_manifest(tmp_path)
    samples = [load_sample(manifest, item) for item in manifest.images]
    assert [item.kind for item in manifest.images] == ["points", "points"]
    assert samples[0].points.points.tolist() == [[1, 2, 3], [4, 5, 6], [7, 8, 10]]
    assert samples[1].images["image"].modality is Modality.DEPTH


def test_a_picture_of_three_float_channels_is_xyz_when_it_is_given_so(tmp_path):
    xyz = np.random.default_rng(0).normal(size=(4, 5, 3)).astype(np.float32)
    xyz[1, 2] = 0
    tifffile.imwrite(tmp_path / "a.tiff", xyz, photometric="rgb")
    assert read_image(tmp_path / "a.tiff").modality is Modality.PICTURE
    image = read_image(tmp_path / "a.tiff", modality=Modality.DEPTH, unit="m")
    assert (image.frame, image.units, image.provenance["modality"]) == ("sensor", "m", "given")
    assert not image.valid[1, 2]
    assert image.valid.sum() == 19
