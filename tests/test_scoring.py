from __future__ import annotations

import functools
import json
import math
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast
from transformers.utils import logging as transformers_logging

from poolreg.errors import ConfigError, Incompatible, NotFound, Refused
from poolreg.evaluation import scoring
from poolreg.evaluation.protocol import Protocol
from poolreg.evaluation.scoring import TokenisedSet, score, tokenise
from poolreg.models.loading import load_model, load_tokenizer, pick_device, quiet_transformers

CONTEXT = 16
PROTOCOL = Protocol(CONTEXT, "00" * 32)
MERGES = ["t h", "th e", "i n", "a n", "e r", "Ġ the", "an d", "Ġ and", "Ġ in", "o n", "Ġ c"]
LLAMA_LIKE = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": CONTEXT,
}  # fmt: skip
SIZES = {
    "llama": LLAMA_LIKE,
    "mistral": LLAMA_LIKE,
    "qwen2": LLAMA_LIKE,
    "qwen3": {**LLAMA_LIKE, "head_dim": 8},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": CONTEXT},
    "opt": {
        "hidden_size": 32, "ffn_dim": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
        "word_embed_proj_dim": 32, "max_position_embeddings": CONTEXT,
    },
    "gpt_neox": {
        "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 4, "max_position_embeddings": CONTEXT,
    },
}  # fmt: skip
FAMILIES = ["llama", "gpt2", "opt", "gpt_neox"]
DOCUMENTS = [
    "the cat",
    "and the rain in the",
    "x" * CONTEXT,
    "",
    "x" * (CONTEXT + 1),
    "y" * (CONTEXT - 3),  # padded in a batch of full windows, as
    "and the cat is",  # this is beside other short ones
    "naïve café, 東京 and 😀",
    "the cat and the hat in the rain, " * 5,
    "def f(x):\n    return x and not x\n" * 3,
]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def make_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer written out by hand, so that it is the same everywhere."""
    symbols = ["<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    symbols += [merge.replace(" ", "") for merge in MERGES]
    pairs = [tuple(merge.split()) for merge in MERGES]
    bpe = models.BPE({symbol: index for index, symbol in enumerate(symbols)}, pairs)
    tokenizer = Tokenizer(bpe)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="</s>"
    )


def make_model(family: str, *, tied: bool = False, seed: int = 7):
    """A tiny model whose weights come from numpy's frozen generator, the same everywhere."""
    config = AutoConfig.for_model(
        family, vocab_size=272, bos_token_id=0, eos_token_id=1, pad_token_id=1,
        tie_word_embeddings=tied, **SIZES[family],
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    random = np.random.RandomState(seed)
    with torch.no_grad():
        for name, weight in sorted(model.named_parameters()):
            values = 0.3 * random.standard_normal(tuple(weight.shape))
            is_norm = weight.ndim == 1 and name.endswith("weight")
            weight.copy_(torch.from_numpy(values + 1.0 if is_norm else values))
    return model.eval()


@pytest.fixture(scope="module")
def tokenizer_folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    make_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def evalset(tokenizer_folder) -> TokenisedSet:
    return tokenise(DOCUMENTS, tokenizer_folder, PROTOCOL)


@pytest.fixture
def folder(tmp_path, tokenizer_folder) -> Path:
    return save(make_model("llama"), tmp_path / "llama", tokenizer_folder)


def save(model, folder: Path, tokenizer_folder: Path) -> Path:
    with quiet_transformers():
        model.save_pretrained(folder)
    shutil.copytree(tokenizer_folder, folder, dirs_exist_ok=True)
    return folder


def change_json(path: Path, **changes) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def change_tensors(folder: Path, change) -> None:
    path = folder / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


@torch.no_grad()
def reference_nll(model, ids: list[int], max_length: int) -> list[float]:
    """One forward pass a token, in float64: the rule of rolling windows, said per token."""
    model = model.double()
    inputs, values = [0, *ids], []
    for index, target in enumerate(ids):
        stop = min((index // max_length + 1) * max_length, len(ids))  # of this token's window
        context = inputs[max(0, stop - max_length) : index + 1]
        logits = model(torch.tensor([context])).logits[0, -1]
        values.append(-torch.log_softmax(logits, -1)[target].item())
    return values


# --- the numbers -------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_scores_equal_a_float64_loop_over_tokens(family, evalset):
    tokenizer = make_tokenizer()
    expected = [
        reference_nll(make_model(family), tokenizer.encode(text), CONTEXT) for text in DOCUMENTS
    ]
    scores = score(make_model(family), evalset)
    np.testing.assert_allclose(scores.token_nll, np.concatenate(expected), rtol=2e-5, atol=2e-5)
    np.testing.assert_allclose(scores.nll, [math.fsum(nll) for nll in expected], rtol=2e-6)
    assert scores.total_nll == pytest.approx(math.fsum(map(math.fsum, expected)), rel=2e-6)


# Made with lm-evaluation-harness 0.4.13 (transformers 5.23, torch 2.13, one thread).
HARNESS = {
    "llama": [
        34.3760529, 56.9495316, 140.611298, 0.0, 147.184617,
        77.6280212, 50.44487, 176.7005, 628.043533, 621.315109,
    ],
    "gpt2": [
        25.9902992, 64.4124908, 133.891617, 0.0, 141.872746,
        70.2392044, 59.2708397, 162.962769, 644.172356, 683.28054,
    ],
    "opt": [
        27.2550049, 57.5230598, 97.1596832, 0.0, 103.556498,
        102.958717, 61.3189163, 168.351822, 586.706726, 632.642189,
    ],
    "gpt_neox": [
        30.1721935, 55.9194527, 99.4762802, 0.0, 105.952911,
        147.776917, 61.6093369, 164.475365, 574.055523, 693.364876,
    ],
}  # fmt: skip


@pytest.mark.parametrize("family", FAMILIES)
def test_scores_equal_the_evaluation_harness(family, evalset):
    """The pinned figures come from this script, run in this folder with `lm-eval` installed.

    import torch
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM
    from test_scoring import CONTEXT, DOCUMENTS, FAMILIES, make_model, make_tokenizer

    torch.set_num_threads(1)
    asked = [
        Instance(request_type="loglikelihood_rolling", doc={}, arguments=(text,), idx=0)
        for text in DOCUMENTS
    ]
    for family in FAMILIES:
        lm = HFLM(make_model(family), tokenizer=make_tokenizer(), backend="causal",
                  max_length=CONTEXT, batch_size=3, add_bos_token=False)
        print(family, [-value for value in lm.loglikelihood_rolling(asked)])
    """
    scores = score(make_model(family), evalset)
    np.testing.assert_allclose(scores.nll, HARNESS[family], rtol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("batch_tokens", [1, 16, 17, 48, 100_000])
def test_batch_size_changes_nothing_but_noise(family, batch_tokens, evalset):
    model = make_model(family)
    alone = score(model, evalset, batch_tokens=1)  # a window at a time: no padding anywhere
    scores = score(model, evalset, batch_tokens=batch_tokens)
    np.testing.assert_allclose(scores.token_nll, alone.token_nll, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(scores.tokens, alone.tokens)


def test_the_same_call_gives_the_same_bits(evalset):
    model = make_model("llama")
    first, second = score(model, evalset), score(model, evalset)
    assert first.token_nll.tobytes() == second.token_nll.tobytes()
    assert first.nll.tobytes() == second.nll.tobytes()


@settings(max_examples=25, deadline=None)
@given(st.lists(st.text(max_size=60), max_size=6), st.integers(1, CONTEXT), st.integers(1, 200))
def test_a_document_scores_the_same_alone_and_in_company(
    shared, tokenizer_folder, texts, max_length, batch_tokens
):
    protocol = Protocol(max_length, "00" * 32)
    model = shared
    together = score(model, tokenise(texts, tokenizer_folder, protocol), batch_tokens=batch_tokens)
    alone = [score(model, tokenise([text], tokenizer_folder, protocol)) for text in texts]
    np.testing.assert_allclose(together.nll, [one.total_nll for one in alone], rtol=1e-5)
    assert together.tokens.tolist() == [one.total_tokens for one in alone]
    assert together.bytes.tolist() == [len(text.encode()) for text in texts]


@pytest.fixture(scope="module")
def shared():
    return make_model("gpt2")


def test_half_precision_models_are_scored_with_float32_logits(evalset):
    exact = score(make_model("llama"), evalset)
    rough = score(make_model("llama").to(torch.bfloat16), evalset)
    assert rough.token_nll.dtype == np.float32
    assert len(np.unique(rough.token_nll)) > 0.8 * len(np.unique(exact.token_nll))
    assert rough.total_nll == pytest.approx(exact.total_nll, rel=0.05)
    assert rough.total_nll != exact.total_nll


def test_dropout_is_off_even_for_a_model_in_training(evalset):
    model = make_model("gpt2")
    expected = score(model, evalset).token_nll
    np.testing.assert_array_equal(score(model.train(), evalset).token_nll, expected)


def test_progress_adds_up_to_the_tokens(evalset):
    told: list[int] = []
    scores = score(make_model("llama"), evalset, batch_tokens=32, progress=told.append)
    assert sum(told) == scores.total_tokens == evalset.total_tokens
    assert len(told) > 1


# --- documents and tokens ----------------------------------------------------------------------


def test_documents_are_counted_in_tokens_and_bytes(evalset):
    tokenizer = make_tokenizer()
    assert evalset.tokens.tolist() == [len(tokenizer.encode(text)) for text in DOCUMENTS]
    assert evalset.bytes.tolist() == [len(text.encode("utf-8")) for text in DOCUMENTS]
    assert evalset.tokens[2:5].tolist() == [CONTEXT, 0, CONTEXT + 1]
    assert evalset.bytes[7] > len(DOCUMENTS[7])


def test_an_empty_document_has_no_tokens_and_no_nats(tokenizer_folder):
    scores = score(make_model("llama"), tokenise(["", "the", ""], tokenizer_folder, PROTOCOL))
    assert scores.tokens.tolist() == [0, 1, 0]
    assert scores.nll[[0, 2]].tolist() == [0.0, 0.0]
    assert scores.nll[1] == scores.token_nll[0] > 0


@pytest.mark.parametrize("texts", [[], [""], ["", ""]])
def test_nothing_to_score_scores_nothing(texts, tokenizer_folder):
    scores = score(make_model("llama"), tokenise(texts, tokenizer_folder, PROTOCOL))
    assert scores.nll.tolist() == [0.0] * len(texts)
    assert (scores.total_nll, scores.total_tokens, scores.total_bytes) == (0.0, 0, 0)
    assert scores.token_nll.shape == (0,)


def test_more_documents_than_are_tokenised_at_once(tokenizer_folder):
    texts = [f"the {number}" for number in range(150)]
    tokens = tokenise(texts, tokenizer_folder, PROTOCOL)
    tokenizer = make_tokenizer()
    assert tokens.stream.tolist() == [i for text in texts for i in [0, *tokenizer.encode(text)]]


def test_special_tokens_of_the_tokenizer_are_not_text(tmp_path):
    tokenizer = make_tokenizer()
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)]
    )
    tokenizer.save_pretrained(tmp_path)
    assert load_tokenizer(tmp_path).encode("x")[0] == 0  # it would add them
    assert tokenise(["x"], tmp_path, PROTOCOL).tokens.tolist() == [1]


def test_the_prefix_is_bos_else_eos(tmp_path, tokenizer_folder):
    folder = Path(shutil.copytree(tokenizer_folder, tmp_path / "t"))
    assert tokenise(["x"], folder, PROTOCOL).stream[0] == 0
    change_json(folder / "tokenizer_config.json", bos_token=None)
    assert tokenise(["x"], folder, PROTOCOL).stream[0] == 1
    change_json(folder / "tokenizer_config.json", eos_token=None)
    with pytest.raises(Refused, match="neither a BOS nor an EOS"):
        tokenise(["x"], folder, PROTOCOL)


def test_a_lone_surrogate_is_refused_with_its_document(tokenizer_folder):
    with pytest.raises(Refused, match="document 1 is not Unicode") as caught:
        tokenise(["fine", "a\ud800"], tokenizer_folder, PROTOCOL)
    assert caught.value.data == {"document": 1}


@pytest.mark.parametrize(
    "damage",
    [
        lambda folder: (folder / "tokenizer.json").unlink(),
        lambda folder: (folder / "tokenizer.json").write_text("{}"),
        lambda folder: (folder / "tokenizer.json").write_text("{nope"),
        lambda folder: change_json(folder / "tokenizer.json", model={"type": "Nonesuch"}),
        lambda folder: (folder / "tokenizer_config.json").write_text("[]"),
        lambda folder: change_json(folder / "tokenizer_config.json", bos_token=5),
        lambda folder: change_json(
            folder / "tokenizer_config.json", auto_map={"AutoTokenizer": ["code.Mine", None]}
        ),
    ],
)
def test_malformed_tokenizers_are_refused(damage, tmp_path, tokenizer_folder):
    folder = Path(shutil.copytree(tokenizer_folder, tmp_path / "t"))
    damage(folder)
    with pytest.raises(Refused):
        load_tokenizer(folder)


# --- what does not fit together ----------------------------------------------------------------


def test_a_tokenizer_larger_than_the_model_is_refused(evalset):
    model = make_model("llama")
    model.resize_token_embeddings(200)
    with pytest.raises(Incompatible, match="only 200 tokens"):
        score(model, evalset)


@pytest.mark.parametrize("family", FAMILIES)
def test_windows_longer_than_the_context_are_refused(family, tokenizer_folder):
    tokens = tokenise(DOCUMENTS, tokenizer_folder, Protocol(CONTEXT + 1, "00" * 32))
    with pytest.raises(Incompatible, match=f"context of {CONTEXT}"):
        score(make_model(family), tokens)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_likelihood_that_is_not_finite_names_its_document(value, tokenizer_folder):
    model = make_model("llama")
    tokens = tokenise(["", "the", "x y", "xyx", "y"], tokenizer_folder, PROTOCOL)
    with torch.no_grad():  # only what follows a y is lost
        model.get_input_embeddings().weight[make_tokenizer().encode("y")] = value
    with pytest.raises(Refused, match="document 3 is not finite") as caught:
        score(model, tokens)
    assert "NaN" in caught.value.hint
    assert caught.value.data == {"document": 3}


# --- loading -----------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", SIZES)
def test_saved_models_load_whole_and_silently(family, tied, tmp_path, tokenizer_folder, capfd):
    model = make_model(family, tied=tied)
    loaded = load_model(save(model, tmp_path / "m", tokenizer_folder))
    assert not loaded.training
    assert {p.dtype for p in loaded.parameters()} == {torch.float32}
    for name, weight in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], weight), name
    assert capfd.readouterr() == ("", "")


