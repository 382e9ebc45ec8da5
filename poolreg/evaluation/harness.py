"""Tasks of lm-evaluation-harness, run on models and on merges in memory.

The harness gets the live model that evaluations use, so its weights are the bytes of the
materialised merge. What was asked once is not run again: a request is identified by the subject,
the task's name, the number of shots and the limit as they were asked for, the harness's version,
the compute dtype, and the task definitions below `include_path`. The task's data is known only
once it is loaded and so is not part of that; `again` runs it in any case. A group's request does
not answer for its tasks, since a group may change their settings. Imported scores answer no
request: nobody knows how they were asked for.

Tasks whose data is on the Hub are fetched by the harness. Code of a data set and tasks that run
what a model writes are never allowed; definitions below `include_path` may hold Python of their
own, as those of the harness do, so that folder has to be trusted.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.util
import io
import json
import logging
import os
import random
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from poolreg.canonical import digest_of, sha256
from poolreg.errors import ConfigError, MissingPackage, NotFound, Refused, UsageError
from poolreg.evaluation.evaluate import Settings, family_of, measuring_order, note_subjects, plan
from poolreg.evaluation.external import HARNESS, TaskScore, parse_results, record_scores
from poolreg.evaluation.protocol import default_max_length
from poolreg.files import read_capped
from poolreg.models.resolve import Resolver, Subject
from poolreg.progress import SILENT, Progress
from poolreg.store.registry import Registry, unknown_name

# The harness's own choices, so that its few-shot examples are those of its command line.
_SEED, _OTHER_SEED = 0, 1234
# Resamples for standard errors without a formula, which are then right to 2%; they are drawn in
# this process, since the harness would fork it.
_BOOTSTRAPS = 1000

_quiet_lock = threading.RLock()

Item = tuple[Subject, list[str]]  # a subject with the tasks to run on it


@dataclass(frozen=True)
class TaskRequest:
    """What to run: task or group names, and what the harness is told about them.

    `num_fewshot` None is each task's own number, `limit` the number of samples of each task
    (None: all), `include_path` a folder with further task definitions, which must be trusted.
    """

    tasks: tuple[str, ...]
    num_fewshot: int | None = None
    limit: int | None = None
    include_path: Path | None = None
    again: bool = False

    def digests(self, dtype: str) -> dict[str, str]:
        """Return the digest of each task's request: see the module's text."""
        facts = {
            "harness": HARNESS,
            "version": harness_version(),
            "num_fewshot": self.num_fewshot,
            "limit": self.limit,
            "dtype": dtype,
            "definitions": _definitions(self.include_path),
        }
        return {task: digest_of({"request": 1, "task": task} | facts) for task in self.tasks}


def harness_version() -> str:
    """Return the version of the installed harness; raises `MissingPackage` without one."""
    if importlib.util.find_spec("lm_eval") is None:
        raise MissingPackage(
            "lm-evaluation-harness is not installed", hint="pip install 'poolreg[lm-eval]'"
        )
    return importlib.metadata.version("lm_eval")


def _definitions(folder: Path | None) -> str | None:
    if folder is None:
        return None
    if not folder.is_dir():
        raise NotFound(f"there is no folder {folder}", hint="give one with task definitions")
    found = {}
    for path in folder.rglob("*"):
        if path.suffix in (".yaml", ".py") and path.is_file():
            text = read_capped(path, 16 << 20, error=ConfigError, what="a task definition")
            found[str(path.relative_to(folder))] = sha256(text)
    return digest_of(found)


def evaluate_tasks(
    registry: Registry, texts: Sequence[str], request: TaskRequest, *, scheme: str = "micro",
    seed: str | None = None, settings: Settings | None = None, progress: Progress = SILENT,
) -> list[dict[str, Any]]:  # fmt: skip
    """Run tasks on models and mixtures, memoised, and return their scores with `memoised`.

    Each task of a subject is recorded as soon as it is done. Raises `MissingPackage` without the
    harness, `NotFound` for an unknown task, and `Refused` for one that cannot be run.
    """
    settings = settings or Settings()
    _check(request, settings)
    digests = request.digests(settings.dtype)
    resolver = Resolver(registry, scheme=scheme, seed=seed)
    subjects = {s.digest: s for s in map(resolver.subject, texts)}
    plan(registry, list(subjects.values()), [], settings)  # all have a tokenizer
    rows = _recorded(registry, subjects, digests)
    done = {(row["subject"], row["request"]) for row in rows if not request.again}
    missing = [
        (subject, [task for task, key in digests.items() if (digest, key) not in done])
        for digest, subject in subjects.items()
    ]
    note_subjects(registry, list(subjects.values()))
    if any(tasks for _, tasks in missing):
        from poolreg.evaluation.measure import torch_threads

        with _quiet(), torch_threads(settings.threads):
            _Run(registry, request, settings).all([item for item in missing if item[1]], progress)
        rows = _recorded(registry, subjects, digests)
    # A task that was asked for by itself and with its group is told once.
    told = {(row["subject"], row["measure"]): row for row in reversed(rows)}
    return [
        {"label": subjects[row["subject"]].label} | row
        | {"memoised": (row["subject"], row["request"]) in done}
        for row in reversed(told.values())
    ]  # fmt: skip


def _check(request: TaskRequest, settings: Settings) -> None:
    if not request.tasks:
        raise UsageError("no tasks are named", hint="name them with --tasks a,b")
    alone = (settings.workers or 1) == 1 and settings.engine == "local"
    if settings.max_length is not None or not alone:
        raise UsageError(
            "tasks of a harness run in one process, with the model's own context",
            hint="leave out --max-length, --workers and --engine",
        )


def _recorded(
    registry: Registry, subjects: Mapping[str, Subject], digests: Mapping[str, str]
) -> list[dict[str, Any]]:
    """Return what the requests gave before, in the order of subjects and tasks."""
    rows = registry.select(
        "task_scores_requested", subjects=list(subjects), requests=list(digests.values())
    )
    first, second = list(subjects), list(digests.values())
    rows.sort(key=lambda row: (first.index(row["subject"]), second.index(row["request"])))
    return rows


class _Run:
    """The harness with its tasks, for the models of one pool."""

    def __init__(self, registry: Registry, request: TaskRequest, settings: Settings) -> None:
        from lm_eval.tasks import TaskManager

        folder = str(request.include_path) if request.include_path else None
        self.registry, self.request, self.settings = registry, request, settings
        self.manager = TaskManager(include_path=folder)
        self.digests = request.digests(settings.dtype)
        known = dict.fromkeys(self.manager.all_tasks)
        for task in request.tasks:
            if task not in known:
                raise unknown_name("task of lm-eval", task, known)

    def all(self, items: Sequence[Item], progress: Progress) -> None:
        """Run what is missing, one family of models in memory at a time."""
        progress.start("running tasks", sum(len(tasks) for _, tasks in items), "tasks")
        ordered = sorted(items, key=lambda item: measuring_order(item[0]))
        for _, group in groupby(ordered, key=lambda item: family_of(item[0])):
            self._models(list(group), progress)

    def _models(self, items: Sequence[Item], progress: Progress) -> None:
        from poolreg.evaluation.live import LiveModel
        from poolreg.evaluation.materials import Materials
        from poolreg.models.loading import load_tokenizer, pick_device

        members = sorted({model for subject, _ in items for model, _ in subject.components})
        materials = Materials.of(self.registry, members)
        trusted = materials.trusted.issuperset(members)
        live = LiveModel(
            materials, members, dtype=self.settings.dtype,
            device=pick_device(self.settings.device), trust_code=trusted,
        )  # fmt: skip
        with materials.folder(members[0]) as folder:
            tokenizer = load_tokenizer(folder, trust_code=trusted)
        first = self.registry.one("model", digest=members[0])
        length = default_max_length(first["context_length"])
        for subject, tasks in items:
            progress.note(subject.label)
            model = live.load(subject.integer_weights)
            for task in tasks:
                scores = self._scores(self._wrapped(model, tokenizer, length), task)
                record_scores(self.registry, subject, scores, request=self.digests[task])
                progress.advance(1)

    def _wrapped(self, model: Any, tokenizer: Any, length: int) -> Any:
        """Return the live model as the harness's kind of model."""
        from lm_eval.models.huggingface import HFLM

        default = 1024 if model.device.type == "cpu" else 16384
        batch = max(1, (self.settings.batch_tokens or default) // length)
        return HFLM(pretrained=model, tokenizer=tokenizer, backend="causal", batch_size=batch)

    def _scores(self, lm: Any, name: str) -> tuple[TaskScore, ...]:
        """Run one task or group."""
        from lm_eval.evaluator import evaluate

        started = time.time()
        with _failures(name):
            loaded = self.manager.load([name])
            for task in loaded["tasks"].values():
                _set_shots(task, self.request.num_fewshot)
            _seed_all()
            found = evaluate(
                lm, loaded, limit=self.request.limit, bootstrap_iters=_BOOTSTRAPS, log_samples=True
            )
        samples = found.pop("samples")
        known = {
            "lm_eval_version": harness_version(),
            "date": started,
            "config": {"limit": self.request.limit},
            "task_hashes": {task: _hash(logged) for task, logged in samples.items()},
        }
        plain = json.loads(json.dumps(found | known, default=_plain))
        return parse_results(plain, f"what task {name} gave")[0]


def _set_shots(task: Any, count: int | None) -> None:
    """Set the number of worked examples as the harness's command line does."""
    own = task.get_config("num_fewshot")
    if own is None or (count is not None and own != 0):  # a task that says 0 takes none
        task.set_config(key="num_fewshot", value=count or 0)
    task.set_fewshot_seed(seed=_OTHER_SEED)


def _seed_all() -> None:
    import numpy as np
    import torch

    random.seed(_SEED)
    np.random.seed(_OTHER_SEED)
    torch.manual_seed(_OTHER_SEED)


def _hash(samples: Sequence[Mapping[str, str]]) -> str:
    """Return the hash that the harness writes beside results: of documents, prompts, targets."""
    parts = [s["doc_hash"] + s["prompt_hash"] + s["target_hash"] for s in samples]
    return sha256("".join(parts).encode())


def _plain(value: Any) -> Any:
    return value.item() if hasattr(value, "item") else str(value)


@contextlib.contextmanager
def _failures(task: str) -> Iterator[None]:
    """Turn what a task or the loading of its data raises into `Refused`."""
    import datasets.exceptions
    import jinja2
    import yaml

    from poolreg.models.loading import LOADING_ERRORS

    others = (datasets.exceptions.DatasetsError, jinja2.TemplateError, yaml.YAMLError)
    try:
        yield
    except (*LOADING_ERRORS, *others) as error:
        reason = str(error).strip().splitlines() or [""]
        raise Refused(
            f"lm-eval cannot run task {task}: {type(error).__name__}: {reason[0]}",
            hint="try it with lm-eval's own command line; data sets may have to be fetched first",
            task=task,
        ) from error


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep the harness from printing, drawing bars and forking inside the block.

    The settings are global, so one thread at a time is inside.
    """
    from tqdm import tqdm

    from poolreg.models.loading import quiet_transformers

    logger, draw = logging.getLogger("lm_eval"), tqdm.__init__

    def hidden(self: Any, *args: Any, **kwargs: Any) -> None:
        draw(self, *args, **kwargs | {"disable": True})

    with _quiet_lock, quiet_transformers(), contextlib.redirect_stdout(io.StringIO()):
        level, forking = logger.level, os.environ.get("DISABLE_MULTIPROC")
        logger.setLevel(logging.ERROR)
        os.environ["DISABLE_MULTIPROC"] = "1"
        tqdm.__init__ = hidden
        try:
            yield
        finally:
            tqdm.__init__ = draw
            logger.setLevel(level)
            os.environ.pop("DISABLE_MULTIPROC")
            os.environ |= {"DISABLE_MULTIPROC": forking} if forking else {}
