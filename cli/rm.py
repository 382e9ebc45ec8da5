"""poolreg rm: take partitions, evalsets and models out of the pool."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from .names import complete
from .options import examples, in_pool
from .output import many, message

if TYPE_CHECKING:
    from poolreg.pool import Pool
    from poolreg.upkeep.removal import Dependents


@click.command(
    epilog=examples(
        "poolreg rm code",
        "poolreg rm code/1 code/2",
        "poolreg rm --kind evalset wiki",
        "poolreg restore",
    )
)
@click.argument(
    "names", nargs=-1, required=True, metavar="NAME...",
    shell_complete=complete("partition", "model", "evalset"),
)  # fmt: skip
@click.option(
    "--kind", type=click.Choice(["partition", "evalset", "model"]),
    help="Of what kind they are, where one name has several meanings.",
)  # fmt: skip
@in_pool
def rm(pool: Pool, names: tuple[str, ...], kind: str | None) -> None:
    """Take partitions, evalsets and models out of the pool.

    NAME may be the beginning of a digest. What was measured stays, and so does the data, until
    poolreg gc finds it removed for long enough; till then poolreg restore brings it back.
    """
    for thing in pool.rm(names, kind=kind):
        message(f"removed {thing.kind} {thing.name} ({thing.digest[:12]})")
        for dependents in thing.dependents:
            message(f"note: {_said(dependents)}")
    message("the data stays until poolreg gc; bring it back with: poolreg restore")


def _said(dependents: Dependents) -> str:
    shown = ", ".join(dependents.first)
    more = ", …" if dependents.count > len(dependents.first) else ""
    noun = many(dependents.count, dependents.noun)
    verb = "stays" if dependents.count == 1 else "stay"
    return f"{noun} {dependents.relation} {verb}: {shown}{more}"
