"""Shares and sizes against brute force."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from poolreg.numerics.allocate import Curve, knapsack, layer_shares

# -- shares of layers ------------------------------------------------------------------------

IMPORTANCE = st.lists(st.floats(0, 1), min_size=1, max_size=12)


@given(
    importance=IMPORTANCE, average=st.floats(0, 1), room=st.floats(0, 1),
    epsilon=st.sampled_from([5e-324, 1e-300, 1e-6, 0.01, 0.1, 1.0, 1e6, 1e300, math.inf]),
)  # fmt: skip
@settings(max_examples=200, deadline=None)
def test_shares_meet_the_average_under_the_cap(importance, average, room, epsilon):
    cap = average + room * (1 - average)
    shares = layer_shares(importance, average, epsilon=epsilon, cap=cap)
    assert shares.mean() == pytest.approx(average, rel=1e-12, abs=1e-15)
    assert shares.max() <= cap * (1 + 1e-15)
    assert shares.min() >= -1e-15
    order = np.argsort(importance, kind="stable")  # the less it matters, the more may go
    assert (np.diff(shares[order]) <= 1e-12).all()


@given(importance=IMPORTANCE, epsilon=st.floats(0.05, 10))
@settings(max_examples=50, deadline=None)
def test_without_a_cap_shares_are_the_softmax(importance, epsilon):
    shares = layer_shares(importance, 0.3, epsilon=epsilon, cap=math.inf)
    raw = [math.exp(-s / epsilon) for s in importance]
    wanted = [len(raw) * 0.3 * r / math.fsum(raw) for r in raw]
    assert shares.tolist() == pytest.approx(wanted, rel=1e-10)


def test_the_excess_goes_to_the_others_in_proportion():
    importance = [0.0, 0.2, 0.4, 0.6]
    shares = layer_shares(importance, 0.55, epsilon=0.2, cap=0.8)
    assert shares[:2].tolist() == [0.8, 0.8]  # the second is over only after the first overflowed
    assert shares[2:].sum() == pytest.approx(0.6)
    assert shares[2] / shares[3] == pytest.approx(math.e)


def test_a_small_temperature_fills_one_layer_after_the_other():
    shares = layer_shares([0.3, 0.1, 0.2, 0.9], 0.4, epsilon=1e-3, cap=0.8)
    assert shares.tolist() == pytest.approx([0.0, 0.8, 0.8, 0.0], abs=1e-12)


def test_layers_alike_share_alike():
    assert layer_shares([0.5] * 3, 0.2, epsilon=1e-9, cap=0.8).tolist() == pytest.approx([0.2] * 3)
    assert layer_shares([0.9, 0.1], 0.2, epsilon=1e9, cap=0.8).tolist() == pytest.approx([0.2] * 2)
    assert layer_shares([0.1, 0.9], 0.8, epsilon=0.1, cap=0.8).tolist() == pytest.approx([0.8] * 2)


def test_an_average_above_the_cap_is_impossible():
    with pytest.raises(ValueError, match="above the cap"):
        layer_shares([0.1, 0.2], 0.9, epsilon=0.1, cap=0.8)


# -- sizes under a budget ----------------------------------------------------------------------


def curve(costs: list[int], errors: list[float]) -> Curve:
    sizes = np.arange(10, 10 + len(costs))
    return Curve(sizes, np.array(costs, np.int64), np.array(errors, np.float64))


@st.composite
def convex_curves(draw, *, price: int | None = None) -> list[Curve]:
    """Up to four curves of up to five sizes, each next parameter saving less than the last."""
    curves = []
    for _ in range(draw(st.integers(1, 4))):
        steps = draw(st.integers(0, 4))
        prices = [price or draw(st.integers(1, 6)) for _ in range(steps)]
        slopes = sorted((draw(st.integers(1, 50)) for _ in range(steps)), reverse=True)
        costs = itertools.accumulate(prices, initial=draw(st.integers(1, 5)))
        saved = itertools.accumulate(
            (-p * s for p, s in zip(prices, slopes, strict=True)), initial=0.0
        )
        curves.append(curve(list(costs), [1000 + s for s in saved]))
    return curves


@st.composite
def any_curves(draw) -> list[Curve]:
    curves = []
    for _ in range(draw(st.integers(1, 3))):
        errors = draw(st.lists(st.floats(0, 10), min_size=1, max_size=6))
        prices = [draw(st.integers(1, 5)) for _ in errors]
        curves.append(curve(list(itertools.accumulate(prices)), errors))
    return curves


def budget_of(data, curves: list[Curve]) -> int:
    least, most = (sum(int(c.costs[end]) for c in curves) for end in (0, -1))
    return data.draw(st.integers(least, most + 2))


def outcome(curves: list[Curve], sizes: list[int]) -> tuple[int, float]:
    places = [int(np.flatnonzero(c.sizes == s)[0]) for c, s in zip(curves, sizes, strict=True)]
    chosen = list(zip(curves, places, strict=True))
    return sum(int(c.costs[p]) for c, p in chosen), sum(float(c.errors[p]) for c, p in chosen)


def brute(curves: list[Curve], budget: int) -> float:
    choices = itertools.product(*(c.sizes.tolist() for c in curves))
    return min(e for cost, e in (outcome(curves, list(c)) for c in choices) if cost <= budget)


def fits_better(curves: list[Curve], sizes: list[int], budget: int) -> bool:
    """Tell whether a single module could grow within the budget and err less."""
    spent, error = outcome(curves, sizes)
    assert spent <= budget
    for index, c in enumerate(curves):
        for size in c.sizes[c.sizes > sizes[index]].tolist():
            cost, less = outcome(curves, [*sizes[:index], size, *sizes[index + 1 :]])
            if cost <= budget and less < error:
                return True
    return False


@given(curves=convex_curves(), data=st.data())
@settings(max_examples=100, deadline=None)
def test_convex_curves_come_within_a_step_of_the_best(curves, data):
    budget = budget_of(data, curves)
    sizes = knapsack(curves, budget)
    step = max((float(-np.diff(c.errors).min()) for c in curves if len(c.errors) > 1), default=0)
    best = brute(curves, budget)
    assert best <= outcome(curves, sizes)[1] <= best + step
    assert not fits_better(curves, sizes, budget)


@given(curves=convex_curves(price=3), data=st.data())
@settings(max_examples=100, deadline=None)
def test_convex_curves_with_equal_steps_are_solved_exactly(curves, data):
    budget = budget_of(data, curves)
    assert outcome(curves, knapsack(curves, budget))[1] == brute(curves, budget)


@given(curves=any_curves(), data=st.data())
@settings(max_examples=100, deadline=None)
def test_any_curves_stay_within_the_budget_and_use_it(curves, data):
    budget = budget_of(data, curves)
    sizes = knapsack(curves, budget)
    assert not fits_better(curves, sizes, budget)
    smallest = [int(c.sizes[0]) for c in curves]
    assert outcome(curves, sizes)[1] <= outcome(curves, smallest)[1] + 1e-12


@given(slopes=st.lists(st.floats(0.1, 1), min_size=2, max_size=3), data=st.data())
@settings(max_examples=100, deadline=None)
def test_straight_curves_are_solved_exactly_whatever_the_rounding(slopes, data):
    curves = [curve(list(range(1, 7)), [1 - s * i for i in range(6)]) for s in slopes]
    budget = budget_of(data, curves)
    found = outcome(curves, knapsack(curves, budget))[1]
    assert found == pytest.approx(brute(curves, budget), abs=1e-12)


def test_a_budget_for_everything_gives_the_best_of_everything():
    curves = [curve([1, 2, 3], [5.0, 2.0, 1.0]), curve([4, 9], [3.0, 0.0])]
    assert knapsack(curves, 12) == [12, 11]
    assert knapsack(curves, 10**9) == [12, 11]
    assert knapsack([], 0) == []


def test_a_size_that_errs_more_than_a_smaller_one_is_not_taken():
    assert knapsack([curve([1, 2, 3, 4], [5.0, 3.0, 4.0, 3.0])], 10) == [11]
    assert knapsack([curve([1, 2], [1.0, 2.0])], 10) == [10]


def test_a_dent_above_the_hull_is_stepped_over():
    lazy = curve([0, 1, 2, 3], [9.0, 8.9, 8.8, 0.0])  # worth it only as a whole
    assert knapsack([lazy, curve([0, 3], [2.0, 0.0])], 3) == [13, 10]
    assert knapsack([lazy, curve([0, 3], [2.0, 0.0])], 2) == [12, 10]  # or what fits of it


def test_what_costs_too_much_at_its_smallest_is_impossible():
    with pytest.raises(ValueError, match="the smallest sizes cost 5, more than 4"):
        knapsack([curve([2, 3], [1.0, 0.0]), curve([3], [1.0])], 4)
