"""Compressed variants in a pool: they shrink as planned, load everywhere, and lose nothing that
can be kept; what cannot be compressed is refused and leaves the pool as it was."""

from __future__ import annotations

import dataclasses
import json
import math
import subprocess
import sys

import pools
import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM

from poolreg import Pool
from poolreg.canonical import digest_of, sha256
from poolreg.compress import stock, variants
from poolreg.compress.calibrations import Calibration, CalibrationText
from poolreg.compress.sizes import INGREDIENTS, LayerSizes, check_ingredients, default_step
from poolreg.compress.workshop import Compression, opened
from poolreg.errors import Conflict, Incompatible, NotFound, Refused, UsageError
from poolreg.evaluation.protocol import Protocol
from poolreg.models.loading import load_model
from poolreg.progress import SILENT
from poolreg.store import records
from poolreg.store.journal import Record

pytestmark = pytest.mark.usefixtures("one_thread")

TOKENS = 1500  # enough for every Gram matrix here, so that no note is due
QK_NORM = ("qwen3", "olmo2", "gemma3_text")
LIKE_OTHERS = ("mistral", "qwen2", "olmo2", "gemma", "gemma3_text")


def some(names, slow):
    """Parameters of a test, of which some are left to the slow run."""
    marks = {True: [pytest.mark.slow], False: []}
    return [pytest.param(name, marks=marks[name in slow]) for name in names]


FAMILIES = pytest.mark.parametrize("family", some(pools.COMPRESSIBLE, LIKE_OTHERS))
# Ids that no calibration made: windows as long as the model takes.
IDS = torch.randint(2, pools.VOCABULARY, (3, 20), generator=torch.Generator().manual_seed(3))


@pytest.fixture(scope="module")
def families(tmp_path_factory):
    """A pool with a model of every family and two evalsets; tests may add variants to it."""
    base = tmp_path_factory.mktemp("families")
    with Pool.create(base / "pool") as pool:
        pool.add_evalset("prose", [pools.write_prose(base / "prose.jsonl", 150)])
        pool.add_evalset("other", [pools.write_prose(base / "other.jsonl", 15, seed=1)])
        for family in pools.COMPRESSIBLE:
            pool.add_model(pools.saved(pools.random_model(family), base / family), name=family)
        yield pool


@pytest.fixture
def copied(families, tmp_path):
    """Return a function that adds a model to a new pool with the evalset prose."""
    with Pool.create(tmp_path / "copied") as pool:
        pool.add_evalset("prose", [pools.write_prose(tmp_path / "prose.jsonl", 150)])

        def add(model, name="model", **options):
            dtype = options.pop("dtype", "float32")
            tokenizer = options.pop("tokenizer", True)
            folder = pools.saved(model, tmp_path / name, dtype, tokenizer=tokenizer)
            pool.add_model(folder, name=name, **options)
            return pool

        yield add


def compress(pool, subject, *ratios, **how):
    how = {"calibrate": "prose", "tokens": TOKENS} | how
    return pool.compress(subject, list(ratios or (0.3,)), **how)


def exported(pool, name, folder):
    """Load a model of a pool from a folder, as anybody would."""
    return load_model(pool.export_model(name, folder / digest_of(name)[:8]))


@torch.inference_mode()
def logits(model, ids=IDS):
    return model(input_ids=ids).logits


def apart(one, other):
    """The largest difference of a logit, relative to the largest logit."""
    return float((one - other).abs().max() / other.abs().max())


def parameters(model):
    return sum(parameter.numel() for parameter in model.parameters())


def loss(answer):
    return answer.nll / answer.tokens


def modules(pool, variant):
    """The rows of variant_modules of a variant."""
    (row,) = (r for r in pool.registry.select("variant_list") if r["model"] == variant.digest)
    return pool.registry.select("variant_modules", variant=row["digest"])


# -- every family ---------------------------------------------------------------------------


def steps(plan, ingredients_step=2):
    """The parameters of the largest step that any part of a plan can take."""
    return max(
        m.parameters // m.size * (ingredients_step if m.part == "mlp" else max(1, m.size // 16))
        for m in plan.modules
    )


