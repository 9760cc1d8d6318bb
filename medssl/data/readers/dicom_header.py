"""What the header of one DICOM file says, without its pixels (PS3.3, PS3.6)."""

import io
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from medssl.data.modality import Modality, from_dicom
from medssl.data.readers.errors import (
    CorruptFileError,
    InconsistentGeometryError,
    NotDicomError,
    ReadError,
    TruncatedPixelDataError,
    UnsupportedFormatError,
)
from medssl.data.readers.stored import decoding

QUANTITATIVE = frozenset({Modality.CT, Modality.MR, Modality.PT, Modality.NM})
_NOT_IMAGES = frozenset({"SEG", "RTDOSE", "RTSTRUCT", "RTPLAN", "PR", "SR", "KO", "REG", "AU"})
_TAGS = [
    "SpecificCharacterSet",
    "SOPClassUID",
    "SOPInstanceUID",
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
    "SharedFunctionalGroupsSequence",
]
_STACK = ["EchoTime", "AcquisitionNumber", "TemporalPositionIdentifier", "DiffusionBValue"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Header:
    """One image object's header; numbers as written, None where absent.

    orientation: direction cosines (LPS) of a row, then of a column. position: mm (LPS) of the
        first pixel. pixel_spacing: mm between rows, then between columns.
    localizer: a scout, which is never part of a volume.
    stack: values that tell volumes of one series apart (echo time, acquisition, time, b-value).
    problem: why the pixels of this object cannot be read, known from the header alone.
    """

    path: Path = field(repr=False)
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
    stack: tuple[str, ...]
    problem: ReadError | None


def is_dicom(start: bytes) -> bool:
    """Whether bytes begin a DICOM file, with the preamble or (old files) without."""
    if start[128:132] == b"DICM":
        return True
    # without a preamble: group 0002 or 0008, little endian, with a small element number first
    return start[:2] in (b"\x02\x00", b"\x08\x00") and start[2:4] in (
        b"\x00\x00", b"\x01\x00", b"\x05\x00", b"\x08\x00", b"\x16\x00", b"\x18\x00"
    )  # fmt: skip


def parse(source: Path | io.BytesIO, *, header_only: bool) -> Any:
    """pydicom's dataset. Raises NotDicomError and CorruptFileError."""
    import pydicom

    tags = _TAGS + _STACK if header_only else None
    with decoding("the DICOM header"):
        dataset = pydicom.dcmread(
            source, force=True, stop_before_pixels=header_only, specific_tags=tags
        )
    if "SOPClassUID" not in dataset and "Rows" not in dataset:  # pydicom drops all at an early end
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


@contextmanager
def quiet() -> Iterator[None]:
    """Without pydicom's warnings, which quote header values and paths."""
    logging.getLogger("pydicom").propagate = False
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@quiet()
@decoding("the DICOM header")
def read_header(path: Path) -> Header | None:
    """The header of an image object; None for objects without an image (reports, plans, ...)."""
    dataset = parse(path, header_only=True)
    code = str(dataset.get("Modality", "") or "")
    if code in _NOT_IMAGES or "Rows" not in dataset:
        return None
    return _header(path, dataset, code)


def is_quantitative(dataset: Any) -> bool:
    """Whether the stored values measure something, so that MONOCHROME1 must not invert them."""
    return from_dicom(str(dataset.get("Modality", "") or "")) in QUANTITATIVE


def _header(path: Path, dataset: Any, code: str) -> Header:
    color = int(dataset.get("SamplesPerPixel", 1) or 1) > 1
    modality = from_dicom(code)
    imager = _floats(dataset, "ImagerPixelSpacing", 2)
    return Header(
        path=path,
        instance_uid=str(dataset.get("SOPInstanceUID", "")),
        series_uid=str(dataset.get("SeriesInstanceUID", "")),
        study_uid=str(dataset.get("StudyInstanceUID", "")),
        patient_id=str(dataset.get("PatientID", "") or ""),
        modality=Modality.OTHER if color and modality in QUANTITATIVE else modality,
        shape=(int(dataset.Rows), int(dataset.Columns)),
        color=color,
        transfer_syntax=str(dataset.file_meta.TransferSyntaxUID.name),
        orientation=_floats(dataset, "ImageOrientationPatient", 6),
        position=_floats(dataset, "ImagePositionPatient", 3),
        pixel_spacing=_floats(dataset, "PixelSpacing", 2) or imager,
        thickness=next(iter(_floats(dataset, "SliceThickness", 1) or ()), None),
        localizer="LOCALIZER" in _kind(dataset),
        stack=tuple(str(dataset.get(name, "")) for name in _STACK),
        problem=_problem(dataset, modality, color),
    )


def _problem(dataset: Any, modality: Modality, color: bool) -> ReadError | None:
    if (
        int(dataset.get("NumberOfFrames", 1) or 1) > 1
        or "SharedFunctionalGroupsSequence" in dataset
    ):
        return UnsupportedFormatError(
            "multi-frame and enhanced DICOM are not supported yet; convert it to one slice per file"
        )
    if "MOSAIC" in _kind(dataset):
        return UnsupportedFormatError(
            "a mosaic holds a whole volume in tiles and is not supported yet; convert it to NIfTI"
        )
    if dataset.get("ModalityLUTSequence"):
        return UnsupportedFormatError("a Modality LUT sequence is not supported yet")
    unit = str(dataset.get("RescaleType", "") or "HU").upper()
    if modality is Modality.CT and not color:
        if unit not in ("HU", "US"):
            return UnsupportedFormatError("a CT whose rescale type is not HU is not supported")
        if dataset.get("RescaleSlope") is None or dataset.get("RescaleIntercept") is None:
            return UnsupportedFormatError(
                "a CT without rescale slope and intercept has no Hounsfield units"
            )
    if ("ImagePositionPatient" in dataset) != ("ImageOrientationPatient" in dataset):
        return InconsistentGeometryError(
            "the header has only one of image position and image orientation; correct it"
        )
    return None


def _kind(dataset: Any) -> list[str]:
    value = dataset.get("ImageType") or ()
    return [part.upper() for part in ([value] if isinstance(value, str) else value)]


def _floats(dataset: Any, name: str, count: int) -> tuple[float, ...] | None:
    value = dataset.get(name)
    if value is None or value == "":
        return None
    values = tuple(float(part) for part in (value if count > 1 else [value]))
    if len(values) != count:
        raise ValueError(f"{name} needs {count} numbers, got {len(values)}")
    return values
