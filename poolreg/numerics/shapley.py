"""What each partition contributes: Shapley values and pair interactions, exact or sampled.

A game over d players gives each subset a value. The internal form is a float64 array [2^d]: the
entry `mask` is the value of the subset whose players have their bits set in `mask`, and entry 0
that of no player at all. Shapley values sum to the value of all minus the value of none.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from itertools import combinations

import numpy as np
from numpy.typing import NDArray

from poolreg.errors import Refused

Doubles = NDArray[np.float64]
Masks = NDArray[np.int64]

MOST_PLAYERS = 20  # a table of 2^20 values; sampling is the way long before


def shapley(values: Mapping[frozenset[str], float], players: Sequence[str]) -> dict[str, float]:
    """Return each player's exact Shapley value from the values of all subsets.

    Raises `Refused` if a subset is missing (the empty one is needed too), a player is named
    twice, or there are more than 20.
    """
    table = table_of(values, players)
    return dict(zip(players, shapley_values(table).tolist(), strict=True))


def table_of(values: Mapping[frozenset[str], float], players: Sequence[str]) -> Doubles:
    """Return the values of all subsets [2^d], bit i standing for `players[i]`.

    Raises `Refused` as `shapley` does.
    """
    if len(set(players)) < len(players):
        raise Refused(
            "a player is named twice", hint="name each player once", players=list(players)
        )
    if len(players) > MOST_PLAYERS:
        raise Refused(
            f"{len(players)} players have too many subsets for exact Shapley values",
            hint=f"sample permutations, or take at most {MOST_PLAYERS} players",
        )
    subsets = [frozenset(p for i, p in enumerate(players) if mask >> i & 1)
               for mask in range(1 << len(players))]  # fmt: skip
    missing = sorted((s for s in subsets if s not in values), key=lambda s: (len(s), sorted(s)))
    if missing:
        named = ["+".join(sorted(s)) or "(none)" for s in missing[:3]]
        raise Refused(
            f"{len(missing)} of {len(subsets)} subsets have no value: {', '.join(named)}"
            + (" …" if len(missing) > len(named) else ""),
            hint="evaluate the missing subsets first, or sample permutations",
            missing=len(missing),
        )
    return np.array([values[s] for s in subsets], np.float64)


def shapley_values(values: Doubles) -> Doubles:
    """Return the Shapley values [d] of a game [2^d].

    φ_i = Σ_{S∌i} (v(S∪i) − v(S)) / (d · C(d−1, |S|)), the sum over subsets without i
    (Shapley 1953). Raises `Refused` if the number of values is no power of two.
    """
    d, sizes = _subsets(values)
    masks = np.arange(len(values))
    weights = np.array([1 / (d * math.comb(d - 1, s)) for s in range(d)])
    found = np.empty(d)
    for i in range(d):
        without = masks[masks >> i & 1 == 0]
        found[i] = weights[sizes[without]] @ (values[without | 1 << i] - values[without])
    return found


def pair_interactions(values: Doubles) -> Doubles:
    """Return the Shapley interaction indices [d, d] of a game [2^d]; the diagonal is NaN.

    I_ij = Σ_{S∌i,j} (v(S∪ij) − v(S∪i) − v(S∪j) + v(S)) / ((d−1) · C(d−2, |S|)), the sum over
    subsets with neither (Grabisch and Roubens 1999). Positive: together they have a higher value
    than apart, so for losses they get in each other's way; 0: they add up. Raises `Refused` if
    the number of values is no power of two.
    """
    d, sizes = _subsets(values)
    masks = np.arange(len(values))
    weights = np.array([1 / ((d - 1) * math.comb(d - 2, s)) for s in range(d - 1)])
    found = np.full((d, d), np.nan)
    for i, j in combinations(range(d), 2):
        a, b = 1 << i, 1 << j
        without = masks[masks & (a | b) == 0]
        joint = values[without | a | b] - values[without | a] - values[without | b]
        found[i, j] = found[j, i] = weights[sizes[without]] @ (joint + values[without])
    return found


def permutation_plan(d: int, permutations: int, seed: int) -> list[tuple[int, ...]]:
    """Return random orders of d players, each followed by its reverse.

    An odd number of `permutations` is rounded up. The reverse puts a player late where it was
    early, which cancels much of the variance (antithetic sampling).
    """
    generator = np.random.default_rng(seed)
    plan = []
    for _ in range(-(-permutations // 2)):
        order = tuple(generator.permutation(d).tolist())
        plan += [order, order[::-1]]
    return plan


def sampled_shapley(
    plan: Sequence[tuple[int, ...]], value: Callable[[int], float]
) -> tuple[Doubles, Doubles]:
    """Return estimated Shapley values [d] and their standard errors [d].

    `value` gives the value of a bitmask; it is asked once for each of the prefixes of the plan's
    orders. A pair of an order and its reverse is one draw: its mean enters the values, and the
    spread of these means over √pairs is the standard error (NaN for a single pair). The values
    sum to v(all) − v(none). Raises `Refused` for a plan that is not made of pairs.
    """
    pairs = list(zip(plan[::2], plan[1::2], strict=False))
    if not pairs or len(plan) % 2 or any(one[::-1] != other for one, other in pairs):
        raise Refused(
            "the plan is not made of orders that are each followed by their reverse",
            hint="make the plan with permutation_plan",
        )
    known = {0: value(0)}
    marginals = np.empty((len(plan), len(plan[0])))
    for row, order in zip(marginals, plan, strict=True):
        mask = 0
        for player in order:
            after = mask | 1 << player
            if after not in known:
                known[after] = value(after)
            row[player] = known[after] - known[mask]
            mask = after
    draws = (marginals[::2] + marginals[1::2]) / 2
    if len(draws) < 2:
        return draws.mean(0), np.full(draws.shape[1], np.nan)
    return draws.mean(0), draws.std(0, ddof=1) / math.sqrt(len(draws))


def _subsets(values: Doubles) -> tuple[int, Masks]:
    """Return d and the size of each subset [2^d]."""
    d = len(values).bit_length() - 1
    if len(values).bit_count() != 1:
        raise Refused(
            f"{len(values)} values are not those of all subsets of some players",
            hint="give one value for each subset, 2^d for d players",
        )
    masks = np.arange(len(values))
    return d, np.sum([masks >> i & 1 for i in range(d)], axis=0, dtype=np.int64)
