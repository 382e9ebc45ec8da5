"""Scores from elsewhere: what lm-evaluation-harness wrote is read, checked, recorded, shown."""

from __future__ import annotations

import copy
import json
import os

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pools import contents

from poolreg.errors import NotFound, Refused
from poolreg.evaluation import external
from poolreg.evaluation.external import TaskScore, read_results

# What lm-eval 0.4.13 wrote about a tiny model on tasks of its own, less what is not read.
REAL = {
    "results": {
        "tiny_pick": {
            "name": "tiny_pick", "alias": "tiny_pick", "sample_len": 5, "acc,none": 0.4,
            "acc_stderr,none": 0.24494897427831783, "acc_norm,none": 0.6,
            "acc_norm_stderr,none": 0.24494897427831783,
        },
        "tiny_pick_b": {
            "name": "tiny_pick_b", "alias": "tiny_pick_b", "sample_len": 5, "acc,none": 0.4,
            "acc_stderr,none": 0.24494897427831783,
        },
        "tiny_roll": {
            "name": "tiny_roll", "alias": "tiny_roll", "sample_len": 5,
            "word_perplexity,none": 354933.22666649846, "word_perplexity_stderr,none": "N/A",
        },
        "tiny_group": {
            "alias": "tiny_group", "name": "tiny_group", "sample_len": 10, "acc,none": 0.4,
            "acc_stderr,none": 0.17320508075688776, "sample_count": {"acc,none": 10},
        },
    },
    "group_subtasks": {"tiny_group": ["tiny_pick", "tiny_pick_b"]},
    "versions": {"tiny_group": "3", "tiny_pick": 1.0, "tiny_pick_b": 1.0, "tiny_roll": 2},
    "n-shot": {"tiny_group": 0, "tiny_pick": 0, "tiny_pick_b": 0, "tiny_roll": 0},
    "higher_is_better": {
        "tiny_group": {"acc": True, "acc_norm": True}, "tiny_pick": {"acc": True, "acc_norm": True},
        "tiny_pick_b": {"acc": True}, "tiny_roll": {"word_perplexity": False},
    },
    "n-samples": {
        "tiny_pick": {"original": 8, "effective": 5},
        "tiny_pick_b": {"original": 8, "effective": 5},
        "tiny_roll": {"original": 8, "effective": 5},
    },
    "config": {"model": "hf", "limit": 5.0, "bootstrap_iters": 100000},
    "git_hash": None,
    "date": 1795406107.0794048,
    "lm_eval_version": "0.4.13",
    "task_hashes": {
        "tiny_pick": "d08a67f1bc2249063f2bb153b3d608e6d8dbc17200bfe7a130afbf47dd2b17e2",
        "tiny_pick_b": "e64d822cc2f9b9180d4aa7af37ac50a455d4a1e974220c9de220c6998588999c",
        "tiny_roll": "dd5cdf3d0adec2ed034feba7a1f30a76798e1c9647bb11abc65aea6153512cf6",
    },
}  # fmt: skip


def written(path, found=REAL, **changes):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({**found, **changes}))
    return path


def changed(*place, to):
    """The real file with one field, said by its keys, set to something else."""
    found = copy.deepcopy(REAL)
    at = found
    for key in place[:-1]:
        at = at[key]
    at[place[-1]] = to
    return found


# -- reading ---------------------------------------------------------------------------------


def test_a_real_file_is_read_field_by_field(tmp_path):
    found = read_results(written(tmp_path / "results_x.json"))
    assert found.skipped == ()
    scores = {(score.task, score.metric): score for score in found.scores}
    assert list(scores) == [
        ("tiny_pick", "acc"), ("tiny_pick", "acc_norm"), ("tiny_pick_b", "acc"),
        ("tiny_roll", "word_perplexity"), ("tiny_group", "acc"),
    ]  # fmt: skip
    assert scores["tiny_pick", "acc_norm"] == TaskScore(
        task="tiny_pick", metric="acc_norm", filter="none", value=0.6, stderr=0.24494897427831783,
        higher_is_better=True, n_shot=0, samples=5, limit=5.0,
        task_hash="d08a67f1bc2249063f2bb153b3d608e6d8dbc17200bfe7a130afbf47dd2b17e2",
        task_version="1", harness_version="0.4.13", measured="2026-11-23T03:55:07.079405",
    )  # fmt: skip
    rolling = scores["tiny_roll", "word_perplexity"]
    assert (rolling.stderr, rolling.higher_is_better, rolling.task_version) == (None, False, "2")
    group = scores["tiny_group", "acc"]
    assert (group.samples, group.task_version, group.n_shot) == (10, "3", 0)


