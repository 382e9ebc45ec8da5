"""Evaluation with a memo: exact numbers, nothing computed twice, nothing mixed up."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from pools import contents, model_folder, set_tensors, unit_folder, write_texts

from poolreg import Pool
from poolreg.errors import Incompatible, Refused
from poolreg.evaluation import engines, live
from poolreg.evaluation.ask import Answer
from poolreg.evaluation.evaluate import Evaluation, Settings, plan
from poolreg.evaluation.measure import Bench
from poolreg.evaluation.protocol import Protocol
from poolreg.evaluation.scoring import score, tokenise
from poolreg.models.loading import load_model
from poolreg.tensors import read_array, read_header
from poolreg.text.partitions import evalset_documents

pytestmark = pytest.mark.usefixtures("one_thread")

NUMBERS = ("subject", "evalset", "protocol", "max_length", "nll", "tokens", "bytes", "documents")


def numbers(rows: list[Answer]) -> list[tuple[object, ...]]:
    return [tuple(getattr(row, name) for name in NUMBERS) for row in rows]


def made(pool: Pool) -> int:
    return pool.sql("SELECT count(*) FROM evaluations").rows[0][0]


@pytest.fixture
def nothing_is_measured(monkeypatch) -> Callable[[], None]:
    """From the call on, measuring anything fails the test."""

    def forbid() -> None:
        def measure(*args, **options):
            raise AssertionError("measured what the memo holds")

        monkeypatch.setattr(engines, "measured", measure)
        monkeypatch.setattr(live, "LiveModel", measure)

    return forbid


# -- the numbers ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "scheme"),
    [("alpha+beta", "micro"), ("alpha+beta", "macro"), ("3*alpha+2*gamma/2", "micro"),
     ("all", "micro"), ("beta/2", "micro")],
)  # fmt: skip
def test_a_mixture_scores_as_its_merge_on_disk(text, scheme, pool, tmp_path):
    asked = pool.evaluate([text], scheme=scheme)
    out = tmp_path / "out"
    pool.merge(text, out, scheme=scheme)
    added = pool.add_model(out, name="merged")
    if len(pool.resolve(text, scheme=scheme).components) > 1:
        assert added.digest != asked[0].subject
    written = pool.evaluate(["merged"])
    assert [row.nll for row in asked] == [row.nll for row in written]
    assert len(asked) == 3

    model = load_model(out)
    for row in asked:
        evalset = pool.registry.resolve("evalset", row.evalset)
        documents = evalset_documents(pool.registry, evalset)
        plain = score(model, tokenise(documents, out, Protocol(16, "any")))
        assert (row.nll, row.tokens) == (plain.total_nll, plain.total_tokens)
        assert row.bytes == sum(len(document.encode()) for document in documents)
        assert row.documents == len(documents) == 3


def test_a_family_that_goes_through_the_disk(tmp_path):
    texts = write_texts(tmp_path / "texts", ["alpha", "beta"])
    seed = model_folder(tmp_path / "seed", "gpt_neox", dtype="bfloat16")
    with Pool.create(tmp_path / "pool") as pool:
        pool.add_evalset("e", [texts / "alpha.held.jsonl"])
        pool.add_model(seed, name="base", role="seed")
        for number, name in enumerate(("alpha", "beta")):
            pool.add_partition(name, [texts / f"{name}.train.jsonl"])
            folder = unit_folder(tmp_path / name, seed, number)
            pool.add_model(folder, role="unit", partition=name, seed="base")
        rows = pool.evaluate(["alpha+beta", "alpha", "beta", "base"])
        pool.merge("alpha+beta", tmp_path / "out")
        pool.add_model(tmp_path / "out", name="merged")
        assert pool.evaluate(["merged"])[0].nll == rows[0].nll
    assert len({row.nll for row in rows}) == 4


def test_what_is_stored(pool):
    (single,) = pool.evaluate(["beta/2"], ["alpha"])
    (mixed,) = pool.evaluate(["alpha+beta"], ["alpha"])
    rows = pool.sql(
        "SELECT subject, document_scores, token_scores, device, seconds FROM evaluations"
    ).dicts()
    stored = {row["subject"]: row for row in rows}

    def arrays(digest: str) -> dict[str, np.ndarray]:
        path = pool.registry.objects.existing(digest)
        return {name: read_array(path, info) for name, info in read_header(path).tensors.items()}

    for answer in (single, mixed):
        row = stored[answer.subject]
        sums = arrays(row["document_scores"])
        assert math.fsum(sums["nll"]) == answer.nll
        assert (sums["tokens"].sum(), sums["bytes"].sum()) == (answer.tokens, answer.bytes)
        assert len(sums["nll"]) == answer.documents
        assert (row["device"], row["seconds"] > 0) == ("cpu", True)
    tokens = arrays(stored[single.subject]["token_scores"])["nll"]
    assert (tokens.dtype, tokens.shape) == (np.float32, (single.tokens,))
    assert tokens.astype(np.float64).sum() == pytest.approx(single.nll, rel=1e-12)
    assert stored[mixed.subject]["token_scores"] is None


def test_the_view_says_the_same(pool):
    rows = pool.evaluate(["alpha+beta", "base"])
    view = pool.sql("SELECT subject, evalset, perplexity, bits_per_byte, nll FROM scores").rows
    shown = {(subject, evalset): numbers for subject, evalset, *numbers in view}
    assert len(shown) == len(rows)
    for row in rows:
        expected = [row.perplexity, row.bits_per_byte, row.nll]
        assert shown[row.subject, row.evalset] == pytest.approx(expected, rel=1e-14)


def test_derived_numbers():
    row = Evaluation("s", "e", "p", 16, nll=20.0, tokens=8, bytes=10, documents=1, memoised=False)
    assert row.perplexity == math.exp(2.5)
    assert row.bits_per_byte == 20.0 / (math.log(2) * 10)
    assert dataclasses.replace(row, nll=1e9).perplexity == math.inf
    empty = dataclasses.replace(row, tokens=0, bytes=0, nll=0.0)
    assert math.isnan(empty.perplexity)
    assert math.isnan(empty.bits_per_byte)


# -- the memo -------------------------------------------------------------------------------


def test_nothing_is_computed_twice(pool, nothing_is_measured):
    first = pool.evaluate(["alpha+beta", "alpha", "base"])
    assert not any(row.memoised for row in first)
    before = contents(pool.root)
    nothing_is_measured()
    again = pool.evaluate(["base", "alpha+beta", "alpha"], ["gamma", "beta", "alpha"])
    assert all(row.memoised for row in again)
    assert sorted(numbers(again)) == sorted(numbers(first))
    assert contents(pool.root) == before
    with Pool.open(pool.root) as other:  # nor in another process's catalog
        other.registry.catalog.path.unlink()
        assert sorted(numbers(other.evaluate(["alpha+beta", "alpha", "base"]))) == sorted(
            numbers(first)
        )


def test_what_is_the_same_by_content_is_memoised(tiny, pool, tmp_path, nothing_is_measured):
    """Other expressions, other schemes, other names: one recipe, one evaluation."""
    (macro,) = pool.evaluate(["alpha+beta"], ["alpha"], scheme="macro")
    (unit,) = pool.evaluate(["alpha"], ["alpha"])
    pool.add_evalset("again", [tiny.texts / "alpha.held.jsonl"])
    pool.add_model(tiny.units["alpha", 1], name="by_name")
    nothing_is_measured()
    (micro,) = pool.evaluate(["4*alpha+2*beta"], ["again"])
    assert (micro.nll, micro.memoised, micro.evalset) == (macro.nll, True, "again")
    (named,) = pool.evaluate(["by_name"], ["alpha"])
    assert (named.nll, named.memoised) == (unit.nll, True)


def test_a_plan_measures_only_what_is_missing(pool, monkeypatch):
    pool.evaluate(["alpha"], ["alpha"])
    subjects = [pool.resolve(text) for text in ("alpha", "beta", "alpha")]
    evalsets = list(pool.registry.names("evalset").values())
    work = plan(pool.registry, subjects, evalsets, Settings())
    assert (len(work.known), work.evaluations, len(work.missing)) == (1, 5, 2)
    sizes = {row["digest"]: row["bytes"] for row in pool.evalsets()}
    alpha = pool.registry.resolve("evalset", "alpha")
    assert work.bytes == 2 * sum(sizes.values()) - sizes[alpha]
    measured = []
    real = Bench.measure

    def measure(self, model, target, *rest):
        measured.append(target.label)
        return real(self, model, target, *rest)

    monkeypatch.setattr(Bench, "measure", measure)
    rows = pool.evaluate(["alpha", "beta"])
    assert sorted(measured) == ["alpha"] * 2 + ["beta"] * 3
    assert [row.memoised for row in rows] == [True, False, False, False, False, False]


def test_other_protocols_are_other_rows(pool, nothing_is_measured):
    variants = [
        Settings(),
        Settings(max_length=8),
        Settings(max_length=15),
        Settings(dtype="bfloat16"),
        Settings(dtype="bfloat16", max_length=8),
    ]
    rows = [pool.evaluate(["alpha+beta"], ["alpha"], settings=how)[0] for how in variants]
    assert not any(row.memoised for row in rows)
    assert len({row.protocol for row in rows}) == len({row.nll for row in rows}) == len(variants)
    assert [row.max_length for row in rows] == [16, 8, 15, 16, 8]
    assert len({(row.tokens, row.bytes) for row in rows}) == 1
    nothing_is_measured()
    again = [pool.evaluate(["alpha+beta"], ["alpha"], settings=how)[0] for how in variants]
    assert numbers(again) == numbers(rows)
    # What the context length gives by default may be asked for by its number.
    (same,) = pool.evaluate(["alpha+beta"], ["alpha"], settings=Settings(max_length=16))
    assert same.protocol == rows[0].protocol


def test_how_fast_is_not_what(pool, tiny, tmp_path, nothing_is_measured):
    """Batch size, threads and device are not part of an evaluation's identity."""
    with Pool.open(tiny.copy(tmp_path / "other")) as other:
        wide = other.evaluate(["all"], settings=Settings(batch_tokens=512))
    narrow = pool.evaluate(["all"], settings=Settings(batch_tokens=16, threads=1))
    for one, two in zip(wide, narrow, strict=True):
        assert one.protocol == two.protocol
        assert one.nll == pytest.approx(two.nll, rel=1e-6)
    nothing_is_measured()
    hit = pool.evaluate(["all"], settings=Settings(batch_tokens=512, device="cpu", workers=3))
    assert all(row.memoised for row in hit)
    assert numbers(hit) == numbers(narrow)


