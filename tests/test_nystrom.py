"""The Nyström re-fit and its factorisations against plain float64 references."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from poolreg.errors import Refused
from poolreg.numerics.nystrom import (
    cholesky,
    compensate,
    condition,
    leverage_scores,
    projected,
    ridge_of,
    squared_error,
)

pytestmark = pytest.mark.usefixtures("one_thread")


def activations(seed: int, tokens: int, channels: int) -> torch.Tensor:
    """Correlated rows a [T, n]; they span only T directions where T < n."""
    make = torch.Generator().manual_seed(seed)
    mix = torch.randn(channels, channels, generator=make, dtype=torch.float64)
    return torch.randn(tokens, channels, generator=make, dtype=torch.float64) @ mix


def weights(seed: int, channels: int, width: int = 3) -> torch.Tensor:
    make = torch.Generator().manual_seed(seed + 1000)
    return torch.randn(channels, width, generator=make, dtype=torch.float64)


def fitted(a: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Least squares on the rows themselves, without their Gram matrix."""
    return torch.linalg.lstsq(a, y, driver="gelsd").solution


def some(seed: int, channels: int, count: int) -> torch.Tensor:
    order = torch.randperm(channels, generator=torch.Generator().manual_seed(seed))
    return order[:count].sort().values


SEEDS = st.integers(0, 10_000)


# -- ridge and factor ----------------------------------------------------------------------


def test_the_ridge_follows_the_scale_of_the_matrix():
    gram = torch.diag(torch.tensor([1.0, 2.0, 6.0], dtype=torch.float64))
    assert ridge_of(gram, 0.1) == pytest.approx(0.3)
    assert ridge_of(1e6 * gram, 0.1) == pytest.approx(0.3e6)


@pytest.mark.parametrize("channels", [1, 2, 9])
def test_cholesky_is_a_root_of_a_definite_matrix(channels):
    a = activations(0, 50, channels)
    root = cholesky(a.T @ a)
    assert torch.equal(root, root.tril())
    torch.testing.assert_close(root @ root.T, a.T @ a, rtol=1e-9, atol=1e-7)


@pytest.mark.parametrize("relative", [0.0, 1e-18, 1e-10])
def test_cholesky_raises_the_ridge_of_a_singular_matrix_just_enough(relative):
    a = activations(1, 4, 10)
    gram = a.T @ a
    root = cholesky(gram, relative)
    assert root.isfinite().all()
    assert (root @ root.T - gram).abs().max() < 1e-9 * gram.abs().max()


def test_each_matrix_of_a_batch_has_the_ridge_of_its_own_scale():
    a = activations(2, 4, 6)
    gram = a.T @ a
    roots = cholesky(torch.stack([gram, 1e-20 * gram, torch.zeros_like(gram)]))
    torch.testing.assert_close(roots[1], 1e-10 * roots[0], rtol=1e-4, atol=1e-18)
    assert (roots[2].diagonal() > 0).all()


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("place", [(0, 0), (3, 3), (3, 1)])
def test_a_matrix_that_is_not_finite_is_refused(value, place):
    a = activations(3, 20, 4)
    gram = a.T @ a
    gram[place] = gram[place[::-1]] = value
    with pytest.raises(Refused, match="not finite"):
        cholesky(gram)
    with pytest.raises(Refused):
        leverage_scores(gram, 1.0)
    with pytest.raises(Refused):
        compensate(gram, weights(3, 4), torch.tensor([0, 1, 3]))
    with pytest.raises(Refused):
        projected(gram, weights(3, 4), torch.eye(4, dtype=torch.float64))


def test_a_matrix_of_no_activations_is_refused():
    with pytest.raises(Refused, match="not that of any activations"):
        cholesky(torch.diag(torch.tensor([1.0, -3.0, 1.0], dtype=torch.float64)))


# -- condition -----------------------------------------------------------------------------


@given(seed=SEEDS, spread=st.floats(0, 5), channels=st.integers(1, 12))
@settings(max_examples=40, deadline=None)
def test_condition_estimates_numpys_from_below(seed, spread, channels):
    turn, _ = torch.linalg.qr(activations(seed, channels, channels))
    values = torch.logspace(-spread, 0, channels, dtype=torch.float64)
    gram = turn @ torch.diag(values) @ turn.T
    true = float(torch.linalg.cond(gram))
    assert 0.7 * true <= condition(gram) <= true * (1 + 1e-6)


def test_condition_of_a_symmetric_matrix_whose_eigenvector_is_constant():
    gram = torch.tensor([[1.2, -0.2], [-0.2, 1.2]], dtype=torch.float64)  # 1 along (1, 1), else 1.4
    assert condition(gram) == pytest.approx(1.4, rel=1e-6)


def test_condition_of_a_singular_matrix_is_infinite():
    assert condition(torch.diag(torch.tensor([1.0, 0.0], dtype=torch.float64))) == math.inf
    assert condition(torch.full((2, 2), math.nan, dtype=torch.float64)) == math.inf


# -- leverage ------------------------------------------------------------------------------


@given(seed=SEEDS, tokens=st.integers(1, 30), ridge=st.floats(1e-6, 1e6))
@settings(max_examples=40, deadline=None)
def test_leverage_scores_are_the_diagonal_of_the_ridge_projection(seed, tokens, ridge):
    a = activations(seed, tokens, 8)
    left, values, _ = torch.linalg.svd(a.T, full_matrices=True)
    spectrum = torch.zeros(8, dtype=torch.float64)
    spectrum[: len(values)] = values.square()
    wanted = (left.square() * (spectrum / (spectrum + ridge))).sum(1)
    found = leverage_scores(a.T @ a, ridge)
    torch.testing.assert_close(found, wanted, rtol=1e-7, atol=1e-7)
    naive = (a.T @ a @ torch.linalg.inv(a.T @ a + ridge * torch.eye(8))).diagonal()
    torch.testing.assert_close(found, naive, rtol=1e-4, atol=1e-4)  # it cancels


