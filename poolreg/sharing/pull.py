"""Pull: take in what a published pool holds and this one lacks.

The place is looked at once, and everything fetched is of that state. Records are checked one by
one, then together: the pool as it will be is indexed beside the present one. Objects are compared
with their digests, and models pass the same strict intake as checkpoints do. Only then objects
move into the store, and after them the new records, all at once. Whatever is refused leaves the
pool as it was.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from poolreg.canonical import digest_of
from poolreg.errors import NotFound, PoolregError, Refused, StorageError
from poolreg.files import lock
from poolreg.models.merges import builds_of, can_rebuild, rebuild
from poolreg.models.resolve import Resolver
from poolreg.models.stored import check_model
from poolreg.progress import SILENT, Progress
from poolreg.sharing.arrival import Arrival
from poolreg.sharing.contents import Clash, Contents, Incoming, incoming, travelling
from poolreg.sharing.inbound import check_evalset
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
    for, and `absent` those that the place does not hold. `moved` are names that follow the place,
    where somebody who knew their meaning here gave them another one.
    """

    place: str
    version: str
    records: int
    objects: int
    bytes: int
    rebuilt: int
    left: int
    absent: int
    clashes: tuple[Clash, ...]
    moved: tuple[str, ...]


@dataclass
class _Found:
    """What the published records say of objects."""

    sizes: dict[str, int] = field(default_factory=dict)
    models: dict[str, Mapping[str, Any]] = field(default_factory=dict)
    evalsets: dict[str, Mapping[str, Any]] = field(default_factory=dict)

    def add(self, record: Record) -> None:
        for digest, size in record.objects.items():
            if self.sizes.setdefault(digest, size) != size:
                raise _disagree(digest)
        if record.kind == "model":
            self.models[record.id] = record.body
        if record.kind == "evalset":
            self.evalsets[record.id] = record.body

    def settle(self, future: Registry) -> None:
        """Of several records about one thing, keep what the pool will go by: that is checked."""
        for digest in self.evalsets:
            self.evalsets[digest] = future.one("evalset", digest=digest)
        for digest in self.models:
            tensors = [
                [row["name"], row["dtype"], row["shape"], row["sha256"]]
                for row in future.select("model_tensors", model=digest)
            ]
            files = future.select("model_files", model=digest)
            row = future.one("model", digest=digest)
            self.models[digest] = {**row, "files": files, "tensors": tensors}


def _disagree(digest: str) -> Refused:
    return Refused(f"the published records disagree on the size of {digest[:12]}", hint=_SOUND)


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
        key = digest_of([place.url, place.repo_type])
        staging = registry.root / "tmp" / f"incoming-{key[:12]}"
        arrival = Arrival(place, place.look(), registry.objects, staging)
        try:
            arrival.check_marker()
            arrival.fetch_journal(progress)
            done = None
            while done is None:  # again if somebody wrote here while we compared and fetched
                done = _pull(registry, arrival, wish or Wish(), origin or place.alias, progress)
        except StorageError:
            raise  # what has arrived is there for the next try
        except PoolregError:
            arrival.discard()  # what was refused is not kept for later
            raise
        arrival.keep_journal()
        arrival.discard()
        return done


def _pull(
    registry: Registry, arrival: Arrival, wish: Wish, origin: str, progress: Progress
) -> Pulled | None:
    """Compare, fetch, check and publish; None if the pool has changed meanwhile."""
    progress.start("comparing", 0, "records")
    segments = registry.journal.segments()
    ours = Contents.of(registry.journal.all(segments))
    taken = incoming(Contents.of(arrival.records()), ours, origin=origin)
    found, new = _Found(), arrival.staging / "new.jsonl"
    new.unlink(missing_ok=True)
    count = write_segment(_taken(arrival, taken, found, progress), new)
    with _as_it_will_be(registry, arrival, new) as future:
        found.settle(future)
        chosen = _chosen(future, found, wish)
        missing = [
            digest for digest, size in found.sizes.items() if not _here(arrival, digest, size)
        ]
        unwanted = _weights(found, found.models.keys() - chosen) - _weights(found, chosen)
        wanted = {digest: found.sizes[digest] for digest in missing if digest not in unwanted}
        arrival.fetch_objects(wanted, progress)
        _check(future, arrival, found, ours, wish, progress)
        rebuilt = _rebuild(future, arrival, found, chosen, progress)
    left = [digest for digest in missing if not _here(arrival, digest, found.sizes[digest])]
    _check_left(arrival, found, wish, chosen, left)
    staged = dict(arrival.objects.staged())
    came = staged.keys() | (wanted.keys() - set(left))  # what was damaged is mended at its place
    done = Pulled(
        arrival.place.url, arrival.snapshot.version, count, len(came),
        sum(found.sizes.get(digest, 0) for digest in came), rebuilt, len(missing) - len(wanted),
        len(set(left) & wanted.keys()), taken.clashes, taken.moved,
    )  # fmt: skip
    if not count and not came:
        return done
    coded = [m for m in chosen if _brings_code(found, m)]
    with registry.writing():
        if registry.journal.segments() != segments:
            return None
        _publish(registry, arrival.place, new, staged, done, left=left, coded=coded)
    registry.catalog.refresh()
    return done


