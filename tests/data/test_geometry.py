"""Grids, affines and the way home."""

import math
from dataclasses import replace
from itertools import permutations, product

import nibabel
import numpy as np
import pytest
import torch
from scipy import ndimage
from scipy.spatial.transform import Rotation
from torch import Tensor

from medssl.data.geometry import corners, crop, orientation, pad, reorient, resample, resize
from medssl.data.image import Image, pixel_affine
from medssl.data.modality import Modality


def volume(shape=(5, 7, 9), *, affine=None, pixels=None, valid=None) -> Image:
    """A patient-frame volume whose voxels are all different."""
    size = math.prod(shape)
    affine = torch.tensor(np.diag([3.0, 0.5, 0.8, 1.0])) if affine is None else affine
    return Image(
        pixels=torch.arange(size, dtype=torch.float32).reshape(1, *shape)
        if pixels is None
        else pixels,
        axes="DHW",
        modality=Modality.CT,
        affine=affine,
        frame="patient",
        spacing=tuple(affine[:3, :3].norm(dim=0).tolist()),
        valid=valid,
    )


def picture(pixels: Tensor, **changes) -> Image:
    values = {"axes": "HW", "modality": Modality.PICTURE, "affine": pixel_affine()}
    return Image(pixels=pixels, frame="pixel", **{**values, **changes})


def oblique(seed: int = 0, spacing=(3.0, 0.5, 0.8), max_deg: float = 20) -> Tensor:
    """An affine of a permuted, rotated, anisotropic, shifted grid."""
    rng = np.random.default_rng(seed)
    turn = Rotation.from_euler("xyz", rng.uniform(-max_deg, max_deg, 3), degrees=True).as_matrix()
    affine = np.eye(4)
    affine[:3, :3] = turn @ np.eye(3)[[2, 1, 0]] @ np.diag(spacing)
    affine[:3, 3] = rng.uniform(-100, 100, 3)
    return torch.from_numpy(affine)


def world(image: Image) -> Tensor:
    """(*spatial, 3) coordinates of every voxel centre, from the definition."""
    shape = (1,) * (3 - len(image.spatial_shape)) + image.spatial_shape
    index = torch.tensor(list(product(*map(range, shape), [1]))).double()
    return (index @ image.affine.T)[:, :3].reshape(*image.spatial_shape, 3)


def linear_field(image: Image) -> Image:
    """The same grid with pixels that are a linear function of the world coordinates."""
    field = world(image) @ torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64) + 7
    return replace(image, pixels=field.float()[None])


# --- resize, crop, pad ---


def test_resize_keeps_the_outer_edges_of_the_picture_in_place():
    image = picture(torch.rand(1, 12, 30))
    small = resize(image, (4, 6))
    edges = torch.tensor([[0, -0.5, -0.5, 1], [0, 3.5, 5.5, 1]], dtype=torch.float64)
    assert (edges @ small.affine.T)[:, 1:3].tolist() == [[-0.5, -0.5], [11.5, 29.5]]


def test_resize_moves_content_and_affine_alike():
    image = linear_field(volume((2, 40, 60), affine=oblique()))
    for size in ((20, 15), (97, 131)):
        moved = resize(image, size)
        inner = (slice(None), slice(4, -4), slice(4, -4))  # the border clamps
        expected = linear_field(moved).pixels[0][inner]
        torch.testing.assert_close(moved.pixels[0][inner], expected, atol=2e-3, rtol=0)


def test_resize_scales_in_plane_spacing_only():
    assert resize(volume((2, 8, 10)), (4, 20)).spacing == pytest.approx((3.0, 1.0, 0.4))


def test_shrinking_averages_fine_stripes_instead_of_picking_them():
    stripes = torch.zeros(1, 64, 64)
    stripes[:, ::4] = 1
    small = resize(picture(stripes), (8, 8)).pixels
    torch.testing.assert_close(small[:, 1:-1], torch.full((1, 6, 8), 0.25), atol=0.02, rtol=0)


def test_invalid_pixels_do_not_leak_through_resize():
    pixels, valid = torch.full((1, 16, 16), 5.0), torch.ones(16, 16, dtype=torch.bool)
    pixels[:, :, :6], valid[:, :6] = -2000, False
    small = resize(picture(pixels, valid=valid), (8, 8))
    assert small.valid is not None
    assert small.valid[0].tolist() == [False] * 3 + [True] * 5
    torch.testing.assert_close(small.pixels[:, small.valid], torch.full((1, 40), 5.0))
    assert small.pixels[:, ~small.valid].isnan().all()


def test_crop_and_pad_leave_every_voxel_at_its_place():
    image = volume(affine=oblique(1))
    part = crop(image, (1, 2, 3), (3, 4, 5))
    torch.testing.assert_close(world(part), world(image)[1:4, 2:6, 3:8])
    assert torch.equal(part.pixels, image.pixels[:, 1:4, 2:6, 3:8])
    back = pad(part, (1, 2, 3), (1, 1, 1))
    torch.testing.assert_close(world(back), world(image))
    assert back.valid is not None
    assert torch.equal(back.pixels[:, back.valid].reshape(part.pixels.shape), part.pixels)
    assert back.pixels[:, ~back.valid].isnan().all()


