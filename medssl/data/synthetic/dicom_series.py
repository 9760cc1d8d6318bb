"""A CT volume as the files a scanner would send: one DICOM object per slice, in no order."""

import hashlib
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.encaps import encapsulate
from pydicom.uid import (
    UID,
    CTImageStorage,
    ExplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGLSLossless,
    generate_uid,
)
from pydicom.valuerep import format_number_as_ds

from medssl.data.image import Image

Syntax = Literal["uncompressed", "jpeg_ls", "jpeg_2000"]
Stored = Literal["unsigned12", "signed16"]

_TRANSFER_SYNTAXES: dict[Syntax, UID] = {
    "uncompressed": ExplicitVRLittleEndian,
    "jpeg_ls": JPEGLSLossless,
    "jpeg_2000": JPEG2000Lossless,
}
_INTERCEPT_HU = {"unsigned12": -1024, "signed16": 0}


def write_dicom_series(
    image: Image,
    folder: Path,
    *,
    name: str,
    syntax: Syntax = "uncompressed",
    stored: Stored = "unsigned12",
) -> None:
    """Write a CT volume of whole HU into `folder` (made if missing), one file per slice.

    name: makes the identifiers; equal names give equal UIDs, so one name per study.
    syntax: of the pixel data; both compressed ones are lossless and need "unsigned12".
    stored: 12 unsigned bits with intercept -1024 (-1024 to 3071 HU), or 16 signed with intercept 0.
    Files are named by a hash, so their order says nothing. Raises ValueError for anything but a
    (1, D, H, W) CT volume in the patient frame, and for HU that the stored type cannot hold.
    """
    if image.axes != "DHW" or image.frame != "patient" or image.modality != "CT":
        raise ValueError(
            f"a DICOM CT series needs a DHW CT volume in the patient frame, got {image.axes} "
            f"{image.modality} in the {image.frame} frame"
        )
    if syntax != "uncompressed" and stored != "unsigned12":
        raise ValueError(f"{syntax} is written with stored='unsigned12' only, got {stored!r}")
    voxels = _stored_values(image.pixels[0].numpy(), stored)
    folder.mkdir(parents=True, exist_ok=True)
    dataset = _series_header(image, name, syntax, stored)
    for index, values in enumerate(voxels):
        uid = _uid(name, f"slice {index}")
        _place_slice(dataset, image, index, uid)
        dataset.add_new(0x7FE00010, "OW", values.tobytes())
        if syntax != "uncompressed":
            dataset.add_new(0x7FE00010, "OB", encapsulate([_encoded(values, syntax)]))
            dataset["PixelData"].is_undefined_length = True
        file = f"{hashlib.sha256(uid.encode()).hexdigest()[:12]}.dcm"
        dataset.save_as(folder / file, enforce_file_format=True)


def _stored_values(hu: NDArray[np.float32], stored: Stored) -> NDArray[Any]:
    """HU (D, H, W) as the stored integers."""
    values = np.rint(hu).astype(np.int32) - _INTERCEPT_HU[stored]
    low, high = (0, 4095) if stored == "unsigned12" else (-32768, 32767)
    if values.min() < low or values.max() > high:
        raise ValueError(
            f"{stored} holds {low} to {high}, got {values.min()} to {values.max()}; clip the HU"
        )
    return values.astype("<u2" if stored == "unsigned12" else "<i2")


def _encoded(values: NDArray[np.uint16], syntax: Syntax) -> bytes:
    """One slice (H, W) as a lossless codestream."""
    if syntax == "jpeg_ls":
        import jpeg_ls  # type: ignore[import-untyped]

        height, width = values.shape
        return bytes(
            jpeg_ls.encode_pixel_data(
                values.tobytes(), rows=height, columns=width, samples_per_pixel=1, bits_stored=12
            )
        )
    from openjpeg.utils import encode_array

    return bytes(encode_array(values, bits_stored=12, photometric_interpretation=2))


def _series_header(image: Image, name: str, syntax: Syntax, stored: Stored) -> Dataset:
    """Everything the slices of one series share. All names and dates are made up."""
    assert image.spacing is not None
    dataset = Dataset()
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.MediaStorageSOPClassUID = CTImageStorage
    dataset.file_meta.TransferSyntaxUID = _TRANSFER_SYNTAXES[syntax]
    between, row, column = image.spacing
    signed = stored == "signed16"
    fields: dict[str, Any] = {
        "SpecificCharacterSet": "ISO_IR 100",
        "ImageType": ["ORIGINAL", "PRIMARY", "AXIAL"],
        "SOPClassUID": CTImageStorage,
        "Modality": "CT",
        "Manufacturer": "medssl phantom",
        "PatientName": f"Phantom^{name}",
        "PatientID": f"PHANTOM-{name}",
        "StudyInstanceUID": _uid(name, "study"),
        "SeriesInstanceUID": _uid(name, "series"),
        "FrameOfReferenceUID": _uid(name, "frame of reference"),
        "StudyID": "1",
        "SeriesNumber": 2,
        "AcquisitionNumber": 1,
        "PatientPosition": "HFS",
        "KVP": "120",
        "SamplesPerPixel": 1,
        "PhotometricInterpretation": "MONOCHROME2",
        "Rows": image.spatial_shape[1],
        "Columns": image.spatial_shape[2],
        "PixelSpacing": _decimals((row, column)),
        "SliceThickness": _decimals((between,))[0],
        "SpacingBetweenSlices": _decimals((between,))[0],
        "BitsAllocated": 16,
        "BitsStored": 16 if signed else 12,
        "HighBit": 15 if signed else 11,
        "PixelRepresentation": int(signed),
        "RescaleIntercept": str(_INTERCEPT_HU[stored]),
        "RescaleSlope": "1",
        "RescaleType": "HU",
        "WindowCenter": "40",
        "WindowWidth": "80",
    }
    empty = (
        "StudyDate StudyTime AccessionNumber ReferringPhysicianName PatientBirthDate PatientSex "
        "PositionReferenceIndicator"
    )
    for keyword, value in {**fields, **dict.fromkeys(empty.split(), "")}.items():
        setattr(dataset, keyword, value)
    return dataset


def _place_slice(dataset: Dataset, image: Image, index: int, uid: UID) -> None:
    """Identity, position and orientation of a slice, in DICOM's LPS+ mm."""
    affine = np.diag([-1.0, -1.0, 1.0, 1.0]) @ image.affine.numpy()
    along_row = affine[:3, 2] / np.linalg.norm(affine[:3, 2])  # as the column index grows
    along_column = affine[:3, 1] / np.linalg.norm(affine[:3, 1])
    dataset.SOPInstanceUID = uid
    dataset.file_meta.MediaStorageSOPInstanceUID = uid
    dataset.InstanceNumber = index + 1
    dataset.ImageOrientationPatient = _decimals((*along_row, *along_column))
    dataset.ImagePositionPatient = _decimals(affine[:3] @ (index, 0.0, 0.0, 1.0))


def _decimals(values: Any) -> list[str]:
    """Decimal strings of at most 16 characters, as the standard wants them."""
    return [format_number_as_ds(float(value)) for value in values]


def _uid(name: str, use: str) -> UID:
    return generate_uid(entropy_srcs=["medssl phantom", name, use])
