"""Fits with checkpoints: stopped, killed, started by torchrun, and what a fit says it chose."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import yaml
from learned_level import LearnedLevel, Level
from PIL import Image as Picture

from anomaly.selection import Selection
from medssl.data.manifest import build_manifest, load_sample
from medssl.data.preprocess import Preprocessing
from medssl.training import TrainingPlan
from pipelines.cli import main
from pipelines.fit import fit

PLAIN = Preprocessing(size=(16, 16), intensity="range", mean=(0.0,), std=(1.0,))
STEPS = 6
JOB = "import sys; from pipelines.cli import main; sys.exit(main())"


@pytest.fixture(autouse=True)
def _from_the_start(monkeypatch):
    monkeypatch.setattr(Level, "losses", 0)
    monkeypatch.setattr(Level, "stop_at", None)


@pytest.fixture
def data(tmp_path) -> Path:
    """20 pictures of noise around 20 levels."""
    folder = tmp_path / "data"
    folder.mkdir()
    noise = np.random.default_rng(0).integers(0, 40, (20, 16, 16))
    for number, values in enumerate(noise):
        Picture.fromarray((values + 80 + number).astype(np.uint8)).save(folder / f"{number}.png")
    return folder


def run(data, out, detector=None, **options):
    given = {"preprocessing": PLAIN, "rate": 0.2, "device": "cpu", "workers": 0, "seed": 1}
    return fit(data, detector or LearnedLevel(), out, **{**given, **options})


def files(out):
    return [(out / name).read_bytes() for name in ("weights.safetensors", "calibration.json")]


@pytest.mark.parametrize("stop_at", [STEPS + 3, 5 * STEPS + 2], ids=["second fold", "final fit"])
def test_a_stopped_fit_goes_on_to_the_result_of_an_undisturbed_one(
    data, tmp_path, capsys, monkeypatch, stop_at
):
    run(data, tmp_path / "whole", calibration="cross")
    out, work = tmp_path / "out", tmp_path / "out.work"
    monkeypatch.setattr(Level, "losses", 0)
    monkeypatch.setattr(Level, "stop_at", stop_at)
    stopped = run(data, out, calibration="cross")
    assert (stopped["finished"], stopped["failed"], stopped["model"]) == (False, 1, None)
    assert "stopped as asked, and saved; --resume goes on from here" in capsys.readouterr().out
    assert not out.exists()
    with pytest.raises(ValueError, match="holds an unfinished run; go on with --resume"):
        run(data, out, calibration="cross")
    result = run(data, out, calibration="cross", resume=True)
    assert result["finished"]
    assert Level.losses == 6 * STEPS  # none of them twice
    assert files(out) == files(tmp_path / "whole")
    assert not work.exists()


def test_a_finished_fit_is_left_alone(data, tmp_path, capsys):
    run(data, tmp_path / "out")
    before = {file.name: file.stat().st_mtime_ns for file in (tmp_path / "out").iterdir()}
    result = run(data, tmp_path / "out", resume=True)
    assert (result["finished"], result["failed"]) == (True, 0)
    assert "nothing to do" in capsys.readouterr().out
    assert {f.name: f.stat().st_mtime_ns for f in (tmp_path / "out").iterdir()} == before


@pytest.mark.parametrize("change", ["a picture", "the preprocessing", "the detector"])
def test_a_stopped_fit_does_not_go_on_with_something_else(data, tmp_path, monkeypatch, change):
    monkeypatch.setattr(Level, "stop_at", 3)
    run(data, tmp_path / "out", calibration="none")
    options = {}
    if change == "a picture":
        Picture.fromarray(np.full((16, 16), 9, np.uint8)).save(data / "3.png")
    elif change == "the preprocessing":
        options["preprocessing"] = Preprocessing(size=(16, 16), intensity="range")
    else:
        plan = TrainingPlan(total_samples=24, batch_size=4, learning_rate=0.04)
        options["detector"] = LearnedLevel(plan=plan)
    with pytest.raises(ValueError, match="holds work with another"):
        run(data, tmp_path / "out", calibration="none", resume=True, **options)


def test_what_was_held_out_to_choose_with_counts_as_seen(data, tmp_path):
    detector = LearnedLevel(selection=Selection(share=0.3, checkpoints=2))
    result = run(data, tmp_path / "out", detector)
    notes = result["notes"]
    fitted, held_out = result["num_fitted"], result["num_calibration"]
    assert notes["num_train"] + notes["num_select"] == fitted
    assert notes["num_select"] >= 2
    assert fitted + held_out == 20
    manifest = build_manifest(data)
    hashes = {
        item.item: load_sample(manifest, item, hashes=True).images["image"].provenance
        for item in manifest.images
    }
    known = json.loads((tmp_path / "out" / "fitted.json").read_text())
    calibration = json.loads((tmp_path / "out" / "calibration.json").read_text())
    assert len(known["fitted"]) == len(calibration["fitted_on"]) == fitted
    assert not set(known["fitted"]) & set(known["calibration"])
    for name, trace in {**known["fitted"], **known["calibration"]}.items():
        assert trace["pixel_sha256"] == hashes[name]["pixel_sha256"]
    assert {trace["pixel_sha256"] for trace in known["fitted"].values()} == set(
        calibration["fitted_on"]
    )


def test_the_choice_stands_in_the_result_the_card_and_the_record(data, tmp_path, monkeypatch):
    from pipelines.record import Run

    logged = {}
    monkeypatch.setattr(
        Run, "metrics", lambda self, values, prefix="": logged.update({prefix: dict(values)})
    )
    detector = LearnedLevel(selection=Selection(checkpoints=2))
    result = run(data, tmp_path / "out", detector, calibration="none")
    chosen, last = result["notes"]["chosen"], result["notes"]["last"]
    assert set(chosen) == set(last) == {"image_auroc", "pixel_auroc", "num_skipped"}
    card = (tmp_path / "out" / "card.md").read_text()
    assert "## Chosen in the fit, without labels" in card
    assert f"- chosen.image_auroc: {chosen['image_auroc']:.4g}" in card
    assert f"- last.pixel_auroc: {last['pixel_auroc']:.4g}" in card
    assert logged["notes."]["last.image_auroc"] == last["image_auroc"]
    assert all(isinstance(value, int | float) for value in logged["notes."].values())
    run(data, tmp_path / "none", calibration="none")
    assert "Chosen" not in (tmp_path / "none" / "card.md").read_text()


def test_workers_make_the_views_and_change_nothing(data, tmp_path):
    run(data, tmp_path / "here")
    run(data, tmp_path / "elsewhere", workers=2)
    assert files(tmp_path / "here") == files(tmp_path / "elsewhere")


CONFIG = {
    "detector": {
        "class_path": "learned_level.LearnedLevel",
        "init_args": {
            "plan": {
                "class_path": "medssl.schedule.TrainingPlan",
                "init_args": {"total_samples": 40, "batch_size": 4, "learning_rate": 0.05},
            }
        },
    },
    "preprocessing": {"size": [16, 16], "intensity": "range", "mean": [0.0], "std": [1.0]},
    "rate": 0.2,
    "device": "cpu",
    "workers": 0,
}


@pytest.fixture
def start(data, tmp_path):
    """Starts `medssl fit` in a process of its own."""
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(CONFIG))
    (tmp_path / "job.py").write_text(JOB)
    here = str(Path(__file__).parent)

    def started(*options, launcher=(), **environment):
        command = [sys.executable, *launcher, "job.py", "fit", "config.yaml", "--data", str(data)]
        return subprocess.Popen(
            [*command, *options],
            cwd=tmp_path,
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": here, **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    return started


def test_a_job_that_gets_sigterm_says_how_to_go_on_and_does(start, data, tmp_path, monkeypatch):
    job = start("--out", "out", SECONDS_PER_STEP="0.3")
    while not (tmp_path / "out.work" / "final" / "fit" / "training").exists():
        assert job.poll() is None, job.communicate()
        time.sleep(0.02)
    time.sleep(0.8)
    job.send_signal(signal.SIGTERM)
    said, _ = job.communicate(timeout=60)
    assert job.returncode == 1
    assert "--resume goes on from here" in said
    monkeypatch.chdir(tmp_path)
    given = ["fit", "config.yaml", "--data", str(data), "--out"]
    assert main([*given, "out", "--resume"]) == 0
    assert main([*given, "whole"]) == 0
    assert files(tmp_path / "out") == files(tmp_path / "whole")


def test_torchrun_shares_the_batches_and_one_process_writes(start, data, tmp_path, monkeypatch):
    two = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    job = start("--out", "two", "--calibration", "cross", launcher=two)
    said, errors = job.communicate(timeout=200)
    assert job.returncode == 0, errors
    assert said.count("saved in") == 1
    monkeypatch.chdir(tmp_path)
    given = ["fit", "config.yaml", "--data", str(data), "--calibration", "cross"]
    assert main([*given, "--out", "one"]) == 0
    one, two = (
        json.loads((tmp_path / name / "calibration.json").read_text()) for name in ("one", "two")
    )
    # the noise of a step differs between the two, and moves the level by far less than 0.02
    assert two["scores"] == pytest.approx(one["scores"], abs=0.02)
    assert two["fitted_on"] == one["fitted_on"]
    assert not (tmp_path / "two.work").exists()
