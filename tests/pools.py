"""Tiny pools of real parts, made in seconds without training.

A tokenizer written out by hand, two-layer models with random weights from numpy's frozen
generator, unit models that are the seed plus small noise, and partitions of repeated lines.
"""

from __future__ import annotations

import functools
import itertools
import json
import math
import os
import shutil
import signal
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from poolreg import Pool
from poolreg.errors import PoolregError, Refused
from poolreg.store import records
from poolreg.tensors import NUMPY_DTYPES, plan_shards, read_array, read_header, write_file

CONTEXT = 16
VOCABULARY = 272
MERGES = ["t h", "th e", "i n", "a n", "e r", "Ġ the", "an d", "Ġ and", "Ġ in", "o n", "Ġ c"]

_LLAMA_LIKE = {
    "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": CONTEXT,
}  # fmt: skip
_SIZES = {
    "llama": _LLAMA_LIKE,
    "mistral": _LLAMA_LIKE,
    "qwen2": _LLAMA_LIKE,
    "gpt2": {"n_embd": 16, "n_layer": 2, "n_head": 4, "n_positions": CONTEXT},
    "opt": {
        "hidden_size": 16, "ffn_dim": 24, "num_hidden_layers": 2, "num_attention_heads": 4,
        "word_embed_proj_dim": 16, "max_position_embeddings": CONTEXT,
    },
    "gpt_neox": {
        "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
        "num_attention_heads": 4, "max_position_embeddings": CONTEXT,
    },
    # Its experts are one tensor each on disk and joined in memory.
    "mixtral": {**_LLAMA_LIKE, "num_local_experts": 2, "num_experts_per_tok": 1},
}  # fmt: skip

# What the partitions are about; each line is a document of the evalset of that name, too.
LINES = {
    "alpha": "the cat and the hat in the rain",
    "beta": "def f(x): return [x for y in range(10)]",
    "gamma": "1 plus 1 is 2 and 2 plus 2 is 4",
    "delta": "Xylophone! Quick? JUMPS: over, lazy; dogs.",
    "epsilon": "<p class='c'>the end of the page</p>",
    "zeta": "naïve café, 東京 and more",
    "python": "def f(x): return [x for y in range(10)]",
    "web": "<p class='c'>the end of the page</p>",
    "prose": "the cat and the hat in the rain",
    "code": "int main() { return 1 + 2; } // the end",
}


# -- folders --------------------------------------------------------------------------------


def tokenizer_folder(folder: Path, merges: list[str] | None = None) -> Path:
    """Write a byte-level BPE tokenizer with a beginning and an end of text."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    merges = MERGES if merges is None else merges
    symbols = ["<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    symbols += [merge.replace(" ", "") for merge in merges]
    pairs = [tuple(merge.split()) for merge in merges]
    bpe = Tokenizer(models.BPE({symbol: i for i, symbol in enumerate(symbols)}, pairs))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made = PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token="<s>", eos_token="</s>")
    made.save_pretrained(folder)
    return folder


@functools.cache
def _tokenizer_files() -> dict[str, bytes]:
    with tempfile.TemporaryDirectory() as folder:
        return {path.name: path.read_bytes() for path in tokenizer_folder(Path(folder)).iterdir()}


@functools.cache
def _model_files(family: str, tied: bool, dtype: str, seed: int) -> dict[str, bytes]:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from poolreg.models.loading import quiet_transformers

    config = AutoConfig.for_model(
        family, vocab_size=VOCABULARY, bos_token_id=0, eos_token_id=1, pad_token_id=1,
        tie_word_embeddings=tied, **_SIZES[family],
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    random = np.random.RandomState(seed)
    with torch.no_grad():
        for name, weight in sorted(model.named_parameters()):
            values = 0.3 * random.standard_normal(tuple(weight.shape))
            is_norm = weight.ndim == 1 and name.endswith("weight")
            weight.copy_(torch.from_numpy(values + 1.0 if is_norm else values))
    with tempfile.TemporaryDirectory() as folder, quiet_transformers():
        model.to(getattr(torch, dtype)).save_pretrained(folder)
        return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


def model_folder(
    folder: Path, family: str = "llama", *, tied: bool = False, dtype: str = "float32",
    seed: int = 0, tokenizer: bool = True,
) -> Path:  # fmt: skip
    """Write a model with random weights, as `save_pretrained` does, with the tokenizer."""
    files = dict(_model_files(family, tied, dtype, seed))
    if tokenizer:
        files |= _tokenizer_files()
    folder.mkdir(parents=True)
    for name, data in files.items():
        (folder / name).write_bytes(data)
    return folder


# -- models that can be compressed ----------------------------------------------------------

_WIDER = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
    "max_position_embeddings": 32,
}  # fmt: skip
_WIDER_LLAMA = {**_WIDER, "intermediate_size": 48, "num_key_value_heads": 2, "head_dim": 8}
_WIDER_GEMMA = {
    **_WIDER_LLAMA, "sliding_window": 8, "query_pre_attn_scalar": 5,
    "layer_types": ["sliding_attention", "full_attention"],
}  # fmt: skip
COMPRESSIBLE = {
    "llama": {**_WIDER_LLAMA, "tie_word_embeddings": True},
    "mistral": {**_WIDER_LLAMA, "sliding_window": 8},
    "qwen2": {name: size for name, size in _WIDER_LLAMA.items() if name != "head_dim"},
    "qwen3": _WIDER_LLAMA,
    "olmo2": _WIDER_LLAMA,
    "gemma": _WIDER_LLAMA,
    "gemma2": _WIDER_GEMMA,
    "gemma3_text": _WIDER_GEMMA,
    "opt": {**_WIDER, "ffn_dim": 48, "word_embed_proj_dim": 32},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 32, "n_inner": 48},
    "gpt_neox": {**_WIDER, "intermediate_size": 48, "rotary_pct": 0.5},
}  # fmt: skip


def random_model(family: str, *, seed: int = 0, **sizes: Any) -> Any:
    """Return a model of two layers with random weights, biases and norms."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(
        family, vocab_size=VOCABULARY, bos_token_id=0, eos_token_id=1, pad_token_id=1,
        **{**COMPRESSIBLE.get(family, {}), **sizes},
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    random = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in sorted(model.named_parameters()):
            is_norm = weight.ndim == 1 and name.endswith("weight")
            noise = torch.randn(weight.shape, generator=random)
            weight.copy_(0.25 * noise + (1.0 if is_norm else 0.0))
    return model.eval()


