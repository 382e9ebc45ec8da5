"""Training recipes: a small TOML file that says how seeds, units and references are trained.

A recipe states only what differs from `DEFAULT_RECIPE`. For one role the settings are layered:
the default's `[training]` and role table, then the file's `[training]`, then the file's role
table. A reference is layered on the unit's settings, because it has to be trained as the units
were for a merge of units to stand in for it. `[model]` and `[tokenizer]` replace the default's
as a whole. Every mistake is a `ConfigError` that names the table and the key. No torch here.
"""

from __future__ import annotations

import difflib
import reprlib
import tomllib
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from poolreg.canonical import canonical_json
from poolreg.errors import ConfigError, Refused
from poolreg.files import read_capped

Role = Literal["seed", "unit", "reference"]

MAX_RECIPE = 64 << 10  # bytes; the default recipe has 1,400
MAX_LINE = 2000  # bytes; for a key of n dots tomllib takes memory in proportion to n squared

DEFAULT_RECIPE = """\
# A Llama of 0.17 million parameters that trains in seconds on a CPU.
[model]                    # any causal model type of transformers, with its sizes
model_type = "llama"
hidden_size = 64
intermediate_size = 192
num_hidden_layers = 2
num_attention_heads = 4
num_key_value_heads = 4
tie_word_embeddings = true

[tokenizer]                # vocab_size trains one on the seed's text; or: folder = "path"
vocab_size = 1024

[training]                 # for every role
context = 64               # tokens predicted per block of text
batch = 8                  # blocks per step
steps = 600                # or: tokens = 307200
lr = 3e-3
schedule = "constant"      # constant, cosine or linear (both end at 0), after the warmup
warmup = 0                 # steps in which the learning rate rises from 0
weight_decay = 0.01        # on matrices only
clip = 1.0                 # largest norm of the gradient; 0 does not clip
betas = [0.9, 0.95]
seed = 0                   # of the initial weights, the order of the data and dropout
dtype = "float32"          # of the saved weights; training itself is in float32

[unit]                     # [seed], [unit] and [reference] take any key of [training];
steps = 80                 # a reference has the unit's settings unless it says otherwise
lr = 5e-4
"""


@dataclass(frozen=True)
class _Rule:
    """What a value must be, in words, and the function that returns it clean (None refuses)."""

    words: str
    clean: Callable[[Any], Any]


def _number(value: Any, low: float, high: float = 1e30) -> float | None:
    if type(value) not in (int, float) or not low <= value < high:
        return None  # NaN, infinity and whole numbers beyond float end here too
    return float(value)


def _pair(value: Any) -> tuple[Any, ...] | None:
    if type(value) is not list or len(value) != 2:
        return None
    betas = tuple(_number(item, 0.0, 1.0) for item in value)
    return None if None in betas else betas


def _at_least(low: int) -> _Rule:
    # Databases and JSON readers hold whole numbers exactly up to 2**53.
    words = f"a whole number of at least {low}"
    return _Rule(
        words, lambda value: value if type(value) is int and low <= value < 2**53 else None
    )


def _one_of(*names: str) -> _Rule:
    words = "one of " + ", ".join(f'"{name}"' for name in names)
    return _Rule(words, lambda value: value if type(value) is str and value in names else None)


_POSITIVE = _at_least(1)
_NOT_NEGATIVE = _Rule("a number of at least 0", lambda value: _number(value, 0.0))
_TINY = 1e-30  # a learning rate of zero would train nothing without a word
_ABOVE_ZERO = _Rule("a number above 0", lambda value: _number(value, _TINY))
_BETAS = _Rule("two numbers of at least 0 and below 1", _pair)
_TEXT = _Rule(
    "a text that is not empty", lambda value: value if type(value) is str and value else None
)


def _key(default: Any, rule: _Rule) -> Any:
    return field(default=default, metadata={"rule": rule})


