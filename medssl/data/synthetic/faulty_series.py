"""Small CT series with one fault each, as scanners and archives make them, and the truth."""

import copy
import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.sequence import Sequence as Items
from pydicom.uid import (
    CTImageStorage,
    EnhancedCTImageStorage,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    generate_uid,
)

SPACING = (2.0, 0.5, 0.8)  # mm between slices, rows and columns
ORIGIN = (-50.0, -60.0, 70.0)  # LPS mm of the first voxel
TILT_DEG = 15.0
AXIAL, SAGITTAL = (1, 0, 0, 0, 1, 0), (0, 1, 0, 0, 0, -1)

Series = list[Dataset]
Fault = Callable[[Series], Series]


def true_hu() -> NDArray[np.int16]:
    """(8, 12, 10): every voxel different, from -1000 HU on, bottom slice first."""
    return np.arange(960, dtype=np.int16).reshape(8, 12, 10) - 1000


def clean(name: str = "clean", orientation: tuple[int, ...] = AXIAL) -> Series:
    """One object per slice of `true_hu`, stored with intercept -1024. name: makes the UIDs."""
    cosines = np.array(orientation, dtype=float).reshape(2, 3)
    normal = np.cross(cosines[0], cosines[1])
    series = []
    for index, plane in enumerate(true_hu()):
        position = np.array(ORIGIN) + normal * SPACING[0] * index
        series.append(_slice(plane, index, tuple(position), orientation, name))
    return series


def write_series(folder: Path, fault: str = "clean", name: str = "case") -> None:
    """Write a series with a fault of `FAULTS` into `folder`, made if missing.

    Files are numbered in an order that says nothing of the slices'. Equal arguments give equal
    files. Raises ValueError for a fault that is none.
    """
    if fault not in FAULTS:
        raise ValueError(f"fault must be one of {', '.join(FAULTS)}; got {fault!r}")
    folder.mkdir(parents=True, exist_ok=True)
    series = FAULTS[fault](clean(name))
    numbers = np.random.default_rng(0).permutation(len(series))
    for number, dataset in zip(numbers, series, strict=True):
        (folder / f"{number:03}").write_bytes(as_file(dataset))
    if fault == "one_truncated_file":
        file = folder / f"{numbers[3]:03}"
        file.write_bytes(file.read_bytes()[:-60])
    if fault == "other_files":
        (folder / "README.txt").write_text("Scanned on a Tuesday.")
        (folder / "DICOMDIR").write_text("This is no directory.")


def as_file(dataset: Dataset) -> bytes:
    """The bytes of a conforming file; without preamble and meta header where it has no meta."""
    buffer = io.BytesIO()
    if not dataset.file_meta:
        dataset.save_as(buffer, implicit_vr=True, little_endian=True)
    else:
        dataset.save_as(buffer, enforce_file_format=True)
    return buffer.getvalue()


def _slice(
    hu: NDArray, index: int, position: tuple[float, ...], orientation: tuple[int, ...], name: str
) -> Dataset:
    uid = generate_uid(entropy_srcs=["medssl faulty", name, f"slice {index}"])
    dataset = Dataset()
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.MediaStorageSOPClassUID = CTImageStorage
    dataset.file_meta.MediaStorageSOPInstanceUID = uid
    dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    dataset.SOPClassUID, dataset.SOPInstanceUID = CTImageStorage, uid
    dataset.StudyInstanceUID = generate_uid(entropy_srcs=["medssl faulty", name, "study"])
    dataset.SeriesInstanceUID = generate_uid(entropy_srcs=["medssl faulty", name, "series"])
    dataset.FrameOfReferenceUID = generate_uid(entropy_srcs=["medssl faulty", name, "frame"])
    dataset.PatientID, dataset.PatientName = f"FAULTY-{name}", f"Faulty^{name}"
    dataset.Modality, dataset.ImageType = "CT", ["ORIGINAL", "PRIMARY", "AXIAL"]
    dataset.InstanceNumber, dataset.AcquisitionNumber = index + 1, 1
    dataset.ImagePositionPatient = [round(float(mm), 6) for mm in position]
    dataset.ImageOrientationPatient = list(orientation)
    dataset.PixelSpacing, dataset.SliceThickness = list(SPACING[1:]), SPACING[0]
    dataset.SamplesPerPixel, dataset.PhotometricInterpretation = 1, "MONOCHROME2"
    dataset.RescaleSlope, dataset.RescaleIntercept, dataset.RescaleType = 1, -1024, "HU"
    dataset.WindowCenter, dataset.WindowWidth = -500, 400
    store(dataset, (hu.astype(np.int32) + 1024).astype(np.uint16))
    return dataset


