"""Verify: is everything that a pool names there, and is it what it was?

It goes by the journal, and looks at the catalog before anything could mend it. Nothing is changed.
What is found is told with the way out; what a partial pull left elsewhere, what only removed
things named, and a torn line that nobody was promised are no damage, and are told apart.
"""

from __future__ import annotations

import os
import time
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path

from poolreg.errors import Damage, NoPool, StorageError
from poolreg.files import storage_errors
from poolreg.progress import SILENT, Progress
from poolreg.store.marker import NAME, has_checksum, read_marker
from poolreg.store.registry import Registry
from poolreg.upkeep.census import Census
from poolreg.verification.findings import Finding, Verdict
from poolreg.verification.hashing import Hashed, Part, hash_objects, problems_of
from poolreg.verification.headers import check_headers
from poolreg.verification.lines import Memory, catalog_finding, memory, read_journal
from poolreg.verification.recipes import Rebuilt, check_merges
from poolreg.verification.remedies import object_findings
from poolreg.verification.shelves import by_shelf, shelves, strange_entries

FOLDERS = ("objects", "journal")
_PASSING = ("locks", "tmp")
_REPAIR = "poolreg verify --repair"
_MERGES = 3
_BLOCKING = ("line", "segment", "newer", "catalog")  # with these no catalog can be made


@dataclass(frozen=True)
class Depth:
    """How deep to look.

    `headers`: strict intake of weights and configurations. `full`: that, hash all objects of
    `part`, make at most `merges` kept merges of it again, and make the catalog again; for
    `max_seconds`, beginning where an earlier pass ended if `resume`.
    """

    headers: bool = False
    full: bool = False
    part: Part = field(default_factory=Part)
    merges: int = _MERGES
    max_seconds: float | None = None
    resume: bool = False


@dataclass(frozen=True)
class Suspects:
    """What a repair has just looked after: objects to hash in any case, and those of them for
    which it could do no more."""

    objects: frozenset[str] = frozenset()
    tried: frozenset[str] = frozenset()


def open_damaged(given: str | Path | None = None) -> Registry:
    """Open a pool as `Registry.find` does, and also one whose FORMAT is damaged or gone.

    A folder that holds objects/ and journal/ is one. Raises `NoPool`.
    """
    try:
        return Registry.find(given)
    except (Damage, NoPool):
        chosen = given or os.environ.get("POOLREG_POOL")
        here = Path(chosen).absolute() if chosen else Path.cwd()
        for folder in [here] if chosen else [here, *here.parents]:
            for root in (folder, folder / "pool"):
                if (root / NAME).exists() or all((root / name).is_dir() for name in FOLDERS):
                    return _opened(root)
        raise


def _opened(root: Path) -> Registry:
    with storage_errors(f"opening the pool {root}"):
        for name in _PASSING:
            if not (root / name).is_dir():
                (root / name).mkdir()
    return Registry(root)


def verify(
    registry: Registry, depth: Depth | None = None, *, suspects: Suspects | None = None,
    progress: Progress = SILENT,
) -> Verdict:  # fmt: skip
    """Look at a pool as deep as `depth` says; changes nothing but the catalog, which is derived."""
    depth, suspects = depth or Depth(), suspects or Suspects()
    findings = [*_folders(registry), *marker_findings(registry)]
    if any(finding.kind == "folder" for finding in findings):
        return Verdict(0, 0, 0, 0, 0, tuple(findings), unchecked=("all that lies in the pool",))
    with registry.steady():
        remembered = memory(registry)
        reading = read_journal(registry, remembered.read, progress)
        findings += [*reading.findings, *remembered.findings, *_names(reading.census)]
        store = _look(registry, reading.census, progress)
        deep = _deep(registry, depth, reading.census, store, suspects, findings, remembered,
                     progress)  # fmt: skip
    return Verdict(
        reading.census.records, store.objects, store.bytes, deep.hashed.objects, store.elsewhere,
        (*findings, *deep.findings), deep.hashed.bytes, store.collected, store.unnamed,
        deep.headers, deep.merges.merges, deep.catalog.compared,
        (*remembered.remarks, *reading.remarks, *store.remarks),
        (*_unhashed(deep.hashed), *deep.catalog.unchecked, *deep.merges.unchecked),
    )  # fmt: skip


@dataclass
class _Deep:
    hashed: Hashed
    headers: int = 0
    merges: Rebuilt = field(default_factory=Rebuilt)
    catalog: _Catalog = field(default_factory=lambda: _Catalog())
    findings: list[Finding] = field(default_factory=list)


def _deep(
    registry: Registry, depth: Depth, census: Census, store: _Store, suspects: Suspects,
    findings: Collection[Finding], remembered: Memory, progress: Progress,
) -> _Deep:  # fmt: skip
    """Look into the objects, as deep as was asked for; `findings` are those until here."""
    deadline = None if depth.max_seconds is None else time.monotonic() + depth.max_seconds
    deep = _Deep(Hashed(problems=problems_of(registry, suspects.objects)))
    if depth.full:
        deep.hashed = hash_objects(
            registry, depth.part, deadline=deadline, resume=depth.resume, progress=progress
        )
    problems = deep.hashed.problems | store.problems  # a size says more than a hash
    deep.findings += object_findings(registry, census, problems, tried=suspects.tried)
    if depth.headers or depth.full:
        deep.headers, wrong = check_headers(registry, census, progress)
        deep.findings += wrong
    if not depth.full:
        return deep
    broken = any(finding.kind in _BLOCKING for finding in findings)
    if not broken:
        deep.catalog = _compare(registry, remembered, deadline, progress)
    else:
        deep.catalog = _Catalog(unchecked=("the catalog was not compared with the journal",))
    deep.findings += deep.catalog.findings
    if broken or deep.catalog.findings:
        deep.merges.unchecked += ["merges were not made again"] if census.builds else []
    else:
        deep.merges = check_merges(
            registry, census, depth.part, most=depth.merges, bad=problems, deadline=deadline,
            progress=progress,
        )  # fmt: skip
    deep.findings += deep.merges.findings
    return deep


