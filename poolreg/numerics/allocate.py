"""Where to save: shares of the layers by their importance, or the best sizes under a budget."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]


def layer_shares(
    importance: Sequence[float], average: float, *, epsilon: float, cap: float
) -> Floats:
    """Return the share of each layer to remove: φ = L · φ_avg · softmax(−s/ε), capped, [L].

    Arguments: importance s [L] (Block Influence), `average` φ_avg, temperature ε, largest share.
    What is above the cap goes to the other layers in proportion until none exceeds it, so the
    mean is φ_avg exactly (arXiv 2408.09632, section 3.3). Raises `ValueError` for φ_avg > cap.
    """
    if average > cap:
        raise ValueError(f"an average share of {average} is above the cap of {cap}")
    scores = np.asarray(importance, np.float64)
    with np.errstate(over="ignore"):  # a distance far above ε leaves a weight of 0
        weights = np.exp(-(scores - scores.min()) / epsilon)
    total = average * len(weights)
    free = np.ones(len(weights), bool)
    shares: Floats = total * weights / weights.sum()
    while (shares[free] > cap).any():
        free &= shares <= cap
        shares[~free] = cap
        # A layer far from the rest may have a weight that underflowed: it shares evenly then.
        left = weights[free] if weights[free].sum() > 0 else np.ones(int(free.sum()))
        shares[free] = (total - cap * (~free).sum()) * left / left.sum()
    return shares


@dataclass(frozen=True, eq=False)
class Curve:
    """What one module costs and how much it errs at each size that it may have.

    `sizes` ascend; `costs` in parameters ascend with them; `errors` are in any unit that adds up
    over modules.
    """

    sizes: NDArray[np.int64]
    costs: NDArray[np.int64]
    errors: Floats


def knapsack(curves: Sequence[Curve], budget: int) -> list[int]:
    """Return one size per curve: least total error with total cost within `budget`.

    Steps along the lower convex hulls are taken in the order of error saved per parameter, then
    single modules grow as long as anything fits. Optimal up to the last step on convex curves.
    Raises `ValueError` if even the smallest sizes cost more than the budget.
    """
    places = [0] * len(curves)
    spent = sum(int(curve.costs[0]) for curve in curves)
    if spent > budget:
        raise ValueError(f"the smallest sizes cost {spent}, more than {budget}")
    steps = []
    for index, curve in enumerate(curves):
        gain = np.inf
        for at, to in itertools.pairwise(_hull(curve)):
            slope = (curve.errors[at] - curve.errors[to]) / (curve.costs[to] - curve.costs[at])
            gain = min(gain, slope)  # on a straight curve rounding must not reverse the order
            steps.append((-gain, index, at, to))
    for _, index, at, to in sorted(steps):
        price = int(curves[index].costs[to] - curves[index].costs[at])
        if places[index] == at and spent + price <= budget:
            places[index], spent = to, spent + price
    while (best := _best_fit(curves, places, budget - spent)) is not None:
        index, to = best
        spent += int(curves[index].costs[to] - curves[index].costs[places[index]])
        places[index] = to
    return [int(curve.sizes[place]) for curve, place in zip(curves, places, strict=True)]


def _hull(curve: Curve) -> list[int]:
    """Return the corners of the lower convex hull of (cost, error), from the smallest size on."""
    corners: list[int] = []
    for to in range(len(curve.costs)):
        while corners and _useless(curve, corners, to):
            corners.pop()
        if not corners or curve.errors[to] < curve.errors[corners[-1]]:
            corners.append(to)
    return corners


def _useless(curve: Curve, corners: list[int], to: int) -> bool:
    """Tell whether the last corner lies above the line from the one before it to `to`.

    One on the line stays, rounding or not: short steps fit where long ones do not.
    """
    if len(corners) < 2:
        return False
    a, b = corners[-2:]
    costs, errors = curve.costs, curve.errors
    before = (errors[a] - errors[b]) * (costs[to] - costs[b])
    after = (errors[b] - errors[to]) * (costs[b] - costs[a])
    return bool(before < after * (1 - 1e-9))


def _best_fit(curves: Sequence[Curve], places: list[int], left: int) -> tuple[int, int] | None:
    """Return the step (curve, place) that saves most error per parameter within what is left."""
    best, most = None, 0.0
    for index, (curve, place) in enumerate(zip(curves, places, strict=True)):
        prices = curve.costs[place + 1 :] - curve.costs[place]
        gains = (curve.errors[place] - curve.errors[place + 1 :]) / prices
        gains = np.where(prices <= left, gains, 0.0)
        if len(gains) and gains.max() > most:
            best, most = (index, place + 1 + int(gains.argmax())), float(gains.max())
    return best
