"""Reading model folders strictly, and their identity: real tiny models, and hostile folders."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from poolreg.canonical import digest_of
from poolreg.errors import Incompatible, NotFound, PoolregError, Refused, StorageError
from poolreg.tensors import NUMPY_DTYPES, write_file
from poolreg.weights import hashing
from poolreg.weights.checkpoint import (
    Checkpoint,
    Fingerprint,
    canonical_config,
    check_same_family,
    digest_of_weights,
    fingerprint,
    read_checkpoint,
)
from poolreg.weights.hashing import count_not_finite

Models = Callable[..., Path]


def arrays(seed: int = 0) -> dict[str, tuple[str, Any]]:
    """Three small tensors, as `write_file` takes them."""
    draw = np.random.default_rng(seed)
    return {
        "embed.weight": ("F32", draw.standard_normal((6, 4)).astype("<f4")),
        "layer.weight": ("BF16", draw.integers(0, 0x3F80, (4, 4)).astype("<u2")),
        "steps": ("I64", np.arange(3)),
    }


def folder_of(
    folder: Path,
    tensors: Mapping[str, tuple[str, Any]] | None = None,
    config: Mapping[str, Any] | None = None,
) -> Path:
    """Write a model folder with one weights file."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"} | dict(config or {})))
    write_file(folder / "model.safetensors", tensors if tensors is not None else arrays())
    return folder


def shard(folder: Path, placed: Mapping[str, str], tensors: Mapping[str, tuple[str, Any]]) -> Path:
    """Turn a folder of one weights file into shards as `placed` says."""
    (folder / "model.safetensors").unlink()
    for name in set(placed.values()):
        write_file(folder / name, {key: tensors[key] for key in placed if placed[key] == name})
    set_index(folder, placed)
    return folder


def set_index(folder: Path, placed: Any) -> None:
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": placed}))


ONE, TWO = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
PLACED = {"embed.weight": ONE, "layer.weight": TWO, "steps": TWO}


@pytest.fixture
def plain(tmp_path: Path) -> Path:
    return folder_of(tmp_path / "plain")


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    return shard(folder_of(tmp_path / "sharded"), PLACED, arrays())


# ---------------------------------------------------------------------- real models of transformers