@FAMILIES
def test_a_variant_is_what_was_planned_and_loads(families, family, tmp_path, monkeypatch):
    in_memory = []

    def check(model, folder, ids, **options):
        in_memory.append(logits(model))
        return check_logits(model, folder, ids, **options)

    check_logits = variants.check_logits
    monkeypatch.setattr(variants, "check_logits", check)
    small, variant = compress(families, family, 0.05, 0.3)
    plan = variant.plan
    assert 0.3 <= plan.achieved <= 0.3 + steps(plan) / plan.block_parameters[0]
    assert variant.logit_difference <= 1e-4

    parent, model = (exported(families, n, tmp_path) for n in (family, variant.digest))
    assert (parameters(parent), parameters(model)) == plan.parameters
    removed = plan.block_parameters[0] - plan.block_parameters[1]
    assert plan.parameters[0] - plan.parameters[1] == removed
    assert apart(logits(model), in_memory[1]) <= 1e-5
    assert apart(logits(model), logits(parent)) > 1e-3
    _generates_as_it_reads(model)

    before, after = families.evaluate([family, small.digest], ["other"])
    assert abs(loss(after) - loss(before)) < 0.5
    kept = {(m.part, m.size == m.kept) for m in (*plan.modules, *small.plan.modules)}
    if family in QK_NORM:
        assert ("pairs", False) not in kept
        assert ("passing", False) not in kept
    assert ("mlp", False) in kept
    assert ("values", False) in kept


def _generates_as_it_reads(model):
    """Greedy decoding with the cache gives what the whole text gives at once."""
    with torch.inference_mode():
        made = model.generate(
            IDS[:1, :6], max_new_tokens=12, min_new_tokens=12, do_sample=False, use_cache=True,
            attention_mask=torch.ones(1, 6, dtype=torch.int64),
        )  # fmt: skip
        assert made.shape == (1, 18)
        read = logits(model, made)[0, 5:-1].clone()
        read[:, model.config.eos_token_id] = -math.inf  # too early for an end
    chosen = read.gather(1, made[0, 6:, None])[:, 0]
    assert torch.allclose(chosen, read.max(1).values, atol=1e-4)


@pytest.mark.parametrize("family", some(["qwen2", "qwen3", "gpt2", "gpt_neox"], ("qwen2", "gpt2")))
def test_the_paper_s_method_takes_it_too(families, family):
    (variant,) = compress(families, family, method="modegpt")
    plan = variant.plan
    assert 0.3 <= plan.achieved <= 0.3 + steps(plan) / plan.block_parameters[0]
    assert variant.logit_difference <= 1e-4
    assert plan.error is None
    whole = [m.size == m.kept for m in plan.modules if m.part in ("pairs", "passing")]
    assert all(whole) == (family in QK_NORM)
    # One share for all modules of a layer, as far as their sizes can be that.
    for layer in (0, 1):
        shares = [m.kept / m.size for m in plan.modules if m.layer == layer]
        if family not in QK_NORM:
            assert max(shares) - min(shares) <= 0.5


def test_module_rows_add_up_to_the_totals(families):
    (variant,) = compress(families, "gpt_neox", 0.3)
    rows = modules(families, variant)
    assert [(r["layer"], r["part"]) for r in rows] == sorted((r["layer"], r["part"]) for r in rows)
    assert {r["part"] for r in rows} == {"mlp", "pairs", "passing", "values"}
    before, after = (sum(r[name] for r in rows) for name in ("parameters", "kept_parameters"))
    assert before - after == variant.plan.block_parameters[0] - variant.plan.block_parameters[1]
    # What can never go is the biases of the output and down projections.
    assert variant.plan.block_parameters[0] - before == 2 * (32 + 32)
    for row, module in zip(rows, sorted(variant.plan.modules, key=lambda m: (m.layer, m.part)), strict=True):  # fmt: skip
        assert row["parameters"] * row["kept"] == row["kept_parameters"] * row["size"]
        assert (row["kept"], row["predicted_error"]) == (module.kept, module.error)
        assert (row["error"] > 0) == (row["kept"] < row["size"])


# -- what is redundant goes at no loss ------------------------------------------------------


def plant(model):
    """Make half the neurons copies, half of each value and half the rotated pairs worthless."""
    random = torch.Generator().manual_seed(8)
    with torch.no_grad():
        for layer in model.model.layers:
            order = torch.randperm(48, generator=random)
            for projection in (layer.mlp.gate_proj, layer.mlp.up_proj):
                projection.weight[order[:24]] = projection.weight[order[24:]]
            for head in layer.self_attn.v_proj.weight.view(2, 8, 32):
                mixing = torch.randn(8, 4, generator=random)
                head.copy_(mixing @ head[:4])
            for head, pairs in zip(layer.self_attn.q_proj.weight.view(4, 8, 32), [1, 1, 2, 2], strict=True):  # fmt: skip
                head[[pairs, pairs + 1, pairs + 4, pairs + 5]] = 0
    return model


