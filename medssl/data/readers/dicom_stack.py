"""Slices of a DICOM volume on their way into one array, each read once."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from medssl.data.modality import Modality
from medssl.data.readers.dicom_header import Header
from medssl.data.readers.dicom_pixels import OpenObject, Slice
from medssl.data.readers.dicom_positioning import positioning
from medssl.data.readers.dicom_voi import Curve, Window, given_window
from medssl.data.readers.doubts import hearing
from medssl.data.readers.errors import UnsupportedFormatError, differing_slices
from medssl.data.readers.stored import PixelDigest, combined_sha256, decoding

OnDuplicate = Literal["error", "first", "last"]


class SliceStack:
    """Slices on their way into one image.

    axes: the sizes (T, D), (D,) or (T,) of the axes that slices are counted along, last fastest;
        () for a single slice.
    frames: how many frames of each file will be asked for; then it is forgotten.
    opened: objects that were parsed before.
    window, modality: what the values are shown through, instead of kept in their unit.

    Raises UnsupportedFormatError for a named window and another modality than CT.
    """

    def __init__(
        self,
        axes: tuple[int, ...],
        *,
        hashes: bool,
        frames: Mapping[Path, int],
        opened: dict[Path, OpenObject],
        window: Window | None,
        modality: Modality,
    ) -> None:
        self._by_header = window == "dicom"
        self._curve: Curve | None = None
        if window is not None and not self._by_header:
            self._curve = given_window(window, modality)
        self.axes, self.count, self.filled = axes, math.prod(axes), 0
        self.inverted = self.rescaled = False
        self.doubts: set[str] = set()
        self.positioning: dict[str, str] | None = None
        self.value_range = (math.inf, -math.inf)
        self._pixels: NDArray[np.float32] | None = None  # (C, N, H, W)
        self._valid: NDArray[np.bool_] | None = None  # (N, H, W)
        self._opened, self._left = opened, dict(frames)
        self._digest: PixelDigest | None = None
        self._file_digests: dict[Path, str] | None = {} if hashes else None

    def add(self, place: Sequence[Header]) -> None:
        """Read the next position; further files there must be copies of the first."""
        (piece, curve), *copies = [self._read(header) for header in place]
        others = [copy for copy, _ in copies]
        if not all(piece.equals(other) for other in others):
            raise differing_slices(1)
        channels = piece.stored.reshape(-1, *place[0].shape)
        if self._pixels is None:
            size = (len(channels), self.count, *place[0].shape)
            self._pixels = np.empty(size, dtype=np.float32)  # numpy asks for huge pages: 2x faster
            if self._file_digests is not None:
                self._digest = PixelDigest((len(channels), *self.axes, *place[0].shape))
        out = self._pixels[:, self.filled]
        piece.write(out if piece.stored.ndim == 3 else out[0])
        if self._curve is not None or self._by_header:
            self._show(out, piece, curve)
        if piece.valid is not None:
            if self._valid is None:
                self._valid = np.ones(self._pixels.shape[1:], dtype=bool)
            self._valid[self.filled] = piece.valid
        if self._digest is not None:
            self._digest.update(piece.stored if piece.before is None else piece.before)
        self._note(piece)
        self.filled += 1

    def pixels(self) -> Tensor:
        """(C, *axes, H, W)."""
        assert self._pixels is not None
        assert self.filled == self.count
        channels, _, *plane = self._pixels.shape
        return torch.from_numpy(self._pixels.reshape(channels, *self.axes, *plane))

    def valid(self, *, has_time: bool) -> Tensor | None:
        """(*axes but T, H, W) bool, True where every time point is; None where all are."""
        if self._valid is None:
            return None
        valid = self._valid.reshape(*self.axes, *self._valid.shape[1:])
        return torch.from_numpy(valid.all(0) if has_time else valid)

    def units(self) -> str:
        """The stored numbers, unless some slice was rescaled or went through a table."""
        if self._curve is not None or self._by_header:
            return "window"
        return "rescaled" if self.rescaled else "stored"

    def hashes(self) -> dict[str, str]:
        """Both hashes, where they were asked for."""
        if self._file_digests is None or self._digest is None:
            return {}
        return {
            "file_sha256": combined_sha256(list(self._file_digests.values())),
            "pixel_sha256": self._digest.hexdigest(),
        }

    def _read(self, header: Header) -> tuple[Slice, Curve | None]:
        with hearing() as doubts, decoding("the pixel data"):
            path, hashes = header.path, self._file_digests is not None
            found = self._opened.get(path)
            if found is None:
                found = self._opened[path] = OpenObject(path, hashes=hashes)
            if self._file_digests is not None and found.file_sha256 is not None:
                self._file_digests[path] = found.file_sha256
            if self.positioning is None:
                self.positioning = positioning(found.header)
            self._left[path] -= 1
            if self._left[path] == 0:
                del self._opened[path]
            curve = found.window(header.frame) if self._by_header else None
            piece = found.slice(header.frame, header.tile)
        self.doubts |= doubts | found.doubts
        return piece, curve

    def _show(self, out: NDArray[np.float32], piece: Slice, curve: Curve | None) -> None:
        """Put (C, H, W) values in their unit through a window, in place."""
        if len(out) > 1:
            raise UnsupportedFormatError("a color picture has no window; leave voi_window= out")
        if self._curve is not None:
            out[:] = self._curve(out)
            return
        assert curve is not None
        if piece.mirror is None:
            out[:] = curve(out)
        else:  # the header's window is for the values before they were inverted
            out[:] = 1 - curve(np.float32(sum(piece.value_range)) - out)

    def _note(self, piece: Slice) -> None:
        self.inverted |= piece.mirror is not None
        self.rescaled |= (piece.slope, piece.intercept) != (1, 0) or piece.before is not None
        low, high = self.value_range
        ends = piece.value_range if self.units() != "window" else (0.0, 1.0)
        self.value_range = (min(low, ends[0]), max(high, ends[1]))


def one_of(place: Sequence[Header], on_duplicate: OnDuplicate) -> tuple[Header, ...]:
    """Of slices at one position the one to read, first or last by time and instance number."""
    if on_duplicate == "error" or len(place) == 1:
        return tuple(place)

    def when(header: Header) -> tuple[float, float, str, int]:
        return (
            -math.inf if header.taken_s is None else header.taken_s,
            -math.inf if header.instance_number is None else header.instance_number,
            header.instance_uid,
            header.frame,
        )

    ordered = sorted(place, key=when)
    return (ordered[0 if on_duplicate == "first" else -1],)
