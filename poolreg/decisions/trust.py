"""Can the proxy be trusted? The numbers of `strata`, and what they come to in plain sentences."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from poolreg.decisions.measures import only_seed
from poolreg.decisions.proxies import AVERAGES, NULLS, Comparison, compare
from poolreg.decisions.strata import (
    FEWEST,
    FORECAST,
    TrustRow,
    macro_statistic,
    of_macro,
    together,
    trust_rows,
)
from poolreg.evaluation.evaluate import Settings
from poolreg.numerics import statistics
from poolreg.progress import SILENT, Progress
from poolreg.store.registry import Registry

WELL, FAIRLY = 0.8, 0.5  # by the lower end of the rank correlation's interval
BUDGETS = {"same": "the budget of one unit", "sum": "the summed budget of their units"}


@dataclass(frozen=True)
class TrustReport:
    """All rows, for each budget its macro rows first, and what they come to in sentences."""

    rows: tuple[TrustRow, ...]
    verdict: tuple[str, ...]


def proxy_report(
    registry: Registry, on: Sequence[str] = (), *, seed: str | None = None,
    settings: Settings | None = None, run_missing: bool = True, progress: Progress = SILENT,
) -> TrustReport:  # fmt: skip
    """Compare every kind of proxy with the references of a seed, on evalsets and tasks.

    `run_missing` measures proxies and references where the memo has nothing; without it only
    what is known counts. Raises `NotFound` for unknown names.
    """
    comparisons = compare(
        registry, on, seed=only_seed(registry, seed), settings=settings or Settings(),
        run_missing=run_missing, progress=progress,
    )  # fmt: skip
    rows = trust_rows(comparisons)
    return TrustReport(tuple(rows), tuple(_verdict(comparisons, rows)))


def _verdict(comparisons: Sequence[Comparison], rows: Sequence[TrustRow]) -> Iterator[str]:
    if not comparisons:
        yield "There is no reference: train some with `poolreg train references`."
    for budget in dict.fromkeys(comparison.budget for comparison in comparisons):
        yield from _of_budget([c for c in comparisons if c.budget == budget], rows, budget)


def _of_budget(
    comparisons: Sequence[Comparison], rows: Sequence[TrustRow], budget: str | None
) -> Iterator[str]:
    count = min(len(comparison.blends) for comparison in comparisons)
    trained = f"trained on {BUDGETS.get(budget or '', 'an unknown budget')}"
    averages = [
        row for kind in AVERAGES
        if (row := of_macro(rows, budget, kind)) and row.spearman is not None
    ]  # fmt: skip
    if not averages:
        yield (
            f"{count} references {trained}: too few to say anything, {FEWEST} are needed; "
            "`poolreg proxy next` names the most useful one."
        )
        return
    averages.sort(key=lambda row: -(row.spearman or 0.0))
    best = averages[0]
    ranks = ", ".join(f"{row.kind} {_correlation(row)}" for row in averages)
    yield (
        f"Against {count} references {trained}, the proxies rank mixtures {_words(best)}: mean "
        f"rank correlation over {best.evalsets} evalsets {ranks}."
    )
    if together(comparisons, best.kind) is None:
        yield (
            "The evalsets have different references, so mixtures cannot be drawn together: no "
            "interval, and no comparison with the nulls. Measure them all: poolreg proxy report."
        )
    else:
        for null in NULLS:
            yield from _against(comparisons, best.kind, null)
    yield from _membership(rows, budget, best)
    if any(comparison.measure.source == "task" for comparison in comparisons):
        yield "Evalsets and tasks are of different units: look at regret and errors one by one."
        return
    if best.regret_1 is not None:
        share = best.regret_1_share
        yield (
            f"Training on the favourite of {best.kind} in place of the truly best reference costs "
            f"{best.regret_1:.4f} bits/byte on average"
            + ("." if share is None else f", {share:.0%} of the spread.")
        )
    yield from _forecast(rows, budget)


def _words(best: TrustRow) -> str:
    """Say how good a rank correlation is by the lower end of its interval."""
    low = best.spearman_low
    if low is None and (best.spearman or 0.0) >= statistics.FISHER_CLIP:
        return "without a mistake"  # so do all resamples, and there is no interval
    if low is None:
        return "as follows (too little to say how surely)"
    return "well" if low >= WELL else "fairly" if low >= FAIRLY else "NOT reliably"


def _correlation(row: TrustRow) -> str:
    if row.spearman_low is None or row.spearman_high is None:
        return f"{row.spearman:.3f}"
    return f"{row.spearman:.3f} [{row.spearman_low:.3f}, {row.spearman_high:.3f}]"


def _against(comparisons: Sequence[Comparison], kind: str, null: str) -> Iterator[str]:
    """Compare a proxy with a null on the evalsets that both know, by paired bootstrap."""
    both = [c for c in comparisons if kind in c.predicted and null in c.predicted]
    ours, theirs = together(both, kind), together(both, null)
    if null == "seed" or ours is None or theirs is None:
        return  # the seed predicts the same for every mixture: it ranks nothing
    one = macro_statistic("spearman", *ours)
    other = macro_statistic("spearman", *theirs)
    every = np.arange(ours[1].shape[1])
    gap = float(one(every) - other(every))
    low, high = statistics.bootstrap_interval(lambda i: one(i) - other(i), len(every))
    if not math.isfinite(low):  # the same gap whichever mixtures are drawn
        low = high = gap
    where = (
        f"on {len(ours[0])} evalsets: difference of the mean rank correlation {gap:+.3f} "
        f"[{low:+.3f}, {high:+.3f}]"
    )
    if low > 0:
        yield f"{kind} is better than {null} {where}."
    elif high < 0:
        yield f"{null}, which averages nothing, does BETTER than {kind} {where}."
    else:
        said = f"does as well as {kind}, as far as can be told,"
        yield f"{null}, which averages nothing, {said} {where}."


def _membership(rows: Sequence[TrustRow], budget: str | None, best: TrustRow) -> Iterator[str]:
    own, inside = (
        of_macro(rows, budget, best.kind, stratum) for stratum in ("own partition", "in domain")
    )
    if own and inside and own.spearman is not None and inside.spearman is not None:
        yield (
            f"In domain {best.kind} has {inside.spearman:.3f}; among mixtures that all hold the "
            f"evalset's own partition {own.spearman:.3f}."
        )


def _forecast(rows: Sequence[TrustRow], budget: str | None) -> Iterator[str]:
    row = of_macro(rows, budget, FORECAST)
    if row and row.coverage is not None:
        yield (
            f"The 90% interval of a prediction holds {row.coverage:.0%} of left-out references; "
            f"it is {row.width:.4f} bits/byte wide and its middle is off by "
            f"{row.mean_absolute_error:.4f}."
        )
