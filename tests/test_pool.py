"""The facade: opening and finding pools, what their parts are, SQL, and the whole loop once."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pools
import pytest
from poolreg.schema import statements

import poolreg
from poolreg import Pool
from poolreg.errors import Conflict, Damage, NoPool, NotFound, QueryError, UnknownFormat, UsageError
from poolreg.evaluation.evaluate import Settings

pytestmark = pytest.mark.usefixtures("one_thread")


# -- opening --------------------------------------------------------------------------------


def test_create_open_find(tmp_path, monkeypatch):
    monkeypatch.delenv("POOLREG_POOL", raising=False)
    with Pool.create(tmp_path / "a" / "pool") as pool:
        root = pool.root
    assert root == tmp_path / "a" / "pool"
    deep = tmp_path / "a" / "b" / "c"
    deep.mkdir(parents=True)
    for place in (deep, root, root / "objects", tmp_path / "a"):
        monkeypatch.chdir(place)
        assert Pool.open().root == root
    monkeypatch.chdir(tmp_path)
    with pytest.raises(NoPool, match="no pool in") as caught:
        Pool.open()
    assert caught.value.exit_code == 10
    assert Pool.open(root).root == Pool.open(str(root)).root == root
    monkeypatch.setenv("POOLREG_POOL", str(root))
    assert Pool.open().root == root
    monkeypatch.setenv("POOLREG_POOL", str(tmp_path / "absent"))
    with pytest.raises(NoPool, match="absent"):
        Pool.open()


def test_a_pool_is_not_made_over_anything(tmp_path):
    Pool.create(tmp_path / "pool").close()
    with pytest.raises(Conflict, match="is a pool already"):
        Pool.create(tmp_path / "pool")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("years")
    with pytest.raises(Conflict, match=r"not empty \(it holds 'thesis\.tex'\)"):
        Pool.create(tmp_path / "full")
    with pytest.raises(Conflict, match="is a file"):
        Pool.create(tmp_path / "full" / "thesis.tex")
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["thesis.tex"]


@pytest.mark.parametrize(
    ("text", "error"),
    [
        *((text, Damage) for text in ("", "{}", "[]", "nonsense")),
        ('{"format": 2, "id": "x"}', UnknownFormat),
        ('{"format": true, "id": "x"}', UnknownFormat),
    ],
)
def test_a_format_of_another_time(text, error, tmp_path):
    Pool.create(tmp_path / "pool").close()
    (tmp_path / "pool" / "FORMAT").write_text(text)
    with pytest.raises(error):
        Pool.open(tmp_path / "pool")


def test_leaving_the_block_leaves_a_current_catalog(tiny, tmp_path):
    root = tiny.copy(tmp_path / "pool")
    with Pool.open(root) as pool:
        pool.remove("evalset", "beta")
        pool.add_model(pools.unit_folder(tmp_path / "u", tiny.seed, 50), name="u")
    before = (root / "catalog.duckdb").stat().st_ino
    with Pool.open(root) as pool:
        assert "u" in [row["name"] for row in pool.models()]
    assert (root / "catalog.duckdb").stat().st_ino == before


# -- what is in a pool ----------------------------------------------------------------------


def test_partitions_and_evalsets(tiny, pool):
    rows = {row["name"]: row for row in pool.partitions()}
    assert {name: (row["units"], row["trained"]) for name, row in rows.items()} == {
        "alpha": (1, 1), "beta": (2, 2), "gamma": (3, 3),
    }  # fmt: skip
    beta = pool.partition("beta")
    assert sum(unit["bytes"] for unit in beta["units"]) == rows["beta"]["bytes"]
    assert [file["path"] for file in beta["files"]] == [str(tiny.texts / "beta.train.jsonl")]
    pool.remove("model", "gamma/2")
    pool.evaluate(["alpha", "base"], ["alpha"])
    assert [row["trained"] for row in pool.partitions()] == [1, 2, 2]
    assert [(row["name"], row["evaluations"]) for row in pool.evalsets()] == [
        ("alpha", 2), ("beta", 0), ("gamma", 0),
    ]  # fmt: skip
    with pytest.raises(NotFound, match=r"no partition is named bata\n.*beta"):
        pool.partition("bata")


def test_checking_partitions(tmp_path):
    texts = pools.write_texts(tmp_path / "texts", ["alpha", "beta"])
    with Pool.create(tmp_path / "pool") as pool:
        pools.add_data(pool, texts, {"alpha": 1, "beta": 1})
        assert [(c.name, c.drifted) for c in pool.check_partitions()] == [
            ("alpha", ()), ("beta", ()),
        ]  # fmt: skip
        (texts / "beta.train.jsonl").write_text("{}")
        (check,) = pool.check_partitions("beta")
        assert [drift.path for drift in check.drifted] == [str(texts / "beta.train.jsonl")]


def test_models_in_order_of_their_roles(tiny, pool, tmp_path):
    pool.add_model(pools.unit_folder(tmp_path / "o", tiny.seed, 50), name="a_other")
    pool.add_model(
        pools.unit_folder(tmp_path / "r", tiny.seed, 51), role="reference", mixture="alpha+beta",
        seed="base", budget="sum",
    )  # fmt: skip
    rows = [(row["role"], row["name"]) for row in pool.models()]
    units = [("unit", f"{name}/{unit}") for name, unit in tiny.units]
    reference = ("reference", "alpha+beta [sum budget reference]")
    assert rows == [("seed", "base"), *units, reference, ("other", "a_other")]


def test_a_model_that_plays_several_parts(tiny, pool):
    """A seed or unit stays one when the same bytes come in as something else, too."""
    pool.add_model(tiny.seed, role="other")
    pool.add_model(tiny.units["alpha", 1], role="reference", mixture="alpha", seed="base")
    rows = {row["name"]: row["role"] for row in pool.models()}
    assert (rows["base"], rows["alpha/1"]) == ("seed", "unit")
    assert pool.resolve("base").seed == pool.resolve("base").digest
    assert [run["role"] for run in pool.model("base")["runs"]] == ["other", "seed"]
    (answer,) = pool.ask("base", ["alpha"])
    assert answer.vs_seed == 0.0


def test_lineage(pool):
    base = {row["child_label"]: row for row in pool.lineage("base")}
    assert base.keys() == {row["name"] for row in pool.models()} - {"base"}
    assert {row["relation"] for row in base.values()} == {"trained from"}
    shares = {"alpha/1": 0.5, "beta/1": 0.25, "beta/2": 0.25}
    for _ in range(2):  # before and after it was asked for
        rows = pool.lineage("2*alpha+beta")
        assert {row["parent_label"]: row["weight"] for row in rows} == shares
        assert {(row["child_label"], row["relation"]) for row in rows} == {
            ("2*alpha+beta", "averages")
        }
        pool.evaluate(["2*alpha+beta"], ["alpha"])
    (trained, averaged) = pool.lineage("beta/2")[::-1]
    assert {trained["relation"], averaged["relation"]} == {"trained from", "averages"}


def test_removing(pool):
    digest = pool.remove("partition", "gamma")
    assert digest not in pool.registry.names("partition").values()
    assert pool.resolve("all").mixture == "alpha+beta"
    with pytest.raises(NotFound, match="the partition gamma was removed"):
        pool.resolve("gamma")
    with pytest.raises(NotFound):
        pool.remove("partition", "gamma")
    with pytest.raises(NotFound, match="'alpha\\+beta' is a mixture"):
        pool.remove("model", "alpha+beta")
    assert "alpha/1" in [row["name"] for row in pool.models()]


# -- SQL ------------------------------------------------------------------------------------


def test_sql(pool):
    pool.evaluate(["alpha+beta", "alpha"], ["alpha"])
    table = pool.sql("SELECT label, tokens FROM scores WHERE label <> ? ORDER BY ALL", ["alpha"])
    assert table.columns == ("label", "tokens")
    assert [row[0] for row in table.rows] == ["alpha+beta"]
    assert table.dicts()[0]["label"] == "alpha+beta"


@pytest.mark.parametrize(
    "text",
    [
        "SELEKT 1",
        "SELECT * FROM absent",
        "DROP TABLE models",
        "DELETE FROM models",
        "CREATE TABLE x (y INTEGER)",
        "SELECT * FROM read_text('/etc/passwd')",
        "COPY models TO '/tmp/poolreg-models.csv'",
        "ATTACH '/tmp/poolreg-other.db'",
        "SET memory_limit = '90GB'",
        "INSTALL httpfs",
    ],
)
def test_sql_is_read_only(text, pool):
    before = pools.contents(pool.root)
    with pytest.raises(QueryError):
        pool.sql(text)
    assert pools.contents(pool.root) == before
    assert len(pool.models()) == 7
    assert not Path("/tmp/poolreg-models.csv").exists()


def test_every_named_query_runs(pool):
    for name in statements("queries.sql"):
        pool.query(name)  # on a pool without evaluations
    pool.sweep(pool.plan_sweep(on=["alpha", "beta"]))
    filled = {name: len(pool.query(name).rows) for name in statements("queries.sql")}
    assert filled["leaderboard"] == 7
    assert filled["best"] == 2
    assert filled["best_per_size"] == 2 * 3
    assert filled["marginal"] == filled["leave_one_out"] == 2 * 3
    assert filled["missing"] == 7  # on gamma
    with pytest.raises(NotFound, match=r"no query is named leader\n.*leaderboard"):
        pool.query("leader")


def test_marginals_against_plain_differences(pool):
    table = pool.sweep(pool.plan_sweep(on=["alpha"]))
    bits = {frozenset(r["mixture"].split("+")): r["bits_per_byte"] for r in table.dicts()}
    found = {row["partition"]: row for row in pool.query("marginal").dicts()}
    for name in ("alpha", "beta", "gamma"):
        gains = [bits[union] - bits[union - {name}] for union in bits if union > {name}]
        assert (found[name]["pairs"], len(gains)) == (3, 3)
        assert found[name]["mean_change"] == pytest.approx(sum(gains) / 3)
        assert found[name]["best_change"] == pytest.approx(min(gains))
    everything = frozenset(found)
    for row in pool.query("leave_one_out").dicts():
        loss = bits[everything - {row["left_out"]}] - bits[everything]
        assert row["loss_without"] == pytest.approx(loss)


# -- the whole ------------------------------------------------------------------------------


def test_a_single_text_is_not_a_list_of_letters(pool):
    assert [row.label for row in pool.ask("alpha", "beta")] == ["alpha"]
    assert [row.evalset for row in pool.evaluate("alpha", "beta")] == ["beta"]


def test_a_pool_can_be_moved(tiny, tmp_path):
    root = tiny.copy(tmp_path / "one")
    with Pool.open(root) as pool:
        first = pool.ask("alpha+beta", settings=Settings(threads=1))
    moved = root.rename(tmp_path / "two")
    with Pool.open(moved) as pool:
        again = pool.ask("alpha+beta")
        assert all(row.memoised for row in again)
        assert [row.nll for row in again] == [row.nll for row in first]


def test_two_pools_put_together_are_one(tiny, tmp_path):
    """Records and objects are keyed by content, so a union of files is a union of pools."""
    roots = [tiny.copy(tmp_path / name) for name in ("one", "two")]
    with Pool.open(roots[0]) as one, Pool.open(roots[1]) as two:
        a = one.ask("alpha+beta", settings=Settings(threads=1))
        b = two.ask("alpha+gamma", settings=Settings(threads=1))
        two.add_model(pools.unit_folder(tmp_path / "u", tiny.seed, 50), name="extra")
    for part in ("objects", "journal"):
        for path in (roots[1] / part).rglob("*"):
            target = roots[0] / path.relative_to(roots[1])
            if path.is_dir():
                target.mkdir(exist_ok=True)
            elif not target.exists():
                target.write_bytes(path.read_bytes())
    with Pool.open(roots[0]) as pool:
        both = pool.ask(["alpha+beta", "alpha+gamma"])
        assert all(row.memoised for row in both)
        assert [row.nll for row in both] == [row.nll for row in (*a, *b)]
        assert pool.resolve("extra").kind == "model"


LIGHT = """
import json, sys
import poolreg
bare = {"numpy", "duckdb", "torch", "click"} & sys.modules.keys()
with poolreg.Pool.open(sys.argv[1]) as pool:
    pool.models(), pool.partitions(), pool.evalsets(), pool.model("base"), pool.lineage("base")
    pool.partition("beta"), pool.describe("alpha+beta"), pool.sql("SELECT * FROM scores")
    pool.plan_sweep(), pool.resolve("all"), pool.query("leaderboard"), pool.check_partitions()
