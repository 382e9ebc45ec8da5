"""Compressed models: equal to stock ones whose dropped channels are zero, and load everywhere."""

from __future__ import annotations

import copy
import functools
import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from poolreg import autoload
from poolreg.errors import Refused
from poolreg.models import modeling_poolreg as ours
from poolreg.models.loading import load_model, load_tokenizer

pytestmark = pytest.mark.usefixtures("one_thread")

LAYERS, HEADS, HIDDEN, MLP = 4, 4, 32, 24
LLAMA = {
    "intermediate_size": MLP, "num_key_value_heads": 2, "head_dim": 8, "initializer_range": 0.3,
}  # fmt: skip
GEMMA = LLAMA | {"sliding_window": 5, "layer_types": ["sliding_attention", "full_attention"] * 2}
TINY = {
    "llama": LLAMA | {"attention_bias": True, "mlp_bias": True},
    "mistral": LLAMA | {"sliding_window": 5},
    "qwen2": {k: v for k, v in LLAMA.items() if k != "head_dim"}
    | {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 2},
    "qwen3": LLAMA | {"tie_word_embeddings": True},
    "olmo2": LLAMA,
    "gemma": LLAMA | {"num_key_value_heads": 1},
    "gemma2": GEMMA | {"query_pre_attn_scalar": 5, "attn_logit_softcapping": 2.0},
    "gemma3_text": GEMMA | {"query_pre_attn_scalar": 5},
    "opt": {"ffn_dim": MLP, "init_std": 0.3, "word_embed_proj_dim": HIDDEN},
    "gpt2": {"n_inner": MLP, "initializer_range": 0.3, "scale_attn_by_inverse_layer_idx": True},
    "gpt_neox": {"intermediate_size": MLP, "initializer_range": 0.3, "rotary_pct": 0.5},
}  # fmt: skip
FAMILIES = pytest.mark.parametrize("family", TINY)
TOKENS = torch.randint(3, 60, (2, 11), generator=torch.Generator().manual_seed(5))


@functools.cache
def stock_model(family):
    """A random model of a family, biases and norms included; never change it."""
    config = AutoConfig.for_model(
        family, vocab_size=60, hidden_size=HIDDEN, num_hidden_layers=LAYERS,
        num_attention_heads=HEADS, max_position_embeddings=40,
        pad_token_id=0, bos_token_id=1, eos_token_id=2, **TINY[family],
    )  # fmt: skip
    torch.manual_seed(len(family))
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for _, parameter in sorted(model.named_parameters()):
            if parameter.dim() == 1:
                parameter += 0.3 * torch.randn_like(parameter)
    return model.eval()


# -- an independent way to slice and to zero channels ------------------------------------------


def layers_of(model):
    where = ours.family_of(model.config.model_type)
    for layer in model.get_submodule(where.layers):
        yield getattr(layer, where.attention), layer.get_submodule(where.mlp), where


def separate(attention, config):
    """Views {q, k, v: [heads, D, hidden + 1]}, the bias (or zeros) in the last column."""
    parts = {}
    if hasattr(attention, "q_proj"):
        parts = {x: getattr(attention, f"{x}_proj") for x in "qkv"}
        parts = {x: (p.weight, p.bias) for x, p in parts.items()}
    elif hasattr(attention, "c_attn"):
        weight, bias = attention.c_attn.weight.T.chunk(3), attention.c_attn.bias.chunk(3)
        parts = dict(zip("qkv", zip(weight, bias, strict=True), strict=True))
    else:
        fused = attention.query_key_value
        weight = fused.weight.view(HEADS, 3, -1, HIDDEN).unbind(1)
        bias = fused.bias.view(HEADS, 3, -1).unbind(1)
        parts = dict(zip("qkv", zip(weight, bias, strict=True), strict=True))
    head_dim = ours.stock_sizes(config)["v_head_dim"]
    return {
        x: (
            weight.reshape(-1, head_dim, HIDDEN) if weight.dim() == 2 else weight,
            None if bias is None else bias.reshape(-1, head_dim),
        )
        for x, (weight, bias) in parts.items()
    }


