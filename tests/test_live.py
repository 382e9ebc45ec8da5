"""A live model's weights are the bytes of the merge on disk, whatever the route and the order."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pools
import pytest
import torch

from poolreg import Pool, live
from poolreg.errors import Incompatible
from poolreg.evaluate import Settings
from poolreg.live import LiveModel
from poolreg.loading import load_model

pytestmark = pytest.mark.usefixtures("one_thread")

MIXTURES = ["alpha", "beta", "alpha+beta", "3*alpha+beta/2"]
MORE = [*MIXTURES, "alpha+2*gamma", "beta+gamma", "all", "3*alpha+beta/2+5*gamma/1"]

# family, tied, storage dtype, whether names in memory are those on disk
KINDS = [
    ("llama", False, "float32", True),
    ("llama", True, "float32", True),
    ("llama", False, "bfloat16", True),
    ("llama", True, "float16", True),
    ("gpt2", True, "float32", True),
    ("gpt2", False, "bfloat16", True),
    ("opt", True, "float32", True),
    ("gpt_neox", False, "float32", False),
    ("gpt_neox", False, "float16", False),
    ("qwen2", False, "float16", True),
    ("mistral", False, "float32", True),
    ("mixtral", False, "bfloat16", False),
]


def members(pool: Pool) -> list[str]:
    return sorted({m for text in MIXTURES for m, _ in pool.resolve(text).components})


def bits(model) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    """All weights and buffers that are saved, as bytes."""
    state = model.state_dict()
    return {
        name: (str(t.dtype), tuple(t.shape), t.contiguous().view(torch.uint8).numpy().tobytes())
        for name, t in ((name, t.detach().cpu().reshape(-1)) for name, t in state.items())
    }


def opened(pool: Pool, dtype: str = "float32", of: list[str] | None = None) -> LiveModel:
    return LiveModel(pool.registry, of or members(pool), dtype=dtype, device="cpu")


@pytest.fixture
def made(tmp_path) -> Callable[..., Pool]:
    """A pool of the given kind, closed with the test."""
    pools_open = []

    def make(family: str = "llama", **options) -> Pool:
        tiny = pools.tiny_pool(tmp_path / "made", {"alpha": 1, "beta": 2}, family, **options)
        pools_open.append(Pool.open(tiny.root))
        return pools_open[-1]

    yield make
    for pool in pools_open:
        pool.close()


@pytest.fixture
def merged(tmp_path) -> Callable[[Pool, str, str], dict]:
    """The weights of the materialised merge, loaded from its folder."""

    def merge(pool: Pool, text: str, dtype: str) -> dict:
        out = tmp_path / "merged" / text.replace("*", "x").replace("/", "-")
        if not out.exists():
            pool.merge(text, out)
        return bits(load_model(out, dtype=dtype))

    return merge


@pytest.fixture
def disk(monkeypatch) -> list[Path]:
    """The folders that live models wrote averages to."""
    seen: list[Path] = []
    real = live.merge_weights

    def merge_weights(parents, folder, **options):
        seen.append(folder)
        return real(parents, folder, **options)

    monkeypatch.setattr(live, "merge_weights", merge_weights)
    return seen


@pytest.mark.parametrize(("family", "tied", "dtype", "by_name"), KINDS)
def test_every_family(family, tied, dtype, by_name, made, merged, disk):
    pool = made(family, tied=tied, dtype=dtype)
    model = opened(pool)
    for text in MIXTURES:
        weights = pool.resolve(text).integer_weights
        assert bits(model.load(weights)) == merged(pool, text, "float32"), text
    assert len(disk) == (0 if by_name else len(MIXTURES))
    assert list((pool.root / "tmp").iterdir()) == []


@pytest.fixture(scope="module")
def more(tiny, tmp_path_factory) -> dict[str, dict]:
    """The weights of several merges of the tiny pool, from their folders."""
    place = tmp_path_factory.mktemp("more")
    with Pool.open(tiny.root) as pool:
        folders = {text: place / str(number) for number, text in enumerate(MORE)}
        for text, folder in folders.items():
            pool.merge(text, folder)
    return {text: bits(load_model(folder)) for text, folder in folders.items()}


@pytest.mark.parametrize("depth", [0, 1, 2, 99])
@pytest.mark.parametrize("order", range(3))
def test_any_order_and_any_number_of_kept_sums(depth, order, tiny, more, monkeypatch):
    elements = sum(raw.size for _, raw in pools.arrays_of(tiny.seed).values())
    monkeypatch.setattr(live, "SUMS_AT_ONCE", depth * 8 * elements)
    with Pool.open(tiny.root) as pool:
        subjects = {text: pool.resolve(text).integer_weights for text in MORE}
        texts = sorted(subjects, key=lambda text: subjects[text])  # as a sweep visits them
        if order:
            texts = texts * 2
            random.Random(order).shuffle(texts)
        model = opened(pool, of=sorted({m for weights in subjects.values() for m, _ in weights}))
        assert model._depth == depth
        for text in texts:
            assert bits(model.load(subjects[text])) == more[text], text


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("family", ["llama", "gpt_neox"])
def test_a_narrow_compute_dtype_rounds_as_loading_does(family, dtype, made, merged):
    """First to the storage dtype, then to the compute dtype: two roundings, as from disk."""
    pool = made(family)
    model = opened(pool, dtype)
    for text in MIXTURES:
        weights = pool.resolve(text).integer_weights
        assert bits(model.load(weights)) == merged(pool, text, dtype), text


def test_a_single_model_keeps_its_zeros(tmp_path, tiny, pool, merged):
    """A sum that starts from zero would turn -0.0 into 0.0; a copy does not."""
    folder = pools.unit_folder(tmp_path / "u", tiny.seed, 50)
    raw = np.array(pools.arrays_of(folder)["model.norm.weight"][1])
    raw[::2] = -0.0
    pools.set_tensors(folder, model__norm__weight=("F32", raw))
    pool.add_model(folder, role="unit", partition="alpha", seed="base")
    model = opened(pool)
    for text in ("alpha+beta", "alpha", "beta"):
        weights = pool.resolve(text).integer_weights
        assert bits(model.load(weights)) == merged(pool, text, "float32"), text
    norm = model.load(pool.resolve("alpha").integer_weights).state_dict()["model.norm.weight"]
    assert torch.signbit(norm[::2]).all()


def test_shards_and_whole_files_together(tmp_path, tiny, pool, merged):
    folder = pools.unit_folder(tmp_path / "u", tiny.seed, 50)
    shards = pools.shard(folder, tmp_path / "shards")
    pool.add_model(shards, role="unit", partition="alpha", seed="base")
    weights = pool.resolve("alpha+beta").integer_weights
    assert bits(opened(pool).load(weights)) == merged(pool, "alpha+beta", "float32")


def test_the_average_is_the_plain_one(tiny):
    """Against ten lines of float64, not only against the merge on disk."""
    with Pool.open(tiny.root) as pool:
        model = opened(pool).load(pool.resolve("3*alpha+2*beta/2+4*beta/1").integer_weights)
    parents = [pools.arrays_of(tiny.units[p]) for p in (("alpha", 1), ("beta", 2), ("beta", 1))]
    for name, (_, raw) in pools.average(parents, [3, 2, 4]).items():
        assert model.state_dict()[name].numpy().tobytes() == raw.tobytes(), name


def test_models_of_two_families_are_refused(tmp_path, tiny, pool):
    other = pool.add_model(pools.model_folder(tmp_path / "o", "gpt2"), name="other")
    with pytest.raises(Incompatible, match="tensor"):
        opened(pool, of=[pool.resolve("base").digest, other.digest])


def test_a_model_moves_between_families_of_one_plan(tmp_path, tiny, pool):
    """Several families in one call: one live model after the other."""
    pool.add_model(pools.model_folder(tmp_path / "o", "gpt2"), name="other")
    texts = ["alpha+beta", "other", "alpha", "base", "beta+gamma"]
    together = pool.evaluate(texts, ["alpha"], settings=Settings(threads=1))
    with Pool.open(tiny.copy(tmp_path / "again")) as again:
        again.add_model(tmp_path / "o", name="other")
        alone = [again.evaluate(t, ["alpha"], settings=Settings(threads=1))[0] for t in texts]
    assert [row.nll for row in together] == [row.nll for row in alone]
    assert len({row.nll for row in together}) == len(texts)


def test_gpt2_of_the_hub(tmp_path, disk, merged):
    """Its file holds masks and leaves out the prefix, so names differ; the weights are right."""
    seed = pools.model_folder(tmp_path / "seed", "gpt2", tied=True)
    arrays = {k.removeprefix("transformer."): v for k, v in pools.arrays_of(seed).items()}
    mask = np.tril(np.ones((1, 1, 16, 16), np.float32))
    arrays |= {f"h.{layer}.attn.bias": ("F32", mask) for layer in range(2)}
    pools.write_file(seed / "model.safetensors", arrays, {"format": "pt"})
    texts = pools.write_texts(tmp_path / "texts", ["alpha", "beta"])
    with Pool.create(tmp_path / "pool") as pool:
        pools.add_data(pool, texts, {"alpha": 1, "beta": 1})
        pool.add_model(seed, name="base", role="seed")
        for number, name in enumerate(("alpha", "beta")):
            folder = pools.unit_folder(tmp_path / name, seed, number)
            pools.set_tensors(folder, **{f"h__{i}__attn__bias": ("F32", mask) for i in range(2)})
            pool.add_model(folder, role="unit", partition=name, seed="base")
        subject = pool.resolve("alpha+beta")
        model = opened(pool, of=[m for m, _ in subject.components])
        loaded = bits(model.load(subject.integer_weights))
        assert disk
        assert loaded == merged(pool, "alpha+beta", "float32")


def test_integer_tensors(tmp_path, tiny, pool, monkeypatch):
    """They are not averaged: they must be equal. Here a buffer that the model saves is one."""
    real = live.load_model

    def with_counter(folder, **options):
        plain = pools.model_folder(tmp_path / f"plain{len(list(tmp_path.iterdir()))}")
        arrays = pools.arrays_of(folder)
        arrays.pop("model.steps")
        pools.write_file(plain / "model.safetensors", arrays, {"format": "pt"})
        model = real(plain, **options)
        model.model.register_buffer("steps", torch.tensor([7, 8]))
        return model

    monkeypatch.setattr(live, "load_model", with_counter)
    made = []
    for number, steps in enumerate([[7, 8], [7, 8], [7, 9]]):
        folder = pools.unit_folder(tmp_path / str(number), tiny.seed, 50 + number)
        pools.set_tensors(folder, model__steps=("I64", np.array(steps)))
        made.append(pool.add_model(folder).digest)
    equal = opened(pool, of=made[:2]).load([(made[0], 1), (made[1], 1)]).state_dict()
    assert equal["model.steps"].tolist() == [7, 8]
    with pytest.raises(Incompatible, match=r"integer tensor 'model\.steps' differs between"):
        opened(pool, of=made)
