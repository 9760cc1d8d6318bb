"""Films written with known pixels and times."""

from fractions import Fraction

import numpy as np
import pytest

from medssl.data.manifest import build_manifest, load_sample
from medssl.data.readers.any import read_image
from medssl.data.readers.errors import (
    CorruptFileError,
    MissingDecoderError,
    ReadError,
    UnsupportedFormatError,
)
from medssl.data.readers.video import read_video, video_header

av = pytest.importorskip("av", reason="PyAV (extra video) is not installed")

RNG = np.random.default_rng(0)
COLORS = RNG.integers(0, 256, (6, 24, 32, 3), dtype=np.uint8)
PTS = [0, 40, 80, 200, 240, 1000]  # milliseconds


def write(path, frames, *, codec="ffv1", kind="rgb24", stored="bgr0", pts=PTS):
    """frames: (T, H, W[, 3]); the codecs used with exact pixels are lossless."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=25)
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = stored
        stream.time_base = Fraction(1, 1000)
        stream.codec_context.time_base = Fraction(1, 1000)
        for pixels, when in zip(frames, pts, strict=True):
            frame = av.VideoFrame.from_ndarray(pixels, format=kind)
            frame.pts, frame.time_base = when, Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def test_pixels_and_uneven_times_are_those_that_were_written(tmp_path):
    image = read_image(write(tmp_path / "film.mkv", COLORS), hashes=True)
    assert image.axes == "THW"
    np.testing.assert_array_equal(image.pixels.numpy(), COLORS.transpose(3, 0, 1, 2))
    assert image.times_s == pytest.approx([pts / 1000 for pts in PTS])
    assert (image.value_range, image.provenance["codec"]) == ((0, 255), "ffv1")
    assert {"file_sha256", "pixel_sha256"} <= set(image.provenance)


@pytest.mark.parametrize(("kind", "bits"), [("gray", 8), ("gray10le", 10), ("gray16le", 16)])
def test_grey_stays_grey_and_keeps_its_depth(tmp_path, kind, bits):
    dtype = np.uint8 if bits == 8 else np.uint16
    grey = RNG.integers(0, 2**bits, (4, 24, 32)).astype(dtype)
    path = write(tmp_path / "a.mkv", grey, kind=kind, stored=kind, pts=[0, 40, 80, 120])
    image = read_video(path)
    np.testing.assert_array_equal(image.pixels[0].numpy(), grey)
    assert image.value_range == (0, 2**bits - 1)


def test_the_same_pixels_in_another_container_have_the_same_hash(tmp_path):
    one = read_video(write(tmp_path / "a.mkv", COLORS), hashes=True).provenance
    other = write(tmp_path / "b.avi", COLORS, codec="huffyuv", stored="rgb24", pts=range(6))
    told = read_video(other, hashes=True).provenance
    assert told["pixel_sha256"] == one["pixel_sha256"]
    assert told["file_sha256"] != one["file_sha256"]


def test_a_header_tells_without_decoding(tmp_path):
    path = write(tmp_path / "a.mp4", COLORS, codec="mpeg4", stored="yuv420p", pts=range(0, 240, 40))
    header = video_header(path)
    assert (header.shape, header.channels, header.num_frames) == ((24, 32), 3, 6)
    assert header.codec == "mpeg4"
    assert read_video(path).times_s == pytest.approx([0, 0.04, 0.08, 0.12, 0.16, 0.2])


def test_a_film_is_an_item_of_a_manifest(tmp_path):
    write(tmp_path / "a.mkv", COLORS)
    manifest = build_manifest(tmp_path)
    (item,) = manifest.images
    assert (item.kind, item.modality) == ("video", "PICTURE")
    assert load_sample(manifest, item).images["image"].pixels.shape == (3, 6, 24, 32)


@pytest.mark.parametrize("share", [0.1, 0.3, 0.6, 0.9])
def test_a_film_that_ends_early_is_an_error_and_no_shorter_film(tmp_path, share):
    path = write(tmp_path / "a.mp4", COLORS, codec="mpeg4", stored="yuv420p", pts=range(0, 240, 40))
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    with pytest.raises(CorruptFileError):
        read_video(path)


@pytest.mark.parametrize("share", [0.1, 0.3, 0.6, 0.8])
def test_a_matroska_that_ends_early_is_an_error_too(tmp_path, share):
    frames = np.concatenate([COLORS] * 8)
    path = write(tmp_path / "a.mkv", frames, pts=range(0, 40 * len(frames), 40))
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    with pytest.raises(CorruptFileError):
        read_video(path)


def test_damage_ends_in_a_film_or_a_typed_error(tmp_path):
    content = write(tmp_path / "a.mkv", COLORS).read_bytes()
    told = []
    for seed in range(150):
        rng = np.random.default_rng(seed)
        damaged = bytearray(content)
        for at in rng.integers(0, len(damaged), 4):
            damaged[at] = rng.integers(256)
        (tmp_path / "b.mkv").write_bytes(damaged)
        try:
            read_video(tmp_path / "b.mkv")
        except ReadError as error:
            told.append(str(error))
    assert len(told) >= 5
    assert str(tmp_path) not in "".join(told)


def test_what_is_no_film_is_refused(tmp_path):
    with av.open(str(tmp_path / "a.mkv"), "w") as container:
        stream = container.add_stream("pcm_s16le", rate=8000)
        frame = av.AudioFrame.from_ndarray(
            np.zeros((1, 8000), np.int16), format="s16", layout="mono"
        )
        frame.sample_rate, frame.pts, frame.time_base = 8000, 0, Fraction(1, 8000)
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    with pytest.raises(UnsupportedFormatError, match="sound"):
        read_video(tmp_path / "a.mkv")


def test_a_film_that_would_not_fit_is_refused_before_it_is_decoded(tmp_path, monkeypatch):
    path = write(tmp_path / "a.mkv", COLORS)
    monkeypatch.setattr("medssl.data.readers.video._MAX_BYTES", 4 * 3 * 24 * 32 * 3)
    with pytest.raises(UnsupportedFormatError, match="shorter"):
        read_video(path)


def test_without_the_package_the_error_says_what_to_install(tmp_path, monkeypatch):
    path = write(tmp_path / "a.mkv", COLORS)
    monkeypatch.setitem(__import__("sys").modules, "av", None)
    with pytest.raises(MissingDecoderError, match=r"medssl\[video\]"):
        read_video(path)
