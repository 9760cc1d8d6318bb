import hashlib
import math

import numpy as np
import pytest
import torch
from scipy.ndimage import binary_erosion, distance_transform_edt, gaussian_filter, uniform_filter

from medssl.data.synthetic import head_ct as generator
from medssl.data.synthetic.ct_scanner import sample_scan
from medssl.data.synthetic.head_anatomy import sample_anatomy
from medssl.data.synthetic.head_ct import (
    DEVELOPMENT_LESION_SEEDS,
    DEVELOPMENT_NORMAL_SEEDS,
    TEST_LESION_SEEDS,
    TEST_NORMAL_SEEDS,
    TRAIN_SEEDS,
    Phantom,
    head_ct,
)
from medssl.data.synthetic.head_lesions import KINDS

IN_PLANE = np.ones((1, 3, 3))
LESION_SEEDS = DEVELOPMENT_LESION_SEEDS[:36]


@pytest.fixture(scope="module")
def ill() -> list[Phantom]:
    return [head_ct(seed, lesion=True) for seed in LESION_SEEDS]


@pytest.fixture(scope="module")
def well() -> list[Phantom]:
    """The same heads and scans without their lesions."""
    return [head_ct(seed, lesion=False) for seed in LESION_SEEDS]


def hu(phantom: Phantom) -> np.ndarray:
    return phantom.image.pixels[0].numpy()


def mask(phantom: Phantom) -> np.ndarray:
    return phantom.mask.pixels[0].numpy() > 0


def smooth(volume: np.ndarray) -> np.ndarray:
    """3 x 3 means in the plane: noise goes, tissue stays."""
    return uniform_filter(volume.astype(float), (1, 3, 3))


def digest(phantom: Phantom) -> str:
    voxels = [phantom.image.pixels, *([phantom.mask.pixels] if phantom.mask else [])]
    voxels.append((phantom.image.affine * 1e4).round())
    content = b"".join(values.numpy().astype("<i4").tobytes() for values in voxels)
    return hashlib.sha256(content).hexdigest()


@pytest.mark.parametrize(
    ("seed", "lesion", "expected"),
    [
        (TRAIN_SEEDS[0], False, "1b63f4d800f1611d"),
        (TEST_NORMAL_SEEDS[0], False, "a4f470356b35e3fa"),
        (TEST_LESION_SEEDS[0], True, "4c41bf58eec0fb55"),
        (TEST_LESION_SEEDS[59], True, "1005204093d382a2"),
    ],
)
def test_the_generator_is_frozen(seed, lesion, expected):
    assert digest(head_ct(seed, lesion=lesion))[:16] == expected


def test_the_splits_share_no_seed():
    splits = (
        TRAIN_SEEDS,
        TEST_NORMAL_SEEDS,
        TEST_LESION_SEEDS,
        DEVELOPMENT_NORMAL_SEEDS,
        DEVELOPMENT_LESION_SEEDS,
    )
    seeds = [seed for split in splits for seed in split]
    assert len(set(seeds)) == len(seeds)
    assert (len(TEST_NORMAL_SEEDS), len(TEST_LESION_SEEDS)) == (100, 60)


def test_a_seed_gives_the_same_phantom_whatever_was_drawn_before():
    first = head_ct(5, lesion=True)
    head_ct(6, lesion=False)
    torch.manual_seed(1)
    np.random.seed(1)
    assert digest(head_ct(5, lesion=True)) == digest(first)
    assert digest(head_ct(7, lesion=True)) != digest(first)


def test_voxels_are_whole_hu_that_12_bits_hold(ill):
    for phantom in ill:
        voxels = hu(phantom)
        assert np.array_equal(voxels, np.rint(voxels))
        assert voxels.min() >= -1024
        assert voxels.max() <= 3071


def test_only_the_lesion_and_its_surroundings_differ_from_the_same_head_without(ill, well):
    for with_lesion, without in zip(ill, well, strict=True):
        difference = np.abs(hu(with_lesion) - hu(without))
        inside = mask(with_lesion)
        far_mm = distance_transform_edt(~inside, sampling=with_lesion.image.spacing)
        assert difference[inside].mean() > 4
        assert np.mean(difference[far_mm > 50] > 4) < 0.01  # what mass effect leaves that far
        assert difference[far_mm > 15].mean() < 0.2 * difference[inside].mean()


