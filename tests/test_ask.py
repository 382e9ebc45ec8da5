"""Answers: what stands beside a mixture, and that a memoised answer loads no model library."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
from pools import contents, refusal, unit_folder

from poolreg import Pool
from poolreg.errors import MixtureError, NotFound, PoolregError, UsageError
from poolreg.evaluation.ask import Answer

pytestmark = pytest.mark.usefixtures("one_thread")


def test_the_answer_is_the_evaluation_with_differences(pool):
    answers = pool.ask(["alpha+beta", "2*gamma/1+beta/2"])
    plain = pool.evaluate(["alpha+beta", "2*gamma/1+beta/2", "base", "all"])
    measured = {(row.label, row.evalset): row for row in plain}
    assert len(answers) == 6
    for answer in answers:
        row = measured[answer.label, answer.evalset]
        assert (answer.nll, answer.perplexity, answer.bits_per_byte) == (
            row.nll, row.perplexity, row.bits_per_byte,
        )  # fmt: skip
        assert answer.perplexity == math.exp(answer.nll / answer.tokens)
        assert answer.bits_per_byte == answer.nll / (math.log(2) * answer.bytes)
        for name, other in (("vs_seed", "base"), ("vs_all", "alpha+beta+gamma")):
            gap = row.bits_per_byte - measured[other, answer.evalset].bits_per_byte
            assert getattr(answer, name) == gap
            assert gap != 0


def test_the_seed_and_all_beside_themselves(pool):
    for answer in pool.ask(["all"]):
        assert answer.vs_all == 0.0
    for answer in pool.ask(["base"]):
        assert (answer.vs_seed, answer.mixture, answer.scheme) == (0.0, None, None)
        assert answer.vs_all == -pool.ask(["all"], [answer.evalset])[0].vs_seed


def test_a_scheme_goes_for_all_too(pool):
    (answer,) = pool.ask(["alpha"], ["beta"], scheme="macro")
    (macro,) = pool.evaluate(["all"], ["beta"], scheme="macro")
    (micro,) = pool.evaluate(["all"], ["beta"])
    assert answer.vs_all == answer.bits_per_byte - macro.bits_per_byte
    assert macro.nll != micro.nll
    assert answer.scheme == "macro"


def test_rows_carry_what_programs_need(pool):
    (row,) = pool.ask("alpha+beta", "gamma")
    fields = json.loads(json.dumps(asdict(row)))
    assert {
        "subject", "mixture", "scheme", "evalset", "protocol", "max_length", "nll", "tokens",
        "bytes", "documents", "perplexity", "bits_per_byte", "memoised",
    } <= fields.keys()  # fmt: skip
    assert (fields["mixture"], fields["scheme"], fields["evalset"]) == (
        "alpha+beta", "micro", "gamma",
    )  # fmt: skip
    assert (fields["memoised"], fields["max_length"], fields["documents"]) == (False, 16, 3)


def test_without_all_units_there_is_no_all(pool):
    pool.remove("model", "gamma/2")
    (answer,) = pool.ask(["alpha"], ["alpha"])
    assert answer.vs_all is None
    assert answer.vs_seed is not None


def test_a_model_of_no_seed_stands_alone(tiny, pool, tmp_path):
    pool.add_model(unit_folder(tmp_path / "u", tiny.seed, 50), name="lone")
    (answer,) = pool.ask(["lone"], ["alpha"])
    assert (answer.vs_seed, answer.vs_all, answer.references) == (None, None, ())


# -- references -----------------------------------------------------------------------------


@pytest.fixture
def referenced(tiny, pool, tmp_path) -> Pool:
    """The tiny pool with references for alpha+beta, of both budgets, one of them replaced."""
    for number, budget in enumerate(["same", "sum", "sum"]):
        folder = unit_folder(tmp_path / f"r{number}", tiny.seed, 60 + number)
        pool.add_model(
            folder, name=f"r{number}", role="reference", mixture="beta+alpha", budget=budget,
            seed="base",
        )  # fmt: skip
    return pool


def test_references_stand_beside(referenced):
    answers = referenced.ask(["alpha+beta"])
    rows = {(r.label, r.evalset): r for r in referenced.evaluate(["r0", "r1", "r2"])}
    for answer in answers:
        shown = [(r.label, r.budget, r.perplexity, r.bits_per_byte) for r in answer.references]
        latest = (("r0", "same"), ("r2", "sum"))
        expected = [(name, budget, rows[name, answer.evalset]) for name, budget in latest]
        assert shown == [(n, b, row.perplexity, row.bits_per_byte) for n, b, row in expected]
    # Of the same weights over units, however they are written; not of others.
    for text, scheme, count in (
        ("2*alpha+beta", "macro", 0), ("beta+alpha", "micro", 2), ("alpha", "micro", 0),
        ("alpha+beta/1+beta/2", "micro", 2), ("alpha+beta", "macro", 0), ("r0", "micro", 0),
    ):  # fmt: skip
        (answer,) = referenced.ask([text], ["alpha"], scheme=scheme)
        assert len(answer.references) == count, text


def test_removed_references_do_not_show(referenced):
    referenced.remove("model", "r2")
    (answer,) = referenced.ask(["alpha+beta"], ["alpha"])
    assert [r.label for r in answer.references] == ["r0", "r1"]
    referenced.remove("model", "r1")
    referenced.remove("model", "r0")
    (answer,) = referenced.ask(["alpha+beta"], ["alpha"])
    assert answer.references == ()


def test_a_model_beside_the_mixture_that_it_is(tiny, pool, tmp_path):
    """Both have one digest, but only the mixture has references."""
    folder = unit_folder(tmp_path / "r", tiny.seed, 60)
    pool.add_model(folder, name="r", role="reference", mixture="alpha", seed="base")
    digest = pool.resolve("alpha").digest
    for texts in (["alpha", digest], [digest, "alpha"]):
        answers = {answer.label: answer for answer in pool.ask(texts, ["alpha"])}
        assert [r.label for r in answers["alpha"].references] == ["r"]
        assert answers["alpha/1"].references == ()
        assert answers["alpha"].nll == answers["alpha/1"].nll


# -- contamination --------------------------------------------------------------------------


def test_shared_documents_are_counted_once(tiny, pool, tmp_path):
    alpha, beta = (
        (tiny.texts / f"{name}.train.jsonl").read_text().splitlines() for name in ("alpha", "beta")
    )
    (tmp_path / "both.jsonl").write_text("\n".join([alpha[0], beta[3], "1 plus 1"]) + "\n")
    pool.add_partition("both", [_jsonl(tmp_path / "p.jsonl", [alpha[0], alpha[1]])])
    added = pool.add_evalset(
        "leaky", [_jsonl(tmp_path / "e.jsonl", [alpha[0], alpha[1], beta[3], '{"text": "new"}'])]
    )
    assert {(o.partition, o.documents) for o in added.overlaps} == {
        ("alpha", 2), ("beta", 1), ("both", 2),
    }  # fmt: skip
    pool.add_model(unit_folder(tmp_path / "u", tiny.seed, 50), role="unit", partition="both",
                   seed="base")  # fmt: skip

    def shared(text: str, on: str = "leaky") -> int:
        return pool.ask([text], [on])[0].shared_documents

    assert {text: shared(text) for text in ("alpha", "beta", "gamma", "both")} == {
        "alpha": 2, "beta": 1, "gamma": 0, "both": 2,
    }  # fmt: skip
    assert shared("alpha+beta+gamma") == 3
    assert shared("alpha+both") == 2
    assert shared("all") == 3
    assert shared("all", on="alpha") == 0
    # A model that was trained on them is marked as its mixture is.
    assert shared(pool.resolve("beta/2").digest) == 1
    assert shared("base") == 0


def _jsonl(path: Path, lines: list[str]) -> Path:
    path.write_text("\n".join(lines) + "\n")
    return path


# -- which evalsets, which errors -----------------------------------------------------------


def test_on_which_evalsets(pool):
    assert [row.evalset for row in pool.ask("alpha", ["gamma", "alpha"])] == ["gamma", "alpha"]
    assert [row.evalset for row in pool.ask("alpha")] == ["alpha", "beta", "gamma"]
    digest = pool.registry.resolve("evalset", "beta")
    assert pool.ask("alpha", [digest[:8]])[0].nll == pool.ask("alpha", ["beta"])[0].nll
    pool.remove("evalset", "beta")
    assert [row.evalset for row in pool.ask("alpha")] == ["alpha", "gamma"]
    with pytest.raises(NotFound, match="the evalset beta was removed"):
        pool.ask("alpha", ["beta"])


def test_nothing_is_asked(pool):
    before = contents(pool.root)
    assert pool.ask([]) == []
    assert contents(pool.root) == before


def test_a_pool_without_evalsets(tiny, pool):
    for name in ("alpha", "beta", "gamma"):
        pool.remove("evalset", name)
    with pytest.raises(NotFound, match=r"no evalsets yet\n.*poolreg evalset add"):
        pool.ask("alpha")


@pytest.mark.parametrize(
    ("text", "options", "kind", "code"),
    [
        ('{"json"}', {}, MixtureError, 2),
        ("", {}, MixtureError, 2),
        ("-2*alpha", {}, MixtureError, 2),
        ("0*alpha", {}, MixtureError, 2),
        ("nobody", {}, NotFound, 1),
        ("alpha+nobody", {}, NotFound, 1),
        ("alpha", {"on": ["nobody"]}, NotFound, 1),
        ("alpha", {"scheme": "mean"}, MixtureError, 2),
        ("alpha", {"seed": "nobody"}, NotFound, 1),
        ("../../x'; DROP TABLE models; --", {}, MixtureError, 2),
        ("x" * 300, {}, MixtureError, 2),
    ],
)
def test_wrong_questions_change_nothing(text, options, kind, code, pool):
    before = contents(pool.root)
    with pytest.raises(PoolregError) as caught:
        pool.ask([text], **options)
    assert isinstance(caught.value, kind)
    assert caught.value.exit_code == code
    assert caught.value.hint, refusal(caught.value)
    assert contents(pool.root) == before


def test_several_seeds_must_be_told_apart(tiny, pool, tmp_path):
    second = unit_folder(tmp_path / "second", tiny.seed, 70)
    pool.add_model(second, name="second", role="seed")

    def add(number: int, partition: str, unit: int) -> str:
        folder = unit_folder(tmp_path / f"u{number}", second, number)
        return pool.add_model(
            folder, role="unit", partition=partition, unit=unit, seed="second"
        ).digest

    made = add(71, "alpha", 1)
    with pytest.raises(UsageError, match="several seed models"):
        pool.ask("alpha", ["alpha"])
    (one,), (two,) = (pool.ask("alpha", ["alpha"], seed=name) for name in ("base", "second"))
    assert one.nll != two.nll
    assert two.vs_all is None
    (seed,) = pool.evaluate(["second"], ["alpha"])
    assert two.vs_seed == two.bits_per_byte - seed.bits_per_byte
    # A model stands beside the union of its own seed's models.
    add(72, "beta", 1)
    add(73, "beta", 2)
    pool.remove("partition", "gamma")
    (model,) = pool.ask(made, ["alpha"])
    (union,) = pool.evaluate(["all"], ["alpha"], seed="second")
    assert model.vs_all == model.bits_per_byte - union.bits_per_byte


# -- memoised -------------------------------------------------------------------------------

QUESTION = """
import json, sys
from dataclasses import asdict
from poolreg import Pool

