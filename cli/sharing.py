"""What push, pull and bundle share: which weights travel, where they arrive, what is said of it."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from poolreg.errors import Locked, PoolregError

from .names import complete
from .options import Command, comma_names
from .output import many, message, show, size
from .tables import CLASHES

if TYPE_CHECKING:
    from poolreg.pool import Pool

_ONLY = click.option(
    "--only", metavar="EXPR", multiple=True, callback=comma_names,
    shell_complete=complete("model", "partition"),
    help="Only the weights of these models and of what these mixtures average: again for each, "
    "or with commas. Records and results go along in any case.",
)  # fmt: skip
_RESULTS_ONLY = click.option(
    "--results-only", is_flag=True, help="No weights, only records, results and texts."
)


def sent_options(command: Command) -> Command:
    """Add what limits the weights that are sent."""
    merges = click.option(
        "--merges", is_flag=True, help="Also the weights of kept merges, else sent as recipes."
    )
    return _ONLY(_RESULTS_ONLY(merges(command)))


def taken_options(command: Command) -> Command:
    """Add what limits the weights that are taken, and how they are taken."""
    trust = click.option(
        "--trust-code", is_flag=True, help="Accept models that run Python of their own."
    )
    origin = click.option(
        "--as", "origin", metavar="NAME", help="Said before names that are taken here."
    )
    return _ONLY(_RESULTS_ONLY(trust(origin(command))))


@contextlib.contextmanager
def opened(directory: Path | None, folder: str | None) -> Iterator[Pool]:
    """Open the pool to pull into, or make it; one that was made for nothing goes again."""
    from poolreg.pool import Pool

    if directory is None or (directory / "FORMAT").exists():
        with Pool.open(directory or folder) as pool:
            yield pool
        return
    with Pool.create(directory) as pool:
        try:
            yield pool
        except Locked:
            raise  # another process works in it
        except PoolregError:
            # What was fetched before the network failed stays, for the next try.
            if not pool.registry.journal.segments() and not any((pool.root / "tmp").iterdir()):
                shutil.rmtree(directory)
            raise


def say_pushed(done: Any, form: str, verb: str = "sent", *, names: str = "version") -> None:
    """Tell what went out; `verb` is sent, would send or wrote."""
    if form != "table":
        show([vars(done)], form, names=names)
        return
    what = f"{many(done.records, 'record')} and {many(done.objects, 'object')}, {size(done.bytes)}"
    if verb != "sent":
        message(f"{verb} {what} to {done.place}")
    elif done.changed:
        message(f"sent {what} to {done.place} {done.version[:12]}".rstrip())
    else:
        message(f"{done.place} has all of it; nothing was sent")
    if done.absent:
        message(f"{many(done.absent, 'object')} that records name are missing")
    _show_clashes(done.clashes, "there")


def say_pulled(done: Any, root: Path, form: str) -> None:
    """Tell what came."""
    if form != "table":
        show([vars(done)], form, names="version")
        return
    if not done.records and not done.objects:
        message(f"{root} has all of {done.place}")
    else:
        message(
            f"{root} took {many(done.records, 'record')} and {many(done.objects, 'object')}, "
            f"{size(done.bytes)}, from {done.place} {done.version[:12]}".rstrip()
        )
    if done.rebuilt:
        message(f"rebuilt {many(done.rebuilt, 'merge')} by recipe")
    if done.left:
        message(f"left {many(done.left, 'object')} there; bring models with: poolreg pull --only")
    if done.absent:
        message(f"{many(done.absent, 'object')} that records name are not there")
    if done.moved:
        message(f"given another meaning by those who knew it: {', '.join(done.moved)}")
    _show_clashes(done.clashes, "here")


def _show_clashes(clashes: Any, where: str) -> None:
    """Tell which names mean something else on the other side."""
    if clashes:
        message(f"names that mean something else {where}:")
        show([vars(clash) for clash in clashes], "table", CLASHES)