def test_a_failure_keeps_what_was_measured_before(pool, monkeypatch):
    texts = ["alpha", "beta/1", "beta/2", "gamma/1"]
    real, loads = live.LiveModel.load, []

    def load(self, weights, following):
        loads.append(weights)
        if len(loads) == 3:
            raise KeyboardInterrupt
        return real(self, weights, following)

    monkeypatch.setattr(live.LiveModel, "load", load)
    with pytest.raises(KeyboardInterrupt):
        pool.evaluate(texts)
    assert made(pool) == 2 * 3
    rows = pool.evaluate(texts)
    assert sum(row.memoised for row in rows) == 6
    assert made(pool) == 4 * 3
    assert list((pool.root / "tmp").iterdir()) == []


@pytest.mark.slow
def test_several_workers_measure_the_same(tiny, pool, tmp_path):
    texts = ["alpha", "beta", "gamma", "alpha+beta", "base"]
    rows = pool.evaluate(texts, settings=Settings(workers=2))
    with Pool.open(tiny.copy(tmp_path / "one")) as one:
        assert numbers(one.evaluate(texts, settings=Settings(threads=1))) == numbers(rows)
    assert made(pool) == 5 * 3


# -- what is refused ------------------------------------------------------------------------


def test_a_model_without_a_tokenizer(tiny, pool, tmp_path):
    folder = model_folder(tmp_path / "m", tokenizer=False)
    pool.add_model(folder, name="mute")
    with pytest.raises(Refused, match=r"mute was added without a tokenizer.*\n.*--tokenizer DIR"):
        pool.evaluate(["mute"])
    added = pool.add_model(folder, name="mute", tokenizer=tiny.seed, replace=True)
    assert pool.evaluate(["mute"], ["alpha"])[0].subject == added.digest


