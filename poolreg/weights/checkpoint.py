"""Hugging Face model folders written by strangers: strict to read, safe to open, identified.

Reading looks at names, JSON and safetensors headers only: it runs no code, unpickles nothing
and refuses what loaders would guess about. The fingerprint reads every byte of the weights
once, and in that pass hashes files and tensors and looks for values that are not finite. The
model digest does not depend on sharding, file order or metadata.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from poolreg.canonical import digest_of
from poolreg.errors import NotFound, Refused
from poolreg.files import storage_errors
from poolreg.tensors import TensorInfo, read_header
from poolreg.weights.family import (
    Family,
    canonical_config,
    check_same_family,
    context_length,
    vocab_size,
)
from poolreg.weights.hashing import HashedFile, hash_files, hash_tensors
from poolreg.weights.hf_json import read_object, refuse_code
from poolreg.weights.known import Seen
from poolreg.weights.tokenizer_files import TokenizerFiles, read_tokenizer, require_tokenizer

__all__ = [
    "Checkpoint",
    "Family",
    "FileDigest",
    "Fingerprint",
    "TensorDigest",
    "TokenizerFiles",
    "canonical_config",
    "check_same_family",
    "context_length",
    "digest_of_tensors",
    "digest_of_weights",
    "fingerprint",
    "read_checkpoint",
    "vocab_size",
]

MAX_CONFIG = 4 << 20  # bytes
MAX_INDEX = 32 << 20  # of a model of 100,000 tensors it has 10 MB

_WEIGHTS = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_ADAPTERS = ("adapter_config.json", "adapter_model.safetensors", "adapter_model.bin")
_SAVE = ".save_pretrained(NEW_FOLDER) writes a folder that poolreg reads"
_AGAIN = "download or export the folder again; poolreg reads only whole, well-formed folders"


@dataclass(frozen=True)
class Checkpoint:
    """A checked model folder; nothing of its weights has been read but the headers."""

    folder: Path
    config: dict[str, Any]  # as read
    generation_config: dict[str, Any] | None
    weight_files: tuple[Path, ...]  # by name
    tensors: Mapping[str, tuple[Path, TensorInfo]]
    tokenizer: TokenizerFiles | None

    @property
    def family(self) -> Family:
        """What other models must share with this one to be averaged with it."""
        layouts = {name: (info.dtype, info.shape) for name, (_, info) in self.tensors.items()}
        digest = self.tokenizer.digest if self.tokenizer else None
        return Family(layouts, canonical_config(self.config), digest)


class FileDigest(NamedTuple):
    """One weights file: where it is, the sha256 of its bytes and their number."""

    path: Path
    sha256: str
    bytes: int


class TensorDigest(NamedTuple):
    """One tensor: what it is, the sha256 of its payload, and where that stands."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    sha256: str
    file: int  # index in `Fingerprint.files`
    start: int  # absolute offsets in that file
    stop: int


@dataclass(frozen=True)
class Fingerprint:
    """The identity of a checkpoint, and the facts that were found on the way."""

    files: tuple[FileDigest, ...]
    tensors: tuple[TensorDigest, ...]  # by name
    digest: str
    parameters: int  # elements of floating-point tensors
    bytes: int  # of payload


def read_checkpoint(
    folder: Path, *, trust_code: bool = False, tokenizer: Path | None = None
) -> Checkpoint:
    """Check a model folder, sharded or not, and describe it.

    `tokenizer` names a folder whose tokenizer is taken instead of the model folder's own.
    Raises `NotFound` without a folder, config or tokenizer asked for, and `Refused` for
    whatever could run code (unless `trust_code`), is not whole, or cannot be averaged.
    """
    if not folder.is_dir():
        raise NotFound(f"no model folder {folder}", hint="check the path", path=str(folder))
    with storage_errors(f"reading the folder {folder}"):
        names = {path.name for path in folder.iterdir()}
    _refuse_adapter(folder, names)
    config = _read_config(folder, trust_code)
    tensors = _read_weights(folder, names)
    if tokenizer is None:
        found = read_tokenizer(folder, trust_code=trust_code)
    else:
        found = require_tokenizer(tokenizer, trust_code=trust_code)
    generation = folder / "generation_config.json"
    return Checkpoint(
        folder=folder,
        config=config,
        generation_config=read_object(generation, MAX_CONFIG) if generation.exists() else None,
        weight_files=tuple(sorted({path for path, _ in tensors.values()})),
        tensors=tensors,
        tokenizer=found,
    )


