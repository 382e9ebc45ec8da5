"""Causal language models whose layers each have sizes of their own, for transformers.

A compressed model is a stock model (Llama, Qwen2, GPT-2, …) in which the MLPs are narrower and the
attention heads have fewer channels, by different amounts in each layer. Its configuration is the
stock one with another `model_type` ("poolreg_llama") and one more field, `layer_sizes`: a list with
one dictionary for each layer, in which a missing key means "as in the stock layer".

    intermediate_size   channels of the MLP between its projections
    rope_pairs          rotated pairs of channels kept of each query and key head
    qk_pass             channels of each query and key head that are not rotated
    v_head_dim          channels of each value head

A query or key head has 2 * rope_pairs + qk_pass channels: the first halves of its pairs, then their
second halves, then those that are not rotated. A layer that gives none of the last three keys has
the stock attention module; any other has a `CompressedAttention`. Embeddings, norms and the head
stay as they are, and so does the scale of the attention scores.

This file needs nothing but torch and transformers, because it is copied into exported folders, to
be loaded with trust_remote_code where poolreg is not installed. Importing it registers the families
with AutoConfig; the classes of a family are made when they are first asked for, because importing
the models of every family takes long.
"""

from __future__ import annotations

import functools
import sys
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import nn
from transformers import AutoConfig

PREFIX = "poolreg_"
ATTENTION_SIZES = ("rope_pairs", "qk_pass", "v_head_dim")
SIZES = ("intermediate_size", *ATTENTION_SIZES)


@dataclass(frozen=True)
class Family:
    """Where the modules and sizes of a stock architecture are."""

    config: str  # class names in transformers
    model: str
    layers: str = "model.layers"
    attention: str = "self_attn"  # in a layer; the fused projection is named like a plain one
    inputs: str = "q_proj"
    output: str = "o_proj"
    mlp: str = "mlp"
    up: tuple[str, ...] = ("gate_proj", "up_proj")
    down: str = "down_proj"
    width: str = "intermediate_size"  # in the configuration
    fused: str = ""  # "heads": q, k, v of each head in turn; "thirds": all q, then all k, all v
    rope: bool = True
    qk_norm: bool = False
    softcap: bool = False


FAMILIES = {
    "llama": Family("LlamaConfig", "LlamaForCausalLM"),
    "mistral": Family("MistralConfig", "MistralForCausalLM"),
    "qwen2": Family("Qwen2Config", "Qwen2ForCausalLM"),
    "qwen3": Family("Qwen3Config", "Qwen3ForCausalLM", qk_norm=True),
    "olmo2": Family("Olmo2Config", "Olmo2ForCausalLM", qk_norm=True),
    "gemma": Family("GemmaConfig", "GemmaForCausalLM"),
    "gemma2": Family("Gemma2Config", "Gemma2ForCausalLM", softcap=True),
    "gemma3_text": Family("Gemma3TextConfig", "Gemma3ForCausalLM", qk_norm=True),
    "opt": Family(
        "OPTConfig", "OPTForCausalLM", layers="model.decoder.layers", output="out_proj",
        mlp="", up=("fc1",), down="fc2", width="ffn_dim", rope=False,
    ),
    "gpt2": Family(
        "GPT2Config", "GPT2LMHeadModel", layers="transformer.h", attention="attn",
        inputs="c_attn", output="c_proj", up=("c_fc",), down="c_proj", width="n_inner", rope=False,
        fused="thirds",
    ),
    "gpt_neox": Family(
        "GPTNeoXConfig", "GPTNeoXForCausalLM", layers="gpt_neox.layers", attention="attention",
        inputs="query_key_value", output="dense", up=("dense_h_to_4h",), down="dense_4h_to_h",
        fused="heads",
    ),
}  # fmt: skip


# -- sizes ---------------------------------------------------------------------------------------


def family_of(model_type: str) -> Family:
    """Return the family of a stock or compressed model type; ValueError if there is none."""
    name = model_type.removeprefix(PREFIX)
    if name not in FAMILIES:
        known = ", ".join(FAMILIES)
        raise ValueError(f"models of type {name!r} cannot be compressed; known are {known}")
    return FAMILIES[name]


def stock_sizes(config: Any) -> dict[str, int]:
    """Return the four sizes of every layer of the stock model with this configuration.

    The configuration may also be that of a compressed model. Raises ValueError for a family that
    is not known.
    """
    family = family_of(config.model_type)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    rotated = 0
    if family.rope:
        rotated = int(head_dim * config.rope_parameters.get("partial_rotary_factor", 1.0))
    pairs = (rotated + 1) // 2  # an odd number is rounded up where the frequencies are computed
    return {
        # GPT-2's n_inner is None for the usual four times the hidden size
        "intermediate_size": getattr(config, family.width) or 4 * config.hidden_size,
        "rope_pairs": pairs,
        "qk_pass": head_dim - 2 * pairs,
        "v_head_dim": head_dim,
    }


