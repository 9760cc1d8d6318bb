"""One door for every image on disk; the content decides, never the suffix."""

from dataclasses import replace
from pathlib import Path
from typing import Literal

from medssl.data.image import Image, PointCloud
from medssl.data.modality import Modality
from medssl.data.privacy import leaving
from medssl.data.readers.archive import is_archive, members, unpacking
from medssl.data.readers.dicom import read_dicom
from medssl.data.readers.dicom_gaps import OnGap
from medssl.data.readers.dicom_header import is_dicom
from medssl.data.readers.dicom_stack import OnDuplicate
from medssl.data.readers.dicom_voi import Window
from medssl.data.readers.doubts import hearing
from medssl.data.readers.errors import ReadError, UnsupportedFormatError
from medssl.data.readers.nifti import read_nifti
from medssl.data.readers.nifti_header import is_nifti
from medssl.data.readers.organized import as_organized
from medssl.data.readers.picture import JPEG, PNG, read_picture
from medssl.data.readers.points import is_xyz_name, points_kind, read_points
from medssl.data.readers.points_stored import Unit
from medssl.data.readers.stored import first_bytes
from medssl.data.readers.tiff import is_tiff
from medssl.data.readers.video import is_video, read_video

Kind = Literal["dicom", "nifti", "picture", "points", "video"]

KNOWN = "DICOM, NIfTI (.nii, .nii.gz), PNG, JPEG, TIFF, PLY, PCD, .xyz and films"
_START_BYTES = 544
_FREE = frozenset({Modality.UNKNOWN, Modality.OTHER, Modality.PICTURE})
"""What a given modality may replace; a header's word stands."""


def sniff(path: Path) -> Kind | None:
    """What a file is by its first bytes; "dicom" also is a folder or an archive of it."""
    if path.is_dir():
        files = (file for file in sorted(path.rglob("*")) if file.is_file())
        return "dicom" if any(sniff(file) == "dicom" for file in files) else None
    start = first_bytes(path, _START_BYTES)
    if start[128:132] == b"DICM":  # a preamble may begin like a TIFF, for other programs
        return "dicom"
    if start.startswith((PNG, JPEG)) or is_tiff(start):
        return "picture"
    if is_nifti(start):
        return "nifti"
    if points_kind(start) or is_xyz_name(path):  # XYZ text has no mark, and is asked for by name
        return "points"
    if is_video(start):
        return "video"
    if is_dicom(start) or (is_archive(start) and _packs_dicom(path)):
        return "dicom"
    return "nifti" if not start and path.name.lower().endswith(".nii.gz") else None


def read_image(
    path: Path,
    *,
    series: str | None = None,
    modality: Modality | None = None,
    unit: Unit | None = None,
    on_gap: OnGap = "error",
    on_duplicate: OnDuplicate = "error",
    resample_tilt: bool = False,
    voi_window: Window | None = None,
    hashes: bool = False,
) -> Image:
    """The image in a file, or the volume in a folder or archive of DICOM slices.

    series: salted id of the volume, where a folder, archive or file holds several.
    modality: of an image whose header names none, such as a NIfTI or a picture: CT is taken to be
        in HU, DEPTH makes three float channels x, y and z (see `as_organized`). Recorded in
        `provenance`; a ValueError where the header says something else.
    unit: of the coordinates or distances of DEPTH and of organized points, which no file says.
    on_gap, on_duplicate, resample_tilt, voi_window: see `read_dicom`; the first three change
        nothing in other kinds of files, which have no slices of their own.
    hashes: put "file_sha256" and "pixel_sha256" into `provenance`. The second is the same for the
        same stored pixels in another file, header or lossless packing.
    Raises ReadError: the kinds in `errors`, of which no message holds a path or an identifier.
    """
    kind = sniff(path)
    if kind is None:
        what = "folder holds no DICOM series" if path.is_dir() else "file is of no known kind"
        raise UnsupportedFormatError(f"the {what}; read are {KNOWN}")
    if kind == "dicom":
        image = read_dicom(
            path,
            series=series,
            on_gap=on_gap,
            on_duplicate=on_duplicate,
            resample_tilt=resample_tilt,
            voi_window=voi_window,
            hashes=hashes,
        )
    else:
        if series is not None:
            raise ValueError(f"series={series!r} chooses among DICOM volumes, this is a {kind}")
        if voi_window is not None:
            raise ValueError(f"voi_window shows DICOM images, this is a {kind}")
        with hearing() as doubts:
            image = _read(path, kind, unit, hashes)
        if doubts:
            image = replace(image, provenance={**image.provenance, "doubts": sorted(doubts)})
    if modality is Modality.DEPTH and image.modality is Modality.PICTURE:
        image = as_organized(image, unit=unit)
        image = replace(image, provenance={**image.provenance, "modality": "given"})
    elif modality is not None:
        image = _given(image, modality)
    return replace(image, provenance=leaving(image.provenance))


def _read(path: Path, kind: Kind, unit: Unit | None, hashes: bool) -> Image:
    if kind == "nifti":
        return read_nifti(path, hashes=hashes)
    if kind == "picture":
        return read_picture(path, hashes=hashes)
    if kind == "video":
        return read_video(path, hashes=hashes)
    points = read_points(path, unit=unit, hashes=hashes)
    if isinstance(points, PointCloud):
        raise UnsupportedFormatError(
            "these are free points and no image; read them with medssl.data.readers.points"
        )
    return points


def _given(image: Image, modality: Modality) -> Image:
    """The image with a modality that its header leaves open."""
    if image.modality is modality:
        return image
    if image.modality not in _FREE:
        raise ValueError(f"the header says {image.modality} and modality= says {modality}")
    units = "HU" if modality is Modality.CT else image.units
    provenance = {**image.provenance, "modality": "given"}
    return replace(image, modality=modality, units=units, provenance=provenance)


def _packs_dicom(path: Path) -> bool:
    """Whether an archive holds a DICOM file; one that cannot be opened holds none."""
    try:
        with unpacking():
            return any(is_dicom(stream.read(132)) for stream in members(path))
    except ReadError:
        return False