def saved(model: Any, folder: Path, dtype: str = "float32", *, tokenizer: bool = True) -> Path:
    """Write a model as `save_pretrained` does, with the tokenizer."""
    import torch

    from poolreg.models.loading import quiet_transformers

    with quiet_transformers():
        model.to(getattr(torch, dtype)).save_pretrained(folder)
    if tokenizer:
        for name, data in _tokenizer_files().items():
            (folder / name).write_bytes(data)
    return folder


def write_prose(path: Path, documents: int, seed: int = 0) -> Path:
    """Write JSON lines of made-up words, documents of 2 to 40 of them."""
    random = np.random.RandomState(seed)
    letters = [chr(ord("a") + n) for n in range(26)]
    words = ["".join(random.choice(letters, random.randint(1, 7))) for _ in range(300)]
    lines = [" ".join(random.choice(words, random.randint(2, 40))) for _ in range(documents)]
    path.write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    return path


Arrays = dict[str, tuple[str, np.ndarray]]


def arrays_of(folder: Path) -> Arrays:
    """Return all tensors of a model folder, sharded or not, as raw arrays with their dtype."""
    found: Arrays = {}
    for path in sorted(folder.glob("*.safetensors")):
        infos = read_header(path).tensors
        found |= {name: (info.dtype, read_array(path, info)) for name, info in infos.items()}
    return found


def values(raw: np.ndarray, dtype: str) -> np.ndarray:
    """Return raw values as float64."""
    if dtype == "BF16":
        return (raw.astype(np.uint32) << 16).view(np.float32).astype(np.float64)
    return raw.astype(np.float64)


def rounded(exact: np.ndarray, dtype: str) -> np.ndarray:
    """Round float64 once, to nearest and ties to even, and return raw values of `dtype`."""
    if dtype != "BF16":
        return exact.astype(NUMPY_DTYPES[dtype])
    _, exponent = np.frexp(exact)
    step = np.exp2(np.maximum(exponent - 8, -133).astype(np.float64))  # of 8 significant bits
    single = (np.rint(exact / step) * step).astype(np.float32)  # which holds such values exactly
    return (single.view(np.uint32) >> 16).astype(np.uint16)


def average(parents: list[Arrays], weights: list[int], dtype: str | None = None) -> Arrays:
    """The plain reference: float64 sums of every tensor, one division, one rounding."""
    made: Arrays = {}
    for name, (stored, first) in parents[0].items():
        if stored.startswith(("F", "BF")):
            total = sum(
                w * values(p[name][1], stored) for w, p in zip(weights, parents, strict=True)
            )
            to = dtype or stored
            made[name] = (to, rounded(np.asarray(total) / sum(weights), to))
        else:
            made[name] = (stored, first)
    return made