def test_what_is_redundant_goes_at_no_loss(copied, tmp_path):
    pool = copied(plant(pools.random_model("llama")))
    mlp, values, pairs = 24 * 3 * 32, 4 * 6 * 32, 4 * 6 * 32
    total = 48 * 3 * 32 + 2 * 8 * 6 * 32
    share = (mlp + values + pairs) / total
    (variant,) = compress(pool, "model", share - 1e-9)
    assert set(variant.plan.sizes) == {LayerSizes(mlp=24, pairs=2, passing=0, values=4)}
    assert variant.plan.error < 1e-6
    parent, model = (exported(pool, name, tmp_path) for name in ("model", variant.digest))
    assert apart(logits(model), logits(parent)) <= 1e-4
    assert parameters(model) == parameters(parent) - 2 * (mlp + values + pairs)
    assert all(row["error"] < 1e-6 for row in modules(pool, variant))


def test_redundant_channels_without_rotation_go_at_no_loss(copied, tmp_path):
    model, random = pools.random_model("opt"), torch.Generator().manual_seed(2)
    with torch.no_grad():
        for layer in model.model.decoder.layers:
            layer.fc1.weight[24:] = layer.fc1.weight[:24]
            layer.fc1.bias[24:] = layer.fc1.bias[:24]
            for projection in (layer.self_attn.q_proj, layer.self_attn.v_proj):
                for weight, bias in zip(projection.weight.view(4, 8, 32), projection.bias.view(4, 8), strict=True):  # fmt: skip
                    mixing = torch.randn(8, 4, generator=random)
                    weight.copy_(mixing @ weight[:4])
                    bias.copy_(mixing @ bias[:4])
    pool = copied(model)
    mlp, heads = 24 * (2 * 32 + 1), 4 * 4 * (4 * 32 + 3)
    total = 48 * (2 * 32 + 1) + 32 + 4 * 8 * (4 * 32 + 3) + 32
    (variant,) = compress(pool, "model", (mlp + heads) / total - 1e-9)
    assert set(variant.plan.sizes) == {LayerSizes(mlp=24, pairs=0, passing=4, values=4)}
    parent, made = (exported(pool, name, tmp_path) for name in ("model", variant.digest))
    assert apart(logits(made), logits(parent)) <= 1e-4


# -- targets --------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt2", "gpt_neox"])
def test_portable_changes_mlp_widths_alone(families, family):
    (variant,) = compress(families, family, 0.25, target="portable")
    assert variant.plan.achieved >= 0.25
    assert {m.part for m in variant.plan.modules if m.kept < m.size} == {"mlp"}
    for sizes, entry in zip(variant.plan.sizes, _layer_sizes(families, variant), strict=True):
        assert entry == {"intermediate_size": sizes.mlp}


def _layer_sizes(pool, variant):
    from poolreg.models.stored import stored_config

    return stored_config(pool.registry, variant.digest)["layer_sizes"]


STOCK = {"llama": 0.6, "mistral": 0.6, "qwen2": 0.6, "opt": 0.3, "gpt2": 0.3, "gpt_neox": 0.3}
PLAIN = """
import sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        assert name.split(".")[0] != "poolreg", name
sys.meta_path.insert(0, Blocked())
import torch
from transformers import AutoModelForCausalLM
torch.set_num_threads(1)
for folder in sys.argv[2:]:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        torch.save((type(model).__name__, model(torch.load(sys.argv[1])).logits), folder + "/logits")
"""