def group_hash(tmp_path, found):
    scores = read_results(written(tmp_path / "results_x.json", found)).scores
    return next(score.task_hash for score in scores if score.task == "tiny_group")


def test_a_group_has_a_hash_of_its_tasks_hashes(tmp_path):
    usual = group_hash(tmp_path, REAL)
    assert len(usual) == 64
    assert group_hash(tmp_path, changed("task_hashes", "tiny_pick", to="0" * 64)) != usual
    swapped = changed("group_subtasks", "tiny_group", to=["tiny_pick_b", "tiny_pick"])
    assert group_hash(tmp_path, swapped) == usual
    nested = {"tiny_group": ["inner"], "inner": ["tiny_pick", "tiny_pick_b"], "tiny_pick": []}
    assert group_hash(tmp_path, changed("group_subtasks", to=nested)) == usual
    assert group_hash(tmp_path, changed("task_hashes", to={"tiny_pick": "0" * 64})) is None
    assert group_hash(tmp_path, changed("group_subtasks", to={})) is None
    endless = {"tiny_group": ["inner"], "inner": ["tiny_group"]}
    assert group_hash(tmp_path, changed("group_subtasks", to=endless)) is None


def test_fields_that_older_files_lack_are_empty(tmp_path):
    found = {"results": {"arc": {"acc,none": 1, "alias": "arc"}, "mmlu": {" ": " "}}}
    (score,) = read_results(written(tmp_path / "results_x.json", found)).scores
    assert score == TaskScore("arc", "acc", "none", 1.0, *[None] * 9)


def test_filters_are_kept_apart(tmp_path):
    values = {"exact_match,strict-match": 0.1, "exact_match,flexible-extract": 0.2}
    found = read_results(written(tmp_path / "results_x.json", {"results": {"gsm8k": values}}))
    assert [(s.metric, s.filter, s.value) for s in found.scores] == [
        ("exact_match", "strict-match", 0.1), ("exact_match", "flexible-extract", 0.2),
    ]  # fmt: skip


def test_of_a_folder_the_newest_file_below_it_is_read(tmp_path):
    newest = written(tmp_path / "b" / "results_2026-03-02T00-00-00.json")
    older = written(tmp_path / "a" / "results_2026-03-01T00-00-00.json")
    os.utime(older, (2e9, 2e9))  # a copy may look newer than it is
    written(tmp_path / "c" / "samples_2027.json")
    assert read_results(tmp_path).path == newest
    assert read_results(tmp_path / "a").path == older
    with pytest.raises(NotFound, match=r"no results_\*\.json below"):
        read_results(tmp_path / "c")
    with pytest.raises(NotFound, match="there is no file"):
        read_results(tmp_path / "nothing.json")


@pytest.mark.parametrize("value", ["NaN", "Infinity", "-Infinity", '"N/A"', "true", "null", "[1]",
                                   "1" + "0" * 400])  # fmt: skip
def test_a_value_that_is_no_finite_number_is_left_out_by_name(tmp_path, value):
    path = tmp_path / "results_x.json"
    path.write_text(
        json.dumps(changed("results", "tiny_pick", "acc,none", to="@@")).replace('"@@"', value)
    )
    found = read_results(path)
    assert found.skipped == ("tiny_pick acc,none",)
    assert ("tiny_pick", "acc") not in {(score.task, score.metric) for score in found.scores}
    assert len(found.scores) == 4


