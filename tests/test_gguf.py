"""GGUF files hold the model's very values under llama.cpp's names, and llama.cpp agrees on them."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pools
import pytest
from hypothesis import given
from hypothesis import strategies as st

from poolreg import Pool
from poolreg.errors import Conflict, Damage, Incompatible, MissingPackage, Refused
from poolreg.models.gguf import neighbouring, read_layout
from poolreg.models.gguf_vocabulary import Vocabulary, read_vocabulary

gguf = pytest.importorskip("gguf")

LIKE = pools._LLAMA_LIKE
NAMES = {
    "model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output",
    "input_layernorm": "attn_norm", "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}  # fmt: skip
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 5000.0, "factor": 8.0, "low_freq_factor": 1.0,
    "high_freq_factor": 4.0, "original_max_position_embeddings": 12,
}  # fmt: skip


def longrope(*factors: float, long: list[float] | None = None) -> dict[str, Any]:
    """Return rotary parameters as the stock variants have them."""
    return {
        "rope_type": "longrope", "rope_theta": 10000.0, "factor": 1.0, "attention_factor": 1.0,
        "short_factor": list(factors), "long_factor": long or list(factors),
        "original_max_position_embeddings": pools.CONTEXT,
    }  # fmt: skip


def config_of(
    family: str = "llama", *, layer_sizes: list[dict[str, int]] | None = None, **changes: Any
) -> Any:
    """Return the configuration of a model with other sizes than pools' own."""
    from transformers import AutoConfig

    from poolreg.models.modeling_poolreg import compressed_config

    sizes = LIKE | {"vocab_size": 272, "bos_token_id": 0, "eos_token_id": 1} | changes
    config = AutoConfig.for_model(family, **sizes)
    return config if layer_sizes is None else compressed_config(config, layer_sizes)


def folder_of(folder: Path, family: str = "llama", **changes: Any) -> Path:
    """Write a random model of such a configuration, with pools' tokenizer."""
    import torch
    from transformers import AutoModelForCausalLM

    from poolreg.models.loading import quiet_transformers

    with quiet_transformers():
        config = config_of(family, **changes)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        generator = torch.Generator().manual_seed(7)
        with torch.no_grad():
            for name, weight in sorted(model.named_parameters()):
                weight.copy_(0.3 * torch.randn(weight.shape, generator=generator))
                if name.endswith("norm.weight"):
                    weight += 1.0
        model.save_pretrained(folder)
    return pools.tokenizer_folder(folder)


def exported(folder: Path, out: Path | None = None) -> Path:
    """Store a folder in a pool of its own beside it and write it as GGUF."""
    with Pool.create(folder.with_name(folder.name + ".pool")) as pool:
        pool.add_model(folder, name="m", role="other")
        return pool.export_gguf("m", out or folder.with_suffix(".gguf"))


def vocabulary_of(folder: Path) -> Vocabulary:
    """Return the vocabulary of a folder that holds a model of pools' sizes."""
    return read_vocabulary(folder, read_layout(folder)[1])


def fields(path: Path) -> dict[str, Any]:
    """Return the metadata, the architecture's name left out of the keys."""
    reader = gguf.GGUFReader(path)
    architecture = reader.fields["general.architecture"].contents()
    return {
        key.removeprefix(f"{architecture}."): field.contents()
        for key, field in reader.fields.items()
    }


def tensors(path: Path) -> dict[str, tuple[str, np.ndarray]]:
    """Return type and raw values of every tensor, bfloat16 as its bits."""
    return {
        t.name: (t.tensor_type.name, t.data.view("<u2") if t.tensor_type.name == "BF16" else t.data)
        for t in gguf.GGUFReader(path).tensors
    }


