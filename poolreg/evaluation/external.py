"""Scores from elsewhere: what lm-evaluation-harness wrote to a file, recorded for a model.

A results file comes from outside and is not trusted: it is read up to a size, every field that
is used is checked, and whatever is wrong is refused with the file's and the field's name. A
value that is no finite number is left out and named.

A score is recorded with all that it says, so importing a file twice changes nothing. Two scores
can be compared when task, metric, filter, number of shots, task hash, task version and limit
are the same; of several for one model the one measured last counts.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from poolreg.canonical import digest_of
from poolreg.errors import NotFound, Refused
from poolreg.evaluation.evaluate import note_subjects
from poolreg.files import read_capped
from poolreg.models.resolve import Resolver, Subject
from poolreg.store import records
from poolreg.store.registry import Registry

HARNESS = "lm-eval"
MAX_BYTES = 64 << 20  # results without samples are a few megabytes for hundreds of tasks
MAX_NAME = 200  # characters of a task, metric, filter, hash or version
_MOST = 1 << 53  # of what is counted
_HINT = "give a results_*.json as lm-eval 0.4 writes it with --output_path"


@dataclass(frozen=True)
class TaskScore:
    """One value of one metric on one task, as the harness gives it.

    `limit` is what was set on the samples (a number, or a share below 1; None: all of them),
    `task_hash` covers all documents and prompts (None where samples were not logged), and
    `measured` is UTC in ISO form.
    """

    task: str
    metric: str
    filter: str
    value: float
    stderr: float | None
    higher_is_better: bool | None
    n_shot: int | None
    samples: int | None
    limit: float | None
    task_hash: str | None
    task_version: str | None
    harness_version: str | None
    measured: str | None


@dataclass(frozen=True)
class Results:
    """What a file holds. `skipped` names values that are no finite numbers."""

    path: Path
    scores: tuple[TaskScore, ...]
    skipped: tuple[str, ...]


@dataclass(frozen=True)
class Imported:
    """What was recorded: `new` of the scores were not in the pool before."""

    path: Path
    label: str
    subject: str
    scores: tuple[TaskScore, ...]
    skipped: tuple[str, ...]
    new: int


def import_scores(
    registry: Registry, path: Path, model: str, *, scheme: str = "micro", seed: str | None = None
) -> Imported:
    """Record the scores of a results file, or of the newest in a folder, for a model or mixture.

    Raises `NotFound` and `Refused` as `read_results` does, and what resolving `model` raises.
    """
    results = read_results(path)
    subject = Resolver(registry, scheme=scheme, seed=seed).subject(model)
    note_subjects(registry, [subject])
    new = record_scores(registry, subject, results.scores)
    return Imported(
        results.path, subject.label, subject.digest, results.scores, results.skipped, new
    )


def record_scores(
    registry: Registry, subject: Subject, scores: tuple[TaskScore, ...], *,
    request: str | None = None,
) -> int:  # fmt: skip
    """Record scores that the pool does not hold yet and return how many those were.

    `request` is the digest of what was asked of the harness here (None: elsewhere).
    """
    made = {}
    for score in scores:
        body = asdict(score) | {"subject": subject.digest, "harness": HARNESS, "request": request}
        body["sample_limit"] = body.pop("limit")
        record = records.fact("task_score", body)
        made[record.id] = record
    known = {row["digest"] for row in registry.select("task_scores_known", digests=list(made))}
    new = [record for key, record in made.items() if key not in known]
    if new:
        with registry.writing():
            registry.record(*new)
    return len(new)


def read_results(path: Path) -> Results:
    """Read a results_*.json of lm-evaluation-harness, or the newest one below a folder.

    Groups of tasks are scores of their own beside their tasks. Raises `NotFound` where there is
    no such file and `Refused`, naming file and field, for one that is malformed.
    """
    path = _newest(path) if path.is_dir() else path
    if not path.exists():
        raise NotFound(f"there is no file {path}", hint=_HINT)
    data = read_capped(path, MAX_BYTES, error=Refused, what="the results file")
    try:
        found = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise Refused(f"{path} is not JSON: {error}", hint=_HINT, path=str(path)) from error
    scores, skipped = parse_results(found, str(path))
    return Results(path, scores, skipped)


def _newest(folder: Path) -> Path:
    # The names end in the time of writing; files copied from elsewhere lose theirs.
    found = sorted(folder.rglob("results_*.json"), key=lambda path: (path.name, str(path)))
    if not found:
        raise NotFound(f"there is no results_*.json below {folder}", hint=_HINT)
    return found[-1]


def parse_results(found: Any, where: str) -> tuple[tuple[TaskScore, ...], tuple[str, ...]]:
    """Return the scores in a decoded results file and the names of those left out.

    `where` names the file in errors. Raises `Refused` for fields of the wrong kind.
    """
    reader = _Reader(found, where)
    scores, skipped = [], []
    for task in reader.results:
        for score in reader.scores(task):
            if isinstance(score, TaskScore):
                scores.append(score)
            else:
                skipped.append(score)
    if not scores:
        said = f"; not finite numbers: {', '.join(skipped[:5])}" if skipped else ""
        raise Refused(f"{where} holds no scores{said}", hint=_HINT, path=where)
    return tuple(scores), tuple(skipped)


class _Reader:
    """One decoded results file; each accessor checks the field that it reads."""

    def __init__(self, found: Any, where: str) -> None:
        self.where = where
        self.found: Mapping[str, Any] = self._dict(found, "the file")
        self.results = self._part("results")
        self.members = self._part("group_subtasks")
        self.hashes = self._part("task_hashes")
        self.version = self._text(self.found.get("lm_eval_version"), "lm_eval_version")
        self.limit = self._number(self._part("config").get("limit"), "config.limit")
        self.measured = self._time(self.found.get("date"))

    def scores(self, task: str) -> Iterator[TaskScore | str]:
        """Yield the scores of one task, or the name of one that is no finite number."""
        self._name(task, "the name of a task")
        fields = self._dict(self.results[task], f"results.{task}")
        better = self._dict(self._part("higher_is_better").get(task) or {}, "higher_is_better")
        shared: dict[str, Any] = {
            "n_shot": self._count(self._part("n-shot").get(task), f"n-shot.{task}", most=1 << 30),
            "samples": self._samples(task, fields),
            "task_hash": self._hash(task),
            "task_version": self._version(task),
        }
        for key, value in fields.items():
            metric, comma, kind = key.partition(",")
            if not comma or metric.endswith("_stderr"):
                continue
            self._name(metric, f"the name of a metric of {task}")
            self._name(kind, f"the filter of {task}.{metric}")
            number = _finite(value)
            if number is None:
                yield f"{task} {key}"
                continue
            yield TaskScore(
                task=task, metric=metric, filter=kind, value=number,
                stderr=_finite(fields.get(f"{metric}_stderr,{kind}")),
                higher_is_better=self._flag(better.get(metric), f"higher_is_better.{task}"),
                limit=self.limit, harness_version=self.version, measured=self.measured, **shared,
            )  # fmt: skip

    def _samples(self, task: str, fields: Mapping[str, Any]) -> int | None:
        place = f"n-samples.{task}"
        counts = self._dict(self._part("n-samples").get(task) or {}, place)
        return self._count(counts.get("effective", fields.get("sample_len")), place)

    def _hash(self, task: str) -> str | None:
        """Return the hash of a task; of a group one of all its tasks' hashes, if each has one."""
        if task in self.hashes or not self.members.get(task):
            return self._text(self.hashes.get(task), f"task_hashes.{task}")
        leaves = self._leaves(task)
        if not leaves or any(leaf not in self.hashes for leaf in leaves):
            return None
        hashes = [self._name(self.hashes[leaf], f"task_hashes.{leaf}") for leaf in leaves]
        return digest_of(["group", 1, sorted(hashes)])

    def _leaves(self, group: str) -> set[str]:
        """Return the tasks of a group and of all groups in it."""
        todo, seen, leaves = [group], {group}, set()
        while todo:
            name = todo.pop()
            below, place = self.members.get(name) or [], f"group_subtasks.{name}"
            if not isinstance(below, list):
                raise self._fault(place, "a list of names", below)
            names = {self._name(item, place) for item in below}
            if not names:
                leaves.add(name)
            todo += names - seen
            seen |= names
        return leaves

    def _version(self, task: str) -> str | None:
        version = self._part("versions").get(task)
        if isinstance(version, int | float) and (number := _finite(version)) is not None:
            return f"{number:.15g}"  # a task says 1.0 where its group says "1"
        return self._text(version, f"versions.{task}")

    def _time(self, value: Any) -> str | None:
        seconds = self._number(value, "date")
        if seconds is None:
            return None
        if not 0 <= seconds < 1 << 35:  # up to the year 3058
            raise self._fault("date", "a time in seconds since 1970", value)
        return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%dT%H:%M:%S.%f")

    def _part(self, name: str) -> Mapping[str, Any]:
        return self._dict(self.found.get(name) or {}, name)

    def _dict(self, value: Any, place: str) -> Mapping[str, Any]:
        if not isinstance(value, dict):
            raise self._fault(place, "an object", value)
        return value

    def _text(self, value: Any, place: str) -> str | None:
        return None if value is None else self._name(value, place)

    def _name(self, value: Any, place: str) -> str:
        if not isinstance(value, str) or not value or len(value) > MAX_NAME:
            raise self._fault(place, f"a text of 1 to {MAX_NAME} characters", value)
        if not value.isprintable():
            raise self._fault(place, "a text without control characters", value)
        return value

    def _flag(self, value: Any, place: str) -> bool | None:
        if value is not None and not isinstance(value, bool):
            raise self._fault(place, "true or false", value)
        return value

    def _number(self, value: Any, place: str) -> float | None:
        if value is None:
            return None
        if (number := _finite(value)) is None:
            raise self._fault(place, "a finite number", value)
        return number

    def _count(self, value: Any, place: str, most: int = _MOST) -> int | None:
        if value is None:
            return None
        if type(value) is not int or not 0 <= value <= most:
            raise self._fault(place, f"a whole number up to {most}", value)
        return value

    def _fault(self, place: str, wanted: str, value: Any) -> Refused:
        shown = repr(value) if isinstance(value, str | int | float) else type(value).__name__
        shown = shown if len(shown) <= 60 else shown[:57] + "…"
        return Refused(
            f"{self.where}: {_shown(place)} is not {wanted}: {shown}",
            hint=_HINT, path=self.where, field=place,
        )  # fmt: skip


def _shown(place: str) -> str:
    place = place if len(place) <= 80 else place[:77] + "…"
    return place if place.isprintable() else repr(place)


def _finite(value: Any) -> float | None:
    """Return a number as a float, or None for what is no finite number ("N/A", NaN, true)."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        number = float(value)
    except OverflowError:
        return None
    return number if math.isfinite(number) else None