def _unhashed(hashed: Hashed) -> list[str]:
    if not hashed.left:
        return []
    return [f"{hashed.left:,} objects ({hashed.left_bytes:,} bytes) were not hashed: go on with "
            "--resume"]  # fmt: skip


# -- the marker and the folders --------------------------------------------------------------


def _folders(registry: Registry) -> list[Finding]:
    return [
        Finding(f"{name}/", "is gone", "put it back from a copy of the pool; or "
                f"{_REPAIR}, which makes it empty and brings what it can", "folder", name)
        for name in FOLDERS if not (registry.root / name).is_dir()
    ]  # fmt: skip


def marker_findings(registry: Registry) -> list[Finding]:
    """Return what is wrong with FORMAT."""
    way_out = f"write it anew: {_REPAIR}"
    try:
        read_marker(registry.root)
        if has_checksum(registry.root):
            return []
        problem = "has no checksum, so a change would not be seen"
    except NoPool:
        problem = "is gone"
    except Damage:
        problem = "is not what was written"
    return [Finding(NAME, problem, way_out, "marker", NAME)]


def _names(census: Census) -> list[Finding]:
    way_out = (
        "give the name to something else; or pull again from where it came, where the records "
        "that it needs may be"
    )
    return [
        Finding(f"{space} {name}", "its target is in no record", way_out, "name", name)
        for space, name in census.dangling()
    ]


# -- the store -------------------------------------------------------------------------------


@dataclass
class _Store:
    objects: int = 0
    bytes: int = 0
    elsewhere: int = 0
    collected: int = 0
    unnamed: int = 0
    problems: dict[str, str] = field(default_factory=dict)
    remarks: list[str] = field(default_factory=list)


def _look(registry: Registry, census: Census, progress: Progress) -> _Store:
    """Compare what the store holds with what the records name."""
    progress.start("looking for objects", len(census.live) + len(census.dead), "objects")
    found = _Store(remarks=[
        f"{path} is no object" for path in strange_entries(registry.objects.folder)
    ])  # fmt: skip
    named = by_shelf(census.live), by_shelf(census.dead)
    for shelf in shelves(registry.objects.folder):
        present = 0
        for dead, digests in enumerate(part[shelf.number] for part in named):
            for digest in digests:
                present += _meet(found, census, digest, shelf.sizes.get(digest), dead=bool(dead))
            progress.advance(len(digests))
        found.unnamed += len(shelf.sizes) - present
        found.remarks += [f"{path} is no object" for path in shelf.strange]
    return found


def _meet(
    found: _Store, census: Census, digest: bytes, size: int | None, *, dead: bool
) -> bool:  # fmt: skip
    """Note one object that records name, with its size in the store; tell whether it is there."""
    wanted = census.size(digest)
    if size is None:
        if dead or digest in census.spare:
            found.collected += 1
        elif digest in census.left:
            found.elsewhere += 1
        else:
            found.problems[digest.hex()] = "missing"
        return False
    found.objects += 1
    found.bytes += size
    if size != wanted:
        found.problems[digest.hex()] = f"has {size:,} bytes instead of {wanted:,}"
    return True


# -- the catalog -----------------------------------------------------------------------------


@dataclass(frozen=True)
class _Catalog:
    compared: bool = False
    findings: tuple[Finding, ...] = ()
    unchecked: tuple[str, ...] = ()


def _compare(
    registry: Registry, remembered: Memory, deadline: float | None, progress: Progress
) -> _Catalog:
    """Compare the catalog with one made again from the journal."""
    if deadline is not None and time.monotonic() >= deadline:
        return _Catalog(unchecked=("the catalog was not compared: no time was left",))
    if not os.access(registry.root / "tmp", os.W_OK):
        return _Catalog(unchecked=("the catalog was not compared: the pool is read-only",))
    progress.start("making the catalog again", 0, "records")
    try:
        if remembered.remarks:  # there is none to compare; can one be made?
            registry.catalog.refresh()
            return _Catalog()
        differing = registry.catalog.differences()
    except StorageError as error:
        return _Catalog(unchecked=(f"the catalog was not compared: {error.message}",))
    except Damage as error:
        return _Catalog(findings=(_not_made(error),))
    if not differing:
        return _Catalog(compared=True)
    told = ", ".join(
        f"{table} ({mine:,} rows only here, {fresh:,} only there)"
        for table, (mine, fresh) in differing.items()
    )
    return _Catalog(True, (catalog_finding(f"is not what the journal gives: {told}"),))


def _not_made(error: Damage) -> Finding:
    message = error.message.splitlines()[0]
    if message.startswith("the catalog"):
        return catalog_finding(message)
    return Finding("journal", message, error.hint, "record", "journal")
