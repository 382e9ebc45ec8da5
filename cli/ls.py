"""poolreg ls: what the pool holds."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from . import tables
from .options import examples, formatted, in_pool
from .output import many, message, show

if TYPE_CHECKING:
    from poolreg.pool import Pool


@click.command(epilog=examples("poolreg ls", "poolreg ls --json", "poolreg ls --format quiet"))
@in_pool
@formatted
def ls(pool: Pool, form: str) -> None:
    """List the partitions, evalsets and models of the pool."""
    kinds = {
        "partition": (pool.partitions(), tables.PARTITIONS),
        "evalset": (pool.evalsets(), tables.EVALSETS),
        "model": (pool.models(), tables.MODELS),
    }
    if form != "table":
        everything = [{"kind": kind, **row} for kind, (rows, _) in kinds.items() for row in rows]
        show(everything, form, tables.OVERVIEW)
        return
    message(f"pool {pool.root}")
    for kind, (rows, columns) in kinds.items():
        click.echo(f"\n{many(len(rows), kind)}")
        if rows:
            show(rows, form, columns)
    if not any(rows for rows, _ in kinds.values()):
        message("next: poolreg partition add NAME FILE…")
