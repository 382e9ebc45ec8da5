"""Progress of long work as a bar on stderr; silent where stderr is not a terminal."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING

from poolreg.progress import SILENT, Progress

from .output import clean, size

if TYPE_CHECKING:
    from rich import progress
    from rich.text import Text


@contextlib.contextmanager
def bar() -> Iterator[Progress]:
    """Yield what long work reports to; the bar is gone when the block ends."""
    if not sys.stderr.isatty():
        yield SILENT
        return
    drawn = Bar()
    try:
        yield drawn
    finally:
        drawn.stop()


class Bar:
    """One bar at a time: stage, share done, rate in the stage's unit, time left, a note."""

    def __init__(self) -> None:
        self._drawn: progress.Progress | None = None
        self._task: progress.TaskID | None = None

    def start(self, what: str, total: int, unit: str) -> None:
        """Begin a stage in place of the one before; without a total the bar only moves."""
        # Imported here: much of what could show a bar turns out to be memoised.
        if self._drawn is None:
            from rich.console import Console
            from rich.progress import Progress as Drawn

            self._drawn = Drawn(*_columns(), console=Console(stderr=True), transient=True)
            self._drawn.start()
        if self._task is not None:
            self._drawn.remove_task(self._task)
        self._task = self._drawn.add_task(clean(what), total=total or None, unit=unit, note="")

    def advance(self, amount: int) -> None:
        """Move the bar on."""
        if self._drawn is not None and self._task is not None:
            self._drawn.advance(self._task, amount)

    def note(self, text: str) -> None:
        """Show a few words behind the bar."""
        if self._drawn is not None and self._task is not None:
            self._drawn.update(self._task, note=clean(text))

    def stop(self) -> None:
        """Take the bar away."""
        if self._drawn is not None:
            self._drawn.stop()


def _columns() -> list[progress.ProgressColumn]:
    from rich import progress
    from rich.text import Text

    class Done(progress.ProgressColumn):
        """The share done, or the amount where the whole is unknown."""

        def render(self, task: progress.Task) -> Text:
            if task.total is not None:
                return Text(f"{task.percentage:3.0f}%")
            return Text(amount(task.completed, task.fields["unit"]))

    class Rate(progress.ProgressColumn):
        """Units a second."""

        def render(self, task: progress.Task) -> Text:
            return Text(rate(task.speed, task.fields["unit"]), style="progress.data.speed")

    class Note(progress.ProgressColumn):
        """What the work says beside the bar."""

        def render(self, task: progress.Task) -> Text:
            return Text(task.fields["note"], overflow="ellipsis", no_wrap=True)

    return [
        progress.TextColumn("{task.description}", markup=False),
        progress.BarColumn(bar_width=24),
        Done(),
        Rate(),
        progress.TimeRemainingColumn(compact=True),
        Note(),
    ]


def amount(done: float, unit: str) -> str:
    """Return so much of a unit: 3.2 MB, 120 steps."""
    return size(done) if unit == "bytes" else f"{done:,.4g} {unit}"


def rate(speed: float | None, unit: str) -> str:
    """Return a speed with its unit: 3.2 MB/s, 120 steps/s."""
    return "" if speed is None else f"{amount(speed, unit)}/s"
