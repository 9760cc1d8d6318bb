from itertools import pairwise
from pathlib import Path
from typing import Self

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from anomaly.base import AnomalyMap, Detector, NormalData
from anomaly.examples import smooth_pictures, smooth_volumes
from anomaly.maps import outside_is_nan
from anomaly.slicewise import Slicewise
from anomaly.tiled import Tiled
from medssl.data.image import Image
from medssl.data.modality import Modality
from medssl.data.sample import Batch, Sample, collate


class Squares(Detector):
    """A map of squared pixels, whose largest value is the score; it remembers what it was given."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("fitted_", torch.empty(0))
        self.learnt: list[Sample] = []
        self.largest_batch = 0

    def fit(self, normal: NormalData, *, workdir: Path | None = None) -> Self:
        self.learnt = [normal[i] for i in range(len(normal))]
        self.fitted_ = torch.ones(1)
        return self

    def predict(self, batch: Batch) -> AnomalyMap:
        self.largest_batch = max(self.largest_batch, len(batch))
        images = batch.images["image"]
        maps = outside_is_nan(self.values(images.pixels), images.valid)
        return AnomalyMap(score=maps.flatten(1).nan_to_num(0).amax(1), maps={"image": maps})

    def values(self, pixels: Tensor) -> Tensor:
        return pixels[:, 0].square()


class Seeing(Squares):
    """A map of means over 9 x 9 pixels, which sees zeros beyond the borders of what it is given."""

    def values(self, pixels: Tensor) -> Tensor:
        return F.avg_pool2d(pixels, 9, stride=1, padding=4)[:, 0]


def picture(height: int, width: int, item: str = "a", seed: int = 0) -> Sample:
    pixels = torch.randn(1, height, width, generator=torch.Generator().manual_seed(seed))
    affine = torch.tensor([[0, 0, 0.5, 7], [0, 0.5, 0, 9], [1, 0, 0, 3], [0, 0, 0, 1]]).double()
    image = Image(pixels=pixels, axes="HW", modality=Modality.UNKNOWN, affine=affine, frame="pixel")
    return Sample(item=item, images={"image": image}, label=0, group="patient")


def test_a_local_detectors_map_is_that_of_the_whole_picture():
    batch = collate([picture(70, 53), picture(41, 64, "b", seed=1)])
    tiled = Tiled(Squares(), tile=[32, 24], overlap=9).fit(NormalData([picture(70, 53)]))
    whole = Squares().predict(batch)
    found = tiled.predict(batch)
    torch.testing.assert_close(
        found.maps["image"], whole.maps["image"], rtol=1e-5, atol=1e-5, equal_nan=True
    )
    torch.testing.assert_close(found.score, whole.score)


def test_there_is_no_seam_where_tiles_end():
    sample = picture(96, 96)
    sample.images["image"].pixels.fill_(1.0)  # a detector that sees all of it says 1 everywhere
    tiled = Tiled(Seeing(), tile=[32, 32], overlap=16).fit(NormalData([sample]))
    values = tiled.predict(collate([sample])).maps["image"][0]
    steps = values[16:-16, 16:-16].diff(dim=1).abs()  # inside, away from the picture's own borders
    starts = {column for (_, column), _ in tiled.places((96, 96))}
    ends = {start + length - 17 for start in starts for length in (0, 32)}
    columns = range(steps.shape[1])
    at_ends = steps[:, [column for column in columns if column in ends]]
    inside = steps[:, [column for column in columns if column not in ends]]
    assert at_ends.numel() > 0
    assert at_ends.max() <= inside.max()
    assert inside.max() < 0.05  # one tile beside another would jump by 5/9


def test_every_pixel_is_in_a_tile_and_neighbours_share_at_least_the_overlap():
    for size in ((100, 77), (64, 64), (65, 200), (20, 90)):
        tiled = Tiled(Squares(), tile=[64, 48], overlap=13)
        places = tiled.places(size)
        seen = torch.zeros(size, dtype=torch.int64)
        for (row, column), (height, width) in places:
            assert (height, width) == (min(64, size[0]), min(48, size[1]))
            assert row + height <= size[0]
            assert column + width <= size[1]
            seen[row : row + height, column : column + width] += 1
        assert (seen > 0).all()
        for axis, side in ((0, 64), (1, 48)):
            starts = sorted({place[0][axis] for place in places})
            assert all(b - a <= side - 13 for a, b in pairwise(starts))


def test_a_tile_keeps_its_place_in_the_world_and_whose_it_is():
    detector = Squares()
    sample = picture(60, 40)
    Tiled(detector, tile=[32, 32], overlap=4).fit(NormalData([sample]))
    source = sample.images["image"]
    assert len(detector.learnt) > 2
    for tile in detector.learnt:
        image = tile.images["image"]
        assert (tile.item, tile.group) == ("a", "patient")
        place = image.affine @ torch.tensor([0, 5, 3, 1]).double()
        row, column = torch.linalg.solve(source.affine, place)[1:3].round().long()
        assert image.pixels[0, 5, 3] == source.pixels[0, row, column]


def test_tiles_without_a_valid_pixel_are_neither_fitted_nor_scored():
    sample = picture(64, 32)
    valid = torch.zeros(64, 32, dtype=torch.bool)
    valid[:20] = True
    image = sample.images["image"]
    sample = sample.with_image(
        Image(
            pixels=image.pixels,
            axes="HW",
            modality=image.modality,
            affine=image.affine,
            frame="pixel",
            valid=valid,
        )
    )
    sample.images["image"].pixels[:, 20:] = torch.nan
    detector = Squares()
    tiled = Tiled(detector, tile=[32, 32], overlap=0).fit(NormalData([sample]))
    assert len(detector.learnt) == 1
    found = tiled.predict(collate([sample]))
    assert found.maps["image"][0].isnan().equal(~valid)
    assert found.score.item() == found.maps["image"].nan_to_num(0).max()
    valid[:] = False
    assert tiled.predict(collate([sample])).score.isnan().all()
    with pytest.raises(ValueError, match="none of the 1 normal items"):
        tiled.fit(NormalData([sample]))


def test_the_score_is_the_mean_of_the_largest_scores_of_tiles():
    sample = picture(32, 96)
    sample.images["image"].pixels.zero_()
    for column, value in ((5, 2.0), (40, 3.0), (80, 1.0)):
        sample.images["image"].pixels[0, 8, column] = value
    for num_top, expected in ((1, 9.0), (2, 6.5), (3, 14 / 3), (9, 14 / 3)):
        tiled = Tiled(Squares(), tile=[32, 32], overlap=0, num_top=num_top)
        found = tiled.fit(NormalData([sample])).predict(collate([sample]))
        assert found.score.item() == pytest.approx(expected)


def test_a_large_picture_is_seen_a_few_tiles_at_a_time():
    sample = picture(256, 256)
    tiled = Tiled(Squares(), tile=[32, 32], overlap=8).fit(NormalData([sample]))
    tiled.predict(collate([sample]))
    assert tiled.detector.largest_batch <= 8 < len(tiled.places((256, 256)))


def test_volumes_are_refused():
    with pytest.raises(ValueError, match="axes HW, got DHW"):
        Tiled(Slicewise(Squares()), tile=[32, 32])
    tiled = Tiled(Squares(), tile=[32, 32], overlap=8)
    with pytest.raises(ValueError, match="axes HW, got DHW"):
        tiled.fit(NormalData(smooth_volumes(2)))
    tiled.fit(NormalData(smooth_pictures(2)))
    with pytest.raises(ValueError, match="axes HW, got DHW"):
        tiled.predict(collate(smooth_volumes(1)))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"tile": [32]}, "tile"),
        ({"tile": [32, 16], "overlap": 16}, "overlap"),
        ({"tile": [32, 32], "overlap": -1}, "overlap"),
        ({"tile": [32, 32], "overlap": 0, "num_top": 0}, "num_top"),
    ],
)
def test_arguments_that_mean_nothing_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        Tiled(Squares(), **arguments)
