"""poolreg train: the seed, one model a base unit, and references."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from . import tables
from .names import complete
from .options import (
    BUDGETS,
    SCHEMES,
    Command,
    examples,
    formatted,
    in_pool,
    seed_option,
    size_range,
)
from .output import message, show
from .progress import bar

if TYPE_CHECKING:
    from poolreg.pool import Pool
    from poolreg.training.jobs import Trained

_FROM = seed_option("--from", help="The seed model to start from, if there are several.")
_BUDGET = click.option(
    "--budget", type=BUDGETS, default="same", show_default=True,
    help="Train on as many tokens as one unit, or as the mixture's units together.",
)  # fmt: skip
_SCHEME = click.option(
    "--scheme",
    type=SCHEMES,
    default="micro",
    show_default=True,
    help="Weigh every base unit equally (micro), or every partition (macro).",
)
_TRAINING = (
    click.option(
        "--recipe", "recipe_file", type=click.Path(dir_okay=False), metavar="FILE",
        help="TOML with model and settings (default: see `poolreg train recipe`).",
    ),
    click.option("--device", default="auto", show_default=True, help="auto, cpu or cuda."),
    click.option(
        "--workers", type=click.IntRange(min=1), default=1, show_default=True, metavar="N",
        help="Models trained at once.",
    ),
    click.option(
        "--threads", type=click.IntRange(min=1), default=1, show_default=True, metavar="N",
        help="Threads a model; with 1 the same recipe gives the same model, bit for bit.",
    ),
)  # fmt: skip


def _trains(command: Command) -> Command:
    """Add the options of training, give the command its recipe and bar, and print its models."""

    @functools.wraps(command)
    def wrapped(pool: Pool, *args: Any, recipe_file: str | None, form: str, **kw: Any) -> None:
        from poolreg.training.recipe import load_recipe

        recipe = load_recipe(Path(recipe_file)) if recipe_file else None
        with bar() as progress:
            trained: Sequence[Trained] = command(
                pool, *args, recipe=recipe, progress=progress, **kw
            )
        if form == "table" and not trained:
            message("every base unit has its model; nothing to train")
            return
        show([asdict(model) for model in trained], form, tables.TRAINED, names="label")

    options = in_pool(formatted(wrapped))
    for option in reversed(_TRAINING):
        options = option(options)
    return options


@click.group(
    epilog=examples(
        "poolreg train recipe > recipe.toml",
        "poolreg train seed --recipe recipe.toml",
        "poolreg train units --recipe recipe.toml --workers 2",
        'poolreg train reference "code+prose" --recipe recipe.toml',
    )
)
def train() -> None:
    """Train small models: the seed, the units, references.

    Large models are trained elsewhere and come in with `poolreg model add`. Training goes on
    where it was interrupted, and what was trained is not trained again.
    """


@train.command("recipe", epilog=examples("poolreg train recipe > recipe.toml"))
def recipe() -> None:
    """Print the default recipe, to start one's own from."""
    from poolreg.training.recipe import DEFAULT_RECIPE

    click.echo(DEFAULT_RECIPE, nl=False)


@train.command(
    "seed",
    epilog=examples(
        "poolreg train seed", "poolreg train seed --name small --on prose --recipe small.toml"
    ),
)
@click.option("--name", default="base", show_default=True, help="What to call it.")
@click.option(
    "--on",
    "mixture",
    metavar="EXPR",
    default="all",
    show_default=True,
    shell_complete=complete("partition"),
    help="The mixture to train it on.",
)
@click.option("--replace", is_flag=True, help="Move the name from another model to this one.")
@_trains
def seed(pool: Pool, mixture: str, **options: Any) -> Sequence[Trained]:
    """Train the common start of all units.

    The tokenizer is trained with it, unless the recipe names one.
    """
    return [pool.train_seed(on=mixture, **options)]


@train.command(
    "unit", epilog=examples("poolreg train unit code/2", "poolreg train unit code prose/1")
)
@click.argument("units", nargs=-1, required=True, metavar="UNIT...",
                shell_complete=complete("partition"))  # fmt: skip
@_FROM
@click.option("--again", is_flag=True, help="Also where a unit has a model from this seed.")
@_trains
def unit(pool: Pool, units: tuple[str, ...], **options: Any) -> Sequence[Trained]:
    """Train a model for each UNIT, such as code/2 or all of code."""
    return pool.train_units(only=units, **options)


@train.command("units", epilog=examples("poolreg train units", "poolreg train units --workers 4"))
@_FROM
@_trains
def units(pool: Pool, **options: Any) -> Sequence[Trained]:
    """Train one model for every base unit that has none."""
    return pool.train_units(**options)


@train.command(
    "reference",
    epilog=examples(
        'poolreg train reference "code+prose"', "poolreg train reference all --budget sum"
    ),
)
@click.argument("mixture", metavar="EXPR", shell_complete=complete("partition"))
@_FROM
@_BUDGET
@_SCHEME
@_trains
def reference(pool: Pool, mixture: str, **options: Any) -> Sequence[Trained]:
    """Train a reference: a model really trained on the mixture EXPR.

    Its scores then stand beside those of the average that answers for it.
    """
    return pool.train_references([mixture], **options)


@train.command(
    "references",
    epilog=examples(
        'poolreg train references "code+prose" "code+web"',
        "poolreg train references --subsets 2-3 --random 5",
        "poolreg train references --file mixtures.txt --budget sum",
    ),
)
@click.argument("mixtures", nargs=-1, metavar="[EXPR]...", shell_complete=complete("partition"))
@click.option("--file", type=click.Path(dir_okay=False), help="Mixtures, one a line.")
@click.option(
    "--subsets", type=size_range, metavar="SIZES", help="Unions of 2, or 1-3, partitions."
)
@click.option("--random", type=click.IntRange(min=1), metavar="N", help="Draw N of the unions.")
@_FROM
@_BUDGET
@_SCHEME
@_trains
def references(
    pool: Pool, mixtures: tuple[str, ...], file: str | None, subsets: tuple[int, int] | None,
    random: int | None, **options: Any,
) -> Sequence[Trained]:  # fmt: skip
    """Train references on mixtures that are named, listed or drawn."""
    from poolreg.evaluation.sweep import choose_subsets, read_mixtures

    chosen = list(mixtures)
    if file:
        chosen += map(str, read_mixtures(pool.registry, Path(file)))
    if subsets or random:
        chosen += map(str, choose_subsets(pool.registry, sizes=subsets, limit=random))
    if not chosen:
        raise click.UsageError("name mixtures, or choose them with --file, --subsets or --random")
    return pool.train_references(chosen, **options)
