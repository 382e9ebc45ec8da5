"""poolreg query: the named analysis queries."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from . import tables
from .names import complete
from .options import examples, formatted, in_pool
from .output import Column, records, show

if TYPE_CHECKING:
    from poolreg.pool import Pool


@click.command(
    epilog=examples("poolreg query", "poolreg query leaderboard", "poolreg query marginal --json")
)
@click.argument("name", required=False, shell_complete=complete("query"))
@in_pool
@formatted
def query(pool: Pool, name: str | None, form: str) -> None:
    """Run a named analysis query, or list them all.

    They are written in SQL over the tables and views that `poolreg sql` sees.
    """
    if name is None:
        show([{"name": q.name, "description": q.description} for q in pool.queries()],
             form, tables.QUERIES)  # fmt: skip
        return
    table = pool.query(name)
    rows = records(table.columns, table.rows)
    columns = [Column(key, key.replace("_", " ")) for key in (rows[0] if rows else table.columns)]
    show(rows, form, columns, names=columns[0].key)
