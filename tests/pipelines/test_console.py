import io
import sys

import pytest

from pipelines import console


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_table_without_a_terminal_is_aligned_plain_text(capsys):
    console.table(["name", "score"], [["a", 0.123456], ["longer", None], ["b", 12]], "Title")
    assert capsys.readouterr().out.splitlines() == [
        "Title",
        "name    score",
        "a       0.1235",
        "longer  -",
        "b       12",
    ]


def test_progress_without_a_terminal_ends_with_one_plain_line(capsys):
    with console.progress(30, "scoring") as bar:
        for _ in range(3):
            bar.advance(10, "loss 0.1")
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err == "scoring: 30/30, 0 s  loss 0.1\n"


def test_slow_progress_tells_a_line_every_few_seconds(capsys, monkeypatch):
    clock = iter(range(0, 1000, 2))
    monkeypatch.setattr(console.time, "monotonic", lambda: float(next(clock)))
    with console.progress(100, "reading") as bar:
        for _ in range(10):
            bar.advance(10)
    lines = capsys.readouterr().err.splitlines()
    assert 3 <= len(lines) < 10
    assert lines[-1].startswith("reading: 100/100")


def test_a_job_that_fails_still_tells_how_far_it_came(capsys):
    def job() -> None:
        with console.progress(5, "fitting") as bar:
            bar.advance(2)
            raise ValueError("broken")

    with pytest.raises(ValueError, match="broken"):
        job()
    assert "fitting: 2/5" in capsys.readouterr().err


def test_a_terminal_gets_a_bar_and_a_drawn_table(monkeypatch):
    out, err = Terminal(), Terminal()
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(sys, "stderr", err)
    with console.progress(2, "scoring") as bar:
        bar.advance(2, "[0/1] done")  # square brackets are no markup
    console.table(["name"], [["[bold]a"]])
    assert "2/2" in err.getvalue()
    assert "[0/1] done" in err.getvalue()
    assert "[bold]a" in out.getvalue()
    assert "\u2500" in out.getvalue() or "\u2501" in out.getvalue()
