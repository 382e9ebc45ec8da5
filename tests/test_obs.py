"""Optimal Brain Surgeon against a greedy rule that solves every least-squares problem anew."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from poolreg.errors import Refused
from poolreg.numerics.nystrom import compensate, leverage_scores, ridge_of, squared_error
from poolreg.numerics.obs import Elimination, eliminate, unpriced

pytestmark = pytest.mark.usefixtures("one_thread")

SEEDS = st.integers(0, 10_000)


def problem(
    seed: int, tokens: int, channels: int, *, maps: int = 1, spread: float = 1.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows [G, T, n] whose directions span `spread` decades, and weights [G, n, 5]."""
    make = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=make, dtype=torch.float64)

    scales = torch.logspace(-spread, 0, channels, dtype=torch.float64)
    rows = (normal(maps, tokens, channels) * scales) @ normal(maps, channels, channels)
    return rows, normal(maps, channels, 5)


def refitted(rows: torch.Tensor, weight: torch.Tensor, kept: list[int]) -> float:
    """The least squared error of the kept channels, over all maps, from the rows themselves."""
    target = rows @ weight
    if not kept:
        return float(target.square().sum())
    solution = torch.linalg.lstsq(rows[..., kept], target).solution
    return float((target - rows[..., kept] @ solution).square().sum())


def greedy(rows: torch.Tensor, weight: torch.Tensor, least: int) -> tuple[list[int], list[float]]:
    """Remove one by one the channel without which a new fit is best."""
    kept, removed, errors = list(range(rows.shape[-1])), [], [0.0]
    while len(kept) > least:
        trials = {j: refitted(rows, weight, [i for i in kept if i != j]) for j in kept}
        best = min(trials, key=trials.__getitem__)
        kept.remove(best)
        removed.append(best)
        errors.append(trials[best])
    return removed, [after - before for before, after in itertools.pairwise(errors)]


def priced(gram: torch.Tensor, weight: torch.Tensor, kept: torch.Tensor) -> float:
    """The error of a selection on the objective that `eliminate` has: C with its ridge."""
    total = 0.0
    for c, w in zip(gram, weight, strict=True):
        ridged = c + ridge_of(c, 1e-8) * torch.eye(len(c), dtype=c.dtype)
        lost = w.clone()
        lost[kept] -= compensate(ridged, w, kept)
        total += squared_error(ridged, lost)
    return total


@given(
    seed=SEEDS, channels=st.integers(1, 9), maps=st.sampled_from([1, 3]), data=st.data()
)  # fmt: skip
@settings(max_examples=25, deadline=None)
def test_block_one_is_the_greedy_rule(seed, channels, maps, data):
    least = data.draw(st.integers(0, channels))
    rows, weight = problem(seed, 60, channels, maps=maps)
    removed, costs = greedy(rows, weight, least)
    found = eliminate(rows.mT @ rows, weight, least, block=1, relative_ridge=1e-12)
    assert found.removed.tolist() == removed
    largest = max(costs, default=0.0)  # a cost far below it is what rounding left
    assert found.costs.tolist() == pytest.approx(costs, rel=1e-5, abs=1e-10 * largest)


@given(seed=SEEDS, block=st.sampled_from([0, 1, 3, 100]), maps=st.sampled_from([1, 2]))
@settings(max_examples=25, deadline=None)
def test_costs_add_up_to_the_real_error_of_what_stays(seed, block, maps):
    rows, weight = problem(seed, 80, 24, maps=maps)
    found = eliminate(rows.mT @ rows, weight, 2, block=block, relative_ridge=1e-12)
    assert sorted([*found.removed.tolist(), *found.kept(2).tolist()]) == list(range(24))
    largest = found.error(2)  # C⁻¹ loses digits where a channel is nearly redundant
    for size in (24, 23, 12, 3, 2):
        real = refitted(rows, weight, found.kept(size).tolist())
        assert found.error(size) == pytest.approx(real, rel=1e-4, abs=1e-7 * largest)


@given(
    seed=SEEDS, spread=st.floats(0, 4), tokens=st.sampled_from([60, 130, 600]),
    share=st.sampled_from([0.25, 0.4, 0.8]), maps=st.sampled_from([1, 2]),
)  # fmt: skip
@settings(max_examples=20, deadline=None)
def test_blocks_choose_better_than_leverage(seed, spread, tokens, share, maps):
    rows, weight = problem(seed, tokens, 130, maps=maps, spread=spread)
    gram, size = rows.mT @ rows, int(130 * share)
    found = eliminate(gram, weight, size)
    slack = 1e-7 * float((rows @ weight).square().sum())
    by_leverage = sum(leverage_scores(c, ridge_of(c, 1e-2)) for c in gram).topk(size).indices
    assert found.error(size) <= priced(gram, weight, by_leverage.sort().values) + slack
    again = priced(gram, weight, found.kept(size))
    assert found.error(size) == pytest.approx(again, rel=1e-3, abs=slack)


