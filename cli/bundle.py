"""poolreg bundle: a pool, or a part of one, as a single file."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from .options import examples, formatted, in_pool, pool_option
from .progress import bar
from .sharing import opened, say_pulled, say_pushed, sent_options, taken_options

if TYPE_CHECKING:
    from poolreg.pool import Pool


@click.group(
    epilog=examples("poolreg bundle create pool.tar", "poolreg bundle apply pool.tar my-pool")
)
def bundle() -> None:
    """Move pools as single files, without a network."""


@bundle.command(
    epilog=examples(
        "poolreg bundle create pool.tar",
        "poolreg bundle create results.tar --results-only",
        "poolreg bundle create two.tar --only code+prose --force",
    )
)
@click.argument("file", type=click.Path(path_type=Path, dir_okay=False))
@sent_options
@click.option("--force", is_flag=True, help="Replace a file that is there.")
@in_pool
@formatted
def create(pool: Pool, file: Path, form: str, **options: Any) -> None:
    """Write the pool to one tar file.

    The file holds what a push would send, each piece compared with its digest while it is
    written. The same pool gives the same bytes.
    """
    with bar() as progress:
        done = pool.create_bundle(file, progress=progress, **options)
    say_pushed(done, form, "wrote", names="place")


@bundle.command(
    epilog=examples(
        "poolreg bundle apply pool.tar my-pool",
        "poolreg bundle apply pool.tar --results-only",
    )
)
@click.argument("file", type=click.Path(path_type=Path, dir_okay=False))
@click.argument("directory", required=False, type=click.Path(path_type=Path), metavar="[DIR]")
@taken_options
@pool_option
@formatted
def apply(
    file: Path, directory: Path | None, folder: str | None, form: str, **options: Any
) -> None:
    """Take in what a bundle holds and this pool lacks.

    Into DIR, which becomes a pool if it is none, else into the present pool. All is checked as
    `poolreg pull` does.
    """
    if directory and folder:
        raise click.UsageError("give DIR or --pool, not both")
    with bar() as progress, opened(directory, folder) as pool:
        done = pool.apply_bundle(file, progress=progress, **options)
        root = pool.root
    say_pulled(done, root, form)
