"""Pull: take in what a published pool holds and this one lacks.

The place is looked at once, and everything fetched is of that state. Records are checked one by
one, then together: the pool as it will be is indexed beside the present one. Objects are compared
with their digests, and models pass the same strict intake as checkpoints do. Only then objects
move into the store, and after them the new records, all at once. Whatever is refused leaves the
pool as it was.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from poolreg import faults
from poolreg.canonical import digest_of
from poolreg.errors import PoolregError, Refused, StorageError
from poolreg.files import lock
from poolreg.models.resolve import Resolver
from poolreg.progress import SILENT, Progress
from poolreg.sharing.arrival import Arrival
from poolreg.sharing.contents import Clash, Contents, Incoming, incoming, travelling
from poolreg.sharing.goods import (
    SOUND,
    Goods,
    Wish,
    check_goods,
    check_left,
    chosen_models,
    rebuild_merges,
)
from poolreg.sharing.places import Place
from poolreg.sharing.scratch import scratch_pool, write_segment
from poolreg.store import records
from poolreg.store.journal import Record
from poolreg.store.registry import Registry

ATTEMPTS = 5  # to find that nobody wrote here while we compared


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


def pull(
    registry: Registry, place: Place, wish: Wish | None = None, *, origin: str | None = None,
    progress: Progress = SILENT,
) -> Pulled:  # fmt: skip
    """Bring what `place` holds into the pool; the union of both, whatever the order.

    `origin` (default: the place's alias) is said before names that mean something else here.
    Raises `Refused` for whatever cannot be trusted, `NotFound` for a place without a pool or a
    model that it does not hold, `Locked` while another pull runs. The pool is unchanged then.
    """
    sharing = lock(
        registry.root / "locks" / "sharing", timeout=0.0, what="this pool to pull into it"
    )
    with sharing, registry.writing():  # nothing that was found here is collected meanwhile
        key = digest_of([place.url, place.repo_type])
        staging = registry.root / "tmp" / f"incoming-{key[:12]}"
        arrival = Arrival(place, place.look(), registry.objects, staging)
        try:
            arrival.check_marker()
            arrival.fetch_journal(progress)
            done, attempt = None, 0
            while done is None:
                attempt += 1
                done = _pull(
                    registry, arrival, wish or Wish(), origin or place.alias, progress,
                    certain=attempt < ATTEMPTS,
                )  # fmt: skip
        except StorageError:
            raise  # what has arrived is there for the next try
        except PoolregError:
            arrival.discard()  # what was refused is not kept for later
            raise
        arrival.keep_journal()
        arrival.discard()
        return done


def _pull(
    registry: Registry, arrival: Arrival, wish: Wish, origin: str, progress: Progress, *,
    certain: bool,
) -> Pulled | None:  # fmt: skip
    """Compare, fetch, check and publish; None if the pool changed meanwhile, if `certain`."""
    progress.start("comparing", 0, "records")
    segments = registry.journal.segments()
    ours = Contents.of(registry.journal.all(segments))
    taken = incoming(Contents.of(arrival.records()), ours, origin=origin)
    goods, new = Goods(), arrival.staging / "new.jsonl"
    count = write_segment(_taken(arrival, taken, goods, progress), new)
    before = goods.lacking(registry.objects)
    with _as_it_will_be(registry, arrival, new) as future:
        goods.settle(future)
        chosen = chosen_models(future, goods, wish)
        unasked = goods.weights(goods.models.keys() - chosen) - goods.weights(chosen)
        missing = goods.lacking(arrival.objects)
        arrival.fetch_objects({d: s for d, s in missing.items() if d not in unasked}, progress)
        check_goods(future, arrival, goods, ours, trust_code=wish.trust_code, progress=progress)
        rebuilt = rebuild_merges(future, arrival, goods, chosen, progress)
    check_left(arrival, goods, wish, chosen)
    left = goods.lacking(arrival.objects).keys()
    came = before.keys() - left
    done = Pulled(
        arrival.place.url, arrival.snapshot.version, count, len(came),
        sum(goods.sizes[digest] for digest in came), rebuilt, len(left & unasked),
        len(left - unasked), taken.clashes, taken.moved,
    )  # fmt: skip
    if count or came:
        if certain and registry.journal.segments() != segments:
            return None
        coded = [model for model in chosen if goods.bring_code(model)]
        # What was here before and is not any more was lost, not left.
        lost = {row["digest"] for row in registry.select("object_list") if not row["was_left"]}
        _publish(registry, arrival, new, done, left=sorted(left - lost), coded=coded)
        registry.catalog.refresh()
    return done


def _taken(arrival: Arrival, taken: Incoming, goods: Goods, progress: Progress) -> Iterator[Record]:
    """Yield the records that are new here, noting what all of them name."""
    for record in map(travelling, arrival.records()):
        progress.advance(1)
        if record.kind == "model":
            # What another user allowed, a model's own code, is not allowed here.
            record = replace(record, body={**record.body, "trusted_code": False})
        goods.add(record)
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
                f"the published records do not make a pool: {error.message}", hint=SOUND
            ) from error
        ghosts = future.select("dangling_names")
        if ghosts and not registry.select("dangling_names"):
            name = ghosts[0]["name"]
            raise Refused(f"the published name {name!r} stands for nothing", hint=SOUND)
        yield future


def _publish(
    registry: Registry, arrival: Arrival, new: Path, done: Pulled, *, left: Sequence[str],
    coded: Sequence[str],
) -> None:  # fmt: skip
    """Make what arrived part of the pool: objects first, then all records at once."""
    faults.step("pull.publish")
    for digest, path in arrival.objects.staged():
        faults.step("pull.object")
        registry.objects.take(path, digest)
    faults.step("pull.records")
    if done.records:
        registry.journal.adopt(new)
    faults.step("pull.note")
    place = arrival.place
    said = records.transfer(
        "pull", place.url, version=done.version, records=done.records, objects=done.objects,
        bytes=done.bytes, left=left, repo_type=place.repo_type, revision=place.revision,
    )  # fmt: skip
    registry.record(*(records.trust(model) for model in coded), said)
