"""Predicted references: what they rest on, and what is said where there are too few."""

from __future__ import annotations

import numpy as np
import pytest
from pools import tiny_pool, unit_folder

from poolreg import Pool
from poolreg.decisions.measures import only_seed
from poolreg.decisions.predict import next_references
from poolreg.decisions.proxies import FEATURES, compare
from poolreg.errors import NotFound
from poolreg.evaluation.evaluate import Settings
from poolreg.numerics.conformal import forecast


@pytest.fixture
def shared(referenced, tmp_path):
    with Pool.open(referenced.copy(tmp_path / "pool")) as pool:
        yield pool


def comparison(pool, name):
    found = compare(
        pool.registry, [name], seed=only_seed(pool.registry), settings=Settings(), run_missing=False
    )
    return found[0]


def test_a_prediction_is_the_forecast_from_the_other_references(shared):
    (answer,) = shared.ask("code+prose", "web")
    known = comparison(shared, "web")
    place = [blend.mixture for blend in known.blends].index("code+prose")
    others = [i for i in range(len(known.blends)) if i != place]
    table = np.stack([known.predicted[kind] for kind in FEATURES], axis=1)
    expected = forecast(table[others], known.actual[others], table[place])
    (made,) = answer.predictions
    assert made.budget == "same"
    assert made.references == 10
    assert made.value == pytest.approx(expected.value)
    assert (made.low, made.high) == pytest.approx((expected.low, expected.high))
    assert made.low <= made.high
    assert answer.unpredicted is None


def test_a_new_mixture_uses_all_references(shared):
    (answer,) = shared.ask("2*code+prose", "web")
    assert answer.predictions[0].references == 11


def test_the_average_is_that_of_the_scheme_asked(tiny, tmp_path):
    """Where units differ in number, micro and macro are two mixtures of the data."""
    with Pool.open(tiny.copy(tmp_path / "pool")) as pool:
        for number in range(9):
            folder = unit_folder(tmp_path / f"r{number}", tiny.seed, 900 + number, 0.02)
            mixture = f"alpha+{number + 1}*beta"
            pool.add_model(folder, role="reference", mixture=mixture, seed="base", budget="same")
        pool.proxy_report(["alpha"])
        found = {
            scheme: pool.ask("alpha+beta+gamma", "alpha", scheme=scheme)[0]
            for scheme in ("micro", "macro")
        }
        assert all(len(answer.predictions) == 1 for answer in found.values())
        values = {scheme: answer.predictions[0].value for scheme, answer in found.items()}
        assert values["micro"] != values["macro"]


@pytest.mark.parametrize("what", ["base", "code", "code/1"])
def test_models_and_single_units_get_no_prediction(shared, what):
    """A unit's model was trained on it: there is nothing to predict."""
    (answer,) = shared.ask(what, "web")
    assert answer.predictions == ()
    assert answer.unpredicted is None


def test_without_references_nothing_is_said(pool):
    (answer,) = pool.ask("alpha+beta", "gamma")
    assert answer.predictions == ()
    assert answer.unpredicted is None


def test_too_few_references_are_told_with_the_way_out(pool, tiny):
    pool.add_model(tiny.units["beta", 2], role="reference", mixture="alpha+beta", seed="base")
    (answer,) = pool.ask("alpha+gamma", "gamma")
    assert answer.predictions == ()
    assert "0 other references" in answer.unpredicted
    assert "poolreg proxy next" in answer.unpredicted


def test_a_reference_without_its_unit_models_is_no_hindrance(tmp_path):
    """Its partition has no model, so it has no proxy; other questions are answered as before."""
    tiny = tiny_pool(tmp_path, {"alpha": 1, "beta": 1})
    with Pool.open(tiny.root) as pool:
        (tmp_path / "more.jsonl").write_text('{"text": "text of a part without a model"}\n')
        pool.add_partition("more", [tmp_path / "more.jsonl"])
        pool.add_model(tiny.units["beta", 1], role="reference", mixture="alpha+more", seed="base")
        (answer,) = pool.ask("alpha+beta", "beta")
        assert answer.predictions == ()
        assert pool.proxy_report(["beta"]).rows == ()


def test_references_that_are_not_measured_here_are_told(shared, tmp_path):
    (tmp_path / "new.jsonl").write_text('{"text": "something new to measure on"}\n')
    shared.add_evalset("new", [tmp_path / "new.jsonl"])
    (answer,) = shared.ask("code+prose", "new")
    assert "poolreg proxy report measures them" in answer.unpredicted
    shared.proxy_report(["new"])
    (answer,) = shared.ask("code+prose", "new")
    assert answer.predictions


class TestNext:
    def test_only_mixtures_without_a_reference_are_named(self, shared):
        shared.ask(["2*code+prose", "code+5*web"])
        found = next_references(shared.registry)
        assert {row.mixture for row in found} == {"2*code+prose", "2*python+web", "code+5*web"}
        assert all(row.leverage > 1 / 11 and row.disagreement >= 0 for row in found)
        assert found[0].leverage >= found[1].leverage >= found[2].leverage

    def test_a_single_unit_is_its_own_reference(self, shared):
        assert [row.mixture for row in next_references(shared.registry)] == ["2*python+web"]

    def test_without_candidates_the_way_out_is_told(self, pool):
        with pytest.raises(NotFound, match="no mixture without a reference") as caught:
            next_references(pool.registry)
        assert "poolreg sweep --subsets" in caught.value.hint

    def test_without_references_disagreement_counts(self, pool):
        pool.sweep(pool.plan_sweep())
        found = next_references(pool.registry)
        assert len(found) == 6  # unions of several units
        assert all(row.leverage is None for row in found)
        gaps = [row.disagreement for row in found]
        assert gaps == sorted(gaps, reverse=True)
