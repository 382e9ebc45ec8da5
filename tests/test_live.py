"""A live model's weights are the bytes of the merge on disk, whatever the route and the order."""

from __future__ import annotations

import contextlib
import random
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pools
import pytest
import torch

from poolreg import Pool, merge_folders
from poolreg.errors import Incompatible
from poolreg.evaluation import averages, live
from poolreg.evaluation.evaluate import Settings
from poolreg.evaluation.live import LiveModel
from poolreg.evaluation.materials import Materials
from poolreg.models.loading import load_model
from poolreg.store.staging import working_folder
from poolreg.weights.checkpoint import fingerprint, read_checkpoint

pytestmark = pytest.mark.usefixtures("one_thread")

MORE = [
    "alpha", "beta", "alpha+beta", "3*alpha+beta/2", "alpha+2*gamma", "beta+gamma", "all",
    "3*alpha+beta/2+5*gamma/1",
]  # fmt: skip

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


def bits(model) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    """All weights and buffers that are saved, as bytes."""
    state = model.state_dict()
    return {
        name: (str(t.dtype), tuple(t.shape), t.contiguous().view(torch.uint8).numpy().tobytes())
        for name, t in ((name, t.detach().cpu().reshape(-1)) for name, t in state.items())
    }


def opened(pool: Pool, of: list[str], **options) -> LiveModel:
    materials = Materials.of(pool.registry, of)
    return LiveModel(materials, of, dtype="float32", device="cpu", **options)


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


# -- families, without a pool ---------------------------------------------------------------


class Shelf:
    """Three unit models of one seed in folders; stands where materials of a pool do."""

    def __init__(self, root: Path, family: str, **options) -> None:
        self.root = root
        (root / "tmp").mkdir()
        seed = pools.model_folder(root / "seed", family, **options)
        self.units = [pools.unit_folder(root / f"u{n}", seed, n) for n in range(3)]
        self.digests = [fingerprint(read_checkpoint(folder)).digest for folder in self.units]
        self.folders = dict(zip(self.digests, self.units, strict=True))

    def tensors(self, digest: str) -> dict:
        return read_checkpoint(self.folders[digest]).tensors

    def folder(self, digest: str) -> contextlib.AbstractContextManager[Path]:
        return contextlib.nullcontext(self.folders[digest])

    def scratch(self) -> contextlib.AbstractContextManager[Path]:
        return working_folder(self.root / "tmp")

    def live(self, dtype: str) -> LiveModel:
        return LiveModel(self, self.digests, dtype=dtype, device="cpu")

    def weights(self, counts: Sequence[int]) -> list[tuple[str, int]]:
        return sorted((d, count) for d, count in zip(self.digests, counts, strict=True) if count)

    def merged(self, counts: Sequence[int], dtype: str) -> dict:
        """The weights of the materialised merge, loaded from its folder."""
        out = self.root / "-".join(map(str, counts))
        merge_folders(self.units, out, weights=counts)
        return bits(load_model(out, dtype=dtype))


@pytest.fixture
def shelf(tmp_path) -> Callable[..., Shelf]:
    return lambda family, **options: Shelf(tmp_path, family, **options)


COUNTS = [(1, 0, 0), (1, 1, 0), (0, 1, 0), (1, 1, 1), (3, 0, 5), (0, 2, 1)]


@pytest.mark.parametrize(("family", "tied", "dtype", "by_name"), KINDS)
def test_every_family(family, tied, dtype, by_name, shelf, disk):
    made = shelf(family, tied=tied, dtype=dtype)
    model = made.live("float32")
    for counts in COUNTS:
        loaded = bits(model.load(made.weights(counts)))
        assert loaded == made.merged(counts, "float32"), counts
    assert len(disk) == (0 if by_name else len(COUNTS))
    assert list((made.root / "tmp").iterdir()) == []


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("family", ["llama", "gpt_neox"])
def test_a_narrow_compute_dtype_rounds_as_loading_does(family, dtype, shelf):
    """First to the storage dtype, then to the compute dtype: two roundings, as from disk."""
    made = shelf(family)
    model = made.live(dtype)
    for counts in COUNTS:
        assert bits(model.load(made.weights(counts))) == made.merged(counts, dtype), counts


def test_gpt2_of_the_hub(shelf, disk):
    """Its file holds masks and leaves out the prefix, so names differ; the weights are right."""
    made = shelf("gpt2", tied=True)
    mask = np.tril(np.ones((1, 1, 16, 16), np.float32))
    for folder in made.units:
        arrays = {k.removeprefix("transformer."): v for k, v in pools.arrays_of(folder).items()}
        arrays |= {f"h.{layer}.attn.bias": ("F32", mask) for layer in range(2)}
        pools.write_file(folder / "model.safetensors", arrays, {"format": "pt"})
    model = made.live("float32")
    loaded = bits(model.load(made.weights((1, 2, 3))))
    assert disk
    assert loaded == made.merged((1, 2, 3), "float32")


