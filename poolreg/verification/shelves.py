"""The object store as it lies there, read folder by folder: memory holds one at a time."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from poolreg.files import storage_errors

_SHELF = re.compile(r"[0-9a-f]{2}")
_REST = re.compile(r"[0-9a-f]{62}")


@dataclass(frozen=True)
class Shelf:
    """The objects of one two-digit folder with their sizes in bytes, and what else is there."""

    number: int  # the first byte of its digests
    sizes: dict[bytes, int]
    strange: tuple[str, ...]


def shelves(folder: Path) -> Iterator[Shelf]:
    """Yield all 256 folders of a store in the order of digests, empty where there is none."""
    for number in range(256):
        yield read_shelf(folder, number)


def read_shelf(folder: Path, number: int) -> Shelf:
    """Return one folder of a store; what vanishes meanwhile is not there."""
    name = f"{number:02x}"
    sizes, strange = {}, []
    with storage_errors(f"looking through objects/{name}"):
        try:
            entries = os.scandir(folder / name)
        except (FileNotFoundError, NotADirectoryError):
            return Shelf(number, {}, ())
        with entries:
            for entry in entries:
                if not _REST.fullmatch(entry.name) or not entry.is_file():
                    strange.append(f"objects/{name}/{entry.name}")
                    continue
                try:
                    sizes[bytes.fromhex(name + entry.name)] = entry.stat().st_size
                except FileNotFoundError:
                    continue
    return Shelf(number, sizes, tuple(sorted(strange)))


def strange_entries(folder: Path) -> list[str]:
    """Return what lies beside the folders of a store."""
    with storage_errors("looking through objects"):
        return sorted(
            f"objects/{entry.name}"
            for entry in os.scandir(folder)
            if not (_SHELF.fullmatch(entry.name) and entry.is_dir())
        )


def by_shelf(digests: Iterable[bytes]) -> list[list[bytes]]:
    """Sort digests into 256 lists by their first byte."""
    found: list[list[bytes]] = [[] for _ in range(256)]
    for digest in digests:
        found[digest[0]].append(digest)
    return found