def restored(rows: np.ndarray, heads: int) -> np.ndarray:
    """Undo llama.cpp's order of rows, one row after the other."""
    made = np.empty_like(rows)
    size = len(rows) // heads
    for head in range(heads):
        for pair in range(size // 2):
            made[head * size + pair] = rows[head * size + 2 * pair]
            made[head * size + size // 2 + pair] = rows[head * size + 2 * pair + 1]
    return made


def renamed(name: str) -> str:
    """Return llama.cpp's name of a transformers tensor."""
    stem, kind = name.rsplit(".", 1)
    if stem.startswith("model.layers."):
        _, _, layer, rest = stem.split(".", 3)
        return f"blk.{layer}.{NAMES[rest]}.{kind}"
    return f"{NAMES[stem]}.{kind}"


def check_tensors(folder: Path, path: Path, heads: dict[str, int]) -> None:
    """Compare every tensor, bit for bit, the rows of queries and keys put back."""
    found, expected = tensors(path), pools.arrays_of(folder)
    extra = {"rope_freqs.weight"} & found.keys()
    assert found.keys() - extra == {renamed(name) for name in expected}
    for name, (dtype, raw) in expected.items():
        written, array = found[renamed(name)]
        module = name.split(".")[-2]
        if module in heads:
            array = restored(array, heads[module])
        if raw.ndim == 1:
            assert written == "F32"
            assert np.array_equal(array, pools.values(raw, dtype))
        else:
            assert written == dtype
            assert array.shape == raw.shape
            assert np.array_equal(array, raw)


@given(heads=st.integers(1, 4), pairs=st.integers(1, 5), columns=st.integers(0, 3))
def test_rows_are_put_side_by_side_and_back(heads, pairs, columns):
    rows = np.arange(heads * 2 * pairs * max(columns, 1)).reshape(
        heads * 2 * pairs, *([columns] if columns else [])
    )
    assert np.array_equal(restored(neighbouring(rows, heads), heads), rows)


@pytest.mark.parametrize(
    ("family", "tied", "dtype"),
    [
        ("llama", False, "float32"),
        ("llama", True, "bfloat16"),
        ("llama", False, "float16"),
        ("mistral", False, "float32"),
        ("qwen2", True, "float32"),
        ("qwen2", False, "bfloat16"),
    ],
)
def test_every_value_comes_back(tmp_path, family, tied, dtype):
    folder = pools.model_folder(tmp_path / "model", family, tied=tied, dtype=dtype)
    path = exported(folder)
    paired = family != "qwen2"
    check_tensors(folder, path, {"q_proj": 4, "k_proj": 2} if paired else {})
    assert ("output.weight" in tensors(path)) == (not tied)
    said = fields(path)
    assert said["general.architecture"] == ("llama" if paired else "qwen2")
    assert said["general.name"] == "m"
    wanted = {
        "block_count": 2, "embedding_length": 16, "feed_forward_length": 24, "context_length": 16,
        "attention.head_count": 4, "attention.head_count_kv": 2, "attention.key_length": 4,
        "attention.value_length": 4, "rope.dimension_count": 4, "rope.freq_base": 10000.0,
        "vocab_size": pools.VOCABULARY,
    }  # fmt: skip
    assert {key: said[key] for key in wanted} == wanted
    assert said["attention.layer_norm_rms_epsilon"] == pytest.approx(1e-6)
    kinds = {"float32": 0, "float16": 1, "bfloat16": 32}
    assert said["general.file_type"] == kinds[dtype]


def test_qwen3_has_its_norms(tmp_path):
    folder = folder_of(tmp_path / "model", "qwen3", head_dim=8)
    path = exported(folder)
    check_tensors(folder, path, {})
    assert fields(path)["attention.key_length"] == 8


def test_biases_change_places_with_their_rows(tmp_path):
    folder = folder_of(tmp_path / "model", attention_bias=True, mlp_bias=True)
    check_tensors(folder, exported(folder), {"q_proj": 4, "k_proj": 2})


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_widths_of_their_own_are_a_deci(tmp_path, family):
    folder = folder_of(tmp_path / "model", family, layer_sizes=[{"intermediate_size": 8}, {}])
    path = exported(folder)
    said = fields(path)
    assert said["general.architecture"] == "deci"
    assert said["feed_forward_length"] == [8, 24]
    check_tensors(folder, path, {"q_proj": 4, "k_proj": 2})


def test_one_width_for_all_layers_stays_a_llama(tmp_path):
    folder = folder_of(tmp_path / "model", layer_sizes=[{"intermediate_size": 8}] * 2)
    said = fields(exported(folder))
    assert (said["general.architecture"], said["feed_forward_length"]) == ("llama", 8)


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_chosen_frequencies_of_smaller_heads(tmp_path, family):
    changes = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 6}
    rope = longrope(0.9, 3.0, 0.25)
    folder = folder_of(tmp_path / "model", family, rope_parameters=rope, **changes)
    path = exported(folder)
    check_tensors(folder, path, {"q_proj": 2, "k_proj": 1})
    kind, factors = tensors(path)["rope_freqs.weight"]
    assert kind == "F32"
    np.testing.assert_allclose(factors, [0.9, 3.0, 0.25], rtol=1e-6)  # of float32
    said = fields(path)
    assert said["general.architecture"] == "llama"
    keys = ("rope.dimension_count", "attention.key_length", "attention.value_length")
    assert [said[key] for key in keys] == [6, 6, 6]
    assert "rope.scaling.type" not in said


def test_llama3_frequencies(tmp_path):
    folder = folder_of(tmp_path / "model", rope_parameters=LLAMA3, hidden_size=32)
    factors = tensors(exported(folder))["rope_freqs.weight"][1]
    expected = []  # the rule as Llama 3.1 states it, by wavelength
    for pair in range(4):
        wavelength = 2 * np.pi * 5000.0 ** (pair / 4)
        smooth = (12 / wavelength - 1.0) / (4.0 - 1.0)
        share = min(max(smooth, 0.0), 1.0)
        expected.append(1 / ((1 - share) / 8.0 + share))
    assert len(set(expected)) > 1
    np.testing.assert_allclose(factors, expected, rtol=1e-6)  # of float32


def test_linear_scaling_is_metadata(tmp_path):
    rope = {"rope_type": "linear", "factor": 4.0, "rope_theta": 500.0}
    path = exported(folder_of(tmp_path / "model", rope_parameters=rope))
    said = fields(path)
    assert (said["rope.scaling.type"], said["rope.scaling.factor"]) == ("linear", 4.0)
    assert said["rope.freq_base"] == 500.0
    assert "rope_freqs.weight" not in tensors(path)


def test_a_context_ends_with_the_sliding_window(tmp_path):
    path = exported(folder_of(tmp_path / "model", "mistral", sliding_window=8))
    assert fields(path)["context_length"] == 8


# -- tokenizers -----------------------------------------------------------------------------


def test_the_vocabulary(tmp_path):
    folder = folder_of(tmp_path / "model", vocab_size=280)  # rows that no token has
    whole = json.loads((folder / "tokenizer.json").read_text())
    word = {"id": 269, "content": "two words", "special": False, "normalized": False,
            "single_word": False, "lstrip": False, "rstrip": False}  # fmt: skip
    pools.change_json(folder / "tokenizer.json", added_tokens=[*whole["added_tokens"], word])
    pools.change_json(folder / "tokenizer_config.json", chat_template="{{ messages }}")
    said = fields(exported(folder))
    vocabulary = {token: text for text, token in whole["model"]["vocab"].items()}
    tokens = said["tokenizer.ggml.tokens"]
    assert tokens[:269] == [vocabulary[token] for token in range(269)]
    assert tokens[269] == "two words"
    kinds = [gguf.TokenType(kind) for kind in said["tokenizer.ggml.token_type"]]
    assert kinds[:2] == [gguf.TokenType.CONTROL] * 2
    assert set(kinds[2:269]) == {gguf.TokenType.NORMAL}
    assert kinds[269] == gguf.TokenType.USER_DEFINED
    assert kinds[270:] == [gguf.TokenType.UNUSED] * 10
    assert len(set(tokens)) == 280
    assert said["tokenizer.ggml.merges"] == pools.MERGES
    assert said["tokenizer.ggml.model"] == "gpt2"
    assert said["tokenizer.ggml.pre"] == "gpt-2"
    keys = ("bos_token_id", "eos_token_id", "add_bos_token", "add_eos_token")
    assert [said[f"tokenizer.ggml.{key}"] for key in keys] == [0, 1, False, False]
    assert said["tokenizer.chat_template"] == "{{ messages }}"


SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}


