"""A stored model as one GGUF file, the format of llama.cpp.

The weights keep their values bit for bit: matrices in the dtype they are stored in, vectors (norms
and biases) in float32, which is what llama.cpp adds and multiplies by. Only the rows of queries and
keys change places where llama.cpp rotates neighbouring channels. What llama.cpp would compute
otherwise than transformers is refused. One difference is left: llama.cpp does not normalise text,
so a tokenizer that composes characters (NFC, as Qwen's) agrees on text that is composed already.

    model                                       architecture in the file
    llama, mistral                              llama
    qwen2, qwen3                                the same
    qwen2, chosen frequencies or smaller heads  llama, which takes biases too; smaller heads with
                                                  biases do not load in llama.cpp of 2025
    all but qwen3, MLPs of different widths     deci: a Llama whose layers have a width each
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from poolreg.errors import Conflict, Incompatible, Refused
from poolreg.files import staged
from poolreg.models.gguf_vocabulary import (
    Vocabulary,
    add_vocabulary,
    gguf_package,
    read_vocabulary,
)
from poolreg.models.stored import stored_config, stored_folder, stored_tensors
from poolreg.store.registry import Registry
from poolreg.tensors import DTYPE_BYTES, NUMPY_DTYPES, Array, TensorInfo, read_array

ARCHITECTURES = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}

# Those that rotate channels 2i and 2i + 1 together (transformers: i and i + D/2), each pair at a
# frequency of its own if the file holds rope_freqs.
_PAIRED = ("llama", "deci")

_FILE_TYPES = {"F32": "ALL_F32", "F16": "MOSTLY_F16", "BF16": "MOSTLY_BF16"}
_QUANTIZATION_VERSION = 2  # readers want it although nothing is quantised


@dataclass(frozen=True)
class Layout:
    """What llama.cpp must know of a model beside its tensors."""

    architecture: str
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    widths: tuple[int, ...]  # of the MLP in each layer
    vocabulary: int
    context: int
    epsilon: float
    rope_base: float
    rope_linear: float  # positions are divided by this
    rope_factors: tuple[float, ...] | None  # [head_dim / 2], the frequencies are divided by these
    tied: bool


def export_gguf(registry: Registry, digest: str, out: Path, *, force: bool = False) -> Path:
    """Write a stored model of the Llama kind as one GGUF file, and return its path.

    Raises `Incompatible` for models that llama.cpp does not compute, `Refused` for tokenizers that
    it does not know, `Conflict` if `out` exists (with `force` a file is replaced), `Damage` if a
    stored file has changed, and `MissingPackage` without the package gguf.
    """
    gguf_package()
    if out.is_dir() or (out.exists() and not force):
        hint = "choose another file" if out.is_dir() else "choose another file, or pass --force"
        raise Conflict(f"{out} exists", hint=hint)
    label = registry.one("model_label", model=digest)["label"]
    check_family(stored_config(registry, digest)["model_type"])
    if registry.one("model", digest=digest)["tokenizer"] is None:
        raise Refused(
            f"model {label} has no tokenizer, and a GGUF file needs one",
            hint="add the model again with: poolreg model add DIR --tokenizer DIR",
        )
    with stored_folder(registry, digest) as folder:
        layout, config = read_layout(folder)
        vocabulary = read_vocabulary(folder, config)
    tensors = _tensors(layout, stored_tensors(registry, digest))
    for row in registry.select("model_files", model=digest):
        registry.objects.check(row["object"])
    out.absolute().parent.mkdir(parents=True, exist_ok=True)
    with staged(out.absolute()) as file:
        _write(Path(file.name), label, layout=layout, vocabulary=vocabulary, tensors=tensors)
    return out


# -- the model ------------------------------------------------------------------------------


def check_family(model_type: str) -> None:
    """Raise `Incompatible` unless models of this type, stock or compressed, can be exported."""
    from poolreg.models.modeling_poolreg import PREFIX

    if model_type.removeprefix(PREFIX) not in ARCHITECTURES:
        *most, last = ARCHITECTURES
        raise Incompatible(
            f"a model of type {model_type} cannot be written as GGUF; "
            f"{', '.join(most)} and {last} can",
            hint="export the folder instead, with: poolreg model export NAME -o DIR",
        )


def read_layout(folder: Path) -> tuple[Layout, Any]:
    """Return what the configuration in a folder says, and the configuration itself.

    Raises `Refused` for a configuration that is malformed, and `Incompatible` for attention or
    rotary positions that llama.cpp does not have.
    """
    from transformers import AutoConfig

    from poolreg.models.loading import LOADING_ERRORS, quiet_transformers

    with quiet_transformers():
        try:
            config = AutoConfig.from_pretrained(str(folder), local_files_only=True)
        except LOADING_ERRORS as error:
            raise Refused(f"the configuration cannot be read: {error}") from error
    _require(config.hidden_act == "silu", f"the activation {config.hidden_act}")
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    widths = _widths(config)
    linear, factors = _rope(config, head_dim)
    architecture = _architecture(config, head_dim, widths=widths, chosen=factors is not None)
    # Within its window sliding attention is full attention, which is what llama.cpp computes.
    window = getattr(config, "sliding_window", None) or config.max_position_embeddings
    layout = Layout(
        architecture, config.num_hidden_layers, config.hidden_size, config.num_attention_heads,
        config.num_key_value_heads, head_dim, widths, config.vocab_size,
        min(window, config.max_position_embeddings), config.rms_norm_eps,
        config.rope_parameters["rope_theta"], linear, factors, config.tie_word_embeddings,
    )  # fmt: skip
    return layout, config


def _require(condition: bool, what: str, hint: str = "") -> None:
    if not condition:
        hint = hint or "export the folder instead, with: poolreg model export NAME -o DIR"
        raise Incompatible(f"llama.cpp does not compute {what} in models of this kind", hint=hint)


def _widths(config: Any) -> tuple[int, ...]:
    """Return the width of each layer's MLP; raises `Incompatible` if anything else is sliced."""
    from poolreg.models.modeling_poolreg import ATTENTION_SIZES, stock_sizes, whole_sizes

    if not hasattr(config, "layer_sizes"):
        width: int = config.intermediate_size
        count: int = config.num_hidden_layers
        return (width,) * count
    stock, layers = stock_sizes(config), whole_sizes(config)
    whole = all(layer[key] == stock[key] for layer in layers for key in ATTENTION_SIZES)
    _require(
        whole,
        "attention heads that were made smaller layer by layer",
        "compress the model with --target portable (heads stay whole) or --target stock",
    )
    widths: list[int] = [layer["intermediate_size"] for layer in layers]
    return tuple(widths)


