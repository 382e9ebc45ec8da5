"""Many mixtures at once: choosing them, planning what is missing, measuring it.

A sweep is an evaluation of many subjects; what makes it cheap (the memo, one live model, partial
sums) is in `evaluate`, `live` and `averages`. Mixtures are recorded as they are done, so a killed
sweep goes on where it was. One sweep may be done in shards, by processes that know nothing of each
other: which mixtures are in a shard depends on content alone.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

from poolreg.errors import ConfigError, UsageError
from poolreg.evaluation.ask import evalsets_named
from poolreg.evaluation.evaluate import (
    Evaluation,
    Key,
    Plan,
    Settings,
    measuring_order,
    note_subjects,
    plan,
    run,
)
from poolreg.files import read_capped
from poolreg.mixture import Atom, Mixture, mix, subsets, thousandths
from poolreg.models.resolve import Resolver, Subject
from poolreg.progress import SILENT, Progress
from poolreg.store.registry import Registry

MOST_MIXTURES = 200_000


@dataclass(frozen=True)
class SweepPlan:
    """What a sweep would do. `seconds` is an estimate from earlier speed, None without any."""

    subjects: tuple[Subject, ...]
    evalsets: dict[str, str]  # digest → name
    work: Plan
    settings: Settings
    seconds: float | None

    @property
    def mixtures(self) -> int:
        """Number of mixtures."""
        return len(self.subjects)

    @property
    def memoised(self) -> int:
        """Evaluations that the memo holds."""
        return len(self.work.known)


def choose_subsets(
    registry: Registry, *, sizes: tuple[int, int] | None = None, limit: int | None = None,
    among: str = "all", sample_seed: int = 0,
) -> list[Mixture]:  # fmt: skip
    """Return the union of every subset of the partitions in `among`, smallest first.

    `sizes` bounds their size, `limit` draws that many of them at random (seeded).
    """
    names = _among(registry, among)
    low, high = sizes or (1, len(names))
    if not 1 <= low <= high:
        raise UsageError(f"sizes {low}-{high} are not a range from 1", hint="write 2 or 1-3")
    if low > len(names):
        raise UsageError(f"there is no union of {low} of {len(names)} partitions")
    high = min(high, len(names))
    count = sum(math.comb(len(names), size) for size in range(low, high + 1))
    if count > MOST_MIXTURES:
        raise UsageError(
            f"{len(names)} partitions have {count:,} such subsets",
            hint="narrow it with --sizes, or draw mixtures with --dirichlet N",
        )
    return _limited(list(subsets(names, range(low, high + 1))), limit, sample_seed)


def choose_dirichlet(
    registry: Registry, count: int, *, seed: int = 0, among: str = "all", concentration: float = 1.0
) -> list[Mixture]:
    """Return `count` mixtures drawn from a symmetric Dirichlet, in whole thousandths."""
    import numpy as np

    if not 1 <= count <= MOST_MIXTURES or not 0 < concentration < math.inf or seed < 0:
        raise UsageError(
            f"cannot draw {count} mixtures with concentration {concentration:g} and seed {seed}",
            hint=f"draw 1 to {MOST_MIXTURES:,} with a concentration above 0 and a seed from 0",
        )
    names = _among(registry, among)
    draws = np.random.default_rng(seed).dirichlet([concentration] * len(names), size=count)
    return [
        mix(
            (Atom(name), Fraction(part)) for name, part in zip(names, thousandths(row), strict=True)
        )
        for row in draws.tolist()
    ]


def _among(registry: Registry, text: str) -> list[str]:
    """Return the partitions to choose from; single base units are not among them."""
    mixture = Resolver(registry).expression(text)
    if any(atom.unit for atom, _ in mixture.weights):
        raise UsageError(f"{text} names single base units", hint="name whole partitions")
    return list(mixture.partitions)


def read_mixtures(registry: Registry, path: Path) -> list[Mixture]:
    """Read expressions from a file, one a line; empty lines and `#` comments are passed over."""
    text = read_capped(path, 64 << 20, error=ConfigError, what="the file of mixtures")
    try:
        lines = text.decode("utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not UTF-8 text") from error
    resolver = Resolver(registry)
    plain = [line.partition("#")[0].strip() for line in lines]
    if not any(plain):
        raise ConfigError(f"{path} holds no mixtures", hint="write one a line, such as 2*a+b")
    return [resolver.expression(line) for line in plain if line]


def _limited(mixtures: list[Mixture], limit: int | None, seed: int) -> list[Mixture]:
    if limit is None or limit >= len(mixtures):
        return mixtures
    if limit < 1:
        raise UsageError(f"cannot limit a sweep to {limit} mixtures", hint="give 1 or more")
    chosen = sorted(random.Random(seed).sample(range(len(mixtures)), limit))
    return [mixtures[index] for index in chosen]


def plan_sweep(
    registry: Registry, mixtures: Sequence[Mixture], on: Sequence[str] = (), *,
    scheme: str = "micro", seed: str | None = None, settings: Settings | None = None,
    shard: tuple[int, int] | None = None,
) -> SweepPlan:  # fmt: skip
    """Resolve mixtures and look up what the memo holds; measures nothing.

    `shard` (i, n) takes the i-th of n parts of them, from 1; see `in_shard`.
    """
    settings = settings or Settings()
    resolver = Resolver(registry, scheme=scheme, seed=seed)
    subjects = tuple(resolver.mixture(mixture) for mixture in dict.fromkeys(mixtures))
    if shard:
        subjects = in_shard(subjects, *shard)
    evalsets = evalsets_named(registry, on)
    work = plan(registry, subjects, list(evalsets), settings)
    speed = registry.select("speed")[0]["bytes_per_second"]
    return SweepPlan(subjects, evalsets, work, settings, work.bytes / speed if speed else None)


def in_shard(subjects: Sequence[Subject], number: int, of: int) -> tuple[Subject, ...]:
    """Return the part `number` (from 1) of `of` parts of subjects, in the order given.

    Parts are neighbours in the order of measuring, so that partial sums still serve, and differ by
    at most one subject: all subjects have the same text to score. They depend neither on the order
    given nor on what is known by now, so together they are the whole and none overlap.
    """
    if not 1 <= number <= of:
        raise UsageError(f"there is no shard {number} of {of}", hint="write 1/8 to 8/8")
    distinct = {subject.digest: subject for subject in subjects}
    ordered = sorted(distinct.values(), key=measuring_order)
    start, stop = len(ordered) * (number - 1) // of, len(ordered) * number // of
    mine = {subject.digest for subject in ordered[start:stop]}
    return tuple(subject for subject in subjects if subject.digest in mine)


def run_sweep(
    registry: Registry, planned: SweepPlan, *, progress: Progress = SILENT
) -> dict[Key, Evaluation]:
    """Measure what the plan lacks and return all of its evaluations."""
    note_subjects(registry, planned.subjects)
    return run(registry, planned.work, planned.settings, progress=progress)
