"""The catalog's schema, and the answers of its views, look-ups and named queries."""

from __future__ import annotations

import math
import re
from pathlib import Path

import pytest
from many import MODEL, digest, write_sweep
from poolreg.schema import statements

from poolreg.canonical import digest_of
from poolreg.store import records
from poolreg.store.journal import Record
from poolreg.store.registry import Registry


@pytest.fixture
def registry(tmp_path):
    with_pool = Registry.create(tmp_path / "pool")
    yield with_pool
    with_pool.close()


# -- the schema -----------------------------------------------------------------------------


def test_every_table_and_column_has_a_comment(registry):
    registry.catalog.refresh()
    for what in (
        "SELECT table_name FROM duckdb_tables() WHERE coalesce(comment, '') = '' AND database_name = 'pool'",
        "SELECT view_name FROM duckdb_views() WHERE NOT internal AND coalesce(comment, '') = '' AND database_name = 'pool'",
        "SELECT table_name, column_name FROM duckdb_columns() WHERE coalesce(comment, '') = '' AND database_name = 'pool'"
        " AND table_name IN (SELECT table_name FROM duckdb_tables())",
    ):  # fmt: skip
        assert registry.catalog.sandbox(what).rows == []
    count = "SELECT count(*) FROM duckdb_tables() WHERE database_name = 'pool'"
    assert registry.catalog.sandbox(count).rows[0][0] >= 20


def test_the_tables_that_the_design_names_are_there(registry):
    registry.catalog.refresh()
    rows = registry.catalog.sandbox(
        "SELECT table_name FROM duckdb_tables() UNION SELECT view_name FROM duckdb_views()"
    ).rows
    assert {name for (name,) in rows} >= {
        "objects", "partitions", "units", "evalsets", "tokenizers", "models", "model_units",
        "model_files", "model_tensors", "names", "recipes", "recipe_components", "mixtures",
        "protocols", "evaluations", "runs", "journal_segments", "scores", "proxy_pairs", "lineage",
        "ledger",
    }  # fmt: skip


PARAMETERS = {"digests": [digest("ma")], "partitions": [digest("pa")], "mixtures": [digest("m")],
              "evalsets": [digest("wiki")], "protocols": [digest("P")], "prefix": "a",
              "models": [digest("ma")], "subjects": [digest("ma")], "measures": [digest("t")],
              "requests": [digest("r")], "space": "model", "job": "j",
              "directions": ["push", "pull"], "since": None, "limit": 5, "sizes": [1],
              "label": "m"}  # fmt: skip
# They say something of an empty pool, too: counts, sums, or that there is nothing.
ALWAYS = {"speed", "record_counts", "shared_bytes", "unstored_merges", "object_use", "checkup",
          "catalog_version", "last_removal", "last_naming", "last_location"}  # fmt: skip


@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("name", list(statements("lookups.sql")))
def test_every_lookup_runs(request, name, full):
    catalog = request.getfixturevalue("small" if full else "empty").catalog
    wanted = re.findall(r"\$(\w+)", statements("lookups.sql")[name].sql)
    rows = catalog.select(name, **{key: PARAMETERS.get(key, digest("ma")) for key in wanted})
    assert isinstance(rows, list)
    assert full or name in ALWAYS or not rows
    assert statements("lookups.sql")[name].description


@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("name", list(statements("queries.sql")))
def test_every_query_runs(request, name, full):
    catalog = request.getfixturevalue("small" if full else "empty").catalog
    table = catalog.sandbox(statements("queries.sql")[name].sql)
    # test_compress.py has a pool with variants.
    filled = full and name not in ("variants", "pareto", "ranking")
    assert bool(table.rows) == (filled or name == "ledger")
    assert statements("queries.sql")[name].description
    assert len(set(table.columns)) == len(table.columns)


@pytest.mark.parametrize("file", ["lookups.sql", "queries.sql", "insert.sql", "settle.sql"])
def test_no_name_stands_twice(file):
    from poolreg.schema import script

    assert len(statements(file)) == script(file).count("-- name: ")


