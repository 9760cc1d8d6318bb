"""What becomes of each faulty series: the true voxels at their true place, or the error by name."""

import numpy as np
import pydicom
import pytest
from pydicom.pixels import apply_modality_lut, apply_voi_lut
from pydicom.sequence import Sequence as Items

from medssl.data.readers.any import read_image
from medssl.data.readers.dicom_find import scan
from medssl.data.readers.errors import (
    AmbiguousSeriesError,
    DuplicateSlicesError,
    InconsistentGeometryError,
    MissingSlicesError,
    TruncatedPixelDataError,
    UnsupportedFormatError,
)
from medssl.data.synthetic.faulty_series import (
    FAULTS,
    ORIGIN,
    SPACING,
    TILT_DEG,
    clean,
    true_hu,
    write_series,
)

HU = true_hu().astype(np.float32)
SHIFT = SPACING[0] * np.tan(np.deg2rad(TILT_DEG))


def affine(columns=((0, 0, 2.0), (0, 0.5, 0), (0.8, 0, 0)), origin=ORIGIN) -> np.ndarray:
    """RAS+ from the directions (LPS mm) of the array axes d, h, w."""
    matrix = np.eye(4)
    matrix[:3, :3], matrix[:3, 3] = np.array(columns).T, origin
    return np.diag([-1, -1, 1, 1]) @ matrix


AXIAL = affine()
SAGITTAL = affine(((-2.0, 0, 0), (0, 0, -0.5), (0, 0.8, 0)))
TILTED = affine(((0, SHIFT, 2.0), (0, 0.5, 0), (0.8, 0, 0)))

WHOLE = {  # fault -> voxels, affine, and what provenance must tell
    "clean": (HU, AXIAL, {}),
    "reversed_instance_numbers": (HU, AXIAL, {}),
    "sagittal": (HU, SAGITTAL, {}),
    "one_slice_copied": (HU, AXIAL, {"duplicates_dropped": 1}),
    "gantry_tilt": (HU, TILTED, {"sheared": True}),
    "rescale_per_slice": (HU, AXIAL, {}),
    "monochrome1": (HU, AXIAL, {}),
    "signed_pixels": (HU, AXIAL, {}),
    "no_instance_numbers": (HU, AXIAL, {}),
    "other_files": (HU, AXIAL, {"files_skipped": 2}),
    "no_preamble": (HU, AXIAL, {}),
    "big_endian": (HU, AXIAL, {}),
    "single_sagittal_slice": (HU[0], SAGITTAL, {}),
    "enhanced_multi_frame": (HU, AXIAL, {}),
}
REFUSED = {
    "one_slice_missing": MissingSlicesError,
    "uneven_spacing": MissingSlicesError,
    "one_slice_taken_again": DuplicateSlicesError,
    "two_series": AmbiguousSeriesError,
    "localizer_of_the_same_series": AmbiguousSeriesError,
    "one_truncated_file": TruncatedPixelDataError,
    "one_slice_of_other_rows": AmbiguousSeriesError,
    "position_not_a_number": InconsistentGeometryError,
    "no_orientation": InconsistentGeometryError,
}
IGNORED = pytest.mark.filterwarnings("ignore:Invalid value for VR DS")


def test_every_fault_has_its_line_in_the_table():
    assert set(WHOLE) | set(REFUSED) == set(FAULTS)


@pytest.mark.parametrize("fault", WHOLE)
def test_what_is_whole_is_read_at_its_true_place(tmp_path, fault):
    write_series(tmp_path, fault)
    image = read_image(tmp_path)
    voxels, place, told = WHOLE[fault]
    np.testing.assert_allclose(image.pixels[0].numpy(), voxels, rtol=0, atol=2e-3)
    np.testing.assert_allclose(image.affine.numpy(), place, rtol=0, atol=1e-6)
    assert image.units == "HU"
    rest = {k: v for k, v in image.provenance.items() if k not in ("reader", "transfer_syntax")}
    assert rest == told


@IGNORED
@pytest.mark.parametrize("fault", REFUSED)
def test_what_is_not_is_refused_by_name(tmp_path, fault):
    write_series(tmp_path, fault)
    with pytest.raises(REFUSED[fault]):
        read_image(tmp_path)


@pytest.mark.parametrize("fault", ["one_slice_missing", "uneven_spacing"])
def test_the_error_names_the_argument_that_resolves_it(tmp_path, fault):
    write_series(tmp_path, fault)
    with pytest.raises(MissingSlicesError) as raised:
        read_image(tmp_path)
    assert "on_gap" in raised.value.argument
    assert "on_gap" in str(raised.value)