@pytest.mark.slow
def test_plain_transformers_loads_a_stock_variant(families, tmp_path):
    torch.save(IDS, tmp_path / "ids")
    made, folders = {}, {}
    for family, ratio in STOCK.items():
        (variant,) = compress(families, family, ratio, target="stock")
        assert len(set(variant.plan.sizes)) == 1
        assert variant.plan.achieved >= ratio
        made[family] = variant.plan.sizes[0]
        folders[family] = families.export_model(variant.digest, tmp_path / family)
    for family in ("llama", "mistral", "qwen2"):
        assert made[family].pairs < 4
        assert made[family].values == 2 * made[family].pairs
    for family in ("opt", "gpt2", "gpt_neox"):
        assert (made[family].pairs, made[family].passing, made[family].values) == {
            "opt": (0, 8, 8), "gpt2": (0, 8, 8), "gpt_neox": (2, 4, 8)
        }[family]  # fmt: skip
    names = [str(folder) for folder in folders.values()]
    subprocess.run([sys.executable, "-I", "-c", PLAIN, str(tmp_path / "ids"), *names], check=True)
    for family, folder in folders.items():
        config = json.loads((folder / "config.json").read_text())
        assert config["model_type"] == family
        assert "layer_sizes" not in config
        kind, there = torch.load(folder / "logits")
        assert "Compressed" not in kind
        assert apart(there, logits(load_model(folder))) <= 1e-6


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "default", "rope_theta": 500.0},
        {"rope_type": "linear", "rope_theta": 10_000.0, "factor": 4.0},
        {"rope_type": "llama3", "rope_theta": 500_000.0, "factor": 8.0, "low_freq_factor": 1.0,
         "high_freq_factor": 4.0, "original_max_position_embeddings": 16},
    ],
    ids=lambda rope: rope["rope_type"],
)  # fmt: skip
def test_stock_heads_keep_the_frequencies_of_their_pairs(copied, rope, tmp_path, monkeypatch):
    # The logits that `check_logits` compares come from our class, with the pairs as they were.
    pool = copied(pools.random_model("llama", rope_parameters=rope))
    uniform = stock.uniform_sizes

    def small_heads(analyses, ratio):
        return [dataclasses.replace(size, pairs=2, values=4) for size in uniform(analyses, ratio)]

    monkeypatch.setattr(stock, "uniform_sizes", small_heads)
    (variant,) = compress(pool, "model", 0.2, target="stock")
    assert variant.logit_difference <= 1e-5
    model = AutoModelForCausalLM.from_pretrained(pool.export_model(variant.digest, tmp_path / "x"))
    parent = exported(pool, "model", tmp_path)
    assert type(model).__name__ == "LlamaForCausalLM"
    assert model.config.head_dim == 4
    kept, whole = (m.model.rotary_emb.inv_freq.double() for m in (model, parent))
    assert all(float((whole - one).abs().min() / one) < 1e-6 for one in kept)
    assert len(kept) == 2


def test_a_family_without_heads_of_its_own_size_keeps_them(families):
    (variant,) = compress(families, "gemma2", 0.2, target="stock")
    assert {m.part for m in variant.plan.modules if m.kept < m.size} == {"mlp"}


# -- in the pool ----------------------------------------------------------------------------


def test_a_mixture_is_compressed_from_one_calibration(pool, monkeypatch):
    subject = pool.resolve("alpha+beta")
    first, second = compress(pool, "alpha+beta", 0.1, 0.3, calibrate="gamma", name="mix")
    assert first.parent == second.parent == subject.digest
    assert (first.label, second.label) == ("mix-10", "mix-30")
    (step,) = (r for r in pool.lineage("mix-30") if r["relation"] == "compressed from")
    assert (step["parent"], step["parent_label"]) == (subject.digest, "alpha+beta")

    def never(*_, **__):
        raise AssertionError("calibrated again")

    monkeypatch.setattr("poolreg.compress.calibrations.gather", never)
    (third,) = compress(pool, "alpha+beta", 0.2, calibrate="gamma", name="mixed")
    assert (third.label, third.new) == ("mixed", True)
    how = Compression("gamma", tokens=TOKENS)
    with opened(pool.registry, subject, how, SILENT) as workshop:
        assert workshop.calibration.memoised
        assert workshop.calibration.tokens == 73  # of 24 channels
    rows = pool.sql("SELECT subject, text_kind, tokens, largest FROM calibrations").rows
    assert [row[:2] for row in rows] == [(subject.digest, "evalset")]
    assert len(pool.registry.select("variant_list")) == 3


@pytest.mark.slow
def test_the_same_request_makes_nothing_new(pool):
    (first,) = compress(pool, "base", 0.2, calibrate="gamma")
    assert first.new
    assert first.label.startswith("base [-2")
    before = pools.contents(pool.root)
    (again,) = compress(pool, "base", 0.2, calibrate="gamma")
    assert not again.new
    assert pools.contents(pool.root) == before
    same = {"new": True, "seconds": first.seconds}
    assert dataclasses.replace(again, **same).plan.sizes == first.plan.sizes
    assert (again.digest, again.label, again.bytes) == (first.digest, first.label, first.bytes)
    (named,) = compress(pool, "base", 0.2, calibrate="gamma", name="small")
    assert (named.new, named.digest, named.label) == (False, first.digest, "small")
    with pytest.raises(Conflict, match="base"):
        compress(pool, "base", 0.2, calibrate="gamma", name="base")
    (other,) = compress(pool, "base", 0.2, calibrate="gamma", epsilon=0.2)
    assert other.new  # another request, be it for the same model
    pool.remove("model", "small")
    (made,) = compress(pool, "base", 0.2, calibrate="gamma")
    assert made.digest == first.digest


