"""Which models may be averaged: configs as versions of transformers write them, and messages."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from poolreg.canonical import canonical_json
from poolreg.errors import Incompatible
from poolreg.weights.family import (
    Family,
    canonical_config,
    check_same_family,
    context_length,
    vocab_size,
)

BASE: dict[str, Any] = {"model_type": "llama", "hidden_size": 8, "num_attention_heads": 2}
TENSORS: dict[str, tuple[str, tuple[int, ...]]] = {
    "a.weight": ("F32", (2, 3)),
    "b.weight": ("F32", (4,)),
    "c.weight": ("BF16", ()),
}


def family(
    tensors: Any = None, config: dict[str, Any] | None = None, tokenizer: str | None = "a" * 64
) -> Family:
    return Family(TENSORS if tensors is None else tensors, BASE | (config or {}), tokenizer)


def check(a: Family, b: Family) -> None:
    """Check both ways: what is said must not depend on the order."""
    caught: list[Incompatible] = []
    for pair in ((a, b), (b, a)):
        try:
            check_same_family(*pair, names=("one", "two"))
        except Incompatible as error:
            caught.append(error)
    if caught:
        assert len(caught) == 2
        assert caught[0].data["tensors"] == caught[1].data["tensors"]
        assert caught[0].data["config"] == caught[1].data["config"]
        raise caught[0]


def difference(a: Family, b: Family) -> Incompatible:
    with pytest.raises(Incompatible) as caught:
        check(a, b)
    assert caught.value.hint
    return caught.value


# -------------------------------------------------------------------------------------- configs


def test_canonical_config_drops_only_what_changes_nothing() -> None:
    volatile = {
        "_name_or_path": "/home/x", "transformers_version": "4.1", "torch_dtype": "float16",
        "dtype": "float32", "use_cache": False, "_commit_hash": "0", "return_dict": True,
        "_attn_implementation": "sdpa", "_attn_implementation_autoset": True,
        "id2label": {"0": "LABEL_0"}, "architectures": ["LlamaForCausalLM"],
    }  # fmt: skip
    kept = {"rope_theta": 10000.0, "sliding_window": None, "rope_scaling": {"type": "linear"}}
    config = BASE | volatile | kept | {"text_config": volatile | {"hidden_size": 3}}
    assert canonical_config(config) == BASE | kept | {"text_config": {"hidden_size": 3}}


json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-5, 5) | st.text(max_size=3),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3)
    ),
    max_leaves=8,
)
keys = st.sampled_from(
    ["dtype", "use_cache", "rope_theta", "rope_scaling", "text_config", "x.y", "type"]
)
configs = st.dictionaries(keys, json_values, max_size=6)


@given(configs)
def test_canonical_config_is_idempotent_and_a_family_matches_itself(config: dict[str, Any]) -> None:
    before = canonical_json(config)
    once = canonical_config(config)
    assert canonical_config(once) == once
    check(family(config=config), family(config=once))
    assert canonical_json(config) == before


@given(configs, configs)
def test_the_check_does_not_depend_on_the_order(a: dict[str, Any], b: dict[str, Any]) -> None:
    with contextlib.suppress(Incompatible):  # `check` compares what both orders say
        check(family(config=a), family(config=b))


@pytest.mark.parametrize(
    ("config", "length"),
    [
        ({"max_position_embeddings": 2048}, 2048),
        ({"n_positions": 1024, "n_ctx": 512}, 1024),
        ({"n_ctx": 512}, 512),
        ({"max_seq_len": 16}, 16),
        ({"seq_length": 8}, 8),
        ({"text_config": {"max_position_embeddings": 99}}, 99),
        ({"max_position_embeddings": None, "n_ctx": 7}, 7),
        ({"max_position_embeddings": -1}, None),
        ({"max_position_embeddings": True}, None),
        ({"max_position_embeddings": "2048"}, None),
        ({"text_config": 3}, None),
        ({}, None),
    ],
)
def test_context_length(config: dict[str, Any], length: int | None) -> None:
    assert context_length(config) == length


def test_vocab_size() -> None:
    assert vocab_size({"vocab_size": 5}) == 5
    assert vocab_size({"text_config": {"vocab_size": 6}}) == 6
    assert vocab_size({"vocab_size": 0}) is None
    assert vocab_size({}) is None


# The configs of well-known models as their authors published them with transformers 4 (sizes
# made small). Saved again by the present version they must stay in the family.
PUBLISHED: dict[str, dict[str, Any]] = {
    "smollm": {
        "model_type": "llama", "attention_bias": False, "attention_dropout": 0.0,
        "bos_token_id": 0, "eos_token_id": 0, "hidden_act": "silu", "hidden_size": 24,
        "initializer_range": 0.04, "intermediate_size": 32, "max_position_embeddings": 64,
        "num_attention_heads": 3, "num_hidden_layers": 2, "num_key_value_heads": 3,
        "pad_token_id": None, "pretraining_tp": 1, "rms_norm_eps": 1e-05, "rope_scaling": None,
        "rope_interleaved": False, "is_llama_config": True, "rope_theta": 10000,
        "tie_word_embeddings": True, "torch_dtype": "bfloat16", "use_cache": True,
        "transformers_version": "4.42.3", "vocab_size": 128,
    },
    "llama 3.1": {
        "model_type": "llama", "attention_bias": False, "eos_token_id": [1, 2], "hidden_size": 24,
        "hidden_act": "silu", "intermediate_size": 32, "max_position_embeddings": 131072,
        "mlp_bias": False, "num_attention_heads": 4, "num_hidden_layers": 2,
        "num_key_value_heads": 2, "rms_norm_eps": 1e-05, "rope_theta": 500000.0,
        "rope_scaling": {
            "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192, "rope_type": "llama3",
        },
        "tie_word_embeddings": False, "vocab_size": 128,
    },
    "gpt2": {
        "model_type": "gpt2", "activation_function": "gelu_new", "attn_pdrop": 0.1,
        "bos_token_id": 7, "eos_token_id": 7, "layer_norm_epsilon": 1e-05, "n_ctx": 64,
        "n_embd": 24, "n_head": 2, "n_layer": 2, "n_positions": 64, "scale_attn_weights": True,
        "summary_type": "cls_index", "task_specific_params": {"text-generation": {}},
        "vocab_size": 128,
    },
    "pythia": {
        "model_type": "gpt_neox", "classifier_dropout": 0.1, "hidden_act": "gelu",
        "hidden_size": 24, "intermediate_size": 32, "layer_norm_eps": 1e-05,
        "max_position_embeddings": 64, "num_attention_heads": 2, "num_hidden_layers": 2,
        "rotary_emb_base": 10000, "rotary_pct": 0.25, "tie_word_embeddings": False,
        "torch_dtype": "float16", "use_parallel_residual": True, "vocab_size": 128,
    },
    "qwen2": {
        "model_type": "qwen2", "attention_dropout": 0.0, "hidden_act": "silu", "hidden_size": 24,
        "intermediate_size": 32, "max_position_embeddings": 64, "max_window_layers": 2,
        "num_attention_heads": 2, "num_hidden_layers": 2, "num_key_value_heads": 2,
        "rms_norm_eps": 1e-06, "rope_theta": 1000000.0, "sliding_window": 32,
        "use_sliding_window": False, "use_mrope": False, "tie_word_embeddings": True,
        "vocab_size": 128,
    },
    "mistral": {
        "model_type": "mistral", "hidden_act": "silu", "hidden_size": 24, "intermediate_size": 32,
        "max_position_embeddings": 64, "num_attention_heads": 2, "num_hidden_layers": 2,
        "num_key_value_heads": 1, "rms_norm_eps": 1e-05, "rope_theta": 10000.0,
        "sliding_window": 4096, "tie_word_embeddings": False, "vocab_size": 128,
    },
    "olmo": {
        "model_type": "olmo", "attention_bias": False, "clip_qkv": None, "hidden_act": "silu",
        "hidden_size": 24, "intermediate_size": 32, "max_position_embeddings": 64,
        "num_attention_heads": 2, "num_hidden_layers": 2, "num_key_value_heads": 2,
        "rope_scaling": None, "rope_theta": 10000.0, "tie_word_embeddings": True,
        "vocab_size": 128,
    },
    "opt": {
        "model_type": "opt", "_name_or_path": "facebook/opt-125m", "activation_function": "relu",
        "do_layer_norm_before": True, "dropout": 0.1, "ffn_dim": 32, "hidden_size": 24,
        "init_std": 0.02, "layerdrop": 0.0, "max_position_embeddings": 64,
        "num_attention_heads": 2, "num_hidden_layers": 2, "prefix": "</s>", "vocab_size": 128,
        "word_embed_proj_dim": 24,
    },
}  # fmt: skip


@pytest.mark.parametrize("name", sorted(PUBLISHED))
def test_saved_again_by_another_version_is_one_family(name: str, tmp_path: Path) -> None:
    import json

    from transformers import AutoConfig

    old = PUBLISHED[name]
    (tmp_path / "config.json").write_text(json.dumps(old))
    AutoConfig.from_pretrained(tmp_path).save_pretrained(tmp_path / "new")
    new = json.loads((tmp_path / "new" / "config.json").read_text())
    assert canonical_config(new) != canonical_config(old)
    check(Family(TENSORS, old, None), Family(TENSORS, new, None))
    for key in ("hidden_size", "n_embd"):
        if key in new:
            error = difference(Family(TENSORS, old, None), Family(TENSORS, new | {key: 48}, None))
            assert error.data["config"] == [key]


ROPE = {"rope_theta": 10000.0, "rope_type": "default"}


@pytest.mark.parametrize(
    ("a", "b"),
    [
        ({"rope_theta": 10000}, {"rope_parameters": ROPE}),
        ({"rope_scaling": {"type": "yarn", "factor": 2}},
         {"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}),
        ({"text_config": {"rope_theta": 1e4}}, {"text_config": {"rope_parameters": ROPE}}),
        ({"attention_dropout": 0.1}, {"attention_dropout": 0.0}),
        ({"resid_pdrop": 0.1}, {}),
        ({"bos_token_id": 1, "pad_token_id": None}, {"bos_token_id": 2, "pad_token_id": 0}),
        ({"layer_types": ["full_attention", "full_attention"]}, {}),
        ({"head_dim": 4}, {}),
        ({"is_decoder": False, "n_inner": None}, {}),
        ({"tie_word_embeddings": True}, {}),
    ],
)  # fmt: skip
def test_settings_that_agree(a: dict[str, Any], b: dict[str, Any]) -> None:
    check(family(config=a), family(config=b))


@pytest.mark.parametrize(
    ("a", "b", "keys"),
    [
        ({"model_type": "qwen2"}, {}, ["model_type"]),
        ({"rope_theta": 1e4}, {"rope_theta": 1e6}, ["rope_parameters.rope_theta"]),
        ({"rope_theta": 1e4}, {"rope_parameters": ROPE | {"rope_theta": 1e6}},
         ["rope_parameters.rope_theta"]),
        ({"rope_theta": 1e4, "rope_scaling": {"type": "yarn", "factor": 2.0}},
         {"rope_theta": 1e4}, ["rope_parameters.factor", "rope_parameters.rope_type"]),
        ({"rope_scaling": "odd"}, {}, ["rope_scaling"]),
        ({"sliding_window": 4096}, {}, ["sliding_window"]),
        ({"sliding_window": None}, {}, ["sliding_window"]),
        ({"use_parallel_residual": False}, {}, ["use_parallel_residual"]),
        ({"norm_topk_prob": True}, {}, ["norm_topk_prob"]),
        ({"num_attention_heads": 4}, {}, ["num_attention_heads"]),
        ({"layer_types": ["sliding_attention"]}, {}, ["layer_types"]),
        ({"head_dim": 4}, {"head_dim": 2}, ["head_dim"]),
        ({"auto_map": {"AutoConfig": "x.X"}}, {}, ["auto_map.AutoConfig"]),
        ({"text_config": {"hidden_size": 4}}, {"text_config": {"hidden_size": 5}},
         ["text_config.hidden_size"]),
    ],
)  # fmt: skip
def test_settings_that_differ(a: dict[str, Any], b: dict[str, Any], keys: list[str]) -> None:
    assert difference(family(config=a), family(config=b)).data["config"] == keys


def test_the_message_shows_some_settings_and_counts_the_rest() -> None:
    error = difference(
        family(config={f"s{i}": i + 1 for i in range(5)} | {"z": "x" * 500}),
        family(config={"s0": 9, "model_type": "gpt2"}),
    )
    assert 'config model_type is "llama" in one but "gpt2" in two' in error.message
    assert "config s0 is 1 in one but 9 in two" in error.message
    assert "config s1 is 2 in one but absent in two (and 4 more settings differ)" in error.message
    assert len(error.message) < 400


def test_the_message_is_safe_to_print() -> None:
    error = difference(family(config={"\x1b[31m": "\x1b[0m", "k" * 999: 1}), family())
    assert error.message.isprintable()
    assert len(error.message) < 300


# -------------------------------------------------------------------------------------- tensors


def test_equal_families_pass_and_stored_shapes_may_be_lists() -> None:
    stored = {name: [dtype, list(shape)] for name, (dtype, shape) in TENSORS.items()}
    check(family(), family(stored))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"b.weight": ("F32", (5,))}, "tensor b.weight is F32 [4] in one but F32 [5] in two"),
        ({"c.weight": ("F16", ())}, "tensor c.weight is BF16 [] in one but F16 [] in two"),
        ({"d": ("F32", (1,))}, "tensor d (F32 [1]) stands in two but not in one"),
        (
            {"a.weight": ("F32", (3, 2)), "b.weight": ("F16", (4,)), "0": ("I8", ())},
            "tensor 0 (I8 []) stands in two but not in one (and 2 more tensors differ)",
        ),
    ],
)
def test_tensors_that_differ(change: dict[str, Any], words: str) -> None:
    error = difference(family(), family(TENSORS | change))
    assert words in error.message
    assert error.data["tensors"] == sorted(change)
    assert error.data["config"] == []


def test_transposed_shapes_are_different() -> None:
    assert difference(family(), family(TENSORS | {"a.weight": ("F32", (3, 2))}))


# ---------------------------------------------------------------------------- tied and tokenizer


@pytest.mark.parametrize("head", ["lm_head.weight", "embed_out.weight"])
def test_tied_against_untied_is_said(head: str) -> None:
    untied = family(TENSORS | {head: ("F32", (2, 3))}, {"tie_word_embeddings": False})
    tied = family(config={"tie_word_embeddings": True})
    assert "two has tied input and output embeddings, one has not" in (
        difference(untied, tied).message
    )
    assert "one has tied input and output embeddings, two has not" in (
        difference(tied, untied).message
    )


def test_tied_by_config_alone() -> None:
    both = TENSORS | {"lm_head.weight": ("F32", (2, 3))}
    error = difference(
        family(both, {"tie_word_embeddings": False}), family(both, {"tie_word_embeddings": True})
    )
    assert "two has tied input and output embeddings, one has not" in error.message
    nested = {"text_config": {"tie_word_embeddings": True}}
    error = difference(family(both, {"tie_word_embeddings": False}), family(both, nested))
    assert "two has tied" in error.message


def test_two_tokenizers() -> None:
    error = difference(family(), family(tokenizer="b" * 64))
    assert "their tokenizers differ: aaaaaaaaaaaa and bbbbbbbbbbbb" in error.message
    assert error.data["tokenizers"] == ("a" * 64, "b" * 64)
    assert "--tokenizer" in error.hint


def test_one_tokenizer_missing() -> None:
    error = difference(family(), family(tokenizer=None))
    assert "one has a tokenizer but two has none" in error.message
    check(family(tokenizer=None), family(tokenizer=None))


def test_all_reasons_stand_in_one_message() -> None:
    other = family(TENSORS | {"b.weight": ("F16", (4,))}, {"hidden_size": 9}, "b" * 64)
    message = difference(family(), other).message
    assert "tensor b.weight" in message
    assert "config hidden_size" in message
    assert "their tokenizers differ" in message
