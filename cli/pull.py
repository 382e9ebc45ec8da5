"""poolreg pull: bring what a published pool holds and this one lacks."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from poolreg.errors import PoolregError

from .options import REPO_TYPES, examples, formatted, pool_option, taken_options
from .output import many, message, show, size
from .progress import bar
from .push import show_conflicts

if TYPE_CHECKING:
    from poolreg.pool import Pool


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
@click.option("--repo-type", type=REPO_TYPES, default="model", show_default=True,
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


@contextlib.contextmanager
def opened(directory: Path | None, folder: str | None) -> Iterator[Pool]:
    """Open the pool to pull into, or make it; one that was made for nothing goes again."""
    from poolreg.pool import Pool

    if directory is None or (directory / "FORMAT").exists():
        with Pool.open(directory or folder) as pool:
            yield pool
        return
    with Pool.create(directory) as pool:
        try:
            yield pool
        except PoolregError:
            # What was fetched before the network failed stays, for the next try.
            if not pool.registry.journal.segments() and not any((pool.root / "tmp").iterdir()):
                shutil.rmtree(directory)
            raise


def say_pulled(done: Any, root: Path, form: str) -> None:
    """Tell what came."""
    if form != "table":
        show([vars(done)], form, names="version")
        return
    if not done.records and not done.objects:
        message(f"{root} has all of {done.place}")
    else:
        message(
            f"{root} took {many(done.records, 'record')} and {many(done.objects, 'object')}, "
            f"{size(done.bytes)}, from {done.place} {done.version[:12]}".rstrip()
        )
    if done.rebuilt:
        message(f"rebuilt {many(done.rebuilt, 'merge')} by recipe")
    if done.left:
        message(f"left {many(done.left, 'object')} there; bring models with: poolreg pull --only")
    if done.absent:
        message(f"{many(done.absent, 'object')} that records name are not there")
    show_conflicts(done.conflicts, "here")
