"""poolreg verify: is everything there, and is it what it was? And if not, mend it."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

import click

from poolreg.errors import CheckFailed

from .options import examples, formatted, pool_option
from .output import many, message, plain, show, size, to_json
from .progress import bar
from .tables import FINDINGS, MENDED

if TYPE_CHECKING:
    from poolreg.verification.findings import Verdict

_EXAMPLES = examples(
    "poolreg verify",
    "poolreg verify --headers",
    "poolreg verify --full",
    "poolreg verify --full --sample 1/10          a tenth today, 2/10 tomorrow",
    "poolreg verify --full --max-seconds 3600     then again with --resume",
    "poolreg verify --full --repair",
)


@click.command(epilog=_EXAMPLES)
@click.option("--headers", is_flag=True, help="Read headers of weights and configurations, too.")
@click.option("--full", is_flag=True,
              help="Hash all objects, make kept merges and the catalog again, too.")  # fmt: skip
@click.option("--sample", default="1/1", metavar="N/T",
              help="With --full: only the N-th of T parts of objects and merges.")  # fmt: skip
@click.option("--merges", type=click.IntRange(min=0), default=3, show_default=True, metavar="N",
              help="With --full: make at most N kept merges again.")  # fmt: skip
@click.option("--max-seconds", type=click.FloatRange(min=0), metavar="S",
              help="With --full: stop after so long, and say what is left.")  # fmt: skip
@click.option("--resume", is_flag=True, help="With --full: go on where the last one ended.")
@click.option("--repair", is_flag=True, help="Mend what is found; what is replaced is kept.")
@pool_option
@formatted
def verify(folder: str | None, form: str, **depth: Any) -> None:
    """Check that the pool is whole.

    Reads the journal, resolves the names, and looks for every object that a record names, with
    its size. Changes nothing; ends with code 3 and a list where something is wrong, with the way
    out for each.

    --repair moves what is damaged to quarantine/ in the pool, makes it again from text, recipes
    and the journal, or fetches it from where the pool was pushed or pulled. Nothing is deleted.
    """
    from poolreg.pool import Pool
    from poolreg.verification.verify import open_damaged

    limited = depth["resume"] or depth["max_seconds"] is not None or depth["sample"] != "1/1"
    if limited and not depth["full"]:
        raise click.UsageError("--sample, --max-seconds and --resume limit --full; give it, too")
    with contextlib.closing(open_damaged(folder)) as registry, bar() as progress:
        found = Pool(registry).verify(progress=progress, **depth)
    if form == "json":
        click.echo(to_json(plain(vars(found))))
    elif form == "table":
        _tell(found)
    else:
        show([vars(finding) for finding in found.findings], form, FINDINGS, names="what")
    if found.findings:
        raise CheckFailed(f"the pool has {many(len(found.findings), 'problem')}")


def _tell(found: Verdict) -> None:
    if found.mended:
        show([vars(done) for done in found.mended], "table", MENDED)
    if found.findings:
        show([vars(finding) for finding in found.findings], "table", FINDINGS)
    counts = [many(found.records, "record"), many(found.objects, "object"), size(found.bytes)]
    if found.headers:
        counts.append(f"{many(found.headers, 'file')} of models read")
    if found.hashed:
        counts.append(f"{many(found.hashed, 'object')} hashed ({size(found.hashed_bytes)})")
    if found.merges:
        counts.append(f"{many(found.merges, 'merge')} made again")
    if found.catalog:
        counts.append("catalog compared")
    message(", ".join(counts))
    if found.elsewhere:
        message(f"{many(found.elsewhere, 'weights file')} were left where the pool came from")
    if found.collected:
        message(f"{many(found.collected, 'object')} of removed things are gone")
    if found.unnamed:
        message(f"{many(found.unnamed, 'object')} of no record: see poolreg gc --dry-run")
    for text in (*found.remarks, *(f"not looked at: {left}" for left in found.unchecked)):
        message(text)
