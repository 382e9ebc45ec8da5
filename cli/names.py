"""Which pool a command line means, and completion of the names in it by the shell."""

from __future__ import annotations

import re
from collections.abc import Callable

import click
from click.shell_completion import CompletionItem

from poolreg import PoolregError

Completer = Callable[[click.Context, click.Parameter, str], list[CompletionItem]]


def complete(*spaces: str) -> Completer:
    """Return a completer for names of these spaces: partition, model, evalset, query or removed.

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
    from poolreg.pool import Pool

    if spaces == ("query",):
        return {query.name for query in Pool.queries()}
    with Pool.open(pool_folder(ctx)) as pool:
        if spaces == ("removed",):
            return {thing.name or thing.digest[:12] for thing in pool.removed()}
        return {name for space in spaces for name in pool.registry.names(space)}


def pool_folder(context: click.Context) -> str | None:
    """Return the folder given with --pool after the command, or before it."""
    here: str | None = context.params.get("folder") or context.find_root().params.get("folder")
    return here
