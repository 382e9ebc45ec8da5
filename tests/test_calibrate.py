"""Calibration against a plain float64 reference: what counts, what is held out, what attention is."""

from __future__ import annotations

import json

import numpy as np
import pools
import pytest
import torch

from poolreg import Pool
from poolreg.compress import calibrate as module
from poolreg.compress.architectures import FAMILIES, heads, layers, read_layer
from poolreg.compress.attention import LocalAttention, value_bases
from poolreg.compress.calibrate import choose_windows, gather, held_ids
from poolreg.compress.calibrations import tokens_of
from poolreg.compress.workshop import Compression, opened
from poolreg.errors import Refused
from poolreg.evaluation.protocol import rolling_windows
from poolreg.evaluation.scoring import TokenisedSet
from poolreg.progress import SILENT

pytestmark = pytest.mark.usefixtures("one_thread")

LENGTH = 12
LENGTHS = [3, 40, 12, 1, 25, 13, 30, 7, 11, 60, 2, 19, 8, 33, 5, 44, 9, 21]  # of documents
REFERENCED = pytest.mark.parametrize("family", ["llama", "gpt_neox", "gpt2", "opt", "qwen3"])


def tokenised(lengths=LENGTHS, length=LENGTH):
    """Documents of random tokens, cut as they are for evaluation."""
    random = np.random.default_rng(5)
    stream, windows, start = [], [], 0
    for size in lengths:
        stream.append(np.array([0, *random.integers(2, pools.VOCABULARY, size)], np.int32))
        rows = np.array(list(rolling_windows(size, length)), np.int64)
        windows.append(rows + np.array([start, start, 0]))
        start += size + 1
    sizes = np.array(lengths, np.int64)
    return TokenisedSet(np.concatenate(stream), np.concatenate(windows), sizes, sizes)


def gathered(model, tokens, limit=10_000, **options):
    names = FAMILIES[model.config.model_type]
    sample = choose_windows(tokens, limit)
    return sample, dict(gather(model, names, tokens, sample=sample, **options))


# -- the reference --------------------------------------------------------------------------

# Where the modules are that take what is calibrated: attention, output and down projection.
PLACES = {
    "llama": ("model.layers.{}", "self_attn", "self_attn.o_proj", "mlp.down_proj"),
    "qwen2": ("model.layers.{}", "self_attn", "self_attn.o_proj", "mlp.down_proj"),
    "qwen3": ("model.layers.{}", "self_attn", "self_attn.o_proj", "mlp.down_proj"),
    "opt": ("model.decoder.layers.{}", "self_attn", "self_attn.out_proj", "fc2"),
    "gpt2": ("transformer.h.{}", "attn", "attn.c_proj", "mlp.c_proj"),
    "gpt_neox": ("gpt_neox.layers.{}", "attention", "attention.dense", "mlp.dense_4h_to_h"),
}


@torch.no_grad()
def window_activations(model, ids):
    """Rows [T, n] of one window alone, for each layer, from the model in float64."""
    found, hooks = [], []
    where, *parts = PLACES[model.config.model_type]
    for index in range(2):
        seen = {}
        found.append(seen)
        layer = model.get_submodule(where.format(index))

        def keep(name, seen=seen):
            def hook(_, args, kwargs):
                value = args[0] if args else kwargs["hidden_states"]
                seen[name] = value.reshape(len(ids), -1)

            return hook

        def after(_, args, kwargs, output, seen=seen):
            seen["before"] = (args[0] if args else kwargs["hidden_states"])[0]
            seen["after"] = (output[0] if isinstance(output, tuple) else output).reshape(len(ids), -1)  # fmt: skip

        for name, part in zip(("attention", "out", "mlp"), parts, strict=True):
            target = layer.get_submodule(part)
            hooks.append(target.register_forward_pre_hook(keep(name), with_kwargs=True))
        hooks.append(layer.register_forward_hook(after, with_kwargs=True))
    model(input_ids=torch.tensor(ids, dtype=torch.int64)[None], use_cache=False)
    for hook in hooks:
        hook.remove()
    for index, seen in enumerate(found):
        seen |= queries_keys_values(model, index, seen["attention"])
    return found


def queries_keys_values(model, index, x):
    """Queries [T, 4, 8] and keys [T, h_kv, 8] after rotation, values, by formulas of their own."""
    kind = model.config.model_type
    layer = model.get_submodule(PLACES[kind][0].format(index))
    attention = layer.get_submodule(PLACES[kind][1])
    if kind == "gpt2":
        q, k, v = attention.c_attn(x).view(-1, 3, 4, 8).unbind(1)
    elif kind == "gpt_neox":
        q, k, v = attention.query_key_value(x).view(-1, 4, 3, 8).unbind(2)
    else:
        projections = (attention.q_proj, attention.k_proj, attention.v_proj)
        q, k, v = (p(x).view(len(x), -1, 8) for p in projections)
    if kind == "qwen3":
        return {"values": v}
    if kind in ("llama", "gpt_neox"):
        pairs = 2 if kind == "gpt_neox" else 4
        q, k = turned(q, pairs), turned(k, pairs)
    return {"queries": q, "keys": k, "values": v}


