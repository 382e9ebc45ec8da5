"""Verify: is everything that a pool names there, and is it what it was?

Nothing is changed. What is found is reported with the way out; what a partial pull left elsewhere
is not damage, and is counted apart.
"""

from __future__ import annotations

from dataclasses import dataclass

from poolreg.errors import Damage, PoolregError
from poolreg.progress import SILENT, Progress
from poolreg.store.registry import Registry

_FETCH = "fetch it from where the pool was pulled: poolreg pull --only NAME"
_RESTORE = "restore it from a copy of the pool, or pull it from where the pool was pushed"


@dataclass(frozen=True)
class Finding:
    """Something that is not as it should be: what, why, and the way out."""

    what: str
    problem: str
    way_out: str


@dataclass(frozen=True)
class Verdict:
    """What a verification looked at and found. `elsewhere` counts objects that a pull left."""

    records: int
    objects: int
    bytes: int
    hashed: int
    elsewhere: int
    findings: tuple[Finding, ...]


def verify(registry: Registry, *, full: bool = False, progress: Progress = SILENT) -> Verdict:
    """Check journal, names, and the presence and size of every object; `full` hashes them, too."""
    progress.start("reading the journal", 0, "records")
    records = 0
    try:
        for _ in registry.journal.all():
            records += 1
            progress.advance(1)
    except Damage as error:
        return Verdict(records, 0, 0, 0, 0, (Finding("journal", error.message, error.hint),))
    findings = [
        Finding(f"{row['space']} {row['name']}", "its target is in no record", _RESTORE)
        for row in registry.select("dangling_names")
    ]
    rows = registry.select("object_list")
    progress.start("checking", sum(row["bytes"] for row in rows) if full else len(rows),
                   "bytes" if full else "objects")  # fmt: skip
    elsewhere = hashed = here = size = 0
    for row in rows:
        problem = _problem(registry, row["digest"], row["bytes"], full=full)
        progress.advance(row["bytes"] if full else 1)
        if problem != "missing":
            here, size, hashed = here + 1, size + row["bytes"], hashed + full
        if problem == "missing" and row["was_left"]:
            elsewhere += 1
        elif problem:
            way_out = _FETCH if row["is_weights"] else _RESTORE
            findings.append(Finding(f"object {row['digest']}", problem, way_out))
    return Verdict(records, here, size, hashed, elsewhere, tuple(findings))


def _problem(registry: Registry, digest: str, size: int, *, full: bool) -> str:
    path = registry.objects.path(digest)
    if not path.is_file():
        return "missing"
    if path.stat().st_size != size:
        return f"has {path.stat().st_size} bytes instead of {size}"
    if full:
        try:
            registry.objects.check(digest)
        except PoolregError as error:
            return error.message
    return ""
