"""Partitions and evalsets of a pool: adding them, checking them, reading a unit's text.

Partition text stays where it is and is referenced by path and digest; evalset text is stored
in the pool. Whatever reads partition text refuses files that drifted since they were added.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from poolreg.canonical import digest_of
from poolreg.errors import Conflict, Drift, NotFound, Refused, UsageError
from poolreg.mixture import check_name
from poolreg.store import records
from poolreg.store.registry import Registry
from poolreg.text import corpus
from poolreg.text.reading import expand_files, read_files
from poolreg.text.units import SLICING, UnitFacts, unit_documents, unit_facts

Progress = Callable[[int], None] | None


@dataclass(frozen=True)
class Overlap:
    """An evalset and a partition that share documents."""

    evalset: str
    partition: str
    documents: int


@dataclass(frozen=True)
class Added:
    """What was added: name, digest, counts, and the documents shared across train and test."""

    name: str
    digest: str
    documents: int
    bytes: int
    duplicates: int
    units: int
    overlaps: tuple[Overlap, ...]
    new: bool


@dataclass(frozen=True)
class PartitionCheck:
    """Whether a partition's files are what they were; `drifted` is empty when they are."""

    name: str
    files: int
    drifted: tuple[corpus.FileDrift, ...]


def add_partition(
    registry: Registry, name: str, paths: Sequence[Path], *, units: int = 1, field: str = "text",
    parent: str | None = None, replace: bool = False, progress: Progress = None,
) -> Added:  # fmt: skip
    """Read and fingerprint files as a named partition, cut into `units` base units.

    `progress` is told UTF-8 bytes read. Raises `Refused` for unreadable text, `Conflict` for a
    taken name, `UsageError` for units that cannot be cut.
    """
    name = registry.check_free("partition", name, None, replace=True)
    parent = check_name(parent) if parent else None
    _refuse_circle(registry, name, parent)
    files = expand_files(paths)
    scan = corpus.scan(files, field=field, progress=progress)
    texts = read_files(files, field=field)
    facts = unit_facts(texts, of=units, total_bytes=scan.bytes)
    digest = partition_id(scan.content_digest, units)
    name = registry.check_free("partition", name, digest, replace=replace)
    known = bool(registry.select("partition", digest=digest))
    objects: dict[str, int] = {}
    with registry.writing():
        overlaps = _overlaps_of_partition(registry, digest, scan.digests)
        body = {
            "content": registry.put(scan.digests, objects),
            "documents": scan.documents,
            "bytes": scan.bytes,
            "duplicates": scan.duplicates,
            "units": [_unit(digest, number, unit) for number, unit in enumerate(facts, start=1)],
        }
        registry.record(
            records.keyed("partition", digest, body, objects),
            registry.location(digest, [asdict(file) for file in scan.files], field),
            registry.naming("partition", name, digest, parent=parent),
            *([registry.removal("partition", digest, removed=False)] if known else []),
            *(records.contamination(o.evalset, o.partition, o.documents) for o in overlaps),
        )
    named = _named(registry, overlaps)
    return Added(
        name, digest, scan.documents, scan.bytes, scan.duplicates, len(facts), named, not known
    )


def partition_id(content: str, units: int) -> str:
    """Return the digest of a partition: of its documents, and of how it is cut."""
    return digest_of({"partition": 1, "content": content, "units": units, "slicing": SLICING})


def unit_id(partition: str, number: int) -> str:
    """Return the digest of a base unit, counted from 1."""
    return digest_of({"unit": 1, "partition": partition, "number": number})


def evalset_id(content: str) -> str:
    """Return the digest of an evalset: of its documents."""
    return digest_of({"evalset": 1, "content": content})


def _refuse_circle(registry: Registry, name: str, parent: str | None) -> None:
    rows = registry.select("names", space="partition")
    parents = {row["name"]: row["parent"] for row in rows}
    above = parent
    while above:
        if above == name:
            raise UsageError(
                f"{name!r} cannot be its own parent"
                if parent == name
                else f"{parent!r} stands below {name!r}, so it cannot be its parent",
                hint="choose another --parent",
            )
        above = parents.pop(above, None)


def _unit(partition: str, number: int, facts: UnitFacts) -> dict[str, object]:
    digest = unit_id(partition, number)
    return {"digest": digest, "documents": facts.documents, "bytes": facts.bytes}


def add_evalset(
    registry: Registry, name: str, paths: Sequence[Path], *, field: str = "text",
    replace: bool = False, progress: Progress = None,
) -> Added:  # fmt: skip
    """Store documents as a named evalset; the digest covers the documents in order.

    Raises `Refused` for unreadable text and `Conflict` for a taken name.
    """
    registry.check_free("evalset", name, None, replace=True)
    files = expand_files(paths)
    scan = corpus.scan(files, field=field, progress=progress)
    digest = evalset_id(scan.content_digest)
    name = registry.check_free("evalset", name, digest, replace=replace)
    known = bool(registry.select("evalset", digest=digest))
    objects: dict[str, int] = {}
    with registry.writing():
        overlaps = _overlaps_of_evalset(registry, digest, scan.digests)
        texts = list(read_files(files, field=field))
        if corpus.document_digests(texts) != scan.digests:
            raise Refused(
                "the files changed while they were read", hint="wait until they are written"
            )
        body = {
            "object": registry.put(corpus.encode_documents(texts), objects),
            "content": registry.put(scan.digests, objects),
            "documents": scan.documents,
            "bytes": scan.bytes,
        }
        registry.record(
            records.keyed("evalset", digest, body, objects),
            registry.naming("evalset", name, digest),
            *([registry.removal("evalset", digest, removed=False)] if known else []),
            *(records.contamination(o.evalset, o.partition, o.documents) for o in overlaps),
        )
    named = _named(registry, overlaps)
    return Added(name, digest, scan.documents, scan.bytes, scan.duplicates, 0, named, not known)


