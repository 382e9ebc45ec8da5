"""Statistics against scipy, plain loops and simulation."""

from __future__ import annotations

import itertools
import math
import warnings

import numpy as np
import pytest
import scipy.stats
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from poolreg.numerics import statistics as S

TOLERANCE = 1e-12


@pytest.fixture(autouse=True)
def _no_warnings():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


# Few levels, so that ties are common.
levels = st.integers(0, 6).map(lambda v: v / 3)


@st.composite
def two_columns(draw, least=1, most=12):
    n = draw(st.integers(least, most))
    column = arrays(np.float64, n, elements=levels)
    return draw(column), draw(column)


def scipys(function, x, y) -> float:
    if len(x) < 2:
        return math.nan
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return float(function(x, y).statistic)


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (S.pearson, scipy.stats.pearsonr),
        (S.spearman, scipy.stats.spearmanr),
        (S.kendall, scipy.stats.kendalltau),
    ],
)
@given(two_columns())
def test_correlations_are_those_of_scipy(ours, theirs, columns):
    assert ours(*columns) == pytest.approx(scipys(theirs, *columns), abs=TOLERANCE, nan_ok=True)


@pytest.mark.parametrize("function", [S.pearson, S.spearman, S.kendall])
@pytest.mark.parametrize("x", [[], [1.0], [0.1, 0.1, 0.1]], ids=len)
def test_correlations_without_spread_are_nan(function, x):
    x = np.array(x)
    assert math.isnan(function(x, np.arange(len(x)) + 0.5))
    assert math.isnan(function(np.arange(len(x)) + 0.5, x))


@pytest.mark.parametrize("scale", [1e-200, 1e-9, 1.0, 1e200])
def test_pearson_does_not_depend_on_the_scale(scale):
    x, y = np.random.default_rng(0).normal(size=(2, 9))
    assert S.pearson(scale * x, y) == pytest.approx(S.pearson(x, y), abs=TOLERANCE)


@pytest.mark.parametrize(
    ("along", "plain"), [(S.pearson_along, S.pearson), (S.spearman_along, S.spearman)]
)
def test_along_the_last_axis_of_broadcast_arrays(along, plain):
    generator = np.random.default_rng(0)
    x, y = generator.integers(0, 4, (3, 1, 7)) * 1.0, generator.integers(0, 4, (2, 7)) * 1.0
    y[1] = 2
    wanted = [[plain(x[i, 0], y[j]) for j in range(2)] for i in range(3)]
    assert np.allclose(along(x, y), wanted, atol=TOLERANCE, equal_nan=True)
    assert np.isnan(along(x, y)[:, 1]).all()


def test_fisher_mean():
    assert S.fisher_mean(np.array([0.2, 0.9])) == pytest.approx(
        math.tanh((math.atanh(0.2) + math.atanh(0.9)) / 2)
    )
    rows = S.fisher_mean(np.array([[0.5, np.nan], [np.nan, np.nan], [1.0, 1.0], [-1.0, 1.0]]))
    assert rows == pytest.approx([0.5, np.nan, S.FISHER_CLIP, 0], nan_ok=True)


def test_the_top_quarter_is_of_the_true_values():
    generator = np.random.default_rng(0)
    true = generator.permutation(17).astype(float)  # the quarter: ⌈17/4⌉ = 5
    predicted = generator.normal(size=17)
    best = true < 5
    assert S.top_quarter_spearman(predicted, true) == pytest.approx(
        scipy.stats.spearmanr(predicted[best], true[best]).statistic
    )
    assert math.isnan(S.top_quarter_spearman(predicted[:16], true[:16]))
    assert math.isnan(S.top_quarter_spearman(np.array([]), np.array([])))


# -- decisions ----------------------------------------------------------------------------------


def accuracy_by_definition(predicted, true) -> float:
    right, pairs = 0.0, 0
    for i, j in itertools.combinations(range(len(true)), 2):
        if true[i] == true[j]:
            continue
        pairs += 1
        if predicted[i] == predicted[j]:
            right += 0.5
        elif (predicted[i] < predicted[j]) == (true[i] < true[j]):
            right += 1
    return right / pairs if pairs else math.nan


@given(two_columns())
def test_decision_accuracy_is_its_definition(columns):
    assert S.decision_accuracy(*columns) == pytest.approx(
        accuracy_by_definition(*columns), nan_ok=True
    )


def test_decision_accuracy_orders_infinite_values():
    inf = math.inf
    assert S.decision_accuracy(np.array([1, inf, inf]), np.array([1, 2, inf])) == 2.5 / 3


def regret_by_definition(predicted, true, k) -> float:
    """Average over all orders that agree with the prediction."""
    chosen = [
        min(true[list(order[:k])])
        for order in itertools.permutations(range(len(true)))
        if all(predicted[a] <= predicted[b] for a, b in itertools.pairwise(order))
    ]
    return float(np.mean(chosen) - min(true))


@given(two_columns(most=6), st.integers(1, 7))
def test_regret_is_the_expectation_over_ties(columns, k):
    assert S.regret_at(*columns, k) == pytest.approx(
        regret_by_definition(*columns, k), abs=TOLERANCE
    )


def test_regret_at_the_ends():
    predicted, true = np.array([3.0, 2, 1]), np.array([1.0, 2, 4])
    assert [S.regret_at(predicted, true, k) for k in (1, 2, 3, 9)] == [3, 1, 0, 0]
    assert math.isnan(S.regret_at(predicted, true, 0))
    assert math.isnan(S.regret_at(np.array([]), np.array([]), 1))
    # One entry that diverged does not make what is certain unknown.
    tied = np.zeros(3)
    assert S.regret_at(tied, np.array([1, 2, math.inf]), 2) == pytest.approx(1 / 3)


