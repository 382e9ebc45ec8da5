"""Training in a pool: repeatable, resumable, shared among processes, recorded as it was."""

from __future__ import annotations

import functools
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pools
import pytest

from poolreg import Pool
from poolreg.errors import Conflict, Drift, Locked, NotFound, UsageError
from poolreg.files import lock
from poolreg.training import loop as training
from poolreg.training.jobs import one_seed, seed_job, unit_jobs
from poolreg.training.recipe import TrainingRecipe, load_recipe

pytestmark = pytest.mark.usefixtures("one_thread")

COUNTS = {"alpha": 1, "beta": 2, "gamma": 1}
RECIPE = """
[model]
model_type = "llama"
hidden_size = 16
intermediate_size = 24
num_hidden_layers = 1
num_attention_heads = 2
num_key_value_heads = 2
tie_word_embeddings = true
[tokenizer]
vocab_size = 300
[training]
context = 8
batch = 2
lr = 1e-2
[seed]
steps = 5
[unit]
steps = 3
"""
PER_STEP = 16  # tokens


@pytest.fixture
def recipe(tmp_path) -> TrainingRecipe:
    return recipe_of(tmp_path)


def recipe_of(folder: Path, *changes: tuple[str, str]) -> TrainingRecipe:
    text = RECIPE
    for old, new in changes:
        assert old in text
        text = text.replace(old, new)
    (folder / "recipe.toml").write_text(text)
    return load_recipe(folder / "recipe.toml")


@pytest.fixture(scope="module")
def texts(tmp_path_factory) -> Path:
    return pools.write_texts(tmp_path_factory.mktemp("texts"), list(COUNTS), lines=30)


def data_pool(root: Path, texts: Path) -> Pool:
    with Pool.create(root) as pool:
        pools.add_data(pool, texts, COUNTS)
    return Pool.open(root)


@pytest.fixture
def empty(tmp_path, texts):
    """A pool with data and no models."""
    with data_pool(tmp_path / "pool", texts) as pool:
        yield pool


@pytest.fixture(scope="module")
def ready(tmp_path_factory, texts) -> Path:
    """The folder of a pool with a trained seed; copy it."""
    base = tmp_path_factory.mktemp("ready")
    with data_pool(base / "pool", texts) as pool:
        pool.train_seed(recipe_of(base))
    return base / "pool"


@pytest.fixture
def seeded(ready, tmp_path):
    """A copy of the pool with a trained seed."""
    with Pool.open(shutil.copytree(ready, tmp_path / "pool")) as pool:
        yield pool


@pytest.fixture
def no_training(monkeypatch):
    """From the call on, training anything fails the test."""

    def forbid() -> None:
        def train(*args, **options):
            raise AssertionError("trained what was there")

        monkeypatch.setattr(training, "train", train)

    return forbid


def digests(pool: Pool) -> dict[str, str]:
    return {row["name"]: row["digest"] for row in pool.models()}


# -- the same again -------------------------------------------------------------------------


def test_the_same_recipe_and_data_give_the_same_models(seeded, tmp_path, texts, recipe):
    """In another pool, under other paths and names, in another order."""
    seeded.train_units(recipe)
    seeded.train_references(["alpha+beta", "gamma"], recipe)
    here = digests(seeded)
    assert len(set(here.values())) == 1 + 4 + 2 - 1  # one unit's text gives the unit's model
    moved = tmp_path / "moved"
    moved.mkdir()
    for path in texts.iterdir():
        (moved / path.name).write_bytes(path.read_bytes())
    with Pool.create(tmp_path / "other") as other:
        for name in reversed(COUNTS):
            other.add_partition(f"x{name}", [moved / f"{name}.train.jsonl"], units=COUNTS[name])
        seed = other.train_seed(recipe, name="start")
        other.train_references(["xgamma", "xbeta+xalpha"], recipe)
        other.train_units(recipe, only=["xbeta", "xgamma", "xalpha/1"])
        there = digests(other)
    assert seed.digest == here["base"]
    assert sorted(there.values()) == sorted(here.values())
    assert there["xbeta/2"] == here["beta/2"]


