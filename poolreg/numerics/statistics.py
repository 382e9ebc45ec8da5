"""How well a proxy predicts: correlations, decisions, regret, calibration and their uncertainty.

`predicted` and `true` are float64 arrays [n], one entry for each mixture; lower is better. What
is not defined (too few entries, nothing varies) is NaN, without a warning.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Doubles = NDArray[np.float64]
Indices = NDArray[np.intp]

# Prints as 1.000. A perfect rank order is common among few mixtures, and with a clip much
# nearer to 1 a single one would outweigh all other entries of a Fisher mean.
FISHER_CLIP = 0.9999
_LEAST_IN_QUARTER = 5


@dataclass(frozen=True)
class Calibration:
    """The line true ≈ slope · predicted + intercept and its leave-one-out mean absolute error."""

    slope: float
    intercept: float
    mean_absolute_error: float


# -- correlation --------------------------------------------------------------------------------


def pearson(x: Doubles, y: Doubles) -> float:
    """Return Pearson's correlation of two arrays [n]."""
    return float(pearson_along(x, y))


def spearman(x: Doubles, y: Doubles) -> float:
    """Return Spearman's rank correlation of two arrays [n]; ties have their average rank."""
    return float(spearman_along(x, y))


def kendall(x: Doubles, y: Doubles) -> float:
    """Return Kendall's τ-b of two arrays [n], which accounts for ties."""
    from scipy.stats import kendalltau

    if len(x) < 2 or np.ptp(x) == 0 or np.ptp(y) == 0:
        return math.nan
    return float(kendalltau(x, y).statistic)


def pearson_along(x: Doubles, y: Doubles) -> Doubles:
    """Return Pearson's correlations over the last axis of broadcast arrays [..., n], [...]."""
    x, y = np.broadcast_arrays(np.asarray(x, np.float64), np.asarray(y, np.float64))
    if x.shape[-1] < 2:
        return np.full(x.shape[:-1], np.nan)
    # Asked of the values: their deviations from a rounded mean need not be zero.
    varies = (np.ptp(x, axis=-1) > 0) & (np.ptp(y, axis=-1) > 0)
    x, y = _direction(x), _direction(y)
    return np.where(varies, np.clip((x * y).sum(-1), -1, 1), np.nan)


def spearman_along(x: Doubles, y: Doubles) -> Doubles:
    """Return Spearman's rank correlations over the last axis of broadcast arrays [..., n]."""
    from scipy.stats import rankdata

    return pearson_along(rankdata(x, axis=-1), rankdata(y, axis=-1))


def fisher_mean(r: Doubles) -> Any:
    """Return tanh(mean(atanh(r))) over the last axis of correlations [..., n], [...].

    NaNs are left out (NaN where nothing is left), and |r| is clipped to `FISHER_CLIP`, since
    atanh(1) is infinite.
    """
    z = np.arctanh(np.clip(r, -FISHER_CLIP, FISHER_CLIP))
    defined = ~np.isnan(z)
    with np.errstate(invalid="ignore"):
        mean = np.where(defined, z, 0).sum(-1) / defined.sum(-1)
    return np.tanh(mean)


