"""Completion of names in the shell: partitions, models, evalsets and named queries of the pool."""

from __future__ import annotations

import re
from collections.abc import Callable

import click
from click.shell_completion import CompletionItem

from poolreg import PoolregError

Completer = Callable[[click.Context, click.Parameter, str], list[CompletionItem]]


def complete(*spaces: str) -> Completer:
    """Return a completer for names of these spaces: partition, model, evalset or query.

    In an expression the last name is completed; without a pool there is nothing to offer.
    """

    def offer(ctx: click.Context, _: click.Parameter, incomplete: str) -> list[CompletionItem]:
        head, tail = re.fullmatch(r"(.*[+*,])?(.*)", incomplete, re.DOTALL).groups("")  # type: ignore[union-attr]
        try:
            known = sorted(_known(ctx, spaces))
        except (PoolregError, OSError):
            return []
        return [CompletionItem(head + name) for name in known if name.startswith(tail)]

    return offer


def _known(ctx: click.Context, spaces: tuple[str, ...]) -> set[str]:
    if spaces == ("query",):
        from poolreg.schema import statements

        return set(statements("queries.sql"))
    from poolreg.pool import Pool

    from .options import pool_folder

    with Pool.open(pool_folder(ctx)) as pool:
        return {name for space in spaces for name in pool.registry.names(space)}