def test_a_second_call_trains_nothing(seeded, recipe, no_training):
    first = seeded.train_units(recipe)
    assert [row.label for row in first] == ["alpha/1", "beta/1", "beta/2", "gamma/1"]
    assert all(row.new for row in first)
    references = seeded.train_references(["alpha+beta"], recipe)
    before = pools.contents(seeded.root)
    no_training()
    assert seeded.train_units(recipe) == []
    (seed,) = [seeded.train_seed(recipe)]
    assert (seed.digest, seed.new, seed.tokens) == (digests(seeded)["base"], False, 5 * PER_STEP)
    (again,) = seeded.train_references("beta+alpha", recipe)
    assert not again.new
    assert (again.digest, again.tokens, again.final_loss) == (
        references[0].digest, references[0].tokens, references[0].final_loss,
    )  # fmt: skip
    # Even when asked for again: the same settings would give the same models.
    again = seeded.train_units(recipe, again=True)
    assert [(row.digest, row.new) for row in again] == [(row.digest, False) for row in first]
    assert pools.contents(seeded.root) == before


def test_one_job_named_twice_is_done_once(seeded, recipe):
    rows = seeded.train_units(recipe, only=["beta/1", "beta", "beta/1"])
    assert [row.label for row in rows] == ["beta/1", "beta/1", "beta/2", "beta/1"]
    assert len({row.digest for row in rows}) == 2
    assert len(seeded.models()) == 3


def test_other_settings_give_other_models(seeded, tmp_path, recipe):
    (first,) = seeded.train_units(recipe, only="alpha")
    other = recipe_of(tmp_path, ("lr = 1e-2", "lr = 2e-2"))
    assert seeded.train_units(other, only="alpha") == []
    (second,) = seeded.train_units(other, only="alpha", again=True)
    assert second.digest != first.digest
    assert seeded.resolve("alpha").digest == second.digest
    assert second.new


# -- what is recorded -----------------------------------------------------------------------


def test_what_is_recorded_of_a_training(seeded, recipe):
    (trained,) = seeded.train_units(recipe, only=["beta/2"])
    (run,) = seeded.model("beta/2")["runs"]
    assert {key: run[key] for key in ("role", "how", "steps", "tokens", "mixture")} == {
        "role": "unit", "how": "trained", "steps": 3, "tokens": 3 * PER_STEP, "mixture": "beta/2",
    }  # fmt: skip
    assert run["seed"] == digests(seeded)["base"]
    assert (run["seconds"], run["final_loss"]) == (trained.seconds, trained.final_loss)
    recipe_of_run = run["recipe"]
    assert recipe_of_run["settings"] == recipe.for_role("unit").as_record()
    assert [step for step, _ in recipe_of_run["curve"]] == [1, 2, 3]
    assert recipe_of_run["device"] == "cpu"
    units = seeded.sql(
        "SELECT unit, tokens, epochs FROM model_units WHERE model = ?", [trained.digest]
    ).rows
    digest = seeded.partition("beta")["units"][1]["digest"]
    ((unit, tokens, epochs),) = units
    assert (unit, tokens) == (digest, 3 * PER_STEP)
    assert 0 < epochs < 1
    (seed,) = seeded.model("base")["runs"]
    assert (seed["role"], seed["seed"], seed["tokens"]) == ("seed", None, 5 * PER_STEP)
    assert list((seeded.root / "tmp").iterdir()) == []


def test_budgets(seeded, recipe):
    same, single = seeded.train_references(["alpha+beta", "alpha"], recipe)
    sums, other = seeded.train_references(["alpha+beta", "2*alpha+beta"], recipe, budget="sum")
    macro, _ = seeded.train_references(
        ["alpha+beta", "alpha+beta"], recipe, budget="sum", scheme="macro"
    )
    assert (same.tokens, single.tokens) == (3 * PER_STEP, 3 * PER_STEP)
    assert (sums.tokens, other.tokens, macro.tokens) == (9 * PER_STEP,) * 3
    assert len({row.digest for row in (same, single, sums, other)}) == 4
    # The macro union of alpha and beta has the weights of the micro mixture 2*alpha+beta.
    assert macro.digest == other.digest
    rows = seeded.sql(
        "SELECT mixture, scheme, budget, steps, tokens FROM runs WHERE role = 'reference'"
        " ORDER BY ALL"
    ).rows
    assert set(rows) == {
        ("alpha", "micro", "same", 3, 48),
        ("alpha+beta", "micro", "same", 3, 48),
        ("alpha+beta", "micro", "sum", 9, 144),
        ("2*alpha+beta", "micro", "sum", 9, 144),
    }
    shares = dict(
        seeded.sql(
            "SELECT unit, tokens FROM model_units WHERE model = ?", [other.digest]
        ).rows
    )  # fmt: skip
    alpha = seeded.partition("alpha")["units"][0]["digest"]
    # By the largest remainder over 18 blocks of 8 tokens: 9, 4.5 and 4.5.
    assert shares.pop(alpha) == 72
    assert sorted(shares.values()) == [32, 40]
    with pytest.raises(UsageError, match="unknown budget 'most'"):
        seeded.train_references(["alpha"], recipe, budget="most")