heavy = {"torch", "transformers", "tokenizers", "scipy", "pandas"} & sys.modules.keys()
print(json.dumps([sorted(bare), sorted(heavy)]))
"""


def test_what_reads_is_light(tiny):
    done = subprocess.run(
        [sys.executable, "-c", LIGHT, str(tiny.root)], capture_output=True, text=True, check=True
    )
    assert json.loads(done.stdout) == [[], []]


def test_the_public_names():
    assert poolreg.__all__ == sorted(poolreg.__all__)
    for name in poolreg.__all__:
        assert getattr(poolreg, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'Pools'"):
        poolreg.Pools  # noqa: B018


@pytest.mark.slow
def test_the_whole_loop(tmp_path):
    """Data, training, references, a sweep, questions, a merge that comes back as a model."""
    texts = pools.write_texts(tmp_path / "texts", ["alpha", "beta"], lines=30)
    (tmp_path / "recipe.toml").write_text(
        '[model]\nmodel_type = "llama"\nhidden_size = 16\nintermediate_size = 24\n'
        "num_hidden_layers = 1\nnum_attention_heads = 2\ntie_word_embeddings = true\n"
        "[tokenizer]\nvocab_size = 300\n[training]\ncontext = 8\nbatch = 2\nsteps = 4\n"
        "[unit]\nsteps = 4\n"
    )
    from poolreg.training.recipe import load_recipe

    recipe = load_recipe(tmp_path / "recipe.toml")
    with Pool.create(tmp_path / "pool") as pool:
        pools.add_data(pool, texts, {"alpha": 1, "beta": 2})
        pool.train_seed(recipe)
        assert len(pool.train_units(recipe)) == 3
        pool.train_references(["alpha+beta"], recipe)
        assert len(pool.sweep(pool.plan_sweep()).rows) == 3 * 2
        for answer in pool.ask("alpha+beta"):
            assert answer.memoised
            assert len(answer.references) == 1
            assert answer.vs_all == 0.0
        merged = pool.merge("alpha+beta", tmp_path / "merged")
        added = pool.add_model(tmp_path / "merged", name="merged")
        assert added.digest == merged.digest
        rows = pool.evaluate(["merged", "alpha+beta"])
        assert [row.nll for row in rows[:2]] == [row.nll for row in rows[2:]]
        with pytest.raises(UsageError, match="is not a seed model"):
            pool.train_units(recipe, seed="merged")
    with Pool.open(tmp_path / "pool") as pool:
        pool.registry.catalog.path.unlink()
        assert all(row.memoised for row in pool.ask("alpha+beta"))
