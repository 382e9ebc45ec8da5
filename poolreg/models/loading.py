"""Models and tokenizers of Hugging Face folders, loaded strictly and without noise.

Whatever a loader would guess about is refused: missing, left-over or reshaped tensors, code of
the folder's author. Nothing is fetched from a network.
"""

from __future__ import annotations

import contextlib
import re
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging as transformers_logging

from poolreg.errors import ConfigError, NotFound, Refused
from poolreg.weights.hf_json import read_object, refuse_code

CONFIG_LIMIT = 16 << 20  # bytes; a configuration holds no data

# Causal masks, rotary frequencies and positions that older libraries wrote into model files.
# They are constants of the architecture and are computed when the model is built.
CONSTANTS = re.compile(
    r"(^|\.)((attn|attention)\.(masked_)?bias|rotary_emb\.inv_freq|position_ids)$"
)

# What from_pretrained raises for folders that are incomplete, malformed or of an unknown kind.
LOADING_ERRORS = (
    ArithmeticError, AssertionError, AttributeError, ImportError, LookupError, OSError,
    RuntimeError, SafetensorError, StrictDataclassError, TypeError, ValueError,
)  # fmt: skip

_quiet = threading.RLock()


def pick_device(name: str = "auto") -> torch.device:
    """Return the device of that name; "auto" is CUDA where there is one, else the CPU.

    Raises `ConfigError` for a device that this machine or this build of torch does not have.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(
            f"device {name!r} cannot be used: {reason}", hint="choose auto, cpu or cuda"
        ) from error
    return device


def load_model(
    folder: Path, *, dtype: str = "float32", device: str | torch.device = "cpu",
    trust_code: bool = False,
) -> PreTrainedModel:  # fmt: skip
    """Load a causal language model from a Hugging Face folder, strictly, for evaluation.

    Raises `NotFound` without a folder, and `Refused` when a tensor is missing, left over or of
    another shape than the configuration says, when the folder cannot be loaded, and when its
    configuration asks for code of its own and `trust_code` is not set.
    """
    _check_code(folder, "config.json", trust_code=trust_code)
    with _loading(folder, "model"):
        model, info = AutoModelForCausalLM.from_pretrained(
            str(folder), dtype=getattr(torch, dtype), local_files_only=True, use_safetensors=True,
            trust_remote_code=trust_code, output_loading_info=True, ignore_mismatched_sizes=True,
        )  # fmt: skip
    _check_loaded(folder, model, info)
    return model.eval().requires_grad_(False).to(device)


def load_tokenizer(folder: Path, *, trust_code: bool = False) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a folder.

    A config.json in the folder takes part in choosing the tokenizer's class, so give the folder
    of the model. Raises `NotFound` without a folder, and `Refused` when it cannot be loaded or
    asks for code of its own and `trust_code` is not set.
    """
    _check_code(folder, "config.json", trust_code=trust_code)
    _check_code(folder, "tokenizer_config.json", trust_code=trust_code)
    with _loading(folder, "tokenizer"):
        return AutoTokenizer.from_pretrained(
            str(folder), local_files_only=True, trust_remote_code=trust_code
        )


def _check_code(folder: Path, name: str, *, trust_code: bool) -> None:
    """Raise `Refused` when the folder's JSON file `name`, if there is one, asks for code."""
    path = folder / name
    if path.exists() and not trust_code:
        refuse_code(read_object(path, CONFIG_LIMIT), path)


def _check_loaded(folder: Path, model: PreTrainedModel, info: dict[str, Any]) -> None:
    """Raise `Refused` when the files' tensors are not exactly those of the configuration."""
    reshaped = [f"{key} {list(old)} not {list(new)}" for key, old, new in info["mismatched_keys"]]
    kinds = {
        "missing": sorted(info["missing_keys"]),
        "left over": sorted(key for key in info["unexpected_keys"] if not CONSTANTS.search(key)),
        "of another shape": sorted(reshaped),
        # The library leaves tensors untied, with a mere warning, when the file holds two.
        "tied in config.json but stored as two": sorted(_untied(model)),
    }
    said = [
        f"{len(keys)} {kind}: {', '.join(keys[:5])}{', …' if len(keys) > 5 else ''}"
        for kind, keys in kinds.items()
        if keys
    ] + list(info["error_msgs"])
    if said:
        raise Refused(
            f"the tensors in {folder} are not those of its config.json: {'; '.join(said)}",
            hint="save the model again with the library that trained it (save_pretrained)",
            tensors=[key for keys in kinds.values() for key in keys],
        )


def _untied(model: PreTrainedModel) -> set[str]:
    expected = model.get_expanded_tied_weights_keys(all_submodels=True)
    return set(expected) - set(model.all_tied_weights_keys)


@contextlib.contextmanager
def _loading(folder: Path, what: str) -> Iterator[None]:
    """Turn the library's errors into `Refused`, and keep its messages off the terminal."""
    if not folder.is_dir():
        # The library would take the name for a model on the Hub and look in its cache.
        raise NotFound(f"there is no folder {folder}", hint="check the path of the model")
    with quiet_transformers():
        try:
            yield
        except Exception as error:
            # The tokenizers library raises plain Exception for a malformed file.
            if type(error) is not Exception and not isinstance(error, LOADING_ERRORS):
                raise
            reason = str(error).strip().splitlines() or [type(error).__name__]
            raise Refused(
                f"the {what} in {folder} cannot be loaded: {reason[0]}",
                hint="it must be a whole Hugging Face folder with safetensors weights",
            ) from error


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """Keep transformers from printing progress bars and warnings inside the block.

    The settings are global, so one thread at a time is inside.
    """
    with _quiet:
        level = transformers_logging.get_verbosity()
        bars = transformers_logging.is_progress_bar_enabled()
        transformers_logging.set_verbosity_error()
        transformers_logging.disable_progress_bar()
        try:
            yield
        finally:
            transformers_logging.set_verbosity(level)
            if bars:
                transformers_logging.enable_progress_bar()