@pytest.fixture(scope="session")
def empty(tmp_path_factory):
    registry = Registry.create(tmp_path_factory.mktemp("empty") / "pool")
    registry.catalog.refresh()
    return registry


# -- golden answers on a small pool ---------------------------------------------------------
#
# Partitions a (1 unit), b (1 unit), c (2 units); a seed, a model of each unit, and a reference
# that was really trained on a+b. Bits per byte were chosen so that all answers can be worked out
# by hand: every evalset has 1000 bytes and 500 tokens.

BITS = {
    # subject: bits per byte on wiki, on code
    "base": (5.0, 6.0), "ma": (2.0, 4.0), "mb": (3.0, 3.0), "mc1": (3.5, 3.5),
    "rc": (4.0, 2.0),  # the average of c's two models
    "rab": (2.25, 3.25), "rac": (2.5, 2.75), "rac-macro": (2.375, 2.875),
    "rbc": (3.25, 2.25), "rabc": (2.75, 2.625), "rabc-macro": (2.625, 2.875),
    "r2ab": (2.125, 3.5), "ref-ab": (2.0, 3.125), "ref-sum": (1.5, 3.0),
}  # fmt: skip
MIXTURES = {
    # label, scheme: subject, weights over partitions, tokens of its units
    ("a", "micro"): ("ma", {"a": 1}, 100),
    ("b", "micro"): ("mb", {"b": 1}, 200),
    ("c", "micro"): ("rc", {"c": 1}, 700),
    ("a+b", "micro"): ("rab", {"a": 1, "b": 1}, 300),
    ("a+c", "micro"): ("rac", {"a": 1, "c": 1}, 800),
    ("a+c", "macro"): ("rac-macro", {"a": 1, "c": 1}, 800),
    ("b+c", "micro"): ("rbc", {"b": 1, "c": 1}, 900),
    ("a+b+c", "micro"): ("rabc", {"a": 1, "b": 1, "c": 1}, 1000),
    ("a+b+c", "macro"): ("rabc-macro", {"a": 1, "b": 1, "c": 1}, 1000),
    ("2*a+b", "micro"): ("r2ab", {"a": 2, "b": 1}, 300),
    ("a/1", "micro"): ("ma", {"a/1": 1}, 100),  # another way to say a
}  # fmt: skip
UNITS = {"a": 1, "b": 1, "c": 2}


def blend(label: str, scheme: str) -> str:
    # a and a/1 are the same text; the schemes give different weights only beside c.
    label = {"a/1": "a"}.get(label, label)
    return digest(f"blend {label} {scheme if label in ('a+c', 'a+b+c') else ''}")


def evaluation(subject: str, evalset: str, bits: float, protocol: str = "P") -> Record:
    body = {
        "subject": digest(subject), "evalset": digest(evalset), "protocol": digest(protocol),
        "nll": bits * 1000 * math.log(2), "tokens": 500, "bytes": 1000, "documents": 10,
        "seconds": 0.5, "device": "cpu", "document_scores": None, "token_scores": None,
    }  # fmt: skip
    return records.keyed("evaluation", digest_of([subject, evalset, protocol]), body)


def run(model: str, role: str, **fields) -> Record:
    body = {
        "model": digest(model), "role": role, "seed": None, "blend": None, "mixture": None,
        "scheme": None, "budget": None, "how": "trained", "tokens": 100, "steps": 10,
        "seconds": 2.0, "final_loss": 1.0, "recipe": None, "units": [],
    }  # fmt: skip
    return records.fact("run", body | fields)


def unit_run(model: str, partition: str, unit: int) -> Record:
    units = [{"unit": digest(f"{partition}/{unit}"), "tokens": 100, "epochs": 1.0}]
    return run(model, "unit", seed=digest("base"), units=units)


def reference_run(model: str, budget: str) -> Record:
    return run(
        model, "reference", seed=digest("base"), blend=blend("a+b", "micro"), mixture="a+b",
        scheme="micro", budget=budget, tokens=300,
    )  # fmt: skip


