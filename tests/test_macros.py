"""The SQL macros against scipy and the numpy functions, through the sandbox of a real pool."""

from __future__ import annotations

import math
import warnings

import numpy as np
import pytest
import scipy.stats
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from poolreg import Pool
from poolreg.errors import QueryError
from poolreg.numerics import statistics as S


def no_value(number: float) -> float | None:
    return None if math.isnan(number) else number


def quietly(function, x, y) -> float:
    if len(x) < 2:
        return math.nan
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return float(function(x, y).statistic)


def error_of(x, y) -> float:
    return float(scipy.stats.sem(x - y)) if len(x) > 1 else math.nan


REFERENCES = {
    "spearman(x, y)": lambda x, y: quietly(scipy.stats.spearmanr, x, y),
    "kendall(x, y)": lambda x, y: quietly(scipy.stats.kendalltau, x, y),
    "decision_accuracy(x, y)": S.decision_accuracy,
    "regret_at(x, y, 1)": lambda x, y: S.regret_at(x, y, 1),
    "regret_at(x, y, 3)": lambda x, y: S.regret_at(x, y, 3),
    "paired_difference(x, y)": lambda x, y: float(np.mean(x - y)) if len(x) else math.nan,
    "paired_difference_error(x, y)": error_of,
}

cells = st.none() | st.integers(-3, 6).map(lambda v: v / 4)
tables = st.lists(st.tuples(st.sampled_from("ab"), cells, cells), min_size=1, max_size=30)


def literal(value) -> str:
    return "NULL" if value is None else f"'{value}'" if isinstance(value, str) else repr(value)


def values(table) -> str:
    rows = ", ".join(f"({', '.join(map(literal, row))})" for row in table)
    return f"(VALUES {rows}) AS rows(name, x, y)"


def expected(table, name) -> dict[str, float | None]:
    pairs = [(x, y) for group, x, y in table if group == name and None not in (x, y)]
    x, y = np.array(pairs, float).reshape(-1, 2).T
    return {macro: no_value(reference(x, y)) for macro, reference in REFERENCES.items()}


@pytest.fixture(scope="module")
def empty_pool(tmp_path_factory):
    with Pool.create(tmp_path_factory.mktemp("macros") / "pool") as opened:
        yield opened


@settings(
    suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=25, deadline=None
)
@given(tables)
def test_macros_are_the_references_in_each_group(empty_pool, table):
    sql = f"SELECT name, {', '.join(REFERENCES)} FROM {values(table)} GROUP BY name"
    found = {row[0]: row[1:] for row in empty_pool.sql(sql).rows}
    assert set(found) == {name for name, _, _ in table}
    for name, row in found.items():
        for macro, value in zip(REFERENCES, row, strict=True):
            wanted = expected(table, name)[macro]
            assert value == (wanted if wanted is None else pytest.approx(wanted, abs=1e-9)), macro


def test_macros_of_many_rows(pool):
    generator = np.random.default_rng(0)
    x = generator.integers(0, 300, 1000) / 7
    y = x + generator.integers(0, 100, 1000) / 3
    table = [("a", a, b) for a, b in zip(x.tolist(), y.tolist(), strict=True)]
    row = pool.sql(f"SELECT {', '.join(REFERENCES)} FROM {values(table)}").rows[0]
    wanted = expected(table, "a")
    assert dict(zip(REFERENCES, row, strict=True)) == pytest.approx(wanted, rel=1e-9)


@pytest.mark.parametrize("k", [-1, 0, 1, 2, 4, 5, 99])
def test_regret_for_every_k(empty_pool, k):
    x, y = np.array([1.0, 2, 2, 2, 3]), np.array([9.0, 4, 1, 6, 0])
    table = [("a", a, b) for a, b in zip(x.tolist(), y.tolist(), strict=True)]
    (found,) = empty_pool.sql(f"SELECT regret_at(x, y, {k}) FROM {values(table)}").rows[0]
    wanted = no_value(S.regret_at(x, y, k))
    assert found == (wanted if wanted is None else pytest.approx(wanted, abs=1e-12))


@pytest.mark.parametrize("table", [
    [("a", None, 1.0)], [("a", 1.0, 2.0)], [("a", 1.0, 2.0), ("a", 1.0, 2.0)],
])  # fmt: skip
@pytest.mark.parametrize("condition", ["TRUE", "FALSE"])
def test_what_is_not_defined_is_null(empty_pool, table, condition):
    sql = f"SELECT spearman(x, y), kendall(x, y), decision_accuracy(x, y) FROM {values(table)} WHERE {condition}"
    assert empty_pool.sql(sql).rows == [(None, None, None)]


def test_macros_work_wherever_aggregates_do(empty_pool):
    table = [("a", 1.0, 1.0), ("a", 2.0, 3.0), ("a", 3.0, 2.0), ("b", 1.0, 2.0), ("b", 2.0, 1.0)]
    having = f"""
        SELECT name, spearman(x, y) + 1 FROM {values(table)}
        GROUP BY ALL HAVING kendall(x, y) < 1 ORDER BY decision_accuracy(x, y)"""
    assert empty_pool.sql(having).rows == [("b", 0), ("a", 1.5)]
    over = f"SELECT DISTINCT {', '.join(f'{m} OVER () IS NULL' for m in REFERENCES)} FROM {values(table)}"
    assert empty_pool.sql(over).rows == [(False,) * len(REFERENCES)]
    kept = f"SELECT spearman(CASE WHEN name = 'b' THEN x END, y) FROM {values(table)}"
    assert empty_pool.sql(kept).rows == [(-1,)]
    nested = f"SELECT avg(r) FROM (SELECT spearman(x, y) AS r FROM {values(table)} GROUP BY name)"
    assert empty_pool.sql(nested).rows == [(-0.25,)]


@pytest.mark.parametrize("macro", REFERENCES)
def test_groups_can_be_chosen_by_a_macro(empty_pool, macro):
    table = [("a", 1.0, 1.0), ("a", 2.0, 3.0), ("a", 3.0, 2.0), ("b", None, 2.0)]
    sql = f"SELECT name FROM {values(table)} GROUP BY ALL HAVING {macro} IS NOT NULL"
    assert empty_pool.sql(sql).rows == [("a",)]


def test_a_filter_is_refused_in_plain_words(empty_pool):
    sql = f"SELECT spearman(x, y) FILTER (WHERE x > 1) FROM {values([('a', 1.0, 2.0)])}"
    with pytest.raises(QueryError, match=r"Macro Function.*FILTER"):
        empty_pool.sql(sql)


def test_macros_over_a_view_of_a_pool(pool):
    sql = """
        SELECT evalset, spearman(perplexity, loss), kendall(loss, bits_per_byte),
               decision_accuracy(loss, perplexity), regret_at(loss, loss, 1), paired_difference(loss, loss)
        FROM scores GROUP BY evalset"""
    pool.ask("alpha+beta")
    pool.ask("beta+gamma")
    rows = pool.sql(sql).rows
    assert rows
    assert all(row[1:] == pytest.approx((1, 1, 1, 0, 0)) for row in rows)


def test_each_macro_has_a_comment(empty_pool):
    sql = """
        SELECT function_name, comment FROM duckdb_functions()
        WHERE database_name = 'pool' AND NOT internal
          AND function_name NOT IN ('perplexity', 'bits_per_byte', 'loss')"""
    comments = dict(empty_pool.sql(sql).rows)
    assert {macro.split("(")[0] for macro in REFERENCES} <= set(comments)
    assert all(comments.values())