def test_tied_embeddings_stay_tied_and_are_shared(families, tmp_path):
    one, two = compress(families, "llama", 0.15, 0.35)
    assert two.shared_bytes > 0
    folder = families.export_model(two.digest, tmp_path / "x")
    model = load_model(folder)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    names = set()
    for file in folder.glob("*.safetensors"):
        with safe_open(file, "pt") as opened_file:
            names |= set(opened_file.keys())
    assert "lm_head.weight" not in names
    # One file has what the variants have in common, and is stored once.
    files = [
        {r["object"]: r["bytes"] for r in families.registry.select("model_files", model=v.digest)
         if r["role"] == "weights"} for v in (one, two)
    ]  # fmt: skip
    common = files[0].keys() & files[1].keys()
    assert [files[1][key] for key in common] == [two.shared_bytes]
    embeddings = model.model.embed_tokens.weight
    assert two.shared_bytes > embeddings.nbytes


def test_a_bfloat16_parent_gives_a_bfloat16_variant(copied, tmp_path):
    pool = copied(pools.random_model("qwen2"), dtype="bfloat16")
    (variant,) = compress(pool, "model")
    row = pool.model(variant.digest)
    assert row["dtype"] == pool.model("model")["dtype"] == "BF16"
    assert variant.logit_difference <= 1e-4
    assert row["parameters"] == variant.plan.parameters[1]
    pairs = [m.kept for m in variant.plan.modules if m.part == "pairs" and m.kept < m.size]
    stored = 2 * variant.plan.parameters[1] + 8 * 2 * sum(pairs)  # and the pairs' int64 indices
    assert variant.bytes == stored
    assert variant.plan.bytes[1] == 2 * variant.plan.parameters[1]


@pytest.mark.slow
def test_a_partition_is_text_to_calibrate_on(pool):
    (variant,) = compress(pool, "base", 0.2, calibrate="alpha")
    assert variant.new
    pool.add_partition("rows", [pools.write_prose(pool.root.parent / "rows.jsonl", 60)], units=2)
    (variant,) = compress(pool, "base", 0.2, calibrate="rows")
    (row,) = (r for r in pool.registry.select("variant_list") if r["model"] == variant.digest)
    assert row["calibrated_on"] == "rows"
    assert pool.sql("SELECT text_kind FROM calibrations ORDER BY added DESC LIMIT 1").rows == [
        ("partition",)
    ]


# -- ways of compressing --------------------------------------------------------------------


@pytest.mark.parametrize("family", some(["mistral", "opt", "gpt_neox"], ("mistral", "gpt_neox")))
def test_sequential_measures_behind_what_is_compressed(families, family):
    (plain,) = compress(families, family, 0.3)
    (behind,) = compress(families, family, 0.3, sequential=True)
    assert behind.plan.sizes == plain.plan.sizes
    assert behind.digest != plain.digest
    first, second = (
        {(r["layer"], r["part"]): r["error"] for r in modules(families, v)} for v in (plain, behind)
    )
    for key, error in first.items():
        if key[0] == 0:
            assert second[key] == pytest.approx(error, rel=1e-3, abs=1e-12)
        else:
            assert second[key] == pytest.approx(error, rel=0.7, abs=1e-4)
    before, one, two = families.evaluate([family, plain.digest, behind.digest], ["prose"])
    assert abs(loss(two) - loss(before)) < abs(loss(one) - loss(before)) + 0.1


FAST = ("allocation", "probe", "two-sided")


@pytest.mark.parametrize("left_out", some(INGREDIENTS, INGREDIENTS.keys() - set(FAST)))
def test_each_ingredient_can_be_left_out(families, left_out):
    family = "opt" if left_out in ("two-sided", "intercept") else "mistral"
    (variant,) = compress(families, family, 0.45, without=(left_out,))
    assert variant.plan.achieved >= 0.45
    assert variant.logit_difference <= 1e-4
    (row,) = (r for r in families.registry.select("variant_list") if r["model"] == variant.digest)
    assert row["without"] == [left_out]
    (whole,) = compress(families, family, 0.45)
    assert whole.digest != variant.digest  # it did something


