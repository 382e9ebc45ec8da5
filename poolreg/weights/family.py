"""Which models belong together: the identity of a config, and the check before averaging.

Models can be averaged when their tensors have the same names, dtypes and shapes, their configs
compute the same function of those tensors, and their tokenizers encode alike. The check works
on plain data, so that it serves folders and stored records alike.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from poolreg.errors import Incompatible

# What a folder's config says about where it came from, how it is loaded or what else it was
# used for; none of it changes the next-token distribution of the weights.
_VOLATILE = frozenset({
    "_name_or_path", "name_or_path", "_commit_hash", "transformers_version", "architectures",
    "dtype", "torch_dtype", "use_cache", "return_dict", "output_attentions",
    "output_hidden_states", "torchscript", "gradient_checkpointing", "id2label", "label2id",
    "problem_type", "task_specific_params", "finetuning_task", "chunk_size_feed_forward",
    "unsloth_version", "unsloth_fixed",
})  # fmt: skip

# What matters to training and generation only: part of a model's identity, but no reason
# against an average. Trainers write the special tokens' ids anew.
_TRAINING = frozenset({
    "bos_token_id", "eos_token_id", "pad_token_id", "initializer_range", "init_std", "layerdrop",
    "pretraining_tp", "output_router_logits", "router_aux_loss_coef", "router_jitter_noise",
})  # fmt: skip

# What equal names and shapes of tensors prove when only one config states it.
_PROVEN = frozenset({
    "attention_bias", "mlp_bias", "qkv_bias", "use_bias", "enable_bias", "head_dim",
    "layer_norm_elementwise_affine", "num_key_value_heads", "tie_word_embeddings",
})  # fmt: skip

# Settings of some architecture that are not off where its config leaves them out.
_ON_BY_DEFAULT = frozenset({
    "attention_softmax_in_fp32", "attn_temperature_tuning", "do_layer_norm_before", "gating",
    "learned_pos_emb", "mamba_norm_before_gate", "moe_renormalize", "multi_query", "no_bias",
    "norm_topk_prob", "parallel_attn", "residual_in_fp32", "rope_interleave",
    "scale_attention_softmax_in_fp32", "scale_attn_weights", "scale_embedding", "sliding_window",
    "use_parallel_residual", "use_qk_norm",
})  # fmt: skip

# Where older configs state what newer ones keep in rope_parameters.
_ROPE = {
    "rope_theta": "rope_theta",
    "rotary_emb_base": "rope_theta",
    "partial_rotary_factor": "partial_rotary_factor",
    "rotary_pct": "partial_rotary_factor",
}
_LENGTHS = ("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "seq_length")
_HEADS = ("lm_head.weight", "embed_out.weight")
_SHOWN = 3

_ONE_VERSION = (
    "only models trained from one seed can be averaged; if only the dtype or the version of "
    "transformers that saved them differs, load each with "
    "AutoModelForCausalLM.from_pretrained(FOLDER, dtype=…) and save it with save_pretrained"
)
_ONE_TOKENIZER = "if they were trained with one tokenizer, name its folder with --tokenizer"


@dataclass(frozen=True)
class Family:
    """What models must share: tensors (name to dtype and shape), config, tokenizer digest."""

    tensors: Mapping[str, tuple[str, tuple[int, ...]]]
    config: Mapping[str, Any]
    tokenizer: str | None


def canonical_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the config, nested ones included, without what does not change the model.

    Left out: paths, library versions, dtype, attention implementation, caching, output
    switches and labels. The rest stands as it was written. Applying it twice changes nothing.
    """
    return {
        key: canonical_config(value) if isinstance(value, Mapping) else value
        for key, value in config.items()
        if key not in _VOLATILE and "_implementation" not in key
    }


def context_length(config: Mapping[str, Any]) -> int | None:
    """Return how many tokens the model can attend to, or None where the config does not say."""
    for key in _LENGTHS:
        value = _stated(config, key)
        if type(value) is int and value > 0:
            return value
    return None


def vocab_size(config: Mapping[str, Any]) -> int | None:
    """Return the number of rows of the output layer, or None where the config does not say."""
    value = _stated(config, "vocab_size")
    return value if type(value) is int and value > 0 else None


def check_same_family(a: Family, b: Family, *, names: tuple[str, str]) -> None:
    """Raise `Incompatible` unless the two models can be averaged.

    `names` are what the message calls `a` and `b`. The error's `data` holds all differences:
    `tensors` and `config` (names) and `tokenizers` (both digests).
    """
    heads = _tying(a, b, names)
    tensors = [
        name for name in sorted({*a.tensors, *b.tensors}) if _layout(a, name) != _layout(b, name)
    ]
    left, right = _settings(a.config), _settings(b.config)
    settings = [key for key in _ordered(left | right) if _differs(key, left, right)]
    tokenizers = a.tokenizer != b.tokenizer
    if not (heads or tensors or settings or tokenizers):
        return
    reasons = [heads] if heads else []
    if tensors:
        reasons.append(_tensor_words(tensors[0], a, b, names) + _more(len(tensors) - 1, "tensor"))
    if settings:
        shown = [_setting_words(key, left, right, names) for key in settings[:_SHOWN]]
        reasons.append(", ".join(shown) + _more(len(settings) - _SHOWN, "setting"))
    if tokenizers:
        reasons.append(_tokenizer_words(a, b, names))
    raise Incompatible(
        f"{names[0]} and {names[1]} cannot be averaged: " + "; ".join(reasons),
        hint=_ONE_VERSION if heads or tensors or settings else _ONE_TOKENIZER,
        tensors=tensors,
        config=settings,
        tokenizers=(a.tokenizer, b.tokenizer),
    )


