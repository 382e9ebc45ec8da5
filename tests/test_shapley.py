"""Shapley values against their axioms and their definition, and the honesty of sampling."""

from __future__ import annotations

import math
from itertools import combinations, permutations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from poolreg.errors import Refused
from poolreg.numerics.shapley import (
    pair_interactions,
    permutation_plan,
    sampled_shapley,
    shapley,
    shapley_values,
    table_of,
)

numbers = st.floats(-10, 10)


@st.composite
def games(draw, least=1, most=6):
    d = draw(st.integers(least, most))
    return draw(arrays(np.float64, 1 << d, elements=numbers))


def players_of(game) -> int:
    return len(game).bit_length() - 1


def by_definition(game):
    """Average what a player adds over all orders of joining."""
    d = players_of(game)
    total = np.zeros(d)
    for order in permutations(range(d)):
        mask = 0
        for player in order:
            total[player] += game[mask | 1 << player] - game[mask]
            mask |= 1 << player
    return total / math.factorial(d)


@given(games(most=5))
def test_values_are_their_definition(game):
    assert shapley_values(game) == pytest.approx(by_definition(game), abs=1e-9)


@given(games(most=8))
def test_values_sum_to_the_total(game):
    assert shapley_values(game).sum() == pytest.approx(game[-1] - game[0], abs=1e-9)


@given(games(least=2, most=5), st.data())
def test_interchangeable_players_have_equal_values(game, data):
    d = players_of(game)
    i, j = data.draw(st.lists(st.integers(0, d - 1), min_size=2, max_size=2, unique=True))
    masks = np.arange(len(game))
    bits = (masks >> i ^ masks >> j) & 1
    swapped = masks ^ (bits << i | bits << j)
    values = shapley_values((game + game[swapped]) / 2)
    assert values[i] == pytest.approx(values[j], abs=1e-9)


@given(games(most=5), st.data())
def test_a_player_who_changes_nothing_has_none(game, data):
    i = data.draw(st.integers(0, players_of(game) - 1))
    without = game[np.arange(len(game)) & ~(1 << i)]
    assert shapley_values(without)[i] == pytest.approx(0, abs=1e-9)


@given(st.integers(1, 5), numbers, numbers, st.data())
def test_values_are_linear_in_the_game(d, a, b, data):
    one, two = (data.draw(arrays(np.float64, 1 << d, elements=numbers)) for _ in range(2))
    wanted = a * shapley_values(one) + b * shapley_values(two)
    assert shapley_values(a * one + b * two) == pytest.approx(wanted, abs=1e-8)


# -- interactions -------------------------------------------------------------------------------


def interactions_by_definition(game):
    """The interaction is how much joining as one player gains over joining apart."""
    d = players_of(game)
    found = np.full((d, d), np.nan)
    for i, j in permutations(range(d), 2):
        others = [k for k in range(d) if k not in (i, j)]
        total = 0.0
        for size in range(d - 1):
            weight = math.factorial(size) * math.factorial(d - size - 2) / math.factorial(d - 1)
            for chosen in combinations(others, size):
                s = sum(1 << k for k in chosen)
                a, b = 1 << i, 1 << j
                total += weight * (game[s | a | b] - game[s | a] - game[s | b] + game[s])
        found[i, j] = total
    return found


@given(games(most=5))
def test_interactions_are_their_definition(game):
    wanted = interactions_by_definition(game)
    assert pair_interactions(game) == pytest.approx(wanted, abs=1e-9, nan_ok=True)


def test_interactions_of_sums_and_products():
    bits = np.arange(8)[:, None] >> np.arange(3) & 1
    apart = pair_interactions(bits @ np.array([1.0, 2, 3]))
    assert apart[~np.eye(3, dtype=bool)] == pytest.approx(0)
    together = pair_interactions(5.0 * bits[:, 0] * bits[:, 2])
    assert (together[0, 2], together[0, 1], together[1, 2]) == pytest.approx((5, 0, 0))


# -- names --------------------------------------------------------------------------------------


def named_game():
    players = ["prose", "code", "wiki"]
    values = {
        frozenset(chosen): float(sum(map(len, chosen)) - 2 * ({"code", "wiki"} <= set(chosen)))
        for size in range(4)
        for chosen in combinations(players, size)
    }
    return players, values