def test_without_any_ingredient_it_is_the_paper_s_method(families):
    (bare,) = compress(families, "gpt_neox", without=tuple(INGREDIENTS))
    (paper,) = compress(families, "gpt_neox", method="modegpt")
    assert bare.plan.sizes == paper.plan.sizes
    assert bare.digest == paper.digest
    assert check_ingredients(INGREDIENTS) == frozenset()


def test_widths_are_multiples_of_what_was_asked_for(families):
    (variant,) = compress(families, "mistral", 0.2, step=12)
    assert {m.kept % 12 for m in variant.plan.modules if m.part == "mlp"} == {0}
    assert [default_step(width) for width in (16, 48, 64, 300, 4096, 14336)] == [
        1, 1, 2, 8, 128, 128
    ]  # fmt: skip


def test_a_plan_says_what_making_it_gives(families):
    how = {"calibrate": "prose", "tokens": TOKENS}
    (planned,) = families.plan_compression("olmo2", [0.4], **how)
    (variant,) = compress(families, "olmo2", 0.4)
    assert variant.plan.modules == planned.modules
    assert planned.error == pytest.approx(sum(m.error for m in planned.modules))
    assert planned.error_unit == "nats per token"
    assert variant.bytes == planned.bytes[1]


# -- what cannot be -------------------------------------------------------------------------


def unchanged(pool, error, match, subject="base", ratio=0.3, **how):
    """Check that a request is refused in these words and changes no record and no name."""
    spaces = ("model", "evalset", "partition")

    def state():
        journal = {k: v for k, v in pools.contents(pool.root).items() if k.startswith("journal/")}
        return journal, [pool.registry.names(space) for space in spaces]

    before = state()
    with pytest.raises(error, match=match) as raised:
        compress(pool, subject, ratio, **({"calibrate": "gamma", "name": "new"} | how))
    assert state() == before
    return pools.refusal(raised.value)


@pytest.mark.parametrize("ratio", [0, 1, -0.1, math.nan, 1.5, math.inf])
def test_a_ratio_outside_its_range_is_refused(pool, ratio):
    assert "share of the block parameters" in unchanged(
        pool, UsageError, "is not between 0 and 1", ratio=ratio
    )


@pytest.mark.parametrize(
    ("how", "error", "match"),
    [
        ({"calibrate": "gama"}, NotFound, "no evalset or partition is named gama"),
        ({"method": "magic"}, UsageError, "unknown method 'magic'"),
        ({"target": "tiny"}, UsageError, "unknown target 'tiny'"),
        ({"without": ("obs", "salt")}, UsageError, "'salt' is nothing that can be left out"),
        ({"method": "modegpt", "without": ("obs",)}, UsageError, "--without leaves out"),
        ({"epsilon": 0.0}, UsageError, r"epsilon is 0\.0"),
        ({"epsilon": math.nan}, UsageError, "epsilon is nan"),
        ({"step": 0}, UsageError, "step is 0"),
        ({"step": -4}, UsageError, "step is -4"),
        ({"tokens": 20}, Refused, "calibration text is too short: .* of 24 channels"),
        ({"tokens": 0}, UsageError, "tokens is 0"),
        ({"tokens": -1}, UsageError, "tokens is -1"),
        ({"max_length": 0}, UsageError, "max_length is 0"),
        ({"subject": "nobody"}, NotFound, "nobody"),
    ],
)  # fmt: skip
def test_a_request_that_makes_no_sense_is_refused(pool, how, error, match):
    assert "|" in unchanged(pool, error, match, **how)  # a hint


def test_the_most_that_can_go_is_named(families):
    compress(families, "qwen3", 0.3)
    for target, most in (("portable", 0.9), ("full", 0.9), ("stock", 0.9)):
        text = unchanged(
            families, UsageError, "cannot be reached", "qwen3", 0.95, target=target,
            calibrate="prose",
        )  # fmt: skip
        share = float(text.split("at most ")[1].split("%")[0]) / 100
        assert 0.4 < share < most
        (plan,) = families.plan_compression(
            "qwen3", [math.floor(1000 * share - 1) / 1000], calibrate="prose", tokens=TOKENS,
            target=target,
        )  # fmt: skip
        assert plan.achieved <= share + 1e-3
    assert "attention stays whole" in unchanged(
        families, UsageError, "cannot be", "qwen3", 0.95, target="portable", calibrate="prose"
    )


