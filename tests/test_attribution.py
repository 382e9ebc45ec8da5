"""Contributions of partitions on real unions, against their definitions."""

from __future__ import annotations

import itertools
import math

import pytest

from poolreg import Pool
from poolreg.errors import NotFound, Refused, UsageError

NAMES = ["code", "prose", "python", "web"]


@pytest.fixture
def shared(referenced, tmp_path):
    with Pool.open(referenced.copy(tmp_path / "pool")) as pool:
        yield pool


@pytest.fixture
def worth(shared):
    """The change of bits per byte from the seed to each union, on code's evalset."""
    rows = shared.sql(
        "SELECT label, bits_per_byte FROM scores WHERE evalset = 'code' AND kind IN ('mixture', 'seed')"
    )
    scores = dict(rows.rows)
    start = scores.pop("base")
    found = {frozenset(label.split("+")): value - start for label, value in scores.items()}
    return {**found, frozenset(): 0.0}


def by_definition(worth):
    """Mean change over all orders in which the partitions may join."""
    orders = list(itertools.permutations(NAMES))
    shares = dict.fromkeys(NAMES, 0.0)
    for order in orders:
        for place, name in enumerate(order):
            before = frozenset(order[:place])
            shares[name] += (worth[before | {name}] - worth[before]) / len(orders)
    return shares


class TestExact:
    def test_against_the_definitions(self, shared, worth):
        found = shared.attribution(["code"])
        assert found.permutations is None
        assert found.mixtures == 15
        rows = {row.partition: row for row in found.contributions}
        everything = frozenset(NAMES)
        for name, share in by_definition(worth).items():
            row = rows[name]
            assert row.shapley == pytest.approx(share)
            assert row.standard_error is None
            assert row.alone == pytest.approx(worth[frozenset([name])])
            assert row.leave_one_out == pytest.approx(
                worth[everything] - worth[everything - {name}]
            )

    def test_shares_sum_to_the_whole_change(self, shared, worth):
        found = shared.attribution()
        for evalset, total in found.totals.items():
            shares = [row.shapley for row in found.contributions if row.evalset == evalset]
            assert math.fsum(shares) == pytest.approx(total)
        assert found.totals["code"] == pytest.approx(worth[frozenset(NAMES)])

    def test_the_marginal_change_is_that_of_the_named_query(self, shared):
        known = {(row["evalset"], row["partition"]): row["mean_change"]
                 for row in shared.query("marginal").dicts() if row["scheme"] == "micro"}  # fmt: skip
        for row in shared.attribution().contributions:
            assert row.marginal == pytest.approx(known[row.evalset, row.partition])

    def test_interactions_of_two_are_second_differences(self, shared, worth):
        (pair,) = shared.attribution(["code"], among="code+prose").interactions
        both, a, b = (frozenset(s) for s in (["code", "prose"], ["code"], ["prose"]))
        assert (pair.first, pair.second) == ("code", "prose")
        assert pair.value == pytest.approx(worth[both] - worth[a] - worth[b])


class TestSampled:
    def test_many_orders_come_close(self, shared, worth):
        found = shared.attribution(["code"], permutations=200)
        shares = by_definition(worth)
        for row in found.contributions:
            assert row.standard_error > 0
            assert abs(row.shapley - shares[row.partition]) < 5 * row.standard_error
        total = math.fsum(row.shapley for row in found.contributions)
        assert total == pytest.approx(found.totals["code"])
        assert not found.interactions

    def test_few_orders_need_few_unions(self, shared):
        found = shared.attribution(["code"], permutations=4)
        assert found.mixtures < 15


class TestMissing:
    def test_unions_that_were_not_measured_are_refused_then_measured(self, tiny, tmp_path):
        with Pool.open(tiny.copy(tmp_path / "pool")) as pool:
            with pytest.raises(Refused, match="8 of the 8 models and unions") as caught:
                pool.attribution(["alpha"])
            assert "--measure" in caught.value.hint
            found = pool.attribution(["alpha"], run_missing=True)
            assert len(found.contributions) == 3
            assert pool.attribution(["alpha"]) == found

    @pytest.mark.parametrize(("among", "error"), [("code", UsageError), ("code/1+prose", UsageError), ("nothing+code", NotFound)])  # fmt: skip
    def test_what_cannot_be_compared(self, shared, among, error):
        with pytest.raises(error):
            shared.attribution(["code"], among=among)
