"""Files on their way to and from places: read and written in chunks, and compared on the way."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from pathlib import Path

from poolreg.errors import Damage, Refused
from poolreg.files import storage_errors
from poolreg.sharing.places import Outgoing

CHUNK = 1 << 22  # bytes held of a file that is copied


def checked(item: Outgoing) -> Iterator[bytes]:
    """Yield a file's bytes; raises `Damage` in the end if they are not the ones promised."""
    hasher, size = hashlib.sha256(), 0
    with storage_errors(f"reading {item.source}"), open(item.source, "rb") as file:
        while chunk := file.read(CHUNK):
            hasher.update(chunk)
            size += len(chunk)
            if size > item.size:
                break
            yield chunk
    if size != item.size or hasher.hexdigest() != item.sha256:
        raise Damage(
            f"{item.source} does not hold the bytes of {item.path} any more",
            hint="run poolreg verify",
            digest=item.sha256,
        )


def receive(
    chunks: Iterable[bytes], target: Path, *, limit: int, progress: Callable[[int], None]
) -> None:
    """Write `chunks` to the new file `target`; `progress` is told bytes.

    Raises `Refused` for more than `limit` bytes. On any error, no file is left.
    """
    size = 0
    with (
        storage_errors(f"writing {target.name}"),
        ExitStack() as undo,
        open(target, "xb") as file,
    ):
        undo.callback(target.unlink)
        for chunk in chunks:
            size += len(chunk)
            if size > limit:
                raise Refused(
                    f"a published file is longer than the {limit:,} bytes that were listed",
                    hint="it changed meanwhile, or the place cannot be trusted; try again",
                )
            file.write(chunk)
            progress(len(chunk))
        file.flush()
        undo.pop_all()
