"""Objects that were lost here, fetched again from places where the pool was pushed or pulled.

An object is named by its digest, so whatever place holds it, it is the one that was lost; bytes
that do not match are not taken. A place that cannot be reached is told and the next one asked.
"""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from poolreg.errors import Damage, PoolregError
from poolreg.files import storage_errors
from poolreg.progress import Progress
from poolreg.sharing.places import Place, object_path
from poolreg.sharing.where import place_at
from poolreg.store.registry import Registry
from poolreg.store.staging import working_folder
from poolreg.workers import at_once

_THREADS = 8


@dataclass
class Fetched:
    """From where each object came, by digest, and what went wrong on the way."""

    brought: dict[str, str] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)


def known_place(where: str, repo_type: str = "", revision: str | None = None) -> Place:
    """Return a place as a record of a push or pull names it; raises `PoolregError`."""
    if where.endswith(".tar") or Path(where).is_file():
        from poolreg.sharing.bundles import BundlePlace

        return BundlePlace(Path(where))
    return place_at(where, repo_type=repo_type or "model", revision=revision)


def refetch(
    registry: Registry, places: Iterable[tuple[str, str, str | None]], wanted: Mapping[str, int],
    progress: Progress,
) -> Fetched:  # fmt: skip
    """Bring objects, given with their sizes, from the first place (URL, type, revision) that has
    each; what is nowhere stays missing."""
    done = Fetched()
    for where, repo_type, revision in places:
        missing = {digest: size for digest, size in wanted.items() if digest not in done.brought}
        if not missing:
            break
        try:
            place = known_place(where, repo_type, revision)
            there = place.look().objects()
        except PoolregError as error:
            done.problems.append(f"{where}: {error.message}")
            continue
        _bring(registry, place, {d: s for d, s in missing.items() if d in there}, done, progress)
    return done


def _bring(
    registry: Registry, place: Place, wanted: Mapping[str, int], done: Fetched, progress: Progress
) -> None:
    progress.start(f"fetching from {place.url}", sum(wanted.values()), "bytes")
    turn = threading.Lock()

    with working_folder(registry.objects.staging) as folder:

        def bring(digest: str, tell: Callable[[int], None]) -> None:
            try:
                part = folder / digest
                place.fetch(object_path(digest), part, progress=tell)
                _check(part, digest)
                with turn, registry.writing():
                    registry.objects.take(part, digest)
                    done.brought[digest] = place.url
            except PoolregError as error:
                with turn:
                    done.problems.append(f"{place.url}: {digest[:12]}: {error.message}")

        at_once(bring, wanted, threads=_THREADS, progress=progress.advance)


def _check(part: Path, digest: str) -> None:
    with storage_errors(f"reading {part.name}"), open(part, "rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
        os.fsync(file.fileno())
    if found != digest:
        raise Damage("what is there does not match its name")
