"""Models of a pool: strict intake, the stored model as files again, lineage, export.

A stored model is a set of objects (weights byte for byte, configuration, tokenizer). What it was
trained on is a separate record, its run, so the same bytes may be said to be several things.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from poolreg.canonical import sha256
from poolreg.errors import Incompatible, Refused, UsageError
from poolreg.files import storage_errors, write_atomic
from poolreg.models.folders import new_folder
from poolreg.store import records
from poolreg.store.journal import Record
from poolreg.store.registry import Registry
from poolreg.store.staging import in_use, working_folder
from poolreg.tensors import TensorInfo, read_header
from poolreg.weights.checkpoint import (
    Checkpoint,
    Family,
    Fingerprint,
    canonical_config,
    check_same_family,
    context_length,
    fingerprint,
    read_checkpoint,
    vocab_size,
)
from poolreg.weights.hashing import HashedFile

Progress = Callable[[int], None] | None

_INDEX = "model.safetensors.index.json"


@dataclass(frozen=True)
class Run:
    """What a model is and how it came to be; digests throughout.

    `role` is seed, unit, reference or other. `units` lists (unit digest, tokens or None, epochs
    or None). `blend` identifies the exact weights over base units that it was trained on.
    """

    role: str
    seed: str | None = None
    units: tuple[tuple[str, int | None, float | None], ...] = ()
    blend: str | None = None
    mixture: str | None = None
    scheme: str | None = None
    budget: str | None = None
    how: str = "added"
    tokens: int | None = None
    steps: int | None = None
    seconds: float | None = None
    final_loss: float | None = None
    recipe: Mapping[str, Any] | None = None


@dataclass(frozen=True)
class AddedModel:
    """A model that is in the pool now."""

    label: str
    digest: str
    role: str
    parameters: int
    bytes: int
    new: bool
    notes: tuple[str, ...] = field(default=())


def add_model(
    registry: Registry, folder: Path, run: Run, *, name: str | None = None, replace: bool = False,
    tokenizer: Path | None = None, trust_code: bool = False, passing: bool = False,
    hashed: Mapping[str, HashedFile] | None = None,
    lineage: Callable[[str], Sequence[Record]] = lambda _: (), progress: Progress = None,
) -> AddedModel:  # fmt: skip
    """Check a Hugging Face folder strictly and store it.

    Every byte of the weights is read once: to hash it, to look for values that are not finite,
    and to copy it, unless the file system shares the blocks. The weights of a `passing` folder,
    which lies in the pool's tmp/ and is needed no longer, are moved; if whoever wrote them knows
    how they are `hashed`, by file name, they are not read. A folder without a tokenizer takes
    that of the seed model it was trained from. `lineage` is given the model's digest and returns
    what else is recorded together with it. `progress` is told bytes hashed. Raises `Refused`,
    `NotFound`, `Incompatible`, `Conflict`.
    """
    if name:
        registry.check_free("model", name, None, replace=True)
    with contextlib.ExitStack() as stack:
        checkpoint = read_checkpoint(folder, trust_code=trust_code, tokenizer=tokenizer)
        notes = []
        if checkpoint.tokenizer is None and run.seed:
            seed_folder = stack.enter_context(stored_folder(registry, run.seed))
            checkpoint = read_checkpoint(folder, trust_code=trust_code, tokenizer=seed_folder)
            notes.append("the folder holds no tokenizer; the seed model's was taken")
        if checkpoint.tokenizer is None:
            notes.append("no tokenizer: text cannot be scored until the model is added with one")
        if run.seed:
            _check_grown_from(registry, run.seed, checkpoint)
        weights = {path: path for path in checkpoint.weight_files}
        if not passing:
            place = stack.enter_context(working_folder(registry.objects.staging))
            weights = {path: place / path.name for path in weights}
        copies = None if passing else weights
        identity = fingerprint(checkpoint, hashed=hashed, copies=copies, progress=progress)
        if name:
            name = registry.check_free("model", name, identity.digest, replace=replace)
        known = registry.select("model", digest=identity.digest)
        with registry.writing():
            more = lineage(identity.digest)
            _store(registry, checkpoint, identity, run, name, weights, more, trust_code=trust_code)
    label = registry.one("model_label", model=identity.digest)["label"]
    return AddedModel(
        label, identity.digest, run.role, identity.parameters, identity.bytes, not known,
        tuple(notes),
    )  # fmt: skip


def _check_grown_from(registry: Registry, seed: str, checkpoint: Checkpoint) -> None:
    """Raise `Incompatible` unless a model can be averaged with others of its seed."""
    names = checkpoint.folder.name, f"seed {registry.one('model_label', model=seed)['label']}"
    check_same_family(checkpoint.family, stored_family(registry, seed), names=names)


def _store(
    registry: Registry, checkpoint: Checkpoint, identity: Fingerprint, run: Run,
    name: str | None, weights: Mapping[Path, Path], more: Sequence[Record], *, trust_code: bool,
) -> None:  # fmt: skip
    """Store the files, of which `weights` are moved from where they lie, and record the model."""
    known = bool(registry.select("model", digest=identity.digest))
    if known:
        _refuse_other_files(registry, checkpoint, identity, trust_code=trust_code)
    objects: dict[str, int] = {}
    files = []
    hashed = {file.path: file for file in identity.files}
    for role, filename, path in _files(checkpoint, trust_code):
        if path in hashed:
            digest, size = hashed[path].sha256, hashed[path].bytes
            registry.objects.take(weights[path], digest)
        else:
            digest = registry.objects.put_file(path)
            size = registry.objects.path(digest).stat().st_size
        objects[digest] = size
        files.append({"role": role, "name": filename, "object": digest, "bytes": size})
    body = {**_facts(checkpoint, identity), "trusted_code": trust_code, "files": files}
    registry.record(
        records.keyed("model", identity.digest, body, objects),
        _run_record(registry, identity.digest, run),
        *([registry.naming("model", name, identity.digest)] if name else []),
        *([registry.removal("model", identity.digest, removed=False)] if known else []),
        *more,
    )


def _refuse_other_files(
    registry: Registry, checkpoint: Checkpoint, identity: Fingerprint, *, trust_code: bool
) -> None:
    """Raise `Refused` if a known model would still lack some of its files with these.

    The pool goes by the files of a model's first record. Cut into other shards, or with another
    library's spelling of its configuration, it is the same model in other bytes.
    """
    weights = {file.path: file.sha256 for file in identity.files}
    coming = {
        weights[path] if path in weights else sha256(path.read_bytes())
        for _, _, path in _files(checkpoint, trust_code)
    }
    lacking = [
        row["name"] for row in registry.select("model_files", model=identity.digest)
        if row["object"] not in coming and not registry.objects.has(row["object"])
    ]  # fmt: skip
    if lacking:
        raise Refused(
            f"model {identity.digest[:12]} is known in other files than these: of them "
            f"{', '.join(lacking[:3])}{', …' if len(lacking) > 3 else ''} "
            f"{'is' if len(lacking) == 1 else 'are'} not here any more, and not in this folder",
            hint="add the folder that it was first added from; or, where the pool was pulled or "
            "pushed, bring its files: poolreg pull",
            digest=identity.digest, files=lacking,
        )  # fmt: skip


def _facts(checkpoint: Checkpoint, identity: Fingerprint) -> dict[str, Any]:
    """Return what a model's record says of it beside its files."""
    return {
        "model_type": checkpoint.config["model_type"],
        "parameters": identity.parameters,
        "bytes": identity.bytes,
        "dtype": _main_dtype(identity),
        "tokenizer": checkpoint.tokenizer.digest if checkpoint.tokenizer else None,
        "context_length": context_length(checkpoint.config),
        "vocab_size": vocab_size(checkpoint.config),
        "tensors": [[t.name, t.dtype, list(t.shape), t.sha256] for t in identity.tensors],
    }


