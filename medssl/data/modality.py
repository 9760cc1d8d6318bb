"""How a picture was made, in DICOM's words where DICOM has one."""

from enum import StrEnum


class Modality(StrEnum):
    """What the numbers of an image mean.

    CT is in Hounsfield units; MR, PT, NM and US in the stored unit after the modality transform;
    XR joins the projection radiographs (CR, DX, MG, RF, XA); PICTURE is a photograph or any
    picture file; UNKNOWN is a volume whose header does not say (NIfTI has no such field).
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