def turned(x, pairs):
    """Turn pair p of each head by position · 10000^(−p/pairs), as complex numbers."""
    angles = torch.arange(len(x))[:, None] * 10_000.0 ** (-torch.arange(pairs).double() / pairs)
    numbers = torch.complex(x[..., :pairs], x[..., pairs : 2 * pairs])
    numbers = numbers * torch.polar(torch.ones_like(angles), angles)[:, None]
    return torch.cat([numbers.real, numbers.imag, x[..., 2 * pairs :]], -1)


def reference(model, tokens, windows):
    """Gram matrices, sums, influence and energy of each layer, one window at a time."""
    exact = pools.random_model(model.config.model_type).double()
    rows = [{}, {}]
    for start, stop, scored in windows:
        for seen, all_rows in zip(window_activations(exact, tokens.stream[start:stop]), rows, strict=True):  # fmt: skip
            for name, value in seen.items():
                all_rows.setdefault(name, []).append(value[len(value) - scored :])
    return [{name: torch.cat(parts) for name, parts in layer.items()} for layer in rows]


@REFERENCED
def test_what_is_gathered_equals_a_plain_reference(family):
    model, tokens = pools.random_model(family), tokenised()
    sample, found = gathered(model, tokens)
    assert sample.tokens + sample.held_out_tokens == sum(LENGTHS)  # each once
    assert list(found) == [0, 1]
    for layer, rows in enumerate(reference(model, tokens, sample.windows)):
        made = found[layer]
        assert made.tokens == sample.tokens == len(rows["mlp"])
        for name in ("mlp", "out"):
            close(made[name], rows[name].T @ rows[name])
            close(made[f"{name}_sum"], rows[name].sum(0))
        for name in ("queries", "keys", "values"):
            assert (name in made) == (name in rows) == (family != "qwen3" or name == "values")
            if name in made:
                close(made[name], torch.einsum("nhi,nhj->hij", rows[name], rows[name]))
                close(made[f"{name}_sum"], rows[name].sum(0))
        before, after = rows["before"], rows["after"]
        cosines = torch.cosine_similarity(before, after)
        assert made.influence == pytest.approx(1 - float(cosines.mean()), abs=1e-5)
        assert made.energy == pytest.approx(float(after.square().sum(1).mean()), rel=1e-5)


def close(made, expected):
    # The model computes in float32: its activations differ by some 1e-6 from those in float64.
    assert made.dtype == torch.float64
    assert made.shape == expected.shape
    assert float((made - expected).abs().max()) <= 2e-5 * float(expected.abs().max())


@REFERENCED
def test_held_out_rows_are_the_activations(family):
    model, tokens = pools.random_model(family), tokenised()
    sample, found = gathered(model, tokens)
    assert len(sample.held_out) >= 2
    taken = {tuple(row) for row in sample.windows.tolist()}
    assert not taken & {tuple(row) for row in sample.held_out.tolist()}
    for layer, rows in enumerate(reference(model, tokens, sample.held_out)):
        made = found[layer]
        mask = made["held_mask"]
        assert int(mask.sum()) == sample.held_out_tokens == len(rows["mlp"])
        for name, held in (("attention", "held_x"), ("mlp", "held_mlp"), ("out", "held_out")):
            assert made[held].dtype == torch.float32
            # Windows stand in the order of their batches: sort the rows to compare them.
            one, other = made[held][mask].double(), rows[name]
            order, other_order = (part[:, 0].argsort() for part in (one, other))
            torch.testing.assert_close(one[order], other[other_order], atol=2e-4, rtol=2e-4)


@REFERENCED
def test_one_layer_alone_gives_the_same(family):
    model, tokens = pools.random_model(family), tokenised()
    told = []
    _, every = gathered(model, tokens, progress=told.append)
    assert told == [1, 1]
    _, only = gathered(model, tokens, only=[1])
    assert list(only) == [1]
    assert every[1].tensors.keys() == only[1].tensors.keys()
    assert (every[1].influence, every[1].energy) == (only[1].influence, only[1].energy)
    assert all(torch.equal(value, only[1][name]) for name, value in every[1].tensors.items())


