"""FORMAT: the file that makes a folder a pool, and says in which form it lies there.

    {"crc32": "…", "format": 1, "id": "…"}

The checksum is that of the canonical JSON of the other two fields.
"""

from __future__ import annotations

import binascii
import json
import reprlib
import uuid
from pathlib import Path

from poolreg.canonical import canonical_json
from poolreg.errors import Damage, NoPool, Refused, UnknownFormat
from poolreg.files import read_capped, staged

NAME = "FORMAT"
VERSION = 1
_FIELDS = {"crc32", "format", "id"}
_RESTORE = "restore it from a copy of the pool, or write it anew with: poolreg verify --repair"


def write_marker(root: Path, identity: str | None = None) -> None:
    """Make `root` a pool of this format, with a new identity unless one is given."""
    fields = {"format": VERSION, "id": identity or str(uuid.uuid4())}
    with staged(root / NAME, folder=root / "tmp") as file:
        file.write(canonical_json({"crc32": _checksum(fields), **fields}))


def read_marker(root: Path) -> str:
    """Return the identity of the pool in `root`.

    Raises `NoPool` without a marker, `UnknownFormat` for another version, `Damage` for a marker
    that is not as it was written. One without a checksum, of a pool made before there was one,
    is taken as it is.
    """
    path = root / NAME
    if not path.is_file():
        raise NoPool(f"no pool in {root}", hint="make one with: poolreg init DIR")
    try:
        fields = json.loads(read_capped(path, 4096, error=Damage, what=NAME))
        version, identity = fields["format"], fields["id"]
        checksum = fields.get("crc32", _checksum({"format": version, "id": identity}))
        if fields.keys() - _FIELDS or checksum != _checksum({"format": version, "id": identity}):
            raise ValueError("a changed marker")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, Refused) as error:
        raise _damage(path) from error
    if type(version) is not int or version != VERSION:  # True and 1.0 equal 1
        shown = reprlib.repr(version)
        raise UnknownFormat(
            f"the pool {root} has format {shown}; this poolreg reads format {VERSION}",
            hint="install a newer poolreg",
        )
    return str(identity)


def has_checksum(root: Path) -> bool:
    """Tell whether the marker, which is readable, could show that it was changed."""
    return b'"crc32"' in (root / NAME).read_bytes()


def _checksum(fields: dict[str, object]) -> str:
    return f"{binascii.crc32(canonical_json(fields)):08x}"


def _damage(path: Path) -> Damage:
    return Damage(f"{path} is not the FORMAT file of a pool, or was damaged", hint=_RESTORE)
