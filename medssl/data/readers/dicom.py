"""DICOM series and single DICOM objects as images (https://www.dicomstandard.org)."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path

from medssl.data.image import Image, pixel_affine
from medssl.data.modality import Modality
from medssl.data.readers.dicom_geometry import is_sheared, volume_affine
from medssl.data.readers.dicom_header import (
    QUANTITATIVE,
    Header,
    headers_of,
    is_dicom,
    quiet,
    read_headers,
)
from medssl.data.readers.dicom_pixels import OpenObject, SliceStack
from medssl.data.readers.dicom_series import Series, plan, times
from medssl.data.readers.errors import (
    AmbiguousSeriesError,
    DuplicateSlicesError,
    NoPixelDataError,
    NotDicomError,
    ReadError,
)
from medssl.data.readers.stored import decoding

_KEPT_BYTES = 512 << 20  # of files, from the look at their headers to their decoding


@dataclass(frozen=True, slots=True)
class Found:
    """All that lies in some files: series, and the counts of what was passed over.

    opened: objects that were parsed whole, by file.
    """

    series: list[Series]
    opened: dict[Path, OpenObject] = field(repr=False)
    num_objects_skipped: int
    num_files_skipped: int


def scan(files: Iterable[Path]) -> list[Series]:
    """The series in these files, from headers only; other files are passed over.

    A damaged DICOM file becomes a series of its own whose `problems` say so, since nobody can tell
    which volume now lacks a slice.
    """
    return find(files).series


def find(
    files: Iterable[Path],
    *,
    any_object: bool = False,
    hashes: bool = False,
    keep_bytes: int = 0,
) -> Found:
    """As `scan`, with the counts of what was passed over.

    any_object: take segmentations and doses for images too.
    keep_bytes: parse files whole, so that they need not be read again, while they fit.
    hashes: of the files that are parsed whole.
    """
    headers: list[Header] = []
    opened: dict[Path, OpenObject] = {}
    damaged: list[Series] = []
    num_objects = num_files = 0
    for file in sorted(files):
        try:
            if not _starts_as_dicom(file):
                num_files += 1
                continue
            if keep_bytes > 0 and (whole := _opened(file, hashes=hashes)) is not None:
                frames = headers_of(file, whole.dataset, any_object=any_object)
                keep_bytes -= whole.size
                opened[file] = whole
            else:
                frames = read_headers(file, any_object=any_object)
        except ReadError as error:
            damaged.append(_damaged(file, error))
            continue
        num_objects += not frames
        headers += frames
    return Found(plan(headers) + damaged, opened, num_objects, num_files)


def read_dicom(path: Path, *, series: str | None = None, hashes: bool = False) -> Image:
    """One volume of a folder (searched with its subfolders), or what one file holds.

    Pixels are in the modality's unit: HU for CT, otherwise the stored values after each slice's
    own rescale or table. Declared padding is invalid. MONOCHROME1 is inverted except where values
    measure something (CT, MR, PT, NM). A single slice has axes "HW"; without a position it lies in
    the pixel frame, with the spacing that the header gives, if any. Doses are in stored counts,
    without their scaling. Volumes of one series over
    time, echoes or diffusion weightings share a T axis; `times_s` is NaN where it is no time or
    nobody said. Segmentations and doses are passed over in a folder, and read when their file is
    given.
    series: salted id of the volume, where there are several.
    Raises the ReadErrors named in `errors`; nothing is averaged, guessed or left out silently:
    what was dropped or changed stands in `provenance`.
    """
    files = path.rglob("*") if path.is_dir() else [path]
    found = find(
        (file for file in files if path.is_file() or file.is_file()),
        any_object=path.is_file(),
        hashes=hashes,
        keep_bytes=_KEPT_BYTES,
    )
    chosen = _chosen(found, series)
    for problem in chosen.problems:
        if not isinstance(problem, DuplicateSlicesError):  # their pixels decide
            raise problem
    return _load(found, chosen, hashes=hashes)


@quiet()
def _opened(file: Path, *, hashes: bool) -> OpenObject | None:
    """The object parsed whole; None where that fails, which need not concern the series wanted."""
    try:
        with decoding("the DICOM object"):
            return OpenObject(file, hashes=hashes)
    except ReadError:
        return None


def _damaged(file: Path, error: ReadError) -> Series:
    return Series(
        volumes=(),
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
            f"one series holds {len(matching)} volumes ({known}), by orientation, size, signal or "
            "segment; put the files of each into its own folder (of one file only one is supported)"
        )
    raise AmbiguousSeriesError(
        f"{len(matching)} volumes where one was asked for; choose with series=: {known}"
    )


def _load(found: Found, chosen: Series, *, hashes: bool) -> Image:
    """Read each file of the series once."""
    volumes = chosen.volumes
    sizes = len(volumes), len(volumes[0])
    axes = ("T" if sizes[0] > 1 else "") + ("D" if sizes[1] > 1 else "")
    counted = tuple(size for size in sizes if size > 1)
    frames = Counter(header.path for place in chain.from_iterable(volumes) for header in place)
    stack = SliceStack(counted, hashes=hashes, frames=frames, opened=found.opened)
    for place in chain.from_iterable(volumes):
        stack.add(place)
    first = volumes[0][0][0]
    flat = first.position is None
    affine = pixel_affine() if flat else volume_affine([place[0] for place in volumes[0]])
    provenance = {
        "objects_skipped": found.num_objects_skipped,
        "files_skipped": found.num_files_skipped,
        "duplicates_dropped": sum(len(p) - 1 for p in chain.from_iterable(volumes)),
        "sheared": not flat and is_sheared(affine),
        "inverted": stack.inverted,
        "varies": list(chosen.varies),
    }
    provenance = {name: value for name, value in provenance.items() if value}
    return Image(
        pixels=stack.pixels(),
        axes=f"{axes}HW",
        modality=chosen.modality,
        affine=affine,
        frame="pixel" if flat else "patient",
        spacing=chosen.spacing,
        valid=stack.valid(has_time="T" in axes),
        times_s=times(volumes) if "T" in axes else None,
        units="HU" if chosen.modality is Modality.CT else stack.units(),
        value_range=None if chosen.modality in QUANTITATIVE else stack.value_range,
        provenance={
            "reader": "dicom",
            "transfer_syntax": chosen.transfer_syntax,
            **provenance,
            **stack.hashes(),
        },
    )
