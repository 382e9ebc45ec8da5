"""poolreg journal: the segments that a pool's records stand in."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from .options import examples, formatted, in_pool
from .output import many, message, show, size
from .progress import bar
from .tables import SEGMENTS

if TYPE_CHECKING:
    from poolreg.pool import Pool


@click.group(epilog=examples("poolreg journal ls", "poolreg journal compact"))
def journal() -> None:
    """List or compact the journal's segments."""


@journal.command("ls", epilog=examples("poolreg journal ls", "poolreg journal ls --json"))
@in_pool
@formatted
def ls(pool: Pool, form: str) -> None:
    """List the segments, oldest first.

    Each process that writes leaves one.
    """
    show(pool.segments(), form, SEGMENTS, names="segment")


@journal.command("compact", epilog=examples("poolreg journal compact"))
@in_pool
@formatted
def compact(pool: Pool, form: str) -> None:
    """Merge many segments into one.

    The records stay what they are, in the same words; what a killed process left of an
    unfinished line goes. Needs the pool for itself for a moment, and may be killed at any time.
    """
    with bar() as progress:
        done = pool.compact(progress=progress)
    if form != "table":
        show([vars(done)], form, names="segments")
    elif done.segments == done.segments_before:
        message(f"nothing to merge: {many(done.segments, 'segment')}, {size(done.bytes)}")
    else:
        message(f"{many(done.segments_before, 'segment')} became {done.segments}: "
                f"{many(done.records, 'record')}, {size(done.bytes)}")  # fmt: skip