SIZES: dict[str, dict[str, Any]] = {
    "llama": {
        "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 4, "vocab_size": 64, "max_position_embeddings": 32,
    },
    "gpt_neox": {
        "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 4, "vocab_size": 64, "max_position_embeddings": 32,
    },
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 64, "n_positions": 32},
    "opt": {
        "hidden_size": 32, "ffn_dim": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
        "vocab_size": 64, "max_position_embeddings": 32, "word_embed_proj_dim": 32,
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    """Make (once) a model of a type and seed; further words go to its config."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.set_num_threads(1)
    root = tmp_path_factory.mktemp("models")

    def make(
        kind: str, *, seed: int = 0, saving: Mapping[str, Any] | None = None, **more: Any
    ) -> Path:
        folder = root / digest_of([kind, seed, dict(saving or {}), more])
        if not folder.exists():
            torch.manual_seed(seed)
            config = AutoConfig.for_model(kind, **SIZES[kind] | more)
            AutoModelForCausalLM.from_config(config).save_pretrained(folder, **saving or {})
        return folder

    return make


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("kind", sorted(SIZES))
def test_real_models_are_read_whole(models: Models, kind: str, tied: bool) -> None:
    from safetensors import safe_open
    from transformers import AutoModelForCausalLM

    folder = models(kind, tie_word_embeddings=tied)
    checkpoint = read_checkpoint(folder)
    with safe_open(folder / "model.safetensors", "pt") as file:
        expected = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    assert {name: info.shape for name, (_, info) in checkpoint.tensors.items()} == expected
    assert checkpoint.config["model_type"] == kind
    assert checkpoint.tokenizer is None
    found = fingerprint(checkpoint)
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert found.parameters == model.num_parameters()
    assert found.bytes == 4 * found.parameters
    assert len({models(kind, tie_word_embeddings=t) for t in (True, False)}) == 2


@pytest.mark.parametrize("kind", sorted(SIZES))
def test_digest_ignores_sharding_and_metadata(models: Models, tmp_path: Path, kind: str) -> None:
    from safetensors.torch import load_file, save_file

    whole = fingerprint(read_checkpoint(models(kind)))
    pieces = fingerprint(read_checkpoint(models(kind, saving={"max_shard_size": "20KB"})))
    assert len(pieces.files) > 1
    assert pieces.digest == whole.digest
    assert [row[:4] for row in pieces.tensors] == [row[:4] for row in whole.tensors]

    copy = Path(shutil.copytree(models(kind), tmp_path / "copy"))
    save_file(load_file(copy / "model.safetensors"), copy / "model.safetensors", {"note": "x"})
    again = fingerprint(read_checkpoint(copy))
    assert again.files[0].sha256 != whole.files[0].sha256
    assert again.digest == whole.digest


@pytest.mark.parametrize("kind", ["llama", "gpt_neox"])
def test_digest_survives_loading_and_saving(models: Models, tmp_path: Path, kind: str) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(models(kind))
    model.config.use_cache = False
    model.save_pretrained(tmp_path)
    again, first = read_checkpoint(tmp_path), read_checkpoint(models(kind))
    assert again.config != first.config
    assert fingerprint(again).digest == fingerprint(first).digest
    check_same_family(again.family, first.family, names=("again", "first"))


def test_models_of_one_architecture_are_one_family(models: Models) -> None:
    families = [read_checkpoint(models("llama", seed=seed)).family for seed in (0, 1)]
    check_same_family(*families, names=("a", "b"))
    digests = {fingerprint(read_checkpoint(models("llama", seed=seed))).digest for seed in (0, 1)}
    assert len(digests) == 2


def test_tied_and_untied_models_are_told_apart(models: Models) -> None:
    tied = read_checkpoint(models("llama", tie_word_embeddings=True)).family
    untied = read_checkpoint(models("llama", tie_word_embeddings=False)).family
    with pytest.raises(Incompatible, match="tidy has tied input and output embeddings, wild has"):
        check_same_family(untied, tied, names=("wild", "tidy"))


def test_another_size_is_named_with_both_shapes(models: Models) -> None:
    small, large = (read_checkpoint(models("llama", vocab_size=v)).family for v in (64, 80))
    with pytest.raises(Incompatible) as caught:
        check_same_family(small, large, names=("small", "large"))
    assert "lm_head.weight is F32 [64, 32] in small but F32 [80, 32] in large" in str(caught.value)
    assert "(and 1 more tensor differs)" in str(caught.value)
    assert "config vocab_size is 64 in small but 80 in large" in str(caught.value)
    assert caught.value.data["tensors"] == ["lm_head.weight", "model.embed_tokens.weight"]


# ----------------------------------------------------------------------------- the fingerprint


def reference(folder: Path, tensors: Mapping[str, tuple[str, Any]]) -> tuple[str, list[Any]]:
    """Return the hash of the weights file and the tensor rows, the plain way."""
    whole = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    rows = [
        [name, dtype, list(array.shape), hashlib.sha256(array.tobytes()).hexdigest()]
        for name, (dtype, array) in sorted(tensors.items())
    ]
    return whole, rows


def check_against_reference(folder: Path, tensors: Mapping[str, Any], found: Fingerprint) -> None:
    whole, rows = reference(folder, tensors)
    assert found.files[0][1:] == (whole, (folder / "model.safetensors").stat().st_size)
    assert [[row.name, row.dtype, list(row.shape), row.sha256] for row in found.tensors] == rows
    facts = {"model": 1, "tensors": rows, "config": {"model_type": "llama"}, "tokenizer": None}
    assert found.digest == digest_of(facts)
    assert found.bytes == sum(array.nbytes for _, array in tensors.values())


def test_fingerprint_is_the_documented_digest(plain: Path) -> None:
    found = fingerprint(read_checkpoint(plain))
    check_against_reference(plain, arrays(), found)
    assert found.parameters == 6 * 4 + 4 * 4
    data = (plain / "model.safetensors").read_bytes()
    for row in found.tensors:
        assert hashlib.sha256(data[row.start : row.stop]).hexdigest() == row.sha256


shapes = st.lists(st.integers(0, 5), max_size=3).map(tuple)
names = st.text("abc.", min_size=1, max_size=6)
some_tensors = st.dictionaries(
    names, st.tuples(st.sampled_from(sorted(NUMPY_DTYPES)), shapes), min_size=1, max_size=5
)


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    layout=some_tensors,
    chunk=st.sampled_from([8, 16, 24, 1 << 20]),
    threads=st.integers(1, 3),
    seed=st.integers(0, 9),
)
def test_chunk_borders_do_not_matter(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    layout: Mapping[str, tuple[str, tuple[int, ...]]],
    chunk: int,
    threads: int,
    seed: int,
) -> None:
    monkeypatch.setattr(hashing, "CHUNK", chunk)
    monkeypatch.setattr(hashing, "_HANDED_OVER", 0)  # else nothing small reaches the second thread
    draw = np.random.default_rng(seed)
    tensors = {
        name: (dtype, draw.integers(0, 2, shape).astype(NUMPY_DTYPES[dtype]))
        for name, (dtype, shape) in layout.items()
    }
    checkpoint = read_checkpoint(folder_of(tmp_path, tensors))
    (copied := tmp_path / "copied").unlink(missing_ok=True)
    copies = {checkpoint.weight_files[0]: copied}
    found = fingerprint(checkpoint, threads=threads, copies=copies)
    check_against_reference(tmp_path, tensors, found)
    assert copied.read_bytes() == checkpoint.weight_files[0].read_bytes()
    monkeypatch.setattr(hashing, "_BATCH", chunk)
    assert digest_of_weights(checkpoint, threads=threads) == found.digest


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    dtype=st.sampled_from(["F64", "F32", "F16", "BF16"]),
    bad=st.lists(st.tuples(st.integers(0, 49), st.sampled_from(["nan", "-nan", "inf", "-inf"]))),
    unaligned=st.booleans(),
)
def test_values_that_are_not_finite_are_counted(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    dtype: str,
    bad: list[tuple[int, str]],
    unaligned: bool,
) -> None:
    import torch
    from safetensors.torch import save_file

    monkeypatch.setattr(hashing, "CHUNK", 16)
    kinds = {
        "F64": torch.float64,
        "F32": torch.float32,
        "F16": torch.float16,
        "BF16": torch.bfloat16,
    }
    largest = torch.finfo(kinds[dtype]).max
    values = torch.tensor([0.0, -0.0, largest, -largest, 1.0] * 10, dtype=kinds[dtype])
    for index, text in bad:
        values[index] = float(text)
    count = int((~torch.isfinite(values)).sum())
    folder = folder_of(tmp_path)
    tensors = {"w": values, "before": torch.zeros(3 if unaligned else 8, dtype=torch.uint8)}
    save_file(tensors, folder / "model.safetensors")
    checkpoint = read_checkpoint(folder)
    for read in (fingerprint, digest_of_weights):
        if not count:
            read(checkpoint)
            continue
        words = f"tensor w of .* holds {count} values .* of 50"
        with pytest.raises(Refused, match=words) as caught:
            read(checkpoint)
        assert caught.value.data["tensor"] == "w"


def test_eight_bit_floats_are_checked_too() -> None:
    import torch

    bits = np.arange(256, dtype=np.uint8)
    for dtype, kind in (("F8_E5M2", torch.float8_e5m2), ("F8_E4M3", torch.float8_e4m3fn)):
        finite = torch.isfinite(torch.from_numpy(bits).view(kind).float())
        assert count_not_finite(memoryview(bits.tobytes()), dtype) == int((~finite).sum())
    assert count_not_finite(memoryview(bits.tobytes()), "U8") == 0


@pytest.mark.parametrize("bit", [0, 7])
@pytest.mark.parametrize("name", ["embed.weight", "layer.weight", "steps"])
def test_one_changed_bit_changes_the_digest(plain: Path, name: str, bit: int) -> None:
    checkpoint = read_checkpoint(plain)
    before = fingerprint(checkpoint)
    path, info = checkpoint.tensors[name]
    data = bytearray(path.read_bytes())
    data[info.start] ^= 1 << bit
    path.write_bytes(data)
    after = fingerprint(read_checkpoint(plain))
    assert after.digest != before.digest
    assert after.files[0].sha256 != before.files[0].sha256
    changed = [a.name for a, b in zip(after.tensors, before.tensors, strict=True) if a != b]
    assert changed == [name]


def test_the_digest_holds_names_shapes_and_config(tmp_path: Path) -> None:
    def digest(tensors: Any, config: Any) -> str:
        return fingerprint(read_checkpoint(folder_of(tmp_path, tensors, config))).digest

    array = np.ones((2, 3), "<f4")
    first = digest({"a": ("F32", array)}, {})
    assert digest({"a": ("F32", array)}, {"torch_dtype": "float32", "_name_or_path": "/x"}) == first
    others = [
        digest({"b": ("F32", array)}, {}),
        digest({"a": ("F32", array.T.copy())}, {}),
        digest({"a": ("I32", array.view("<i4"))}, {}),
        digest({"a": ("F32", array)}, {"rms_norm_eps": 1e-5}),
    ]
    assert len({first, *others}) == 5


def test_progress_counts_every_byte_once(sharded: Path) -> None:
    counts: list[int] = []
    found = fingerprint(read_checkpoint(sharded), threads=4, progress=counts.append)
    assert sum(counts) == sum(file.bytes for file in found.files)


def test_an_error_or_interrupt_in_the_callback_ends_the_work(sharded: Path) -> None:
    def interrupt(_: int) -> None:
        raise KeyboardInterrupt

    before = set(threading.enumerate())
    with pytest.raises(KeyboardInterrupt):
        fingerprint(read_checkpoint(sharded), threads=4, progress=interrupt)
    assert set(threading.enumerate()) <= before


@pytest.mark.parametrize("change", [lambda data: data[:-8], lambda data: data + b"more"])
def test_a_file_that_changes_meanwhile_is_refused(
    plain: Path, change: Callable[[bytes], bytes]
) -> None:
    checkpoint = read_checkpoint(plain)
    path = plain / "model.safetensors"
    path.write_bytes(change(path.read_bytes()))
    for read in (fingerprint, digest_of_weights):
        with pytest.raises(Refused, match="changed while it was read"):
            read(checkpoint)


@pytest.mark.parametrize("threads", [1, 2])
def test_a_copy_that_shares_blocks_is_what_is_hashed(
    plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, threads: int
) -> None:
    """As on XFS or Btrfs: the file may change while it is hashed, its clone does not."""
    checkpoint = read_checkpoint(plain)
    (path,) = checkpoint.weight_files
    expected = fingerprint(checkpoint)

    def clone(source: int, target: int) -> bool:
        os.pwrite(target, path.read_bytes(), 0)
        with open(path, "r+b") as file:
            file.write(bytes(8))
            os.utime(file.fileno(), ns=(before.st_atime_ns, before.st_mtime_ns))
        return True

    before = path.stat()
    monkeypatch.setattr(hashing, "clone", clone)
    found = fingerprint(checkpoint, copies={path: tmp_path / "copy"}, threads=threads)
    assert found == expected
    assert hashlib.sha256((tmp_path / "copy").read_bytes()).hexdigest() == found.files[0].sha256


def test_a_copy_needs_a_place_of_its_own(plain: Path) -> None:
    checkpoint = read_checkpoint(plain)
    (path,) = checkpoint.weight_files
    before = path.read_bytes()
    with pytest.raises(StorageError, match="File exists"):
        fingerprint(checkpoint, copies={path: path})
    assert path.read_bytes() == before


def test_a_full_disk_ends_a_copy(
    plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "pwrite", full)
    monkeypatch.setattr(hashing, "_HANDED_OVER", 0)
    checkpoint = read_checkpoint(plain)
    before = set(threading.enumerate())
    with pytest.raises(StorageError, match=r"storing model\.safetensors: No space left"):
        fingerprint(checkpoint, copies={checkpoint.weight_files[0]: tmp_path / "copy"})
    assert set(threading.enumerate()) <= before


# ------------------------------------------------------------------------------ what is refused


def refused(
    folder: Path, words: str, kind: type[PoolregError] = Refused, **more: Any
) -> PoolregError:
    with pytest.raises(kind, match=words) as caught:
        read_checkpoint(folder, **more)
    assert caught.value.hint
    return caught.value


def test_no_folder_config_or_weights(tmp_path: Path, plain: Path) -> None:
    refused(tmp_path / "absent", "no model folder", NotFound)
    (plain / "model.safetensors").unlink()
    refused(plain, "has no weights", NotFound)
    (plain / "config.json").unlink()
    refused(plain, "has no config.json", NotFound)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (b"[1]", "a JSON list instead of an object"),
        (b"null", "a JSON NoneType instead of an object"),
        (b"{", "is not valid JSON"),
        (b"", "is not valid JSON"),
        (b'{"model_type": "llama", "eps": NaN}', "NaN is not a finite number"),
        (b'{"model_type": "llama", "eps": -Infinity}', "-Infinity is not a finite number"),
        (b'{"model_type": "llama", "eps": 1e999}', "1e999 is not a finite number"),
        (b'{"model_type": "llama", "n": ' + b"9" * 5000 + b"}", "is not valid JSON"),
        (b'{"model_type": "\xff"}', "is not valid JSON"),
        (b'{"a":' * 100_000, "is not valid JSON"),
        (b'{"model_type": "llama", "a": ' + b"[" * 200 + b"]" * 200 + b"}", "64 levels deep"),
        (b" " * (4 << 20) + b"{}", "is larger than"),
        (b"{}", "names no model_type"),
        (b'{"model_type": 3}', "names no model_type"),
    ],
)
def test_config_that_is_no_config(plain: Path, text: bytes, words: str) -> None:
    (plain / "config.json").write_bytes(text)
    with pytest.raises(Refused, match=words):
        read_checkpoint(plain)


def test_config_that_is_no_file(plain: Path) -> None:
    (plain / "config.json").unlink()
    os.mkfifo(plain / "config.json")
    with pytest.raises(Refused, match="not a regular file"):
        read_checkpoint(plain)


@pytest.mark.parametrize(
    "code",
    [
        {"auto_map": {"AutoModelForCausalLM": "modeling_x.XForCausalLM"}},
        {"text_config": {"auto_map": {"AutoConfig": "x.X"}}},
        {"parts": [{"auto_map": "x.X"}]},
        {"attn_implementation": "someone/kernels"},
        {"text_config": {"_attn_implementation": {"": "someone/kernels@main"}}},
    ],
)
def test_code_runs_only_when_trusted(tmp_path: Path, code: dict[str, Any]) -> None:
    folder = folder_of(tmp_path / "model", config=code)
    assert "--trust-code" in refused(folder, "asks to run code").hint
    assert read_checkpoint(folder, trust_code=True).config["model_type"] == "llama"


def test_harmless_lookalikes_of_code(tmp_path: Path) -> None:
    config = {"auto_map": None, "_attn_implementation": "sdpa", "_name_or_path": "a/b"}
    read_checkpoint(folder_of(tmp_path, config=config))


@pytest.mark.parametrize("nested", [False, True])
def test_quantised_weights(tmp_path: Path, nested: bool) -> None:
    config: dict[str, Any] = {"quantization_config": {"quant_method": "gptq", "bits": 4}}
    folder = folder_of(tmp_path, config={"text_config": config} if nested else config)
    refused(folder, "are quantised, so they cannot be averaged")


class Explosive:
    """Unpickling it would leave a trace."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.trace,))


@pytest.mark.parametrize(
    "name", ["pytorch_model.bin", "model.pt", "weights.pth", "last.ckpt", "x.pkl"]
)
def test_pickles_are_refused_with_the_way_out(plain: Path, tmp_path: Path, name: str) -> None:
    import pickle

    (plain / "model.safetensors").unlink()
    (plain / name).write_bytes(pickle.dumps(Explosive(tmp_path / "trace")))
    error = refused(plain, "as a pickle")
    assert name in error.message
    assert f"from_pretrained({str(plain)!r}).save_pretrained(" in error.hint
    assert not (tmp_path / "trace").exists()


def test_index_of_pickles(plain: Path) -> None:
    (plain / "model.safetensors").unlink()
    (plain / "pytorch_model.bin.index.json").write_text("{}")
    refused(plain, "as a pickle")


def test_the_way_out_of_pickles_works(models: Models, tmp_path: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(models("llama"))
    model.config.save_pretrained(tmp_path)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    code = (
        refused(tmp_path, "as a pickle").hint.split(":\n")[1].replace("NEW_FOLDER", f"{tmp_path}/n")
    )
    exec("\n".join(line.strip() for line in code.splitlines()))
    expected = fingerprint(read_checkpoint(models("llama")))
    assert fingerprint(read_checkpoint(tmp_path / "n")).digest == expected.digest


def test_pickles_beside_weights_are_ignored(plain: Path) -> None:
    for name in ("optimizer.pt", "training_args.bin", "rng_state.pth", "scheduler.pt"):
        (plain / name).write_bytes(b"\x80\x04not opened")
    assert [path.name for path in read_checkpoint(plain).weight_files] == ["model.safetensors"]


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "adapter_config.json"])
def test_adapters(plain: Path, tmp_path: Path, name: str) -> None:
    (plain / name).write_bytes(b"{}")
    assert "merge the adapter first" in refused(plain, "holds an adapter").hint
    (tmp_path / "only").mkdir()
    (tmp_path / "only" / name).write_bytes(b"{}")
    refused(tmp_path / "only", "holds an adapter")


