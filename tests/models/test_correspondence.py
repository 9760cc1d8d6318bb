"""Places that correspond: crops of one picture know which cells show the same."""

import pytest
import torch

from medssl.data.geometry import crop, resize
from medssl.data.image import Image
from medssl.data.modality import Modality
from medssl.data.views import mirror, place
from medssl.models.correspondence import by_feature, by_location, grid_positions


def coordinates(height: int, width: int) -> Image:
    """A picture of two channels that hold each pixel's own row and column."""
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    affine = torch.tensor([[1, 0, 0, 7], [0, 0, -2.0, 3], [0, 0.5, 0, 1], [0, 0, 0, 1]]).double()
    return Image(
        pixels=torch.stack([rows, columns]).float(),
        axes="HW",
        modality=Modality.MR,
        affine=affine,
        frame="patient",
        spacing=(0.5, 2.0),
    )


@pytest.mark.parametrize("flipped", [False, True])
def test_cells_know_where_in_the_picture_they_look(flipped):
    picture = coordinates(40, 30)
    view = resize(crop(picture, (8, 6), (16, 12)), (32, 24))
    view = mirror(view) if flipped else view
    found = grid_positions(place(view, picture), (32, 24), (8, 6)).view(8, 6, 2)
    cells = torch.nn.functional.adaptive_avg_pool2d(view.pixels, (8, 6))  # what they hold
    unit = max(40 * 0.5, 30 * 2.0)  # the longer side in mm
    wanted = torch.stack([cells[0] * 0.5, cells[1] * 2.0], -1) / unit
    inside = (slice(1, -1), slice(1, -1))  # resizing repeats the pixels at the border
    torch.testing.assert_close(found[inside], wanted[inside], rtol=0, atol=1e-4)


def test_the_same_places_of_two_crops_are_found_by_location_and_by_content():
    picture = coordinates(64, 64)
    left = resize(crop(picture, (0, 0), (48, 48)), (24, 24))
    right = mirror(resize(crop(picture, (16, 16), (48, 48)), (24, 24)))
    positions, features = [], []
    for view in (left, right):
        positions.append(grid_positions(place(view, picture), (24, 24), (6, 6)))
        cells = torch.nn.functional.adaptive_avg_pool2d(view.pixels, (6, 6)).flatten(1).T
        turned = cells / 64 * 3  # rows and columns as angles, so that a cosine of 1 is the place
        features.append(torch.cat([turned.sin(), turned.cos()], 1) / 2**0.5)
    cosine = features[0] @ features[1].T
    shared = 16  # cells of 8 pixels that both crops see: 4 x 4
    assert by_location(cosine, *positions, shared) > 0.999
    assert by_feature(cosine, shared) > 0.999
    assert by_location(cosine, *positions, 36) < 0.99  # the rest has no partner
    assert by_location(cosine.flip(-1), *positions, shared) < 0.9


def test_the_best_pairs_alone_count():
    cosine = torch.tensor([[0.9, 0.1], [0.2, 0.3], [-0.5, -0.7]])
    assert by_feature(cosine, 1) == pytest.approx(0.9)
    assert by_feature(cosine, 2) == pytest.approx(0.6)
    assert by_feature(cosine, 9) == pytest.approx((0.9 + 0.3 - 0.5) / 3)
    first = torch.tensor([[0.0, 0.0], [0.0, 1.0], [5.0, 5.0]])
    second = torch.tensor([[0.0, 0.9], [0.1, 0.0]])
    assert by_location(cosine, first, second, 1) in (pytest.approx(0.1), pytest.approx(0.2))
    assert by_location(cosine, first, second, 2) == pytest.approx(0.15)
