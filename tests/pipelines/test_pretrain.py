"""The pretrain job: what it writes, what it refuses, and that a kill changes nothing."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch
import yaml

from medssl.data.augment import Augmentation
from medssl.data.boxes import Boxes, MultiBox
from medssl.data.manifest import NoDataError, build_manifest, load_sample
from medssl.data.preprocess import Preprocessing
from medssl.data.views import MultiCrop
from medssl.models.folder import load_encoder, load_model
from medssl.models.timm_encoder import TimmEncoder
from medssl.models.vit3d import ViT3DEncoder
from medssl.objectives.base import Objective
from medssl.objectives.joint_embedding.dino import DINO
from medssl.training import TrainingPlan
from pipelines.cli import _parser
from pipelines.pretrain import pretrain

PREPROCESSING = Preprocessing(size=(32, 32), intensity="range", channels=1)
PLAN = TrainingPlan(total_samples=12, batch_size=4)


def write_pictures(folder: Path, count: int = 6) -> Path:
    folder.mkdir(parents=True)
    noise = np.random.default_rng(count).integers(0, 255, (count, 40, 48), dtype=np.uint8)
    for number, pixels in enumerate(noise):
        PIL.Image.fromarray(pixels).save(folder / f"{number}.png")
    return folder


def dino(encoder: TimmEncoder | Path | None = None) -> DINO:
    torch.manual_seed(0)
    return DINO(
        encoder or TimmEncoder("test_resnet", in_channels=1),
        prototypes=16,
        hidden_dim=32,
        bottleneck_dim=16,
        global_size=32,
        local_crops=1,
        local_size=16,
    )


def run(data: Path, out: Path, **changes):
    objective = changes.pop("objective", None) or dino()
    options = {"preprocessing": PREPROCESSING, "plan": PLAN, "device": "cpu", "workers": 0}
    return objective, pretrain(data, objective, out, **{**options, **changes})


def test_the_folder_holds_the_trained_teacher_its_preprocessing_and_its_domain(tmp_path: Path):
    objective, result = run(write_pictures(tmp_path / "data"), tmp_path / "out")
    saved = load_model(tmp_path / "out", kind="encoder")
    noise = torch.randn(2, 1, 32, 32)
    torch.testing.assert_close(saved.model(noise), objective.teacher.eval()(noise))
    assert saved.preprocessing == PREPROCESSING
    assert saved.domain["size"] == {"min": [40.0, 48.0], "max": [40.0, 48.0]}
    assert result["images"] == 6
    assert result["failed"] == 0
    assert not (tmp_path / "out.work").exists()
    start = dino().teacher.state_dict()
    assert any(
        not torch.equal(start[key], value) for key, value in saved.model.state_dict().items()
    )


def test_a_network_that_takes_volumes_is_pretrained_from_files_and_loads_again(tmp_path: Path):
    import nibabel

    (tmp_path / "data").mkdir()
    for number in range(4):
        values = np.random.default_rng(number).normal(size=(24, 20, 6)).astype(np.float32)
        image = nibabel.Nifti1Image(values, np.diag([1.0, 1.0, 4.0, 1.0]))
        nibabel.save(image, tmp_path / "data" / f"{number}.nii.gz")
    boxes = MultiBox(
        large=Boxes(count=2, size=(4, 16, 16), side_mm=(12, 20)),
        small=Boxes(count=1, size=(2, 8, 8), side_mm=(6, 8)),
        augmentation=Augmentation(),
    )
    sides = {"image_size": (4, 16, 16), "patch_size": (2, 8, 8)}
    encoder = ViT3DEncoder(**sides, embedding_dim=16, depth=1, num_heads=2)
    objective = DINO(encoder, prototypes=16, hidden_dim=32, bottleneck_dim=16, views=boxes)
    prepare = Preprocessing(size=(24, 20), intensity="percentile", channels=1)
    run(tmp_path / "data", tmp_path / "out", objective=objective, preprocessing=prepare)
    loaded = load_encoder(tmp_path / "out")
    volumes = torch.randn(2, 1, 4, 16, 16)
    torch.testing.assert_close(loaded(volumes), objective.teacher.eval()(volumes))


def test_the_folder_remembers_what_was_seen_also_by_the_training_before(tmp_path: Path):
    first, second = write_pictures(tmp_path / "a", 6), write_pictures(tmp_path / "b", 8)
    run(first, tmp_path / "one")
    run(second, tmp_path / "two", objective=dino(tmp_path / "one"))
    once, twice = (load_encoder(tmp_path / name).seen for name in ("one", "two"))
    manifest = build_manifest(first)
    hashes = {
        load_sample(manifest, item, hashes=True).images["image"].provenance["pixel_sha256"]
        for item in manifest.images
    }
    assert once.pixels == hashes
    assert len(hashes) == 6
    assert once.pixels < twice.pixels
    assert len(twice.pixels) == 14


def test_test_images_are_not_used_and_a_broken_one_is_named(tmp_path: Path, capsys):
    data = tmp_path / "data" / "part"
    write_pictures(data / "train" / "good", 5)
    write_pictures(data / "test" / "bad", 3)
    (data / "train" / "good" / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\nnothing more")
    _, result = run(tmp_path / "data", tmp_path / "out")
    assert result["images"] == 5
    assert result["failed"] == 1
    broken = next(i for i in build_manifest(tmp_path / "data").images if "broken" in i.path)
    told = capsys.readouterr()
    assert f"left out: item {broken.item}" in told.out
    assert "broken.png" not in told.out + told.err


def test_training_goes_on_from_an_encoder_folder_with_its_own_preprocessing_only(tmp_path: Path):
    data = write_pictures(tmp_path / "data")
    run(data, tmp_path / "first")
    _, result = run(data, tmp_path / "second", objective=dino(tmp_path / "first"))
    assert result["finished"]
    other = Preprocessing(size=(48, 48), intensity="range", channels=1)
    with pytest.raises(ValueError, match=r"trained with .*32, 32.* asks for .*48, 48"):
        run(data, tmp_path / "third", objective=dino(tmp_path / "first"), preprocessing=other)
    assert load_encoder(tmp_path / "second").preprocessing == PREPROCESSING


def test_a_finished_folder_is_left_alone(tmp_path: Path, capsys):
    data = write_pictures(tmp_path / "data")
    run(data, tmp_path / "out")
    before = {f.name: f.stat().st_mtime_ns for f in (tmp_path / "out").iterdir()}
    with pytest.raises(ValueError, match="exists; choose another folder"):
        run(data, tmp_path / "out")
    _, result = run(data, tmp_path / "out", resume=True)
    assert result["finished"]
    assert "nothing to do" in capsys.readouterr().out
    assert {f.name: f.stat().st_mtime_ns for f in (tmp_path / "out").iterdir()} == before


def test_an_unfinished_run_is_not_overwritten(tmp_path: Path):
    (tmp_path / "out.work").mkdir()
    with pytest.raises(ValueError, match="go on with --resume"):
        run(write_pictures(tmp_path / "data"), tmp_path / "out")


def test_no_image_to_train_on_is_said_before_anything_is_written(tmp_path: Path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(NoDataError):
        run(tmp_path / "empty", tmp_path / "out")
    write_pictures(tmp_path / "data" / "part" / "test" / "good")
    write_pictures(tmp_path / "data" / "part" / "train" / "good", 1)
    with pytest.raises(NoDataError, match="all of the split 'test'"):
        run(tmp_path / "data", tmp_path / "out", select="split == 'test'")
    assert not (tmp_path / "out.work").exists()


def test_a_place_that_cannot_be_written_is_an_error_at_once(tmp_path: Path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(ValueError, match="cannot write"):
        run(write_pictures(tmp_path / "data"), tmp_path / "file" / "out")


def test_max_train_draws_that_many_by_the_seed(tmp_path: Path):
    data = write_pictures(tmp_path / "data")
    _, result = run(data, tmp_path / "out", max_train=3)
    assert result["images"] == 3


CONFIG = {
    "preprocessing": {"size": [32, 32], "intensity": "range", "channels": 1},
    "objective": {
        "class_path": "medssl.objectives.joint_embedding.dino.DINO",
        "init_args": {
            "encoder": {
                "class_path": "medssl.models.timm_encoder.TimmEncoder",
                "init_args": {
                    "name": "test_resnet",
                    "in_channels": 1,
                    "options": {"drop_path_rate": 0.3},
                },
            },
            "prototypes": 16,
            "hidden_dim": 32,
            "bottleneck_dim": 16,
            "global_size": 32,
            "local_crops": 1,
            "local_size": 16,
        },
    },
    "plan": {"total_samples": 400, "batch_size": 4, "checkpoint_every_samples": 8},
}


JOB = "import sys; from pipelines.cli import main; sys.exit(main())"


def test_torchrun_shares_the_batch_and_one_process_writes(tmp_path: Path):
    data = write_pictures(tmp_path / "data")
    options = CONFIG["objective"]["init_args"]
    encoder = {**options["encoder"], "init_args": {"name": "test_convnext", "in_channels": 1}}
    small = {**options, "encoder": encoder, "local_crops": 0}
    method = {**CONFIG["objective"], "init_args": small}
    plan = {"total_samples": 12, "batch_size": 4, "learning_rate": 1e-5}
    config = {**CONFIG, "objective": method, "plan": plan, "device": "cpu", "workers": 0}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    (tmp_path / "job.py").write_text(JOB)
    two = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    said = {}
    for name, start in (("one", []), ("two", two)):
        command = [sys.executable, *start, "job.py", "pretrain", "config.yaml", "--data", str(data)]
        done = subprocess.run(
            [*command, "--out", name],
            cwd=tmp_path,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        said[name] = done.stdout
    assert said["two"].count("waiting for data") == 1
    one, two = (load_encoder(tmp_path / name).state_dict() for name in ("one", "two"))
    apart = torch.cat([(two[name] - weight).abs().flatten() for name, weight in one.items()])
    # a step of Adam is about 1e-5 either way, so another gradient would show in half of them
    assert (apart > 3e-6).float().mean() < 0.02


@pytest.mark.slow
def test_a_killed_job_started_again_writes_the_weights_of_an_undisturbed_one(tmp_path: Path):
    data = write_pictures(tmp_path / "data")
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(CONFIG))

    def command(name: str, *more: str) -> list[str]:
        options = ["--data", str(data), "--out", str(tmp_path / name), "--device", "cpu", *more]
        return [sys.executable, "-c", JOB, "pretrain", str(tmp_path / "config.yaml"), *options]

    subprocess.run(command("whole"), check=True, cwd=tmp_path)
    with subprocess.Popen(command("killed"), cwd=tmp_path) as process:
        while not (tmp_path / "killed.work" / "checkpoint.pt").exists():
            time.sleep(0.02)
        time.sleep(random.random())
        process.kill()
    assert process.returncode == -signal.SIGKILL, "it was faster than the kill"
    subprocess.run(command("killed", "--resume"), check=True, cwd=tmp_path)
    whole, killed = (
        (tmp_path / name / "weights.safetensors").read_bytes() for name in ("whole", "killed")
    )
    assert whole == killed


PICTURES = set(Path("configs/pretrain").glob("*.yaml")) - {Path("configs/pretrain/point_mae.yaml")}


@pytest.mark.parametrize("file", sorted(PICTURES), ids=str)
def test_the_configs_in_the_house_build_what_they_name(file: Path):
    parser = _parser("pretrain", pretrain)
    places = {"data": ".", "out": "there"}
    given = {**yaml.safe_load(file.read_text()), **places}
    values = parser.instantiate(parser.parse_object(given))
    assert isinstance(values.plan, TrainingPlan)
    assert isinstance(values.objective, Objective)
    views = getattr(values.objective.views, "crop", values.objective.views)
    side = views.large.size if isinstance(views, MultiCrop) else max(views.large.size)
    assert side <= values.preprocessing.size[0]
    arguments = yaml.safe_load(file.read_text())["objective"]["init_args"]
    named = arguments.get("views", {}).get("init_args", arguments).get("augmentation", {})
    kind = named.get("class_path", "medssl.data.augment.Augmentation").rpartition(".")[2]
    assert type(views.augmentation).__name__ == kind
    first = file.read_text().partition("\n")[0]
    assert first.startswith(f"# medssl pretrain {file} --data ")