def test_unions_know_their_units_tokens(seeded, tmp_path, recipe):
    seeded.train_units(recipe)
    more = recipe_of(tmp_path, ("[unit]\nsteps = 3", "[unit]\nsteps = 4"))
    seeded.train_units(more, only=["gamma"], again=True)
    seeded.evaluate(["alpha+beta", "beta+gamma", "beta/1", "gamma"], ["alpha"])
    rows = dict(seeded.sql("SELECT mixture, unit_tokens FROM mixtures").rows)
    unit = 3 * PER_STEP
    assert rows == {
        "alpha+beta": 3 * unit, "beta+gamma": 2 * unit + 4 * PER_STEP, "beta/1": unit,
        "gamma": 4 * PER_STEP,
    }  # fmt: skip
    ledger = seeded.sql("SELECT * FROM ledger").dicts()[0]
    trained = 5 * PER_STEP + 4 * unit + 4 * PER_STEP
    assert (ledger["models_trained"], ledger["tokens_trained"]) == (6, trained)
    # Only unions stand for a training that was not done.
    assert ledger["trainings_avoided"] == 2
    assert ledger["tokens_avoided"] == rows["alpha+beta"] + rows["beta+gamma"]


def test_references_answer_beside_their_proxy(seeded, recipe):
    seeded.train_units(recipe)
    seeded.train_references(["alpha+beta"], recipe)
    seeded.train_references(["alpha+beta"], recipe, budget="sum")
    (answer,) = seeded.ask("alpha+beta", ["gamma"])
    assert [r.budget for r in answer.references] == ["same", "sum"]
    assert len({answer.bits_per_byte, *(r.bits_per_byte for r in answer.references)}) == 3
    pairs = seeded.sql("SELECT mixture, budget, evalset FROM proxy_pairs ORDER BY ALL").rows
    assert pairs == [("alpha+beta", "same", "gamma"), ("alpha+beta", "sum", "gamma")]


# -- names, seeds, tokenizers ---------------------------------------------------------------


def test_a_seed_takes_the_name_that_is_asked_for(seeded, tmp_path, recipe, no_training):
    base = digests(seeded)["base"]
    other = recipe_of(tmp_path, ("lr = 1e-2", "lr = 2e-2"))
    with pytest.raises(Conflict, match="'base' is taken"):
        seeded.train_seed(other)
    with pytest.raises(Conflict, match="names a partition"):
        seeded.train_seed(other, name="alpha")
    no_training()
    trained = seeded.train_seed(recipe, name="second")
    assert (trained.digest, trained.new) == (base, False)
    assert seeded.resolve("second").digest == seeded.resolve("base").digest == base


def test_a_seed_is_replaced_when_told(seeded, tmp_path):
    base = digests(seeded)["base"]
    other = recipe_of(tmp_path, ("lr = 1e-2", "lr = 2e-2"))
    trained = seeded.train_seed(other, replace=True)
    assert trained.digest == seeded.resolve("base").digest != base


def test_which_seed(seeded, tmp_path, recipe):
    other = recipe_of(tmp_path, ("lr = 1e-2", "lr = 2e-2"))
    second = seeded.train_seed(other, name="second", on="beta")
    with pytest.raises(UsageError, match=r"several seeds: base, second\n.*--from"):
        seeded.train_units(recipe)
    (unit,) = seeded.train_units(recipe, only="alpha", seed="second")
    assert seeded.model(unit.digest)["runs"][0]["seed"] == second.digest
    with pytest.raises(UsageError, match="is not a seed model"):
        one_seed(seeded.registry, unit.digest)
    (run,) = seeded.model("second")["runs"]
    assert run["mixture"] == "beta"


