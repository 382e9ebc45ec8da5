"""Fixtures that several test files share: tiny pools, and torch on one thread."""

from __future__ import annotations

import fcntl
import os
import pickle
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import click
import pools
import pytest
from click.testing import CliRunner, Result
from hub import Hub, Repo

from poolreg import Pool

# Tiny models are far slower on several threads, all the more beside other test processes.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# What one test hashed must not spare another the work.
os.environ["POOLREG_CACHE"] = ""


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Run torch on one thread, so that bits can be compared."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def once(tmp_path_factory, make: Callable[[Path], pools.Tiny]) -> pools.Tiny:
    """Make a pool for all test processes of this run: whoever comes first makes it."""
    base = tmp_path_factory.getbasetemp()
    base = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    folder, made = base / make.__name__, base / f"{make.__name__}.made"
    with open(base / f"{make.__name__}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not made.exists():
            made.write_bytes(pickle.dumps(make(folder)))
        return pickle.loads(made.read_bytes())  # noqa: S301


@pytest.fixture(scope="session")
def tiny(tmp_path_factory) -> pools.Tiny:
    """A pool with the partitions alpha (1 unit), beta (2) and gamma (3); never change it."""
    return once(tmp_path_factory, pools.tiny_pool)


@pytest.fixture
def pool(tiny, tmp_path) -> Iterator[Pool]:
    """A copy of the tiny pool, to be changed at will."""
    with Pool.open(tiny.copy(tmp_path / "pool")) as opened:
        yield opened


@pytest.fixture(scope="session")
def referenced(tmp_path_factory) -> pools.Tiny:
    """A pool of four partitions with 11 references, all measured; never change it."""
    return once(tmp_path_factory, pools.referenced_pool)


@pytest.fixture
def hub(tmp_path, monkeypatch) -> Iterator[Hub]:
    """An empty Hub on the loopback interface that the client of this process talks to."""
    with Hub(tmp_path / "hub") as server:
        server.adopt(monkeypatch)
        # Drawing takes as long as all the rest of a push; test_cards.py looks at the picture.
        monkeypatch.setattr("poolreg.sharing.cards._drawn", lambda _: None)
        yield server


@dataclass(frozen=True)
class Published:
    """The tiny pool with a few answers, before it was pushed, after, and what the Hub has."""

    asked: Path
    pushed: Path
    repo: Repo


@pytest.fixture(scope="session")
def published(tiny, tmp_path_factory) -> Published:
    """A pool that was pushed to me/pool once; copy before you change anything."""
    folder = tmp_path_factory.mktemp("published")
    with Hub(folder / "hub") as server, pytest.MonkeyPatch.context() as patch:
        server.adopt(patch)
        with Pool.open(tiny.copy(folder / "asked")) as opened:
            opened.ask(["alpha+beta", "all"])
        shutil.copytree(folder / "asked", folder / "pushed")
        with Pool.open(folder / "pushed") as opened:
            opened.push("me/pool")
        return Published(folder / "asked", folder / "pushed", server.repo("me/pool"))


# -- the command line, loaded as the installed script loads it ----------------------------------

CliRun = Callable[..., Result]


@pytest.fixture(scope="session")
def cli_app() -> click.Group:
    """The command `poolreg`."""
    (entry,) = entry_points(group="console_scripts", name="poolreg")
    loaded: click.Group = entry.load()
    return loaded


@pytest.fixture(scope="session")
def cli_run(cli_app) -> CliRun:
    """Run a command line in this process and check its exit code (None: any)."""

    def run(*words: Any, code: int | None = 0, **options: Any) -> Result:
        environment = {"POOLREG_DEBUG": "1", "POOLREG_POOL": None} | options.pop("env", {})
        result = CliRunner(env=environment).invoke(
            cli_app, [str(word) for word in words], prog_name="poolreg", **options
        )
        assert code in (None, result.exit_code), (result.output, result.exception)
        return result

    return run


@pytest.fixture(scope="session")
def cli_pool(tiny, tmp_path_factory, cli_run) -> Path:
    """A copy of the tiny pool with a reference and some answers in it; never change it."""
    root = tiny.copy(tmp_path_factory.mktemp("cli") / "pool")
    cli_run(
        "model", "add", tiny.units["beta", 2], "--reference", "alpha+beta", "--from", "base",
        "--budget", "same", "--pool", root,
    )  # fmt: skip
    cli_run("ask", "alpha+beta", "--pool", root, "--threads", 1)
    return root
