import json
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

import pipelines
from pipelines.cli import find_jobs, main, plain

JOB = '''
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

class Brush: ...

class Round(Brush):
    def __init__(self, width: float, *, weights: Path | None = None) -> None:
        self.width, self.weights = width, weights
        self.hair = torch.rand(1).item()
        if weights is not None:
            raise FileNotFoundError(f"no weight file at {weights}")

class Painter: ...

class Careful(Painter):
    def __init__(self, brush: Brush | Path, *, layers: list[str], ratio: float = 0.1) -> None:
        self.brush, self.layers, self.ratio = brush, layers, ratio

@dataclass(frozen=True, kw_only=True)
class Canvas:
    size: tuple[int, int]

def paint(path: Path, painter: Painter, out: Path, *, canvas: Canvas | None = None,
          mode: Literal["oil", "ink"] | Path = "oil", num_fails: int = 0,
          dry: bool = False, seed: int = 0) -> dict:
    """Paint a wall.

    Args:
        path: the wall.
        painter: who paints.
        out: where the picture goes.
        num_fails: how many strokes miss.
    """
    print("noise on stdout")
    if mode == "ink":
        raise {0: ValueError("no ink"), 1: KeyError("x"), 2: KeyboardInterrupt(),
               3: PermissionError(13, "Permission denied", "wall"), 4: NoDataError("no wall"),
               5: TruncatedPixelDataError("cut off")}[seed]
    brush = painter.brush
    return {"out": out, "ratio": painter.ratio, "layers": painter.layers, "path": str(path),
            "brush": str(brush) if isinstance(brush, Path) else brush.width, "nan": float("nan"),
            "hair": getattr(brush, "hair", None), "size": canvas and canvas.size,
            "failed": num_fails, "dry": dry}

class NoDataError(ValueError): ...
class ReadError(Exception): ...
class TruncatedPixelDataError(ReadError): ...
'''
CONFIG = """
# medssl paint config.yaml WALL --out DIR
painter:
  class_path: pipelines.paint.Careful
  init_args:
    layers: [a, b]
    brush:
      class_path: pipelines.paint.Round
      init_args: {width: 2.5}
"""


