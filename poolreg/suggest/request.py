"""What is asked of a search for the best mixture, checked, and what the pool knows towards it.

A plan measures nothing: it holds the objective and constraints in words for people and in numbers
for the search, and the baselines that will stand beside the answer.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from fractions import Fraction

import numpy as np

from poolreg.decisions.measures import Measure, measured, measures_named, protocol_of
from poolreg.errors import UsageError
from poolreg.evaluation.evaluate import Settings, plan
from poolreg.mixture import thousandths
from poolreg.store.registry import Registry
from poolreg.suggest import shares as points
from poolreg.suggest.constraints import Constrained, Limits, constrained
from poolreg.suggest.shares import Field
from poolreg.suggest.surrogate import least_rows, units_of


@dataclass(frozen=True)
class Request:
    """What is asked: a target (weights of measures, normalised) or the worst group, and limits.

    Without both every evalset weighs the same. `budget` is how many mixtures may be measured.
    """

    target: Mapping[str, float] = field(default_factory=dict)
    worst_group: bool = False
    on: tuple[str, ...] = ()
    among: str = "all"
    limits: Limits = field(default_factory=Limits)
    budget: int = 0


@dataclass(frozen=True)
class Baseline:
    """A mixture that stands beside the answer whatever it is."""

    name: str
    mixture: str
    shares: points.Shares
    measured: bool
    allowed: bool  # by the constraints


@dataclass(frozen=True, eq=False)
class SuggestPlan:
    """What a search knows and would do; nothing was measured for it."""

    objective: str
    constraints: tuple[str, ...]
    partitions: tuple[str, ...]
    seed: str
    rows: int  # measured on every measure of the objective
    ensemble: bool  # whether the unit models' losses are there
    baselines: tuple[Baseline, ...]
    budget: int
    request: Request
    field: Field
    measures: tuple[Measure, ...]
    weights: tuple[float, ...]
    limited: Constrained
    settings: Settings

    @property
    def least_rows(self) -> int:
        """How many rows a surrogate needs."""
        return least_rows(len(self.partitions))


def plan_suggestions(
    registry: Registry, request: Request, *, seed: str | None = None,
    settings: Settings | None = None,
) -> SuggestPlan:  # fmt: skip
    """Check a request and look up what the pool knows; measures nothing.

    Raises `UsageError` for constraints that clash, `NotFound` for unknown names.
    """
    settings = settings or Settings()
    given = points.field(registry, request.among, seed)
    measures, weights = _measures(registry, request)
    if request.budget < 0:
        raise UsageError(f"cannot measure {request.budget} mixtures", hint="--budget 0 or more")
    if request.budget and any(measure.source == "task" for measure in measures):
        raise UsageError(
            "rounds measure evalsets, and the target holds tasks",
            hint="use --budget 0 over mixtures whose tasks were run with their harness",
        )
    limited = constrained(given, request.limits, _ratios(given, settings))
    known = points.known_averages(given)
    values = measured(
        registry, [row.subject for row in known], measures, settings, run_missing=False
    )
    full = [k for k in known if all((k.subject.digest, m.digest) in values for m in measures)]
    units = units_of(given, measures, protocol_of(registry, given.seed, settings).digest)
    return SuggestPlan(
        objective=_words(request, measures, weights), constraints=limited.words,
        partitions=given.names, seed=given.seed, rows=len(full), ensemble=units is not None,
        baselines=_baselines(given, limited, {row.subject.digest for row in full}),
        budget=request.budget, request=request, field=given, measures=tuple(measures),
        weights=tuple(weights), limited=limited, settings=settings,
    )  # fmt: skip


def _measures(registry: Registry, request: Request) -> tuple[list[Measure], list[float]]:
    if request.target and (request.worst_group or request.on):
        other = "--worst-group" if request.worst_group else "--on"
        raise UsageError(f"--target and {other} exclude each other", hint="give one of them")
    if not request.target:
        measures = measures_named(registry, request.on)
        return measures, [1 / len(measures)] * len(measures)
    total = sum(request.target.values())
    if not all(0 <= weight < np.inf for weight in request.target.values()) or total <= 0:
        raise UsageError(
            "the weights of a target are zero or more, and one is above zero",
            hint="write for example --target wiki=0.7,code=0.3",
        )
    wanted = {name: weight / total for name, weight in request.target.items() if weight > 0}
    return measures_named(registry, list(wanted)), list(wanted.values())


def _words(request: Request, measures: list[Measure], weights: list[float]) -> str:
    if request.worst_group:
        names = ", ".join(measure.name for measure in measures)
        return f"the largest change against the seed model over {names}, in bits/byte"
    unit = "bits/byte" if all(m.source == "evalset" for m in measures) else "bits/byte and scores"
    if len(set(weights)) == 1 and len(measures) > 1:
        return f"the mean over {', '.join(measure.name for measure in measures)}, in {unit}"
    parts = zip(measures, weights, strict=True)
    return f"{' + '.join(f'{weight:.3g}·{measure.name}' for measure, weight in parts)}, in {unit}"


def _ratios(given: Field, settings: Settings) -> dict[str, tuple[int, int]]:
    """Return bytes and tokens of the evalsets that the seed or a unit model was measured on."""
    registry = given.registry
    evalsets = registry.names("evalset")
    models = [given.seed, *(model for own in given.models for model in own)]
    subjects = [given.resolver.model(model) for model in dict.fromkeys(models)]
    rows = plan(registry, subjects, list(evalsets.values()), settings).known.values()
    counted = {row.evalset: (row.bytes, row.tokens) for row in rows}
    return {name: counted[digest] for name, digest in evalsets.items() if digest in counted}


def _baselines(given: Field, limited: Constrained, measured: set[str]) -> tuple[Baseline, ...]:
    """Return uniform, natural and stratified; those that round to the same are one row."""
    found: dict[tuple[int, ...], tuple[list[str], points.Shares]] = {}
    for name in ("uniform", "natural", "stratified"):
        shares = points.point(given, name)
        parts = thousandths(shares)
        if name != "uniform":  # its thirds stay what they are, so that the union is measured once
            shares = tuple(Fraction(part, 1000) for part in parts)
        found.setdefault(parts, ([], shares))[0].append(name)
    rows = []
    for names, shares in found.values():
        mixture = given.mixture(shares)
        allowed = limited.region.contains(points.as_floats(shares), 5e-4)
        there = given.subject(mixture).digest in measured
        rows.append(Baseline(" = ".join(names), str(mixture), shares, there, allowed))
    return tuple(rows)
