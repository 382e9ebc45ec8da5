"""The targets of fuzz.py on inputs that hypothesis makes: mutated valid ones, and structured ones.

A target raises whatever is no `PoolregError`, and fails where it accepts what it should not: for
safetensors, anything that the library does not read in the same way.
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from fuzz import TARGETS, WORDS, with_checksums
from hypothesis import HealthCheck, event, example, given, settings
from hypothesis import strategies as st

from poolreg.tensors import DTYPE_BYTES, plan_file

quick = settings(
    max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


few = settings(quick, max_examples=30)  # where making the input takes longest


def offer(name: str, data: bytes, folder: Path) -> None:
    """Let a target read; what it raises is the failure."""
    event(f"{name}: {'accepted' if TARGETS[name](data, folder) else 'refused'}")


# -- mutations of valid inputs ------------------------------------------------------------------


@st.composite
def mutated(draw: st.DrawFn, seeds: tuple[bytes, ...]) -> bytes:
    """A seed with some bytes flipped, cut out, put in or repeated, or two seeds in one."""
    data = bytearray(draw(st.sampled_from(seeds)))
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, len(data)))
        match draw(st.sampled_from(["flip", "cut", "end", "insert", "word", "repeat", "splice"])):
            case "flip" if at < len(data):
                data[at] ^= 1 << draw(st.integers(0, 7))
            case "cut":
                del data[at : at + draw(st.integers(1, 8))]
            case "end":
                del data[at:]
            case "insert":
                data[at:at] = draw(st.binary(min_size=1, max_size=8))
            case "word":
                data[at : at + draw(st.integers(0, 6))] = draw(st.sampled_from(WORDS))
            case "repeat":
                data[at:at] = data[at : at + 20] * draw(st.integers(1, 3))
            case "splice":
                data[at:] = draw(st.sampled_from(seeds))[at:]
    return bytes(data)


@pytest.mark.parametrize("name", TARGETS)
def test_valid_inputs_are_accepted(name, tmp_path):
    accepted = [TARGETS[name](seed, tmp_path) for seed in TARGETS[name].seeds]
    assert accepted[0]


@pytest.mark.parametrize("name", TARGETS)
def test_mutated_inputs_are_read_or_refused(name, tmp_path):
    @quick
    @given(mutated(TARGETS[name].seeds))
    def offered(data: bytes) -> None:
        offer(name, data, tmp_path)

    offered()


# -- structured inputs --------------------------------------------------------------------------

names = st.text(st.characters(exclude_categories=["Cc", "Cs"]), min_size=1, max_size=6)
shapes = st.lists(st.integers(0, 4), max_size=3).map(tuple)
layouts = st.dictionaries(
    names.filter(str.isprintable), st.tuples(st.sampled_from(list(DTYPE_BYTES)), shapes), max_size=5
)

json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-1, 9) | st.floats() | names,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(names, inner, max_size=3),
    max_leaves=6,
)
sizes = st.lists(st.integers(0, 4), max_size=3)


@st.composite
def files(draw: st.DrawFn) -> bytes:
    """A whole file in some spelling of JSON, then damaged in none, one or several places."""
    start, infos = plan_file(draw(layouts), {"format": "pt"})
    end = max((info.stop for info in infos.values()), default=len(start))
    header = json.loads(start[8:])
    entries = [item for name, item in header.items() if name != "__metadata__"]
    for item in draw(st.lists(st.sampled_from(entries), max_size=1)) if entries else []:
        item[draw(st.sampled_from([*item, "more"]))] = draw(sizes | json_values)
    header = dict(draw(st.permutations(list(header.items()))))
    text = bytearray(
        json.dumps(
            header, indent=draw(st.sampled_from([None, 0, 2])), ensure_ascii=draw(st.booleans())
        ).encode()
    )
    for _ in range(draw(st.sampled_from([0, 0, 1, 2]))):
        at = draw(st.integers(0, len(text)))
        width = draw(st.integers(0, 1))
        text[at : at + width] = draw(st.sampled_from(list(b'\x0001 9\n}{,"-.e\\\xff'))).to_bytes()
    text += draw(st.sampled_from([b"", b" ", b"\n\t", b"\0"]))
    length = len(text) + draw(st.sampled_from([0, 0, 0, 0, -1, 1]))
    size = end - len(start) + draw(st.sampled_from([0, 0, 0, 0, -1, 1]))
    return max(length, 0).to_bytes(8, "little") + text + bytes(index % 251 for index in range(size))


@quick
@given(files())
def test_safetensors_are_a_subset_of_the_librarys_with_equal_values(tmp_path, content):
    offer("safetensors", content, tmp_path)


@quick
@given(files())
@example(b"\x08\0\0\0\0\0\0\0{}      ")
def test_headers_with_other_payloads(tmp_path, content):
    stop = 8 + int.from_bytes(content[:8], "little")
    offer("header", content[8:stop] + b"\0" + content[stop:], tmp_path)


KEYS = {
    "config": ["model_type", "auto_map", "text_config", "quantization_config", "vocab_size",
               "max_position_embeddings", "_attn_implementation", "tie_word_embeddings"],
    "index": ["weight_map", "metadata", "w0", "model.safetensors"],
    "tokenizer": ["model", "type", "BPE", "merges", "vocab", "added_tokens", "normalizer", "single",
                  "pre_tokenizer", "post_processor", "ByteLevel", "TemplateProcessing", "Sequence"],
    "tokenizer-config": ["bos_token", "eos_token", "content", "tokenizer_class", "auto_map",
                         "add_bos_token", "legacy"],
    "format": ["format", "id", "crc32"],
}  # fmt: skip


@cache
def documents(keys: tuple[str, ...]) -> st.SearchStrategy[Any]:
    """JSON values whose keys and texts are those that a reader looks at."""
    texts = st.sampled_from(keys) | st.text(max_size=3)
    plain = st.none() | st.booleans() | st.integers(-(2**65), 2**65) | st.floats() | texts
    values = st.recursive(
        plain,
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=4),
        max_leaves=6,
    )
    return st.dictionaries(texts, values, max_size=6)


@pytest.mark.parametrize("name", KEYS)
def test_documents_are_read_or_refused(name, tmp_path):
    start = json.loads(TARGETS[name].seeds[0])

    @few
    @given(documents(tuple(KEYS[name])), st.booleans())
    def offered(document: dict[str, Any], alone: bool) -> None:
        offer(name, json.dumps(document if alone else start | document).encode(), tmp_path)

    offered()


FIELDS = ["v", "kind", "id", "at", "body", "objects"]


@few
@given(st.lists(documents(tuple(FIELDS)), max_size=3), st.booleans())
def test_records_are_read_or_refused(tmp_path, changes, torn):
    whole = json.loads(TARGETS["records"].seeds[0])
    lines = b"".join(json.dumps(whole | change).encode() + b"\n" for change in changes)
    offer("records", lines[:-1] if torn else lines, tmp_path)
    assert with_checksums(lines).count(b"\n") == len(changes)


TOKENS = ["a", "b", "d-e", "g", "none", "all", "-", "+", "*", "/", "1", "0", "0.5", "1/3", " ",
          "all-", "99999999999999999999", "é", "e\u0301", "\udc80", "\x1b", "(", "1e9"]  # fmt: skip


@quick
@given(st.lists(st.sampled_from(TOKENS), max_size=12).map("".join))
def test_expressions_are_read_or_refused(tmp_path, text):
    offer("mixture", text.encode("utf-8", "surrogateescape"), tmp_path)


TOML = ["[model]\n", "[unit]\n", "[tokenizer]\n", "[seed]\n", "[[unit]]\n", "model_type = ", "lr = ",
        "steps = ", "tokens = ", "folder = ", "vocab_size = ", "betas = ", "warmup = ", "a.b = ",
        "'llama'\n", "'~x'\n", "3\n", "1e3\n", "nan\n", "[0.9, 0.95]\n", "2020-01-01\n", "true\n",
        "'''", "{a = 1}\n", "\n", "# x\n", "0x10\n", "-1\n"]  # fmt: skip


@quick
@given(st.lists(st.sampled_from(TOML), max_size=10).map("".join))
def test_recipes_are_read_or_refused(tmp_path, text):
    offer("recipe", text.encode(), tmp_path)
