"""The sizes of a layer's parts, what they cost in parameters, and what may be switched off."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from poolreg.compress.architectures import Heads, LayerWeights
from poolreg.errors import UsageError

METHODS = ("poolreg", "modegpt")
TARGETS = ("full", "portable", "stock")
PARTS = ("mlp", "pairs", "passing", "values")

# What `poolreg` adds to the paper's method; each can be left out to see what it is worth.
INGREDIENTS = {
    "allocation": "sizes of single modules by a knapsack over their errors, not one ratio a layer",
    "probe": "errors weighed by what they do to the predictions, by a forward pass for each part",
    "obs": "MLP channels chosen by OBS elimination instead of leverage scores",
    "joint-svd": "one SVD for a key/value head with all outputs of its group",
    "mixed-values": "value/output fitted to values as attention mixes them, outputs refitted",
    "two-sided": "query/key by SVD instead of channel selection where positions do not rotate",
    "rescale": "query/key pairs chosen and rescaled by least squares under rotary embeddings",
    "intercept": "the mean of what is lost goes into the bias where there is one",
}


@dataclass(frozen=True)
class LayerSizes:
    """Sizes of one layer: MLP width; per head RoPE pairs, unrotated q/k channels, value size."""

    mlp: int
    pairs: int
    passing: int
    values: int

    def entry(self, full: LayerSizes) -> dict[str, int]:
        """Return the layer's entry in the configuration: what differs from the full sizes."""
        entry = {}
        if self.mlp != full.mlp:
            entry["intermediate_size"] = self.mlp
        if (self.pairs, self.passing, self.values) != (full.pairs, full.passing, full.values):
            entry |= {
                "rope_pairs": self.pairs,
                "qk_pass": self.passing,
                "v_head_dim": self.values,
            }
        return entry


def default_step(width: int) -> int:
    """Return what MLP widths are multiples of: 128 on large models, less on small ones."""
    return next(step for step in (128, 64, 32, 16, 8, 4, 2, 1) if width >= 32 * step or step == 1)


def full_sizes(weights: LayerWeights, heads: Heads) -> LayerSizes:
    """Return the sizes of a layer as it is."""
    passing = heads.size - heads.rotated
    return LayerSizes(weights.down.shape[0], heads.rotated // 2, passing, heads.size)


def unit_costs(weights: LayerWeights, heads: Heads) -> dict[str, int]:
    """Return the parameters that one more of each size costs: a channel, pair or rank."""
    hidden = weights.down.shape[1]
    both = heads.queries + heads.keys
    qk = (
        hidden * both + _biases(weights.q_bias, heads.queries) + _biases(weights.k_bias, heads.keys)
    )
    mlp = hidden * (1 + len(weights.inputs)) + sum(b is not None for b in weights.input_biases)
    values = hidden * both + _biases(weights.v_bias, heads.keys)
    return {"mlp": mlp, "pairs": 2 * qk, "passing": qk, "values": values}


def _biases(bias: object, count: int) -> int:
    return 0 if bias is None else count


def check_ingredients(names: Iterable[str]) -> frozenset[str]:
    """Return all ingredients without those named; raises `UsageError` for an unknown one."""
    for name in names:
        if name not in INGREDIENTS:
            raise UsageError(
                f"{name!r} is nothing that can be left out",
                hint=f"use one of {', '.join(INGREDIENTS)}",
            )
    return frozenset(INGREDIENTS) - set(names)
