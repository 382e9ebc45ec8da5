"""The jackknife+ against plain loops, and its coverage in simulations."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from poolreg.errors import Refused
from poolreg.numerics import conformal as C


def made(kind: str, n: int, generator):
    """Return features [n, 3], correlated as proxies are, and values [n]."""
    x = generator.normal(size=(n, 3))
    x[:, 1:] += 0.7 * x[:, :1]
    mean, noise = x @ [1, 0.4, 0.1], generator.normal(size=n)
    if kind == "linear":
        return x, mean + 0.3 * noise
    if kind == "uneven noise":
        return x, mean + 0.3 * np.exp(0.7 * x[:, 0]) * noise
    return x, np.sin(2 * x[:, 0]) + x[:, 1] ** 2 + 0.2 * noise


# -- ten plain lines ----------------------------------------------------------------------------


def design(x, keep):
    """Return the function that standardises by the rows `keep`, with a column of ones."""
    spread = x[keep].std(0)
    spread[spread < 1e-9] = np.inf

    def rows(points):
        z = (np.atleast_2d(points) - x[keep].mean(0)) / spread
        return np.column_stack([np.ones(len(z)), z])

    return rows


def plain_fit(x, v, keep):
    """Return the chosen fit's prediction function, by refitting for each leave-one-out error."""
    candidates = [(0.0, 1), *((penalty, x.shape[1]) for penalty in C.PENALTIES)]
    best = None
    for penalty, p in candidates:
        rows = design(x[:, :p], keep)
        ridge = len(keep) * penalty * np.diag([0.0] + [1.0] * p)

        def solve(members, rows=rows, ridge=ridge, p=p):
            a = rows(x[members][:, :p])
            return np.linalg.pinv(a.T @ a + ridge, rcond=1e-11) @ (a.T @ v[members])

        errors = []
        for i in keep:
            others = [j for j in keep if j != i]
            if p == 1 and np.ptp(x[others, 0]) < 1e-9:
                errors.append(v[i] - v[others].mean())
            else:
                errors.append(v[i] - float((rows(x[i, :p]) @ solve(others))[0]))
        loss = float(np.mean(np.square(errors)))
        if best is None or loss < best[0]:
            w = solve(keep)
            best = loss, lambda point, w=w, r=rows, p=p: float((r(point[:p]) @ w)[0])
    return best[1]


def plain_interval(x, v, new, level, members):
    low, high = [], []
    for i in members:
        fit = plain_fit(x, v, [j for j in members if j != i])
        residual = abs(v[i] - fit(x[i]))
        low.append(fit(new) - residual)
        high.append(fit(new) + residual)
    n = len(members)
    alpha = 1 - level
    down, up = math.floor(alpha * (n + 1) + 1e-9), math.ceil(level * (n + 1) - 1e-9)
    return sorted(low)[max(down, 1) - 1], sorted(high)[min(up, n) - 1]


@pytest.mark.parametrize("kind", ["linear", "uneven noise", "wrong form"])
@pytest.mark.parametrize("n", [8, 13])
def test_forecast_is_the_plain_jackknife(kind, n):
    x, v = made(kind, n + 1, np.random.default_rng(n))
    found = C.forecast(x[:n], v[:n], x[n])
    members = list(range(n))
    assert found.value == pytest.approx(plain_fit(x, v, members)(x[n]), abs=1e-9)
    wanted = plain_interval(x, v, x[n], 0.9, members)
    assert (found.low, found.high) == pytest.approx(wanted, abs=1e-9)
    assert found.references == n


@pytest.mark.parametrize("level", [0.7, 0.9])
def test_coverage_is_forecasting_each_from_the_others(level):
    n = 11
    x, v = made("linear", n, np.random.default_rng(0))
    inside, widths = [], []
    for j in range(n):
        others = np.arange(n) != j
        found = C.forecast(x[others], v[others], x[j], level=level)
        inside.append(found.low <= v[j] <= found.high)
        widths.append(found.high - found.low)
    assert C.coverage(x, v, level=level) == pytest.approx((np.mean(inside), np.mean(widths)))


def test_the_left_out_error_is_that_of_each_plain_fit():
    n = 10
    x, v = made("linear", n, np.random.default_rng(5))
    fits = [plain_fit(x, v, [j for j in range(n) if j != i])(x[i]) for i in range(n)]
    assert C.left_out_error(x, v) == pytest.approx(np.abs(v - fits).mean())


# -- what the interval stands for ---------------------------------------------------------------


@pytest.mark.parametrize(("n", "level", "reached"), [
    (8, 0.9, 8 / 9), (9, 0.9, 0.9), (18, 0.95, 18 / 19), (19, 0.95, 0.95), (9, 0.7, 0.7),
])  # fmt: skip
def test_the_level_is_what_so_few_references_can_give(n, level, reached):
    x, v = made("linear", n, np.random.default_rng(1))
    assert C.forecast(x, v, x[0], level=level).level == pytest.approx(reached)


def test_seventy_percent_of_nine_is_the_seventh():
    assert C._rank(9, 0.7) == 7  # 0.7 · 10 is a little more than 7 in floating point