def test_a_gap_filled_with_nan(tmp_path):
    write_series(tmp_path, "one_slice_missing")
    image = read_image(tmp_path, on_gap="insert_nan")
    there = [0, 1, 2, 4, 5, 6, 7]
    np.testing.assert_array_equal(image.pixels[0, there].numpy(), HU[there])
    assert image.pixels[0, 3].isnan().all()
    assert image.valid.flatten(1).all(1).tolist() == [d != 3 for d in range(8)]
    np.testing.assert_allclose(image.affine.numpy(), AXIAL, atol=1e-9)
    told = image.provenance
    assert (told["on_gap"], told["slices_missing"]) == ("insert_nan", [3])


def test_a_gap_interpolated(tmp_path):
    write_series(tmp_path, "one_slice_missing")
    image = read_image(tmp_path, on_gap="resample")
    np.testing.assert_allclose(image.pixels[0].numpy(), HU, atol=1e-3)  # linear in d, as are HU
    np.testing.assert_allclose(image.affine.numpy(), AXIAL, atol=1e-9)
    assert (image.valid, image.provenance["slices_missing"]) == (None, [3])


def test_uneven_distances_interpolated(tmp_path):
    write_series(tmp_path, "uneven_spacing")  # the fourth slice lies at 3.25 distances, not 3
    image = read_image(tmp_path, on_gap="resample")
    expected = HU.copy()
    expected[3] = HU[2] * (0.25 / 1.25) + HU[3] * (1 / 1.25)
    np.testing.assert_allclose(image.pixels[0].numpy(), expected, atol=1e-3)
    with pytest.raises(MissingSlicesError, match="resample"):
        read_image(tmp_path, on_gap="insert_nan")


def test_a_gap_kept_as_it_is(tmp_path):
    write_series(tmp_path, "one_slice_missing")
    image = read_image(tmp_path, on_gap="keep")
    np.testing.assert_array_equal(image.pixels[0].numpy(), HU[[0, 1, 2, 4, 5, 6, 7]])
    assert image.spacing[0] == pytest.approx(14 / 6)
    assert image.provenance["slice_positions_mm"] == [0, 2, 4, 8, 10, 12, 14]


@pytest.mark.parametrize(("which", "offset"), [("first", 0), ("last", 100)])
def test_a_slice_taken_again(tmp_path, which, offset):
    write_series(tmp_path, "one_slice_taken_again")
    image = read_image(tmp_path, on_duplicate=which)
    expected = HU.copy()
    expected[3] += offset
    np.testing.assert_array_equal(image.pixels[0].numpy(), expected)
    assert image.provenance["on_duplicate"] == which
    assert image.provenance["duplicates_dropped"] == 1


def test_a_tilt_made_rectangular(tmp_path):
    write_series(tmp_path, "gantry_tilt")
    image = read_image(tmp_path, resample_tilt=True)
    matrix = image.affine.numpy()
    np.testing.assert_allclose(matrix[:3, :3], AXIAL[:3, :3], atol=1e-9)  # no shear is left
    d, h, w = np.meshgrid(*map(np.arange, image.spatial_shape), indexing="ij")
    place = matrix @ np.stack([d, h, w, np.ones_like(d)]).reshape(4, -1)
    source = (np.linalg.inv(TILTED) @ place).reshape(4, *d.shape)
    inside = image.valid.numpy()
    linear = -1000 + 120 * source[0] + 10 * source[1] + source[2]  # `true_hu`, anywhere
    within = inside & (source[1] >= 0) & (source[1] <= 11)
    np.testing.assert_allclose(image.pixels[0].numpy()[within], linear[within], atol=2e-3)
    assert np.isnan(image.pixels[0].numpy()[~inside]).all()
    assert inside[np.abs(source[1] - 5.5) < 5.5].all()
    assert source[1].min() <= 1e-6  # nothing of any slice is cut off
    assert (source[1].max((1, 2)) >= 11 - 1e-6).all()
    assert image.provenance["resample_tilt"] is True


@pytest.mark.parametrize("fault", ["two_series", "localizer_of_the_same_series"])
def test_one_of_several_volumes(tmp_path, fault):
    write_series(tmp_path, fault)
    found = scan(tmp_path.iterdir())
    assert len({series.series for series in found}) == len(found) == 2
    (wanted,) = (series for series in found if series.shape == HU.shape)
    image = read_image(tmp_path, series=wanted.series)
    np.testing.assert_array_equal(image.pixels[0].numpy(), HU)


def test_the_rest_of_a_series_with_one_odd_slice_lacks_a_slice(tmp_path):
    write_series(tmp_path, "one_slice_of_other_rows")
    (wanted,) = (series for series in scan(tmp_path.iterdir()) if len(series.shape) == 3)
    with pytest.raises(MissingSlicesError):
        read_image(tmp_path, series=wanted.series)
    image = read_image(tmp_path, series=wanted.series, on_gap="insert_nan")
    assert image.provenance["slices_missing"] == [3]


