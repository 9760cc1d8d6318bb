import dataclasses

import numpy as np
import pytest
import torch

from medssl.data.image import Image, pixel_affine
from medssl.data.modality import Modality
from medssl.data.preprocess import Preprocessing
from medssl.data.region import intracranial
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