def test_a_crop_beyond_the_image_is_refused():
    with pytest.raises(ValueError, match="does not fit"):
        crop(volume(), (0, 0, 5), (5, 7, 5))


# --- orientation ---


def test_orientation_agrees_with_nibabel_for_every_right_angled_and_tilted_grid():
    for order in permutations(range(3)):
        for signs in product((-1, 1), repeat=3):
            for seed in range(3):
                affine = oblique(seed)[:, [*order, 3]].numpy() @ np.diag([*signs, 1])
                expected = "".join(nibabel.aff2axcodes(affine))
                assert orientation(torch.from_numpy(affine)) == expected


@pytest.mark.parametrize("code", ["SPL", "RAS", "LIP", "PIL", "ASR"])
def test_reorient_turns_the_grid_and_no_voxel_leaves_its_place(code):
    image = linear_field(volume(affine=oblique(2)))
    turned = reorient(image, code)
    assert "".join(nibabel.aff2axcodes(turned.affine.numpy())) == code
    torch.testing.assert_close(turned.pixels, linear_field(turned).pixels)
    assert sorted(turned.pixels.flatten().tolist()) == sorted(image.pixels.flatten().tolist())
    assert turned.spacing == pytest.approx(turned.affine[:3, :3].norm(dim=0).tolist())
    assert torch.equal(reorient(turned, orientation(image.affine)).pixels, image.pixels)


def test_reorient_turns_valid_with_the_pixels():
    valid = torch.rand(5, 7, 9, generator=torch.Generator().manual_seed(0)) > 0.5
    image = volume(pixels=valid.float()[None], valid=valid, affine=oblique(3))
    turned = reorient(image, "LPS")
    assert turned.valid is not None
    assert torch.equal(turned.valid, turned.pixels[0] > 0.5)


@pytest.mark.parametrize("code", ["SP", "SSL", "XYZ"])
def test_reorient_refuses_a_code_that_names_no_three_axes(code):
    with pytest.raises(ValueError, match="R/L"):
        reorient(volume(), code)


def test_corners_are_the_extreme_voxel_centers():
    image = volume((2, 3, 4), affine=oblique(4))
    expected = world(image)[[0, 0, 0, 0, 1, 1, 1, 1], [0, 0, 2, 2] * 2, [0, 3] * 4]
    torch.testing.assert_close(corners(image), expected)
    flat = picture(torch.zeros(1, 3, 4))
    assert corners(flat).tolist() == [[0, 0, 0], [0, 0, 3], [0, 2, 0], [0, 2, 3]]


# --- resample ---


def scipy_resample(image: Image, to: Image, order: int, outside: float) -> np.ndarray:
    step = np.linalg.inv(image.affine.numpy()) @ to.affine.numpy()
    index = np.indices(to.spatial_shape).reshape(3, -1)
    source = step[:3, :3] @ index + step[:3, 3:]
    limits = np.array(image.spatial_shape)[:, None] - 0.5
    inside = ((source >= -0.5) & (source <= limits)).all(0)
    array = image.pixels[0].double().numpy()
    values = ndimage.map_coordinates(array, source, order=order, mode="nearest")
    return np.where(inside, values, outside).reshape(to.spatial_shape)


AXIS_ALIGNED = torch.tensor(
    [[0, 0, 0.4, -1.0], [0, -0.45, 0, 3.31], [2.1, 0, 0, 0.7], [0, 0, 0, 1]], dtype=torch.float64
)


@pytest.mark.parametrize("mode", ["linear", "nearest"])
@pytest.mark.parametrize("aligned", [True, False])
def test_resample_equals_scipy_on_aligned_and_oblique_grids(aligned, mode):
    generator = torch.Generator().manual_seed(0)
    image = volume((6, 11, 13), pixels=torch.rand(1, 6, 11, 13, generator=generator))
    tilt = torch.eye(4, dtype=torch.float64)
    tilt[:3, :3] = torch.from_numpy(Rotation.from_rotvec([0.2, 0.1, -0.3]).as_matrix())
    target = (image.affine if aligned else tilt @ image.affine) @ AXIS_ALIGNED
    to = volume((9, 14, 17), affine=target)
    moved = resample(image, to, mode=mode, outside=-5.0)
    expected = scipy_resample(image, to, order=1 if mode == "linear" else 0, outside=-5.0)
    assert (expected == -5).any()
    assert (expected != -5).any()
    np.testing.assert_allclose(moved.pixels[0].numpy(), expected, atol=2e-6)
    assert torch.equal(moved.affine, to.affine)
    assert moved.spacing == to.spacing


def test_resample_onto_its_own_grid_changes_no_bit():
    image = volume(affine=oblique(5))
    assert torch.equal(resample(image, image).pixels, image.pixels)