HOSTILE = [
    ((), [], "the file is not an object"),
    (("results",), [1], "results is not an object"),
    (("results", "tiny_pick"), [1], "results.tiny_pick is not an object"),
    (("results",), {}, "holds no scores"),
    (("results",), {"a": {"acc,none": "N/A"}}, "not finite numbers: a acc,none"),
    (("results", "a\x1b[2J"), {"acc,none": 1.0}, "the name of a task is not a text without"),
    (("results", "\ud800"), {"acc,none": 1.0}, "the name of a task is not a text without"),
    (("results", ""), {"acc,none": 1.0}, "the name of a task is not a text of"),
    (("results", "a" * 201), {"acc,none": 1.0}, "the name of a task is not a text of 1 to 200"),
    (("results", "a"), {"b\nc,none": 1.0}, "the name of a metric of a is not"),
    (("results", "a"), {"b,\u202e": 1.0}, "the filter of a.b is not"),
    (("results", "a"), {"b,": 1.0}, "the filter of a.b is not"),
    (("n-shot", "tiny_pick"), "5", "n-shot.tiny_pick is not a whole number"),
    (("n-shot", "tiny_pick"), -1, "n-shot.tiny_pick is not a whole number"),
    (("n-shot", "tiny_pick"), 1 << 40, "n-shot.tiny_pick is not a whole number"),
    (("n-shot", "tiny_pick"), True, "n-shot.tiny_pick is not a whole number"),
    (("n-shot",), [1], "n-shot is not an object"),
    (("n-samples", "tiny_pick"), 5, "n-samples.tiny_pick is not an object"),
    (("n-samples", "tiny_pick"), {"effective": 0.5}, "n-samples.tiny_pick is not a whole"),
    (("n-samples", "tiny_pick"), {"effective": 1 << 60}, "n-samples.tiny_pick is not a whole"),
    (("higher_is_better", "tiny_pick"), {"acc": "yes"}, "is not true or false: 'yes'"),
    (("versions", "tiny_pick"), [2], "versions.tiny_pick is not a text"),
    (("versions", "tiny_pick"), "1\x00", "versions.tiny_pick is not a text without control"),
    (("task_hashes", "tiny_pick"), 7, "task_hashes.tiny_pick is not a text"),
    (("task_hashes",), "x", "task_hashes is not an object"),
    (("group_subtasks", "tiny_group"), "tiny", "group_subtasks.tiny_group is not a list"),
    (("group_subtasks", "tiny_group"), [None], "group_subtasks.tiny_group is not a text"),
    (("config",), "x", "config is not an object"),
    (("config", "limit"), "5", "config.limit is not a finite number"),
    (("config", "limit"), float("nan"), "config.limit is not a finite number"),
    (("date",), "today", "date is not a finite number"),
    (("date",), -1, "date is not a time"),
    (("date",), 1e300, "date is not a time"),
    (("lm_eval_version",), 4, "lm_eval_version is not a text"),
]  # fmt: skip


@pytest.mark.parametrize(("place", "value", "says"), HOSTILE, ids=range(len(HOSTILE)))
def test_a_malformed_file_is_refused_with_file_and_field(tmp_path, place, value, says):
    path = tmp_path / "results_x.json"
    path.write_text(json.dumps(changed(*place, to=value) if place else value))
    with pytest.raises(Refused) as caught:
        read_results(path)
    assert says in caught.value.message
    assert str(path) in caught.value.message
    assert all(line.isprintable() for line in str(caught.value).split("\n"))


@pytest.mark.parametrize("data", [b"", b"{", b"\xff\xfe", b"[" * 100_000, b"1" * 10_000])
def test_what_is_not_json_is_refused(tmp_path, data):
    path = tmp_path / "results_x.json"
    path.write_bytes(data)
    with pytest.raises(Refused, match="is not JSON"):
        read_results(path)


def test_a_giant_file_and_a_pipe_are_refused(tmp_path, monkeypatch):
    path = written(tmp_path / "results_x.json")
    monkeypatch.setattr(external, "MAX_BYTES", 100)
    with pytest.raises(Refused, match="larger than 100 bytes"):
        read_results(path)
    os.mkfifo(tmp_path / "results_pipe.json")
    with pytest.raises(Refused, match="not a regular file"):
        read_results(tmp_path / "results_pipe.json")


json_like = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["tiny_pick", "acc,none", "limit", "x"]), inner, max_size=3
        )
    ),
    max_leaves=8,
)


@settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(st.sampled_from(sorted(REAL)), json_like)
def test_any_field_is_read_or_refused(tmp_path, name, value):
    path = tmp_path / "results_x.json"
    path.write_text(json.dumps(changed(name, to=value)))
    try:
        found = read_results(path)
    except Refused:
        return
    assert all(type(score.value) is float for score in found.scores)


# -- recording -------------------------------------------------------------------------------


def test_importing_twice_changes_nothing(pool, tmp_path):
    path = written(tmp_path / "results_x.json")
    first = pool.import_scores(path, "base")
    assert (first.label, first.new, len(first.scores), first.path) == ("base", 5, 5, path)
    before, rows = contents(pool.root), pool.task_scores()
    assert pool.import_scores(tmp_path, "base").new == 0
    assert contents(pool.root) == before
    assert pool.task_scores() == rows
    assert len(rows) == 5


def test_the_score_measured_last_counts_whatever_is_imported_last(pool, tmp_path):
    def value():
        (row,) = [r for r in pool.task_scores("tiny_pick") if r["metric"] == "acc"]
        return row["value"]

    newer = changed("results", "tiny_pick", "acc,none", to=0.9) | {"date": REAL["date"] + 1}
    pool.import_scores(written(tmp_path / "newer.json", newer), "base")
    pool.import_scores(written(tmp_path / "older.json"), "base")
    assert value() == 0.9
    undated = changed("results", "tiny_pick", "acc,none", to=0.1) | {"date": None}
    pool.import_scores(written(tmp_path / "undated.json", undated), "base")
    assert value() == 0.9
    assert pool.sql(
        "select count(*) from task_scores where task = 'tiny_pick' and metric = 'acc'"
    ).rows == [(3,)]


def test_what_cannot_be_compared_has_another_measure(pool, tmp_path):
    def measure(model, found):
        pool.import_scores(written(tmp_path / "results_x.json", found), model)
        label = pool.resolve(model).label
        rows = [
            r for r in pool.task_scores("tiny_pick") if (r["label"], r["metric"]) == (label, "acc")
        ]
        return rows[-1]["measure"] if len(rows) == 1 else {row["measure"] for row in rows}

    usual = measure("base", REAL)
    assert measure("alpha", REAL | {"lm_eval_version": "0.5", "date": 1.0}) == usual
    for place, value in [
        (("n-shot", "tiny_pick"), 5), (("versions", "tiny_pick"), 2),
        (("task_hashes", "tiny_pick"), "0" * 64), (("config", "limit"), None),
        (("config", "limit"), 0.5),
    ]:  # fmt: skip
        before = len(pool.registry.select("task_measures"))
        pool.import_scores(written(tmp_path / "other.json", changed(*place, to=value)), "base")
        assert len(pool.registry.select("task_measures")) > before, place
    assert len(measure("base", REAL)) == 6


def test_measures_hold_evalsets_and_tasks_in_one_shape(cli_pool, tmp_path, cli_run):
    from shutil import copytree

    from poolreg import Pool

    with Pool.open(copytree(cli_pool, tmp_path / "pool")) as pool:
        evalsets = pool.sql("from measures order by all").rows
        assert len(evalsets) == pool.sql("select count(*) from scores").rows[0][0] > 0
        pool.import_scores(written(tmp_path / "results_x.json"), "alpha + beta")
        found = pool.sql("from measures where source = 'task' order by measure, metric").dicts()
        assert pool.sql("from measures where source = 'evalset' order by all").rows == evalsets
        assert [(r["measure"], r["metric"]) for r in found] == [
            ("tiny_group", "acc"), ("tiny_pick", "acc"), ("tiny_pick", "acc_norm"),
            ("tiny_pick_b", "acc"), ("tiny_roll", "word_perplexity"),
        ]  # fmt: skip
        mixture = pool.resolve("alpha+beta")
        row = found[1]
        assert (row["label"], row["kind"], row["size"], row["subject"], row["protocol"]) == (
            "alpha+beta", "mixture", 2, mixture.digest, None,
        )  # fmt: skip
        beside = pool.sql(
            "select distinct label, kind, scheme, size, origin, seed, blend, subject from measures "
            "where label = 'alpha+beta' and kind = 'mixture'"
        ).rows
        assert len(beside) == 1, "an evalset's row and a task's row say the same of the mixture"
        known = pool.registry.select("task_measures")
        assert [
            (k["measure"], k["metric"], k["higher_is_better"], k["subjects"]) for k in known
        ] == [(r["measure"], r["metric"], r["higher_is_better"], 1) for r in found]
        values = pool.registry.select(
            "task_values",
            subjects=[mixture.digest, "x"],
            measures=[k["measure_digest"] for k in known[:2]],
        )
        assert sorted((v["measure_digest"], v["value"], v["stderr"]) for v in values) == sorted(
            (r["measure_digest"], -r["value"], r["stderr"]) for r in found[:2]
        )


