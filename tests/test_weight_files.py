"""Weights files hold what was suggested, and other tools can read them."""

from __future__ import annotations

import csv
import json

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from poolreg.errors import Conflict, UsageError
from poolreg.evaluation.evaluate import Settings
from poolreg.suggest import weight_files

ONE = Settings(threads=1)


@pytest.fixture
def swept(pool):
    pool.sweep(pool.plan_sweep(settings=ONE, scheme="macro"))
    return pool


@pytest.mark.parametrize("name", ["mix.yaml", "mix.yml", "mix.json"])
def test_a_weights_file_holds_the_best_mixture(swept, tmp_path, name):
    out = tmp_path / "new" / name
    planned = swept.plan_suggest({"alpha": 1}, settings=ONE)
    found = swept.suggest(planned, output=out)
    read = yaml.safe_load(out.read_text(encoding="utf-8"))
    assert read == json.loads(json.dumps(weight_files.weights(found)))
    assert read["mixture"] == found.best.mixture
    assert sum(read["weights"].values()) == pytest.approx(1)
    assert read["pool"] == json.loads((swept.root / "FORMAT").read_text())["id"]
    assert set(read["baselines"]) == set(found.baselines)
    assert swept.resolve(read["mixture"], scheme="macro").digest


def test_nothing_is_replaced_without_being_told(swept, tmp_path):
    planned = swept.plan_suggest(settings=ONE)
    out = tmp_path / "mix.json"
    out.write_text("mine")
    with pytest.raises(Conflict, match="--force"):
        swept.suggest(planned, output=out)
    assert out.read_text() == "mine"
    swept.suggest(planned, output=out, force=True)
    assert json.loads(out.read_text())["made_by"].startswith("poolreg")


def test_a_folder_gets_ratios_and_metrics(swept, tmp_path):
    out = tmp_path / "swarm"
    planned = swept.plan_suggest(settings=ONE)
    swept.suggest(planned, output=out)
    tables = {}
    for name in ("ratios.csv", "metrics.csv"):
        with open(out / name, newline="", encoding="utf-8") as file:
            tables[name] = list(csv.DictReader(file))
    ratios, metrics = tables.values()
    assert list(ratios[0]) == ["run_id", "name", "alpha", "beta", "gamma"]
    assert list(metrics[0]) == ["run_id", "name", "alpha", "beta", "gamma"]
    assert [row["run_id"] for row in ratios] == [row["run_id"] for row in metrics]
    assert len({row["run_id"] for row in ratios}) == len(ratios) == 7
    for ratio, metric in zip(ratios, metrics, strict=True):
        assert sum(float(ratio[name]) for name in planned.partitions) == pytest.approx(1)
        (answer,) = swept.evaluate([ratio["name"]], ["beta"], scheme="macro", settings=ONE)
        assert float(metric["beta"]) == answer.bits_per_byte
    with pytest.raises(Conflict):
        swept.suggest(planned, output=out)


def test_other_endings_are_refused_before_the_search(swept, tmp_path):
    with pytest.raises(UsageError, match=r"mix\.yaml"):
        swept.suggest(swept.plan_suggest(settings=ONE), output=tmp_path / "mix.toml")


values = st.recursive(
    st.none() | st.booleans() | st.floats(allow_nan=False, allow_infinity=False) | st.integers(-9, 9)
    | st.text(st.characters(categories=("L", "N", "P", "Zs"))),
    lambda inner: st.dictionaries(st.text(st.characters(categories=("L",)), min_size=1), inner),
    max_leaves=8,
)  # fmt: skip


@given(st.dictionaries(st.sampled_from(["mixture", "weights", "source"]), values))
def test_the_yaml_is_what_was_written(facts):
    text = weight_files._yaml(facts)
    assert (yaml.safe_load(text) or {}) == facts
