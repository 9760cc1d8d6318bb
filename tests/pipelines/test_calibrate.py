"""Thresholds from new normals: what they are, what is refused, and that the detector stays."""

import json
import stat
from pathlib import Path

import numpy as np
import pytest
from mean_distance import MeanDistance
from PIL import Image as Picture

from anomaly.calibration import conformal_threshold
from medssl.data.manifest import build_manifest
from medssl.data.preprocess import Preprocessing
from medssl.data.privacy import salted
from medssl.models.folder import ModelFolderError, load_model
from pipelines import record
from pipelines.calibrate import calibrate
from pipelines.cli import main
from pipelines.fit import fit
from pipelines.leakage import LeakageError, read_history
from pipelines.scoring import read_calibration

PLAIN = Preprocessing(size=(8, 8), intensity="range", mean=(0.0,), std=(1.0,))


def greys(folder, levels, start=0):
    folder.mkdir(parents=True, exist_ok=True)
    for i, level in enumerate(levels, start):
        Picture.fromarray(np.full((20, 30), level, np.uint8)).save(folder / f"{i:03d}.png")
    return folder


@pytest.fixture
def model(tmp_path):
    """Fitted on the grey levels 101 to 108, whose mean is 104.5; not calibrated."""
    data = greys(tmp_path / "data", range(101, 109))
    fit(data, MeanDistance(), tmp_path / "model", preprocessing=PLAIN, calibration="none")
    return tmp_path / "model"


def test_the_threshold_is_the_quantile_of_the_new_scores(model, tmp_path):
    levels = [60, 70, 80, 90, 130, 140, 150, 151, 152]
    result = calibrate(str(model), greys(tmp_path / "new", levels), tmp_path / "out", rate=0.2)
    scores = [abs(level - 104.5) / 255 for level in levels]
    saved = read_calibration(tmp_path / "out")
    assert saved.scores == pytest.approx(sorted(scores), abs=1e-6)
    assert saved.map_maxima == pytest.approx(saved.scores, abs=1e-6)
    assert result["threshold"] == pytest.approx(conformal_threshold(scores, 0.2), abs=1e-6)
    assert (result["num_calibration"], result["rate"], result["calibrated"]) == (9, 0.2, True)
    assert saved.pixel_threshold(0.2) == pytest.approx(46.5 / 255, abs=1e-6)  # 2 of 10 above


def test_the_new_folder_is_the_old_one_but_for_its_calibration(model, tmp_path):
    before = {file.name: file.read_bytes() for file in model.iterdir()}
    result = calibrate(str(model), greys(tmp_path / "new", range(60, 79)), tmp_path / "out")
    after = {file.name: file.read_bytes() for file in (tmp_path / "out").iterdir()}
    assert {file.name: file.read_bytes() for file in model.iterdir()} == before
    changed = {name for name in before if before[name] != after[name]}
    assert changed == {"calibration.json", "fitted.json", "card.md"}
    assert set(after) == set(before)
    assert result["digest"] == load_model(tmp_path / "out").digest != load_model(model).digest
    old, new = before["card.md"].decode(), after["card.md"].decode()
    start, end = "## Calibration\n", "## Use and limits\n"
    assert old.partition(start)[0] == new.partition(start)[0]
    assert old.partition(end)[2] == new.partition(end)[2]
    assert result["guarantee"] in new
    assert "Not calibrated" in old
    assert "Not calibrated" not in new
    assert [line for line in new.splitlines() if line.startswith("## ")] == [
        line for line in old.splitlines() if line.startswith("## ")
    ]


def test_the_new_history_tells_what_calibrated_it_instead_of_what_did_before(model, tmp_path):
    first, second = greys(tmp_path / "a", range(40, 44)), greys(tmp_path / "b", range(60, 64))
    calibrate(str(model), first, tmp_path / "one", rate=0.2)
    calibrate(str(tmp_path / "one"), second, tmp_path / "two", rate=0.2)
    calibrate(str(tmp_path / "two"), second, tmp_path / "again", rate=0.25)  # they may once more
    items = {item.item for item in build_manifest(second).images}
    assert set(read_history(tmp_path / "two").calibration) == items
    assert read_history(tmp_path / "two").fitted == read_history(model).fitted