@pytest.mark.parametrize("tokens", [60, 200, 1000])
def test_blocks_choose_nearly_as_well_as_one_by_one(tokens):
    # Greedy choices are chaotic: a single one may be better or worse by a tenth.
    ratios = []
    for seed in range(5):
        rows, weight = problem(seed, tokens, 200)
        gram = rows.mT @ rows
        fast, plain = (eliminate(gram, weight, 40, block=block) for block in (0, 1))
        ratios += [fast.error(size) / plain.error(size) for size in (40, 50)]
    assert max(ratios) < 1.2
    assert sum(ratios) / len(ratios) < 1.03


def test_one_run_ranks_the_channels_for_every_size():
    rows, weight = problem(0, 90, 70)
    gram = (rows.mT @ rows)[0]
    longer, shorter = (eliminate(gram, weight[0], least, block=4) for least in (6, 30))
    assert longer.removed[:40].tolist() == shorter.removed.tolist()
    torch.testing.assert_close(longer.costs[:40], shorter.costs)
    assert [longer.error(size) for size in (70, 30)] == [0.0, float(shorter.costs.sum())]
    errors = [longer.error(size) for size in range(6, 71)]
    assert errors == sorted(errors, reverse=True)


def test_two_dimensions_and_a_batch_of_one_are_the_same():
    rows, weight = problem(1, 50, 12)
    gram = rows.mT @ rows
    flat, batch = eliminate(gram[0], weight[0], 3), eliminate(gram, weight, 3)
    assert torch.equal(flat.removed, batch.removed)
    assert torch.equal(flat.costs, batch.costs)


def test_the_matrices_given_are_not_changed():
    rows, weight = problem(2, 50, 12)
    gram = rows.mT @ rows
    before = gram.clone(), weight.clone()
    eliminate(gram, weight, 2)
    assert torch.equal(gram, before[0])
    assert torch.equal(weight, before[1])


def test_scale_changes_the_costs_and_not_the_choice():
    rows, weight = problem(3, 50, 20)
    gram = rows.mT @ rows
    one, other = eliminate(gram, weight, 4), eliminate(1e-12 * gram, weight, 4)
    assert torch.equal(one.removed, other.removed)
    torch.testing.assert_close(1e-12 * one.costs, other.costs, rtol=1e-6, atol=0)


@pytest.mark.parametrize("channels", [1, 2, 5])
def test_keeping_all_or_nothing(channels):
    rows, weight = problem(4, 20, channels)
    gram = rows.mT @ rows
    whole = eliminate(gram, weight, channels)
    assert whole.kept(channels).tolist() == list(range(channels))
    assert (len(whole.costs), whole.error(channels)) == (0, 0.0)
    none = eliminate(gram, weight, 0)
    assert none.kept(0).tolist() == []
    assert none.error(0) == pytest.approx(refitted(rows, weight, []), rel=1e-6)


def test_channels_that_add_nothing_go_first_and_cost_nothing():
    rows, weight = problem(5, 60, 10)
    rows[0, :, 3] = 0  # silent
    rows[0, :, 7] = rows[0, :, 1]  # a copy: either may go
    weight[0, 5] = 0  # unheard
    found = eliminate(rows.mT @ rows, weight, 4, block=1)
    first = set(found.removed[:3].tolist())
    assert first in ({3, 7, 5}, {3, 1, 5})
    assert found.error(7) < 1e-6 * found.error(4)


@pytest.mark.parametrize("block", [0, 1, 8])
@pytest.mark.parametrize("tokens", [1, 5, 39])
def test_fewer_tokens_than_channels(tokens, block):
    rows, weight = problem(6, tokens, 40, maps=2)
    found = eliminate(rows.mT @ rows, weight, 0, block=block)
    assert sorted(found.removed.tolist()) == list(range(40))
    assert (found.costs >= 0).all()
    total = refitted(rows, weight, [])
    assert found.error(tokens) < 1e-5 * total  # so many channels can say it all
    assert found.error(0) == pytest.approx(total, rel=1e-5)


def test_a_map_without_activations_does_not_count():
    rows, weight = problem(7, 50, 12, maps=3)
    rows[1] = 0
    found = eliminate(rows.mT @ rows, weight, 2)
    others = eliminate((rows.mT @ rows)[[0, 2]], weight[[0, 2]], 2)
    assert torch.equal(found.removed, others.removed)
    torch.testing.assert_close(found.costs, others.costs)
    assert eliminate(torch.zeros(4, 4, dtype=torch.float64), weight[0, :4], 1).error(1) < 1e-200


def test_a_matrix_with_nan_is_refused():
    rows, weight = problem(8, 30, 6)
    rows[0, 3, 2] = math.nan
    with pytest.raises(Refused, match="not finite"):
        eliminate(rows.mT @ rows, weight, 2)


def test_an_order_without_prices():
    found = unpriced(torch.tensor([2, 0, 3, 1]), 4)
    assert [found.kept(size).tolist() for size in (4, 3, 1, 0)] == [
        [0, 1, 2, 3],
        [0, 1, 3],
        [1],
        [],
    ]
    assert math.isnan(found.error(2))
    assert isinstance(found, Elimination)
