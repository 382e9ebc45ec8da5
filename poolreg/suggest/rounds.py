"""The search itself: propose shares, measure their averages, fit again, within a budget.

A `Search` holds the rows that are measured on every measure. It first learns what single
partitions do if it knows too little, then measures the ensemble's best, then does rounds: the
surrogate's best, and every third round but the last the mixture with the lowest confidence
bound. It stops early when there is nothing new to propose.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from fractions import Fraction

import numpy as np

from poolreg.decisions.measures import Measure, measured, protocol_of
from poolreg.evaluation.evaluate import Settings, note_subjects, plan
from poolreg.mixture import thousandths
from poolreg.models.resolve import Subject
from poolreg.numerics.mixing import MOST_SUPPORTS, Goal, Losses, Solution, minimise
from poolreg.numerics.regions import Floats, Region, pulled_in, rounded, supports
from poolreg.progress import SILENT, Progress
from poolreg.suggest.shares import Field, Shares, as_floats, known_averages
from poolreg.suggest.surrogate import Surrogate, Units, fitted, least_rows, units_of

_NEAR = 0.01  # Σ|Δs| below which a proposal repeats a row: fits err by more than it moves values
_EXPLORE = 3  # every third round explores
_DRAWS = 96  # random mixtures that an exploring round chooses from
_CONFIDENCE = 2.0  # how many errors of the fit the confidence bound lies below it


@dataclass(frozen=True, eq=False)
class Row:
    """A measured mixture: its average, shares, values [E], and where it came from."""

    subject: Subject
    shares: Shares
    values: Floats
    source: str

    @functools.cached_property
    def point(self) -> Floats:
        """The shares as float64."""
        return as_floats(self.shares)

    @functools.cached_property
    def parts(self) -> tuple[int, ...]:
        """The shares in thousandths."""
        return thousandths(self.shares)


@dataclass(eq=False)
class Search:
    """Measured rows of one field, and what is asked of them."""

    given: Field
    measures: Sequence[Measure]
    goal: Goal
    region: Region
    settings: Settings
    progress: Progress = SILENT
    rows: dict[str, Row] = field(default_factory=dict)  # by subject
    units: Units | None = None
    rounds: int = 0
    _ensembles: dict[str, Floats] = field(default_factory=dict)

    # -- rows ------------------------------------------------------------------------------

    def load(self) -> None:
        """Take in what the memo holds."""
        known = known_averages(self.given)
        self._take([(one.subject, one.shares, "memo") for one in known], run_missing=False)
        protocol = protocol_of(self.given.registry, self.given.seed, self.settings)
        self.units = units_of(self.given, self.measures, protocol.digest)

    def measure(self, wanted: Iterable[tuple[Shares, str]], origin: str) -> int:
        """Measure mixtures, given as shares with their source, and return how many were new."""
        subjects = [
            (self.given.subject(self.given.mixture(shares), origin), shares, source)
            for shares, source in wanted
        ]
        registry = self.given.registry
        note_subjects(registry, [subject for subject, _, _ in subjects])
        texts = [measure.digest for measure in self.measures if measure.source == "evalset"]
        work = plan(registry, [subject for subject, _, _ in subjects], texts, self.settings)
        self._take(subjects, run_missing=True)
        return len(work.missing)

    def _take(self, subjects: Sequence[tuple[Subject, Shares, str]], *, run_missing: bool) -> None:
        values = measured(
            self.given.registry, [subject for subject, _, _ in subjects], self.measures,
            self.settings, run_missing=run_missing, progress=self.progress,
        )  # fmt: skip
        for subject, shares, source in subjects:
            keys = [(subject.digest, measure.digest) for measure in self.measures]
            if all(key in values for key in keys) and subject.digest not in self.rows:
                found = np.array([values[key] for key in keys])
                self.rows[subject.digest] = Row(subject, shares, found, source)

    def value(self, row: Row) -> float:
        """Return the goal of a measured row."""
        return float(self.goal.of(row.values))

    def singles(self) -> list[tuple[Shares, str]]:
        """Return the single partitions that are not measured."""
        count = len(self.given.names)
        alone = [tuple(Fraction(int(k == own)) for k in range(count)) for own in range(count)]
        there = {row.shares for row in self.rows.values()}
        return [(shares, "single partition") for shares in alone if shares not in there]

    # -- predictions -----------------------------------------------------------------------

    def surrogate(self) -> Surrogate | None:
        """Fit what is measured; None for too few rows."""
        rows = list(self.rows.values())
        if len(rows) < least_rows(len(self.given.names)):
            return None
        shares = np.array([row.point for row in rows])
        values = np.array([row.values for row in rows])
        return fitted(shares, values, self.goal, self.units, self._ensembles_of(rows))

    def _ensembles_of(self, rows: Sequence[Row]) -> Floats | None:
        if self.units is None:
            return None
        for row in rows:
            if row.subject.digest not in self._ensembles:
                self._ensembles[row.subject.digest] = self.units.ensemble(row.point)[0]
        return np.array([self._ensembles[row.subject.digest] for row in rows])

    def shift(self) -> Floats:
        """Return by how much measured rows are above the ensemble, on average [E]."""
        rows = list(self.rows.values())
        ensembles = self._ensembles_of(rows)
        if ensembles is None or not rows:
            return np.zeros(len(self.measures))
        return np.asarray(np.mean([row.values for row in rows] - ensembles, axis=0))

    def ensemble_best(self) -> Solution | None:
        """Return the ensemble's best shares with their certificate; None without an ensemble."""
        if self.units is None:
            return None
        return minimise(self.units.ensemble, self.goal, self.region, convex=True)

    def surrogate_best(self, surrogate: Losses, starts: Iterable[Floats] = ()) -> Solution:
        """Return the surrogate's best shares, from the best rows and other starts."""
        inside = [row for row in self.rows.values() if self.allowed(row.shares)]
        best = sorted(inside, key=self.value)[:2]
        begun = [*starts, *(row.point for row in best)]
        return minimise(surrogate, self.goal, self.region, starts=begun)

    def allowed(self, shares: Shares) -> bool:
        """Tell whether shares keep the constraints, up to half a thousandth."""
        return self.region.contains(as_floats(shares), 5e-4)

    def exact(self, shares: Floats) -> Shares | None:
        """Return shares in whole parts, or those of a measured row that rounds to the same."""
        region = self.region
        if region.size is not None:
            region = region.within(tuple(np.flatnonzero(shares > 0).tolist()))
        found = rounded(region, shares)
        if found is None:
            return None
        made = tuple(Fraction(count, found[1]) for count in found[0])
        parts = tuple(found[0]) if found[1] == 1000 else thousandths(made)
        return next((row.shares for row in self.rows.values() if row.parts == parts), made)

    def settled(self, shares: Floats) -> Shares | None:
        """Return shares in whole parts, or those of an allowed row so near that they repeat it."""
        made = self.exact(shares)
        if made is None:
            return None
        near = [
            (float(np.abs(row.point - as_floats(made)).sum()), row.shares)
            for row in self.rows.values()
            if self.allowed(row.shares)
        ]
        distance, shares_of_row = min(near, default=(2.0, made))
        return shares_of_row if distance <= _NEAR else made

    # -- proposals -------------------------------------------------------------------------

    def learn(self, budget: int) -> int:
        """Measure single partitions while too few rows are known; return how many were new."""
        if len(self.rows) >= least_rows(len(self.given.names)):
            return 0
        used = self.measure(self.singles()[:budget], "design")
        if self.units is None and used:
            protocol = protocol_of(self.given.registry, self.given.seed, self.settings)
            self.units = units_of(self.given, self.measures, protocol.digest)
        return used

    def run(self, budget: int, start: Floats | None) -> tuple[int, str]:
        """Do rounds; return how many mixtures were measured, and why it ended.

        `start` is the ensemble's best, one of the starts of each search.
        """
        used = 0
        random = np.random.default_rng(len(self.rows))
        while used < budget:
            count = min(self.settings.workers or 1, budget - used)
            last = used + count == budget
            proposed = self._propose(count, [] if start is None else [start], random, last)
            if not proposed:
                return used, "nothing new to propose"
            self.rounds += 1
            new = [(shares, f"round {self.rounds}") for shares in proposed]
            used += self.measure(new, "adaptive")
        return used, "the budget is spent" if budget else "no budget"

    def _propose(
        self, count: int, starts: list[Floats], random: np.random.Generator, last: bool
    ) -> list[Shares]:
        surrogate = self.surrogate()
        proposed: list[Shares] = []
        if surrogate is not None and (last or (self.rounds + 1) % _EXPLORE):
            best = self.exact(self.surrogate_best(surrogate, starts).shares)
            if best is not None and self._distance(best, proposed) > _NEAR:
                proposed.append(best)
        while len(proposed) < count:
            other = self._explored(surrogate, proposed, random)
            if other is None:
                break
            proposed.append(other)
        return proposed

    def _explored(
        self, surrogate: Surrogate | None, proposed: list[Shares], random: np.random.Generator
    ) -> Shares | None:
        """Return the draw with the lowest confidence bound; None if none could be the best.

        The bound is prediction − 2·error·min(distance / typical distance, 1). Without a
        surrogate the draw farthest from all rows is returned.
        """
        draws = {shares for shares in map(self.exact, self._draws(random)) if shares is not None}
        far = [(s, d) for s in sorted(draws) if (d := self._distance(s, proposed)) > _NEAR]
        if not far:
            return None
        if surrogate is None:
            return max(far, key=lambda item: item[1])[0]
        usual = float(np.median([d for _, d in far]))
        bounds = [
            float(self.goal.of(surrogate(as_floats(s))[0]))
            - _CONFIDENCE * surrogate.error * min(d / usual, 1.0)
            for s, d in far
        ]
        lowest = int(np.argmin(bounds))
        best = min(
            (self.value(r) for r in self.rows.values() if self.allowed(r.shares)), default=np.inf
        )
        return far[lowest][0] if bounds[lowest] < best else None

    def _draws(self, random: np.random.Generator) -> Iterator[Floats]:
        """Yield random shares of the region: half anywhere, half around the best row."""
        count = len(self.given.names)
        inside = [row for row in self.rows.values() if self.allowed(row.shares)]
        best = (
            as_floats(min(inside, key=self.value).shares) if inside else np.full(count, 1 / count)
        )
        pieces = [self.region]
        if self.region.size is not None:
            found = supports(self.region, MOST_SUPPORTS)
            own = tuple(np.argsort(-best, kind="stable")[: self.region.size].tolist())
            pieces = [self.region.within(piece) for piece in found or [own]]
        for draw in range(_DRAWS):
            around = np.ones(count) if draw % 2 else 0.5 + 20 * count * best
            piece = pieces[int(random.integers(len(pieces)))]
            yield pulled_in(piece, random.dirichlet(around))

    def _distance(self, shares: Shares, proposed: Sequence[Shares]) -> float:
        """Return the distance to the nearest measured or proposed mixture, Σ|Δs|."""
        there = [*(row.point for row in self.rows.values()), *map(as_floats, proposed)]
        if not there:
            return 2.0
        return float(np.abs(np.array(there) - as_floats(shares)).sum(axis=1).min())
