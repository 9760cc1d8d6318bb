import os
import signal
import socket
import sqlite3
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import mlflow
import pytest
import yaml

from medssl.data.manifest import Item, Manifest
from medssl.models.folder import digest
from medssl.models.timm_encoder import TimmEncoder
from pipelines import record
from pipelines.record import promote, recorded, register, registered, resolve

SECRET = "smith-1957"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A model folder, as far as the registry is concerned, whose name nobody may see."""
    folder = tmp_path / SECRET
    folder.mkdir()
    (folder / "model.yaml").write_text("kind: detector\n")
    (folder / "weights.safetensors").write_bytes(bytes(range(256)))
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {
        str(file.relative_to(folder)): file.read_bytes()
        for file in folder.rglob("*")
        if file.is_file()
    }


def read(run_id: str) -> mlflow.entities.Run:
    return mlflow.MlflowClient(tracking_uri=os.environ["MLFLOW_TRACKING_URI"]).get_run(run_id)


def test_a_run_holds_its_arguments_code_packages_and_numbers(tmp_path):
    arguments = {"data": tmp_path, "detector": TimmEncoder("test_resnet"), "seed": 3, "rate": None}
    with recorded("fit", {**arguments, "device": "cpu"}) as run:
        run.metrics({"image_auroc": {"value": 0.9, "low": 0.8, "high": 0.95}, "unknown": None})
        run.tags({"note": "x"})
        assert read(run.run_id).info.status == "RUNNING"
    found = read(run.run_id)
    assert found.info.status == "FINISHED"
    assert found.data.metrics == {
        "image_auroc": 0.9,
        "image_auroc_low": 0.8,
        "image_auroc_high": 0.95,
    }
    assert found.data.params["seed"] == "3"
    assert found.data.params["detector.init_args.name"] == "test_resnet"
    tags = found.data.tags
    assert (tags["job"], tags["note"], tags["device_name"]) == ("fit", "x", "cpu")
    assert tags["version.mlflow"] == mlflow.__version__
    config = yaml.safe_load(Path(found.info.artifact_uri[7:], "config.yaml").read_text())
    assert config["detector"]["init_args"]["name"] == "test_resnet"
    assert config["rate"] is None


def test_more_settings_than_one_request_may_hold_are_all_kept():
    many = {f"key{i}": "v" * 10_000 for i in range(230)}
    with recorded("fit", many) as run:
        run.metrics({f"metric{i}": i for i in range(1_001)})
    data = read(run.run_id).data
    assert len(data.params) == 230
    assert len(data.metrics) == 1_001


def test_a_failed_run_tells_the_class_of_the_error_and_no_more():
    with pytest.raises(OSError, match=SECRET), recorded("fit", {}) as run:
        raise FileNotFoundError(f"/home/{SECRET}/scan.dcm")
    found = read(run.run_id)
    assert (found.info.status, found.data.tags["error"]) == ("FAILED", "FileNotFoundError")
    assert SECRET not in str(found.data.tags)


def test_a_stopped_run_is_killed():
    with pytest.raises(KeyboardInterrupt), recorded("fit", {}) as run:
        raise KeyboardInterrupt
    assert read(run.run_id).info.status == "KILLED"


def test_the_manifest_is_counted_by_split_and_label():
    cells = [("train", 0), ("train", 0), ("test", 0), ("test", 1), (None, None)]
    items = tuple(item(str(i), split, label) for i, (split, label) in enumerate(cells))
    manifest = Manifest(items=items, key="k")
    with recorded("fit", {}) as run:
        run.manifest(manifest)
    assert read(run.run_id).data.params == {
        "manifest.digest": manifest.digest,
        "manifest.train.normal": "2",
        "manifest.test.normal": "1",
        "manifest.test.anomalous": "1",
        "manifest.unsplit.unlabeled": "1",
    }


def item(name: str, split: str | None, label: int | None) -> Item:
    known = dict.fromkeys(Item.__dataclass_fields__)
    known |= {"item": name, "path": SECRET, "kind": "picture", "role": "image"}
    return Item(**{**known, "modality": "PICTURE", "split": split, "label": label})


def test_the_first_version_is_the_champion_until_another_is_promoted(folder):
    with recorded("fit", {}) as run:
        first = register(folder, "vase", run)
        (folder / "weights.safetensors").write_bytes(b"other")
        second = register(folder, "vase", run)
    assert (first.version, first.champion, second.version, second.champion) == (1, True, 2, False)
    assert contents(resolve("models:/vase/2")) == contents(folder)
    assert contents(resolve("models:/vase@champion")) != contents(folder)

    assert promote("vase", 2) == 1
    assert contents(resolve("models:/vase@champion")) == contents(folder)
    versions = {entry["version"]: entry for entry in registered("vase")}
    assert versions[2]["aliases"] == ["champion"]
    assert versions[2]["digest"] == digest(folder) != versions[1]["digest"]


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("models:/jar@challenger", "no alias 'challenger'; it has: champion"),
        ("models:/jar/7", "no version 7; it has: 1"),
        ("models:/nothing/1", "'nothing'; registered: .*jar"),
        ("models:/jar", "expected models:/NAME@ALIAS"),
    ],
)
def test_a_missing_model_is_answered_with_what_exists(folder, model, message):
    if "jar" not in {entry["name"] for entry in all_registered()}:
        with recorded("fit", {}) as run:
            register(folder, "jar", run)
    with pytest.raises(ValueError, match=message):
        resolve(model)


def all_registered() -> list[dict]:
    with recorded("fit", {}):  # makes the store where this test is the first
        return registered()


def test_a_folder_is_its_own_answer(folder):
    assert resolve(str(folder)) == folder
    with pytest.raises(FileNotFoundError, match="no model folder at gone"):
        resolve("gone")


@pytest.mark.parametrize("name", ["a/b", "a:b", "", "o'neil"])
def test_a_name_the_registry_cannot_hold_is_refused(folder, name):
    with recorded("fit", {}) as run, pytest.raises(ValueError, match="registered name"):
        register(folder, name, run)


def test_asking_for_a_model_makes_no_store(tmp_path, monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="no tracking store in this folder"):
        resolve("models:/ct@champion")
    assert not list(tmp_path.iterdir())


def test_a_file_store_is_refused_with_what_to_use(monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "file:./mlruns")
    with pytest.raises(ValueError, match="must be a database or a server"), recorded("fit", {}):
        pass


def test_tracking_is_silent_quick_and_leaves_the_environment_alone(folder, capfd):
    with recorded("fit", {}):
        pass
    before = os.environ["MLFLOW_TRACKING_URI"]
    capfd.readouterr()
    start = time.perf_counter()
    with recorded("fit", {"seed": 1}) as run:
        run.metrics({"a": 1.0})
    assert time.perf_counter() - start < 2
    with recorded("fit", {}) as run:
        register(folder, "silent", run)
    captured = capfd.readouterr()
    assert (captured.out, captured.err) == ("", "")
    assert os.environ["MLFLOW_TRACKING_URI"] == before


def test_no_name_of_a_folder_user_or_program_is_written(folder, monkeypatch):
    monkeypatch.setattr(sys, "argv", [f"/opt/{SECRET}/program"])
    with recorded("fit", {"data": folder, "model": str(folder), "groups": f"{folder}/x:id"}) as run:
        run.artifact(folder / "model.yaml")
        run.artifact(folder)
        register(folder, "nameless", run)
    database = record.sqlite_file(os.environ["MLFLOW_TRACKING_URI"])
    stored = "\n".join(sqlite3.connect(database).iterdump())
    files = {file: file.read_bytes() for file in (database.parent / "mlruns").rglob("*.*")}
    hidden = [SECRET, str(Path(record.__file__).parent)]
    for word in hidden:
        assert word not in stored
        assert not [file for file, text in files.items() if word.encode() in text]
        assert not [file for file in files if word in str(file)]
    assert read(run.run_id).info.user_id == "medssl"
    assert read(run.run_id).data.tags["mlflow.source.name"] == "medssl fit"


RUN = """
from pathlib import Path
from pipelines.record import recorded
with recorded("fit", {"seed": 1}) as run:
    run.metrics({"a": 1.0})
