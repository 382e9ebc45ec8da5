"""Narrower MLPs: rank the inner channels, keep the best, re-fit the down projection."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from poolreg.compress.architectures import LayerWeights
from poolreg.compress.calibrate import LayerStatistics
from poolreg.numerics.nystrom import compensate, leverage_scores, ridge_of, squared_error
from poolreg.numerics.obs import Elimination, eliminate, unpriced

# Ridges, relative to the mean of the Gram's diagonal, that a fit may take. The last one stands
# for no compensation at all.
RIDGES = (1e-8, 1e-6, 1e-4, 1e-2, 1e6)
LEVERAGE_RIDGE = 1e-2


def moments(statistics: LayerStatistics, name: str, *, centred: bool) -> tuple[Tensor, Tensor]:
    """Return the second moments of some activations per token, and what was subtracted.

    Centred they are covariances around the mean, else plain moments around zero.
    """
    gram = statistics[name] / statistics.tokens
    mean = statistics[f"{name}_sum"] / statistics.tokens
    if not centred:
        return gram, torch.zeros_like(mean)
    return gram - mean[..., :, None] * mean[..., None, :], mean


def rank_channels(
    weights: LayerWeights, statistics: LayerStatistics, ingredients: frozenset[str], *, least: int
) -> Elimination:
    """Return the MLP's channels in the order in which they go, with the error of each size.

    Errors are mean squared norms per token of what the MLP adds to the residual stream.
    """
    gram, _ = moments(statistics, "mlp", centred=_centred(weights, ingredients))
    if "obs" in ingredients:
        return eliminate(gram, weights.down, least)
    scores = leverage_scores(gram, ridge_of(gram, LEVERAGE_RIDGE))
    order = scores.argsort()
    curve = "allocation" in ingredients
    return _priced(gram, weights.down, order, least) if curve else unpriced(order, len(scores))


def _priced(gram: Tensor, weight: Tensor, order: Tensor, least: int) -> Elimination:
    """Return an elimination in a given order, its errors measured at some sizes."""
    channels = len(order)
    sizes = sorted({*range(least, channels, max(1, channels // 16)), channels}, reverse=True)
    costs = torch.zeros(channels - least, dtype=torch.float64)
    before = 0.0
    for more, size in itertools.pairwise(sizes):
        error = narrowing_error(gram, weight, order[channels - size :].sort().values)
        costs[channels - more : channels - size] = max(0.0, error - before) / (more - size)
        before = max(before, error)
    return Elimination(order[: channels - least], costs, channels)


def _centred(weights: LayerWeights, ingredients: frozenset[str]) -> bool:
    return weights.down_bias is not None and "intercept" in ingredients


def narrow(
    weights: LayerWeights, statistics: LayerStatistics, ingredients: frozenset[str], *,
    kept: Tensor,
) -> float:  # fmt: skip
    """Keep some channels of the MLP, in place; returns the error per held-out token.

    The ridge of the re-fit is the one that does best on the held-out tokens, so that the kept
    weights stay as they were where the calibration cannot support a change.
    """
    gram, mean = moments(statistics, "mlp", centred=_centred(weights, ingredients))
    held = statistics["held_mlp"][statistics["held_mask"]].double() - mean
    best: tuple[float, Tensor] | None = None
    for relative in RIDGES:
        down = compensate(gram, weights.down, kept, ridge_of(gram, relative))
        error = float((held @ weights.down - held[:, kept] @ down).square().sum(1).mean())
        if best is None or error < best[0]:
            best = error, down
    assert best is not None
    if weights.down_bias is not None:
        weights.down_bias = weights.down_bias + mean @ weights.down - mean[kept] @ best[1]
    weights.down = best[1]
    weights.inputs = [weight[:, kept] for weight in weights.inputs]
    weights.input_biases = [b if b is None else b[kept] for b in weights.input_biases]
    return best[0]


def narrowing_error(gram: Tensor, weight: Tensor, kept: Tensor) -> float:
    """Return the error per calibration token with `kept` channels re-fitted."""
    difference = weight.clone()
    difference[kept] -= compensate(gram, weight, kept)
    return squared_error(gram, difference)
