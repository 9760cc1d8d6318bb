"""TIFF pictures of one page: 8, 16 and 32 bits, floats, any number of channels."""

import io
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from medssl.data.readers.doubts import hearing
from medssl.data.readers.errors import CorruptFileError, UnsupportedFormatError
from medssl.data.readers.stored import decoding

_STARTS = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
_MAX_VALUES = 1 << 30  # more is taken for a damaged header
_WHITE_IS_ZERO, _BLACK_IS_ZERO, _RGB = 0, 1, 2
_ASSOCIATED = 1  # of ExtraSamples
_ALPHA = (_ASSOCIATED, 2)


def is_tiff(start: bytes) -> bool:
    """Whether bytes begin a TIFF or BigTIFF."""
    return start[:4] in _STARTS


@decoding("the TIFF")
def read_tiff(content: bytes) -> tuple[NDArray, NDArray[np.bool_] | None]:
    """(C, H, W) in the stored type, upright, and (H, W) where alpha is not 0; None without alpha.

    White-is-zero pictures are inverted, one-bit pictures become 0 and 255. Colors that were
    multiplied by a partial alpha are refused.
    """
    with hearing(), _opened(io.BytesIO(content)) as tiff:
        page = _only_page(tiff)
        if page.photometric not in (_WHITE_IS_ZERO, _BLACK_IS_ZERO, _RGB):
            return _by_pillow(content, page)
        try:
            stored = page.asarray()
        except (KeyError, ValueError) as error:
            if "imagecodecs" not in str(error):
                raise
            return _by_pillow(content, page)
        stored = _channels_first(stored, page.axes)
        if page.photometric == _WHITE_IS_ZERO:
            stored = _inverted(stored, page)
        if page.bitspersample == 1:
            stored = stored.astype(np.uint8) * np.uint8(255)
        return _without_alpha(_upright(stored, _orientation(page)), page)


@decoding("the TIFF header")
def tiff_shape(stream: BinaryIO) -> tuple[int, int, int]:
    """(C, H, W) from the header alone, as `read_tiff` would give it."""
    with hearing(), _opened(stream) as tiff:
        page = _only_page(tiff)
        height, width = page.imagelength, page.imagewidth
        if _orientation(page) >= 5:
            height, width = width, height
        channels = page.samplesperpixel - int(_has_alpha(page))
        return 3 if page.photometric == 3 else channels, height, width  # 3: a palette


def _opened(stream: BinaryIO) -> Any:
    import tifffile

    return tifffile.TiffFile(stream)


def _only_page(tiff: Any) -> Any:
    count, page = len(tiff.pages), tiff.pages[0]
    if count > 1 or page.imagedepth > 1:
        raise UnsupportedFormatError(
            f"a TIFF of {max(count, page.imagedepth)} pages is not supported; save one per file"
        )
    size = page.imagelength * page.imagewidth * page.samplesperpixel
    if not 0 < size <= _MAX_VALUES:
        raise CorruptFileError(
            f"the header asks for {size} values, and 1 to {_MAX_VALUES} are supported; "
            "if that is true, cut it into tiles"
        )
    return page


def _by_pillow(content: bytes, page: Any) -> tuple[NDArray, NDArray[np.bool_] | None]:
    """(C, H, W) of palettes, JPEG colors and LZW, with 8 bits, or 16 and one channel."""
    from PIL import Image as Pillow
    from PIL import ImageOps

    with Pillow.open(io.BytesIO(content), formats=("TIFF",)) as opened:
        picture: Pillow.Image = ImageOps.exif_transpose(opened)
        if picture.mode == "1":
            picture = picture.convert("L")
        mode = picture.mode
        array = np.asarray(picture.convert("RGB") if mode in ("P", "YCbCr") else picture)
    deep = mode not in ("I;16", "I;16B", "F") and page.dtype != np.uint8 and page.bitspersample > 8
    if deep or mode not in ("1", "L", "P", "RGB", "RGBA", "I;16", "I;16B", "F", "YCbCr"):
        raise UnsupportedFormatError(
            f"a TIFF of mode {mode} with {page.bitspersample} bits, packed as "
            f"{page.compression.name}, is not supported; save it uncompressed as grey or RGB"
        )
    stored = np.atleast_3d(array).transpose(2, 0, 1)
    return _without_alpha(stored, page) if mode == "RGBA" else (stored, None)


def _channels_first(stored: NDArray, axes: str) -> NDArray:
    if stored.ndim != len(axes):
        raise CorruptFileError("the TIFF holds no whole picture; copy the file again")
    if axes == "YX":
        return stored[None]
    if axes == "YXS":
        return stored.transpose(2, 0, 1)
    if axes == "SYX":
        return stored
    raise UnsupportedFormatError(
        f"a TIFF with axes {axes} is not supported; save one page per file"
    )


def _inverted(stored: NDArray, page: Any) -> NDArray:
    if stored.dtype.kind == "b":
        return ~stored
    if stored.dtype.kind != "u":
        raise UnsupportedFormatError(
            "a white-is-zero TIFF of signed or real numbers has no known white; invert it first"
        )
    return ((1 << page.bitspersample) - 1 - stored).astype(stored.dtype)


def _has_alpha(page: Any) -> bool:
    return bool(page.extrasamples) and page.extrasamples[-1] in _ALPHA


def _without_alpha(stored: NDArray, page: Any) -> tuple[NDArray, NDArray[np.bool_] | None]:
    if not _has_alpha(page):
        return stored, None
    *_, alpha = stored
    opaque = np.iinfo(stored.dtype).max if stored.dtype.kind in "ui" else 1
    if page.extrasamples[-1] == _ASSOCIATED and ((alpha != 0) & (alpha != opaque)).any():
        raise UnsupportedFormatError(
            "the colors of the TIFF were multiplied by a partial alpha; save it with unassociated "
            "alpha, or flatten it onto a background"
        )
    return stored[:-1], alpha != 0


def _orientation(page: Any) -> int:
    tag = page.tags.get(274)
    return int(tag.value) if tag is not None else 1


def _upright(stored: NDArray, orientation: int) -> NDArray:
    """(C, H, W) turned so that the first row is the top, by the TIFF/EXIF orientation 1 to 8."""
    if orientation >= 5:
        stored = stored.transpose(0, 2, 1)
    if orientation in (3, 4, 7, 8):
        stored = stored[:, ::-1]
    if orientation in (2, 3, 6, 7):
        stored = stored[:, :, ::-1]
    return stored
