"""poolreg query: the named analysis queries."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import click

from . import tables
from .names import complete
from .options import examples, formatted, queried
from .output import Column, records, show

if TYPE_CHECKING:
    from poolreg.store.sandbox import Table


@click.command(
    epilog=examples(
        "poolreg query",
        "poolreg query leaderboard",
        "poolreg query marginal --json",
        "poolreg query leaderboard --remote you/pool",
    )
)
@click.argument("name", required=False, shell_complete=complete("query"))
@queried
@formatted
def query(run: Callable[..., Table], name: str | None, form: str) -> None:
    """Run a named analysis query, or list them all.

    They are written in SQL over the tables and views that `poolreg sql` sees.
    """
    from poolreg.pool import Pool

    if name is None:
        show([{"name": q.name, "description": q.description} for q in Pool.queries()],
             form, tables.QUERIES)  # fmt: skip
        return
    table = run(Pool.named_query(name))
    rows = records(table.columns, table.rows)
    columns = [Column(key, key.replace("_", " ")) for key in (rows[0] if rows else table.columns)]
    show(rows, form, columns, names=columns[0].key)
