"""Small DICOM series written with pydicom alone, from numbers the tests choose."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest
from pydicom.dataset import FileDataset, FileMetaDataset
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, generate_uid

AXIAL = (1.0, 0.0, 0.0, 0.0, 1.0, 0.0)


def ct_slice(stored: np.ndarray, **changes: Any) -> FileDataset:
    """One slice: stored (H, W) or (H, W, 3) integers; changes: DICOM keywords, None removes one."""
    meta = FileMetaDataset()
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    meta.MediaStorageSOPClassUID = CTImageStorage
    meta.MediaStorageSOPInstanceUID = generate_uid()
    dataset = FileDataset("", {}, file_meta=meta, preamble=b"\0" * 128)
    bits = stored.dtype.itemsize * 8
    values: dict[str, Any] = {
        "SOPClassUID": CTImageStorage,
        "SOPInstanceUID": meta.MediaStorageSOPInstanceUID,
        "StudyInstanceUID": "1.2.3",
        "SeriesInstanceUID": "1.2.3.4",
        "FrameOfReferenceUID": "1.2.3.5",
        "PatientID": "secret-patient",
        "PatientName": "Secret^Patient",
        "Modality": "CT",
        "ImageType": ["ORIGINAL", "PRIMARY", "AXIAL"],
        "Rows": stored.shape[0],
        "Columns": stored.shape[1],
        "SamplesPerPixel": 1 if stored.ndim == 2 else 3,
        "PhotometricInterpretation": "MONOCHROME2" if stored.ndim == 2 else "RGB",
        "BitsAllocated": bits,
        "BitsStored": bits,
        "HighBit": bits - 1,
        "PixelRepresentation": int(stored.dtype.kind == "i"),
        "ImageOrientationPatient": list(AXIAL),
        "ImagePositionPatient": [0.0, 0.0, 0.0],
        "PixelSpacing": [0.5, 0.8],
        "SliceThickness": 2.0,
        "RescaleSlope": 1,
        "RescaleIntercept": -1024,
        "RescaleType": "HU",
    }
    if stored.ndim == 3:
        values["PlanarConfiguration"] = 0
    for keyword, value in {**values, **changes}.items():
        if value is not None:
            setattr(dataset, keyword, value)
    dataset.PixelData = stored.tobytes()
    dataset["PixelData"].VR = "OB" if bits == 8 else "OW"
    return dataset


def stored_volume(depth: int = 6, height: int = 10, width: int = 12) -> np.ndarray:
    """(D, H, W) uint16, every voxel different, below 2^12."""
    return np.arange(depth * height * width, dtype=np.uint16).reshape(depth, height, width)


def write_series(
    folder: Path,
    *,
    stored: np.ndarray | None = None,
    orientation: Sequence[float] = AXIAL,
    origin: Sequence[float] = (-50.0, -60.0, 70.0),
    step: Sequence[float] | None = None,
    change: Callable[[int, FileDataset], None] | None = None,
    **changes: Any,
) -> np.ndarray:
    """A folder of slices, in shuffled file names and instance numbers; returns what is stored.

    step: mm (LPS) from one slice to the next; 2 mm along the normal if None.
    change: called with each slice's index and dataset before it is written.
    """
    stored = stored_volume() if stored is None else stored
    cosines = np.array(orientation).reshape(2, 3)
    vector = 2 * np.cross(*cosines) if step is None else np.array(step)
    names = np.random.default_rng(0).permutation(len(stored))
    folder.mkdir(parents=True, exist_ok=True)
    for index, plane in enumerate(stored):
        dataset = ct_slice(
            plane,
            ImageOrientationPatient=list(orientation),
            ImagePositionPatient=[round(float(x), 6) for x in np.array(origin) + index * vector],
            InstanceNumber=int(names[index]),
            **changes,
        )
        if change is not None:
            change(index, dataset)
        save(dataset, folder / f"{names[index]:03d}.dcm")
    return stored


def save(dataset: FileDataset, file: Path) -> None:
    """Write as a conforming file."""
    pydicom.dcmwrite(file, dataset, enforce_file_format=True)


@pytest.fixture
def write_ct_series() -> Callable[..., np.ndarray]:
    """`write_series`, for tests of other files."""
    return write_series


@pytest.fixture
def make_ct_slice() -> Callable[..., FileDataset]:
    """`ct_slice`, for tests of other files."""
    return ct_slice


@pytest.fixture
def save_dicom() -> Callable[[FileDataset, Path], None]:
    """`save`, for tests of other files."""
    return save
