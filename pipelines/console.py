"""What a job says while it works: bars and tables on a terminal, plain lines elsewhere.

Results go to stdout and progress to stderr; under `--json` the command line turns stdout into
stderr, so nothing here needs to know of it. Of several processes that torchrun started, the first
speaks.
"""

import os
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

_SECONDS_BETWEEN_LINES = 5.0


class Progress(Protocol):
    """What `progress` hands to the job."""

    def advance(self, count: int, text: str = "") -> None:
        """`count` more items are done; `text` (a loss, a rate) is shown beside them."""


def say(text: str) -> None:
    """One line for the reader."""
    if _speaks():
        print(text, flush=True)


@contextmanager
def progress(total: int, what: str) -> Iterator[Progress]:
    """Show how much of `total` is done: a bar on a terminal, else a line every few seconds.

    what: the work in a few words, such as "scoring"; it names no path.
    """
    if not sys.stderr.isatty() or not _speaks():
        lines = _Lines(total, what)
        try:
            yield lines
        finally:
            lines.close()
        return
    import rich.progress as bars
    from rich.console import Console

    columns = (
        bars.TextColumn("{task.description}"),
        bars.BarColumn(),
        bars.MofNCompleteColumn(),
        bars.TimeRemainingColumn(),
        bars.TextColumn("{task.fields[text]}", markup=False),
    )
    with bars.Progress(*columns, console=Console(file=sys.stderr)) as bar:
        yield _Bar(bar, bar.add_task(what, total=total, text=""))


def table(columns: Sequence[str], rows: Sequence[Sequence[Any]], title: str = "") -> None:
    """Print rows under their columns; floats with four significant digits, None as a dash."""
    cells = [[_cell(value) for value in row] for row in rows]
    if sys.stdout.isatty():
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text

        drawn = Table(*columns, title=title or None)
        for row in cells:
            drawn.add_row(*map(Text, row))
        Console(file=sys.stdout).print(drawn)
        return
    lines = [list(columns), *cells]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    if title:
        say(title)
    for line in lines:
        say("  ".join(map(str.ljust, line, widths)).rstrip())


def _speaks() -> bool:
    return os.environ.get("RANK", "0") == "0"


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


class _Lines:
    """Progress for a log file."""

    def __init__(self, total: int, what: str) -> None:
        self.total, self.what, self.done, self.text = total, what, 0, ""
        self.started = time.monotonic()
        self.last = self.started
        self.told = -1

    def advance(self, count: int, text: str = "") -> None:
        self.done += count
        self.text = text or self.text
        if time.monotonic() - self.last >= _SECONDS_BETWEEN_LINES:
            self.last = time.monotonic()
            self._tell()

    def close(self) -> None:
        if self.told != self.done:
            self._tell()

    def _tell(self) -> None:
        self.told = self.done
        if not _speaks():
            return
        seconds = time.monotonic() - self.started
        tail = f"  {self.text}" if self.text else ""
        line = f"{self.what}: {self.done}/{self.total}, {seconds:.0f} s{tail}"
        print(line, file=sys.stderr, flush=True)


class _Bar:
    """Progress on a terminal; `bar` is a rich.progress.Progress."""

    def __init__(self, bar: Any, task: Any) -> None:
        self.bar, self.task, self.text = bar, task, ""

    def advance(self, count: int, text: str = "") -> None:
        self.text = text or self.text
        self.bar.update(self.task, advance=count, text=self.text)