def fingerprint(
    checkpoint: Checkpoint,
    *,
    hashed: Mapping[str, HashedFile] | None = None,
    copies: Mapping[Path, Path] | None = None,
    threads: int | None = None,
    progress: Callable[[int], None] | None = None,
) -> Fingerprint:
    """Read all weights once; return their hashes and the digest of the model.

    With `hashed`, by file name, which whoever wrote the files knows, nothing is read. In the same
    pass a file in `copies` is copied to the path given there. `threads` (default: one per core)
    work on files, and within a file on its hashes. `progress` is told how many bytes were read
    since it was last called, from one thread at a time. Raises `Refused` naming a tensor with NaN
    or infinite values, and a file that changed.
    """
    files = checkpoint.weight_files
    index = {path: at for at, path in enumerate(files)}
    if hashed is None:
        found = hash_files(
            _work(checkpoint), threads=threads or _cores(), copies=copies, progress=progress
        )
        hashed = {path.name: made for path, made in zip(files, found, strict=True)}
    rows = tuple(
        TensorDigest(
            name, info.dtype, info.shape, hashed[path.name].tensors[name], index[path],
            info.start, info.stop,
        )
        for name, (path, info) in sorted(checkpoint.tensors.items())
    )  # fmt: skip
    infos = [info for _, info in checkpoint.tensors.values()]
    return Fingerprint(
        files=tuple(
            FileDigest(path, hashed[path.name].sha256, hashed[path.name].bytes) for path in files
        ),
        tensors=rows,
        digest=digest_of_tensors(checkpoint, {row.name: row.sha256 for row in rows}),
        parameters=sum(info.elements for info in infos if _is_floating(info.dtype)),
        bytes=sum(info.stop - info.start for info in infos),
    )


def digest_of_weights(
    checkpoint: Checkpoint,
    *,
    threads: int | None = None,
    progress: Callable[[int], None] | None = None,
) -> str:
    """Return the digest of the model alone: all tensors are read once, by all threads at once.

    Files that have not changed since they were hashed for this are not read again. Otherwise
    as `fingerprint`.
    """
    hashes: dict[str, str] = {}
    seen, rest = {}, []
    for path, tensors in _work(checkpoint):
        with storage_errors(f"reading {path.name}"):
            seen[path] = Seen.of(path)
        known = seen[path].recall(info.name for info in tensors)
        if known is None:
            rest.append((path, tensors))
            continue
        hashes |= known
        if progress:
            progress(sum(info.stop - info.start for info in tensors))
    found = hash_tensors(rest, threads=threads or _cores(), progress=progress)
    for (path, _), made in zip(rest, found, strict=True):
        seen[path].remember(path, made)
        hashes |= made
    return digest_of_tensors(checkpoint, hashes)


def digest_of_tensors(checkpoint: Checkpoint, hashes: Mapping[str, str]) -> str:
    """Return the digest of the model, given the sha256 of each tensor's payload."""
    return digest_of({
        "model": 1,
        "tensors": [
            [name, info.dtype, list(info.shape), hashes[name]]
            for name, (_, info) in sorted(checkpoint.tensors.items())
        ],
        "config": canonical_config(checkpoint.config),
        "tokenizer": checkpoint.tokenizer.digest if checkpoint.tokenizer else None,
    })  # fmt: skip


def _work(checkpoint: Checkpoint) -> list[tuple[Path, list[TensorInfo]]]:
    """Return the tensors of each file."""
    parts: dict[Path, list[TensorInfo]] = {path: [] for path in checkpoint.weight_files}
    for path, info in checkpoint.tensors.values():
        parts[path].append(info)
    return list(parts.items())


def _cores() -> int:
    return os.cpu_count() or 1


def _is_floating(dtype: str) -> bool:
    return dtype.startswith(("F", "BF"))


def _refuse_adapter(folder: Path, names: set[str]) -> None:
    # With an adapter present, loaders take the weights of another, absent model below it.
    found = next((name for name in _ADAPTERS if name in names), None)
    if found:
        raise Refused(
            f"{folder} holds an adapter ({found}), not a whole model",
            hint="merge the adapter first: PeftModel.from_pretrained(base, ADAPTER)"
            f".merge_and_unload(){_SAVE}",
            path=str(folder),
        )


def _read_config(folder: Path, trust_code: bool) -> dict[str, Any]:
    path = folder / "config.json"
    if not path.exists():
        hint = "give the folder that save_pretrained wrote: config.json and *.safetensors"
        raise NotFound(f"{folder} has no config.json", hint=hint, path=str(folder))
    config = read_object(path, MAX_CONFIG)
    if not isinstance(config.get("model_type"), str) or not config["model_type"]:
        raise Refused(f"{path} names no model_type", hint=_AGAIN, path=str(path))
    if not trust_code:
        refuse_code(config, path)
    for part in (config, config.get("text_config")):
        if isinstance(part, dict) and part.get("quantization_config"):
            raise Refused(
                f"the weights in {folder} are quantised, so they cannot be averaged",
                hint="use the checkpoint in float32, bfloat16 or float16 that they were made from",
                path=str(path),
            )
    return config


