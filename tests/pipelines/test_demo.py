import json
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from jsonargparse import ArgumentParser

from medssl.data.geometry import corners
from medssl.data.manifest import build_manifest
from medssl.data.readers.any import read_image
from medssl.models.folder import describe
from pipelines import demo as demo_module
from pipelines.demo import demo
from pipelines.fit import fit
from pipelines.pretrain import pretrain

ROOT = Path(__file__).parents[2]


@pytest.fixture
def small(monkeypatch):
    """The demo with a few heads of the development seeds and a few steps."""
    monkeypatch.setattr(demo_module, "TRAIN_SEEDS", range(44))
    monkeypatch.setattr(demo_module, "NUM_HELD_OUT", 20)
    monkeypatch.setattr(demo_module, "TEST_NORMAL_SEEDS", range(100, 106))
    monkeypatch.setattr(demo_module, "TEST_LESION_SEEDS", range(1_000, 1_006))
    plan = demo_module.TrainingPlan(total_samples=64, batch_size=32, learning_rate=1e-3)
    monkeypatch.setattr(demo_module, "PLAN", plan)


@pytest.mark.slow
def test_the_demo_goes_the_whole_way(small, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = demo(Path("demo"))
    assert set(found["image_auroc"]) == {"value", "low", "high"}
    assert set(found["baselines"]) == {"maximum intensity", "voxelwise z-score", "random encoder"}
    assert found["target_false_alarm_rate"] == 0.05
    assert Path(found["report"]).is_file()
    rows = [json.loads(line) for line in Path("demo/results/scores.jsonl").read_text().splitlines()]
    assert len(rows) == 12
    assert {row["status"] for row in rows} == {"ok"}
    assert not any(row["p_value"] is None for row in rows)
    check_maps_lie_on_their_sources(rows, Path("demo/results"))


def check_maps_lie_on_their_sources(rows, out):
    sources = {item.item: item for item in build_manifest(Path("demo/scans")).images}
    for row in rows:
        item = sources[row["item"]]
        source = read_image(Path(item.path), series=item.series)
        home = read_image(out / row["map_path"])
        assert home.spatial_shape == source.spatial_shape
        assert torch.equal(home.affine, source.affine.float().double())
        assert (corners(home) - corners(source)).abs().max() < 1e-3  # mm
        stored = nib.load(out / row["map_path"])
        assert stored.get_data_dtype() == np.float32


def test_the_configs_for_ct_are_the_settings_of_the_demo():
    pretraining = arguments(pretrain, "configs/pretrain/dino_ct.yaml", {"data", "out"})
    assert pretraining["preprocessing"] == demo_module.PREPARE
    assert pretraining["plan"] == demo_module.PLAN
    assert describe(pretraining["objective"]) == describe(demo_module.objective())
    fitting = arguments(fit, "configs/fit/patchcore_ct.yaml", {"data", "out"})
    mine = describe(demo_module.detector(demo_module.encoder()))
    config = describe(fitting["detector"])
    for described in (mine, config):  # the encoder's folder takes the place of the one named there
        del described["init_args"]["detector"]["init_args"]["encoder"]
    assert config == mine
    assert fitting["rate"] == demo_module.RATE


def arguments(job, config, skip):
    """What a config makes of a job's arguments."""
    parser = ArgumentParser(exit_on_error=False)
    parser.add_function_arguments(job, skip=skip, as_group=False)
    return vars(parser.instantiate(parser.parse_path(ROOT / config)))


def test_a_folder_that_no_demo_made_is_left_alone(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    with pytest.raises(FileExistsError, match="no demo made it"):
        demo(tmp_path / "mine")
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "years of work"
