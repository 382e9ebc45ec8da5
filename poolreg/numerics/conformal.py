"""The value of one more reference, predicted from few, with an interval that covers as it says.

The interval is the jackknife+ (Barber, Candès, Ramdas and Tibshirani, Annals of Statistics 49,
2021, arXiv 1905.02928). Around any fit that treats the references alike its coverage is at least
1 − 2α, whatever the truth is, and about 1 − α in practice; the choice of the fit is therefore
made anew within each leave-one-out fit. Features are [n, p] and values [n], float64.

The candidates are lines in the first feature alone and ridge regressions on all features,
centred and divided by their standard deviations, with an unpenalised intercept:
minimise Σ (v − b − z·w)² + n·λ·|w|². A feature without spread says nothing and has z = 0.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from poolreg.errors import Refused

Doubles = NDArray[np.float64]
Flags = NDArray[np.bool_]

LEAST_REFERENCES = 8
PENALTIES = (1e-3, 1e-2, 1e-1, 1.0)  # λ; 1 halves the weight of a feature that stands alone
_SPREAD = 1e-12  # a standard deviation below this share of the largest value is rounding


@dataclass(frozen=True)
class Forecast:
    """A predicted value, its interval, the interval's level, and what it rests on."""

    value: float
    low: float
    high: float
    level: float
    references: int
    fit: str  # "affine" or "ridge"


@dataclass(frozen=True, eq=False)
class _Fits:
    """Linear maps v = constant + x·weights, one for each of B subsets, and whether ridge won."""

    constant: Doubles  # [B]
    weights: Doubles  # [B, p]
    ridge: Flags  # [B]

    def at(self, x: Doubles) -> Doubles:
        """Return each fit's prediction at a point of its own [B, p], or at one point [p]."""
        predicted: Doubles = self.constant + (self.weights * x).sum(-1)
        return predicted


def forecast(features: Doubles, values: Doubles, new: Doubles, *, level: float = 0.9) -> Forecast:
    """Predict the value at `new` [p] from n references, with the jackknife+ interval.

    With R_i = |v_i − μ_−i(x_i)|, `low` is the ⌊α(n+1)⌋-th smallest μ_−i(x) − R_i and `high` the
    ⌈(1−α)(n+1)⌉-th smallest μ_−i(x) + R_i. Where there is no such rank the extremes are taken,
    and the level of the result is what they stand for, n/(n+1). Raises `Refused` for fewer than
    8 references and for numbers that are not finite.
    """
    features, values = _checked(features, values, LEAST_REFERENCES)
    new = np.asarray(new, np.float64)
    if new.shape != features.shape[1:] or not np.isfinite(new).all():
        raise Refused(
            f"the features to predict from are not {features.shape[1]} finite numbers",
            hint="give the features that the references have",
        )
    n = len(values)
    whole = _fit(features, values, np.ones((1, n), bool))
    without_one = _fit(features, values, ~np.eye(n, dtype=bool))
    residuals = np.abs(values - without_one.at(features))
    centres = without_one.at(new)
    low, high = _interval(centres, residuals, level)
    fit = "ridge" if whole.ridge[0] else "affine"
    return Forecast(float(whole.at(new)[0]), float(low), float(high), _reached(n, level), n, fit)


def coverage(features: Doubles, values: Doubles, *, level: float = 0.9) -> tuple[float, float]:
    """Forecast each reference from the others: the share inside its interval, and the mean width.

    Raises `Refused` for fewer than 9 references and for numbers that are not finite.
    """
    features, values = _checked(features, values, LEAST_REFERENCES + 1)
    n = len(values)
    first, second = np.triu_indices(n, 1)
    kept = np.ones((len(first), n), bool)
    rows = np.arange(len(first))
    kept[rows, first] = kept[rows, second] = False
    fits = _fit(features, values, kept)
    # without[j, i]: what the fit without i and j says at j; one fit serves [i, j] and [j, i].
    without = np.full((n, n), np.nan)
    without[first, second] = fits.at(features[first])
    without[second, first] = fits.at(features[second])
    others = ~np.eye(n, dtype=bool)
    centres = without[others].reshape(n, n - 1)
    residuals = np.abs(values - without.T)[others].reshape(n, n - 1)
    low, high = _interval(centres, residuals, level)
    return float(((low <= values) & (values <= high)).mean()), float((high - low).mean())


def left_out_error(features: Doubles, values: Doubles) -> float:
    """Return the mean |v_i − μ_−i(x_i)|: how far off the fit without each reference is.

    Raises `Refused` for fewer than 8 references and for numbers that are not finite.
    """
    features, values = _checked(features, values, LEAST_REFERENCES)
    without_one = _fit(features, values, ~np.eye(len(values), dtype=bool))
    return float(np.abs(values - without_one.at(features)).mean())


def leverage(features: Doubles, new: Doubles, penalty: float) -> Doubles:
    """Return h(x) = 1/n + zᵀ (ZᵀZ + n·λ·I)⁻¹ z for points `new` [m, p] and λ = `penalty`, [m].

    Of the candidates for a further reference the one with the largest h is where the fit knows
    least: its error there has variance (1 + h)·σ² where the residuals have σ². The features of
    the affine fit are `features[:, :1]` with penalty 0; directions in which the references do
    not vary are ignored, as the fit does.
    """
    n = len(features)
    centre, scale = features.mean(0), _inverse_spread(features.std(0), features)
    z, at = (features - centre) * scale, (new - centre) * scale
    spectrum, axes = np.linalg.eigh(z.T @ z / n)
    leverages: Doubles = (1 + ((at @ axes) ** 2 * _inverse(spectrum, penalty)).sum(-1)) / n
    return leverages


