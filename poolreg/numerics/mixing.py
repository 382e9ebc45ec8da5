"""The best shares for a goal: losses as functions of shares, minimised under constraints.

Losses are functions s ↦ (values [E], Jacobian [E, d]) of the shares s, one value a measure. A
goal turns values into one number to be minimised: max_g (Σ_e W_ge·value_e + offset_g), with one
row for a weighted sum and one row a measure for the worst group. For losses that are convex in s
the answer comes with a certificate: how far from the best it can be at most.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from poolreg.numerics.regions import Floats, Region, centre, least, pulled_in, supports

Losses = Callable[[Floats], tuple[Floats, Floats]]

MOST_SUPPORTS = 300  # with a bound on the size: more are not looked at one by one
_CHUNK = 1 << 15  # tokens at once: the temporaries stay in cache
_SMALLEST = 1e-30  # a token probability below this share of the largest counts as this
_RESTARTS = 4
_CLOSED = 1e-7  # a gap that is as good as none
_TOP = 1e-6  # this near to a bound is on it


@dataclass(frozen=True, eq=False)
class Goal:
    """max_g (weights_g · values + offset_g): weights [G, E], offsets [G]."""

    weights: Floats
    offsets: Floats

    def of(self, values: Floats) -> Any:
        """Return the goal of values [..., E]."""
        return (values @ self.weights.T + self.offsets).max(axis=-1)


@dataclass(frozen=True, eq=False)
class Solution:
    """Shares, their goal, how much better any others could be (None: unknown), and the search."""

    shares: Floats
    value: float
    gap: float | None
    search: str


# -- the ensemble ------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Ensemble:
    """Ensembles of models on several evalsets, as losses in bits per byte.

    With p_tk the mean probability of token t under the models of partition k, an evalset's loss
    is −Σ_t log2 Σ_k s_k p_tk / bytes: convex in s. `odds` [T, d] are p_tk over the largest of
    the token, `base` is −Σ_t of its logarithm in nats.
    """

    odds: Sequence[Floats]
    base: Sequence[float]
    bytes: Sequence[int]

    def __call__(self, shares: Floats) -> tuple[Floats, Floats]:
        """Return losses [E] and their Jacobian [E, d]."""
        values = np.array(self.base, dtype=np.float64)
        jacobian = np.zeros((len(values), len(shares)))
        weights = np.maximum(shares, 0.0)
        for row, odds in enumerate(self.odds):
            for start in range(0, len(odds), _CHUNK):
                part = odds[start : start + _CHUNK].astype(np.float64)
                mixed = np.maximum(part @ weights, _SMALLEST)
                values[row] -= np.log(mixed).sum()
                jacobian[row] -= (1.0 / mixed) @ part
        scale = 1.0 / (math.log(2) * np.array(self.bytes, dtype=np.float64))
        return values * scale, jacobian * scale[:, None]

    def of(self, row: int) -> Ensemble:
        """Return the ensemble on one evalset alone."""
        return Ensemble([self.odds[row]], [self.base[row]], [self.bytes[row]])


def odds_of(token_losses: Floats, columns: Sequence[Sequence[int]]) -> tuple[Floats, float]:
    """Return an evalset's odds [T, d] (float32) and base, from losses in nats [T, models].

    `columns` names the models of each partition; their probabilities are averaged.
    """
    count = len(token_losses)
    odds = np.empty((count, len(columns)), dtype=np.float32)
    base = 0.0
    for start in range(0, count, _CHUNK):
        part = token_losses[start : start + _CHUNK].astype(np.float64)
        smallest = part.min(axis=1)
        likely = np.exp(smallest[:, None] - part)
        mean = np.stack([likely[:, list(own)].mean(axis=1) for own in columns], axis=1)
        top = mean.max(axis=1)
        odds[start : start + _CHUNK] = np.maximum(mean / top[:, None], _SMALLEST)
        base += float(np.sum(smallest - np.log(top)))
    return odds, base


# -- minimisation ------------------------------------------------------------------------------


def minimise(
    losses: Losses, goal: Goal, region: Region, *, starts: Iterable[Floats] = (),
    convex: bool = False,
) -> Solution:  # fmt: skip
    """Return the shares of the region with the least goal, from the centre and other starts.

    With a bound on the size every support is tried while there are at most 300, else the
    smallest share is dropped until the rest is few enough. `convex` says that the losses are
    convex in the shares: one start then does, and a gap is given. Raises `ValueError` for an
    empty region.
    """
    if region.size is None or region.size >= region.dimension:
        return _on_piece(losses, goal, region, list(starts), convex)
    pieces = supports(region, MOST_SUPPORTS)
    if pieces is None:
        return _eliminated(losses, goal, region, list(starts), convex)
    if not pieces:
        raise ValueError("the region is empty")
    found = [_on_piece(losses, goal, region.within(p), list(starts), convex) for p in pieces]
    best = min(found, key=lambda solution: solution.value)
    # The best could hide in a piece whose own search stopped short of its end.
    gaps = [best.value - (one.value - one.gap) for one in found if one.gap is not None]
    gap = max(0.0, *gaps) if len(gaps) == len(found) else None
    return Solution(best.shares, best.value, gap, f"each of {len(pieces)} supports")


def _eliminated(
    losses: Losses, goal: Goal, region: Region, starts: list[Floats], convex: bool
) -> Solution:
    most = region.size or region.dimension
    kept = tuple(range(region.dimension))
    solution = _on_piece(losses, goal, region.within(kept), starts, convex)
    while int((solution.shares > 0).sum()) > most:
        order = sorted(kept, key=lambda k: float(solution.shares[k]))
        order = [k for k in order if region.lower[k] <= 0]
        fewer = (tuple(k for k in kept if k != gone) for gone in order)
        piece = next((p for p in fewer if centre(region.within(p)) is not None), None)
        if piece is None:
            raise ValueError("the region is empty")
        kept = piece
        solution = _on_piece(losses, goal, region.within(kept), [solution.shares], convex)
    return Solution(solution.shares, solution.value, None, "dropping the smallest share in turn")


def _on_piece(
    losses: Losses, goal: Goal, region: Region, starts: list[Floats], convex: bool
) -> Solution:
    middle = centre(region)
    if middle is None:
        raise ValueError("the region is empty")
    inside = [pulled_in(region, start) for start in starts]
    begun = [min(inside, key=lambda s: _value(losses, goal, s))] if convex and inside else inside
    best = middle
    for start in begun if convex and begun else [middle, *begun]:
        best = min(
            (best, _descended(losses, goal, region, start)), key=lambda s: _value(losses, goal, s)
        )
    if not convex:
        return Solution(best, _value(losses, goal, best), None, "descent from several starts")
    gap = optimality_gap(losses, goal, region, best)
    for _ in range(_RESTARTS):
        if gap <= _CLOSED:
            break
        again = _descended(losses, goal, region, 0.999 * best + 0.001 * middle)
        closer = optimality_gap(losses, goal, region, again)
        if _value(losses, goal, again) <= _value(losses, goal, best):
            best, gap = again, min(gap, closer)
    return Solution(best, _value(losses, goal, best), gap, "convex")


def _value(losses: Losses, goal: Goal, shares: Floats) -> float:
    return float(goal.of(losses(shares)[0]))


def _descended(losses: Losses, goal: Goal, region: Region, start: Floats) -> Floats:
    """Sequential quadratic programming over (shares, t): minimise t with every group below t."""
    from scipy.optimize import minimize

    memory: dict[bytes, tuple[Floats, Floats]] = {}

    def groups(point: Floats) -> tuple[Floats, Floats]:
        key = point[:-1].tobytes()
        if key not in memory:
            memory.clear()
            values, jacobian = losses(np.clip(point[:-1], 0.0, 1.0))
            memory[key] = goal.weights @ values + goal.offsets, goal.weights @ jacobian
        return memory[key]

    single = len(goal.offsets) == 1
    level = float(goal.of(losses(start)[0]))
    found = minimize(
        (lambda x: float(groups(x)[0][0])) if single else (lambda x: float(x[-1])),
        np.append(start, 0.0 if single else level),
        jac=(lambda x: np.append(groups(x)[1][0], 0.0)) if single else (lambda x: _last(len(x))),
        bounds=[*zip(region.lower, region.upper, strict=True), (0, 0) if single else (None, None)],
        constraints=_constraints(region, None if single else groups),
        method="SLSQP", options={"ftol": 1e-13, "maxiter": 300},
    )  # fmt: skip
    end = found.x[:-1]
    return pulled_in(region, end if np.isfinite(end).all() else start)


def _last(count: int) -> Floats:
    unit = np.zeros(count)
    unit[-1] = 1.0
    return unit


def _constraints(
    region: Region, groups: Callable[[Floats], tuple[Floats, Floats]] | None
) -> list[dict[str, Any]]:
    made: list[dict[str, Any]] = [
        {"type": "eq", "fun": lambda x: x[:-1].sum() - 1.0, "jac": lambda x: 1.0 - _last(len(x))}
    ]
    if groups is not None:
        made.append({
            "type": "ineq",
            "fun": lambda x: x[-1] - groups(x)[0],
            "jac": lambda x: np.hstack([-groups(x)[1], np.ones((len(groups(x)[0]), 1))]),
        })  # fmt: skip
    near = region.near
    if near is not None and math.isfinite(region.radius):
        q = np.maximum(near, 1e-12)

        def log_ratio(x: Floats) -> Floats:
            return np.asarray(np.log(np.maximum(x[:-1], 1e-12) / q))

        made.append({
            "type": "ineq",
            "fun": lambda x: region.radius - float(x[:-1] @ log_ratio(x)),
            "jac": lambda x: np.append(-log_ratio(x) - 1.0, 0.0),
        })  # fmt: skip
    return made


def optimality_gap(losses: Losses, goal: Goal, region: Region, shares: Floats) -> float:
    """Return how much below its value at `shares` a convex goal can be in a convex region.

    For any weights w ≥ 0 of the groups with Σ w = 1, convexity bounds the least goal from below
    by Σ_g w_g f_g(s) + min_v ∇(Σ w f)·(v − s). One group: the Frank-Wolfe gap.
    Several: w are the multipliers at `shares`.
    """
    values, jacobian = losses(shares)
    heights, slopes = goal.weights @ values + goal.offsets, goal.weights @ jacobian
    weights = np.ones(1) if len(heights) == 1 else _multipliers(heights, slopes, region, shares)
    slope = weights @ slopes
    bound = float(weights @ heights) + least(region, slope) - float(slope @ shares)
    return max(0.0, float(heights.max()) - bound)


def _multipliers(heights: Floats, slopes: Floats, region: Region, shares: Floats) -> Floats:
    """Return the weights of the groups that come nearest to the conditions of an optimum.

    There Σ w_g ∇f_g is a combination of the normals of Σ s = 1, of the bounds that hold, and of
    the ball: non-negative least squares over the groups at the top.
    """
    from scipy.optimize import nnls

    top = heights >= heights.max() - _TOP * max(1.0, float(np.ptp(heights)))
    count, own = region.dimension, int(top.sum())
    normals = [slopes[top].T, np.ones((count, 1)), -np.ones((count, 1))]
    normals.append(-np.eye(count)[:, shares <= region.lower + _TOP])
    normals.append(np.eye(count)[:, shares >= region.upper - _TOP])
    if region.near is not None and region.divergence(shares) >= region.radius - _TOP:
        ratio = np.maximum(shares, 1e-12) / np.maximum(region.near, 1e-12)
        normals.append(np.log(ratio)[:, None] + 1.0)
    columns = np.hstack(normals)
    scale = max(float(np.abs(slopes).max()), 1e-12)
    total = np.where(np.arange(columns.shape[1]) < own, scale, 0.0)
    found, _ = nnls(np.vstack([columns, total]), np.append(np.zeros(count), scale))
    weights = np.zeros(len(heights))
    weights[top] = found[:own]
    # Any weights give a bound.
    return np.asarray(weights / weights.sum() if weights.sum() > 0 else top / own)
