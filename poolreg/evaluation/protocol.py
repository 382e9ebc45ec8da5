"""The evaluation protocol: everything that can change a measured number, and nothing else.

A protocol is a handful of plain facts with a digest; together with the digests of what was
measured and of the text it identifies an evaluation. Device, batch size and names are not part
of it: they must not change the number. This module imports nothing heavy, so that a memoised
answer can be looked up without loading a model library.

The window rule stands here too, as arithmetic on lengths alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from functools import cached_property
from typing import Any, NamedTuple

from poolreg.canonical import digest_of
from poolreg.errors import ConfigError, Refused, UnknownFormat

LONGEST = 2048  # tokens; a longer window is only used when it is asked for
VERSION = 1
DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True)
class Protocol:
    """How text is scored: window length in tokens, tokenizer digest, compute dtype, rules.

    Raises `ConfigError` for a window below one token or an unknown dtype, and `UnknownFormat`
    for rules that this version of poolreg does not implement.
    """

    max_length: int
    tokenizer: str
    dtype: str = "float32"
    prefix: str = "bos-or-eos"
    window: str = "rolling"
    version: int = VERSION

    def __post_init__(self) -> None:
        _check_max_length(self.max_length)
        if self.dtype not in DTYPES:
            raise ConfigError(
                f"cannot evaluate in dtype {self.dtype!r}",
                hint=f"choose one of {', '.join(DTYPES)}",
            )
        if (self.prefix, self.window, self.version) != ("bos-or-eos", "rolling", VERSION):
            raise _unknown(f"prefix {self.prefix!r} and window {self.window!r}", self.version)

    @cached_property
    def digest(self) -> str:
        """The sha256 of the protocol's canonical record."""
        return digest_of(self.as_record())

    def as_record(self) -> dict[str, str | int]:
        """Return the fields as a plain record for the journal."""
        return asdict(self)

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> Protocol:
        """Return the protocol that `as_record` described.

        Raises `Refused` for a record of another shape and `UnknownFormat` for another version.
        """
        if record.get("version", VERSION) != VERSION:
            raise _unknown("rules of its own", record["version"])
        names = {field.name for field in fields(cls)}
        if record.keys() != names:
            odd = ", ".join(sorted(record.keys() ^ names))
            raise Refused(f"not the record of a protocol: missing or unknown fields: {odd}")
        if not isinstance(record["tokenizer"], str):
            raise Refused("not the record of a protocol: the tokenizer is not a digest")
        return cls(**record)


def evaluation_id(subject: str, evalset: str, protocol: str) -> str:
    """Return the id of an evaluation from the digests of its three parts.

    `subject` is the digest of a model or recipe.
    """
    return digest_of([subject, evalset, protocol])


def default_max_length(context: int | None) -> int:
    """Return the window length for a model with a context of `context` tokens (None: unknown)."""
    return min(context, LONGEST) if context else LONGEST


class Window(NamedTuple):
    """One forward pass over `[prefix] + document`: the inputs [start, stop) and what they score.

    The last `scored` inputs predict the document's tokens [stop - scored, stop).
    """

    start: int
    stop: int
    scored: int


def rolling_windows(length: int, max_length: int) -> Iterator[Window]:
    """Yield the windows that score each token of a document of `length` tokens exactly once.

    Position 0 of the inputs is the prefix token, which is context and never scored. Windows
    follow each other by `max_length` predictions; the last one is filled up with left context, so
    that it has min(max_length, length) inputs. This is the rule of lm-evaluation-harness's
    `loglikelihood_rolling` (rolling windows with one token of context, made disjoint). An empty
    document has no window.
    """
    _check_max_length(max_length)
    for scored_before in range(0, length, max_length):
        stop = min(scored_before + max_length, length)
        yield Window(max(0, stop - max_length), stop, stop - scored_before)


def _check_max_length(value: object) -> None:
    if type(value) is not int or value < 1:
        raise ConfigError(
            f"a window must hold at least one token, not {value!r}",
            hint="give max_length a whole number from 1 up",
        )


def _unknown(rules: str, version: object) -> UnknownFormat:
    return UnknownFormat(
        f"this poolreg does not know the protocol of version {version!r} with {rules}",
        hint="a newer poolreg made it: upgrade poolreg",
    )
