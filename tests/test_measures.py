"""Evalsets and tasks as one kind of thing."""

from __future__ import annotations

import json

import pytest

from poolreg import Pool
from poolreg.decisions.measures import measured, measures_named, only_seed
from poolreg.decisions.proxies import compare
from poolreg.errors import NotFound, UsageError
from poolreg.evaluation.evaluate import Settings


@pytest.fixture
def shared(referenced, tmp_path):
    with Pool.open(referenced.copy(tmp_path / "pool")) as pool:
        yield pool


def results(path, accuracy, *, shots=0, metrics=("acc",)):
    """What lm-evaluation-harness writes, as little of it as is read."""
    values = {f"{metric},none": accuracy + place for place, metric in enumerate(metrics)}
    found = {
        "results": {"quiz": {"alias": "quiz", **values, "acc_stderr,none": 0.01}},
        "versions": {"quiz": 1}, "n-shot": {"quiz": shots}, "higher_is_better": {"quiz": dict.fromkeys(metrics, True)},
        "n-samples": {"quiz": {"original": 100, "effective": 100}}, "config": {"limit": None},
        "date": 1.0, "lm_eval_version": "0.4.13", "task_hashes": {"quiz": "ab" * 32},
    }  # fmt: skip
    path.write_text(json.dumps(found))
    return path


def labels(pool):
    rows = pool.sql("SELECT DISTINCT label, kind FROM scores").rows
    return sorted(label for label, kind in rows if kind != "reference")


def test_a_task_is_turned_so_that_less_is_better(shared, tmp_path):
    shared.import_scores(results(tmp_path / "r.json", 0.25), "code+prose")
    (measure,) = measures_named(shared.registry, ["quiz"])
    assert measure.source == "task"
    subject = shared.resolve("code+prose")
    values = measured(shared.registry, [subject], [measure], Settings(), run_missing=True)
    assert values == {(subject.digest, measure.digest): -0.25}


def test_tasks_have_a_place_in_the_proxy_report(shared, tmp_path):
    models = {row["digest"]: row for row in shared.models()}
    for place, row in enumerate(models.values()):
        shared.import_scores(results(tmp_path / "r.json", 0.2 + place / 100), row["digest"][:12])
    for place, label in enumerate(labels(shared)):
        if "+" in label:
            shared.import_scores(results(tmp_path / "r.json", 0.5 + place / 100), label)
    (found,) = compare(
        shared.registry, ["quiz"], seed=only_seed(shared.registry), settings=Settings(),
        run_missing=False,
    )  # fmt: skip
    assert len(found.blends) == 11
    assert {"micro", "mean-loss", "natural", "seed"} <= set(found.predicted)
    assert "ensemble" not in found.predicted  # there are no token probabilities of a task
    assert (found.actual < 0).all()
    report = shared.proxy_report(["quiz", "code"], run_missing=False)
    assert {row.evalset for row in report.rows} == {None, "quiz", "code"}


class TestNames:
    def test_by_metric_and_digest_where_a_name_is_not_enough(self, shared, tmp_path):
        shared.import_scores(results(tmp_path / "r.json", 0.2, metrics=("acc", "acc_norm")), "base")
        with pytest.raises(UsageError, match="in several ways") as caught:
            measures_named(shared.registry, ["quiz"])
        assert "quiz/acc_norm (" in caught.value.hint
        (by_metric,) = measures_named(shared.registry, ["quiz/acc_norm"])
        assert measures_named(shared.registry, [by_metric.digest[:10]]) == [by_metric]

    def test_shots_are_told_apart_by_digest(self, shared, tmp_path):
        for shots in (0, 5):
            shared.import_scores(results(tmp_path / "r.json", 0.2, shots=shots), "base")
        with pytest.raises(UsageError):
            measures_named(shared.registry, ["quiz/acc"])
        digests = {row["measure_digest"] for row in shared.registry.select("task_measures")}
        assert {measures_named(shared.registry, [d])[0].digest for d in digests} == digests

    def test_an_evalset_of_the_same_name_comes_first(self, shared, tmp_path):
        shared.import_scores(results(tmp_path / "r.json", 0.2), "base")
        (tmp_path / "quiz.jsonl").write_text('{"text": "a quiz"}\n')
        shared.add_evalset("quiz", [tmp_path / "quiz.jsonl"])
        assert measures_named(shared.registry, ["quiz"])[0].source == "evalset"

    @pytest.mark.parametrize("with_tasks", [False, True])
    def test_unknown_names_are_told(self, shared, tmp_path, with_tasks):
        if with_tasks:
            shared.import_scores(results(tmp_path / "r.json", 0.2), "base")
        with pytest.raises(NotFound, match="quizz"):
            measures_named(shared.registry, ["quizz"])
