"""Intake of model folders: what is stored, what is refused, and that refusals change nothing."""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from pools import (
    arrays_of,
    change_json,
    contents,
    model_folder,
    refusal,
    set_tensors,
    shard,
    tokenizer_folder,
    unit_folder,
)

from poolreg import Pool
from poolreg.canonical import sha256
from poolreg.errors import (
    Conflict,
    Damage,
    Incompatible,
    NameRefused,
    NotFound,
    PoolregError,
    Refused,
    UsageError,
)
from poolreg.models.folders import new_folder
from poolreg.models.stored import Run, add_model, stored_folder, stored_tensors
from poolreg.weights import checkpoint as checkpoint_module
from poolreg.weights import hashing
from poolreg.weights.checkpoint import fingerprint, read_checkpoint


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def stored_files(pool: Pool, name: str) -> dict[str, bytes]:
    rows = pool.model(name)["files"]
    return {row["name"]: pool.registry.objects.read(row["object"]) for row in rows}


# -- what is stored -------------------------------------------------------------------------


def test_the_roles(tiny, pool, tmp_path):
    made = unit_folder(tmp_path / "made", tiny.seed, 77)
    added = pool.add_model(
        made, name="ref", role="reference", mixture="2*beta + alpha", seed="base", tokens=500,
        budget="same",
    )  # fmt: skip
    assert (added.label, added.role, added.new) == ("ref", "reference", True)
    assert added.bytes == sum(raw.nbytes for _, raw in arrays_of(made).values())
    assert added.parameters == added.bytes // 4
    assert pool.add_model(unit_folder(tmp_path / "o", tiny.seed, 78), name="o").role == "other"

    roles = {row["name"]: (row["role"], row["seed"]) for row in pool.models()}
    units = {f"{name}/{unit}": ("unit", "base") for name, unit in tiny.units}
    others = {"base": ("seed", None), "ref": ("reference", "base"), "o": ("other", None)}
    assert roles == units | others
    (run,) = pool.model("ref")["runs"]
    facts = {"mixture": "alpha+2*beta", "scheme": "micro", "budget": "same", "tokens": 500}
    assert {key: run[key] for key in facts} == facts
    assert run["blend"] == pool.resolve("alpha+2*beta").blend
    rows = pool.sql(
        "SELECT name, units.unit FROM model_units JOIN units ON units.digest = model_units.unit "
        "JOIN names ON names.target = units.partition WHERE model = ? ORDER BY ALL",
        [added.digest],
    ).rows
    assert rows == [("alpha", 1), ("beta", 1), ("beta", 2)]


def test_stored_bytes_are_the_files(tiny, pool):
    assert stored_files(pool, "base") == files_of(tiny.seed)
    with stored_folder(pool.registry, pool.resolve("base").digest) as folder:
        assert files_of(folder) == files_of(tiny.seed)
    assert not folder.exists()
    assert list((pool.root / "tmp").iterdir()) == []


@pytest.mark.parametrize("family", ["llama", "gpt_neox"])
@pytest.mark.parametrize("first", ["whole", "shards"])
def test_shards_do_not_change_the_digest(family, first, tmp_path):
    whole = model_folder(tmp_path / "whole", family)
    shards = shard(whole, tmp_path / "shards")
    one, other = (whole, shards) if first == "whole" else (shards, whole)
    with Pool.create(tmp_path / "pool") as pool:
        a = pool.add_model(one, name="m", role="seed")
        stored = stored_files(pool, "m")
        b = pool.add_model(other, name="m", role="seed")
        assert a.digest == b.digest
        assert (a.new, b.new) == (True, False)
        assert stored == files_of(one) == stored_files(pool, "m")
        tensors = stored_tensors(pool.registry, a.digest)
        assert tensors.keys() == arrays_of(whole).keys()


def test_shards_are_stored_and_exported(tiny, pool, tmp_path):
    folder = shard(unit_folder(tmp_path / "u", tiny.seed, 50), tmp_path / "shards")
    pool.add_model(folder, name="sharded", role="other")
    assert stored_files(pool, "sharded") == files_of(folder)
    assert files_of(pool.export_model("sharded", tmp_path / "out")) == files_of(folder)