@REFERENCED
def test_the_model_is_left_as_it_was(family):
    model, tokens = pools.random_model(family), tokenised()
    names = FAMILIES[family]
    before, ids = layers(model, names), torch.arange(2, 9)[None]
    logits = model(input_ids=ids).logits
    gathering = gather(model, names, tokens, sample=choose_windows(tokens, 10_000))
    next(gathering)  # and no more than the first layer
    assert all(one is other for one, other in zip(layers(model, names), before, strict=True))
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in model.modules())
    assert torch.equal(model(input_ids=ids).logits, logits)


def test_padding_and_the_batch_change_nothing(monkeypatch):
    model, tokens = pools.random_model("llama"), tokenised()
    _, together = gathered(model, tokens)
    monkeypatch.setattr(module, "BATCH_TOKENS", {"cpu": 1})
    _, alone = gathered(model, tokens)
    for name in ("mlp", "out", "queries", "keys", "values"):
        close(alone[1][name], together[1][name])


@pytest.mark.parametrize("family", ["llama", "gpt_neox", "opt", "gpt2", "qwen2", "gemma"])
def test_local_attention_is_the_model_s_own(family):
    model, tokens = pools.random_model(family), tokenised()
    names, sizes = FAMILIES[family], heads(model.config)
    _, found = gathered(model, tokens)
    for index, layer in enumerate(layers(model, names)):
        weights = read_layer(layer, names, sizes)
        scaling = float(layer.get_submodule(names.attention).scaling)
        local = LocalAttention(weights, found[index], sizes, scaling)
        own = found[index]["held_out"][found[index]["held_mask"]]
        torch.testing.assert_close(local.mixed, own, atol=1e-4, rtol=1e-4)
        whole = torch.eye(sizes.size, dtype=torch.float64)
        maps = [whole.expand(count, -1, -1) for count in (sizes.queries, sizes.keys)]
        assert local.error(tuple(maps)) < 1e-8
        # Without any scores every token attends evenly to what is before it.
        error = local.error((maps[0] * 0, maps[1]))
        assert error == pytest.approx(evenly(local, own, weights.o.float()), rel=1e-3)


def evenly(local, own, output):
    groups = local.heads.group
    values = local.values.repeat_interleave(groups, 1)  # [W, h, T, D]
    counts = torch.arange(1, values.shape[2] + 1)[:, None]
    mean = (values.cumsum(2) / counts).transpose(1, 2).flatten(2)[local.mask]
    return float(((mean - own) @ output).square().sum(1).mean())


@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2"])  # without bias, with, and fused
def test_values_are_counted_without_their_bias(family):
    model, tokens = pools.random_model(family), tokenised()
    names, sizes = FAMILIES[family], heads(model.config)
    sample, found = gathered(model, tokens)
    rows = reference(model, tokens, sample.windows)[0]["attention"]
    weights = read_layer(layers(model, names)[0], names, sizes)
    assert (weights.v_bias is None) == (family == "llama")
    made = value_bases(weights, found[0], sizes, frozenset())[0]
    for head, columns in enumerate(weights.v.split(sizes.size, 1)):
        # The basis makes what the head computes of the text white: PᵀCP = 1.
        mapped = rows @ columns @ made[head]
        white = mapped.T @ mapped / len(rows)
        torch.testing.assert_close(white, torch.eye(sizes.size).double(), atol=1e-4, rtol=0)


# -- which windows --------------------------------------------------------------------------


def test_windows_are_chosen_alike_each_time():
    tokens = tokenised()
    one, two = choose_windows(tokens, 150), choose_windows(tokens, 150)
    assert np.array_equal(one.windows, two.windows)
    assert np.array_equal(one.held_out, two.held_out)
    assert 150 <= one.tokens + one.held_out_tokens < 150 + LENGTH
    assert len(one.held_out) == -(-(len(one.windows) + len(one.held_out)) // 8)
    ids = held_ids(tokens, one)
    assert ids.shape[1] == max(stop - start for start, stop, _ in one.held_out)
    everything = choose_windows(tokens, 10**9)
    rows = np.concatenate([everything.windows, everything.held_out])
    assert {tuple(row) for row in rows} == {tuple(row) for row in tokens.windows}
    assert len(rows) == len(tokens.windows)


def test_not_too_much_is_held_out(monkeypatch):
    monkeypatch.setattr(module, "HELD_OUT_TOKENS", 20)
    sample = choose_windows(tokenised(), 10**9)
    assert 20 <= sample.held_out_tokens < 20 + LENGTH
    assert sample.tokens + sample.held_out_tokens == sum(LENGTHS)


def test_one_window_is_no_sample():
    sample = choose_windows(tokenised([5]), 100)
    assert (sample.tokens, sample.held_out_tokens) == (0, 5)
    empty = choose_windows(tokenised([5]), 0)
    assert empty.tokens == 0


def test_what_is_not_finite_is_named():
    model, tokens = pools.random_model("opt"), tokenised()
    with torch.no_grad():
        model.model.decoder.layers[1].fc1.bias[3] = float("nan")
    with pytest.raises(Refused, match="the mlp activations of layer 1 are not finite"):
        gathered(model, tokens)
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in model.modules())


