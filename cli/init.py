"""poolreg init: make an empty pool."""

from __future__ import annotations

import click

from .names import pool_folder
from .options import examples
from .output import message


@click.command(epilog=examples("poolreg init", "poolreg init /data/pool"))
@click.argument("directory", metavar="[DIR]", required=False)
def init(directory: str | None) -> None:
    """Make an empty pool in the folder DIR (default: pool)."""
    from poolreg.pool import Pool

    folder = directory or pool_folder(click.get_current_context()) or "pool"
    with Pool.create(folder) as pool:
        message(f"made a pool in {pool.root}")
    message("next: poolreg partition add NAME FILE…")
