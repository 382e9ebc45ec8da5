"""poolreg report: the pool as one page to look at."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from .names import complete
from .options import comma_names, examples, in_pool
from .output import message, size
from .progress import bar

if TYPE_CHECKING:
    from poolreg.pool import Pool

_PORT = 8000


@click.command(
    epilog=examples(
        "poolreg report",
        "poolreg report --on wiki,news -o news.html",
        "poolreg report --serve --port 0",
    )
)
@click.option(
    "--on", metavar="EVALSET", multiple=True, callback=comma_names,
    shell_complete=complete("evalset"),
    help="Evalsets to show: again for each, or with commas (default: all).",
)  # fmt: skip
@click.option("-o", "--output", "out", type=click.Path(path_type=Path), metavar="FILE",
              help="The page to write (default: report.html).")  # fmt: skip
@click.option("--force", is_flag=True, help="Replace the file if it is there.")
@click.option("--serve", "serving", is_flag=True,
              help="Show it to a browser on this machine until Ctrl-C.")  # fmt: skip
@click.option("--port", type=click.IntRange(0, 65535), default=_PORT, show_default=True,
              help="With --serve: where; 0 takes a free one.")  # fmt: skip
@in_pool
def report(
    pool: Pool, on: list[str], out: Path | None, force: bool, serving: bool, port: int
) -> None:
    """Write a page that shows what the pool knows.

    One file that works offline: the answer in words, figures, and tables with the SQL that made
    them and downloads. Nothing is measured for it. With --serve and no -o nothing is written.
    """
    with bar() as progress:
        if serving and out is None:
            page = pool.report_page(on, progress=progress).encode()
        else:
            out = pool.report(out or Path("report.html"), on, force=force, progress=progress)
            page = out.read_bytes()
    if out is not None:
        click.echo(out)
        message(f"{size(len(page))}; open it in a browser")
    if serving:
        from poolreg.report.serve import serve

        serve(page, port, ready=click.echo)
