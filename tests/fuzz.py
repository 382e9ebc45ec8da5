"""Feed bytes to the readers of what comes from outside; only a `PoolregError` may come out.

    python tests/fuzz.py safetensors --seconds 90        (needs: pip install 'poolreg[fuzz]')

Each target takes any bytes, has its reader read them, checks what the reader accepts, and tells
whether it accepted. A refusal has to name what it refuses, in a bounded message. `test_fuzz.py`
runs the same targets on mutated and generated inputs; here atheris finds its way by coverage,
and leaves the input of a crash in the current folder.
"""

from __future__ import annotations

import argparse
import binascii
import gc
import json
import sys
import tempfile
import types
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import safetensors

from poolreg.canonical import canonical_json
from poolreg.errors import MixtureError, PoolregError
from poolreg.mixture import parse, unit_weights
from poolreg.store.journal import Journal, Record
from poolreg.store.registry import Registry
from poolreg.tensors import NUMPY_DTYPES, encode, read_array, read_header
from poolreg.training.recipe import DEFAULT_RECIPE, load_recipe
from poolreg.weights.checkpoint import context_length, read_checkpoint, vocab_size
from poolreg.weights.tokenizer_files import read_tokenizer

LONGEST_MESSAGE = 20_000  # characters; an error is to be read by a person


def read_safetensors(path: Path) -> None:
    """What ours accepts, the library accepts with equal names, dtypes, shapes and values."""
    header = read_header(path)
    theirs = dict(safetensors.deserialize(path.read_bytes()))  # raises if they refuse
    assert header.tensors.keys() == theirs.keys()
    for name, info in header.tensors.items():
        array = read_array(path, info)
        assert info.dtype == theirs[name]["dtype"]
        assert list(info.shape) == list(array.shape) == theirs[name]["shape"]
        assert array.tobytes() == bytes(theirs[name]["data"])


def read_mixture(path: Path) -> None:
    """What is accepted has a canonical text of its own, and weights over units that sum to 1."""
    text = path.read_bytes().decode("utf-8", "surrogateescape")  # as the command line has it
    found = parse(text, everything=("a", "b", "c", "d-e"), groups={"g": ("a", "b"), "none": ()})
    assert parse(str(found), everything=(), groups={}) == found
    for scheme in ("micro", "macro"):
        units = dict.fromkeys(found.partitions, 3)
        assert sum(weight for _, weight in unit_weights(found, units, scheme)) == 1


def read_journal(path: Path) -> None:
    """What is accepted are all whole lines, each of them where it is said to be."""
    data = path.read_bytes()
    offset = 0
    for record, after in Journal(path.parent).read(path.name, 0, len(data)):
        line = data[offset:after]
        assert line.startswith(b"%08x " % binascii.crc32(line[9:-1]))
        assert json.loads(line[9:])["id"] == record.id
        offset = after
    assert b"\n" not in data[offset:]


def read_format(path: Path) -> None:
    """A pool that opens has an identity."""
    registry = Registry.open(path.parent)
    assert isinstance(registry.id, str)


def read_model(path: Path) -> None:
    """A folder that is accepted has a family that can be told and compared."""
    checkpoint = read_checkpoint(path.parent)
    assert canonical_json(dict(checkpoint.family.config))
    context_length(checkpoint.config), vocab_size(checkpoint.config)


def read_tokenizer_folder(path: Path) -> None:
    """A folder whose files are accepted has a digest."""
    found = read_tokenizer(path.parent)
    assert found is not None
    assert len(found.digest) == 64


def read_recipe(path: Path) -> None:
    """A recipe that is accepted can be recorded."""
    recipe = load_recipe(path)
    assert canonical_json(recipe.as_record())
    assert all(0 <= settings.warmup < settings.steps for settings in recipe.roles.values())


# -- what turns a few bytes into a file that passes the first check ---------------------------


def as_they_are(data: bytes) -> bytes:
    """The file itself."""
    return data