@pytest.mark.parametrize("kind", ["linear", "uneven noise", "wrong form"])
@pytest.mark.parametrize("n", [8, 12, 24])
def test_intervals_cover_as_they_say(kind, n):
    generator, trials, covered = np.random.default_rng(n), 400, 0
    for _ in range(trials):
        x, v = made(kind, n + 1, generator)
        found = C.forecast(x[:n], v[:n], x[n])
        covered += found.low <= v[n] <= found.high
    error = math.sqrt(found.level * (1 - found.level) / trials)
    assert covered / trials >= found.level - 3 * error
    # Ranks are whole numbers, so some more is covered than asked for, but not without end.
    assert covered / trials <= found.level + 0.05 + 3 * error


def test_measured_coverage_estimates_the_true_one():
    generator = np.random.default_rng(5)
    shares = [C.coverage(*made("linear", 12, generator))[0] for _ in range(60)]
    assert np.mean(shares) == pytest.approx(0.91, abs=0.04)


def test_the_interval_is_short_where_a_fit_explains_all():
    x, _ = made("linear", 20, np.random.default_rng(2))
    line = 3 * x[:, 0] - 1
    found = C.forecast(x, line, np.array([5.0, 0, 0]))
    assert (found.fit, found.value) == ("affine", pytest.approx(14))
    assert found.high - found.low < 1e-9
    several = C.forecast(x, x @ [1.0, 1, 1], np.array([0.5, 0.5, 0.5]))
    assert several.fit == "ridge"
    assert several.value == pytest.approx(1.5, abs=0.01)


# -- awkward features ---------------------------------------------------------------------------


@pytest.mark.parametrize("awkward", ["constant", "copied", "one differs", "all constant", "huge"])
def test_awkward_features_are_fitted_safely(awkward):
    x, v = made("linear", 12, np.random.default_rng(3))
    if awkward == "constant":
        x[:, 1] = 0.1
    elif awkward == "copied":
        x[:, 1] = x[:, 0]
    elif awkward == "one differs":
        x[:, 0] = 0.1
        x[4, 0] = 7
    elif awkward == "all constant":
        x[:] = 0.1
    else:
        x[:, 2] *= 1e12
    found = C.forecast(x, v, x[0])
    assert found.low <= found.high
    assert np.isfinite([found.value, found.low, found.high, *C.coverage(x, v)]).all()
    wanted = plain_interval(x, v, x[0], 0.9, list(range(12)))
    assert (found.low, found.high) == pytest.approx(wanted, abs=1e-6)


@given(st.floats(0.01, 100), st.floats(-100, 100), st.integers(0, 50))
def test_units_do_not_matter(scale, shift, seed):
    x, v = made("linear", 9, np.random.default_rng(seed))
    one = C.forecast(x, v, x[0])
    other = C.forecast(scale * x + shift, scale * v + shift, scale * x[0] + shift)
    for name in ("value", "low", "high"):
        wanted = scale * getattr(one, name) + shift
        assert getattr(other, name) == pytest.approx(wanted, rel=1e-6, abs=1e-6 * scale)


def test_one_feature_is_enough():
    x, v = made("linear", 10, np.random.default_rng(4))
    assert np.isfinite(C.forecast(x[:, :1], v, x[0, :1]).value)


# -- leverage -----------------------------------------------------------------------------------


def test_leverage_is_the_diagonal_of_the_hat_matrix():
    x, _ = made("linear", 10, np.random.default_rng(6))
    z = np.column_stack([np.ones(10), (x - x.mean(0)) / x.std(0)])
    for penalty in (0.0, 0.1):
        hat = z @ np.linalg.inv(z.T @ z + 10 * penalty * np.diag([0, 1, 1, 1])) @ z.T
        assert C.leverage(x, x, penalty) == pytest.approx(hat.diagonal())
    assert C.leverage(x, x, 0.0).sum() == pytest.approx(4)


def test_leverage_grows_with_distance_and_ignores_what_the_fit_ignores():
    x, _ = made("linear", 10, np.random.default_rng(7))
    x[:, 2] = 0.1
    near, far, aside = C.leverage(x, np.array([x.mean(0), x.mean(0) + 9, [*x.mean(0)[:2], 8]]), 0.0)
    assert near == pytest.approx(0.1)
    assert far > 1 > near
    assert aside == pytest.approx(near)


# -- refusals -----------------------------------------------------------------------------------


def test_what_cannot_be_forecast_is_refused():
    x, v = made("linear", 9, np.random.default_rng(8))
    with pytest.raises(Refused, match="7 references are too few") as caught:
        C.forecast(x[:7], v[:7], x[8])
    assert caught.value.data == {"references": 7, "least": 8}
    with pytest.raises(Refused, match="8 references are too few"):
        C.coverage(x[:8], v[:8])
    with pytest.raises(Refused, match="do not belong together"):
        C.forecast(x, v[:8], x[0])
    with pytest.raises(Refused, match="not 3 finite numbers"):
        C.forecast(x, v, x[0, :2])
    with pytest.raises(Refused, match="not finite"):
        C.forecast(np.where(x == x[0, 0], np.nan, x), v, x[1])
