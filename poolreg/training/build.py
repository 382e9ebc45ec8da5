"""New models: from the `[model]` settings of a recipe to a network with random weights.

The keys belong to transformers, which ignores those that it does not know. Here they are
refused, and so is a network that sees the tokens that it has to predict.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from poolreg.errors import ConfigError
from poolreg.training.recipe import nearest

# What transformers raises for sizes that give no model.
_BUILD_ERRORS = (
    StrictDataclassError, ValueError, TypeError, RuntimeError, LookupError, ArithmeticError,
    AssertionError, AttributeError,
)  # fmt: skip

# Read by many model types that do not declare it.
_UNDECLARED = {"head_dim"}


def build_model(given: Mapping[str, Any], tokenizer: Any, context: int) -> Any:
    """Return a causal language model in float32 with new weights from torch's generator.

    Unless `given` says otherwise it has one row per token of the tokenizer and positions for
    `context` tokens. Raises `ConfigError` for unknown keys and for sizes that give no model.
    """
    kind, sizes = given["model_type"], {k: v for k, v in given.items() if k != "model_type"}
    if kind not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        hint = nearest(kind, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
        raise ConfigError(f"[model] model_type {kind} is no causal language model", hint=hint)
    try:
        plain = AutoConfig.for_model(kind)
        known = plain.to_dict().keys() | plain.attribute_map.keys() | _UNDECLARED
        for key in sizes.keys() - known:  # transformers would keep it and never read it
            words, hint = f"[model] {kind} has no key {key}", nearest(key, known)
            raise ConfigError(words, hint=hint, table="model", key=key)
        fill = {
            "vocab_size": len(tokenizer),
            "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": None,  # a model does not train the embedding of its padding
            "max_position_embeddings": context,
        }
        aliased = {name for name, real in plain.attribute_map.items() if real in sizes}
        fill = {key: value for key, value in fill.items() if key in known - aliased}
        config = AutoConfig.for_model(kind, **{**fill, **sizes})
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
        _check_causal(model, kind)
    except _BUILD_ERRORS as error:
        reason = [*str(error).strip().splitlines(), type(error).__name__][0]
        words = f"[model] gives no {kind} model: {reason}"
        raise ConfigError(words, hint="check the sizes in [model]", table="model") from error
    return model


def _check_causal(model: Any, kind: str) -> None:
    # An encoder's own past and future lie open to it: its loss would fall to nothing.
    ids = torch.tensor([[1, 2, 3, 4], [1, 2, 3, 5]])
    with torch.no_grad():
        one, other = model(input_ids=ids).logits[:, :-1]
    if not torch.allclose(one, other, rtol=1e-3, atol=1e-4):
        hint = "set is_decoder = true in [model], or choose a decoder such as llama"
        raise ConfigError(f"[model] {kind} sees the tokens that it has to predict", hint=hint)
