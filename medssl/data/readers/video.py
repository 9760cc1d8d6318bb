"""Films with the true time of each frame, through PyAV (https://pyav.org), the extra `video`."""

import hashlib
import io
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray

from medssl.data.image import Image, pixel_affine
from medssl.data.modality import Modality
from medssl.data.readers.errors import (
    CorruptFileError,
    MissingDecoderError,
    UnsupportedFormatError,
)
from medssl.data.readers.stored import PixelDigest, decoding, opened

_MAX_BYTES = 8 << 30  # of the float32 film
_GREY = {"gray": 8, "gray8": 8, "gray10le": 10, "gray12le": 12, "gray14le": 14, "gray16le": 16}
_TIMES_TOLERANCE_S = 1e-9
_LEAST_STEP_S = 0.1


@dataclass(frozen=True, slots=True, kw_only=True)
class VideoHeader:
    """What a film announces, without decoding it.

    shape: (H, W) upright. num_frames: None where the container does not say. codec: its short name.
    """

    shape: tuple[int, int]
    channels: int
    num_frames: int | None
    codec: str


def is_video(start: bytes) -> bool:
    """Whether bytes begin an MP4 or MOV, Matroska or WebM, AVI, or an MPEG program stream."""
    return (
        start[4:8] in (b"ftyp", b"moov")
        or start.startswith((b"\x1aE\xdf\xa3", b"\x00\x00\x01\xba"))
        or (start[:4] == b"RIFF" and start[8:12] == b"AVI ")
        or (start[:1] == b"\x47" and start[188:189] == b"\x47" and start[376:377] == b"\x47")
    )


def read_video(path: Path, *, hashes: bool = False) -> Image:
    """A film as (3, T, H, W), or (1, T, H, W) of a grey one, in its own pixel frame.

    Colors are 8-bit RGB, grey keeps its depth. `times_s` are the presentation times since the first
    frame, also at a varying rate; NaN where the file has none. A display rotation is applied.
    Raises MissingDecoderError without PyAV, CorruptFileError for a film that is damaged or ends
    before it says, and UnsupportedFormatError for one without pictures or of over 8 GiB as float32.
    """
    with _container(path) as container:
        stream = _pictures(container)
        header, bits = _described(stream), _GREY.get(stream.codec_context.pix_fmt or "")
        frames, times, rotation = _decoded(container, stream, header, bits)
    stored = np.stack(frames)  # (T, C, H, W)
    stored = np.ascontiguousarray(stored.transpose(1, 0, 2, 3))
    provenance: dict[str, Any] = {"reader": "video", "codec": header.codec}
    if rotation:
        provenance["rotated_deg"] = rotation
    if hashes:
        with opened(path) as content:
            digest = hashlib.file_digest(cast(io.BufferedReader, content), "sha256")
        provenance["file_sha256"] = digest.hexdigest()
        pixels = PixelDigest(stored.shape)
        pixels.update(stored)
        provenance["pixel_sha256"] = pixels.hexdigest()
    return Image(
        pixels=torch.from_numpy(stored.astype(np.float32)),
        axes="THW",
        modality=Modality.PICTURE,
        affine=pixel_affine(),
        frame="pixel",
        times_s=times,
        value_range=(0.0, 2.0 ** (bits or 8) - 1),
        provenance=provenance,
    )


def video_header(path: Path) -> VideoHeader:
    """What the film announces; raises what `read_video` raises about it."""
    with _container(path) as container:
        return _described(_pictures(container))


@contextmanager
def _container(path: Path) -> Iterator[Any]:
    if find_spec("av") is None:
        raise MissingDecoderError(
            "films need PyAV, which is not installed; pip install medssl[video]"
        )
    import av
    import av.logging

    av.logging.set_level(av.logging.PANIC)  # ffmpeg would print paths
    with opened(path) as content, decoding("the film"), av.open(content) as container:
        yield container


def _pictures(container: Any) -> Any:
    if not container.streams.video:
        raise UnsupportedFormatError("the film has sound and no pictures; leave it out")
    return container.streams.video[0]


