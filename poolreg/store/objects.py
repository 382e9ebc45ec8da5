"""The object store: immutable bytes named by their sha256.

    objects/ab/cdef…     the first two digits are the folder, the other 62 the file's name

An object is written beside its place, flushed, renamed and made read-only, so it is whole or
absent, and writing the same bytes twice is harmless. Who names objects is not known here.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import secrets
from collections.abc import Callable
from pathlib import Path

from poolreg import faults
from poolreg.canonical import is_digest, sha256
from poolreg.errors import Damage, NotFound
from poolreg.files import staged, storage_errors, sync_file, sync_folder
from poolreg.weights.disk import clone, write_all

_CHUNK = 1 << 22


class ObjectStore:
    """Write-once objects under one folder; `staging` is a folder on the same file system."""

    def __init__(self, folder: Path, staging: Path) -> None:
        self.folder = folder
        self.staging = staging

    def path(self, digest: str) -> Path:
        """Return where the object stands or would stand."""
        if not is_digest(digest):
            raise NotFound(f"{digest!r} is not a digest")
        return self.folder / digest[:2] / digest[2:]

    def has(self, digest: str) -> bool:
        """Tell whether the object is here."""
        return self.path(digest).is_file()

    def holds(self, digest: str, size: int) -> bool:
        """Tell whether the object is here, in the size that it should have."""
        path = self.path(digest)
        return path.is_file() and path.stat().st_size == size

    def read(self, digest: str) -> bytes:
        """Return an object's bytes; raises `NotFound`, or `Damage` if they changed on disk."""
        with storage_errors(f"reading object {digest[:12]}"):
            data = self.existing(digest).read_bytes()
        if sha256(data) != digest:
            raise _changed(digest)
        return data

    def existing(self, digest: str) -> Path:
        """Return the path of an object that must be here; raises `NotFound`."""
        path = self.path(digest)
        if not path.is_file():
            raise NotFound(
                f"object {digest[:12]} is not in this pool",
                hint="where the pool was pulled without weights, bring them: poolreg pull --only "
                "NAME; else restore it from a copy, or add the file it came from again",
                digest=digest,
            )
        return path

    def put(self, data: bytes) -> str:
        """Store bytes and return their digest."""
        digest = sha256(data)
        target = self._place(digest)
        if self.holds(digest, len(data)):
            self._keep(target)
        else:
            with staged(target, folder=self.staging, mode=0o444) as file:
                file.write(data)
        return digest

    def put_file(
        self,
        source: Path,
        *,
        expect: str | None = None,
        progress: Callable[[int], None] | None = None,
    ) -> str:
        """Copy a file into the store and return its digest; `progress` is told bytes copied.

        Where the file system can, the copy shares the file's blocks until either is changed.
        With `expect`, a file with another digest raises `Damage` and nothing is stored.
        """
        temporary = self.staging / f"object.{os.getpid()}.{secrets.token_hex(6)}.tmp"
        with storage_errors(f"storing {source.name}"):
            try:
                digest = _copy(source, temporary, progress)
                if expect is not None and digest != expect:
                    raise _changed(expect, where=str(source))
                self._adopt(temporary, digest)
            finally:
                temporary.unlink(missing_ok=True)
        return digest

    def adopt(self, file: Path, digest: str) -> None:
        """Move a file of the staging folder into the store if its bytes have that digest.

        Raises `Damage` if they have not; the file stays then.
        """
        with storage_errors(f"storing object {digest[:12]}"), open(file, "rb") as reader:
            if hashlib.file_digest(reader, "sha256").hexdigest() != digest:
                raise _changed(digest, where=file.name)
        self.take(file, digest)

    def check(self, digest: str) -> None:
        """Hash the object again; raises `NotFound` or `Damage`."""
        path = self.existing(digest)
        with storage_errors(f"reading object {digest[:12]}"), open(path, "rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
        if found != digest:
            raise _changed(digest)

    def _place(self, digest: str) -> Path:
        target = self.path(digest)
        with storage_errors("making the object folder"):
            if not target.parent.is_dir():
                target.parent.mkdir(exist_ok=True)
                sync_folder(self.folder)
        return target

    def take(self, file: Path, digest: str) -> None:
        """Move a file of the same file system into the store, trusting that it was checked.

        Nobody else may have it open to write, and it has no other name.
        """
        with storage_errors(f"storing object {digest[:12]}"):
            sync_file(file)
            self._adopt(file, digest)

    def _adopt(self, temporary: Path, digest: str) -> None:
        target = self._place(digest)
        # What has another size was cut off, and is mended.
        if target.is_file() and target.stat().st_size == temporary.stat().st_size:
            self._keep(target)
        else:
            temporary.chmod(0o444)
            faults.step("object.place")
            temporary.replace(target)
            faults.step("object.placed")
            sync_folder(target.parent)

    @staticmethod
    def _keep(target: Path) -> None:
        """Make an object that is here already outlast a power cut and a collection's grace."""
        if not os.access(target.parent, os.W_OK):  # nothing can be collected there
            return
        with storage_errors("keeping an object"):
            with contextlib.suppress(PermissionError):  # it is another user's
                os.utime(target)
            sync_folder(target.parent)  # who put it there may not have come so far


def _copy(source: Path, target: Path, progress: Callable[[int], None] | None) -> str:
    hasher = hashlib.sha256()
    buffer = memoryview(bytearray(_CHUNK))
    at = 0
    with open(source, "rb", buffering=0) as reader, open(target, "x+b", buffering=0) as writer:
        cloned = clone(reader.fileno(), writer.fileno())
        while count := (writer if cloned else reader).readinto(buffer):
            hasher.update(buffer[:count])
            if not cloned:
                write_all(writer.fileno(), buffer[:count], at)
            at += count
            if progress:
                progress(count)
        faults.step("object.flush")
        os.fsync(writer.fileno())
    return hasher.hexdigest()


def _changed(digest: str, where: str = "its object") -> Damage:
    return Damage(
        f"the bytes of {digest[:12]} changed in {where}",
        hint="restore the file from a copy; a pool never uses bytes that do not match their digest",
        digest=digest,
    )