def test_truncated_weights(plain: Path) -> None:
    path = plain / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    refused(plain, "truncated")


def test_weights_without_tensors(tmp_path: Path) -> None:
    refused(folder_of(tmp_path, {}), "hold no tensors")


def test_weights_by_another_name(plain: Path) -> None:
    (plain / "model.safetensors").rename(plain / "final.safetensors")
    assert "rename it" in refused(plain, "is not called model.safetensors").hint


def test_several_weights_without_index(sharded: Path) -> None:
    (sharded / "model.safetensors.index.json").unlink()
    refused(sharded, "holds several weights")
    write_file(sharded / "model.safetensors", arrays())
    refused(sharded, "holds several weights")


def test_weights_beside_an_index(sharded: Path) -> None:
    write_file(sharded / "model.safetensors", arrays())
    refused(sharded, "holds several weights")


# -------------------------------------------------------------------------------------- shards


def test_shards_equal_one_file(plain: Path, sharded: Path) -> None:
    found = read_checkpoint(sharded)
    assert found.weight_files == (sharded / ONE, sharded / TWO)
    assert fingerprint(found, threads=4).digest == fingerprint(read_checkpoint(plain)).digest
    rows = {row.name: row.file for row in fingerprint(found).tensors}
    assert rows == {"embed.weight": 0, "layer.weight": 1, "steps": 1}


