"""DICOM series and single DICOM objects as images (https://www.dicomstandard.org)."""

import gc
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any, get_args

import torch

from medssl.data.geometry import corners, resample
from medssl.data.image import Image, pixel_affine
from medssl.data.modality import Modality
from medssl.data.readers.archive import is_archive, unpacked
from medssl.data.readers.dicom_directory import listed_files
from medssl.data.readers.dicom_find import Found, find
from medssl.data.readers.dicom_gaps import OnGap, filled
from medssl.data.readers.dicom_geometry import is_sheared, line_of, volume_affine
from medssl.data.readers.dicom_header import QUANTITATIVE, Header
from medssl.data.readers.dicom_series import Series, times
from medssl.data.readers.dicom_stack import OnDuplicate, SliceStack, one_of
from medssl.data.readers.dicom_voi import Window, check_window
from medssl.data.readers.doubts import hearing
from medssl.data.readers.errors import (
    AmbiguousSeriesError,
    DuplicateSlicesError,
    MissingSlicesError,
    NoPixelDataError,
    NotDicomError,
)
from medssl.data.readers.stored import first_bytes

_KEPT_BYTES = 512 << 20  # of files, from the look at their headers to their decoding


@dataclass(frozen=True, slots=True, kw_only=True)
class Choices:
    """What a caller wants done where there is more than one right answer; see `read_dicom`."""

    on_gap: OnGap = "error"
    on_duplicate: OnDuplicate = "error"
    resample_tilt: bool = False
    voi_window: Window | None = None

    def __post_init__(self) -> None:
        for name, kind in (("on_gap", OnGap), ("on_duplicate", OnDuplicate)):
            value = getattr(self, name)
            if value not in get_args(kind):
                known = ", ".join(get_args(kind))
                raise ValueError(f"{name} must be one of {known}; got {value!r}")
        check_window(self.voi_window)

    def made(self) -> dict[str, Any]:
        """Those that differ from the default, for the provenance."""
        default = Choices()
        names = ("on_gap", "on_duplicate", "resample_tilt", "voi_window")
        return {n: getattr(self, n) for n in names if getattr(self, n) != getattr(default, n)}


def read_dicom(
    path: Path,
    *,
    series: str | None = None,
    on_gap: OnGap = "error",
    on_duplicate: OnDuplicate = "error",
    resample_tilt: bool = False,
    voi_window: Window | None = None,
    hashes: bool = False,
) -> Image:
    """One volume of a folder (searched with its subfolders), an archive, a DICOMDIR or one file.

    Pixels are in the modality's unit: HU for CT, otherwise the stored values after each slice's
    own rescale or table. Declared padding is invalid. MONOCHROME1 is inverted except where values
    measure something (CT, MR, PT, NM). A single slice has axes "HW"; without a position it lies in
    the pixel frame, with the spacing that the header gives, if any. Doses are in stored counts,
    without their scaling. Volumes of one series over time, echoes or diffusion weightings share a
    T axis; `times_s` is NaN where it is no time or nobody said. Segmentations and doses are passed
    over in a folder, and read when their file is given.

    series: salted id of the volume, where there are several.
    on_gap: where slices are missing or at uneven distances: "insert_nan" puts invalid slices of
        NaN into the gaps, "resample" interpolates linearly onto even distances, "keep" takes the
        slices as they are with their mean distance, which distorts.
    on_duplicate: which of different slices at one position to take, by acquisition time and
        instance number.
    resample_tilt: resample a volume with gantry tilt onto a rectangular grid, linearly; what lies
        outside of the slices is invalid. Otherwise the tilt stays in the affine as a shear.
    voi_window: give [0, 1] through a window instead of the values: a name in
        `medssl.data.modality.CT_WINDOWS`, (centre, width), or "dicom" for what each header says.

    Every choice is put into `provenance`, and what was dropped, changed or made up beside it.
    Raises the ReadErrors named in `errors`; nothing is averaged, guessed or left out silently.
    """
    choices = Choices(
        on_gap=on_gap,
        on_duplicate=on_duplicate,
        resample_tilt=resample_tilt,
        voi_window=voi_window,
    )
    with ExitStack() as opened:
        opened.enter_context(_uncollected())
        opened.enter_context(hearing())
        single = path.is_file() and not is_archive(first_bytes(path, 262))
        if path.is_file() and not single:
            path = opened.enter_context(unpacked(path))
        found = find(_files(path), any_object=single, hashes=hashes, keep_bytes=_KEPT_BYTES)
        chosen = _chosen(found, series)
        for problem in chosen.problems:
            if not _is_left_to(choices, problem):
                raise problem
        return _load(found, chosen, choices, hashes=hashes)


@contextmanager
def _uncollected() -> Iterator[None]:
    """Without the cyclic garbage collector, which would walk over all headers again and again."""
    collecting = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collecting:
            gc.enable()


def _files(path: Path) -> Iterable[Path]:
    if path.is_dir():
        return _regular_files(path)
    listed = listed_files(path)
    return [path] if listed is None else listed


