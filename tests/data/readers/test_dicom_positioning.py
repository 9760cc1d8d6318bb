"""Position, side and view are told in the standard's codes and change no geometry."""

import numpy as np
import pytest
import torch

from medssl.data.readers.any import read_image


@pytest.mark.parametrize("position", ["HFS", "HFP", "FFDR"])
def test_how_the_patient_lay_is_told_and_the_affine_stays(tmp_path, write_ct_series, position):
    write_ct_series(tmp_path / "a", PatientPosition=None)
    write_ct_series(tmp_path / "b", PatientPosition=position)
    plain, lying = read_image(tmp_path / "a"), read_image(tmp_path / "b")
    assert "patient_position" not in plain.provenance
    assert lying.provenance["patient_position"] == position
    assert torch.equal(plain.affine, lying.affine)
    assert torch.equal(plain.pixels, lying.pixels)


@pytest.mark.parametrize(
    ("tags", "told"),
    [
        ({"ImageLaterality": "L", "Laterality": "R"}, {"laterality": "L"}),
        ({"Laterality": "R", "ViewPosition": "PA"}, {"laterality": "R", "view_position": "PA"}),
        ({"PatientOrientation": ["L", "FP"]}, {"patient_orientation": "L\\FP"}),
        ({"ViewPosition": "OF SMITH", "PatientOrientation": ["RALPH", "L"]}, {}),
        ({"PatientOrientation": "L", "Laterality": ""}, {}),
    ],
)
def test_a_radiograph_tells_side_and_view_and_no_other_text(
    tmp_path, make_ct_slice, save_dicom, tags, told
):
    flat = {"ImagePositionPatient": None, "ImageOrientationPatient": None}
    stored = np.arange(120, dtype=np.uint16).reshape(10, 12)
    save_dicom(make_ct_slice(stored, Modality="CR", **flat, **tags), tmp_path / "a.dcm")
    provenance = read_image(tmp_path / "a.dcm").provenance
    names = ("patient_position", "patient_orientation", "laterality", "view_position")
    assert {name: provenance[name] for name in names if name in provenance} == told