def test_a_given_tokenizer(empty, tmp_path):
    folder = pools.tokenizer_folder(tmp_path / "bpe")
    recipe = recipe_of(tmp_path, ("vocab_size = 300", 'folder = "bpe"'))
    first = empty.train_seed(recipe, name="first")
    assert empty.model("first")["vocab_size"] == pools.VOCABULARY - 3
    assert not empty.train_seed(recipe, name="first").new
    # Another tokenizer in its place is another seed.
    pools.tokenizer_folder(folder, ["t h", "th e"])
    second = empty.train_seed(recipe, name="second")
    assert second.new
    assert second.digest != first.digest
    with pytest.raises(NotFound, match="no tokenizer in"):
        empty.train_seed(recipe_of(tmp_path, ("vocab_size = 300", 'folder = "absent"')), name="x")


# -- what is refused ------------------------------------------------------------------------


def test_drifted_text_is_refused_and_nothing_recorded(tmp_path, recipe):
    texts = pools.write_texts(tmp_path / "texts", list(COUNTS), lines=30)
    with data_pool(tmp_path / "pool", texts) as pool:
        pool.train_seed(recipe)
        before = pools.contents(pool.root)
        path = texts / "beta.train.jsonl"
        whole = path.read_text()
        path.write_text(whole + '{"text": "more"}\n')
        with pytest.raises(Drift, match=r"beta\.train\.jsonl") as caught:
            pool.train_units(recipe, only=["beta"])
        assert caught.value.exit_code == 3
        with pytest.raises(Drift):
            pool.train_references(["alpha+beta"], recipe)
        path.unlink()
        with pytest.raises(Drift):
            pool.train_units(recipe, only=["beta/1"])
        assert pools.contents(pool.root) == before
        assert len(pool.train_units(recipe, only=["alpha"])) == 1
        path.write_text(whole)
        assert len(pool.train_units(recipe, only=["beta"])) == 2


@pytest.mark.parametrize(
    ("only", "words"),
    [
        (["nobody"], "no partition is named nobody"),
        (["beta/3"], "beta/3 does not exist"),
        (["alpha", "beta +"], "not a mixture"),
    ],
)
def test_units_that_are_none(only, words, seeded, recipe):
    before = pools.contents(seeded.root)
    with pytest.raises((NotFound, UsageError), match=words):
        seeded.train_units(recipe, only=only)
    assert pools.contents(seeded.root) == before


def test_pools_that_lack_something(tmp_path, empty, recipe):
    with pytest.raises(NotFound, match=r"no seed model yet\n.*poolreg train seed"):
        empty.train_units(recipe)
    with Pool.create(tmp_path / "bare") as bare:
        with pytest.raises(UsageError):
            bare.train_seed(recipe)
        bare.add_model(pools.model_folder(tmp_path / "m"), name="base", role="seed")
        with pytest.raises(NotFound, match="no partitions yet"):
            bare.train_units(recipe)


def test_too_little_text_and_too_long_a_context(seeded, tmp_path):
    before = pools.contents(seeded.root)
    long = recipe_of(tmp_path, ("context = 8", "context = 100000"))
    with pytest.raises(UsageError, match="too few for one block of 100000"):
        seeded.train_units(long, only="alpha")
    more = recipe_of(tmp_path, ("context = 8", "context = 9"))
    with pytest.raises(UsageError, match="9 tokens is longer than the model's 8"):
        seeded.train_units(more, only="alpha")
    assert pools.contents(seeded.root) == before


def test_a_training_that_another_process_does(seeded, recipe):
    (job,) = unit_jobs(seeded.registry, recipe, only=["alpha"])
    place = seeded.root / "tmp" / f"train-{job.key[:32]}"
    place.mkdir()
    with lock(place / "lock"), pytest.raises(Locked, match="the training of alpha/1"):
        seeded.train_units(recipe, only="alpha")
    assert len(seeded.train_units(recipe, only="alpha")) == 1


# -- interrupted ----------------------------------------------------------------------------