@pytest.mark.parametrize(
    "name",
    [
        "../model.safetensors", "/etc/model.safetensors", "a/b.safetensors", "..", ".", "",
        "a\\b.safetensors", "model.bin", "model\n.safetensors", "model\0.safetensors", 3, None,
        ["model.safetensors"],
    ],
)  # fmt: skip
def test_shard_names_cannot_leave_the_folder(sharded: Path, name: Any) -> None:
    write_file(sharded.parent / "model.safetensors", arrays())  # what ../model.safetensors names
    set_index(sharded, {**PLACED, "embed.weight": name})
    error = refused(sharded, "not a plain file name")
    assert "\n" not in error.message
    assert "\0" not in error.message


@pytest.mark.parametrize("placed", [None, [], {}, "x"])
def test_index_without_a_map(sharded: Path, placed: Any) -> None:
    set_index(sharded, placed)
    refused(sharded, "has no weight_map")


def test_missing_shard(sharded: Path) -> None:
    (sharded / TWO).unlink()
    refused(sharded, f"is incomplete: {TWO} is missing")


def test_very_long_shard_name(sharded: Path) -> None:
    set_index(sharded, {**PLACED, "embed.weight": "x" * 5000 + ".safetensors"})
    refused(sharded, "is incomplete")


def test_tensor_missing_from_its_shard(sharded: Path) -> None:
    set_index(sharded, {**PLACED, "gone": ONE})
    error = refused(sharded, f"tensor 'gone' is missing: {ONE} does not hold it")
    assert error.data["tensor"] == "gone"


