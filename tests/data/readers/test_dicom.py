"""DICOM series against highdicom, pydicom and numbers chosen by the tests."""

import hashlib
import math
import os
import warnings
from pathlib import Path

import highdicom
import numpy as np
import openjpeg.utils
import pydicom
import pytest
import torch
from pydicom.uid import (
    MPEG2MPML,
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGLSLossless,
    RLELossless,
    generate_uid,
)

from medssl.data.modality import Modality
from medssl.data.readers.any import read_image
from medssl.data.readers.dicom_find import scan
from medssl.data.readers.errors import (
    AmbiguousSeriesError,
    CorruptFileError,
    DuplicateSlicesError,
    InconsistentGeometryError,
    MissingDecoderError,
    MissingSlicesError,
    NoPixelDataError,
    NotDicomError,
    ReadError,
    TruncatedPixelDataError,
    UnsupportedFormatError,
    UnsupportedPhotometricError,
)

SAGITTAL = (0.0, 1.0, 0.0, 0.0, 0.0, -1.0)
CORONAL = (1.0, 0.0, 0.0, 0.0, 0.0, -1.0)
TILTED = (0.9848077530, 0.1736481777, 0.0, -0.1710100717, 0.9698463104, 0.1736481777)
LPS_TO_RAS = np.diag([-1.0, -1, 1, 1])
XR = {"RescaleSlope": None, "RescaleIntercept": None, "RescaleType": None}
FLAT = {"ImagePositionPatient": None, "ImageOrientationPatient": None}


@pytest.fixture(autouse=True)
def key_of_these_tests(tmp_path, monkeypatch):
    monkeypatch.setenv("MEDSSL_KEY_FILE", str(tmp_path / "key-file" / "key"))


@pytest.mark.parametrize("orientation", [SAGITTAL, CORONAL, TILTED, (1, 0, 0, 0, 1, 0)])
def test_volume_and_affine_equal_highdicom(tmp_path, write_ct_series, orientation):
    write_ct_series(tmp_path / "s", orientation=orientation)
    image = read_image(tmp_path / "s")
    datasets = [pydicom.dcmread(file) for file in (tmp_path / "s").iterdir()]
    reference = highdicom.get_volume_from_series(datasets)
    expected = LPS_TO_RAS @ reference.affine
    pixels = image.pixels[0].numpy()
    ours = image.affine.numpy().copy()
    if not np.allclose(ours, expected, atol=1e-4):  # highdicom may count slices from the other end
        ours[:3, 3] += ours[:3, 0] * (len(pixels) - 1)
        ours[:3, 0] *= -1
        pixels = pixels[::-1]
    np.testing.assert_allclose(ours, expected, atol=1e-4)
    np.testing.assert_array_equal(pixels, reference.array)
    assert image.axes == "DHW"
    assert image.frame == "patient"
    assert image.units == "HU"
    assert image.modality is Modality.CT


def test_pixel_spacing_is_between_rows_first(tmp_path, write_ct_series):
    write_ct_series(tmp_path / "s")
    image = read_image(tmp_path / "s")
    assert image.spacing == pytest.approx((2.0, 0.5, 0.8))
    step_down = image.affine @ torch.tensor([0, 1, 0, 0.0], dtype=torch.float64)
    assert step_down[:3].tolist() == pytest.approx([0, -0.5, 0])  # towards posterior in RAS


def test_slices_are_sorted_by_position_and_each_keeps_its_own_rescale(tmp_path, write_ct_series):
    def rescale(index, dataset):
        dataset.RescaleSlope, dataset.RescaleIntercept = str(0.5 + index / 10), str(-index)

    stored = write_ct_series(tmp_path / "s", step=(0, 0, -2.0), change=rescale)
    pixels = read_image(tmp_path / "s").pixels[0].numpy()
    for index, plane in enumerate(stored):
        expected = plane * (0.5 + index / 10) - index
        np.testing.assert_allclose(pixels[len(stored) - 1 - index], expected, rtol=1e-6)


