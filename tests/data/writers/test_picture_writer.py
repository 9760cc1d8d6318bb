"""Maps and overlays as Pillow and tifffile read them."""

import numpy as np
import pytest
import tifffile
import torch
from PIL import Image as Pillow

from medssl.data.image import Image, pixel_affine
from medssl.data.modality import Modality
from medssl.data.readers.any import read_image
from medssl.data.writers.picture import write_png, write_tiff


def picture(pixels: torch.Tensor, axes: str = "HW") -> Image:
    return Image(
        pixels=pixels,
        axes=axes,
        modality=Modality.PICTURE,
        affine=pixel_affine(),
        frame="pixel",
    )


@pytest.mark.parametrize("channels", [1, 2, 3, 5])
def test_a_float_map_comes_back_bit_for_bit(tmp_path, channels):
    pixels = torch.randn(channels, 7, 4)
    pixels[0, 2, 1] = torch.nan
    write_tiff(picture(pixels), tmp_path / "a.tif")
    written = np.atleast_3d(tifffile.imread(tmp_path / "a.tif"))
    assert written.dtype == np.float32
    np.testing.assert_array_equal(written, pixels.numpy().transpose(1, 2, 0))
    torch.testing.assert_close(
        read_image(tmp_path / "a.tif").pixels, pixels, rtol=0, atol=0, equal_nan=True
    )


@pytest.mark.parametrize("channels", [1, 3])
def test_a_png_is_rounded_to_the_nearest(tmp_path, channels):
    pixels = torch.rand(channels, 7, 4) * 255
    write_png(picture(pixels), tmp_path / "a.png")
    written = np.atleast_3d(np.asarray(Pillow.open(tmp_path / "a.png"))).transpose(2, 0, 1)
    assert np.abs(written - pixels.numpy()).max() <= 0.5
    assert [file.name for file in tmp_path.iterdir()] == ["a.png"]


@pytest.mark.parametrize("value", [-1.0, 256.0, torch.nan])
def test_what_8_bits_cannot_hold_is_refused(tmp_path, value):
    with pytest.raises(ValueError, match="0 to 255"):
        write_png(picture(torch.full((1, 2, 2), value)), tmp_path / "a.png")


def test_volumes_are_refused(tmp_path):
    with pytest.raises(ValueError, match="write_nifti"):
        write_tiff(picture(torch.zeros(1, 2, 3, 4), "DHW"), tmp_path / "a.tif")
