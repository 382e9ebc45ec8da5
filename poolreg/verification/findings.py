"""What a verification says: findings with their ways out, remarks, and what was not looked at."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Finding:
    """Something that is not as it should be: what, why, and the way out.

    `kind` is object, segment, line, newer, catalog, marker, folder, name, model or merge; `key`
    is its digest or name, and `of` says what an object belongs to.
    """

    what: str
    problem: str
    way_out: str
    kind: str
    key: str
    of: str = ""


@dataclass(frozen=True)
class Mended:
    """Something that a repair has done, and the file below the pool that was kept of it."""

    what: str
    done: str
    kept: str = ""


@dataclass(frozen=True)
class Verdict:
    """What a verification looked at and found; it found nothing wrong when `findings` is empty.

    `objects` of `bytes` are here in their size. `elsewhere` counts objects that a pull left where
    they came from, `collected` those that are gone and that only removed things named (or that are
    gathered again when they are missed), `unnamed`
    files in the store that no record names. `unchecked` says what was asked for and not reached,
    `remarks` what is worth knowing and no damage, and `mended` what a repair has done.
    """

    records: int
    objects: int
    bytes: int
    hashed: int
    elsewhere: int
    findings: tuple[Finding, ...]
    hashed_bytes: int = 0
    collected: int = 0
    unnamed: int = 0
    headers: int = 0
    merges: int = 0
    catalog: bool = False
    remarks: tuple[str, ...] = ()
    unchecked: tuple[str, ...] = ()
    mended: tuple[Mended, ...] = ()
