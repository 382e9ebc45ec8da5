"""Which sizes to give every layer: errors of each module at each size, shared out under a budget.

`analyse` looks at each layer once: how its channels, pairs and ranks are ordered, and what each
size would cost in error. `choose_sizes` then answers any ratio from that in no time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from poolreg.compress import attention as qkvo
from poolreg.compress.architectures import Heads, LayerWeights, block_parameters
from poolreg.compress.calibrate import LayerStatistics
from poolreg.compress.mlp import moments, rank_channels
from poolreg.compress.sizes import PARTS, LayerSizes, full_sizes, unit_costs
from poolreg.errors import UsageError
from poolreg.numerics.allocate import Curve, knapsack, layer_shares
from poolreg.numerics.nystrom import projected, ridge_of, squared_error
from poolreg.numerics.obs import Elimination

LEAST_SHARE = 0.1  # of each module stays at least
LARGEST_SHARE = 0.8  # of a layer that the paper's allocation may take
STEPS = 16  # sizes that a head may have

Sizes = NDArray[np.int64]
Floats = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class LayerAnalysis:
    """One layer's rankings, the sizes that its movable parts may have, and their error curves.

    Errors are mean squared norms per token of the change in the residual stream, divided by the
    stream's own. Without the "allocation" ingredient there are no curves.
    """

    full: LayerSizes
    allowed: dict[str, Sizes]
    parameters: int
    costs: dict[str, int]
    influence: float
    channels: Elimination
    values: tuple[Tensor, Tensor]
    scores: qkvo.QueryKeyRanking | None
    curves: dict[str, Curve]

    @property
    def movable(self) -> int:
        """Parameters of the parts that may shrink."""
        return sum(self.costs[part] * int(sizes[-1]) for part, sizes in self.allowed.items())

    def removed(self, sizes: LayerSizes) -> int:
        """Return how many parameters these sizes remove."""
        return sum((getattr(self.full, p) - getattr(sizes, p)) * self.costs[p] for p in PARTS)


def analyse(
    weights: LayerWeights, statistics: LayerStatistics, heads: Heads, *, scaling: float,
    step: int, ingredients: frozenset[str], scores: qkvo.QueryKeyRanking | None,
    attention: bool = True,
) -> LayerAnalysis:  # fmt: skip
    """Rank the parts of one layer and, for "allocation", work out their errors at each size.

    `step` is what MLP widths are multiples of. `scores` ranks queries and keys, if they may
    shrink; without `attention` nothing but the MLP does.
    """
    full, costs = full_sizes(weights, heads), unit_costs(weights, heads)
    allowed = {"mlp": allowed_sizes(full.mlp, step)}
    if attention:
        parts = ("values",) if scores is None else ("values", "pairs", "passing")
        sizes = {part: getattr(full, part) for part in parts if getattr(full, part)}
        allowed |= {part: allowed_sizes(n, max(1, n // STEPS)) for part, n in sizes.items()}
    channels = rank_channels(weights, statistics, ingredients, least=int(allowed["mlp"][0]))
    bases = qkvo.value_bases(weights, statistics, heads, ingredients)
    curves = {}
    if "allocation" in ingredients:
        errors = {"mlp": [channels.error(int(width)) for width in allowed["mlp"]]}
        if "values" in allowed:
            errors["values"] = _value_errors(
                weights, statistics, heads, bases[0], allowed["values"],
                centred=weights.o_bias is not None and "intercept" in ingredients,
            )  # fmt: skip
        if scores is not None:
            local = qkvo.LocalAttention(weights, statistics, heads, scaling)
            errors |= _score_errors(local, scores, full, ingredients, allowed=allowed)
        curves = {
            part: _curve(sizes, np.array(errors[part]) / statistics.energy, costs[part])
            for part, sizes in allowed.items()
        }
    return LayerAnalysis(
        full, allowed, block_parameters(weights), costs, statistics.influence, channels, bases,
        scores, curves,
    )  # fmt: skip


def allowed_sizes(full: int, step: int) -> Sizes:
    """Return the sizes a part may have, ascending: multiples of `step`, and the full one."""
    least = max(step, -(-int(LEAST_SHARE * full) // step) * step)
    return np.array(sorted({*range(least, full, step), full}), np.int64)


def _curve(sizes: Sizes, errors: Floats, price: int) -> Curve:
    # Larger never errs more: what a measurement says against it is noise.
    return Curve(sizes, sizes * price, np.minimum.accumulate(np.maximum(errors, 0.0)))


def _value_errors(
    weights: LayerWeights, statistics: LayerStatistics, heads: Heads, bases: Tensor, ranks: Sizes,
    *, centred: bool,
) -> list[float]:  # fmt: skip
    """Return the error per calibration token of the re-fitted output at each rank."""
    gram, _ = moments(statistics, "out", centred=centred)
    errors = []
    for rank in ranks:
        wide = torch.block_diag(*bases[:, :, : int(rank)].repeat_interleave(heads.group, 0))
        fitted = projected(gram, weights.o, wide, ridge_of(gram, qkvo.OUTPUT_RIDGE))
        errors.append(squared_error(gram, weights.o - wide @ fitted))
    return errors


def _score_errors(
    local: qkvo.LocalAttention, ranking: qkvo.QueryKeyRanking, full: LayerSizes,
    ingredients: frozenset[str], *, allowed: dict[str, Sizes],
) -> dict[str, list[float]]:  # fmt: skip
    """Return what the attention's output loses with fewer pairs, and with fewer other channels."""

    def error(pairs: int, passing: int) -> float:
        maps = qkvo.query_key_maps(ranking, local.heads, ingredients, pairs=pairs, passing=passing)
        return local.error(maps)

    errors = {}
    if "pairs" in allowed:
        errors["pairs"] = [error(int(size), full.passing) for size in allowed["pairs"]]
    if "passing" in allowed:
        errors["passing"] = [error(full.pairs, int(size)) for size in allowed["passing"]]
    return errors