def test_few_tokens_are_noted():
    text = CalibrationText("digest", "evalset", "prose")
    made = Calibration("digest", text, 479, 60, 48, 10.0, 1.0, False, 600, "p", "w", ())
    (note,) = made.notes
    assert "479 calibration tokens are fewer than 10 for each of the 48 channels" in note
    assert dataclasses.replace(made, tokens=480).notes == ()


def test_a_text_that_is_too_short_is_refused(families, tmp_path):
    (tmp_path / "one.jsonl").write_text('{"text": "a few words"}\n')
    families.add_evalset("short", [tmp_path / "one.jsonl"])
    unchanged(families, Refused, "too short: 0 tokens", "llama", calibrate="short")
    (plan,) = families.plan_compression("llama", [0.2], calibrate="prose", tokens=200)
    assert len(plan.notes) == 1


@pytest.mark.parametrize("layer", [0, 1])
def test_activations_that_are_not_finite_are_refused(copied, layer):
    model = pools.random_model("mistral")
    with torch.no_grad():
        for projection in (
            model.model.layers[layer].mlp.up_proj,
            model.model.layers[layer].mlp.gate_proj,
        ):
            projection.weight[3] *= 1e25
    pool = copied(model)
    text = unchanged(pool, Refused, f"the mlp activations of layer {layer} are not finite", "model", calibrate="prose")  # fmt: skip
    assert "poolreg eval" in text


def test_an_unknown_family_says_what_to_add(copied):
    sizes = {"hidden_size": 32, "n_layer": 2, "n_head": 4}
    pool = copied(pools.random_model("bloom", **sizes))
    text = unchanged(pool, Incompatible, "weight names of 'bloom' models", "model", calibrate="prose")  # fmt: skip
    assert "a row in FAMILIES of poolreg/models/modeling_poolreg.py" in text


def test_a_variant_is_not_compressed_again(pool):
    compress(pool, "base", 0.2, calibrate="gamma", name="small")
    unchanged(pool, Incompatible, "a compressed variant already", "small")
    unchanged(pool, Conflict, "base", calibrate="gamma", name="base")


def test_a_model_without_tokenizer_is_refused(copied):
    pool = copied(pools.random_model("mistral"), tokenizer=False)
    text = unchanged(pool, Refused, "without a tokenizer", "model", calibrate="prose")
    assert "--tokenizer" in text


def test_a_folder_that_gives_other_logits_is_not_added(pool, monkeypatch):
    from poolreg.errors import Damage

    compress(pool, "base", 0.1, calibrate="gamma")
    fill = variants.write_folder

    def spoilt(state, *rest, **options):
        state = {n: v + (0.1 if n.endswith("down_proj.weight") else 0) for n, v in state.items()}
        fill(state, *rest, **options)

    monkeypatch.setattr(variants, "write_folder", spoilt)
    unchanged(pool, Damage, "gives other logits", ratio=0.2)


# -- views ----------------------------------------------------------------------------------


def digest(label):
    return sha256(label.encode())


def _model(label, size):
    return Record("model", digest(label), {
        "model_type": "llama", "parameters": size, "bytes": size, "dtype": "F32",
        "tokenizer": None, "context_length": 16, "vocab_size": 8, "trusted_code": False,
        "files": [], "tensors": [],
    }, {})  # fmt: skip


def _variant(label, parent, **changes):
    body = {
        "model": digest(label), "parent": digest(parent), "parent_label": parent,
        "method": "poolreg", "target": "full", "ratio": 0.3, "achieved": 0.3, "without": [],
        "epsilon": 0.1, "step": None, "sequential": False, "calibration": digest("calibration"),
        "block_parameters": 70, "parent_block_parameters": 100, "parent_parameters": 100,
        "parent_bytes": 100, "shared_bytes": 0, "logit_difference": 0.0, "seconds": 1.0,
        "modules": [],
    }  # fmt: skip
    return Record("variant", digest(f"variant {label}"), body | changes, {})


def _score(label, evalset, bits):
    """An evaluation of 100 bytes and 100 tokens."""
    return Record("evaluation", digest(f"{label} on {evalset}"), {
        "subject": digest(label), "evalset": digest(evalset), "protocol": PROTOCOL.digest,
        "nll": 100 * bits * math.log(2), "tokens": 100, "bytes": 100, "documents": 1,
        "seconds": 1.0, "device": "cpu", "document_scores": None, "token_scores": None,
    }, {})  # fmt: skip


PROTOCOL = Protocol(16, digest("tokenizer"))