def split(pattern: str, **changes: Any) -> dict[str, Any]:
    """Return the pre-tokenizer that splits text by a regular expression."""
    step = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    return {"type": "Sequence", "pretokenizers": [step | changes, BYTES]}


@pytest.mark.parametrize(
    ("pre", "ignore_merges", "name"),
    [
        (split(SPLIT), True, "llama-bpe"),
        (split(SPLIT), False, "smaug-bpe"),
        (split(SPLIT.replace("{1,3}", "")), False, "qwen2"),
        (
            {"type": "Sequence", "pretokenizers": [
                {"type": "Digits", "individual_digits": True}, BYTES | {"use_regex": True},
            ]}, False, "smollm",
        ),
        (split(SPLIT.replace("{1,3}", "")), True, None),
        (split(SPLIT.replace("{1,3}", "{1,2}")), False, None),
        (split(SPLIT, invert=True), False, None),
        (split(SPLIT, behavior="Removed"), False, None),
        (BYTES, False, None),
        (BYTES | {"use_regex": True, "add_prefix_space": True}, False, None),
        ({"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": True},
         False, None),
        (None, False, None),
    ],
)  # fmt: skip
def test_how_text_is_split(tmp_path, pre, ignore_merges, name):
    folder = pools.model_folder(tmp_path / "model")
    model = json.loads((folder / "tokenizer.json").read_text())["model"]
    model |= {"ignore_merges": ignore_merges}
    pools.change_json(folder / "tokenizer.json", pre_tokenizer=pre, model=model)
    if name is None:
        with pytest.raises(Refused, match=r"(?s)cannot write as GGUF.*byte-level BPE"):
            vocabulary_of(folder)
    else:
        assert vocabulary_of(folder).splitting == name


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"normalizer": {"type": "Lowercase"}}, "normalises text"),
        ({"model": {"byte_fallback": True}}, "not byte-level"),
        ({"model": {"merges": []}}, "not at all"),
    ],
)
def test_tokenizers_that_are_refused(tmp_path, change, said):
    folder = pools.model_folder(tmp_path / "model")
    whole = json.loads((folder / "tokenizer.json").read_text())
    change = {k: whole[k] | v if k == "model" else v for k, v in change.items()}
    pools.change_json(folder / "tokenizer.json", **change)
    with pytest.raises(Refused, match=said):
        vocabulary_of(folder)