def whole_sizes(config: Any) -> list[dict[str, int]]:
    """Return the four sizes of each layer, those that `layer_sizes` leaves out filled in.

    Raises ValueError for sizes that cannot be: another number of layers, an unknown key, a size
    that is no positive integer or larger than the stock layer's, and sliced queries and keys in a
    family that normalises them (the norm would change).
    """
    stock = stock_sizes(config)
    given, layers = config.layer_sizes, config.num_hidden_layers
    if given is None:
        return [stock] * layers
    if not isinstance(given, list | tuple) or len(given) != layers:
        raise ValueError(f"layer_sizes must be a list of {layers} dictionaries, one for each layer")
    qk_norm = family_of(config.model_type).qk_norm
    return [_checked(index, sizes, stock, qk_norm=qk_norm) for index, sizes in enumerate(given)]


def _checked(index: int, sizes: Any, stock: dict[str, int], *, qk_norm: bool) -> dict[str, int]:
    what = f"layer_sizes of layer {index}"
    if not isinstance(sizes, dict) or not sizes.keys() <= stock.keys():
        raise ValueError(f"{what} must be a dictionary with no keys but {', '.join(SIZES)}")
    for key, size in sizes.items():
        least = 0 if key in ("rope_pairs", "qk_pass") else 1
        if type(size) is not int or not least <= size <= stock[key]:
            raise ValueError(f"{what}: {key} is {size!r}, not from {least} to {stock[key]}")
    whole = stock | sizes
    if whole["rope_pairs"] + whole["qk_pass"] == 0:
        raise ValueError(f"{what}: rope_pairs and qk_pass leave nothing of the queries and keys")
    if qk_norm and any(whole[key] != stock[key] for key in ("rope_pairs", "qk_pass")):
        raise ValueError(
            f"{what}: this family normalises queries and keys, so rope_pairs must stay "
            f"{stock['rope_pairs']} and qk_pass {stock['qk_pass']}"
        )
    return whole


# -- modules -------------------------------------------------------------------------------------


