"""Suggestions on a tiny pool: budgets, marks, baselines, and that nothing is measured twice."""

from __future__ import annotations

import itertools
import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from poolreg import Pool
from poolreg.errors import NotFound, UsageError
from poolreg.evaluation.evaluate import Settings

UNITS = [f"{name}/{unit}" for name, count in (("alpha", 1), ("beta", 2), ("gamma", 3))
         for unit in range(1, count + 1)]  # fmt: skip
ONE = Settings(threads=1)


def plan(pool: Pool, **asked):
    return pool.plan_suggest(settings=ONE, **asked)


@pytest.fixture(scope="module")
def known(tiny, tmp_path_factory) -> Path:
    """A pool whose unit models and seed are measured, so that the ensemble is known."""
    root = tiny.copy(tmp_path_factory.mktemp("known") / "pool")
    with Pool.open(root) as pool:
        pool.evaluate([*UNITS, "base"], settings=ONE)
    return root


@pytest.fixture
def measured(known, tmp_path) -> Iterator[Pool]:
    """A copy of it, to be changed at will."""
    with Pool.open(shutil.copytree(known, tmp_path / "measured")) as pool:
        yield pool


def evaluations(pool: Pool) -> int:
    return pool.sql("SELECT count(*) FROM evaluations").rows[0][0]


def test_nothing_known_and_no_budget(pool):
    with pytest.raises(NotFound, match="--budget"):
        pool.suggest(plan(pool))


def test_without_a_budget_nothing_is_measured(measured):
    before = evaluations(measured)
    found = measured.suggest(plan(measured, target={"alpha": 2, "beta": 1}))
    assert evaluations(measured) == before
    assert found.effort.evaluated == found.effort.beside == 0
    assert found.effort.gap < 1e-5
    assert "ensemble" in {row.source for row in found.rows}
    assert all(sum(row.shares.values()) == pytest.approx(1) for row in found.rows)
    assert "0.667·alpha + 0.333·beta" in found.objective


def test_the_ensembles_best_is_that_of_a_grid(measured):
    """Over all mixtures in tenths, token by token from the stored losses."""
    from poolreg.decisions.ensemble import ensemble_loss, token_losses
    from poolreg.decisions.measures import protocol_of
    from poolreg.suggest.shares import field

    given = field(measured.registry)
    protocol = protocol_of(measured.registry, given.seed, ONE).digest
    evalset = measured.registry.names("evalset")["gamma"]
    flat = [model for own in given.models for model in own]
    losses = token_losses(measured.registry, evalset, protocol, flat)
    size = measured.evalset("gamma")["bytes"]

    def bits(shares) -> float:
        weights = np.repeat(np.array(shares) / [1, 2, 3], [1, 2, 3])
        return ensemble_loss(losses, weights) / np.log(2) / size

    grid = [np.array(p) / 10 for p in itertools.product(range(11), repeat=3) if sum(p) == 10]
    found = measured.suggest(plan(measured, target={"gamma": 1}))
    best = next(row for row in found.rows if "ensemble" in row.source)
    own = bits([best.shares.get(name, 0.0) for name in given.names])
    assert own <= min(map(bits, grid)) + found.effort.gap + 1e-5


@pytest.mark.slow
def test_a_budget_is_kept_and_proposals_are_marked(measured):
    planned = plan(measured, budget=6)
    found = measured.suggest(planned)
    assert 1 <= found.effort.evaluated <= 6
    origins = dict(measured.sql("SELECT mixture, origin FROM mixtures").rows)
    for row in found.rows:
        if row.source.startswith("round") or row.source == "ensemble":
            assert origins[row.mixture] == "adaptive"
    assert origins["alpha+beta+gamma"] == "design"  # the uniform baseline
    known = set(origins.values())
    assert known == {"design", "adaptive"}
    measured_rows = [row for row in found.rows if row.measured is not None]
    assert [row.measured for row in measured_rows] == sorted(row.measured for row in measured_rows)
    assert [row.rank for row in found.rows] == list(range(1, len(found.rows) + 1))
    assert found.facts
    uniform = found.rows[found.baselines[planned.baselines[0].name] - 1]
    assert min(row.measured for row in measured_rows) <= uniform.measured


def test_what_is_measured_is_what_ask_says(measured):
    found = measured.suggest(plan(measured, target={"beta": 1}, budget=2))
    row = next(row for row in found.rows if row.measured is not None and len(row.shares) > 1)
    (answer,) = measured.evaluate([row.mixture], ["beta"], scheme="macro", settings=ONE)
    assert answer.memoised
    assert answer.bits_per_byte == pytest.approx(row.measured)


@pytest.mark.slow
def test_running_again_measures_nothing_twice(measured):
    measured.suggest(plan(measured, budget=3))
    keys = "SELECT count(*), count(DISTINCT (subject, evalset, protocol)) FROM evaluations"
    first = measured.suggest(plan(measured, budget=0))
    before = evaluations(measured)
    again = measured.suggest(plan(measured, budget=2))
    assert again.effort.known == first.effort.known
    new = evaluations(measured) - before
    assert new == 3 * again.effort.evaluated
    count, distinct = measured.sql(keys).rows[0]
    assert count == distinct


