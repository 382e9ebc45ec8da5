"""poolreg partition: the named parts of the training corpus."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING

import click

from poolreg.errors import Drift

from . import tables
from .added import say_added
from .names import complete
from .options import examples, formatted, in_pool
from .output import many, message, show_facts
from .output import show as show_rows
from .progress import bar

if TYPE_CHECKING:
    from poolreg.pool import Pool

_NAME = click.argument("name", shell_complete=complete("partition"))


@click.group(
    epilog=examples(
        "poolreg partition add code src/ --units 4",
        "poolreg partition ls",
        "poolreg partition check",
    )
)
def partition() -> None:
    """Name, list and check the parts of the training corpus."""


@partition.command(
    "add",
    epilog=examples(
        "poolreg partition add prose books/*.txt",
        "poolreg partition add web crawl.jsonl.gz --field content --units 8",
        "poolreg partition add python src/ --parent code",
    ),
)
@click.argument("name")
@click.argument("files", nargs=-1, required=True, type=click.Path(), metavar="FILE...")
@click.option(
    "--units",
    type=click.IntRange(min=1),
    default=1,
    show_default=True,
    metavar="N",
    help="Cut the text into N base units of equal size; one model is trained on each.",
)
@click.option(
    "--parent",
    metavar="NAME",
    shell_complete=complete("partition"),
    help="The group or partition that it belongs to.",
)
@click.option(
    "--field", default="text", show_default=True, help="Where .jsonl and .parquet hold the text."
)
@click.option("--replace", is_flag=True, help="Move the name from other text to this one.")
@in_pool
def add(
    pool: Pool, name: str, files: tuple[str, ...], units: int, parent: str | None, field: str,
    replace: bool,
) -> None:  # fmt: skip
    """Add text files or folders as the partition NAME.

    Reads .jsonl, .jsonl.gz, .parquet and any UTF-8 text file. The text stays where it is: the
    pool remembers each file by its digest and notices when it changes.
    """
    with bar() as progress:
        added = pool.add_partition(
            name, files, units=units, parent=parent, field=field, replace=replace,
            progress=progress,
        )  # fmt: skip
    say_added("partition", added)


@partition.command("ls", epilog=examples("poolreg partition ls", "poolreg partition ls --json"))
@in_pool
@formatted
def ls(pool: Pool, form: str) -> None:
    """List the partitions."""
    show_rows(pool.partitions(), form, tables.PARTITIONS)


@partition.command("show", epilog=examples("poolreg partition show code"))
@_NAME
@in_pool
@formatted
def show(pool: Pool, name: str, form: str) -> None:
    """Show the units and files of the partition NAME."""
    parts = {"units": tables.UNITS, "files": tables.FILES, "shared": tables.SHARED}
    show_facts(pool.partition(name), form, parts)


@partition.command(
    "check", epilog=examples("poolreg partition check", "poolreg partition check code prose")
)
@click.argument("names", nargs=-1, metavar="[NAME]...", shell_complete=complete("partition"))
@in_pool
@formatted
def check(pool: Pool, names: tuple[str, ...], form: str) -> None:
    """Tell whether the files of partitions are what they were.

    Checks all partitions when none is named. Ends with exit code 3 if a file changed.
    """
    with bar() as progress:
        checks = pool.check_partitions(names, progress=progress)
    drifted = [{"partition": c.name, **asdict(drift)} for c in checks for drift in c.drifted]
    rows = [{**asdict(c), "drifted": [asdict(d) for d in c.drifted]} for c in checks]
    if form in ("table", "csv"):
        rows = [{**row, "drifted": len(row["drifted"])} for row in rows]
    show_rows(rows, form, tables.CHECKS)
    if drifted:
        listed = "\n".join(f"  {d['partition']}: {d['path']} is {d['reason']}" for d in drifted)
        raise Drift(
            f"{many(len(drifted), 'file')} changed or missing since they were added:\n{listed}",
            hint="restore them, or add the changed text as a new partition",
        )


@partition.command("rm", epilog=examples("poolreg partition rm code"))
@_NAME
@in_pool
def rm(pool: Pool, name: str) -> None:
    """Take the partition NAME out of the pool.

    What was measured stays, and adding it again restores it.
    """
    digest = pool.remove("partition", name)
    message(f"removed partition {name} ({digest[:12]})")
