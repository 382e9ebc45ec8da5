"""The half of a Pool that keeps it whole and small: verify, remove and restore, collect."""

from __future__ import annotations

from typing import TYPE_CHECKING

from poolreg.models.resolve import Resolver
from poolreg.progress import SILENT, Progress
from poolreg.store.registry import Registry

if TYPE_CHECKING:
    from poolreg.upkeep.verify import Verdict


class Maintenance:
    """What looks after a pool's files; `Pool` is made of it."""

    registry: Registry

    def verify(self, *, full: bool = False, progress: Progress = SILENT) -> Verdict:
        """Check that everything that the pool names is there; `full` hashes it again."""
        from poolreg.upkeep.verify import verify

        return verify(self.registry, full=full, progress=progress)

    def remove(self, space: str, name: str) -> str:
        """Tombstone a partition, model or evalset and return its digest; its data stays."""
        if space == "model":
            name = Resolver(self.registry).stored(name)
        return self.registry.remove(space, name)