def _regular_files(folder: Path) -> Iterator[Path]:
    """Of a folder and its subfolders; no pipes, and no links that lead nowhere."""
    for entry in os.scandir(folder):
        if entry.is_dir(follow_symlinks=False):
            yield from _regular_files(Path(entry.path))
        elif entry.is_file():
            yield Path(entry.path)


def _is_left_to(choices: Choices, problem: Exception) -> bool:
    """Whether a problem that headers show is answered by the pixels or by the caller."""
    if isinstance(problem, MissingSlicesError):
        return choices.on_gap != "error"
    return isinstance(problem, DuplicateSlicesError)


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
    raise AmbiguousSeriesError(
        f"{len(matching)} volumes where one was asked for; choose with series=: {known}"
    )


def _load(found: Found, chosen: Series, choices: Choices, *, hashes: bool) -> Image:
    """Read each file of the series once."""
    volumes = [[one_of(p, choices.on_duplicate) for p in volume] for volume in chosen.volumes]
    sizes = len(volumes), len(volumes[0])
    axes = ("T" if sizes[0] > 1 else "") + ("D" if sizes[1] > 1 else "")
    places = list(chain.from_iterable(volumes))
    stack = SliceStack(
        tuple(size for size in sizes if size > 1),
        hashes=hashes,
        frames=Counter(header.path for header in chain.from_iterable(places)),
        opened=found.opened,
        window=choices.voi_window,
        modality=chosen.modality,
    )
    for place in places:
        stack.add(place)
    slices = [place[0] for place in volumes[0]]
    flat = slices[0].position is None
    image = Image(
        pixels=stack.pixels(),
        axes=f"{axes}HW",
        modality=chosen.modality,
        affine=pixel_affine() if flat else volume_affine(slices, on_gap=choices.on_gap),
        frame="pixel" if flat else "patient",
        spacing=chosen.spacing,
        valid=stack.valid(has_time="T" in axes),
        times_s=times(volumes) if "T" in axes else None,
        units=_units(chosen.modality, stack.units()),
        value_range=_value_range(chosen.modality, stack),
        provenance={
            "reader": "dicom",
            "transfer_syntax": chosen.transfer_syntax,
            **_told(found, chosen, stack),
            **choices.made(),
            **stack.hashes(),
        },
    )
    return image if flat else _on_grid(image, slices, choices)


def _units(modality: Modality, stored: str) -> str:
    return "HU" if modality is Modality.CT and stored != "window" else stored


def _value_range(modality: Modality, stack: SliceStack) -> tuple[float, float] | None:
    measured = modality in QUANTITATIVE and stack.units() != "window"
    return None if measured else stack.value_range


def _told(found: Found, chosen: Series, stack: SliceStack) -> dict[str, Any]:
    """What a user should know of how the pixels came to be."""
    places = list(chain.from_iterable(chosen.volumes))
    told = {
        "objects_skipped": found.num_objects_skipped,
        "files_skipped": found.num_files_skipped,
        "duplicates_dropped": sum(len(place) - 1 for place in places),
        "inverted": stack.inverted,
        "varies": list(chosen.varies),
        "burned_in_text": chosen.burned_in_text,
        "shows_face": chosen.shows_face,
        "ultrasound_regions": [list(box) for box in chosen.ultrasound_regions],
        "doubts": sorted(chosen.doubts | stack.doubts),
        **(stack.positioning or {}),
    }
    return {name: value for name, value in told.items() if value}


def _on_grid(image: Image, slices: Sequence[Header], choices: Choices) -> Image:
    """A volume with the gaps and the tilt that the caller chose."""
    if len(slices) > 1:
        image = filled(image, line_of(slices), choices.on_gap)
    spacing = tuple(image.affine[:3, :3].norm(dim=0).tolist())
    image = replace(image, spacing=spacing[-len(image.spatial_shape) :])
    if not is_sheared(image.affine):
        return image
    if choices.resample_tilt:
        return resample(image, to=_rectangular(image))
    return replace(image, provenance={**image.provenance, "sheared": True})


def _rectangular(image: Image) -> Image:
    """An empty grid with the plane and the slice positions of a sheared volume that encloses it."""
    affine = image.affine.clone()
    normal = torch.linalg.cross(affine[:3, 1], affine[:3, 2])
    normal = normal / normal.norm()
    affine[:3, 0] = normal * (affine[:3, 0] @ normal)
    ends = torch.cat([corners(image), torch.ones(8, 1, dtype=torch.float64)], 1)
    index = (torch.linalg.solve(affine, ends.T)[:3]).round(decimals=6)
    low, high = index.min(1).values.floor(), index.max(1).values.ceil()
    affine[:3, 3] = affine[:3, :3] @ low + affine[:3, 3]
    shape = [int(length) for length in (high - low + 1)]
    return replace(
        image,
        pixels=torch.empty(1, dtype=torch.float32).expand(1, *shape),
        axes="DHW",
        times_s=None,
        valid=None,
        affine=affine,
        spacing=tuple(affine[:3, :3].norm(dim=0).tolist()),
    )