print(Path.cwd().name, run.run_id)
"""


def test_four_processes_may_make_one_store_at_once(tmp_path):
    kept = {key: value for key, value in os.environ.items() if key != "MLFLOW_TRACKING_URI"}
    command = [sys.executable, "-c", RUN]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    started = [subprocess.Popen(command, cwd=tmp_path, env=kept, **pipes) for _ in range(4)]
    ended = [process.communicate(timeout=200) for process in started]
    assert [process.returncode for process in started] == [0] * 4, ended
    assert [error for _, error in ended] == [""] * 4
    with sqlite3.connect(tmp_path / "mlflow.db") as database:
        assert database.execute("select count(*) from runs").fetchone() == (4,)
        names = database.execute("select name from experiments order by experiment_id").fetchall()
    assert names == [("Default",), ("medssl",)]
    assert len(list((tmp_path / "mlruns" / "medssl").glob("*/artifacts/config.yaml"))) == 4


@pytest.fixture
def server(tmp_path, monkeypatch) -> Iterator[str]:
    """A tracking server that keeps the artifacts to itself."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    uri = f"http://127.0.0.1:{port}"
    store = ["--backend-store-uri", f"sqlite:///{tmp_path}/server.db"]
    store += ["--artifacts-destination", str(tmp_path / "far")]
    command = [sys.executable, "-m", "mlflow", "server", "--port", str(port), "--workers", "1"]
    kept = {key: value for key, value in os.environ.items() if key != "MLFLOW_TRACKING_URI"}
    process = subprocess.Popen([*command, *store], env=kept, start_new_session=True)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    try:
        wait_for(f"{uri}/health")
        yield uri
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        process.wait(30)


def wait_for(address: str) -> None:
    for _ in range(240):
        try:
            with urllib.request.urlopen(address, timeout=5):
                return
        except OSError:
            time.sleep(0.5)
    raise TimeoutError(address)


@pytest.mark.slow
def test_a_model_of_a_server_is_downloaded_once(server, folder, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    with recorded("fit", {}) as run:
        register(folder, "far", run)
    found = resolve("models:/far@champion")
    assert found.is_relative_to(tmp_path / "cache")
    assert contents(found) == contents(folder)
    (found / "mark").touch()
    assert (resolve("models:/far/1") / "mark").exists()
