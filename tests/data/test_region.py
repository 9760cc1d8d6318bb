import dataclasses

import numpy as np
import pytest
import torch
from scipy import ndimage
from skimage import filters, measure

from medssl.data.geometry import crop, resample, resize
from medssl.data.image import Image, pixel_affine
from medssl.data.modality import Modality
from medssl.data.preprocess import Preprocessing
from medssl.data.region import crop_ultrasound, foreground, intracranial
from medssl.data.synthetic.head_ct import DEVELOPMENT_LESION_SEEDS, head_ct


def skull(*, radius=30, thickness=4, gap=0, slices=5):
    """Cylinders of brain (40 HU) in bone (1000 HU) in air, one with a gap of `gap` pixels."""
    y, x = np.mgrid[-40:40, -40:40]
    distance = np.hypot(y, x)
    hu = np.full((slices, 80, 80), -1000.0, dtype=np.float32)
    hu[:, distance <= radius] = 40
    bone = (distance > radius - thickness) & (distance <= radius)
    hu[:, bone] = 1000
    if gap:
        hu[0, 38 : 38 + gap, :40][bone[38 : 38 + gap, :40]] = 40
    return volume(hu)


def volume(hu, modality=Modality.CT):
    return Image(
        pixels=torch.from_numpy(hu)[None],
        axes="DHW",
        modality=modality,
        affine=pixel_affine(),
        frame="patient",
        spacing=(1.0, 1.0, 1.0),
    )


def test_it_is_what_the_skull_encloses_less_a_rim():
    y, x = np.mgrid[-40:40, -40:40]
    region = intracranial(skull())
    inner = np.hypot(y, x) <= 30 - 4
    assert region.any()
    assert not (region.numpy() & ~inner).any()
    assert (region[2].numpy() | (np.hypot(y, x) > 30 - 4 - 3.5)).all()


def test_a_calcification_inside_belongs_to_it():
    image = skull()
    image.pixels[0, 2, 38:42, 38:42] = 400
    assert intracranial(image)[2, 38:42, 38:42].all()


def test_a_small_gap_of_the_skull_is_closed_and_an_open_slice_left_out():
    assert intracranial(skull(gap=3))[0].any()
    wide = intracranial(skull(gap=12))
    assert not wide[0].any()
    assert wide[1:].any((1, 2)).all()


def test_slices_much_smaller_than_the_largest_are_left_out():
    image = skull()
    image.pixels[0, 4] = skull(radius=18).pixels[0, 4]
    region = intracranial(image)
    assert not region[4].any()
    assert region[3].any()


def test_a_volume_without_bone_has_no_region():
    assert not intracranial(volume(np.full((2, 20, 20), 40, dtype=np.float32))).any()


def test_other_modalities_are_refused():
    with pytest.raises(ValueError, match="needs CT in HU, got MR"):
        intracranial(volume(np.zeros((1, 4, 4), dtype=np.float32), Modality.MR))


def test_most_of_a_lesion_lies_within_it():
    """The phantom knows where its lesions are; what the region leaves out is bounded."""
    shares = []
    for seed in DEVELOPMENT_LESION_SEEDS[:6]:
        phantom = head_ct(seed, lesion=True)
        lesion = phantom.mask.pixels[0] > 0.5
        shares.append(float((intracranial(phantom.image) & lesion).sum() / lesion.sum()))
    assert np.mean(shares) > 0.8


def test_preprocessing_makes_the_rest_invalid_and_dark():
    prepare = Preprocessing(
        size=(80, 80), intensity="window", window_hu=(40.0, 80.0), region="intracranial"
    )
    image = skull()
    prepared = prepare(dataclasses.replace(image, frame="sensor"))
    assert torch.equal(prepared.valid, intracranial(image))
    outside = prepared.pixels[0][~prepared.valid]
    assert (outside == (0.0 - 0.5) / 0.25).all()
    assert (prepared.pixels[0][prepared.valid] == 0).all()  # 40 HU is the middle of the window


def body(*, air=20, hot=False, legs=False, noise=0.02, slices=3):
    """A disc of radius 30 with a dark cavity in noisy air; returns the image and the disc."""
    half = 30 + air
    y, x = np.mgrid[-half:half, -half:half]
    disc = np.broadcast_to(np.hypot(y, x) <= 30, (slices, 2 * half, 2 * half)).copy()
    rng = np.random.default_rng(0)
    values = np.abs(rng.normal(0, noise, disc.shape)) + disc * (1 + 0.4 * x / 30)
    values[:, np.hypot(y - 8, x) <= 5] = 0
    if hot:
        values[:, np.hypot(y + 15, x) <= 3] = 30
    if legs:
        values[:, half - 4 : half + 4, :8] = 1
    return volume((100 * values).astype(np.float32), Modality.MR), disc


@pytest.mark.parametrize("hot", [False, True])
def test_the_foreground_is_the_body_with_its_cavities_less_a_rim(hot):
    image, disc = body(hot=hot)
    found = foreground(image).numpy()
    cross = ndimage.generate_binary_structure(2, 1)[None]
    assert not (found & ~disc).any()
    assert (found | ~ndimage.binary_erosion(disc, cross, iterations=2)).all()


def test_only_the_largest_part_is_the_foreground():
    image, disc = body(legs=True)
    assert not (foreground(image).numpy() & ~disc).any()


