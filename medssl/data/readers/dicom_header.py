"""What the header of one DICOM file says, without its pixels (PS3.3, PS3.6)."""

import io
from collections.abc import Set
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, BinaryIO

from medssl.data.modality import Modality, from_dicom
from medssl.data.readers.dicom_elements import Elements
from medssl.data.readers.dicom_frames import (
    STACK,
    TAGS,
    Frame,
    frames,
    kind_of,
    segment_of,
    transformation,
    ultrasound_regions,
)
from medssl.data.readers.doubts import hearing
from medssl.data.readers.errors import (
    CorruptFileError,
    InconsistentGeometryError,
    NotDicomError,
    ReadError,
    TruncatedPixelDataError,
    UnsupportedFormatError,
)
from medssl.data.readers.stored import decoding, read_bytes, unzipped

QUANTITATIVE = frozenset({Modality.CT, Modality.MR, Modality.PT, Modality.NM})
DIRECTORY = "1.2.840.10008.1.3.10"  # Media Storage Directory Storage: a DICOMDIR
_NOT_IMAGES = frozenset({"SEG", "RTDOSE", "RTSTRUCT", "RTPLAN", "PR", "SR", "KO", "REG", "AU"})
_TAGS = [
    "SpecificCharacterSet",
    "SOPClassUID",
    "SOPInstanceUID",
    "InstanceNumber",
    "NumberOfTemporalPositions",
    "Modality",
    "ImageType",
    "StudyInstanceUID",
    "SeriesInstanceUID",
    "PatientID",
    "Rows",
    "Columns",
    "SamplesPerPixel",
    "NumberOfFrames",
    "PhotometricInterpretation",
    "PixelRepresentation",
    "ImagePositionPatient",
    "ImageOrientationPatient",
    "PixelSpacing",
    "ImagerPixelSpacing",
    "SliceThickness",
    "ModalityLUTSequence",
    "RescaleType",
    "RescaleSlope",
    "RescaleIntercept",
    "PresentationLUTShape",
    "BurnedInAnnotation",
    "BodyPartExamined",
    *TAGS,
    *STACK,
]
_MAY_SHOW_TEXT = frozenset({"US", "XA", "RF", "SC", "OT", "ES", "XC"})
_HEAD = ("HEAD", "BRAIN", "SKULL", "FACE", "ORBIT", "SINUS", "JAW", "WHOLEBODY")
_COMPONENTS = frozenset(
    {"M", "P", "R", "I", "MAGNITUDE", "PHASE", "REAL", "IMAGINARY", "PHASE MAP", "ADC", "FA"}
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Header:
    """One frame of an image object, by its header; numbers as written, None where absent.

    orientation: direction cosines (LPS) of a row, then of a column. position: mm (LPS) of the
        first pixel. pixel_spacing: mm between rows, then between columns.
    localizer: a scout, which is never part of a volume.
    component: what was computed from the signal (magnitude, phase, ...), or the segment that is
        marked; one volume has one.
    instance_number: of this object in its series, a label that nobody guarantees.
    num_times: how many volumes over time the series announces.
    frame, tile, stack, taken_s, cine_s: as of `dicom_frames.Frame`.
    burned_in_text, shows_head: as of `Series`; by the header's own word or by modality.
    ultrasound_regions: (x0, y0, x1, y1) in pixels, both ends included.
    doubts: what pydicom warned of, as of `doubts.hearing`.
    problem: why the pixels of this object cannot be read, known from the header alone.
    """

    path: Path = field(repr=False)
    frame: int
    tile: tuple[int, int] | None
    instance_uid: str = field(repr=False)
    series_uid: str = field(repr=False)
    study_uid: str = field(repr=False)
    patient_id: str = field(repr=False)
    modality: Modality
    shape: tuple[int, int]
    color: bool
    transfer_syntax: str
    orientation: tuple[float, ...] | None
    position: tuple[float, ...] | None
    pixel_spacing: tuple[float, ...] | None
    thickness: float | None
    localizer: bool
    component: frozenset[str]
    instance_number: int | None
    num_times: int | None
    stack: tuple[str, ...]
    taken_s: float | None
    cine_s: float | None
    burned_in_text: str | None
    shows_head: bool
    ultrasound_regions: tuple[tuple[int, ...], ...]
    doubts: frozenset[str] = frozenset()
    problem: ReadError | None


def is_dicom(start: bytes) -> bool:
    """Whether bytes begin a DICOM file, with the preamble or (old files) without."""
    if start[128:132] == b"DICM":
        return True
    # without a preamble: group 0002 or 0008, little endian, with a small element number first
    return start[:2] in (b"\x02\x00", b"\x08\x00") and start[2:4] in (
        b"\x00\x00", b"\x01\x00", b"\x05\x00", b"\x08\x00", b"\x16\x00", b"\x18\x00"
    )  # fmt: skip


def parse(source: Path | BinaryIO, *, header_only: bool) -> Any:
    """pydicom's dataset. Raises NotDicomError and CorruptFileError."""
    import pydicom

    tags: Any = _TAGS if header_only else None
    with decoding("the DICOM header"):
        dataset = pydicom.dcmread(
            source, force=True, stop_before_pixels=header_only, specific_tags=tags
        )
    kind = dataset.file_meta.get("MediaStorageSOPClassUID", "")
    empty = "SOPClassUID" not in dataset and "Rows" not in dataset  # pydicom's at an early end
    if empty and kind != DIRECTORY:
        if not header_only:
            raise TruncatedPixelDataError("the file ends inside its pixel data; copy it again")
        if dataset.preamble is None:
            raise NotDicomError("the file looked like DICOM and is not; remove it")
        raise CorruptFileError("the DICOM header is cut off; copy the file again")
    if not dataset.file_meta.get("TransferSyntaxUID"):  # old files without a meta header
        implicit, _ = dataset.original_encoding
        dataset.file_meta.TransferSyntaxUID = (
            pydicom.uid.ImplicitVRLittleEndian if implicit else pydicom.uid.ExplicitVRLittleEndian
        )
    return dataset


@decoding("the DICOM header")
def read_headers(path: Path, *, any_object: bool = False, zipped: bool = False) -> list[Header]:
    """The frames of an image object; none for objects without an image (reports, plans, ...).

    any_object: pixels of any kind are an image, also those of segmentations and doses.
    zipped: the file is gzipped.
    """
    source = io.BytesIO(unzipped(read_bytes(path))) if zipped else path
    with hearing() as doubts:
        dataset = Elements(parse(source, header_only=True))
    return headers_of(path, dataset, doubts, any_object=any_object)


@decoding("the DICOM header")
def headers_of(
    path: Path, dataset: Elements, doubts: Set[str], *, any_object: bool = False
) -> list[Header]:
    """As `read_headers`, of an object whose parsing left some doubts."""
    with hearing() as others:
        found = _headers_of(path, dataset, any_object)
    if doubts or others:
        found = [replace(header, doubts=frozenset(doubts | others)) for header in found]
    return found


def _headers_of(path: Path, dataset: Elements, any_object: bool) -> list[Header]:
    code = str(dataset.get("Modality", "") or "")
    if "Rows" not in dataset or (code in _NOT_IMAGES and not any_object):
        return []
    try:
        found, problem = frames(dataset), None
    except ReadError as error:
        found, problem = [_NO_FRAME], error
    return [_header(path, dataset, code, frame, problem) for frame in found]


_NO_FRAME = Frame(
    orientation=None, position=None, spacing=None, thickness=None, stack=("",), taken_s=None
)


def is_quantitative(dataset: Any) -> bool:
    """Whether the stored values measure something, so that MONOCHROME1 must not invert them."""
    return from_dicom(str(dataset.get("Modality", "") or "")) in QUANTITATIVE


def is_color(dataset: Any) -> bool:
    """Whether a pixel has three values, as stored or through a palette."""
    palette = dataset.get("PhotometricInterpretation") == "PALETTE COLOR"
    return palette or int(dataset.get("SamplesPerPixel", 1) or 1) > 1


def _header(
    path: Path, dataset: Elements, code: str, frame: Frame, problem: ReadError | None
) -> Header:
    color, modality, kind = is_color(dataset), from_dicom(code), kind_of(dataset)
    return Header(
        path=path,
        frame=frame.index,
        tile=frame.tile,
        instance_uid=str(dataset.get("SOPInstanceUID", "")),
        series_uid=str(dataset.get("SeriesInstanceUID", "")),
        study_uid=str(dataset.get("StudyInstanceUID", "")),
        patient_id=str(dataset.get("PatientID", "") or ""),
        modality=Modality.OTHER if color and modality in QUANTITATIVE else modality,
        shape=frame.tile or (int(dataset.get("Rows")), int(dataset.get("Columns"))),
        color=color,
        transfer_syntax=dataset.transfer_syntax,
        orientation=frame.orientation,
        position=frame.position,
        pixel_spacing=frame.spacing,
        thickness=frame.thickness,
        localizer="LOCALIZER" in kind,
        component=_COMPONENTS.intersection(kind[2:]) | {segment_of(dataset, frame.index)},
        instance_number=_whole(dataset, "InstanceNumber"),
        num_times=_whole(dataset, "NumberOfTemporalPositions"),
        stack=frame.stack,
        taken_s=frame.taken_s,
        cine_s=frame.cine_s,
        burned_in_text=_burned_in_text(dataset, code),
        shows_head=_shows_head(dataset, code),
        ultrasound_regions=ultrasound_regions(dataset) if code == "US" else (),
        problem=problem or _problem(dataset, modality, frame),
    )


def _problem(dataset: Any, modality: Modality, frame: Frame) -> ReadError | None:
    rescale = transformation(dataset, frame.index)
    unit = str(rescale.get("RescaleType", "") or "HU").upper()
    table = dataset.get("ModalityLUTSequence")
    if modality is Modality.CT and table and str(table[0].get("ModalityLUTType")) != "HU":
        return UnsupportedFormatError("a CT whose modality table is not in HU is not supported")
    if modality is Modality.CT and not is_color(dataset) and not table:
        if unit not in ("HU", "US"):
            return UnsupportedFormatError("a CT whose rescale type is not HU is not supported")
        if rescale.get("RescaleSlope") is None or rescale.get("RescaleIntercept") is None:
            return UnsupportedFormatError(
                "a CT without rescale slope and intercept has no Hounsfield units"
            )
    if (frame.position is None) != (frame.orientation is None):
        return InconsistentGeometryError(
            "the header has only one of image position and image orientation; correct it"
        )
    return None


def _burned_in_text(dataset: Any, code: str) -> str | None:
    """Headers cannot prove its absence, except by saying so."""
    said = str(dataset.get("BurnedInAnnotation") or "").upper()
    if said in ("YES", "NO"):
        return "declared" if said == "YES" else None
    return "possible" if code in _MAY_SHOW_TEXT else None


def _shows_head(dataset: Any, code: str) -> bool:
    part = str(dataset.get("BodyPartExamined") or "").upper().replace(" ", "")
    return code in ("CT", "MR", "PT") and part.startswith(_HEAD)


def _whole(dataset: Any, name: str) -> int | None:
    value = dataset.get(name)
    return None if value is None or value == "" else int(value)
