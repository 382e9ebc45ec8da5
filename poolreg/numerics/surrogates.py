"""Surrogates: what a few measured mixtures say about all others, chosen by cross-validation.

For one measure y and shares s [d] there are four kinds. A kind is a vector of features φ(s) with
an intercept and coefficients, through the identity or through the exponential:

    ridge      y = a + β·s                                 linear in the shares
    law        y = c + exp(t·s)                            the log-linear mixing law
    ensemble   y = a + α·E(s) + γ·m·s + β·s                 E: the ensemble's loss, m: units' losses
    pairs      y = a + β·s + Σ_{j<k} β_jk s_j s_k           a quadratic form on the simplex

The linear ones are ridge regressions on standardised features; the penalty has the least
leave-one-out error, in closed form. The law (Ye et al. 2024, arXiv 2403.16952) is fitted by
robust non-linear least squares from several starts. A prediction's interval is CV+ (Barber et
al. 2021, arXiv 1905.02928).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from poolreg.numerics.regions import Floats

KINDS = ("ridge", "law", "ensemble", "pairs")
PENALTIES = np.logspace(-7, 1, 17)  # a row and a standardised feature
_FOLDS = 10
_ROBUST = 3.0  # residuals beyond so many typical ones count less


@dataclass(frozen=True, eq=False)
class Fitted:
    """One measure's surrogate: constant + φ·slopes, or constant + exp(φ·slopes)."""

    kind: str
    constant: float
    slopes: Floats

    def at(self, features: Floats) -> Floats:
        """Return predictions for features [..., p]."""
        inner = features @ self.slopes
        return np.asarray(
            self.constant + (np.exp(np.minimum(inner, 50.0)) if self.curved else inner)
        )

    def gradient(self, features: Floats, jacobian: Floats) -> Floats:
        """Return the gradient [d] at features [p] with Jacobian [p, d]."""
        factor = math.exp(min(float(features @ self.slopes), 50.0)) if self.curved else 1.0
        return np.asarray(factor * (self.slopes @ jacobian))

    @property
    def curved(self) -> bool:
        """Whether the prediction is an exponential."""
        return self.kind == "law"


def possible(rows: int, dimension: int, *, ensemble: bool) -> tuple[str, ...]:
    """Return the kinds that rows can carry: the law from 2(d+1), pairs from d(d+1)/2 + 2 rows."""
    found = ["ridge"]
    if rows >= 2 * (dimension + 1):
        found.append("law")
    if ensemble:
        found.append("ensemble")
    if rows >= dimension * (dimension + 1) // 2 + 2:
        found.append("pairs")
    return tuple(found)


def paired(shares: Floats) -> tuple[Floats, Floats]:
    """Return the features of `pairs`: shares and products [p], and their Jacobian [p, d]."""
    count = len(shares)
    first, second = np.triu_indices(count, 1)
    products = np.zeros((len(first), count))
    rows = np.arange(len(first))
    products[rows, first] = shares[second]
    products[rows, second] = shares[first]
    features = np.concatenate([shares, shares[first] * shares[second]])
    return features, np.vstack([np.eye(count), products])


def fit(kind: str, features: Floats, values: Floats, *, begin: Fitted | None = None) -> Fitted:
    """Fit one kind to features [n, p] and values [n]; `begin` warm-starts the law."""
    if kind == "law":
        return _law(features, values, begin)
    constant, slopes = ridge(features, values)
    return Fitted(kind, constant, slopes)


def ridge(features: Floats, values: Floats) -> tuple[float, Floats]:
    """Return intercept and slopes of the ridge regression with the best leave-one-out error.

    Features are centred and scaled to unit deviation. With Z = U S Vᵀ and penalty nλ the hat
    matrix is 1/n + U diag(S²/(S² + nλ)) Uᵀ, and a left-out residual is r_i / (1 − h_ii).
    """
    count = len(values)
    middle, spread = features.mean(axis=0), features.std(axis=0)
    spread = np.where(spread > 1e-12 * max(float(np.abs(features).max()), 1.0), spread, np.inf)
    left, sizes, right = np.linalg.svd((features - middle) / spread, full_matrices=False)
    level = float(values.mean())
    along = left.T @ (values - level)
    best, kept = math.inf, np.zeros_like(sizes)
    for penalty in PENALTIES:
        kept_here = sizes**2 / (sizes**2 + count * penalty)
        residual = values - level - left @ (kept_here * along)
        leverage = 1 / count + (left**2) @ kept_here
        error = float(np.mean((residual / np.maximum(1 - leverage, 1e-9)) ** 2))
        if error < best:
            best, kept = error, kept_here
    inverse = np.where(sizes > 1e-12, 1 / np.maximum(sizes, 1e-12), 0.0)
    slopes = (right.T @ (kept * inverse * along)) / spread
    return level - float(middle @ slopes), slopes


