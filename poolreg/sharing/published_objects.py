"""Single objects of a published pool, fetched by digest.

For machines that have no pool of their own: they know what they need, and take nothing else.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from poolreg.errors import NotFound, UsageError
from poolreg.sharing.places import object_path
from poolreg.sharing.trees import TreePlace


@dataclass(frozen=True)
class ObjectsAt:
    """The objects of a pool that was pushed to a URL, as fsspec knows it.

    Only the URL travels; credentials come from where each machine has them.
    """

    url: str

    def __post_init__(self) -> None:
        if "://" not in self.url:
            raise UsageError(
                f"{self.url!r} is not a URL", hint="write s3://bucket/pool or file:///mnt/pool"
            )

    def fetch(self, digest: str, target: Path) -> None:
        """Write an object to the new file `target`, not checked yet; raises `NotFound`."""
        place = TreePlace(self.url)
        path = object_path(digest)
        if path not in place.sizes(path.rpartition("/")[0]):
            raise NotFound(
                f"object {digest[:12]} is not at {place.url}",
                hint=f"push the pool there first: poolreg push {place.url}",
                digest=digest,
            )
        place.fetch(path, target, progress=lambda _: None)