def test_gantry_tilt_stays_a_shear_in_the_affine(tmp_path, write_ct_series):
    angle = math.radians(15)
    step = (0.0, 2 * math.tan(angle), 2.0)
    stored = write_ct_series(tmp_path / "s", step=step)
    image = read_image(tmp_path / "s")
    assert image.affine[:3, 0].tolist() == pytest.approx([0, -step[1], 2.0], abs=1e-6)
    assert image.provenance["sheared"]
    last = image.affine @ torch.tensor([len(stored) - 1, 0, 0, 1.0], dtype=torch.float64)
    assert last[:3].tolist() == pytest.approx([50, 60 - 5 * step[1], 80], abs=1e-5)


@pytest.mark.parametrize("kept", [[0, 1, 3, 4, 5], [0, 1, 2, 5]])
def test_missing_slices_are_an_error_and_counted(tmp_path, write_ct_series, kept):
    write_ct_series(tmp_path / "s")
    for file in (tmp_path / "s").iterdir():
        z = pydicom.dcmread(file).ImagePositionPatient[2]
        if round((z - 70) / 2) not in kept:
            file.unlink()
    with pytest.raises(MissingSlicesError, match=f"{6 - len(kept)} slices? (is|are) missing"):
        read_image(tmp_path / "s")


@pytest.mark.parametrize(("jitter", "fails"), [(0.019, False), (0.03, True)])
def test_spacing_may_vary_by_one_percent(tmp_path, write_ct_series, jitter, fails):
    def move(index, dataset):
        dataset.ImagePositionPatient[2] += jitter if index == 3 else 0

    write_ct_series(tmp_path / "s", change=move)
    if fails:
        with pytest.raises(MissingSlicesError, match="varies"):
            read_image(tmp_path / "s")
    else:
        assert read_image(tmp_path / "s").pixels.shape == (1, 6, 10, 12)


def test_slices_off_the_line_are_no_grid(tmp_path, write_ct_series):
    def move(index, dataset):
        dataset.ImagePositionPatient[0] += 1.0 if index == 3 else 0

    write_ct_series(tmp_path / "s", change=move)
    with pytest.raises(InconsistentGeometryError, match="straight"):
        read_image(tmp_path / "s")


def copy_slice(folder: Path, **changes) -> None:
    file = sorted(folder.iterdir())[0]
    dataset = pydicom.dcmread(file)
    if "pixel" in changes:
        dataset.PixelData = dataset.PixelData[:-2] + b"\x07\x00"
    dataset.SOPInstanceUID = generate_uid()
    pydicom.dcmwrite(folder / "copy.dcm", dataset)


def test_an_equal_duplicate_is_dropped_and_recorded(tmp_path, write_ct_series):
    stored = write_ct_series(tmp_path / "s")
    whole = read_image(tmp_path / "s")
    copy_slice(tmp_path / "s")
    image = read_image(tmp_path / "s")
    assert len(stored) == image.pixels.shape[1]
    assert torch.equal(image.pixels, whole.pixels)
    assert image.provenance["duplicates_dropped"] == 1


def test_a_different_duplicate_is_an_error(tmp_path, write_ct_series):
    write_ct_series(tmp_path / "s")
    copy_slice(tmp_path / "s", pixel=True)
    with pytest.raises(DuplicateSlicesError, match="position"):
        read_image(tmp_path / "s")
    (series,) = scan((tmp_path / "s").iterdir())
    assert isinstance(series.problems[0], DuplicateSlicesError)


