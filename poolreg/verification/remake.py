"""Objects made again: from the text they came from, from recipes, and from other copies.

Every object is stored by the digest of its bytes, so what is made is what was lost, or it is not
stored under that name at all.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from poolreg import faults
from poolreg.canonical import sha256
from poolreg.errors import PoolregError, StorageError
from poolreg.models.merges import builds_of, can_rebuild, rebuild
from poolreg.progress import Progress
from poolreg.sharing.refetch import refetch
from poolreg.store.journal import Record
from poolreg.store.registry import Registry
from poolreg.text import corpus
from poolreg.upkeep.census import Census
from poolreg.verification.findings import Mended
from poolreg.verification.remedies import Owners


@dataclass
class Made:
    """What came back, and what went wrong on the way."""

    mended: list[Mended] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


def remake(
    registry: Registry, census: Census, missing: Mapping[str, int], progress: Progress
) -> Made:
    """Bring objects back that are not in the store, given with their sizes.

    What text gives first, then what known places have, then merges, whose parents are back by
    then, and at last merges that have no recipe which works.
    """
    made = Made()
    owners = Owners.find(registry, missing)
    merges = {
        record.id
        for digest in missing
        for record in owners.of.get(digest, [])
        if record.kind == "model" and record.id in census.builds
    }
    for digest in missing:
        for record in owners.of.get(digest, []):
            _from_text(registry, owners, record, digest, made)
    of_merges = {
        digest for digest in missing
        if any(record.id in merges for record in owners.of.get(digest, []))
    }  # fmt: skip
    _fetch(registry, census, _lacking(registry, missing, but=of_merges), made, progress)
    for model in sorted(merges):
        _from_recipe(registry, model, missing, made, progress)
    _fetch(registry, census, _lacking(registry, missing), made, progress)
    return made


def _lacking(
    registry: Registry, missing: Mapping[str, int], but: set[str] | None = None
) -> dict[str, int]:
    return {
        digest: size
        for digest, size in missing.items()
        if digest not in (but or ()) and not registry.objects.has(digest)
    }


def _from_text(registry: Registry, owners: Owners, record: Record, digest: str, made: Made) -> None:
    """Make the digests of documents again, from the files or the stored text."""
    if registry.objects.has(digest) or record.body.get("content") != digest:
        return
    if record.kind == "evalset":
        _put(registry, digest, lambda: _of_evalset(registry, record), "its stored text", made)
    elif record.kind == "partition" and (files := owners.text(record.id)):
        text_field = owners.locations[record.id].body["field"]
        _put(registry, digest, lambda: _of_files(files, text_field), str(files[0]), made)


def _of_files(files: list[Path], text_field: str) -> bytes:
    return corpus.scan(files, field=text_field).digests


def _of_evalset(registry: Registry, record: Record) -> bytes:
    documents = corpus.decode_documents(registry.objects.read(record.body["object"]))
    return corpus.document_digests(documents)


def _put(
    registry: Registry, digest: str, make: Callable[[], bytes], source: str, made: Made
) -> None:
    try:
        data = make()
    except StorageError:
        raise
    except PoolregError as error:
        made.problems.append(f"object {digest[:12]} from {source}: {error.message}")
        return
    if sha256(data) != digest:
        made.problems.append(f"object {digest[:12]}: {source} is not what it was")
        return
    faults.step("repair.object")
    with registry.writing():
        registry.objects.put(data)
    made.mended.append(Mended(f"object {digest}", f"made again from {source}"))


def _from_recipe(
    registry: Registry, model: str, missing: Mapping[str, int], made: Made, progress: Progress
) -> None:
    before = _lacking(registry, missing)
    for build in builds_of(registry, model):
        if not can_rebuild(registry, build):
            continue
        size = registry.one("model", digest=model)["bytes"]
        progress.start("making a merge again", size, "bytes")
        faults.step("repair.merge")
        try:
            with registry.writing():
                rebuild(registry, build, progress=progress)
        except StorageError:
            raise
        except PoolregError as error:
            made.problems.append(f"merge {model[:12]}: {error.message}")
    made.mended += [
        Mended(f"object {digest}", "made again from the recipe of the merge")
        for digest in before
        if registry.objects.has(digest)
    ]


def _fetch(
    registry: Registry, census: Census, wanted: Mapping[str, int], made: Made, progress: Progress
) -> None:
    if not wanted:
        return
    places = [(known.place, known.repo_type, known.revision) for known in census.places]
    faults.step("repair.fetch")
    fetched = refetch(registry, places, wanted, progress)
    made.problems += [text for text in fetched.problems if text not in made.problems]
    made.mended += [
        Mended(f"object {digest}", f"fetched from {place}")
        for digest, place in sorted(fetched.brought.items())
    ]