def test_masks_hold_the_volume_of_the_lesions_ellipsoids(ill):
    ratios = []
    for phantom in ill:
        if len(phantom.lesions) == 1:
            voxel_mm3 = math.prod(phantom.image.spacing)
            ellipsoid_mm3 = 4 / 3 * math.pi * math.prod(phantom.lesions[0].radii_mm)
            ratios.append(mask(phantom).sum() * voxel_mm3 / ellipsoid_mm3)
    assert np.median(ratios) == pytest.approx(1, abs=0.12)  # the warp and the skull's clipping
    assert min(ratios) > 0.5


@pytest.mark.parametrize(
    ("kind", "low", "high"), [("haematoma", 52, 84), ("infarct", 6, 22), ("cyst", -2, 16)]
)
def test_lesions_of_one_value_have_it_within_their_mask(ill, kind, low, high):
    inner = [
        hu(phantom)[binary_erosion(mask(phantom), IN_PLANE, iterations=2)].mean()
        for phantom in ill
        if [lesion.kind for lesion in phantom.lesions] == [kind]
    ]
    assert len(inner) >= 3
    assert low < min(inner)
    assert max(inner) < high


def test_lesions_said_to_be_in_range_take_values_of_normal_brain(ill, well):
    brain = [smooth(hu(phantom)) for phantom in well]
    normal = np.concatenate([v[(v > -10) & (v < 90)] for v in brain])  # CSF to dense tissue
    low, high = np.quantile(normal, (0.005, 0.995))
    for phantom in ill:
        if len(phantom.lesions) > 1:
            continue
        values = smooth(hu(phantom))[mask(phantom)]
        if phantom.lesions[0].in_range:
            assert low < values.mean() < high
            assert np.mean((values > low) & (values < high)) > 0.85
        else:
            assert np.quantile(values, 0.95) > 42  # denser than any normal grey matter


def test_at_least_a_third_of_the_test_lesions_are_in_the_range_of_normal_tissue():
    lesions = [
        lesion
        for seed in TEST_LESION_SEEDS
        for lesion in generator._sample_lesions(seed, sample_anatomy(generator._stream(seed, 0)))
    ]
    assert sum(lesion.in_range for lesion in lesions) >= len(lesions) / 3
    kinds = [KINDS[seed % len(KINDS)] for seed in TEST_LESION_SEEDS]
    assert {kind: kinds.count(kind) for kind in KINDS} == dict.fromkeys(KINDS, 10)


def test_noise_differs_between_scans_by_more_than_a_factor_of_two(well):
    levels = []
    for phantom in well:
        middle = hu(phantom)[len(hu(phantom)) // 2, 46:66, 40:56]
        levels.append((middle - gaussian_filter(middle, 1.5)).std())
    assert np.quantile(levels, 0.9) > 2 * np.quantile(levels, 0.1)


def test_rows_run_to_the_back_columns_to_the_left_and_slices_up(well):
    for phantom in well:
        directions = phantom.image.affine[:3, :3] / torch.tensor(phantom.image.spacing)
        assert torch.allclose(directions.norm(dim=0), torch.ones(3, dtype=torch.float64))
        assert torch.allclose(directions.T @ directions, torch.eye(3, dtype=torch.float64))
        assert directions[2, 0] > 0.9  # d: superior
        assert directions[1, 1] < -0.9  # h: posterior
        assert directions[0, 2] < -0.9  # w: left
        voxels = hu(phantom)
        behind = voxels[:, -25:].max(axis=(0, 1))
        assert np.mean(behind > -700) > 0.5, "the couch lies behind the head"
        assert (voxels[:, :4] < -900).mean() > 0.9


def test_some_scans_are_oblique_and_some_have_unequal_spacing():
    scans = [sample_scan(np.random.default_rng(seed)) for seed in range(200)]
    oblique = np.mean([scan.affine[2, 0] < 0.999 * scan.spacing[0] for scan in scans])
    unequal = np.mean([abs(scan.spacing[1] - scan.spacing[2]) > 0.05 for scan in scans])
    assert 0.15 < oblique < 0.35
    assert 0.15 < unequal < 0.35
    assert {scan.shape[0] for scan in scans} == {13, 14, 15, 16}


def test_the_mask_lies_on_the_images_grid(ill):
    for phantom in ill:
        assert torch.equal(phantom.mask.affine, phantom.image.affine)
        assert phantom.mask.spatial_shape == phantom.image.spatial_shape
        assert set(phantom.mask.pixels.unique().tolist()) == {0, 1}
    assert head_ct(0, lesion=False).mask is None


def test_more_random_numbers_for_one_use_do_not_change_another():
    used, fresh = generator._stream(3, 1), generator._stream(3, 2)
    used.standard_normal(1000)
    assert fresh.uniform() == generator._stream(3, 2).uniform()
    assert generator._stream(3, 1).uniform() != generator._stream(3, 2).uniform()
