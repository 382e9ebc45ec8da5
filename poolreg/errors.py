"""Every error poolreg raises on purpose, each with the exit code that the CLI ends with.

    PoolregError                    1
    ├── UsageError                  2   the request itself cannot be right
    │   ├── MixtureError            2   an expression that names no mixture
    │   ├── NameRefused             2   a name outside the rule for names
    │   └── ConfigError             2   a recipe file or option that cannot be used
    ├── NotFound                    1   no such name, digest or file
    ├── Conflict                    1   the name or output place is taken
    ├── Incompatible                1   models or tokenizers that cannot be averaged or compared
    ├── Refused                     1   a file from outside that is unsafe, malformed or not finite
    ├── QueryError                  1   SQL that failed, or that the sandbox forbids
    ├── StorageError                1   the disk is full, read-only or failing
    ├── UnknownFormat               1   a pool written by a newer poolreg
    ├── MissingPackage              1   an optional package is needed
    ├── CheckFailed                 3   a check was asked for and did not pass
    │   ├── Drift                   3   a partition's file changed on disk
    │   └── Damage                  3   stored bytes are not what was stored
    ├── NoPool                     10   no pool here
    └── Locked                     11   another process holds the lock

An error says what is wrong, then the way out (`hint`); what it talks about is in `data`.
Errors are raised where the fact is known and turned into text and an exit code in one place,
`poolreg.cli.main`.
"""

from __future__ import annotations

from typing import Any, ClassVar


class PoolregError(Exception):
    """Base of all errors: `message`, an optional `hint` (the way out) and `data` (the facts)."""

    exit_code: ClassVar[int] = 1

    def __init__(self, message: str, *, hint: str = "", **data: Any) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint
        self.data = data

    def __str__(self) -> str:
        return f"{self.message}\n{self.hint}" if self.hint else self.message


class UsageError(PoolregError):
    """The request itself cannot be right."""

    exit_code = 2


class MixtureError(UsageError):
    """An expression that names no mixture: syntax, negative or all-zero weights."""


class NameRefused(UsageError):
    """A name outside the rule for names."""


class ConfigError(UsageError):
    """A recipe file or option that cannot be used."""


class NotFound(PoolregError):
    """No such name, digest or file."""


class Conflict(PoolregError):
    """The name or the output place is taken by something else."""


class Incompatible(PoolregError):
    """Models or tokenizers that cannot be averaged or compared."""


class Refused(PoolregError):
    """A file from outside that is unsafe, malformed or holds values that are not finite."""


class QueryError(PoolregError):
    """SQL that failed, or that the read-only sandbox forbids."""


class StorageError(PoolregError):
    """The disk is full, read-only or failing."""


class UnknownFormat(PoolregError):
    """A pool written by a newer poolreg."""


class MissingPackage(PoolregError):
    """An optional package is needed."""


class CheckFailed(PoolregError):
    """A check was asked for and did not pass."""

    exit_code = 3


class Drift(CheckFailed):
    """A partition's file changed on disk since it was added."""


class Damage(CheckFailed):
    """Stored bytes are not what was stored."""


class NoPool(PoolregError):
    """No pool here."""

    exit_code = 10


class Locked(PoolregError):
    """Another process holds the lock."""

    exit_code = 11