def zeroed(stock, keeps):
    """A copy of the stock model in which the channels that are not kept are zero."""
    model = copy.deepcopy(stock)
    with torch.no_grad():
        for (attention, mlp, where), keep in zip(layers_of(model), keeps, strict=True):
            for x, parts in separate(attention, model.config).items():
                for part in parts:
                    if part is None or (kind := "v" if x == "v" else "qk") not in keep:
                        continue
                    groups = len(part) // len(keep[kind])
                    for head in range(len(part)):
                        drop = set(range(part.shape[1])) - set(keep[kind][head // groups])
                        part[head, sorted(drop)] = 0
            if "mlp" in keep:
                drop = sorted(set(range(MLP)) - set(keep["mlp"]))
                down = getattr(mlp, where.down)
                weight = down.weight if isinstance(down, torch.nn.Linear) else down.weight.T
                weight[:, drop] = 0
    return model


def sliced(stock, sizes, keeps, **options):
    """The compressed model with those channels of the stock one."""
    config = ours.compressed_config(stock.config, sizes)
    model = AutoModelForCausalLM.from_config(config, **options).eval()
    state = {
        name: tensor for name, tensor in stock.state_dict().items()
        if name in model.state_dict() and model.state_dict()[name].shape == tensor.shape
    }  # fmt: skip
    model.load_state_dict(state, strict=False)
    pairs = ours.stock_sizes(stock.config)["rope_pairs"]
    layers = zip(layers_of(model), layers_of(stock), keeps, strict=True)
    with torch.no_grad():
        for (attention, mlp, where), (old, old_mlp, _), keep in layers:
            if "mlp" in keep:
                slice_mlp(mlp, old_mlp, where, keep["mlp"])
            if not isinstance(attention, ours.CompressedAttention):
                continue
            slice_attention(attention, old, where, keep, stock.config)
            if attention.rope_pairs is not None:
                kept = [[c for c in channels if c < pairs] for channels in keep["qk"]]
                attention.rope_pairs.copy_(torch.tensor(kept))
    return model


def slice_mlp(mlp, old, where, keep):
    for name in (*where.up, where.down):
        new, was, rows = getattr(mlp, name), getattr(old, name), name != where.down
        if not isinstance(new, torch.nn.Linear):
            rows = not rows
        new.weight.copy_(was.weight[keep] if rows else was.weight[:, keep])
        if was.bias is not None:
            new.bias.copy_(was.bias if name == where.down else was.bias[keep])


def slice_attention(attention, old, where, keep, config):
    for x, (weight, bias) in separate(old, config).items():
        kept = keep["v" if x == "v" else "qk"]
        groups = len(weight) // len(kept)
        heads = range(len(weight))
        rows = torch.stack([weight[head, kept[head // groups]] for head in heads])
        getattr(attention, f"{x}_proj").weight.copy_(rows.flatten(0, 1))
        if bias is not None:
            rows = torch.stack([bias[head, kept[head // groups]] for head in heads])
            getattr(attention, f"{x}_proj").bias.copy_(rows.flatten())
    output = getattr(old, where.output)
    weight = output.weight if isinstance(output, torch.nn.Linear) else output.weight.T
    weight = weight.view(HIDDEN, HEADS, -1)
    groups = HEADS // len(keep["v"])
    columns = [weight[:, head, keep["v"][head // groups]] for head in range(HEADS)]
    attention.o_proj.weight.copy_(torch.cat(columns, dim=1))
    if output.bias is not None:
        attention.o_proj.bias.copy_(output.bias)


def whole(config):
    """The sizes of a layer, and what is kept of it, when nothing is dropped."""
    sizes, kv_heads = ours.stock_sizes(config), kv_heads_of(config)
    channels = list(range(sizes["v_head_dim"]))
    return sizes, {"qk": [channels] * kv_heads, "v": [channels] * kv_heads, "mlp": list(range(MLP))}


def kv_heads_of(config):
    return getattr(config, "num_key_value_heads", HEADS)


def dropped(config):
    """Sizes and channels kept, others in each layer: all kinds, MLP only, values only, nothing."""
    stock, everything = whole(config)
    rng = random.Random(3)
    pairs, half = stock["rope_pairs"], stock["v_head_dim"]
    sizes = {"intermediate_size": 7, "v_head_dim": 3}
    if not ours.family_of(config.model_type).qk_norm:
        sizes["rope_pairs"] = pairs // 2
        sizes["qk_pass"] = stock["qk_pass"] // 2 + (stock["qk_pass"] > 0)

    def some(n, of):
        return sorted(rng.sample(of, n))

    def qk():
        kept = some(sizes.get("rope_pairs", pairs), range(pairs))
        through = range(2 * pairs, half)
        return kept + [pairs + p for p in kept] + some(sizes.get("qk_pass", len(through)), through)

    keep = {
        "qk": [qk() for _ in range(kv_heads_of(config))],
        "v": [some(3, range(half)) for _ in range(kv_heads_of(config))],
        "mlp": some(7, range(MLP)),
    }
    only_v = {"qk": everything["qk"], "v": keep["v"]}
    given = [sizes, {"intermediate_size": 7}, {"v_head_dim": 3}, {}]
    return given, [keep, {"mlp": keep["mlp"]}, only_v, {}]


@functools.cache
def compressed(family):
    """A compressed model of a family, its weights sliced from the stock one; never change it."""
    return sliced(stock_model(family), *dropped(stock_model(family).config))


@torch.no_grad()
def logits(model, tokens=TOKENS, **options):
    return model(tokens, **options).logits


# -- equal to stock ----------------------------------------------------------------------------


@FAMILIES
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_whole_sizes_are_the_stock_model(family, attention):
    stock = copy.deepcopy(stock_model(family))
    if attention == "sdpa" and not stock._supports_sdpa:
        pytest.skip("this family has eager attention only")
    sizes, keep = whole(stock.config)
    model = sliced(stock, [sizes] * LAYERS, [keep] * LAYERS, attn_implementation=attention)
    stock.set_attn_implementation(attention)
    assert {stock.config._attn_implementation, model.config._attn_implementation} == {attention}
    assert all(isinstance(a, ours.CompressedAttention) for a, _, _ in layers_of(model))
    assert not any(name.endswith("rope_pairs") for name in model.state_dict())
    torch.testing.assert_close(logits(model), logits(stock), rtol=1e-5, atol=1e-5)


@FAMILIES
def test_no_sizes_are_the_stock_model_itself(family):
    stock = stock_model(family)
    model = AutoModelForCausalLM.from_config(ours.compressed_config(stock.config, [{}] * LAYERS))
    model.load_state_dict(stock.state_dict())
    assert torch.equal(logits(model.eval()), logits(stock))


@FAMILIES
def test_a_compressed_model_is_the_stock_one_with_zeros(family):
    stock = stock_model(family)
    _, keeps = dropped(stock.config)
    reference = logits(zeroed(stock, keeps))
    assert (reference - logits(stock)).abs().max() > 0.01
    model = compressed(family)
    torch.testing.assert_close(logits(model), reference, rtol=1e-4, atol=1e-4)  # of about 10
    whole_size = sum(p.numel() for p in stock.parameters())
    assert sum(p.numel() for p in model.parameters()) < whole_size


def test_pairs_keep_their_own_frequencies():
    model = copy.deepcopy(compressed("llama"))
    first = next(layers_of(model))[0]
    before = logits(model)
    first.rope_pairs.copy_((first.rope_pairs + 1) % 4)
    assert (logits(model) - before).abs().max() > 1e-3


# -- generation --------------------------------------------------------------------------------


def greedy(model, tokens, **options):
    return model.generate(
        tokens, max_new_tokens=9, do_sample=False, eos_token_id=None, pad_token_id=0, **options
    )


@FAMILIES
def test_the_cache_changes_nothing(family):
    model = compressed(family)
    mask = torch.ones_like(TOKENS)
    made = greedy(model, TOKENS, attention_mask=mask)
    assert torch.equal(made, greedy(model, TOKENS, attention_mask=mask, use_cache=False))
    following = logits(model, made)[:, TOKENS.shape[1] - 1 : -1].argmax(-1)
    assert torch.equal(made[:, TOKENS.shape[1] :], following)
    assert greedy(model, TOKENS, attention_mask=mask, num_beams=3).shape == made.shape


@FAMILIES
def test_sdpa_is_eager(family):
    model = copy.deepcopy(compressed(family))
    if not model._supports_sdpa:
        assert model.config._attn_implementation == "eager"
        return
    assert model.config._attn_implementation == "sdpa"
    one = logits(model)
    model.set_attn_implementation("eager")
    used = {attention.config._attn_implementation for attention, _, _ in layers_of(model)}
    assert used == {"eager"}
    torch.testing.assert_close(one, logits(model), rtol=1e-4, atol=1e-4)


@FAMILIES
def test_left_padding_changes_nothing(family):
    model = compressed(family)
    short = TOKENS[:1, 4:]
    padded = TOKENS.clone()
    padded[0, :4] = 0
    mask = torch.ones_like(TOKENS)
    mask[0, :4] = 0
    alone = greedy(model, short, attention_mask=torch.ones_like(short))[0, 7:]
    assert torch.equal(greedy(model, padded, attention_mask=mask)[0, 11:], alone)


def test_a_static_cache_takes_heads_of_different_sizes():
    made = greedy(compressed("llama"), TOKENS, cache_implementation="static")
    assert torch.equal(made, greedy(compressed("llama"), TOKENS))


# -- folders -----------------------------------------------------------------------------------


def save(family, folder, *, code=False, model=None):
    (model or compressed(family)).save_pretrained(folder)
    if code:
        entries = ours.config_entries(family)
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | entries))
        shutil.copy(ours.__file__, folder)
    return folder


@FAMILIES
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_saved_model_loads_strictly(family, dtype, tmp_path):
    model = load_model(save(family, tmp_path), dtype=dtype)
    assert type(model) is type(compressed(family))
    assert model.config.layer_sizes == compressed(family).config.layer_sizes
    for attention, _, _ in layers_of(model):
        if getattr(attention, "rope_pairs", None) is not None:
            assert attention.rope_pairs.dtype == torch.int64
    config = copy.deepcopy(compressed(family).config)
    expected = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype)).eval()
    expected.load_state_dict(compressed(family).state_dict())
    assert torch.equal(logits(model), logits(expected))
    model.save_pretrained(tmp_path / "again")
    again = load_file(tmp_path / "again/model.safetensors")
    assert all(torch.equal(again[k], v) for k, v in expected.state_dict().items() if k in again)
    assert again.keys() == load_file(tmp_path / "model.safetensors").keys()


def test_a_folder_with_code_of_ours_loads_by_the_installed_code(tmp_path):
    save("qwen2", tmp_path, code=True)
    (tmp_path / "modeling_poolreg.py").write_text("raise AssertionError\n")
    model = AutoModelForCausalLM.from_pretrained(tmp_path, trust_remote_code=False)
    assert type(model) is type(load_model(tmp_path, trust_code=True)) is type(compressed("qwen2"))


def test_a_layer_may_keep_no_rotated_pair(tmp_path):
    sizes = [{"rope_pairs": 0, "qk_pass": 3}] * LAYERS
    config = ours.compressed_config(stock_model("gpt_neox").config, sizes)
    model = AutoModelForCausalLM.from_config(config).eval()
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(load_model(tmp_path)), logits(model))


def test_files_that_lack_the_pairs_are_refused(tmp_path):
    save("llama", tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["model.layers.0.self_attn.rope_pairs"]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(Refused, match=r"1 missing: model\.layers\.0\.self_attn\.rope_pairs"):
        load_model(tmp_path)


def test_only_compressed_attention_has_other_names():
    names = {name for name in compressed("gpt2").state_dict() if ".h.0.attn" in name}
    parts = [f"{x}_proj.{part}" for x in "qkvo" for part in ("weight", "bias")]
    assert names == {f"transformer.h.0.attn.{part}" for part in parts}
    names = {name for name in compressed("llama").state_dict() if ".0.self_attn.rope" in name}
    assert names == {"model.layers.0.self_attn.rope_pairs"}


def test_the_stock_classes_are_untouched(tmp_path):
    stock_model("llama").save_pretrained(tmp_path)
    assert type(AutoModelForCausalLM.from_pretrained(tmp_path)).__name__ == "LlamaForCausalLM"


def test_it_trains():
    model = copy.deepcopy(compressed("qwen2")).train()
    model.activation_checkpointing_enable()
    model(TOKENS, labels=TOKENS).loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


# -- sizes that cannot be ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sizes", "says"),
    [
        ([{}] * 3, "must be a list of 4 dictionaries"),
        ("none", "must be a list of 4 dictionaries"),
        ([{}, {"head_dim": 4}, {}, {}], "layer 1 must be a dictionary with no keys but"),
        ([{}, 4, {}, {}], "layer 1 must be a dictionary"),
        ([{}, {}, {"intermediate_size": 0}, {}], "layer 2: intermediate_size is 0, not from 1 to"),
        ([{}, {}, {"intermediate_size": MLP + 1}, {}], "intermediate_size is 25, not from 1 to 24"),
        ([{"v_head_dim": 2.0}, {}, {}, {}], "v_head_dim is 2.0"),
        ([{"v_head_dim": True}, {}, {}, {}], "v_head_dim is True"),
        ([{"rope_pairs": 5}, {}, {}, {}], "rope_pairs is 5, not from 0 to 4"),
        ([{"rope_pairs": 0}, {}, {}, {}], "leave nothing of the queries and keys"),
        ([{"qk_pass": 1}, {}, {}, {}], "qk_pass is 1, not from 0 to 0"),
    ],
)
def test_bad_sizes_are_refused(sizes, says):
    with pytest.raises(ValueError, match=says):
        ours.compressed_config(stock_model("llama").config, sizes)
    config = ours.compressed_config(stock_model("llama").config, [{}] * LAYERS)
    object.__setattr__(config, "layer_sizes", sizes)
    with pytest.raises(ValueError, match=says):
        AutoModelForCausalLM.from_config(config)


@pytest.mark.parametrize("family", ["qwen3", "olmo2", "gemma3_text"])
def test_normalised_queries_and_keys_stay_whole(family):
    sizes = [{"rope_pairs": 2}] + [{}] * (LAYERS - 1)
    with pytest.raises(ValueError, match=r"layer 0: .* rope_pairs must stay 4"):
        ours.compressed_config(stock_model(family).config, sizes)


def test_an_unknown_family_is_refused():
    with pytest.raises(ValueError, match="'bloom' cannot be compressed; known are llama"):
        ours.stock_sizes(AutoConfig.for_model("bloom"))
    with pytest.raises(AttributeError, match="CompressedBloomConfig"):
        _ = ours.CompressedBloomConfig


# -- other processes -----------------------------------------------------------------------------

RUN = """
import sys, json
{prepare}
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
torch.set_num_threads(1)
tokens = torch.tensor(json.loads(sys.argv[2]))
for folder in sys.argv[3:]:
    model = AutoModelForCausalLM.from_pretrained(folder, **{options})
    with torch.no_grad():
        torch.save(model.eval()(tokens).logits, f"{{sys.argv[1]}}/{{model.config.model_type}}")
    {after}
"""
BLOCK = """
class Blocked:
    def find_spec(self, name, path=None, target=None):
        assert name.split(".")[0] != "poolreg", name
sys.meta_path.insert(0, Blocked())
"""


def run(code, *words, **environment):
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, words)], capture_output=True, text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.strip()


@pytest.mark.campaign
@pytest.mark.slow
def test_a_fresh_process_loads_them_after_importing_poolreg(tmp_path):
    folders = [save(family, tmp_path / family) for family in TINY]
    prepare = "import poolreg\nassert not {'torch', 'transformers'} & set(sys.modules)"
    code = RUN.format(prepare=prepare, options="{}", after="")
    run(code, tmp_path, TOKENS.tolist(), *folders)
    for family in TINY:
        made = torch.load(tmp_path / f"poolreg_{family}")
        torch.testing.assert_close(made, logits(compressed(family)), rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_a_process_without_poolreg_loads_them_with_the_code_in_the_folder(tmp_path):
    folders = [save(family, tmp_path / family, code=True) for family in TINY]
    # What such a process saves can be loaded in the same way again.
    after = "model.save_pretrained(folder + '/again')"
    code = RUN.format(prepare=BLOCK, options="{'trust_remote_code': True}", after=after)
    cache = {"HF_MODULES_CACHE": str(tmp_path / "cache")}
    run(code, tmp_path, TOKENS.tolist(), *folders, **cache)
    for family in TINY:
        made = torch.load(tmp_path / f"poolreg_{family}")
        torch.testing.assert_close(made, logits(compressed(family)), rtol=1e-5, atol=1e-6)
        config = json.loads((tmp_path / family / "again/config.json").read_text())
        assert config["auto_map"] == ours.config_entries(family)["auto_map"]
    shutil.copy(ours.__file__, tmp_path / "llama/again")
    again = RUN.format(prepare=BLOCK, options="{'trust_remote_code': True}", after="")
    run(again, tmp_path, TOKENS.tolist(), tmp_path / "llama/again", **cache)


@pytest.mark.slow
@pytest.mark.parametrize(
    "imports",
    [
        pytest.param(
            "import poolreg; from transformers import AutoConfig", marks=pytest.mark.campaign
        ),
        pytest.param(
            "import poolreg; from transformers import Gemma3ForCausalLM", marks=pytest.mark.campaign
        ),
        "from transformers import AutoConfig; import poolreg",
    ],
)
def test_any_way_into_transformers_registers_the_models(imports):
    code = f"""
import sys
{imports}
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
print(sum(name.startswith("poolreg_") for name in CONFIG_MAPPING))
print(sum(type(finder).__module__ == "poolreg.autoload" for finder in sys.meta_path))
"""
    assert run(code).split() == [str(len(ours.FAMILIES)), "0"]


def test_importing_poolreg_imports_neither_torch_nor_transformers():
    code = "import sys, poolreg; print(sorted({'torch', 'transformers'} & set(sys.modules)))"
    assert run(code) == "[]"


def test_a_failure_of_ours_is_a_warning_for_others(monkeypatch):
    monkeypatch.setattr(autoload, "OURS", "poolreg.no_such_module")
    with pytest.warns(UserWarning, match="compressed models are not available"):
        autoload.install()


# -- tokenizers ----------------------------------------------------------------------------------

TEXT = "Hello  world's 1234 tests,\n\n  naïve café — don't! ▁x"


def tokenizer_folder(folder, family, *, declared):
    """A folder with tokenizer files and the config.json of a stock model of the family."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE(unk_token="<unk>"))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<unk>", "<s>", "</s>", "<|endoftext|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator([TEXT] * 3, trainer)
    PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="</s>").save_pretrained(folder)
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text())
    config.pop("tokenizer_class")
    path.write_text(json.dumps(config | ({"tokenizer_class": declared} if declared else {})))
    stock_model(family).config.save_pretrained(folder)
    return folder


def seen(tokenizer):
    return [
        type(tokenizer).__name__,
        tokenizer(TEXT).input_ids,
        tokenizer.backend_tokenizer.to_str(),
    ]


CASES = [
    (family, declared)
    for family in ("llama", "qwen2", "qwen3", "mistral", "gpt_neox", "gpt2")
    for declared in (None, "PreTrainedTokenizerFast", "LlamaTokenizer", "GPT2Tokenizer")
]


def beside(tmp_path, family, declared, **options):
    """Folders with the same tokenizer files beside a stock and a compressed configuration."""
    stock = tokenizer_folder(tmp_path / f"{family}-{declared}", family, declared=declared)
    other = Path(shutil.copytree(stock, f"{stock}-compressed"))
    save(family, other, **options)
    return stock, other


@pytest.mark.parametrize(("family", "declared"), CASES[:8])
def test_the_tokenizer_is_that_of_the_stock_folder(family, declared, tmp_path):
    stock, other = beside(tmp_path, family, declared)
    assert seen(AutoTokenizer.from_pretrained(other)) == seen(AutoTokenizer.from_pretrained(stock))
    assert seen(load_tokenizer(other)) == seen(load_tokenizer(stock))


@pytest.mark.slow
@pytest.mark.parametrize(
    "prepare", [pytest.param("import poolreg", marks=pytest.mark.campaign), BLOCK]
)
def test_other_processes_see_the_same_tokenizer(prepare, tmp_path):
    code = f"""
import sys, json
{prepare}
from transformers import AutoTokenizer
for folder in sys.argv[1:]:
    t = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    seen = type(t).__name__, t({TEXT!r}).input_ids, t.backend_tokenizer.to_str()
    print(json.dumps(seen))
"""
    folders = [beside(tmp_path, family, declared, code=True) for family, declared in CASES]
    others = [other for _, other in folders]
    lines = run(code, *others, HF_MODULES_CACHE=str(tmp_path / "cache")).splitlines()
    assert len(lines) == len(folders)
    for line, (stock, _) in zip(lines, folders, strict=True):
        assert json.loads(line) == seen(AutoTokenizer.from_pretrained(stock))