# -- in a pool ------------------------------------------------------------------------------


@pytest.fixture
def prose(tmp_path):
    with Pool.create(tmp_path / "pool") as pool:
        text = pools.write_prose(tmp_path / "prose.jsonl", 40)
        pool.add_evalset("prose", [text])
        pool.add_partition("rows", [text], units=1)
        pool.add_partition("halves", [text], units=2)
        folder = pools.saved(pools.random_model("llama"), tmp_path / "model")
        pool.add_model(folder, name="model")
        yield pool, len(text.read_text().splitlines())


def workshop(pool, **how):
    return opened(pool.registry, pool.resolve("model"), Compression(**how), SILENT)


def test_stored_statistics_are_those_gathered(prose):
    pool, _ = prose
    with workshop(pool, calibrate="prose") as made:
        calibration = made.calibration
        assert not calibration.memoised
        tokens = tokens_of(pool.registry, calibration, made.folder)
        sample, found = gathered(made.load(), tokens, calibration.limit)
        assert calibration.tokens == sample.tokens
        assert calibration.held_out_tokens == sample.held_out_tokens
        for layer in (0, 1):
            stored = calibration.layer(pool.registry, layer)
            assert (stored.tokens, stored.influence, stored.energy) == (
                found[layer].tokens, found[layer].influence, found[layer].energy
            )  # fmt: skip
            assert stored.tensors.keys() == found[layer].tensors.keys()
            assert stored["held_mask"].dtype == torch.bool
            for name, value in found[layer].tensors.items():
                assert torch.equal(stored[name], value), name
        ids = calibration.ids(pool.registry)
        assert torch.equal(ids, torch.from_numpy(held_ids(tokens, sample)).long())
        grams = [found[layer][name] for layer in (0, 1) for name in ("mlp", "out")]
        worst = max(float(torch.linalg.cond(gram)) for gram in grams)
        assert calibration.condition == pytest.approx(worst, rel=0.2)


def test_a_partition_is_read_unit_by_unit(prose):
    pool, documents = prose
    with workshop(pool, calibrate="prose") as made:
        whole = tokens_of(pool.registry, made.calibration, made.folder)
        by_set = made.calibration
    for name in ("rows", "halves"):
        with workshop(pool, calibrate=name) as made:
            assert made.calibration.text.kind == "partition"
            assert not made.calibration.memoised
            tokens = tokens_of(pool.registry, made.calibration, made.folder)
            assert len(tokens.tokens) == documents
            assert sorted(tokens.tokens) == sorted(whole.tokens)
            together = made.calibration.tokens + made.calibration.held_out_tokens
            assert together == by_set.tokens + by_set.held_out_tokens == whole.total_tokens
    with workshop(pool, calibrate="rows", tokens=150) as made:
        tokens = tokens_of(pool.registry, made.calibration, made.folder)
        assert 150 <= tokens.total_tokens < whole.total_tokens  # only what is needed is read
        assert made.calibration.limit == 150


@pytest.mark.slow
def test_a_calibration_is_known_by_what_it_depends_on(prose, monkeypatch):
    pool, _ = prose
    digests = set()
    different = [{}, {"tokens": 500}, {"max_length": 9}, {"dtype": "bfloat16"}]
    for how in different:
        with workshop(pool, calibrate="prose", target="portable", **how) as made:
            digests.add(made.calibration.digest)
    assert len(digests) == len(different)
    monkeypatch.setattr("poolreg.compress.calibrations.gather", None)
    for how in ({"method": "modegpt"}, {"target": "stock"}, {"sequential": True}, {"step": 4}):
        with workshop(pool, calibrate="prose", **how) as made:
            assert made.calibration.memoised
            assert made.calibration.digest in digests
    assert pool.sql("SELECT count(*) FROM calibrations").rows == [(len(different),)]


def test_an_evalset_comes_before_a_partition_of_its_name(prose, tmp_path):
    pool, _ = prose
    (tmp_path / "other.jsonl").write_text(json.dumps({"text": "other"}) + "\n")
    pool.add_partition("prose", [tmp_path / "other.jsonl"], units=1)
    with workshop(pool, calibrate="prose", target="portable") as made:
        assert made.calibration.text.kind == "evalset"
