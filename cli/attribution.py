"""poolreg attribution: what each partition contributes."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import click

from .names import complete
from .options import examples, formatted, in_pool, measuring
from .output import Column, fixed, plain, show, to_json
from .progress import bar

if TYPE_CHECKING:
    from poolreg.pool import Pool


@click.command(
    epilog=examples(
        "poolreg attribution",
        "poolreg attribution --on wiki --measure",
        "poolreg attribution --among code+prose+web --interactions",
        "poolreg attribution --permutations 100 --measure --json",
    )
)
@click.option("--among", default="all", show_default=True, metavar="EXPR",
              shell_complete=complete("partition"), help="The partitions to compare.")  # fmt: skip
@click.option("--measure", is_flag=True, help="Measure the unions that the memo lacks.")
@click.option("--permutations", type=click.IntRange(min=4), metavar="N",
              help="Sample N orders (default: exact up to 12 partitions, else 50).")  # fmt: skip
@click.option("--draw", type=click.IntRange(min=0), default=0, metavar="S",
              help="Start of the random orders.")  # fmt: skip
@click.option("--interactions", is_flag=True, help="Print pairs that help or hinder each other.")
@measuring("--from", "--seed")
@in_pool
@formatted
def attribution(pool: Pool, form: str, measure: bool, interactions: bool, **options: Any) -> None:
    """Tell what each partition contributes.

    Changes are in bits per byte against the seed model, negative is better. Shapley values
    split the change of all partitions together; "alone" is a partition by itself, "last" its
    joining all the others, "marginal" the mean change when it joins others.
    """
    with bar() as progress:
        found = pool.attribution(run_missing=measure, progress=progress, **options)
    if form == "json":
        click.echo(to_json(plain(found)))
    elif interactions:
        rows = sorted((asdict(row) for row in found.interactions),
                      key=lambda row: (row["evalset"], row["value"]))  # fmt: skip
        columns = [Column("evalset"), Column("first"), Column("second"),
                   Column("value", "interaction", fixed(4, sign=True))]  # fmt: skip
        show(rows, form, columns, notes=["negative: together they give more than apart"])
    else:
        _show(found, form)


def _show(found: Any, form: str) -> None:
    rows = sorted((asdict(row) for row in found.contributions),
                  key=lambda row: (row["evalset"], row["shapley"]))  # fmt: skip
    signed = fixed(4, sign=True)
    columns = [Column("evalset"), Column("partition"), Column("shapley", "Shapley", signed)]
    if found.permutations:
        columns.append(Column("standard_error", "± s.e.", fixed(4)))
    columns += [Column("alone", write=signed), Column("leave_one_out", "last", signed),
                Column("marginal", write=signed)]  # fmt: skip
    how = f"{found.permutations} random orders" if found.permutations else "exact"
    notes = [
        f"bits/byte against the seed model, negative is better; {how}, {found.mixtures} unions"
    ]
    show(rows, form, columns, names="partition", notes=notes)
