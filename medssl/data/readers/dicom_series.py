"""Which frames form which volume, from their headers alone."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from torch import Tensor

from medssl.data.geometry import orientation
from medssl.data.modality import Modality
from medssl.data.privacy import salted
from medssl.data.readers.dicom_frames import STACK
from medssl.data.readers.dicom_geometry import is_sheared, same_plane, sorted_slices, volume_affine
from medssl.data.readers.dicom_header import Header
from medssl.data.readers.errors import ReadError, differing_slices

_SAME_MM = 0.01
_TIMES = frozenset({"TemporalPositionIdentifier", "AcquisitionNumber", "AcquisitionTime"})

Place = tuple[Header, ...]
"""The slice of one position, and copies of it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Series:
    """Slices that form one volume, several over time, or one picture; known from headers alone.

    A series UID whose slices differ in size, orientation, spacing or signal component gives
    several; slices without a position are one picture each, frames of a sequence one together.

    volumes: per time point, per position, in geometric order. shape: ([T], [D], H, W). spacing: mm
    per spatial axis or None. orientation: RAS letters per array axis (d, h, w), or None. varies:
    what tells time points apart, in DICOM's keywords. series: the salted id to choose it by, of the
    series UID and the first of its instance UIDs. color: pixels are RGB. sheared: the gantry was
    tilted. burned_in_text: "declared" or "possible" where pixels may show who the patient is.
    shows_face: a volume of the head, from which a face could be rendered. ultrasound_regions: as of
    `Header`. doubts: what pydicom warned of. problems: why it cannot be read, as headers tell.
    """

    volumes: tuple[tuple[Place, ...], ...] = field(repr=False)
    files: tuple[Path, ...] = field(repr=False)
    series: str
    series_uid: str = field(repr=False)
    study_uid: str = field(repr=False)
    patient_id: str = field(repr=False)
    modality: Modality
    shape: tuple[int, ...]
    spacing: tuple[float, ...] | None
    orientation: str | None
    transfer_syntax: str
    varies: tuple[str, ...] = ()
    color: bool = False
    sheared: bool = False
    burned_in_text: str | None = None
    shows_face: bool = False
    ultrasound_regions: tuple[tuple[int, ...], ...] = ()
    doubts: frozenset[str] = frozenset()
    problems: tuple[ReadError, ...]


def plan(headers: Sequence[Header]) -> list[Series]:
    """The series that these frames form, in the order of their first frames."""
    groups: list[list[Header]] = []
    for header in headers:
        for group in groups:
            if _belongs(header, group[0]):
                group.append(header)
                break
        else:
            groups.append([header])
    return [_series(volumes) for group in groups for volumes in _over_time(group)]


def times(volumes: Sequence[Sequence[Place]]) -> tuple[float, ...]:
    """Seconds of each time point since the first; NaN where they are unknown or no time."""
    frames = [volume[0][0] for volume in volumes]
    if frames[0].cine_s is not None:
        return tuple(math.nan if frame.cine_s is None else frame.cine_s for frame in frames)
    taken = [
        min((place[0].taken_s for place in volume if place[0].taken_s is not None), default=None)
        for volume in volumes
    ]
    known = [when for when in taken if when is not None]
    in_time = set(_varying(frames)) <= _TIMES
    if not in_time or len(known) < len(taken) or any(np.diff(known) <= 0):
        return (math.nan,) * len(volumes)
    return tuple(when - known[0] for when in known)


def _belongs(header: Header, first: Header) -> bool:
    if header.problem is not None or first.problem is not None:  # one series with one reason
        return _key(header) == _key(first) and repr(header.problem) == repr(first.problem)
    if header.cine_s is not None or first.cine_s is not None:
        return header.path == first.path and header.cine_s is not None
    return header.position is not None and _key(header) == _key(first) and same_plane(header, first)


def _key(header: Header) -> tuple[object, ...]:
    return (
        header.study_uid,
        header.series_uid,
        header.shape,
        header.color,
        header.localizer,
        header.component,
        header.position is None,
    )


def _over_time(group: list[Header]) -> list[list[list[Header]]]:
    """Each series of a group as its volumes, in the order of time, echo, b-value, ...

    Where positions repeat, header values tell the volumes apart, or else the times at which their
    slices were taken, or instance numbers where as many volumes are announced. Whatever these say
    where no position repeats, it is one volume, as the slabs of one scan may differ in acquisition
    number. Volumes that do not lie on one grid are series of their own.
    """
    if group[0].problem is not None or len(group) == 1:
        return [[group]]
    if group[0].cine_s is not None:
        return [[[header] for header in sorted(group, key=lambda header: header.frame)]]
    if _num_repeated(group) == 0:
        return [[group]]
    ways = [_by_values(group), _by_rank(group, "taken_s"), _by_number(group)]
    ways = [parts for parts in ways if all(_num_repeated(part) == 0 for part in parts)]
    for parts in ways:
        if _on_one_grid(parts):
            return [parts]
    return [[part] for part in ways[0]] if ways else [[group]]