# -- in a pool ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def more(tiny, tmp_path_factory) -> dict[str, dict]:
    """The weights of several merges of the tiny pool, from their folders."""
    place = tmp_path_factory.mktemp("more")
    with Pool.open(tiny.root) as pool:
        folders = {text: place / str(number) for number, text in enumerate(MORE)}
        for text, folder in folders.items():
            pool.merge(text, folder)
    return {text: bits(load_model(folder)) for text, folder in folders.items()}


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("depth", [0, 1, 2, 99])
@pytest.mark.parametrize("order", range(3))
def test_any_order_and_any_number_of_kept_sums(depth, order, threads, tiny, more, monkeypatch):
    elements = sum(raw.size for _, raw in pools.arrays_of(tiny.seed).values())
    monkeypatch.setattr(averages, "SUMS_AT_ONCE", depth * 8 * elements)
    monkeypatch.setattr(averages, "FEWEST_KEPT", 2)
    monkeypatch.setattr(averages, "CHUNK", 1000)
    with Pool.open(tiny.root) as pool:
        subjects = {text: pool.resolve(text).integer_weights for text in MORE}
        texts = sorted(subjects, key=lambda text: subjects[text])  # as a sweep visits them
        if order:
            texts = texts * 2
            random.Random(order).shuffle(texts)
        members = sorted({m for weights in subjects.values() for m, _ in weights})
        model = opened(pool, members, threads=threads)
        kept = 0
        for text, following in zip(texts, [*texts[1:], None], strict=True):
            after = subjects[following] if following else ()
            assert bits(model.load(subjects[text], after)) == more[text], text
            kept = max(kept, len(model._averages._kept._stack))
    assert min(depth, 1) <= kept <= depth


def test_a_single_model_keeps_its_zeros(shelf):
    """A sum that starts from zero would turn -0.0 into 0.0; a copy does not."""
    made = shelf("llama")
    raw = np.array(pools.arrays_of(made.units[0])["model.norm.weight"][1])
    raw[::2] = -0.0
    pools.set_tensors(made.units[0], model__norm__weight=("F32", raw))
    model = made.live("float32")
    for counts in ((1, 1, 0), (1, 0, 0), (0, 1, 0), (1, 0, 0)):
        assert bits(model.load(made.weights(counts))) == made.merged(counts, "float32"), counts
        shutil.rmtree(made.root / "-".join(map(str, counts)))
    assert torch.signbit(model.model.state_dict()["model.norm.weight"][::2]).all()


def test_shards_and_whole_files_together(tmp_path, tiny, pool):
    folder = pools.unit_folder(tmp_path / "u", tiny.seed, 50)
    shards = pools.shard(folder, tmp_path / "shards")
    pool.add_model(shards, role="unit", partition="alpha", seed="base")
    weights = pool.resolve("alpha+beta").integer_weights
    loaded = bits(opened(pool, [digest for digest, _ in weights]).load(weights))
    pool.merge("alpha+beta", tmp_path / "merged")
    assert loaded == bits(load_model(tmp_path / "merged"))


def test_the_average_is_the_plain_one(tiny):
    """Against ten lines of float64, not only against the merge on disk."""
    with Pool.open(tiny.root) as pool:
        weights = pool.resolve("3*alpha+2*beta/2+4*beta/1").integer_weights
        model = opened(pool, [digest for digest, _ in weights]).load(weights)
    parents = [pools.arrays_of(tiny.units[p]) for p in (("alpha", 1), ("beta", 2), ("beta", 1))]
    for name, (_, raw) in pools.average(parents, [3, 2, 4]).items():
        assert model.state_dict()[name].numpy().tobytes() == raw.tobytes(), name


def test_models_of_two_families_are_refused(tmp_path, tiny, pool):
    other = pool.add_model(pools.model_folder(tmp_path / "o", "gpt2"), name="other")
    with pytest.raises(Incompatible, match="tensor"):
        opened(pool, [pool.resolve("base").digest, other.digest])


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
    equal = opened(pool, made[:2]).load([(made[0], 1), (made[1], 1)]).state_dict()
    assert equal["model.steps"].tolist() == [7, 8]
    with pytest.raises(Incompatible, match=r"integer tensor 'model\.steps' differs between"):
        opened(pool, made)