# -- calibration --------------------------------------------------------------------------------


def calibration_by_refitting(x, y) -> float:
    errors = []
    for i in range(len(x)):
        others = np.arange(len(x)) != i
        if np.ptp(x[others]) == 0:
            predicted = y[others].mean()
        else:
            predicted = np.polyval(np.polyfit(x[others], y[others], 1), x[i])
        errors.append(abs(y[i] - predicted))
    return float(np.mean(errors))


@given(two_columns(least=2))
def test_calibration_is_refitting_without_each(columns):
    x, y = columns
    found = S.affine_calibration(x, y)
    assert found.mean_absolute_error == pytest.approx(calibration_by_refitting(x, y), abs=1e-9)
    if np.ptp(x) == 0:
        assert math.isnan(found.slope)
        assert found.intercept == pytest.approx(y.mean())
    else:
        assert [found.slope, found.intercept] == pytest.approx(np.polyfit(x, y, 1), abs=1e-9)


def test_calibration_of_too_few():
    assert math.isnan(S.affine_calibration(np.array([1.0]), np.array([1.0])).intercept)


# -- the bootstrap ------------------------------------------------------------------------------


def correlated(generator, n, rho):
    x, noise = generator.normal(size=(2, n))
    return x, rho * x + math.sqrt(1 - rho**2) * noise


@pytest.mark.parametrize("along", [S.pearson_along, S.spearman_along])
def test_the_interval_is_scipys_bca_at_the_expanded_level(along):
    n = 16
    x, y = correlated(np.random.default_rng(1), n, 0.7)
    wide = math.sqrt(n / (n - 1)) * scipy.stats.t.ppf(0.025, n - 1)
    theirs = scipy.stats.bootstrap(
        (np.arange(n),),
        lambda index, axis: along(x[index], y[index]),  # noqa: ARG005
        n_resamples=2000,
        confidence_level=1 - 2 * scipy.stats.norm.cdf(wide),
        method="BCa",
        random_state=np.random.default_rng(0),
    ).confidence_interval
    ours = S.bootstrap_interval(lambda index: along(x[index], y[index]), n)
    assert ours == pytest.approx((theirs.low, theirs.high), abs=1e-9)
    assert ours[0] < along(x, y) < ours[1]


def test_a_higher_level_is_wider_and_the_seed_repeats():
    x, y = correlated(np.random.default_rng(2), 20, 0.5)

    def interval(**options):
        return S.bootstrap_interval(lambda i: S.pearson_along(x[i], y[i]), 20, **options)

    narrow, wide = interval(level=0.5), interval(level=0.99)
    assert wide[0] < narrow[0] < narrow[1] < wide[1]
    assert interval() == interval(seed=0) != interval(seed=1)


def test_a_macro_average_resamples_whole_mixtures():
    generator = np.random.default_rng(3)
    x = generator.normal(size=(5, 18))
    y = x + generator.normal(size=(5, 18))

    def statistic(index):
        return S.fisher_mean(np.moveaxis(S.pearson_along(x[:, index], y[:, index]), 0, -1))

    low, high = S.bootstrap_interval(statistic, 18)
    single = S.bootstrap_interval(lambda i: S.pearson_along(x[0, i], y[0, i]), 18)
    assert low < statistic(np.arange(18)) < high
    assert high - low < single[1] - single[0]


def undefined_where(share):
    def statistic(index):
        value = index.mean(-1).astype(float)
        return np.where(index[..., 0] < share * 10, np.nan, value) if index.ndim == 2 else value

    return statistic


def test_undefined_resamples_are_left_out_up_to_half():
    low, high = S.bootstrap_interval(undefined_where(0.3), 10)
    assert low < 4.5 < high
    assert np.isnan(S.bootstrap_interval(undefined_where(0.7), 10)).all()


@pytest.mark.parametrize("n", [0, 1, 2, 6])
def test_intervals_that_would_say_nothing_are_nan(n):
    x = np.arange(n, dtype=float)
    for y in (x, -x, 0 * x):
        assert np.isnan(S.bootstrap_interval(lambda i, y=y: S.pearson_along(x[i], y[i]), n)).all()


def test_without_bca_the_interval_is_that_of_percentiles():
    # A maximum: all resamples lie on one side of it.
    values = np.arange(10.0)
    low, high = S.bootstrap_interval(lambda i: np.minimum(values[i].max(-1), 7), 10)
    assert low < high == 7


@pytest.mark.slow
@pytest.mark.parametrize("along", [S.pearson_along, S.spearman_along])
@pytest.mark.parametrize("n", [16, 24])
def test_the_interval_covers(along, n):
    generator, trials, rho = np.random.default_rng(4), 300, 0.8
    # Spearman's ρ of a bivariate normal is 6/π · asin(r/2); a finite sample's is a little lower.
    true = rho if along is S.pearson_along else 6 / math.pi * math.asin(rho / 2)
    covered = 0
    for _ in range(trials):
        x, y = correlated(generator, n, rho)
        low, high = S.bootstrap_interval(lambda i: along(x[i], y[i]), n, resamples=500)  # noqa: B023
        covered += low <= true <= high
    assert covered / trials >= 0.95 - 3 * math.sqrt(0.95 * 0.05 / trials)