def test_two_series_need_a_choice_and_the_salted_id_makes_it(tmp_path, write_ct_series):
    write_ct_series(tmp_path / "s" / "a", SeriesInstanceUID="1.2.3.8")
    other = write_ct_series(
        tmp_path / "s" / "b", SeriesInstanceUID="1.2.3.9", RescaleIntercept=0, step=(0, 0, 3)
    )
    name = next(s.series for s in scan((tmp_path / "s" / "b").iterdir()))
    with pytest.raises(AmbiguousSeriesError, match=name):
        read_image(tmp_path / "s")
    chosen = read_image(tmp_path / "s", series=name)
    np.testing.assert_array_equal(chosen.pixels[0].numpy(), other)
    with pytest.raises(AmbiguousSeriesError, match="no volume"):
        read_image(tmp_path / "s", series="nonsense")


def test_a_localizer_in_the_same_series_is_never_stacked(tmp_path, write_ct_series):
    write_ct_series(tmp_path / "s")
    write_ct_series(tmp_path / "s" / "scout", orientation=CORONAL)
    found = scan(file for file in (tmp_path / "s").rglob("*") if file.is_file())
    assert sorted(str(series.orientation) for series in found) == ["PIL", "SPL"]
    with pytest.raises(AmbiguousSeriesError, match="2 volumes where one"):
        read_image(tmp_path / "s")
    shapes = [read_image(tmp_path / "s", series=series.series).axes for series in found]
    assert shapes == ["DHW", "DHW"]  # each has an id of its own, of one series UID


def test_a_parallel_localizer_in_the_same_series_is_never_stacked(tmp_path, write_ct_series):
    write_ct_series(tmp_path / "s")
    kind = ["ORIGINAL", "PRIMARY", "LOCALIZER"]
    write_ct_series(tmp_path / "s" / "scout", origin=(-50, -60, 82), ImageType=kind)
    found = scan(file for file in (tmp_path / "s").rglob("*") if file.is_file())
    assert [series.shape for series in found] == [(6, 10, 12)] * 2


def test_slabs_with_their_own_acquisition_numbers_are_one_volume(tmp_path, write_ct_series):
    def number(index, dataset):
        dataset.AcquisitionNumber = index // 3

    write_ct_series(tmp_path / "s", change=number)
    assert read_image(tmp_path / "s").pixels.shape == (1, 6, 10, 12)


def test_padding_is_invalid_also_where_it_is_written_unsigned(tmp_path, make_ct_slice, save_dicom):
    stored = np.arange(-60, 60, dtype=np.int16).reshape(10, 12)
    stored[:2] = -2000
    dataset = make_ct_slice(stored, RescaleIntercept=0)
    dataset.add_new("PixelPaddingValue", "US", 65536 - 2000)
    save_dicom(dataset, tmp_path / "a.dcm")
    image = read_image(tmp_path / "a.dcm")
    assert image.valid is not None
    assert (~image.valid[:2]).all()
    assert image.valid[2:].all()


def test_padding_range_has_both_ends_inside(tmp_path, make_ct_slice, save_dicom):
    stored = np.arange(120, dtype=np.uint16).reshape(10, 12)
    dataset = make_ct_slice(stored, PixelPaddingValue=5, PixelPaddingRangeLimit=2)
    save_dicom(dataset, tmp_path / "a.dcm")
    valid = read_image(tmp_path / "a.dcm").valid
    assert valid is not None
    assert (~valid).nonzero().tolist() == [[0, 2], [0, 3], [0, 4], [0, 5]]


@pytest.mark.parametrize(("modality", "inverted"), [("CT", False), ("MR", False), ("DX", True)])
def test_monochrome1_is_inverted_only_where_values_measure_nothing(
    tmp_path, make_ct_slice, save_dicom, modality, inverted
):
    stored = np.arange(120, dtype=np.uint16).reshape(10, 12)
    dataset = make_ct_slice(
        stored,
        Modality=modality,
        PhotometricInterpretation="MONOCHROME1",
        BitsStored=12,
        HighBit=11,
        RescaleIntercept=0,
    )
    save_dicom(dataset, tmp_path / "a.dcm")
    image = read_image(tmp_path / "a.dcm")
    expected = 4095.0 - stored if inverted else stored
    np.testing.assert_array_equal(image.pixels[0].numpy(), expected)
    assert image.provenance.get("inverted", False) == inverted


