"""Options that several commands share, each said once.

`in_pool` opens the pool around a command, `formatted` adds the output formats, and `measuring`
the way text is scored; the rest are small parameter types.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Sequence
from typing import Any

import click

from .names import complete, pool_folder
from .output import FORMATS

Command = Callable[..., Any]

SCHEMES = click.Choice(["micro", "macro"])
BUDGETS = click.Choice(["sum", "same"])


def examples(*lines: str) -> str:
    """Return the epilog that every command's help ends with, line breaks kept."""
    return "\b\nExamples:\n" + "\n".join(f"  {line}" for line in lines)


def in_pool(command: Command) -> Command:
    """Give a command `--pool` and, as its first argument, the opened pool."""

    @click.option(
        "--pool", "folder", metavar="DIR",
        help="The pool (default: $POOLREG_POOL, else the nearest one upwards from here).",
    )  # fmt: skip
    @functools.wraps(command)
    def wrapped(*args: Any, folder: str | None, **kwargs: Any) -> Any:
        from poolreg.pool import Pool

        with Pool.open(pool_folder(click.get_current_context())) as pool:
            return command(pool, *args, **kwargs)

    return wrapped


def formatted(command: Command) -> Command:
    """Add `--format` and its short form `--json`, passed on as `form`."""
    command = click.option(
        "--json", "form", flag_value="json", help="Short for --format json."
    )(command)  # fmt: skip
    return click.option(
        "--format", "form", type=click.Choice(FORMATS), default="table", show_default=True,
        help="How to print; quiet prints names only.",
    )(command)  # fmt: skip


def measuring(command: Command) -> Command:
    """Add how text is scored and on which evalsets: passed on as `on`, `scheme` and so forth."""

    @functools.wraps(command)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        from poolreg.evaluate import Settings

        names = ("max_length", "dtype", "device", "batch_tokens", "threads")
        settings = Settings(**{name: kwargs.pop(name) for name in names})
        return command(*args, settings=settings, **kwargs)

    for option in reversed(_MEASURING):
        wrapped = option(wrapped)
    return wrapped


def _names(context: click.Context, _: click.Parameter, values: Sequence[str]) -> list[str]:
    return [name for value in values for name in value.split(",") if name]


def on_option() -> Callable[[Command], Command]:
    """Return the option that names evalsets, several times or with commas."""
    return click.option(
        "--on", metavar="EVALSET", multiple=True, callback=_names,
        shell_complete=complete("evalset"),
        help="Evalsets to measure on: again for each, or with commas (default: all).",
    )  # fmt: skip


def seed_option(flag: str, what: str) -> Callable[[Command], Command]:
    """Return the option that names a seed model."""
    return click.option(
        flag, "seed", metavar="SEED", shell_complete=complete("model"), help=what
    )  # fmt: skip


_MEASURING = (
    on_option(),
    click.option(
        "--scheme", type=SCHEMES, default="micro", show_default=True,
        help="Weigh every base unit equally (micro), or every partition (macro).",
    ),
    seed_option("--seed", "Average the models of this seed (needed if several cover it)."),
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
    click.option("--threads", type=click.IntRange(min=1), metavar="N", help="Threads of torch."),
)  # fmt: skip


class Size(click.ParamType):
    """A number of bytes, such as 5GB, 500MB or 1GiB."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """Return the bytes."""
        match = re.fullmatch(r"([0-9]{1,15}(?:\.[0-9]{1,15})?) *([kmgt]?)(i?)b?", str(value).lower())
        if match is None:
            self.fail(f"{value!r} is not a size; write 5GB or 500MB", param, ctx)
        number, prefix, binary = match.groups()
        return int(float(number) * (1024 if binary else 1000) ** " kmgt".index(prefix or " "))


class Sizes(click.ParamType):
    """A range of sizes of subsets: 2, or 1-3."""

    name = "sizes"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[int, int]:
        """Return (smallest, largest)."""
        match = re.fullmatch(r"([0-9]{1,6})(?:-([0-9]{1,6}))?", str(value))
        if match is None:
            self.fail(f"{value!r} is not a range of sizes; write 2 or 1-3", param, ctx)
        return int(match[1]), int(match[2] or match[1])
