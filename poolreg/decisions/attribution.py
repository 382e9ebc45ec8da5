"""What each partition contributes: Shapley values, leave-one-out and marginal changes.

The value of a set of partitions is the change of a measure from the seed model to the average
of the set's uniform union, so negative is better and the empty set has 0. The Shapley values of
the partitions sum to the change that all of them make together.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from poolreg.decisions.ensemble import Floats
from poolreg.decisions.measures import Measure, Values, measured, measures_named, only_seed
from poolreg.errors import Refused, UsageError
from poolreg.evaluation.evaluate import Settings
from poolreg.mixture import uniform
from poolreg.models.resolve import Resolver, Subject
from poolreg.numerics.shapley import (
    pair_interactions,
    permutation_plan,
    sampled_shapley,
    shapley_values,
)
from poolreg.progress import SILENT, Progress
from poolreg.store.registry import Registry

MOST_EXACT = 12  # partitions: 4,095 unions
_PERMUTATIONS = 50


@dataclass(frozen=True)
class Contribution:
    """One partition on one evalset or task, as changes of its value (negative is better).

    `shapley` with its `standard_error` (None when exact); `alone`: from the seed to this
    partition only; `leave_one_out`: what its joining changes for all the others together;
    `marginal`: the mean change when it joins, over all the sets that were measured.
    """

    evalset: str
    partition: str
    shapley: float
    standard_error: float | None
    alone: float
    leave_one_out: float
    marginal: float


@dataclass(frozen=True)
class Interaction:
    """Shapley interaction of two partitions: negative where they help each other."""

    evalset: str
    first: str
    second: str
    value: float


@dataclass(frozen=True)
class Attribution:
    """Contributions and (exact only) interactions; `totals` is the change that all make."""

    contributions: tuple[Contribution, ...]
    interactions: tuple[Interaction, ...]
    totals: dict[str, float]
    mixtures: int
    permutations: int | None  # None: exact


def attribute(
    registry: Registry, on: Sequence[str] = (), *, among: str = "all", scheme: str = "micro",
    seed: str | None = None, settings: Settings | None = None, permutations: int | None = None,
    draw: int = 0, run_missing: bool = False, progress: Progress = SILENT,
) -> Attribution:  # fmt: skip
    """Attribute the change from the seed model to the union of `among` to its partitions.

    Exact from all unions for up to 12 partitions, else (or with `permutations`) from that many
    random orders, drawn in pairs of an order and its reverse. `run_missing` measures the unions
    that the memo lacks; without it they are a `Refused`.
    """
    game = _Game.of(registry, on, among=among, scheme=scheme, seed=only_seed(registry, seed))
    if permutations is None and len(game.names) > MOST_EXACT:
        permutations = _PERMUTATIONS
    orders = permutation_plan(len(game.names), permutations, draw) if permutations else []
    masks = game.masks(orders)
    values = measured(
        registry, [game.subjects[mask] for mask in masks], game.measures, settings or Settings(),
        run_missing=run_missing, progress=progress,
    )  # fmt: skip
    _check_known(game, masks, values)
    contributions: list[Contribution] = []
    interactions: list[Interaction] = []
    totals = {}
    for measure in game.measures:
        worth = game.worth(masks, measure, values)
        totals[measure.name] = worth[game.everything]
        contributions += _contributions(game, measure, worth, orders)
        if not orders:
            interactions += _interactions(game, measure, worth)
    return Attribution(
        tuple(contributions), tuple(interactions), totals, len(masks) - 1, permutations
    )


@dataclass
class _Game:
    """The partitions as players, sets of them as bit masks, and the subject of each set."""

    resolver: Resolver
    seed: str
    names: tuple[str, ...]
    measures: Sequence[Measure]
    subjects: dict[int, Subject]

    @classmethod
    def of(
        cls, registry: Registry, on: Sequence[str], *, among: str, scheme: str, seed: str
    ) -> _Game:
        resolver = Resolver(registry, scheme=scheme)
        mixture = resolver.expression(among)
        if any(atom.unit for atom, _ in mixture.weights):
            raise UsageError(f"{among} names single base units", hint="name whole partitions")
        if len(mixture.partitions) < 2:
            raise UsageError(f"{among} is one partition", hint="name two or more, such as all")
        measures = measures_named(registry, on)
        return cls(resolver, seed, mixture.partitions, measures, {0: resolver.model(seed)})

    @cached_property
    def everything(self) -> int:
        return (1 << len(self.names)) - 1

    def masks(self, orders: Sequence[Sequence[int]]) -> list[int]:
        """Return the sets that are needed (all, or those along the orders) and resolve them."""
        needed = {0, self.everything} if orders else set(range(self.everything + 1))
        for order in orders:
            mask = 0
            for player in order:
                mask |= 1 << player
                needed.add(mask)
        for player in range(len(self.names)):
            needed |= {1 << player, self.everything ^ (1 << player)}
        for mask in needed - set(self.subjects):
            chosen = [name for bit, name in enumerate(self.names) if mask >> bit & 1]
            self.subjects[mask] = self.resolver.mixture(uniform(chosen), seed=self.seed)
        return sorted(needed)

    def worth(self, masks: Sequence[int], measure: Measure, values: Values) -> dict[int, float]:
        start = values[self.subjects[0].digest, measure.digest]
        return {mask: values[self.subjects[mask].digest, measure.digest] - start for mask in masks}


def _check_known(game: _Game, masks: Sequence[int], values: Values) -> None:
    lacking = [
        game.subjects[mask].label
        for mask in masks
        if any((game.subjects[mask].digest, m.digest) not in values for m in game.measures)
    ]
    if lacking:
        raise Refused(
            f"{len(lacking)} of the {len(masks)} models and unions that are needed were not "
            f"measured, such as {lacking[0]}",
            hint="measure them: poolreg attribution --measure, or poolreg sweep --subsets",
        )


def _contributions(
    game: _Game, measure: Measure, worth: dict[int, float], orders: Sequence[tuple[int, ...]]
) -> list[Contribution]:
    count, everything = len(game.names), game.everything
    errors: Floats | None = None
    if orders:
        shares, errors = sampled_shapley(orders, lambda mask: worth[mask])
    else:
        shares = shapley_values(np.array([worth[mask] for mask in range(everything + 1)]))
    return [
        Contribution(
            measure.name, game.names[i], float(shares[i]),
            None if errors is None else float(errors[i]),
            alone=worth[1 << i], leave_one_out=worth[everything] - worth[everything ^ (1 << i)],
            marginal=_marginal(worth, 1 << i),
        )
        for i in range(count)
    ]  # fmt: skip


def _marginal(worth: dict[int, float], bit: int) -> float:
    changes = [
        value - worth[mask ^ bit]
        for mask, value in worth.items()
        if mask & bit and mask ^ bit and mask ^ bit in worth  # joining others, not the seed
    ]
    return float(np.mean(changes))


def _interactions(game: _Game, measure: Measure, worth: dict[int, float]) -> list[Interaction]:
    table = pair_interactions(np.array([worth[mask] for mask in range(game.everything + 1)]))
    return [
        Interaction(measure.name, first, second, float(table[i, j]))
        for i, first in enumerate(game.names)
        for j, second in enumerate(game.names)
        if i < j
    ]