def test_a_filter_is_part_of_the_metric_in_measures(pool, tmp_path):
    found = {"results": {"gsm8k": {"em,strict": 0.1, "em,none": 0.2}}}
    pool.import_scores(written(tmp_path / "results_x.json", found), "base")
    rows = pool.sql("select metric, value from measures where source = 'task' order by 2").rows
    assert rows == [("em,strict", 0.1), ("em", 0.2)]


def test_scores_of_a_removed_model_are_not_shown(pool, tmp_path):
    pool.import_scores(written(tmp_path / "results_x.json"), "base")
    pool.remove("model", "base")
    assert pool.task_scores() == []
    assert pool.registry.select("task_measures") == []


# -- on the command line ---------------------------------------------------------------------


def test_scores_on_the_command_line(tiny, tmp_path, cli_run):
    root = tiny.copy(tmp_path / "pool")
    written(
        tmp_path / "out" / "results_1.json", changed("results", "tiny_pick", "acc,none", to="N/A")
    )
    at = ["--pool", root]
    said = cli_run("scores", "import", tmp_path / "out", "--model", "alpha+gamma", *at)
    assert said.stdout == ""
    assert "4 scores of alpha+gamma, 4 new" in said.stderr
    assert "results_1.json" in said.stderr
    assert "left out, no finite numbers: tiny_pick acc,none" in said.stderr
    table = cli_run("scores", "ls", *at).stdout.splitlines()
    assert table[0].split()[:3] == ["subject", "task", "version"]
    assert len(table) == 5
    rows = json.loads(cli_run("scores", "ls", "--task", "tiny_roll", "--json", *at).stdout)
    assert [(row["label"], row["task"], row["stderr"]) for row in rows] == [
        ("alpha+gamma", "tiny_roll", None)
    ]
    assert cli_run("scores", "ls", "--format", "quiet", *at).stdout.split() == [
        "tiny_group", "tiny_pick", "tiny_pick_b", "tiny_roll",
    ]  # fmt: skip
    assert cli_run("scores", "ls", "--format", "csv", *at).stdout.startswith("label,scheme,task,")
    assert "nothing to show" in cli_run("scores", "ls", "--task", "none", *at).stderr


@pytest.mark.parametrize(
    ("words", "code", "says"),
    [
        (["scores", "import", "nowhere.json", "--model", "base"], 1, "there is no file"),
        (["scores", "import", "{path}", "--model", "bas"], 1, "did you mean base"),
        (["scores", "import", "{path}"], 2, "--model"),
        (["eval", "base", "--tasks", "arc"], 2, "need --harness lm-eval"),
        (["eval", "base", "--limit", "3"], 2, "need --harness lm-eval"),
        (["eval", "base", "--again"], 2, "need --harness lm-eval"),
        (["eval", "base", "--harness", "lm-eval"], 2, "no tasks are named"),
        (["eval", "base", "--harness", "lm-eval", "--tasks", "a", "--on", "beta"], 2, "--on names"),
        (["eval", "base", "--harness", "lm-eval", "--tasks", "a", "--max-length", "8"], 2, "--max-length"),
        (["eval", "base", "--harness", "helm"], 2, "lm-eval"),
    ],
)  # fmt: skip
def test_what_cannot_be_done_is_said(cli_run, cli_pool, tmp_path, words, code, says):
    path = written(tmp_path / "results_x.json")
    said = cli_run("--pool", cli_pool, *(w.replace("{path}", str(path)) for w in words), code=code)
    assert said.stdout == ""
    assert says in said.stderr