def _overlaps_of_partition(registry: Registry, digest: str, digests: bytes) -> list[Overlap]:
    found = []
    for row in _whole(registry, "evalset_contents"):
        shared = corpus.shared_documents(registry.objects.read(row["content"]), digests)
        if shared:
            found.append(Overlap(row["digest"], digest, len(shared)))
    return found


def _overlaps_of_evalset(registry: Registry, digest: str, digests: bytes) -> list[Overlap]:
    found = []
    for row in _whole(registry, "partition_contents"):
        shared = corpus.shared_documents(digests, registry.objects.read(row["content"]))
        if shared:
            found.append(Overlap(digest, row["digest"], len(shared)))
    return found


def _whole(registry: Registry, lookup: str) -> list[dict[str, Any]]:
    # A pool that was pulled may lack what the place that it came from did not hold, and what was
    # removed may have been collected: it comes back only by being added, which looks here again.
    return [row for row in registry.select(lookup) if registry.objects.has(row["content"])]


def _named(registry: Registry, overlaps: Sequence[Overlap]) -> tuple[Overlap, ...]:
    """Return overlaps for people: with names, and of what is not removed."""
    removed = {row["digest"] for row in registry.select("removed")}
    evalsets = {digest: name for name, digest in registry.names("evalset").items()}
    partitions = {digest: name for name, digest in registry.names("partition").items()}
    return tuple(
        Overlap(
            evalsets.get(overlap.evalset, overlap.evalset[:12]),
            partitions.get(overlap.partition, overlap.partition[:12]),
            overlap.documents,
        )
        for overlap in overlaps
        if not removed & {overlap.evalset, overlap.partition}
    )


def evalset_documents(registry: Registry, digest: str) -> list[str]:
    """Return the documents of a stored evalset; raises `NotFound` or `Damage`."""
    row = registry.one("evalset", digest=digest)
    return corpus.decode_documents(registry.objects.read(row["object"]))


def check_partition(registry: Registry, name: str, *, progress: Progress = None) -> PartitionCheck:
    """Hash the partition's files again and report those that changed or are gone."""
    files, _ = _files(registry, registry.resolve("partition", name))
    return PartitionCheck(name, len(files), corpus.check_files(files, progress=progress))


def unit_text(registry: Registry, partition: str, unit: int) -> Iterator[str]:
    """Return the documents of one base unit (from 1), read from disk.

    Raises `Drift` before the first document if any file of the partition changed.
    """
    row = registry.one("partition", digest=partition)
    files, field = _files(registry, partition)
    refuse_drift(row["digest"], files)
    texts = read_files([Path(file.path) for file in files], field=field)
    return unit_documents(texts, unit, of=row["units"], total_bytes=row["bytes"])


def refuse_drift(label: str, files: Sequence[corpus.FileFacts]) -> None:
    """Raise `Drift` if any of the files is missing or changed."""
    drifted = corpus.check_files(files)
    if drifted:
        first = drifted[0]
        raise Drift(
            f"the text of partition {label[:12]} is not what was added: {first.path} is "
            f"{first.reason}" + (f" (and {len(drifted) - 1} more)" if len(drifted) > 1 else ""),
            hint="restore the file, or add the changed text as a new partition",
            files=[drift.path for drift in drifted],
        )


def _files(registry: Registry, partition: str) -> tuple[list[corpus.FileFacts], str]:
    rows = registry.select("partition_files", partition=partition)
    if not rows:
        raise NotFound(
            f"where the text of partition {partition[:12]} lies is not known here",
            hint="add its files again: poolreg partition add NAME FILE…",
        )
    files = [
        corpus.FileFacts(row["path"], row["bytes"], row["sha256"], row["documents"]) for row in rows
    ]
    return files, rows[0]["field"]


def groups(registry: Registry) -> dict[str, list[str]]:
    """Return, for each parent name without text of its own, the partitions below it."""
    rows = registry.select("names", space="partition")
    parents = {row["name"]: row["parent"] for row in rows}
    found: dict[str, list[str]] = {}
    for name in parents:
        parent, seen = parents[name], {name}
        while parent:
            if parent in seen:
                raise Conflict(
                    f"the parents of partition {name!r} form a circle",
                    hint="add one of them again with another --parent, or with none",
                )
            seen.add(parent)
            if parent not in parents:
                found.setdefault(parent, []).append(name)
            parent = parents.get(parent)
    return found


def everything(registry: Registry) -> list[str]:
    """Return what `all` stands for: the partitions that are nobody's parent.

    Those that another pool calls by a name which is taken here, such as hub/code, are not in it.
    """
    rows = registry.select("names", space="partition")
    names, parents = [row["name"] for row in rows], {row["parent"] for row in rows}
    return [name for name in names if name not in parents and "/" not in name]
