"""poolreg proxy: can the averages be trusted, and which reference would tell most?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import click

from .options import BUDGETS, examples, formatted, in_pool, measuring
from .output import Column, fixed, message, plain, show, to_json
from .progress import bar

if TYPE_CHECKING:
    from poolreg.decisions.strata import TrustRow
    from poolreg.pool import Pool


@click.group(
    epilog=examples(
        "poolreg proxy report",
        "poolreg proxy report --on wiki,news --strata",
        "poolreg proxy next",
    )
)
def proxy() -> None:
    """Check averages against models really trained on the mixtures."""


@proxy.command(
    "report",
    epilog=examples(
        "poolreg proxy report",
        "poolreg proxy report --on wiki,news --each",
        "poolreg proxy report --strata",
        "poolreg proxy report --memoised --json > report.json",
    ),
)
@click.option("--each", is_flag=True, help="Each evalset too, not only the mean over them.")
@click.option(
    "--strata",
    is_flag=True,
    help="Inside groups of mixtures, too: of one size, with the own partition.",
)
@click.option("--memoised", is_flag=True, help="Measure nothing: only what is known counts.")
@measuring("--from", "--seed", scheme=False)
@in_pool
@formatted
def report(pool: Pool, form: str, each: bool, strata: bool, memoised: bool,
           **options: Any) -> None:  # fmt: skip
    """Compare proxies with trained references, and conclude.

    Kinds are the averages (micro, macro), the ensemble of the unit models, and nulls that need
    no average: the mean of the unit models' losses, the share of the evalset's own domain, the
    distance to natural proportions, the seed model. Statistics are computed within each evalset
    and then averaged, never pooled.
    """
    with bar() as progress:
        found = pool.proxy_report(run_missing=not memoised, progress=progress, **options)
    rows = [asdict(row) for row in found.rows]
    if form == "json":
        click.echo(to_json({"verdict": found.verdict, "rows": [plain(row) for row in rows]}))
    elif form == "table":
        _show(found.rows, each, strata)
        click.echo("\n".join(found.verdict))
    else:
        show(rows, form, names="kind")


def _show(found: Sequence[TrustRow], each: bool, strata: bool) -> None:
    """Print how proxies rank, then how near their values are."""
    rows = [_words(row) for row in found if _shown(row, each, strata)]
    budget = [Column("budget")] if len({row["budget"] for row in rows}) > 1 else []
    first = [
        *budget,
        Column("where", "evalset, mixtures"),
        Column("kind"),
        Column("references", "n"),
    ]
    ranks = [
        Column("rho", "Spearman [95%]"),
        Column("decision_accuracy", "pairs right", _share),
        Column("regret_1", "regret@1", fixed(4)),
        Column("regret_1_share", "of spread", _share),
        Column("regret_3", "@3", fixed(4)),
        Column("regret_5", "@5", fixed(4)),
        Column("top_quarter", "best quarter", fixed(2)),
    ]
    values = [
        Column("r", "Pearson [95%]"),
        Column("slope", write=fixed(2)),
        Column("intercept", write=fixed(2, sign=True)),
        Column("mean_absolute_error", "off by", fixed(4)),
        Column("coverage", "90% holds", _share),
        Column("width", write=fixed(4)),
    ]
    for title, columns in (("Does it rank mixtures?", ranks), ("Does it give the value?", values)):
        keys = [column.key for column in columns]
        told = [row for row in rows if row["withheld"] or any(row[key] for key in keys)]
        if told:
            click.secho(title, bold=True)
            show(told, "table", [*first, *columns])
            click.echo()
    if rows:
        click.echo(
            "means of correlations are by Fisher's z; regret, 'off by', width in bits/byte\n"
        )


def _said(value: Any) -> bool:
    return value not in (None, "")  # a regret of zero says a lot


def _shown(row: TrustRow, each: bool, strata: bool) -> bool:
    overall = row.stratum in ("all", "in domain", "out of domain")
    useful = row.withheld is None or row.stratum == "all"
    return useful and (strata or overall) and (each or row.evalset is None)


def _words(row: TrustRow) -> dict[str, Any]:
    """Return a row with its place and its correlations as text."""
    words = asdict(row)
    place = row.evalset or f"mean of {row.evalsets}"
    words["where"] = place if row.stratum == "all" else f"{place}, {row.stratum}"
    words["r"] = _correlation(row.pearson, row.pearson_low, row.pearson_high)
    words["rho"] = _correlation(row.spearman, row.spearman_low, row.spearman_high)
    if row.withheld:
        words["r"] = words["rho"] = f"withheld: {row.withheld}"
    return words


def _correlation(value: float | None, low: float | None, high: float | None) -> str:
    if value is None or low is None or high is None:
        return "" if value is None else f"{value:.3f}"
    return f"{value:.3f} [{low:.2f}, {high:.2f}]"


def _share(value: float | None) -> str:
    return "" if value is None else f"{value:.0%}"


@proxy.command(
    "next",
    epilog=examples(
        "poolreg proxy next",
        "poolreg proxy next --on wiki -n 3",
        'poolreg train reference "$(poolreg proxy next -n 1 --format quiet)"',
    ),
)
@click.option("-n", "--number", "most", type=click.IntRange(min=1), default=10, show_default=True,
              metavar="N", help="How many to name.")  # fmt: skip
@click.option("--budget", type=BUDGETS, help="Beside references of this budget only.")
@measuring("--from", "--seed", scheme=False)
@in_pool
@formatted
def next_(pool: Pool, form: str, most: int, budget: str | None, on: list[str], seed: str | None,
          settings: Any) -> None:  # fmt: skip
    """Name the mixtures whose reference would help most.

    These are measured mixtures that lie far from what the references show (leverage), or on
    which the proxies disagree. Nothing is measured.
    """
    found = pool.next_references(on, seed=seed, settings=settings, budget=budget)[:most]
    columns = [Column("mixture"), Column("size"), Column("leverage", write=fixed(3)),
               Column("disagreement", write=fixed(2))]  # fmt: skip
    show([asdict(row) for row in found], form, columns, names="mixture")
    if form == "table":
        message(f'train it: poolreg train reference "{found[0].mixture}"')
