"""poolreg scores: scores on tasks, from elsewhere or from a harness run here."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from . import tables
from .names import complete
from .options import SCHEMES, examples, formatted, in_pool, seed_option
from .output import many, message, show

if TYPE_CHECKING:
    from poolreg.pool import Pool

_SHOWN = 5


@click.group(
    epilog=examples("poolreg scores import results.json --model base", "poolreg scores ls")
)
def scores() -> None:
    """Import and list scores on benchmark tasks."""


@scores.command(
    "import",
    epilog=examples(
        "poolreg scores import results_2026-03-01T10-00-00.json --model base",
        'poolreg scores import lm-eval-output/ --model "code+prose"',
    ),
)
@click.argument("path", type=click.Path(path_type=Path), metavar="FILE|DIR")
@click.option("--model", required=True, metavar="MODEL|EXPR",
              shell_complete=complete("model", "partition"), help="What was measured.")  # fmt: skip
@click.option("--scheme", type=SCHEMES, default="micro", show_default=True,
              help="The scheme of an expression.")  # fmt: skip
@seed_option("--from", "--seed", help="The seed of an expression, if there are several.")
@in_pool
def import_scores(pool: Pool, path: Path, model: str, scheme: str, seed: str | None) -> None:
    """Record what lm-evaluation-harness wrote about a model.

    Of a folder the newest results_*.json in it counts. Scores that are in the pool already
    change nothing.
    """
    found = pool.import_scores(path, model, scheme=scheme, seed=seed)
    message(f"{many(len(found.scores), 'score')} of {found.label}, {found.new} new: {found.path}")
    if found.skipped:
        more = ", …" if len(found.skipped) > _SHOWN else ""
        message(f"left out, no finite numbers: {', '.join(found.skipped[:_SHOWN])}{more}")


@scores.command("ls", epilog=examples("poolreg scores ls", "poolreg scores ls --task arc --json"))
@click.option("--task", metavar="TASK", help="Only this task or group of tasks.")
@in_pool
@formatted
def ls(pool: Pool, task: str | None, form: str) -> None:
    """List the latest scores on tasks."""
    show(pool.task_scores(task), form, tables.TASK_SCORES, names="task")