LUT = {"LUTDescriptor": [200, 40, 12], "LUTData": [20 * n for n in range(200)]}


def window(**changes):
    """A change of each slice's header."""

    def change(dataset):
        for name, value in changes.items():
            setattr(dataset, name, value)

    return change


def voi_table(dataset):
    table = pydicom.Dataset()
    table.add_new("LUTDescriptor", "US", LUT["LUTDescriptor"])
    table.add_new("LUTData", "US", LUT["LUTData"])
    dataset.VOILUTSequence = Items([table])
    dataset.RescaleIntercept = 0


@pytest.mark.parametrize(
    "change",
    [
        window(),
        window(WindowCenter=[-500, 40], WindowWidth=[333, 80]),
        window(VOILUTFunction="LINEAR_EXACT", WindowWidth=77),
        window(VOILUTFunction="SIGMOID", WindowWidth=120),
        voi_table,
    ],
    ids=["linear", "the first of two", "exact", "sigmoid", "table"],
)
def test_the_window_of_the_header_is_the_standards(tmp_path, change):
    expected = []
    for index, dataset in enumerate(clean("window")):
        change(dataset)
        dataset.save_as(tmp_path / str(index), enforce_file_format=True)
        values = apply_modality_lut(dataset.pixel_array, dataset)
        if change is not voi_table:  # pydicom's output range is that of the stored values
            values = values.astype(np.float64)
            dataset.BitsStored = 12
        shown = apply_voi_lut(values, dataset)
        expected.append(shown)
    image = read_image(tmp_path, voi_window="dicom")
    shown = np.stack(expected).astype(np.float64)
    low, high = (0, 4095) if change is voi_table else (-1024, 3071)  # of 12 bits, rescaled
    np.testing.assert_allclose(
        image.pixels[0].numpy(), (shown - low) / (high - low), rtol=0, atol=2e-6
    )
    assert (image.units, image.value_range) == ("window", (0, 1))
    assert image.provenance["voi_window"] == "dicom"


@pytest.mark.parametrize(
    ("given", "center", "width"), [("brain", 40, 80), ((-500, 300), -500, 300)]
)
def test_a_window_by_name_or_numbers(tmp_path, given, center, width):
    write_series(tmp_path)
    image = read_image(tmp_path, voi_window=given)
    expected = ((HU - (center - width / 2)) / width).clip(0, 1)
    np.testing.assert_allclose(image.pixels[0].numpy(), expected, atol=1e-6)


def test_windows_that_make_no_sense_say_so(tmp_path, make_ct_slice, save_dicom):
    write_series(tmp_path / "ct")
    with pytest.raises(ValueError, match="one of brain"):
        read_image(tmp_path / "ct", voi_window="brian")
    with pytest.raises(ValueError, match="positive width"):
        read_image(tmp_path / "ct", voi_window=(40, 0))
    with pytest.raises(ValueError, match="on_gap must be one of"):
        read_image(tmp_path / "ct", on_gap="fill")
    save_dicom(make_ct_slice(np.zeros((4, 5), np.uint16), Modality="MR"), tmp_path / "mr.dcm")
    with pytest.raises(UnsupportedFormatError, match="no window"):
        read_image(tmp_path / "mr.dcm", voi_window="dicom")
    with pytest.raises(UnsupportedFormatError, match="in HU"):
        read_image(tmp_path / "mr.dcm", voi_window="brain")
    color = make_ct_slice(np.zeros((4, 5, 3), np.uint8), Modality="US")
    save_dicom(color, tmp_path / "us.dcm")
    with pytest.raises(UnsupportedFormatError, match="color"):
        read_image(tmp_path / "us.dcm", voi_window=(40, 80))


def test_an_inverted_radiograph_is_windowed_before_it_is_inverted(
    tmp_path, make_ct_slice, save_dicom
):
    stored = np.arange(0, 4096, 64, dtype=np.uint16).reshape(8, 8)
    dataset = make_ct_slice(
        stored,
        Modality="DX",
        PhotometricInterpretation="MONOCHROME1",
        BitsStored=12,
        HighBit=11,
        RescaleIntercept=0,
        WindowCenter=1000,
        WindowWidth=801,
    )
    save_dicom(dataset, tmp_path / "a.dcm")
    image = read_image(tmp_path / "a.dcm", voi_window="dicom")
    shown = ((stored - 999.5) / 800 + 0.5).clip(0, 1)  # PS3.3 C.11.2.1.2.1
    np.testing.assert_allclose(image.pixels[0].numpy(), 1 - shown, atol=1e-6)
