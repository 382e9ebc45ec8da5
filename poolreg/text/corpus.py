"""A corpus and its identity: fingerprints of documents and files, drift, evalset bytes.

A corpus is an ordered sequence of documents (strings that are not empty). Where they stand is
a detail: the digest of a document is the sha256 of its UTF-8 bytes, and the identity of a corpus
is the sha256 of its documents' digests in order, so renamed or repacked files are the same data.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from poolreg.canonical import canonical_json, sha256
from poolreg.errors import NotFound, Refused, StorageError
from poolreg.text.reading import read_documents, reading

Digests = bytes
"""The sha256 of each document's UTF-8 bytes, concatenated in order: 32 bytes a document."""

_DIGEST_BYTES = 32
_PROGRESS_BYTES = 1 << 20


@dataclass(frozen=True)
class FileFacts:
    """What a file was when it was read: absolute path, size, sha256, documents in it."""

    path: str
    bytes: int
    sha256: str
    documents: int


@dataclass(frozen=True)
class Scan:
    """A corpus that was read once: its files, its counts and the digests of its documents."""

    files: tuple[FileFacts, ...]
    documents: int
    bytes: int  # UTF-8 bytes of the documents' text
    duplicates: int  # documents that repeat an earlier one exactly; they are kept
    digests: Digests

    @property
    def content_digest(self) -> str:
        """The identity of the corpus: the sha256 of `digests`."""
        return sha256(self.digests)


Reason = Literal["missing", "changed", "unreadable"]


@dataclass(frozen=True)
class FileDrift:
    """A file that is no longer what it was."""

    path: str
    reason: Reason


def scan(
    paths: Sequence[Path], *, field: str = "text", progress: Callable[[int], None] | None = None
) -> Scan:
    """Read all documents of `paths` (as `expand_files` gives them) once and fingerprint them.

    `progress` gets the UTF-8 bytes of text read since its last call, about every MiB. Raises
    what `read_documents` raises, and `Refused` for a file that changes meanwhile and for a
    corpus without any text.
    """
    files: list[FileFacts] = []
    digests = bytearray()
    size = 0
    for path in paths:
        before, first = _stamp(path), len(digests)
        length, digest = _hash_file(path)
        for data in _counted(read_documents(path, field=field), progress):
            digests += hashlib.sha256(data).digest()
            size += len(data)
        if _stamp(path) != before:
            raise Refused(f"{path} changed while it was read", hint="wait until it is written")
        documents = (len(digests) - first) // _DIGEST_BYTES
        files.append(FileFacts(str(path.absolute()), length, digest, documents))
    if not digests:
        raise Refused("no text in the given files", hint="all documents in them are empty")
    found = len(digests) // _DIGEST_BYTES
    unique = len(set(_split_digests(bytes(digests))))
    return Scan(tuple(files), found, size, found - unique, bytes(digests))


def _counted(documents: Iterable[str], progress: Callable[[int], None] | None) -> Iterator[bytes]:
    pending = 0
    for document in documents:
        data = document.encode()
        yield data
        pending += len(data)
        if progress and pending >= _PROGRESS_BYTES:
            progress(pending)
            pending = 0
    if progress and pending:
        progress(pending)


def _stamp(path: Path) -> tuple[int, int, int]:
    with reading(path):
        facts = path.stat()
    return facts.st_size, facts.st_mtime_ns, facts.st_ino


def _hash_file(path: Path, progress: Callable[[int], None] | None = None) -> tuple[int, str]:
    state, size = hashlib.sha256(), 0
    with reading(path), open(path, "rb") as file:
        while block := file.read(1 << 20):
            state.update(block)
            size += len(block)
            if progress:
                progress(len(block))
    return size, state.hexdigest()


def document_digests(documents: Iterable[str]) -> Digests:
    """Return the digests of `documents` in order."""
    return b"".join(hashlib.sha256(document.encode()).digest() for document in documents)


def shared_documents(evalset: Digests, partition: Digests) -> tuple[int, ...]:
    """Return the indices of the documents of `evalset` that also stand, exactly, in `partition`."""
    wanted = set(_split_digests(evalset))
    present = wanted.intersection(_split_digests(partition))
    return tuple(i for i, digest in enumerate(_split_digests(evalset)) if digest in present)


def _split_digests(digests: Digests) -> Iterator[bytes]:
    return (digests[i : i + _DIGEST_BYTES] for i in range(0, len(digests), _DIGEST_BYTES))


def check_files(
    files: Sequence[FileFacts], *, progress: Callable[[int], None] | None = None
) -> tuple[FileDrift, ...]:
    """Return the files that are missing or whose bytes are not what they were.

    `progress` gets the bytes hashed since its last call; a file of another size is not read.
    """
    found = ((facts.path, _drift_of(facts, progress)) for facts in files)
    return tuple(FileDrift(path, reason) for path, reason in found if reason)


def _drift_of(facts: FileFacts, progress: Callable[[int], None] | None) -> Reason | None:
    path, recorded = Path(facts.path), (facts.bytes, facts.sha256)
    try:
        same = path.stat().st_size == facts.bytes and _hash_file(path, progress) == recorded
    except (FileNotFoundError, NotADirectoryError, NotFound):
        return "missing"
    except (OSError, StorageError):
        return "unreadable"
    return None if same else "changed"


# --- evalsets as objects -----------------------------------------------------------------


def encode_documents(documents: Iterable[str]) -> bytes:
    """Return the one stored form of an evalset: a canonical JSON string and LF a document."""
    return b"".join(canonical_json(document) + b"\n" for document in documents)


def decode_documents(data: bytes) -> list[str]:
    """Return the documents of `encode_documents`; anything else is `Refused`."""
    lines = data.split(b"\n")
    if lines.pop():
        raise Refused("stored evalset: the last line is not ended", hint="add the evalset again")
    return [_decode_document(line, number) for number, line in enumerate(lines, start=1)]


def _decode_document(line: bytes, number: int) -> str:
    try:
        document = json.loads(line.decode())
        # Only the canonical spelling: one content, one object.
        canonical = canonical_json(document) == line
    except (ValueError, RecursionError, Refused):
        document, canonical = None, False
    if not isinstance(document, str) or not canonical:
        raise Refused(
            f"stored evalset: line {number} is not a canonical JSON string",
            hint="add the evalset again from its files",
        )
    return document
