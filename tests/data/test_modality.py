"""Modalities by header code, and CT windows by name."""

import pytest

from medssl.data.modality import CT_WINDOWS, Modality, ct_window, from_dicom


@pytest.mark.parametrize(
    ("code", "modality"),
    [("CT", "CT"), ("DX", "XR"), ("MG", "XR"), ("US", "US"), ("SM", "OTHER"), ("", "OTHER")],
)
def test_the_header_alone_says_the_modality(code, modality):
    assert from_dicom(code) is Modality(modality)


def test_a_window_is_named_or_given():
    assert ct_window("brain") == (40.0, 80.0)
    assert ct_window((35.0, 60.0)) == (35.0, 60.0)


def test_an_unknown_window_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match="no CT window is called 'spleen'") as refused:
        ct_window("spleen")
    assert all(name in str(refused.value) for name in CT_WINDOWS)
