"""Tasks of lm-evaluation-harness on models and merges in memory, with the harness itself."""

from __future__ import annotations

import builtins
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pools
import pytest

from poolreg import Pool
from poolreg.errors import ConfigError, MissingPackage, NotFound, Refused, UsageError
from poolreg.evaluation import harness
from poolreg.evaluation.evaluate import Settings
from poolreg.evaluation.external import read_results
from poolreg.evaluation.harness import TaskRequest

PICK = """
task: tiny_pick
dataset_path: json
dataset_kwargs: {data_files: {test: "@/pick.jsonl", train: "@/pick.jsonl"}}
test_split: test
fewshot_split: train
output_type: multiple_choice
doc_to_text: "{{q}}"
doc_to_target: "{{a}}"
doc_to_choice: "{{c}}"
metric_list:
  - {metric: acc, aggregation: mean, higher_is_better: true}
metadata: {version: 1.0}
"""
ROLL = """
task: tiny_roll
dataset_path: json
dataset_kwargs: {data_files: {test: "@/pick.jsonl"}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{q}}"
metric_list: [{metric: bits_per_byte}]
metadata: {version: 2}
"""
GROUP = """
group: tiny_group
task: [tiny_pick, tiny_roll]
aggregate_metric_list: [{metric: acc, aggregation: mean, weight_by_size: true}]
metadata: {version: 3}
"""
BROKEN = {
    "tiny_template": PICK.replace("tiny_pick", "tiny_template").replace("{{q}}", "{{q"),
    "tiny_absent": PICK.replace("tiny_pick", "tiny_absent").replace("pick.jsonl", "none.jsonl"),
    "tiny_unsafe": PICK.replace("tiny_pick", "tiny_unsafe") + "unsafe_code: true\n",
}


