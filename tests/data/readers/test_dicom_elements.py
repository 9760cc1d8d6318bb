"""Values by `Elements` against pydicom's own, over the files that pydicom ships."""

from pathlib import Path

import numpy as np
import pydicom
import pytest

from medssl.data.readers.dicom_elements import Elements
from medssl.data.readers.dicom_header import _TAGS

ROOT = Path(pydicom.__file__).parent / "data" / "test_files"


@pytest.mark.filterwarnings("ignore")
def test_every_value_is_what_pydicom_says():
    compared = 0
    for file in sorted(file for file in ROOT.rglob("*") if file.suffix in ("", ".dcm")):
        if not file.is_file():
            continue
        mine, theirs = (pydicom.dcmread(file, force=True) for _ in range(2))
        for name in _TAGS:
            if name not in theirs:
                assert Elements(mine).get(name, "absent") == "absent"
                continue
            expected = theirs[name].value
            assert Elements(mine).get(name) == expected, (file.name, name)
            compared += 1
    assert compared > 1000


def test_a_value_is_that_of_its_own_file_whatever_was_read_before(make_ct_slice, tmp_path):
    found = []
    for index, spacing in enumerate(([0.5, 0.8], [0.5, 0.9], [0.5, 0.8])):
        dataset = make_ct_slice(np.zeros((4, 4), np.uint16), PixelSpacing=spacing)
        dataset.save_as(tmp_path / f"{index}.dcm", enforce_file_format=True)
        parsed = pydicom.dcmread(tmp_path / f"{index}.dcm")
        found.append([float(number) for number in Elements(parsed).get("PixelSpacing")])
    assert found == [[0.5, 0.8], [0.5, 0.9], [0.5, 0.8]]


def test_an_absent_value_is_what_was_asked_for_instead():
    dataset = pydicom.Dataset()
    dataset.Rows = 5
    elements = Elements(dataset)
    assert elements.get("Rows") == 5
    assert elements.get("Columns") is None
    assert elements.get("Columns", 7) == 7
    assert "Rows" in elements
    assert "Columns" not in elements
