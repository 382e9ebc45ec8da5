"""poolreg plot: one figure of the report as a file."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from .names import complete
from .options import comma_names, examples, in_pool
from .output import Column, message, show

if TYPE_CHECKING:
    from poolreg.pool import Pool


@click.command(
    epilog=examples(
        "poolreg plot",
        "poolreg plot heatmap -o heatmap.svg",
        "poolreg plot proxy --on wiki,news -o proxy.png --dpi 200",
    )
)
@click.argument("name", required=False)
@click.option(
    "--on", metavar="EVALSET", multiple=True, callback=comma_names,
    shell_complete=complete("evalset"),
    help="Evalsets to show: again for each, or with commas (default: all).",
)  # fmt: skip
@click.option("-o", "--output", "out", type=click.Path(path_type=Path), metavar="FILE",
              help="A file ending in .svg or .png (default: NAME.svg).")  # fmt: skip
@click.option("--dpi", type=click.IntRange(20, 1200), default=150, show_default=True,
              help="Resolution of a .png.")  # fmt: skip
@click.option("--force", is_flag=True, help="Replace the file if it is there.")
@in_pool
def plot(
    pool: Pool, name: str | None, on: list[str], out: Path | None, dpi: int, force: bool
) -> None:
    """Draw one figure of the report, or list them all."""
    if name is None:
        columns = [Column("name"), Column("shows")]
        show([{"name": name, "shows": what} for name, what in pool.figures().items()],
             "table", columns)  # fmt: skip
        return
    chart = pool.plot(name, out or Path(f"{name}.svg"), on, dpi=dpi, force=force)
    click.echo(out or f"{name}.svg")
    message(chart.reading)