def mixture(label: str, scheme: str) -> Record:
    subject, weights, tokens = MIXTURES[label, scheme]
    total = sum(weights.values())
    rows = []
    for name, weight in weights.items():
        partition, _, unit = name.partition("/")
        gcd = math.gcd(weight, total)
        rows.append([digest(f"p{partition}"), int(unit or 0), weight // gcd, total // gcd])
    body = {
        "mixture": label, "scheme": scheme, "seed": digest("base"), "subject": digest(subject),
        "blend": blend(label, scheme), "size": len(rows), "unit_tokens": tokens,
        "origin": "design", "weights": rows,
    }  # fmt: skip
    return records.keyed("mixture", digest_of([label, scheme, subject]), body)


def small_pool(root: Path) -> Registry:
    registry = Registry.create(root)
    made = []
    for name, count in UNITS.items():
        units = [
            {"digest": digest(f"{name}/{n}"), "documents": 1, "bytes": 10}
            for n in range(1, count + 1)
        ]
        body = {"content": digest(name), "documents": 1, "bytes": 10, "duplicates": 0}
        made.append(records.keyed("partition", digest(f"p{name}"), {**body, "units": units}))
        made.append(records.name("partition", name, digest(f"p{name}")))
        made.append(records.location(digest(f"p{name}"), [], "text"))
    for name in ("wiki", "code", "new"):
        body = {"object": digest(name), "content": digest(name), "documents": 10, "bytes": 1000}
        made.append(records.keyed("evalset", digest(name), body, {digest(name): 1000}))
        made.append(records.name("evalset", name, digest(name)))
    for label in ("base", "ma", "mb", "mc1", "mc2", "ref-ab", "ref-sum"):
        made.append(records.keyed("model", digest(label), {**MODEL, "tokenizer": "t"}))
    made += [records.name("model", "base", digest("base")), run("base", "seed", tokens=1000)]
    made += [unit_run("ma", "a", 1), unit_run("mb", "b", 1)]
    made += [unit_run("mc1", "c", 1), unit_run("mc2", "c", 2)]
    made += [reference_run("ref-ab", "same"), reference_run("ref-sum", "sum")]
    components = [[digest("ma"), 1, 2], [digest("mb"), 1, 2]]
    made.append(records.keyed("recipe", digest("rab"), {"components": components}))
    made += [mixture(*key) for key in MIXTURES]
    for label, length in (("P", 8), ("Q", 16)):
        body = {
            "max_length": length, "dtype": "float32", "prefix": "bos", "tokenizer": "t",
            "version": 1, "window": "rolling",
        }  # fmt: skip
        made.append(records.keyed("protocol", digest(label), body))
    for subject, (wiki, code) in BITS.items():
        made += [evaluation(subject, "wiki", wiki), evaluation(subject, "code", code)]
    made += [evaluation(subject, "wiki", 1.0, "Q") for subject in ("ma", "rab")]
    body = {"evalset": digest("wiki"), "partition": digest("pa"), "documents": 1}
    made.append(records.keyed("contamination", "x", body))
    registry.record(*made)
    registry.catalog.refresh()
    return registry


@pytest.fixture(scope="session")
def small(tmp_path_factory):
    return small_pool(tmp_path_factory.mktemp("small") / "pool")


def ask(registry: Registry, sql: str) -> list[tuple]:
    """Rows with floats rounded, so that they can be written down."""
    rows = registry.catalog.sandbox(sql).rows
    return [tuple(round(v, 9) if isinstance(v, float) else v for v in row) for row in rows]


def query(registry: Registry, name: str, *columns: str) -> list[tuple]:
    table = registry.catalog.sandbox(statements("queries.sql")[name].sql)
    places = [table.columns.index(column) for column in columns]
    return [
        tuple(round(row[i], 9) if isinstance(row[i], float) else row[i] for i in places)
        for row in table.rows
    ]


def test_scores(small):
    rows = ask(
        small,
        "SELECT label, kind, scheme, size, evalset, bits_per_byte, perplexity, loss, max_length, tokens, bytes"
        " FROM scores WHERE label IN ('a+b', 'base', 'a', 'c/1') AND evalset = 'wiki' ORDER BY label, max_length",
    )  # fmt: skip
    loss = {bits: bits * 2 * math.log(2) for bits in (2.0, 1.0, 2.25, 3.5, 5.0)}

    def row(label, kind, scheme, size, bits, length):
        ppl = 4.0**bits  # two bytes a token
        measures = (round(ppl, 9), round(loss[bits], 9))
        return (label, kind, scheme, size, "wiki", bits, *measures, length, 500, 1000)

    assert rows == [
        row("a", "mixture", "micro", 1, 2.0, 8),
        row("a", "mixture", "micro", 1, 1.0, 16),
        row("a+b", "mixture", "micro", 2, 2.25, 8),
        row("a+b", "mixture", "micro", 2, 1.0, 16),
        row("base", "seed", None, None, 5.0, 8),
        row("c/1", "unit", None, None, 3.5, 8),
    ]


def test_every_evaluation_has_a_score(small):
    ((count,),) = ask(
        small, "SELECT count(DISTINCT (subject, evalset_digest, protocol)) FROM scores"
    )
    assert count == 2 * len(BITS) + 2


def test_labels(small):
    assert dict(ask(small, "SELECT label, role FROM model_labels")) == {
        "base": "seed", "a/1": "unit", "b/1": "unit", "c/1": "unit", "c/2": "unit",
        "a+b [same budget reference]": "reference", "a+b [sum budget reference]": "reference",
    }  # fmt: skip


def test_proxy_pairs(small):
    rows = ask(
        small,
        "SELECT mixture, scheme, evalset, budget, proxy_bits_per_byte, reference_bits_per_byte, reference"
        " FROM proxy_pairs ORDER BY ALL",
    )  # fmt: skip
    same, total = "a+b [same budget reference]", "a+b [sum budget reference]"
    assert rows == [
        ("a+b", "micro", "code", "same", 3.25, 3.125, same),
        ("a+b", "micro", "code", "sum", 3.25, 3.0, total),
        ("a+b", "micro", "wiki", "same", 2.25, 2.0, same),
        ("a+b", "micro", "wiki", "sum", 2.25, 1.5, total),
    ]
    losses = ask(small, "SELECT proxy_loss, reference_loss, proxy_perplexity, reference_perplexity"
                        " FROM proxy_pairs WHERE evalset = 'wiki' AND budget = 'same'")  # fmt: skip
    expected = (2.25 * 2 * math.log(2), 2.0 * 2 * math.log(2), 4.0**2.25, 4.0**2.0)
    assert losses == [tuple(round(value, 9) for value in expected)]


def test_ledger(small):
    (row,) = small.catalog.sandbox("FROM ledger").dicts()
    assert row == {
        "models_trained": 7,
        "tokens_trained": 1000 + 4 * 100 + 2 * 300,
        "training_seconds": 7 * 2.0,
        # All mixtures but a, b (and a/1): those are models; and but a+b: it was really trained.
        "trainings_avoided": 7,
        "tokens_avoided": 700 + 800 + 800 + 900 + 1000 + 1000 + 300,
        "evaluations_memoised": 2 * len(BITS) + 2,
        "tokens_scored": 500 * (2 * len(BITS) + 2),
        "scoring_seconds": 0.5 * (2 * len(BITS) + 2),
    }


def test_lineage(small):
    rows = ask(small, "SELECT child_label, parent_label, relation, weight FROM lineage"
                      " WHERE child_label IN ('a+b', 'a/1') ORDER BY ALL")  # fmt: skip
    assert rows == [
        ("a+b", "a/1", "averages", 0.5),
        ("a+b", "b/1", "averages", 0.5),
        ("a/1", "base", "trained from", None),
    ]


def test_marginal(small):
    found = query(small, "marginal", "evalset", "scheme", "partition", "pairs", "mean_change",
                  "best_change", "worst_change", "max_length")  # fmt: skip
    wiki = [row for row in found if row[0] == "wiki" and row[-1] == 8]

    def row(scheme, partition, *changes):
        mean = round(sum(changes) / len(changes), 9)
        return ("wiki", scheme, partition, len(changes), mean, min(changes), max(changes), 8)

    # With x joining y: score of x+y less score of y.
    assert wiki == [
        # b+c is only known as micro, so nothing is said of its macro average.
        row("macro", "a", 2.25 - 3.0, 2.375 - 4.0),
        row("macro", "b", 2.25 - 2.0, 2.625 - 2.375),
        row("macro", "c", 2.375 - 2.0, 2.625 - 2.25),
        row("micro", "a", 2.25 - 3.0, 2.5 - 4.0, 2.75 - 3.25),
        row("micro", "b", 2.25 - 2.0, 3.25 - 4.0, 2.75 - 2.5),
        row("micro", "c", 2.5 - 2.0, 3.25 - 3.0, 2.75 - 2.25),
    ]
    # Of the other protocol only a and a+b are known: one pair, of b joining a.
    assert [row for row in found if row[-1] == 16] == [
        ("wiki", scheme, "b", 1, 0.0, 0.0, 0.0, 16) for scheme in ("macro", "micro")
    ]


def test_leave_one_out(small):
    found = query(small, "leave_one_out", "evalset", "scheme", "left_out", "with_it", "without_it",
                  "loss_without", "max_length")  # fmt: skip
    assert [row for row in found if row[0] == "wiki" and row[-1] == 8] == [
        ("wiki", "macro", "b", 2.625, 2.375, -0.25, 8),
        ("wiki", "macro", "c", 2.625, 2.25, -0.375, 8),
        ("wiki", "micro", "a", 2.75, 3.25, 0.5, 8),
        ("wiki", "micro", "b", 2.75, 2.5, -0.25, 8),
        ("wiki", "micro", "c", 2.75, 2.25, -0.5, 8),
    ]


def test_best_per_size(small):
    found = query(small, "best_per_size", "evalset", "size", "mixture", "scheme", "bits_per_byte",
                  "max_length")  # fmt: skip
    assert [row[:-1] for row in found if row[-1] == 8] == [
        ("code", 1, "c", "micro", 2.0),
        ("code", 2, "b+c", "micro", 2.25),
        ("code", 3, "a+b+c", "micro", 2.625),
        ("wiki", 1, "a", "micro", 2.0),
        ("wiki", 2, "2*a+b", "micro", 2.125),
        ("wiki", 3, "a+b+c", "macro", 2.625),
    ]


def test_best_and_leaderboard(small):
    found = query(small, "best", "evalset", "mixture", "bits_per_byte", "max_length")
    assert sorted(found) == [("code", "c", 2.0, 8), ("wiki", "a", 1.0, 16), ("wiki", "a", 2.0, 8)]
    found = query(small, "leaderboard", "mixture", "scheme", "evalsets", "mean_bits_per_byte",
                  "geometric_mean_perplexity", "max_length")  # fmt: skip
    assert found[:4] == [
        ("a+c", "macro", 2, 2.625, round(4.0**2.625, 9), 8),
        ("a+c", "micro", 2, 2.625, round(4.0**2.625, 9), 8),
        ("a+b+c", "micro", 2, 2.6875, round(4.0**2.6875, 9), 8),
        ("a+b", "micro", 2, 2.75, round(4.0**2.75, 9), 8),
    ]
    assert sum(row[-1] == 8 for row in found) == len(MIXTURES)


def made_and_trained_again(root: Path) -> Registry:
    """A sweep over four partitions in which two unions were made again, later and earlier."""
    write_sweep(root, 8 * 15, 2)
    registry = Registry.open(root)
    mixtures = {r.id: r for r in registry.journal.all() if r.kind == "mixture"}
    for union, when in ((3, "2040"), (5, "2000")):
        known = mixtures[digest(f"mixture {union}")]
        body = known.body | {"subject": digest(f"again {union}")}
        again = Record("mixture", digest(f"again {union}"), body, {}, f"{when}-{known.at[5:]}")
        registry.record(again)
        for number, evalset in enumerate(["eval-0", "eval-1"]):
            scored = evaluation(f"again {union}", evalset, 1.0 + number, "protocol")
            registry.record(scored)
    registry.catalog.refresh()
    return registry


def test_unions_against_plain_loops(tmp_path):
    registry = made_and_trained_again(tmp_path / "pool")
    rows = registry.catalog.sandbox("FROM unions").dicts()
    scores = {
        (frozenset(r["members"]), r["scheme"], r["evalset"]): r["bits_per_byte"] for r in rows
    }
    assert len(scores) == len(rows) == 8 * 15
    names = {digest(f"part {n}"): f"part-{n}" for n in range(4)}
    again = frozenset(digest(f"part {n}") for n in (0, 1))
    assert (scores[again, "micro", "eval-0"], scores[again, "micro", "eval-1"]) == (1.0, 2.0)
    assert all(row["size"] == len(row["members"]) for row in rows)
    changes: dict[tuple, list[float]] = {}
    for (members, scheme, evalset), score in scores.items():
        for member in members:
            rest = scores.get((members - {member}, scheme, evalset))
            if rest is not None:
                changes.setdefault((evalset, scheme, names[member]), []).append(score - rest)
    expected = {key: (len(c), sum(c) / len(c), min(c), max(c)) for key, c in changes.items()}
    columns = (
        "evalset",
        "scheme",
        "partition",
        "pairs",
        "mean_change",
        "best_change",
        "worst_change",
    )
    found = {row[:3]: row[3:] for row in query(registry, "marginal", *columns)}
    assert found.keys() == expected.keys()
    for key, values in expected.items():
        assert found[key] == pytest.approx(values, abs=1e-8)
    everything = frozenset(names)
    columns = ("evalset", "scheme", "left_out", "with_it", "without_it")
    assert sorted(query(registry, "leave_one_out", *columns)) == sorted(
        (evalset, scheme, names[member], round(score, 9),
         round(scores[everything - {member}, scheme, evalset], 9))
        for (members, scheme, evalset), score in scores.items() if members == everything
        for member in everything
    )  # fmt: skip
    registry.close()


def test_missing(small):
    found = query(small, "missing", "mixture", "scheme", "evalset")
    assert found == sorted((label, scheme, "new") for label, scheme in MIXTURES)


def test_a_removed_evalset_is_not_missing(tmp_path):
    registry = small_pool(tmp_path / "pool")
    registry.remove("evalset", "new")
    registry.catalog.refresh()
    assert query(registry, "missing", "mixture") == []
    registry.close()


def test_models_that_were_trained_again_replace_the_old_in_analyses(tmp_path):
    registry = small_pool(tmp_path / "pool")
    before = query(registry, "marginal", "partition", "pairs")
    fields = dict(mixture("b", "micro").body, subject=digest("mb-new"))
    registry.record(records.keyed("mixture", digest("new"), fields))
    registry.record(evaluation("mb-new", "wiki", 3.125), evaluation("mb-new", "code", 3.0))
    registry.catalog.refresh()
    assert sorted(query(registry, "marginal", "partition", "pairs")) == sorted(before)
    found = query(registry, "marginal", "evalset", "scheme", "partition", "best_change")
    assert ("wiki", "micro", "a", min(2.25 - 3.125, 2.5 - 4.0, 2.75 - 3.25)) in found
    assert ("wiki", "micro", "c", min(2.5 - 2.0, 3.25 - 3.125, 2.75 - 2.25)) in found
    registry.close()


def test_correlation(small):
    found = query(small, "correlation", "evalset", "budget", "references")
    assert sorted(found) == [("code", "same", 1), ("code", "sum", 1), ("wiki", "same", 1),
                             ("wiki", "sum", 1)]  # fmt: skip
