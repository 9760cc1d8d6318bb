"""Views: crops know where they come from, and volumes give slices that hold something."""

from dataclasses import replace

import pytest
import torch

from medssl.data.augment import Augmentation
from medssl.data.image import Image, pixel_affine
from medssl.data.modality import Modality
from medssl.data.sample import Sample
from medssl.data.views import Crops, MultiCrop, mirror, near_slices, random_slice, take_slice

STILL = Augmentation(intensity_probability=0, noise_probability=0, blur_probability=0)


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def ramp(*shape: int, affine: torch.Tensor | None = None) -> Image:
    """Each pixel holds its own place: channel a is coordinate a of the frame."""
    affine = pixel_affine() if affine is None else affine
    index = torch.meshgrid(*(torch.arange(n) for n in shape), indexing="ij")
    index = [torch.zeros(shape)] * (3 - len(shape)) + [i.float() for i in index]
    homogeneous = torch.stack([*index, torch.ones(shape)]).double()
    places = torch.einsum("ij,j...->i...", affine, homogeneous)[:3].float()
    axes = "DHW" if len(shape) == 3 else "HW"
    return Image(pixels=places, axes=axes, modality=Modality.CT, affine=affine, frame="pixel")


def places(image: Image) -> torch.Tensor:
    """(3, H, W): where the affine says each pixel of a picture lies."""
    h, w = image.spatial_shape
    rows, columns = torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij")
    index = torch.stack([torch.zeros(h, w), rows, columns, torch.ones(h, w)]).double()
    return torch.einsum("ij,jhw->ihw", image.affine, index)[:3].float()


@pytest.mark.parametrize("seed", range(8))
def test_a_crops_affine_leads_to_the_pixels_it_was_made_of(seed):
    source = ramp(90, 140)
    crops = Crops(count=3, size=24, scale=(0.1, 0.9), flip=0.5)
    inner = slice(3, -3)  # antialiasing has less to average at the border of the box
    for view in crops(source, rng(seed)):
        assert view.pixels.shape == (3, 24, 24)
        difference = (view.pixels - places(view))[:, inner, inner]
        assert difference.mean((1, 2)).abs().max() < 0.01  # pixels
        assert difference.abs().max() < 0.2  # antialiasing weights are sampled coarsely


def test_the_share_of_the_area_and_the_aspect_stay_in_their_ranges():
    crops = Crops(count=300, size=8, scale=(0.2, 0.3), aspect=(0.5, 2.0), flip=0)
    views = crops(ramp(200, 200), rng())
    heights = torch.tensor([8 * view.affine[1, 1] for view in views])
    widths = torch.tensor([8 * view.affine[2, 2] for view in views])
    share, aspect = heights * widths / 200**2, widths / heights
    assert 0.195 < share.min() < 0.21
    assert 0.29 < share.max() < 0.305
    assert 0.49 < aspect.min() < 0.6
    assert 1.7 < aspect.max() < 2.05


def test_crops_reach_every_border_and_flip_as_often_as_asked():
    views = Crops(count=400, size=8, scale=(0.25, 0.25), flip=0.25)(ramp(40, 40), rng())
    boxes = torch.stack([places(view).flatten(1) for view in views])  # (V, 3, 64)
    assert boxes[:, 1].min() < 2
    assert boxes[:, 1].max() > 37
    assert boxes[:, 2].min() < 2
    assert boxes[:, 2].max() > 37
    flipped = sum(float(view.affine[2, 2]) < 0 for view in views)
    assert 70 < flipped < 130


def test_mirror_reverses_columns_and_keeps_places():
    source = ramp(5, 7)
    mirrored = mirror(source)
    assert torch.equal(mirrored.pixels, source.pixels.flip(-1))
    torch.testing.assert_close(places(mirrored), mirrored.pixels)


def test_a_slice_keeps_its_place_in_an_oblique_volume():
    affine = torch.tensor(
        [[2.5, 0.1, 0.0, -40.0], [0.3, 0.0, 0.7, 12.0], [0.0, 0.8, 0.1, 5.0], [0, 0, 0, 1]],
        dtype=torch.float64,
    )
    volume = ramp(6, 5, 4, affine=affine)
    cut = take_slice(volume, 4)
    assert cut.axes == "HW"
    torch.testing.assert_close(places(cut), volume.pixels[:, 4])


def test_empty_slices_are_not_drawn():
    pixels = torch.zeros(1, 10, 6, 6)
    pixels[:, 3] = torch.randn(6, 6)
    pixels[:, 7] = torch.randn(6, 6)
    volume = Image(
        pixels=pixels, axes="DHW", modality=Modality.CT, affine=pixel_affine(), frame="pixel"
    )
    generator = rng()
    drawn = {int(random_slice(volume, generator).affine[0, 3]) for _ in range(50)}
    assert drawn == {3, 7}


def test_a_volume_without_content_still_gives_a_slice():
    volume = Image(
        pixels=torch.zeros(1, 4, 6, 6),
        axes="DHW",
        modality=Modality.CT,
        affine=pixel_affine(),
        frame="pixel",
    )
    assert random_slice(volume, rng()).pixels.shape == (1, 6, 6)


@pytest.mark.parametrize("shape", [(30, 50), (5, 30, 50)])
def test_views_of_pictures_and_volumes_have_the_same_shapes(shape):
    views = MultiCrop(
        large=Crops(count=2, size=20, scale=(0.5, 1)),
        small=Crops(count=3, size=10, scale=(0.1, 0.4)),
        augmentation=STILL,
    )(Sample(item="a", images={"image": ramp(*shape)}), rng())
    assert {name: tuple(view.shape) for name, view in views.items()} == {
        "global": (2, 3, 20, 20),
        "local": (3, 3, 10, 10),
        "global_place": (2, 2, 3),
        "local_place": (3, 2, 3),
    }


