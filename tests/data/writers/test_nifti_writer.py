"""What we write, as nibabel reads it."""

import nibabel
import numpy as np
import pytest
import torch
from scipy.spatial.transform import Rotation

from medssl.data.geometry import corners
from medssl.data.image import Image, pixel_affine
from medssl.data.modality import Modality
from medssl.data.readers.any import read_image
from medssl.data.writers.nifti import write_nifti


def volume(affine, pixels=None, axes="DHW") -> Image:
    pixels = torch.randn(1, 4, 5, 6) if pixels is None else pixels
    affine = torch.as_tensor(affine, dtype=torch.float64)
    return Image(pixels=pixels, axes=axes, modality=Modality.CT, affine=affine, frame="patient")


def turned(seed: int) -> np.ndarray:
    affine = np.eye(4)
    affine[:3, :3] = Rotation.random(random_state=seed).as_matrix() @ np.diag([2.5, 0.7, 0.4])
    affine[:3, 3] = [-120.3, 44.1, 900.7]
    return affine


@pytest.mark.parametrize("name", ["a.nii", "a.nii.gz"])
@pytest.mark.parametrize("seed", range(4))
def test_nibabel_reads_back_the_same_voxels_at_the_same_places(tmp_path, seed, name):
    image = volume(turned(seed))
    write_nifti(image, tmp_path / name)
    written = nibabel.load(tmp_path / name)
    np.testing.assert_array_equal(written.get_fdata(), image.pixels[0].numpy().T)
    expected = image.affine.numpy()[:, [2, 1, 0, 3]].astype(np.float32)
    np.testing.assert_array_equal(written.affine, expected)
    np.testing.assert_allclose(written.get_qform(), expected, atol=1e-3)
    assert (written.header["sform_code"], written.header["qform_code"]) == (1, 1)
    assert written.get_data_dtype() == np.float32
    assert written.header.get_xyzt_units()[0] == "mm"


def test_what_is_written_is_read_at_the_same_corners(tmp_path):
    image = volume(turned(7))
    write_nifti(image, tmp_path / "a.nii.gz")
    back = read_image(tmp_path / "a.nii.gz")
    assert torch.equal(back.pixels, image.pixels)
    torch.testing.assert_close(corners(back), corners(image), atol=1e-3, rtol=0)


def test_a_sheared_affine_goes_into_the_sform_alone(tmp_path):
    affine = turned(0)
    affine[:3, 0] += 0.5 * affine[:3, 1]
    write_nifti(volume(affine), tmp_path / "a.nii")
    written = nibabel.load(tmp_path / "a.nii")
    assert (written.header["sform_code"], written.header["qform_code"]) == (1, 0)
    np.testing.assert_allclose(written.affine, affine[:, [2, 1, 0, 3]], rtol=1e-6)


def test_nan_is_written_as_nan(tmp_path):
    pixels = torch.randn(1, 4, 5, 6)
    pixels[0, 1, 2, 3] = torch.nan
    write_nifti(volume(np.eye(4), pixels), tmp_path / "a.nii")
    assert np.argwhere(np.isnan(nibabel.load(tmp_path / "a.nii").get_fdata())).tolist() == [
        [3, 2, 1]
    ]


def test_a_slice_becomes_a_volume_of_one(tmp_path):
    image = volume(turned(1), torch.randn(1, 5, 6), axes="HW")
    write_nifti(image, tmp_path / "a.nii")
    written = nibabel.load(tmp_path / "a.nii")
    assert written.shape == (6, 5, 1)
    back = read_image(tmp_path / "a.nii")
    torch.testing.assert_close(corners(back)[:4], corners(image), atol=1e-3, rtol=0)


def test_masks_are_bytes_and_refuse_anything_else(tmp_path):
    mask = (torch.randn(1, 4, 5, 6) > 0).float()
    write_nifti(volume(np.eye(4), mask), tmp_path / "a.nii", dtype="uint8")
    written = nibabel.load(tmp_path / "a.nii")
    assert written.get_data_dtype() == np.uint8
    np.testing.assert_array_equal(written.get_fdata(), mask[0].numpy().T)
    with pytest.raises(ValueError, match="integers"):
        write_nifti(volume(np.eye(4), mask / 2), tmp_path / "b.nii", dtype="uint8")
    assert not (tmp_path / "b.nii").exists()


def test_equal_images_give_equal_bytes(tmp_path):
    image = volume(turned(2))
    for name in ("a.nii.gz", "b.nii.gz"):
        write_nifti(image, tmp_path / name)
    assert (tmp_path / "a.nii.gz").read_bytes() == (tmp_path / "b.nii.gz").read_bytes()
    assert sorted(file.name for file in tmp_path.iterdir()) == ["a.nii.gz", "b.nii.gz"]


def test_time_and_channels_are_the_fourth_and_fifth_axis(tmp_path):
    pixels = torch.arange(2 * 3 * 4 * 5 * 6.0).reshape(2, 3, 4, 5, 6)
    image = Image(
        pixels=pixels,
        axes="TDHW",
        modality=Modality.MR,
        affine=torch.diag(torch.tensor([2.0, 0.5, 0.8, 1.0], dtype=torch.float64))[[2, 1, 0, 3]],
        frame="patient",
        spacing=(2.0, 0.5, 0.8),
        times_s=(0.0, 2.5, 5.0),
    )
    write_nifti(image, tmp_path / "a.nii.gz")
    nifti = nibabel.load(tmp_path / "a.nii.gz")
    assert nifti.shape == (6, 5, 4, 3, 2)
    np.testing.assert_array_equal(nifti.get_fdata(), pixels.numpy().transpose(4, 3, 2, 1, 0))
    assert nifti.header.get_zooms()[:4] == pytest.approx((0.8, 0.5, 2.0, 2.5))
    assert nifti.header.get_xyzt_units() == ("mm", "sec")


@pytest.mark.parametrize(
    ("spacing", "zooms", "unit"), [((0.5, 0.8), (0.8, 0.5), "mm"), (None, (1, 1), "unknown")]
)
def test_a_picture_has_neither_form_and_the_spacing_that_is_known(tmp_path, spacing, zooms, unit):
    picture = Image(
        pixels=torch.arange(20.0).reshape(1, 4, 5),
        axes="HW",
        modality=Modality.XR,
        affine=pixel_affine(),
        frame="pixel",
        spacing=spacing,
    )
    write_nifti(picture, tmp_path / "a.nii")
    header = nibabel.load(tmp_path / "a.nii").header
    assert (int(header["sform_code"]), int(header["qform_code"])) == (0, 0)
    assert header["pixdim"][1:3] == pytest.approx(zooms)
    assert header.get_xyzt_units()[0] == unit
    assert tuple(header.get_data_shape()) == (5, 4, 1)


def test_uneven_times_have_no_step(tmp_path):
    cine = Image(
        pixels=torch.zeros(1, 3, 4, 5),
        axes="THW",
        modality=Modality.US,
        affine=pixel_affine(),
        frame="pixel",
        times_s=(0.0, 0.1, 0.5),
    )
    write_nifti(cine, tmp_path / "a.nii")
    assert nibabel.load(tmp_path / "a.nii").header["pixdim"][4] == 0
