"""Stored values of one DICOM slice, and what they mean: padding, inversion, rescale."""

import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medssl.data.readers.dicom_elements import Elements, syntax_name
from medssl.data.readers.dicom_frames import transformation
from medssl.data.readers.dicom_header import is_quantitative, parse
from medssl.data.readers.dicom_voi import Curve, header_window
from medssl.data.readers.doubts import MORE_BYTES, MORE_FRAMES, hearing, repeat
from medssl.data.readers.errors import (
    MissingDecoderError,
    NoPixelDataError,
    TruncatedPixelDataError,
    UnsupportedPhotometricError,
)
from medssl.data.readers.stored import GZIP, file_sha256, opened, unzipped

_PLUGINS = ("pyjpegls", "pylibjpeg", "pillow", "pydicom", "gdcm")
"""The first that serves decodes; gdcm is last because it ends the process over damaged JPEG-LS."""

_PIXELS = ("PixelData", "FloatPixelData", "DoubleFloatPixelData")
_COLORS = frozenset({"RGB", "YBR_FULL", "YBR_FULL_422", "YBR_RCT", "YBR_ICT"})


@dataclass(frozen=True, slots=True, kw_only=True)
class Slice:
    """Stored values and what they become: intercept + slope * stored.

    stored: (H, W), or (3, H, W) RGB, as decoded.
    mirror: stored x first becomes mirror - x (an inverted MONOCHROME1); None where it stays.
    valid: (H, W) bool, False where the header declares padding; None where all are valid.
    value_range: what the smallest and largest storable number become.
    before: the values before a modality table, where there is one.
    """

    stored: NDArray
    slope: float = 1.0
    intercept: float = 0.0
    mirror: float | None = None
    valid: NDArray[np.bool_] | None = None
    value_range: tuple[float, float]
    before: NDArray | None = None

    def write(self, out: NDArray[np.float32]) -> None:
        """Fill `out`, of the shape of `stored`, with the values in the modality's unit."""
        if self.stored.dtype.itemsize > 2:  # float32 would round before the rescale
            values = self.stored.astype(np.float64)
            values = values if self.mirror is None else self.mirror - values
            np.copyto(out, values * self.slope + self.intercept, casting="same_kind")
            return
        np.copyto(out, self.stored, casting="same_kind")
        if self.mirror is not None:
            np.subtract(np.float32(self.mirror), out, out=out)
        if self.slope != 1:
            out *= np.float32(self.slope)
        if self.intercept != 0:
            out += np.float32(self.intercept)

    def equals(self, other: "Slice") -> bool:
        """Whether both hold the same values."""
        mine, theirs = ((s.slope, s.intercept, s.mirror) for s in (self, other))
        return mine == theirs and np.array_equal(self.stored, other.stored)