with Pool.open(sys.argv[1]) as pool:
    rows = [asdict(row) for row in pool.ask(["alpha+beta", "alpha"])]
heavy = {"torch", "transformers", "tokenizers", "safetensors", "pyarrow", "pandas", "scipy"}
print(json.dumps({"rows": rows, "heavy": sorted(heavy & sys.modules.keys())}))
"""


def test_a_memoised_answer_loads_no_model_library(referenced):
    fresh = [asdict(row) for row in referenced.ask(["alpha+beta", "alpha"])]
    assert not any(row["memoised"] for row in fresh)
    assert fresh[0]["references"]
    referenced.close()
    before = contents(referenced.root)
    for _ in range(2):
        done = subprocess.run(
            [sys.executable, "-c", QUESTION, str(referenced.root)],
            capture_output=True, text=True, check=True,
        )  # fmt: skip
        said = json.loads(done.stdout)
        assert said["heavy"] == []
        assert done.stderr == ""
        assert said["rows"] == json.loads(json.dumps([row | {"memoised": True} for row in fresh]))
    assert contents(referenced.root) == before


def test_answers_are_told_apart_from_numbers_of_other_protocols(pool):
    from poolreg.evaluation.evaluate import Settings

    short = pool.ask("alpha", ["alpha"], settings=Settings(max_length=4))
    plain = pool.ask("alpha", ["alpha"])
    assert not plain[0].memoised
    assert isinstance(plain[0], Answer)
    for (answer,), length in ((short, 4), (plain, 16)):
        (seed,) = pool.evaluate(["base"], ["alpha"], settings=Settings(max_length=length))
        assert seed.memoised
        assert answer.vs_seed == answer.bits_per_byte - seed.bits_per_byte
