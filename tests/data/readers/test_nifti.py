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


def test_a_volume_without_any_form_lies_in_its_own_grid(tmp_path):
    path = tmp_path / "a.nii"
    image = nibabel.Nifti1Image(ARRAY, None)
    image.header.set_xyzt_units("mm")
    image.header.set_zooms((0.5, 0.75, 3))
    nibabel.save(image, path)
    read = read_image(path)
    assert (read.frame, read.spacing) == ("pixel", (3.0, 0.75, 0.5))
    assert torch.equal(read.affine, torch.eye(4, dtype=torch.float64))
    assert read.provenance["affine_from"] == "none"
    image.header.set_xyzt_units("unknown")
    nibabel.save(image, path)
    assert read_image(path).spacing is None  # a number without a unit is no spacing


def test_forms_that_differ_are_told_with_the_distance(tmp_path):
    image = nibabel.Nifti1Image(ARRAY, None)
    image.set_sform(np.diag([2.0, 2, 2, 1]), code=1)
    moved = np.diag([2.0, 2, 2, 1])
    moved[:3, 3] = [3, 4, 0]
    image.set_qform(moved, code=1)
    nibabel.save(image, tmp_path / "a.nii")
    assert read_image(tmp_path / "a.nii").provenance["qform_differs_mm"] == 5.0
    image.set_qform(np.diag([2.0, 2, 2, 1]), code=1)
    nibabel.save(image, tmp_path / "b.nii")
    assert "qform_differs_mm" not in read_image(tmp_path / "b.nii").provenance


def test_a_sheared_sform_is_kept_and_told(tmp_path):
    affine = np.array([[1.0, 0, 0.3, 5], [0, 1, 0, 6], [0, 0, 2, 7], [0, 0, 0, 1]])
    image = read_image(saved(tmp_path / "a.nii", affine=affine))
    np.testing.assert_allclose(image.affine.numpy(), in_our_order(affine), atol=1e-6)
    assert image.provenance["sheared"] is True


@pytest.mark.parametrize(("code", "value"), [("sform", np.nan), ("sform", 0.0), ("qform", np.nan)])
def test_a_form_that_is_no_matrix_is_refused(tmp_path, code, value):
    path = saved(tmp_path / "a.nii", sform=2 if code == "sform" else 0, qform=1)
    content = bytearray(path.read_bytes())
    start = 280 if code == "sform" else 256  # srow_x, or quatern_b
    content[start : start + 12] = np.full(3, value, "<f4").tobytes()
    path.write_bytes(content)
    with pytest.raises(InconsistentGeometryError):
        read_image(path)


@pytest.mark.parametrize(
    ("unit", "step", "expected"),
    [
        ("sec", 2.5, 2.5),
        ("msec", 720, 0.72),
        ("usec", 5e5, 0.5),
        ("sec", 0, None),
        (8 + 24, 3, None),
    ],
)
def test_the_fourth_axis_is_time(tmp_path, unit, step, expected):
    array = np.arange(4 * 5 * 6 * 3, dtype=np.int16).reshape(4, 5, 6, 3)
    image = nibabel.Nifti1Image(array, AFFINE)
    image.header.set_xyzt_units("mm", unit)
    image.header["pixdim"][4] = step
    nibabel.save(image, tmp_path / "a.nii.gz")
    read = read_image(tmp_path / "a.nii.gz")
    assert read.axes == "TDHW"
    np.testing.assert_array_equal(read.pixels[0].numpy(), array.T)
    if expected is None:
        assert np.isnan(read.times_s).all()
    else:
        assert read.times_s == pytest.approx((0, expected, 2 * expected))


def test_the_fifth_axis_is_channels(tmp_path):
    array = np.random.default_rng(0).normal(size=(4, 5, 6, 1, 3)).astype(np.float32)
    read = read_image(saved(tmp_path / "a.nii", array))
    assert read.axes == "DHW"
    np.testing.assert_array_equal(read.pixels.numpy(), array[:, :, :, 0].T)
    array = np.random.default_rng(0).normal(size=(4, 5, 6, 2, 3)).astype(np.float32)
    read = read_image(saved(tmp_path / "b.nii", array))
    assert read.axes == "TDHW"
    np.testing.assert_array_equal(read.pixels.numpy(), array.T)


