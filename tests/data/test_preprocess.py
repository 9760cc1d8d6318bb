from dataclasses import replace

import numpy as np
import pytest
import torch
from jsonargparse import ArgumentParser
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


def test_three_sides_resize_the_slices_of_a_volume_too():
    ramp = torch.arange(8.0).reshape(1, 8, 1, 1).expand(1, 8, 4, 6)
    volume = replace(image(torch.zeros(1, 4, 6)), pixels=ramp, axes="DHW", value_range=(0, 1))
    prepare = Preprocessing(size=(4, 2, 3), intensity="range", mean=(0.0,), std=(0.125,))
    halved = prepare(replace(volume, pixels=ramp / 8))
    assert halved.spatial_shape == (4, 2, 3)
    middle = halved.pixels[0, 1:3, 0, 0]
    torch.testing.assert_close(middle, torch.tensor([2.5, 4.5]))  # 2.5 and 4.5 of 0 to 7
    assert halved.affine[0, 0] == 2 * volume.affine[0, 0]
    with pytest.raises(ValueError, match="size must be"):
        prepare(image(torch.zeros(1, 4, 6)))


def test_a_config_gives_two_sides_or_three(tmp_path):
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--preprocessing", type=Preprocessing)
    for text, size in (("[8, 9]", (8, 9)), ("[4, 8, 9]", (4, 8, 9))):
        arguments = ["--preprocessing.size", text, "--preprocessing.intensity", "range"]
        assert parser.instantiate(parser.parse_args(arguments)).preprocessing.size == size
    with pytest.raises(ValueError, match="size is"):
        Preprocessing(size=(4, 4, 4, 4), intensity="range")


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
        {"intensity": "window", "window_hu": "spleen"},
    ],
)
def test_contradictory_arguments_are_refused(arguments):
    with pytest.raises(ValueError, match="window_hu|std|no CT window"):
        Preprocessing(size=(2, 2), **arguments)


def test_the_saved_form_comes_back_equal():
    prepare = Preprocessing(size=(2, 3), intensity="window", window_hu=(40.0, 80.0), channels=3)
    assert Preprocessing.from_dict(prepare.to_dict()) == prepare


PLAIN = {"mean": (0.0,), "std": (1.0,)}


def test_a_window_is_called_by_its_name_and_saved_by_it():
    hu = image(torch.linspace(-100, 200, 12).reshape(1, 3, 4), modality=Modality.CT)
    named = Preprocessing(size=(3, 4), intensity="window", window_hu="brain")
    given = Preprocessing(size=(3, 4), intensity="window", window_hu=(40.0, 80.0))
    assert torch.equal(named(hu).pixels, given(hu).pixels)
    assert named.to_dict()["window_hu"] == "brain"
    assert Preprocessing.from_dict(named.to_dict()) == named


@pytest.mark.parametrize(
    ("text", "window"),
    [("[40, 80]", (40.0, 80.0)), ("lung", "lung"), ("[-600, 1500]", (-600, 1500))],
)
def test_a_config_and_a_command_line_give_a_window_by_name_or_numbers(text, window, tmp_path):
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--config", action="config")
    parser.add_argument("--preprocessing", type=Preprocessing)
    config = tmp_path / "config.yaml"
    config.write_text(
        f"preprocessing: {{size: [8, 8], intensity: window, window_hu: {text}, channels: 1}}\n"
    )
    start = ["--config", str(config)]
    for arguments in (start, [*start, "--preprocessing.window_hu", text]):
        made = parser.instantiate(parser.parse_args(arguments)).preprocessing
        assert made.window_hu == window
        assert Preprocessing.from_dict(made.to_dict()) == made


def test_what_an_older_model_saved_still_loads():
    saved = {"size": [96, 96], "intensity": "window", "window_hu": [35.0, 60.0], "channels": 1}
    saved |= {"mean": [0.5], "std": [0.25], "plane": "axial", "region": "intracranial"}
    prepare = Preprocessing.from_dict(saved)
    assert prepare.window_hu == (35.0, 60.0)
    assert prepare.to_dict() == {**saved, "slab": 1, "slab_mm": None, "geometry": None}


@pytest.mark.parametrize("choice", [{"intensity": "foreground"}, {"intensity": "depth"}])
@pytest.mark.parametrize("region", ["all", "ultrasound"])
def test_new_choices_come_back_equal(choice, region):
    prepare = Preprocessing(size=(2, 3), region=region, **choice)
    assert Preprocessing.from_dict(prepare.to_dict()) == prepare


def phantom(air):
    """A square of 40 x 40 pixels of 1000 to 2000, its rim 1500, in air of 0 on each side."""
    square = torch.full((40, 40), 1500.0)
    square[3:-3, 3:-3] = torch.linspace(1000, 2000, 34 * 34).reshape(34, 34)
    pixels = torch.zeros(1, 40 + 2 * air, 40 + 2 * air)
    pixels[0, air : air + 40, air : air + 40] = square
    return image(pixels, modality=Modality.MR, value_range=None)


