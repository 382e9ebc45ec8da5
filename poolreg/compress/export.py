"""A compressed model as a Hugging Face folder, proven by its logits.

Tensors that no compression touches (embeddings, head, norms) stand in a file of their own, which
all variants of one model share in the pool's store.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from poolreg.errors import Damage
from poolreg.files import write_atomic
from poolreg.models.folders import copy_companions
from poolreg.models.loading import load_model
from poolreg.models.modeling_poolreg import Family
from poolreg.tensors import write_file

# Largest difference of a logit, relative to the largest logit, between the model in memory and
# the one loaded from its folder; both compute in float32 from the same stored values.
TOLERANCE = 1e-4
DTYPES = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
SHARED, OWN = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"


def round_to_storage(model: Any, dtypes: Mapping[str, str], default: str) -> None:
    """Round all weights of a model to the dtypes in which they will be stored, in place."""
    with torch.no_grad():
        for name, value in model.state_dict().items():
            if value.is_floating_point():
                value.copy_(value.to(DTYPES[dtypes.get(name, default)]))


def write_folder(
    state: Mapping[str, Tensor], config: Mapping[str, Any], folder: Path, *, template: Path,
    names: Family, dtypes: Mapping[str, str], default: str,
) -> None:  # fmt: skip
    """Write weights, configuration and what goes with them (tokenizer, …) of `template`.

    `dtypes` are the storage dtypes of tensors by name; `default` is that of all others.
    """
    inside = f"{names.layers}."
    files: dict[str, dict[str, Tensor]] = {SHARED: {}, OWN: {}}
    for name, value in state.items():
        files[OWN if name.startswith(inside) else SHARED][name] = value
    for file, tensors in files.items():
        arrays = {n: _array(v, dtypes.get(n, default)) for n, v in tensors.items()}
        write_file(folder / file, arrays, {"format": "pt"})
    places = {name: file for file, tensors in files.items() for name in tensors}
    size = sum((folder / file).stat().st_size for file in files)
    index = {"metadata": {"total_size": size}, "weight_map": places}
    text = json.dumps(index, indent=2, sort_keys=True) + "\n"
    write_atomic(folder / "model.safetensors.index.json", text.encode())
    write_atomic(folder / "config.json", (json.dumps(dict(config), indent=2) + "\n").encode())
    copy_companions(template, folder)


def _array(value: Tensor, dtype: str) -> tuple[str, Any]:
    value = value.detach().cpu().contiguous()
    if not value.is_floating_point():
        return {torch.int64: "I64", torch.int32: "I32", torch.bool: "BOOL"}[
            value.dtype
        ], value.numpy()
    value = value.to(DTYPES[dtype])
    if dtype == "BF16":
        return dtype, value.view(torch.int16).numpy().view(np.uint16)
    return dtype, value.numpy()


def check_logits(
    model: Any, folder: Path, ids: Tensor, *, dtype: str, trust_code: bool = False
) -> float:
    """Compare a folder's logits with those of the model in memory, on token ids [B, T].

    Returns the largest difference relative to the largest logit; raises `Damage` when it is
    above `TOLERANCE`.
    """
    loaded = load_model(folder, dtype=dtype, device=model.device, trust_code=trust_code)
    with torch.inference_mode():
        here = model(input_ids=ids).logits.float()
        there = loaded(input_ids=ids).logits.float()
    difference = float((here - there).abs().max() / here.abs().max())
    if not difference <= TOLERANCE:
        raise Damage(
            f"the model that was written gives other logits than the one in memory: "
            f"{difference:.2g} relative to the largest",
            hint="this is a bug in poolreg; please report the model's config.json",
            difference=difference,
        )
    return difference