def _described(stream: Any) -> VideoHeader:
    width, height = stream.codec_context.width, stream.codec_context.height
    if width < 1 or height < 1:
        raise CorruptFileError("the film announces no size; copy it again")
    return VideoHeader(
        shape=(height, width),
        channels=1 if stream.codec_context.pix_fmt in _GREY else 3,
        num_frames=stream.frames or None,
        codec=str(stream.codec_context.name),
    )


def _decoded(
    container: Any, stream: Any, header: VideoHeader, bits: int | None
) -> tuple[list[NDArray], tuple[float, ...], int]:
    """Frames (C, H, W) in the order they are shown, their times, and how they were turned."""
    frame_bytes = 4 * header.channels * math.prod(header.shape)
    _check_size((header.num_frames or 1) * frame_bytes)
    frames: list[NDArray] = []
    shown: list[float | None] = []
    rotation = 0
    for frame in container.decode(stream):
        _check_size((len(frames) + 1) * frame_bytes)
        if frame.is_corrupt:
            raise CorruptFileError("a frame of the film is damaged; copy it again")
        rotation = int(frame.rotation) % 360
        frames.append(_array(frame, bits, rotation))
        shown.append(None if frame.pts is None else float(frame.pts * frame.time_base))
    counted = "mp4" in container.format.name  # an AVI counts frames that were dropped as well
    if not frames or (counted and len(frames) < (header.num_frames or 0)):
        raise CorruptFileError(
            f"the film announces {header.num_frames or 'some'} frames and {len(frames)} can be "
            "decoded; copy it again"
        )
    _check_end(stream, shown)
    if len({frame.shape for frame in frames}) > 1:
        raise UnsupportedFormatError("the film changes its size on the way; cut it there")
    return frames, _times(shown), rotation


def _check_end(stream: Any, shown: list[float | None]) -> None:
    """Refuse a film whose last frame comes long before it says it ends."""
    if stream.duration is not None:
        end = float((stream.start_time or 0) + stream.duration) * float(stream.time_base)
    else:
        end = _seconds(stream.metadata.get("DURATION", ""))
    times = [when for when in shown if when is not None]
    if not times:
        return
    longest = float(np.diff(times).max()) if len(times) > 1 else 0.0
    if end > times[-1] + 2 * max(longest, _LEAST_STEP_S):
        raise CorruptFileError(
            f"the film announces {end:.2f} s and its last frame comes at {times[-1]:.2f} s; copy "
            "it again"
        )


def _seconds(text: str) -> float:
    """HH:MM:SS.fraction, as Matroska writes it; 0 for anything else."""
    try:
        hours, minutes, seconds = text.split(":")
        return int(hours) * 3600 + int(minutes) * 60 + float(seconds)
    except ValueError:
        return 0.0


def _check_size(num_bytes: int) -> None:
    if num_bytes > _MAX_BYTES:
        raise UnsupportedFormatError(
            f"the film takes over {_MAX_BYTES >> 30} GiB as float32; cut it into shorter ones"
        )


def _array(frame: Any, bits: int | None, rotation: int) -> NDArray:
    if bits is None:
        pixels = frame.to_ndarray(format="rgb24").transpose(2, 0, 1)
    else:
        pixels = frame.to_ndarray(format="gray" if bits == 8 else f"gray{bits}le")[None]
    if rotation % 90:
        raise UnsupportedFormatError(f"a film turned by {rotation} degrees; save it upright")
    return np.rot90(pixels, rotation // 90, axes=(1, 2))


def _times(shown: list[float | None]) -> tuple[float, ...]:
    """Seconds since the first frame."""
    if None in shown:
        return (math.nan,) * len(shown)
    times = np.array(shown, dtype=np.float64)
    if (np.diff(times) <= _TIMES_TOLERANCE_S).any():
        raise CorruptFileError("the frames of the film are not one after the other; copy it again")
    return tuple((times - times[0]).tolist())