def test_baselines_stand_beside(measured):
    planned = plan(measured, budget=1)
    names = [name for b in planned.baselines for name in b.name.split(" = ")]
    assert sorted(names) == ["natural", "stratified", "uniform"]
    found = measured.suggest(planned)
    assert found.effort.beside == len(planned.baselines)
    assert set(found.baselines) >= {b.name for b in planned.baselines}
    assert "best single partition" in found.baselines


@pytest.mark.slow
def test_constraints_are_kept(measured):
    limits = {"minimum": {"alpha": 0.2}, "maximum": {"gamma": 0.25}, "near": "uniform", "kl": 0.2}
    found = measured.suggest(plan(measured, budget=4, **limits))
    for row in found.rows:
        if row.allowed:
            assert row.shares.get("alpha", 0) >= 0.2 - 5e-4
            assert row.shares.get("gamma", 0) <= 0.25 + 5e-4
        else:
            assert row.source in found.baselines
    assert found.best.allowed
    single = measured.suggest(plan(measured, size=1))
    assert all(len(row.shares) == 1 for row in single.rows if row.allowed)


def test_the_worst_group_is_against_the_seed(measured):
    found = measured.suggest(plan(measured, worst_group=True, budget=2))
    seed = {a.evalset: a.bits_per_byte for a in measured.evaluate(["base"], settings=ONE)}
    for row in found.rows:
        if row.measured is not None:
            change = max(row.per_measure[name] - seed[name] for name in seed)
            assert row.measured == pytest.approx(change)


@pytest.mark.slow
def test_the_worst_group_needs_the_seed(pool):
    pool.evaluate(UNITS, settings=ONE)
    with pytest.raises(NotFound, match="poolreg eval base"):
        pool.suggest(plan(pool, worst_group=True))
    assert pool.suggest(plan(pool, worst_group=True, budget=1)).effort.beside >= 2


def test_too_few_rows_are_learned_first(pool):
    found = pool.suggest(plan(pool, budget=3))
    assert found.effort.evaluated == 3
    measured = {row.mixture for row in found.rows if row.measured is not None}
    assert {"alpha", "beta", "gamma"} <= measured


def test_a_surrogate_predicts_rows_without_themselves(measured):
    measured.sweep(measured.plan_sweep(settings=ONE))
    found = measured.suggest(plan(measured))
    assert found.facts
    known = [row for row in found.rows if row.measured is not None]
    assert all(row.low <= row.predicted <= row.high for row in known)
    assert any(row.predicted != row.measured for row in known)
    assert 0 < found.level <= 0.9


def test_among_narrows_the_choice(measured):
    found = measured.suggest(plan(measured, among="alpha+beta"))
    assert all(set(row.shares) <= {"alpha", "beta"} for row in found.rows)


REFUSED = {
    "weights": ({"target": {"alpha": -1.0}}, UsageError),
    "no weight": ({"target": {"alpha": 0.0}}, UsageError),
    "both": ({"target": {"alpha": 1.0}, "worst_group": True}, UsageError),
    "unknown": ({"target": {"nowhere": 1.0}}, NotFound),
    "budget": ({"budget": -1}, UsageError),
    "units": ({"among": "beta/1"}, UsageError),
    "infeasible": ({"maximum": {"alpha": 0.1, "beta": 0.1, "gamma": 0.1}}, UsageError),
}


@pytest.mark.parametrize("case", REFUSED)
def test_requests_that_cannot_be(pool, case):
    asked, error = REFUSED[case]
    with pytest.raises(error):
        plan(pool, **asked)


def test_the_command(measured, cli_run, tmp_path):
    root = measured.root
    measured.close()
    words = ["suggest", "--pool", root, "--target", "alpha=0.7,beta=0.3", "--max", "gamma=0.5"]
    dry = cli_run(*words, "--budget", 5, "--dry-run")
    assert "0.7·alpha + 0.3·beta" in dry.stderr
    assert "gamma at most 0.5" in dry.stderr
    assert not dry.stdout
    out = tmp_path / "mix.json"
    shown = cli_run(*words, "--json", "--output", out, "--threads", 1)
    (facts,) = json.loads(shown.stdout)
    assert facts["rows"][0]["rank"] == 1
    assert json.loads(out.read_text())["mixture"]
    table = cli_run(*words, "--threads", 1).stdout
    assert "ensemble" in table
    assert "less is better" in table
    assert cli_run(*words, "--output", out, code=1).exit_code == 1  # it is there already
    wrong = cli_run("suggest", "--pool", root, "--max", "gamma", code=2)
    assert "NAME=NUMBER" in wrong.stderr
    clash = cli_run("suggest", "--pool", root, "--min", "alpha=0.8", "--min", "beta=0.8", code=2)
    assert "sum to 1.6" in clash.stderr
    assert "--scheme" not in cli_run("suggest", "--help").stdout
