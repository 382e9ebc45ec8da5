"""Real text that every installation has, for a demo that downloads nothing.

Five kinds of text that differ clearly become partitions of equal size, each with an evalset of
the same name from files of which the partition holds nothing; two more kinds are evalsets out
of domain. A passage (a paragraph, or a line of a table) is used once in the whole demo, so no
passage of an evalset stands in a partition. The same installation always gives the same bytes.
"""

from __future__ import annotations

import importlib.util
import re
import sysconfig
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from poolreg.canonical import canonical_json, sha256
from poolreg.errors import NotFound
from poolreg.files import storage_errors, write_atomic

PARTITIONS = 5
FEWEST_PARTITIONS = 3
OUT_OF_DOMAIN = 2

_DOCUMENT_BYTES = 4_000  # long files become many documents, as in a corpus
_SHORTEST_DOCUMENT = 200  # what is left of a file after its repetitions may be a heading
_LEAST_BYTES = 100_000  # a kind of text with less would shrink all partitions to its size
_HELD_OUT_EVERY = 10
_NAMES_A_FILE = 200

File = tuple[str, str]  # name, text


@dataclass(frozen=True)
class DemoText:
    """The .jsonl files that were written, by name, and a line about each kind of text."""

    partitions: dict[str, Path]
    evalsets: dict[str, Path]
    notes: tuple[str, ...]


@dataclass(frozen=True)
class _Kind:
    """One kind of text: where it comes from and what one passage of it is."""

    name: str
    about: str
    files: Callable[[], Iterable[File]]
    lines: bool = False  # a passage is a line, else a paragraph


@dataclass(frozen=True)
class _Document:
    source: str
    text: str

    @property
    def bytes(self) -> int:
        return len(self.text.encode())


def write_demo_text(
    folder: Path, *, partition_bytes: int = 400_000, evalset_bytes: int = 40_000
) -> DemoText:
    """Write the demo's partitions and evalsets below `folder`; see the module for the promises.

    Partitions have the same size, at most `partition_bytes` and what the smallest kind of text
    has, to within a line; evalsets have up to `evalset_bytes`. Rows are {"source", "text"}.
    A kind of text that this installation lacks is replaced or left out and `notes` says so.
    Raises `NotFound` if fewer than three kinds are here.
    """
    seen: set[str] = set()
    partitions, missing = _choose(_IN_DOMAIN, PARTITIONS, min(_LEAST_BYTES, partition_bytes), seen)
    if len(partitions) < FEWEST_PARTITIONS:
        raise NotFound(
            f"this Python has only {len(partitions)} of the texts that the demo is made of",
            hint="; ".join(missing),
        )
    others, missing_others = _choose(_OUT_OF_DOMAIN, OUT_OF_DOMAIN, evalset_bytes, seen)
    size = min(partition_bytes, *(_bytes(train) for _, train, _ in partitions))
    written: dict[str, Path] = {}
    evalsets: dict[str, Path] = {}
    notes = []
    for kind, train, held_out in partitions:
        texts = _take(train, size)
        written[kind.name] = _write(folder / "partitions" / f"{kind.name}.jsonl", texts)
        measured = _take(held_out, evalset_bytes)
        evalsets[kind.name] = _write(folder / "evalsets" / f"{kind.name}.jsonl", measured)
        notes.append(f"{kind.name}: {kind.about}; {_sizes(texts)}, held out {_sizes(measured)}")
    for kind, train, held_out in others:
        measured = _take(_shuffled(train + held_out), evalset_bytes)
        evalsets[kind.name] = _write(folder / "evalsets" / f"{kind.name}.jsonl", measured)
        notes.append(f"{kind.name}: {kind.about}; out of domain, {_sizes(measured)}")
    return DemoText(written, evalsets, (*notes, *missing, *missing_others))


# --- choosing ----------------------------------------------------------------------------

_Split = tuple[_Kind, list[_Document], list[_Document]]


def _choose(
    kinds: Sequence[_Kind], count: int, least: int, seen: set[str]
) -> tuple[list[_Split], list[str]]:
    chosen: list[_Split] = []
    missing = []
    for kind in kinds:
        if len(chosen) == count:
            break
        train, held_out = _split(kind, seen)
        if _bytes(train) >= least and held_out:
            chosen.append((kind, train, held_out))
        else:
            missing.append(f"{kind.name}: left out, {_sizes(train)} of {kind.about} are here")
    return chosen, missing


def _split(kind: _Kind, seen: set[str]) -> tuple[list[_Document], list[_Document]]:
    train: list[_Document] = []
    held_out: list[_Document] = []
    for number, (source, text) in enumerate(kind.files()):
        place = held_out if number % _HELD_OUT_EVERY == _HELD_OUT_EVERY // 2 else train
        fresh = "".join(_fresh_passages(text, kind.lines, seen))
        place += [_Document(source, piece) for piece in _pieces(fresh, _DOCUMENT_BYTES)]
    return _shuffled(train), _shuffled(held_out)


def _fresh_passages(text: str, lines: bool, seen: set[str]) -> Iterator[str]:
    end = "\n" if lines else "\n\n"
    for passage in text.split(end):
        key = " ".join(passage.split())
        if key and key not in seen:
            seen.add(key)
            yield passage + end


def _pieces(text: str, limit: int) -> Iterator[str]:
    piece, size = "", 0
    for line in text.lstrip("\n").splitlines(keepends=True):
        length = len(line.encode())
        if size + length > limit and size:
            yield piece
            piece, size = "", 0
        piece, size = piece + line, size + length
    if size >= _SHORTEST_DOCUMENT:
        yield piece