# -- fits on many subsets at once ---------------------------------------------------------------


def _fit(features: Doubles, values: Doubles, kept: Flags) -> _Fits:
    """Choose and fit the best candidate on each of the subsets `kept` [B, n]."""
    share = kept / kept.sum(-1, keepdims=True)
    centre, level = share @ features, share @ values  # [B, p], [B]
    deviations = features - centre[:, None]  # [B, n, p]
    spread = np.sqrt(np.einsum("bn,bnp->bp", share, deviations**2))
    scale = _inverse_spread(spread, features)
    z, v = deviations * scale[:, None], values - level[:, None]
    line, line_error = _solve(z[..., :1], v, share, np.zeros(1))
    line = np.pad(line, ((0, 0), (0, 0), (0, z.shape[-1] - 1)))
    ridges, ridge_errors = _solve(z, v, share, np.array(PENALTIES))
    chosen = np.concatenate([line_error, ridge_errors], 1).argmin(1)
    weights = np.concatenate([line, ridges], 1)[np.arange(len(kept)), chosen] * scale
    return _Fits(level - (weights * centre).sum(-1), weights, chosen > 0)


def _solve(z: Doubles, v: Doubles, share: Doubles, penalties: Doubles) -> tuple[Doubles, Doubles]:
    """Return the weights [B, K, p] for K penalties and their leave-one-out errors [B, K].

    Of standardised features z [B, n, p] and centred values v [B, n], each subset with `share`
    1/m at its m members and 0 elsewhere. The error is Σ (e_i / (1 − h_i))² / m, with residuals
    e_i and leverages h_i; where a line hangs on one member (h_i = 1) the fit without it is the
    mean of the others.
    """
    most = share.max(-1)[:, None, None]  # 1/m
    spectrum, axes = np.linalg.eigh(np.einsum("bn,bnp,bnq->bpq", share, z, z))
    inverse = _inverse(spectrum[:, None], penalties[:, None])  # [B, K, p]
    moments = np.einsum("bpq,bn,bnp,bn->bq", axes, share, z, v, optimize=True)
    weights = np.einsum("bpq,bkq->bkp", axes, inverse * moments[:, None])
    spare = 1 - most * (1 + np.einsum("bnp,bkp->bkn", (z @ axes) ** 2, inverse))
    lone = spare < 1e-9
    errors = (v[:, None] - np.einsum("bnp,bkp->bkn", z, weights)) / np.where(lone, 1, spare)
    errors = np.where(lone, v[:, None] / (1 - most), errors)
    return weights, np.einsum("bn,bkn->bk", share, errors**2)


def _inverse(spectrum: Doubles, penalty: Any) -> Doubles:
    """Return 1 / (s + λ), 0 for directions without any spread."""
    shifted = spectrum + penalty
    return np.where(shifted > _SPREAD, 1 / np.where(shifted > _SPREAD, shifted, 1), 0)


def _inverse_spread(spread: Doubles, features: Doubles) -> Doubles:
    """Return 1 / spread [..., p], 0 for a feature whose spread is rounding."""
    varies = spread > _SPREAD * np.abs(features).max(0)
    return np.where(varies, 1 / np.where(varies, spread, 1), 0)


# -- intervals ----------------------------------------------------------------------------------


def _interval(centres: Doubles, residuals: Doubles, level: float) -> tuple[Doubles, Doubles]:
    """Return the jackknife+ bounds over the last axis of μ_−i(x) and R_i."""
    n = centres.shape[-1]
    rank = min(_rank(n, level), n)
    low = np.sort(centres - residuals, -1)[..., n - rank]
    high = np.sort(centres + residuals, -1)[..., rank - 1]
    return low, high


def _rank(n: int, level: float) -> int:
    """Return ⌈(1−α)(n+1)⌉; rounding must not lift a whole number (0.7 · 10) to the next one."""
    return math.ceil(level * (n + 1) - 1e-9)


def _reached(n: int, level: float) -> float:
    return level if _rank(n, level) <= n else n / (n + 1)


def _checked(features: Doubles, values: Doubles, least: int) -> tuple[Doubles, Doubles]:
    features, values = np.asarray(features, np.float64), np.asarray(values, np.float64)
    if features.ndim != 2 or values.shape != features.shape[:1] or features.shape[1] < 1:
        raise Refused(
            f"features {list(features.shape)} and values {list(values.shape)} do not belong "
            "together",
            hint="give one row of features for each value",
        )
    if len(values) < least:
        raise Refused(
            f"{len(values)} references are too few for an interval",
            hint=f"train at least {least} references",
            references=len(values),
            least=least,
        )
    if not (np.isfinite(features).all() and np.isfinite(values).all()):
        raise Refused(
            "the references have features or values that are not finite numbers",
            hint="leave out the references whose evaluation is not finite",
        )
    return features, values