def same(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Tell whether two sets of tensors are equal bit for bit."""
    return one.keys() == other.keys() and all(
        one[name][0] == other[name][0]
        and one[name][1].shape == other[name][1].shape
        and one[name][1].tobytes() == other[name][1].tobytes()
        for name in one
    )


def unit_folder(folder: Path, start: Path, number: int, spread: float = 0.05) -> Path:
    """Write a copy of the model in `start` whose floating tensors have small noise added."""
    shutil.copytree(start, folder)
    random = np.random.RandomState(1000 + number)
    noisy: Arrays = {}
    for name, (dtype, raw) in sorted(arrays_of(start).items()):
        if dtype.startswith(("F", "BF")):
            noise = spread * random.standard_normal(raw.shape)
            noisy[name] = (dtype, rounded(values(raw, dtype) + noise, dtype))
        else:
            noisy[name] = (dtype, raw)
    write_file(folder / "model.safetensors", noisy, {"format": "pt"})
    return folder


def set_tensors(folder: Path, **changed: tuple[str, np.ndarray]) -> None:
    """Replace or add tensors of an unsharded folder; dots are written as two underscores."""
    arrays = {name: (dtype, np.array(raw)) for name, (dtype, raw) in arrays_of(folder).items()}
    arrays |= {name.replace("__", "."): item for name, item in changed.items()}
    write_file(folder / "model.safetensors", arrays, {"format": "pt"})


def change_json(path: Path, **changes: Any) -> None:
    """Set keys of a JSON file."""
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def shard(folder: Path, to: Path, max_bytes: int = 8000) -> Path:
    """Write the model of a folder again, in shards."""
    shutil.copytree(folder, to)
    (to / "model.safetensors").unlink()
    arrays = arrays_of(folder)
    groups = plan_shards({name: (d, raw.shape) for name, (d, raw) in arrays.items()}, max_bytes)
    placed = {}
    for number, names in enumerate(groups, start=1):
        file = f"model-{number:05d}-of-{len(groups):05d}.safetensors"
        write_file(to / file, {name: arrays[name] for name in names}, {"format": "pt"})
        placed |= dict.fromkeys(names, file)
    assert len(groups) > 1
    index = {"metadata": {}, "weight_map": placed}
    (to / "model.safetensors.index.json").write_text(json.dumps(index))
    return to


# -- pools ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Tiny:
    """A pool made here, with the folders of its models beside it."""

    root: Path  # of the pool
    seed: Path  # model folders
    units: dict[tuple[str, int], Path]
    texts: Path

    def copy(self, to: Path) -> Path:
        """Copy the pool alone."""
        return Path(shutil.copytree(self.root, to))


def write_texts(folder: Path, names: list[str], lines: int = 12) -> Path:
    """Write a JSON lines file of training text for each name, and one of held-out text."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        train = [f"{LINES[name]} {i} {LINES[name]}" for i in range(lines)]
        held = [f"{LINES[name]} held {i}" for i in range(3)]
        for kind, documents in (("train", train), ("held", held)):
            text = "".join(json.dumps({"text": document}) + "\n" for document in documents)
            (folder / f"{name}.{kind}.jsonl").write_text(text)
    return folder


def add_data(pool: Pool, texts: Path, units: Mapping[str, int]) -> None:
    """Add a partition of so many base units and an evalset for each name."""
    for name, count in units.items():
        pool.add_partition(name, [texts / f"{name}.train.jsonl"], units=count)
        pool.add_evalset(name, [texts / f"{name}.held.jsonl"])


def tiny_pool(
    base: Path, units: Mapping[str, int] | None = None, family: str = "llama", *,
    tied: bool = False, dtype: str = "float32",
) -> Tiny:  # fmt: skip
    """Make a pool with a seed `base`, one model for each base unit, and evalsets."""
    units = units or {"alpha": 1, "beta": 2, "gamma": 3}
    texts = write_texts(base / "texts", list(units))
    seed = model_folder(base / "seed", family, tied=tied, dtype=dtype)
    places = [(name, unit) for name, count in units.items() for unit in range(1, count + 1)]
    folders = {
        (name, unit): unit_folder(base / f"{name}-{unit}", seed, number)
        for number, (name, unit) in enumerate(places)
    }
    with Pool.create(base / "pool") as pool:
        add_data(pool, texts, units)
        pool.add_model(seed, name="base", role="seed")
        for (name, unit), folder in folders.items():
            pool.add_model(
                folder, role="unit", partition=name, unit=unit, seed="base", tokens=100 * unit
            )
    return Tiny(base / "pool", seed, folders, texts)


def union_folder(folder: Path, parents: list[Path], number: int) -> Path:
    """Write what training on a union might give: the parents' average with a little noise."""
    averaged = average([arrays_of(parent) for parent in parents], [1] * len(parents))
    with tempfile.TemporaryDirectory() as place:
        start = Path(place) / "start"
        shutil.copytree(parents[0], start)
        write_file(start / "model.safetensors", averaged, {"format": "pt"})
        return unit_folder(folder, start, 500 + number, spread=0.005)


def unions(names: Sequence[str]) -> list[str]:
    """Return the expression of every union of two or more names."""
    return [
        "+".join(chosen)
        for size in range(2, len(names) + 1)
        for chosen in itertools.combinations(sorted(names), size)
    ]


REFERENCES = unions(["code", "prose", "python", "web"])


def referenced_pool(base: Path) -> Tiny:
    """Make a pool of four partitions of one unit each with a reference for every larger union.

    One further mixture, 2*python+web, was asked for, and `wiki` is another name of an evalset.
    """
    made = tiny_pool(base, dict.fromkeys(["python", "web", "prose", "code"], 1))
    with Pool.open(made.root) as pool:
        for number, mixture in enumerate(REFERENCES):
            parents = [made.units[name, 1] for name in mixture.split("+")]
            folder = union_folder(base / f"reference-{number}", parents, number)
            pool.add_model(folder, role="reference", mixture=mixture, budget="same", seed="base")
        pool.registry.record(
            records.name("evalset", "wiki", pool.registry.names("evalset")["prose"])
        )
        pool.sweep(pool.plan_sweep())
        pool.ask("2*python+web")
        pool.proxy_report()
    return made


def contents(root: Path) -> dict[str, bytes]:
    """Return what a pool holds: the journal's bytes and the names of its objects."""
    found = {f"journal/{p.name}": p.read_bytes() for p in (root / "journal").iterdir()}
    found |= {str(p.relative_to(root)): b"" for p in (root / "objects").rglob("*") if p.is_file()}
    return found


def refusal(error: PoolregError) -> str:
    """Return message and hint in one line."""
    return str(error).replace("\n", " | ")


# -- for worker processes -------------------------------------------------------------------


class Rooter:
    """Finds the roots of runs of numbers, and says which process and which of its runs it was."""

    def __init__(self, pause: float) -> None:
        self.pause, self.runs = pause, 0

    def __call__(self, run: Sequence[int], *, progress: Any) -> Iterator[tuple[int, int, int]]:
        self.runs += 1
        for value in run:
            root, process = root_of(value, self.pause, progress=progress)
            yield root, process, self.runs


class Gate:
    """Sends numbers back; a zero waits, not for ever, until there is a file; refuses negatives."""

    def __init__(self, file: Path) -> None:
        self.file, self.until = file, time.monotonic() + 60

    def __call__(self, run: Sequence[int], *, progress: Any) -> Iterator[int]:
        for value in run:
            while value == 0 and not self.file.exists() and time.monotonic() < self.until:
                time.sleep(0.01)
            progress.note(str(value))
            if value < 0:
                raise Refused(f"{value} is negative")
            time.sleep(0.05)
            yield value


class Stubborn:
    """Says which process it is, and then hears nobody for a while."""

    def __call__(self, run: Sequence[int], *, progress: Any) -> Iterator[int]:  # noqa: ARG002
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        yield os.getpid()
        time.sleep(30)


def root_of(value: int, seconds: float, *, progress: Any) -> tuple[int, int]:
    """Return the whole square root and the process that found it; refuse, or die of -9."""
    time.sleep(seconds)
    progress.advance(1)
    progress.note(str(value))
    if value == -9:
        os.kill(os.getpid(), signal.SIGKILL)
    if value < 0:
        raise Refused(f"{value} has no root", hint="use a square", value=value)
    return math.isqrt(value), os.getpid()


class Untold(Exception):
    """Cannot be made again from what it was made of."""

    def __init__(self, one: int, *, two: int) -> None:  # noqa: ARG002
        super().__init__("only here")


def raise_untold(value: int, *, progress: Any) -> None:
    """Raise what cannot be sent to another process."""
    raise Untold(value, two=2)


def divmod_by(value: int, by: int, *, progress: Any) -> tuple[int, int]:
    """Raise an error that is none of ours for `by` zero."""
    return divmod(value, by)