def test_named_values_follow_the_players_order():
    players, values = named_game()
    assert shapley(values, players) == pytest.approx({"prose": 5, "code": 3, "wiki": 3})
    assert list(shapley(values, players)) == players
    table = table_of(values, players)
    assert (table[0b000], table[0b001], table[0b110], table[0b111]) == (0, 5, 6, 11)


def test_missing_subsets_are_counted_and_named():
    players, values = named_game()
    kept = {s: v for s, v in values.items() if "wiki" in s}
    with pytest.raises(
        Refused, match=r"4 of 8 subsets have no value: \(none\), code, prose …"
    ) as e:
        shapley(kept, players)
    assert e.value.data == {"missing": 4}
    del values[frozenset(["wiki", "code"])]
    with pytest.raises(Refused, match=r"1 of 8 subsets have no value: code\+wiki\n"):
        shapley(values, players)


def test_what_is_no_game_is_refused():
    players, values = named_game()
    with pytest.raises(Refused, match="named twice"):
        shapley(values, [*players, "code"])
    with pytest.raises(Refused, match="21 players have too many subsets"):
        shapley({}, [str(i) for i in range(21)])
    for size in (0, 3, 6):
        with pytest.raises(Refused, match=f"{size} values are not those of all subsets"):
            shapley_values(np.zeros(size))


# -- sampling -----------------------------------------------------------------------------------


@given(st.integers(1, 9), st.integers(1, 12), st.integers(0, 99))
def test_a_plan_is_made_of_orders_and_their_reverses(d, count, seed):
    plan = permutation_plan(d, count, seed)
    assert len(plan) == count + count % 2
    assert all(sorted(order) == list(range(d)) for order in plan)
    assert all(one[::-1] == other for one, other in zip(plan[::2], plan[1::2], strict=True))
    assert plan == permutation_plan(d, count, seed)


def uneven_game(d, generator):
    """A game with diminishing returns and some noise, as losses of mixtures are."""
    bits = np.arange(1 << d)[:, None] >> np.arange(d) & 1
    return -np.sqrt(bits @ generator.uniform(0.1, 2, d)) + 0.1 * generator.normal(size=1 << d)


def test_sampled_values_are_near_the_exact_ones_and_sum_to_the_total():
    game = uneven_game(8, np.random.default_rng(0))
    values, errors = sampled_shapley(permutation_plan(8, 200, seed=1), lambda mask: game[mask])
    assert values.sum() == pytest.approx(game[-1] - game[0], abs=1e-12)
    assert (np.abs(values - shapley_values(game)) < 4 * errors).all()
    assert (errors < 0.02).all()


def test_reverses_make_the_errors_smaller():
    game = uneven_game(8, np.random.default_rng(2))
    _, errors = sampled_shapley(permutation_plan(8, 400, seed=3), lambda mask: game[mask])
    generator, marginals = np.random.default_rng(4), []
    for _ in range(400):
        order = generator.permutation(8)
        masks = np.cumsum(np.append(0, 1 << order))
        row = np.empty(8)
        row[order] = np.diff(game[masks])
        marginals.append(row)
    independent = np.std(marginals, axis=0, ddof=1) / 20
    assert errors.mean() < independent.mean()


@pytest.mark.parametrize("pairs", [10, 40])
def test_standard_errors_say_how_far_off_the_values_are(pairs):
    game = uneven_game(6, np.random.default_rng(5))
    exact = shapley_values(game)
    scores = []
    for seed in range(200):
        plan = permutation_plan(6, 2 * pairs, seed)
        values, errors = sampled_shapley(plan, game.__getitem__)
        scores.append((values - exact) / errors)
    covered = np.mean(np.abs(scores) < {10: 2.262, 40: 2.023}[pairs])  # t at 95%
    assert covered == pytest.approx(0.95, abs=0.03)


def test_each_subset_is_asked_once():
    asked = []

    def value(mask: int) -> float:
        asked.append(mask)
        return 0.0

    sampled_shapley(permutation_plan(4, 50, seed=0), value)
    assert len(asked) == len(set(asked)) <= 16


def test_a_single_pair_has_no_standard_error():
    values, errors = sampled_shapley([(0, 1), (1, 0)], lambda mask: [0.0, 1, 2, 4][mask])
    assert values.tolist() == [1.5, 2.5]
    assert np.isnan(errors).all()


@pytest.mark.parametrize("plan", [[], [(0, 1)], [(0, 1), (0, 1)]])
def test_a_plan_without_reverses_is_refused(plan):
    with pytest.raises(Refused, match="followed by their reverse"):
        sampled_shapley(plan, float)
