"""NIfTI against nibabel."""

import gzip
import os
from itertools import permutations, product
from pathlib import Path

import nibabel
import numpy as np
import pytest
import torch

from medssl.data.geometry import corners
from medssl.data.readers.any import read_image
from medssl.data.readers.errors import (
    CorruptFileError,
    InconsistentGeometryError,
    UnsupportedFormatError,
)
from medssl.data.readers.nifti import nifti_header

ARRAY = np.arange(4 * 5 * 6, dtype=np.int16).reshape(4, 5, 6)
AFFINE = np.array([[0.8, 0.1, 0, -40], [-0.1, 0.9, 0.2, 30], [0, -0.2, 3, 7], [0, 0, 0, 1.0]])


def saved(path: Path, array=ARRAY, affine=AFFINE, *, sform=2, qform=0, **header) -> Path:
    image = nibabel.Nifti1Image(array, affine)
    image.set_sform(affine, code=sform)
    image.set_qform(affine, code=qform)
    for name, value in header.items():
        image.header[name] = value
    nibabel.save(image, path)
    return path


def in_our_order(affine: np.ndarray) -> np.ndarray:
    return affine[:, [2, 1, 0, 3]]


@pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
def test_every_orientation_puts_every_voxel_where_nibabel_puts_it(tmp_path, suffix):
    for order in permutations(range(3)):
        for signs in product((-1, 1), repeat=3):
            affine = AFFINE[:, [*order, 3]] @ np.diag([*signs, 1])
            path = saved(tmp_path / f"a{suffix}", affine=affine)
            image, reference = read_image(path), nibabel.load(path)
            assert image.axes == "DHW"
            for i, j, k in ((0, 0, 0), (3, 1, 2), (1, 4, 5)):
                place = image.affine @ torch.tensor([k, j, i, 1.0], dtype=torch.float64)
                expected = reference.affine @ [i, j, k, 1]
                np.testing.assert_allclose(place.numpy(), expected, atol=1e-9)
                assert image.pixels[0, k, j, i] == ARRAY[i, j, k]


def test_spacing_is_that_of_our_axes(tmp_path):
    image = read_image(saved(tmp_path / "a.nii"))
    zooms = np.linalg.norm(AFFINE[:3, :3], axis=0)
    assert image.spacing == pytest.approx(tuple(zooms[::-1]))
    assert image.frame == "patient"


def test_the_sform_wins_and_the_qform_serves_where_it_is_alone(tmp_path):
    image = nibabel.Nifti1Image(ARRAY, None)
    q = np.diag([2.0, 3, 4, 1])
    image.set_qform(q, code=1)
    image.set_sform(AFFINE, code=1)
    nibabel.save(image, tmp_path / "both.nii")
    both = read_image(tmp_path / "both.nii")
    np.testing.assert_allclose(both.affine.numpy(), in_our_order(AFFINE), atol=1e-6)
    image.set_sform(None, code=0)
    nibabel.save(image, tmp_path / "q.nii")
    alone = read_image(tmp_path / "q.nii")
    np.testing.assert_allclose(alone.affine.numpy(), in_our_order(q), atol=1e-6)
    assert (both.provenance["affine_from"], alone.provenance["affine_from"]) == ("sform", "qform")


def test_a_volume_without_any_form_is_refused_with_what_to_do(tmp_path):
    with pytest.raises(InconsistentGeometryError, match="set_sform"):
        read_image(saved(tmp_path / "a.nii", sform=0, qform=0))


def test_meters_become_millimeters(tmp_path):
    image = nibabel.Nifti1Image(ARRAY, AFFINE / 1000)
    image.header.set_xyzt_units("meter")
    nibabel.save(image, tmp_path / "a.nii")
    affine = read_image(tmp_path / "a.nii").affine.numpy()
    np.testing.assert_allclose(affine[:3], in_our_order(AFFINE)[:3], rtol=1e-6)


def test_slope_and_intercept_are_applied(tmp_path):
    image = nibabel.Nifti1Image(ARRAY, AFFINE)
    image.header.set_slope_inter(0.125, -3)
    nibabel.save(image, tmp_path / "a.nii")
    with_slope = bytearray((tmp_path / "a.nii").read_bytes())
    with_slope[112:120] = np.array([0.125, -3], "<f4").tobytes()
    with_slope[352:] = ARRAY.T.astype("<i2").tobytes()
    (tmp_path / "a.nii").write_bytes(with_slope)
    pixels = read_image(tmp_path / "a.nii").pixels[0].numpy()
    np.testing.assert_array_equal(pixels, ARRAY.T * 0.125 - 3)


def test_big_endian_is_read(tmp_path):
    nibabel.save(
        nibabel.Nifti1Image(ARRAY, AFFINE, nibabel.Nifti1Header(endianness=">")), tmp_path / "a.nii"
    )
    np.testing.assert_array_equal(read_image(tmp_path / "a.nii").pixels[0].numpy(), ARRAY.T)


