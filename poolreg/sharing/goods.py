"""The objects that published records name: which of them are wanted, and whether they hold.

Records come first and say which objects there are, and of what models and texts. What a pull
wishes decides which weights are fetched; models and texts that have arrived pass the same intake
as those that a user adds; merges are made from their recipes.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from poolreg.errors import NotFound, PoolregError, Refused, StorageError
from poolreg.models.merges import builds_of, can_rebuild, rebuild
from poolreg.models.resolve import Resolver
from poolreg.models.stored import check_model
from poolreg.progress import Progress
from poolreg.sharing.arrival import Arrival
from poolreg.sharing.contents import Contents
from poolreg.sharing.inbound import check_evalset
from poolreg.store.journal import Record
from poolreg.store.objects import ObjectStore
from poolreg.store.registry import Registry

SOUND = "nothing was taken; ask whoever published it to push a sound pool"


@dataclass(frozen=True)
class Wish:
    """Whose weights to bring: of all models, of those that some expressions need, or of none.

    Records, results, texts and tokenizers come in any case. `trust_code` allows models that
    bring Python code of their author.
    """

    only: tuple[str, ...] = ()
    weights: bool = True
    trust_code: bool = False


@dataclass
class Goods:
    """What published records say of objects: sizes by digest, records of models and evalsets."""

    sizes: dict[str, int] = field(default_factory=dict)
    models: dict[str, Mapping[str, Any]] = field(default_factory=dict)
    evalsets: dict[str, Mapping[str, Any]] = field(default_factory=dict)

    def add(self, record: Record) -> None:
        """Take one record; raises `Refused` where two disagree."""
        for digest, size in record.objects.items():
            if self.sizes.setdefault(digest, size) != size:
                raise _disagree(digest)
        if record.kind == "model":
            self.models[record.id] = record.body
        if record.kind == "evalset":
            self.evalsets[record.id] = record.body

    def settle(self, future: Registry) -> None:
        """Of several records about one thing, keep what the pool will go by: that is checked."""
        for digest in self.evalsets:
            self.evalsets[digest] = future.one("evalset", digest=digest)
        for digest in self.models:
            tensors = [
                [row["name"], row["dtype"], row["shape"], row["sha256"]]
                for row in future.select("model_tensors", model=digest)
            ]
            files = future.select("model_files", model=digest)
            row = future.one("model", digest=digest)
            self.models[digest] = {**row, "files": files, "tensors": tensors}

    def weights(self, models: Iterable[str]) -> set[str]:
        """Return the weights files of some models."""
        files = (file for model in models for file in self.models[model]["files"])
        return {file["object"] for file in files if file["role"] == "weights"}

    def bring_code(self, model: str) -> bool:
        """Tell whether a model has Python code of its own."""
        return any(file["role"] == "code" for file in self.models[model]["files"])

    def lacking(self, objects: ObjectStore) -> dict[str, int]:
        """Return the objects that a store does not hold in the size that records say."""
        return {
            digest: size for digest, size in self.sizes.items() if not objects.holds(digest, size)
        }


def _disagree(digest: str) -> Refused:
    return Refused(f"the published records disagree on the size of {digest[:12]}", hint=SOUND)


def chosen_models(future: Registry, goods: Goods, wish: Wish) -> set[str]:
    """Return the published models whose weights are wanted, with those that give them.

    Raises `Refused` for one that brings code which nobody trusts, `NotFound` and `MixtureError`
    for an expression that means nothing.
    """
    chosen: set[str] = set()
    if wish.weights and not wish.only:
        chosen = {digest for digest, body in goods.models.items() if not body["removed"]}
    resolver = Resolver(future)
    for text in wish.only if wish.weights else ():
        subject = resolver.subject(text)
        chosen |= {model for model, _ in subject.components} | {subject.seed or ""}
    for model in list(chosen):
        chosen |= {parent for build in builds_of(future, model) for parent, _ in build.components}
    chosen &= goods.models.keys()
    for model in chosen if not wish.trust_code else ():
        if goods.bring_code(model):
            raise Refused(
                f"model {model[:12]} brings Python code of its author",
                hint="read it, and add --trust-code if you trust it; or leave the model out with "
                "--only or --results-only",
            )
    return chosen


def check_goods(
    future: Registry, arrival: Arrival, goods: Goods, ours: Contents, *, trust_code: bool,
    progress: Progress,
) -> None:  # fmt: skip
    """Pass the models and evalsets that are whole now, and were not before, through intake.

    Raises `Refused` for what is not what its record says.
    """
    for digest, body in goods.evalsets.items():
        known = ours.has("evalset", digest) and arrival.store.has(body["object"])
        if not known and arrival.objects.has(body["object"]):
            check_evalset(future.objects, digest, body)
    models = {
        digest: body
        for digest, body in goods.models.items()
        if _whole(arrival.objects, body)
        and not (ours.has("model", digest) and _whole(arrival.store, body))
    }
    progress.start("checking", sum(body["bytes"] for body in models.values()), "bytes")
    for digest, body in models.items():
        with _blamed(arrival, digest):
            check_model(future, digest, body, trust_code=trust_code, progress=progress.advance)


def check_left(arrival: Arrival, goods: Goods, wish: Wish, chosen: set[str]) -> None:
    """Raise `Refused` for lies about what is here, `NotFound` for what was asked for and is not."""
    left = goods.lacking(arrival.objects)
    for digest in left:
        if arrival.objects.has(digest):
            raise _disagree(digest)
    if wish.only and goods.weights(chosen) & left.keys():
        raise NotFound(
            f"{arrival.place.url} does not hold the weights of {', '.join(wish.only)}",
            hint="ask whoever has them to push them",
        )


def rebuild_merges(
    future: Registry, arrival: Arrival, goods: Goods, chosen: set[str], progress: Progress
) -> int:
    """Make the weights of merges that travelled as recipes, where their parents are here."""
    todo = [
        (digest, build)
        for digest in sorted(chosen)
        if not _whole(arrival.objects, goods.models[digest])
        for build in builds_of(future, digest)[:1]
        if can_rebuild(future, build)
    ]
    arrival.check_space(sum(goods.models[digest]["bytes"] for digest, _ in todo))
    for digest, build in todo:
        progress.start("rebuilding merges", goods.models[digest]["bytes"], "bytes")
        with _blamed(arrival, digest):
            rebuild(future, build, progress=progress)
            check_model(future, digest, goods.models[digest])
    return len(todo)


def _whole(objects: ObjectStore, body: Mapping[str, Any]) -> bool:
    return all(objects.has(file["object"]) for file in body["files"])


@contextlib.contextmanager
def _blamed(arrival: Arrival, digest: str) -> Iterator[None]:
    """Turn what is wrong with a published model into `Refused`."""
    try:
        yield
    except StorageError:
        raise
    except PoolregError as error:
        raise Refused(
            f"model {digest[:12]} of {arrival.place.url}: {error.message}", hint=error.hint
        ) from error