def _shuffled(documents: list[_Document]) -> list[_Document]:
    # By digest: a shuffle that is the same everywhere and needs no seed.
    return sorted(documents, key=lambda document: sha256(document.text.encode()))


def _take(documents: list[_Document], budget: int) -> list[_Document]:
    taken: list[_Document] = []
    left = budget
    for document in documents:
        if document.bytes > left:
            head = document.text.encode()[:left]
            head = head[: head.rfind(b"\n") + 1]
            return [*taken, _Document(document.source, head.decode())] if head else taken
        taken.append(document)
        left -= document.bytes
    return taken


def _bytes(documents: list[_Document]) -> int:
    return sum(document.bytes for document in documents)


def _sizes(documents: list[_Document]) -> str:
    return f"{len(documents)} documents of {_bytes(documents):,} bytes"


def _write(path: Path, documents: list[_Document]) -> Path:
    rows = ({"source": document.source, "text": document.text} for document in documents)
    with storage_errors(f"making {path.parent}"):
        path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, b"".join(canonical_json(row) + b"\n" for row in rows))
    return path


# --- where the text comes from -----------------------------------------------------------


def _read(paths: Iterable[Path], root: Path) -> Iterator[File]:
    for path in sorted(paths):
        try:
            text = path.read_bytes().decode("utf-8")
        except (OSError, UnicodeDecodeError):
            continue  # one file less of thousands; what is missing shows in the sizes
        yield path.relative_to(root).as_posix(), text.replace("\r\n", "\n")


def _standard_library() -> Path:
    return Path(sysconfig.get_path("stdlib"))


def _package(name: str) -> list[Path]:
    """Return the folder of an installed package, without importing it, or nothing."""
    spec = importlib.util.find_spec(name)
    places = spec.submodule_search_locations if spec else None
    return [Path(place) for place in places or ()][:1]


def _prose() -> Iterator[File]:
    try:
        from pydoc_data.topics import topics
    except ImportError:  # a minimal Python of a Linux distribution
        return
    yield from sorted(topics.items())


_NOT_CODE = {
    "encodings", "idlelib", "lib2to3", "pydoc_data", "site-packages", "dist-packages", "test",
    "tests", "turtledemo", "entities.py", "sitecustomize.py", "usercustomize.py",
}  # fmt: skip


def _code() -> Iterator[File]:
    root = _standard_library()
    packages = [file.parent for file in root.glob("*/__init__.py")]
    files = [*root.glob("*.py"), *(file for package in packages for file in package.rglob("*.py"))]
    # _sysconfigdata holds the paths and compiler flags of one machine.
    return _read(
        (
            file
            for file in files
            if _NOT_CODE.isdisjoint(file.relative_to(root).parts)
            and not file.name.startswith("_sysconfigdata")
        ),
        root,
    )


def _headers() -> Iterator[File]:
    # Written by hand; ATen/ops beside them is generated and repeats itself.
    for package in _package("torch"):
        root = package / "include"
        folders = (root / "c10", root / "ATen" / "core", root / "ATen" / "native")
        yield from _read((file for folder in folders for file in folder.rglob("*.h")), root)


def _names() -> Iterator[File]:
    # The first two planes: beyond them a name is only a number behind a prefix, as it is for
    # most of these.
    named = ((code, unicodedata.name(chr(code), "")) for code in range(0x20000))
    counted = re.compile(r"IDEOGRAPH-|CHARACTER-|HANGUL SYLLABLE")
    lines = [f"U+{code:04X} {name}\n" for code, name in named if name and not counted.search(name)]
    for start in range(0, len(lines), _NAMES_A_FILE):
        yield lines[start].split()[0], "".join(lines[start : start + _NAMES_A_FILE])


def _tables() -> Iterator[File]:
    root = _standard_library()
    files = [*(root / "encodings").glob("*.py"), root / "html" / "entities.py"]
    rows = re.compile(r"decoding_table = \(|html5 = \{")
    return ((name, text) for name, text in _read(files, root) if rows.search(text))


def _licences() -> Iterator[File]:
    called = re.compile(r"(licen[cs]e|copying|notice)", re.IGNORECASE)
    root = Path(sysconfig.get_path("purelib"))
    files = (file for folder in root.glob("*.dist-info") for file in folder.rglob("*"))
    return _read((file for file in files if called.match(file.name) and file.is_file()), root)


def _stubs() -> Iterator[File]:
    for package in _package("numpy"):
        yield from _read(package.rglob("*.pyi"), package.parent)


def _news() -> Iterator[File]:
    root = _standard_library()
    return _read((root / "idlelib").rglob("*.txt"), root)


def _readmes() -> Iterator[File]:
    root = Path(sysconfig.get_path("purelib"))
    metadata = _read(root.glob("*.dist-info/METADATA"), root)
    return ((name, text.partition("\n\n")[2]) for name, text in metadata)


_IN_DOMAIN = (
    _Kind("prose", "Python's help topics", _prose),
    _Kind("code", "Python code of the standard library", _code),
    _Kind("cpp", "C++ headers of torch", _headers),
    _Kind("names", "names of Unicode characters", _names, lines=True),
    _Kind("tables", "character tables of the codecs", _tables, lines=True),
    _Kind("legal", "licences of the installed packages", _licences),
)
_OUT_OF_DOMAIN = (
    _Kind("stubs", "type stubs of numpy", _stubs),
    _Kind("news", "news and notes of IDLE", _news),
    _Kind("readme", "descriptions of the installed packages", _readmes),
)