def test_models_load_in_the_dtype_that_is_asked_for(folder):
    assert load_model(folder, dtype="bfloat16").dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("family", "prefix"),
    [
        ("llama", "model.layers.0.self_attn"),
        ("gpt2", "transformer.h.0.attn"),
        ("gpt_neox", "gpt_neox.layers.0.attention"),
    ],
)
def test_constants_that_older_libraries_saved_are_no_left_overs(
    family, prefix, tmp_path, tokenizer_folder
):
    folder = save(make_model(family), tmp_path / "m", tokenizer_folder)
    old = {f"{prefix}.rotary_emb.inv_freq": torch.ones(4)}
    if family != "llama":
        old[f"{prefix}.bias"] = torch.ones(1, 1, CONTEXT, CONTEXT, dtype=torch.bool)
        old[f"{prefix}.masked_bias"] = torch.tensor(-1e9)
    change_tensors(folder, lambda tensors: tensors.update(old))
    load_model(folder)


def double_norm(tensors):
    tensors["model.norm.weight"] = torch.ones(64)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("model.norm.weight"), "1 missing: model.norm.weight"),
        (lambda t: t.pop("lm_head.weight"), "1 missing: lm_head.weight"),
        (lambda t: t.update({"extra.weight": torch.ones(1)}), "1 left over: extra.weight"),
        (double_norm, r"1 of another shape: model.norm.weight \[64\] not \[32\]"),
    ],
)
def test_tensors_that_are_not_those_of_the_config_are_refused(change, message, folder):
    change_tensors(folder, change)
    with pytest.raises(Refused, match=message):
        load_model(folder)