def check_model(
    registry: Registry, digest: str, body: Mapping[str, Any], *, trust_code: bool = False,
    progress: Progress = None,
) -> None:  # fmt: skip
    """Check that the stored files of a model are what its record `body` says, as when it was added.

    `progress` is told bytes hashed. Raises `Refused` where they are not; it, `NotFound` or
    `Incompatible` for files that make no model.
    """
    with stored_folder(registry, digest) as folder:
        checkpoint = read_checkpoint(folder, trust_code=trust_code)
        identity = fingerprint(checkpoint, progress=progress)
        found = {(role, name) for role, name, _ in _files(checkpoint, trust_code)}
    said = {(file["role"], file["name"]) for file in body["files"]}
    facts = _facts(checkpoint, identity)
    if identity.digest != digest or said != found or facts != {key: body[key] for key in facts}:
        raise Refused(
            f"the files of model {digest[:12]} are not the model that its record describes",
            hint="whoever made this pool did not add it with poolreg; do not use it",
            digest=digest,
        )


def _run_record(registry: Registry, model: str, run: Run) -> Record:
    """Return the record of how a model came to be.

    Said again where another model has taken its place since, it is a statement of its own, so
    that the model stands again.
    """
    fields = {key: value for key, value in vars(run).items() if key != "units"}
    units = [
        {"unit": unit, "tokens": tokens, "epochs": epochs} for unit, tokens, epochs in run.units
    ]
    body = {**fields, "model": model, "units": units}
    fact = records.fact("run", body)
    same = {key: fields[key] for key in ("role", "seed", "blend", "budget")}
    known = registry.select("runs_alike", **same)
    if any(row["digest"] == fact.id for row in known) and known[0]["model"] != model:
        return records.statement("run", body, after=known[0]["at"])
    return fact