class OpenObject:
    """One image object, parsed once; a frame is decoded when it is asked for.

    Raises TruncatedPixelDataError, MissingDecoderError, NoPixelDataError and
    UnsupportedPhotometricError, and whatever pydicom and the decoders raise over damaged bytes.
    """

    def __init__(self, path: Path, *, hashes: bool) -> None:
        self.file_sha256: str | None = None
        with hearing() as self.doubts, opened(path) as stream:
            zipped = stream.read(2) == GZIP
            stream.seek(0)
            if not hashes and not zipped:  # pydicom reads what it needs, without a second copy
                self.size = path.stat().st_size
                self.dataset = parse(stream, header_only=False)
            else:
                content = stream.read()
                self.file_sha256 = file_sha256(content) if hashes else None
                content = unzipped(content)
                self.size = len(content)
                self.dataset = parse(io.BytesIO(content), header_only=False)
        self.header = Elements(self.dataset)
        self._sheet: NDArray | None = None  # of a mosaic

    def slice(self, frame: int, tile: tuple[int, int] | None = None) -> Slice:
        """A frame, or a tile of the only one.

        MONOCHROME1 is to be inverted unless the values measure something.
        """
        dataset, header = self.dataset, self.header
        photometric = str(header.get("PhotometricInterpretation", ""))
        stored = self._tile(frame, tile) if tile else self._decoded(frame)
        if photometric == "PALETTE COLOR":
            return _with_palette(dataset, stored)
        if photometric in _COLORS:
            return _color_slice(stored, int(dataset.BitsStored))
        if photometric not in ("MONOCHROME1", "MONOCHROME2"):
            raise UnsupportedPhotometricError(
                "only grey, palette, RGB and YBR pixels are supported; convert it first"
            )
        if header.get("ModalityLUTSequence"):
            return _with_modality_lut(dataset, stored)
        low, high = _stored_range(header, stored)
        rescale = transformation(header, frame)
        slope = _number(rescale, "RescaleSlope", 1.0)
        intercept = _number(rescale, "RescaleIntercept", 0.0)
        ends = sorted((low * slope + intercept, high * slope + intercept))
        inverted = _is_inverted(header)
        return Slice(
            stored=stored,
            slope=slope,
            intercept=intercept,
            mirror=low + high if inverted else None,
            valid=_valid(header, stored),
            value_range=(ends[0], ends[1]),
        )

    def window(self, frame: int) -> Curve:
        """How the header wants a frame shown."""
        return header_window(self.header, frame)

    def _decoded(self, frame: int) -> NDArray:
        plain = _plain(self.header, frame)
        return _decoded(self.dataset, frame) if plain is None else plain

    def _tile(self, index: int, size: tuple[int, int]) -> NDArray:
        if self._sheet is None:
            self._sheet = self._decoded(0)
        row, column = divmod(index, self._sheet.shape[1] // size[1])
        rows = self._sheet[row * size[0] :][: size[0]]
        return np.ascontiguousarray(rows[:, column * size[1] :][:, : size[1]])


def _color_slice(stored: NDArray, bits: int) -> Slice:
    """stored: (H, W, 3)."""
    planes = np.ascontiguousarray(stored.transpose(2, 0, 1))
    return Slice(stored=planes, value_range=(0.0, 2.0**bits - 1))


def _with_palette(dataset: Any, stored: NDArray) -> Slice:
    from pydicom.pixels import apply_color_lut

    if "RedPaletteColorLookupTableDescriptor" not in dataset:
        raise UnsupportedPhotometricError("a palette picture comes without its palette")
    colors = apply_color_lut(stored, dataset)[..., :3]
    return _color_slice(colors, 8 * colors.dtype.itemsize)


def _with_modality_lut(dataset: Any, stored: NDArray) -> Slice:
    """The table takes the place of slope and intercept (PS3.3 C.11.1)."""
    from pydicom.pixels import apply_modality_lut

    values = apply_modality_lut(stored, dataset)
    table = apply_modality_lut(np.arange(*_ends(dataset)), dataset)
    ends = (float(table.min()), float(table.max()))
    inverted = _is_inverted(dataset)
    return Slice(
        stored=values,
        mirror=sum(ends) if inverted else None,
        valid=_valid(dataset, stored),
        value_range=ends,
        before=stored,
    )


def _is_inverted(dataset: Any) -> bool:
    """Whether small values are bright: two ways to say the same; never of measured values."""
    said = (
        dataset.get("PhotometricInterpretation") == "MONOCHROME1",
        str(dataset.get("PresentationLUTShape") or "") == "INVERSE",
    )
    return any(said) and not is_quantitative(dataset)


def _ends(dataset: Any) -> tuple[int, int]:
    """First stored value of the modality table, and the one after its last."""
    entries, first, _ = dataset.ModalityLUTSequence[0].LUTDescriptor
    return int(first), int(first) + (int(entries) or 1 << 16)


def _decoded(dataset: Any, frame: int) -> NDArray:
    """(H, W) or (H, W, 3); YBR becomes RGB, unused high bits are masked or sign-extended."""
    if not any(name in dataset for name in _PIXELS):
        raise NoPixelDataError("the object has no pixel data")
    from pydicom.pixels import pixel_array

    return pixel_array(dataset, index=frame, decoding_plugin=_plugin(dataset))


def _plain(dataset: Elements, frame: int) -> NDArray | None:
    """The most common layout, 16 bits of grey as they lie in the file; None for any other."""
    syntax = dataset.dataset.file_meta.TransferSyntaxUID
    bits = int(dataset.get("BitsStored") or 0)
    layout = (
        syntax.is_encapsulated or syntax.is_deflated or not syntax.is_little_endian,
        int(dataset.get("SamplesPerPixel") or 1),
        int(dataset.get("BitsAllocated") or 0),
        int(dataset.get("HighBit", bits - 1)),
    )
    rows, columns = int(dataset.get("Rows")), int(dataset.get("Columns"))
    size, content = rows * columns, dataset.get("PixelData")
    if layout != (False, 1, 16, bits - 1) or not content or len(content) < 2 * size * (frame + 1):
        return None
    beyond = len(content) - 2 * size * int(dataset.get("NumberOfFrames") or 1)
    if beyond > 1:  # as pydicom warns of, which is not asked here
        repeat(frozenset({MORE_FRAMES if beyond >= 2 * size else MORE_BYTES}))
    signed = bool(int(dataset.get("PixelRepresentation") or 0))
    stored = np.frombuffer(content, "<i2" if signed else "<u2", size, 2 * size * frame)
    if bits < 16:  # what lies in the high bits is not part of the number
        stored = (stored << (16 - bits)) >> (16 - bits)
    return stored.reshape(rows, columns)


def _plugin(dataset: Any) -> str:
    """The decoder to use; "" for pixels that are not packed, which must be complete."""
    from pydicom.pixels import get_decoder

    syntax = dataset.file_meta.TransferSyntaxUID
    if not syntax.is_encapsulated:
        name = next(name for name in _PIXELS if name in dataset)
        have, need = len(dataset[name].value), _expected_bytes(dataset)
        if have < need:
            raise TruncatedPixelDataError(
                f"the header asks for {need} bytes of pixels and there are {have}; "
                "copy the file again"
            )
        return ""
    try:
        decoder = get_decoder(syntax)
    except NotImplementedError:
        raise MissingDecoderError(
            f"nothing decodes {syntax_name(syntax)} pixels; convert the series to another transfer "
            "syntax"
        ) from None
    if not decoder.is_available:
        raise MissingDecoderError(
            f"{syntax.name} needs one of: {'; '.join(decoder.missing_dependencies)}"
        )
    order = [name for name in _PLUGINS if name in decoder.available_plugins]
    if syntax.keyword == "JPEGExtended12Bit" and int(dataset.BitsStored) > 8:
        order = [name for name in order if name != "pillow"] or order  # it knows 8 bits only
    return order[0] if order else decoder.available_plugins[0]


def _expected_bytes(dataset: Any) -> int:
    from pydicom.pixels.utils import get_expected_length

    return int(get_expected_length(dataset))


def _stored_range(dataset: Elements, stored: NDArray) -> tuple[float, float]:
    if stored.dtype.kind == "f":
        return float(np.nanmin(stored)), float(np.nanmax(stored))
    bits = int(dataset.get("BitsStored"))
    if int(dataset.get("PixelRepresentation", 0)):
        return -(1 << bits - 1), (1 << bits - 1) - 1
    return 0, (1 << bits) - 1


def _valid(dataset: Any, stored: NDArray) -> NDArray[np.bool_] | None:
    padding = _padding(dataset)
    if padding is None:
        return None
    padded = (stored >= padding[0]) & (stored <= padding[1])
    return ~padded if padded.any() else None


def _padding(dataset: Any) -> tuple[int, int] | None:
    """The stored values, both included, that the header declares as padding."""
    value = dataset.get("PixelPaddingValue")
    if value is None:
        return None
    other = dataset.get("PixelPaddingRangeLimit")
    ends = [_signed(dataset, int(v)) for v in (value, value if other is None else other)]
    return min(ends), max(ends)


def _signed(dataset: Any, value: int) -> int:
    """Padding written as unsigned over signed pixels, which explicit VR files may do."""
    bits = int(dataset.get("BitsAllocated"))
    if int(dataset.get("PixelRepresentation", 0)) and value >= 1 << bits - 1:
        return value - (1 << bits)
    return value


def _number(dataset: Any, name: str, otherwise: float) -> float:
    value = dataset.get(name)
    return otherwise if value is None else float(value)
