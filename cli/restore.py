"""poolreg restore: what was removed, and bringing it back."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING

import click

from . import tables
from .names import complete
from .options import examples, formatted, in_pool
from .output import many, message, show, text
from .progress import bar

if TYPE_CHECKING:
    from poolreg.pool import Pool
    from poolreg.upkeep.removal import Restorable


@click.command(
    epilog=examples(
        "poolreg restore",
        "poolreg restore code",
        "poolreg restore 3f9a0c12 --as code-2",
    )
)
@click.argument("names", nargs=-1, metavar="[NAME]...", shell_complete=complete("removed"))
@click.option(
    "--kind", type=click.Choice(["partition", "evalset", "model"]),
    help="Of what kind they are, where one name has several meanings.",
)  # fmt: skip
@click.option("--as", "name", metavar="NAME", help="Call it so from now on.")
@in_pool
@formatted
def restore(
    pool: Pool, names: tuple[str, ...], kind: str | None, name: str | None, form: str
) -> None:
    """Bring back what was removed, or list it.

    NAME is what it was called, or the beginning of its digest. Without a NAME all that is removed
    is listed, with what of its data is still here.
    """
    if not names:
        if name:
            raise click.UsageError("--as needs the NAME of what to restore")
        _list(pool, kind, form)
        return
    with bar() as progress:
        done = pool.restore(names, kind=kind, name=name, progress=progress)
    if form != "table":
        show([asdict(thing) for thing in done], form, names="digest")
        return
    for thing in done:
        made = ": its weights were made again from its parents" if thing.rebuilt else ""
        message(f"restored {thing.kind} {thing.name} ({thing.digest[:12]}){made}")
        if thing.left:
            message(
                f"note: {many(thing.left, 'file')} of it are where the pool was pulled from; "
                f"bring them with: poolreg pull --only {thing.name}"
            )


def _list(pool: Pool, kind: str | None, form: str) -> None:
    found = [thing for thing in pool.removed() if kind in (None, thing.kind)]
    if not found and form == "table":
        message("nothing is removed")
        return
    rows = [_row(thing) for thing in found]
    if form == "table":
        rows = [{**row, "name": row["name"] or "", "state": _state(thing)}
                for row, thing in zip(rows, found, strict=True)]  # fmt: skip
    show(rows, form, tables.REMOVED)


def _row(thing: Restorable) -> dict[str, object]:
    return {key: value for key, value in asdict(thing).items() if key not in ("names", "ever")}


def _state(thing: Restorable) -> str:
    if thing.missing:
        return "collected"
    left = f"; {many(thing.left, 'file')} where it was pulled from" if thing.left else ""
    return f"kept until {text(thing.until)} or later{left}"