def _here(arrival: Arrival, digest: str, size: int) -> bool:
    """Tell whether an object is here, or has arrived, in the size that records say."""
    path = arrival.objects.path(digest)
    return path.is_file() and path.stat().st_size == size


def _check_left(
    arrival: Arrival, found: _Found, wish: Wish, chosen: set[str], left: list[str]
) -> None:
    """Raise `Refused` for lies about objects that are here, `NotFound` for what was asked for."""
    for digest in left:
        if arrival.objects.has(digest):
            raise _disagree(digest)
    if wish.only and _weights(found, chosen) & set(left):
        raise NotFound(
            f"{arrival.place.url} does not hold the weights of {', '.join(wish.only)}",
            hint="ask whoever has them to push them",
        )


# -- records -----------------------------------------------------------------------------------


def _taken(
    arrival: Arrival, taken: Incoming, found: _Found, progress: Progress
) -> Iterator[Record]:
    """Yield the records that are new here, noting what all of them name."""
    for record in map(travelling, arrival.records()):
        progress.advance(1)
        if record.kind == "model":
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
        ghosts = future.select("dangling_names")
        if ghosts and not registry.select("dangling_names"):
            name = ghosts[0]["name"]
            raise Refused(f"the published name {name!r} stands for nothing", hint=_SOUND)
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
        if _brings_code(found, model):
            raise Refused(
                f"model {model[:12]} brings Python code of its author",
                hint="read it, and add --trust-code if you trust it; or leave the model out with "
                "--only or --results-only",
            )
    return chosen


def _brings_code(found: _Found, model: str) -> bool:
    return any(file["role"] == "code" for file in found.models[model]["files"])


def _weights(found: _Found, models: set[str]) -> set[str]:
    files = (file for model in models for file in found.models[model]["files"])
    return {file["object"] for file in files if file["role"] == "weights"}


def _whole(objects: Any, body: Mapping[str, Any]) -> bool:
    return all(objects.has(file["object"]) for file in body["files"])


def _check(
    future: Registry, arrival: Arrival, found: _Found, ours: Contents, wish: Wish,
    progress: Progress,
) -> None:  # fmt: skip
    """Pass models and evalsets that have arrived, or are complete only now, through intake."""
    for digest, body in found.evalsets.items():
        known = ours.has("evalset", digest) and arrival.store.has(body["object"])
        if not known and arrival.objects.has(body["object"]):
            check_evalset(future.objects, digest, body)
    models = {
        digest: body
        for digest, body in found.models.items()
        if _whole(arrival.objects, body)
        and not (ours.has("model", digest) and _whole(arrival.store, body))
    }
    progress.start("checking", sum(body["bytes"] for body in models.values()), "bytes")
    for digest, body in models.items():
        with _blamed(arrival, digest):
            check_model(future, digest, body, trust_code=wish.trust_code, progress=progress.advance)


@contextlib.contextmanager
def _blamed(arrival: Arrival, digest: str) -> Iterator[None]:
    """Turn what is wrong with a published model into `Refused`."""
    try:
        yield
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
    todo = [
        (digest, build)
        for digest in sorted(chosen)
        if not _whole(arrival.objects, found.models[digest])
        for build in builds_of(future, digest)[:1]
        if can_rebuild(future, build)
    ]
    arrival.check_space(sum(found.models[digest]["bytes"] for digest, _ in todo))
    for digest, build in todo:
        progress.start("rebuilding merges", found.models[digest]["bytes"], "bytes")
        with _blamed(arrival, digest):
            rebuild(future, build, progress=progress)
            check_model(future, digest, found.models[digest])
    return len(todo)


def _publish(
    registry: Registry, place: Place, new: Path, staged: Mapping[str, Path], done: Pulled, *,
    left: Sequence[str], coded: Sequence[str],
) -> None:  # fmt: skip
    """Make what arrived part of the pool: objects first, then all records at once."""
    for digest, path in staged.items():
        registry.objects.take(path, digest)
    if done.records:
        registry.journal.adopt(new)
    registry.record(
        *(records.trust(model) for model in coded),
        records.transfer(
            "pull", done.place, version=done.version, records=done.records, objects=done.objects,
            bytes=done.bytes, left=sorted(left), repo_type=place.repo_type,
            revision=place.revision,
        ),
    )  # fmt: skip