def store(dataset: Dataset, stored: NDArray) -> None:
    """Put (H, W) or (N, H, W) integers of 16 bits into an object."""
    dataset.Rows, dataset.Columns = stored.shape[-2:]
    dataset.BitsAllocated, dataset.BitsStored, dataset.HighBit = 16, 16, 15
    dataset.PixelRepresentation = int(stored.dtype.kind == "i")
    dataset.add_new(0x7FE00010, "OW", stored.astype(stored.dtype.newbyteorder("<")).tobytes())


def _same(series: Series) -> Series:
    return series


def _reversed_numbers(series: Series) -> Series:
    for number, dataset in enumerate(reversed(series)):
        dataset.InstanceNumber = number + 1
    return series


def _sagittal(series: Series) -> Series:
    return clean("sagittal", SAGITTAL)


def _missing(series: Series) -> Series:
    return series[:3] + series[4:]


def _uneven(series: Series) -> Series:
    series[3].ImagePositionPatient[2] += 0.5
    return series


def _copied(series: Series) -> Series:
    return [*series, copy.deepcopy(series[3])]


def _taken_again(series: Series) -> Series:
    """The fourth slice a second time, later and 100 HU brighter."""
    again = copy.deepcopy(series[3])
    again.SOPInstanceUID = again.file_meta.MediaStorageSOPInstanceUID = generate_uid(
        entropy_srcs=["medssl faulty", "taken again", str(again.SOPInstanceUID)]
    )
    again.InstanceNumber = 99
    store(again, (true_hu()[3] + 1124).astype(np.uint16))
    return [*series, again]


def _tilted(series: Series) -> Series:
    """Each slice shifted along the columns, as a gantry tilt does."""
    shift = SPACING[0] * np.tan(np.deg2rad(TILT_DEG))
    for index, dataset in enumerate(series):
        dataset.ImagePositionPatient[1] = round(ORIGIN[1] + index * shift, 6)
    return series


def _own_rescale(series: Series) -> Series:
    for index, dataset in enumerate(series):
        slope = 1 / (index + 1)
        dataset.RescaleSlope, dataset.RescaleIntercept = f"{slope:.12g}", -1000 - index
        hu = true_hu()[index].astype(np.int64)
        store(dataset, ((hu + 1000 + index) * (index + 1)).astype(np.uint16))
    return series


def _monochrome1(series: Series) -> Series:
    for dataset in series:
        dataset.PhotometricInterpretation = "MONOCHROME1"
    return series


def _signed(series: Series) -> Series:
    for dataset, hu in zip(series, true_hu(), strict=True):
        dataset.RescaleIntercept = 0
        store(dataset, hu)
    return series


def _two_series(series: Series) -> Series:
    return series + clean("another")[:5]


def _localizer(series: Series) -> Series:
    """A scout across the slices, with the series' own UID."""
    scout = copy.deepcopy(series[0])
    scout.SOPInstanceUID = scout.file_meta.MediaStorageSOPInstanceUID = generate_uid(
        entropy_srcs=["medssl faulty", "scout"]
    )
    scout.ImageType = ["ORIGINAL", "PRIMARY", "LOCALIZER"]
    scout.ImageOrientationPatient = list(SAGITTAL)
    return [*series, scout]


