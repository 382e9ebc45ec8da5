"""poolreg pull: bring what a published pool holds and this one lacks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from .options import REPO_TYPES, examples, formatted, pool_option
from .progress import bar
from .sharing import opened, say_pulled, taken_options


@click.command(
    epilog=examples(
        "poolreg pull you/pool my-pool",
        "poolreg pull you/pool my-pool --results-only",
        "poolreg pull --only code+prose",
        "poolreg pull you/results my-pool --repo-type dataset",
        "poolreg pull file:///mnt/share/pool",
    )
)
@click.argument("place", required=False, metavar="[REPO|URL]")
@click.argument("directory", required=False, type=click.Path(path_type=Path), metavar="[DIR]")
@click.option("--repo-type", type=REPO_TYPES,
              help="What kind of repository it is.")  # fmt: skip
@click.option("--revision", metavar="REVISION", help="Branch, tag or commit (default: main).")
@taken_options
@pool_option
@formatted
def pull(
    place: str | None, directory: Path | None, folder: str | None, form: str, **options: Any
) -> None:
    """Bring what a published pool has and this one lacks.

    Into DIR, which becomes a pool if it is none, else into the present pool. Everything is
    checked before it counts: bytes against digests, models as `model add` does. Pulling is a
    union: nothing that is here changes, and names that mean something else here are kept as
    ORIGIN/name. Without REPO, from where the pool was last pushed to or pulled from.
    """
    if directory and folder:
        raise click.UsageError("give DIR or --pool, not both")
    with bar() as progress, opened(directory, folder) as pool:
        done = pool.pull(place, progress=progress, **options)
        root = pool.root
    say_pulled(done, root, form)
