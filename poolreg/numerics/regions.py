"""Regions of the simplex: which shares a mixture may have, and what follows from that alone.

A region holds the shares s with Σ s = 1, lower ≤ s ≤ upper, KL(s ‖ near) ≤ radius and at most
`size` positive entries. Without `size` it is convex, and everything here is exact: bounds, the
divergence and sums are solved by one bisection each. `supports` gives the convex pieces of a
region with `size`.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[Any]

TOLERANCE = 1e-9
_HUGE = 1e300
_STEEPEST = 500.0  # exp(-500) is still a number; beyond, the ball says no more than the box


@dataclass(frozen=True, eq=False)
class Region:
    """Bounds [d], the centre and radius (nats) of a ball of divergence, the largest support."""

    lower: Floats
    upper: Floats
    near: Floats | None = None
    radius: float = math.inf
    size: int | None = None

    @property
    def dimension(self) -> int:
        """Number of shares."""
        return len(self.lower)

    def contains(self, shares: Floats, tolerance: float = TOLERANCE) -> bool:
        """Tell whether shares lie in the region, up to rounding."""
        inside = (
            abs(float(shares.sum()) - 1) <= tolerance
            and bool((shares >= self.lower - tolerance).all())
            and bool((shares <= self.upper + tolerance).all())
        )
        small = self.size is None or int((shares > tolerance).sum()) <= self.size
        return inside and small and self.divergence(shares) <= self.radius + tolerance

    def divergence(self, shares: Floats) -> float:
        """Return KL(shares ‖ near) in nats; 0 without `near`."""
        return 0.0 if self.near is None else kl(shares, self.near)

    def within(self, support: tuple[int, ...]) -> Region:
        """Return the convex region in which only these partitions have a share."""
        allowed = np.isin(np.arange(self.dimension), support)
        return replace(self, upper=np.where(allowed, self.upper, 0.0), size=None)


def kl(shares: Floats, near: Floats) -> float:
    """Return Σ s log(s / q) in nats, with 0 log 0 = 0; infinite where q lacks what s has."""
    used = shares > 0
    if (near[used] <= 0).any():
        return math.inf
    return float(np.sum(shares[used] * np.log(shares[used] / near[used])))


def scaled(weights: Floats, lower: Floats, upper: Floats) -> Floats | None:
    """Return clip(c·weights, lower, upper) for the c that makes it sum to 1; None if none does.

    It is the point of the box nearest to `weights` in the sense of KL(· ‖ weights).
    """
    most = np.where(weights > 0, upper, lower)
    if (
        (lower > upper + TOLERANCE).any()
        or lower.sum() > 1 + TOLERANCE
        or most.sum() < 1 - TOLERANCE
    ):
        return None
    used = weights > 0
    # The sum is linear between the factors at which a share leaves a bound or meets one.
    ends = np.concatenate([[0.0], lower[used] / weights[used], most[used] / weights[used]])
    ends = np.unique(ends[ends < _HUGE])
    sums = np.clip(ends[:, None] * weights, lower, most).sum(axis=1)
    last = min(max(int(np.searchsorted(sums, 1.0, side="right")) - 1, 0), len(ends) - 2)
    if last < 0:
        return np.asarray(most)
    middle = (ends[last] + ends[last + 1]) / 2 * weights
    slope = float(weights[used & (middle > lower) & (middle < most)].sum())
    factor = ends[last] + (max(1.0 - sums[last], 0.0) / slope if slope > 0 else 0.0)
    return np.asarray(np.clip(factor * weights, lower, most))


def centre(region: Region) -> Floats | None:
    """Return the point of a convex region that diverges least from `near` (else from uniform).

    None if the region is empty.
    """
    start = np.full(region.dimension, 1 / region.dimension) if region.near is None else region.near
    point = scaled(start, region.lower, region.upper)
    if point is None or region.divergence(point) > region.radius + TOLERANCE:
        return None
    return point


def least(region: Region, gradient: Floats) -> float:
    """Return a lower bound on min gradient·v over a convex region; exact up to rounding.

    Over the box the minimum is greedy: the cheapest shares are filled first. Over the ball it is
    the best Lagrangian bound: for λ > 0 the minimiser of gradient·v + λ (KL(v ‖ q) − radius) is
    clip(c·q·exp(−gradient/λ), lower, upper), so each λ gives a bound and the best one is sought.
    """
    bound = float(gradient @ _greedy(region, gradient))
    if region.near is None or math.isinf(region.radius):
        return bound
    from scipy.optimize import minimize_scalar

    near = region.near

    def minus_dual(log_multiplier: float) -> float:
        return -_lagrangian(region, near, gradient, math.exp(log_multiplier))

    span = max(float(np.ptp(gradient)), 1e-12)
    found = minimize_scalar(
        minus_dual, bounds=(math.log(span / _STEEPEST), math.log(span) + 12), method="bounded",
        options={"xatol": 1e-9},
    )  # fmt: skip
    return max(bound, -float(found.fun))


def _greedy(region: Region, gradient: Floats) -> Floats:
    point = region.lower.astype(np.float64).copy()
    left = 1.0 - float(point.sum())
    for index in np.argsort(gradient, kind="stable"):
        added = min(left, float(region.upper[index] - point[index]))
        point[index] += added
        left -= added
    return point


def _lagrangian(region: Region, near: Floats, gradient: Floats, multiplier: float) -> float:
    exponent = -(gradient - gradient.min()) / multiplier
    tilted = near * np.exp(exponent)
    point = scaled(tilted, region.lower, region.upper)
    if point is None:
        return -math.inf
    return float(gradient @ point + multiplier * (kl(point, near) - region.radius))


def pulled_in(region: Region, shares: Floats) -> Floats:
    """Return the shares moved as little as needed to lie in a convex region that is not empty."""
    middle = centre(region)
    if middle is None:
        raise ValueError("the region is empty")
    point = np.clip(np.where(shares < 1e-7, 0.0, shares), region.lower, region.upper)
    excess = float(point.sum()) - 1.0
    room = point - region.lower if excess > 0 else region.upper - point
    if room.sum() > 0:
        point = point - excess * room / room.sum()
    if region.contains(point):
        return point
    low, high = 0.0, 1.0
    for _ in range(60):
        part = (low + high) / 2
        inside = region.contains(point + part * (middle - point), TOLERANCE / 2)
        low, high = (low, part) if inside else (part, high)
    return np.asarray(point + high * (middle - point))


def supports(region: Region, most: int) -> list[tuple[int, ...]] | None:
    """Return the supports of the largest size allowed whose piece is not empty.

    None if there are more than `most` to look at. Smaller supports lie in the faces of these.
    """
    count = min(region.size or region.dimension, region.dimension)
    needed = tuple(np.flatnonzero(region.lower > 0).tolist())
    others = [k for k in range(region.dimension) if k not in needed]
    if len(needed) > count:
        return []
    if math.comb(len(others), count - len(needed)) > most:
        return None
    chosen = (
        tuple(sorted(needed + extra))
        for extra in itertools.combinations(others, count - len(needed))
    )
    return [support for support in chosen if centre(region.within(support)) is not None]


# -- shares in whole parts -------------------------------------------------------------------


def whole(region: Region, shares: Floats, total: int) -> list[int] | None:
    """Round shares to whole parts of `total` within the bounds, by the largest remainder.

    None if no whole parts fit the bounds. The divergence is not looked at.
    """
    exact = shares * total
    low = np.ceil(region.lower * total - 1e-6).astype(int)
    high = np.floor(region.upper * total + 1e-6).astype(int)
    if (low > high).any() or low.sum() > total or high.sum() < total:
        return None
    counts = np.clip(np.floor(exact + 1e-9).astype(int), low, high)
    while (left := total - int(counts.sum())) != 0:
        step = 1 if left > 0 else -1
        free = counts < high if step > 0 else counts > low
        gain = np.where(free, step * (exact - counts), -np.inf)
        best = np.argsort(-gain, kind="stable")[: min(abs(left), int(free.sum()))]
        counts[best] += step
    return [int(count) for count in counts]


def rounded(region: Region, shares: Floats) -> tuple[list[int], int] | None:
    """Return whole parts of a thousand near `shares` that lie in a convex region, and the total.

    Where rounding leaves the ball the shares are moved towards its centre; where thousandths
    cannot fit at all, finer parts are tried, down to millionths. None if none fit.
    """
    middle = centre(region)
    if middle is None:
        return None
    for total, part in itertools.product((1000, 10_000, 100_000, 1_000_000), _parts()):
        counts = whole(region, shares + part * (middle - shares), total)
        if counts is not None and region.contains(np.array(counts) / total):
            return counts, total
    return None


def _parts() -> Iterator[float]:
    yield 0.0
    yield from (2.0**-power for power in range(8, -1, -1))
