"""How long work tells what it is doing; the command line draws it, a library call may ignore it."""

from __future__ import annotations

from typing import Protocol


class Progress(Protocol):
    """Receives the course of one long piece of work."""

    def start(self, what: str, total: int, unit: str) -> None:
        """A stage named `what` begins, of `total` units (0: unknown) of "bytes", "tokens", …."""

    def advance(self, amount: int) -> None:
        """So many more units of the stage are done."""

    def note(self, text: str) -> None:
        """Something worth showing beside the bar, such as a loss or a name."""


class Silent:
    """Shows nothing."""

    def start(self, what: str, total: int, unit: str) -> None:
        """Ignore the stage."""

    def advance(self, amount: int) -> None:
        """Ignore the advance."""

    def note(self, text: str) -> None:
        """Ignore the note."""


SILENT = Silent()
