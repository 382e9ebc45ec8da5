"""poolreg sql: any question to the catalog, read-only."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import TYPE_CHECKING

import click

from .options import examples, formatted, queried
from .output import Column, records, show

if TYPE_CHECKING:
    from poolreg.store.sandbox import Table


@click.command(
    epilog=examples(
        'poolreg sql "from scores"',
        "poolreg sql \"select label, perplexity from scores where evalset = 'wiki'\" --json",
        "poolreg sql - < question.sql",
        'poolreg sql --remote you/pool "from scores"',
    )
)
@click.argument("statement", metavar="SQL")
@click.option(
    "--max-seconds", type=click.FloatRange(min=0, min_open=True), default=60.0, show_default=True,
    help="Give up after so long.",
)  # fmt: skip
@queried
@formatted
def sql(run: Callable[..., Table], statement: str, max_seconds: float, form: str) -> None:
    """Run a DuckDB query over a catalog, read-only.

    SQL is the query, or - to read it from stdin. The catalog cannot be changed, and files and
    extensions are out of reach. Tables and views are described in docs/schema.md; start with
    scores, models, partitions and ledger. With --remote, what the query needs is read from the
    tables of a pushed pool.
    """
    text = sys.stdin.read() if statement == "-" else statement
    table = run(text, seconds=max_seconds)
    rows = records(table.columns, table.rows)
    columns = [Column(name, name) for name in (rows[0] if rows else table.columns)]
    show(rows, form, columns, names=columns[0].key if columns else "")
