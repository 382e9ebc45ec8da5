"""The history of a pool: names given and moved, what was added, made, removed, pushed and pulled.

It is read from the records, each with the time when it was first written, wherever that was: what
a pull brought stands at the time when it was made, beside the row of the pull itself.
"""

from __future__ import annotations

import unicodedata
from datetime import UTC, datetime
from typing import Any

from poolreg.errors import UsageError
from poolreg.store.registry import Registry, unknown_name

_SHORTEST_PREFIX = 6


def history(
    registry: Registry, name: str | None = None, *, since: datetime | None = None,
    limit: int | None = None,
) -> list[dict[str, Any]]:  # fmt: skip
    """Return what happened in the pool, newest first; `limit` keeps the newest.

    Keys: added (UTC), event, kind, name, digest, from_digest, detail; see the view `history`.
    With `name` only what happened to all that was ever called so, or to the one thing whose
    digest begins so. `since` without a time zone is UTC. Raises `NotFound` and `UsageError`.
    """
    if since is not None and since.tzinfo is not None:
        since = since.astimezone(UTC).replace(tzinfo=None)
    digests = None if name is None else _digests(registry, unicodedata.normalize("NFC", name))
    return registry.select("history", digests=digests, since=since, limit=limit)


def _digests(registry: Registry, text: str) -> list[str]:
    known: dict[str, list[str]] = {}
    for row in registry.select("history_names"):
        known.setdefault(row["name"], []).append(row["digest"])
    if text in known:
        return known[text]
    found = {digest for digests in known.values() for digest in digests if digest.startswith(text)}
    if len(text) < _SHORTEST_PREFIX or not found:
        raise unknown_name("partition, evalset or model", text, known)
    if len(found) > 1:
        raise UsageError(f"{text} begins {len(found)} digests", hint="give more of its digits")
    return list(found)