def with_length(data: bytes) -> bytes:
    """A safetensors file of the header before the first NUL byte and the data after it."""
    header, _, payload = data.partition(b"\0")
    return len(header).to_bytes(8, "little") + header + payload


def with_checksums(data: bytes) -> bytes:
    """A segment of lines that match their checksums; the last is torn unless it ends."""
    *lines, rest = data.split(b"\n")
    return b"".join(b"%08x %s\n" % (binascii.crc32(line), line) for line in lines) + rest


# -- small valid files ------------------------------------------------------------------------


def _weights(*dtypes: str) -> bytes:
    shapes = [(2, 3), (), (0, 2), (5,)]
    arrays = {
        f"w{number}": (dtype, np.zeros(shapes[number % 4], NUMPY_DTYPES[dtype]))
        for number, dtype in enumerate(dtypes)
    }
    return encode(arrays, {"format": "pt", "größe": "2"})


def _headed(file: bytes) -> bytes:
    """Return the bytes from which `with_length` makes this file."""
    stop = 8 + int.from_bytes(file[:8], "little")
    return file[8:stop] + b"\0" + file[stop:]


_RECORDS = (
    Record("name", "a" * 64, {"space": "model", "name": "x", "target": "b" * 64}, {}, "2026"),
    Record("kind", "é", {"x": [1, 0.5, None, {"y": True}]}, {"c" * 64: 3}, "then"),
)
_CONFIG = {
    "model_type": "llama", "hidden_size": 16, "rope_parameters": {"rope_theta": 1e4},
    "eos_token_id": [1, 2], "tie_word_embeddings": False, "text_config": {"vocab_size": 9},
}  # fmt: skip
_TOKENIZER = {
    "added_tokens": [{"id": 0, "content": "<s>"}], "normalizer": None,
    "pre_tokenizer": {"type": "ByteLevel", "use_regex": True},
    "post_processor": {"type": "TemplateProcessing", "single": [{"Sequence": {"id": "A"}}]},
    "model": {"type": "BPE", "vocab": {"a": 0, "b": 1}, "merges": ["a b", ["a", "b"]]},
}  # fmt: skip
_TOKENIZER_CONFIG = {
    "bos_token": {"content": "<s>"}, "eos_token": "</s>", "tokenizer_class": "LlamaTokenizerFast",
}  # fmt: skip
_PLACED = {"metadata": {"total_size": 4}, "weight_map": {"w0": "model.safetensors"}}


def _json(*values: object) -> tuple[bytes, ...]:
    return tuple(json.dumps(value).encode() for value in values)


MODEL = {"config.json": b'{"model_type": "llama"}', "model.safetensors": _weights("F32")}


@dataclass(frozen=True)
class Target:
    """A reader, the file that it gets with what lies beside it, and small valid inputs."""

    read: Callable[[Path], None]
    name: str
    seeds: tuple[bytes, ...]
    beside: dict[str, bytes]
    frame: Callable[[bytes], bytes] = as_they_are

    def __call__(self, data: bytes, folder: Path) -> bool:
        """Read `data` as the file in `folder`; tell whether it was accepted."""
        for name, content in {**self.beside, self.name: self.frame(data)}.items():
            (folder / name).write_bytes(content)
        try:
            self.read(folder / self.name)
        except PoolregError as error:
            self._check(error, folder)
            return False
        return True

    def _check(self, error: PoolregError, folder: Path) -> None:
        text = error.message
        assert 0 < len(text) <= LONGEST_MESSAGE, text[:200]
        named = any(name in text for name in (self.name, str(folder)))
        assert named or isinstance(error, MixtureError), text


_HEADERS = (_weights("F32", "BF16", "I64", "U8"), _weights("F8_E4M3", "BOOL"), _weights())
_LINES = tuple(record.line() for record in _RECORDS)

