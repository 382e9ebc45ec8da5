"""Push: publish what this pool holds and a place lacks.

The records that are there already are read first, as a pull would. What is new goes there as one
more segment of the journal, after the objects that it names; the tables, the card and the model
folders are made from the pool as it will be there, so they show the union of both. On the Hub all
this is one commit. If somebody else publishes in the meantime, everything is compared again; what
was uploaded is not uploaded twice.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from poolreg.errors import Conflict, NotFound, StorageError
from poolreg.files import lock
from poolreg.models.merges import builds_of
from poolreg.models.resolve import Resolver
from poolreg.progress import SILENT, Progress
from poolreg.sharing.arrival import Arrival
from poolreg.sharing.bundles import write_bundle
from poolreg.sharing.contents import Clash, Contents, Incoming, incoming, travelling
from poolreg.sharing.inbound import read_segment
from poolreg.sharing.places import (
    MARK,
    MARKER,
    Moved,
    Outgoing,
    Place,
    Snapshot,
    Unanswered,
    object_path,
    segment_path,
)
from poolreg.sharing.scratch import scratch_pool, write_segment
from poolreg.sharing.showcase import FOLDERS, showcase, stamp
from poolreg.store import records
from poolreg.store.journal import Record
from poolreg.store.registry import Registry

ATTEMPTS = 10
# What a repository may hold before the first push: what the Hub itself puts there.
_HARMLESS = ("README.md", ".gitattributes", ".gitignore", "LICENSE", "heatmap.png")
_OURS = ("objects/", "journal/", "models/", "tables/")


@dataclass(frozen=True)
class Sending:
    """What to publish: weights of all models, of those that some expressions need, or of none.

    Records, results, texts and tokenizers go in any case. Merges that the pool keeps go as their
    recipes, unless `merges`. A `dry_run` only says what would go.
    """

    only: tuple[str, ...] = ()
    weights: bool = True
    merges: bool = False
    dry_run: bool = False


@dataclass(frozen=True)
class Pushed:
    """What a push sent, or would send. `absent` counts objects that neither side holds."""

    place: str
    version: str
    records: int
    objects: int
    bytes: int
    absent: int
    clashes: tuple[Clash, ...]
    stale: bool = False  # whether tables and card were of another state

    @property
    def changed(self) -> bool:
        """Tell whether there was anything to send."""
        return bool(self.records or self.objects or self.stale)


@dataclass(frozen=True)
class _Load:
    """What the place lacks: a segment of new records if any, objects; and how many are nowhere."""

    segments: list[Outgoing]
    records: int
    objects: list[Outgoing]
    absent: int
    clashes: tuple[Clash, ...]


def push(
    registry: Registry, place: Place, sending: Sending | None = None, *,
    origin: str | None = None, progress: Progress = SILENT,
) -> Pushed:  # fmt: skip
    """Publish at `place` what it lacks of the pool; nothing changes where it lacks nothing.

    `origin` is said before names that mean something else there (default: pool- and the
    beginning of this pool's id). Raises `Conflict` for a place that holds something else than a
    pool, or where others keep publishing.
    """
    sending = sending or Sending()
    origin = origin or f"pool-{registry.id[:6]}"
    sharing = lock(registry.root / "locks" / "sharing", timeout=0.0, what="this pool to share it")
    with sharing, registry.writing():  # nothing that was looked at is collected meanwhile
        tried: list[Pushed] = []
        silent = False
        for _ in range(ATTEMPTS):
            snapshot = _look(place, sending)
            staging = registry.root / "tmp" / "outgoing"
            arrival = Arrival(place, snapshot, registry.objects, staging)
            try:
                done = _push(registry, arrival, sending, origin, tried, progress)
            except Moved as moved:
                silent = isinstance(moved, Unanswered)
                continue
            finally:
                arrival.discard()
            if tried and not sending.dry_run:
                # An attempt that went unanswered may be found to have been made.
                done = replace(tried[-1], version=done.version)
                _note(registry, place, done)
            return done
    if silent:
        raise StorageError(
            f"{place.url} takes what is sent, and does not answer", hint="run it again; it goes on"
        )
    raise Conflict(f"others keep publishing at {place.url}", hint="run it again; it goes on")


def bundle(
    registry: Registry, file: Path, sending: Sending | None = None, *, force: bool = False,
    progress: Progress = SILENT,
) -> Pushed:  # fmt: skip
    """Write all that a push to an empty place would send to one tar file.

    Raises `Conflict` for a file that exists, unless `force`.
    """
    with registry.writing(), tempfile.TemporaryDirectory(dir=registry.root / "tmp") as folder:
        marker = Path(folder) / MARKER
        marker.write_bytes(MARK)
        load = _load(
            registry,
            Path(folder),
            Snapshot({}),
            Contents(),
            sending or Sending(),
            "bundle",
            progress,
        )
        members = [Outgoing.of(MARKER, marker), *load.segments, *load.objects]
        progress.start("writing", sum(item.size for item in members), "bytes")
        write_bundle(file, members, progress=progress.advance, force=force)
    return Pushed(
        str(file), "", load.records, len(load.objects), sum(o.size for o in load.objects),
        load.absent, (),
    )  # fmt: skip


def _look(place: Place, sending: Sending) -> Snapshot:
    try:
        return place.look()
    except NotFound:
        if sending.dry_run:
            return Snapshot({})
    place.create()
    return place.look()


def _push(
    registry: Registry, arrival: Arrival, sending: Sending, origin: str, tried: list[Pushed],
    progress: Progress,
) -> Pushed:  # fmt: skip
    _check_place(arrival)
    arrival.fetch_journal(progress)
    progress.start("comparing", 0, "records")
    there = Contents.of(arrival.records())
    load = _load(registry, arrival.staging, arrival.snapshot, there, sending, origin, progress)
    size = sum(item.size for item in load.objects)
    segments = [*arrival.snapshot.segments(), *(part.sha256 for part in load.segments)]
    done = Pushed(
        arrival.place.url, arrival.snapshot.version, load.records, len(load.objects), size,
        load.absent, load.clashes, stale=stamp(segments) not in arrival.snapshot.files,
    )  # fmt: skip
    if done.changed and not sending.dry_run:
        tried.append(done)
        done = replace(done, version=_send(registry, arrival, load, segments, progress))
    arrival.keep_journal()
    return done


def _check_place(arrival: Arrival) -> None:
    """Raise `Conflict` where something else than a pool is, or the beginning of one."""
    files = arrival.snapshot.files
    strange = [path for path in files if path not in _HARMLESS and not path.startswith(_OURS)]
    if MARKER in files:
        arrival.check_marker()
    elif strange:
        raise Conflict(
            f"{arrival.place.url} holds something else than a pool: {min(strange)!r}",
            hint="choose a place of its own for the pool",
        )


# -- what is new -------------------------------------------------------------------------------


def _load(
    registry: Registry, folder: Path, snapshot: Snapshot, there: Contents, sending: Sending,
    origin: str, progress: Progress,
) -> _Load:  # fmt: skip
    segments = registry.journal.segments()
    given = incoming(Contents.of(registry.journal.all(segments)), there, origin=origin)
    file = folder / "new.jsonl"
    sizes: dict[str, int] = {}
    ours = map(travelling, registry.journal.all(segments))
    count = write_segment(_given(ours, given, sizes, progress), file)
    hashed = Outgoing.of("", file)
    for _ in read_segment(file, hashed.sha256):
        pass  # what nobody would take must not get there
    present = {
        digest
        for digest, entry in snapshot.objects().items()
        if entry.size == sizes.get(digest) and entry.sha256 in (None, digest)
    }
    unwanted = _unwanted(registry, given.theirs, sending, present)
    missing = [digest for digest in sorted(sizes) if digest not in present | unwanted]
    here = [digest for digest in missing if registry.objects.has(digest)]
    objects = [
        Outgoing(object_path(digest), registry.objects.path(digest), digest, sizes[digest])
        for digest in here
    ]
    parts = [replace(hashed, path=segment_path(hashed.sha256))] if count else []
    return _Load(parts, count, objects, len(missing) - len(here), given.clashes)


def _given(
    ours: Iterable[Record], given: Incoming, sizes: dict[str, int], progress: Progress
) -> Iterator[Record]:
    """Yield the records that are new there, noting the objects of all that will be there."""
    for record in ours:
        progress.advance(1)
        wanted = given.wants(record)
        if wanted or given.ours.has(record.kind, record.id):
            sizes.update(record.objects)
        if wanted:
            yield record
    yield from (record for record in given.made if not given.ours.has(record.kind, record.id))


def _unwanted(registry: Registry, ours: Contents, sending: Sending, present: set[str]) -> set[str]:
    """Return the weights that do not go: unasked, removed, or given by a recipe."""
    weights: dict[str, set[str]] = {}
    for row in registry.select("weight_files"):
        weights.setdefault(row["model"], set()).add(row["object"])
    chosen = {model for model in _chosen(registry, set(weights), sending)
              if not ours.removed("model", model)}  # fmt: skip
    kept = {row["model"] for row in registry.select("builds")} if not sending.merges else set()
    going = set().union(*(weights[model] for model in chosen - kept))
    there = present | {digest for digest in going if registry.objects.has(digest)}
    for model in sorted(chosen & kept):
        recipes = [[parent for parent, _ in b.components] for b in builds_of(registry, model)]
        if not any(all(weights.get(p, {""}) <= there for p in parents) for parents in recipes):
            going |= weights[model]
    return set().union(*weights.values()) - going


def _chosen(registry: Registry, models: set[str], sending: Sending) -> set[str]:
    """Return the models whose weights are asked for, with those that give them."""
    if not sending.weights:
        return set()
    if not sending.only:
        return models
    subjects = [Resolver(registry).subject(text) for text in sending.only]
    chosen = {model for subject in subjects for model, _ in subject.components}
    chosen |= {subject.seed for subject in subjects if subject.seed}
    builds = [build for model in chosen for build in builds_of(registry, model)]
    return (chosen | {parent for build in builds for parent, _ in build.components}) & models


# -- sending -----------------------------------------------------------------------------------


def _send(
    registry: Registry, arrival: Arrival, load: _Load, segments: Sequence[str], progress: Progress
) -> str:
    """Publish the load with tables, card and model folders of the pool as it will be there."""
    place, files = arrival.place, arrival.snapshot.files
    # What is there goes in as a pull would take it, whatever else its segments hold.
    write_segment(arrival.records(), arrival.staging / "there.jsonl")
    with (
        scratch_pool(
            arrival.staging / "pool", registry.objects,
            [arrival.staging / "there.jsonl", *(part.source for part in load.segments)],
        ) as future,
        tempfile.TemporaryDirectory(dir=arrival.staging) as folder,
    ):  # fmt: skip
        progress.start("making tables and card", 0, "files")
        there = {*arrival.snapshot.objects(), *(item.sha256 for item in load.objects)}
        shown = showcase(future, Path(folder), place, there, segments)
        kept = {item.path for item in shown}
        rest = [*load.segments, *(item for item in shown if not item.is_at(files.get(item.path)))]
        gone = [path for path in files if path.startswith(FOLDERS) and path not in kept]
        sizes = {item.sha256: item.size for item in [*load.objects, *rest]}
        progress.start("sending", sum(sizes.values()), "bytes")
        version = place.publish(
            arrival.snapshot, load.objects, rest, gone, message=_message(load),
            progress=progress.advance,
        )  # fmt: skip
    for part in load.segments:
        registry.objects.put_file(part.source, expect=part.sha256)
    return version


def _message(load: _Load) -> str:
    return f"Add {load.records} records and {len(load.objects)} objects"


def _note(registry: Registry, place: Place, done: Pushed) -> None:
    said = records.transfer(
        "push", done.place, version=done.version, records=done.records, objects=done.objects,
        bytes=done.bytes, left=[], repo_type=place.repo_type, revision=place.revision,
    )  # fmt: skip
    with registry.writing():
        registry.record(said)