def top_quarter_spearman(predicted: Doubles, true: Doubles) -> float:
    """Return Spearman's correlation inside the truly best quarter, its size rounded up.

    Ties at its border are kept in the order given. NaN with fewer than 5 entries in the quarter.
    """
    best = np.argsort(true, kind="stable")[: -(-len(true) // 4)]
    if len(best) < _LEAST_IN_QUARTER:
        return math.nan
    return spearman(predicted[best], true[best])


def _direction(x: Doubles) -> Doubles:
    """Return the deviations from the mean, of length 1 over the last axis (0 where all are 0)."""
    x = x - x.mean(-1, keepdims=True)
    peak = np.abs(x).max(-1, keepdims=True)
    x = x / np.where(peak > 0, peak, 1)  # squares of very small or large values leave the range
    length = np.sqrt((x * x).sum(-1, keepdims=True))
    direction: Doubles = x / np.where(length > 0, length, 1)
    return direction


# -- decisions ----------------------------------------------------------------------------------


def decision_accuracy(predicted: Doubles, true: Doubles) -> float:
    """Return the share of pairs whose order is predicted rightly.

    A tie in `predicted` counts one half; pairs tied in `true` are left out.
    """
    truly = _orders(true)
    counted = truly != 0
    right = (1 + _orders(predicted)[counted] * truly[counted]) / 2
    return float(right.mean()) if len(right) else math.nan


def regret_at(predicted: Doubles, true: Doubles, k: int) -> float:
    """Return what is lost by measuring only the k entries with the lowest prediction.

    The best true value among them minus the best of all, in the units of `true`. Where ties in
    `predicted` leave open which entries these are, the expectation over a uniform choice: of t
    tied entries with true values a_1 ≤ … ≤ a_t, of which m are taken, the smallest taken is a_j
    with probability C(t − j, m − 1) / C(t, m). NaN without entries or for k < 1.
    """
    k = min(k, len(true))
    if k < 1:
        return math.nan
    border = np.partition(predicted, k - 1)[k - 1]
    certain = true[predicted < border]
    tied = np.sort(true[predicted == border])
    taken, t = k - len(certain), len(tied)
    j = np.arange(1, t - taken + 1)
    chance = taken / t * np.cumprod(np.append(1.0, (t - j - taken + 1) / (t - j)))
    best = np.minimum(tied[: t - taken + 1], certain.min(initial=np.inf))
    return float(chance @ (best - true.min()))


def _orders(v: Doubles) -> NDArray[np.int8]:
    """Return the sign of v_i − v_j for each pair i < j; infinite values compare as they should."""
    first, second = np.triu_indices(len(v), 1)
    signs: NDArray[np.int8] = (v[first] > v[second]).astype(np.int8) - (v[first] < v[second])
    return signs


def affine_calibration(predicted: Doubles, true: Doubles) -> Calibration:
    """Fit true ≈ slope · predicted + intercept by least squares.

    The error is that of leave-one-out fits, |e_i| / (1 − h_i) with leverages h_i. A constant
    prediction has no slope (NaN): then the fit is the mean. An entry whose prediction alone
    differs from all others is likewise compared with the mean of the others.
    """
    n = len(true)
    if n < 2:
        return Calibration(math.nan, math.nan, math.nan)
    mean, level = float(predicted.mean()), float(true.mean())
    from_mean = (true - level) * n / (n - 1)
    if np.ptp(predicted) == 0:
        return Calibration(math.nan, level, float(np.abs(from_mean).mean()))
    x = predicted - mean
    slope = float(x @ true / (x @ x))
    spare = 1 - 1 / n - x * x / (x @ x)
    lone = spare < 1e-12
    errors = np.where(lone, from_mean, (true - level - slope * x) / np.where(lone, 1, spare))
    return Calibration(slope, level - slope * mean, float(np.abs(errors).mean()))


# -- uncertainty --------------------------------------------------------------------------------


def bootstrap_interval(
    statistic: Callable[[Indices], Doubles],
    n: int,
    *,
    level: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> tuple[float, float]:
    """Return the expanded BCa bootstrap interval of a statistic over n items.

    `statistic` maps item indices [..., n] to values [...]; it is also asked for all but one
    item. BCa corrects for bias and skewness (Efron 1987). Its quantiles are those of
    t(n−1) · √(n/(n−1)) instead of the normal (Hesterberg 2015, "expanded"), without which an
    interval of Pearson's r at level 0.95 covers 92–94% at 16 to 24 items. Where BCa is not
    defined (an undefined or constant leave-one-out value, all resamples on one side) the expanded
    percentile interval takes its place.

    Resamples in which the statistic is NaN are left out, as if drawn again. (NaN, NaN) if they
    are more than half, if the statistic itself is NaN, or if all resamples agree, as they do for
    a perfect correlation: then they say nothing about other items.
    """
    from scipy.special import ndtr, stdtrit

    if n < 2:
        return math.nan, math.nan
    drawn = np.random.default_rng(seed).integers(0, n, (resamples, n))
    found = statistic(drawn)
    found = found[~np.isnan(found)]
    whole = float(statistic(np.arange(n)))
    if math.isnan(whole) or 2 * len(found) < resamples or _agree(found):
        return math.nan, math.nan
    wide = math.sqrt(n / (n - 1)) * stdtrit(n - 1, (1 - level) / 2)
    others = np.broadcast_to(np.arange(n), (n, n))[~np.eye(n, dtype=bool)].reshape(n, n - 1)
    bias, acceleration = _bias(found, whole), _acceleration(statistic(others))
    ends = np.array([wide, -wide])
    scale = 1 - acceleration * (bias + ends)
    if math.isfinite(bias + acceleration) and scale.min() > 0:
        ends = bias + (bias + ends) / scale
    low, high = np.quantile(found, ndtr(ends))
    return float(low), float(high)


def _agree(found: Doubles) -> bool:
    return bool(np.ptp(found) <= 1e-12 * np.abs(found).max())


def _bias(found: Doubles, whole: float) -> float:
    """Return BCa's z0: how far the statistic lies from the resamples' median."""
    from scipy.special import ndtri

    return float(ndtri(((found < whole).mean() + (found <= whole).mean()) / 2))


def _acceleration(without_one: Doubles) -> float:
    """Return BCa's a = Σ u³ / (6 (Σ u²)^1.5) of the leave-one-out values' deviations u."""
    u = without_one.mean() - without_one
    squares = float((u**2).sum())
    return float((u**3).sum()) / (6 * squares**1.5) if squares else math.nan