def test_many_missing_tensors_are_counted_and_some_named(folder):
    change_json(folder / "config.json", num_hidden_layers=3)
    with pytest.raises(Refused, match=r"9 missing: model\.layers\.2\..*, …") as caught:
        load_model(folder)
    assert len(caught.value.data["tensors"]) == 9


def test_two_different_tensors_where_the_config_says_tied_are_refused(folder):
    change_json(folder / "config.json", tie_word_embeddings=True)
    with pytest.raises(Refused, match="stored as two: lm_head"):
        load_model(folder)


@pytest.mark.parametrize(
    "damage",
    [
        lambda folder: (folder / "model.safetensors").unlink(),
        lambda folder: (folder / "model.safetensors").write_bytes(b"\xff" * 100),
        lambda folder: (folder / "config.json").unlink(),
        lambda folder: (folder / "config.json").write_text("{nope"),
        lambda folder: (folder / "config.json").write_text("[]"),
        lambda folder: change_json(folder / "config.json", model_type="nonesuch"),
        lambda folder: change_json(folder / "config.json", model_type="t5"),
        lambda folder: change_json(folder / "config.json", hidden_size="wide"),
        lambda folder: change_json(folder / "config.json", hidden_act="nonesuch"),
        lambda folder: change_json(folder / "config.json", num_attention_heads=0),
    ],
)
def test_incomplete_and_malformed_folders_are_refused(damage, folder):
    damage(folder)
    with pytest.raises(Refused, match=str(folder)):
        load_model(folder)