def test_blocks_of_target_slices_join_without_a_seam(monkeypatch):
    image = volume((6, 11, 13), pixels=torch.rand(1, 6, 11, 13))
    for affine in (image.affine @ AXIS_ALIGNED, oblique(6)):
        to = volume((9, 14, 17), affine=affine)
        whole = resample(image, to, outside=0.0)
        with monkeypatch.context() as patch:
            patch.setattr("medssl.data.geometry._BLOCK", 500)
            torch.testing.assert_close(resample(image, to, outside=0.0).pixels, whole.pixels)


def test_a_map_made_on_a_turned_and_resized_grid_comes_home_to_its_voxels():
    source = linear_field(volume((6, 40, 50), affine=oblique(7)))
    home = resample(resize(reorient(source, "SPL"), (30, 30)), to=source)
    inner = (0, slice(None), slice(3, -3), slice(3, -3))  # a voxel's step is 0.4 to 3
    torch.testing.assert_close(home.pixels[inner], source.pixels[inner], atol=0.05, rtol=0)
    torch.testing.assert_close(corners(home), corners(source), atol=1e-9, rtol=0)


def test_a_picture_comes_home_in_its_pixel_frame():
    image = picture(torch.rand(3, 31, 17))
    small = resize(crop(image, (4, 2), (20, 10)), (40, 20))
    home = resample(small, to=image)
    assert home.axes == "HW"
    assert home.pixels.shape == (3, 31, 17)
    assert home.valid is not None
    assert home.valid.sum() == 200
    assert home.valid[4:24, 2:12].all()


def test_nearest_keeps_a_mask_binary_and_fills_outside():
    mask = volume(pixels=(torch.arange(315).reshape(1, 5, 7, 9) % 3 == 0).float())
    to = volume((9, 9, 9), affine=oblique(8, max_deg=5))
    moved = resample(mask, to, mode="nearest", outside=0.0).pixels
    assert set(moved.unique().tolist()) <= {0.0, 1.0}


def test_half_a_voxel_beyond_the_border_clamps_and_farther_is_outside():
    line = volume((1, 1, 4), pixels=torch.tensor([[[[10.0, 20, 30, 40]]]]), affine=pixel_affine())
    shifted = pixel_affine()
    shifted[2, 3] = -0.5
    to = volume((1, 1, 6), affine=shifted)
    moved = resample(line, to, outside=-1.0)
    assert moved.pixels.flatten().tolist() == [10, 15, 25, 35, 40, -1]
    assert moved.valid is not None
    assert moved.valid.flatten().tolist() == [True] * 5 + [False]


def test_nan_stays_where_it_dominates_and_nowhere_else():
    line = torch.tensor([[[[1.0, 1, math.nan, 1, 1]]]])
    to_affine = torch.diag(torch.tensor([1.0, 1, 0.25, 1], dtype=torch.float64))
    for tilt in (0.0, 1e-4):  # the aligned and the general way
        affine = to_affine.clone()
        affine[1, 2] = tilt
        image = volume((1, 1, 5), pixels=line, affine=pixel_affine())
        moved = resample(image, volume((1, 1, 17), affine=affine))
        nan = moved.pixels.flatten().isnan().tolist()
        assert [i for i, missing in enumerate(nan) if missing] == [7, 8, 9]
        assert (moved.pixels[~moved.pixels.isnan()] == 1).all()


def test_different_frames_and_singular_affines_are_refused():
    with pytest.raises(ValueError, match="frame"):
        resample(volume(), picture(torch.zeros(1, 4, 4)))
    flat = torch.diag(torch.tensor([0.0, 1, 1, 1], dtype=torch.float64))
    with pytest.raises(ValueError, match="singular"):
        resample(volume(), volume(affine=flat))


def test_a_volume_is_resized_along_all_axes_as_scipy_averages_and_interpolates():
    """A linear ramp stays one, its spacing follows, and its middle stays where it is."""
    index = torch.meshgrid(*(torch.arange(n).float() for n in (12, 8, 10)), indexing="ij")
    source = Image(
        pixels=torch.stack(index),
        axes="DHW",
        modality=Modality.CT,
        affine=pixel_affine(),
        frame="patient",
        spacing=(1.0, 2.0, 3.0),
    )
    small = resize(source, (6, 16, 5))
    assert small.spacing == pytest.approx((2.0, 1.0, 6.0))
    assert small.affine.diagonal().tolist() == pytest.approx([2.0, 0.5, 2.0, 1.0])
    for axis, (length, factor) in enumerate(((6, 2.0), (16, 0.5), (5, 2.0))):
        wanted = torch.arange(length) * factor + 0.5 * factor - 0.5
        found = small.pixels[axis].movedim(axis, 0).flatten(1).mean(1)
        torch.testing.assert_close(found[2:-2], wanted[2:-2], atol=1e-4, rtol=0)
    stripes = replace(source, pixels=(source.pixels[:1] % 2))  # slices that alternate
    assert (resize(stripes, (3, 8, 10)).pixels - 0.5).abs().max() < 0.1
    with pytest.raises(ValueError, match="of each axis of 'DHW'"):
        resize(source, (4,))
