"""Where measuring runs: in this process, in others beside it, or on the machines of a cluster.

The work is handed out in short runs of neighbours, so that partial sums are shared and yet nobody
waits long for a slow worker; every result comes back as soon as it is there.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import replace

from poolreg.errors import ConfigError
from poolreg.evaluation.evaluate import Plan, Settings, family_of
from poolreg.evaluation.materials import Materials
from poolreg.evaluation.measure import Bench, Family, Measured, Target
from poolreg.evaluation.protocol import Protocol
from poolreg.progress import Progress
from poolreg.store.registry import Registry
from poolreg.workers import stream

ENGINES = ("local", "ray")

_LONGEST = 32  # targets in a run: what one worker has ahead of it
_SHARE = 4  # a run is at most a worker's share of the rest, in so many parts

Results = Generator[tuple[Measured, ...]]


def measured(registry: Registry, work: Plan, settings: Settings, progress: Progress) -> Results:
    """Yield what each missing subject of a plan scores, in the order in which they are done.

    Raises `ConfigError` for an unknown engine, and what measuring raises.
    """
    if settings.engine not in ENGINES:
        raise ConfigError(f"unknown engine {settings.engine!r}", hint="choose local or ray")
    given = (*_given(registry, work, settings), settings)
    if settings.engine == "ray":
        from poolreg.evaluation import on_ray

        return on_ray.measured(given, _targets(work), progress)
    workers = min(settings.workers or 1, len(work.missing))
    if workers == 1:
        return stream(Bench, given, [_targets(work)], workers=1, progress=progress)
    # One thread each: several processes with many threads would fight for the cores.
    alone = replace(settings, threads=settings.threads or 1)
    runs = cut(_targets(work), workers)
    return stream(Bench, (*given[:2], alone), runs, workers=workers, progress=progress)


def _given(
    registry: Registry, work: Plan, settings: Settings
) -> tuple[Materials, dict[str, Family]]:
    members: dict[str, dict[str, None]] = {}
    protocols: dict[str, Protocol] = {}
    evalsets: dict[str, None] = {}
    for subject, texts in work.missing:
        family = family_of(subject)
        members.setdefault(family, {}).update((model, None) for model, _ in subject.components)
        protocols[family] = work.protocols[subject.digest]
        evalsets |= dict.fromkeys(texts)
    families = {
        family: Family(tuple(sorted(models)), protocols[family])
        for family, models in members.items()
    }
    models = {model for family in families.values() for model in family.members}
    materials = Materials.of(registry, sorted(models), evalsets, published=settings.published)
    return materials, families


def _targets(work: Plan) -> list[Target]:
    return [
        Target(
            subject.digest, subject.label, family_of(subject), subject.integer_weights, evalsets,
            work.lap,
        )
        for subject, evalsets in work.missing
    ]  # fmt: skip


def cut(targets: Sequence[Target], workers: int) -> list[Sequence[Target]]:
    """Cut targets into runs of neighbours, ever shorter, so that all workers end together."""
    runs, start = [], 0
    while start < len(targets):
        size = max(1, min(_LONGEST, (len(targets) - start) // (_SHARE * workers)))
        runs.append(targets[start : start + size])
        start += size
    return runs
