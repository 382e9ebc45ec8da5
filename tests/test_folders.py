"""Merging folders without a pool: bit-equal to ten lines of float64, loadable, whole or absent."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from pools import (
    arrays_of,
    average,
    change_json,
    model_folder,
    refusal,
    same,
    set_tensors,
    shard,
    tokenizer_folder,
    unit_folder,
)
from transformers import AutoModelForCausalLM, AutoTokenizer

from poolreg import Pool, merge_folders
from poolreg.canonical import digest_of
from poolreg.errors import (
    Conflict,
    Incompatible,
    MixtureError,
    NotFound,
    PoolregError,
    Refused,
    UsageError,
)
from poolreg.weights.checkpoint import fingerprint, read_checkpoint

pytestmark = pytest.mark.usefixtures("one_thread")

WEIGHTS = {2: [2, 1], 3: ["0.5", "1/3", "1/6"], 5: [1, 2, 3, 4, 90]}


def family(place: Path, count: int, **options) -> list[Path]:
    """Write so many models of one seed."""
    seed = model_folder(place / "seed", **options)
    return [unit_folder(place / f"m{number}", seed, number) for number in range(count)]


def digest(folder: Path) -> str:
    return fingerprint(read_checkpoint(folder)).digest


def load_strictly(folder: Path):
    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"):
        assert not info[kind], kind
    return model


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


# -- the numbers ----------------------------------------------------------------------------


@pytest.mark.parametrize("count", [2, 3, 5])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("weighted", [False, True], ids=["uniform", "weighted"])
@pytest.mark.parametrize("kind", ["plain", "tied", "sharded"])
def test_bit_equal_to_the_plain_reference(count, dtype, weighted, kind, tmp_path):
    folders = family(tmp_path, count, dtype=dtype, tied=kind == "tied")
    if kind == "sharded":  # some of them, so that the parents' files differ
        folders[1:2] = [shard(folders[1], tmp_path / "shards")]
    weights = WEIGHTS[count] if weighted else None
    exact = [Fraction(w) for w in weights or [1] * count]
    merged = merge_folders(folders, tmp_path / "out", weights=weights)

    parents = [arrays_of(folder) for folder in folders]
    expected = average(parents, [int(w * 6) for w in exact])
    assert same(arrays_of(tmp_path / "out"), expected)
    assert ("lm_head.weight" in expected) == (kind != "tied")
    assert merged.parents == tuple(
        sorted((digest(f), w / sum(exact)) for f, w in zip(folders, exact, strict=True))
    )
    model = load_strictly(tmp_path / "out")
    assert model.dtype == getattr(torch, dtype)
    state = model.state_dict()
    for name, (_, raw) in expected.items():
        assert state[name].contiguous().view(torch.uint8).numpy().tobytes() == raw.tobytes()


@pytest.mark.parametrize("name", ["gpt2", "opt", "gpt_neox", "qwen2", "mistral", "mixtral"])
def test_other_families(name, tmp_path):
    folders = family(tmp_path, 3, family=name, dtype="bfloat16")
    merge_folders(folders, tmp_path / "out", weights=[3, 2, 2], max_shard_bytes=12_000)
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 1
    parents = [arrays_of(folder) for folder in folders]
    assert same(arrays_of(tmp_path / "out"), average(parents, [3, 2, 2]))
    load_strictly(tmp_path / "out")


@pytest.mark.parametrize(
    ("dtype", "storage"),
    [("float32", "F32"), ("bfloat16", "BF16"), ("float16", "F16"), ("float64", "F64")],
)
def test_a_cast_rounds_once(dtype, storage, tmp_path):
    folders = family(tmp_path, 2)
    # Their mean lies a hair above the middle of two bfloat16 values, which float32 cannot hold.
    low, high = np.float32(1 + 2**-8), np.float32(1 + 2**-8 + 2**-23)
    for folder, value in zip(folders, (low, high), strict=True):
        set_tensors(folder, model__norm__weight=("F32", np.full(16, value, np.float32)))
    merged = merge_folders(folders, tmp_path / "out", dtype=dtype)
    made = arrays_of(tmp_path / "out")
    parents = [arrays_of(folder) for folder in folders]
    assert same(made, average(parents, [1, 1], storage))
    if dtype == "bfloat16":
        assert (made["model.norm.weight"][1] == 0x3F81).all()  # 1 + 2**-7, not 1
    assert merged.bytes == sum(raw.nbytes for _, raw in made.values())
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == dtype
    assert load_strictly(tmp_path / "out").dtype == getattr(torch, dtype)


def test_one_folder_is_a_copy(tmp_path):
    (folder,) = family(tmp_path, 1)
    set_tensors(folder, model__norm__weight=("F32", np.full(16, -0.0, np.float32)))
    merged = merge_folders([folder], tmp_path / "out")
    assert same(arrays_of(tmp_path / "out"), arrays_of(folder))
    assert merged.digest == digest(folder) == digest(tmp_path / "out")
    cast = merge_folders([folder], tmp_path / "half", dtype="float16")
    assert cast.digest != merged.digest
    assert load_strictly(tmp_path / "half").dtype == torch.float16


def test_a_folder_named_twice_counts_twice(tmp_path):
    one, two = family(tmp_path, 2)
    copy = shard(one, tmp_path / "copy")  # the same model under another path
    merged = merge_folders([one, two, copy], tmp_path / "out")
    assert merged.digest == merge_folders([one, two], tmp_path / "w", weights=[2, 1]).digest
    assert dict(merged.parents) == {digest(one): Fraction(2, 3), digest(two): Fraction(1, 3)}
    alone = merge_folders([one, copy], tmp_path / "alone")
    assert (alone.digest, alone.parents) == (digest(one), ((digest(one), Fraction(1)),))


def test_a_weight_of_zero_leaves_out(tmp_path):
    folders = family(tmp_path, 3)
    merged = merge_folders(folders, tmp_path / "out", weights=[0, 1, 3])
    parents = [arrays_of(folder) for folder in folders[1:]]
    assert same(arrays_of(tmp_path / "out"), average(parents, [1, 3]))
    assert digest(folders[0]) not in dict(merged.parents)
    assert "m0" not in (tmp_path / "out" / "README.md").read_text()


def test_weights_as_they_print(tmp_path):
    folders = family(tmp_path, 3)
    merged = merge_folders(folders, tmp_path / "out", weights=[0.1, "0.2", Fraction(7, 10)])
    wanted = dict(zip(map(digest, folders), map(Fraction, ("1/10", "1/5", "7/10")), strict=True))
    assert dict(merged.parents) == wanted


def test_threads_and_shards_do_not_change_the_model(tmp_path):
    folders = family(tmp_path, 3, dtype="bfloat16")
    plain = merge_folders(folders, tmp_path / "plain", threads=1)
    for threads, size in ((1, 9_000), (2, 20_000), (7, 10**9)):
        out = tmp_path / f"out{threads}"
        merged = merge_folders(folders, out, threads=threads, max_shard_bytes=size)
        assert merged.digest == plain.digest
        assert merged.files == len(list(out.glob("*.safetensors")))
        assert (merged.files > 1) == (size < 10**9)
        load_strictly(out)


# -- the folder -----------------------------------------------------------------------------


def test_the_folder_is_complete(tmp_path):
    folders = family(tmp_path, 2)
    (folders[0] / "notes.bin").write_bytes(b"private")
    merged = merge_folders(folders, tmp_path / "out", weights=[1, 3])
    assert files_of(tmp_path / "out").keys() == {
        "README.md", "config.json", "generation_config.json", "model.safetensors", "poolreg.json",
        "tokenizer.json", "tokenizer_config.json",
    }  # fmt: skip
    about = json.loads((tmp_path / "out" / "poolreg.json").read_text())
    rows = [[d, w.numerator, w.denominator] for d, w in merged.parents]
    assert about["components"] == rows == sorted(rows)
    assert merged.recipe == digest_of({"recipe": about["recipe"], "components": rows})
    assert about["digest"] == merged.digest == digest(tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    assert all(d[:16] in card for d, _ in merged.parents)
    assert "| 3/4 |" in card
    one, other = (AutoTokenizer.from_pretrained(f) for f in (folders[0], tmp_path / "out"))
    assert one("the cat 東京")["input_ids"] == other("the cat 東京")["input_ids"]


def test_the_recipe_rebuilds_the_weights(tmp_path):
    folders = family(tmp_path, 4)
    merge_folders(folders, tmp_path / "out", weights=[1, 2, 4, 8])
    about = json.loads((tmp_path / "out" / "poolreg.json").read_text())
    known = {digest(folder): arrays_of(folder) for folder in folders}
    shares = [Fraction(n, d) for _, n, d in about["components"]]
    rebuilt = average([known[d] for d, _, _ in about["components"]], [int(s * 15) for s in shares])
    assert same(arrays_of(tmp_path / "out"), rebuilt)


def test_the_order_of_folders_does_not_matter(tmp_path):
    folders = family(tmp_path, 3)
    for number, folder in enumerate(folders):  # trainers write such settings anew
        change_json(folder / "config.json", initializer_range=0.01 * (number + 1))
        change_json(folder / "tokenizer_config.json", padding_side=["left", "right"][number % 2])
    one = merge_folders(folders, tmp_path / "one" / "out", weights=[1, 2, 3])
    other = merge_folders(folders[::-1], tmp_path / "other" / "out", weights=[3, 2, 1])
    assert (one.digest, one.recipe) == (other.digest, other.recipe)
    here, there = files_of(one.folder), files_of(other.folder)
    del here["README.md"], there["README.md"]  # the titles follow the command
    assert here == there


def test_a_pool_writes_the_same_model(tiny, tmp_path):
    with Pool.open(tiny.root) as pool:
        inside = pool.merge("alpha+beta", tmp_path / "inside", scheme="macro")
        subject = pool.resolve("alpha+beta", scheme="macro")
    folders = [tiny.units[place] for place in (("beta", 1), ("alpha", 1), ("beta", 2))]
    outside = merge_folders(folders, tmp_path / "outside", weights=[1, 2, 1])
    assert inside.recipe == outside.recipe == subject.digest
    assert inside.digest == outside.digest
    assert inside.parents == outside.parents == subject.components
    assert same(arrays_of(tmp_path / "inside"), arrays_of(tmp_path / "outside"))
    assert "| alpha/1 |" in (tmp_path / "inside" / "README.md").read_text()
    load_strictly(tmp_path / "inside")


def test_a_stored_model_is_written_as_it_is(tiny, tmp_path):
    with Pool.open(tiny.root) as pool:
        merged = pool.merge("base", tmp_path / "out", dtype=None)
        assert merged.digest == pool.resolve("base").digest
    assert same(arrays_of(tmp_path / "out"), arrays_of(tiny.seed))


class Seen:
    """Keeps what progress was told: the total and the sum of each stage."""

    def __init__(self) -> None:
        self.stages: dict[str, list[int]] = {}

    def start(self, what: str, total: int, unit: str) -> None:
        assert unit == "bytes"
        self.now = what
        self.stages[what] = [total, 0]

    def advance(self, amount: int) -> None:
        self.stages[self.now][1] += amount

    def note(self, text: str) -> None: ...


@pytest.mark.parametrize("dtype", [None, "bfloat16", "float64"])
def test_progress_reaches_the_end(dtype, tmp_path):
    seen = Seen()
    merge_folders(family(tmp_path, 3), tmp_path / "out", dtype=dtype, progress=seen)
    assert list(seen.stages) == ["hashing", "merging"]
    for stage, (total, done) in seen.stages.items():
        assert done == total, stage


def test_folders_are_merged_without_the_libraries_of_other_commands(tmp_path):
    folders = [str(folder) for folder in family(tmp_path, 2)]
    code = (
        "import json, sys\n"
        "from poolreg.cli.main import main\n"
        "try:\n"
        "    main(sys.argv[1:])\n"
        "except SystemExit as end:\n"
        "    print(json.dumps([end.code, sorted(sys.modules)]))\n"
    )
    words = [sys.executable, "-c", code, "merge", *folders, "-o", str(tmp_path / "out")]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    status, modules = json.loads(done.stdout)
    assert status == 0
    assert (tmp_path / "out" / "model.safetensors").is_file()
    heavy = {"torch", "transformers", "tokenizers", "safetensors", "pyarrow", "duckdb", "scipy"}
    assert not heavy & set(modules)


# -- refusals -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("weights", "kind", "words"),
    [
        ([1], UsageError, "1 weights for 2 folders"),
        ([1, 2, 3], UsageError, "3 weights for 2 folders"),
        ([0, 0], MixtureError, "not all zero"),
        ([2, -1], MixtureError, "zero or more"),
        ([1, "many"], MixtureError, "not a weight"),
        ([1, "1/0"], MixtureError, "not a weight"),
        ([1, float("nan")], MixtureError, "not a weight"),
        ([1, float("inf")], MixtureError, "not a weight"),
        ([1, "1e999999999"], MixtureError, "not a weight"),
        ([1, "1/300000000000000000"], MixtureError, "too fine"),
        ([1, 10**17], PoolregError, "weights"),
    ],
)
def test_weights_that_are_none(weights, kind, words, tmp_path):
    folders = family(tmp_path, 2)
    before = sorted(path.name for path in tmp_path.iterdir())
    with pytest.raises(kind, match=words):
        merge_folders(folders, tmp_path / "out", weights=weights)
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def bad_tensor(folder: Path) -> None:
    set_tensors(folder, model__norm__weight=("F32", np.ones(17, np.float32)))


def nan(folder: Path) -> None:
    set_tensors(folder, model__norm__weight=("F32", np.full(16, np.inf, np.float32)))


def cut(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])


def pickle_only(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def tokens(folder: Path) -> None:
    tokenizer_folder(folder, ["t h"])


def theta(folder: Path) -> None:
    change_json(folder / "config.json", rms_norm_eps=0.5)


def untied(folder: Path) -> None:
    change_json(folder / "config.json", tie_word_embeddings=False)
    set_tensors(folder, lm_head__weight=("F32", np.ones((272, 16), np.float32)))


def gone(folder: Path) -> None:
    folder.rename(folder.with_name("elsewhere"))


@pytest.mark.parametrize(
    ("spoil", "kind", "words"),
    [
        (bad_tensor, Incompatible, r"model\.norm\.weight is F32 \[16\] in .*m0 but F32 \[17\]"),
        (nan, Refused, r"tensor model\.norm\.weight"),
        (cut, Refused, r"truncated"),
        (pickle_only, Refused, r"pickle"),
        (tokens, Incompatible, r"tokenizers differ"),
        (theta, Incompatible, r"rms_norm_eps"),
        (untied, Incompatible, r"m0 has tied .*m1 has not"),
        (gone, NotFound, r"no model folder .*m1"),
    ],
)
def test_a_bad_folder_leaves_nothing(spoil, kind, words, tmp_path):
    folders = family(tmp_path, 2, tied=spoil is untied)
    spoil(folders[1])
    before = sorted(path.name for path in tmp_path.iterdir())
    with pytest.raises(kind, match=words):
        merge_folders(folders, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_an_average_that_overflows_leaves_nothing(tmp_path):
    folders = family(tmp_path, 2)
    for folder in folders:
        set_tensors(folder, model__norm__weight=("F32", np.full(16, 1e6, np.float32)))
    with pytest.raises(Refused, match=r"model\.norm\.weight.*too large for F16"):
        merge_folders(folders, tmp_path / "out", dtype="float16")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m0", "m1", "seed"]


def test_an_interrupt_leaves_nothing(tmp_path):
    class Stop(Seen):
        def advance(self, amount: int) -> None:
            super().advance(amount)
            if self.now == "merging":
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        merge_folders(family(tmp_path, 2), tmp_path / "out", progress=Stop())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m0", "m1", "seed"]


def test_nothing_is_overwritten_unasked(tmp_path):
    folders = family(tmp_path, 2)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "file").write_text("mine")
    for options in ({}, {"force": True}):
        with pytest.raises(Conflict):
            merge_folders(folders, tmp_path / "mine", **options)
    assert files_of(tmp_path / "mine") == {"file": b"mine"}
    first = merge_folders(folders, tmp_path / "out")
    with pytest.raises(Conflict, match="not empty"):
        merge_folders(folders[:1], tmp_path / "out")
    assert digest(tmp_path / "out") == first.digest
    again = merge_folders(folders[:1], tmp_path / "out", force=True)
    assert digest(tmp_path / "out") == again.digest != first.digest


def test_a_parent_is_never_replaced(tmp_path):
    """A merge that replaces its own parent could not be made again."""
    folders = family(tmp_path, 2)
    before = files_of(folders[0])
    with pytest.raises(Conflict, match="is or holds a model to merge"):
        merge_folders(folders, folders[0], force=True)
    assert files_of(folders[0]) == before


def test_a_folder_that_holds_a_parent_is_never_replaced(tmp_path):
    """As trainers leave them: a model, and its earlier checkpoints in folders of the folder."""
    model, one, two = family(tmp_path, 3)
    parents = [folder.rename(model / folder.name) for folder in (one, two)]
    before = [files_of(folder) for folder in parents]
    with pytest.raises(Conflict, match="is or holds a model to merge"):
        merge_folders(parents, model, force=True)
    assert [files_of(folder) for folder in parents] == before


@pytest.mark.parametrize("stage", ["hashing", "merging"])
@pytest.mark.parametrize("how", ["written over", "replaced"])
def test_a_parent_that_changes_meanwhile_leaves_nothing(stage, how, tmp_path):
    """The recipe names the parents that were averaged, not what they were before."""
    folders = family(tmp_path, 2)
    path = folders[0] / "model.safetensors"

    class Changing(Seen):
        def start(self, name: str, total: int, *_) -> None:
            super().start(name, total, *_)
            if name != stage:
                return
            data = bytearray(path.read_bytes())
            data[-1] ^= 1
            place = path.with_suffix(".new") if how == "replaced" else path
            place.write_bytes(data)
            os.utime(place)
            place.replace(path)

    with pytest.raises(Refused, match=r"m0.*changed while it was read"):
        merge_folders(folders, tmp_path / "out", progress=Changing())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m0", "m1", "seed"]


def test_wrong_requests(tmp_path):
    folders = family(tmp_path, 2)
    with pytest.raises(UsageError, match="nothing to merge"):
        merge_folders([], tmp_path / "out")
    with pytest.raises(UsageError, match=r"unknown dtype 'int8'\n.*float32, bfloat16") as caught:
        merge_folders(folders, tmp_path / "out", dtype="int8")
    assert "float16" in refusal(caught.value)
    assert not (tmp_path / "out").exists()