class CompressedAttention(nn.Module):
    """The attention of every family, with head sizes of its own.

    The projections are separate also where the stock module fuses them: q_proj, k_proj, v_proj and
    o_proj, with the stock module's biases, and its q_norm and k_norm. Where not all pairs are kept,
    the buffer `rope_pairs`, int64 [key/value heads, pairs kept], tells which pairs of the stock
    head they are; each keeps its own frequency.
    """

    rope_pairs: torch.Tensor | None

    def __init__(self, stock: Any, family: Family, config: Any, sizes: dict[str, int]) -> None:
        super().__init__()
        self.config = config
        self.layer_idx = stock.layer_idx
        self.is_causal = stock.is_causal
        self.scaling = stock.scaling
        self.num_key_value_groups = getattr(stock, "num_key_value_groups", 1)
        dropout = getattr(config, "attn_pdrop", 0.0)
        self.attention_dropout = getattr(config, "attention_dropout", dropout)
        # Mistral's attention has no sliding_window of its own: all its layers have the same.
        window = getattr(config, "sliding_window", None)
        self.sliding_window = getattr(stock, "sliding_window", window)
        self.softcap = config.attn_logit_softcapping if family.softcap else None
        self.qk_head_dim = 2 * sizes["rope_pairs"] + sizes["qk_pass"]
        self.v_head_dim = sizes["v_head_dim"]

        heads = config.num_attention_heads
        kv_heads = heads // self.num_key_value_groups
        hidden, inputs, output = (
            config.hidden_size, getattr(stock, family.inputs), getattr(stock, family.output)
        )  # fmt: skip
        self.q_proj = _linear(hidden, heads * self.qk_head_dim, like=inputs)
        self.k_proj = _linear(hidden, kv_heads * self.qk_head_dim, like=inputs)
        self.v_proj = _linear(hidden, kv_heads * self.v_head_dim, like=inputs)
        self.o_proj = _linear(heads * self.v_head_dim, hidden, like=output)
        self.q_norm = getattr(stock, "q_norm", None)
        self.k_norm = getattr(stock, "k_norm", None)
        self.resid_dropout = getattr(stock, "resid_dropout", nn.Identity())

        pairs = None
        if sizes["rope_pairs"] < stock_sizes(config)["rope_pairs"]:
            pairs = torch.arange(sizes["rope_pairs"], device=inputs.weight.device)
            pairs = pairs.repeat(kv_heads, 1)
        self.register_buffer("rope_pairs", pairs)
        # A tuple, lest a function that a kernel has replaced is taken for a submodule.
        module = sys.modules[type(stock).__module__]
        self.stock = (module.eager_attention_forward, getattr(module, "apply_rotary_pos_emb", None))

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        position_embeddings: tuple[torch.Tensor, torch.Tensor] | None = None,
        past_key_values: Any = None,
        layer_past: Any = None,  # GPT-NeoX's name for past_key_values
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return the output [batch, tokens, hidden] and, of eager attention, the weights."""
        query = self._heads(self.q_proj(hidden_states), self.q_norm, self.qk_head_dim)
        key = self._heads(self.k_proj(hidden_states), self.k_norm, self.qk_head_dim)
        value = self._heads(self.v_proj(hidden_states), None, self.v_head_dim)
        eager, apply_rotary = self.stock
        if self.rope_pairs is not None:
            query, key = self._rotated(query, key, position_embeddings)
        elif position_embeddings is not None and apply_rotary is not None:
            query, key = apply_rotary(query, key, *position_embeddings)

        cache = layer_past if past_key_values is None else past_key_values
        if cache is not None:
            key, value = cache.update(key, value, self.layer_idx)
        # set_attn_implementation looks for this very call in the text of this file.
        attend = transformers.modeling_utils.ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager
        )
        options = {"softcap": self.softcap} if self.softcap is not None else {}
        output, weights = attend(
            self, query, key, value, attention_mask,
            dropout=self.attention_dropout if self.training else 0.0, scaling=self.scaling,
            sliding_window=self.sliding_window, **options, **kwargs,
        )  # fmt: skip
        output = self.o_proj(output.reshape(*hidden_states.shape[:-1], -1).contiguous())
        return self.resid_dropout(output), weights

    def _heads(self, states: torch.Tensor, norm: Any, head_dim: int) -> torch.Tensor:
        """Return [batch, heads, tokens, head_dim] of a projection's output, normalised."""
        batch_and_tokens = states.shape[:-1]
        if norm is not None:
            # Over a head in Qwen3 and Gemma 3, over all heads in OLMo 2.
            states = norm(states.view(*batch_and_tokens, -1, norm.weight.shape[0]))
        return states.view(*batch_and_tokens, -1, head_dim).transpose(1, 2)

    def _rotated(self, query: torch.Tensor, key: torch.Tensor, embeddings: Any) -> Any:
        """Rotate the kept pairs of each head by their own angles."""
        # Both halves of the stock [batch, tokens, 2 * pairs] are the same, so the pairs' indices
        # select from the first: [batch, kv heads, tokens, pairs kept].
        cos, sin = (table[..., self.rope_pairs].transpose(1, 2) for table in embeddings)
        groups = self.num_key_value_groups
        rotated = _rotate(key, cos, sin)
        cos, sin = (table.repeat_interleave(groups, dim=1) for table in (cos, sin))
        return _rotate(query, cos, sin), rotated