def test_signed_12_bit_values_ignore_the_unused_high_bits(tmp_path, make_ct_slice, save_dicom):
    true = np.arange(-60, 60, dtype=np.int16).reshape(10, 12)
    dirty = (true & 0x0FFF) | 0x5000
    dataset = make_ct_slice(dirty.astype(np.int16), BitsStored=12, HighBit=11, RescaleIntercept=0)
    save_dicom(dataset, tmp_path / "a.dcm")
    np.testing.assert_array_equal(read_image(tmp_path / "a.dcm").pixels[0].numpy(), true)


@pytest.mark.parametrize(
    ("tags", "spacing"),
    [
        ({"PixelSpacing": [0.2, 0.3], "ImagerPixelSpacing": [0.4, 0.5]}, (0.2, 0.3)),
        ({"PixelSpacing": None, "ImagerPixelSpacing": [0.4, 0.5]}, (0.4, 0.5)),
        ({"PixelSpacing": None}, None),
    ],
)
def test_a_radiograph_lies_in_the_pixel_frame_with_the_spacing_it_has(
    tmp_path, make_ct_slice, save_dicom, tags, spacing
):
    stored = np.arange(120, dtype=np.uint16).reshape(10, 12)
    save_dicom(make_ct_slice(stored, Modality="DX", **FLAT, **XR, **tags), tmp_path / "a.dcm")
    image = read_image(tmp_path / "a.dcm")
    assert (image.axes, image.frame, image.spacing) == ("HW", "pixel", spacing)
    assert torch.equal(image.affine, torch.eye(4, dtype=torch.float64))
    assert image.modality is Modality.XR
    assert image.value_range == (0, 65535)
    assert image.units == "stored"


def test_a_single_oriented_slice_has_an_invertible_affine(tmp_path, make_ct_slice, save_dicom):
    stored = np.arange(120, dtype=np.uint16).reshape(10, 12)
    position = [1.0, 2.0, 3.0]
    save_dicom(
        make_ct_slice(
            stored, ImageOrientationPatient=list(SAGITTAL), ImagePositionPatient=position
        ),
        tmp_path / "a.dcm",
    )
    image = read_image(tmp_path / "a.dcm")
    assert image.axes == "HW"
    assert image.frame == "patient"
    assert image.spacing == pytest.approx((0.5, 0.8))
    assert abs(torch.linalg.det(image.affine[:3, :3])) == pytest.approx(2.0 * 0.5 * 0.8)
    assert image.affine[:3, 3].tolist() == [-1, -2, 3]
    assert image.affine[:3, 2].tolist() == pytest.approx([0, -0.8, 0])


def test_color_is_read_as_three_channels(tmp_path, make_ct_slice, save_dicom):
    stored = np.random.default_rng(0).integers(0, 255, (10, 12, 3)).astype(np.uint8)
    save_dicom(make_ct_slice(stored, Modality="US", **FLAT, **XR), tmp_path / "a.dcm")
    image = read_image(tmp_path / "a.dcm")
    np.testing.assert_array_equal(image.pixels.numpy(), stored.transpose(2, 0, 1))
    assert image.value_range == (0, 255)
    assert image.modality is Modality.US


# --- packing and hashes ---


def compress(dataset, syntax) -> None:
    """JPEG 2000 with OpenJPEG itself, the others with pydicom's encoders."""
    if syntax != JPEG2000Lossless:
        dataset.compress(syntax, generate_instance_uid=False)
        return
    code = openjpeg.utils.encode_array(dataset.pixel_array, bits_stored=dataset.BitsStored)
    dataset.PixelData = pydicom.encaps.encapsulate([code])
    dataset["PixelData"].VR = "OB"
    dataset["PixelData"].is_undefined_length = True
    dataset.file_meta.TransferSyntaxUID = syntax