def test_nifti2_is_read(tmp_path):
    nibabel.save(nibabel.Nifti2Image(ARRAY, AFFINE), tmp_path / "a.nii.gz")
    np.testing.assert_array_equal(read_image(tmp_path / "a.nii.gz").pixels[0].numpy(), ARRAY.T)


def test_nan_is_kept_and_invalid(tmp_path):
    array = ARRAY.astype(np.float32)
    array[1, 2, 3], array[0, 0, 1] = np.nan, np.inf
    image = read_image(saved(tmp_path / "a.nii", array))
    assert image.valid is not None
    assert (~image.valid).nonzero().tolist() == [[1, 0, 0], [3, 2, 1]]
    assert image.pixels[0, 3, 2, 1].isnan()


def test_a_two_dimensional_nifti_is_one_slice(tmp_path):
    image = read_image(saved(tmp_path / "a.nii", ARRAY[:, :, 0]))
    assert image.axes == "HW"
    np.testing.assert_array_equal(image.pixels[0].numpy(), ARRAY[:, :, 0].T)
    np.testing.assert_allclose(image.affine.numpy(), in_our_order(AFFINE), atol=1e-6)


def test_trailing_axes_of_one_are_no_fourth_axis(tmp_path):
    assert read_image(saved(tmp_path / "a.nii", ARRAY[..., None])).pixels.shape == (1, 6, 5, 4)


def test_large_integers_that_float32_cannot_hold_are_refused(tmp_path):
    fine, lossy = ARRAY.astype(np.int32), ARRAY.astype(np.int32) + (1 << 24)
    assert read_image(saved(tmp_path / "a.nii", fine)).pixels.max() == 119
    with pytest.raises(UnsupportedFormatError, match="2\\^24"):
        read_image(saved(tmp_path / "a.nii", lossy))


RGB = np.zeros((4, 5, 6), dtype=[("R", "u1"), ("G", "u1"), ("B", "u1")])


@pytest.mark.parametrize("array", [np.zeros((4, 5, 6, 2), np.int16), RGB, ARRAY.astype("c8")])
def test_more_than_one_number_per_voxel_is_refused(tmp_path, array):
    with pytest.raises(UnsupportedFormatError, match="one"):
        read_image(saved(tmp_path / "a.nii", array))


@pytest.mark.parametrize("name", ["a.nii", "a.nii.gz"])
@pytest.mark.parametrize("share", [0.02, 0.3, 0.6, 0.99])
def test_a_truncated_file_is_corrupt_whatever_is_left_of_it(tmp_path, name, share):
    noise = np.random.default_rng(0).integers(0, 30000, (20, 20, 20)).astype(np.int16)
    content = saved(tmp_path / name, noise).read_bytes()
    (tmp_path / name).write_bytes(content[: max(360, int(share * len(content)))])
    with pytest.raises(CorruptFileError):
        read_image(tmp_path / name)


def test_a_flipped_bit_in_a_gzip_is_noticed(tmp_path):
    content = bytearray(saved(tmp_path / "a.nii.gz").read_bytes())
    content[-6] ^= 1  # in the checksum
    (tmp_path / "a.nii.gz").write_bytes(content)
    with pytest.raises(CorruptFileError):
        read_image(tmp_path / "a.nii.gz")


def test_plain_and_gzipped_have_one_pixel_hash_and_two_file_hashes(tmp_path):
    one = read_image(saved(tmp_path / "a.nii"), hashes=True).provenance
    content = gzip.compress((tmp_path / "a.nii").read_bytes())
    (tmp_path / "b.nii.gz").write_bytes(content)
    other = read_image(tmp_path / "b.nii.gz", hashes=True).provenance
    assert one["pixel_sha256"] == other["pixel_sha256"]
    assert one["file_sha256"] != other["file_sha256"]


DATA = os.environ.get("MEDSSL_DATA")


@pytest.mark.skipif(not DATA, reason="MEDSSL_DATA is not set")
@pytest.mark.parametrize("name", ["FLAIR", "T1", "lesion"])
@pytest.mark.parametrize("case", ["patient07", "patient19"])
def test_real_cases_equal_nibabel(case, name):
    path = Path(DATA or "") / "nifti-ms-lesions" / "cases" / case / f"{name}.nii.gz"
    image, reference = read_image(path), nibabel.load(path)
    np.testing.assert_allclose(
        image.pixels[0].numpy(), reference.get_fdata(dtype=np.float32).T, rtol=1e-6, atol=1e-4
    )
    np.testing.assert_allclose(image.affine.numpy(), in_our_order(reference.affine), atol=1e-6)
    header = nifti_header(path)
    assert header.shape == image.spatial_shape
    assert torch.equal(header.affine, image.affine)
    far = np.array(reference.shape) - 1
    np.testing.assert_allclose(corners(image)[-1], reference.affine[:3] @ [*far, 1], atol=1e-6)
