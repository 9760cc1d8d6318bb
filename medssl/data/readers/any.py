"""One door for every image on disk; the content decides, never the suffix."""

from pathlib import Path
from typing import Literal

from medssl.data.image import Image
from medssl.data.readers.dicom import read_dicom
from medssl.data.readers.dicom_header import is_dicom
from medssl.data.readers.errors import UnsupportedFormatError
from medssl.data.readers.nifti import is_nifti, nifti_start, read_nifti
from medssl.data.readers.picture import JPEG, PNG, read_picture
from medssl.data.readers.tiff import is_tiff

Kind = Literal["dicom", "nifti", "picture"]


def sniff(path: Path) -> Kind | None:
    """What a file is by its first bytes, and "dicom" for a folder with a DICOM file in it."""
    if path.is_dir():
        files = (file for file in sorted(path.rglob("*")) if file.is_file())
        return "dicom" if any(sniff(file) == "dicom" for file in files) else None
    start = nifti_start(path)
    if start[128:132] == b"DICM":  # a preamble may begin like a TIFF, for other programs
        return "dicom"
    if start.startswith((PNG, JPEG)) or is_tiff(start):
        return "picture"
    if is_nifti(start):
        return "nifti"
    if is_dicom(start):
        return "dicom"
    return "nifti" if not start and path.name.lower().endswith(".nii.gz") else None


def read_image(path: Path, *, series: str | None = None, hashes: bool = False) -> Image:
    """The image in a file, or the volume in a folder of DICOM slices.

    series: salted id of the volume, where a folder holds several.
    hashes: put "file_sha256" and "pixel_sha256" into `provenance`. The second is the same for the
        same stored pixels in another file, header or lossless packing.
    Raises ReadError: the kinds in `errors`, of which no message holds a path or an identifier.
    """
    kind = sniff(path)
    if kind == "dicom":
        return read_dicom(path, series=series, hashes=hashes)
    if kind is None:
        what = "folder holds no DICOM series" if path.is_dir() else "file is of no known kind"
        raise UnsupportedFormatError(
            f"the {what}; read are DICOM, NIfTI (.nii, .nii.gz), PNG, JPEG and TIFF"
        )
    if series is not None:
        raise ValueError(f"series={series!r} chooses in a DICOM folder; this is a {kind} file")
    return (read_nifti if kind == "nifti" else read_picture)(path, hashes=hashes)
