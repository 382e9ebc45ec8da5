"""What mixtures are judged by: evalsets and tasks as one kind of thing, where less is better.

An evalset's value is in bits per byte, so that texts can be averaged; a task's is its score,
negated where more is better.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from poolreg.errors import NotFound, UsageError
from poolreg.evaluation.ask import evalsets_named
from poolreg.evaluation.evaluate import Settings, plan, run
from poolreg.evaluation.protocol import Protocol
from poolreg.models.resolve import Resolver, Subject
from poolreg.progress import SILENT, Progress
from poolreg.store.registry import Registry, unknown_name

_HEX = re.compile(r"[0-9a-f]{6,64}")  # a digest or the beginning of one

Values = dict[tuple[str, str], float]  # (subject digest, measure digest) → value, less is better


@dataclass(frozen=True)
class Measure:
    """An evalset or a task. `digest` tells which values may be compared with each other."""

    name: str
    source: str  # evalset or task
    digest: str


def measures_named(registry: Registry, on: Sequence[str] = ()) -> list[Measure]:
    """Return the evalsets and tasks named, or all evalsets.

    A task is named task, task/metric, or by the beginning of its measure's digest, as in the
    view `measures`. Raises `NotFound`, and `UsageError` for a name that several measures have.
    """
    if not on:
        return [Measure(name, "evalset", key) for key, name in evalsets_named(registry, ()).items()]
    evalsets = registry.names("evalset")
    names = list(dict.fromkeys(on))
    tasks = [] if all(name in evalsets for name in names) else registry.select("task_measures")
    return [_named(registry, name, evalsets, tasks) for name in names]


def _named(
    registry: Registry, name: str, evalsets: Mapping[str, str], tasks: Sequence[Mapping[str, str]]
) -> Measure:
    chosen = [row for row in tasks if _fits(row, name)]
    if name in evalsets or not chosen:
        if name not in evalsets and tasks and not _HEX.fullmatch(name):
            known = {**evalsets, **{row["measure"]: "" for row in tasks}}
            raise unknown_name("evalset or task", name, known)
        return Measure(name, "evalset", registry.resolve("evalset", name))
    if len(chosen) > 1:
        forms = ", ".join(
            f"{row['measure']}/{row['metric']} ({row['measure_digest'][:12]})" for row in chosen
        )
        raise UsageError(f"{name!r} is measured in several ways", hint=f"name one: {forms}")
    return Measure(chosen[0]["measure"], "task", chosen[0]["measure_digest"])


def _fits(row: Mapping[str, str], name: str) -> bool:
    if name in (row["measure"], f"{row['measure']}/{row['metric']}"):
        return True
    return bool(_HEX.fullmatch(name)) and row["measure_digest"].startswith(name)


def protocol_of(registry: Registry, seed: str, settings: Settings) -> Protocol:
    """Return how text is scored with the models of a seed."""
    subject = Resolver(registry).model(seed)
    return plan(registry, [subject], [], settings).protocols[seed]


def measured(
    registry: Registry, subjects: Sequence[Subject], measures: Sequence[Measure],
    settings: Settings, *, run_missing: bool, progress: Progress = SILENT,
) -> Values:  # fmt: skip
    """Return the values of subjects; with `run_missing` evalsets are measured where needed.

    What is not known is absent: tasks are measured by their own harness.
    """
    texts = [measure.digest for measure in measures if measure.source == "evalset"]
    work = plan(registry, subjects, texts, settings)
    rows = run(registry, work, settings, progress=progress) if run_missing else work.known
    values = {key: row.bits_per_byte for key, row in rows.items()}
    tasks = [measure.digest for measure in measures if measure.source == "task"]
    if tasks:
        digests = list({subject.digest for subject in subjects})
        for row in registry.select("task_values", subjects=digests, measures=tasks):
            values[row["subject"], row["measure_digest"]] = row["value"]
    return values


def only_seed(registry: Registry, seed: str | None = None) -> str:
    """Return the digest of the seed named, or of the only one; raises `NotFound`, `UsageError`."""
    resolver = Resolver(registry, seed=seed)
    if not resolver.units:
        raise NotFound("the pool has no partitions yet", hint="poolreg partition add NAME FILE…")
    return resolver.seed_for([])