def test_the_digest_covers_values_and_configuration(tiny, pool, tmp_path):
    folder = Path(shutil.copytree(tiny.seed, tmp_path / "copy"))
    base = pool.resolve("base").digest

    def added() -> str:
        return pool.add_model(folder).digest

    assert added() == base
    change_json(folder / "config.json", _name_or_path="/elsewhere", transformers_version="1")
    (folder / "README.md").write_text("a card")
    assert added() == base
    name = "model.norm.weight"
    raw = np.array(arrays_of(folder)[name][1])
    raw[0] = np.nextafter(raw[0], np.float32(9))
    set_tensors(folder, **{name: ("F32", raw)})
    changed = added()
    assert changed != base
    change_json(folder / "config.json", rms_norm_eps=1e-3)
    assert added() not in (base, changed)


def test_a_folder_without_tokenizer_takes_the_seeds(tiny, pool, tmp_path):
    folder = unit_folder(tmp_path / "u", tiny.seed, 50)
    whole = fingerprint(read_checkpoint(folder)).digest
    for path in folder.glob("*token*"):
        path.unlink()
    added = pool.add_model(folder, role="unit", partition="alpha", seed="base")
    assert added.digest == whole
    assert "tokenizer" in added.notes[0]
    assert (
        stored_files(pool, added.digest)["tokenizer.json"]
        == (tiny.seed / "tokenizer.json").read_bytes()
    )
    other = pool.add_model(folder, role="other")
    assert other.digest != whole
    assert "no tokenizer" in other.notes[0]
    assert pool.model(other.digest)["tokenizer"] is None
    given = pool.add_model(folder, role="other", tokenizer=tiny.seed)
    assert (given.digest, given.notes) == (whole, ())


def test_adding_again_changes_nothing(tiny, pool):
    def state() -> tuple[object, ...]:
        tables = ("models", "model_files", "model_tensors", "model_units", "objects")
        rows = [pool.sql(f"SELECT * FROM {table} ORDER BY ALL").rows for table in tables]
        return (*rows, pool.sql("SELECT * EXCLUDE added FROM runs ORDER BY ALL").rows)

    before, objects = state(), contents(pool.root).keys()
    for (name, unit), folder in [*tiny.units.items()][:2]:
        added = pool.add_model(
            folder, role="unit", partition=name, unit=unit, seed="base", tokens=100 * unit
        )
        assert not added.new
    assert not pool.add_model(tiny.seed, name="base", role="seed").new
    assert state() == before
    assert {key for key in contents(pool.root) if key.startswith("objects")} == {
        key for key in objects if key.startswith("objects")
    }


def test_removed_and_added_again(tiny, pool):
    assert pool.resolve("alpha").components[0][0] == pool.remove("model", "alpha/1")
    with pytest.raises(NotFound, match="alpha/1 was removed"):
        pool.resolve("alpha")
    assert "alpha/1" not in [row["name"] for row in pool.models()]
    pool.add_model(tiny.units["alpha", 1], role="unit", partition="alpha", seed="base")
    assert "alpha/1" in [row["name"] for row in pool.models()]
    assert len(pool.resolve("alpha").components) == 1

    pool.remove("model", "base")
    with pytest.raises(NotFound, match="no seed model"):
        pool.resolve("alpha")
    pool.add_model(tiny.seed, name="base", role="seed")
    assert len(pool.resolve("alpha+beta").components) == 3


def test_the_latest_model_of_a_unit_counts(tiny, pool, tmp_path):
    before = pool.resolve("alpha").digest
    folder = unit_folder(tmp_path / "better", tiny.seed, 99)
    added = pool.add_model(folder, role="unit", partition="alpha", unit=1, seed="base")
    assert pool.resolve("alpha").digest == added.digest != before
    pool.remove("model", added.digest)
    assert pool.resolve("alpha").digest == before


def test_a_model_of_a_unit_that_is_added_again_stands_again(tiny, pool, tmp_path):
    other = unit_folder(tmp_path / "other", tiny.seed, 99)
    folders = [tiny.units["alpha", 1], other, tiny.units["alpha", 1], tiny.units["alpha", 1], other]
    for folder in folders:
        added = pool.add_model(folder, role="unit", partition="alpha", seed="base", tokens=100)
        assert pool.resolve("alpha").digest == added.digest
    rows = pool.sql("SELECT model, count(*) FROM runs WHERE role = 'unit' GROUP BY model").rows
    assert sorted(count for _, count in rows) == [1, 1, 1, 1, 1, 2, 2]  # not one more than needed


