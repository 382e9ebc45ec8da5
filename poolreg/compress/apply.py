"""Carry out a plan on a live model: each layer's weights at their new sizes, by closed forms."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from poolreg.compress import attention as qkvo
from poolreg.compress.architectures import Heads, LayerWeights, projection
from poolreg.compress.calibrate import LayerStatistics
from poolreg.compress.mlp import narrow
from poolreg.compress.plan import LayerAnalysis
from poolreg.compress.sizes import LayerSizes
from poolreg.models.modeling_poolreg import CompressedAttention, Family, resize_layer


@dataclass(frozen=True, eq=False)
class Shrunk:
    """One layer's new weights, the RoPE pairs that each key/value head keeps ([h_kv, r], None for
    all), and by part the error per held-out token, relative to the residual stream."""

    weights: LayerWeights
    pairs: Tensor | None
    errors: dict[str, float]


def shrink(
    weights: LayerWeights, statistics: LayerStatistics, heads: Heads, *, analysis: LayerAnalysis,
    sizes: LayerSizes, scaling: float, ingredients: frozenset[str],
) -> Shrunk:  # fmt: skip
    """Give one layer its new sizes; `weights` are changed in place."""
    full, scores, pairs = analysis.full, analysis.scores, None
    errors: dict[str, float] = {}
    if scores and (sizes.pairs, sizes.passing) != (full.pairs, full.passing):
        maps = qkvo.query_key_maps(
            scores, heads, ingredients, pairs=sizes.pairs, passing=sizes.passing
        )
        local = qkvo.LocalAttention(weights, statistics, heads, scaling)
        for part in ("pairs", "passing"):
            if getattr(sizes, part) != getattr(full, part):
                alone = replace(full, **{part: getattr(sizes, part)})
                errors[part] = local.error(
                    qkvo.query_key_maps(
                        scores, heads, ingredients, pairs=alone.pairs, passing=alone.passing
                    )
                )
        qkvo.shrink_queries_keys(weights, heads, maps)
        if sizes.pairs != full.pairs:
            pairs = qkvo.kept_pairs(scores, sizes.pairs)
    if sizes.values != full.values:
        errors["values"] = qkvo.shrink_values(
            weights, statistics, heads, ingredients, rank=sizes.values, bases=analysis.values
        )
    if sizes.mlp != full.mlp:
        kept = analysis.channels.kept(sizes.mlp)
        errors["mlp"] = narrow(weights, statistics, ingredients, kept=kept)
    relative = {part: error / statistics.energy for part, error in errors.items()}
    return Shrunk(weights, pairs, relative)


def install(
    layer: nn.Module, shrunk: Shrunk, names: Family, config: Any, entry: dict[str, int]
) -> None:
    """Give a live layer the modules of its new sizes and put the weights in.

    `config` is the live model's; `entry` the layer's of `layer_sizes` (see `LayerSizes.entry`).
    """
    resize_layer(layer, config, entry)
    weights, attention = shrunk.weights, layer.get_submodule(names.attention)
    mlp = layer.get_submodule(names.mlp)
    if isinstance(attention, CompressedAttention):
        _fill(attention.q_proj, weights.q, weights.q_bias)
        _fill(attention.k_proj, weights.k, weights.k_bias)
        _fill(attention.v_proj, weights.v, weights.v_bias)
        _fill(attention.o_proj, weights.o, weights.o_bias)
        if attention.rope_pairs is not None and shrunk.pairs is not None:
            attention.rope_pairs.copy_(shrunk.pairs)
    if "intermediate_size" in entry:
        for name, weight, bias in zip(names.up, weights.inputs, weights.input_biases, strict=True):
            _fill(mlp.get_submodule(name), weight, bias)
        _fill(projection(layer, names, "down"), weights.down, weights.down_bias)
    layer.requires_grad_(False).eval()


@torch.no_grad()
def _fill(module: Any, weight: Tensor, bias: Tensor | None) -> None:
    module.weight.copy_(weight.mT if isinstance(module, nn.Linear) else weight)
    if bias is not None:
        module.bias.copy_(bias)
