"""Training in a pool: which models are wanted, the text of each, and the result in the registry.

A job is identified by all that decides its model: start, text with weights, and settings. A job
that was done is not done again; one that was interrupted goes on from its checkpoint in `tmp`.
Large runs use the user's own trainer and `poolreg model add` instead.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any

from poolreg.canonical import digest_of
from poolreg.errors import NotFound, UsageError
from poolreg.files import lock
from poolreg.mixture import Atom, Mixture
from poolreg.models.resolve import Resolver, seed_named
from poolreg.models.stored import AddedModel, Run, add_model, stored_folder
from poolreg.progress import SILENT, Progress
from poolreg.store.registry import Registry
from poolreg.text.partitions import unit_text
from poolreg.training.recipe import Hyperparameters, Role, TrainingRecipe
from poolreg.weights.tokenizer_files import require_tokenizer
from poolreg.workers import run_jobs

if TYPE_CHECKING:
    from poolreg.training.tokens import Source

# A tokenizer learns little from more text than this, and the trainer holds all of it.
TOKENIZER_CHARACTERS = 64 << 20


@dataclass(frozen=True)
class Text:
    """One base unit to train on: partition digest, unit number, unit digest, share."""

    partition: str
    number: int
    unit: str
    weight: Fraction


@dataclass(frozen=True)
class Job:
    """One model to train; `key` identifies all that decides it."""

    role: Role
    label: str
    texts: tuple[Text, ...]
    settings: Hyperparameters
    recipe: TrainingRecipe
    seed: str | None = None
    name: str | None = None
    blend: str | None = None
    mixture: str | None = None
    scheme: str | None = None
    budget: str | None = None

    @functools.cached_property
    def key(self) -> str:
        """Digest of start, text with weights, settings and role."""
        start: Any = self.seed
        if self.seed is None:
            about, folder = self.recipe.as_record(), self.recipe.tokenizer.folder
            tokenizer = require_tokenizer(folder).digest if folder else about["tokenizer"]
            start = {"model": about["model"], "tokenizer": tokenizer}
        texts = sorted([t.unit, str(t.weight)] for t in self.texts)
        settings = self.settings.as_record()
        return digest_of(["job", 1, self.role, self.budget, start, texts, settings])


@dataclass(frozen=True)
class Trained:
    """A finished job: the model, and whether it was there already."""

    label: str
    digest: str
    role: str
    new: bool
    tokens: int
    seconds: float
    final_loss: float


# -- which jobs ----------------------------------------------------------------------------


def seed_job(
    registry: Registry, recipe: TrainingRecipe, *, name: str, on: str = "all", replace: bool = False
) -> Job:
    """Plan a seed model with new weights, trained on blocks drawn from the mixture `on`.

    Raises `Conflict` if another model has the name, unless `replace`.
    """
    resolver = Resolver(registry, scheme="micro")
    mixture = resolver.expression(on)
    job = Job(
        "seed", name, _texts(resolver, mixture), recipe.for_role("seed"), recipe, name=name,
        blend=resolver.blend(mixture), mixture=str(mixture),
    )  # fmt: skip
    known = _known(registry, job)
    registry.check_free("model", name, known.digest if known else None, replace=replace)
    return job


def unit_jobs(
    registry: Registry, recipe: TrainingRecipe, *, seed: str | None = None,
    only: Sequence[str] = (), again: bool = False,
) -> list[Job]:  # fmt: skip
    """Plan one model for each base unit named in `only` (default: of every partition).

    Without `again`, units that have a model from the seed are left out, however it was made.
    """
    resolver = Resolver(registry)
    start = one_seed(registry, seed)
    present = resolver.unit_models(start)
    settings = recipe.for_role("unit")
    jobs = []
    for atom in _unit_atoms(resolver, only):
        mixture = Mixture(((atom, Fraction(1)),))
        texts = _texts(resolver, mixture)
        if again or (texts[0].partition, atom.unit) not in present:
            jobs.append(
                Job("unit", str(atom), texts, settings, recipe, seed=start,
                    blend=resolver.blend(mixture), mixture=str(atom))
            )  # fmt: skip
    return jobs


def reference_jobs(
    registry: Registry, recipe: TrainingRecipe, mixtures: Sequence[str], *,
    seed: str | None = None, scheme: str = "micro", budget: str = "same",
) -> list[Job]:  # fmt: skip
    """Plan models really trained on mixtures, to validate proxies against.

    With `budget` "sum" a reference trains on as many tokens as the units of its mixture
    together, with "same" on as many as one unit. Text is shuffled over the whole mixture.
    """
    if budget not in ("sum", "same"):
        raise UsageError(f"unknown budget {budget!r}", hint="use sum or same")
    resolver = Resolver(registry, scheme=scheme)
    start = one_seed(registry, seed)
    jobs = []
    for text in mixtures:
        mixture = resolver.expression(text)
        texts = _texts(resolver, mixture)
        settings = recipe.for_role("reference")
        if budget == "sum":
            settings = dataclasses.replace(settings, steps=settings.steps * len(texts))
        jobs.append(
            Job("reference", f"{mixture} [{budget} budget reference]", texts, settings, recipe,
                seed=start, blend=resolver.blend(mixture), mixture=str(mixture), scheme=scheme,
                budget=budget)
        )  # fmt: skip
    return jobs


def one_seed(registry: Registry, name: str | None) -> str:
    """Return the digest of the named seed, or of the only one in the pool."""
    if name:
        return seed_named(registry, name)
    seeds = registry.select("seeds")
    if not seeds:
        raise NotFound("the pool has no seed model yet", hint="train one with: poolreg train seed")
    if len(seeds) > 1:
        labels = ", ".join(row["label"] for row in seeds)
        raise UsageError(f"the pool has several seeds: {labels}", hint="say which with --from NAME")
    return str(seeds[0]["digest"])


def _texts(resolver: Resolver, mixture: Mixture) -> tuple[Text, ...]:
    return tuple(
        Text(partition, number, resolver.units[partition, number], weight)
        for (partition, number), weight in resolver.weights(mixture)
    )


def _unit_atoms(resolver: Resolver, only: Sequence[str]) -> Iterator[Atom]:
    names = only or resolver.everything
    if not names:
        raise NotFound("the pool has no partitions yet", hint="poolreg partition add NAME FILE…")
    for text in names:
        for atom, _ in resolver.expression(text).weights:
            resolver.weights(Mixture(((atom, Fraction(1)),)))  # refuses unknown names
            count = resolver.counts[resolver.partitions[atom.partition]]
            numbers = [atom.unit] if atom.unit else range(1, count + 1)
            yield from (Atom(atom.partition, number) for number in numbers)


# -- doing them ----------------------------------------------------------------------------


def train(
    registry: Registry, jobs: Sequence[Job], *, device: str = "auto", workers: int = 1,
    threads: int = 1, progress: Progress = SILENT,
) -> list[Trained]:  # fmt: skip
    """Train what is missing and return one result a job, in order.

    `workers` processes (spawned) share the jobs, with `threads` torch threads each; one thread
    makes a model repeatable bit for bit. Progress is in steps. Interrupted jobs leave a
    checkpoint and go on from it next time.
    """
    done = {job.key: found for job in jobs if (found := _known(registry, job))}
    for job in jobs:
        if job.name and job.key in done:
            _name(registry, job.name, done[job.key].digest)
    todo = list({job.key: job for job in jobs if job.key not in done}.values())
    progress.start("training", sum(job.settings.steps for job in todo), "steps")
    calls = [(registry.root, job, device, threads) for job in todo]
    results = run_jobs(_train_one, calls, workers=workers, progress=progress)
    done |= {job.key: result for job, result in zip(todo, results, strict=True)}
    return [done[job.key] for job in jobs]


def _name(registry: Registry, name: str, digest: str) -> None:
    """Give a model that was there already the name that was asked for."""
    name = registry.check_free("model", name, digest, replace=True)
    if registry.names("model").get(name) != digest:
        with registry.writing():
            registry.record(registry.naming("model", name, digest))


def _known(registry: Registry, job: Job) -> Trained | None:
    for row in registry.select("run_known", job=job.key):
        return Trained(
            job.label, row["model"], job.role, False, row["tokens"], row["seconds"],
            row["final_loss"],
        )  # fmt: skip
    return None


def _train_one(root: Path, job: Job, device: str, threads: int, *, progress: Progress) -> Trained:
    """Train one job in this process and add its model to the pool."""
    registry = Registry.open(root)
    place = root / "tmp" / f"train-{job.key[:32]}"
    place.mkdir(exist_ok=True)
    with lock(place / "lock", timeout=0, what=f"the training of {job.label}"):
        found = _known(registry, job)
        result = found or _run(
            registry, job, place, device=device, threads=threads, progress=progress
        )
    shutil.rmtree(place, ignore_errors=True)
    registry.close()
    return result


def _run(
    registry: Registry, job: Job, place: Path, *, device: str, threads: int, progress: Progress
) -> Trained:
    from poolreg.training import loop as training

    shown = 0

    def show(state: training.TrainProgress) -> None:
        nonlocal shown
        progress.advance(state.step - shown)  # the first step after a resume stands for many
        shown = state.step
        speed = f"{state.tokens_per_second:,.0f} tokens/s"
        progress.note(f"{job.label}  loss {state.loss:.3f}  {speed}")

    # What a killed attempt left half written; its checkpoint stays.
    shutil.rmtree(place / "model", ignore_errors=True)
    with _start(registry, job, place) as (start, tokenizer):
        sources = _sources(registry, job, tokenizer)
        result = training.train(
            start, sources, job.settings, tokenizer=tokenizer, out=place / "model", device=device,
            threads=threads, resume=training.Resume(place, job.key), progress=show,
        )  # fmt: skip
    shares = {share.key: share for share in result.shares}
    run = Run(
        role=job.role, seed=job.seed, blend=job.blend, mixture=job.mixture, scheme=job.scheme,
        budget=job.budget, how="trained", tokens=result.tokens, steps=result.steps,
        seconds=result.seconds, final_loss=result.final_loss,
        units=tuple((t.unit, shares[t.unit].tokens, shares[t.unit].epochs) for t in job.texts),
        recipe={"job": job.key, "settings": job.settings.as_record(), "device": result.device,
                "curve": [list(point) for point in result.curve]},
    )  # fmt: skip
    added = add_model(registry, place / "model", run, name=job.name, replace=True)
    return _trained(added, job, result)


def _trained(added: AddedModel, job: Job, result: Any) -> Trained:
    return Trained(
        job.label, added.digest, job.role, True, result.tokens, result.seconds, result.final_loss
    )


@contextlib.contextmanager
def _start(registry: Registry, job: Job, place: Path) -> Iterator[tuple[Any, Path]]:
    """Yield what training starts from (settings or folder) and the folder of the tokenizer."""
    if job.seed:
        with stored_folder(registry, job.seed) as folder:
            yield folder, folder
        return
    if job.recipe.tokenizer.folder:
        yield job.recipe.model, job.recipe.tokenizer.folder
        return
    from poolreg.training.tokens import train_tokenizer

    size = job.recipe.tokenizer.vocab_size or 0
    if not (place / "tokenizer").exists():
        train_tokenizer(
            _sample(registry, job), size, place / "tokenizer",
            model_type=job.recipe.model["model_type"],
        )  # fmt: skip
    yield job.recipe.model, place / "tokenizer"


def _sample(registry: Registry, job: Job) -> Iterator[str]:
    """Yield documents of every unit in turn, up to what a tokenizer needs to see."""
    share = TOKENIZER_CHARACTERS // len(job.texts)
    for text in job.texts:
        seen = 0
        for document in unit_text(registry, text.partition, text.number):
            yield document
            seen += len(document)
            if seen > share:
                break


def _sources(registry: Registry, job: Job, tokenizer: Path) -> list[Source]:
    from poolreg.models.loading import load_tokenizer
    from poolreg.training.tokens import Source, encode_stream

    encoder = load_tokenizer(tokenizer)
    return [
        Source(
            text.unit,
            encode_stream(unit_text(registry, text.partition, text.number), encoder),
            text.weight,
        )
        for text in job.texts
    ]
