"""A pool as it will be: another pool's records and objects laid over the present ones.

What is about to be taken in or published is put together here first, in the pool's own `tmp`,
with links only. So it can be indexed, resolved, checked and drawn by the code that works on any
pool, before anything of the real one changes.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path

from poolreg.files import storage_errors
from poolreg.store.journal import Record
from poolreg.store.objects import ObjectStore
from poolreg.store.registry import Registry


class Overlay(ObjectStore):
    """The objects of a store, and beside them those that are not in it yet."""

    def __init__(self, below: ObjectStore, folder: Path, staging: Path) -> None:
        super().__init__(folder, staging)
        self.below = below

    def path(self, digest: str) -> Path:
        """Return where the object stands, or where it would stand beside the store."""
        present = self.below.path(digest)
        return present if present.is_file() else super().path(digest)

    def staged(self) -> Iterator[tuple[str, Path]]:
        """Yield the digest and place of each object that stands beside the store."""
        for path in sorted(self.folder.glob("??/*")):
            if path.is_file():
                yield path.parent.name + path.name, path


@contextlib.contextmanager
def scratch_pool(
    folder: Path, objects: ObjectStore, segments: Iterable[Path], *, catalog: Path | None = None
) -> Iterator[Registry]:
    """Give a pool in `folder` with these objects and journal segments for the block.

    `catalog` is one that knows some of the segments already, under the same names.
    """
    with storage_errors("preparing a pool"):
        shutil.rmtree(folder, ignore_errors=True)
        folder.parent.mkdir(parents=True, exist_ok=True)
    registry = Registry.create(folder)
    try:
        with storage_errors("preparing a pool"):
            for segment in segments:
                (folder / "journal" / segment.name).symlink_to(segment.resolve())
            if catalog and catalog.is_file():
                shutil.copyfile(catalog, folder / "catalog.duckdb")
        registry.objects = objects
        yield registry
    finally:
        registry.close()
        shutil.rmtree(folder, ignore_errors=True)


def write_segment(records: Iterable[Record], file: Path) -> int:
    """Write records to a file in the journal's form, flushed; return how many."""
    count = 0
    with storage_errors(f"writing {file.name}"), open(file, "wb") as writer:
        for record in records:
            writer.write(record.line())
            count += 1
        writer.flush()
        os.fsync(writer.fileno())
    return count
