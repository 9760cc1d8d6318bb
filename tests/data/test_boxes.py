"""Boxes of volumes: cubes in mm that know where they come from."""

import math

import pytest
import torch

from medssl.data.augment import Augmentation
from medssl.data.boxes import Boxes, MultiBox
from medssl.data.image import Image
from medssl.data.modality import Modality
from medssl.data.physics import MRAugmentation
from medssl.data.sample import Sample

STILL = Augmentation(intensity_probability=0, noise_probability=0, blur_probability=0)
SPACING = (5.0, 0.5, 1.0)


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def volume(pixels: torch.Tensor, spacing=SPACING) -> Image:
    """Axes turned about each other, so that a mixed-up axis is seen."""
    turned = torch.zeros(4, 4, dtype=torch.float64)
    turned[2, 0], turned[1, 1], turned[0, 2], turned[3, 3] = *(spacing or (1, 1, 1)), 1
    turned[:3, 3] = torch.tensor([-40.0, 20.0, 7.0])
    axes = "DHW" if pixels.ndim == 4 else "HW"
    return Image(
        pixels=pixels,
        axes=axes,
        modality=Modality.CT,
        affine=turned,
        frame="patient",
        spacing=spacing,
    )


def places(image: Image) -> torch.Tensor:
    """(3, D, H, W): where the affine says each voxel lies."""
    index = torch.meshgrid(*(torch.arange(n) for n in image.spatial_shape), indexing="ij")
    whole = torch.stack([*index, torch.ones(image.spatial_shape)]).double()
    return torch.einsum("ij,jdhw->idhw", image.affine, whole)[:3].float()


def ramp() -> Image:
    """Channel a holds coordinate a of the frame, in mm."""
    return volume(places(volume(torch.zeros(1, 20, 120, 90))))


@pytest.mark.parametrize("seed", range(6))
def test_a_boxs_affine_leads_to_the_voxels_it_was_made_of(seed: int):
    box = Boxes(count=1, size=(6, 12, 10), side_mm=(20, 60)).once(ramp(), rng(seed))
    assert box.pixels.shape == (3, 6, 12, 10)
    inner = (slice(None), *[slice(2, -2)] * 3)
    difference = (box.pixels - places(box))[inner]
    assert difference.abs().max() < 0.5  # mm; antialiasing weights are sampled coarsely
    assert difference.mean((1, 2, 3)).abs().max() < 0.1


def test_a_box_is_a_cube_in_mm_whatever_the_spacing():
    sides = []
    for seed in range(200):
        box = Boxes(count=1, size=(4, 8, 16), side_mm=(20, 50)).once(ramp(), rng(seed))
        steps = box.affine[:3, :3].norm(dim=0)
        sides.append(steps * torch.tensor([4, 8, 16]))
        assert box.spacing == pytest.approx(steps.tolist())
    found = torch.stack(sides)
    assert (found[:, 1] - found[:, 2]).abs().max() <= 1  # a voxel's rounding
    assert (found[:, 0] - found[:, 2]).abs().max() <= 5.5
    assert 19 <= found[:, 2].min() < 22
    assert 47 < found[:, 2].max() <= 50
    below = (found[:, 2] < math.sqrt(20 * 50)).float().mean()
    assert 0.4 < below < 0.6  # even in the logarithm


def test_an_axis_that_is_shorter_than_the_side_is_taken_whole():
    box = Boxes(count=1, size=(3, 4, 4), side_mm=(80, 80), flip=0).once(ramp(), rng())
    lengths = box.affine[:3, :3].norm(dim=0) * torch.tensor([3, 4, 4])
    assert lengths.tolist() == pytest.approx([80, 60, 80])  # 120 rows of half a millimetre


def test_the_views_of_a_volume_know_their_places():
    views = MultiBox(
        large=Boxes(count=2, size=(4, 8, 8), side_mm=(40, 60)),
        small=Boxes(count=3, size=(2, 6, 6), side_mm=(15, 25)),
        augmentation=STILL,
    )(Sample(item="a", images={"image": ramp()}), rng())
    assert views["global"].shape == (2, 3, 4, 8, 8)
    assert views["local"].shape == (3, 3, 2, 6, 6)
    for name in ("global", "local"):
        for box, place in zip(views[name], views[f"{name}_place"], strict=True):
            middle = torch.tensor([(n - 1) / 2 for n in box.shape[1:]])
            found = 100 * (place[:, :3] @ middle + place[:, 3])  # the longest side is 100 mm
            x, y, z = box.mean((1, 2, 3))
            shown = torch.stack([z - 7, y - 20, x + 40])  # mm across, down and right
            torch.testing.assert_close(found, shown, atol=0.3, rtol=0)


def test_all_slices_of_a_box_are_changed_alike():
    changes = MRAugmentation(
        noise_probability=0,
        blur_probability=0,
        bias=1.0,
        artefact_probability=1.0,
        spike=0,
        ghosting=0,
        gibbs=1.0,
    )
    alike = torch.rand(1, 1, 120, 90, generator=rng(1)).expand(1, 20, 120, 90).contiguous()
    views = MultiBox(
        large=Boxes(count=1, size=(5, 16, 16), side_mm=(50, 50)),
        small=Boxes(count=0, size=(1, 1, 1), side_mm=(1, 1)),
        augmentation=changes,
    )(Sample(item="a", images={"image": volume(alike)}), rng())
    assert "local" not in views
    (box,) = views["global"]
    assert box.std() > 0.01
    torch.testing.assert_close(box, box[:, :1].expand_as(box), atol=1e-5, rtol=1e-5)


def test_what_cannot_be_cut_is_refused():
    boxes = Boxes(count=1, size=(2, 2, 2), side_mm=(10, 20))
    with pytest.raises(ValueError, match="need an image with a spacing"):
        boxes.once(volume(torch.zeros(1, 4, 4, 4), spacing=None), rng())
    flat = Sample(item="a", images={"image": volume(torch.zeros(1, 4, 4), spacing=None)})
    with pytest.raises(ValueError, match="item a: boxes need a volume with axes DHW, got HW"):
        MultiBox(large=boxes, small=boxes, augmentation=STILL)(flat, rng())
    with pytest.raises(ValueError, match="smallest, largest"):
        Boxes(count=1, size=(2, 2, 2), side_mm=(20, 10))
    with pytest.raises(ValueError, match="three sizes in voxels"):
        Boxes(count=1, size=(2, 2), side_mm=(10, 20))
