"""Options that several commands share, each said once.

`in_pool` opens the pool around a command, `formatted` adds the output formats, and `measuring`
the way text is scored; the rest are small parameter types.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any

import click

from .names import complete, pool_folder
from .output import FORMATS

Command = Callable[..., Any]

SCHEMES = click.Choice(["micro", "macro"])
BUDGETS = click.Choice(["sum", "same"])
REPO_TYPES = click.Choice(["model", "dataset"])


def examples(*lines: str) -> str:
    """Return the epilog that every command's help ends with, line breaks kept."""
    return "\b\nExamples:\n" + "\n".join(f"  {line}" for line in lines)


pool_option = click.option(
    "--pool", "folder", metavar="DIR",
    callback=lambda context, _, value: value or pool_folder(context),
    help="The pool (default: $POOLREG_POOL, else the nearest one upwards from here).",
)  # fmt: skip


def in_pool(command: Command) -> Command:
    """Give a command `--pool` and, as its first argument, the opened pool."""

    @functools.wraps(command)
    def wrapped(*args: Any, folder: str | None, **kwargs: Any) -> Any:
        from poolreg.pool import Pool

        with Pool.open(folder) as pool:
            return command(pool, *args, **kwargs)

    return pool_option(wrapped)


def queried(command: Command) -> Command:
    """Give a command `--pool` or `--remote` and, as its first argument, what runs SQL there."""

    @functools.wraps(command)
    def wrapped(
        *args: Any, folder: str | None, remote: str | None, revision: str | None,
        repo_type: str | None, **kwargs: Any,
    ) -> Any:  # fmt: skip
        if remote is None:
            from poolreg.pool import Pool

            if revision or repo_type:
                raise click.UsageError("--revision and --repo-type say more about --remote")
            with Pool.open(folder) as pool:
                return command(pool.sql, *args, **kwargs)
        from poolreg.sharing.published import sql_remote

        if folder:
            raise click.UsageError("--remote stands in place of --pool; give one of them")
        run = functools.partial(
            sql_remote, remote, revision=revision, repo_type=repo_type or "model"
        )
        return command(run, *args, **kwargs)

    for option in reversed(_REMOTE):
        wrapped = option(wrapped)
    return pool_option(wrapped)


_REMOTE = (
    click.option(
        "--remote", metavar="PLACE",
        help="A pushed pool instead, not pulled: a Hub repository OWNER/NAME, or a URL.",
    ),
    click.option("--revision", metavar="REVISION", help="Its branch, tag or commit."),
    click.option(
        "--repo-type", type=REPO_TYPES,
        help="What kind of repository it is (default: model).",
    ),
)  # fmt: skip


def formatted(command: Command) -> Command:
    """Add `--format` and its short form `--json`, passed on as `form`."""
    command = click.option(
        "--json", "form", flag_value="json", help="Short for --format json."
    )(command)  # fmt: skip
    return click.option(
        "--format", "form", type=click.Choice(FORMATS), default="table", show_default=True,
        help="How to print; quiet prints names only.",
    )(command)  # fmt: skip


def seed_option(*flags: str, help: str) -> Callable[[Command], Command]:
    """Return the option that names a seed model."""
    return click.option(
        *flags, "seed", metavar="SEED", shell_complete=complete("model"), help=help
    )  # fmt: skip


def measuring(*flags: str, scheme: bool = True) -> Callable[[Command], Command]:
    """Return what adds how text is scored and on which evalsets.

    A command gets `on`, `scheme` (unless it has no use for one), `settings` and `seed`, the seed
    model said with `flags`.
    """

    def add(command: Command) -> Command:
        @functools.wraps(command)
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            return command(*args, settings=_settings(kwargs), **kwargs)

        seed = seed_option(*flags, help="Average the models of this seed, if there are several.")
        options: list[Callable[[Command], Command]] = [_ON, seed, *_HOW]
        if scheme:
            options.insert(1, _SCHEME)
        measured: Command = wrapped
        for option in reversed(options):
            measured = option(measured)
        return measured

    return add


def _settings(given: dict[str, Any]) -> Any:
    """Take how to measure out of a command's arguments."""
    from poolreg.evaluation.evaluate import Settings

    names = ("max_length", "dtype", "device", "batch_tokens", "threads", "workers", "engine")
    values = {name: given.pop(name) for name in names}
    if (objects := given.pop("objects")) is not None:
        from poolreg.sharing.published_objects import ObjectsAt

        if values["engine"] != "ray":
            raise click.UsageError("--objects is for the machines of a cluster: --engine ray")
        values["published"] = ObjectsAt(objects)
    return Settings(**values)