class Steps:
    """Counts steps, and stops like Ctrl-C after `limit` of them."""

    def __init__(self, limit: float = float("inf")) -> None:
        self.total = self.done = self.calls = 0
        self.limit = limit

    def start(self, what: str, total: int, unit: str) -> None:
        assert (what, unit) == ("training", "steps")
        self.total = total

    def advance(self, amount: int) -> None:
        self.done += amount
        self.calls += 1

    def note(self, text: str) -> None:
        assert "loss" in text
        if self.calls >= self.limit:
            raise KeyboardInterrupt


def test_interrupted_and_resumed(seeded, ready, tmp_path, recipe, monkeypatch):
    monkeypatch.setattr(training, "Resume", functools.partial(training.Resume, every=0.0))
    before = pools.contents(seeded.root)
    with pytest.raises(KeyboardInterrupt):
        seeded.train_references(["alpha+beta"], recipe, budget="sum", progress=Steps(6))
    assert pools.contents(seeded.root) == before
    (place,) = (seeded.root / "tmp").iterdir()
    assert (place / training.CHECKPOINT).exists()
    # A half-written model of a killed attempt is in nobody's way.
    (place / "model").mkdir()
    (place / "model" / "config.json").write_text("{")
    steps = Steps()
    (resumed,) = seeded.train_references(["alpha+beta"], recipe, budget="sum", progress=steps)
    assert (steps.total, steps.done, steps.calls) == (9, 9, 4)  # five steps were not done again
    with Pool.open(shutil.copytree(ready, tmp_path / "whole")) as pool:
        (whole,) = pool.train_references(["alpha+beta"], recipe, budget="sum")
    assert resumed.digest == whole.digest
    assert resumed.tokens == whole.tokens
    assert list((seeded.root / "tmp").iterdir()) == []


TRAIN = """
import functools, sys
from pathlib import Path
from poolreg import Pool
from poolreg.training import loop as training
from poolreg.training.recipe import load_recipe

training.Resume = functools.partial(training.Resume, every=0.0)
with Pool.open(sys.argv[1]) as pool:
    pool.train_seed(load_recipe(Path(sys.argv[2])))
"""


@pytest.mark.campaign
@pytest.mark.slow
def test_killed_and_resumed(empty, texts, tmp_path):
    recipe = recipe_of(tmp_path, ("steps = 5", "steps = 400"))
    empty.close()
    command = [sys.executable, "-c", TRAIN, str(empty.root), str(tmp_path / "recipe.toml")]
    child = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while not list((empty.root / "tmp").glob(f"train-*/{training.CHECKPOINT}")):
        assert child.poll() is None, child.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.002)
    time.sleep(0.05)
    os.kill(child.pid, signal.SIGKILL)
    child.communicate()
    assert child.returncode == -signal.SIGKILL
    assert empty.models() == []
    steps = Steps()
    resumed = empty.train_seed(recipe, progress=steps)
    assert steps.done == 400
    assert 1 <= steps.calls < 400
    with data_pool(tmp_path / "whole", texts) as pool:
        whole = pool.train_seed(recipe)
        assert resumed.digest == whole.digest
        assert resumed.final_loss == whole.final_loss
        curves = [p.model("base")["runs"][0]["recipe"]["curve"] for p in (pool, empty)]
        assert curves[0] == curves[1]


# -- several processes ----------------------------------------------------------------------


@pytest.mark.campaign
@pytest.mark.slow
def test_two_workers_train_the_same(seeded, ready, tmp_path, recipe):
    steps = Steps()
    shared = seeded.train_units(recipe, workers=2, progress=steps)
    with Pool.open(shutil.copytree(ready, tmp_path / "one")) as pool:
        alone = pool.train_units(recipe)
    assert [(row.label, row.digest) for row in shared] == [(row.label, row.digest) for row in alone]
    assert (steps.total, steps.done) == (4 * 3, 4 * 3)
    assert len(seeded.resolve("all").components) == 4


def test_a_plan_names_what_it_would_train(seeded, recipe):
    jobs = unit_jobs(seeded.registry, recipe, only=["beta"])
    assert [(job.role, job.label, job.settings.steps) for job in jobs] == [
        ("unit", "beta/1", 3), ("unit", "beta/2", 3),
    ]  # fmt: skip
    assert len({job.key for job in jobs}) == 2
    seed = seed_job(seeded.registry, recipe, name="base")
    assert (seed.mixture, seed.seed, len(seed.texts)) == ("alpha+beta+gamma", None, 4)
