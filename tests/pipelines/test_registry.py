import json
from pathlib import Path

import pytest

from pipelines.cli import main
from pipelines.record import recorded, register


@pytest.fixture
def bowl(tmp_path: Path) -> str:
    """A registered name with two versions."""
    name = f"bowl {tmp_path.name}"
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "model.yaml").write_text("kind: detector\n")
    with recorded("fit", {}) as run:
        register(folder, name, run)
        register(folder, name, run)
    return name


def ask(capfd: pytest.CaptureFixture[str], *arguments: str) -> dict:
    assert main(["registry", *arguments, "--json"]) == 0
    return json.loads(capfd.readouterr().out)


def test_promoting_moves_the_alias(bowl, capfd):
    moved = ask(capfd, "promote", bowl, "--version", "2")
    assert moved == {"name": bowl, "version": 2, "alias": "champion", "before": 1}
    shown = ask(capfd, "show", bowl)["models"]
    assert [(entry["version"], entry["aliases"]) for entry in shown] == [(2, ["champion"]), (1, [])]


def test_another_alias_leaves_the_champion_alone(bowl, capfd):
    moved = ask(capfd, "promote", bowl, "--version", "2", "--alias", "challenger")
    assert moved["before"] is None
    shown = ask(capfd, "show", bowl)["models"]
    assert [entry["aliases"] for entry in shown] == [["challenger"], ["champion"]]


def test_the_list_holds_every_name_and_version(bowl, capfd):
    listed = ask(capfd, "list")["models"]
    assert [entry["version"] for entry in listed if entry["name"] == bowl] == [2, 1]


def test_the_table_shows_the_alias_beside_its_version(bowl, capfd):
    assert main(["registry", "show", bowl]) == 0
    header, newest, oldest = capfd.readouterr().out.splitlines()
    assert header.split() == ["name", "version", "aliases", "digest", "run"]
    assert "champion" in oldest
    assert "champion" not in newest


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["show"], "needs the NAME"),
        (["promote", "NAME"], "needs --version N; NAME has versions 2, 1"),
        (["promote", "NAME", "--version", "9"], "has no version 9; it has: 1, 2"),
        (["show", "no-such"], "no registered model is named 'no-such'"),
    ],
)
def test_what_cannot_be_done_says_why(bowl, capfd, arguments, message):
    assert main(["registry", *(bowl if word == "NAME" else word for word in arguments)]) == 2
    assert message.replace("NAME has", f"{bowl} has") in capfd.readouterr().err
