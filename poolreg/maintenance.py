"""The half of a Pool that keeps it whole and small: verify, remove and restore, collect."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from poolreg.analysis import listed
from poolreg.progress import SILENT, Progress
from poolreg.store.registry import Registry

if TYPE_CHECKING:
    from collections.abc import Sequence
    from datetime import datetime, timedelta

    from poolreg.doctor.checks import Check
    from poolreg.upkeep.collection import Plan
    from poolreg.upkeep.compact import Compacted
    from poolreg.upkeep.removal import Removed, Restorable, Restored
    from poolreg.upkeep.stats import Stats
    from poolreg.verification.findings import Verdict


class Maintenance:
    """What looks after a pool's files; `Pool` is made of it."""

    registry: Registry

    def verify(
        self, *, headers: bool = False, full: bool = False, repair: bool = False,
        sample: str = "1/1", merges: int = 3, max_seconds: float | None = None,
        resume: bool = False, progress: Progress = SILENT,
    ) -> Verdict:  # fmt: skip
        """Check that everything that the pool names is there, and `repair` what is not.

        `headers` reads the headers of all weights and all configurations again. `full` hashes the
        `sample` N/T of all objects, makes at most `merges` kept merges again, and compares the
        catalog with one made anew; for `max_seconds`, after which `resume` goes on.
        """
        from poolreg.verification.hashing import Part
        from poolreg.verification.repair import repair as mended
        from poolreg.verification.verify import Depth, verify

        depth = Depth(headers, full, Part.parse(sample), merges, max_seconds, resume)
        return (mended if repair else verify)(self.registry, depth, progress=progress)

    def log(
        self, name: str | None = None, *, since: datetime | None = None, limit: int | None = None
    ) -> list[dict[str, Any]]:
        """Return what happened in the pool, or to what was ever called `name`, newest first."""
        from poolreg.upkeep.history import history

        return history(self.registry, name, since=since, limit=limit)

    def stats(self, *, biggest: int = 10) -> Stats:
        """Measure the pool: bytes by what they hold, what sharing saves, its biggest objects."""
        from poolreg.upkeep.stats import stats

        return stats(self.registry, biggest=biggest)

    def doctor(self, *, torch: bool = False) -> list[Check]:
        """Check versions, disk, file system, locks and clock around the pool."""
        from poolreg.doctor.examination import examine

        return examine(self.registry, torch=torch)

    def remove(self, space: str, name: str) -> str:
        """Tombstone a partition, model or evalset and return its digest; its data stays."""
        from poolreg.models.resolve import Resolver

        if space == "model":
            name = Resolver(self.registry).stored(name)
        return self.registry.remove(space, name)

    def rm(self, names: Sequence[str] | str, *, kind: str | None = None) -> list[Removed]:
        """Tombstone partitions, models and evalsets, all or none; tell what rests on them."""
        from poolreg.upkeep.removal import remove

        return remove(self.registry, listed(names), kind=kind)

    def removed(self) -> list[Restorable]:
        """Return what is removed, the latest first, and whether its data is here still."""
        from poolreg.upkeep.removal import removed_things

        return removed_things(self.registry)

    def restore(
        self, names: Sequence[str] | str, *, kind: str | None = None, name: str | None = None,
        progress: Progress = SILENT,
    ) -> list[Restored]:  # fmt: skip
        """Bring back what was removed, all or none; with `name` one thing, called so."""
        from poolreg.upkeep.removal import restore

        return restore(self.registry, listed(names), kind=kind, name=name, progress=progress)

    def gc(
        self, *, grace: timedelta | None = None, dry_run: bool = False,
        progress: Progress = SILENT,
    ) -> Plan:  # fmt: skip
        """Delete what nothing needs and what is older than `grace` (14 days), or plan to."""
        from poolreg.upkeep.collection import collect
        from poolreg.upkeep.removal import GRACE

        grace = GRACE if grace is None else grace
        return collect(self.registry, grace=grace, dry_run=dry_run, progress=progress)

    def segments(self) -> list[dict[str, Any]]:
        """Return the journal's segments, oldest first, with their sizes in bytes."""
        return [
            {"segment": segment, "bytes": size}
            for segment, size in self.registry.journal.segments().items()
        ]

    def compact(self, *, progress: Progress = SILENT) -> Compacted:
        """Merge the journal's segments into few; raises `Locked` while others write."""
        from poolreg.upkeep.compact import compact

        return compact(self.registry, progress=progress)
