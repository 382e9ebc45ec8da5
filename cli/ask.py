"""poolreg ask: what would training on a mixture give?"""

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
    epilog=examples(
        'poolreg ask "code+prose"',
        'poolreg ask "2*code+prose" "all - web" --on wiki,news',
        "poolreg ask code/2 --json",
    )
)
@click.argument("mixtures", nargs=-1, required=True, metavar="EXPR...",
                shell_complete=complete("partition", "model"))  # fmt: skip
@measuring("--from", "--seed")
@in_pool
@formatted
def ask(pool: Pool, mixtures: tuple[str, ...], form: str, **options: Any) -> None:
    """Tell what training on each mixture EXPR would give.

    A mixture is written a+b, 2*a+b, 0.3*a+0.7*b, a/2 (one base unit), all, or all-c. Its
    answer is the evaluation of the exact average of its unit models, beside the seed model,
    the average of all, and references where the pool has them. What was measured once is
    not measured again.
    """
    with bar() as progress:
        answers = pool.ask(mixtures, progress=progress, **options)
    show_answers(answers, form, beside=True)
