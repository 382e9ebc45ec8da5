"""poolreg verify: is everything there, and is it what it was?"""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from poolreg.errors import CheckFailed

from .options import examples, formatted, in_pool
from .output import many, message, show, size
from .progress import bar
from .tables import FINDINGS

if TYPE_CHECKING:
    from poolreg.pool import Pool


@click.command(epilog=examples("poolreg verify", "poolreg verify --full"))
@click.option("--full", is_flag=True, help="Hash every object again, too.")
@in_pool
@formatted
def verify(pool: Pool, full: bool, form: str) -> None:
    """Check that the pool is whole.

    Reads the journal, resolves the names, and looks for every object that a record names, with
    its size. Changes nothing; ends with code 3 and a list where something is wrong.
    """
    with bar() as progress:
        found = pool.verify(full=full, progress=progress)
    if form == "table":
        if found.findings:
            show([vars(finding) for finding in found.findings], form, FINDINGS)
        hashed = f", {many(found.hashed, 'object')} hashed" if full else ""
        message(f"{many(found.records, 'record')}, {many(found.objects, 'object')}, "
                f"{size(found.bytes)}{hashed}")  # fmt: skip
        if found.elsewhere:
            message(f"{many(found.elsewhere, 'weights file')} were left where the pool came from")
    else:
        show([vars(found)], form, names="records")
    if found.findings:
        raise CheckFailed(f"the pool has {many(len(found.findings), 'problem')}")
