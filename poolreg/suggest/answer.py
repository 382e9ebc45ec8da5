"""Which mixture is best? A search over shares under constraints, with measured proof.

A suggestion comes from the ensemble of the unit models (convex, no inference), from a surrogate
of the measured rows, or from rounds that propose, average, measure and fit again within a budget.
What a round proposed is recorded as adaptive, so that it never enters statistics on how good
proxies are. Baselines stand beside every answer.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np

from poolreg.decisions.measures import measured
from poolreg.errors import NotFound
from poolreg.numerics.mixing import Goal, Solution
from poolreg.numerics.regions import Floats
from poolreg.progress import SILENT, Progress
from poolreg.suggest.request import SuggestPlan
from poolreg.suggest.rounds import Row, Search
from poolreg.suggest.shares import Shares, as_floats
from poolreg.suggest.surrogate import LEVEL, Fact, Surrogate

SHOWN = 10  # of the measured, beside the optima and baselines


@dataclass(frozen=True)
class Suggestion:
    """One mixture. Predicted, low, high and measured are in the unit of the objective.

    `predicted` of a measured row is what the fit without this row says. `allowed` tells whether
    it keeps the constraints; `per_measure` are measured values, or predicted ones.
    """

    rank: int
    mixture: str
    shares: Mapping[str, float]
    source: str
    measured: float | None
    predicted: float | None
    low: float | None
    high: float | None
    allowed: bool
    per_measure: Mapping[str, float]


@dataclass(frozen=True)
class Effort:
    """What an answer cost and how it was found.

    `known` rows were measured before, `evaluated` mixtures by the search, `beside` baselines and
    the seed. `gap` is how much better any mixture can be under the ensemble, in bits per byte.
    """

    known: int
    evaluated: int
    beside: int
    rounds: int
    stopped: str
    search: str | None  # how the ensemble's best was found; None without an ensemble
    gap: float | None
    seconds: float | None  # that it took


@dataclass(frozen=True)
class Suggestions:
    """The answer: ranked rows, baselines among them, and what the predictions rest on."""

    objective: str
    constraints: tuple[str, ...]
    rows: tuple[Suggestion, ...]
    baselines: Mapping[str, int]  # name → rank
    predictor: str
    facts: tuple[Fact, ...]
    error: float | None  # root mean square over left-out rows, of the objective
    level: float | None  # of the intervals
    effort: Effort
    pool: str
    seed: str

    @property
    def best(self) -> Suggestion | None:
        """The best row that keeps the constraints."""
        return next((row for row in self.rows if row.allowed), None)


def suggest(planned: SuggestPlan, *, progress: Progress = SILENT) -> Suggestions:
    """Do what a plan says and return ranked mixtures.

    At most `budget` mixtures are measured, and with a budget also the baselines and, for the
    worst group, the seed model. Raises `NotFound` where nothing is known and there is no budget.
    """
    goal, beside = _goal(planned, progress)
    search = Search(planned.field, planned.measures, goal, planned.limited.region,
                    planned.settings, progress)  # fmt: skip
    search.load()
    known = len(search.rows)
    if planned.budget:
        beside += search.measure([(b.shares, b.name) for b in planned.baselines], "design")
    used = search.learn(planned.budget)
    begun = time.perf_counter()
    solution = search.ensemble_best()
    seconds = time.perf_counter() - begun if solution else None
    if solution is None and not search.rows:
        raise NotFound(
            "nothing is known of these partitions and evalsets yet",
            hint="let it measure some mixtures: --budget 10; or run poolreg sweep --subsets",
        )
    first = search.exact(solution.shares) if solution else None
    if first is not None and used < planned.budget:
        used += search.measure([(first, "ensemble")], "adaptive")
    more, stopped = search.run(planned.budget - used, solution.shares if solution else None)
    effort = Effort(
        known, used + more, beside, search.rounds, stopped,
        solution.search if solution else None, solution.gap if solution else None, seconds,
    )  # fmt: skip
    return _answer(planned, search, solution, effort)


def _goal(planned: SuggestPlan, progress: Progress) -> tuple[Goal, int]:
    """Return the goal, and how many models were measured for it."""
    if not planned.request.worst_group:
        return Goal(np.array([planned.weights]), np.zeros(1)), 0
    seed = planned.field.resolver.model(planned.seed)
    registry = planned.field.registry
    known = measured(registry, [seed], planned.measures, planned.settings, run_missing=False)
    values = known
    if planned.budget and len(known) < len(planned.measures):
        values = measured(registry, [seed], planned.measures, planned.settings,
                          run_missing=True, progress=progress)  # fmt: skip
    missing = [m.name for m in planned.measures if (seed.digest, m.digest) not in values]
    if missing:
        raise NotFound(
            f"the seed model {seed.label} is not measured on {', '.join(missing)}",
            hint=f"measure it: poolreg eval {seed.label}; or give a --budget",
        )
    offsets = -np.array([values[seed.digest, measure.digest] for measure in planned.measures])
    return Goal(np.eye(len(offsets)), offsets), int(len(values) > len(known))


# -- the answer ----------------------------------------------------------------------------------

_SINGLE = "best single partition"


def _answer(
    planned: SuggestPlan, search: Search, solution: Solution | None, effort: Effort
) -> Suggestions:
    surrogate = search.surrogate()
    optima: list[tuple[Floats, str]] = []
    if surrogate is not None:
        starts = [solution.shares] if solution else []
        optima.append((search.surrogate_best(surrogate, starts).shares, "surrogate"))
    if solution is not None:
        optima.append((solution.shares, "ensemble"))
    predict = _Predictor(search, surrogate)
    rows = [_suggestion(search, predict, *item) for item in _candidates(planned, search, optima)]
    rows.sort(key=_order)
    ranked = tuple(replace(row, rank=rank) for rank, row in enumerate(rows, start=1))
    names = [*(baseline.name for baseline in planned.baselines), _SINGLE]
    facts: tuple[Fact, ...] = ()
    if surrogate is not None:
        values = np.array([row.values for row in search.rows.values()])
        facts = surrogate.facts(planned.measures, values)
    return Suggestions(
        planned.objective, planned.constraints, ranked,
        {n: row.rank for n in names for row in ranked if n in row.source.split(", ")},
        predict.words, facts, surrogate.error if surrogate else None,
        min(LEVEL, len(search.rows) / (len(search.rows) + 1)) if surrogate else None,
        effort, _pool_id(planned), planned.seed,
    )  # fmt: skip


def _order(row: Suggestion) -> float:
    values = (value for value in (row.measured, row.predicted) if value is not None)
    return next(values, np.inf)


def _pool_id(planned: SuggestPlan) -> str:
    text = (planned.field.registry.root / "FORMAT").read_text(encoding="utf-8")
    return str(json.loads(text)["id"])


def _candidates(
    planned: SuggestPlan, search: Search, optima: list[tuple[Floats, str]]
) -> list[tuple[Shares, str, Row | None]]:
    """Return what is shown: the best measured, the optima, the baselines; each once."""
    measured_rows = sorted(search.rows.values(), key=search.value)
    sources: dict[Shares, list[str]] = {}
    for row in [row for row in measured_rows if search.allowed(row.shares)][:SHOWN]:
        sources.setdefault(row.shares, []).append(row.source)
    for shares, source in optima:
        exact = search.settled(shares)
        if exact is not None:
            sources.setdefault(exact, []).append(source)
    for baseline in planned.baselines:
        sources.setdefault(baseline.shares, []).append(baseline.name)
    alone = next((row for row in measured_rows if max(row.shares) == 1), None)
    if alone is not None:
        sources.setdefault(alone.shares, []).append(_SINGLE)
    by_shares = {row.shares: row for row in measured_rows}
    return [
        (shares, ", ".join(_named(names)), by_shares.get(shares))
        for shares, names in sources.items()
    ]


def _named(names: list[str]) -> list[str]:
    """Return the names once each; that a row was known says nothing where it has another."""
    unique = list(dict.fromkeys(names))
    return [name for name in unique if name != "memo"] or unique


def _suggestion(
    search: Search, predict: _Predictor, shares: Shares, source: str, row: Row | None
) -> Suggestion:
    predicted, low, high, values = predict.of(shares, row)
    found = values if row is None else row.values
    names = [measure.name for measure in search.measures]
    return Suggestion(
        rank=0,
        mixture=str(search.given.mixture(shares)),
        shares={n: float(s) for n, s in zip(search.given.names, shares, strict=True) if s},
        source=source,
        measured=None if row is None else search.value(row),
        predicted=predicted,
        low=low,
        high=high,
        allowed=search.allowed(shares),
        per_measure={} if found is None else dict(zip(names, map(float, found), strict=True)),
    )


@dataclass(frozen=True, eq=False)
class _Predictor:
    """The surrogate; without one the ensemble, moved to the level of the measured rows."""

    search: Search
    surrogate: Surrogate | None

    @property
    def words(self) -> str:
        """What predictions rest on."""
        count = len(self.search.rows)
        if self.surrogate is not None:
            return f"a surrogate of {count} measured mixtures"
        if self.search.units is None:
            return f"nothing: {count} measured mixtures are too few for a surrogate"
        moved = f", moved to the level of {count} measured mixtures" if count else ""
        return f"the ensemble of the unit models{moved}"

    def of(
        self, shares: Shares, row: Row | None
    ) -> tuple[float | None, float | None, float | None, Floats | None]:
        """Return the predicted goal, its interval, and the predicted values."""
        point, goal = as_floats(shares), self.search.goal
        if self.surrogate is None:
            if self.search.units is None:
                return None, None, None, None
            values = self.search.units.ensemble(point)[0] + self.search.shift()
            return float(goal.of(values)), None, None, values
        if row is not None:
            index = list(self.search.rows).index(row.subject.digest)
            low, high, _ = self.surrogate.interval_of_row(index)
            return float(self.surrogate.left_out[index]), low, high, None
        values = self.surrogate(point)[0]
        low, high, _ = self.surrogate.interval(point)
        return float(goal.of(values)), low, high, values