@pytest.mark.parametrize(
    ("tokens", "adds"),
    [(["<s>"], (True, False)), (["<s>", "</s>"], (True, True)), (["<s>", "<s>"], None)],
)
def test_tokens_that_begin_and_end_a_text(tmp_path, tokens, adds):
    from tokenizers import Tokenizer, processors

    folder = pools.model_folder(tmp_path / "model")
    whole = Tokenizer.from_file(str(folder / "tokenizer.json"))
    template = " ".join(t for t in tokens if t == "<s>") + " $A"
    template += " </s>" if "</s>" in tokens else ""
    whole.post_processor = processors.TemplateProcessing(
        single=template, special_tokens=[("<s>", 0), ("</s>", 1)]
    )
    whole.save(str(folder / "tokenizer.json"))
    if adds is None:
        with pytest.raises(Refused, match="adds other tokens"):
            vocabulary_of(folder)
    else:
        found = vocabulary_of(folder)
        assert (found.adds_bos, found.adds_eos) == adds


def test_a_tokenizer_larger_than_the_model(tmp_path):
    with pytest.raises(Refused, match="tokens up to 268, the model embeddings for 200"):
        exported(folder_of(tmp_path / "model", vocab_size=200))


def test_a_model_without_a_tokenizer(tmp_path):
    with pytest.raises(Refused, match=r"(?s)no tokenizer.*--tokenizer"):
        exported(pools.model_folder(tmp_path / "model", tokenizer=False))


