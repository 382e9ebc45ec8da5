"""poolreg show: what a name, digest or expression stands for."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from . import tables
from .names import complete
from .options import examples, formatted, in_pool
from .output import Column, show_facts
from .output import show as show_rows

if TYPE_CHECKING:
    from poolreg.pool import Pool

PARTS: dict[str, dict[str, tuple[Column, ...]]] = {
    "partition": {
        "units": tables.UNITS, "files": tables.FILES, "shared": tables.SHARED,
    },
    "evalset": {"shared": tables.SHARED},
    "model": {"runs": tables.RUNS, "files": tables.MODEL_FILES},
    "mixture": {"components": tables.COMPONENTS},
}  # fmt: skip


@click.command(epilog=examples("poolreg show python", 'poolreg show "2*python+cpp" --json'))
@click.argument("name", shell_complete=complete("partition", "model", "evalset"))
@in_pool
@formatted
def show(pool: Pool, name: str, form: str) -> None:
    """Show what NAME is: partition, evalset, model or mixture."""
    found = pool.describe(name)
    if form != "table":
        show_rows(found, form, names="digest")
        return
    for number, facts in enumerate(found):
        if number:
            click.echo()
        show_facts(facts, form, PARTS[facts["kind"]])
