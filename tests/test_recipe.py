"""Recipes: layering, defaults, and one clear error for each mistake."""

from __future__ import annotations

import dataclasses
import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from poolreg.canonical import canonical_json
from poolreg.errors import ConfigError
from poolreg.training.recipe import (
    DEFAULT_RECIPE,
    Hyperparameters,
    TrainingRecipe,
    default_recipe,
    load_recipe,
    nearest,
)


@pytest.fixture
def load(tmp_path):
    def write(text: str) -> TrainingRecipe:
        path = tmp_path / "recipe.toml"
        path.write_text(text)
        return load_recipe(path)

    return write


def test_default_is_the_small_llama_and_the_file_says_the_same(load):
    recipe = default_recipe()
    seed, unit = recipe.for_role("seed"), recipe.for_role("unit")
    assert recipe.model["model_type"] == "llama"
    assert recipe.tokenizer.vocab_size == 1024
    assert (seed.context, seed.batch, seed.steps, seed.lr) == (64, 8, 600, 3e-3)
    assert (unit.steps, unit.lr, unit.schedule) == (80, 5e-4, "constant")
    assert seed == Hyperparameters()  # the text and the dataclass state one default
    assert load(DEFAULT_RECIPE) == load("") == recipe


def test_a_file_states_only_what_differs(load):
    recipe = load("[training]\nlr = 1e-3\ncontext = 32\n[unit]\nsteps = 7\n[reference]\nbatch = 2")
    seed, unit, reference = (recipe.for_role(role) for role in ("seed", "unit", "reference"))
    assert seed == Hyperparameters(lr=1e-3, context=32)
    # The file's [training] stands above the default's [unit], the file's [unit] above both.
    assert unit == Hyperparameters(lr=1e-3, context=32, steps=7)
    assert reference == dataclasses.replace(unit, batch=2)


def test_whole_numbers_serve_as_numbers(load):
    unit = load("[unit]\nlr = 1\nclip = 0\nbetas = [0, 0.5]").for_role("unit")
    assert (unit.lr, unit.clip, unit.betas) == (1.0, 0.0, (0.0, 0.5))
    assert type(unit.lr) is type(unit.clip) is type(unit.betas[0]) is float


@given(tokens=st.integers(1, 10**6), batch=st.integers(1, 64), context=st.integers(1, 512))
def test_tokens_become_the_fewest_steps_that_reach_them(tmp_path_factory, tokens, batch, context):
    path = tmp_path_factory.getbasetemp() / "tokens.toml"
    path.write_text(f"[training]\ntokens = {tokens}\n[unit]\nbatch = {batch}\ncontext = {context}")
    unit = load_recipe(path).for_role("unit")
    assert unit.tokens >= tokens > unit.tokens - batch * context
    assert unit.steps == math.ceil(tokens / (batch * context))


def test_steps_and_tokens_replace_each_other_over_tables(load):
    recipe = load("[training]\ntokens = 5120\n[unit]\nsteps = 3\n[reference]\ntokens = 1024")
    assert [recipe.for_role(role).steps for role in ("seed", "unit", "reference")] == [10, 3, 2]


def test_model_is_passed_through_and_replaces_the_default(load):
    recipe = load('[model]\nmodel_type = "gpt2"\nn_embd = 32\nrope = { a = [1, 2] }')
    assert recipe.model == {"model_type": "gpt2", "n_embd": 32, "rope": {"a": [1, 2]}}


def test_tokenizer_folder_is_relative_to_the_file(load, tmp_path):
    assert load('[tokenizer]\nfolder = "tok"').tokenizer.folder == tmp_path / "tok"
    assert load('[tokenizer]\nfolder = "/a/b"').tokenizer.folder == Path("/a/b")
    assert load('[tokenizer]\nfolder = "tok"').tokenizer.vocab_size is None


def test_records_are_json(load):
    recipe = load("[unit]\nbetas = [0.8, 0.9]")
    record = json.loads(canonical_json(recipe.as_record()))
    assert record["roles"]["unit"] == recipe.for_role("unit").as_record()
    assert record["roles"]["unit"]["betas"] == [0.8, 0.9]
    assert record["tokenizer"] == {"vocab_size": 1024}
    assert load('[tokenizer]\nfolder = "/t"').as_record()["tokenizer"] == {"folder": "/t"}
    assert {field.name for field in dataclasses.fields(Hyperparameters)} == record["roles"][
        "seed"
    ].keys()


