"""Every command of the README is run here, in its order, or by the demo and the test run."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
RUN_ELSEWHERE = {"make demo", "make test"}


def blocks(language: str) -> list[str]:
    """Code blocks of the README in a language, "" for shell."""
    pieces = re.split(r"^```(.*)\n", (ROOT / "README.md").read_text(), flags=re.MULTILINE)
    opening = zip(pieces[1::4], pieces[2::4], strict=True)  # language, code, "", prose, ...
    return [code for found, code in opening if found == language]


def commands() -> list[str]:
    """Shell commands without their comments."""
    lines = [line.split("#")[0].strip() for block in blocks("") for line in block.splitlines()]
    return [line for line in lines if line.startswith(("medssl ", "make "))]


def test_every_job_of_the_readme_exists():
    jobs = {command.split()[1] for command in commands() if command.startswith("medssl ")}
    assert {"inspect", "pretrain", "fit", "score", "evaluate", "registry"} <= jobs
    assert all((ROOT / "pipelines" / f"{job}.py").is_file() for job in jobs)


@pytest.fixture
def workplace(tmp_path, real_data, monkeypatch):
    """What the README speaks of: SCANS and NEW, parts, FILE, and the configs."""
    from medssl.data.synthetic.head_ct_study import write_head_ct_study

    write_head_ct_study(
        tmp_path / "made",
        train=range(24),
        test_normal=range(100, 102),
        test_lesion=range(1_000, 1_002),
    )
    shutil.move(tmp_path / "made" / "train" / "good", tmp_path / "SCANS")
    shutil.move(tmp_path / "made" / "test", tmp_path / "NEW")
    write_head_ct_study(tmp_path / "HELD_OUT", train=range(24, 44), test_normal=(), test_lesion=())
    shutil.copytree(real_data / "industrial-cookies" / "cookie", tmp_path / "parts")
    scratch = tmp_path / "parts" / "test" / "scratch"
    (tmp_path / "parts" / "test" / "broken").rename(scratch)
    (tmp_path / "parts" / "ground_truth" / "broken").rename(
        scratch.parents[1] / "ground_truth/scratch"
    )
    shutil.copy(min(scratch.iterdir()), scratch / "000.png")
    weights = real_data / "weights-mobilenetv2" / "mobilenetv2_100_tf2.pth"
    shutil.copy(weights, tmp_path / "FILE")
    shutil.copytree(ROOT / "configs", tmp_path / "configs")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_commands_of_the_readme_work_one_after_the_other(workplace):
    program = Path(sys.executable).with_name("medssl")
    for command in commands():
        if command in RUN_ELSEWHERE or command.startswith("make"):
            continue
        words = command.split()[1:]
        if words[0] == "pretrain":
            words += ["--plan.total_samples", "320", "--plan.warmup_samples", "32"]
        for folder in ("model", "results"):  # each section of the README begins anew
            if "--out" in words and words[-1] == folder and (workplace / folder).exists():
                shutil.rmtree(workplace / folder)
        done = subprocess.run([program, *words], capture_output=True, text=True)
        assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    done = subprocess.run(
        [sys.executable, "-c", "\n".join(blocks("python"))], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "score" in done.stdout
    assert json.loads((workplace / "results" / "metrics.json").read_text())["image_auroc"]