def test_colors_are_channels_and_transparent_voxels_invalid(tmp_path):
    colors = np.random.default_rng(0).integers(0, 256, (4, 5, 6, 3), dtype=np.uint8)
    rgb = np.zeros((4, 5, 6), [("R", "u1"), ("G", "u1"), ("B", "u1")])
    rgba = np.zeros((4, 5, 6), [("R", "u1"), ("G", "u1"), ("B", "u1"), ("A", "u1")])
    for index, name in enumerate("RGB"):
        rgb[name] = rgba[name] = colors[..., index]
    read = read_image(saved(tmp_path / "a.nii", rgb))
    np.testing.assert_array_equal(read.pixels.numpy(), colors.transpose(3, 2, 1, 0))
    assert (read.value_range, read.valid) == ((0, 255), None)
    rgba["A"] = 255
    assert read_image(saved(tmp_path / "b.nii", rgba)).valid is None
    rgba["A"][1, 2, 3] = 0
    read = read_image(saved(tmp_path / "c.nii", rgba))
    assert (~read.valid).nonzero().tolist() == [[3, 2, 1]]
    assert read.provenance["alpha"] == "mask"


def test_scaling_is_computed_before_it_is_rounded(tmp_path):
    array = np.array([[[2**31 - 1, -(2**31), 7]]], np.int32)
    image = nibabel.Nifti1Image(array, AFFINE)
    nibabel.save(image, tmp_path / "a.nii")
    content = bytearray((tmp_path / "a.nii").read_bytes())
    content[112:120] = np.array([1e-9, 0.1], "<f4").tobytes()
    (tmp_path / "a.nii").write_bytes(content)
    expected = nibabel.load(tmp_path / "a.nii").get_fdata().astype(np.float32)
    np.testing.assert_array_equal(read_image(tmp_path / "a.nii").pixels[0].numpy(), expected.T)


@pytest.mark.parametrize("endings", [(".hdr", ".img"), (".hdr.gz", ".img.gz")])
def test_a_header_finds_its_voxels_beside_it(tmp_path, endings):
    nibabel.save(nibabel.Nifti1Pair(ARRAY, AFFINE), tmp_path / f"a{endings[1]}")
    header = tmp_path / f"a{endings[0]}"
    read = read_image(header, hashes=True)
    np.testing.assert_array_equal(read.pixels[0].numpy(), ARRAY.T)
    np.testing.assert_allclose(read.affine.numpy(), in_our_order(AFFINE), atol=1e-6)
    (tmp_path / f"a{endings[1]}").unlink()
    with pytest.raises(UnsupportedFormatError, match="second file"):
        read_image(header)


def test_a_gzip_that_holds_far_more_than_its_header_says_is_refused(tmp_path):
    content = saved(tmp_path / "a.nii").read_bytes()
    (tmp_path / "a.nii.gz").write_bytes(gzip.compress(content + bytes(5 << 20)))
    with pytest.raises(CorruptFileError, match="over"):
        read_image(tmp_path / "a.nii.gz")
    (tmp_path / "b.nii.gz").write_bytes(gzip.compress(content + b"a remark"))
    np.testing.assert_array_equal(read_image(tmp_path / "b.nii.gz").pixels[0].numpy(), ARRAY.T)


def test_a_plain_file_is_not_held_in_memory_twice(tmp_path):
    import tracemalloc

    path = saved(tmp_path / "a.nii", np.zeros((128, 128, 64), np.int16))
    read_image(path)
    tracemalloc.start()
    image = read_image(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2.5 * 4 * image.pixels.numel()


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


def test_complex_numbers_and_a_sixth_axis_are_refused_by_name(tmp_path):
    with pytest.raises(UnsupportedFormatError, match="complex"):
        read_image(saved(tmp_path / "a.nii", ARRAY.astype("c8")))
    with pytest.raises(UnsupportedFormatError, match="6 axes"):
        read_image(saved(tmp_path / "b.nii", np.zeros((2, 2, 2, 2, 2, 2), np.int16)))


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