@pytest.fixture
def paint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A job of its own beside the real ones, and its config; returns the config file."""
    folder = tmp_path / "jobs"
    folder.mkdir()
    (folder / "paint.py").write_text(JOB)
    (folder / "helper.py").write_text("def paint(): ...\n")
    monkeypatch.setattr(pipelines, "__path__", [*pipelines.__path__, str(folder)])
    monkeypatch.chdir(tmp_path)
    config = tmp_path / "config.yaml"
    config.write_text(CONFIG)
    yield config
    sys.modules.pop("pipelines.paint", None)


def answer(capfd: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, dict, str]:
    """Exit code, the JSON object, stderr."""
    code = main(["paint", *map(str, arguments), "--json"])
    captured = capfd.readouterr()
    assert captured.out.count("\n") == 1
    return code, json.loads(captured.out), captured.err


def test_a_job_is_a_file_with_a_function_of_its_name(paint):
    jobs = find_jobs()
    assert jobs["paint"] == "Paint a wall."
    assert {"doctor", "list", "registry"} <= set(jobs)
    assert not {"helper", "cli", "console", "record", "served", "scoring"} & set(jobs)


def test_a_config_names_classes_and_overrides_reach_into_them(paint, capfd, tmp_path):
    code, result, err = answer(
        capfd, paint, "wall", "--out", "o", "--painter.ratio", 0.05, "--painter.brush.width", 7
    )
    assert code == 0
    assert (result["ratio"], result["brush"], result["layers"]) == (0.05, 7, ["a", "b"])
    assert result["out"] == str(tmp_path / "o")
    assert result["path"] == "wall"
    assert result["nan"] is None
    assert "noise on stdout" in err


def test_a_path_replaces_a_nested_object(paint, capfd):
    assert answer(capfd, paint, "w", "--out", "o", "--painter.brush", "D")[1]["brush"] == "D"


def test_a_yaml_list_fills_a_tuple_field(paint, capfd):
    paint.write_text(CONFIG + "canvas: {size: [3, 4]}\n")
    assert answer(capfd, paint, "w", "--out", "o")[1]["size"] == [3, 4]


def test_the_seed_decides_what_constructors_draw(paint, capfd):
    hair = [answer(capfd, paint, "w", "--out", "o", "--seed", s)[1]["hair"] for s in (3, 4, 3)]
    assert hair[0] == hair[2] != hair[1]


def test_failed_items_give_exit_code_one(paint, capfd):
    assert answer(capfd, paint, "w", "--out", "o", "--num_fails", 2)[0] == 1


def test_flags_take_dashes_and_a_switch_takes_no_value(paint, capfd):
    code, result, _ = answer(capfd, paint, "w", "--dry", "--num-fails=3", "--out", "a-b")
    assert (code, result["failed"], result["dry"]) == (1, 3, True)
    assert result["out"].endswith("/a-b")
    assert answer(capfd, paint, "w", "--out", "o")[1]["dry"] is False
    paint.write_text(CONFIG + "dry: true\n")
    assert answer(capfd, paint, "w", "--out", "o")[1]["dry"] is True


@pytest.mark.parametrize(
    ("flag", "owner", "right"),
    [
        ("--painter.layrs=[a]", "pipelines.paint.Careful", "layers"),
        ("--painter.brush.widht=3", "pipelines.paint.Round", "width"),
        ("--sed=3", "paint", "seed"),
    ],
)
def test_a_mistyped_flag_is_named_with_its_class_and_the_right_word(
    paint, capfd, flag, owner, right
):
    code, result, err = answer(capfd, paint, "w", "--out", "o", flag)
    wrong = flag.split("=")[0].rpartition(".")[2].removeprefix("--")
    assert code == 2
    assert f"{owner} has no argument '{wrong}'; did you mean '{right}'?" in err
    assert result == {"error": err.removeprefix("medssl paint: ").rstrip()}


def test_a_mistyped_key_in_the_config_is_named_with_its_class(paint, capfd):
    paint.write_text(CONFIG.replace("layers", "layrs"))
    code, _, err = answer(capfd, paint, "w", "--out", "o")
    assert code == 2
    assert "pipelines.paint.Careful has no argument 'layrs'; did you mean 'layers'?" in err


def test_what_a_nested_constructor_says_is_the_message(paint, capfd):
    code, _, err = answer(capfd, paint, "w", "--out", "o", "--painter.brush.weights", "gone.pth")
    assert code == 2
    assert err == "medssl paint: no weight file at gone.pth\n"


@pytest.mark.parametrize(
    ("seed", "code", "message"),
    [
        (0, 2, "no ink"),
        (2, 130, "stopped"),
        (3, 2, "Permission denied: wall"),
        (4, 3, "no wall"),
        (5, 2, "cut off"),
    ],
)
def test_an_error_that_explains_itself_is_one_line(paint, capfd, seed, code, message):
    found, result, err = answer(capfd, paint, "w", "--out", "o", "--mode", "ink", "--seed", seed)
    assert (found, result) == (code, {"error": message})
    assert "Traceback" not in err
    assert err.splitlines()[-1].endswith(message)


def test_an_unforeseen_error_keeps_its_traceback(paint, capfd):
    code, result, err = answer(capfd, paint, "w", "--out", "o", "--mode", "ink", "--seed", 1)
    assert (code, result) == (1, {"error": "KeyError"})
    assert "Traceback" in err


@pytest.mark.parametrize("arguments", [["w"], ["gone.yaml"], ["w", "v", "--out", "o"]])
def test_wrong_usage_gives_exit_code_two(paint, capfd, arguments):
    assert main(["paint", *arguments]) == 2
    assert capfd.readouterr().err.startswith("medssl paint: ")


def test_help_shows_the_docstring_of_each_argument(paint, capfd):
    assert main(["paint", "--help"]) == 0
    shown = " ".join(capfd.readouterr().out.split())
    assert "usage: medssl paint" in shown
    for text in ("Paint a wall.", "path the wall.", "--painter PAINTER who paints."):
        assert text in shown


def test_an_unknown_job_gets_the_nearest_name(capfd):
    assert main(["doctr"]) == 2
    assert "did you mean 'doctor'?" in capfd.readouterr().err


def test_only_the_answer_reaches_stdout_even_past_python(tmp_path):
    code = textwrap.dedent(
        """
        import os, sys
        import pipelines, pipelines.cli
        pipelines.__path__.append(sys.argv[1])
        sys.exit(pipelines.cli.main(["loud", "--json"]))
        """
    )
    (tmp_path / "loud.py").write_text(
        "import os\ndef loud() -> dict:\n    os.write(1, b'from C')\n    return {'a': 1}\n"
    )
    done = subprocess.run([sys.executable, "-c", code, tmp_path], capture_output=True, check=True)
    assert json.loads(done.stdout) == {"a": 1}
    assert b"from C" in done.stderr


def test_help_answers_in_half_a_second():
    command = [sys.executable, "-c", "from pipelines.cli import main; main(['--help'])"]
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        done = subprocess.run(command, capture_output=True, check=True, text=True)
        seconds.append(time.perf_counter() - start)
    assert "usage: medssl JOB" in done.stdout
    assert min(seconds) < 0.5


def test_help_imports_nothing_heavy():
    code = "import sys; from pipelines.cli import main; main(['--help']); print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout
    assert not {"torch", "numpy", "jsonargparse", "mlflow", "rich"} & set(loaded.split())


def test_numbers_of_any_library_become_json():
    import numpy as np
    import torch

    from medssl.metrics import Interval

    values = {
        1: np.float32(0.5),
        "t": torch.tensor(2),
        "i": Interval(value=0.9, low=0.8, high=float("inf")),
    }
    assert json.loads(json.dumps(plain(values))) == {
        "1": 0.5,
        "t": 2,
        "i": {"value": 0.9, "low": 0.8, "high": None},
    }
