"""What becomes of each peculiar NIfTI: the true voxels at their place, or the error by name."""

import nibabel
import numpy as np
import pytest

from medssl.data.readers.any import read_image
from medssl.data.readers.errors import CorruptFileError, UnsupportedFormatError
from medssl.data.synthetic.faulty_nifti import (
    AFFINE,
    CASES,
    INTERCEPT,
    SHEARED,
    SLOPE,
    TIME_STEP_S,
    true_volume,
    write_case,
)

TRUE = true_volume().T[None].astype(np.float32)  # (1, D, H, W)
ORDER = [2, 1, 0, 3]
NAN = np.where(TRUE == 1 * 20 + 2 * 4 + 3, np.nan, TRUE)

WHOLE = {  # case -> pixels, affine of (d, h, w) or None, and what provenance must tell
    "clean": (TRUE, AFFINE, {"affine_from": "sform"}),
    "scaled": (TRUE * SLOPE + INTERCEPT, AFFINE, {"affine_from": "sform"}),
    "forms_differ": (TRUE, AFFINE, {"affine_from": "sform", "qform_differs_mm": 5.0}),
    "no_form": (TRUE, None, {"affine_from": "none"}),
    "qform_only": (TRUE, AFFINE, {"affine_from": "qform"}),
    "sheared_sform": (TRUE, SHEARED, {"affine_from": "sform", "sheared": True}),
    "four_axes": (np.stack([TRUE, TRUE + 500, TRUE + 1000], 1), AFFINE, {"affine_from": "sform"}),
    "five_axes": (np.concatenate([TRUE] * 3), AFFINE, {"affine_from": "sform"}),
    "big_endian": (TRUE, AFFINE, {"affine_from": "sform"}),
    "not_gzipped": (TRUE, AFFINE, {"affine_from": "sform"}),
    "colors": (np.concatenate([TRUE, 255 - TRUE, 0 * TRUE]), AFFINE, {"affine_from": "sform"}),
    "not_a_number": (NAN, AFFINE, {"affine_from": "sform"}),
    "two_axes": (TRUE[:, 0], AFFINE, {"affine_from": "sform"}),
}
REFUSED = {"truncated": CorruptFileError, "complex": UnsupportedFormatError}


def test_every_case_has_its_line_in_the_table():
    assert set(WHOLE) | set(REFUSED) == set(CASES)


@pytest.mark.parametrize("name", ["a.nii", "a.nii.gz"])
@pytest.mark.parametrize("case", WHOLE)
def test_what_is_whole_is_read_at_its_true_place(tmp_path, case, name):
    write_case(tmp_path / name, case)
    image = read_image(tmp_path / name)
    pixels, affine, told = WHOLE[case]
    np.testing.assert_array_equal(image.pixels.numpy(), pixels)
    assert image.provenance == {"reader": "nifti", **told}
    if affine is None:
        assert (image.frame, image.spacing) == ("pixel", pytest.approx((2.0, 0.5, 0.8)))
    else:
        np.testing.assert_allclose(image.affine.numpy(), affine[:, ORDER], rtol=0, atol=1e-5)
    if case == "four_axes":
        assert image.times_s == pytest.approx([0, TIME_STEP_S, 2 * TIME_STEP_S])
    if case == "not_a_number":
        assert (~image.valid).nonzero().tolist() == [[3, 2, 1]]
    else:
        assert image.valid is None


@pytest.mark.parametrize("name", ["a.nii", "a.nii.gz"])
@pytest.mark.parametrize("case", REFUSED)
def test_what_is_not_is_refused_by_name(tmp_path, case, name):
    write_case(tmp_path / name, case)
    with pytest.raises(REFUSED[case]):
        read_image(tmp_path / name)


def test_the_peculiarities_are_really_there_as_nibabel_sees_them(tmp_path):
    def header(case):
        write_case(tmp_path / f"{case}.nii", case)
        return nibabel.load(tmp_path / f"{case}.nii").header

    assert header("big_endian").endianness == ">"
    assert [int(header("no_form")[name]) for name in ("sform_code", "qform_code")] == [0, 0]
    assert [int(header("qform_only")[name]) for name in ("sform_code", "qform_code")] == [0, 1]
    header("scaled")
    stored = nibabel.load(tmp_path / "scaled.nii").dataobj
    assert (stored.slope, stored.inter) == (SLOPE, INTERCEPT)
    apart = header("forms_differ").get_sform() - header("forms_differ").get_qform()
    assert np.linalg.norm(apart[:3, 3]) == pytest.approx(5)
    assert header("five_axes").get_data_shape() == (6, 5, 4, 1, 3)


def test_an_unknown_case_is_refused_with_those_there_are(tmp_path):
    with pytest.raises(ValueError, match="qform_only"):
        write_case(tmp_path / "a.nii", "broken")
