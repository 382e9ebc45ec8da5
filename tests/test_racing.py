"""Racing: the estimates against a plain reference, and how often the true winner is dropped."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from poolreg.numerics.racing import standing

ROUNDS = (1 / 16, 1 / 8, 1 / 4, 1 / 2)


def corpus(draw: np.random.Generator, mixtures: int, documents: int, spread: float):
    """Return nats [K, D] and bytes [D]: long-tailed sizes, documents hard for all alike."""
    sizes = np.ceil(draw.lognormal(6, 1.2, documents))
    hardness = draw.gamma(4, 0.15, documents)
    tastes = 1 + spread * draw.standard_normal((mixtures, 1))
    own = 1 + 0.05 * draw.standard_t(4, (mixtures, documents))
    return sizes * hardness * tastes * own, sizes


def test_against_plain_sums():
    draw = np.random.default_rng(0)
    parts = [corpus(draw, 3, 40, 0.02), corpus(draw, 3, 25, 0.02)]
    counts = [10, 12]
    found = standing(
        [nll[:, :n] for (nll, _), n in zip(parts, counts, strict=True)],
        [sizes for _, sizes in parts], confidence=0.95, comparisons=4,
    )  # fmt: skip
    scores = []
    for k in range(3):
        scores.append(sum(
            sum(nll[k, i] for i in range(n)) / sum(sizes[i] for i in range(n))
            for (nll, sizes), n in zip(parts, counts, strict=True)
        ))  # fmt: skip
    assert found.leader == scores.index(min(scores))
    from scipy.stats import t

    for k in range(3):
        ratios, variances = [], []
        for (nll, sizes), n in zip(parts, counts, strict=True):
            d = [nll[k, i] - nll[found.leader, i] for i in range(n)]
            r = math.fsum(d) / math.fsum(sizes[:n])
            s = math.fsum((d[i] - r * sizes[i]) ** 2 for i in range(n)) / (n - 1)
            ratios.append(r)
            variances.append((1 - n / len(sizes)) * s / (n * (math.fsum(sizes) / len(sizes)) ** 2))
        behind, error = sum(ratios) / 2, math.sqrt(sum(variances)) / 2
        assert found.behind[k] == pytest.approx(behind / math.log(2), rel=1e-12, abs=1e-15)
        surely = behind - t.ppf(1 - 0.05 / 4, 9) * error
        assert found.surely[k] == pytest.approx(surely / math.log(2), rel=1e-9, abs=1e-15)


def test_the_winner_is_rarely_dropped():
    draw, dropped, left = np.random.default_rng(1), 0, 0
    races = 300
    for _ in range(races):
        nll, sizes = corpus(draw, 8, 400, 0.03)
        best = int(np.argmin(nll.sum(1)))
        running = np.arange(8)
        for share in ROUNDS:
            n = int(400 * share)
            found = standing([nll[running, :n]], [sizes], confidence=0.95, comparisons=28)
            running = running[found.surely <= 0]
        dropped += best not in running
        left += len(running)
    assert dropped <= 0.05 * races
    assert left < 4 * races  # and most of the others are


@given(st.integers(0, 2**32 - 1), st.integers(1, 6), st.integers(2, 30))
def test_the_whole_evalset_leaves_no_doubt(seed, mixtures, documents):
    nll, sizes = corpus(np.random.default_rng(seed), mixtures, documents, 0.1)
    found = standing([nll], [sizes], confidence=0.95, comparisons=5)
    exact = (nll - nll[found.leader]).sum(1) / sizes.sum() / math.log(2)
    assert found.behind == pytest.approx(exact, rel=1e-9, abs=1e-15)
    assert np.array_equal(found.surely, found.behind)
    assert (found.behind >= 0).all()


@given(st.integers(0, 2**32 - 1), st.integers(1, 6))
def test_one_document_of_many_settles_nothing(seed, mixtures):
    nll, sizes = corpus(np.random.default_rng(seed), mixtures, 30, 0.1)
    found = standing([nll[:, :1]], [sizes], confidence=0.95, comparisons=5)
    assert not (found.surely > 0).any()


def test_what_is_the_same_everywhere_is_sure_at_once():
    sizes = np.full(50, 100.0)
    found = standing(
        [np.outer([1.0, 2.0], sizes[:5])], [sizes], confidence=0.95, comparisons=5
    )  # fmt: skip
    assert found.leader == 0
    assert found.surely == pytest.approx([0, 1 / math.log(2)])
