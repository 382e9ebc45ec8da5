"""Every command, on a tiny pool, in each of its formats."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path

import pools
import pytest

from poolreg import Pool

FORMS = ("table", "json", "csv", "quiet")
ROW = {
    "subject", "mixture", "scheme", "evalset", "protocol", "max_length", "nll", "tokens", "bytes",
    "documents", "perplexity", "bits_per_byte", "memoised",
}  # fmt: skip
BESIDE = {"label", "vs_seed", "vs_all", "references", "shared_documents"}

READING = [
    ["ls"],
    ["show", "alpha"],
    ["show", "alpha+beta"],
    ["partition", "ls"],
    ["partition", "show", "beta"],
    ["partition", "check"],
    ["evalset", "ls"],
    ["evalset", "show", "beta"],
    ["model", "ls"],
    ["model", "show", "base"],
    ["model", "lineage", "alpha+beta"],
    ["diff", "base", "beta/1"],
    ["ask", "alpha+beta"],
    ["eval", "alpha+beta"],
    ["query"],
    ["query", "leaderboard"],
    ["sql", "from scores"],
]


@pytest.fixture
def root(tiny, tmp_path) -> Path:
    """A pool to be changed at will."""
    return tiny.copy(tmp_path / "pool")


@pytest.mark.parametrize("words", READING, ids=" ".join)
def test_each_format_says_something_that_parses(cli_run, cli_pool, words):
    said = {form: cli_run(*words, "--pool", cli_pool, "--format", form).stdout for form in FORMS}
    rows = json.loads(said["json"])
    assert rows
    assert all(isinstance(row, dict) for row in rows)
    table = list(csv.reader(io.StringIO(said["csv"])))
    assert len(table) == len(rows) + 1
    assert {len(line) for line in table} == {len(table[0])}
    assert set(table[0]) >= set(rows[0])
    names = said["quiet"].splitlines()
    assert names
    assert len(set(names)) == len(names)
    assert said["table"].strip()
    assert "\x1b" not in said["table"]
    assert cli_run(*words, "--pool", cli_pool, "--json").stdout == said["json"]


def test_ls_counts_what_is_there(cli_run, cli_pool):
    table = cli_run("ls", "--pool", cli_pool).stdout
    assert "3 partitions" in table
    assert "3 evalsets" in table
    assert "7 models" in table
    rows = json.loads(cli_run("ls", "--pool", cli_pool, "--json").stdout)
    assert {row["kind"] for row in rows} == {"partition", "evalset", "model"}


def test_an_empty_pool_says_what_to_do_next(cli_run, tmp_path):
    made = cli_run("init", tmp_path / "new")
    assert "made a pool" in made.stderr
    assert made.stdout == ""
    assert "poolreg partition add" in cli_run("ls", "--pool", tmp_path / "new").stderr
    assert json.loads(cli_run("ls", "--pool", tmp_path / "new", "--json").stdout) == []
    assert cli_run("partition", "ls", "--pool", tmp_path / "new").stderr == "nothing to show\n"
    cli_run("init", tmp_path / "new", code=1)


def test_ask_has_the_promised_columns(cli_run, cli_pool):
    rows = json.loads(cli_run("ask", "alpha+beta", "--pool", cli_pool, "--json").stdout)
    assert [row["evalset"] for row in rows] == ["alpha", "beta", "gamma"]
    for row in rows:
        assert row.keys() >= ROW | BESIDE
        assert row["memoised"] is True
        assert row["mixture"] == row["label"] == "alpha+beta"
        assert row["scheme"] == "micro"
        (reference,) = row["references"]
        assert reference["budget"] == "same"
    plain = json.loads(cli_run("eval", "alpha+beta", "--pool", cli_pool, "--json").stdout)
    assert [{key: row[key] for key in ROW} for row in plain] == [
        {key: row[key] for key in ROW} for row in rows
    ]


def test_ask_prints_differences_with_their_sign_and_the_reference(cli_run, cli_pool):
    rows = json.loads(cli_run("ask", "alpha+beta", "--pool", cli_pool, "--json").stdout)
    head, *lines = cli_run("ask", "alpha+beta", "--pool", cli_pool).stdout.splitlines()
    assert "reference (same)" in head
    for row, line in zip(rows, lines, strict=False):
        (reference,) = row["references"]
        assert line.split() == [
            "alpha+beta", row["evalset"], f"{row['perplexity']:,.2f}",
            f"{row['bits_per_byte']:.4f}", f"{row['vs_seed']:+.4f}", f"{row['vs_all']:+.4f}",
            f"{reference['bits_per_byte']:.4f}", "yes",
        ]  # fmt: skip
    assert "windows of 16 tokens" in lines[3]


def test_macro_is_said_in_the_table(cli_run, root):
    said = cli_run("ask", "alpha+beta", "--scheme", "macro", "--on", "gamma", "--pool", root)
    assert "scheme" in said.stdout.splitlines()[0]
    assert "macro" in said.stdout.splitlines()[1]


def test_evalsets_are_chosen_again_or_with_commas(cli_run, cli_pool):
    for words in (["--on", "gamma,alpha"], ["--on", "gamma", "--on", "alpha"]):
        rows = json.loads(cli_run("ask", "alpha+beta", *words, "--pool", cli_pool, "--json").stdout)
        assert [row["evalset"] for row in rows] == ["gamma", "alpha"]


def test_shared_documents_are_marked(cli_run, root, tiny):
    added = cli_run("evalset", "add", "seen", tiny.texts / "beta.train.jsonl", "--pool", root)
    assert "shares 12 documents with partition beta" in added.stderr
    lines = cli_run("ask", "beta+gamma", "--on", "seen", "--pool", root).stdout.splitlines()
    assert " seen* " in lines[1]
    assert lines[-1] == "* beta+gamma was trained on 12 of the 12 documents of evalset seen"
    shown = json.loads(cli_run("show", "seen", "--pool", root, "--json").stdout)
    assert shown[0]["shared"] == [{"name": "beta", "documents": 12}]


def test_partitions_come_go_and_drift(cli_run, tmp_path):
    pool, text = tmp_path / "pool", tmp_path / "a.txt"
    text.write_text("one line\nand another\n" * 20)
    cli_run("init", pool)
    added = cli_run(
        "partition", "add", "a", text, "--units", 2, "--parent", "group", "--pool", pool
    )
    assert "added partition a: 1 document, 420 B, 2 units" in added.stderr
    assert "already" in cli_run(
        "partition", "add", "a", text, "--units", 2, "--pool", pool
    ).stderr  # fmt: skip
    assert cli_run("partition", "check", "--pool", pool).stderr == ""
    text.write_text("something else")
    drifted = cli_run("partition", "check", "a", "--pool", pool, code=3)
    assert f"a: {text} is changed" in drifted.stderr
    (row,) = json.loads(cli_run("partition", "check", "--json", "--pool", pool, code=3).stdout)
    assert row["drifted"][0]["path"] == str(text)
    cli_run("partition", "add", "a", text, "--pool", pool, code=1)
    cli_run("partition", "add", "a", text, "--pool", pool, "--replace")
    assert "removed partition a" in cli_run("partition", "rm", "a", "--pool", pool).stderr
    assert cli_run("partition", "ls", "--format", "quiet", "--pool", pool).stdout == ""


def test_evalsets_come_and_go(cli_run, root, tmp_path):
    text = tmp_path / "x.jsonl"
    text.write_text('{"body": "some text"}\n')
    added = cli_run("evalset", "add", "x", text, "--field", "body", "--pool", root)
    assert "added evalset x: 1 document, 9 B (" in added.stderr
    cli_run("evalset", "rm", "x", "--pool", root)
    cli_run("evalset", "show", "x", "--pool", root, code=1)


def test_models_come_in_every_role_and_go(cli_run, root, tiny, tmp_path):
    folder = pools.unit_folder(tmp_path / "new", tiny.seed, 77)
    at = ["--pool", root]
    cli_run("model", "add", folder, *at, code=2)
    cli_run("model", "add", folder, "--seed", "--other", *at, code=2)
    assert (
        "added other model x"
        in cli_run("model", "add", folder, "--other", "--name", "x", *at).stderr
    )
    cli_run("model", "export", "x", "-o", tmp_path / "out", *at)
    assert pools.same(pools.arrays_of(tmp_path / "out"), pools.arrays_of(folder))
    cli_run("model", "export", "x", "-o", tmp_path / "out", *at, code=1)
    cli_run("model", "export", "x", "-o", tmp_path / "out", "--force", *at)
    unit = cli_run(
        "model", "add", folder, "--partition", "beta", "--unit", 2, "--from", "base",
        "--tokens", 5, *at,
    )  # fmt: skip
    assert "already in the pool: unit model" in unit.stderr
    cli_run("model", "add", folder, "--reference", "alpha+gamma", "--from", "base", *at)
    runs = json.loads(cli_run("model", "show", "x", *at, "--json").stdout)[0]["runs"]
    assert {run["role"] for run in runs} == {"other", "unit", "reference"}
    assert "removed model x" in cli_run("model", "rm", "x", *at).stderr
    cli_run("model", "show", "x", *at, code=1)
    assert "removed model beta/1" in cli_run("model", "rm", "beta/1", *at).stderr
    cli_run("ask", "beta", *at, code=1)


def test_diff_of_a_model_with_itself_is_nothing(cli_run, cli_pool):
    said = cli_run("diff", "base", "base", "--pool", cli_pool)
    assert (said.stdout, said.stderr) == ("", "the models hold the same tensors\n")
    assert cli_run("diff", "base", "base", "--json", "--pool", cli_pool).stdout == "[]\n"


def test_show_tells_what_a_name_is(cli_run, cli_pool):
    def kinds(name):
        rows = json.loads(cli_run("show", name, "--pool", cli_pool, "--json").stdout)
        return [row["kind"] for row in rows]

    assert kinds("alpha") == ["partition", "evalset"]
    assert kinds("base") == ["model"]
    assert kinds("2*alpha+gamma") == ["mixture"]
    assert kinds("beta/2") == ["model"]
    digest = json.loads(cli_run("show", "base", "--pool", cli_pool, "--json").stdout)[0]["digest"]
    assert kinds(digest[:10]) == ["model"]
    wrong = cli_run("show", "bade", "--pool", cli_pool, code=1)
    assert "did you mean base" in wrong.stderr


# -- merging ---------------------------------------------------------------------------------


def test_merge_of_a_mixture(cli_run, cli_pool, tiny, tmp_path):
    out = tmp_path / "out"
    said = cli_run("merge", "alpha+beta", "-o", out, "--pool", cli_pool)
    assert "the average of 3 models" in said.stderr
    parents = [
        pools.arrays_of(tiny.units[place]) for place in (("alpha", 1), ("beta", 1), ("beta", 2))
    ]
    assert pools.same(pools.arrays_of(out), pools.average(parents, [1, 1, 1]))
    cli_run("merge", "alpha", "-o", out, "--pool", cli_pool, code=1)
    cli_run("merge", "alpha", "-o", out, "--pool", cli_pool, "--force", "--dtype", "bfloat16")
    cli_run("merge", "alpha", "-o", tmp_path / "x", "--pool", cli_pool, "--dtype", "int3", code=2)
    cli_run("merge", "alpha", "-o", tmp_path / "x", "--pool", cli_pool, "--weights", "1", code=2)


def test_merge_of_folders_needs_no_pool(cli_run, tiny, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    one, two = tiny.units["alpha", 1], tiny.units["gamma", 3]
    cli_run("merge", one, two, "--weights", "2,1", "-o", "out", "--max-shard-size", "8kB")
    assert len(list(Path("out").glob("model-*.safetensors"))) > 1
    wanted = pools.average([pools.arrays_of(one), pools.arrays_of(two)], [2, 1])
    assert pools.same(pools.arrays_of(Path("out")), wanted)
    cli_run("merge", one, two, "--weights", "2,-1", "-o", "bad", code=2)
    cli_run("merge", one, two, "--max-shard-size", "much", "-o", "bad", code=2)
    assert not Path("bad").exists()


def test_merge_refuses_to_guess(cli_run, tiny, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("alpha").symlink_to(tiny.units["alpha", 1])
    said = cli_run("merge", "alpha", "-o", "out", code=2)
    assert "write ./alpha for the folder" in said.stderr
    cli_run("merge", "./alpha", "-o", "out")
    cli_run("merge", "alpha", "-o", "out2", "--pool", tiny.copy(tmp_path / "pool"))
    said = cli_run("merge", "alpha", "beta", "-o", "out3", code=2)
    assert "write a mixture as one" in said.stderr
    cli_run("merge", "alpha", "alpha", "-o", "out3", "--pool", "pool", code=2)
    assert not Path("out3").exists()


# -- sweeping --------------------------------------------------------------------------------


def test_sweep_plans_does_and_shows_the_best_first(cli_run, root):
    at = ["--pool", root, "--on", "alpha,beta"]
    plan = cli_run("sweep", "--subsets", "--dry-run", *at)
    assert plan.stdout == ""
    assert "plan: 7 mixtures on alpha, beta" in plan.stderr
    assert "to do     14 evaluations" in plan.stderr
    done = cli_run("sweep", "--subsets", *at).stdout.splitlines()
    assert done[0].split() == ["mixture", "size", "alpha", "beta", "mean"]
    means = [float(line.split()[-1]) for line in done[1:8]]
    assert means == sorted(means)
    again = cli_run("sweep", "--subsets", *at, "--json")
    assert "memoised  14 evaluations" in again.stderr
    rows = json.loads(again.stdout)
    assert len(rows) == 14
    assert rows[0].keys() >= {"mixture", "evalset", "perplexity", "bits_per_byte"}


def test_sweep_of_a_file_and_of_random_mixtures(cli_run, root, tmp_path):
    file = tmp_path / "mixtures.txt"
    file.write_text("# two of them\n2*alpha+beta\n\nall - gamma  # the other\n")
    at = ["--pool", root, "--on", "alpha", "--format", "quiet"]
    assert set(cli_run("sweep", "--file", file, *at).stdout.split()) == {
        "2*alpha+beta", "alpha+beta",
    }  # fmt: skip
    drawn = ["sweep", "--dirichlet", 2, "--seed", 5, "--among", "alpha+beta", *at]
    first = cli_run(*drawn).stdout
    assert len(first.split()) == 2
    assert cli_run(*drawn).stdout == first
    assert len(cli_run("sweep", "--sizes", 2, *at).stdout.split()) == 3
    assert len(cli_run("sweep", "--subsets", "--limit-mixtures", 2, *at).stdout.split()) == 2


@pytest.mark.parametrize(
    "words",
    [
        [],
        ["--subsets", "--dirichlet", "3"],
        ["--dirichlet", "3", "--limit-mixtures", "1"],
        ["--sizes", "3-1"],
        ["--sizes", "many"],
        ["--dirichlet", "0"],
        ["--dirichlet", "2", "--concentration", "0"],
    ],
)
def test_sweep_refuses_what_cannot_be(cli_run, cli_pool, words):
    cli_run("sweep", *words, "--pool", cli_pool, code=2)


# -- SQL -------------------------------------------------------------------------------------


def test_sql_is_read_only_and_bounded(cli_run, cli_pool):
    at = ["--pool", cli_pool]
    cli_run("sql", "delete from models", *at, code=1)
    cli_run("sql", "copy (select 1) to '/tmp/x.csv'", *at, code=1)
    assert "line 1" in cli_run("sql", "selec 1", *at, code=1).stderr.lower()
    slow = "select count(*) from range(1000000000000) a where a.range % 3 = 1"
    assert "--max-seconds" in cli_run("sql", slow, "--max-seconds", 0.2, *at, code=1).stderr
    said = cli_run("sql", "-", *at, "--format", "csv", input="select 1 as a, 'x,y' as b")
    assert said.stdout == 'a,b\n1,"x,y"\n'
    none = cli_run("sql", "select 1 as a where false", *at, "--format", "csv")
    assert none.stdout == "a\n"


def test_query_names_what_it_knows(cli_run, cli_pool):
    names = cli_run("query", "--format", "quiet", "--pool", cli_pool).stdout.split()
    for name in names:
        cli_run("query", name, "--json", "--pool", cli_pool)
    wrong = cli_run("query", "leaderbord", "--pool", cli_pool, code=1)
    assert "did you mean leaderboard" in wrong.stderr


# -- training --------------------------------------------------------------------------------

RECIPE = """
[model]
model_type = "llama"
hidden_size = 16
intermediate_size = 24
num_hidden_layers = 1
num_attention_heads = 2
num_key_value_heads = 2
[tokenizer]
vocab_size = 280
[training]
context = 16
batch = 2
steps = 4
[unit]
steps = 2
"""


def test_training_from_nothing_to_an_answer(cli_run, tmp_path, monkeypatch, one_thread):
    monkeypatch.chdir(tmp_path)
    Path("r.toml").write_text(RECIPE)
    pools.write_texts(tmp_path, ["alpha", "beta"])
    cli_run("init")
    for name in ("alpha", "beta"):
        cli_run("partition", "add", name, f"{name}.train.jsonl")
        cli_run("evalset", "add", name, f"{name}.held.jsonl")
    cli_run("train", "units", code=1)
    trained = cli_run("train", "seed", "--recipe", "r.toml", "--json")
    (seed,) = json.loads(trained.stdout)
    assert (seed["label"], seed["role"], seed["new"], seed["tokens"]) == ("base", "seed", True, 128)
    (again,) = json.loads(cli_run("train", "seed", "--recipe", "r.toml", "--json").stdout)
    assert (again["digest"], again["new"]) == (seed["digest"], False)
    assert cli_run("train", "unit", "beta", "--recipe", "r.toml", "--format", "quiet").stdout == (
        "beta/1\n"
    )
    assert "alpha/1" in cli_run("train", "units", "--recipe", "r.toml").stdout
    assert "nothing to train" in cli_run("train", "units", "--recipe", "r.toml").stderr
    cli_run("train", "reference", "alpha+beta", "--recipe", "r.toml", "--budget", "sum")
    Path("m.txt").write_text("2*alpha+beta\n")
    cli_run("train", "references", code=2)
    said = cli_run(
        "train", "references", "--file", "m.txt", "--subsets", 2, "--random", 1,
        "--recipe", "r.toml", "--json",
    )  # fmt: skip
    assert [row["tokens"] for row in json.loads(said.stdout)] == [64, 64]
    head = cli_run("ask", "alpha+beta").stdout.splitlines()[0]
    assert "reference (same)" in head
    assert "reference (sum)" in head
    assert len(json.loads(cli_run("eval", "base", "beta/1", "--json").stdout)) == 4


def test_the_printed_recipe_is_the_default_one(cli_run, tmp_path):
    from poolreg.training.recipe import default_recipe, load_recipe

    (tmp_path / "r.toml").write_text(cli_run("train", "recipe").stdout)
    assert load_recipe(tmp_path / "r.toml") == default_recipe()


def test_a_wrong_recipe_is_a_usage_error(cli_run, root, tmp_path):
    (tmp_path / "r.toml").write_text("[training]\nstepps = 3\n")
    said = cli_run("train", "units", "--recipe", tmp_path / "r.toml", "--pool", root, code=2)
    assert "did you mean steps?" in said.stderr
    cli_run("train", "units", "--recipe", tmp_path / "none.toml", "--pool", root, code=2)


def test_a_failed_command_changes_nothing(cli_run, root, tiny, tmp_path):
    with Pool.open(root) as pool:
        pool.models()
    before = pools.contents(root)
    for words in (
        ["ask", '{"json"}'],
        ["ask", "alpha+nobody"],
        ["ask", "0*alpha"],
        ["ask", "--", "-1*alpha"],
        ["ask", "all - alpha - beta - gamma"],
        ["ask", "alpha", "--on", "nothing"],
        ["ask", "alpha", "--max-length", "0"],
        ["ask", "alpha", "--dtype", "int8"],
        ["partition", "add", "../x", tiny.texts / "beta.train.jsonl"],
        ["partition", "add", "x", tmp_path / "missing.txt"],
        ["evalset", "add", "x" * 300, tiny.texts / "beta.train.jsonl"],
        ["model", "add", tmp_path, "--other"],
        ["model", "rm", "nobody"],
        ["train", "reference", "alpha+nobody"],
    ):
        assert cli_run("--pool", root, *words, code=None).exit_code in (1, 2), words
    assert pools.contents(root) == before
