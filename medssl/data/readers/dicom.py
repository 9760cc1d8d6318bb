"""DICOM series of single-frame slices, and single DICOM pictures (https://www.dicomstandard.org)."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

from medssl.data.geometry import orientation
from medssl.data.image import Image, pixel_affine
from medssl.data.modality import Modality
from medssl.data.privacy import salted
from medssl.data.readers.dicom_geometry import (
    is_sheared,
    same_plane,
    sorted_slices,
    volume_affine,
)
from medssl.data.readers.dicom_header import QUANTITATIVE, Header, is_dicom, read_header
from medssl.data.readers.dicom_pixels import SliceStack, differing_slices
from medssl.data.readers.errors import (
    AmbiguousSeriesError,
    DuplicateSlicesError,
    NoPixelDataError,
    NotDicomError,
    ReadError,
    UnsupportedPhotometricError,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Series:
    """Slices that form one volume, or one picture; known from the headers alone.

    A series UID whose slices differ in size, orientation, spacing, echo, acquisition, time point
    or b-value gives several; slices without a position are one picture each.

    files: in geometric order. shape: (D, H, W), or (H, W) of a single slice. spacing: mm per axis
    or None. orientation: RAS letters per array axis (d, h, w), or None. series: the salted id to
    choose it by, of the series UID (of the instance UID for a picture without position).
    problems: why it cannot be read, as far as headers tell.
    """

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
    problems: tuple[ReadError, ...]


@dataclass(frozen=True, slots=True)
class Found:
    """All that lies in some files: series, and the counts of what was passed over."""

    series: list[Series]
    headers: dict[Path, Header] = field(repr=False)
    num_objects_skipped: int
    num_files_skipped: int


def scan(files: Iterable[Path]) -> list[Series]:
    """The series in these files, from headers only; other files are passed over.

    A damaged DICOM file becomes a series of its own whose `problems` say so, since nobody can tell
    which volume now lacks a slice.
    """
    return find(files).series


def find(files: Iterable[Path]) -> Found:
    """As `scan`, with the headers and the counts of what was passed over."""
    headers: dict[Path, Header] = {}
    damaged: list[Series] = []
    num_objects = num_files = 0
    for file in sorted(files):
        try:
            if not _starts_as_dicom(file):
                num_files += 1
                continue
            header = read_header(file)
        except ReadError as error:
            damaged.append(_damaged(file, error))
            continue
        if header is None:
            num_objects += 1
        else:
            headers[file] = header
    volumes = [_series(group) for group in _groups(list(headers.values()))]
    return Found(volumes + damaged, headers, num_objects, num_files)


def read_dicom(path: Path, *, series: str | None = None, hashes: bool = False) -> Image:
    """One volume of a folder (searched with its subfolders), or the picture of one file.

    Pixels are in the modality's unit: HU for CT, otherwise the stored values after each slice's
    own rescale. Declared padding is invalid. MONOCHROME1 is inverted except where values measure
    something (CT, MR, PT, NM). A single slice has axes "HW"; without a position it lies in the
    pixel frame, with the spacing that the header gives, if any.
    series: salted id of the volume, where there are several.
    Raises the ReadErrors named in `errors`; nothing is averaged, guessed or left out silently:
    what was dropped or changed stands in `provenance`.
    """
    files = path.rglob("*") if path.is_dir() else [path]
    found = find(file for file in files if path.is_file() or file.is_file())
    chosen = _chosen(found, series)
    for problem in chosen.problems:
        if not isinstance(problem, DuplicateSlicesError):  # their pixels decide
            raise problem
    return _load(found, chosen, hashes=hashes)


def _groups(headers: Sequence[Header]) -> list[list[Header]]:
    """Headers that can lie in one volume together, in the order they came."""
    groups: list[list[Header]] = []
    for header in headers:
        for group in groups:
            if _belongs(header, group[0]):
                group.append(header)
                break
        else:
            groups.append([header])
    return [part for group in groups for part in _volumes(group)]


def _belongs(header: Header, first: Header) -> bool:
    if header.problem is not None or first.problem is not None:  # one series with one reason
        return _key(header) == _key(first) and repr(header.problem) == repr(first.problem)
    return header.position is not None and _key(header) == _key(first) and same_plane(header, first)


def _key(header: Header) -> tuple[object, ...]:
    return (
        header.study_uid,
        header.series_uid,
        header.shape,
        header.color,
        header.localizer,
        header.position is None,
    )


def _volumes(group: list[Header]) -> list[list[Header]]:
    """Where positions repeat, apart by echo, time point, ...; else one volume, whatever these say.

    The slabs of one scan may differ in acquisition number, and are one volume all the same.
    """
    if len(group) == 1 or group[0].problem is not None or _num_repeated(group) == 0:
        return [group]
    parts: dict[tuple[str, ...], list[Header]] = {}
    for header in group:
        parts.setdefault(header.stack, []).append(header)
    apart = all(_num_repeated(part) == 0 for part in parts.values())
    return list(parts.values()) if apart else [group]


def _num_repeated(group: Sequence[Header]) -> int:
    """Positions that hold more than one instance (copies of one file count once)."""
    try:
        places = sorted_slices(group)
    except ReadError:
        return 0
    return sum(len({header.instance_uid for header in place}) > 1 for place in places)


def _series(group: Sequence[Header]) -> Series:
    first = group[0]
    problems = [first.problem] if first.problem is not None else []
    affine = None
    if first.position is not None and not problems:
        try:
            places = sorted_slices(group)
            group = [header for place in places for header in place]
            affine = volume_affine([place[0] for place in places])
        except ReadError as error:
            problems.append(error)
        problems += _stack_problems(group)
    depth = len(places) if affine is not None else len(group)
    shape = first.shape if depth == 1 else (depth, *first.shape)
    return Series(
        files=tuple(header.path for header in group),
        series=salted(first.instance_uid if first.position is None else first.series_uid),
        series_uid=first.series_uid,
        study_uid=first.study_uid,
        patient_id=first.patient_id,
        modality=first.modality,
        shape=shape,
        spacing=_spacing(first, affine, len(shape)),
        orientation=None if affine is None else orientation(affine),
        transfer_syntax=", ".join(sorted({header.transfer_syntax for header in group})),
        problems=tuple(problems),
    )


def _stack_problems(group: Sequence[Header]) -> list[ReadError]:
    if group[0].color and len(group) > 1:
        return [UnsupportedPhotometricError("a volume of color slices is not supported")]
    repeated = _num_repeated(group)
    return [differing_slices(repeated)] if repeated else []


def _spacing(first: Header, affine: Tensor | None, num_axes: int) -> tuple[float, ...] | None:
    """mm per axis; from the header alone for a picture without a position."""
    if affine is not None:
        return tuple(affine[:3, :3].norm(dim=0).tolist()[-num_axes:])
    usable = first.position is None and first.pixel_spacing and min(first.pixel_spacing) > 0
    return first.pixel_spacing if usable else None


def _damaged(file: Path, error: ReadError) -> Series:
    return Series(
        files=(file,),
        series="",
        series_uid="",
        study_uid="",
        patient_id="",
        modality=Modality.UNKNOWN,
        shape=(),
        spacing=None,
        orientation=None,
        transfer_syntax="",
        problems=(error,),
    )


def _starts_as_dicom(file: Path) -> bool:
    try:
        with file.open("rb") as stream:
            return is_dicom(stream.read(132))
    except OSError as error:
        raise ReadError(f"a file cannot be opened: {error.strerror}") from None


def _chosen(found: Found, series: str | None) -> Series:
    for candidate in found.series:
        if not candidate.shape:  # a damaged file: it may be a slice of any volume
            raise candidate.problems[0]
    if not found.series:
        if found.num_objects_skipped:
            raise NoPixelDataError("the DICOM objects here hold no image (reports, plans, ...)")
        raise NotDicomError("there is no DICOM file here")
    matching = [s for s in found.series if series is None or s.series == series]
    if len(matching) == 1:
        return matching[0]
    known = ", ".join(f"{s.series} ({s.modality} {s.shape})" for s in found.series[:8])
    if not matching:
        raise AmbiguousSeriesError(f"no volume has the id {series!r}; there are {known}")
    if len({s.series for s in matching}) == 1:
        raise AmbiguousSeriesError(
            f"one series holds {len(matching)} volumes ({known}), by orientation, size, echo or "
            "time point; put the files of each into its own folder"
        )
    raise AmbiguousSeriesError(
        f"{len(matching)} volumes where one was asked for; choose with series=: {known}"
    )


def _load(found: Found, chosen: Series, *, hashes: bool) -> Image:
    """Read each file of the series once."""
    headers = [found.headers[file] for file in chosen.files]
    first = headers[0]
    places = [headers] if first.position is None else sorted_slices(headers)
    stack = SliceStack(len(places), hashes=hashes)
    for place in places:
        stack.add(place)
    affine = pixel_affine() if first.position is None else volume_affine([p[0] for p in places])
    provenance = {
        "objects_skipped": found.num_objects_skipped,
        "files_skipped": found.num_files_skipped,
        "duplicates_dropped": len(headers) - len(places),
        "sheared": first.position is not None and is_sheared(affine),
        "inverted": stack.inverted,
    }
    provenance = {name: value for name, value in provenance.items() if value}
    return Image(
        pixels=stack.pixels(),
        axes="HW" if len(places) == 1 else "DHW",
        modality=chosen.modality,
        affine=affine,
        frame="pixel" if first.position is None else "patient",
        spacing=chosen.spacing,
        valid=stack.valid(),
        units="HU"
        if chosen.modality is Modality.CT
        else "rescaled"
        if stack.rescaled
        else "stored",
        value_range=None if chosen.modality in QUANTITATIVE else stack.value_range,
        provenance={
            "reader": "dicom",
            "transfer_syntax": chosen.transfer_syntax,
            **provenance,
            **stack.hashes(),
        },
    )
