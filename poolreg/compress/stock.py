"""Variants that plain transformers loads: one width for all layers, one set of RoPE pairs.

A Llama with r of D/2 pairs kept in all heads is a Llama with head_dim 2r whose rotary frequencies
are chosen: type longrope divides each default frequency by a factor of our choice. The scale of
the scores follows the smaller head, so W_Q takes a factor sqrt(2r/D).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from poolreg.compress.attention import QueryKeyRanking
from poolreg.compress.plan import LayerAnalysis, check_reachable
from poolreg.compress.sizes import LayerSizes
from poolreg.errors import UsageError
from poolreg.models.modeling_poolreg import Family
from poolreg.numerics.obs import eliminate

# Families whose configuration has a head_dim of its own, and whose heads rotate whole.
WITH_HEAD_DIM = ("llama", "mistral", "qwen2")
ROPE_TYPES = ("default", "linear", "llama3")  # frequencies that do not depend on the text


def heads_may_shrink(config: Any) -> bool:
    """Tell whether the stock class of a model takes smaller heads with chosen frequencies."""
    rope = getattr(config, "rope_parameters", None) or {}
    return config.model_type in WITH_HEAD_DIM and rope.get("rope_type", "default") in ROPE_TYPES


def shared_pairs(rankings: Sequence[QueryKeyRanking]) -> list[QueryKeyRanking]:
    """Return the rankings of all layers with one order of pairs, the best for all together.

    Each head's scores count by their own energy, so that no layer rules.
    """
    products = torch.cat([ranking.products.flatten(0, 1) for ranking in rankings])
    products = products / products.sum((1, 2), keepdim=True)
    ones = torch.ones(*products.shape[:2], 1, dtype=products.dtype, device=products.device)
    order = eliminate(products, ones, 0, block=1)
    return [replace(ranking, pairs=(order,) * len(ranking.pairs)) for ranking in rankings]


def uniform_sizes(analyses: Sequence[LayerAnalysis], ratio: float) -> list[LayerSizes]:
    """Return one set of sizes for all layers that removes `ratio` of the block parameters.

    All allowed head sizes are tried, each with the widest MLP that it leaves; the least total
    error counts, or the most even shares where errors are not known. Raises `UsageError` if no
    sizes remove so much.
    """
    wanted = check_reachable(analyses, ratio)
    first, layers = analyses[0], len(analyses)
    best: tuple[float, LayerSizes] | None = None
    for pairs in first.allowed.get("pairs", [first.full.pairs]):
        size = replace(first.full, pairs=int(pairs))
        if "pairs" in first.allowed:
            size = replace(size, values=2 * int(pairs))
        left = wanted - layers * first.removed(size)
        widths = [
            int(w) for w in first.allowed["mlp"]
            if layers * first.costs["mlp"] * (first.full.mlp - int(w)) >= left
        ]  # fmt: skip
        if not widths:
            continue
        size = replace(size, mlp=max(widths))
        error = _error(analyses, size, ratio)
        if best is None or error < best[0]:
            best = error, size
    if best is None:
        raise UsageError(
            f"a ratio of {ratio:g} cannot be reached with one size for all layers",
            hint="choose a smaller --ratio, or --target full",
        )
    return [best[1]] * layers


def _error(analyses: Sequence[LayerAnalysis], size: LayerSizes, ratio: float) -> float:
    if not analyses[0].curves:
        full = analyses[0].full
        return abs(size.mlp / full.mlp - (1 - ratio))
    total = 0.0
    for layer in analyses:
        for part, curve in layer.curves.items():
            # The smallest allowed size that is not below: ranks may step otherwise than pairs.
            at = int((curve.sizes >= getattr(size, part)).argmax())
            total += float(curve.errors[at])
    return total


def stock_config(
    config: Mapping[str, Any], names: Family, size: LayerSizes, frequencies: Tensor | None
) -> dict[str, Any]:
    """Return the config.json of a uniform variant in its stock class.

    `frequencies` [r] are the inverse frequencies of the pairs that stay (None: all do).
    """
    made = {key: value for key, value in config.items() if key != "layer_sizes"}
    made[names.width] = size.mlp
    if frequencies is None:
        return made
    made.pop("rope_theta", None)
    made.pop("rope_scaling", None)
    rope = config.get("rope_parameters") or {}
    base = rope.get("rope_theta") or config.get("rope_theta") or 10_000.0
    count = len(frequencies)
    default = base ** (-torch.arange(count, dtype=torch.float64) / count)
    factors = (default / frequencies.double().cpu()).tolist()
    length = config["max_position_embeddings"]
    made["head_dim"] = 2 * count
    made["rope_parameters"] = {
        "rope_type": "longrope", "rope_theta": base, "factor": 1.0, "attention_factor": 1.0,
        "short_factor": factors, "long_factor": factors,
        "original_max_position_embeddings": length,
    }  # fmt: skip
    return made


def stock_tensors(model: Any, full_head: int) -> dict[str, Tensor]:
    """Return the state of a uniform compressed model under the names of its stock class."""
    state: dict[str, Tensor] = model.state_dict()
    pairs = [name for name in state if name.endswith(".rope_pairs")]
    for name in pairs:
        scale = math.sqrt(2 * state.pop(name).shape[1] / full_head)
        for kind in ("weight", "bias"):
            key = name.removesuffix("rope_pairs") + f"q_proj.{kind}"
            if key in state:
                state[key] = state[key] * scale
    return state
