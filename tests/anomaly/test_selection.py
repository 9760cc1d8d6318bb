"""Choosing without labels: who is held out, how a detector is judged, and which one is kept."""

import weakref
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from jsonargparse import ArgumentParser
from sklearn.metrics import roc_auc_score

from anomaly.base import AnomalyMap, Detector, NormalData
from anomaly.examples import smooth_pictures, smooth_volumes
from anomaly.maps import outside_is_nan
from anomaly.selection import Chosen, Selection
from anomaly.streaming import StreamingPixelScores
from anomaly.synthetic import Defects
from medssl.data.image import PointCloud
from medssl.data.preprocess import Preprocessing
from medssl.data.sample import Sample, collate
from medssl.data.split import split_by_group
from medssl.models.folder import describe, load_model, save_model, selftest_noise
from pipelines.fit import fit


class Knowing(Detector):
    """Scores by the distance from a normal level, times `sign`."""

    def __init__(self, *, sign: float = 1.0, axes: str = "HW") -> None:
        super().__init__()
        self.sign, self.axes = sign, axes
        self.register_buffer("level_", torch.empty(0))
        self.items: list[str] = []
        self.predicted: list[str] = []

    def fit(self, normal, *, workdir=None):
        batches = list(normal.batches())
        self.items = [item for batch in batches for item in batch.items]
        self.level_ = torch.cat(
            [b.images["image"].pixels[:, 0][b.images["image"].valid] for b in batches]
        ).mean()[None]
        return self

    def predict(self, batch):
        self.check_fitted()
        self.predicted += batch.items
        image = batch.images["image"]
        maps = outside_is_nan(self.sign * (image.pixels[:, 0] - self.level_).abs(), image.valid)
        return AnomalyMap(score=maps.flatten(1).nanmean(1), maps={"image": maps})


def normals(count=12, groups=4, make=smooth_pictures):
    samples = [
        replace(sample, item=f"item{i}", group=f"patient{i % groups}")
        for i, sample in enumerate(make(count))
    ]
    return NormalData(samples, batch_size=3)


def groups_of(normal):
    return {normal[i].group for i in range(len(normal))}


@pytest.mark.parametrize("seed", range(6))
def test_no_patient_is_both_trained_on_and_chosen_with(seed: int):
    data = normals(groups=5)
    training, held_out = Selection(share=0.3).split(data, seed=seed)
    assert not groups_of(training) & groups_of(held_out)
    assert groups_of(training) | groups_of(held_out) == groups_of(data)
    assert len(training) + len(held_out) == len(data)
    assert len(held_out) < len(training)


@pytest.mark.parametrize("seed", range(4))
def test_the_three_sets_of_a_fit_share_no_patient(seed: int):
    data = normals(groups=6)
    rest, calibrating = split_by_group(data.samples, 0.3, seed)
    training, held_out = Selection(share=0.3).split(NormalData(rest), seed=seed)
    three = [groups_of(training), groups_of(held_out), {sample.group for sample in calibrating}]
    assert sum(map(len, three)) == len(set.union(*three)) == 6


def test_settings_that_mean_nothing_are_refused():
    with pytest.raises(ValueError, match="checkpoints must be at least 1, got 0"):
        Selection(checkpoints=0)
    with pytest.raises(ValueError, match="per_normal must be at least 1, got -1"):
        Selection(per_normal=-1)


def test_one_patient_cannot_be_split_and_that_is_said():
    with pytest.raises(ValueError, match="at least two patients or parts, got 12 of one"):
        Selection().split(normals(groups=1), seed=0)


@pytest.mark.parametrize("make", [smooth_pictures, smooth_volumes], ids=["HW", "DHW"])
def test_a_judgement_is_the_auroc_of_normals_against_their_copies_with_a_defect(make):
    held_out = normals(6, make=make)
    detector = Knowing(axes=held_out[0].images["image"].axes).fit(held_out)
    selection = Selection(per_normal=3)
    judged = selection.judge(detector, held_out, seed=4)

    scores, labels, values, wrong = [], [], [], []
    for i in range(6):
        generator = torch.Generator().manual_seed(4 * 1_000_003 + i)
        samples = [held_out[i]]
        for _ in range(3):
            donor = held_out[int(torch.randint(6, (1,), generator=generator))]
            samples.append(selection.defects(held_out[i], donor, generator))
        for sample in samples:
            found = detector.predict(collate([sample]))
            valid = sample.images["image"].valid
            scores.append(float(found.score))
            labels.append(sample.label)
            values.append(found.maps["image"][0][valid])
            mask = torch.zeros_like(valid) if sample.mask is None else sample.mask.pixels[0] > 0
            wrong.append(mask[valid])
    assert sum(labels) == 18
    assert judged.image_auroc == pytest.approx(roc_auc_score(labels, scores))
    assert judged.pixel_auroc == pytest.approx(roc_auc_score(torch.cat(wrong), torch.cat(values)))
    assert judged.value == (judged.image_auroc + judged.pixel_auroc) / 2


