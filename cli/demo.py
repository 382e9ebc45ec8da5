"""poolreg demo: a whole pool from nothing, with its answers."""

from __future__ import annotations

import math
import shlex
from pathlib import Path
from typing import TYPE_CHECKING

import click

from .answers import show_answers
from .output import Column, count, duration, fixed, show
from .progress import bar

if TYPE_CHECKING:
    from poolreg.demo import DemoResult


@click.command(
    epilog="""\b
Examples:
  poolreg demo                     # in ./poolreg-demo
  poolreg demo /tmp/try --workers 4
"""
)
@click.argument("folder", type=click.Path(path_type=Path), default="poolreg-demo")
@click.option("--workers", type=click.IntRange(1), help="Processes (default: one a core).")
def demo(folder: Path, workers: int | None) -> None:
    """Build a small pool from real text in FOLDER and ask it.

    The text is what every installation has. Trains a tokenizer, a seed model, one model per
    partition and a few references, sweeps all mixtures, and prints what it measured. Takes a
    few minutes; run again, it goes on.
    """
    from poolreg.demo import run_demo

    with bar() as progress:
        result = run_demo(folder, workers=workers, progress=progress)
    _show(result)
    _next_steps(result, folder)


def _show(result: DemoResult) -> None:
    """Print the text, the answers, the best mixtures and how far the averages can be trusted."""
    _title("Text")
    for line in result.texts:
        click.echo(f"  {line}")
    _title("What would training on these give?")
    show_answers(result.answers, "table", beside=True)
    _title("The best of all mixtures for each evalset")
    columns = [Column("evalset"), Column("mixture"), Column("bits_per_byte", "bits/byte", fixed(4))]
    show(result.best.dicts(), "table", columns)
    _title(
        f"Can the averages be trusted? Correlation with {result.references} models really trained"
    )
    rows = result.correlation.dicts()
    columns = [
        Column("evalset"),
        Column("references", write=count),
        Column("merged", "average of parameters", fixed(3)),
        Column("mean_of_losses", "average of losses", fixed(3)),
        Column("merged_minus_reference", "proxy - reference, nats", fixed(3, sign=True)),
    ]
    show(rows, "table", columns, notes=[_mean(rows)])


def _mean(rows: list[dict[str, float]]) -> str:
    merged, losses = (
        math.tanh(sum(math.atanh(row[key]) for row in rows) / len(rows))
        for key in ("merged", "mean_of_losses")
    )
    return (
        f"mean over evalsets (Fisher z): {merged:.3f} for the average of parameters, {losses:.3f} "
        "for the weighted mean of the unit models' losses; Pearson r of losses, equal budgets"
    )


def _next_steps(result: DemoResult, folder: Path) -> None:
    row = result.ledger.dicts()[0]
    times = ", ".join(f"{stage} {duration(took)}" for stage, took in result.seconds.items())
    _title("What it cost")
    click.echo(
        f"  {row['models_trained']} models trained on {count(row['tokens_trained'])} tokens; "
        f"{row['trainings_avoided']} trainings on {count(row['tokens_avoided'])} tokens avoided\n"
        f"  {duration(sum(result.seconds.values()))}: {times}"
    )
    first, second = result.partitions[:2]
    _title("Next")
    click.echo(
        f"  cd {shlex.quote(str(folder))}\n"
        f'  poolreg ask "2*{first}+{second}" "all-{second}"\n'
        "  poolreg proxy report\n"
        "  poolreg attribution\n"
        f"  poolreg suggest --target {first}=0.6,{second}=0.4\n"
        '  poolreg sql "from proxy_pairs order by evalset, mixture"\n'
        "  poolreg report -o report.html\n"
        f'  poolreg merge "{first}+{second}" -o merged\n'
        "  poolreg ls"
    )


def _title(text: str) -> None:
    click.secho(f"\n{text}", bold=True)
