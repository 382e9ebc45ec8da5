"""poolreg proxy and attribution as a user types them."""

from __future__ import annotations

import csv
import io
import json

import pytest


@pytest.fixture(scope="module")
def root(referenced, tmp_path_factory):
    return referenced.copy(tmp_path_factory.mktemp("decisions") / "pool")


@pytest.fixture
def run(cli_run, root):
    return lambda *words, **options: cli_run(*words, "--pool", root, **options)


class TestReport:
    def test_the_table_has_means_and_ends_with_the_verdict(self, run):
        lines = run("proxy", "report").stdout.splitlines()
        assert lines[0] == "Does it rank mixtures?"
        assert lines[1].split()[:4] == ["evalset,", "mixtures", "kind", "n"]
        assert lines[2].startswith("mean of 4")
        assert "Does it give the value?" in lines
        assert lines[-1].startswith("The 90% interval of a prediction holds")
        assert any(line.startswith("Against 11 references trained on the budget of one unit")
                   for line in lines)  # fmt: skip

    def test_zeros_are_shown(self, run):
        """That the best is among five favourites on every evalset is worth a column."""
        rows = json.loads(run("proxy", "report", "--json").stdout)["rows"]
        means = [row for row in rows if row["evalset"] is None and row["stratum"] == "all"]
        assert any(row["regret_5"] == 0 for row in means)
        assert "@5" in run("proxy", "report").stdout.splitlines()[1]

    def test_it_fits_a_screen(self, run):
        assert (
            max(map(len, run("proxy", "report").stdout.split("correlations are")[0].splitlines()))
            <= 120
        )

    def test_each_evalset_and_stratum_on_demand(self, run):
        brief, each, strata = (
            run("proxy", "report", *extra).stdout for extra in ([], ["--each"], ["--strata"])
        )
        assert "code" not in brief
        assert len(each) > len(brief)
        assert "size 2" in strata
        assert "size 2" not in brief

    def test_json_holds_every_row(self, run):
        found = json.loads(run("proxy", "report", "--on", "code", "--json").stdout)
        assert found["verdict"]
        kinds = {row["kind"] for row in found["rows"]}
        assert {"micro", "ensemble", "mean-loss", "own-domain", "natural", "seed"} <= kinds
        withheld = [row for row in found["rows"] if row["stratum"] == "size 4"]
        assert withheld
        assert all(row["pearson"] is None and "1 of the 5" in row["withheld"] for row in withheld)

    def test_csv(self, run):
        rows = list(csv.DictReader(io.StringIO(run("proxy", "report", "--format", "csv").stdout)))
        assert {"kind", "stratum", "spearman", "coverage"} <= set(rows[0])

    def test_a_pool_without_references_says_so(self, cli_run, tiny, tmp_path):
        pool = tiny.copy(tmp_path / "pool")
        result = cli_run("proxy", "report", "--pool", pool, "--json")
        assert "There is no reference" in json.loads(result.stdout)["verdict"][0]
        assert "poolreg train references" in cli_run("proxy", "report", "--pool", pool).output


class TestNext:
    def test_names_for_a_shell(self, run):
        run("ask", "2*code+prose", "--threads", 1)
        assert run("proxy", "next", "-n", 1, "--format", "quiet").stdout == "2*code+prose\n"
        assert 'poolreg train reference "2*code+prose"' in run("proxy", "next").stderr


class TestAsk:
    def test_the_prediction_stands_beside_the_reference(self, run):
        result = run("ask", "code+prose", "--on", "web")
        assert "predicted (same)" in result.stdout
        assert "90% interval" in result.stdout
        (row,) = json.loads(run("ask", "code+prose", "--on", "web", "--json").stdout)
        (made,) = row["predictions"]
        assert made["low"] <= made["value"] <= made["high"]


class TestAttribution:
    def test_table_and_json_agree(self, run):
        lines = run("attribution", "--on", "code").stdout.splitlines()
        found = json.loads(run("attribution", "--on", "code", "--json").stdout)
        best = min(found["contributions"], key=lambda row: row["shapley"])
        assert lines[1].split()[:3] == ["code", best["partition"], f"{best['shapley']:+.4f}"]
        assert "exact, 15 unions" in lines[-1]

    def test_sampling_prints_errors(self, run):
        out = run("attribution", "--permutations", 8, "--measure", "--threads", 1).stdout
        assert "± s.e." in out

    def test_interactions(self, run):
        lines = run("attribution", "--interactions", "--on", "code").stdout.splitlines()
        assert len(lines) == 1 + 6 + 1

    def test_missing_unions_end_with_the_way_out(self, cli_run, tiny, tmp_path):
        pool = tiny.copy(tmp_path / "pool")
        result = cli_run("attribution", "--pool", pool, code=1)
        assert "poolreg attribution --measure" in result.stderr
