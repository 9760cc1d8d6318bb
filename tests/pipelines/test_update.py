"""Normals in and out of a fitted detector, against fitting anew on the same ones."""

import json

import grey_bank
import numpy as np
import pytest
import torch
from grey_bank import GreyBank
from mean_distance import MeanDistance
from PIL import Image as Picture

from anomaly.features.patchcore import PatchCore
from medssl.data.manifest import build_manifest
from medssl.data.preprocess import Preprocessing
from medssl.models.folder import load_model
from medssl.models.timm_encoder import TimmEncoder
from pipelines.cli import main
from pipelines.fit import fit
from pipelines.leakage import LeakageError, read_history
from pipelines.scoring import read_calibration
from pipelines.update import update

PLAIN = Preprocessing(size=(8, 8), intensity="range", mean=(0.0,), std=(1.0,))
assert grey_bank


def greys(folder, levels, start=0):
    folder.mkdir(parents=True, exist_ok=True)
    for i, level in enumerate(levels, start):
        Picture.fromarray(np.full((20, 30), level, np.uint8)).save(folder / f"{i:03d}.png")
    return folder


@pytest.fixture
def held_out(tmp_path):
    return greys(tmp_path / "held_out", range(10, 14))


@pytest.fixture
def model(tmp_path, held_out):
    """Fitted on the grey levels 100, 104, ... 120; calibrated with 10 to 13 for a rate of 0.2."""
    data = greys(tmp_path / "data", range(100, 124, 4))
    fit(data, GreyBank(), tmp_path / "model", preprocessing=PLAIN, calibration=held_out, rate=0.2)
    return tmp_path / "model"


def levels(folder):
    bank = load_model(folder, kind="detector").model
    return sorted(round(level * 255) for level in bank.levels_.tolist())


def test_added_normals_are_as_if_fitted_from_the_start(model, tmp_path, held_out):
    more = greys(tmp_path / "more", [20, 30])  # files named as two of the fitted ones
    result = update(str(model), tmp_path / "out", held_out, add=more)
    assert levels(tmp_path / "out") == [20, 30, *range(100, 124, 4)]
    assert (result["num_added"], result["num_removed"], result["num_fitted"]) == (2, 0, 8)
    greys(tmp_path / "data", [20, 30], start=50)
    fit(
        tmp_path / "data",
        GreyBank(),
        tmp_path / "anew",
        preprocessing=PLAIN,
        calibration=held_out,
        rate=0.2,
    )
    updated, anew = (read_calibration(tmp_path / name) for name in ("out", "anew"))
    assert updated.scores == anew.scores == pytest.approx([k / 255 for k in (7, 8, 9, 10)])
    assert updated.fitted_on == anew.fitted_on
    assert result["threshold"] == anew.threshold
    assert read_calibration(model).scores[0] > 80 / 255  # the old ones are of no use now


def test_removed_pictures_are_found_by_their_pixels_under_any_name(model, tmp_path, held_out):
    renamed = greys(tmp_path / "gone", [104, 120], start=700)
    result = update(str(model), tmp_path / "out", held_out, remove=renamed)
    assert levels(tmp_path / "out") == [100, 108, 112, 116]
    assert (result["num_removed"], result["failed"]) == (2, 0)
    before, after = read_history(model), read_history(tmp_path / "out")
    assert set(after.fitted) < set(before.fitted)
    assert len(after.fitted) == len(read_calibration(tmp_path / "out").fitted_on) == 4
    again = update(str(tmp_path / "out"), tmp_path / "back", held_out, add=renamed)
    assert again["num_fitted"] == 6  # forgotten, so they may come back
    assert levels(tmp_path / "back") == levels(model)


def test_a_file_of_the_same_name_and_other_pixels_is_not_removed(model, tmp_path, held_out):
    namesakes = greys(tmp_path / "gone", [100, 55])  # 001.png was 104
    result = update(str(model), tmp_path / "out", held_out, remove=namesakes)
    assert levels(tmp_path / "out") == list(range(104, 124, 4))
    [other] = [item.item for item in build_manifest(namesakes).images if "001" in item.path]
    assert result["errors"] == [
        {"item": other, "reason": "the detector was not fitted on these pixels"}
    ]
    assert result["failed"] == 1