def test_the_foreground_is_that_of_scikit_image():
    """The rule of the docstring, one step after the other, by scikit-image alone."""
    image, _ = body(noise=0.15, slices=1)
    values = image.pixels[0, 0].numpy()
    root = np.sqrt(filters.gaussian(values - values.min(), 1.0, mode="reflect"))
    above = ndimage.binary_erosion(root > filters.threshold_otsu(root))
    parts = measure.regionprops(measure.label(above, connectivity=1))
    largest = max(parts, key=lambda part: part.area)
    expected = np.zeros_like(above)
    expected[largest.slice] = largest.image_filled
    assert (foreground(image)[0].numpy() == expected).all()


def test_the_foreground_does_not_depend_on_the_unit():
    image, _ = body()
    scaled = dataclasses.replace(image, pixels=3 * image.pixels - 70, modality=Modality.UNKNOWN)
    assert torch.equal(foreground(scaled), foreground(image))


def test_invalid_pixels_do_not_count_for_the_foreground():
    image, disc = body()
    valid = torch.ones(image.spatial_shape, dtype=torch.bool)
    valid[:, :5] = False
    pixels = image.pixels.clone()
    pixels[:, :, :3], pixels[:, :, 3:5] = torch.nan, 1e6
    broken = dataclasses.replace(image, pixels=pixels, valid=valid)
    found = foreground(broken).numpy()
    assert not (found & ~disc).any()
    assert (found != foreground(image).numpy()).mean() < 1e-3  # a little less air moves Otsu


def test_a_foreground_needs_air_and_body():
    with pytest.raises(ValueError, match="found in MR and PT, got CT"):
        foreground(skull())
    with pytest.raises(ValueError, match="without two different valid values"):
        foreground(volume(np.ones((1, 8, 8), dtype=np.float32), Modality.MR))


def ultrasound(regions, axes="HW"):
    """Each pixel holds its row and its column; 40 x 60 pixels."""
    index = torch.meshgrid(torch.arange(40.0), torch.arange(60.0), indexing="ij")
    pixels = torch.stack(index)
    timed = axes == "THW"
    return Image(
        pixels=pixels[:, None].expand(2, 3, 40, 60) if timed else pixels,
        axes=axes,
        modality=Modality.US,
        affine=pixel_affine(),
        frame="pixel",
        times_s=(0.0, 0.1, 0.2) if timed else None,
        provenance={} if regions is None else {"ultrasound_regions": regions},
    )


@pytest.mark.parametrize("axes", ["HW", "THW"])
def test_ultrasound_is_cut_to_the_box_around_its_regions(axes):
    part = crop_ultrasound(ultrasound([[10, 5, 29, 24], [20, 15, 49, 30]], axes))
    assert part.spatial_shape == (26, 40)  # both ends belong to a region
    assert part.pixels[..., 0, 0].reshape(2, -1)[:, 0].tolist() == [5, 10]
    assert part.pixels[..., -1, -1].reshape(2, -1)[:, 0].tolist() == [30, 49]
    assert (part.affine @ torch.tensor([0, 0, 0, 1.0]).double()).tolist() == [0, 5, 10, 1]


def test_ultrasound_regions_stay_where_they_are_when_the_picture_moves():
    whole = ultrasound([[10, 4, 29, 23]])
    expected = crop_ultrasound(whole).pixels
    assert torch.equal(crop_ultrasound(crop_ultrasound(whole)).pixels, expected)
    assert torch.equal(crop_ultrasound(crop(whole, (2, 6), (30, 40))).pixels, expected)
    half = crop_ultrasound(resize(whole, (20, 30)))
    assert half.spatial_shape == (10, 10)
    assert half.affine[:3, 3].tolist() == [0, 4.5, 10.5]


def test_a_region_beyond_the_border_is_cut_there():
    assert crop_ultrasound(ultrasound([[10, 5, 60, 40]])).spatial_shape == (35, 50)
    with pytest.raises(ValueError, match="outside of the picture of 40 x 60"):
        crop_ultrasound(ultrasound([[60, 5, 70, 9]]))


@pytest.mark.parametrize("regions", [None, []])
def test_ultrasound_regions_are_never_guessed(regions):
    with pytest.raises(ValueError, match="no ultrasound region is declared"):
        crop_ultrasound(ultrasound(regions))


def test_regions_in_pixels_mean_nothing_in_the_patient_frame():
    with pytest.raises(ValueError, match="in frame 'pixel', the image in 'patient'"):
        crop_ultrasound(dataclasses.replace(ultrasound([[0, 0, 9, 9]]), frame="patient"))


def test_a_map_of_a_cut_ultrasound_comes_home_to_its_place():
    whole = ultrasound([[20, 10, 39, 29]])
    prepare = Preprocessing(
        size=(10, 10), intensity="percentile", region="ultrasound", mean=(0.0,), std=(1.0,)
    )
    prepared = prepare(dataclasses.replace(whole, pixels=whole.pixels[:1]))
    marked = torch.zeros(1, 10, 10)
    marked[0, 2, 7] = 1
    home = resample(dataclasses.replace(prepared, pixels=marked), to=whole, mode="nearest")
    assert (home.pixels[0] == 1).nonzero().tolist() == [[14, 34], [14, 35], [15, 34], [15, 35]]
    assert home.valid.nonzero().amin(0).tolist() == [10, 20]
    assert home.valid.nonzero().amax(0).tolist() == [29, 39]
