import importlib.metadata
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from medssl.data.privacy import salted
from medssl.metrics import Interval
from medssl.models.timm_encoder import TimmEncoder
from pipelines import provenance
from pipelines.provenance import commit, described, device_name, flat, numbers, versions


@dataclass(frozen=True)
class Plan:
    file: Path
    size: tuple[int, int] = (3, 4)


def test_every_path_becomes_its_salted_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "smith.csv").touch()
    (tmp_path / "smith").mkdir()
    values = {
        "data": Path("/home/smith/scans"),
        "groups": "smith.csv:patient_id",
        "model": "smith",
        "typed": "scans/smith",
        "plan": Plan(Path("smith")),
        "list": [Path("smith")],
    }
    text = str(described(values))
    assert "smith" not in text
    assert described(values)["data"] == f"path-{salted('/home/smith/scans')}"
    assert described(values)["plan"]["size"] == [3, 4]


def test_what_is_no_path_stays_as_it_is():
    values = {
        "model": "models:/ct@champion",
        "mode": "split",
        "n": 3,
        "x": None,
        "select": "a == 1",
    }
    assert described(values) == values


def test_a_very_long_text_is_no_path():
    assert described("a" * 10_000) == "a" * 10_000


def test_a_network_is_described_by_class_and_arguments():
    found = flat({"detector": described(TimmEncoder("test_resnet", in_channels=1))})
    assert found["detector.class_path"] == "medssl.models.timm_encoder.TimmEncoder"
    assert found["detector.init_args.in_channels"] == 1


def test_an_interval_is_three_numbers():
    values = {
        "auroc": Interval(value=0.9, low=0.8, high=0.95),
        "cookie": {"aupro": {"value": 0.5, "low": 0.25, "high": 0.75}, "none": None},
        "loss": torch.tensor(2.0),
    }
    assert dict(numbers(values)) == {
        "auroc": 0.9,
        "auroc_low": 0.8,
        "auroc_high": 0.95,
        "cookie/aupro": 0.5,
        "cookie/aupro_low": 0.25,
        "cookie/aupro_high": 0.75,
        "loss": 2.0,
    }


def test_versions_are_the_installed_ones(monkeypatch):
    assert versions()["torch"] == importlib.metadata.version("torch")
    monkeypatch.setattr(provenance, "PACKAGES", ("torch", "no-such-package"))
    assert versions()["no-such-package"] == "absent"


@pytest.fixture
def checkout(tmp_path, monkeypatch) -> Path:
    """A repository with one commit of a stand-in for the module; returns that file."""
    file = tmp_path / "provenance.py"
    file.write_text("1\n")
    monkeypatch.setattr(provenance, "__file__", str(file))
    git(tmp_path, "init", "-q")
    git(tmp_path, "add", ".")
    git(tmp_path, "-c", "user.name=a", "-c", "user.email=a@b.c", "commit", "-qm", "one")
    return file


def git(folder: Path, *arguments: str) -> str:
    command = ["git", "-C", str(folder), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def test_the_commit_and_a_change_after_it_are_told(checkout):
    head = git(checkout.parent, "rev-parse", "HEAD")
    assert commit() == {"mlflow.source.git.commit": head, "dirty": "False"}
    checkout.write_text("2\n")
    assert commit()["dirty"] == "True"


def test_an_installed_copy_inside_another_checkout_has_no_commit(checkout, monkeypatch):
    monkeypatch.setattr(provenance, "__file__", str(checkout.with_name("installed.py")))
    assert commit() == {}


def test_a_machine_without_git_has_no_commit(monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert commit() == {}


def test_the_cpu_is_named_where_it_was_asked_for():
    assert device_name("cpu") == "cpu"


def test_a_name_that_the_store_would_refuse_is_rewritten():
    assert flat({"encoders": {"DINO, X-rays": {"seed": 1}}}) == {"encoders.DINO_ X-rays.seed": 1}
