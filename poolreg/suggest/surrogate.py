"""What the pool says of mixtures that were not measured: the ensemble, and fits to measured rows.

The ensemble needs the unit models' losses at each token, which the memo keeps; the surrogate
needs measured rows. Both are functions of the shares, in the units of the measures.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from poolreg.decisions.ensemble import token_losses
from poolreg.decisions.measures import Measure
from poolreg.numerics.mixing import Ensemble, Goal, odds_of
from poolreg.numerics.regions import Floats
from poolreg.numerics.surrogates import Chosen, choose, cv_plus, folds_of, paired, possible
from poolreg.suggest.shares import Field

LEVEL = 0.9


@dataclass(frozen=True, eq=False)
class Units:
    """The ensemble of the unit models, and the mean loss of each partition's units [E, d]."""

    ensemble: Ensemble
    means: Floats


def units_of(given: Field, measures: Sequence[Measure], protocol: str) -> Units | None:
    """Return the ensemble on these measures; None for tasks and where a unit is not measured."""
    flat = list(dict.fromkeys(model for own in given.models for model in own))
    columns = [[flat.index(model) for model in own] for own in given.models]
    odds, base, sizes, means = [], [], [], []
    for measure in measures:
        losses = None
        if measure.source == "evalset":
            losses = token_losses(given.registry, measure.digest, protocol, flat)
        if losses is None:
            return None
        found, rest = odds_of(losses, columns)
        size = given.registry.one("evalset", digest=measure.digest)["bytes"]
        totals = losses.sum(axis=0, dtype=np.float64) / (math.log(2) * size)
        odds.append(found)
        base.append(rest)
        sizes.append(size)
        means.append([float(totals[own].mean()) for own in columns])
    return Units(Ensemble(odds, base, sizes), np.array(means))


@dataclass(frozen=True)
class Fact:
    """How one measure is predicted: the kind chosen, its error, and that of every kind.

    Errors are root mean squares over left-out rows, in the measure's unit; `spread` is the
    standard deviation of the measured values beside them.
    """

    measure: str
    kind: str
    error: float
    spread: float
    errors: Mapping[str, float]


@dataclass(frozen=True, eq=False)
class Surrogate:
    """Fits to n measured rows. It is a `Losses`; `interval` is for the goal."""

    chosen: tuple[Chosen, ...]
    goal: Goal
    units: Units | None
    folds: Floats
    residuals: Floats  # [n] of the goal, each row by the fit that did not see it
    left_out: Floats  # [n] the goal of each row as that fit predicts it

    def __call__(self, shares: Floats) -> tuple[Floats, Floats]:
        """Return predicted values [E] and their Jacobian [E, d]."""
        maps = [self._features(shares, row) for row in range(len(self.chosen))]
        values = [one.whole.at(phi) for one, (phi, _) in zip(self.chosen, maps, strict=True)]
        slopes = [one.whole.gradient(*both) for one, both in zip(self.chosen, maps, strict=True)]
        return np.array(values, dtype=np.float64), np.array(slopes)

    def _features(self, shares: Floats, row: int) -> tuple[Floats, Floats]:
        kind = self.chosen[row].whole.kind
        if kind == "pairs":
            return paired(shares)
        if kind != "ensemble" or self.units is None:
            return shares, np.eye(len(shares))
        values, slopes = self.units.ensemble.of(row)(shares)
        means = self.units.means[row]
        features = np.concatenate([values, [means @ shares], shares])
        return features, np.vstack([slopes, means, np.eye(len(shares))])

    @property
    def error(self) -> float:
        """The root mean square of what left-out rows are missed by, in the goal's unit."""
        return float(np.sqrt(np.mean(self.residuals**2)))

    def interval(self, shares: Floats) -> tuple[float, float, float]:
        """Return low, high and level of the CV+ interval of the goal at shares."""
        maps = [self._features(shares, row)[0] for row in range(len(self.chosen))]
        by_fold = []
        for fold in range(len(self.chosen[0].folds)):
            pairs = zip(self.chosen, maps, strict=True)
            values = np.array([one.folds[fold].at(phi) for one, phi in pairs])
            by_fold.append(float(self.goal.of(values)))
        return cv_plus(np.array(by_fold)[self.folds], self.residuals, LEVEL)

    def interval_of_row(self, index: int) -> tuple[float, float, float]:
        """Return the interval of a measured row, by the fit and the residuals of the others."""
        others = np.delete(self.residuals, index)
        return cv_plus(np.full(len(others), self.left_out[index]), others, LEVEL)

    def facts(self, measures: Sequence[Measure], values: Floats) -> tuple[Fact, ...]:
        """Return how each measure is predicted; `values` [n, E] are the rows'."""
        return tuple(
            Fact(measure.name, one.whole.kind, one.errors[one.whole.kind], float(column.std()),
                 dict(one.errors))
            for measure, one, column in zip(measures, self.chosen, values.T, strict=True)
        )  # fmt: skip


def least_rows(dimension: int) -> int:
    """Return how many measured rows a surrogate needs."""
    return dimension + 2


def fitted(
    shares: Floats, values: Floats, goal: Goal, units: Units | None, ensembles: Floats | None
) -> Surrogate | None:
    """Fit measured rows: shares [n, d], values [n, E], the rows' ensembles [n, E] if there are.

    None for fewer rows than d + 2.
    """
    count, dimension = shares.shape
    if count < least_rows(dimension):
        return None
    kinds = possible(count, dimension, ensemble=ensembles is not None)
    folds = folds_of(count)
    pairs = np.array([paired(row)[0] for row in shares])
    chosen = []
    for column in range(values.shape[1]):
        tables = {"ridge": shares, "law": shares, "pairs": pairs}
        if units is not None and ensembles is not None:
            means = shares @ units.means[column]
            tables["ensemble"] = np.column_stack([ensembles[:, column], means, shares])
        chosen.append(choose({kind: tables[kind] for kind in kinds}, values[:, column], folds))
    left_out = goal.of(np.column_stack([one.left_out for one in chosen]))
    residuals = np.abs(left_out - goal.of(values))
    return Surrogate(tuple(chosen), goal, units, folds, residuals, left_out)