def _no_numbers(series: Series) -> Series:
    for dataset in series:
        del dataset.InstanceNumber
    return series


def _other_rows(series: Series) -> Series:
    store(series[3], (true_hu()[3, :10] + 1024).astype(np.uint16))
    return series


def _not_a_number(series: Series) -> Series:
    for dataset in series:
        dataset.add_new("ImagePositionPatient", "DS", ["nan", "0", "0"])
    return series


def _no_orientation(series: Series) -> Series:
    for dataset in series:
        del dataset.ImageOrientationPatient
    return series


def _no_preamble(series: Series) -> Series:
    for dataset in series:
        dataset.file_meta = FileMetaDataset()
    return series


def _big_endian(series: Series) -> Series:
    for dataset, hu in zip(series, true_hu(), strict=True):
        dataset.file_meta.TransferSyntaxUID = ExplicitVRBigEndian
        stored = (hu.astype(np.int32) + 1024).astype(">u2")
        dataset.add_new(0x7FE00010, "OW", stored.tobytes())
    return series


def _single_sagittal(series: Series) -> Series:
    return clean("sagittal", SAGITTAL)[:1]


def _enhanced(series: Series) -> Series:
    """One object with all slices as frames, the last first; rescale in the shared groups."""
    whole = copy.deepcopy(series[0])
    whole.SOPClassUID = whole.file_meta.MediaStorageSOPClassUID = EnhancedCTImageStorage
    for name in (
        *("ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing", "SliceThickness"),
        *("RescaleSlope", "RescaleIntercept", "RescaleType", "WindowCenter", "WindowWidth"),
    ):
        delattr(whole, name)
    frames = series[::-1]
    whole.NumberOfFrames = len(frames)
    shared = Dataset()
    shared.PixelMeasuresSequence = Items([_only(series[0], "PixelSpacing", "SliceThickness")])
    shared.PlaneOrientationSequence = Items([_only(series[0], "ImageOrientationPatient")])
    shared.PixelValueTransformationSequence = Items(
        [_only(series[0], "RescaleSlope", "RescaleIntercept", "RescaleType")]
    )
    whole.SharedFunctionalGroupsSequence = Items([shared])
    whole.PerFrameFunctionalGroupsSequence = Items([_frame(frame) for frame in frames])
    store(whole, (true_hu()[::-1].astype(np.int32) + 1024).astype(np.uint16))
    return [whole]


def _only(dataset: Dataset, *names: str) -> Dataset:
    part = Dataset()
    for name in names:
        part.add(copy.deepcopy(dataset[name]))
    return part


def _frame(dataset: Dataset) -> Dataset:
    groups = Dataset()
    groups.PlanePositionSequence = Items([_only(dataset, "ImagePositionPatient")])
    return groups


FAULTS: dict[str, Fault] = {
    "clean": _same,
    "reversed_instance_numbers": _reversed_numbers,
    "sagittal": _sagittal,
    "one_slice_missing": _missing,
    "uneven_spacing": _uneven,
    "one_slice_copied": _copied,
    "one_slice_taken_again": _taken_again,
    "gantry_tilt": _tilted,
    "rescale_per_slice": _own_rescale,
    "monochrome1": _monochrome1,
    "signed_pixels": _signed,
    "two_series": _two_series,
    "localizer_of_the_same_series": _localizer,
    "no_instance_numbers": _no_numbers,
    "other_files": _same,
    "one_truncated_file": _same,
    "one_slice_of_other_rows": _other_rows,
    "position_not_a_number": _not_a_number,
    "no_orientation": _no_orientation,
    "no_preamble": _no_preamble,
    "big_endian": _big_endian,
    "single_sagittal_slice": _single_sagittal,
    "enhanced_multi_frame": _enhanced,
}
"""Name -> what it does to a clean series; what touches files is done by `write_series`."""
