"""Low-rank factors against the tail of the spectrum, and against anything else of that rank."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from poolreg.errors import Refused
from poolreg.numerics.svd import low_rank, two_sided

pytestmark = pytest.mark.usefixtures("one_thread")

SEEDS = st.integers(0, 10_000)


def normal(seed: int, *shape: int) -> torch.Tensor:
    make = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=make, dtype=torch.float64)


def skewed(seed: int, tokens: int, channels: int) -> torch.Tensor:
    """Rows [T, n] with a wide spectrum."""
    scales = torch.logspace(-1.5, 0, channels, dtype=torch.float64)
    return (normal(seed, tokens, channels) * scales) @ normal(seed + 1, channels, channels)


def rank_error(z: torch.Tensor, w: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> float:
    return float((z @ w - z @ left @ right).square().sum())


def score_error(q: torch.Tensor, k: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> float:
    """Σ over heads g [G, T, n], queries and keys; `left` [G·n, r], `right` [r, n]."""
    heads = left.unflatten(0, (len(q), -1))
    return float((q @ k.T - (q @ heads) @ (k @ right.T).T).square().sum())


# -- one map ---------------------------------------------------------------------------------


@given(seed=SEEDS, n=st.integers(1, 7), m=st.integers(1, 9), data=st.data())
@settings(max_examples=40, deadline=None)
def test_the_error_is_the_tail_of_the_spectrum(seed, n, m, data):
    rank = data.draw(st.integers(1, n))
    z, w = skewed(seed, 30, n), normal(seed + 2, n, m)
    factors = low_rank(z.T @ z, w, rank)
    total = float((z @ w).square().sum())
    # The reference: the best rank-k approximation of the outputs themselves.
    tail = torch.linalg.svdvals(z @ w)[rank:].square().sum()
    found = rank_error(z, w, factors.left, factors.right)
    assert found == pytest.approx(float(tail), rel=1e-6, abs=1e-8 * total)
    assert factors.error(rank) == pytest.approx(float(tail), rel=1e-6, abs=1e-8 * total)
    short = min(rank, n, m)
    assert (factors.left.shape, factors.right.shape) == ((n, short), (short, m))
    assert factors.spectrum.shape == (min(n, m),)


@given(seed=SEEDS, rank=st.integers(1, 5))
@settings(max_examples=20, deadline=None)
def test_nothing_else_of_that_rank_is_better(seed, rank):
    z, w = skewed(seed, 30, 6), normal(seed + 2, 6, 8)
    factors = low_rank(z.T @ z, w, rank)
    best = rank_error(z, w, factors.left, factors.right)
    for trial in range(10):
        step = 10.0 ** -(trial % 4)
        left = factors.left + step * normal(seed + trial, 6, rank)
        right = factors.right + step * normal(seed + trial + 50, rank, 8)
        assert best <= rank_error(z, w, left, factors.right) + 1e-9
        assert best <= rank_error(z, w, left, right) + 1e-9
        fitted = torch.linalg.lstsq(z @ left, z @ w).solution  # the best that goes with this left
        assert best <= rank_error(z, w, left, fitted) + 1e-9


def test_the_error_falls_with_the_rank():
    z, w = skewed(0, 30, 8), normal(2, 8, 8)
    factors = low_rank(z.T @ z, w, 8)
    errors = [factors.error(rank) for rank in range(9)]
    assert errors == sorted(errors, reverse=True)
    assert errors[0] == pytest.approx(float((z @ w).square().sum()), rel=1e-7)
    assert errors[8] == 0


@pytest.mark.parametrize(("n", "m"), [(1, 1), (6, 4), (6, 6), (6, 9)])
@pytest.mark.parametrize("tokens", [2, 30])
def test_full_rank_changes_nothing(n, m, tokens):
    z, w = skewed(3, tokens, n), normal(5, n, m)
    factors = low_rank(z.T @ z, w, n)
    torch.testing.assert_close(factors.left @ factors.right, w, rtol=1e-6, atol=1e-6)


def test_columns_come_in_the_order_of_their_worth():
    z, w = skewed(6, 30, 6), normal(8, 6, 9)
    full, cut = (low_rank(z.T @ z, w, rank) for rank in (6, 2))
    torch.testing.assert_close(full.left[:, :2], cut.left)
    torch.testing.assert_close(full.right[:2], cut.right)
    torch.testing.assert_close(full.spectrum, cut.spectrum)


def test_low_rank_is_the_same_at_any_scale():
    z, w = skewed(9, 30, 5), normal(11, 5, 5)
    one, other = low_rank(z.T @ z, w, 2), low_rank(1e-14 * (z.T @ z), w, 2)
    torch.testing.assert_close(one.left @ one.right, other.left @ other.right)


# -- two sides -------------------------------------------------------------------------------


@given(seed=SEEDS, heads=st.integers(1, 3), n=st.integers(1, 6), data=st.data())
@settings(max_examples=40, deadline=None)
def test_scores_lose_the_tail_of_their_spectrum(seed, heads, n, data):
    rank = data.draw(st.integers(1, n))
    q = torch.stack([skewed(seed + 10 * g, 20, n) for g in range(heads)])
    k = skewed(seed + 5, 15, n)
    factors = two_sided(q.mT @ q, k.T @ k, rank)
    scores = (q @ k.T).flatten(0, 1)  # the queries of all heads meet the same keys
    total = float(scores.square().sum())
    tail = float(torch.linalg.svdvals(scores)[rank:].square().sum())
    found = score_error(q, k, factors.left, factors.right)
    assert found == pytest.approx(tail, rel=1e-6, abs=1e-8 * total)
    assert factors.error(rank) == pytest.approx(tail, rel=1e-6, abs=1e-8 * total)
    assert (factors.left.shape, factors.right.shape) == ((heads * n, rank), (rank, n))


@pytest.mark.parametrize("heads", [1, 3])
@pytest.mark.parametrize("rank", [1, 3])
def test_no_other_maps_of_that_rank_give_better_scores(heads, rank):
    q = torch.stack([skewed(20 + g, 20, 5) for g in range(heads)])
    k = skewed(30, 15, 5)
    factors = two_sided(q.mT @ q, k.T @ k, rank)
    best = score_error(q, k, factors.left, factors.right)
    for trial in range(20):
        step = 10.0 ** -(trial % 4)
        left = factors.left + step * normal(trial, heads * 5, rank)
        right = factors.right + step * normal(trial + 100, rank, 5)
        assert best <= score_error(q, k, left, right)
        free = normal(trial + 200, rank, 5)  # any keys' map, with the queries' best answer to it
        answer = torch.linalg.lstsq(k @ free.T, k).solution.T
        assert best <= score_error(q, k, answer.repeat(heads, 1), free)


@pytest.mark.parametrize("heads", [1, 2])
def test_scores_at_full_rank_are_the_same(heads):
    q = torch.stack([skewed(40 + g, 20, 5) for g in range(heads)])
    k = skewed(50, 15, 5)
    factors = two_sided(q.mT @ q, k.T @ k, 5)
    for head in factors.left.unflatten(0, (heads, 5)):
        torch.testing.assert_close(
            head @ factors.right, torch.eye(5, dtype=torch.float64), rtol=1e-7, atol=1e-7
        )


def test_both_sides_carry_the_same_share_of_the_scores():
    q, k = skewed(60, 20, 5)[None], skewed(61, 20, 5)
    factors = two_sided(q.mT @ q, k.T @ k, 3)
    queries, keys = q[0] @ factors.left, k @ factors.right.T
    spread = factors.spectrum[:3]
    torch.testing.assert_close(queries.square().sum(0), spread, rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(keys.square().sum(0), spread, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("tokens", [1, 3])
def test_fewer_tokens_than_channels_need_no_more_rank(tokens):
    q, k = skewed(70, 20, 6)[None], skewed(71, tokens, 6)
    factors = two_sided(q.mT @ q, k.T @ k, tokens)
    assert factors.left.isfinite().all()
    total = float((q @ k.T).square().sum())
    assert score_error(q, k, factors.left, factors.right) < 1e-6 * total


def test_matrices_with_nan_are_refused():
    gram, bad = torch.eye(4, dtype=torch.float64), torch.eye(4, dtype=torch.float64)
    bad[2, 1] = bad[1, 2] = math.nan
    with pytest.raises(Refused, match="not finite"):
        low_rank(bad, gram, 2)
    with pytest.raises(Refused, match="not finite"):
        two_sided(torch.stack([gram, bad]), gram, 2)
    with pytest.raises(Refused, match="not finite"):
        two_sided(gram[None], bad, 2)