def test_tensor_in_another_shard_than_the_index_says(sharded: Path) -> None:
    set_index(sharded, {**PLACED, "steps": ONE})
    refused(sharded, f"tensor 'steps' of {TWO} is not there by")


def test_tensor_that_the_index_does_not_know(sharded: Path) -> None:
    set_index(sharded, {key: PLACED[key] for key in ("embed.weight", "layer.weight")})
    refused(sharded, f"tensor 'steps' of {TWO} is not there by")


def test_tensor_in_two_shards(sharded: Path) -> None:
    write_file(sharded / TWO, arrays())
    refused(sharded, f"tensor 'embed.weight' stands in {ONE} and {TWO}")


def test_hub_cache_of_symlinks(plain: Path, tmp_path: Path) -> None:
    snapshot = tmp_path / "snapshot"
    snapshot.mkdir()
    for file in plain.iterdir():
        (snapshot / file.name).symlink_to(file)
    linked = fingerprint(read_checkpoint(snapshot))
    assert linked.digest == fingerprint(read_checkpoint(plain)).digest
    (plain / "model.safetensors").unlink()
    refused(snapshot, "cannot be read")


# -------------------------------------------------------------------------------------- the rest


def test_generation_config_is_carried(plain: Path) -> None:
    assert read_checkpoint(plain).generation_config is None
    (plain / "generation_config.json").write_text('{"do_sample": true}')
    assert read_checkpoint(plain).generation_config == {"do_sample": True}