def test_all_views_of_a_volume_come_from_one_slice():
    views = MultiCrop(
        large=Crops(count=2, size=20, scale=(0.5, 1)),
        small=Crops(count=3, size=10, scale=(0.1, 0.4)),
        augmentation=STILL,
    )(Sample(item="a", images={"image": ramp(9, 30, 50)}), rng(5))
    depths = torch.cat([views[name][:, 0].flatten() for name in ("global", "local")])
    assert depths.max() - depths.min() < 1e-4


def test_a_scale_that_is_no_share_is_refused():
    with pytest.raises(ValueError, match=r"share of the area within \(0, 1\]"):
        Crops(count=1, size=8, scale=(0.5, 1.5))


def volume_with_air() -> Image:
    """Slices of one value each: air, nine tissues in between, bone."""
    pixels = torch.linspace(-1, 1, 11)[None, :, None, None].expand(1, 11, 12, 12).clone()
    pixels[:, :, :, 6:] *= 0.9  # so that no slice is constant and all can be drawn
    return Image(
        pixels=pixels, axes="DHW", modality=Modality.CT, affine=pixel_affine(), frame="pixel"
    )


def multi_crop(**options) -> MultiCrop:
    return MultiCrop(
        large=Crops(count=2, size=12, scale=(1, 1), aspect=(1, 1), flip=0),
        small=Crops(count=3, size=6, scale=(0.2, 0.4), flip=0),
        augmentation=STILL,
        **options,
    )


def test_windows_of_crops_are_shares_of_the_whole_volumes_range():
    """Each large crop is the slice itself, so the window is a line through its two values."""
    sample = Sample(item="a", images={"image": volume_with_air()})
    views = multi_crop(window_share=(0.5, 0.5))
    slopes = []
    for seed in range(30):
        plain = multi_crop()(sample, rng(seed))["global"]
        windowed = views(sample, rng(seed))["global"]
        for before, after in zip(plain, windowed, strict=True):
            if after.abs().max() < 0.999:  # nothing was clipped
                slopes.append((after.max() - after.min()) / (before.max() - before.min()))
    assert len(slopes) > 10
    torch.testing.assert_close(torch.stack(slopes), torch.full((len(slopes),), 2.0))


def test_every_crop_has_a_window_of_its_own_and_none_by_default():
    sample = Sample(item="a", images={"image": volume_with_air()})
    large = multi_crop(window_share=(0.5, 1.0))(sample, rng(3))["global"]
    assert not torch.equal(large[0], large[1])
    plain = multi_crop()(sample, rng(3))["global"]
    assert torch.equal(plain[0], plain[1])


@pytest.mark.parametrize("share", [(0.0, 0.5), (0.8, 0.5), (0.5, 1.5)])
def test_a_window_share_that_is_no_share_is_refused(share):
    with pytest.raises(ValueError, match=r"share of a window within \(0, 1\]"):
        multi_crop(window_share=share)


def thick(depth: int = 12, spacing: tuple[float, float, float] | None = (2.5, 1.0, 1.0)) -> Image:
    """Slice d holds d + 1 and, in one pixel, nothing."""
    pixels = torch.arange(1.0, depth + 1)[None, :, None, None].repeat(1, 1, 8, 8)
    pixels[..., 0, 0] = 0
    return Image(
        pixels=pixels,
        axes="DHW",
        modality=Modality.MR,
        affine=torch.diag(torch.tensor([2.5, 1, 1, 1], dtype=torch.float64)),
        frame="patient",
        spacing=spacing,
    )


def test_the_second_large_crop_may_come_from_a_slice_within_so_many_mm():
    apart, together = set(), set()
    for seed in range(200):
        for reach, found in ((5.0, apart), (0.0, together)):
            first, second = near_slices(thick(), 2, reach, rng(seed))
            found.add(int(second.pixels.max() - first.pixels.max()))
    assert apart == {-2, -1, 0, 1, 2}
    assert together == {0}


def test_neighbours_are_seen_by_the_views_and_need_a_spacing():
    crops = {"large": Crops(count=2, size=8, scale=(1, 1), flip=0.0), "augmentation": STILL}
    small = Crops(count=0, size=1, scale=(1, 1))
    views = MultiCrop(**crops, small=small, neighbours_mm=2.5)
    levels = set()
    for seed in range(40):
        seen = views(Sample(item="a", images={"image": thick()}), rng(seed))["global"]
        levels.add(round(float(seen[1].amax() - seen[0].amax())))
    assert levels == {-1, 0, 1}
    with pytest.raises(ValueError, match="need a volume with a spacing"):
        views(Sample(item="a", images={"image": thick(spacing=None)}), rng())
    with pytest.raises(ValueError, match="neighbours_mm must not be negative"):
        MultiCrop(**crops, small=small, neighbours_mm=-1)


def test_a_crop_in_mm_is_a_square_on_the_patient_whatever_the_spacing():
    source = replace(ramp(120, 200), spacing=(0.5, 0.25))
    crops = Crops(count=100, size=8, side_mm=(10, 20), aspect=(1, 1), flip=0)
    for view in crops(source, rng()):
        height, width = 8 * view.affine[1, 1] * 0.5, 8 * view.affine[2, 2] * 0.25  # mm
        assert float(height) == pytest.approx(float(width), abs=0.4)
        assert 9.7 < width < 20.2
    with pytest.raises(ValueError, match="need an image with a spacing"):
        crops(ramp(20, 20), rng())
    with pytest.raises(ValueError, match="both above 0"):
        Crops(count=1, size=8, side_mm=(0, 5))