def test_equal_seeds_judge_alike_and_leave_the_held_out_items_as_they_were():
    held_out = normals()
    before = [held_out[i].images["image"].pixels.clone() for i in range(len(held_out))]
    detector = Knowing().fit(held_out)
    first, again, other = (Selection().judge(detector, held_out, seed=seed) for seed in (1, 1, 2))
    assert first == again
    assert first != other
    for i, pixels in enumerate(before):
        assert held_out[i].images["image"].pixels.equal(pixels)


def test_an_item_without_a_valid_pixel_tells_nothing():
    held_out = normals()
    detector = Knowing().fit(held_out)
    held_out[3].images["image"].valid.zero_()
    Selection().judge(detector, held_out, seed=0)
    assert set(detector.predicted) == {f"item{i}" for i in range(12) if i != 3}
    for i in range(len(held_out)):
        held_out[i].images["image"].valid.zero_()
    with pytest.raises(ValueError, match="of 12 held out, 0 have a valid pixel"):
        Selection().judge(detector, held_out, seed=0)


# a share of the way to a donor: nothing where both are plain
BETWEEN = Selection(share=0.4, defects=Defects(kinds=("interpolation",)))


def blanked(held_out, places):
    """The same items, those of these places plain."""
    samples = [held_out[i] for i in range(len(held_out))]
    for i in places:
        image = samples[i].images["image"]
        samples[i] = samples[i].with_image(replace(image, pixels=torch.zeros_like(image.pixels)))
    return NormalData(samples)


def test_an_item_that_no_defect_changes_is_left_out_of_the_judgement_and_counted():
    held_out = normals()
    detector = Knowing().fit(held_out)
    few = Selection(defects=Defects(kinds=("poisson",)))
    valid = held_out[3].images["image"].valid
    valid.zero_()[:2, :2] = True  # no pixel with four valid neighbours
    detector.predicted = []
    judged = few.judge(detector, held_out, seed=0)
    assert judged.num_skipped == 1
    assert set(detector.predicted) == {f"item{i}" for i in range(12) if i != 3}
    assert 0.5 < judged.pixel_auroc <= 1
    assert few.judge(detector, normals(), seed=0).num_skipped == 0


def test_a_plain_item_takes_another_donor_where_the_first_is_as_plain():
    held_out = blanked(normals(8), range(4))
    detector = Knowing().fit(held_out)
    judged = [BETWEEN.judge(detector, held_out, seed=seed) for seed in range(3)]
    assert [one.num_skipped for one in judged] == [0, 0, 0]
    assert {f"item{i}" for i in range(4)} <= set(detector.predicted)


def test_a_judgement_of_plain_items_alone_takes_a_kind_that_changes_them():
    plain = blanked(normals(4), range(4))
    detector = Knowing().fit(plain)
    judged = Selection(per_normal=4).judge(detector, plain, seed=0)
    assert judged.num_skipped == 0
    assert judged.image_auroc == 1.0  # the normals are exactly the level
    with pytest.raises(ValueError, match="4 have a valid pixel, and interpolation changed none"):
        BETWEEN.judge(detector, plain, seed=0)


def test_notes_say_how_many_normals_were_skipped():
    data = normals(groups=6)
    for i in range(len(data)):
        if data[i].group in ("patient1", "patient2", "patient3"):
            data[i].images["image"].valid.zero_()
    chosen = Chosen([Knowing(), Knowing(sign=-1.0)], selection=BETWEEN).fit(data)
    _, held_out = BETWEEN.split(data, seed=0)
    blank = sum(not held_out[i].images["image"].valid.any() for i in range(len(held_out)))
    assert 0 < blank < len(held_out)
    assert [one["num_skipped"] for one in chosen.notes["candidates"]] == [blank, blank]


class Counting(Knowing):
    """Whose maps are arrays that tell whether anyone still holds them."""

    def __init__(self, **settings):
        super().__init__(**settings)
        self.made, self.most = [], 0

    def predict(self, batch):
        found = super().predict(batch)
        self.made = [one for one in self.made if one() is not None]
        self.most = max(self.most, len(self.made))
        array = found.maps["image"].numpy().copy()
        self.made.append(weakref.ref(array))
        return AnomalyMap(score=found.score, maps={"image": torch.from_numpy(array)})


def test_no_map_is_held_while_others_are_made():
    held_out = normals(make=smooth_volumes)
    detector = Counting(axes="DHW").fit(held_out)
    Selection().judge(detector, held_out, seed=0)
    assert detector.most <= 1  # the last one
    assert len(detector.predicted) == 36