@pytest.mark.parametrize(
    "syntax",
    [
        ImplicitVRLittleEndian,
        ExplicitVRBigEndian,
        DeflatedExplicitVRLittleEndian,
        RLELossless,
        JPEG2000Lossless,
        JPEGLSLossless,
    ],
    ids=lambda uid: uid.keyword,
)
def test_every_packing_gives_the_same_pixels_and_pixel_hash(tmp_path, write_ct_series, syntax):
    noise = np.random.default_rng(0).integers(0, 4000, (3, 64, 80)).astype(np.uint16)
    write_ct_series(tmp_path / "plain", stored=noise)
    (tmp_path / "packed").mkdir()
    for file in (tmp_path / "plain").iterdir():
        dataset = pydicom.dcmread(file)
        dataset.PatientID = "another"
        dataset.SeriesInstanceUID = "1.9.9"
        target = tmp_path / "packed" / file.name
        if syntax.is_encapsulated:
            compress(dataset, syntax)
            dataset.save_as(target)
            continue
        if syntax == ExplicitVRBigEndian:
            dataset.PixelData = dataset.pixel_array.astype(">u2").tobytes()
        dataset.file_meta.TransferSyntaxUID = syntax
        pydicom.dcmwrite(
            target,
            dataset,
            implicit_vr=syntax.is_implicit_VR,
            little_endian=syntax.is_little_endian,
            enforce_file_format=True,
        )
    plain = read_image(tmp_path / "plain", hashes=True)
    packed = read_image(tmp_path / "packed", hashes=True)
    assert torch.equal(plain.pixels, packed.pixels)
    assert plain.provenance["pixel_sha256"] == packed.provenance["pixel_sha256"]
    assert plain.provenance["file_sha256"] != packed.provenance["file_sha256"]
    assert packed.provenance["transfer_syntax"] == syntax.name


def test_hashes_are_the_documented_ones(tmp_path, write_ct_series):
    stored = write_ct_series(tmp_path / "s")
    provenance = read_image(tmp_path / "s", hashes=True).provenance
    digests = sorted(
        hashlib.sha256(file.read_bytes()).hexdigest() for file in (tmp_path / "s").iterdir()
    )
    assert provenance["file_sha256"] == hashlib.sha256("".join(digests).encode()).hexdigest()
    content = b"1,6,10,12" + stored.astype("<i4").tobytes()
    assert provenance["pixel_sha256"] == hashlib.sha256(content).hexdigest()


# --- what is refused ---


def test_a_missing_decoder_is_named(tmp_path, make_ct_slice):
    dataset = make_ct_slice(np.zeros((10, 12), np.uint8))
    dataset.PixelData = pydicom.encaps.encapsulate([b"\0" * 20])
    dataset["PixelData"].is_undefined_length = True
    dataset.file_meta.TransferSyntaxUID = MPEG2MPML
    dataset.save_as(tmp_path / "a.dcm")
    with pytest.raises(MissingDecoderError, match="MPEG2"):
        read_image(tmp_path / "a.dcm")


def test_truncated_pixels_are_an_error_with_both_numbers(tmp_path, make_ct_slice, save_dicom):
    save_dicom(make_ct_slice(np.zeros((10, 12), np.uint16)), tmp_path / "a.dcm")
    content = (tmp_path / "a.dcm").read_bytes()
    (tmp_path / "a.dcm").write_bytes(content[:-40])
    with pytest.raises(TruncatedPixelDataError, match="240 bytes of pixels and there are 200"):
        read_image(tmp_path / "a.dcm")