# -- refusals -------------------------------------------------------------------------------


def test_other_families(tmp_path):
    with pytest.raises(Incompatible, match=r"gpt2 .*llama, mistral, qwen2 and qwen3 can"):
        exported(pools.model_folder(tmp_path / "model", "gpt2"))


@pytest.mark.parametrize(
    ("family", "changes", "said"),
    [
        ("llama", {"layer_sizes": [{"rope_pairs": 1}, {}]}, "(?s)smaller layer by layer.*portable"),
        ("llama", {"layer_sizes": [{}, {"v_head_dim": 2}]}, "(?s)smaller layer by layer.*stock"),
        ("qwen3", {"layer_sizes": [{"intermediate_size": 8}, {}]}, "(?s)different widths.*stock"),
        ("qwen3", {"head_dim": 8, "rope_parameters": LLAMA3}, "other than the default"),
        ("llama", {"rope_parameters": longrope(1.0, 2.0, long=[1.0, 3.0])}, "type longrope"),
        ("llama", {"rope_parameters": longrope(1.0, 2.0) | {"attention_factor": 1.1}}, "scale"),
        ("llama", {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0,
                                       "rope_theta": 1e4}}, "type dynamic"),
        ("llama", {"hidden_act": "gelu"}, "activation gelu"),
    ],
)  # fmt: skip
def test_what_llama_cpp_does_not_compute(tmp_path, family, changes, said):
    config_of(family, **changes).save_pretrained(tmp_path)
    with pytest.raises(Incompatible, match=said):
        read_layout(tmp_path)


def test_a_refusal_leaves_no_file(tmp_path):
    folder = folder_of(tmp_path / "model", layer_sizes=[{"rope_pairs": 1}, {}])
    with pytest.raises(Incompatible, match="layer by layer"):
        exported(folder)
    assert {path.name for path in tmp_path.iterdir()} == {"model", "model.pool"}


def test_a_model_without_its_output(tmp_path):
    folder = pools.model_folder(tmp_path / "model", tied=True)
    pools.change_json(folder / "config.json", tie_word_embeddings=False)
    with pytest.raises(Refused, match=r"lm_head\.weight is missing"):
        exported(folder)


def test_a_dtype_of_its_own(tmp_path):
    folder = pools.model_folder(tmp_path / "model")
    pools.set_tensors(folder, model__norm__weight=("F64", np.ones(16)))
    with pytest.raises(Incompatible, match=r"the dtype F64 of model\.norm\.weight"):
        exported(folder)


def test_what_is_there_is_not_replaced(tmp_path):
    folder = pools.model_folder(tmp_path / "model")
    out = tmp_path / "there.gguf"
    out.write_text("mine")
    with pytest.raises(Conflict, match=r"(?s)there\.gguf exists.*--force"):
        exported(folder, out)
    with Pool.open(tmp_path / "model.pool") as pool:
        assert out.read_text() == "mine"
        assert pool.export_gguf("m", out, force=True) == out
        assert fields(out)["general.name"] == "m"
        with pytest.raises(Conflict, match="exists"):
            pool.export_gguf("m", tmp_path / "model", force=True)
    assert (tmp_path / "model" / "config.json").is_file()


def test_a_damaged_model_is_not_exported(tmp_path):
    folder = pools.model_folder(tmp_path / "model")
    exported(folder)
    with Pool.open(tmp_path / "model.pool") as pool:
        (row,) = [f for f in pool.model("m")["files"] if f["name"] == "model.safetensors"]
        path = pool.registry.objects.existing(row["object"])
        path.chmod(0o644)
        data = bytearray(path.read_bytes())
        data[-1] ^= 1
        path.write_bytes(data)
        with pytest.raises(Damage):
            pool.export_gguf("m", tmp_path / "new.gguf")
    assert not (tmp_path / "new.gguf").exists()


