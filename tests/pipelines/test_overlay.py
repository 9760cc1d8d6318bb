"""Displays: windows, slices, square pixels, and heat that starts at one value for a run."""

import numpy as np
import pytest
import torch
from torch import Tensor

from medssl.data.image import Image, pixel_affine
from medssl.data.modality import Modality
from medssl.data.preprocess import Preprocessing
from pipelines.report.overlay import HeatScale, View, heat_scale, overlay, side_by_side, view

PICTURES = Preprocessing(size=(32, 32), intensity="range")
CT = Preprocessing(size=(32, 32), intensity="window", window_hu=(40.0, 80.0))
LPS = torch.diag(torch.tensor([1.0, -1.0, -1.0, 1.0]).double())


def picture(pixels: Tensor) -> Image:
    return Image(
        pixels=pixels,
        axes="HW",
        modality=Modality.PICTURE,
        affine=pixel_affine(),
        frame="pixel",
        value_range=(0, 255),
    )


def axial_ct(pixels: Tensor, spacing: tuple[float, float, float]) -> Image:
    """D towards the head, H towards the back, W towards the left: as scanners store it."""
    affine = torch.zeros(4, 4, dtype=torch.float64)
    affine[2, 0], affine[1, 1], affine[0, 2], affine[3, 3] = (
        *spacing[:1],
        -spacing[1],
        -spacing[2],
        1,
    )
    return Image(
        pixels=pixels[None],
        axes="DHW",
        modality=Modality.CT,
        affine=affine,
        frame="patient",
        spacing=spacing,
        units="HU",
    )


def like(image: Image, values: Tensor) -> Image:
    return Image(
        pixels=values[None],
        axes=image.axes,
        modality=image.modality,
        affine=image.affine,
        frame=image.frame,
        spacing=image.spacing,
    )


def test_a_dark_picture_stays_dark():
    source = picture(torch.full((3, 8, 10), 20.0))
    assert (view(source, like(source, torch.zeros(8, 10)), PICTURES).picture == 20).all()


def test_a_volume_shows_its_most_suspicious_slice_in_the_models_window():
    pixels = torch.full((9, 16, 16), -1000.0)
    pixels[6] = 40.0  # the middle of the window
    source = axial_ct(pixels, (5.0, 1.0, 1.0))
    values = torch.zeros(9, 16, 16)
    values[6, 3, 12] = 5.0
    shown = view(source, like(source, values), CT)
    assert shown.where == "axial slice 7 of 9"
    assert (shown.picture == 128).all()
    assert np.argwhere(shown.heat == 5.0).tolist() == [[3, 12]]


def test_a_coronal_slice_has_square_pixels():
    source = axial_ct(torch.zeros(10, 6, 40), (5.0, 1.0, 1.0))
    plane = Preprocessing(size=(32, 32), intensity="window", window_hu=(40, 80), plane="coronal")
    shown = view(source, like(source, torch.zeros(10, 6, 40)), plane)
    assert shown.picture.shape == (50, 40, 3)  # 10 slices of 5 mm above 40 columns of 1 mm
    assert shown.where == "coronal slice 1 of 6"


def test_the_single_hottest_pixel_of_a_large_picture_is_still_seen():
    source = picture(torch.zeros(1, 1400, 900))
    values = torch.zeros(1400, 900)
    values[701, 77] = 9.0
    shown = view(source, like(source, values), PICTURES)
    assert max(shown.heat.shape) == 448
    assert shown.heat.max() == 9.0


def test_nothing_below_the_threshold_is_coloured_and_all_above_is():
    grey = np.full((20, 20, 3), 90, np.uint8)
    heat = np.zeros((20, 20), np.float32)
    heat[5:10, 5:10] = 2.0
    heat[0, 0], heat[19, 19] = 1.0, -np.inf  # at the threshold; no value
    changed = (overlay(View(grey, heat, ""), HeatScale(1.0, 3.0, True)) != 90).any(-1)
    assert (changed == (heat > 1.0)).all()


def test_a_normal_item_stays_clean_beside_an_anomalous_one():
    rng = np.random.default_rng(0)
    normal = View(np.zeros((8, 8, 3), np.uint8), rng.random((8, 8), np.float32), "")
    sick = View(normal.picture, normal.heat + 4, "")
    scale = heat_scale([normal, sick], map_threshold=1.0)
    assert scale.start == 1.0
    assert scale.calibrated
    assert (overlay(normal, scale) == 0).all()
    assert (overlay(sick, scale) != 0).any()


def test_without_calibration_heat_starts_at_a_percentile_of_the_run():
    heat = np.arange(1000, dtype=np.float32).reshape(20, 50)
    low, high = View(np.zeros((20, 50, 3), np.uint8), heat, ""), View(None, heat + 1000, "")
    scale = heat_scale([low, high], None)
    assert not scale.calibrated
    assert scale.start == pytest.approx(1989.005)  # 0.995 * 1999


def test_original_and_overlay_lie_side_by_side_and_views_survive_the_disk(tmp_path):
    grey = np.arange(300, dtype=np.uint8).reshape(10, 10, 3)
    heat = np.full((10, 10), -np.inf, np.float32)
    heat[2, 2] = 4
    View(grey, heat, "slice 1 of 2").save(tmp_path / "a.npz")
    again = View.load(tmp_path / "a.npz")
    assert again.where == "slice 1 of 2"
    scale = HeatScale(1.0, 3.0, True)
    both = side_by_side(again, scale)
    assert (both[:, :10] == grey).all()
    assert (both[:, 12:] == overlay(View(grey, heat, ""), scale)).all()


def test_of_xyz_the_distance_alone_is_shown():
    z = torch.linspace(100, 200, 64).expand(64, 64)
    xyz = Image(
        pixels=torch.stack([torch.randn(64, 64), torch.randn(64, 64), z]),
        axes="HW",
        modality=Modality.DEPTH,
        affine=pixel_affine(),
        frame="sensor",
        channels=("x", "y", "z"),
    )
    shown = view(xyz, None, PICTURES).picture.astype(int)
    assert (shown == shown[:1]).all()
    assert (np.diff(shown[0, :, 0]) >= 0).all()
    assert (shown[..., 0] == shown[..., 2]).all()
