"""PNG, JPEG and TIFF pictures with their stored values: 16 bits stay 16 bits, grey stays grey."""

import io
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image as Pillow
from PIL import ImageOps

from medssl.data.image import Image, pixel_affine
from medssl.data.modality import Modality
from medssl.data.readers.errors import CorruptFileError, ReadError, UnsupportedFormatError
from medssl.data.readers.stored import decoding, file_sha256, pixel_sha256, read_bytes, to_float32
from medssl.data.readers.tiff import is_tiff, read_tiff, tiff_shape

PNG = b"\x89PNG\r\n\x1a\n"
JPEG = b"\xff\xd8\xff"

_CHANNELS = {"1": 1, "L": 1, "LA": 1, "I;16": 1, "I;16B": 1, "RGB": 3, "RGBA": 3, "CMYK": 3}


def read_picture(path: Path, *, hashes: bool = False) -> Image:
    """A picture of (1, H, W) or (3, H, W) in its own pixel frame, without spacing.

    Pixels are the stored numbers and `value_range` what their type can hold: (0, 255), (0, 65535),
    None for floats. One-bit pictures become 0 and 255. A palette gives RGB, or grey where it holds
    only greys, CMYK gives RGB. Alpha is left out: where it is 0 the pixel is invalid, and where it
    is partial the stored color counts. The EXIF orientation is applied. TIFF: one page, any number
    of channels.
    Raises CorruptFileError and UnsupportedFormatError.
    """
    content = read_bytes(path)
    provenance: dict[str, Any] = {"reader": "picture"}
    if is_tiff(content):
        stored, visible = read_tiff(content)
    else:
        stored, visible = _read_png_or_jpeg(content, provenance)
    stored = np.ascontiguousarray(stored)  # (C, H, W)
    if visible is not None and not visible.all():
        provenance["alpha"] = "mask"
    if hashes:
        provenance["file_sha256"] = file_sha256(content)
        provenance["pixel_sha256"] = pixel_sha256(stored)
    pixels = torch.from_numpy(to_float32(stored))
    usable = pixels.isfinite().all(0)
    if visible is not None:
        usable &= torch.from_numpy(np.ascontiguousarray(visible))
    return Image(
        pixels=pixels,
        axes="HW",
        modality=Modality.PICTURE,
        affine=pixel_affine(),
        frame="pixel",
        valid=None if usable.all() else usable,
        value_range=_value_range(stored.dtype),
        provenance=provenance,
    )


def picture_shape(path: Path) -> tuple[int, int, int]:
    """(C, H, W) from the header alone, as `read_picture` would give it."""
    try:
        stream = path.open("rb")
    except OSError as error:
        raise ReadError(f"the file cannot be opened: {error.strerror}") from None
    with stream, decoding("the picture's header"):
        start = stream.read(26)
        stream.seek(0)
        if is_tiff(start):
            return tiff_shape(stream)
        with _opened(stream) as picture:
            width, height = picture.size
            if picture.getexif().get(0x0112, 1) >= 5:  # lies on its side
                width, height = height, width
            return _channels(picture, start), height, width


@decoding("the picture")
def _read_png_or_jpeg(
    content: bytes, provenance: dict[str, Any]
) -> tuple[NDArray, NDArray[np.bool_] | None]:
    """(C, H, W) uint8 or uint16, and (H, W) where alpha is not 0; None without alpha."""
    with _opened(io.BytesIO(content)) as picture:
        channels = _channels(picture, content)
        if content.startswith(PNG) and content[24] == 16 and content[25] != 0:
            return _without_alpha(_png_16_bit(content), channels)  # Pillow would drop 8 bits
        picture = ImageOps.exif_transpose(picture)
        clear = picture.info.get("transparency")
        if clear is not None and picture.mode.startswith("I"):  # one grey of 16 bits
            return np.asarray(picture)[None], np.asarray(picture) != clear
        if clear is not None:
            picture = picture.convert("RGBA")
        elif picture.mode == "CMYK":
            provenance["converted_from"] = "CMYK"
            picture = picture.convert("RGB")
        elif picture.mode == "P":
            picture = picture.convert("RGB")
        elif picture.mode == "1":
            picture = picture.convert("L")
        array = np.asarray(picture)
    return _without_alpha(np.atleast_3d(array).transpose(2, 0, 1), channels)


def _opened(stream: Any) -> Any:
    """The Pillow image over a stream, pixels not yet decoded."""
    try:
        picture = Pillow.open(stream, formats=("PNG", "JPEG"))
    except Pillow.DecompressionBombError as error:
        raise CorruptFileError(
            "the header asks for more than 178 million pixels; if that is true, cut it into tiles"
        ) from error
    if picture.format == "PNG" and getattr(picture, "n_frames", 1) > 1:
        raise UnsupportedFormatError("an animated PNG is not supported; save one file per frame")
    return picture


def _channels(picture: Any, start: bytes) -> int:
    """Channels without alpha; a palette of greys counts as one."""
    if start.startswith(PNG) and start[24] == 16:  # Pillow calls grey with alpha RGBA
        return 1 if start[25] in (0, 4) else 3
    if picture.mode == "P":
        palette = np.array(picture.getpalette("RGB")).reshape(-1, 3)
        return 1 if (palette == palette[:, :1]).all() else 3
    if picture.mode not in _CHANNELS:
        raise UnsupportedFormatError(
            f"pictures of mode {picture.mode} are not supported; save it as grey or RGB"
        )
    return _CHANNELS[picture.mode]


def _png_16_bit(content: bytes) -> NDArray[np.uint16]:
    """(C, H, W) of a 16-bit PNG with more than one channel."""
    from torchvision.io import ImageReadMode, decode_png

    encoded = torch.frombuffer(bytearray(content), dtype=torch.uint8)
    with warnings.catch_warnings():  # it is to move to another package; the versions are pinned
        warnings.simplefilter("ignore", DeprecationWarning)
        return decode_png(encoded, mode=ImageReadMode.UNCHANGED).numpy()


def _without_alpha(stored: NDArray, channels: int) -> tuple[NDArray, NDArray[np.bool_] | None]:
    """(C, H, W) of `channels` channels; a last one beyond these and RGB is alpha."""
    visible = stored[-1] != 0 if len(stored) in (2, 4) else None
    return stored[:channels], visible  # a grey palette was expanded to three equal channels


def _value_range(dtype: np.dtype) -> tuple[float, float] | None:
    if dtype.kind == "f":
        return None
    limits = np.iinfo(dtype)
    return float(limits.min), float(limits.max)