MISTAKES = {  # recipe: what the message must say, what the hint must say
    "[unit]\nlearing = 1": ("[unit] has no key learing", "valid here: batch"),
    "[unit]\nbatsh = 1": ("[unit] has no key batsh", "did you mean batch?"),
    "[units]\nlr = 1": ("no table [units]", "did you mean unit?"),
    "steps = 5": ("no table [steps]", "valid here"),
    "unit = 5": ("unit must be a table", ""),
    "[unit]\nbatch = 0": ("[unit] batch must be a whole number of at least 1, not 0", ""),
    "[unit]\nbatch = -3": ("[unit] batch must be", ""),
    "[unit]\nbatch = 8.0": ("[unit] batch must be", ""),
    "[unit]\nbatch = true": ("[unit] batch must be", ""),
    '[unit]\nbatch = "8"': ("[unit] batch must be a whole number of at least 1, not '8'", ""),
    "[unit]\ncontext = 0": ("[unit] context must be", ""),
    "[unit]\nsteps = 0": ("[unit] steps must be", ""),
    "[unit]\ntokens = 0": ("[unit] tokens must be", ""),
    f"[unit]\nsteps = {2**60}": ("[unit] steps must be", ""),
    "[seed]\nlr = 0": ("[seed] lr must be a number above 0", ""),
    "[seed]\nlr = nan": ("[seed] lr must be", ""),
    "[seed]\nlr = inf": ("[seed] lr must be", ""),
    f"[seed]\nlr = 1{'0' * 400}": ("[seed] lr must be", ""),
    "[seed]\nlr = true": ("[seed] lr must be", ""),
    "[seed]\nclip = -1": ("[seed] clip must be", ""),
    "[seed]\nweight_decay = -0.1": ("[seed] weight_decay must be", ""),
    "[seed]\nseed = -1": ("[seed] seed must be", ""),
    "[seed]\nbetas = [0.9]": ("[seed] betas must be two numbers", ""),
    "[seed]\nbetas = [0.9, 1.0]": ("[seed] betas must be two numbers", ""),
    "[seed]\nbetas = 0.9": ("[seed] betas must be two numbers", ""),
    '[seed]\nschedule = "step"': ('must be one of "constant", "cosine", "linear"', ""),
    '[seed]\ndtype = "int8"': ("[seed] dtype must be one of", ""),
    "[training]\nsteps = 5\ntokens = 5": ("[training] gives both steps and tokens", "keep one"),
    "[unit]\nwarmup = 80": ("a warmup of 80 steps does not fit into 80 steps", "warmup"),
    "[model]\nhidden_size = 4": ("[model] needs a model_type", "llama"),
    '[model]\nmodel_type = "llama"\nday = 2020-01-01': ("[model] day cannot be stored", ""),
    '[model]\nmodel_type = "llama"\neps = nan': ("[model] eps cannot be stored", ""),
    "[tokenizer]": ("[tokenizer] is empty", "vocab_size or folder"),
    "[tokenizer]\nvocab_size = 256": ("[tokenizer] vocab_size must be", ""),
    '[tokenizer]\nfolder = ""': ("[tokenizer] folder must be a text", ""),
    '[tokenizer]\nfolder = "a"\nvocab_size = 300': ("gives both vocab_size and folder", ""),
    "[unit": ("is not TOML", ""),
    f"[unit]\nlr = {'[' * 1900}": ("is not TOML", ""),
    f"[unit]\nlr = {'1' * 1900}": ("[unit] lr must be", ""),
    f"[unit]\nlr = {'1' * 5000}": ("has a line of more than", "break long arrays"),
    f"[model]\n{'a.' * 5000}a = 1": ("has a line of more than", ""),  # its memory was all there is
    f"[{'x' * 1900}]": ("no table [xxx", "valid here"),
    '["\\u001b[2J"]': ("no table ['\\x1b[2J']", ""),
    "[tokenizer]\nfolder = '~nobody here'": ("a home folder that is not there: ~nobody", ""),
    "[unit]\nlr = 1\nlr = 2": ("is not TOML", ""),
}


@pytest.mark.parametrize("text", MISTAKES, ids=lambda text: text[:30])
def test_each_mistake_is_named_with_the_file(load, text):
    message, hint = MISTAKES[text]
    with pytest.raises(ConfigError) as caught:
        load(text)
    assert message in caught.value.message
    assert "recipe.toml" in caught.value.message
    assert len(caught.value.message) < 400
    assert hint in caught.value.hint
    assert caught.value.exit_code == 2


def test_the_error_carries_table_and_key(load):
    with pytest.raises(ConfigError) as caught:
        load("[reference]\nbatsh = 1")
    assert caught.value.data["table"] == "reference"
    assert caught.value.data["key"] == "batsh"


def test_files_that_are_no_recipe(tmp_path):
    with pytest.raises(ConfigError, match="not a regular file"):
        load_recipe(tmp_path / "absent.toml")
    (tmp_path / "latin.toml").write_bytes(b"# caf\xe9")
    with pytest.raises(ConfigError, match="not UTF-8"):
        load_recipe(tmp_path / "latin.toml")
    (tmp_path / "big.toml").write_bytes(b"#" * ((1 << 20) + 1))
    with pytest.raises(ConfigError, match="larger than"):
        load_recipe(tmp_path / "big.toml")


def test_nearest_lists_all_when_nothing_is_near():
    assert nearest("zzz", {"b", "a"}) == "valid here: a, b"
    assert nearest("aa", {"b", "a"}).startswith("did you mean a? ")


def test_recipes_need_no_torch():
    code = "import sys, poolreg.training.recipe as r; r.default_recipe(); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
