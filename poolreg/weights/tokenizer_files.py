"""The tokenizer files of a model folder, and an identity for what they encode.

Two folders have the same tokenizer digest when they turn every text into the same tokens and
begin it with the same token, as far as the files tell. Chat templates, padding, truncation,
decoders and the habits of the library version that saved them do not count.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from poolreg.canonical import digest_of, sha256
from poolreg.errors import NotFound, Refused
from poolreg.files import read_capped, storage_errors
from poolreg.weights.hf_json import read_object, refuse_code

MAX_TOKENIZER = 64 << 20  # bytes of one file; the largest in use have about 40 MB
MAX_CONFIG = 16 << 20

_WHOLE = "tokenizer.json"
_CONFIG = "tokenizer_config.json"
_SPECIAL = "special_tokens_map.json"
_VOCABULARIES = frozenset({
    "vocab.json", "merges.txt", "vocab.txt", "spiece.model", "tokenizer.model",
    "sentencepiece.bpe.model", "tekken.json",
})  # fmt: skip
_BESIDE = frozenset({_CONFIG, _SPECIAL, "added_tokens.json", "chat_template.jinja"})
_TOKENS = ("bos_token", "eos_token", "unk_token")
_SWITCHES = ("add_bos_token", "add_eos_token", "add_prefix_space")
_SLOW_SWITCHES = ("do_lower_case", "legacy")  # a tokenizer.json has them built in
_PLAIN = ("PreTrainedTokenizerFast", "TokenizersBackend")  # what 4 and 5 call the same class


@dataclass(frozen=True)
class TokenizerFiles:
    """The tokenizer files of a folder by name, and the digest of what they encode."""

    files: Mapping[str, Path]
    digest: str


def read_tokenizer(folder: Path, *, trust_code: bool = False) -> TokenizerFiles | None:
    """Find and identify the tokenizer in a folder; None where there is no vocabulary.

    Raises `Refused` for files that are not what their names say, or that ask to run code.
    """
    with storage_errors(f"reading the folder {folder}"):
        files = {path.name: path for path in sorted(folder.iterdir()) if _is_known(path.name)}
    if not any(_is_vocabulary(name) for name in files):
        return None
    config = read_object(files[_CONFIG], MAX_CONFIG) if _CONFIG in files else {}
    if not trust_code:
        refuse_code(config, folder / _CONFIG)
    facts: dict[str, Any] = {"class": _class(config), "special": _special(files, config)}
    if _WHOLE in files:
        facts["tokenizer"] = _encoding(read_object(files[_WHOLE], MAX_TOKENIZER))
    else:
        facts["slow"] = {key: config.get(key) for key in _SLOW_SWITCHES}
        facts["files"] = {name: _digest(files[name]) for name in files if _has_tokens(name)}
    return TokenizerFiles(files, digest_of(facts))


def require_tokenizer(folder: Path, *, trust_code: bool = False) -> TokenizerFiles:
    """Like `read_tokenizer`, but a folder without a tokenizer is `NotFound`."""
    found = read_tokenizer(folder, trust_code=trust_code) if folder.is_dir() else None
    if found is None:
        hint = f"give a folder that holds {_WHOLE} or a vocabulary file"
        raise NotFound(f"no tokenizer in {folder}", hint=hint, path=str(folder))
    return found


def _is_known(name: str) -> bool:
    return _is_vocabulary(name) or name in _BESIDE


def _is_vocabulary(name: str) -> bool:
    return name == _WHOLE or name in _VOCABULARIES or name.endswith(".tiktoken")


def _has_tokens(name: str) -> bool:
    return _is_vocabulary(name) or name == "added_tokens.json"


def _digest(path: Path) -> str:
    return sha256(read_capped(path, MAX_TOKENIZER, error=Refused, what=path.name))


def _class(config: Mapping[str, Any]) -> str | None:
    """Return the class that loads the files: some replace what a tokenizer.json says."""
    name = config.get("tokenizer_class")
    if not isinstance(name, str) or name in _PLAIN:
        return None
    return name.removesuffix("Fast")


def _special(files: Mapping[str, Path], config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the special tokens' texts and the switches that add them; absent is null."""
    stated = read_object(files[_SPECIAL], MAX_CONFIG) if _SPECIAL in files else {}
    stated |= config  # older versions kept the tokens in a file of their own
    tokens = {key: _text(stated.get(key)) for key in _TOKENS}
    return tokens | {key: config.get(key) for key in _SWITCHES}


def _text(token: Any) -> Any:
    return token.get("content") if isinstance(token, dict) else token


def _encoding(tokenizer: dict[str, Any]) -> dict[str, Any]:
    """Return the parts of a tokenizer.json that decide the tokens, in one spelling.

    Older files leave out fields that have their default, write merges as "a b", and have a
    post-processor where newer ones have another that adds just as little.
    """
    parts = {"added_tokens", "normalizer", "pre_tokenizer", "post_processor", "model"}
    result = {key: _spelled_out(tokenizer.get(key)) for key in parts - {"model"}}
    if _adds_nothing(result["post_processor"]):
        result["post_processor"] = None
    return result | {"model": _model(tokenizer.get("model"))}


def _model(model: Any) -> Any:
    if not isinstance(model, dict):
        return model
    bpe = model.get("type", "BPE") == "BPE" and "merges" in model
    off = {
        key
        for key, item in model.items()
        if item is None or item is False or (bpe and item == "")  # an affix of no characters
    }
    model = {key: item for key, item in model.items() if key not in off}
    if bpe and isinstance(model.get("merges"), list):
        model |= {"type": "BPE", "merges": [_pair(merge) for merge in model["merges"]]}
    return model


def _spelled_out(value: Any) -> Any:
    if isinstance(value, list):
        return [_spelled_out(item) for item in value]
    if not isinstance(value, dict):
        return value
    defaults = {"use_regex": True} if value.get("type") == "ByteLevel" else {}
    return defaults | {key: _spelled_out(item) for key, item in value.items()}


def _adds_nothing(processor: Any) -> bool:
    if not isinstance(processor, dict):
        return False
    if processor.get("type") == "ByteLevel":
        return True
    single = processor.get("single")
    if processor.get("type") != "TemplateProcessing" or not isinstance(single, list):
        return False
    return len(single) == 1 and isinstance(single[0], dict) and "Sequence" in single[0]


def _pair(merge: Any) -> Any:
    return merge.split(" ") if isinstance(merge, str) else merge
