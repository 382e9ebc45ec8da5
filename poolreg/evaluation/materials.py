"""What measuring needs of a pool, said by digest, so that it can be done where the pool is not.

A `Materials` holds no connection and no open file: it travels to other processes and machines.
There its objects are read from the pool's folder, if the folder is seen there, and else fetched by
digest from a place that the pool was pushed to, checked, and kept for this user on that machine.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple, Protocol

from poolreg.errors import PoolregError, Refused
from poolreg.files import lock, storage_errors
from poolreg.models.stored import check_file_name
from poolreg.store.marker import read_marker
from poolreg.store.objects import ObjectStore
from poolreg.store.registry import Registry
from poolreg.store.staging import working_folder
from poolreg.tensors import TensorInfo, read_header
from poolreg.text.corpus import decode_documents


class Published(Protocol):
    """A place that objects can be fetched from by digest."""

    def fetch(self, digest: str, target: Path) -> None:
        """Write an object to the new file `target`; raises `NotFound`."""


class StoredFile(NamedTuple):
    """A file of a stored model: what it is for, its name, its object."""

    role: str
    name: str
    object: str


class Text(NamedTuple):
    """The text of an evalset: its object, and the UTF-8 bytes of its documents."""

    object: str
    bytes: int


@dataclass(frozen=True)
class Materials:
    """Files of models and texts of evalsets, by digest, and where their objects are."""

    root: Path
    pool: str  # the pool's identity
    models: Mapping[str, tuple[StoredFile, ...]]
    trusted: frozenset[str]  # the models whose own code may run
    texts: Mapping[str, Text]
    published: Published | None = None

    @classmethod
    def of(
        cls, registry: Registry, models: Iterable[str], evalsets: Iterable[str] = (), *,
        published: Published | None = None,
    ) -> Materials:  # fmt: skip
        """Look up what models and evalsets of a pool consist of."""
        files, trusted, texts = {}, set(), {}
        for model in models:
            rows = registry.select("model_files", model=model)
            files[model] = tuple(StoredFile(r["role"], r["name"], r["object"]) for r in rows)
            if registry.one("model", digest=model)["trusted_code"]:
                trusted.add(model)
        for evalset in evalsets:
            row = registry.one("evalset", digest=evalset)
            texts[evalset] = Text(row["object"], row["bytes"])
        return cls(registry.root, registry.id, files, frozenset(trusted), texts, published)

    def here(self) -> Materials:
        """Return these materials with objects that this machine can read.

        Raises `Refused` where neither the pool's folder nor a place to fetch from is known.
        """
        with contextlib.suppress(PoolregError):
            if read_marker(self.root) == self.pool:
                return replace(self, published=None)
        if self.published is None:
            raise Refused(
                f"the pool's folder {self.root} is not seen on {os.uname().nodename}",
                hint="put the pool into a folder that all machines share under one path, or push "
                "it and name the place with --objects URL",
            )
        return replace(self, root=_kept_folder(self.pool))

    def tensors(self, model: str) -> dict[str, tuple[Path, TensorInfo]]:
        """Return where each tensor of a model stands, read from its files' headers."""
        found: dict[str, tuple[Path, TensorInfo]] = {}
        for file in self.models[model]:
            if file.role == "weights":
                path = self._objects.existing(file.object)
                found |= {name: (path, info) for name, info in read_header(path).tensors.items()}
        return found

    @contextlib.contextmanager
    def folder(self, model: str) -> Iterator[Path]:
        """Lay a model out as a Hugging Face folder of links for the block."""
        with self.scratch() as folder:
            for file in self.models[model]:
                target = self._objects.existing(file.object).resolve()
                (folder / check_file_name(file.name)).symlink_to(target)
            yield folder

    def documents(self, evalset: str) -> list[str]:
        """Return the documents of an evalset; raises `NotFound` or `Damage`."""
        return decode_documents(self._objects.read(self.texts[evalset].object))

    def scratch(self) -> contextlib.AbstractContextManager[Path]:
        """Return a folder for passing work, which is gone after the block."""
        place = self.root / "tmp"
        usable = os.access(place, os.W_OK)
        return working_folder(place if usable else Path(tempfile.gettempdir()))

    @property
    def _objects(self) -> ObjectStore:
        folder, staging = self.root / "objects", self.root / "tmp"
        if self.published is None:
            return ObjectStore(folder, staging)
        return _Fetched(folder, staging, self.published)


class _Fetched(ObjectStore):
    """Objects that are fetched when they are first asked for."""

    def __init__(self, folder: Path, staging: Path, published: Published) -> None:
        super().__init__(folder, staging)
        self._published = published

    def existing(self, digest: str) -> Path:
        if not self.has(digest):
            # One of the processes of a machine fetches it, the others wait.
            with lock(self.staging / f"{digest}.lock", what="a fetched object"):
                if not self.has(digest):
                    self._fetch(digest)
        return super().existing(digest)

    def _fetch(self, digest: str) -> None:
        part = self.staging / f"{digest}.{secrets.token_hex(4)}.tmp"
        try:
            self._published.fetch(digest, part)
            self.adopt(part, digest)
        finally:
            part.unlink(missing_ok=True)


def _kept_folder(pool: str) -> Path:
    """Return this user's own folder for fetched objects of a pool, below TMPDIR."""
    folder = Path(tempfile.gettempdir()) / f"poolreg-{os.getuid()}-{pool}"
    with storage_errors("making a folder for fetched objects"):
        folder.mkdir(mode=0o700, exist_ok=True)
        # In a folder that all users share, somebody else may have made it first.
        if folder.is_symlink() or folder.stat().st_uid != os.getuid():
            raise Refused(f"{folder} is not this user's own folder", hint="set TMPDIR to another")
        for name in ("objects", "tmp"):
            (folder / name).mkdir(exist_ok=True)
    return folder