def test_without_the_package(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(MissingPackage, match=r"pip install 'poolreg\[gguf\]'"):
        exported(pools.model_folder(tmp_path / "model"))


def test_the_command(tiny, tmp_path, cli_run):
    out = tmp_path / "base.gguf"
    done = cli_run("model", "export", "base", "--gguf", "-o", out, "--pool", tiny.root)
    assert f"wrote {out}" in done.stderr
    check_tensors(tiny.seed, out, {"q_proj": 4, "k_proj": 2})


# -- llama.cpp itself -----------------------------------------------------------------------

TEXT = "the cat and the hat in the rain, 123 don't   x"


def check_logits(folder: Path, path: Path, tolerance: float = 5e-5) -> None:
    """Compare llama.cpp's tokens and logits with transformers'.

    Of float32 weights, 5e-5 of logits up to 5: both compute in float32, in different orders.
    Other matrices make llama.cpp round what it multiplies them with to their dtype.
    """
    llama_cpp = pytest.importorskip("llama_cpp")
    import torch

    from poolreg.models.loading import load_model, load_tokenizer

    ids = load_tokenizer(folder)(TEXT)["input_ids"][: pools.CONTEXT]
    with torch.inference_mode():
        expected = load_model(folder)(torch.tensor([ids])).logits[0].double().numpy()
    whole = llama_cpp.Llama(
        str(path), n_ctx=len(ids), logits_all=True, n_threads=1, verbose=False,
        type_k=llama_cpp.GGML_TYPE_F32, type_v=llama_cpp.GGML_TYPE_F32,
    )  # fmt: skip
    try:
        assert whole.tokenize(TEXT.encode(), add_bos=False)[: len(ids)] == ids
        whole.eval(ids)
        found = np.array(whole.scores[: len(ids)], np.float64)
    finally:
        whole.close()
    assert abs(expected).max() > 1
    assert abs(found - expected).max() < tolerance


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("llama", {}),
        ("llama", {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True}),
        ("llama", {"layer_sizes": [{"intermediate_size": 8}, {}]}),
        ("llama", {"rope_parameters": LLAMA3}),
        ("llama", {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 500.0}}),
        ("llama", {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 6,
                   "rope_parameters": longrope(0.9, 3.0, 0.25)}),
        ("mistral", {"sliding_window": None}),
        ("qwen2", {}),
        ("qwen2", {"layer_sizes": [{}, {"intermediate_size": 8}]}),
        ("qwen2", {"rope_parameters": longrope(0.3, 5.0)}),
        ("qwen3", {"head_dim": 8}),
    ],
)  # fmt: skip
def test_llama_cpp_computes_the_same(tmp_path, family, changes):
    pytest.importorskip("llama_cpp")
    folder = folder_of(tmp_path / "model", family, **changes)
    check_logits(folder, exported(folder))


@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "tolerance"), [("float16", 0.03), ("bfloat16", 0.2)])
def test_llama_cpp_reads_shorter_floats(tmp_path, dtype, tolerance):
    pytest.importorskip("llama_cpp")
    folder = pools.model_folder(tmp_path / "model", dtype=dtype)
    check_logits(folder, exported(folder), tolerance)


@pytest.mark.slow
@pytest.mark.parametrize("target", ["portable", "stock", "full"])
def test_compressed_variants(pool, tmp_path, target):
    pool.compress("base", [0.3], name="small", calibrate="alpha", target=target)
    out = tmp_path / "small.gguf"
    if target == "full":
        with pytest.raises(Incompatible, match="--target portable"):
            pool.export_gguf("small", out)
        return
    pool.export_gguf("small", out)
    folder = pool.export_model("small", tmp_path / "small")
    check_tensors(folder, out, {"q_proj": 4, "k_proj": 2})
    check_logits(folder, out)
