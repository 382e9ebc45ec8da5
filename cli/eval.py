"""poolreg eval: measure models and mixtures."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from .answers import show_answers
from .names import complete
from .options import examples, formatted, in_pool, measuring
from .progress import bar

if TYPE_CHECKING:
    from poolreg.pool import Pool


@click.command(
    "eval",
    epilog=examples(
        "poolreg eval base", 'poolreg eval base "code+prose" --on wiki', "poolreg eval gpt2 --json"
    ),
)
@click.argument("subjects", nargs=-1, required=True, metavar="MODEL|EXPR...",
                shell_complete=complete("model", "partition"))  # fmt: skip
@measuring("--from", "--seed")
@in_pool
@formatted
def evaluate(pool: Pool, subjects: tuple[str, ...], form: str, **options: Any) -> None:
    """Measure models and mixtures on evalsets.

    What was measured once is not measured again.
    """
    with bar() as progress:
        answers = pool.evaluate(subjects, progress=progress, **options)
    show_answers(answers, form, beside=False)