def test_a_calibrating_picture_needs_no_removal_and_nothing_to_remove_is_an_error(
    model, tmp_path, held_out
):
    with pytest.raises(ValueError, match="of 4 pictures to remove, 0 are among the 6"):
        update(str(model), tmp_path / "out", held_out, remove=held_out)
    with pytest.raises(ValueError, match="leave at least one"):
        update(str(model), tmp_path / "out", held_out, remove=tmp_path / "data")
    both = greys(tmp_path / "both", [100, 10])
    assert update(str(model), tmp_path / "out", "none", remove=both)["failed"] == 0


@pytest.mark.parametrize(("level", "what"), [(108, "fitted on"), (12, "calibrated with")])
def test_copies_of_known_pictures_are_not_added(model, tmp_path, held_out, level, what):
    more = greys(tmp_path / "more", [20, level])
    with pytest.raises(LeakageError, match="1 of 2 normals to add .* fitted on or calibrated with"):
        update(str(model), tmp_path / "out", held_out, add=more)
    assert not (tmp_path / "out").exists()


def test_what_was_just_added_does_not_calibrate(model, tmp_path):
    more = greys(tmp_path / "more", [20, 30, 40, 50])
    with pytest.raises(LeakageError, match="calibration normals .* 4 of 4 have the same pixels"):
        update(str(model), tmp_path / "out", more, add=more)


def test_the_parts_of_what_was_added_are_remembered_and_of_what_was_removed_forgotten(
    model, tmp_path, held_out
):
    more = greys(tmp_path / "more", [20, 30])
    rows = [*(f"more/{i:03d}.png,new{i}" for i in range(2)),
            *(f"held_out/{i:03d}.png,held{i}" for i in range(4))]  # fmt: skip
    (tmp_path / "parts.csv").write_text("\n".join(["path,part", *rows]))
    groups = "parts.csv:part"
    update(str(model), tmp_path / "out", held_out, add=more, groups=groups)
    parts = {item.group for item in build_manifest(more, groups=groups).images}
    found = {trace.group for trace in read_history(tmp_path / "out").fitted.values()} - {None}
    assert found == parts
    update(str(tmp_path / "out"), tmp_path / "less", held_out, remove=more / "000.png")
    left = {trace.group for trace in read_history(tmp_path / "less").fitted.values()} - {None}
    assert len(left) == 1
    assert left < parts


def test_without_calibration_the_old_thresholds_are_gone_and_that_is_said(model, tmp_path, capsys):
    more = greys(tmp_path / "more", [20])
    result = update(str(model), tmp_path / "out", "none", add=more)
    assert (result["calibrated"], result["threshold"], result["rate"]) == (False, None, 0.2)
    assert read_calibration(tmp_path / "out").scores == ()
    assert read_history(tmp_path / "out").calibration == {}
    assert "the old thresholds do not hold" in capsys.readouterr().out
    card = (tmp_path / "out" / "card.md").read_text()
    assert "7 normal items of 7 patients or parts, after an update: 1 added, 0 removed" in card


def test_a_normal_outside_the_domain_is_left_out_and_named(model, tmp_path, held_out):
    more = greys(tmp_path / "more", [20])
    Picture.fromarray(np.full((200, 300), 30, np.uint8)).save(more / "large.png")
    result = update(str(model), tmp_path / "out", held_out, add=more)
    [large] = [item.item for item in build_manifest(more).images if "large" in item.path]
    assert (result["num_added"], result["failed"]) == (1, 1)
    assert result["errors"][0]["item"] == large
    (more / "000.png").unlink()
    with pytest.raises(ValueError, match="none of the 1 normal images to add can be used"):
        update(str(model), tmp_path / "b", held_out, add=more)