@dataclass(frozen=True)
class Hyperparameters:
    """How one model is trained; a step predicts `batch * context` tokens."""

    context: int = _key(64, _POSITIVE)
    batch: int = _key(8, _POSITIVE)
    steps: int = _key(600, _POSITIVE)
    lr: float = _key(3e-3, _ABOVE_ZERO)
    schedule: str = _key("constant", _one_of("constant", "cosine", "linear"))
    warmup: int = _key(0, _at_least(0))
    weight_decay: float = _key(0.01, _NOT_NEGATIVE)
    clip: float = _key(1.0, _NOT_NEGATIVE)
    betas: tuple[float, float] = _key((0.9, 0.95), _BETAS)
    seed: int = _key(0, _at_least(0))
    dtype: str = _key("float32", _one_of("float32", "bfloat16", "float16"))

    @property
    def tokens(self) -> int:
        """Tokens predicted in the whole training."""
        return self.steps * self.batch * self.context

    def as_record(self) -> dict[str, Any]:
        """Return the settings as JSON values, for a record or a digest."""
        values = {item.name: getattr(self, item.name) for item in fields(self)}
        return {**values, "betas": list(self.betas)}


@dataclass(frozen=True)
class TokenizerRecipe:
    """Where the tokenizer comes from: exactly one of the two is set."""

    vocab_size: int | None = None  # train a byte-level BPE of at most this many tokens
    folder: Path | None = None  # take this Hugging Face tokenizer folder as it is


@dataclass(frozen=True)
class TrainingRecipe:
    """A checked recipe: the model's settings, the tokenizer and the settings of each role."""

    model: Mapping[str, Any]
    tokenizer: TokenizerRecipe
    roles: Mapping[Role, Hyperparameters]

    def for_role(self, role: Role) -> Hyperparameters:
        """Return how models of this role are trained."""
        return self.roles[role]

    def as_record(self) -> dict[str, Any]:
        """Return the recipe as JSON values (a tokenizer folder as its path)."""
        folder, size = self.tokenizer.folder, self.tokenizer.vocab_size
        return {
            "model": dict(self.model),
            "tokenizer": {"folder": str(folder)} if folder else {"vocab_size": size},
            "roles": {role: settings.as_record() for role, settings in self.roles.items()},
        }


_TABLES = ("model", "tokenizer", "training", "seed", "unit", "reference")
# `tokens` is another way to say `steps`; it is gone once a role is known.
_TRAINING: dict[str, _Rule] = {
    **{item.name: item.metadata["rule"] for item in fields(Hyperparameters)},
    "tokens": _POSITIVE,
}
_TOKENIZER: dict[str, _Rule] = {
    "vocab_size": _at_least(257),  # the 256 bytes and the end of a document
    "folder": _TEXT,
}


def default_recipe() -> TrainingRecipe:
    """Return the recipe of `DEFAULT_RECIPE`."""
    return _recipe({}, Path())


def load_recipe(path: Path) -> TrainingRecipe:
    """Read a recipe file; a relative tokenizer folder is relative to the file.

    Raises `ConfigError` for a file that cannot be read or is not TOML, and for every unknown
    table or key, wrong type or impossible value in it.
    """
    data = read_capped(path, MAX_RECIPE, error=ConfigError, what="the recipe")
    if max(map(len, data.split(b"\n"))) > MAX_LINE:
        message = f"the recipe {path} has a line of more than {MAX_LINE} bytes"
        raise ConfigError(message, hint="break long arrays into lines", path=str(path))
    try:
        tables = tomllib.loads(data.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise ConfigError(f"the recipe {path} is not UTF-8 text", path=str(path)) from error
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"the recipe {path} is not TOML: {error}", path=str(path)) from error
    try:
        return _recipe(tables, path.parent)
    except ConfigError as error:
        message = f"recipe {path}: {error.message}"
        raise ConfigError(message, hint=error.hint, path=str(path), **error.data) from None


def nearest(word: str, valid: Collection[str]) -> str:
    """Return the hint for a word that is not among the valid ones, naming the nearest."""
    close = difflib.get_close_matches(word, sorted(valid), n=1, cutoff=0.5)
    meant = f"did you mean {close[0]}? " if close else ""
    return f"{meant}valid here: {', '.join(sorted(valid))}"


