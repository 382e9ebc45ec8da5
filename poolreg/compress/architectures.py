"""A layer's weights in one orientation for all families.

The names of modules come from `FAMILIES` in poolreg/models/modeling_poolreg.py: to teach poolreg
another family, add a row there. All of compression reads and writes `LayerWeights`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from poolreg.errors import Incompatible
from poolreg.models.modeling_poolreg import FAMILIES, PREFIX, Family, stock_sizes


@dataclass(frozen=True)
class Heads:
    """The sizes of one layer's attention: query heads, key/value heads, D, rotated channels."""

    queries: int
    keys: int
    size: int
    rotated: int

    @property
    def group(self) -> int:
        """Query heads per key/value head."""
        return self.queries // self.keys


@dataclass(eq=False)
class LayerWeights:
    """A layer's weights, all for x·W: q [d, h·D], k and v [d, h_kv·D], o [h·D, d], MLP inputs
    [d, m] each, down [m, d]; biases [outputs] or None. Float64 while they are worked on."""

    q: Tensor
    k: Tensor
    v: Tensor
    o: Tensor
    inputs: list[Tensor]
    down: Tensor
    q_bias: Tensor | None
    k_bias: Tensor | None
    v_bias: Tensor | None
    o_bias: Tensor | None
    input_biases: list[Tensor | None]
    down_bias: Tensor | None


def family(model_type: str) -> Family:
    """Return the names of a family; raises `Incompatible`, saying what to add, for another."""
    if model_type.startswith(PREFIX):
        raise Incompatible(
            "the model is a compressed variant already", hint="compress the model it was made from"
        )
    if model_type not in FAMILIES:
        raise Incompatible(
            f"compression does not know the weight names of {model_type!r} models",
            hint=f"it knows {', '.join(FAMILIES)}; another family needs a row in FAMILIES of "
            "poolreg/models/modeling_poolreg.py",
        )
    return FAMILIES[model_type]


def layers(model: nn.Module, names: Family) -> list[nn.Module]:
    """Return the model's layers in order."""
    found: Any = model.get_submodule(names.layers)
    return list(found)


def projection(layer: nn.Module, names: Family, role: str) -> nn.Module:
    """Return the module of a layer that is its "output" or "down" projection."""
    if role == "output":
        return layer.get_submodule(names.attention).get_submodule(names.output)
    return layer.get_submodule(names.mlp).get_submodule(names.down)


def heads(config: Any) -> Heads:
    """Return the attention sizes of every layer of a stock model."""
    sizes = stock_sizes(config)
    keys = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    return Heads(config.num_attention_heads, keys, sizes["v_head_dim"], 2 * sizes["rope_pairs"])


def read_layer(layer: nn.Module, names: Family, sizes: Heads) -> LayerWeights:
    """Return a stock layer's weights in float64, for x·W, fused projections taken apart."""
    attention, mlp = (layer.get_submodule(n) for n in (names.attention, names.mlp))
    if names.fused:
        fused = attention.get_submodule(names.inputs)
        (q, qb), (k, kb), (v, vb) = _taken_apart(fused, names, sizes)
    else:
        projections = (getattr(attention, name) for name in ("q_proj", "k_proj", "v_proj"))
        (q, qb), (k, kb), (v, vb) = map(_oriented, projections)
    o, ob = _oriented(projection(layer, names, "output"))
    down, down_bias = _oriented(projection(layer, names, "down"))
    inputs = [_oriented(getattr(mlp, name)) for name in names.up]
    return LayerWeights(
        q, k, v, o, [w for w, _ in inputs], down, qb, kb, vb, ob, [b for _, b in inputs], down_bias
    )


def _oriented(module: nn.Module) -> tuple[Tensor, Tensor | None]:
    weight: Any = module.weight
    if isinstance(module, nn.Linear):
        weight = weight.mT
    bias: Any = module.bias
    return weight.detach().double(), None if bias is None else bias.detach().double()


def _taken_apart(
    module: nn.Module, names: Family, sizes: Heads
) -> list[tuple[Tensor, Tensor | None]]:
    """Cut a fused projection's outputs into those of q, k and v."""
    weight, bias = _oriented(module)
    biases = [None] * 3 if bias is None else split_fused(bias, names, sizes)
    parts = [part.flatten(-2) for part in split_fused(weight, names, sizes)]
    return list(zip(parts, [b if b is None else b.flatten() for b in biases], strict=True))


def split_fused(outputs: Tensor, names: Family, sizes: Heads) -> list[Tensor]:
    """Cut outputs [..., 3·h·D] of a fused projection into q, k and v, [..., h, D] each."""
    if names.fused == "heads":  # q, k, v of each head in turn
        return list(outputs.unflatten(-1, (sizes.queries, 3, sizes.size)).unbind(-2))
    return list(outputs.unflatten(-1, (3, sizes.queries, sizes.size)).unbind(-3))


def block_parameters(weights: LayerWeights) -> int:
    """Return the number of parameters of a layer's attention and MLP."""
    tensors = [
        weights.q, weights.k, weights.v, weights.o, weights.down, *weights.inputs, weights.q_bias,
        weights.k_bias, weights.v_bias, weights.o_bias, weights.down_bias, *weights.input_biases,
    ]  # fmt: skip
    return sum(tensor.numel() for tensor in tensors if tensor is not None)