def _architecture(config: Any, head_dim: int, *, widths: tuple[int, ...], chosen: bool) -> str:
    """Return llama.cpp's name; `chosen`: the rotary frequencies are others than the default."""
    from poolreg.models.modeling_poolreg import PREFIX

    family = config.model_type.removeprefix(PREFIX)
    if len(set(widths)) > 1:
        stock = "compress the model with --target stock, which gives all layers one width"
        _require(family != "qwen3", f"MLPs of different widths ({family})", stock)
        return "deci"
    # What qwen2 lacks there, the architecture llama has, and its biases too.
    whole = config.num_attention_heads * head_dim == config.hidden_size
    if not chosen and (whole or family != "qwen2"):
        return ARCHITECTURES[family]
    _require(family != "qwen3", f"rotary frequencies other than the default ({family})")
    return "llama"


def _rope(config: Any, head_dim: int) -> tuple[float, tuple[float, ...] | None]:
    """Return by what positions, and by what the D/2 default frequencies, are divided."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    rope = config.rope_parameters
    kind = rope.get("rope_type", "default")
    _require(rope.get("partial_rotary_factor", 1.0) == 1.0, "heads that are rotated in part")
    if kind == "default":
        return 1.0, None
    if kind == "linear":
        return float(rope["factor"]), None
    fixed = kind == "llama3" or (kind == "longrope" and rope["short_factor"] == rope["long_factor"])
    _require(fixed, f"rotary frequencies of type {kind} that change with the length of the text")
    frequencies, scale = ROPE_INIT_FUNCTIONS[kind](config, "cpu")
    _require(scale == 1.0, "rotary tables with a scale")
    default = rope["rope_theta"] ** -(np.arange(0, head_dim, 2) / head_dim)
    factors = default / frequencies.double().numpy()
    return 1.0, tuple(map(float, factors))


# -- the tensors ----------------------------------------------------------------------------


@dataclass(frozen=True)
class _Tensor:
    """One tensor of the file, and how to read it when its turn comes."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    read: Callable[[], Array]

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * DTYPE_BYTES[self.dtype]


