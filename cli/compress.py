"""poolreg compress: smaller variants of models and mixtures, without gradients."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from .names import complete
from .options import SCHEMES, examples, formatted, in_pool, seed_option
from .output import message, show
from .progress import bar
from .publishing import push_options
from .variants import columns, notes, plan_row, say_plan, variant_rows

if TYPE_CHECKING:
    from poolreg.compress.variants import Variant, VariantPlan
    from poolreg.pool import Pool
    from poolreg.progress import Progress


def _ratios(_: click.Context, __: click.Parameter, value: str) -> list[float]:
    try:
        return [float(part) for part in value.split(",")]
    except ValueError:
        raise click.BadParameter(f"{value!r} is no ratio; write 0.3, or 0.1,0.2,0.3") from None


@click.command(
    epilog=examples(
        "poolreg compress base --ratio 0.3 --calibrate wiki --name base-small",
        'poolreg compress "code+prose" --ratio 0.1,0.2,0.3 --calibrate wiki --on wiki,news',
        "poolreg compress base --ratio 0.4 --calibrate code --target stock --dry-run",
        "poolreg compress base --ratio 0.2,0.4 --calibrate wiki --push you/base",
        "poolreg compress --members --ratio 0.3 --calibrate wiki --on news",
    )
)
@click.argument("sources", nargs=-1, metavar="[MODEL|EXPR]...",
                shell_complete=complete("model", "partition"))  # fmt: skip
@click.option("--members", is_flag=True, help="Every unit model of the pool.")
@click.option("--file", type=click.Path(dir_okay=False), help="Mixtures of a file, one a line.")
@click.option(
    "--ratio", "ratios", required=True, callback=_ratios, metavar="R[,R...]",
    help="Share of the block parameters (attention and MLPs) to remove; several make several.",
)  # fmt: skip
@click.option(
    "--calibrate", required=True, metavar="TEXT", shell_complete=complete("evalset", "partition"),
    help="Evalset, or partition, whose activations say what matters.",
)  # fmt: skip
@click.option("--name", help="Name of the variant; of several, NAME-10, NAME-20, …")
@click.option(
    "--on", metavar="EVALSET", multiple=True, shell_complete=complete("evalset"),
    help="Measure models and variants on these: again for each, or with commas.",
)  # fmt: skip
@click.option(
    "--method", type=click.Choice(["poolreg", "modegpt"]), default="poolreg", show_default=True,
    help="modegpt is the paper's method; poolreg adds to it.",
)  # fmt: skip
@click.option(
    "--without", multiple=True, metavar="PART",
    help="Leave out a part of the method poolreg, to see what it is worth: allocation, probe, obs, "
    "joint-svd, mixed-values, two-sided, rescale, intercept.",
)  # fmt: skip
@click.option(
    "--target", type=click.Choice(["full", "portable", "stock"]), default="full",
    show_default=True,
    help="full: each module has its size. portable: only MLPs shrink, each to its width. stock: "
    "one size for all layers, which loads without poolreg.",
)  # fmt: skip
@click.option(
    "--tokens", type=click.IntRange(min=1), metavar="N",
    help="Calibrate on about N tokens (default: 20 a channel of the widest).",
)  # fmt: skip
@click.option(
    "--round", "step", type=click.IntRange(min=1), metavar="N",
    help="Widths are multiples of N (default: 128 on large models, less on small).",
)  # fmt: skip
@click.option("--epsilon", type=float, default=0.1, show_default=True,
              help="Of modegpt's allocation: small spares important layers more.")  # fmt: skip
@click.option("--sequential", is_flag=True,
              help="Measure each layer behind those already compressed: slower.")  # fmt: skip
@click.option(
    "--max-length", type=click.IntRange(min=1), metavar="N",
    help="Tokens in a window (default: the model's context, at most 2048).",
)  # fmt: skip
@click.option("--dtype", default="float32", show_default=True, help="Compute in this dtype.")
@click.option("--device", default="auto", show_default=True, help="auto, cpu or cuda.")
@click.option("--scheme", type=SCHEMES, default="micro", show_default=True,
              help="Weigh base units, or partitions, of EXPR equally.")  # fmt: skip
@seed_option("--from", "--seed", help="Use the models of this seed, if there are several.")
@click.option("--replace", is_flag=True, help="Give the name to this variant if it is taken.")
@push_options
@click.option("--dry-run", is_flag=True, help="Print the plan and stop; the calibration is kept.")
@in_pool
@formatted
def compress(
    pool: Pool, sources: tuple[str, ...], members: bool, file: str | None, ratios: list[float],
    name: str | None, on: tuple[str, ...], replace: bool, push: str | None, private: bool,
    dry_run: bool, form: str, **how: Any,
) -> None:  # fmt: skip
    """Make smaller variants of models or mixtures.

    Modules of each layer are replaced by smaller ones that give nearly the same outputs on the
    calibration text: nothing is trained. A variant is a model of the pool, with its lineage.
    The plan is printed first. What was calibrated or made before is taken from the pool.
    Several variants are published as REPO-10, REPO-20, …, like their names.
    """
    evalsets = [part for value in on for part in value.split(",") if part]
    for evalset in evalsets:  # before anything is made
        pool.evalset(evalset)
    rows: list[dict[str, Any]] = []
    repos = _repositories(push, ratios)
    single = "--name" if name else "--push" if push else None
    for label in _subjects(pool, sources, members, file, single):
        with bar() as progress:
            if dry_run:
                for plan in pool.plan_compression(label, ratios, progress=progress, **how):
                    say_plan(label, plan)
                    rows.append(plan_row(label, plan))
            else:
                made = pool.compress(
                    label, ratios, name=name, replace=replace, progress=progress,
                    announce=partial(_announce, label, repos, private), **how,
                )  # fmt: skip
                rows += variant_rows(pool, label, made, on=evalsets, progress=progress)
                for variant, repo in zip(made, repos.values(), strict=False):
                    _publish(pool, variant, repo, private=private, progress=progress)
    show(rows, form, columns(rows), names="variant", notes=notes(rows, how["calibrate"], evalsets))


def _subjects(
    pool: Pool, sources: Sequence[str], members: bool, file: str | None,
    single: str | None,
) -> list[str]:  # fmt: skip
    if [bool(sources), members, file is not None].count(True) != 1:
        raise click.UsageError("name models or mixtures, or give --members or --file")
    chosen = list(sources)
    if members:
        chosen = pool.unit_models()
    if file:
        from poolreg.evaluation.sweep import read_mixtures

        chosen = [str(mixture) for mixture in read_mixtures(pool.registry, Path(file))]
    if single and len(chosen) != 1:
        raise click.UsageError(f"{single} is for the variants of one model or mixture")
    return chosen


def _repositories(push: str | None, ratios: Sequence[float]) -> dict[float, str]:
    """Return the repository of each ratio's variant."""
    if push is None:
        return {}
    from poolreg.sharing.single import variant_repositories

    return dict(zip(ratios, variant_repositories(push, ratios), strict=True))


def _announce(label: str, repos: dict[float, str], private: bool, plan: VariantPlan) -> None:
    """Print a plan, and make sure that there is a place for what it makes."""
    say_plan(label, plan)
    if repos:
        from poolreg.sharing.single import model_repository

        model_repository(repos[plan.ratio], private=private)


def _publish(pool: Pool, variant: Variant, repo: str, *, private: bool, progress: Progress) -> None:
    from poolreg.sharing.single import push_variant

    url = push_variant(pool.registry, variant.digest, repo, private=private, progress=progress)
    message(f"{variant.label}: published as {url}")