TARGETS = {
    "safetensors": Target(read_safetensors, "model.safetensors", _HEADERS, {}),
    "header": Target(
        read_safetensors, "model.safetensors", tuple(map(_headed, _HEADERS)), {}, with_length
    ),
    "mixture": Target(
        read_mixture, "text",
        (b"a+b", b"2*a+1/3*b/2", b"0.3*g+0.7*c", b"all - a - d-e", b"hub/a/1+\xc3\xa9"), {},
    ),
    "journal": Target(read_journal, "x.jsonl", (*_LINES, b"".join(_LINES)), {}),
    "records": Target(
        read_journal, "x.jsonl",
        (*(line[9:] for line in _LINES), b"".join(line[9:] for line in _LINES)), {}, with_checksums,
    ),
    "format": Target(
        read_format, "FORMAT", _json({"format": 1, "id": "0-1"}, {"format": 2, "id": "x"}), {}
    ),
    "config": Target(read_model, "config.json", _json(_CONFIG), MODEL),
    "index": Target(read_model, "model.safetensors.index.json", _json(_PLACED), MODEL),
    "tokenizer": Target(
        read_tokenizer_folder, "tokenizer.json", _json(_TOKENIZER),
        {"tokenizer_config.json": b"{}"},
    ),
    "tokenizer-config": Target(
        read_tokenizer_folder, "tokenizer_config.json", _json(_TOKENIZER_CONFIG),
        {"tokenizer.json": b"{}"},
    ),
    "recipe": Target(
        read_recipe, "recipe.toml",
        (DEFAULT_RECIPE.encode(), b"[tokenizer]\nfolder = 'x'\n[seed]\ntokens = 1e3\n"), {},
    ),
}  # fmt: skip

WORDS = (
    b'"dtype"', b'"shape"', b'"data_offsets"', b'"__metadata__"', b'"F32"', b'"BF16"', b"[0,4]",
    b'"v":1', b'"kind"', b'"id"', b'"at"', b'"body":{}', b'"objects":{}', b'"format"', b"all",
    b'"model_type"', b'"auto_map"', b'"weight_map"', b"../", b"NaN", b"1e999", b"\\ud800",
    b"18446744073709551616", b'"merges"', b'"vocab"', b'"_implementation"', b"[model]", b"[seed]",
)  # fmt: skip


def main() -> None:
    """Fuzz one target for a while; ends with code 0 if nothing was found."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("target", choices=TARGETS)
    parser.add_argument("--seconds", type=int, default=90)
    parser.add_argument("--corpus", type=Path, help="a folder of inputs, kept for the next time")
    given = parser.parse_args()
    import atheris

    _instrument(atheris.instrument_func, ["poolreg", "tomllib", "json"])
    target = TARGETS[given.target]
    with tempfile.TemporaryDirectory() as place:
        folder, corpus = Path(place) / "read", given.corpus or Path(place) / "corpus"
        for made in (folder, corpus):
            made.mkdir(exist_ok=True)
        for number, seed in enumerate(target.seeds):
            (corpus / f"seed-{number}").write_bytes(seed)
        dictionary = Path(place) / "words"
        dictionary.write_text("".join(f'"{_escaped(word)}"\n' for word in WORDS))
        options = ["-timeout=20", "-rss_limit_mb=1000", "-print_final_stats=1", "-verbosity=0"]
        options += [f"-max_total_time={given.seconds}", f"-dict={dictionary}"]
        atheris.Setup([sys.argv[0], *options, str(corpus)], lambda data: target(data, folder))
        atheris.Fuzz()


def _instrument(instrument: Callable[[types.FunctionType], object], packages: list[str]) -> None:
    found = [item for item in gc.get_objects() if isinstance(item, types.FunctionType)]
    for function in found:
        if str(function.__module__).partition(".")[0] in packages:
            instrument(function)


def _escaped(word: bytes) -> str:
    return "".join(f"\\x{byte:02x}" for byte in word)


if __name__ == "__main__":
    main()
