"""Canonical JSON and digests: the one way in which poolreg turns facts into identities.

Canonical JSON is sorted keys, no spaces, UTF-8 as is, no NaN or infinity, object keys are
strings, floats in Python's shortest round-trip form. It is a contract: changing it changes
every digest in every pool.
"""

from __future__ import annotations

import hashlib
import json
import re
from typing import Any

from poolreg.errors import Refused

_DIGEST = re.compile(r"[0-9a-f]{64}")


def canonical_json(value: Any) -> bytes:
    """Return the canonical JSON bytes of `value`.

    Raises `Refused` for values that have no canonical form (NaN, infinities, non-string keys,
    lone surrogates, objects that are not JSON).
    """
    try:
        _check_keys(value)
        text = json.dumps(
            value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False
        )
        return text.encode("utf-8")
    except (TypeError, ValueError, RecursionError) as error:
        raise Refused(f"value has no canonical JSON form: {error}") from error


def _check_keys(value: Any) -> None:
    # json.dumps would turn the keys 1, None and True into strings without a word.
    if isinstance(value, dict):
        for key, item in value.items():
            if not isinstance(key, str):
                raise Refused(f"canonical JSON needs string keys, not {key!r}")
            _check_keys(item)
    elif isinstance(value, list | tuple):
        for item in value:
            _check_keys(item)


def sha256(data: bytes | memoryview) -> str:
    """Return the sha256 of `data` as 64 lower-case hexadecimal digits."""
    return hashlib.sha256(data).hexdigest()


def digest_of(value: Any) -> str:
    """Return the sha256 of the canonical JSON of `value`."""
    return sha256(canonical_json(value))


def is_digest(text: str) -> bool:
    """Tell whether `text` is a full digest (64 lower-case hexadecimal digits)."""
    return _DIGEST.fullmatch(text) is not None