def _by_values(group: Sequence[Header]) -> list[list[Header]]:
    parts: dict[tuple[str, ...], list[Header]] = {}
    for header in group:
        parts.setdefault(header.stack, []).append(header)
    return [parts[values] for values in sorted(parts, key=_in_order)]


def _in_order(values: Sequence[str]) -> tuple[tuple[float, str], ...]:
    def number(text: str) -> float:
        try:
            return float(text)
        except ValueError:
            return -math.inf

    return tuple((number(text), text) for text in values)


def _by_rank(group: Sequence[Header], name: str) -> list[list[Header]]:
    """The first of each position by a value of the header, the second of each, ...

    All in one where not every position has as many frames of different values.
    """
    places = sorted_slices(group)
    if len({len(place) for place in places}) > 1:
        return [list(group)]
    for place in places:
        values = {getattr(header, name) for header in place}
        if None in values or len(values) < len(place):
            return [list(group)]
    ordered = [sorted(place, key=lambda header: getattr(header, name)) for place in places]
    return [list(part) for part in zip(*ordered, strict=True)]


def _by_number(group: Sequence[Header]) -> list[list[Header]]:
    """By instance number, where the header announces just as many volumes over time."""
    parts = _by_rank(group, "instance_number")
    return parts if len(parts) == group[0].num_times else [list(group)]


def _on_one_grid(parts: Sequence[Sequence[Header]]) -> bool:
    try:
        affines = [_geometry(_places(part)) for part in parts]
    except ReadError:
        return False
    if len({len(_places(part)) for part in parts}) > 1:
        return False
    return all(bool((affine - affines[0]).abs().max() < _SAME_MM) for affine in affines)


def _num_repeated(group: Sequence[Header]) -> int:
    """Positions that hold more than one frame (copies of one file count once)."""
    try:
        places = sorted_slices(group)
    except ReadError:
        return 0
    return sum(len({(h.instance_uid, h.frame) for h in place}) > 1 for place in places)


def _places(volume: Sequence[Header]) -> tuple[Place, ...]:
    if volume[0].position is None:
        return (tuple(volume),)
    return tuple(tuple(place) for place in sorted_slices(volume))


def _geometry(places: Sequence[Place]) -> Tensor:
    return volume_affine([place[0] for place in places])


def _varying(frames: Sequence[Header]) -> tuple[str, ...]:
    """What tells the time points apart, by DICOM's keywords."""
    columns = zip(STACK, zip(*(frame.stack for frame in frames), strict=True), strict=False)
    found = tuple(name for name, values in columns if len(set(values)) > 1)
    if found or frames[0].cine_s is not None:
        return found
    if len(frames) < 2:
        return ()
    apart = len({frame.taken_s for frame in frames}) == len(frames)
    return ("AcquisitionTime",) if apart else ("InstanceNumber",)


def _series(volumes: Sequence[Sequence[Header]]) -> Series:
    first = volumes[0][0]
    problems = [first.problem] if first.problem is not None else []
    places: tuple[tuple[Place, ...], ...] = tuple((tuple(volume),) for volume in volumes)
    affine = None
    if first.position is not None and not problems:
        try:
            places = tuple(_places(volume) for volume in volumes)
            affine = _geometry(places[0])
        except ReadError as error:
            problems.append(error)
        repeated = sum(_num_repeated(volume) for volume in volumes)
        problems += [differing_slices(repeated)] if repeated else []
    depth = len(places[0]) if affine is not None or len(volumes) > 1 else len(volumes[0])
    plane = first.shape if depth == 1 else (depth, *first.shape)
    headers = [header for volume in places for place in volume for header in place]
    return Series(
        volumes=places,
        files=tuple(dict.fromkeys(header.path for header in headers)),
        series=_salted_id(headers),
        series_uid=first.series_uid,
        study_uid=first.study_uid,
        patient_id=first.patient_id,
        modality=first.modality,
        shape=plane if len(volumes) == 1 else (len(volumes), *plane),
        spacing=_spacing(first, affine, len(plane)),
        orientation=None if affine is None else orientation(affine),
        transfer_syntax=", ".join(sorted({header.transfer_syntax for header in headers})),
        varies=_varying([volume[0] for volume in volumes]),
        color=first.color,
        sheared=affine is not None and is_sheared(affine),
        burned_in_text=first.burned_in_text,
        shows_face=first.shows_head and first.color is False and depth > 1,
        ultrasound_regions=first.ultrasound_regions,
        doubts=frozenset().union(*(header.doubts for header in headers)),
        problems=tuple(problems),
    )


def _salted_id(headers: Sequence[Header]) -> str:
    """Of this volume alone, also where a series UID or a file holds several."""
    first = min(headers, key=lambda header: (header.instance_uid, header.frame))
    return salted(f"{first.series_uid} {first.instance_uid} {first.frame}")


def _spacing(first: Header, affine: Tensor | None, num_axes: int) -> tuple[float, ...] | None:
    """mm per axis; from the header alone for a picture without a position."""
    if affine is not None:
        return tuple(affine[:3, :3].norm(dim=0).tolist()[-num_axes:])
    usable = first.position is None and first.pixel_spacing and min(first.pixel_spacing) > 0
    return first.pixel_spacing if usable else None
