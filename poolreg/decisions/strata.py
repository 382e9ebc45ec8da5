"""How each kind of proxy fares against models really trained on the mixtures, in numbers.

Correlations are never pooled over evalsets: evalsets differ far more than mixtures do, and a
pooled r would measure that. Each evalset has its own row; macro rows average them, correlations
by Fisher's z. Budgets are kept apart. With fewer than FEWEST references a row is withheld.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from poolreg.decisions.ensemble import Floats
from poolreg.decisions.proxies import AVERAGE, KINDS, Comparison
from poolreg.numerics import conformal, statistics

FEWEST = 5  # references below which nothing is said
FEWEST_COVERED = conformal.LEAST_REFERENCES + 1  # one is left out to see whether it is covered
FORECAST = "forecast"  # the fit on several proxies, see `predict`

Index = Sequence[int]


@dataclass(frozen=True)
class TrustRow:
    """How one kind of proxy fares on one evalset (None: the mean over evalsets) in one stratum.

    Losses are in bits per byte. `regret_k` is what the best of the proxy's k favourites loses
    against the truly best reference; `regret_1_share` is its share of the spread between the
    best and the worst. `top_quarter` is the rank correlation inside the truly best quarter.
    `slope`, `intercept`: reference ≈ slope · proxy + intercept; `mean_absolute_error` is that of
    such fits with each reference left out. `coverage` is the share of references inside the 90%
    interval made from the others, `width` the interval's mean width. Intervals of correlations
    are 95%. What cannot be said is None, and `withheld` says why a row has nothing.

    Leaving out each of n references in turn, a jackknife+ interval holds close to its 90% by
    construction; its width, beside the spread of the references, tells what it is worth.
    """

    evalset: str | None
    budget: str | None
    kind: str
    stratum: str
    references: int
    evalsets: int = 1
    pearson: float | None = None
    pearson_low: float | None = None
    pearson_high: float | None = None
    spearman: float | None = None
    spearman_low: float | None = None
    spearman_high: float | None = None
    decision_accuracy: float | None = None
    regret_1: float | None = None
    regret_3: float | None = None
    regret_5: float | None = None
    regret_1_share: float | None = None
    top_quarter: float | None = None
    slope: float | None = None
    intercept: float | None = None
    mean_absolute_error: float | None = None
    coverage: float | None = None
    width: float | None = None
    withheld: str | None = None


_CORRELATIONS = ("pearson", "spearman", "top_quarter")
_INTERVALS = ("pearson_low", "pearson_high", "spearman_low", "spearman_high")
_MEANS = ("decision_accuracy", "regret_1", "regret_3", "regret_5", "regret_1_share", "slope",
          "intercept", "mean_absolute_error", "coverage", "width")  # fmt: skip
# Their predictions only rank: no loss can be read off them.
_ONLY_RANK = ("own-domain", "natural")


def trust_rows(comparisons: Sequence[Comparison]) -> list[TrustRow]:
    """Return the rows of all evalsets, kinds and strata, for each budget its macro rows first."""
    budgets = dict.fromkeys(comparison.budget for comparison in comparisons)
    return [
        row
        for budget in budgets
        for row in _budget_rows([c for c in comparisons if c.budget == budget])
    ]


def _budget_rows(comparisons: Sequence[Comparison]) -> list[TrustRow]:
    single = [
        row
        for comparison in comparisons
        for stratum, index in strata(comparison)
        for row in _stratum_rows(comparison, stratum, index)
    ]
    return [*_macro_rows(comparisons, single), *single]


def strata(comparison: Comparison) -> Iterator[tuple[str, list[int]]]:
    """Yield the named groups of references in which statistics are computed."""
    blends = comparison.blends
    every = range(len(blends))
    yield "all", list(every)
    if own := comparison.own:
        yield "own partition", [i for i in every if own in blends[i].shares]
    for size in sorted({blend.size for blend in blends}):
        yield f"size {size}", [i for i in every if blends[i].size == size]
    for name in sorted({name for blend in blends for name in blend.shares}):
        yield f"without {name}", [i for i in every if name not in blends[i].shares]


def _stratum_rows(comparison: Comparison, stratum: str, index: list[int]) -> Iterator[TrustRow]:
    for kind in KINDS:
        if kind == "macro" and comparison.one_scheme:
            continue
        row = TrustRow(comparison.measure.name, comparison.budget, kind, stratum, len(index))
        if kind not in comparison.predicted:
            if comparison.blends and kind != "own-domain":
                yield replace(row, withheld="not measured")
        elif len(index) < FEWEST:
            yield replace(row, withheld=_too_few(len(index)))
        else:
            yield _measured_row(row, comparison, index)
    if stratum == "all":
        yield _forecast_row(comparison)


def _too_few(count: int) -> str:
    return f"{count} of the {FEWEST} references that are needed"


def _measured_row(row: TrustRow, comparison: Comparison, index: list[int]) -> TrustRow:
    predicted, actual = comparison.predicted[row.kind][index], comparison.actual[index]
    spread = float(np.ptp(actual))
    regrets = [statistics.regret_at(predicted, actual, k) for k in (1, 3, 5)]
    facts: dict[str, float] = {
        "pearson": statistics.pearson(predicted, actual),
        "spearman": statistics.spearman(predicted, actual),
        "decision_accuracy": statistics.decision_accuracy(predicted, actual),
        "top_quarter": statistics.top_quarter_spearman(predicted, actual),
        "regret_1": regrets[0], "regret_3": regrets[1], "regret_5": regrets[2],
        "regret_1_share": regrets[0] / spread if spread else math.nan,
    }  # fmt: skip
    if row.kind not in _ONLY_RANK:
        fit = statistics.affine_calibration(predicted, actual)
        facts |= {"slope": fit.slope, "intercept": fit.intercept,
                  "mean_absolute_error": fit.mean_absolute_error}  # fmt: skip
    if row.stratum == "all":
        facts |= _intervals(predicted[None], actual[None])
        if row.kind not in _ONLY_RANK and len(index) >= FEWEST_COVERED:
            facts |= _coverage(predicted[:, None], actual)
    return replace(row, **_finite(facts))


def _coverage(features: Floats, actual: Floats) -> dict[str, float]:
    covered, width = conformal.coverage(features, actual)
    return {"coverage": covered, "width": width}


def _finite(facts: dict[str, float]) -> dict[str, Any]:
    return {name: value if math.isfinite(value) else None for name, value in facts.items()}


def _forecast_row(comparison: Comparison) -> TrustRow:
    count = len(comparison.actual)
    row = TrustRow(comparison.measure.name, comparison.budget, FORECAST, "all", count)
    if AVERAGE not in comparison.predicted or count < FEWEST_COVERED:
        return replace(row, withheld=f"{count} of the {FEWEST_COVERED} references that are needed")
    features, actual = comparison.features(), comparison.actual
    facts = _coverage(features, actual)
    facts["mean_absolute_error"] = conformal.left_out_error(features, actual)
    return replace(row, **_finite(facts))


# -- macro averages --------------------------------------------------------------------------


def _macro_rows(comparisons: Sequence[Comparison], single: Sequence[TrustRow]) -> list[TrustRow]:
    """Average rows over evalsets: over all of them, and over those in and out of domain."""
    own = {c.measure.name for c in comparisons if c.own}
    groups: dict[tuple[str, str], list[TrustRow]] = {}
    for row in single:
        groups.setdefault((row.kind, row.stratum), []).append(row)
    rows = []
    for (kind, stratum), members in groups.items():
        if stratum == "all" and 0 < len(own) < len(comparisons):
            inside = [row for row in members if row.evalset in own]
            outside = [row for row in members if row.evalset not in own]
            for name, part in (("in domain", inside), ("out of domain", outside)):
                rows.append(_mean_row(part, kind, name))
        mean = _mean_row(members, kind, stratum)
        if stratum == "all" and mean and mean.withheld is None:
            mean = replace(mean, **_macro_intervals(comparisons, kind))
        rows.append(mean)
    order = {stratum: place for place, stratum in enumerate(["all", "in domain", "out of domain"])}
    found = [row for row in rows if row]
    return sorted(found, key=lambda row: order.get(row.stratum, len(order)))


def _mean_row(members: Sequence[TrustRow], kind: str, stratum: str) -> TrustRow | None:
    if not members:
        return None
    usable = [row for row in members if row.withheld is None]
    fewest = min(row.references for row in usable or members)
    row = TrustRow(None, members[0].budget, kind, stratum, fewest, evalsets=len(usable))
    if not usable:
        return replace(row, withheld=members[0].withheld)
    facts: dict[str, Any] = {}
    for name in _CORRELATIONS + _MEANS:
        values = [value for r in usable if (value := getattr(r, name)) is not None]
        if values:
            mean = statistics.fisher_mean if name in _CORRELATIONS else np.mean
            facts[name] = float(mean(np.array(values)))
    return replace(row, **facts)


def _macro_intervals(comparisons: Sequence[Comparison], kind: str) -> dict[str, Any]:
    """Bootstrap the macro average over mixtures: the same mixtures are drawn on every evalset."""
    shared = together(comparisons, kind)
    if shared is None:
        return {}
    return _finite(_intervals(*shared))


def _intervals(predicted: Floats, actual: Floats) -> dict[str, float]:
    """Return the 95% intervals of the mean correlations, both (evalsets, references)."""
    facts: dict[str, float] = {}
    for name in ("pearson", "spearman"):
        statistic = macro_statistic(name, predicted, actual)
        low, high = statistics.bootstrap_interval(statistic, actual.shape[1])
        facts |= {f"{name}_low": low, f"{name}_high": high}
    return facts


def together(comparisons: Sequence[Comparison], kind: str) -> tuple[Floats, Floats] | None:
    """Return (predicted, actual) of all evalsets that know a kind, (evalsets, references).

    None if their references are not the same, for then mixtures cannot be drawn together.
    """
    able = [c for c in comparisons if kind in c.predicted and len(c.actual) >= FEWEST]
    if not able or len({tuple(b.digest for b in c.blends) for c in able}) > 1:
        return None
    return np.stack([c.predicted[kind] for c in able]), np.stack([c.actual for c in able])


def macro_statistic(name: str, predicted: Floats, actual: Floats) -> Callable[[Floats], Floats]:
    """Return the mean correlation over evalsets as a function of drawn references (…, n)."""
    along = statistics.pearson_along if name == "pearson" else statistics.spearman_along

    def statistic(index: Floats) -> Floats:
        rows = [along(p[index], a[index]) for p, a in zip(predicted, actual, strict=True)]
        means: Floats = statistics.fisher_mean(np.stack(rows, axis=-1))
        return means

    return statistic


def of_macro(
    rows: Iterable[TrustRow], budget: str | None, kind: str, stratum: str = "all"
) -> TrustRow | None:
    """Return the macro row of a budget, kind and stratum."""
    wanted = (None, budget, kind, stratum)
    return next((r for r in rows if (r.evalset, r.budget, r.kind, r.stratum) == wanted), None)