def _shown(word: str) -> str:
    return (word if word.isprintable() else repr(word))[:100]


def _recipe(tables: Mapping[str, Any], folder: Path) -> TrainingRecipe:
    for name, table in tables.items():
        if name not in _TABLES:
            hint = nearest(name, _TABLES)
            raise ConfigError(f"there is no table [{_shown(name)}]", hint=hint, table=name)
        if not isinstance(table, dict):
            raise ConfigError(f"{name} must be a table: [{name}]", table=name)
    default = tomllib.loads(DEFAULT_RECIPE)
    model = tables.get("model", default["model"])
    _check_model(model)
    tokenizer = _read("tokenizer", tables.get("tokenizer", default["tokenizer"]), _TOKENIZER)
    _one_of_two("tokenizer", tokenizer, "vocab_size", "folder")
    if "folder" in tokenizer:
        tokenizer["folder"] = folder / _expanded(tokenizer["folder"])
    elif not tokenizer:
        raise ConfigError("[tokenizer] is empty", hint="give vocab_size or folder")
    return TrainingRecipe(model, TokenizerRecipe(**tokenizer), _roles(default, tables))


def _expanded(text: str) -> Path:
    try:
        return Path(text).expanduser()
    except RuntimeError as error:  # ~name, where nobody has that name
        words = f"[tokenizer] folder is in a home folder that is not there: {_shown(text)}"
        raise ConfigError(words, table="tokenizer", key="folder") from error


def _roles(default: Mapping[str, Any], given: Mapping[str, Any]) -> dict[Role, Hyperparameters]:
    def settings(role: Role, *names: str) -> Hyperparameters:
        merged: dict[str, Any] = {}
        for tables in (default, given):
            for name in names:
                table = _read(name, tables.get(name, {}), _TRAINING)
                _one_of_two(name, table, "steps", "tokens")
                if {"steps", "tokens"} & table.keys():
                    merged.pop("steps", None)
                    merged.pop("tokens", None)
                merged.update(table)
        tokens = merged.pop("tokens", None)
        ready = Hyperparameters(**merged)
        if tokens is not None:
            steps = -(-tokens // (ready.batch * ready.context))
            ready = Hyperparameters(**merged, steps=steps)
        if ready.warmup >= ready.steps:
            words = f"a warmup of {ready.warmup} steps does not fit into {ready.steps} steps"
            hint = f"set warmup below steps in [training] or [{role}]"
            raise ConfigError(f"[{role}] {words}", hint=hint, table=role, key="warmup")
        return ready

    return {
        "seed": settings("seed", "training", "seed"),
        "unit": settings("unit", "training", "unit"),
        "reference": settings("reference", "training", "unit", "reference"),
    }


def _read(name: str, table: Mapping[str, Any], rules: Mapping[str, _Rule]) -> dict[str, Any]:
    clean = {}
    for key, value in table.items():
        if key not in rules:
            hint = nearest(key, rules)
            raise ConfigError(f"[{name}] has no key {_shown(key)}", hint=hint, table=name, key=key)
        clean[key] = rules[key].clean(value)
        if clean[key] is None:
            words = f"[{name}] {key} must be {rules[key].words}, not {reprlib.repr(value)}"
            raise ConfigError(words, table=name, key=key)
    return clean


def _one_of_two(name: str, table: Mapping[str, Any], first: str, second: str) -> None:
    if first in table and second in table:
        words = f"[{name}] gives both {first} and {second}"
        raise ConfigError(words, hint="keep one of them", table=name, key=second)


def _check_model(model: Mapping[str, Any]) -> None:
    # The keys belong to transformers, which checks them when the model is built.
    if not isinstance(model.get("model_type"), str):
        hint = 'for instance model_type = "llama"'
        raise ConfigError("[model] needs a model_type", hint=hint, table="model", key="model_type")
    for key, value in model.items():
        try:
            canonical_json(value)
        except Refused as error:
            words = (
                f"[model] {_shown(key)} cannot be stored in a model's config: {reprlib.repr(value)}"
            )
            raise ConfigError(words, table="model", key=key) from error
