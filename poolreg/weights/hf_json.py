"""JSON files of Hugging Face folders, written by strangers: read whole, checked, never believed.

What comes out is plain data: an object, UTF-8, of a bounded size and depth, without NaN or
infinity. Asking for code to run is refused here too, because it is asked for in these files.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from pathlib import Path
from typing import Any, NoReturn

from poolreg.errors import Refused
from poolreg.files import read_capped

MAX_DEPTH = 64  # no real config or tokenizer is half as deep; Python recurses to about 1000
# The smallest values take 2 bytes in a file and 100 in memory. The largest tokenizer in use has
# 2 million of them, half of what may stand in one.
_BYTES_A_VALUE = 16


def read_object(path: Path, limit: int) -> dict[str, Any]:
    """Return the JSON object in a file of at most `limit` bytes.

    Raises `Refused`, naming the file, when it holds anything else, or so many values that they
    would take far more memory than the file has bytes.
    """
    data = read_capped(path, limit, error=Refused, what=path.name)
    if sum(map(data.count, (b",", b"[", b"{"))) > limit // _BYTES_A_VALUE:
        raise _refusal(path, f"holds more than {limit // _BYTES_A_VALUE} values")
    try:
        value = json.loads(
            data.decode("utf-8"),
            object_pairs_hook=_unique,
            parse_float=_finite,
            parse_constant=_no_number,
        )
        if b"\\ud" in data or b"\\uD" in data:
            json.dumps(value, ensure_ascii=False).encode("utf-8")  # a lone half of a character
    except (ValueError, RecursionError) as error:
        raise _refusal(path, f"is not valid JSON ({error})") from error
    if not isinstance(value, dict):
        raise _refusal(path, f"holds a JSON {type(value).__name__} instead of an object")
    if _deeper(value, MAX_DEPTH):
        raise _refusal(path, f"is nested more than {MAX_DEPTH} levels deep")
    return value


def refuse_code(value: dict[str, Any], path: Path) -> None:
    """Raise `Refused` if `value`, read from `path`, asks the loader to run code of its author.

    That is an `auto_map` (Python files beside the weights), or an implementation of attention
    or experts that names a repository of kernels, at any depth. The file beside an exported
    variant of ours is never run: poolreg's own classes are found first.
    """
    if str(value.get("model_type", "")).startswith("poolreg_"):
        value = {key: item for key, item in value.items() if key != "auto_map"}
    reason = _code(value)
    if reason:
        raise Refused(
            f"{path} asks to run code of its author: {reason}",
            hint="read that code; if you trust it, say so with --trust-code (trust_code=True); "
            "where the library knows the model without it, remove that entry from the file",
            path=str(path),
        )


def _code(value: Any) -> str:
    if isinstance(value, list):
        return next(filter(None, map(_code, value)), "")
    if not isinstance(value, dict):
        return ""
    for key, item in value.items():
        if key == "auto_map" and item:
            return "it has an auto_map"
        if key.endswith("_implementation") and "/" in json.dumps(item):
            return f"its {key!r} is a repository"
    return next(filter(None, map(_code, value.values())), "")


def _deeper(value: Any, levels: int) -> bool:
    if levels == 0:
        return True
    items = value.values() if isinstance(value, dict) else value
    return any(_deeper(item, levels - 1) for item in items if isinstance(item, dict | list))


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        twice = Counter(key for key, _ in pairs).most_common(1)[0][0]
        raise ValueError(f"the key {twice[:100]!r} stands there twice")
    return result


def _finite(text: str) -> float:
    number = float(text)
    return number if math.isfinite(number) else _no_number(text)


def _no_number(text: str) -> NoReturn:
    raise ValueError(f"{text[:40]} is not a finite number")


def _refusal(path: Path, reason: str) -> Refused:
    hint = "download or export the folder again; poolreg reads only whole, well-formed files"
    return Refused(f"{path} {reason}", hint=hint, path=str(path))