def _read_weights(folder: Path, names: set[str]) -> Mapping[str, tuple[Path, TensorInfo]]:
    """Read the headers of the weights; every tensor stands in exactly one file."""
    placed = _read_index(folder, names) if _INDEX in names else None
    shards = sorted(set(placed.values())) if placed is not None else [_single(folder, names)]
    tensors: dict[str, tuple[Path, TensorInfo]] = {}
    for shard in shards:
        for name, info in read_header(folder / shard).tensors.items():
            if name in tensors:
                raise _mismatch(folder, name, f"stands in {tensors[name][0].name} and {shard}")
            if placed is not None and placed.get(name) != shard:
                raise _mismatch(folder, name, f"of {shard} is not there by {_INDEX}")
            tensors[name] = (folder / shard, info)
    for name, shard in (placed or {}).items():
        if name not in tensors:
            raise _mismatch(folder, name, f"is missing: {shard} does not hold it")
    if not tensors:
        raise Refused(f"the weights in {folder} hold no tensors", hint=_AGAIN, path=str(folder))
    return tensors


def _mismatch(folder: Path, name: str, reason: str) -> Refused:
    return Refused(f"{folder}: tensor {name!r} {reason}", hint=_AGAIN, tensor=name)


def _read_index(folder: Path, names: set[str]) -> dict[str, str]:
    """Return which file each tensor stands in; the files exist, in the folder itself."""
    path = folder / _INDEX
    placed = read_object(path, MAX_INDEX).get("weight_map")
    if not isinstance(placed, dict) or not placed:
        raise Refused(f"{path} has no weight_map", hint=_AGAIN, path=str(path))
    for shard in placed.values():
        if not _is_plain(shard):
            reason = f"names the weights file {str(shard)[:100]!r}, which is not a plain file name"
            raise Refused(f"{path} {reason}", hint=_AGAIN, path=str(path))
        if shard not in names:
            raise Refused(
                f"{folder} is incomplete: {shard[:100]} is missing",
                hint=_AGAIN,
                path=str(folder / shard),
            )
    if _WEIGHTS in names and _WEIGHTS not in placed.values():
        raise _ambiguous(folder, [_WEIGHTS, _INDEX])
    return placed


def _is_plain(shard: Any) -> bool:
    return (
        isinstance(shard, str)
        and shard.isprintable()
        and shard.endswith(".safetensors")
        and not set(shard) & {"/", "\\"}
    )


def _single(folder: Path, names: set[str]) -> str:
    """Return the name of the one weights file of a folder without an index."""
    found = sorted(name for name in names if name.endswith(".safetensors"))
    shards = [name for name in found if name.startswith("model-")]
    if _WEIGHTS in found and not shards:
        return _WEIGHTS
    if len(found) > 1:
        raise _ambiguous(folder, found)
    if found:
        hint = f"if it holds the whole model, rename it to {_WEIGHTS}"
        raise Refused(f"{folder / found[0]} is not called {_WEIGHTS}", hint=hint, path=str(folder))
    pickles = sorted(name for name in names if name.endswith(_PICKLES))
    if pickles or "pytorch_model.bin.index.json" in names:
        raise _pickled(folder, pickles)
    hint = f"give the folder that save_pretrained wrote: config.json and {_WEIGHTS}"
    raise NotFound(f"{folder} has no weights", hint=hint, path=str(folder))


def _ambiguous(folder: Path, found: list[str]) -> Refused:
    return Refused(
        f"{folder} holds several weights, and nothing says which count: {', '.join(found[:4])}",
        hint=f"keep either {_WEIGHTS}, or the shards with {_INDEX}, and move the rest away",
        path=str(folder),
    )


def _pickled(folder: Path, found: list[str]) -> Refused:
    what = found[0] if found else "pytorch_model.bin.index.json"
    return Refused(
        f"{folder} holds its weights as a pickle ({what}), which can run code when it is opened",
        hint="if you trust it, convert it to safetensors with these two lines of Python:\n"
        "    from transformers import AutoModelForCausalLM\n"
        f'    AutoModelForCausalLM.from_pretrained({str(folder)!r}).save_pretrained("NEW_FOLDER")',
        path=str(folder),
    )
