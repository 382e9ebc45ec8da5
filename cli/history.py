"""poolreg log: what happened in the pool."""

from __future__ import annotations

from datetime import datetime
from typing import TYPE_CHECKING

import click

from . import tables
from .names import complete
from .options import examples, formatted, in_pool, moment
from .output import show

if TYPE_CHECKING:
    from poolreg.pool import Pool


@click.command(
    epilog=examples(
        "poolreg log",
        "poolreg log python",
        "poolreg log -n 20 --since 7d",
        "poolreg log --since 2026-03-01 --json",
    )
)
@click.argument("name", required=False, shell_complete=complete("partition", "model", "evalset"))
@click.option("-n", "--limit", type=click.IntRange(min=1), metavar="N",
              help="Only the newest N rows.")  # fmt: skip
@click.option("--since", type=moment, metavar="TIME",
              help="Only what is newer: a date or time (UTC), or 7d, 12h ago.")  # fmt: skip
@in_pool
@formatted
def log(
    pool: Pool, name: str | None, limit: int | None, since: datetime | None, form: str
) -> None:  # fmt: skip
    """Show what happened, newest first.

    Names given and moved, what was added, trained, compressed, merged, removed and restored, and
    pushes and pulls. With NAME, or the beginning of a digest, all that happened to what was ever
    called so. Evaluations are one row a day.
    """
    rows = pool.log(name, since=since, limit=limit)
    if form == "quiet":  # what concerns the whole pool has no digest
        rows = [row for row in rows if row["digest"]]
    show(rows, form, tables.HISTORY, names="digest")
