"""Where and when each frame of one DICOM object was taken (PS3.3 C.7.6.16, C.7.6.5, C.8.8.3)."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from medssl.data.readers.errors import InconsistentGeometryError, UnsupportedFormatError

TAGS = (
    "SharedFunctionalGroupsSequence",
    "PerFrameFunctionalGroupsSequence",
    "GridFrameOffsetVector",
    "FrameTime",
    "FrameTimeVector",
    "CineRate",
    "RecommendedDisplayFrameRate",
    "SequenceOfUltrasoundRegions",
    "SpacingBetweenSlices",
    "NominalScannedPixelSpacing",
    "AcquisitionDateTime",
    "AcquisitionTime",
    "ContentTime",
    (0x0029, 0x1010),  # Siemens CSA image header
)
STACK = (
    "TemporalPositionIdentifier",
    "EchoTime",
    "DiffusionBValue",
    "TriggerTime",
    "InversionTime",
    "AcquisitionNumber",
)
_IN_GROUPS = {
    "TemporalPositionIdentifier": ("FrameContentSequence", "TemporalPositionIndex"),
    "EchoTime": ("MREchoSequence", "EffectiveEchoTime"),
    "DiffusionBValue": ("MRDiffusionSequence", "DiffusionBValue"),
    "TriggerTime": ("CardiacSynchronizationSequence", "NominalCardiacTriggerDelayTime"),
    "AcquisitionNumber": ("FrameContentSequence", "FrameAcquisitionNumber"),
}
_GROUPS = ("PerFrameFunctionalGroupsSequence", "SharedFunctionalGroupsSequence")
_VOLUMES = frozenset({"CT", "MR", "PT", "NM"})
_CORNERS = (
    "RegionLocationMinX0",
    "RegionLocationMinY0",
    "RegionLocationMaxX1",
    "RegionLocationMaxY1",
)
_CM = 3  # PhysicalUnitsXDirection of ultrasound regions


@dataclass(frozen=True, slots=True, kw_only=True)
class Frame:
    """One frame of an object, or one tile of a mosaic.

    index: of the frame, or of the tile, counted along rows. tile: (H, W) of a tile, else None.
    orientation, position, spacing, thickness: as of `Header`, mm (LPS).
    stack: the values of `STACK`, as text, "" where absent.
    taken_s: seconds of the day when its acquisition began, None where nobody said.
    cine_s: seconds since the first frame of a sequence without geometry of its own, NaN where the
        frame rate is not given; None for a frame that belongs to no such sequence.
    """

    index: int = 0
    tile: tuple[int, int] | None = None
    orientation: tuple[float, ...] | None
    position: tuple[float, ...] | None
    spacing: tuple[float, ...] | None
    thickness: float | None
    stack: tuple[str, ...]
    taken_s: float | None
    cine_s: float | None = None


def frames(dataset: Any) -> list[Frame]:
    """The frames of an image object, in the order they are stored.

    Frames without a position of their own follow each other in time. A header may describe more
    frames than it announces, where some were cut out of it.
    Raises InconsistentGeometryError and UnsupportedFormatError.
    """
    count = int(dataset.get("NumberOfFrames", 1) or 1)
    if "PerFrameFunctionalGroupsSequence" in dataset:
        groups = dataset.get("PerFrameFunctionalGroupsSequence")
        if len(groups) < count:
            raise InconsistentGeometryError(
                f"the header announces {count} frames and describes {len(groups)}; export it again"
            )
        found = [_frame(dataset, index) for index in range(count)]
        placed = all(frame.position is not None for frame in found)
        return found if placed or count == 1 else _sequence(dataset, found)
    if "MOSAIC" in kind_of(dataset):
        return _tiles(dataset)
    alone = _frame(dataset, 0)
    if count == 1:
        return [alone]
    offsets = numbers(dataset, "GridFrameOffsetVector", count)
    if offsets is not None:
        return _at_offsets(alone, offsets)
    return _sequence(dataset, [replace(alone, index=index) for index in range(count)])


def group(dataset: Any, frame: int, name: str) -> Any:
    """The functional group of a frame, or of all frames; None where neither says."""
    if not any(name in dataset for name in _GROUPS):
        return None
    per_frame = dataset.get("PerFrameFunctionalGroupsSequence") or ()
    shared = dataset.get("SharedFunctionalGroupsSequence") or ()
    for item in (*per_frame[frame : frame + 1], *shared[:1]):
        if item.get(name):
            return item[name].value[0]
    return None


def transformation(dataset: Any, frame: int) -> Any:
    """What holds the rescale slope and intercept of a frame: its functional group or the object."""
    found = group(dataset, frame, "PixelValueTransformationSequence")
    return dataset if found is None else found


def kind_of(dataset: Any) -> list[str]:
    """The values of ImageType, in capitals."""
    value = dataset.get("ImageType") or ()
    return [part.upper() for part in ([value] if isinstance(value, str) else value)]


def numbers(dataset: Any, name: str, count: int) -> tuple[float, ...] | None:
    """`count` numbers of an element, None where it is absent or empty."""
    value = dataset.get(name)
    if value is None or value == "":
        return None
    values = tuple(float(part) for part in ([value] if _is_one(value) else value))
    if len(values) != count:
        raise ValueError(f"{name} needs {count} numbers, got {len(values)}")
    return values


def _is_one(value: Any) -> bool:
    return isinstance(value, (int, float, str))


def _frame(dataset: Any, index: int) -> Frame:
    grouped = any(name in dataset for name in _GROUPS)

    def of(sequence: str) -> Any:
        found = group(dataset, index, sequence) if grouped else None
        return dataset if found is None else found

    measures = of("PixelMeasuresSequence")
    spacing = numbers(measures, "PixelSpacing", 2)
    for name in ("ImagerPixelSpacing", "NominalScannedPixelSpacing"):
        spacing = spacing or numbers(dataset, name, 2)
    return Frame(
        index=index,
        orientation=numbers(of("PlaneOrientationSequence"), "ImageOrientationPatient", 6),
        position=numbers(of("PlanePositionSequence"), "ImagePositionPatient", 3),
        spacing=spacing or _ultrasound_spacing(dataset),
        thickness=next(iter(numbers(measures, "SliceThickness", 1) or ()), None),
        stack=tuple(_stack_value(dataset, index, name, grouped) for name in STACK),
        taken_s=_taken(dataset, index, grouped),
    )


def segment_of(dataset: Any, frame: int) -> str:
    """The segment that a frame of a segmentation marks, "" where it is none."""
    found = group(dataset, frame, "SegmentIdentificationSequence")
    return "" if found is None else f"segment {found.get('ReferencedSegmentNumber')}"


def _stack_value(dataset: Any, index: int, name: str, grouped: bool) -> str:
    if grouped and name in _IN_GROUPS:
        sequence, entry = _IN_GROUPS[name]
        found = group(dataset, index, sequence)
        if found is not None and found.get(entry) is not None:
            return str(found.get(entry))
    value = dataset.get(name)
    return "" if value is None else str(value)


def _taken(dataset: Any, index: int, grouped: bool) -> float | None:
    content = group(dataset, index, "FrameContentSequence") if grouped else None
    if content is not None and content.get("FrameAcquisitionDateTime"):
        return _seconds_of_day(str(content.FrameAcquisitionDateTime)[8:])
    if dataset.get("AcquisitionDateTime"):
        return _seconds_of_day(str(dataset.get("AcquisitionDateTime"))[8:])
    return _seconds_of_day(str(dataset.get("AcquisitionTime") or ""))


def _seconds_of_day(text: str) -> float | None:
    """HHMMSS.ffffff, with a zone offset perhaps, to seconds."""
    text = text.replace(":", "").split("+")[0].split("-")[0].strip()
    try:
        return int(text[:2]) * 3600 + int(text[2:4]) * 60 + float(text[4:])
    except ValueError:
        return None


def _sequence(dataset: Any, found: list[Frame]) -> list[Frame]:
    """Frames over time, unless they may as well be slices that are described in another way."""
    times = _times(dataset, len(found))
    if math.isnan(times[-1]) and dataset.get("Modality") in _VOLUMES:
        raise UnsupportedFormatError(
            f"{len(found)} frames without position or time, of a kind that may be slices as well, "
            "are not supported; convert the object to one slice per file"
        )
    return [replace(frame, cine_s=when) for frame, when in zip(found, times, strict=True)]


def _times(dataset: Any, count: int) -> list[float]:
    """Seconds of each frame since the first; NaN where the header gives no rate."""
    steps = dataset.get("FrameTimeVector")
    if steps is not None and not _is_one(steps) and len(steps) == count:
        return (np.cumsum([0.0, *map(float, list(steps)[1:])]) / 1000).tolist()
    if dataset.get("FrameTime"):
        return [index * float(dataset.get("FrameTime")) / 1000 for index in range(count)]
    rate = dataset.get("CineRate") or dataset.get("RecommendedDisplayFrameRate")
    return [index / float(rate) if rate else math.nan for index in range(count)]


def _ultrasound_spacing(dataset: Any) -> tuple[float, float] | None:
    """mm between rows and columns, where the regions of an ultrasound picture in cm agree on it."""
    found = set()
    for region in dataset.get("SequenceOfUltrasoundRegions") or ():
        units = (region.get("PhysicalUnitsXDirection"), region.get("PhysicalUnitsYDirection"))
        if units == (_CM, _CM):
            deltas = (float(region.PhysicalDeltaY), float(region.PhysicalDeltaX))
            found.add((abs(deltas[0]) * 10, abs(deltas[1]) * 10))
    return found.pop() if len(found) == 1 else None


def ultrasound_regions(dataset: Any) -> tuple[tuple[int, ...], ...]:
    """(x0, y0, x1, y1) of each declared region, in pixels from 0, both ends included (C.8.5.5)."""
    regions = dataset.get("SequenceOfUltrasoundRegions") or ()
    return tuple(
        tuple(int(region.get(name)) for name in _CORNERS)
        for region in regions
        if all(region.get(name) is not None for name in _CORNERS)
    )


def _at_offsets(first: Frame, offsets: Sequence[float]) -> list[Frame]:
    """Frames of a dose grid, by their offsets in mm (PS3.3 C.8.8.3.2).

    Offsets that start at 0 count along the normal of the first frame; others are its z.
    """
    if first.orientation is None or first.position is None:
        raise InconsistentGeometryError("a dose grid without position or orientation")
    cosines = np.array(first.orientation).reshape(2, 3)
    along = np.cross(cosines[0], cosines[1])
    if offsets[0] != 0:
        if abs(offsets[0] - first.position[2]) > 0.01 or abs(abs(along[2]) - 1) > 1e-4:
            raise InconsistentGeometryError(
                "the offsets of the frames are neither relative nor the z of axial ones"
            )
        along = np.array([0.0, 0.0, 1.0])
    places = [np.array(first.position) + along * (offset - offsets[0]) for offset in offsets]
    return [
        replace(first, index=i, position=tuple(place.tolist())) for i, place in enumerate(places)
    ]


def _tiles(dataset: Any) -> list[Frame]:
    """The slices of a Siemens mosaic, one tile each.

    The header's position is that of the mosaic's own first pixel, as if the whole sheet were
    centred where a slice is (nibabel's documentation, "Siemens mosaic format").
    """
    count, normal = _csa(dataset)
    whole = _frame(dataset, 0)
    step = next(iter(numbers(dataset, "SpacingBetweenSlices", 1) or ()), whole.thickness)
    if whole.orientation is None or whole.position is None or whole.spacing is None or not step:
        raise InconsistentGeometryError("the mosaic has no position, orientation or spacing")
    per_side = math.ceil(math.sqrt(count))
    sheet = (int(dataset.get("Rows")), int(dataset.get("Columns")))
    tile = (sheet[0] // per_side, sheet[1] // per_side)
    cosines = np.array(whole.orientation).reshape(2, 3)
    corner = np.array(whole.position)
    for cosine, extent, size, gap in zip(
        cosines, sheet[::-1], tile[::-1], whole.spacing[::-1], strict=True
    ):
        corner = corner + cosine * gap * (extent - size) / 2
    return [
        replace(whole, index=i, tile=tile, position=tuple((corner + normal * step * i).tolist()))
        for i in range(count)
    ]


def _csa(dataset: Any) -> tuple[int, Any]:
    """Number of slices in a mosaic, and the unit vector (LPS) along which they follow."""
    from nibabel.nicom import csareader

    content = dataset.get((0x0029, 0x1010))
    header = csareader.read(content) if content else None
    count = csareader.get_n_mosaic(header) if header else None
    normal = csareader.get_slice_normal(header) if header else None
    if not count or normal is None:
        raise UnsupportedFormatError(
            "a mosaic without Siemens' private header cannot be cut into slices; export the series "
            "again without anonymizing private elements, or convert it to NIfTI"
        )
    return int(count), np.asarray(normal, dtype=np.float64)