@pytest.mark.parametrize("share", [0.5, 0.8, 0.97])
def test_a_truncated_compressed_slice_is_an_error(tmp_path, make_ct_slice, share):
    noise = np.random.default_rng(0).integers(0, 4000, (64, 64)).astype(np.uint16)
    dataset = make_ct_slice(noise)
    compress(dataset, JPEG2000Lossless)
    dataset.save_as(tmp_path / "a.dcm")
    content = (tmp_path / "a.dcm").read_bytes()
    (tmp_path / "a.dcm").write_bytes(content[: int(share * len(content))])
    with pytest.raises(TruncatedPixelDataError):
        read_image(tmp_path / "a.dcm")


@pytest.mark.parametrize("syntax", [JPEGLSLossless, JPEG2000Lossless, RLELossless])
def test_damaged_compressed_pixels_end_in_an_error_and_not_the_process(
    tmp_path, make_ct_slice, syntax
):
    rng = np.random.default_rng(0)
    dataset = make_ct_slice(rng.integers(0, 4000, (64, 64)).astype(np.uint16))
    compress(dataset, syntax)
    dataset.save_as(tmp_path / "a.dcm")
    content = (tmp_path / "a.dcm").read_bytes()
    start = content.rindex(b"\xe0\x7f\x10\x00")
    outcomes = set()
    for _ in range(60):
        damaged = bytearray(content)
        for place in rng.integers(start + 20, start + 120, 4):
            damaged[place] = rng.integers(0, 256)
        (tmp_path / "a.dcm").write_bytes(damaged)
        try:
            outcomes.add(read_image(tmp_path / "a.dcm").pixels.shape)
        except ReadError:
            outcomes.add("error")
    assert "error" in outcomes
    assert outcomes <= {"error", (1, 64, 64)}


def test_one_damaged_file_stops_the_folder_that_holds_it(tmp_path, write_ct_series):
    write_ct_series(tmp_path / "s")
    file = sorted((tmp_path / "s").iterdir())[0]
    file.write_bytes(file.read_bytes()[:500])
    with pytest.raises(ReadError):
        read_image(tmp_path / "s")
    assert any(series.problems for series in scan((tmp_path / "s").iterdir()))


def test_other_files_and_objects_are_passed_over_and_counted(
    tmp_path, write_ct_series, make_ct_slice, save_dicom
):
    write_ct_series(tmp_path / "s")
    (tmp_path / "s" / "README.txt").write_text("hello")
    report = make_ct_slice(np.zeros((2, 2), np.uint16), Modality="SR", Rows=None, Columns=None)
    save_dicom(report, tmp_path / "s" / "report.dcm")
    image = read_image(tmp_path / "s")
    assert image.pixels.shape == (1, 6, 10, 12)
    assert image.provenance["files_skipped"] == 1
    assert image.provenance["objects_skipped"] == 1
    with pytest.raises(NoPixelDataError):
        read_image(tmp_path / "s" / "report.dcm")


@pytest.mark.parametrize(
    ("changes", "error", "word"),
    [
        ({"NumberOfFrames": 3}, UnsupportedFormatError, "may be slices"),
        ({"ImageType": ["ORIGINAL", "PRIMARY", "M", "MOSAIC"]}, UnsupportedFormatError, "mosaic"),
        ({"PhotometricInterpretation": "CMYK"}, UnsupportedPhotometricError, "RGB and YBR"),
        ({"RescaleType": "MGML"}, UnsupportedFormatError, "HU"),
        ({"RescaleIntercept": None}, UnsupportedFormatError, "Hounsfield"),
        ({"ImagePositionPatient": None}, InconsistentGeometryError, "only one"),
        ({"PixelSpacing": None}, InconsistentGeometryError, "pixel spacing"),
        ({"PixelSpacing": [0.0, 1.0]}, InconsistentGeometryError, "pixel spacing"),
        ({"ImageOrientationPatient": [1, 0, 0, 1, 0, 0]}, InconsistentGeometryError, "perpend"),
        (
            {"PhotometricInterpretation": "PALETTE COLOR"},
            UnsupportedPhotometricError,
            "its palette",
        ),
    ],
)
def test_what_has_no_reader_yet_is_refused_by_name(
    tmp_path, make_ct_slice, save_dicom, changes, error, word
):
    save_dicom(make_ct_slice(np.zeros((10, 12), np.uint16), **changes), tmp_path / "a.dcm")
    with pytest.raises(error, match=word):
        read_image(tmp_path / "a.dcm")