def _stated(config: Mapping[str, Any], key: str) -> Any:
    """Look up a setting in the config, else in its nested `text_config`."""
    inner = config.get("text_config")
    return config.get(key, inner.get(key) if isinstance(inner, Mapping) else None)


def _tying(a: Family, b: Family, names: tuple[str, str]) -> str:
    """Say which of the two has tied embeddings, if only one has; else nothing."""
    untied = [any(name.endswith(_HEADS) for name in family.tensors) for family in (a, b)]
    flags = [_stated(family.config, "tie_word_embeddings") for family in (a, b)]
    if untied[0] == untied[1]:
        if None in flags or flags[0] == flags[1]:
            return ""
        untied = [not flag for flag in flags]
    tied, other = names if untied[1] else names[::-1]
    return f"{tied} has tied input and output embeddings, {other} has not"


def _layout(family: Family, name: str) -> tuple[str, tuple[int, ...]] | None:
    found = family.tensors.get(name)
    return found and (found[0], tuple(found[1]))  # stored records hold shapes as lists


def _tensor_words(name: str, a: Family, b: Family, names: tuple[str, str]) -> str:
    here, there = _layout(a, name), _layout(b, name)
    if here and there:
        return (
            f"tensor {name} is {here[0]} {list(here[1])} in {names[0]} "
            f"but {there[0]} {list(there[1])} in {names[1]}"
        )
    dtype, shape = here or there or ("", ())
    owner, other = names if here else names[::-1]
    return f"tensor {name} ({dtype} {list(shape)}) stands in {owner} but not in {other}"


def _setting_words(
    key: str, left: Mapping[str, Any], right: Mapping[str, Any], names: tuple[str, str]
) -> str:
    here, there = (_shown(side[key]) if key in side else "absent" for side in (left, right))
    # A hostile key's control characters must not reach the terminal.
    return f"config {_shown(key)[1:-1]} is {here} in {names[0]} but {there} in {names[1]}"


def _tokenizer_words(a: Family, b: Family, names: tuple[str, str]) -> str:
    if a.tokenizer and b.tokenizer:
        return f"their tokenizers differ: {a.tokenizer[:12]} and {b.tokenizer[:12]}"
    owner, other = names if a.tokenizer else names[::-1]
    return f"{owner} has a tokenizer but {other} has none"


def _shown(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:55]} …{text[-1]}"


def _more(count: int, noun: str) -> str:
    if count <= 0:
        return ""
    return f" (and {count} more {noun}{'s differ' if count > 1 else ' differs'})"


def _ordered(keys: Mapping[str, Any]) -> list[str]:
    return sorted(keys, key=lambda key: (key != "model_type", key))


def _differs(key: str, left: Mapping[str, Any], right: Mapping[str, Any]) -> bool:
    """Tell whether a setting differs; what one side leaves out may stand for its default."""
    if key in left and key in right:
        return bool(left[key] != right[key])
    value, name = left.get(key, right.get(key)), key.rpartition(".")[2]
    if name == "layer_types":  # newer versions list what older ones took for granted
        return not isinstance(value, list) or set(map(str, value)) != {"full_attention"}
    return name not in _PROVEN and (bool(value) or name in _ON_BY_DEFAULT)


def _settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return what the function of the weights depends on: dotted names, one spelling each."""
    config = _one_spelling(canonical_config(config))
    inner = config.get("text_config")
    if isinstance(inner, dict):
        config["text_config"] = _one_spelling(inner)
    return {key: value for key, value in _flat(config) if _matters(key.rpartition(".")[2])}


def _matters(name: str) -> bool:
    # The summary head of GPT-2 and its kin belongs to classification.
    of_training = "dropout" in name or name.endswith("_pdrop") or name.startswith("summary_")
    return not of_training and name not in _TRAINING


def _flat(config: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    pairs: list[tuple[str, Any]] = []
    for key, value in config.items():
        nested = isinstance(value, Mapping) and value
        pairs += _flat(value, f"{prefix}{key}.") if nested else [(prefix + key, value)]
    return pairs


def _one_spelling(config: dict[str, Any]) -> dict[str, Any]:
    """Rewrite what transformers 4 and 5 spell differently: rotary embeddings, sliding windows."""
    config = dict(config)
    if config.get("use_sliding_window") is False:
        config.pop("sliding_window", None)
    rope: dict[str, Any] = {}
    for key in ("rope_parameters", "rope_scaling"):
        if isinstance(config.get(key), dict | None):
            rope |= config.pop(key, None) or {}
    for key, name in _ROPE.items():
        if key in config:
            rope.setdefault(name, config.pop(key))
    if rope:
        kind = rope.pop("type", "default")
        config["rope_parameters"] = {"rope_type": kind} | rope
    return config
