"""One small file of each kind that is read, as bytes, to be damaged and read."""

import gzip
import io
import zipfile
from functools import cache

import numpy as np
from pydicom.dataset import Dataset
from pydicom.encaps import encapsulate
from pydicom.uid import (
    UID,
    DeflatedExplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGBaseline8Bit,
    JPEGLSLossless,
    RLELossless,
)

from medssl.data.synthetic.faulty_series import FAULTS, as_file, clean, store, true_hu


@cache
def sample_files() -> dict[str, bytes]:
    """File name -> content; equal on every call."""
    files = {f"{name}.dcm": as_file(dataset) for name, dataset in _dicom().items()}
    files |= {f"{name}.tiff": content for name, content in _tiffs().items()}
    files |= _niftis() | _points()
    files["a.png"], files["a.jpg"] = _picture("PNG"), _picture("JPEG")
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
        for index, dataset in enumerate(clean("zipped")[:2]):
            archive.writestr(zipfile.ZipInfo(str(index)), as_file(dataset))
    files["a.zip"] = packed.getvalue()
    return files


def _dicom() -> dict[str, Dataset]:
    plain = clean("sample")[0]
    found = {"plain": plain, "enhanced": FAULTS["enhanced_multi_frame"](clean("enhanced"))[0]}
    found["implicit"] = FAULTS["no_preamble"](clean("implicit"))[0]
    found["cine"] = _cine()
    for name, syntax in (
        ("jpeg_ls", JPEGLSLossless),
        ("jpeg_2000", JPEG2000Lossless),
        ("rle", RLELossless),
    ):
        dataset = clean(name)[0]
        store(dataset, np.arange(64 * 64, dtype=np.uint16).reshape(64, 64))
        dataset.compress(syntax, encoding_plugin="pydicom" if name == "rle" else "")
        found[name] = dataset
    deflated = clean("deflated")[0]
    deflated.file_meta.TransferSyntaxUID = DeflatedExplicitVRLittleEndian
    return found | {"deflated": deflated}


def _cine() -> Dataset:
    """Four ultrasound frames as JPEG, 20 a second."""
    dataset = clean("cine")[0]
    for name in ("ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing"):
        delattr(dataset, name)
    store(dataset, np.zeros((16, 16), np.uint16))
    dataset.Modality, dataset.PhotometricInterpretation = "US", "YBR_FULL_422"
    dataset.SamplesPerPixel, dataset.PlanarConfiguration = 3, 0
    dataset.BitsAllocated, dataset.BitsStored, dataset.HighBit = 8, 8, 7
    dataset.NumberOfFrames, dataset.FrameTime = 4, 50
    dataset.file_meta.TransferSyntaxUID = UID(JPEGBaseline8Bit)
    dataset.add_new(0x7FE00010, "OB", encapsulate([_picture("JPEG")] * 4))
    dataset["PixelData"].is_undefined_length = True
    return dataset


def _picture(kind: str) -> bytes:
    from PIL import Image as Pillow

    colors = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Pillow.fromarray(colors).save(buffer, kind)
    return buffer.getvalue()


def _tiffs() -> dict[str, bytes]:
    import tifffile

    files = {}
    rng = np.random.default_rng(0)
    for name, values, changes in (
        ("grey16", rng.integers(0, 65536, (12, 10), dtype=np.uint16), {}),
        ("xyz", rng.normal(size=(12, 10, 3)).astype(np.float32), {"photometric": "rgb"}),
        ("deflate", rng.integers(0, 4, (64, 64), dtype=np.uint8), {"compression": "zlib"}),
    ):
        buffer = io.BytesIO()
        tifffile.imwrite(buffer, values, metadata=None, **changes)
        files[name] = buffer.getvalue()
    return files


def _niftis() -> dict[str, bytes]:
    import nibabel

    affine = np.diag([0.8, 0.5, 2.0, 1.0])
    plain = nibabel.Nifti1Image(true_hu().T, affine).to_bytes()
    series = nibabel.Nifti2Image(np.zeros((5, 4, 3, 2), np.float32), affine).to_bytes()
    return {"a.nii": plain, "b.nii": series, "a.nii.gz": gzip.compress(plain, mtime=0)}


def _points() -> dict[str, bytes]:
    xyz = np.random.default_rng(0).normal(size=(50, 3)).astype("<f4")
    ply = "ply\nformat {} 1.0\nelement vertex 50\n" + "".join(
        f"property float {axis}\n" for axis in "xyz"
    )
    faces = "element face 2\nproperty list uchar int vertex_indices\nend_header\n"
    face = b"\x03" + np.array([0, 1, 2], "<i4").tobytes()
    pcd = (
        "VERSION .7\nFIELDS x y z\nSIZE 4 4 4\nTYPE F F F\nCOUNT 1 1 1\nWIDTH {}\nHEIGHT {}\n"
        "VIEWPOINT 0 0 0 1 0 0 0\nPOINTS 50\nDATA {}\n"
    )
    text = "\n".join(" ".join(f"{value:.6g}" for value in row) for row in xyz).encode()
    return {
        "binary.ply": (ply.format("binary_little_endian") + faces).encode()
        + xyz.tobytes()
        + 2 * face,
        "ascii.ply": (ply.format("ascii") + "end_header\n").encode() + text,
        "binary.pcd": pcd.format(50, 1, "binary").encode() + xyz.tobytes(),
        "ascii.pcd": pcd.format(10, 5, "ascii").encode() + text,
        "a.xyz": text,
    }
