"""poolreg evalset: the named texts to measure on."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from . import tables
from .added import say_added
from .names import complete
from .options import examples, formatted, in_pool
from .output import message, show_facts
from .output import show as show_rows
from .progress import bar

if TYPE_CHECKING:
    from poolreg.pool import Pool

_NAME = click.argument("name", shell_complete=complete("evalset"))


@click.group(epilog=examples("poolreg evalset add wiki heldout/wiki.jsonl", "poolreg evalset ls"))
def evalset() -> None:
    """Store and list the texts to measure on."""


@evalset.command(
    "add",
    epilog=examples(
        "poolreg evalset add wiki heldout/wiki.jsonl",
        "poolreg evalset add code heldout/*.py",
    ),
)
@click.argument("name")
@click.argument("files", nargs=-1, required=True, type=click.Path(), metavar="FILE...")
@click.option(
    "--field", default="text", show_default=True, help="Where .jsonl and .parquet hold the text."
)
@click.option("--replace", is_flag=True, help="Move the name from other text to this one.")
@in_pool
def add(pool: Pool, name: str, files: tuple[str, ...], field: str, replace: bool) -> None:
    """Copy the text of files or folders into the pool as the evalset NAME.

    Documents that also stand in a partition are counted, and answers on them are marked.
    """
    with bar() as progress:
        added = pool.add_evalset(name, files, field=field, replace=replace, progress=progress)
    say_added("evalset", added)


@evalset.command("ls", epilog=examples("poolreg evalset ls", "poolreg evalset ls --json"))
@in_pool
@formatted
def ls(pool: Pool, form: str) -> None:
    """List the evalsets."""
    show_rows(pool.evalsets(), form, tables.EVALSETS)


@evalset.command("show", epilog=examples("poolreg evalset show wiki"))
@_NAME
@in_pool
@formatted
def show(pool: Pool, name: str, form: str) -> None:
    """Show the evalset NAME, and partitions that share its text."""
    show_facts(pool.evalset(name), form, {"shared": tables.SHARED})


@evalset.command("rm", epilog=examples("poolreg evalset rm wiki"))
@_NAME
@in_pool
def rm(pool: Pool, name: str) -> None:
    """Take the evalset NAME out of the pool.

    What was measured stays, and adding it again restores it.
    """
    digest = pool.remove("evalset", name)
    message(f"removed evalset {name} ({digest[:12]})")
