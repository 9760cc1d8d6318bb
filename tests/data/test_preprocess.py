import numpy as np
import pytest
import torch
from PIL import Image as PILImage

from medssl.data.image import Image, pixel_affine
from medssl.data.modality import Modality
from medssl.data.preprocess import Preprocessing
from medssl.data.sample import Sample


def image(pixels, *, modality=Modality.PICTURE, value_range=(0.0, 255.0), valid=None):
    return Image(
        pixels=pixels,
        axes="HW",
        modality=modality,
        affine=pixel_affine(),
        frame="pixel",
        value_range=value_range,
        valid=valid,
    )


def test_an_hu_window_maps_its_edges_to_0_and_1():
    ct = image(
        torch.tensor([[[-100.0, 0.0], [40.0, 500.0]]]), modality=Modality.CT, value_range=None
    )
    brain = Preprocessing(
        size=(2, 2), intensity="window", window_hu=(40, 80), mean=(0.0,), std=(1.0,)
    )
    assert brain(ct).pixels.tolist() == [[[0.0, 0.0], [0.5, 1.0]]]


def test_an_hu_window_refuses_mr():
    mr = image(torch.zeros(1, 2, 2), modality=Modality.MR, value_range=None)
    brain = Preprocessing(size=(2, 2), intensity="window", window_hu=(40, 80))
    with pytest.raises(ValueError, match="needs CT, got MR"):
        brain(mr)


@pytest.mark.parametrize("top", [255.0, 65535.0])
def test_range_uses_what_the_source_can_hold(top):
    full = image(torch.tensor([[[0.0, top]]]), value_range=(0.0, top))
    scaled = Preprocessing(size=(1, 2), intensity="range", mean=(0.5,), std=(0.5,))(full)
    assert scaled.pixels.tolist() == [[[-1.0, 1.0]]]


def test_range_refuses_physical_units():
    with pytest.raises(ValueError, match="use 'percentile'"):
        Preprocessing(size=(2, 2), intensity="range")(image(torch.zeros(1, 2, 2), value_range=None))


def test_percentiles_ignore_invalid_pixels():
    pixels = torch.linspace(0, 1, 10_000).reshape(1, 100, 100)
    pixels[0, 0] = 1e6
    valid = torch.ones(100, 100, dtype=torch.bool)
    valid[0] = False
    stretch = Preprocessing(size=(100, 100), intensity="percentile", mean=(0.0,), std=(1.0,))
    out = stretch(image(pixels, value_range=None, valid=valid)).pixels[0]
    inside = pixels[0, 1:].numpy()
    low, high = np.quantile(inside, [0.005, 0.995])
    expected = np.clip((inside - low) / (high - low), 0, 1)
    np.testing.assert_allclose(out[1:].numpy(), expected, atol=1e-5)
    assert (out[0] == 0).all()


def test_grey_is_repeated_and_rgb_made_grey_as_pillow_does():
    rng = np.random.default_rng(0)
    rgb = rng.integers(0, 256, (8, 9, 3), dtype=np.uint8)
    color = image(torch.from_numpy(rgb).permute(2, 0, 1).float())
    plain = {"size": (8, 9), "intensity": "range", "mean": (0.0,), "std": (1.0,)}
    grey = Preprocessing(channels=1, **plain)(color).pixels[0] * 255
    pillow = np.asarray(PILImage.fromarray(rgb).convert("L"), dtype=float)
    assert np.abs(grey.numpy() - pillow).max() <= 0.51
    again = Preprocessing(channels=3, **plain)(image(color.pixels[:1])).pixels
    assert torch.equal(again[0], again[2])
    with pytest.raises(ValueError, match="2 channels cannot become 3"):
        Preprocessing(channels=3, **plain)(image(color.pixels[:2]))


def test_resizing_agrees_with_pillows_antialiased_bilinear():
    rng = np.random.default_rng(1)
    picture = rng.integers(0, 256, (90, 70), dtype=np.uint8)
    prepare = Preprocessing(size=(32, 48), intensity="range", mean=(0.0,), std=(1.0,))
    ours = prepare(image(torch.from_numpy(picture)[None].float())).pixels[0] * 255
    floats = PILImage.fromarray(picture.astype(np.float32))
    theirs = np.asarray(floats.resize((48, 32), PILImage.Resampling.BILINEAR))
    np.testing.assert_allclose(ours.numpy(), theirs, atol=0.1)


def test_one_mean_per_channel_or_one_for_all():
    two = Preprocessing(size=(2, 2), intensity="range", mean=(0.1, 0.2), std=(1.0, 1.0))
    with pytest.raises(ValueError, match="2 means for an image of 3 channels"):
        two(image(torch.zeros(3, 2, 2)))


def test_a_mask_follows_its_image():
    pixels = torch.zeros(1, 4, 4)
    mask = torch.zeros(1, 4, 4)
    mask[0, 2:, 2:] = 1
    prepare = Preprocessing(size=(8, 8), intensity="range")
    sample = Sample(item="a", images={"image": image(pixels)}, mask=image(mask))
    prepared = prepare.sample(sample)
    assert prepared.mask.pixels.sum() == 16
    assert (prepared.mask.pixels[0, 4:, 4:] == 1).all()


@pytest.mark.parametrize(
    "arguments",
    [
        {"intensity": "window"},
        {"intensity": "range", "window_hu": (40.0, 80.0)},
        {"intensity": "range", "mean": (0.5,), "std": (0.0,)},
        {"intensity": "range", "mean": (0.5, 0.5), "std": (1.0,)},
    ],
)
def test_contradictory_arguments_are_refused(arguments):
    with pytest.raises(ValueError, match="window_hu|std"):
        Preprocessing(size=(2, 2), **arguments)


def test_the_saved_form_comes_back_equal():
    prepare = Preprocessing(size=(2, 3), intensity="window", window_hu=(40.0, 80.0), channels=3)
    assert Preprocessing.from_dict(prepare.to_dict()) == prepare