def _read(path: Path, info: TensorInfo, heads: int) -> Array:
    """Return a stored tensor as it is to be written; `heads` of 0 leave its rows where they are."""
    array = read_array(path, info)
    if array.ndim == 1:
        array = _single(array, info.dtype)
    return np.ascontiguousarray(neighbouring(array, heads) if heads else array)


def neighbouring(rows: Array, heads: int) -> Array:
    """Put the halves of each rotated pair side by side: rows [heads * D, …], D even.

    Row i of a head goes to 2i, and row i + D/2 to 2i + 1.
    """
    halves = rows.reshape(heads, 2, rows.shape[0] // heads // 2, *rows.shape[1:])
    return halves.swapaxes(1, 2).reshape(rows.shape)


def _single(raw: Array, dtype: str) -> Array:
    if dtype == "BF16":
        return (raw.astype(np.uint32) << 16).view(np.float32)
    return raw.astype(np.float32)


def _tensors(layout: Layout, stored: dict[str, tuple[Path, TensorInfo]]) -> list[_Tensor]:
    """Return the tensors under llama.cpp's names; raises `Incompatible` for one it has not."""
    from poolreg.models.loading import CONSTANTS

    gguf = gguf_package()
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[layout.architecture.upper()], layout.layers)
    heads = {"q_proj": layout.heads, "k_proj": layout.kv_heads}
    found = []
    if not layout.tied and "lm_head.weight" not in stored:  # llama.cpp would tie it
        raise Refused(
            "lm_head.weight is missing from a model that is not tied",
            hint="save the model again with the library that trained it (save_pretrained)",
        )
    if layout.rope_factors is not None:
        factors = np.array(layout.rope_factors, np.float32)
        found.append(_Tensor("rope_freqs.weight", "F32", factors.shape, lambda: factors))
    for name, (path, info) in stored.items():
        if CONSTANTS.search(name):
            continue
        known = names.get_name(name, try_suffixes=(".weight", ".bias"))
        _require(known is not None, f"the tensor {name}")
        _require(info.dtype in _FILE_TYPES, f"the dtype {info.dtype} of {name}")
        paired = heads.get(name.split(".")[-2], 0) if layout.architecture in _PAIRED else 0
        dtype = "F32" if len(info.shape) == 1 else info.dtype
        found.append(_Tensor(known, dtype, info.shape, partial(_read, path, info, paired)))
    return found


# -- the file -------------------------------------------------------------------------------


def _write(
    path: Path, label: str, *, layout: Layout, vocabulary: Vocabulary, tensors: list[_Tensor]
) -> None:
    gguf = gguf_package()
    sizes = Counter[str]()
    for tensor in tensors:
        sizes[tensor.dtype] += tensor.bytes
    (main, _), *_ = sizes.most_common(1)
    writer = gguf.GGUFWriter(path, layout.architecture)
    try:
        writer.add_type("model")
        writer.add_name(label)
        writer.add_file_type(gguf.LlamaFileType[_FILE_TYPES[main]])
        writer.add_quantization_version(_QUANTIZATION_VERSION)
        _add_layout(writer, layout)
        add_vocabulary(writer, vocabulary)
        for tensor in tensors:
            writer.add_tensor_info(
                tensor.name, tensor.shape, np.dtype(NUMPY_DTYPES[tensor.dtype]), tensor.bytes,
                raw_dtype=gguf.GGMLQuantizationType[tensor.dtype],
            )  # fmt: skip
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for tensor in tensors:
            writer.write_tensor_data(tensor.read())
    finally:
        writer.close()


def _add_layout(writer: Any, layout: Layout) -> None:
    one_width = len(set(layout.widths)) == 1
    writer.add_block_count(layout.layers)
    writer.add_embedding_length(layout.hidden)
    writer.add_feed_forward_length(layout.widths[0] if one_width else layout.widths)
    writer.add_head_count(layout.heads)
    writer.add_head_count_kv(layout.kv_heads)
    writer.add_key_length(layout.head_dim)
    writer.add_value_length(layout.head_dim)
    writer.add_vocab_size(layout.vocabulary)
    writer.add_context_length(layout.context)
    writer.add_layer_norm_rms_eps(layout.epsilon)
    writer.add_rope_dimension_count(layout.head_dim)
    writer.add_rope_freq_base(layout.rope_base)
    if layout.rope_linear != 1.0:
        writer.add_rope_scaling_type(gguf_package().RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(layout.rope_linear)
