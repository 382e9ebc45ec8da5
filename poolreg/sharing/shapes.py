"""What a record of each kind must look like to be taken from elsewhere.

A shape is a test of one value; a list of one shape stands for a list of such values, several for
one value each; a dictionary for an object with at least these fields. Other fields are ignored
here as everywhere: a later poolreg may add some.
"""

from __future__ import annotations

import math
import re
from datetime import datetime
from typing import Any

from poolreg.canonical import is_digest
from poolreg.errors import MixtureError
from poolreg.mixture import MAX_EXPRESSION, parse
from poolreg.models.folders import DTYPES

_SURROGATE = re.compile("[\ud800-\udfff]")
_MOMENT = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}", re.ASCII)

MAX_DEPTH = 32  # far below what any reader of JSON can follow


def writable(value: Any, levels: int = MAX_DEPTH) -> bool:
    """Tell whether a value can be written as JSON again, and is nested no deeper than that."""
    if isinstance(value, str):
        return value.isascii() or not _SURROGATE.search(value)
    if isinstance(value, float):
        return math.isfinite(value)
    if isinstance(value, dict):
        return levels > 0 and all(
            writable(key) and writable(item, levels - 1) for key, item in value.items()
        )
    if isinstance(value, list):
        return levels > 0 and all(writable(item, levels - 1) for item in value)
    return True


def misfit(value: Any, shape: Any) -> str | None:
    """Return where a value is not of a shape ("" for the value itself), or None if it is."""
    if isinstance(shape, dict):
        if not isinstance(value, dict):
            return ""
        for key, part in shape.items():
            if key not in value or (misfit(value[key], part) is not None):
                return str(key)
        return None
    if isinstance(shape, list):
        shapes = shape * len(value) if isinstance(value, list) and len(shape) == 1 else shape
        fits = isinstance(value, list) and len(value) == len(shapes)
        whole = fits and all(misfit(v, s) is None for v, s in zip(value, shapes, strict=True))
        return None if whole else ""
    return None if shape(value) else ""


def moment(value: Any) -> bool:
    """Tell whether a value is a time to the microsecond that there was or will be."""
    if not isinstance(value, str) or not _MOMENT.fullmatch(value):
        return False
    try:
        datetime.fromisoformat(value)
    except ValueError:  # such as February 30
        return False
    return True


def _text(value: Any) -> bool:
    return isinstance(value, str) and len(value) <= MAX_EXPRESSION


def _digest(value: Any) -> bool:
    return isinstance(value, str) and is_digest(value)


def _flag(value: Any) -> bool:
    return isinstance(value, bool)


def _count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 1 << 63


def _small(value: Any) -> bool:
    return _count(value) and value < 1 << 31


def _positive(value: Any) -> bool:
    return _count(value) and value > 0


def _number(value: Any) -> bool:
    if type(value) is int:  # in a column of floats
        return abs(value) < 1 << 53
    return isinstance(value, float) and math.isfinite(value)


def _expression(value: Any) -> bool:
    if not _text(value):
        return False
    try:
        parse(value, everything=(), groups={})
    except MixtureError:
        return False
    return True


def _dtype(value: Any) -> bool:
    return isinstance(value, str) and value in DTYPES


def _maybe(shape: Any) -> Any:
    return lambda value: value is None or misfit(value, shape) is None


_COUNTED = {"documents": _count, "bytes": _count}
_FILE = {"role": _text, "name": _text, "object": _digest, "bytes": _count}
_MODULE = [_small, _text, _small, _small, _count, _count, _maybe(_number), _maybe(_number)]

SHAPES: dict[str, dict[str, Any]] = {
    "name": {"space": _text, "name": _text, "target": _digest, "parent": _maybe(_text)},
    "removal": {"kind": _text, "target": _digest, "removed": _flag},
    "partition": {
        **_COUNTED, "content": _digest, "duplicates": _count,
        "units": [{**_COUNTED, "digest": _digest}],
    },
    "evalset": {**_COUNTED, "object": _digest, "content": _digest},
    "contamination": {"evalset": _digest, "partition": _digest, "documents": _count},
    "model": {
        "model_type": _text, "parameters": _count, "bytes": _count, "dtype": _text,
        "tokenizer": _maybe(_digest), "context_length": _maybe(_small),
        "vocab_size": _maybe(_small), "trusted_code": _flag, "files": [_FILE],
        "tensors": [[_text, _text, [_count], _digest]],
    },
    "run": {
        "model": _digest, "role": _text, "seed": _maybe(_digest), "blend": _maybe(_digest),
        "mixture": _maybe(_expression), "scheme": _maybe(_text), "budget": _maybe(_text),
        "how": _text, "tokens": _maybe(_count), "steps": _maybe(_count),
        "seconds": _maybe(_number), "final_loss": _maybe(_number), "recipe": _maybe({}),
        "units": [{"unit": _digest, "tokens": _maybe(_count), "epochs": _maybe(_number)}],
    },
    "recipe": {"components": [[_digest, _positive, _positive]]},
    "mixture": {
        "mixture": _expression, "scheme": _text, "seed": _maybe(_digest), "subject": _digest,
        "blend": _digest, "size": _small, "unit_tokens": _maybe(_count), "origin": _text,
        "weights": [[_digest, _small, _positive, _positive]],
    },
    "protocol": {
        "max_length": _small, "dtype": _text, "prefix": _text, "tokenizer": _digest,
        "window": _text, "version": _small,
    },
    "evaluation": {
        **_COUNTED, "subject": _digest, "evalset": _digest, "protocol": _digest, "nll": _number,
        "tokens": _count, "seconds": _number, "device": _text, "document_scores": _digest,
        "token_scores": _maybe(_digest),
    },
    "calibration": {
        "subject": _digest, "text": _digest, "text_kind": _text, "protocol": _digest,
        "token_limit": _count, "tokens": _count, "held_out_tokens": _count, "largest": _small,
        "condition": _maybe(_number), "windows": _digest, "layers": [_digest], "seconds": _number,
    },
    "variant": {
        "variant": _count, "model": _digest, "parent": _digest, "parent_label": _text,
        "method": _text, "target": _text, "ratio": _number, "achieved": _number, "without": [_text],
        "epsilon": _maybe(_number), "step": _maybe(_small), "sequential": _flag,
        "calibration": _digest, "block_parameters": _count, "parent_block_parameters": _count,
        "parent_parameters": _count, "parent_bytes": _count, "shared_bytes": _count,
        "logit_difference": _maybe(_number), "seconds": _number, "modules": [_MODULE],
    },
    "task_score": {
        "subject": _digest, "task": _text, "metric": _text, "filter": _text, "value": _number,
        "stderr": _maybe(_number), "higher_is_better": _maybe(_flag), "n_shot": _maybe(_small),
        "samples": _maybe(_count), "sample_limit": _maybe(_number), "task_hash": _maybe(_text),
        "task_version": _maybe(_text), "harness": _text, "harness_version": _maybe(_text),
        "measured": _maybe(moment), "request": _maybe(_digest),
    },
    "build": {
        "model": _digest, "subject": _digest, "dtype": _maybe(_dtype), "max_shard_bytes": _positive,
    },
}  # fmt: skip
