"""poolreg doctor: does anything around the pool stand in its way?"""

from __future__ import annotations

import click

from poolreg.errors import CheckFailed

from . import tables
from .options import examples, formatted, pool_option
from .output import many, message, show


@click.command(epilog=examples("poolreg doctor", "poolreg doctor --torch", "poolreg doctor --json"))
@click.option("--torch", is_flag=True, help="Start torch and look for a GPU, too.")
@pool_option
@formatted
def doctor(torch: bool, folder: str | None, form: str) -> None:
    """Check versions, disk, locks and clock.

    Packages against what poolreg needs; free space, and whether the file system does what a pool
    rests on; who is at the pool's locks; what broken-off work left; catalog and clock. Changes
    nothing, works on a read-only pool, and without a pool. Ends with code 3 where something failed.
    """
    from poolreg.doctor.examination import doctor as check

    found = check(folder, torch=torch)
    rows = [vars(line) for line in found]
    if form == "table":
        rows = [{**row, "said": _said(row["found"], row["way_out"])} for row in rows]
    show(rows, form, tables.DOCTOR if form == "table" else (), names="check")
    failed = sum(line.status == "failed" for line in found)
    warnings = sum(line.status == "warning" for line in found)
    if failed:
        raise CheckFailed(f"{many(failed, 'check')} failed", hint="the table says the way out")
    if form == "table":
        message(f"nothing failed, {many(warnings, 'warning')}")


def _said(found: str, way_out: str) -> str:
    return f"{found} → {way_out}" if way_out else found
