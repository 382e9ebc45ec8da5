"""Hostile files of every kind, met on the way that a user meets them: refused by name, cheaply.

Each case of hostile.py goes through the command line in a child process that tells its peak
memory. Nothing of the pool changes, whatever the file is.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import hostile
import pytest
from fuzz import MODEL

from poolreg import Pool

MOST_MEMORY = 500  # MiB of the process, its libraries included
LONGEST = 3000  # characters of what is said
CONTROL = re.compile(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u202a-\u202e\ud800-\udfff]")

Run = Callable[..., dict[str, Any]]


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> Path:
    """A pool of a partition and an evalset, with an up-to-date catalog; never change it."""
    folder = tmp_path_factory.mktemp("small")
    (folder / "text.txt").write_text("the cat and the hat\n" * 50)
    with Pool.create(folder / "pool") as pool:
        pool.add_partition("prose", [folder / "text.txt"])
        pool.add_evalset("held", [folder / "text.txt"])
        assert pool.partitions()
    return folder / "pool"


@pytest.fixture(scope="module")
def run() -> Iterator[Run]:
    """Run command lines in a child process that does nothing else."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("POOLREG")}
    with subprocess.Popen(
        [sys.executable, hostile.__file__], text=True, env=environment,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    ) as child:  # fmt: skip

        def run(*words: Any) -> dict[str, Any]:
            assert child.stdin is not None
            assert child.stdout is not None
            child.stdin.write(json.dumps([str(word) for word in words]) + "\n")
            child.stdin.flush()
            answer: dict[str, Any] = json.loads(child.stdout.readline())
            return answer

        yield run
        child.communicate(timeout=20)
    assert child.returncode == 0


def state(root: Path) -> dict[str, bytes]:
    """Everything in a pool, to the byte."""
    return {
        str(path.relative_to(root)): path.read_bytes() if path.is_file() else b""
        for path in root.rglob("*")
    }


def check(answer: dict[str, Any], case: hostile.Case, *, first: str = "error: ") -> None:
    """It ended as documented, said what is wrong with what, and needed little memory."""
    said = answer["said"]
    assert case.words in said, said[:500]
    assert answer["code"] == case.code, said[:500]
    assert said.startswith(first)
    check_said(answer)


def check_said(answer: dict[str, Any]) -> None:
    """Whatever it was, it was no bug, was said in bounds, and needed little memory."""
    said = answer["said"]
    assert "a bug in poolreg" not in said, said[:500]
    assert len(said) <= LONGEST
    assert not CONTROL.search(said)
    assert answer["peak"] < MOST_MEMORY


def names(family: str) -> Any:
    return pytest.mark.parametrize("name", hostile.CASES[family])


def folder_of(folder: Path) -> Path:
    """A model folder with nothing wrong in it."""
    for name, data in {**MODEL, "tokenizer.json": b'{"model":{"type":"BPE"}}'}.items():
        (folder / name).write_bytes(data)
    return folder


def check_model(run: Run, small: Path, folder: Path, case: hostile.Case, file: str) -> None:
    """Add a model folder in which one file is hostile."""
    (folder_of(folder) / file).unlink(missing_ok=True)
    case.make(folder / file)
    before = state(small)
    check(run("--pool", small, "model", "add", folder, "--other", "--name", "x"), case)
    assert state(small) == before
    shutil.rmtree(folder)


def test_there_are_many_and_the_rest_of_the_folder_is_good(small, run, tmp_path):
    assert sum(map(len, hostile.CASES.values())) >= 60
    pool, folder = shutil.copytree(small, tmp_path / "pool"), tmp_path / "model"
    folder.mkdir()
    words = ["--pool", pool, "model", "add", folder_of(folder), "--other", "--name", "x"]
    assert run(*words)["code"] == 0


@names("weights")
def test_weights(small, run, tmp_path, name):
    check_model(run, small, tmp_path, hostile.CASES["weights"][name], "model.safetensors")


@names("indexes")
def test_indexes(small, run, tmp_path, name):
    check_model(
        run, small, tmp_path, hostile.CASES["indexes"][name], "model.safetensors.index.json"
    )


@names("configs")
def test_configs(small, run, tmp_path, name):
    check_model(run, small, tmp_path, hostile.CASES["configs"][name], "config.json")


@names("tokenizers")
def test_tokenizers(small, run, tmp_path, name):
    check_model(run, small, tmp_path, hostile.CASES["tokenizers"][name], "tokenizer.json")


@pytest.mark.parametrize("name", list(hostile.SEGMENTS))
def test_segments(small, run, tmp_path, name):
    case = hostile.SEGMENTS[name]
    root = Path(shutil.copytree(small, tmp_path / "pool"))
    case.make(root / "journal" / "hostile.jsonl")
    before = state(root)
    check(run("--pool", root, "verify"), case, first="what ")  # a table of findings
    assert state(root) == before
    # Another command may take what stands alone and means nothing, or refuses it.
    listed = run("--pool", root, "ls")
    assert listed["code"] in (0, 1, 3)
    check_said(listed)
    del before["catalog.duckdb"]
    assert {path: data for path, data in state(root).items() if path in before} == before
    shutil.rmtree(root)


@names("formats")
def test_formats(small, run, tmp_path, name):
    case = hostile.FORMATS[name]
    root = Path(shutil.copytree(small, tmp_path / "pool"))
    (root / "FORMAT").unlink()
    before = state(root)
    case.make(root / "FORMAT")
    check(run("--pool", root, "ls"), case)
    (root / "FORMAT").rename(tmp_path / "FORMAT")
    assert state(root) == before


@names("recipes")
def test_recipes(small, run, tmp_path, name):
    case = hostile.RECIPES[name]
    case.make(tmp_path / "recipe.toml")
    before = state(small)
    check(run("--pool", small, "train", "seed", "--recipe", tmp_path / "recipe.toml"), case)
    assert state(small) == before