def test_leverage_without_a_ridge_is_one_for_every_channel():
    a = activations(4, 40, 5)
    torch.testing.assert_close(leverage_scores(a.T @ a, 0.0), torch.ones(5, dtype=torch.float64))


# -- compensation --------------------------------------------------------------------------


@given(seed=SEEDS, count=st.integers(1, 8))
@settings(max_examples=40, deadline=None)
def test_compensation_is_least_squares_on_the_rows(seed, count):
    a, w, kept = activations(seed, 60, 8), weights(seed, 8), some(seed, 8, count)
    found = compensate(a.T @ a, w, kept)
    wanted = fitted(a[:, kept], a @ w)
    best = (a @ w - a[:, kept] @ wanted).square().sum()
    error = (a @ w - a[:, kept] @ found).square().sum()
    assert error <= best + 1e-7 * (a @ w).square().sum()
    padded = w.clone()
    padded[kept] -= found
    assert squared_error(a.T @ a, padded) == pytest.approx(float(error), rel=1e-6, abs=1e-6)


@given(seed=SEEDS, count=st.integers(1, 10), tokens=st.integers(1, 9))
@settings(max_examples=40, deadline=None)
def test_compensation_from_fewer_tokens_than_channels_is_as_good(seed, count, tokens):
    a, w, kept = activations(seed, tokens, 10), weights(seed, 10), some(seed, 10, count)
    found = compensate(a.T @ a, w, kept)
    best = (a @ w - a[:, kept] @ fitted(a[:, kept], a @ w)).square().sum()
    error = (a @ w - a[:, kept] @ found).square().sum()
    assert error <= best + 1e-6 * (a @ w).square().sum()


@given(seed=SEEDS, channels=st.integers(1, 9), tokens=st.integers(1, 20))
@settings(max_examples=40, deadline=None)
def test_keeping_all_channels_keeps_the_weights(seed, channels, tokens):
    a, w = activations(seed, tokens, channels), weights(seed, channels)
    assert torch.equal(compensate(a.T @ a, w, torch.arange(channels)), w)


def test_a_ridge_pulls_towards_the_kept_rows():
    a, w, kept = activations(5, 30, 8), weights(5, 8), torch.tensor([1, 4, 6])
    gram = a.T @ a
    torch.testing.assert_close(
        compensate(gram, w, kept, 1e12 * ridge_of(gram, 1.0)), w[kept], rtol=1e-9, atol=1e-9
    )
    ridge = ridge_of(gram, 0.3)
    rows = torch.cat([a[:, kept], math.sqrt(ridge) * torch.eye(3, dtype=torch.float64)])
    wanted = fitted(rows, torch.cat([a @ w, math.sqrt(ridge) * w[kept]]))
    torch.testing.assert_close(compensate(gram, w, kept, ridge), wanted, rtol=1e-7, atol=1e-7)


def test_the_order_of_the_kept_channels_is_that_of_the_rows():
    a, w = activations(6, 30, 6), weights(6, 6)
    kept, turned = torch.tensor([0, 2, 5]), torch.tensor([5, 0, 2])
    torch.testing.assert_close(
        compensate(a.T @ a, w, turned), compensate(a.T @ a, w, kept)[[2, 0, 1]]
    )


def test_dead_channels_do_no_harm():
    a, w = activations(7, 30, 6), weights(7, 6)
    a[:, 2] = 0
    found = compensate(a.T @ a, w, torch.tensor([0, 2, 3]))
    torch.testing.assert_close(found[1], w[2])
    wanted = fitted(a[:, [0, 3]], a @ w)
    torch.testing.assert_close(found[[0, 2]], wanted, rtol=1e-6, atol=1e-6)


def test_the_weights_given_are_not_changed():
    a, w = activations(8, 30, 6), weights(8, 6)
    before = w.clone()
    compensate(a.T @ a, w, torch.tensor([1, 2]))
    assert torch.equal(w, before)


@given(seed=SEEDS, rank=st.integers(1, 7))
@settings(max_examples=30, deadline=None)
def test_projected_is_least_squares_on_the_projected_rows(seed, rank):
    a, w, basis = activations(seed, 50, 7), weights(seed, 7), weights(seed + 1, 7, rank)
    found = projected(a.T @ a, w, basis)
    best = (a @ w - a @ basis @ fitted(a @ basis, a @ w)).square().sum()
    error = (a @ w - a @ basis @ found).square().sum()
    assert error <= best + 1e-6 * (a @ w).square().sum()


def test_projected_on_columns_of_the_identity_is_compensation():
    a, w, kept = activations(9, 40, 6), weights(9, 6), torch.tensor([0, 3, 4])
    basis = torch.eye(6, dtype=torch.float64)[:, kept]
    torch.testing.assert_close(
        projected(a.T @ a, w, basis), compensate(a.T @ a, w, kept), rtol=1e-7, atol=1e-7
    )
    ridge = 5.0
    rows = torch.cat([a[:, kept], math.sqrt(ridge) * torch.eye(3, dtype=torch.float64)])
    wanted = fitted(rows, torch.cat([a @ w, torch.zeros(3, 3, dtype=torch.float64)]))
    torch.testing.assert_close(projected(a.T @ a, w, basis, ridge), wanted, rtol=1e-7, atol=1e-7)


def test_squared_error_is_the_sum_over_the_rows():
    a, d = activations(10, 25, 6), weights(10, 6)
    assert squared_error(a.T @ a, d) == pytest.approx(float((a @ d).square().sum()), rel=1e-10)
