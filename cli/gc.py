"""poolreg gc: delete what nothing needs any more."""

from __future__ import annotations

from datetime import timedelta
from typing import TYPE_CHECKING, Any

import click

from . import tables
from .options import examples, formatted, in_pool, span
from .output import many, message, show, size
from .progress import bar

if TYPE_CHECKING:
    from poolreg.pool import Pool
    from poolreg.upkeep.collection import Plan

_BIGGEST = 10


@click.command(
    epilog=examples("poolreg gc --dry-run", "poolreg gc", "poolreg gc --grace 12h --json")
)
@click.option("-n", "--dry-run", is_flag=True, help="Say what would go; delete nothing.")
@click.option(
    "--grace", metavar="TIME", default="14d", show_default=True,
    callback=lambda _, __, value: span(value),
    help="Keep what is younger: 14d, 12h, 30min or 0.",
)  # fmt: skip
@in_pool
@formatted
def gc(pool: Pool, dry_run: bool, grace: timedelta, form: str) -> None:
    """Delete what nothing needs any more.

    That is the data of what was removed, objects that no record names (the traces of killed
    commands, and what pulls keep for the next one), and leftovers in tmp/, which stay for a day
    at least. Names, records and results are never deleted.

    Other commands may go on reading; while one writes, gc waits a little and ends with code 11.
    Where that cannot be told (a file system whose locks do not reach other machines) and while a
    copy of the pool arrives, the grace is what protects: make it longer than they take.
    """
    with bar() as progress:
        plan = pool.gc(grace=grace, dry_run=dry_run, progress=progress)
    if form != "table":
        facts: dict[str, Any] = _facts(plan, dry_run=dry_run)
        if form == "csv":
            show(facts["reasons"], form, tables.GARBAGE)
        elif form == "quiet":
            show([{"path": item.path} for item in plan.garbage], form, names="path")
        else:
            show([facts], form)
        return
    if rows := _reasons(plan):
        show(rows, form, tables.GARBAGE)
    if plan.garbage:
        click.echo()
        show([vars(item) for item in plan.biggest(_BIGGEST)], form, tables.GARBAGE_FILES)
    freed = f"{many(len(plan.garbage), 'file')}, {size(plan.bytes)}"
    message(f"would delete {freed}" if dry_run else f"deleted {freed}")


def _facts(plan: Plan, *, dry_run: bool) -> dict[str, Any]:
    return {
        "dry_run": dry_run,
        "grace_seconds": plan.grace.total_seconds(),
        "files": len(plan.garbage),
        "bytes": plan.bytes,
        "kept": plan.kept,
        "reasons": _reasons(plan),
        "biggest": [vars(item) for item in plan.biggest(_BIGGEST)],
    }


def _reasons(plan: Plan) -> list[dict[str, Any]]:
    gone = {amount.reason: amount for amount in plan.amounts}
    waiting = {amount.reason: amount for amount in plan.waiting}
    return [
        {
            "reason": reason,
            "files": gone[reason].files if reason in gone else 0,
            "bytes": gone[reason].bytes if reason in gone else 0,
            "waiting": waiting[reason].files if reason in waiting else 0,
            "waiting_bytes": waiting[reason].bytes if reason in waiting else 0,
        }
        for reason in dict.fromkeys((*gone, *waiting))
    ]
