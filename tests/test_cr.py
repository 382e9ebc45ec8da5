"""Selecting channels and pairs of queries and keys against sums over explicit scores."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from poolreg.errors import Refused
from poolreg.numerics.cr import channel_scores, pair_products, pair_scores, rescale

pytestmark = pytest.mark.usefixtures("one_thread")

SEEDS = st.integers(0, 10_000)


def normal(seed: int, *shape: int) -> torch.Tensor:
    make = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=make, dtype=torch.float64)


def rotated(x: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    """Turn each pair (p, p + n/2) of row t by the angle places[t] · 100^(−2p/n)."""
    half = x.shape[-1] // 2
    angles = places[:, None] * 100.0 ** (-torch.arange(half, dtype=torch.float64) / half)
    first, second = x[..., :half], x[..., half:]
    cos, sin = angles.cos(), angles.sin()
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)


def pair_parts(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    """s_p(i, j) for every query, key and pair, as columns [T·T, P]."""
    half = q.shape[-1] // 2
    parts = [q[:, [p, p + half]] @ k[:, [p, p + half]].T for p in range(half)]
    return torch.stack([part.flatten() for part in parts], 1)


@given(seed=SEEDS, channels=st.integers(1, 7))
@settings(max_examples=25, deadline=None)
def test_channel_scores_are_the_norms_of_columns_of_roots(seed, channels):
    q, k = normal(seed, 9, channels), normal(seed + 1, 5, channels)
    found = channel_scores(q.T @ q, k.T @ k)

    def root(gram: torch.Tensor) -> torch.Tensor:
        values, vectors = torch.linalg.eigh(gram)
        return vectors @ torch.diag(values.clamp(min=0).sqrt()) @ vectors.T

    wanted = root(q.T @ q).norm(dim=0) * root(k.T @ k).norm(dim=0)
    torch.testing.assert_close(found, wanted, rtol=1e-7, atol=1e-7)
    # One channel's part of the scores has just this norm.
    explicit = torch.stack([torch.outer(q[:, i], k[:, i]).norm() for i in range(channels)])
    torch.testing.assert_close(found, explicit)


@given(seed=SEEDS, half=st.integers(1, 4))
@settings(max_examples=25, deadline=None)
def test_pair_scores_do_not_see_the_rotation(seed, half):
    q, k = normal(seed, 11, 2 * half), normal(seed + 1, 11, 2 * half)
    places = torch.arange(11, dtype=torch.float64)
    rq, rk = rotated(q, places), rotated(k, places)
    before, after = pair_scores(q.T @ q, k.T @ k), pair_scores(rq.T @ rq, rk.T @ rk)
    torch.testing.assert_close(before, after)
    energy = [x[:, [0, half]].square().sum() for x in (q, k)]
    torch.testing.assert_close(before[0], energy[0] * energy[1])


@given(seed=SEEDS, half=st.integers(1, 4))
@settings(max_examples=25, deadline=None)
def test_pair_products_are_sums_over_all_queries_and_keys(seed, half):
    q, k = normal(seed, 7, 2 * half), normal(seed + 1, 9, 2 * half)
    q = rotated(q, torch.arange(7, dtype=torch.float64))
    k = rotated(k, torch.arange(9, dtype=torch.float64))
    found = pair_products(q.T @ q, k.T @ k)
    wanted = torch.zeros(half, half, dtype=torch.float64)
    for i in range(7):
        for j in range(9):
            s = torch.stack([q[i, p::half] @ k[j, p::half] for p in range(half)])
            wanted += torch.outer(s, s)
    torch.testing.assert_close(found, wanted)
    # A pair's own energy is at most the product of those of its queries and keys.
    assert (found.diagonal() <= pair_scores(q.T @ q, k.T @ k) * (1 + 1e-12)).all()


def test_batches_are_as_their_members():
    grams = [x.mT @ x for x in (normal(0, 2, 3, 9, 6), normal(1, 2, 1, 9, 6))]
    kept = torch.tensor([0, 2])
    products = pair_products(*grams)
    for a in range(2):
        for b in range(3):
            one = grams[0][a, b], grams[1][a, 0]
            torch.testing.assert_close(products[a, b], pair_products(*one))
            torch.testing.assert_close(pair_scores(*grams)[a, b], pair_scores(*one))
            torch.testing.assert_close(channel_scores(*grams)[a, b], channel_scores(*one))
            torch.testing.assert_close(rescale(products, kept)[a, b], rescale(products[a, b], kept))


@given(seed=SEEDS, half=st.integers(2, 5), data=st.data())
@settings(max_examples=25, deadline=None)
def test_rescaling_is_least_squares_on_the_scores(seed, half, data):
    kept = data.draw(st.sets(st.integers(0, half - 1), min_size=1))
    kept = torch.tensor(sorted(kept))
    # A common part makes the pairs' scores correlate, so that the factors differ from one.
    q, k = (normal(seed + i, 12, 2 * half) + normal(seed + 2 + i, 12, 1) for i in (0, 1))
    parts = pair_parts(q, k)
    found = rescale(pair_products(q.T @ q, k.T @ k), kept)
    wanted = torch.linalg.lstsq(parts[:, kept], parts.sum(1, keepdim=True)).solution[:, 0]
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)

    def error(factors: torch.Tensor) -> float:
        return float((parts.sum(1) - parts[:, kept] @ factors).square().sum())

    assert error(found) <= error(torch.ones_like(found)) + 1e-9
    for step in 0.1 * normal(seed, 20, len(kept)):
        assert error(found) <= error(found + step) + 1e-9


@pytest.mark.parametrize("tokens", [1, 2, 12])
def test_keeping_all_pairs_needs_no_factors(tokens):
    q, k = normal(0, tokens, 10), normal(1, tokens, 10)  # B has rank ≤ tokens²
    found = rescale(pair_products(q.T @ q, k.T @ k), torch.arange(5))
    assert torch.equal(found, torch.ones(5, dtype=torch.float64))


def test_a_head_without_energy_keeps_its_pairs_as_they_are():
    q, k = normal(2, 2, 12, 6), normal(3, 2, 12, 6)
    q[0] = 0
    products = pair_products(q.mT @ q, k.mT @ k)
    found = rescale(products, torch.tensor([0, 1]))
    assert found[0].tolist() == [1.0, 1.0]
    torch.testing.assert_close(found[1], rescale(products[1], torch.tensor([0, 1])))


def test_products_with_nan_are_refused():
    products = torch.full((3, 3), math.nan, dtype=torch.float64)
    with pytest.raises(Refused, match="not finite"):
        rescale(products, torch.tensor([0, 2]))
