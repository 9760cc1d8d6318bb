"""Pictures against Pillow, tifffile and the arrays they were made from."""

import hashlib
import os
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import tifffile
import torch
from PIL import Image as Pillow
from PIL import ImageOps

from medssl.data.modality import Modality
from medssl.data.readers.any import read_image
from medssl.data.readers.errors import CorruptFileError, ReadError, UnsupportedFormatError
from medssl.data.readers.picture import picture_shape

RNG = np.random.default_rng(0)
GREY8 = RNG.integers(0, 256, (7, 5), dtype=np.uint8)
GREY16 = RNG.integers(0, 65536, (7, 5), dtype=np.uint16)
RGB8 = RNG.integers(0, 256, (7, 5, 3), dtype=np.uint8)
RGB16 = RNG.integers(0, 65536, (7, 5, 3), dtype=np.uint16)


def write_png16(path: Path, array: np.ndarray) -> Path:
    """A 16-bit PNG by the letter of its standard; 1 to 4 channels."""
    array = np.atleast_3d(array)
    kind = {1: 0, 2: 4, 3: 2, 4: 6}[array.shape[2]]
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in array)
    head = struct.pack(">IIBBBBB", array.shape[1], array.shape[0], 16, kind, 0, 0, 0)
    chunks = [(b"IHDR", head), (b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
    path.write_bytes(
        b"\x89PNG\r\n\x1a\n"
        + b"".join(
            struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
            for name, data in chunks
        )
    )
    return path


def check(path: Path, expected: np.ndarray, value_range) -> None:
    """expected: (H, W) or (H, W, C)."""
    image = read_image(path)
    np.testing.assert_array_equal(image.pixels.numpy(), np.atleast_3d(expected).transpose(2, 0, 1))
    assert image.value_range == value_range
    assert picture_shape(path) == tuple(image.pixels.shape)
    assert (image.axes, image.frame, image.spacing) == ("HW", "pixel", None)
    assert image.modality is Modality.PICTURE
    assert torch.equal(image.affine, torch.eye(4, dtype=torch.float64))


@pytest.mark.parametrize("suffix", ["png", "tif"])
@pytest.mark.parametrize("array", [GREY8, RGB8], ids=["grey", "rgb"])
def test_8_bits_stay_8_bits(tmp_path, array, suffix):
    Pillow.fromarray(array).save(tmp_path / f"a.{suffix}")
    check(tmp_path / f"a.{suffix}", array, (0, 255))


@pytest.mark.parametrize("array", [GREY16, RGB16], ids=["grey", "rgb"])
def test_16_bits_stay_16_bits(tmp_path, array):
    check(write_png16(tmp_path / "a.png", array), array, (0, 65535))
    tifffile.imwrite(tmp_path / "a.tif", array)
    check(tmp_path / "a.tif", array, (0, 65535))


def test_jpeg_equals_pillow(tmp_path):
    for array in (GREY8, RGB8):
        Pillow.fromarray(array).save(tmp_path / "a.jpg")
        check(tmp_path / "a.jpg", np.asarray(Pillow.open(tmp_path / "a.jpg")), (0, 255))


def test_float_tiff_has_no_range_and_nan_is_invalid(tmp_path):
    array = RNG.normal(size=(7, 5)).astype(np.float32)
    tifffile.imwrite(tmp_path / "a.tif", array)
    check(tmp_path / "a.tif", array, None)
    array[2, 3] = np.nan
    tifffile.imwrite(tmp_path / "a.tif", array)
    valid = read_image(tmp_path / "a.tif").valid
    assert valid is not None
    assert (~valid).nonzero().tolist() == [[2, 3]]


@pytest.mark.parametrize("planes", ["contig", "separate"])
def test_a_tiff_may_have_any_number_of_channels(tmp_path, planes):
    array = RNG.integers(0, 65536, (7, 5, 6), dtype=np.uint16)
    stored = array if planes == "contig" else array.transpose(2, 0, 1)
    tifffile.imwrite(
        tmp_path / "a.tif", stored, photometric="minisblack", planarconfig=planes, metadata=None
    )
    check(tmp_path / "a.tif", array, (0, 65535))


@pytest.mark.parametrize("compression", ["tiff_lzw", "tiff_deflate", "packbits", "jpeg"])
def test_packed_tiff_equals_pillow(tmp_path, compression):
    Pillow.fromarray(RGB8).save(tmp_path / "a.tif", compression=compression)
    check(tmp_path / "a.tif", np.asarray(Pillow.open(tmp_path / "a.tif").convert("RGB")), (0, 255))


def test_16_bit_lzw_grey_tiff_keeps_its_bits(tmp_path):
    Pillow.fromarray(GREY16).save(tmp_path / "a.tif", compression="tiff_lzw")
    check(tmp_path / "a.tif", GREY16, (0, 65535))


def test_white_is_zero_is_inverted(tmp_path):
    tifffile.imwrite(tmp_path / "a.tif", GREY16, photometric="miniswhite")
    check(tmp_path / "a.tif", 65535 - GREY16, (0, 65535))


def test_one_bit_becomes_0_and_255(tmp_path):
    bits = GREY8 > 128
    for name in ("a.png", "a.tif"):
        Pillow.fromarray(bits).save(tmp_path / name)
        check(tmp_path / name, bits * np.uint8(255), (0, 255))


def test_a_palette_gives_its_colors_or_its_greys(tmp_path):
    indices = Pillow.fromarray(GREY8 % 3, mode="P")
    indices.putpalette([255, 0, 0, 0, 255, 0, 10, 20, 30])
    indices.save(tmp_path / "a.png")
    colors = np.array([[255, 0, 0], [0, 255, 0], [10, 20, 30]], np.uint8)
    check(tmp_path / "a.png", colors[GREY8 % 3], (0, 255))
    indices.putpalette([9, 9, 9, 0, 0, 0, 77, 77, 77])
    indices.save(tmp_path / "a.png")
    check(tmp_path / "a.png", np.array([9, 0, 77], np.uint8)[GREY8 % 3], (0, 255))


@pytest.mark.parametrize("array", [GREY8, RGB8, GREY16, RGB16], ids=["L", "RGB", "L16", "RGB16"])
def test_alpha_marks_what_is_not_there_and_colors_stay_as_stored(tmp_path, array):
    top = np.iinfo(array.dtype).max
    alpha = np.full((7, 5, 1), top, array.dtype)
    paths = [tmp_path / "a.png", tmp_path / "a.tif"]
    for value in (top, top - 1, 0):
        alpha[3, 2] = value
        both = np.concatenate([np.atleast_3d(array), alpha], axis=2)
        if top == 255:
            Pillow.fromarray(both).save(paths[0])
        else:
            write_png16(paths[0], both)
        tifffile.imwrite(
            paths[1], both, photometric="rgb" if both.shape[2] == 4 else "minisblack",
            extrasamples=["unassalpha"], planarconfig="contig", metadata=None,
        )  # fmt: skip
        for path in paths:
            image = read_image(path)
            np.testing.assert_array_equal(
                image.pixels.numpy(), np.atleast_3d(array).transpose(2, 0, 1)
            )
            assert image.value_range == (0, top)
            if value:
                assert image.valid is None
                assert "alpha" not in image.provenance
            else:
                assert (~image.valid).nonzero().tolist() == [[3, 2]]
                assert image.provenance["alpha"] == "mask"


@pytest.mark.parametrize(("value", "fails"), [(255, False), (0, False), (254, True)])
def test_colors_multiplied_by_a_partial_alpha_are_refused(tmp_path, value, fails):
    both = np.concatenate([RGB8, np.full((7, 5, 1), 255, np.uint8)], axis=2)
    both[3, 2, 3] = value
    tifffile.imwrite(tmp_path / "a.tif", both, photometric="rgb", extrasamples=["assocalpha"])
    if fails:
        with pytest.raises(UnsupportedFormatError, match="multiplied"):
            read_image(tmp_path / "a.tif")
    else:
        image = read_image(tmp_path / "a.tif")
        assert (image.valid is None) == (value == 255)


def test_a_transparent_grey_of_16_bits_marks_its_pixels(tmp_path):
    write_png16(tmp_path / "a.png", GREY16[..., None])
    content = (tmp_path / "a.png").read_bytes()
    at = content.index(b"IDAT") - 4
    body = b"tRNS" + int(GREY16[3, 2]).to_bytes(2, "big")
    chunk = (2).to_bytes(4, "big") + body + zlib.crc32(body).to_bytes(4, "big")
    (tmp_path / "a.png").write_bytes(content[:at] + chunk + content[at:])
    image = read_image(tmp_path / "a.png")
    np.testing.assert_array_equal(image.pixels[0].numpy(), GREY16)
    np.testing.assert_array_equal(~image.valid.numpy(), GREY16[3, 2] == GREY16)


def test_a_transparent_color_of_a_palette_marks_its_pixels(tmp_path):
    indices = Pillow.fromarray(GREY8 % 2, mode="P")
    indices.putpalette([255, 0, 0, 0, 255, 0, 10, 20, 30])
    indices.save(tmp_path / "a.png", transparency=1)
    image = read_image(tmp_path / "a.png")
    colors = np.array([[255, 0, 0], [0, 255, 0]])[GREY8 % 2]
    np.testing.assert_array_equal(image.pixels.numpy(), colors.transpose(2, 0, 1))
    np.testing.assert_array_equal(image.valid.numpy(), GREY8 % 2 == 0)


def test_cmyk_becomes_rgb_as_pillow_makes_it_and_says_so(tmp_path):
    Pillow.fromarray(RGB8).convert("CMYK").save(tmp_path / "c.jpg", quality=95)
    image = read_image(tmp_path / "c.jpg")
    expected = np.asarray(Pillow.open(tmp_path / "c.jpg").convert("RGB"))
    np.testing.assert_array_equal(image.pixels.numpy(), expected.transpose(2, 0, 1))
    assert image.provenance["converted_from"] == "CMYK"


@pytest.mark.parametrize("orientation", range(1, 9))
def test_the_exif_orientation_is_applied_as_pillow_applies_it(tmp_path, orientation):
    exif = Pillow.Exif()
    exif[0x0112] = orientation
    expected = np.asarray(ImageOps.exif_transpose(with_orientation(GREY8, orientation)))
    Pillow.fromarray(GREY8).save(tmp_path / "a.png", exif=exif)
    check(tmp_path / "a.png", expected, (0, 255))
    tag = [(274, 3, 1, orientation, True)]
    tifffile.imwrite(tmp_path / "a.tif", GREY8, extratags=tag)
    check(tmp_path / "a.tif", expected, (0, 255))


def with_orientation(array: np.ndarray, orientation: int) -> Pillow.Image:
    picture = Pillow.fromarray(array)
    picture.getexif()[0x0112] = orientation
    return picture


@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.tif"])
@pytest.mark.parametrize("share", [0.02, 0.4, 0.9])
def test_a_truncated_picture_is_corrupt(tmp_path, name, share):
    Pillow.fromarray(RNG.integers(0, 256, (80, 60, 3), dtype=np.uint8)).save(tmp_path / name)
    content = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(content[: max(9, int(share * len(content)))])
    with pytest.raises(CorruptFileError):
        read_image(tmp_path / name)


@pytest.mark.parametrize("packing", [{}, {"tile": (16, 16)}, {"compression": "zlib"}])
@pytest.mark.parametrize("share", [0.5, 0.9, 0.99])
def test_a_truncated_tiff_is_corrupt_however_it_is_packed(tmp_path, packing, share):
    array = RNG.integers(0, 65536, (64, 50), dtype=np.uint16)
    tifffile.imwrite(tmp_path / "a.tif", array, rowsperstrip=8, **packing)
    content = (tmp_path / "a.tif").read_bytes()
    (tmp_path / "a.tif").write_bytes(content[: int(share * len(content))])
    with pytest.raises(CorruptFileError):
        read_image(tmp_path / "a.tif")


def test_a_truncated_16_bit_color_png_is_corrupt(tmp_path):
    path = write_png16(tmp_path / "a.png", RGB16)
    path.write_bytes(path.read_bytes()[:-60])
    with pytest.raises(CorruptFileError):
        read_image(path)


def test_a_header_that_asks_for_too_much_is_refused_before_any_memory_is(tmp_path):
    head = struct.pack(">IIBBBBB", 300_000, 300_000, 8, 0, 0, 0, 0)
    path = write_png16(tmp_path / "a.png", GREY16)
    content = path.read_bytes()
    chunk = b"IHDR" + head
    path.write_bytes(content[:12] + chunk + struct.pack(">I", zlib.crc32(chunk)) + content[33:])
    with pytest.raises(CorruptFileError, match="million"):
        read_image(path)


def test_pages_and_frames_are_refused(tmp_path):
    tifffile.imwrite(tmp_path / "a.tif", np.stack([GREY8, GREY8]), photometric="minisblack")
    Pillow.fromarray(GREY8).save(
        tmp_path / "b.png", save_all=True, append_images=[Pillow.fromarray(GREY8 // 2)]
    )
    for name in ("a.tif", "b.png"):
        with pytest.raises(UnsupportedFormatError):
            read_image(tmp_path / name)


def test_png_and_tiff_of_one_picture_share_the_pixel_hash_only(tmp_path):
    for array in (GREY8, RGB8, GREY16, RGB16):
        if array.dtype == np.uint8:
            Pillow.fromarray(array).save(tmp_path / "a.png")
        else:
            write_png16(tmp_path / "a.png", array)
        tifffile.imwrite(tmp_path / "a.tif", array)
        one, other = (read_image(tmp_path / n, hashes=True).provenance for n in ("a.png", "a.tif"))
        assert one["pixel_sha256"] == other["pixel_sha256"]
        assert one["file_sha256"] != other["file_sha256"]
        stored = np.atleast_3d(array).transpose(2, 0, 1)
        content = ",".join(map(str, stored.shape)).encode() + stored.astype("<i4").tobytes()
        assert one["pixel_sha256"] == hashlib.sha256(content).hexdigest()


def test_a_transposed_picture_has_another_pixel_hash(tmp_path):
    flat = np.zeros((4, 9), np.uint8)
    hashes = set()
    for array in (flat, flat.T):
        Pillow.fromarray(array).save(tmp_path / "a.png")
        hashes.add(read_image(tmp_path / "a.png", hashes=True).provenance["pixel_sha256"])
    assert len(hashes) == 2


def test_a_missing_file_is_a_read_error_without_its_path(tmp_path):
    with pytest.raises(ReadError) as error:
        read_image(tmp_path / "gone.png")
    assert str(tmp_path) not in str(error.value)
    assert error.value.__cause__ is None


DATA = os.environ.get("MEDSSL_DATA")


@pytest.mark.skipif(not DATA, reason="MEDSSL_DATA is not set")
@pytest.mark.parametrize(
    "pattern", ["industrial-cookies/**/*.jpg", "industrial-cookies/**/*.png", "cxr-*/**/*.jp*g"]
)
def test_real_pictures_equal_pillow(pattern):
    for path in sorted(Path(DATA or "").glob(pattern))[:10]:
        expected = np.asarray(ImageOps.exif_transpose(Pillow.open(path)))
        check(path, expected, (0, 255))
