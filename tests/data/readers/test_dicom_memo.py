"""Headers are read once, and again where a file has changed."""

import numpy as np
import pytest

from medssl.data.readers import dicom_find, dicom_memo
from medssl.data.readers.any import read_image
from medssl.data.readers.dicom_find import scan


@pytest.fixture(autouse=True)
def _nothing_remembered():
    dicom_memo.forget()
    yield
    dicom_memo.forget()


def test_a_second_look_reads_no_header(tmp_path, write_ct_series, monkeypatch):
    write_ct_series(tmp_path / "s")
    first = scan((tmp_path / "s").iterdir())
    monkeypatch.setattr(dicom_find, "read_headers", None)
    monkeypatch.setattr(dicom_find, "headers_of", None)
    assert scan((tmp_path / "s").iterdir()) == first
    assert read_image(tmp_path / "s").spatial_shape == (6, 10, 12)


def test_a_changed_file_is_read_again(tmp_path, make_ct_slice, save_dicom):
    dataset = make_ct_slice(np.zeros((4, 5), np.uint16))
    save_dicom(dataset, tmp_path / "a.dcm")
    assert read_image(tmp_path / "a.dcm").spacing == pytest.approx((0.5, 0.8))
    dataset.PixelSpacing = [0.25, 0.75]
    save_dicom(dataset, tmp_path / "a.dcm")
    assert read_image(tmp_path / "a.dcm").spacing == pytest.approx((0.25, 0.75))


def test_headers_of_other_processes_are_taken_and_the_oldest_forgotten(
    tmp_path, write_ct_series, monkeypatch
):
    write_ct_series(tmp_path / "s")
    files = sorted((tmp_path / "s").iterdir())
    (tmp_path / "s" / "notes.txt").write_text("no image")
    found = dicom_memo.headers_of_files([*files, tmp_path / "s" / "notes.txt", tmp_path / "gone"])
    assert [key[0] for key in found] == [str(file) for file in files]
    monkeypatch.setattr(dicom_memo, "_MOST_FRAMES", 4)
    dicom_memo.remember(found)
    known = [dicom_find.is_known(file) for file in files]
    assert known == [False, False, True, True, True, True]


def test_reading_headers_imports_no_torch():
    import subprocess
    import sys

    code = "import medssl.data.readers.dicom_memo, sys; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


@pytest.mark.parametrize(("modality", "inverted"), [("DX", True), ("CT", False)])
def test_an_inverse_presentation_is_inverted_where_values_measure_nothing(
    tmp_path, make_ct_slice, save_dicom, modality, inverted
):
    stored = np.arange(20, dtype=np.uint16).reshape(4, 5)
    dataset = make_ct_slice(
        stored,
        Modality=modality,
        PresentationLUTShape="INVERSE",
        BitsStored=12,
        HighBit=11,
        RescaleIntercept=0,
    )
    save_dicom(dataset, tmp_path / "a.dcm")
    image = read_image(tmp_path / "a.dcm")
    np.testing.assert_array_equal(image.pixels[0].numpy(), 4095 - stored if inverted else stored)
    assert image.provenance.get("inverted", False) is inverted