def test_errors_and_reprs_hold_no_path_and_no_patient(tmp_path, write_ct_series):
    write_ct_series(tmp_path / "a")
    write_ct_series(tmp_path / "b", SeriesInstanceUID="1.2.3.77")
    with pytest.raises(AmbiguousSeriesError) as error:
        read_image(tmp_path)
    text = str(error.value) + repr(scan(tmp_path.rglob("*.dcm")))
    for secret in ("secret", "Secret", "1.2.3", str(tmp_path)):
        assert secret not in text


def test_a_strange_header_value_is_not_quoted_in_a_warning(tmp_path, make_ct_slice, save_dicom):
    save_dicom(make_ct_slice(np.zeros((10, 12), np.uint16)), tmp_path / "a.dcm")
    content = (tmp_path / "a.dcm").read_bytes()
    strange = content.replace(b"1.2.3.4\0", b"secret-7")
    assert strange != content
    (tmp_path / "a.dcm").write_bytes(strange)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        read_image(tmp_path / "a.dcm")
    assert not [str(w.message) for w in caught if "pydicom" in w.filename or "secret" in str(w)]


def test_a_folder_without_dicom_is_no_image(tmp_path):
    (tmp_path / "notes.txt").write_text("nothing here")
    with pytest.raises(UnsupportedFormatError):
        read_image(tmp_path)
    (tmp_path / "notes.txt").write_bytes(b"\x08\x00\x05\x00" + b"\x20" * 300)
    with pytest.raises(NotDicomError):
        read_image(tmp_path / "notes.txt")
    (tmp_path / "notes.txt").unlink()
    (tmp_path / "fake.dcm").write_bytes(b"\0" * 128 + b"DICM" + b"\0" * 50)
    with pytest.raises(CorruptFileError):
        read_image(tmp_path)


def test_a_file_without_preamble_and_meta_header_is_read(tmp_path, make_ct_slice):
    stored = np.arange(120, dtype=np.uint16).reshape(10, 12)
    dataset = make_ct_slice(stored)
    del dataset.file_meta
    pydicom.dcmwrite(tmp_path / "old.ima", dataset, implicit_vr=True, little_endian=True)
    image = read_image(tmp_path / "old.ima")
    np.testing.assert_array_equal(image.pixels[0].numpy(), stored - 1024.0)


# --- real scans ---

DATA = os.environ.get("MEDSSL_DATA")
needs_data = pytest.mark.skipif(not DATA, reason="MEDSSL_DATA is not set")


@needs_data
def test_the_first_volume_of_a_real_scan_equals_its_nifti_reference(tmp_path):
    import nibabel

    root = Path(DATA or "") / "dicom-mr-ge-siemens"
    files = sorted((root / "dicom/20180918GE/mr_0004").glob("*.dcm"))
    by_number = {int(pydicom.dcmread(file).InstanceNumber): file for file in files}
    for number in range(1, 16):
        (tmp_path / f"{number}.dcm").symlink_to(by_number[number])
    image = read_image(tmp_path)
    reference = nibabel.load(root / "ref" / "DCM2NIIX_regression_test_4.nii.gz").slicer[..., 0]
    reference = nibabel.as_closest_canonical(reference)
    ours = nibabel.Nifti1Image(image.pixels[0].numpy().T, image.affine[:, [2, 1, 0, 3]].numpy())
    ours = nibabel.as_closest_canonical(ours)
    np.testing.assert_allclose(ours.affine, reference.affine, atol=1e-3)
    np.testing.assert_array_equal(ours.get_fdata(), reference.get_fdata())