def test_names_move_only_when_told(tiny, pool, tmp_path):
    folder = unit_folder(tmp_path / "u", tiny.seed, 50)
    with pytest.raises(Conflict, match="'base' is taken"):
        pool.add_model(folder, name="base")
    with pytest.raises(Conflict, match="names a partition"):
        pool.add_model(folder, name="alpha")
    added = pool.add_model(folder, name="base", replace=True)
    assert pool.resolve("base").digest == added.digest


# -- what is refused ------------------------------------------------------------------------


def nan(folder: Path) -> None:
    raw = np.array(arrays_of(folder)["model.norm.weight"][1])
    raw[3] = np.nan
    set_tensors(folder, model__norm__weight=("F32", raw))


def truncated(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-5])


def pickled(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    torch.save({"weight": torch.zeros(2)}, folder / "pytorch_model.bin")


def reshaped(folder: Path) -> None:
    set_tensors(folder, model__norm__weight=("F32", np.ones(17, np.float32)))


def half(folder: Path) -> None:
    raw = arrays_of(folder)["model.norm.weight"][1]
    set_tensors(folder, model__norm__weight=("F16", raw.astype(np.float16)))


def extra(folder: Path) -> None:
    set_tensors(folder, model__more__weight=("F32", np.ones(2, np.float32)))


def other_tokenizer(folder: Path) -> None:
    tokenizer_folder(folder, ["t h", "th e"])


def tied(folder: Path) -> None:
    shutil.rmtree(folder)
    model_folder(folder, tied=True)


def code(folder: Path) -> None:
    change_json(folder / "config.json", auto_map={"AutoModelForCausalLM": "code.Model"})


def quantised(folder: Path) -> None:
    change_json(folder / "config.json", quantization_config={"quant_method": "gptq"})


def no_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def no_config(folder: Path) -> None:
    (folder / "config.json").unlink()


def theta(folder: Path) -> None:
    rope = json.loads((folder / "config.json").read_text())["rope_parameters"]
    change_json(folder / "config.json", rope_parameters=rope | {"rope_theta": 5.0})


UNIT = {"role": "unit", "partition": "alpha", "seed": "base"}
CASES = [
    (nan, Refused, r"model\.norm\.weight.*1 values that are NaN"),
    (truncated, Refused, r"truncated"),
    (pickled, Refused, r"pytorch_model\.bin.*safetensors"),
    (reshaped, Incompatible, r"tensor model\.norm\.weight is F32 \[17\].*but F32 \[16\].*seed"),
    (half, Incompatible, r"tensor model\.norm\.weight is F16 \[16\].*but F32 \[16\]"),
    (extra, Incompatible, r"tensor model\.more\.weight \(F32 \[2\]\) stands in bad but not in"),
    (tied, Incompatible, r"bad has tied .* seed base has not"),
    (theta, Incompatible, r"rope_theta is 5\.0 in bad but 10000"),
    (other_tokenizer, Incompatible, r"tokenizers differ"),
    (code, Refused, r"code.*--trust-code"),
    (quantised, Refused, r"quantised"),
    (no_weights, NotFound, r"no weights"),
    (no_config, NotFound, r"no config\.json"),
]


@pytest.mark.parametrize(
    ("spoil", "kind", "words"), CASES, ids=[case[0].__name__ for case in CASES]
)
def test_a_bad_folder_is_refused_and_nothing_changes(spoil, kind, words, tiny, pool, tmp_path):
    bad = unit_folder(tmp_path / "bad", tiny.seed, 50)
    before = contents(pool.root)
    spoil(bad)
    with pytest.raises(PoolregError) as caught:
        pool.add_model(bad, name="bad", **UNIT)
    assert type(caught.value) is kind
    assert_words(words, caught.value)
    assert contents(pool.root) == before
    assert list((pool.root / "tmp").iterdir()) == []
    assert len(pool.models()) == 7


def assert_words(words: str, error: PoolregError) -> None:
    assert re.search(words, refusal(error)), refusal(error)


REQUESTS = [
    ({"role": "unit", "seed": "base"}, UsageError, r"needs its partition"),
    ({"role": "unit", "partition": "alpha"}, UsageError, r"needs the seed.*--from"),
    ({"role": "unit", "partition": "beta", "seed": "base"}, UsageError, r"2 base units.*--unit 1"),
    ({**UNIT, "unit": 0}, UsageError, r"from 1"),
    ({**UNIT, "unit": -1}, UsageError, r"from 1"),
    ({**UNIT, "unit": 2}, NotFound, r"alpha/2 does not exist.*1 unit"),
    ({**UNIT, "partition": "alhpa"}, NotFound, r"alhpa.*did you mean alpha"),
    ({**UNIT, "seed": "bsae"}, NotFound, r"bsae.*did you mean base"),
    ({**UNIT, "seed": "alpha/1"}, NotFound, r"alpha/1"),
    ({**UNIT, "mixture": "alpha"}, UsageError, r"cannot be described"),
    ({"role": "seed", "seed": "base"}, UsageError, r"not trained from another seed"),
    ({"role": "reference", "seed": "base"}, UsageError, r"reference its mixture"),
    ({"role": "reference", "mixture": "alpha", "seed": "base", "budget": "most"}, UsageError,
     r"budget.*sum or same"),
    ({"role": "reference", "mixture": "alpha+", "seed": "base"}, UsageError, r"not a mixture"),
    ({"role": "reference", "mixture": "nil", "seed": "base"}, NotFound, r"no partition is named"),
    ({"role": "reference", "mixture": "alpha", "seed": "base", "scheme": "x"}, UsageError,
     r"unknown scheme"),
    ({"role": "other", "unit": 1}, UsageError, r"unit number needs its partition"),
    ({"role": "other", "partition": "alpha"}, UsageError, r"cannot be described"),
    ({"role": "other", "budget": "sum"}, UsageError, r"only references"),
    ({"role": "king"}, UsageError, r"unknown role.*seed, unit"),
    ({"role": "other", "name": "../x"}, NameRefused, r"letters, digits"),
    ({"role": "other", "name": "a" * 300}, NameRefused, r"1 to 100"),
    ({"role": "other", "name": "base"}, Conflict, r"taken"),
    ({"role": "other", "tokenizer": "/absent"}, NotFound, r"no tokenizer in /absent"),
]  # fmt: skip


@pytest.mark.parametrize(("request_", "kind", "words"), REQUESTS)
def test_a_wrong_request_is_refused_and_nothing_changes(request_, kind, words, tiny, pool):
    before = contents(pool.root)
    with pytest.raises(PoolregError) as caught:
        pool.add_model(tiny.units["beta", 2], **request_)
    assert type(caught.value) in (kind, *kind.__subclasses__())
    assert_words(words, caught.value)
    assert contents(pool.root) == before
    assert list((pool.root / "tmp").iterdir()) == []


def test_a_unit_trained_from_what_is_no_seed_is_refused(tiny, pool, tmp_path):
    made = unit_folder(tmp_path / "u", tiny.seed, 50)
    pool.add_model(made, name="mine", role="other")
    with pytest.raises(UsageError, match=r"'mine' is not a seed model.*\n.*--seed"):
        pool.add_model(tiny.seed, role="unit", partition="alpha", seed="mine")


def test_of_another_architecture(tiny, pool, tmp_path):
    bad = model_folder(tmp_path / "bad", "gpt2")
    with pytest.raises(Incompatible, match=r"tensor \S+ .*\[.*\].*; .*model_type is \"gpt2\""):
        pool.add_model(bad, **UNIT)


@pytest.fixture
def changing(tiny, tmp_path, monkeypatch):
    """A folder whose weights are written over, in place, as soon as they have been hashed."""
    from poolreg.models import stored as models

    folder = unit_folder(tmp_path / "u", tiny.seed, 50)
    real = models.fingerprint

    def then_changed(*args, **options):
        identity = real(*args, **options)
        with open(folder / "model.safetensors", "r+b") as file:
            file.seek(-64, os.SEEK_END)
            file.write(bytes(64))
        return identity

    monkeypatch.setattr(models, "fingerprint", then_changed)
    return folder


def test_what_is_hashed_is_what_is_stored(pool, changing, tmp_path):
    before = files_of(changing)
    added = pool.add_model(changing, name="u")
    assert files_of(changing) != before
    assert files_of(pool.export_model("u", tmp_path / "out")) == before
    assert fingerprint(read_checkpoint(tmp_path / "out")).digest == added.digest
    assert pool.verify(full=True).findings == ()


def test_a_model_that_changes_while_it_is_read_is_refused(tiny, pool, tmp_path, monkeypatch):
    folder = unit_folder(tmp_path / "u", tiny.seed, 50)
    real = hashing._read

    def then_longer(*args):
        real(*args)
        with open(folder / "model.safetensors", "ab") as file:
            file.write(b"more")

    monkeypatch.setattr(hashing, "_read", then_longer)
    before = contents(pool.root)
    with pytest.raises(Refused, match="changed while it was read"):
        pool.add_model(folder, name="u")
    assert contents(pool.root) == before


def test_passing_folders_are_moved_and_others_copied(tiny, pool):
    """What a user has is never touched; what was made in the pool is not written twice."""
    mine = unit_folder(pool.root / "tmp" / "mine", tiny.seed, 50)
    ours = unit_folder(pool.root / "tmp" / "ours", tiny.seed, 51)
    inodes = {}
    for folder, passing in ((mine, False), (ours, True)):
        weights = folder / "model.safetensors"
        inodes[folder] = weights.stat().st_ino
        data = weights.read_bytes()
        add_model(pool.registry, folder, Run("other"), name=folder.name, passing=passing)
        stored = pool.registry.objects.existing(sha256(data))
        assert stored.read_bytes() == data
        assert (stored.stat().st_ino == inodes[folder]) == passing
        assert weights.exists() != passing
        assert stored.stat().st_mode & 0o777 == 0o444
    assert (mine / "model.safetensors").stat().st_ino == inodes[mine]
    assert (mine / "model.safetensors").stat().st_mode & 0o200
    assert (mine / "model.safetensors").stat().st_nlink == 1


def test_a_kept_merge_is_read_by_nobody(pool, monkeypatch):
    """It is hashed while it is written, and moved."""

    def never(*_, **__):
        raise AssertionError("hashed again")

    monkeypatch.setattr(checkpoint_module, "hash_files", never)
    kept = pool.keep_merge("alpha+beta", "blend")
    monkeypatch.undo()
    with stored_folder(pool.registry, kept.digest) as folder:
        assert fingerprint(read_checkpoint(folder)).digest == kept.digest
    assert pool.verify(full=True).findings == ()


# -- folders written --------------------------------------------------------------------------


def test_export_is_byte_equal(tiny, pool, tmp_path):
    assert pool.export_model("base", tmp_path / "deep" / "out") == tmp_path / "deep" / "out"
    assert files_of(tmp_path / "deep" / "out") == files_of(tiny.seed)
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["out"]
    assert files_of(pool.export_model("beta/2", tmp_path / "unit")) == files_of(
        tiny.units["beta", 2]
    )
    with pytest.raises(NotFound, match=r"'alpha\+beta' is a mixture.*\n.*poolreg merge"):
        pool.export_model("alpha+beta", tmp_path / "mixed")


def test_force_replaces_only_model_folders(tiny, pool, tmp_path):
    out = pool.export_model("beta/2", tmp_path / "out")
    with pytest.raises(Conflict, match="not empty"):
        pool.export_model("base", out)
    assert files_of(out) == files_of(tiny.units["beta", 2])
    pool.export_model("base", out, force=True)
    assert files_of(out) == files_of(tiny.seed)

    (tmp_path / "work").mkdir()
    (tmp_path / "work" / "thesis.tex").write_text("years")
    (tmp_path / "work" / "config.json").write_text("{}")  # many programs have one
    (tmp_path / "file").write_text("text")
    for place in ("work", "file"):
        with pytest.raises(Conflict):
            pool.export_model("base", tmp_path / place, force=True)
    assert (tmp_path / "work" / "thesis.tex").read_text() == "years"
    (tmp_path / "empty").mkdir()
    assert files_of(pool.export_model("base", tmp_path / "empty")) == files_of(tiny.seed)


def test_a_damaged_object_is_not_exported(tiny, pool, tmp_path):
    row = next(row for row in pool.model("base")["files"] if row["role"] == "weights")
    path = pool.registry.objects.path(row["object"])
    path.chmod(0o644)
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(Damage, match="changed"):
        pool.export_model("base", tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["pool"]


def test_a_new_folder_is_whole_or_absent(tmp_path):
    def fail(place: Path) -> None:
        with new_folder(place) as staging:
            (staging / "half").write_text("half")
            raise Refused("no")

    with pytest.raises(Refused):
        fail(tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