@pytest.fixture
def views(tmp_path):
    """A pool of records written by hand: a calibration on the evalset a."""
    with Pool.create(tmp_path / "views") as pool:
        pool.registry.record(
            *(Record("evalset", digest(n), {"object": digest(n), "content": digest(n),
                                            "documents": 1, "bytes": 100}, {}) for n in "ab"),
            *(records.name("evalset", n, digest(n)) for n in "ab"),
            Record("protocol", PROTOCOL.digest, PROTOCOL.as_record(), {}),
            Record("calibration", digest("calibration"), {
                "subject": digest("big"), "text": digest("a"), "text_kind": "evalset",
                "protocol": PROTOCOL.digest, "token_limit": 10, "tokens": 9, "held_out_tokens": 1,
                "largest": 2, "condition": None, "windows": digest("w"), "layers": [],
                "seconds": 1.0,
            }, {}),
        )  # fmt: skip
        yield pool


def named(*labels, size=100):
    made = [_model(label, size) for label in labels]
    return made + [records.name("model", label, digest(label)) for label in labels]


def test_the_pareto_view_marks_the_front_and_the_calibration_text(views):
    sizes = {"big": 100, "good": 80, "worse": 85, "same": 80, "tiny": 40}
    bits = {"big": 2.0, "good": 2.2, "worse": 2.3, "same": 2.2, "tiny": 4.0}
    for label, size in sizes.items():
        views.registry.record(*named(label, size=size), _score(label, "b", bits[label]))
        if label != "big":
            views.registry.record(_variant(label, "big"), _score(label, "a", bits[label]))
    rows = views.sql(
        "SELECT label, method, on_front, calibrated_on_it, perplexity_increase FROM pareto "
        "WHERE evalset = 'b' ORDER BY label"
    ).rows
    assert [row[:4] for row in rows] == [
        ("big", "dense", True, False), ("good", "poolreg", True, False),
        ("same", "poolreg", True, False), ("tiny", "poolreg", True, False),
        ("worse", "poolreg", False, False),
    ]  # fmt: skip
    assert [row[4] for row in rows] == pytest.approx([2 ** bits[r[0]] - 4 for r in rows])
    # On a the parent is not measured yet: there is nothing to compare with.
    assert views.sql("SELECT * FROM pareto WHERE evalset = 'a'").rows == []
    views.registry.record(_score("big", "a", 2.5))
    rows = views.sql(
        "SELECT label, on_front, calibrated_on_it FROM pareto WHERE evalset = 'a' ORDER BY label"
    ).rows
    assert rows == [
        ("big", False, False), ("good", True, True), ("same", True, True), ("tiny", True, True),
        ("worse", False, True),
    ]  # fmt: skip
    assert len(views.query("pareto").rows) == 10


@pytest.mark.parametrize(
    ("small", "correlation", "same_best"),
    [
        ([1.5, 2.5, 3.5, 4.5], 1.0, True),
        ([4.0, 3.0, 2.5, 2.0], -1.0, False),
        ([2.0, 2.0, 2.0, 5.0], 0.7745966692414834, True),
        ([1.5, 2.5], None, True),
    ],
)
def test_the_query_ranking_finds_planted_orders(views, small, correlation, same_best):
    for number, bits in enumerate(small):
        big, little = f"big{number}", f"small{number}"
        views.registry.record(
            *named(big, little), _variant(little, big), _score(big, "b", 1.0 + number),
            _score(little, "b", bits),
        )  # fmt: skip
    table = views.query("ranking")
    (row,) = [dict(zip(table.columns, r, strict=True)) for r in table.rows]
    assert (row["evalset"], row["models"], row["same_best"]) == ("b", len(small), same_best)
    assert row["rank_correlation"] == (None if correlation is None else pytest.approx(correlation))
    increase = sum(bits - 1.0 - n for n, bits in enumerate(small)) / len(small) * math.log(2)
    assert row["mean_loss_increase"] == pytest.approx(increase)


@pytest.mark.slow
def test_real_variants_stand_in_the_pareto_view(families):
    made = compress(families, "qwen2", 0.1, 0.4)
    families.evaluate(["qwen2", *(v.digest for v in made)], ["prose", "other"])
    table = families.query("pareto")
    rows = [dict(zip(table.columns, row, strict=True)) for row in table.rows]
    assert {(r["evalset"], r["calibrated_on_it"]) for r in rows if r["method"] == "poolreg"} == {
        ("prose", True), ("other", False)
    }  # fmt: skip
