import json
import platform

import pydicom.pixels
import pytest
import torch

from medssl.data.privacy import key_file, salted
from pipelines import doctor as module
from pipelines.cli import main


def ask(capfd: pytest.CaptureFixture[str]) -> tuple[int, dict]:
    code = main(["doctor", "--json"])
    return code, json.loads(capfd.readouterr().out)


class Deaf:
    is_available = False
    missing_dependencies = ("pylibjpeg - requires pylibjpeg-openjpeg",)


def test_versions_decoders_and_threads_are_those_of_this_machine(capfd):
    _, found = ask(capfd)
    assert found["packages"]["python"] == platform.python_version()
    assert found["packages"]["torch"] == torch.__version__.partition("+")[0]
    assert found["device"]["threads"] == torch.get_num_threads()
    assert len(found["device"]["gpus"]) == torch.cuda.device_count()
    for syntax in ("ExplicitVRLittleEndian", "JPEG2000Lossless", "JPEGLSLossless", "RLELossless"):
        assert found["decoders"][syntax] is None


def test_a_missing_decoder_is_a_problem_that_names_the_package(capfd, monkeypatch):
    monkeypatch.setattr(pydicom.pixels, "get_decoder", lambda uid: Deaf())
    code, found = ask(capfd)
    assert code == 1
    assert (
        "DICOM HTJ2K cannot be decoded: pylibjpeg - requires pylibjpeg-openjpeg"
        in (found["problems"])
    )


def test_a_package_that_is_absent_is_a_problem(capfd, monkeypatch):
    monkeypatch.setattr(module, "versions", lambda: {"timm": "absent"})
    assert "timm is not installed; install it with pip" in ask(capfd)[1]["problems"]


def test_a_key_that_others_may_read_is_a_problem(capfd, monkeypatch, tmp_path):
    monkeypatch.setenv("MEDSSL_KEY_FILE", str(tmp_path / "key"))
    assert ask(capfd)[1]["key"] == {"exists": False, "mode": None}
    salted("makes it")
    assert ask(capfd)[1]["key"] == {"exists": True, "mode": "0o600"}
    key_file().chmod(0o644)
    code, found = ask(capfd)
    assert code == 1
    assert [problem for problem in found["problems"] if "mode 0o644" in problem]


def test_a_server_that_does_not_answer_is_a_problem_without_its_password(capfd, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://user:hidden@127.0.0.1:9/")
    found = ask(capfd)[1]
    assert found["store"]["problem"].startswith("does not answer")
    assert [problem for problem in found["problems"] if "tracking store" in problem]
    assert "hidden" not in json.dumps(found)


def test_looking_at_the_store_does_not_make_one(capfd, monkeypatch, tmp_path):
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    monkeypatch.chdir(tmp_path)
    assert ask(capfd)[1]["store"] == {"kind": "sqlite", "exists": False, "problem": None}
    assert not list(tmp_path.iterdir())


def test_a_data_variable_that_names_nothing_is_a_problem(capfd, monkeypatch):
    monkeypatch.setenv("MEDSSL_DATA", "/no/such/folder")
    assert [problem for problem in ask(capfd)[1]["problems"] if "MEDSSL_DATA" in problem]


def test_the_printed_report_ends_with_the_problems(capfd, monkeypatch):
    monkeypatch.setattr(module, "_decoders", dict)
    monkeypatch.delenv("MEDSSL_DATA", raising=False)
    assert main(["doctor"]) == 0
    lines = capfd.readouterr().out.splitlines()
    assert lines[-1] == "problems  none"
    assert any(line.startswith("torch ") for line in lines)