def _rotate(states: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    pairs = cos.shape[-1]
    x, y, rest = states[..., :pairs], states[..., pairs : 2 * pairs], states[..., 2 * pairs :]
    turned = torch.cat([x * cos - y * sin, y * cos + x * sin], dim=-1)
    return torch.cat([turned.to(states.dtype), rest], dim=-1)


def _linear(inputs: int, outputs: int, *, like: Any) -> nn.Linear:
    """Return a linear layer with a bias if `like` has one."""
    weight = like.weight
    bias = like.bias is not None
    return nn.Linear(inputs, outputs, bias=bias, device=weight.device, dtype=weight.dtype)


def _resized(stock: Any, inputs: int, outputs: int) -> nn.Module:
    """Return a projection of the stock one's kind: nn.Linear, or GPT-2's Conv1D."""
    if isinstance(stock, nn.Linear):
        return _linear(inputs, outputs, like=stock)
    resized: nn.Module = type(stock)(outputs, inputs)
    return resized.to(device=stock.weight.device, dtype=stock.weight.dtype)


class Compressed(nn.Module):
    """What makes a compressed model of a stock one: its layers are resized once it is built."""

    _supports_flash_attn = False  # it wants queries, keys and values of one size

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        whole_sizes(config)  # before anything is built
        super().__init__(config, *args, **kwargs)
        layers: Any = self.get_submodule(family_of(config.model_type).layers)
        for layer, sizes in zip(layers, config.layer_sizes or [], strict=False):
            resize_layer(layer, config, sizes)
        # Only what is new is initialised: the rest bears a mark that it has been.
        self.init_weights()  # type: ignore[operator]


def resize_layer(layer: nn.Module, config: Any, sizes: dict[str, int]) -> None:
    """Replace a stock layer's modules that `sizes` wants smaller by untrained ones.

    `config` is that of the model, stock or compressed; sizes are those of one layer, checked.
    """
    family, stock = family_of(config.model_type), stock_sizes(config)
    whole = stock | sizes
    mlp: Any = layer.get_submodule(family.mlp)
    hidden, width = config.hidden_size, whole["intermediate_size"]
    if width != stock["intermediate_size"]:
        for name in family.up:
            setattr(mlp, name, _resized(getattr(mlp, name), hidden, width))
        setattr(mlp, family.down, _resized(getattr(mlp, family.down), width, hidden))
    if sizes.keys() & set(ATTENTION_SIZES):
        attention = getattr(layer, family.attention)
        setattr(layer, family.attention, CompressedAttention(attention, family, config, whole))


# -- the classes of the families, and how transformers finds them ---------------------------------


def _class_names(family: Family) -> tuple[str, str]:
    return f"Compressed{family.config}", f"Compressed{family.model}"


def __getattr__(name: str) -> Any:
    """Make the class of that name, CompressedLlamaConfig for instance."""
    for model_type, family in FAMILIES.items():
        config, model = _class_names(family)
        if name == config:
            return globals().setdefault(name, _config_class(model_type, family))
        if name == model:
            stock = getattr(transformers, family.model)
            body = {"config_class": _class(config), "__module__": __name__}
            return globals().setdefault(name, type(name, (Compressed, stock), body))
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def _class(name: str) -> Any:
    return getattr(sys.modules[__name__], name)


def _config_class(model_type: str, family: Family) -> type:
    stock = getattr(transformers, family.config)

    def __post_init__(self: Any, **kwargs: Any) -> None:
        # Whoever wants a model or a tokenizer of the family begins with its configuration.
        stock.__post_init__(self, **kwargs)
        _register_family(model_type)

    body = {
        "model_type": PREFIX + model_type,
        "layer_sizes": None,
        "__annotations__": {"layer_sizes": list | None},
        "__post_init__": __post_init__,
        "__module__": __name__,
    }
    return type(_class_names(family)[0], (stock,), body)


@functools.cache
def _register_family(model_type: str) -> None:
    """Let AutoModelForCausalLM know a family's model, and AutoTokenizer choose as for the stock."""
    from transformers.models.auto import tokenization_auto as auto

    family = FAMILIES[model_type]
    config, model = map(_class, _class_names(family))
    transformers.AutoModelForCausalLM.register(config, model, exist_ok=True)
    # The class of a tokenizer depends on the name of the model's type as well as on the mapping.
    names = auto.TOKENIZER_MAPPING_NAMES
    names[PREFIX + model_type] = names.get(model_type)
    misnamed = auto.MODELS_WITH_INCORRECT_HUB_TOKENIZER_CLASS
    if model_type in misnamed:
        misnamed.add(PREFIX + model_type)
    tokenizer = auto.TOKENIZER_MAPPING.get(getattr(transformers, family.config), None)
    if tokenizer is not None:
        auto.AutoTokenizer.register(config, tokenizer, exist_ok=True)


def register() -> None:
    """Let AutoConfig, and through it the other automatic classes, know the compressed models."""
    for model_type, family in FAMILIES.items():
        AutoConfig.register(PREFIX + model_type, _class(_class_names(family)[0]), exist_ok=True)


def compressed_config(stock_config: Any, layer_sizes: list[dict[str, int]]) -> Any:
    """Return the configuration of a compressed model, with all fields of a stock model's.

    Raises ValueError for a family that is not known and for sizes that cannot be.
    """
    name, _ = _class_names(family_of(stock_config.model_type))
    values = stock_config.to_dict()
    for key in ("model_type", "architectures", "auto_map", "transformers_version"):
        values.pop(key, None)
    config = _class(name)(**values | {"layer_sizes": layer_sizes})
    whole_sizes(config)
    return config


def config_entries(model_type: str) -> dict[str, Any]:
    """Return what the config.json of an exported folder says for those without poolreg.

    It names the classes in a copy of this file, modeling_poolreg.py, that is to lie beside it.
    """
    config, model = _class_names(family_of(model_type))
    auto_map = {"AutoConfig": config, "AutoModelForCausalLM": model}
    return {
        "architectures": [model],
        "auto_map": {auto: f"modeling_poolreg.{name}" for auto, name in auto_map.items()},
    }


register()
