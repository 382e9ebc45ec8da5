"""poolreg stats: how large the pool is, and why."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from . import tables
from .options import examples, formatted, in_pool
from .output import many, message, plain, show, size, to_json

if TYPE_CHECKING:
    from poolreg.pool import Pool
    from poolreg.upkeep.stats import Stats


@click.command(
    epilog=examples("poolreg stats", "poolreg stats --biggest 30", "poolreg stats --json")
)
@click.option("--biggest", type=click.IntRange(min=0), default=10, show_default=True, metavar="N",
              help="How many of the biggest objects to list.")  # fmt: skip
@in_pool
@formatted
def stats(pool: Pool, biggest: int, form: str) -> None:
    """Show what the pool's bytes are.

    Records by kind, the journal, objects by what they hold, what sharing files between models
    and not storing merges saves, what is missing or of no record, and the biggest objects.
    """
    found = pool.stats(biggest=biggest)
    if form == "json":
        click.echo(to_json(plain(found)))
        return
    show(_rows(found), form, tables.STATS, names="what")
    if form == "table":
        if found.biggest:
            click.echo()
            show([{**vars(big), "owner": _owner(big.owner, big.owners)} for big in found.biggest],
                 form, tables.BIGGEST)  # fmt: skip
        if left := sum(part.left_elsewhere for part in found.contents):
            message(f"{many(left, 'object')} of the missing stayed where the pool was pulled from")
        message(f"{size(found.bytes)} in all; {size(found.free_bytes)} free on the disk")


def _rows(found: Stats) -> list[dict[str, Any]]:
    rows: list[tuple[str, str, int | None, int | None]] = []
    rows += [("records", kind, number, None) for kind, number in found.records.items() if number]
    rows += [("journal", "segments", found.journal.segments, found.journal.bytes)]
    rows += [("journal", "largest", None, found.journal.largest_bytes)]
    rows += [("objects", part.content, part.objects, part.bytes) for part in found.contents]
    rows += [("saved", "files that models share", None, found.model_files.saved_bytes)]
    rows += [("saved", "merges not stored", found.merges, found.merges_bytes)]
    rows += [("missing", part.content, part.missing, part.missing_bytes)
             for part in found.contents if part.missing]  # fmt: skip
    rows += [("files", "of no record", found.unnamed.files, found.unnamed.bytes)]
    rows += [("files", name, place.files, place.bytes) for name, place in found.places.items()]
    return [dict(zip(("of", "what", "count", "bytes"), row, strict=True)) for row in rows]


def _owner(first: str, owners: int) -> str:
    if not owners:
        return "no record"
    return first if owners == 1 else f"{first} and {owners - 1:,} more"
