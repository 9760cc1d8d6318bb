"""What holds for slices and tiles alike: the detector of the pieces decides."""

import pytest
import torch

from anomaly.base import AnomalyMap, Detector, NormalData
from anomaly.examples import smooth_pictures, smooth_volumes
from anomaly.maps import outside_is_nan
from anomaly.selection import Chosen, Selection
from anomaly.slicewise import Slicewise
from anomaly.tiled import Tiled
from medssl.data.sample import collate


class Offset(Detector):
    """Scores by the distance from a normal level, times `sign`."""

    def __init__(self, *, sign: float = 1.0) -> None:
        super().__init__()
        self.sign = sign
        self.register_buffer("level_", torch.empty(0))

    def fit(self, normal, *, workdir=None):
        values = [batch.images["image"].pixels.mean() for batch in normal.batches()]
        self.level_ = torch.stack(values).mean()[None]
        self.notes = {"batches": len(values)}
        return self

    def predict(self, batch):
        self.check_fitted()
        images = batch.images["image"]
        maps = outside_is_nan(self.sign * (images.pixels[:, 0] - self.level_).abs(), images.valid)
        return AnomalyMap(score=maps.flatten(1).nanmean(1), maps={"image": maps})


class Reading(NormalData):
    """Normals that remember which of them were read, in order."""

    def __getitem__(self, index):
        self.read = [*getattr(self, "read", []), index]
        return self.samples[index]


def slices(detector):
    return Slicewise(detector), smooth_volumes(8)


def tiles(detector):
    return Tiled(detector, tile=[32, 32], overlap=8), smooth_pictures(8)


wrapped = pytest.mark.parametrize("wrap", [slices, tiles])


@wrapped
def test_a_choice_whose_loser_is_forgotten_is_fitted(wrap):
    choice = Chosen([Offset(sign=-1.0), Offset()], selection=Selection(share=0.5))
    detector, samples = wrap(choice)
    batch = collate(samples[:2])
    with pytest.raises(RuntimeError, match="Chosen is not fitted"):
        detector.predict(batch)
    detector.fit(NormalData(samples))
    winner = choice.candidates[int(choice.chosen_)]
    alone, _ = wrap(winner)
    assert detector.predict(batch).score.equal(alone.predict(batch).score)


@wrapped
@pytest.mark.parametrize("unbounded", [True, False])
def test_a_score_has_a_limit_where_that_of_a_piece_has_one(wrap, unbounded):
    inner = Offset()
    inner.unbounded = unbounded
    assert wrap(inner)[0].unbounded == unbounded


@wrapped
def test_forgetting_forgets_the_detector_of_the_pieces_and_what_it_noted(wrap):
    detector, samples = wrap(Offset())
    detector.fit(NormalData(samples))
    assert detector.notes["batches"] > 1
    detector.forget()
    assert not detector.notes
    assert not detector.detector.notes
    with pytest.raises(RuntimeError, match="Offset is not fitted"):
        detector.predict(collate(samples[:1]))


@wrapped
def test_an_image_is_read_once_for_its_places_and_once_for_all_of_its_pieces_in_order(wrap):
    detector, samples = wrap(Offset())
    normal = Reading(samples)
    detector.fit(normal)
    assert normal.read == [*range(8), *range(8)]


@wrapped
def test_a_detector_of_volumes_has_no_pieces(wrap):
    with pytest.raises(ValueError, match="needs a detector of axes HW, got DHW"):
        wrap(Slicewise(Offset()))
