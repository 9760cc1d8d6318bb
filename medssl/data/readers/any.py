"""One door for every image on disk; the content decides, never the suffix."""

from dataclasses import replace
from pathlib import Path
from typing import Literal

from medssl.data.image import Image
from medssl.data.modality import Modality
from medssl.data.readers.archive import is_archive, members
from medssl.data.readers.dicom import read_dicom
from medssl.data.readers.dicom_gaps import OnGap
from medssl.data.readers.dicom_header import is_dicom
from medssl.data.readers.dicom_stack import OnDuplicate
from medssl.data.readers.dicom_voi import Window
from medssl.data.readers.errors import ReadError, UnsupportedFormatError
from medssl.data.readers.nifti import is_nifti, read_nifti
from medssl.data.readers.picture import JPEG, PNG, read_picture
from medssl.data.readers.stored import first_bytes
from medssl.data.readers.tiff import is_tiff

Kind = Literal["dicom", "nifti", "picture"]

_START_BYTES = 544
_FREE = frozenset({Modality.UNKNOWN, Modality.OTHER, Modality.PICTURE})
"""What a given modality may replace; a header's word stands."""


def sniff(path: Path) -> Kind | None:
    """What a file is by its first bytes; "dicom" is a folder or an archive that holds DICOM, too."""
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
    if is_dicom(start) or (is_archive(start) and _packs_dicom(path)):
        return "dicom"
    return "nifti" if not start and path.name.lower().endswith(".nii.gz") else None


def read_image(
    path: Path,
    *,
    series: str | None = None,
    modality: Modality | None = None,
    on_gap: OnGap = "error",
    on_duplicate: OnDuplicate = "error",
    resample_tilt: bool = False,
    voi_window: Window | None = None,
    hashes: bool = False,
) -> Image:
    """The image in a file, or the volume in a folder or archive of DICOM slices.

    series: salted id of the volume, where a folder, archive or file holds several.
    modality: of an image whose header names none, such as a NIfTI or a picture: CT is taken to be
        in HU. Recorded in `provenance`; a ValueError where the header says something else.
    on_gap, on_duplicate, resample_tilt, voi_window: see `read_dicom`; for other kinds of files they
        change nothing, as these have no slices of their own.
    hashes: put "file_sha256" and "pixel_sha256" into `provenance`. The second is the same for the
        same stored pixels in another file, header or lossless packing.
    Raises ReadError: the kinds in `errors`, of which no message holds a path or an identifier.
    """
    kind = sniff(path)
    if kind is None:
        what = "folder holds no DICOM series" if path.is_dir() else "file is of no known kind"
        raise UnsupportedFormatError(
            f"the {what}; read are DICOM, NIfTI (.nii, .nii.gz), PNG, JPEG and TIFF"
        )
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
        return image if modality is None else _given(image, modality)
    if series is not None:
        raise ValueError(f"series={series!r} chooses among DICOM volumes; this is a {kind} file")
    if voi_window is not None:
        raise ValueError(f"voi_window shows DICOM images; this is a {kind} file")
    image = (read_nifti if kind == "nifti" else read_picture)(path, hashes=hashes)
    return image if modality is None else _given(image, modality)


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
        return any(is_dicom(stream.read(132)) for stream in members(path))
    except ReadError:
        return False
