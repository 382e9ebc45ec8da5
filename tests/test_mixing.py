"""Regions, the ensemble's optimum and surrogates, against grids and plain float64."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from poolreg.numerics import mixing, regions, surrogates
from poolreg.numerics.mixing import Ensemble, Goal, minimise, odds_of
from poolreg.numerics.regions import Region, kl

ONE = Goal(np.ones((1, 1)), np.zeros(1))


def whole_simplex(count: int, **limits) -> Region:
    return Region(np.zeros(count), np.ones(count), **limits)


def grid(count: int, parts: int) -> np.ndarray:
    """Every point of the simplex whose shares are multiples of 1 / parts."""
    bars = itertools.combinations(range(parts + count - 1), count - 1)
    return np.array([np.diff((-1, *bar, parts + count - 1)) - 1 for bar in bars]) / parts


def losses_of(seed: int, tokens: int, models: int) -> np.ndarray:
    """Losses of tokens, each of which one model or another knows well."""
    random = np.random.default_rng(seed)
    return (random.exponential(2.0, (tokens, models)) + random.random((tokens, 1))).astype(
        np.float32
    )


def ensemble_of(*losses: np.ndarray, columns: list[list[int]] | None = None) -> Ensemble:
    columns = columns or [[k] for k in range(losses[0].shape[1])]
    made = [odds_of(one, columns) for one in losses]
    return Ensemble([m[0] for m in made], [m[1] for m in made], [3 * len(one) for one in losses])


def plain_loss(losses: np.ndarray, shares: np.ndarray) -> float:
    """The definition, token by token, in bits per byte."""
    likely = np.exp(-losses.astype(np.float64)) @ shares
    return float(-np.log(likely).sum() / (math.log(2) * 3 * len(losses)))


# -- regions --------------------------------------------------------------------------------


@st.composite
def boxes(draw, convex: bool = True):
    """A region that is not empty, with bounds and often a ball."""
    count = draw(st.integers(2, 6))
    numbers = st.lists(st.floats(0.01, 1), min_size=count, max_size=count)
    inside = np.array(draw(numbers))
    inside /= inside.sum()
    lower = np.maximum(inside - np.array(draw(numbers)), 0)
    upper = np.minimum(inside + np.array(draw(numbers)), 1)
    if not draw(st.booleans()):
        return Region(lower, upper)
    near = np.array(draw(numbers))
    near /= near.sum()
    return Region(lower, upper, near, kl(inside, near) + draw(st.floats(0.01, 1)))


@given(boxes(), st.integers(0, 1000))
@settings(max_examples=100, deadline=None)
def test_rounded_shares_keep_the_constraints(region, seed):
    wanted = np.random.default_rng(seed).dirichlet(np.ones(region.dimension))
    inside = regions.pulled_in(region, wanted)
    assert region.contains(inside, 1e-8)
    found = regions.rounded(region, inside)
    if found is not None:
        counts, total = found
        assert sum(counts) == total
        assert region.contains(np.array(counts) / total, 1e-8)
    else:  # only where bounds are narrower than a millionth
        assert float((region.upper - region.lower).max()) < 1e-4


@given(st.integers(1, 8), st.integers(0, 10_000))
@settings(max_examples=50, deadline=None)
def test_without_constraints_rounding_is_the_largest_remainder(count, seed):
    shares = np.random.default_rng(seed).dirichlet(np.ones(count))
    counts, total = regions.rounded(whole_simplex(count), shares)
    exact = shares * 1000
    order = sorted(range(count), key=lambda k: math.floor(exact[k]) - exact[k])
    plain = [math.floor(x) for x in exact]
    for k in order[: 1000 - sum(plain)]:
        plain[k] += 1
    assert (counts, total) == (plain, 1000)


@given(boxes(), st.integers(0, 1000))
@settings(max_examples=25, deadline=None)
def test_least_is_below_every_point_and_is_reached(region, seed):
    random = np.random.default_rng(seed)
    gradient = random.normal(size=region.dimension)
    bound = regions.least(region, gradient)
    draws = [
        regions.pulled_in(region, random.dirichlet(np.ones(region.dimension))) for _ in range(30)
    ]
    assert all(float(gradient @ draw) >= bound - 1e-7 for draw in draws)
    linear = minimise(
        lambda s: (np.array([gradient @ s]), gradient[None]), ONE, region, convex=True
    )
    assert linear.value == pytest.approx(bound, abs=2e-5)


def test_the_centre_is_the_projection():
    near = np.array([0.5, 0.3, 0.2])
    region = Region(np.array([0.0, 0.4, 0.0]), np.ones(3), near, 1.0)
    points = [p for p in grid(3, 200) if p[1] >= 0.4]
    best = min(points, key=lambda p: kl(p, near))
    assert np.allclose(regions.centre(region), best, atol=0.005)
    assert regions.centre(Region(np.array([0.0, 0.9, 0.0]), np.ones(3), near, 0.1)) is None


@pytest.mark.parametrize("size", [1, 2, 3])
def test_supports_hold_what_is_needed(size):
    region = Region(np.array([0.1, 0, 0, 0]), np.array([1, 0.5, 0.95, 1]), size=size)
    found = regions.supports(region, 300)
    assert all(0 in support and len(support) == size for support in found)
    assert len(found) == math.comb(3, size - 1)
    assert regions.supports(region, 1) is None or size == 1


# -- the ensemble ----------------------------------------------------------------------------


def test_the_ensemble_is_the_definition_and_its_gradient_a_difference_quotient():
    losses = losses_of(0, 400, 4)
    columns = [[0], [1, 2], [3]]
    ensemble = ensemble_of(losses, columns=columns)
    shares = np.array([0.2, 0.5, 0.3])
    spread = np.array([0.2, 0.25, 0.25, 0.3])
    values, jacobian = ensemble(shares)
    assert values[0] == pytest.approx(plain_loss(losses, spread), rel=1e-6)
    for k in range(3):
        step = np.zeros(3)
        step[k] = 1e-5
        slope = (ensemble(shares + step)[0] - ensemble(shares - step)[0]) / 2e-5
        assert jacobian[0, k] == pytest.approx(float(slope[0]), rel=1e-4)


def test_tokens_that_no_model_expects_do_not_overflow():
    losses = np.array([[900.0, 2.0], [1.0, 800.0]], dtype=np.float32)
    values, jacobian = ensemble_of(losses)(np.array([1.0, 0.0]))
    assert np.isfinite(values).all()
    assert np.isfinite(jacobian).all()


LIMITS = {
    "none": {},
    "ball": {"near": np.array([0.2, 0.3, 0.5]), "radius": 0.1},
    "two": {"size": 2},
    "one": {"size": 1},
}


@pytest.mark.parametrize("limits", LIMITS)
@pytest.mark.parametrize("bounded", [False, True])
@pytest.mark.parametrize("worst", [False, True])
def test_the_optimum_is_within_its_certificate_of_a_grid(limits, bounded, worst):
    losses = [losses_of(seed, 300, 3) for seed in (1, 2, 3)]
    losses[0][:, 0] += 1.0
    upper = np.array([1.0, 1.0, 0.4 if bounded and limits != "one" else 1.0])
    region = Region(np.array([0.05 if bounded and limits == "none" else 0, 0, 0]), upper,
                    **LIMITS[limits])  # fmt: skip
    goal = Goal(np.eye(3), np.array([-2.0, -1.9, -2.1])) if worst else Goal(
        np.array([[0.5, 0.3, 0.2]]), np.zeros(1)
    )  # fmt: skip
    found = minimise(ensemble_of(*losses), goal, region, convex=True)
    assert region.contains(found.shares, 1e-6)
    assert found.gap < 1e-5
    points = [p for p in grid(3, 100) if region.contains(p)]
    values = [float(goal.of(np.array([plain_loss(one, p) for one in losses]))) for p in points]
    assert found.value - found.gap <= min(values) + 1e-6
    assert found.value <= min(values) + 1e-6


def test_many_partitions_are_dropped_in_turn():
    losses = losses_of(4, 200, 8)
    losses[:, [2, 4, 7]] -= 1.0
    region = whole_simplex(8, size=3)
    assert math.comb(8, 3) < mixing.MOST_SUPPORTS
    each = minimise(ensemble_of(losses), ONE, region, convex=True)
    assert each.search == "each of 56 supports"
    larger = ensemble_of(np.hstack([losses, losses + 3.0]))
    dropped = minimise(larger, ONE, whole_simplex(16, size=3), convex=True)
    assert "dropping" in dropped.search
    assert dropped.gap is None
    assert int((dropped.shares > 0).sum()) <= 3
    assert dropped.value == pytest.approx(each.value, abs=0.01)


def test_an_empty_region_is_an_error():
    region = Region(np.array([0.7, 0.7]), np.ones(2))
    with pytest.raises(ValueError, match="empty"):
        minimise(ensemble_of(losses_of(0, 10, 2)), ONE, region, convex=True)


# -- surrogates ------------------------------------------------------------------------------


def draws(count: int, dimension: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).dirichlet(np.ones(dimension), size=count)


def test_the_law_is_recovered():
    shares, slopes = draws(40, 4), np.array([-0.5, 0.3, -1.2, 0.1])
    values = 2.0 + np.exp(shares @ slopes)
    law = surrogates.fit("law", shares, values)
    other = draws(20, 4, seed=1)
    assert law.constant == pytest.approx(2.0, abs=1e-3)
    assert np.allclose(law.at(other), 2.0 + np.exp(other @ slopes), atol=1e-5)


def test_the_law_is_robust():
    shares, slopes = draws(40, 3), np.array([-0.5, 0.3, -1.2])
    values = 2.0 + np.exp(shares @ slopes)
    spoiled = values.copy()
    spoiled[5] += 1.0
    law = surrogates.fit("law", shares, spoiled)
    assert np.abs(law.at(shares) - values).max() < 0.05


@pytest.mark.parametrize("kind", ["ridge", "law", "pairs"])
def test_gradients_are_difference_quotients(kind):
    shares = draws(30, 3)
    values = 2.0 + np.exp(shares @ [-0.5, 0.3, -1.2])
    features = shares if kind != "pairs" else np.array([surrogates.paired(s)[0] for s in shares])
    fitted = surrogates.fit(kind, features, values)

    def both(s: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return surrogates.paired(s) if kind == "pairs" else (s, np.eye(3))

    point = np.array([0.2, 0.3, 0.5])
    slope = fitted.gradient(*both(point))
    for k in range(3):
        step = np.zeros(3)
        step[k] = 1e-6
        quotient = (fitted.at(both(point + step)[0]) - fitted.at(both(point - step)[0])) / 2e-6
        assert slope[k] == pytest.approx(float(quotient), abs=1e-5)


def test_ridge_is_least_squares_where_there_is_no_noise_and_shrinks_where_there_is():
    random = np.random.default_rng(0)
    features = random.normal(size=(50, 3))
    constant, slopes = surrogates.ridge(features, 1.5 + features @ [1.0, -2.0, 0.5])
    assert constant == pytest.approx(1.5, abs=1e-4)
    assert np.allclose(slopes, [1.0, -2.0, 0.5], atol=1e-4)
    _, noise = surrogates.ridge(features[:8], random.normal(size=8))
    plain = np.linalg.lstsq(
        np.column_stack([np.ones(8), features[:8]]), random.normal(size=8), rcond=None
    )[0]
    assert np.linalg.norm(noise) < 3 * np.linalg.norm(plain) + 1


def test_the_closed_form_is_leaving_one_out():
    random = np.random.default_rng(1)
    features, values = random.normal(size=(12, 2)), random.normal(size=12)
    middle, spread = features.mean(0), features.std(0)

    def plain(penalty: float) -> float:
        """Leave one out by hand, with the standardisation of all rows."""
        z = np.column_stack([np.ones(12), (features - middle) / spread])
        shrink = np.diag([0.0, 12 * penalty, 12 * penalty])
        missed = []
        for i in range(12):
            own = np.arange(12) != i
            beta = np.linalg.solve(z[own].T @ z[own] + shrink, z[own].T @ values[own])
            missed.append(float(values[i] - z[i] @ beta))
        return float(np.mean(np.square(missed)))

    best = min(surrogates.PENALTIES, key=plain)
    z = np.column_stack([np.ones(12), (features - middle) / spread])
    beta = np.linalg.solve(z.T @ z + np.diag([0.0, 12 * best, 12 * best]), z.T @ values)
    constant, slopes = surrogates.ridge(features, values)
    assert np.allclose(slopes, beta[1:] / spread, atol=1e-8)
    assert constant == pytest.approx(float(beta[0] - middle @ (beta[1:] / spread)), abs=1e-8)


@pytest.mark.parametrize("truth", ["ridge", "law", "pairs"])
def test_cross_validation_chooses_the_kind_that_made_the_values(truth):
    shares = draws(60, 3)
    pairs = np.array([surrogates.paired(s)[0] for s in shares])
    values = {
        "ridge": shares @ [1.0, 2.0, 3.0],
        "law": 2.0 + np.exp(shares @ [-3.0, 2.0, -4.0]),
        "pairs": pairs @ [1.0, 1.2, 1.1, -3.0, 2.0, 1.0],
    }[truth]
    values = values + 1e-3 * np.random.default_rng(3).normal(size=60)
    tables = {"ridge": shares, "law": shares, "pairs": pairs}
    chosen = surrogates.choose(tables, values, surrogates.folds_of(60))
    assert chosen.errors[truth] <= 1.1 * min(chosen.errors.values())
    assert chosen.errors[truth] < 2e-3
    assert chosen.whole.kind in (truth, "pairs" if truth == "ridge" else truth)


def test_kinds_come_with_rows():
    assert surrogates.possible(6, 4, ensemble=False) == ("ridge",)
    assert surrogates.possible(10, 4, ensemble=True) == ("ridge", "law", "ensemble")
    assert surrogates.possible(12, 4, ensemble=False) == ("ridge", "law", "pairs")


def test_cv_plus_by_hand():
    residuals = np.arange(1.0, 20.0)  # 19 rows: ranks 18 of 19 at 90%
    low, high, level = surrogates.cv_plus(np.zeros(19), residuals, 0.9)
    assert (low, high, level) == (-18.0, 18.0, 0.9)
    low, high, level = surrogates.cv_plus(np.zeros(4), residuals[:4], 0.9)
    assert (low, high, level) == (-4.0, 4.0, 0.8)


def test_cv_plus_covers_new_rows():
    random = np.random.default_rng(5)
    inside = 0
    for _ in range(100):
        shares = random.dirichlet(np.ones(3), size=31)
        values = shares @ [1.0, 2.0, 3.0] + 0.1 * random.normal(size=31)
        folds = surrogates.folds_of(30)
        chosen = surrogates.choose({"ridge": shares[:30]}, values[:30], folds)
        by_fold = np.array([float(one.at(shares[30])) for one in chosen.folds])
        residuals = np.abs(chosen.left_out - values[:30])
        low, high, _ = surrogates.cv_plus(by_fold[folds], residuals, 0.9)
        inside += low <= values[30] <= high
    assert 0.82 <= inside / 100 <= 0.99
