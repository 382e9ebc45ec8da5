"""Damaged and missing objects: what they belong to, and the way out for each.

The journal is read once more for it, so that a pool that is whole pays nothing.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from poolreg.store.journal import Record
from poolreg.store.registry import Registry
from poolreg.upkeep.census import Census
from poolreg.verification.findings import Finding
from poolreg.verification.lines import sound_records

REPAIR = "poolreg verify --repair"


@dataclass
class Owners:
    """The records that name some objects, and where the text of partitions lies."""

    of: dict[str, list[Record]] = field(default_factory=dict)
    locations: dict[str, Record] = field(default_factory=dict)  # the latest, by partition

    @classmethod
    def find(cls, registry: Registry, digests: Collection[str]) -> Owners:
        """Read who names these objects."""
        found = cls()
        if not digests:
            return found
        wanted = set(digests)
        for record in sound_records(registry):
            for digest in wanted & record.objects.keys():
                found.of.setdefault(digest, []).append(record)
            if record.kind == "location":
                before = found.locations.get(record.body["partition"])
                if before is None or (before.at, before.id) < (record.at, record.id):
                    found.locations[record.body["partition"]] = record
        return found

    def text(self, partition: str) -> list[Path]:
        """Return the files of a partition if all are still where they were."""
        location = self.locations.get(partition)
        files = [Path(file["path"]) for file in location.body["files"]] if location else []
        return files if all(path.is_file() for path in files) else []


def object_findings(
    registry: Registry, census: Census, problems: Mapping[str, str], *,
    tried: Collection[str] = (),
) -> list[Finding]:  # fmt: skip
    """Return the findings about objects; `problems` says by digest what is wrong.

    For those in `tried` a repair has done all it can.
    """
    owners = Owners.find(registry, problems)
    names = {(space, target): name for (space, name), target in census.names.items()}
    return [
        Finding(
            f"object {digest}", problem, way_out(
                registry, census, owners, digest, missing=problem == "missing",
                tried=digest in tried,
            ), "object", digest, _belongs(owners.of.get(digest, []), digest, names),
        )
        for digest, problem in sorted(problems.items())
    ]  # fmt: skip


def _belongs(owners: list[Record], digest: str, names: Mapping[tuple[str, str], str]) -> str:
    if not owners:
        return "no record"
    record = owners[0]
    label = names.get((record.kind, record.id), record.id[:12])
    part = next((file["name"] for file in _files(record) if file["object"] == digest), "")
    return f"{part} of model {label}" if part else f"{record.kind} {label}"


def _files(record: Record) -> list[dict[str, Any]]:
    return record.body["files"] if record.kind == "model" else []


def way_out(
    registry: Registry, census: Census, owners: Owners, digest: str, *, missing: bool, tried: bool
) -> str:  # fmt: skip
    """Return what brings an object back."""
    named = owners.of.get(digest, [])
    if not named:
        return f"nothing needs it: {REPAIR} moves it to quarantine/"
    again = None if tried else _by_repair(registry, census, owners, digest)
    if again:
        return f"{REPAIR} {again}"
    first = "" if missing else f"{REPAIR} (which moves it to quarantine/), then "
    commands = {
        "model": "add the model again: poolreg model add FOLDER",
        "partition": "add the partition again: poolreg partition add NAME FILES",
        "evalset": "add the evalset again: poolreg evalset add NAME FILES",
    }
    path = registry.objects.path(digest).relative_to(registry.root)
    copy = f"put {path} back from a copy of the pool"
    for record in named:
        if record.kind in commands:
            return f"{first}{copy}, or {commands[record.kind]}"
    return f"{first}{copy}"


def _by_repair(registry: Registry, census: Census, owners: Owners, digest: str) -> str | None:
    """Return what a repair will do about an object, if there is anything that it can do."""
    for record in owners.of[digest]:
        if record.kind == "model" and record.id in census.builds:
            return "makes it again from the recipe of the merge"
        if record.kind == "partition" and (files := owners.text(record.id)):
            return f"makes it again from {files[0]}"
        content = record.kind == "evalset" and record.body["content"] == digest
        if content and registry.objects.has(record.body["object"]):
            return "makes it again from the text of the evalset"
    if census.places:
        return f"fetches it from {census.places[0].place}, if it is there"
    return None