def choose_sizes(
    analyses: Sequence[LayerAnalysis], ratio: float, *, epsilon: float, ingredients: frozenset[str]
) -> list[LayerSizes]:
    """Return the sizes of all layers that remove `ratio` of the block parameters, or just more.

    Raises `UsageError` if not so much can be removed.
    """
    wanted = check_reachable(analyses, ratio)
    if "allocation" in ingredients:
        return _by_knapsack(analyses, wanted)
    return _by_layer(analyses, wanted, epsilon=epsilon)


def check_reachable(analyses: Sequence[LayerAnalysis], ratio: float) -> int:
    """Return how many parameters a ratio removes; raises `UsageError` for too many."""
    total = sum(layer.parameters for layer in analyses)
    most = sum(
        layer.costs[part] * int(sizes[-1] - sizes[0])
        for layer in analyses
        for part, sizes in layer.allowed.items()
    )
    wanted = int(np.ceil(ratio * total))
    if wanted > most:
        whole = [part for part in ("pairs", "values") if part not in analyses[0].allowed]
        why = " (attention stays whole)" if len(whole) > 1 else ""
        why = why or (" (queries and keys stay whole)" if "pairs" in whole else "")
        raise UsageError(
            f"a ratio of {ratio:g} cannot be reached: at most {most / total:.1%} of the block "
            f"parameters can go here{why}",
            hint="choose a smaller --ratio" + (", or --target full" if len(whole) > 1 else ""),
        )
    return wanted


def _by_knapsack(analyses: Sequence[LayerAnalysis], wanted: int) -> list[LayerSizes]:
    keys = [(i, part) for i, layer in enumerate(analyses) for part in layer.curves]
    curves = [analyses[i].curves[part] for i, part in keys]
    budget = sum(int(curve.costs[-1]) for curve in curves) - wanted
    sizes = dict(zip(keys, knapsack(curves, budget), strict=True))
    return [
        LayerSizes(*(sizes.get((i, part), getattr(layer.full, part)) for part in PARTS))
        for i, layer in enumerate(analyses)
    ]


def _by_layer(
    analyses: Sequence[LayerAnalysis], wanted: int, *, epsilon: float
) -> list[LayerSizes]:
    """Give each layer one share to remove of all its movable parts, after the paper."""
    average = wanted / sum(layer.movable for layer in analyses)
    influence = [layer.influence for layer in analyses]
    cap = max(LARGEST_SHARE, average)
    shares = layer_shares(influence, average, epsilon=epsilon, cap=cap)
    return _rounded(analyses, shares, wanted)


def _rounded(analyses: Sequence[LayerAnalysis], shares: Floats, wanted: int) -> list[LayerSizes]:
    """Round sizes up to allowed ones, then go down step by step until `wanted` are gone."""
    chosen = [{part: getattr(layer.full, part) for part in PARTS} for layer in analyses]
    smaller: dict[tuple[int, str], list[int]] = {}
    for i, (layer, share) in enumerate(zip(analyses, shares, strict=True)):
        for part, sizes in layer.allowed.items():
            above = sizes[sizes >= (1 - share) * sizes[-1] - 1e-9]
            chosen[i][part] = int(above[0])
            smaller[i, part] = sizes[sizes < above[0]].tolist()
            wanted -= int(sizes[-1] - above[0]) * layer.costs[part]

    def surplus(key: tuple[int, str]) -> float:
        i, part = key
        return float(chosen[i][part] / int(analyses[i].allowed[part][-1]) - (1 - shares[i]))

    while wanted > 0:
        i, part = max((key for key, sizes in smaller.items() if sizes), key=surplus)
        size = smaller[i, part].pop()
        wanted -= (chosen[i][part] - size) * analyses[i].costs[part]
        chosen[i][part] = size
    return [LayerSizes(**sizes) for sizes in chosen]
