"""poolreg diff: the tensors in which two models differ."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING

import click

from . import tables
from .names import complete
from .options import examples, formatted, in_pool
from .output import message, show
from .progress import bar

if TYPE_CHECKING:
    from poolreg.pool import Pool


@click.command(epilog=examples("poolreg diff base code/1", "poolreg diff base code/1 --json"))
@click.argument("a", metavar="A", shell_complete=complete("model"))
@click.argument("b", metavar="B", shell_complete=complete("model"))
@in_pool
@formatted
def diff(pool: Pool, a: str, b: str, form: str) -> None:
    """Show the tensors in which models A and B differ."""
    with bar() as progress:
        tensors = pool.diff(a, b, progress=progress)
    if form == "table" and not tensors:
        message("the models hold the same tensors")
        return
    show([asdict(tensor) for tensor in tensors], form, tables.DIFF, names="tensor")