def _law(shares: Floats, values: Floats, begin: Fitted | None) -> Fitted:
    """y = c + exp(t·s); on the simplex the law's b is a shift of all t and needs no letter."""
    from scipy.optimize import least_squares

    spread = max(float(np.ptp(values)), 1e-9)
    scale = max(float(np.std(values)) / _ROBUST, 1e-9)

    def residuals(x: Floats) -> Floats:
        return np.asarray(x[0] + np.exp(np.minimum(shares @ x[1:], 50.0)) - values)

    def jacobian(x: Floats) -> Floats:
        inner = np.exp(np.minimum(shares @ x[1:], 50.0))
        return np.hstack([np.ones((len(values), 1)), inner[:, None] * shares])

    starts = [np.append(begin.constant, begin.slopes)] if begin else []
    for below in () if begin else (0.05, 0.5, 5.0):
        floor = float(values.min()) - below * spread
        slopes = np.linalg.lstsq(shares, np.log(values - floor), rcond=None)[0]
        starts.append(np.append(floor, slopes))
    found = [
        least_squares(residuals, start, jac=jacobian, loss="soft_l1", f_scale=scale, max_nfev=200)
        for start in starts
    ]
    best = min(found, key=lambda one: float(one.cost)).x
    return Fitted("law", float(best[0]), np.asarray(best[1:]))


# -- choosing, and what the choice is worth ----------------------------------------------------


@dataclass(frozen=True, eq=False)
class Chosen:
    """One measure's best kind: fitted on all rows, and on all but each fold; errors by kind.

    `left_out` [n] are the predictions of each row by the fit that did not see it; `errors` are
    the root mean squares of what they miss.
    """

    whole: Fitted
    folds: tuple[Fitted, ...]
    left_out: Floats
    errors: Mapping[str, float]


def folds_of(rows: int) -> Floats:
    """Return each row's fold: ten of equal size (leave-one-out below ten rows), shuffled once."""
    order = np.random.default_rng(0).permutation(rows)
    folds = np.empty(rows, dtype=int)
    folds[order] = np.arange(rows) % min(_FOLDS, rows)
    return folds


def choose(features: Mapping[str, Floats], values: Floats, folds: Floats) -> Chosen:
    """Return the kind with the least cross-validated error; `features` [n, p] of each kind."""
    errors: dict[str, float] = {}
    best: Chosen | None = None
    for kind, table in features.items():
        whole = fit(kind, table, values)
        parts = tuple(
            fit(kind, table[folds != fold], values[folds != fold], begin=whole)
            for fold in range(int(folds.max()) + 1)
        )
        left_out = np.array([float(parts[f].at(row)) for f, row in zip(folds, table, strict=True)])
        errors[kind] = float(np.sqrt(np.mean((left_out - values) ** 2)))
        if best is None or errors[kind] < min(e for k, e in errors.items() if k != kind):
            best = Chosen(whole, parts, left_out, errors)
    if best is None:
        raise ValueError("no kinds to choose from")
    return best


def cv_plus(
    predictions: Sequence[float] | Floats, residuals: Floats, level: float
) -> tuple[float, float, float]:
    """Return low, high and the level reached of the CV+ interval around a new row.

    `predictions` [n] are those of the new row by the fit that left out row i, `residuals` [n]
    what row i was missed by. With α = 1 − level the ends are the ⌊α(n+1)⌋-th smallest
    prediction − residual and the ⌈(1−α)(n+1)⌉-th smallest prediction + residual; with too few
    rows for these, the extremes, at level n/(n+1).
    """
    count = len(residuals)
    centres = np.asarray(predictions)
    rank = math.ceil(level * (count + 1) - 1e-9)
    rank = min(rank, count)
    low = float(np.sort(centres - residuals)[count - rank])
    high = float(np.sort(centres + residuals)[rank - 1])
    return low, high, min(level, count / (count + 1))
