"""Pull: take in what a published pool holds and this one lacks.

The place is looked at once, and everything fetched is of that state. Records are checked one by
one, then together: the pool as it will be is indexed beside the present one. Objects are compared
with their digests, and models pass the same strict intake as checkpoints do. Only then objects
move into the store, and after them the new records, all at once. Whatever is refused leaves the
pool as it was.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from poolreg.errors import NotFound, PoolregError, Refused, StorageError
from poolreg.files import lock
from poolreg.models.merges import builds_of, can_rebuild, rebuild
from poolreg.models.resolve import Resolver
from poolreg.models.stored import check_model
from poolreg.progress import SILENT, Progress
from poolreg.sharing.arrival import Arrival
from poolreg.sharing.contents import Conflict, Contents, Incoming, incoming, travelling
from poolreg.sharing.inbound import check_evalset, read_segment
from poolreg.sharing.places import Place
from poolreg.sharing.scratch import scratch_pool, write_segment
from poolreg.store import records
from poolreg.store.journal import Record
from poolreg.store.registry import Registry

_SOUND = "nothing was taken; ask whoever published it to push a sound pool"


@dataclass(frozen=True)
class Wish:
    """Whose weights to bring: of all models, of those that some expressions need, or of none.

    Records, results, texts and tokenizers come in any case. `trust_code` allows models that
    bring Python code of their author.
    """

    only: tuple[str, ...] = ()
    weights: bool = True
    trust_code: bool = False


@dataclass(frozen=True)
class Pulled:
    """What a pull brought.

    `rebuilt` counts merges that were made from their recipes, `left` objects that were not asked
    for, and `absent` those that the place does not hold.
    """

    place: str
    version: str
    records: int
    objects: int
    bytes: int
    rebuilt: int
    left: int
    absent: int
    conflicts: tuple[Conflict, ...]


@dataclass
class _Found:
    """What the published records say of objects."""

    sizes: dict[str, int] = field(default_factory=dict)
    models: dict[str, Mapping[str, Any]] = field(default_factory=dict)
    evalsets: dict[str, Mapping[str, Any]] = field(default_factory=dict)

    def add(self, record: Record) -> None:
        for digest, size in record.objects.items():
            if self.sizes.setdefault(digest, size) != size:
                raise Refused(
                    f"the published records disagree on the size of {digest[:12]}", hint=_SOUND
                )
        if record.kind == "model":
            self.models.setdefault(record.id, record.body)
        if record.kind == "evalset":
            self.evalsets.setdefault(record.id, record.body)


def pull(
    registry: Registry, place: Place, wish: Wish | None = None, *, origin: str | None = None,
    progress: Progress = SILENT,
) -> Pulled:  # fmt: skip
    """Bring what `place` holds into the pool; the union of both, whatever the order.

    `origin` (default: the place's alias) is said before names that mean something else here.
    Raises `Refused` for whatever cannot be trusted, `NotFound` for a place without a pool or a
    model that it does not hold, `Locked` while another pull runs. The pool is unchanged then.
    """
    with lock(registry.root / "locks" / "sharing", timeout=0.0, what="this pool to pull into it"):
        arrival = Arrival(place, place.look(), registry.objects, registry.root / "tmp/incoming")
        try:
            arrival.check_marker()
            done = _pull(registry, arrival, wish or Wish(), origin or place.alias, progress)
        except StorageError:
            raise  # what has arrived is there for the next try
        except PoolregError:
            arrival.discard()  # what was refused is not kept for later
            raise
        arrival.discard()
        return done


def _pull(
    registry: Registry, arrival: Arrival, wish: Wish, origin: str, progress: Progress
) -> Pulled:
    arrival.fetch_journal(progress)
    progress.start("comparing", 0, "records")
    ours = Contents.of(registry.journal.all())
    taken = incoming(Contents.of(_published(arrival)), ours, origin=origin)
    found, new = _Found(), arrival.staging / "new.jsonl"
    new.unlink(missing_ok=True)
    count = write_segment(_taken(arrival, taken, found, wish, progress), new)
    with _as_it_will_be(registry, arrival, new) as future:
        chosen = _chosen(future, found, wish)
        missing = [digest for digest in found.sizes if not arrival.objects.has(digest)]
        unwanted = _weights(found, found.models.keys() - chosen) - _weights(found, chosen)
        wanted = {digest: found.sizes[digest] for digest in missing if digest not in unwanted}
        arrival.fetch_objects(wanted, progress)
        _check(future, arrival, found, ours, progress)
        rebuilt = _rebuild(future, arrival, found, chosen, progress)
    absent = [digest for digest in wanted if not arrival.objects.has(digest)]
    if wish.only and _weights(found, chosen) & set(absent):
        raise NotFound(
            f"{arrival.place.url} does not hold the weights of {', '.join(wish.only)}",
            hint="ask whoever has them to push them",
        )
    staged = dict(arrival.objects.staged())
    done = Pulled(
        arrival.place.url, arrival.snapshot.version, count, len(staged),
        sum(path.stat().st_size for path in staged.values()), rebuilt,
        len(missing) - len(wanted), len(absent), taken.conflicts,
    )  # fmt: skip
    if count or staged:
        _publish(registry, arrival.place, new, staged, done)
    arrival.keep_journal()
    return done


# -- records -----------------------------------------------------------------------------------


def _published(arrival: Arrival) -> Iterator[Record]:
    for digest, file in arrival.segments().items():
        yield from read_segment(file, digest)


def _taken(
    arrival: Arrival, taken: Incoming, found: _Found, wish: Wish, progress: Progress
) -> Iterator[Record]:
    """Yield the records that are new here, noting what all of them name."""
    for record in map(travelling, _published(arrival)):
        progress.advance(1)
        if record.kind == "model" and not wish.trust_code:
            # What another user allowed, a model's own code, is not allowed here.
            record = replace(record, body={**record.body, "trusted_code": False})
        found.add(record)
        if taken.wants(record):
            yield record
    yield from (record for record in taken.made if not taken.ours.has(record.kind, record.id))


@contextlib.contextmanager
def _as_it_will_be(registry: Registry, arrival: Arrival, new: Path) -> Iterator[Registry]:
    """Give the pool with the new records; raises `Refused` if they do not make one."""
    registry.catalog.refresh()
    segments = [registry.root / "journal" / name for name in registry.journal.segments()]
    with scratch_pool(
        arrival.staging / "pool", arrival.objects, [*segments, new],
        catalog=registry.root / "catalog.duckdb",
    ) as future:  # fmt: skip
        try:
            Resolver(future)
        except StorageError:
            raise
        except PoolregError as error:
            raise Refused(
                f"the published records do not make a pool: {error.message}",
                hint=_SOUND,
            ) from error
        yield future


# -- models ------------------------------------------------------------------------------------


def _chosen(future: Registry, found: _Found, wish: Wish) -> set[str]:
    """Return the published models whose weights are wanted."""
    chosen = set(found.models) if wish.weights and not wish.only else set()
    resolver = Resolver(future)
    for text in wish.only if wish.weights else ():
        subject = resolver.subject(text)
        chosen |= {model for model, _ in subject.components} | {subject.seed or ""}
    for model in list(chosen):
        chosen |= {parent for build in builds_of(future, model) for parent, _ in build.components}
    chosen &= found.models.keys()
    for model in chosen if not wish.trust_code else ():
        if any(file["role"] == "code" for file in found.models[model]["files"]):
            raise Refused(
                f"model {model[:12]} brings Python code of its author",
                hint="read it, and add --trust-code if you trust it; or leave the model out with "
                "--only or --results-only",
            )
    return chosen


def _weights(found: _Found, models: set[str]) -> set[str]:
    files = (file for model in models for file in found.models[model]["files"])
    return {file["object"] for file in files if file["role"] == "weights"}


def _whole(objects: Any, body: Mapping[str, Any]) -> bool:
    return all(objects.has(file["object"]) for file in body["files"])


def _check(
    future: Registry, arrival: Arrival, found: _Found, ours: Contents, progress: Progress
) -> None:
    """Pass models and evalsets that have arrived, or are complete only now, through intake."""
    for digest, body in found.evalsets.items():
        if not ours.has("evalset", digest) and arrival.objects.has(body["object"]):
            check_evalset(future.objects, digest, body)
    models = {
        digest: body
        for digest, body in found.models.items()
        if _whole(arrival.objects, body)
        and not (ours.has("model", digest) and _whole(arrival.store, body))
    }
    progress.start("checking", sum(body["bytes"] for body in models.values()), "bytes")
    for digest, body in models.items():
        try:
            check_model(future, digest, body, progress=progress.advance)
        except StorageError:
            raise
        except PoolregError as error:
            raise Refused(
                f"model {digest[:12]} of {arrival.place.url}: {error.message}", hint=error.hint
            ) from error


def _rebuild(
    future: Registry, arrival: Arrival, found: _Found, chosen: set[str], progress: Progress
) -> int:
    """Make the weights of merges that travelled as recipes, where their parents are here."""
    rebuilt = 0
    for digest in sorted(chosen):
        body = found.models[digest]
        builds = [] if _whole(arrival.objects, body) else builds_of(future, digest)
        for build in builds:
            if can_rebuild(future, build):
                progress.start("rebuilding merges", body["bytes"], "bytes")
                rebuild(future, build, progress=progress)
                check_model(future, digest, body)
                rebuilt += 1
                break
    return rebuilt


def _publish(
    registry: Registry, place: Place, new: Path, staged: Mapping[str, Path], done: Pulled
) -> None:  # fmt: skip
    """Make what arrived part of the pool: objects first, then all records at once."""
    said = records.transfer(
        "pull", done.place, version=done.version, records=done.records, objects=done.objects,
        bytes=done.bytes, skipped=done.left + done.absent, repo_type=place.repo_type,
        revision=place.revision,
    )  # fmt: skip
    with registry.writing():
        for digest, path in staged.items():
            registry.objects.take(path, digest)
        if done.records:
            registry.journal.adopt(new)
        registry.record(said)
    registry.catalog.refresh()
