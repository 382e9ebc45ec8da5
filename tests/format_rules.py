"""The rules of docs/format.md written out once more, with the standard library alone.

Canonical JSON, safetensors, averages, names, base units and the digests of models. `Wrong` says
what is not as it should be; `tests/format_reader.py` reads pools with these.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import re
import struct
import unicodedata
from fractions import Fraction
from typing import Any, NamedTuple

ITEM = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "I16": 2, "U16": 2, "F16": 2,
    "BF16": 2, "I32": 4, "U32": 4, "F32": 4, "I64": 8, "U64": 8, "F64": 8,
}  # fmt: skip
CODES = {"F64": "d", "F32": "f", "I64": "q", "I32": "i", "U8": "B"}
VOLATILE = {
    "_name_or_path", "name_or_path", "_commit_hash", "transformers_version", "architectures",
    "dtype", "torch_dtype", "use_cache", "return_dict", "output_attentions",
    "output_hidden_states", "torchscript", "gradient_checkpointing", "id2label", "label2id",
    "problem_type", "task_specific_params", "finetuning_task", "chunk_size_feed_forward",
    "unsloth_version", "unsloth_fixed",
}  # fmt: skip
VOCABULARIES = {
    "vocab.json", "merges.txt", "vocab.txt", "spiece.model", "tokenizer.model",
    "sentencepiece.bpe.model", "tekken.json",
}  # fmt: skip


class Wrong(Exception):
    """Something is not as the format says."""


def need(true: Any, what: str) -> None:
    if not true:
        raise Wrong(what)


# -- canonical JSON ------------------------------------------------------------------------


def canonical(value: Any) -> bytes:
    return _text(value).encode("utf-8")


def digest(value: Any) -> str:
    return sha256(canonical(value))


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _text(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, int):
        return str(value)
    if isinstance(value, float):
        return _float(value)
    if isinstance(value, str):
        return '"' + "".join(map(_character, value)) + '"'
    if isinstance(value, list):
        return "[" + ",".join(map(_text, value)) + "]"
    return "{" + ",".join(f"{_text(key)}:{_text(value[key])}" for key in sorted(value)) + "}"


def _character(letter: str) -> str:
    short = {
        '"': '\\"', "\\": "\\\\", "\b": "\\b", "\f": "\\f", "\n": "\\n", "\r": "\\r", "\t": "\\t",
    }  # fmt: skip
    return short.get(letter) or (f"\\u{ord(letter):04x}" if letter < " " else letter)


def _float(value: float) -> str:
    need(math.isfinite(value), "a float that is not finite")
    sign = "-" if math.copysign(1, value) < 0 else ""
    if value == 0:
        return sign + "0.0"
    digits, exponent = _shortest(abs(value))
    if not -4 <= exponent < 16:
        point = "." if len(digits) > 1 else ""
        return (
            f"{sign}{digits[0]}{point}{digits[1:]}e{'-' if exponent < 0 else '+'}{abs(exponent):02}"
        )
    if exponent < 0:
        return f"{sign}0.{'0' * (-exponent - 1)}{digits}"
    whole, rest = digits[: exponent + 1].ljust(exponent + 1, "0"), digits[exponent + 1 :]
    return f"{sign}{whole}.{rest or '0'}"


def _shortest(value: float) -> tuple[str, int]:
    """Return the fewest digits that read back as `value`, the nearest ones, and the exponent."""
    for count in range(17):
        text, _, exponent = f"{value:.{count}e}".partition("e")
        middle, scale = int(text.replace(".", "")), int(exponent) - count
        near = [n for n in (middle - 1, middle, middle + 1) if n and float(f"{n}e{scale}") == value]
        if near:
            exact = Fraction(value)
            best = min(near, key=lambda n: (abs(n * Fraction(10) ** scale - exact), n % 2))
            return str(best).rstrip("0"), scale + len(str(best)) - 1
    raise Wrong(f"no digits for {value!r}")


# -- safetensors ---------------------------------------------------------------------------


class Tensor(NamedTuple):
    dtype: str
    shape: list[int]
    data: bytes

    @property
    def values(self) -> tuple[Any, ...]:
        return struct.unpack(f"<{math.prod(self.shape)}{CODES[self.dtype]}", self.data)


def tensors_of(data: bytes) -> dict[str, Tensor]:
    first = 8 + int.from_bytes(data[:8], "little")
    fields = json.loads(data[8:first])
    fields.pop("__metadata__", None)
    found = {
        name: Tensor(f["dtype"], f["shape"], data[slice(*(first + at for at in f["data_offsets"]))])
        for name, f in fields.items()
    }
    for name, tensor in found.items():
        need(len(tensor.data) == math.prod(tensor.shape) * ITEM[tensor.dtype], f"size of {name}")
    return found


def canonical_file(tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> bytes:
    header: dict[str, Any] = {"__metadata__": metadata} if metadata else {}
    data = b""
    for name in sorted(tensors, key=lambda name: (-ITEM[tensors[name].dtype], name)):
        dtype, shape, values = tensors[name]
        offsets = [len(data), len(data) + len(values)]
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": offsets}
        data += values
    text = canonical(header)
    text += b" " * (-(8 + len(text)) % 64)
    return len(text).to_bytes(8, "little") + text + data


def average(parents: list[dict[str, Tensor]], weights: list[int]) -> dict[str, Tensor]:
    """The exact average of models in the order of their digests; F32 alone."""
    made = {}
    for name, (dtype, shape, _) in parents[0].items():
        sums = [0.0] * math.prod(shape)
        for parent, weight in zip(parents, weights, strict=True):
            sums = [s + weight * x for s, x in zip(sums, parent[name].values, strict=True)]
        rounded = [s / sum(weights) for s in sums]
        made[name] = Tensor(dtype, shape, struct.pack(f"<{len(sums)}f", *rounded))
    return made


# -- the digests of models -----------------------------------------------------------------


def configuration(config: dict[str, Any]) -> dict[str, Any]:
    return {
        key: configuration(value) if isinstance(value, dict) else value
        for key, value in config.items()
        if key not in VOLATILE and "_implementation" not in key
    }


def tokenizer(files: dict[str, bytes]) -> str | None:
    def read(name: str) -> dict[str, Any]:
        return json.loads(files[name]) if name in files else {}

    vocabularies = {n for n in files if n in VOCABULARIES or n.endswith(".tiktoken")}
    if not vocabularies and "tokenizer.json" not in files:
        return None
    c = read("tokenizer_config.json")
    s = read("special_tokens_map.json") | c
    name = c.get("tokenizer_class")
    if not isinstance(name, str) or name in ("PreTrainedTokenizerFast", "TokenizersBackend"):
        name = None
    special = {key: s.get(key) for key in ("bos_token", "eos_token", "unk_token")}
    special = {k: v.get("content") if isinstance(v, dict) else v for k, v in special.items()}
    special |= {key: c.get(key) for key in ("add_bos_token", "add_eos_token", "add_prefix_space")}
    facts: dict[str, Any] = {"class": name and name.removesuffix("Fast"), "special": special}
    if "tokenizer.json" in files:
        facts["tokenizer"] = _encoding(read("tokenizer.json"))
    else:
        facts["slow"] = {key: c.get(key) for key in ("do_lower_case", "legacy")}
        counted = vocabularies | ({"added_tokens.json"} & files.keys())
        facts["files"] = {name: sha256(files[name]) for name in counted}
    return digest(facts)


def _encoding(whole: dict[str, Any]) -> dict[str, Any]:
    keys = ("added_tokens", "normalizer", "pre_tokenizer", "post_processor")
    parts = {key: _with_regex(whole.get(key)) for key in keys}
    last = parts["post_processor"]
    if isinstance(last, dict):
        single = last.get("single")
        plain = isinstance(single, list) and len(single) == 1 and "Sequence" in single[0]
        if last["type"] == "ByteLevel" or (last["type"] == "TemplateProcessing" and plain):
            parts["post_processor"] = None
    model = whole["model"]
    bpe = model.get("type", "BPE") == "BPE" and "merges" in model
    model = {
        key: value
        for key, value in model.items()
        if value is not None and value is not False and not (bpe and value == "")
    }
    if bpe:
        merges = [m.split(" ") if isinstance(m, str) else m for m in model["merges"]]
        model |= {"type": "BPE", "merges": merges}
    return parts | {"model": model}


def _with_regex(value: Any) -> Any:
    if isinstance(value, list):
        return [_with_regex(item) for item in value]
    if not isinstance(value, dict):
        return value
    extra = {"use_regex": True} if value.get("type") == "ByteLevel" else {}
    return extra | {key: _with_regex(item) for key, item in value.items()}


# -- names and base units ------------------------------------------------------------------


def is_name(text: str) -> bool:
    """Tell whether a text may stand in a pool as a name, plain or behind its origin."""
    origin, slash, word = text.partition("/")
    return all(map(_is_word, (origin, word) if slash else (origin,)))


def _is_word(text: str) -> bool:
    def starts(letter: str) -> bool:
        numeric = unicodedata.numeric(letter, None) is not None
        return letter == "_" or numeric or unicodedata.category(letter).startswith("L")

    def goes_on(letter: str) -> bool:
        return letter in "-." or unicodedata.category(letter) in ("Mn", "Mc") or starts(letter)

    return (
        0 < len(text) <= 100
        and text == unicodedata.normalize("NFC", text)
        and starts(text[0])
        and all(map(goes_on, text))
        and text != "all"
        and not text.startswith("all-")
        and not re.fullmatch(r"[0-9]+(\.[0-9]*)?([eE][+-]?[0-9]+)?", text)
    )


def base_units(documents: list[bytes], units: int) -> list[list[bytes]] | None:
    """Cut documents into base units; None where a unit would be empty."""
    ends = [sum(map(len, documents[: n + 1])) for n in range(len(documents))]
    text = b"".join(documents)
    line_ends = sorted({*ends, *(at + 1 for at in range(len(text)) if text[at] == 0x0A)})
    cuts = [0]
    for unit in range(1, units):
        target = unit * len(text) // units
        around = next(n for n, end in enumerate(ends) if end >= target)
        if ends[around] == target or len(documents[around]) * 100 * units <= len(text):
            cuts.append(ends[around])
        else:
            cuts.append(next(end for end in line_ends if end >= target))
    cuts.append(len(text))
    made = []
    for start, stop in itertools.pairwise(cuts):
        if start >= stop:
            return None
        edges = [start, *(end for end in ends if start < end < stop), stop]
        made.append([text[a:b] for a, b in itertools.pairwise(edges)])
    return made