def _files(checkpoint: Checkpoint, trust_code: bool) -> Iterator[tuple[str, str, Path]]:
    """Yield (role, name, path) of every file that makes up the model."""
    for path in checkpoint.weight_files:
        yield "weights", path.name, path
    for role, filename in (("config", "config.json"), ("config", "generation_config.json")):
        if (checkpoint.folder / filename).is_file():
            yield role, filename, checkpoint.folder / filename
    if len(checkpoint.weight_files) > 1 or checkpoint.weight_files[0].name != "model.safetensors":
        yield "index", _INDEX, checkpoint.folder / _INDEX
    if trust_code:
        for path in sorted(checkpoint.folder.glob("*.py")):
            yield "code", path.name, path
    if checkpoint.tokenizer:
        for filename, path in sorted(checkpoint.tokenizer.files.items()):
            yield "tokenizer", filename, path


def _main_dtype(identity: Fingerprint) -> str:
    sizes: dict[str, int] = {}
    for tensor in identity.tensors:
        sizes[tensor.dtype] = sizes.get(tensor.dtype, 0) + tensor.stop - tensor.start
    return max(sorted(sizes), key=lambda dtype: sizes[dtype])


# -- the stored model ----------------------------------------------------------------------


def stored_tensors(registry: Registry, digest: str) -> dict[str, tuple[Path, TensorInfo]]:
    """Return where each tensor of a stored model stands, read from its files' headers."""
    found: dict[str, tuple[Path, TensorInfo]] = {}
    for row in registry.select("model_files", model=digest):
        if row["role"] == "weights":
            path = registry.objects.existing(row["object"])
            found |= {name: (path, info) for name, info in read_header(path).tensors.items()}
    return found


def stored_config(registry: Registry, digest: str) -> dict[str, Any]:
    """Return the config.json of a stored model."""
    for row in registry.select("model_files", model=digest):
        if row["name"] == "config.json":
            config: dict[str, Any] = json.loads(registry.objects.read(row["object"]))
            return config
    raise Incompatible(f"model {digest[:12]} has no configuration")


def stored_family(registry: Registry, digest: str) -> Family:
    """Return what models must share with a stored model to be averaged with it."""
    rows = registry.select("model_tensors", model=digest)
    layouts = {row["name"]: (row["dtype"], tuple(row["shape"])) for row in rows}
    tokenizer = registry.one("model", digest=digest)["tokenizer"]
    return Family(layouts, canonical_config(stored_config(registry, digest)), tokenizer)


@contextlib.contextmanager
def stored_folder(registry: Registry, digest: str) -> Iterator[Path]:
    """Lay a stored model out as a Hugging Face folder of links for the block."""
    folder = registry.root / "tmp" / f"model.{os.getpid()}.{secrets.token_hex(4)}"
    with storage_errors("laying out a model"):
        folder.mkdir()
    try:
        with in_use(folder):
            for row in registry.select("model_files", model=digest):
                target = registry.objects.existing(row["object"]).resolve()
                (folder / check_file_name(row["name"])).symlink_to(target)
            yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def check_file_name(name: str) -> str:
    """Return a file name of a stored model if it stays in its folder; raises `UsageError`."""
    plain = name == Path(name).name and name.isprintable() and not set(name) & set("/\\:")
    if not name or name in (".", "..") or not plain:
        raise UsageError(f"{name!r} is not a file name")
    return name


def export_model(registry: Registry, digest: str, out: Path, *, force: bool = False) -> None:
    """Copy a stored model to a folder, byte for byte, each file checked against its digest.

    A compressed variant also gets the code that loads it where poolreg is not installed, and the
    entries in config.json that name it.
    """
    with new_folder(out, force=force) as staging:
        for row in registry.select("model_files", model=digest):
            registry.objects.check(row["object"])
            source = registry.objects.existing(row["object"])
            shutil.copyfile(source, staging / check_file_name(row["name"]))
        config = stored_config(registry, digest)
        if config["model_type"].startswith("poolreg_"):
            from poolreg.models import modeling_poolreg

            config |= modeling_poolreg.config_entries(config["model_type"])
            text = json.dumps(config, indent=2) + "\n"
            write_atomic(staging / "config.json", text.encode())
            shutil.copy(modeling_poolreg.__file__, staging / "modeling_poolreg.py")