def test_the_updated_folder_loads_with_its_selftest_and_the_old_one_stays(
    model, tmp_path, held_out
):
    before = {file.name: file.read_bytes() for file in model.iterdir()}
    update(str(model), tmp_path / "out", held_out, add=greys(tmp_path / "more", [20]))
    assert {file.name: file.read_bytes() for file in model.iterdir()} == before
    old, new = load_model(model), load_model(tmp_path / "out")
    assert new.domain == old.domain
    assert new.preprocessing == old.preprocessing
    assert not torch.equal(old.model.levels_, new.model.levels_)


def test_a_detector_without_the_methods_is_refused(tmp_path, held_out):
    data = greys(tmp_path / "data", range(100, 111))
    fit(data, MeanDistance(), tmp_path / "model", preprocessing=PLAIN, calibration="none")
    with pytest.raises(
        ValueError, match="MeanDistance learns from all normals at once .*PatchCore"
    ):
        update(str(tmp_path / "model"), tmp_path / "out", held_out, add=held_out)


def test_nothing_to_do_and_a_folder_that_tells_nothing_are_refused(model, tmp_path, held_out):
    with pytest.raises(ValueError, match="nothing to do"):
        update(str(model), tmp_path / "out", held_out)
    (model / "fitted.json").unlink()
    with pytest.raises(ValueError, match="does not tell which images it was fitted on"):
        update(str(model), tmp_path / "out", held_out, remove=tmp_path / "data")


def test_the_command_line_demands_a_calibration(model, tmp_path, held_out, capsys):
    more = greys(tmp_path / "more", [20])
    arguments = ["update", str(model), "--add", str(more), "--out", str(tmp_path / "out")]
    assert main(arguments) == 2
    assert "calibration" in capsys.readouterr().err
    assert main([*arguments, "--calibration", str(held_out), "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert (result["num_added"], result["num_calibration"]) == (1, 4)


def test_patchcore_takes_a_picture_in_and_forgets_it_again(tmp_path):
    rng = np.random.default_rng(0)
    for folder, count in (("data", 6), ("more", 1), ("held_out", 4)):
        (tmp_path / folder).mkdir()
        for i, pixels in enumerate(rng.integers(0, 255, (count, 32, 32), np.uint8)):
            Picture.fromarray(pixels).save(tmp_path / folder / f"{i:03d}.png")
    held_out, more = tmp_path / "held_out", tmp_path / "more"
    fit(
        tmp_path / "data",
        PatchCore(TimmEncoder("test_resnet", in_channels=1), layers=["layer1"]),
        tmp_path / "model",
        preprocessing=Preprocessing(size=(32, 32), intensity="range"),
        calibration=held_out,
        rate=0.2,
    )
    update(str(tmp_path / "model"), tmp_path / "out", held_out, add=more)
    update(str(tmp_path / "out"), tmp_path / "back", held_out, remove=more)
    first, grown, back = (load_model(tmp_path / name).model for name in ("model", "out", "back"))
    assert len(grown.bank_) > len(first.bank_)
    torch.testing.assert_close(back.bank_, first.bank_, rtol=0, atol=0)
    assert set(read_history(tmp_path / "out").fitted) == set(grown.items)
    assert read_calibration(tmp_path / "back").scores == pytest.approx(
        read_calibration(tmp_path / "model").scores
    )


def test_a_rate_of_zero_is_not_taken_for_the_old_one(model, tmp_path, held_out):
    more = greys(tmp_path / "more", [20])
    with pytest.raises(ValueError, match="between 0 and 1, got 0"):
        update(str(model), tmp_path / "out", held_out, add=more, rate=0.0)
    assert not (tmp_path / "out").exists()


def test_a_selection_of_what_is_added_does_not_choose_what_is_removed(model, tmp_path, held_out):
    with pytest.raises(ValueError, match="--select chooses among what is added"):
        update(str(model), tmp_path / "out", held_out, remove=held_out, select="label == 0")