def test_a_window_beyond_the_context(pool):
    with pytest.raises(Incompatible, match=r"17 tokens are longer than .* 16\n.*max_length to 16"):
        pool.evaluate(["alpha"], settings=Settings(max_length=17))
    assert made(pool) == 0


def test_a_likelihood_that_is_not_finite(tiny, pool, tmp_path):
    folder = unit_folder(tmp_path / "u", tiny.seed, 50)
    set_tensors(folder, lm_head__weight=("F32", np.full((272, 16), 3e38, np.float32)))
    pool.add_model(folder, name="wild")
    with pytest.raises(Refused, match="not finite"):
        pool.evaluate(["wild", "alpha"])
    assert not pool.sql(
        "SELECT * FROM evaluations WHERE subject = ?", [pool.resolve("wild").digest]
    ).rows
    assert list((pool.root / "tmp").iterdir()) == []


def test_progress_counts_bytes(pool):
    class Seen:
        total = done = 0
        notes: tuple[str, ...] = ()

        def start(self, what: str, total: int, unit: str) -> None:
            assert (what, unit) == ("evaluating", "bytes")
            self.total += total

        def advance(self, amount: int) -> None:
            assert amount >= 0
            self.done += amount

        def note(self, text: str) -> None:
            self.notes = (*self.notes, text)

    seen = Seen()
    pool.evaluate(["alpha", "beta"], progress=seen)
    assert seen.done == seen.total == 2 * sum(row["bytes"] for row in pool.evalsets())
    assert sorted(seen.notes) == ["alpha", "beta"]
    pool.evaluate(["alpha", "beta"], progress=seen)
    assert seen.done == seen.total


def test_the_callers_threads_are_left_alone(pool):
    torch.set_num_threads(2)
    pool.evaluate(["alpha"], ["alpha"], settings=Settings(threads=1))
    assert torch.get_num_threads() == 2
