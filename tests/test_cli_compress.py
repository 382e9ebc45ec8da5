"""poolreg compress on tiny pools: plans, variants, what is said about them, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pools
import pytest

PLAN = {
    "subject", "variant", "ratio", "achieved", "block_parameters", "parameters", "bytes",
    "predicted_error", "modules", "digest", "calibrated_on",
}  # fmt: skip
MADE = PLAN | {"shared_bytes", "seconds", "logit_difference", "new"}


@pytest.fixture
def root(tiny, tmp_path) -> Path:
    """A pool to be changed at will."""
    return tiny.copy(tmp_path / "pool")


@pytest.fixture
def compress(cli_run, root):
    def run(*words, **options):
        calibrate = () if "--calibrate" in words else ("--calibrate", "gamma")
        return cli_run("compress", *words, *calibrate, "--pool", root, **options)

    return run


def rows_of(result):
    return json.loads(result.stdout)


def test_a_dry_run_prints_plans_and_keeps_the_calibration(compress, cli_run, root):
    words = ("base", "--ratio", "0.1,0.3", "--dry-run")
    first = compress(*words, "--json")
    rows = rows_of(first)
    assert [row["ratio"] for row in rows] == [0.1, 0.3]
    assert all(row.keys() == PLAN for row in rows)
    for row in rows:
        assert row["achieved"] >= row["ratio"]
        assert {m["part"] for m in row["modules"]} == {"mlp", "pairs", "values"}
        assert {m["layer"] for m in row["modules"]} == {0, 1}
        kept = sum(m["kept_parameters"] for m in row["modules"])
        assert kept == row["block_parameters"]
    assert "plan for base at 0.1" in first.stderr
    assert "MLP" in first.stderr
    assert "note: 73 calibration tokens are fewer than 10" in first.stderr
    before = pools.contents(root)
    assert rows_of(compress(*words, "--json")) == rows
    assert pools.contents(root) == before
    listed = rows_of(cli_run("query", "variants", "--pool", root, "--json"))
    assert listed == []
    assert "removed" in compress(*words).stdout


@pytest.mark.slow
def test_variants_and_their_parent_stand_in_a_table(compress, cli_run, root):
    result = compress(
        "alpha+beta", "--ratio", "0.1,0.3", "--name", "mix", "--on", "alpha,beta", "--on", "gamma",
        "--json",
    )  # fmt: skip
    parent, *variants = rows_of(result)
    assert [row["variant"] for row in variants] == ["mix-10", "mix-30"]
    assert parent["variant"] == parent["subject"] == "alpha+beta"
    assert parent["achieved"] == 0
    columns = {f"{what} on {name}" for what in ("perplexity", "bits/byte") for name in
               ("alpha", "beta", "gamma")}  # fmt: skip
    for row in (parent, *variants):
        assert row.keys() == MADE | columns
        assert all(row[name] > 0 for name in columns)
    assert all(row["new"] for row in variants)
    assert variants[0]["bytes"] > variants[1]["bytes"]
    asked = rows_of(cli_run("ask", "alpha+beta", "--on", "beta", "--pool", root, "--json"))
    assert asked[0]["perplexity"] == parent["perplexity on beta"]
    again = compress("alpha+beta", "--ratio", "0.1,0.3", "--on", "beta")
    assert "perplexity on beta" in again.stdout
    assert "flatter" not in again.stdout
    flattered = compress("alpha+beta", "--ratio", "0.1", "--on", "gamma").stdout
    assert "gamma is the text calibrated on: its figures flatter the variants" in flattered
    quiet = compress("alpha+beta", "--ratio", "0.1", "--format", "quiet").stdout.split("\n")
    assert "mix-10" in quiet
    shown = rows_of(cli_run("model", "lineage", "mix-30", "--pool", root, "--json"))
    assert any(row["relation"] == "compressed from" for row in shown)


@pytest.mark.slow
def test_all_members_and_whether_their_ranking_survives(compress, cli_run, root):
    words = ("--members", "--ratio", "0.2", "--target", "portable", "--on", "alpha", "--json")
    rows = rows_of(compress(*words))
    members = {"alpha/1", "beta/1", "beta/2", "gamma/1", "gamma/2", "gamma/3"}
    assert {row["subject"] for row in rows} == members
    assert len(rows) == 2 * len(members)
    (found,) = rows_of(cli_run("query", "ranking", "--pool", root, "--json"))
    assert (found["evalset"], found["models"], found["method"]) == ("alpha", 6, "poolreg")
    whole = [r["bits/byte on alpha"] for r in rows if r["ratio"] == 0]
    small = [r["bits/byte on alpha"] for r in rows if r["ratio"] > 0]
    assert found["rank_correlation"] == pytest.approx(spearman(whole, small))


def spearman(one, other):
    ranks = [[sorted(part).index(value) for value in part] for part in (one, other)]
    squares = sum((a - b) ** 2 for a, b in zip(*ranks, strict=True))
    return 1 - 6 * squares / (len(one) * (len(one) ** 2 - 1))


def test_mixtures_of_a_file(compress, tmp_path):
    (tmp_path / "mixtures.txt").write_text("alpha+gamma\nbeta\n")
    rows = rows_of(
        compress("--file", tmp_path / "mixtures.txt", "--ratio", "0.2", "--dry-run", "--json")
    )
    assert [row["subject"] for row in rows] == ["alpha+gamma", "beta"]


@pytest.mark.parametrize(
    ("words", "code", "says"),
    [
        (("base", "--ratio", "1.5"), 2, "the ratio 1.5 is not between 0 and 1"),
        (("base", "--ratio", "nan"), 2, "is not between 0 and 1"),
        (("base", "--ratio", "-0.1"), 2, "is not between 0 and 1"),
        (("base", "--ratio", "half"), 2, "'half' is no ratio"),
        (("base", "--ratio", ""), 2, "is no ratio"),
        (("base",), 2, "--ratio"),
        (("--ratio", "0.3"), 2, "give --members or --file"),
        (("base", "--members", "--ratio", "0.3"), 2, "give --members or --file"),
        (("base", "alpha", "--ratio", "0.3", "--name", "x"), 2, "--name is for the variants of one"),
        (("base", "--ratio", "0.3", "--method", "magic"), 2, "magic"),
        (("base", "--ratio", "0.3", "--target", "tiny"), 2, "tiny"),
        (("base", "--ratio", "0.3", "--without", "salt"), 2, "nothing that can be left out"),
        (("base", "--ratio", "0.3", "--method", "modegpt", "--without", "obs"), 2, "drop it"),
        (("base", "--ratio", "0.3", "--calibrate", "gama"), 1, "did you mean gamma?"),
        (("nobody", "--ratio", "0.3"), 1, "nobody"),
    ],
)  # fmt: skip
def test_what_is_refused_changes_nothing(compress, root, words, code, says):
    before = pools.contents(root)
    result = compress(*words, code=None)
    assert result.exit_code == code, result.stderr
    assert says in result.stderr
    assert "Traceback" not in result.stderr
    assert result.stdout == ""
    assert pools.contents(root) == before


def test_an_unknown_evalset_is_found_before_anything_is_made(compress, root):
    before = pools.contents(root)
    result = compress("base", "--ratio", "0.3", "--on", "nothing", code=None)
    assert result.exit_code != 0
    assert "nothing" in result.stderr
    assert pools.contents(root) == before


def test_a_ratio_out_of_reach_says_what_can_be_reached(compress):
    result = compress("base", "--ratio", "0.9", "--target", "portable", code=None)
    assert result.exit_code == 2
    assert "at most" in result.stderr
    assert "attention stays whole" in result.stderr


@pytest.mark.slow
def test_a_name_that_is_taken(compress, root):
    result = compress("base", "--ratio", "0.2", "--name", "base", code=None)
    assert result.exit_code != 0
    assert "base" in result.stderr
    assert compress("beta/1", "--ratio", "0.2", "--name", "small").exit_code == 0
    taken = compress("gamma/1", "--ratio", "0.2", "--name", "small", code=None)
    assert taken.exit_code != 0
    assert "--replace" in taken.stderr
    compress("gamma/1", "--ratio", "0.2", "--name", "small", "--replace")