@pytest.mark.parametrize("make", [smooth_pictures, smooth_volumes], ids=["HW", "DHW"])
def test_more_pixels_than_are_sorted_are_counted_in_bins_from_a_file(make, monkeypatch):
    held_out = normals(6, make=make)
    held_out[2].images["image"].valid[:5] = False
    detector = Knowing(axes=held_out[0].images["image"].axes).fit(held_out)
    used = []

    class Spy(StreamingPixelScores):
        def auroc(self):
            used.append(self.counted.num_items)
            return super().auroc()

    monkeypatch.setattr("anomaly.selection.StreamingPixelScores", Spy)
    exact = Selection().judge(detector, held_out, seed=1)
    assert used == []
    monkeypatch.setattr("anomaly.selection._SORTED", 1000)
    monkeypatch.setattr("anomaly.selection._KEPT_BYTES", 1000)
    counted = Selection().judge(detector, held_out, seed=1)
    assert counted.image_auroc == exact.image_auroc
    assert used == [18]
    assert counted.pixel_auroc == pytest.approx(exact.pixel_auroc, abs=1e-3)


def test_items_without_an_image_are_refused_before_anything_is_trained():
    cloud = PointCloud(points=torch.rand(5, 3), unit="mm")
    data = NormalData([Sample(item=f"cloud{i}", points=cloud) for i in range(4)])
    with pytest.raises(ValueError, match="item cloud0 without an image; fit without a selection"):
        Selection().split(data, seed=0)


@pytest.mark.parametrize("place", [0, 1, 2])
def test_the_candidate_that_tells_defects_best_is_chosen(place: int):
    signs = [-1.0, -1.0, -1.0]
    signs[place] = 1.0
    chosen = Chosen([Knowing(sign=sign) for sign in signs]).fit(normals())
    assert chosen.notes["chosen"] == int(chosen.chosen_) == place
    batch = collate(smooth_pictures(2))
    assert chosen.predict(batch).score.equal(chosen.candidates[place].predict(batch).score)
    values = [score["pixel_auroc"] for score in chosen.notes["candidates"]]
    assert values.index(max(values)) == place
    for other in set(range(3)) - {place}:
        with pytest.raises(RuntimeError, match="is not fitted"):
            chosen.candidates[other].predict(batch)


def test_of_equals_the_first_is_chosen():
    assert Chosen([Knowing(), Knowing()]).fit(normals()).notes["chosen"] == 0


def test_candidates_see_only_training_items_and_are_judged_on_the_others():
    data = normals(groups=5)
    chosen = Chosen([Knowing(), Knowing(sign=-1.0)], seed=3).fit(data)
    training, held_out = chosen.selection.split(data, seed=3)
    of = {data[i].item: data[i].group for i in range(len(data))}
    for candidate in chosen.candidates:
        assert candidate.items == [training[i].item for i in range(len(training))]
        assert {of[item] for item in candidate.predicted} == groups_of(held_out)
    assert chosen.notes["num_train"] == len(training)
    assert chosen.notes["num_select"] == len(held_out)


def test_a_choice_takes_two_detectors_for_the_same_axes():
    with pytest.raises(ValueError, match="at least two detectors"):
        Chosen([Knowing()])
    with pytest.raises(ValueError, match=r"got 2 for \['DHW', 'HW'\]"):
        Chosen([Knowing(), Knowing(axes="DHW")])


def test_a_saved_choice_comes_back_with_its_settings_and_its_choice(tmp_path: Path):
    selection = Selection(share=0.4, defects=Defects(kinds=("scar", "blob"), size=(0.1, 0.2)))
    chosen = Chosen([Knowing(sign=-1.0), Knowing()], selection=selection, seed=2).fit(normals())
    save_model(
        tmp_path / "model",
        chosen,
        kind="detector",
        preprocessing=Preprocessing(size=(64, 48), intensity="percentile", channels=1),
        domain={},
        card="",
        noise=selftest_noise((2, 1, 64, 48)),
    )
    loaded = load_model(tmp_path / "model", trust=("tests", "test_selection")).model
    assert isinstance(loaded, Chosen)
    assert loaded.selection == selection
    assert asdict(loaded.selection) == asdict(selection)
    assert int(loaded.chosen_) == 1
    assert loaded.candidates[0].level_.numel() == 0  # stays forgotten
    batch = collate(smooth_pictures(2))
    assert loaded.predict(batch).score.equal(chosen.predict(batch).score)


def test_the_config_builds_candidates_that_differ():
    parser = ArgumentParser(exit_on_error=False)
    parser.add_function_arguments(fit, skip={"data", "out"}, as_group=False)
    config = Path(__file__).parents[2] / "configs" / "fit" / "chosen_patchcore.yaml"
    chosen = parser.instantiate(parser.parse_path(config)).detector
    assert isinstance(chosen, Chosen)
    assert chosen.selection == Selection()
    described = [describe(candidate)["init_args"] for candidate in chosen.candidates]
    assert [{**one, "layers": None, "whiten": None} for one in described[1:]] == [
        {**described[0], "layers": None, "whiten": None}
    ] * 2
    assert len({str(one) for one in described}) == 3


def test_pieces_of_an_image_without_a_group_stay_together():
    samples = [replace(sample, group=None) for sample in smooth_pictures(4)]
    pieces = NormalData([sample for sample in samples for _ in range(5)])
    sides = Selection(share=0.5).split(pieces, seed=0)
    training, held_out = ({side[i].item for i in range(len(side))} for side in sides)
    assert training
    assert held_out
    assert not training & held_out
