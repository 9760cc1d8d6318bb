"""What lies in some files: DICOM series, damaged files, and what was passed over."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from medssl.data.modality import Modality
from medssl.data.readers.dicom_header import Header, headers_of, read_headers
from medssl.data.readers.dicom_memo import Frames, dicom_start, key_of, recall, remember
from medssl.data.readers.dicom_pixels import OpenObject
from medssl.data.readers.dicom_series import Series, plan
from medssl.data.readers.errors import ReadError
from medssl.data.readers.stored import GZIP, decoding


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

    Headers are remembered by path, size and time of change, so that the second of many volumes in
    one folder does not read the whole folder again.

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
            frames, whole = _look(file, any_object, hashes=hashes, keep=keep_bytes > 0)
        except ReadError as error:
            damaged.append(_damaged(file, error))
            continue
        if whole is not None:
            keep_bytes -= whole.size
            opened[file] = whole
        num_files += frames is None
        num_objects += frames == ()
        headers += frames or ()
    return Found(plan(headers) + damaged, opened, num_objects, num_files)


def _look(
    file: Path, any_object: bool, *, hashes: bool, keep: bool
) -> tuple[Frames | None, OpenObject | None]:
    """The headers of a file, None where it is not DICOM, and the object where it is to be kept."""
    key = key_of(file, any_object=any_object)
    frames = recall(key)
    if frames is not None:
        return frames, None
    start = dicom_start(file)
    if start is None:
        return None, None
    whole = _opened(file, hashes=hashes) if keep else None
    if whole is not None:
        frames = tuple(headers_of(file, whole.header, whole.doubts, any_object=any_object))
    else:
        zipped = start.startswith(GZIP)
        frames = tuple(read_headers(file, any_object=any_object, zipped=zipped))
    remember({key: frames})
    return frames, whole


def is_known(file: Path) -> bool:
    """Whether a file is DICOM and its header was read before."""
    try:
        return recall(key_of(file)) is not None
    except ReadError:
        return False


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