@pytest.mark.parametrize("air", [10, 20, 40, 80])
def test_the_scale_of_mr_does_not_depend_on_the_air_around_the_body(air):
    """What the rim loses to the air changes the quantiles by less than a thousandth."""
    size, square = (40 + 2 * air,) * 2, (0, *[slice(air, air + 40)] * 2)
    source = phantom(air)
    found = Preprocessing(size=size, intensity="foreground", **PLAIN)(source).pixels
    low, high = np.quantile(source.pixels[square], [0.005, 0.995])
    expected = ((source.pixels[square] - low) / (high - low)).clamp(0, 1)
    torch.testing.assert_close(found[square], expected, atol=2e-3, rtol=0)
    assert (found[source.pixels == 0] == 0).all()
    whole = Preprocessing(size=size, intensity="percentile", **PLAIN)(source).pixels
    assert whole[square][3, 3] > 0.5  # with the air, the darkest tissue is far from black


def test_the_foreground_keeps_what_is_invalid_out():
    bright = phantom(10)
    bright.pixels[0, 10:20, 10:50] = 1e5
    valid = torch.ones(60, 60, dtype=torch.bool)
    valid[:20] = False
    masked = Preprocessing(size=(60, 60), intensity="foreground", **PLAIN)(
        image(bright.pixels, modality=Modality.MR, value_range=None, valid=valid)
    )
    assert masked.pixels[0, 46, 46] > 0.95  # the brightest valid pixel
    assert (masked.pixels[0, :20] == 0).all()


def test_depth_is_the_channel_z_stretched_over_its_valid_pixels():
    xyz = torch.stack([torch.full((50, 40), 9.0), torch.full((50, 40), -9.0), torch.zeros(50, 40)])
    xyz[2] = torch.linspace(0.5, 0.7, 2000).reshape(50, 40)
    valid = torch.ones(50, 40, dtype=torch.bool)
    valid[7, 9], xyz[:, 7, 9] = False, 0.0
    cloud = Image(
        pixels=xyz,
        axes="HW",
        modality=Modality.DEPTH,
        affine=pixel_affine(),
        frame="sensor",
        valid=valid,
        channels=("x", "y", "z"),
    )
    prepare = Preprocessing(size=(50, 40), intensity="depth", **PLAIN)
    out = prepare(cloud)
    low, high = np.quantile(xyz[2][valid], [0.005, 0.995])
    expected = ((xyz[2:] - low) / (high - low)).clamp(0, 1)
    expected[0, 7, 9] = 0
    torch.testing.assert_close(out.pixels, expected, atol=1e-5, rtol=0)
    assert out.channels == ("z",)
    alone = replace(cloud, pixels=xyz[2:], channels=())
    assert torch.equal(prepare(alone).pixels, out.pixels)
    repeated = Preprocessing(size=(50, 40), intensity="depth", channels=3, **PLAIN)(cloud)
    assert torch.equal(repeated.pixels, out.pixels.expand(3, -1, -1))


def test_depth_needs_distances():
    prepare = Preprocessing(size=(2, 2), intensity="depth")
    with pytest.raises(ValueError, match="needs a depth image, got PICTURE"):
        prepare(image(torch.zeros(1, 2, 2)))
    with pytest.raises(ValueError, match="one that is called 'z', got 3"):
        prepare(image(torch.zeros(3, 2, 2), modality=Modality.DEPTH))


def numbered_slices(spacing=None) -> Image:
    """Seven slices of the value of their number, of two channels with opposite signs."""
    numbers = torch.arange(7.0)[None, :, None, None].expand(2, 7, 2, 2)
    return Image(
        pixels=numbers * torch.tensor([1.0, -1.0])[:, None, None, None],
        axes="DHW",
        modality=Modality.PICTURE,
        affine=pixel_affine(),
        frame="pixel",
        value_range=(0.0, 1.0),
        spacing=spacing,
    )


@pytest.mark.parametrize(("spacing", "slab_mm", "step"), [(None, None, 1), ((2.0, 1, 1), 3.9, 2)])
def test_each_slice_of_a_slab_has_its_neighbours_as_channels(spacing, slab_mm, step):
    slab = Preprocessing(size=(2, 2), intensity="range", slab=3, slab_mm=slab_mm)
    whole = slab(numbered_slices(spacing))
    alone = replace(slab, slab=1, slab_mm=None)(numbered_slices(spacing)).pixels
    assert whole.pixels.shape == (6, 7, 2, 2)
    for depth in range(7):
        near = [max(0, depth - step), depth, min(6, depth + step)]
        wanted = torch.cat([alone[:, place] for place in near])
        assert torch.equal(whole.pixels[:, depth], wanted)


def test_a_slab_needs_slices_and_their_distance_a_spacing():
    with pytest.raises(ValueError, match="1, 3, 5"):
        Preprocessing(size=(2, 2), intensity="range", slab=2)
    slab = Preprocessing(size=(2, 2), intensity="range", slab=3, slab_mm=2.0)
    with pytest.raises(ValueError, match="needs a volume, got axes 'HW'"):
        slab(image(torch.zeros(1, 2, 2)))
    with pytest.raises(ValueError, match="needs a volume with a spacing"):
        slab(numbered_slices())


def test_xyz_beside_a_picture_is_dropped_by_preprocessing_without_geometry():
    xyz = replace(
        image(torch.ones(3, 6, 8), modality=Modality.DEPTH, value_range=None),
        channels=("x", "y", "z"),
    )
    both = Sample(item="part", images={"image": image(torch.zeros(3, 6, 8)), "xyz": xyz})
    prepared = Preprocessing(size=(3, 4), intensity="range").sample(both)
    assert set(prepared.images) == {"image"}
    assert set(both.images) == {"image", "xyz"}
