from dataclasses import replace

import pytest
import torch
from torch import Tensor

from anomaly.base import AnomalyMap, Detector, NormalData
from anomaly.slicewise import Slicewise
from medssl.data.image import Image
from medssl.data.modality import Modality
from medssl.data.sample import Batch, Sample, collate


class Brightness(Detector):
    """The map is the picture, the score its largest valid pixel; remembers what it was given."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("level_", torch.empty(0))
        self.fitted: list[Sample] = []
        self.largest_batch = 0

    def fit(self, normal: NormalData, *, workdir=None):
        self.fitted = [normal[i] for i in range(len(normal))]
        self.level_ = torch.zeros(1)
        return self

    def predict(self, batch: Batch) -> AnomalyMap:
        images = batch.images["image"]
        self.largest_batch = max(self.largest_batch, len(batch))
        maps = images.pixels[:, 0].where(images.valid, torch.nan)
        return AnomalyMap(score=maps.nan_to_num(-1e9).amax((1, 2)), maps={"image": maps})


def volume(pixels: Tensor, *, valid: Tensor | None = None, item: str = "v") -> Sample:
    affine = torch.tensor(
        [[0, 0, -0.5, 7], [0, -0.5, 0, 8], [3.0, 0, 0, 9], [0, 0, 0, 1]], dtype=torch.float64
    )
    image = Image(
        pixels=pixels[None],
        axes="DHW",
        modality=Modality.CT,
        affine=affine,
        frame="patient",
        spacing=(3.0, 0.5, 0.5),
        valid=valid,
    )
    return Sample(item=item, images={"image": image})


def test_a_volume_scores_its_largest_slice_or_the_mean_of_the_top_ones():
    pixels = torch.zeros(5, 4, 6)
    pixels[:, 1, 2] = torch.tensor([1.0, 9, 3, 6, 0])
    normal = NormalData([volume(pixels)])
    batch = next(normal.batches())
    assert Slicewise(Brightness()).fit(normal).predict(batch).score.tolist() == [9.0]
    top = Slicewise(Brightness(), aggregation="top_mean", num_top=3).fit(normal)
    assert top.predict(batch).score.tolist() == [6.0]


def test_fewer_slices_than_the_top_are_all_taken():
    normal = NormalData([volume(torch.tensor([2.0, 4.0])[:, None, None].expand(2, 3, 3))])
    top = Slicewise(Brightness(), aggregation="top_mean", num_top=9).fit(normal)
    assert top.predict(next(normal.batches())).score.tolist() == [3.0]


def test_a_share_of_a_volumes_own_level_is_taken_off_its_map_and_score():
    generator = torch.Generator().manual_seed(0)
    volumes = [
        volume(level + torch.rand(d, 5, 6, generator=generator)) for level, d in [(0, 4), (7, 2)]
    ]
    plain = Slicewise(Brightness(), num_top=2, aggregation="top_mean").fit(NormalData(volumes))
    half = Slicewise(Brightness(), num_top=2, aggregation="top_mean", relative=0.5)
    batch = collate(volumes)
    before, after = plain.predict(batch), half.fit(NormalData(volumes)).predict(batch)
    for i, sample in enumerate(volumes):
        pixels = sample.images["image"].pixels[0]
        level = 0.5 * pixels.mean()
        torch.testing.assert_close(after.maps["image"][i, : len(pixels)], pixels - level)
        torch.testing.assert_close(after.score[i], before.score[i] - level)
    with pytest.raises(ValueError, match="relative must lie"):
        Slicewise(Brightness(), relative=1.5)


def test_the_map_lies_slice_by_slice_on_the_volume():
    generator = torch.Generator().manual_seed(0)
    volumes = [
        volume(torch.randn(d, h, w, generator=generator)) for d, h, w in [(40, 5, 6), (3, 4, 8)]
    ]
    detector = Slicewise(Brightness()).fit(NormalData(volumes))

    found = detector.predict(collate(volumes)).maps["image"]

    assert found.shape == (2, 40, 5, 8)
    for values, sample in zip(found, volumes, strict=True):
        pixels = sample.images["image"].pixels[0]
        inside = tuple(slice(n) for n in pixels.shape)
        assert values[inside].equal(pixels)
        assert int(values.isnan().sum()) == values.numel() - pixels.numel()


def test_scoring_takes_a_bounded_number_of_slices_at_a_time():
    inner = Brightness()
    sample = volume(torch.rand(70, 4, 4))
    Slicewise(inner).fit(NormalData([sample])).predict(collate([sample]))
    assert inner.largest_batch == 16


def test_slices_without_a_valid_pixel_are_skipped_and_constant_ones_are_not():
    pixels = torch.zeros(4, 3, 3)
    pixels[2] = 50.0
    valid = torch.ones(4, 3, 3, dtype=torch.bool)
    valid[2] = False
    sample, inner = volume(pixels, valid=valid), Brightness()

    found = Slicewise(inner).fit(NormalData([sample])).predict(collate([sample]))

    assert len(inner.fitted) == 3
    assert found.score.tolist() == [0.0]
    assert found.maps["image"].isnan().all((2, 3)).tolist() == [[False, False, True, False]]


def test_a_volume_without_a_valid_pixel_scores_nan_and_cannot_be_fitted():
    sample = volume(torch.zeros(2, 3, 3), valid=torch.zeros(2, 3, 3, dtype=torch.bool))
    with pytest.raises(ValueError, match="none of the 1 normal volumes"):
        Slicewise(Brightness()).fit(NormalData([sample]))
    detector = Slicewise(Brightness()).fit(NormalData([volume(torch.zeros(2, 3, 3))]))
    assert detector.predict(collate([sample])).score.isnan().all()


def test_a_fitted_slice_knows_its_place_in_the_patient():
    pixels, inner = torch.rand(5, 4, 6), Brightness()
    Slicewise(inner).fit(NormalData([volume(pixels, item="a"), volume(pixels + 1, item="b")]))

    assert [sample.item for sample in inner.fitted] == ["a"] * 5 + ["b"] * 5
    image = inner.fitted[3].images["image"]
    whole = volume(pixels).images["image"]
    inside = torch.tensor([0.0, 1, 2, 1], dtype=torch.float64)
    assert image.pixels.equal(pixels[None, 3])
    assert (image.axes, image.spacing) == ("HW", (0.5, 0.5))
    assert (image.affine @ inside).equal(whole.affine @ (inside + torch.tensor([3.0, 0, 0, 0])))


def test_pictures_and_detectors_of_volumes_are_refused():
    sample = volume(torch.rand(2, 3, 3))
    image = sample.images["image"]
    flat = replace(image, pixels=image.pixels[:, 0], axes="HW", spacing=(0.5, 0.5))
    with pytest.raises(ValueError, match="axes DHW, got HW"):
        Slicewise(Brightness()).fit(NormalData([sample.with_image(flat)]))
    with pytest.raises(ValueError, match="axes HW, got DHW"):
        Slicewise(Slicewise(Brightness()))
    with pytest.raises(ValueError, match="'median'"):
        Slicewise(Brightness(), aggregation="median")