def test_a_folder_that_is_not_there_is_not_looked_for_elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for load in (load_model, load_tokenizer):
        with pytest.raises(NotFound, match="no folder gpt2"):
            load(Path("gpt2"))


def test_sharded_models_load(tmp_path, tokenizer_folder, evalset):
    model = make_model("llama")
    with quiet_transformers():
        model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    loaded = score(load_model(tmp_path), evalset)
    np.testing.assert_array_equal(loaded.token_nll, score(model, evalset).token_nll)


def test_a_truncated_weights_file_is_refused(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(Refused, match="cannot be loaded"):
        load_model(folder)


def test_pickled_weights_are_never_opened(folder):
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(tensors, folder / "pytorch_model.bin")
    with pytest.raises(Refused, match="cannot be loaded"):
        load_model(folder)


@pytest.mark.parametrize(
    "code",
    [
        {"auto_map": {"AutoModelForCausalLM": "code.Mine"}},
        {"auto_map": {"AutoConfig": "code.Mine"}, "model_type": "mine"},
        {"_attn_implementation": "someone/kernel"},
    ],
)
def test_code_from_outside_is_refused_unless_trusted(code, folder):
    change_json(folder / "config.json", **code)
    (folder / "code.py").write_text("raise SystemExit('it ran')")
    with pytest.raises(Refused, match="run code of its author") as caught:
        load_model(folder)
    assert "--trust-code" in caught.value.hint


def test_trusted_code_runs(folder):
    source = "from transformers import LlamaForCausalLM\nclass Mine(LlamaForCausalLM): pass\n"
    (folder / "code.py").write_text(source)
    change_json(folder / "config.json", auto_map={"AutoModelForCausalLM": "code.Mine"})
    assert type(load_model(folder, trust_code=True)).__name__ == "Mine"


def test_loading_leaves_the_librarys_settings_as_they_were(folder):
    level = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_info()
    try:
        with quiet_transformers():
            assert not transformers_logging.is_progress_bar_enabled()
            load_model(folder)
        assert transformers_logging.get_verbosity() == transformers_logging.INFO
        assert transformers_logging.is_progress_bar_enabled()
    finally:
        transformers_logging.set_verbosity(level)


# --- devices -----------------------------------------------------------------------------------


def test_auto_picks_a_device_that_is_there():
    assert pick_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")
    assert pick_device("cpu") == torch.device("cpu")


@pytest.mark.parametrize("name", ["nonesuch", "cuda:99", "cpu:x", "", "meta"])
def test_devices_that_are_not_there_are_refused(name):
    with pytest.raises(ConfigError, match="cannot be used"):
        pick_device(name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_the_loss_is_that_of_the_library(dtype, share, monkeypatch):
    """Bit for bit, a few rows at a time."""
    monkeypatch.setattr(scoring, "SOFTMAX_AT_ONCE", 500)
    source = torch.Generator().manual_seed(3)
    logits = (8 * torch.randn(97, 41, generator=source)).to(dtype)
    targets = torch.randint(0, 41, (97,), generator=source)
    rows = torch.arange(97)[torch.rand(97, generator=source) < share]
    found = scoring._token_nll(logits[rows], targets[rows])
    exact = torch.nn.functional.cross_entropy(logits[rows].float(), targets[rows], reduction="none")
    assert torch.equal(found, exact)


@given(st.lists(st.integers(0, len(DOCUMENTS) - 1), max_size=12))
@settings(max_examples=30)
def test_some_documents_score_as_among_all(documents):
    """In any order, also again, also empty ones."""
    evalset, model, whole = scored_once()
    some = evalset.only(np.array(documents, np.int64))
    found = score(model, some)
    assert found.tokens.tolist() == [int(evalset.tokens[d]) for d in documents]
    assert found.bytes.tolist() == [int(evalset.bytes[d]) for d in documents]
    ends = np.cumsum(evalset.tokens)
    pieces = [whole.token_nll[ends[d] - evalset.tokens[d] : ends[d]] for d in documents]
    np.testing.assert_allclose(found.token_nll, np.concatenate([[], *pieces]), rtol=1e-3, atol=1e-5)


@functools.cache
def scored_once():
    """All documents, a model, and what it scores on them."""
    with tempfile.TemporaryDirectory() as folder:
        make_tokenizer().save_pretrained(folder)
        evalset = tokenise(DOCUMENTS, Path(folder), PROTOCOL)
    model = make_model("llama")
    return evalset, model, score(model, evalset)
