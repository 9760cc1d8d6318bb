"""How a picture was made, in DICOM's words where DICOM has one.

The modality comes from the header, or from whoever makes the `Image`; it is never guessed from
pixels. What it decides about intensities is in `medssl.data.preprocess`.
"""

from enum import StrEnum


class Modality(StrEnum):
    """What the numbers of an image mean.

    CT is in Hounsfield units; MR, PT, NM and US in the stored unit after the modality transform;
    XR joins the projection radiographs (CR, DX, MG, RF, XA), which the DICOM reader gives in one
    polarity, dense is bright: MONOCHROME1 and a PresentationLUTShape of INVERSE are inverted;
    PICTURE is a photograph or any picture file; DEPTH is what a depth camera measures, distances or
    xyz in the sensor's frame; UNKNOWN is a volume whose header does not say (NIfTI has no such
    field).
    """

    CT = "CT"
    MR = "MR"
    PT = "PT"
    NM = "NM"
    US = "US"
    XR = "XR"
    PICTURE = "PICTURE"
    DEPTH = "DEPTH"
    OTHER = "OTHER"
    UNKNOWN = "UNKNOWN"


_PROJECTION = {"CR", "DX", "MG", "RF", "XA", "IO", "PX"}


def from_dicom(code: str) -> Modality:
    """The modality of a DICOM Modality (0008,0060) code; OTHER where we have no word for it."""
    if code in _PROJECTION:
        return Modality.XR
    return Modality(code) if code in {"CT", "MR", "PT", "NM", "US"} else Modality.OTHER


CT_WINDOWS: dict[str, tuple[float, float]] = {
    "brain": (40.0, 80.0),
    "stroke": (40.0, 40.0),
    "subdural": (75.0, 215.0),
    "temporal_bone": (600.0, 2800.0),
    "bone": (400.0, 1800.0),
    "soft_tissue": (50.0, 400.0),
    "mediastinum": (50.0, 350.0),
    "lung": (-600.0, 1500.0),
    "abdomen": (50.0, 400.0),
    "liver": (30.0, 150.0),
}
"""Centre and width in HU by the name radiologists use (Radiopaedia, "Windowing (CT)")."""


def ct_window(window: str | tuple[float, float]) -> tuple[float, float]:
    """Centre and width in HU of a name in `CT_WINDOWS`; numbers stay as they are."""
    if not isinstance(window, str):
        return window
    if window not in CT_WINDOWS:
        raise ValueError(f"no CT window is called {window!r}; there are {', '.join(CT_WINDOWS)}")
    return CT_WINDOWS[window]
