"""The tokenizer of a model as the vocabulary of a GGUF file.

llama.cpp has the ways to split text before merging built in, under names; what has no name there is
refused, since a file that splits text otherwise would load and answer wrongly.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from poolreg.errors import MissingPackage, Refused

# How tokenizer.json splits text before merging -> (ignore_merges, llama.cpp's name for that).
_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|DIGITS"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_PRE_TOKENIZERS = {
    (("words",), False): "gpt-2",
    (("digits", "words"), False): "smollm",
    ((_SPLIT.replace("DIGITS", r"\p{N}{1,3}"), "bytes"), True): "llama-bpe",
    ((_SPLIT.replace("DIGITS", r"\p{N}{1,3}"), "bytes"), False): "smaug-bpe",
    ((_SPLIT.replace("DIGITS", r"\p{N}"), "bytes"), False): "qwen2",
}


@dataclass(frozen=True)
class Vocabulary:
    """A byte-level BPE tokenizer as llama.cpp knows it."""

    splitting: str
    tokens: tuple[str, ...]
    types: tuple[int, ...]
    merges: tuple[str, ...]
    special: dict[str, int]  # bos, eos, pad -> token
    adds_bos: bool
    adds_eos: bool
    chat_template: str | None


def gguf_package() -> Any:
    """Import the package gguf, which is an extra; raises `MissingPackage` with the way to it."""
    try:
        import gguf
    except ImportError as error:
        raise MissingPackage(
            "writing GGUF needs the Python package gguf",
            hint="install it with: pip install 'poolreg[gguf]'",
        ) from error
    return gguf


def read_vocabulary(folder: Path, config: Any) -> Vocabulary:
    """Return the tokenizer in a model's folder, as poolreg uses it, for llama.cpp.

    Raises `Refused` for one that is not byte-level BPE or splits text in a way of its own.
    """
    from poolreg.models.loading import load_tokenizer

    tokenizer: Any = load_tokenizer(folder)
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise _unknown("has no tokenizer.json")
    whole = json.loads(backend.to_str())
    splitting = _splitting(whole)
    special = {}
    for kind in ("bos", "eos", "pad"):
        token = _special(kind, tokenizer, config)
        if token is not None:
            special[kind] = token
    tokens, types = _tokens(whole, config.vocab_size)
    merges = tuple(
        merge if isinstance(merge, str) else " ".join(merge) for merge in whole["model"]["merges"]
    )
    adds_bos, adds_eos = _adds(backend, special)
    template = tokenizer.chat_template
    return Vocabulary(
        splitting, tokens, types, merges, special, adds_bos, adds_eos,
        template if isinstance(template, str) else None,
    )  # fmt: skip


def _unknown(what: str) -> Refused:
    return Refused(
        f"the tokenizer {what}, which this export cannot write as GGUF",
        hint="it writes byte-level BPE that splits text as GPT-2, SmolLM, Llama 3 or Qwen2 does",
    )


def _special(kind: str, tokenizer: Any, config: Any) -> int | None:
    """Return a special token of the tokenizer, or else the first that the configuration names."""
    token = getattr(tokenizer, f"{kind}_token_id", None)
    if token is None:
        token = getattr(config, f"{kind}_token_id", None)
    if isinstance(token, list):
        token = token[0] if token else None
    return token if isinstance(token, int) and 0 <= token < config.vocab_size else None


def _splitting(whole: dict[str, Any]) -> str:
    """Return llama.cpp's name of how text is split before merging."""
    model, normalizer = whole["model"], whole["normalizer"]
    if model["type"] != "BPE" or model.get("byte_fallback"):
        raise _unknown("is not byte-level BPE")
    extras = ("dropout", "continuing_subword_prefix", "end_of_word_suffix")
    if any(model.get(key) for key in extras) or not model["merges"]:
        raise _unknown("merges with an affix, with dropout or not at all")
    if normalizer is not None and normalizer["type"] != "NFC":
        raise _unknown(f"normalises text ({normalizer['type']})")
    pre = whole["pre_tokenizer"] or {"type": "none"}
    steps = tuple(map(_step, pre["pretokenizers"] if pre["type"] == "Sequence" else [pre]))
    key = (steps, bool(model.get("ignore_merges")))
    if key not in _PRE_TOKENIZERS:
        raise _unknown("splits text in a way that llama.cpp has no name for")
    return _PRE_TOKENIZERS[key]


def _step(step: dict[str, Any]) -> str:
    """Return what a step of splitting does: words, bytes, digits, or its regular expression."""
    match step:
        case {"type": "ByteLevel", "add_prefix_space": False}:
            return "words" if step.get("use_regex", True) else "bytes"
        case {"type": "Digits", "individual_digits": True}:
            return "digits"
        case {"type": "Split", "pattern": {"Regex": str(pattern)}, "behavior": "Isolated"}:
            return "inverted" if step.get("invert") else pattern
    raise _unknown(f"splits text by {step['type']} in a way that llama.cpp has no name for")


def _tokens(whole: dict[str, Any], rows: int) -> tuple[tuple[str, ...], tuple[int, ...]]:
    """Return text and kind of each token; rows of the embedding without one are unused."""
    kinds = gguf_package().TokenType
    found = {token: (text, kinds.NORMAL) for text, token in whole["model"]["vocab"].items()}
    for added in whole["added_tokens"]:
        kind = kinds.CONTROL if added["special"] else kinds.USER_DEFINED
        found[added["id"]] = (added["content"], kind)
    if max(found) >= rows:
        raise Refused(
            f"the tokenizer has tokens up to {max(found)}, the model embeddings for {rows}",
            hint="add the model with the tokenizer it was trained with",
        )
    table = [found.get(row, (f"[PAD{row}]", kinds.UNUSED)) for row in range(rows)]
    return tuple(text for text, _ in table), tuple(int(kind) for _, kind in table)


def _adds(backend: Any, special: dict[str, int]) -> tuple[bool, bool]:
    """Tell whether the tokenizer begins a text with bos and ends it with eos."""
    bare, whole = (backend.encode("a", add_special_tokens=add).ids for add in (False, True))
    for bos in (False, True):
        for eos in (False, True):
            start = [special.get("bos")] if bos else []
            end = [special.get("eos")] if eos else []
            if whole == start + bare + end:
                return bos, eos
    raise _unknown("adds other tokens to a text than its bos and eos")


def add_vocabulary(writer: Any, vocabulary: Vocabulary) -> None:
    """Write the vocabulary's entries with a `gguf.GGUFWriter`."""
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(vocabulary.splitting)
    writer.add_token_list(vocabulary.tokens)
    writer.add_token_types(vocabulary.types)
    writer.add_token_merges(vocabulary.merges)
    for kind, token in vocabulary.special.items():
        getattr(writer, f"add_{kind}_token_id")(token)
    writer.add_add_bos_token(vocabulary.adds_bos)
    writer.add_add_eos_token(vocabulary.adds_eos)
    if vocabulary.chat_template:
        writer.add_chat_template(vocabulary.chat_template)