def comma_names(_: click.Context, __: click.Parameter, values: Sequence[str]) -> list[str]:
    """Return the names in the values of an option that is given again or with commas."""
    return [name for value in values for name in value.split(",") if name]


_ON = click.option(
    "--on", metavar="EVALSET", multiple=True, callback=comma_names,
    shell_complete=complete("evalset"),
    help="Evalsets to measure on: again for each, or with commas (default: all).",
)  # fmt: skip
_SCHEME = click.option(
    "--scheme", type=SCHEMES, default="micro", show_default=True,
    help="Weigh every base unit equally (micro), or every partition (macro).",
)  # fmt: skip
_HOW = (
    click.option(
        "--max-length", type=click.IntRange(min=1), metavar="N",
        help="Tokens in a window (default: the model's context, at most 2048).",
    ),
    click.option(
        "--dtype", default="float32", show_default=True,
        help="Compute in float32, bfloat16 or float16.",
    ),
    click.option("--device", default="auto", show_default=True, help="auto, cpu or cuda."),
    click.option(
        "--batch-tokens", type=click.IntRange(min=1), metavar="N",
        help="Tokens scored at once: less needs less memory.",
    ),
    click.option(
        "--workers", type=click.IntRange(min=1), metavar="N",
        help="Processes that share the mixtures (default: 1; with Ray as many as fit).",
    ),
    click.option(
        "--threads", type=click.IntRange(min=1), metavar="N", help="Threads of each process."
    ),
    click.option(
        "--engine", type=click.Choice(["local", "ray"]), default="local", show_default=True,
        help="Run on this machine, or on a Ray cluster.",
    ),
    click.option(
        "--objects", metavar="URL",
        help="Where its machines fetch objects if they do not see the pool's folder.",
    ),
)  # fmt: skip


def byte_size(value: str) -> int:
    """Return the bytes of a size such as 5GB, 500MB or 1GiB."""
    match = re.fullmatch(r"([0-9]{1,15}(?:\.[0-9]{1,15})?) *([kmgt]?)(i?)b?", value.lower())
    if match is None:
        raise click.BadParameter(f"{value!r} is not a size; write 5GB or 500MB")
    number, prefix, binary = match.groups()
    return int(float(number) * (1024 if binary else 1000) ** " kmgt".index(prefix or " "))


def size_range(value: str) -> tuple[int, int]:
    """Return the smallest and largest size of subsets in a range such as 2 or 1-3."""
    match = re.fullmatch(r"([0-9]{1,6})(?:-([0-9]{1,6}))?", value)
    if match is None:
        raise click.BadParameter(f"{value!r} is not a range of sizes; write 2 or 1-3")
    return int(match[1]), int(match[2] or match[1])


def share(value: str) -> tuple[int, int]:
    """Return number and count of a part such as 3/16."""
    match = re.fullmatch(r"([0-9]{1,6})/([0-9]{1,6})", value)
    if match is None or not 1 <= int(match[1]) <= int(match[2]):
        raise click.BadParameter(f"{value!r} is not a part; write 1/16 to 16/16")
    return int(match[1]), int(match[2])


_SECONDS = {"": 1, "s": 1, "m": 60, "min": 60, "h": 3600, "d": 86400, "w": 7 * 86400}


def span(value: str) -> timedelta:
    """Return a length of time such as 14d, 12h, 30min or 0."""
    match = re.fullmatch(r"(0|[0-9]{1,6}(?:\.[0-9]{1,6})?) *(s|m|min|h|d|w|)", value.lower())
    if match is None or (not match[2] and match[1] != "0"):
        raise click.BadParameter(f"{value!r} is not a length of time; write 14d, 12h or 30min")
    return timedelta(seconds=float(match[1]) * _SECONDS[match[2]])


def moment(value: str) -> datetime:
    """Return a time in UTC: a date, a date with a time (UTC unless it says), or how long ago."""
    try:
        found = datetime.fromisoformat(value)
    except ValueError:
        try:
            return datetime.now(UTC) - span(value)
        except (click.BadParameter, OverflowError):
            raise click.BadParameter(
                f"{value!r} is not a time; write 2026-03-01, 2026-03-01T12:00 or 7d"
            ) from None
    return found if found.tzinfo else found.replace(tzinfo=UTC)