def test_copies_of_fitted_pictures_are_refused(model, tmp_path):
    new = greys(tmp_path / "new", [*range(60, 77), 101, 102])
    with pytest.raises(LeakageError, match="2 of 19 have the same pixels"):
        calibrate(str(model), new, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_other_pictures_of_a_fitted_part_are_refused(tmp_path):
    data, new = greys(tmp_path / "data", range(101, 109)), greys(tmp_path / "new", range(60, 79))
    rows = [f"data/{i:03d}.png,part{i}" for i in range(8)]
    rows += [f"new/{i:03d}.png,{'part' if i > 15 else 'new'}{i - 14}" for i in range(19)]
    (tmp_path / "parts.csv").write_text("\n".join(["path,part", *rows]))
    groups = "parts.csv:part"
    fit(data, MeanDistance(), tmp_path / "model", preprocessing=PLAIN, calibration="none",
        groups=groups)  # fmt: skip
    with pytest.raises(LeakageError, match="0 of 19 .* 3 are of the same patient or part"):
        calibrate(str(tmp_path / "model"), new, tmp_path / "out", groups=groups)


def test_each_site_gets_its_own_threshold_under_a_salted_name(model, tmp_path, capsys):
    levels = {"north": [60, 61, 62, 63], "south": [150, 160, 170, 180, 190], "east": [90]}
    every = [(site, level) for site, found in levels.items() for level in found]
    new = greys(tmp_path / "new", [level for _, level in every])
    rows = [f"{i:03d}.png,{site}" for i, (site, _) in enumerate(every)]
    (new / "sites.csv").write_text("\n".join(["path,scanner", *rows]))
    result = calibrate(str(model), new, tmp_path / "out", rate=0.2, by="sites.csv:scanner")
    assert result["by"] == "scanner"
    assert result["threshold"] is None
    for site, expected in (("north", 44.5), ("south", 85.5), ("east", None)):
        told = result["sites"][salted(site)]
        assert told["num_calibration"] == len(levels[site])
        found = told["threshold"]
        assert found == (None if expected is None else pytest.approx(expected / 255, abs=1e-6))
    texts = [(tmp_path / "out" / name).read_text() for name in ("card.md", "calibration.json")]
    for text in (*texts, json.dumps(result), capsys.readouterr().out):
        assert not any(site in text for site in levels)
    assert "for each scanner by itself" in texts[0]


def test_sites_that_are_all_too_small_are_refused(model, tmp_path):
    new = greys(tmp_path / "new", range(60, 66))
    rows = [f"{i:03d}.png,site{i}" for i in range(6)]
    (new / "sites.csv").write_text("\n".join(["path,site", *rows]))
    with pytest.raises(ValueError, match="none of 6 values of site"):
        calibrate(str(model), new, tmp_path / "out", rate=0.2, by="sites.csv:site")
    assert not (tmp_path / "out").exists()


def test_too_few_normals_are_refused_and_an_unreadable_one_is_named(model, tmp_path):
    new = greys(tmp_path / "new", range(60, 79))
    (new / "003.png").write_bytes(b"\x89PNG\r\n\x1a\n broken")
    with pytest.raises(ValueError, match="takes 19 held-out normal images, got 18"):
        calibrate(str(model), new, tmp_path / "out")
    result = calibrate(str(model), new, tmp_path / "out", rate=0.1)
    [broken] = [item.item for item in build_manifest(new).images if "003" in item.path]
    assert (result["num_calibration"], result["failed"]) == (18, 1)
    assert result["errors"][0]["item"] == broken


def test_only_a_detector_can_be_calibrated_and_out_must_be_free(model, tmp_path):
    new = greys(tmp_path / "new", range(60, 79))
    with pytest.raises(FileExistsError):
        calibrate(str(model), new, model)
    description = (model / "model.yaml").read_text().replace("kind: detector", "kind: probe")
    (model / "model.yaml").write_text(description)
    with pytest.raises(ModelFolderError, match="expected a detector"):
        calibrate(str(model), new, tmp_path / "out")


def test_a_registered_model_is_calibrated_by_command_and_registered_anew(model, tmp_path):
    with record.recorded("fit", {}) as run:
        record.register(model, "greys to calibrate", run)
    new = greys(tmp_path / "new", range(60, 64))
    arguments = ["calibrate", "--model", "models:/greys to calibrate@champion", "--data", str(new)]
    more = ["--out", str(tmp_path / "out"), "--rate", "0.2", "--register", "greys to calibrate"]
    assert main([*arguments, *more]) == 0
    newest, oldest = record.registered("greys to calibrate")
    assert newest["digest"] == load_model(tmp_path / "out").digest
    assert oldest["digest"] == load_model(model).digest
    assert (newest["version"], oldest["aliases"]) == (2, ["champion"])


def test_a_copy_of_a_calibration_picture_counts_once_and_is_named(model, tmp_path, capsys):
    new = greys(tmp_path / "new", [60, 61, 61, 62, 63])
    with pytest.raises(ValueError, match="takes 19 held-out normal images, got 4"):
        calibrate(str(model), greys(tmp_path / "twice", [60, 61, 62, 63] * 5), tmp_path / "out")
    result = calibrate(str(model), new, tmp_path / "out", rate=0.2)
    assert result["num_calibration"] == 4
    by_name = {Path(item.path).name: item.item for item in build_manifest(new).images}
    [copy] = result["errors"]
    assert copy["item"] == by_name["002.png"]
    assert by_name["001.png"] in copy["reason"]
    assert result["failed"] == 1


def test_normals_without_a_site_are_counted_aloud(model, tmp_path, capsys):
    new = greys(tmp_path / "new", range(60, 67))
    rows = [f"{i:03d}.png,north" for i in range(4)]
    (new / "sites.csv").write_text("\n".join(["path,scanner", *rows]))
    calibrate(str(model), new, tmp_path / "out", rate=0.2, by="sites.csv:scanner")
    assert "3 of 7 calibration normals have no scanner in the table" in capsys.readouterr().out


def test_what_comes_of_a_model_that_is_read_only_can_be_changed(model, tmp_path):
    for file in model.iterdir():
        file.chmod(0o444)
    model.chmod(0o555)
    out = tmp_path / "out"
    calibrate(str(model), greys(tmp_path / "new", range(60, 64)), out, rate=0.2)
    model.chmod(0o755)  # so that it can be removed
    modes = [place.stat().st_mode for place in (out, *out.iterdir())]
    assert all(mode & stat.S_IWUSR for mode in modes)
    assert not list(tmp_path.glob(".out*"))