@pytest.fixture(scope="module")
def tasks(tmp_path_factory) -> Path:
    """A folder of task definitions with their data."""
    folder = tmp_path_factory.mktemp("tasks")
    lines = [f"the cat and the hat {i} in the rain {i}" for i in range(8)]
    rows = [
        {"q": q, "c": ["the end", "def f(x)", "1 plus 1"], "a": i % 3} for i, q in enumerate(lines)
    ]
    (folder / "pick.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name, text in {"pick": PICK, "roll": ROLL, "group": GROUP, **BROKEN}.items():
        (folder / f"{name}.yaml").write_text(text.replace("@", str(folder)))
    return folder


# -- without the harness ---------------------------------------------------------------------


def test_without_the_package_the_way_out_is_said(pool, monkeypatch):
    monkeypatch.setattr(harness.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(MissingPackage, match=r"pip install 'poolreg\[lm-eval\]'"):
        pool.evaluate_tasks("base", "arc")


def test_a_request_is_all_that_can_be_known_before_loading(tasks, tmp_path, monkeypatch):
    monkeypatch.setattr(harness, "harness_version", lambda: "1")

    def digest(*args, dtype="float32"):
        return TaskRequest(("a",), *args).digests(dtype)["a"]

    folder = shutil.copytree(tasks, tmp_path / "tasks")
    made = [
        digest(),
        digest(0),
        digest(5),
        digest(5, 10),
        digest(None, 10),
        digest(dtype="bfloat16"),
    ]
    made.append(digest(None, None, folder))
    (folder / "pick.jsonl").write_text("")
    assert digest(None, None, folder) == made[-1], "data is not part of it"
    (folder / "pick.yaml").write_text(PICK + "repeats: 2\n")
    made.append(digest(None, None, folder))
    monkeypatch.setattr(harness, "harness_version", lambda: "2")
    made.append(digest())
    assert len(set(made)) == len(made)
    assert TaskRequest(("a", "b")).digests("float32")["a"] == made[-1]
    with pytest.raises(NotFound, match="there is no folder"):
        digest(None, None, tmp_path / "nowhere")


def test_options_that_a_harness_does_not_take_are_refused(pool):
    with pytest.raises(UsageError, match="no tasks"):
        pool.evaluate_tasks("base", [])
    for given in (Settings(max_length=8), Settings(workers=2), Settings(engine="ray")):
        with pytest.raises(UsageError, match="--max-length, --workers and --engine"):
            pool.evaluate_tasks("base", "arc", settings=given)


# -- with it ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def only_ours():
    """Let the harness know our tasks alone: to read its own 14,000 takes ten seconds."""
    manager = pytest.importorskip("lm_eval.tasks").TaskManager
    with pytest.MonkeyPatch.context() as patch:
        plain = manager.__init__
        patch.setattr(manager, "__init__", lambda self, include_path=None: plain(
            self, include_path=include_path, include_defaults=False
        ))  # fmt: skip
        patch.setenv("HF_HUB_OFFLINE", "1")
        yield


def reference(folder: Path, task: str, tasks: Path, **options) -> dict[str, float]:
    """What the harness alone says of a model in a folder: task metric → value."""
    from lm_eval.evaluator import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    found = simple_evaluate(
        HFLM(pretrained=str(folder), device="cpu", dtype="float32", batch_size=64),
        tasks=[task], task_manager=TaskManager(include_path=str(tasks)), bootstrap_iters=0, **options,
    )  # fmt: skip
    return {
        f"{name} {key.split(',')[0]}": value
        for name, fields in found["results"].items()
        for key, value in fields.items()
        if key.endswith(",none") and "_stderr" not in key
    }


def values(rows) -> dict[str, float]:
    return {f"{row['task']} {row['metric']}": row["value"] for row in rows}


@pytest.mark.slow
@pytest.mark.parametrize(("family", "tied"), [("llama", False), ("llama", True), ("gpt2", True)])
def test_a_merge_in_memory_scores_as_the_merge_in_a_folder(
    tmp_path, tasks, only_ours, one_thread, family, tied
):
    base = pools.tiny_pool(tmp_path / "made", {"alpha": 1, "beta": 2}, family, tied=tied)
    with Pool.open(base.root) as pool:
        asked = ["alpha+beta", "alpha", "base", "3*alpha+beta"]
        rows = pool.evaluate_tasks(asked, "tiny_group", include_path=tasks)
        assert not any(row["memoised"] for row in rows)
        different = set()
        for text in asked:
            found = values(row for row in rows if row["label"] == pool.resolve(text).label)
            pool.merge(text, tmp_path / text)
            alone = reference(tmp_path / text, "tiny_group", tasks)
            assert found == alone
            assert found.keys() == {"tiny_group acc", "tiny_pick acc", "tiny_roll bits_per_byte"}
            different.add(found["tiny_roll bits_per_byte"])
        assert len(different) == len(asked)


@pytest.mark.slow
def test_shots_and_limits_are_the_harnesss_own(pool, tasks, only_ours, tiny):
    given = {"num_fewshot": 2, "limit": 5}
    rows = pool.evaluate_tasks("base", "tiny_pick", include_path=tasks, **given)
    assert values(rows) == reference(tiny.seed, "tiny_pick", tasks, **given)
    (row,) = rows
    assert (row["n_shot"], row["samples"], row["sample_limit"]) == (2, 5, 5.0)
    assert row["stderr"] > 0
    assert row["task_version"] == "1"


@pytest.mark.slow
def test_what_was_asked_once_is_not_run_again(pool, tasks, only_ours, monkeypatch):
    plain, loaded = builtins.__import__, []
    first = pool.evaluate_tasks(
        ["base", "alpha+gamma"], ["tiny_pick", "tiny_roll"], include_path=tasks
    )
    monkeypatch.setattr(
        builtins, "__import__",
        lambda name, *rest: loaded.append(name) or plain(name, *rest),
    )  # fmt: skip
    again = pool.evaluate_tasks(
        ["base", "alpha+gamma"], ["tiny_pick", "tiny_roll"], include_path=tasks
    )
    assert not any(name.startswith(("lm_eval", "torch")) for name in loaded)
    monkeypatch.undo()
    assert [row["memoised"] for row in again] == [True] * 4
    assert [row | {"memoised": False} for row in again] == first
    assert [(row["label"], row["task"]) for row in first] == [
        ("base", "tiny_pick"), ("base", "tiny_roll"),
        ("alpha+gamma", "tiny_pick"), ("alpha+gamma", "tiny_roll"),
    ]  # fmt: skip
    more = pool.evaluate_tasks(["alpha+gamma", "beta"], "tiny_pick", include_path=tasks)
    assert [row["memoised"] for row in more] == [True, False]
    (other,) = pool.evaluate_tasks("beta", "tiny_pick", include_path=tasks, limit=3)
    assert not other["memoised"]
    (repeated,) = pool.evaluate_tasks("beta", "tiny_pick", include_path=tasks, limit=3, again=True)
    assert not repeated["memoised"]
    assert (repeated["value"], repeated["measure"]) == (other["value"], other["measure"])
    assert repeated["measured"] > other["measured"]


@pytest.mark.slow
def test_a_run_here_compares_with_an_imported_file(pool, tiny, tasks, only_ours, tmp_path):
    from lm_eval.evaluator import simple_evaluate
    from lm_eval.loggers import EvaluationTracker
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    tracker = EvaluationTracker(output_path=str(tmp_path / "out"))
    found = simple_evaluate(
        HFLM(pretrained=str(tiny.seed), device="cpu"), tasks=["tiny_group"], limit=6,
        task_manager=TaskManager(include_path=str(tasks)), evaluation_tracker=tracker,
    )  # fmt: skip
    tracker.save_results_aggregated(found, samples=found.pop("samples"))
    assert len(read_results(tmp_path / "out").scores) == 3
    pool.import_scores(tmp_path / "out", "base")
    imported = {row["measure"]: row["value"] for row in pool.task_scores()}
    rows = pool.evaluate_tasks("base", "tiny_group", include_path=tasks, limit=6)
    assert not any(row["memoised"] for row in rows), "imported scores answer no request"
    assert {row["measure"] for row in rows} == imported.keys()
    for row in rows:
        assert row["value"] == pytest.approx(imported[row["measure"]], rel=1e-6)
    assert len(pool.task_scores()) == 3


@pytest.mark.slow
def test_what_the_harness_cannot_run_is_refused(pool, tasks, only_ours):
    with pytest.raises(NotFound, match="did you mean tiny_pick"):
        pool.evaluate_tasks("base", "tiny_pik", include_path=tasks)
    with pytest.raises(Refused, match="cannot run task tiny_template: TemplateSyntaxError"):
        pool.evaluate_tasks("base", "tiny_template", include_path=tasks)
    with pytest.raises(Refused, match="cannot run task tiny_absent: FileNotFoundError"):
        pool.evaluate_tasks("base", "tiny_absent", include_path=tasks)
    with pytest.raises(Refused, match=r"cannot run task tiny_unsafe: ValueError: .*unsafe"):
        pool.evaluate_tasks("base", "tiny_unsafe", include_path=tasks)
    with pytest.raises(ConfigError):
        pool.evaluate_tasks(
            "base", "tiny_pick", include_path=tasks, settings=Settings(dtype="int8")
        )
    assert pool.task_scores() == []


@pytest.mark.slow
def test_what_was_done_before_a_failure_stays(pool, tasks, only_ours):
    with pytest.raises(Refused):
        pool.evaluate_tasks("base", ["tiny_pick", "tiny_absent"], include_path=tasks)
    assert [row["task"] for row in pool.task_scores()] == ["tiny_pick"]
    (row,) = pool.evaluate_tasks("base", "tiny_pick", include_path=tasks)
    assert row["memoised"]


@pytest.mark.slow
def test_the_command_line_prints_scores_and_nothing_else(tiny, tasks, tmp_path):
    pytest.importorskip("lm_eval")
    root = tiny.copy(tmp_path / "pool")
    code = "import sys; from importlib.metadata import entry_points as e; list(e(group='console_scripts', name='poolreg'))[0].load()()"
    said = subprocess.run(
        [sys.executable, "-c", code, "--pool", root, "eval", "alpha+beta", "--harness", "lm-eval",
         "--tasks", "tiny_roll,tiny_pick", "--include-path", tasks, "--limit", "4", "--json"],
        capture_output=True, text=True, check=True, cwd=tmp_path,
    )  # fmt: skip
    assert said.stderr == ""
    assert [(row["label"], row["task"], row["samples"]) for row in json.loads(said.stdout)] == [
        ("alpha+beta", "tiny_roll", 4), ("alpha+beta", "tiny_pick", 4),
    ]  # fmt: skip