def test_tokenizer_of_another_folder(plain: Path, tmp_path: Path) -> None:
    refused(plain, "no tokenizer in", NotFound, tokenizer=tmp_path / "absent")
    refused(plain, "no tokenizer in", NotFound, tokenizer=tmp_path)
    (tmp_path / "vocab.json").write_text("{}")
    found = read_checkpoint(plain, tokenizer=tmp_path)
    assert found.tokenizer is not None
    bare, complete = fingerprint(read_checkpoint(plain)), fingerprint(found)
    assert bare.digest != complete.digest
    assert found.family.tokenizer == found.tokenizer.digest


def test_checkpoint_travels_to_other_processes(sharded: Path) -> None:
    import pickle

    found = read_checkpoint(sharded)
    copy: Checkpoint = pickle.loads(pickle.dumps(found))  # noqa: S301
    assert copy == found
    assert canonical_config(copy.config) == {"model_type": "llama"}


def test_reading_imports_no_heavy_library(plain: Path) -> None:
    code = (
        "import sys; from pathlib import Path\n"
        "from poolreg.weights.checkpoint import read_checkpoint, fingerprint\n"
        f"fingerprint(read_checkpoint(Path({str(plain)!r})))\n"
        "assert not {'torch', 'transformers', 'tokenizers', 'safetensors'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
