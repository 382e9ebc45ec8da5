"""Pool: the whole of poolreg as one object, each method one call of the floors below.

pool = Pool.create("pool")
pool.add_partition("python", ["src"])
pool.add_evalset("wiki", ["heldout.jsonl"])
pool.train_seed(); pool.train_units()
pool.ask(["python+cpp"])
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from poolreg.analysis import Analysis, listed
from poolreg.errors import StorageError
from poolreg.exchange import Exchange
from poolreg.maintenance import Maintenance
from poolreg.progress import SILENT, Progress
from poolreg.store.registry import Registry

if TYPE_CHECKING:
    from types import TracebackType

    from poolreg.compress.variants import Variant, VariantPlan
    from poolreg.evaluation.ask import Answer
    from poolreg.evaluation.evaluate import Settings
    from poolreg.evaluation.external import Imported
    from poolreg.evaluation.race import Race
    from poolreg.evaluation.sweep import SweepPlan
    from poolreg.models.diff import TensorDiff
    from poolreg.models.folders import Merged
    from poolreg.models.resolve import Subject
    from poolreg.models.stored import AddedModel
    from poolreg.store.sandbox import Table
    from poolreg.text.partitions import Added, PartitionCheck
    from poolreg.training.jobs import Job, Trained
    from poolreg.training.recipe import TrainingRecipe

PathLike = str | Path


class Pool(Analysis, Exchange, Maintenance):
    """One pool in a folder. Open it with `Pool.open` or `Pool.create`; use as a context manager.

    Methods raise the errors of `poolreg.errors`. A pool may be used by several processes at
    once, and by several threads if each has its own Pool.
    """

    def __init__(self, registry: Registry) -> None:
        self.registry = registry

    @classmethod
    def create(cls, folder: PathLike) -> Pool:
        """Make an empty pool; raises `Conflict` if the folder holds anything."""
        return cls(Registry.create(Path(folder)))

    @classmethod
    def open(cls, folder: PathLike | None = None) -> Pool:
        """Open a pool: `folder`, else $POOLREG_POOL, else the nearest one upwards from here."""
        return cls(Registry.find(folder))

    @property
    def root(self) -> Path:
        """The pool's folder."""
        return self.registry.root

    def close(self) -> None:
        """Bring the catalog up to date, so that the next reader need not, and let go of it."""
        # What was done is done: a disk too full for the catalog is the next reader's to report.
        with contextlib.suppress(StorageError):
            self.registry.catalog.refresh()
        self.registry.close()

    def __enter__(self) -> Pool:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:  # fmt: skip
        self.close() if kind is None else self.registry.close()

    # -- data ------------------------------------------------------------------------------

    def add_partition(
        self, name: str, files: Iterable[PathLike], *, units: int = 1, parent: str | None = None,
        field: str = "text", replace: bool = False, progress: Progress = SILENT,
    ) -> Added:  # fmt: skip
        """Add a named part of the training corpus, cut into `units` base units."""
        from poolreg.text import partitions as data

        progress.start("reading", 0, "bytes")
        return data.add_partition(
            self.registry, name, [Path(file) for file in files], units=units, parent=parent,
            field=field, replace=replace, progress=progress.advance,
        )  # fmt: skip

    def add_evalset(
        self, name: str, files: Iterable[PathLike], *, field: str = "text", replace: bool = False,
        progress: Progress = SILENT,
    ) -> Added:  # fmt: skip
        """Store a named text to measure on."""
        from poolreg.text import partitions as data

        progress.start("reading", 0, "bytes")
        return data.add_evalset(
            self.registry, name, [Path(file) for file in files], field=field, replace=replace,
            progress=progress.advance,
        )  # fmt: skip

    def check_partitions(
        self, names: Sequence[str] = (), *, progress: Progress = SILENT
    ) -> list[PartitionCheck]:
        """Hash the files of partitions (all when none is named) again and report drift."""
        from poolreg.text import partitions as data

        chosen = listed(names) or list(self.registry.names("partition"))
        progress.start("hashing", 0, "bytes")
        return [
            data.check_partition(self.registry, name, progress=progress.advance) for name in chosen
        ]

    def partitions(self) -> list[dict[str, Any]]:
        """Return the partitions by name: documents, bytes, units, units with a model."""
        return self.registry.select("partition_list")

    def partition(self, name: str) -> dict[str, Any]:
        """Return one partition with its units, its files and the evalsets that overlap it."""
        from poolreg.models import describe as describing

        return describing.partition_facts(self.registry, self.registry.resolve("partition", name))

    def evalsets(self) -> list[dict[str, Any]]:
        """Return the evalsets by name: documents, bytes, number of evaluations."""
        return self.registry.select("evalset_list")

    def evalset(self, name: str) -> dict[str, Any]:
        """Return one evalset with the partitions that overlap it."""
        from poolreg.models import describe as describing

        return describing.evalset_facts(self.registry, self.registry.resolve("evalset", name))

    def describe(self, text: str) -> list[dict[str, Any]]:
        """Return what a name, digest or expression stands for: see `poolreg.models.describe`."""
        from poolreg.models import describe as describing

        return describing.describe(self.registry, text)

    # -- models ----------------------------------------------------------------------------

    def add_model(
        self, folder: PathLike, *, name: str | None = None, role: str = "other",
        partition: str | None = None, unit: int | None = None, mixture: str | None = None,
        scheme: str = "micro", budget: str | None = None, seed: str | None = None,
        tokens: int | None = None, tokenizer: PathLike | None = None, trust_code: bool = False,
        replace: bool = False, progress: Progress = SILENT,
    ) -> AddedModel:  # fmt: skip
        """Check a Hugging Face folder strictly and store it as seed, unit, reference or other.

        A unit model needs `partition` (and `unit` where it has several) and `seed`, a reference
        `mixture` and `seed`: names of what it was trained on and from. `tokens` is how many it
        was trained on, for the ledger.
        """
        from poolreg.models.intake import added_run
        from poolreg.models.stored import add_model

        run = added_run(
            self.registry, role, partition=partition, unit=unit, mixture=mixture, scheme=scheme,
            budget=budget, seed=seed, tokens=tokens,
        )  # fmt: skip
        files = [file for file in Path(folder).glob("*.safetensors") if file.is_file()]
        size = sum(file.stat().st_size for file in files)
        progress.start("checking", size, "bytes")
        return add_model(
            self.registry, Path(folder), run, name=name, replace=replace, trust_code=trust_code,
            tokenizer=Path(tokenizer) if tokenizer else None, progress=progress.advance,
        )  # fmt: skip

    def models(self) -> list[dict[str, Any]]:
        """Return the models: name, role, size, seed, what they were trained on."""
        return self.registry.select("model_list")

    def model(self, name: str) -> dict[str, Any]:
        """Return one model with its files and runs."""
        from poolreg.models import describe as describing
        from poolreg.models.resolve import Resolver

        resolver = Resolver(self.registry)
        subject = resolver.model(resolver.stored(name))
        return describing.model_facts(self.registry, subject)

    def lineage(self, name: str) -> list[dict[str, Any]]:
        """Return what a model or mixture was made from, and what was made from it."""
        from poolreg.models import describe as describing

        subject = self.resolve(name)
        rows = self.registry.select("lineage", digest=subject.digest)
        if rows or len(subject.components) == 1:
            return rows
        # An average that nobody has asked for yet.
        return [
            {"child": subject.digest, "child_label": subject.label, "parent": part["digest"],
             "parent_label": part["model"], "relation": "averages", "weight": part["share"]}
            for part in describing.mixture_facts(self.registry, subject)["components"]
        ]  # fmt: skip

    def export_model(self, name: str, out: PathLike, *, force: bool = False) -> Path:
        """Copy a stored model to a folder, byte for byte."""
        from poolreg.models.stored import export_model

        export_model(self.registry, self._stored(name), Path(out), force=force)
        return Path(out)

    def export_gguf(self, name: str, out: PathLike, *, force: bool = False) -> Path:
        """Write a stored model of the Llama kind as one GGUF file, for llama.cpp."""
        from poolreg.models.gguf import export_gguf

        return export_gguf(self.registry, self._stored(name), Path(out), force=force)

    def diff(self, a: str, b: str, *, progress: Progress = SILENT) -> list[TensorDiff]:
        """Return the tensors that differ between two models, with norms."""
        from poolreg.models.diff import diff_models

        progress.start("comparing", 0, "tensors")
        return diff_models(
            self.registry, self._stored(a), self._stored(b), progress=progress.advance
        )

    def _stored(self, text: str) -> str:
        from poolreg.models.resolve import Resolver

        return Resolver(self.registry).stored(text)

    def unit_models(self, seed: str | None = None) -> list[str]:
        """Return the base units that have a model of a seed (default: the only one), as code/1."""
        from poolreg.models.resolve import Resolver

        resolver = Resolver(self.registry, seed=seed)
        found = resolver.unit_models(resolver.seed_for(list(resolver.units)[:1]))
        names = {digest: name for name, digest in resolver.partitions.items()}
        return sorted(f"{names[p]}/{unit}" for p, unit in found if p in names)

    # -- training --------------------------------------------------------------------------

    def train_seed(
        self, recipe: TrainingRecipe | None = None, *, name: str = "base", on: str = "all",
        replace: bool = False, **options: Any,
    ) -> Trained:  # fmt: skip
        """Train the common start of all units on text of the mixture `on`."""
        from poolreg.training import jobs as train
        from poolreg.training.recipe import default_recipe

        job = train.seed_job(
            self.registry, recipe or default_recipe(), name=name, on=on, replace=replace
        )
        return self._train([job], **options)[0]

    def train_units(
        self, recipe: TrainingRecipe | None = None, *, only: Sequence[str] = (),
        seed: str | None = None, again: bool = False, **options: Any,
    ) -> list[Trained]:  # fmt: skip
        """Train one model for each base unit (of `only`, as `python` or `python/2`) without one."""
        from poolreg.training import jobs as train
        from poolreg.training.recipe import default_recipe

        jobs = train.unit_jobs(
            self.registry, recipe or default_recipe(), seed=seed, only=listed(only), again=again
        )
        return self._train(jobs, **options)

    def train_references(
        self, mixtures: Sequence[str], recipe: TrainingRecipe | None = None, *,
        seed: str | None = None, scheme: str = "micro", budget: str = "same", **options: Any,
    ) -> list[Trained]:  # fmt: skip
        """Train models on mixtures, to validate proxies; `budget` is same or sum."""
        from poolreg.training import jobs as train
        from poolreg.training.recipe import default_recipe

        jobs = train.reference_jobs(
            self.registry, recipe or default_recipe(), listed(mixtures), seed=seed, scheme=scheme,
            budget=budget,
        )  # fmt: skip
        return self._train(jobs, **options)

    def _train(
        self, jobs: list[Job], *, device: str = "auto", workers: int = 1, threads: int = 1,
        progress: Progress = SILENT,
    ) -> list[Trained]:  # fmt: skip
        from poolreg.training.jobs import train

        return train(
            self.registry, jobs, device=device, workers=workers, threads=threads, progress=progress
        )

    # -- mixtures --------------------------------------------------------------------------

    def resolve(self, text: str, *, scheme: str = "micro", seed: str | None = None) -> Subject:
        """Return what an expression or model name stands for: digests and exact weights."""
        from poolreg.models.resolve import Resolver

        return Resolver(self.registry, scheme=scheme, seed=seed).subject(text)

    def merge(
        self, text: str, out: PathLike, *, scheme: str = "micro", seed: str | None = None,
        **options: Any,
    ) -> Merged:  # fmt: skip
        """Write the exact average of a mixture to a folder that any tool loads.

        Options: `dtype`, `max_shard_bytes`, `threads`, `force`, `progress` of
        `poolreg.models.folders.merge_subject`.
        """
        from poolreg.models.folders import merge_subject

        subject = self.resolve(text, scheme=scheme, seed=seed)
        return merge_subject(self.registry, subject, Path(out), **options)

    def keep_merge(
        self, text: str, name: str, *, scheme: str = "micro", seed: str | None = None,
        **options: Any,
    ) -> AddedModel:  # fmt: skip
        """Keep the exact average of a mixture in the pool as model `name`.

        Options: `dtype`, `max_shard_bytes`, `threads`, `replace`, `progress` of
        `poolreg.models.merges.keep_merge`.
        """
        from poolreg.models.merges import keep_merge

        subject = self.resolve(text, scheme=scheme, seed=seed)
        return keep_merge(self.registry, subject, name, **options)

    def plan_compression(
        self, text: str, ratios: Sequence[float], *, scheme: str = "micro",
        seed: str | None = None, progress: Progress = SILENT, **how: Any,
    ) -> list[VariantPlan]:  # fmt: skip
        """Plan variants of a model or mixture, one a ratio: sizes, parameters, predicted errors.

        `how` are the fields of `poolreg.compress.workshop.Compression`; `calibrate`, the evalset
        or partition to calibrate on, is needed. The calibration stays in the pool.
        """
        from poolreg.compress import variants
        from poolreg.compress.workshop import Compression, opened

        subject = self.resolve(text, scheme=scheme, seed=seed)
        variants.check_ratios(ratios)
        with opened(self.registry, subject, Compression(**how), progress) as workshop:
            return [variants.plan(workshop, ratio) for ratio in ratios]

    def compress(
        self, text: str, ratios: Sequence[float], *, name: str | None = None, scheme: str = "micro",
        seed: str | None = None, replace: bool = False, progress: Progress = SILENT,
        announce: Callable[[VariantPlan], None] | None = None, **how: Any,
    ) -> list[Variant]:  # fmt: skip
        """Make compressed variants of a model or mixture, one a ratio, from one calibration.

        `how` as in `plan_compression`. Several variants of one `name` are NAME-10, NAME-20, ….
        `announce` is told each plan before anything is made.
        """
        from poolreg.compress import variants
        from poolreg.compress.workshop import Compression, opened

        subject = self.resolve(text, scheme=scheme, seed=seed)
        names = variants.check_ratios(ratios, name)
        for label in filter(None, names):
            self.registry.check_free("model", label, None, replace=True)
        with opened(self.registry, subject, Compression(**how), progress) as workshop:
            plans = [variants.plan(workshop, ratio) for ratio in ratios]
            if announce:
                for plan in plans:
                    announce(plan)
            return [
                variants.make(workshop, plan, name=label, replace=replace, progress=progress)
                for plan, label in zip(plans, names, strict=True)
            ]

    def evaluate(
        self, texts: Sequence[str], on: Sequence[str] = (), **options: Any
    ) -> list[Answer]:
        """Measure models and mixtures on evalsets (all when none is named), memoised.

        Options: `scheme`, `seed`, `settings`, `progress` of `poolreg.evaluation.ask.evaluate`.
        """
        from poolreg.evaluation import ask as asking

        return asking.evaluate(self.registry, listed(texts), listed(on), **options)

    def ask(self, texts: Sequence[str], on: Sequence[str] = (), **options: Any) -> list[Answer]:
        """Answer what training on each mixture would give, beside seed, `all` and references.

        With 8 references or more, what a trained model would score is predicted with an
        interval. Options: `scheme`, `seed`, `settings`, `progress` of
        `poolreg.evaluation.ask.ask`.
        """
        from poolreg.decisions import ask as asking

        return asking.ask(self.registry, listed(texts), listed(on), **options)

    def plan_sweep(
        self, mixtures: Sequence[str] | None = None, on: Sequence[str] = (), *,
        sizes: tuple[int, int] | None = None, limit: int | None = None, scheme: str = "micro",
        seed: str | None = None, settings: Settings | None = None,
        shard: tuple[int, int] | None = None,
    ) -> SweepPlan:  # fmt: skip
        """Plan the evaluation of many mixtures: the given ones, else every subset.

        `shard` (i, n) is the i-th of n parts of them, from 1.
        """
        from poolreg.evaluation import sweep as sweeping
        from poolreg.models.resolve import Resolver

        if mixtures is None:
            chosen = sweeping.choose_subsets(self.registry, sizes=sizes, limit=limit)
        else:
            resolver = Resolver(self.registry)
            chosen = [resolver.expression(text) for text in listed(mixtures)]
        return sweeping.plan_sweep(
            self.registry, chosen, listed(on), scheme=scheme, seed=seed, settings=settings,
            shard=shard,
        )  # fmt: skip

    def sweep(self, planned: SweepPlan, *, progress: Progress = SILENT) -> Table:
        """Do what a sweep's plan lacks and return the scores of its mixtures, best first."""
        from poolreg.evaluation import sweep as sweeping

        sweeping.run_sweep(self.registry, planned, progress=progress)
        return self.scores(planned)

    def race(
        self, planned: SweepPlan, *, confidence: float = 0.95, progress: Progress = SILENT
    ) -> Race:
        """Do a sweep's plan, but stop mixtures that are surely worse than the leader on the way.

        Those that stop have no scores; what they scored on a part of the text is in `raced`.
        """
        from poolreg.evaluation.race import run_race

        return run_race(self.registry, planned, confidence=confidence, progress=progress)

    def scores(self, planned: SweepPlan) -> Table:
        """Return the memoised scores of a sweep's mixtures under its protocol, best first."""
        protocols = sorted({p.digest for p in planned.work.protocols.values()})
        from poolreg.store.sandbox import Table

        rows = self.registry.select(
            "sweep_scores", mixtures=[subject.mixture_digest for subject in planned.subjects],
            evalsets=list(planned.evalsets), protocols=protocols,
        )  # fmt: skip
        columns = tuple(rows[0]) if rows else ()
        return Table(columns, [tuple(row.values()) for row in rows])

    # -- tasks -----------------------------------------------------------------------------

    def import_scores(
        self, path: PathLike, model: str, *, scheme: str = "micro", seed: str | None = None
    ) -> Imported:
        """Record an lm-evaluation-harness results file (or a folder's newest) for a model."""
        from poolreg.evaluation.external import import_scores

        return import_scores(self.registry, Path(path), model, scheme=scheme, seed=seed)

    def task_scores(self, task: str | None = None) -> list[dict[str, Any]]:
        """Return the latest scores on all tasks, or on one."""
        return self.registry.select("task_list", task=task)

    def evaluate_tasks(
        self, texts: Sequence[str], tasks: Sequence[str], *, num_fewshot: int | None = None,
        limit: int | None = None, include_path: PathLike | None = None, again: bool = False,
        **options: Any,
    ) -> list[dict[str, Any]]:  # fmt: skip
        """Run tasks of lm-evaluation-harness on models and on merges in memory, memoised.

        Options: `scheme`, `seed`, `settings`, `progress` of
        `poolreg.evaluation.harness.evaluate_tasks`.
        """
        from poolreg.evaluation.harness import TaskRequest, evaluate_tasks

        folder = Path(include_path) if include_path is not None else None
        request = TaskRequest(tuple(listed(tasks)), num_fewshot, limit, folder, again)
        return evaluate_tasks(self.registry, listed(texts), request, **options)
