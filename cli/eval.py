"""poolreg eval: measure models and mixtures, on evalsets or on a harness's tasks."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from . import tables
from .answers import show_answers
from .names import complete
from .options import comma_names, examples, formatted, in_pool, measuring
from .output import Column, show
from .progress import bar

if TYPE_CHECKING:
    from poolreg.pool import Pool


@click.command(
    "eval",
    epilog=examples(
        "poolreg eval base",
        'poolreg eval base "code+prose" --on wiki',
        'poolreg eval "code+prose" --harness lm-eval --tasks arc_easy,piqa --limit 200',
    ),
)
@click.argument("subjects", nargs=-1, required=True, metavar="MODEL|EXPR...",
                shell_complete=complete("model", "partition"))  # fmt: skip
@measuring("--from", "--seed")
@click.option("--harness", type=click.Choice(["lm-eval"]),
              help="Run tasks of lm-evaluation-harness in place of evalsets.")  # fmt: skip
@click.option("--tasks", metavar="TASK", multiple=True, callback=comma_names,
              help="Its tasks or groups: again for each, or with commas.")  # fmt: skip
@click.option("--num-fewshot", type=click.IntRange(min=0), metavar="N",
              help="Worked examples before each question (default: as the task says).")  # fmt: skip
@click.option("--limit", type=click.IntRange(min=1), metavar="N",
              help="Only the first N questions of each task.")  # fmt: skip
@click.option("--include-path", type=click.Path(path_type=Path), metavar="DIR",
              help="Further task definitions; they may run code, so trust them.")  # fmt: skip
@click.option("--again", is_flag=True, help="Run tasks that were run before, too.")
@in_pool
@formatted
def evaluate(
    pool: Pool, subjects: tuple[str, ...], form: str, harness: str | None, tasks: list[str],
    num_fewshot: int | None, limit: int | None, include_path: Path | None, again: bool,
    **options: Any,
) -> None:  # fmt: skip
    """Measure models and mixtures on evalsets, or on tasks.

    What was measured once is not measured again. With --harness mixtures are merged in memory.
    """
    asked: dict[str, Any] = {"num_fewshot": num_fewshot, "limit": limit}
    asked["include_path"] = include_path
    if harness is None:
        if tasks or again or any(value is not None for value in asked.values()):
            raise click.UsageError("options of tasks need --harness lm-eval")
        with bar() as progress:
            answers = pool.evaluate(subjects, progress=progress, **options)
        show_answers(answers, form, beside=False)
        return
    if options.pop("on"):
        raise click.UsageError("--on names evalsets; with --harness name --tasks")
    with bar() as progress:
        rows = pool.evaluate_tasks(
            subjects, tasks, **asked, again=again, progress=progress, **options
        )
    show(rows, form, [*tables.TASK_SCORES, Column("memoised")], names="label")
