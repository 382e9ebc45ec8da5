"""Where measuring runs: how the work is cut, and that it is the same everywhere."""

from __future__ import annotations

import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from poolreg.errors import ConfigError, Incompatible, MissingPackage
from poolreg.evaluation.engines import cut
from poolreg.evaluation.evaluate import Settings
from poolreg.evaluation.measure import Target

pytestmark = pytest.mark.usefixtures("one_thread")


@given(st.integers(0, 3000), st.integers(1, 64))
def test_runs_are_neighbours_and_ever_shorter(count, workers):
    targets = [Target(str(n), "", "", (), ()) for n in range(count)]
    runs = cut(targets, workers)
    assert [target for run in runs for target in run] == targets
    sizes = [len(run) for run in runs]
    assert sizes == sorted(sizes, reverse=True)
    assert max(sizes, default=0) <= 32
    # Whoever takes the longest run takes at most a fair share, and the last are single targets.
    assert all(size * workers <= count or size == 1 for size in sizes)
    assert sizes[-workers:] == [1] * min(len(sizes), workers)


def test_an_engine_that_is_none(pool):
    with pytest.raises(ConfigError, match=r"unknown engine 'slurm'\nchoose local or ray"):
        pool.evaluate(["alpha"], settings=Settings(engine="slurm"))


def test_ray_that_is_not_there(pool, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(MissingPackage, match=r"Ray is not installed\n.*poolreg\[ray\]"):
        pool.evaluate(["alpha"], settings=Settings(engine="ray"))


@pytest.mark.slow
def test_only_the_driver_writes(pool):
    """Workers send what they measured; an error of one keeps what the others had sent."""
    before = {path.name for path in (pool.root / "journal").iterdir()}
    pool.evaluate(["alpha", "beta", "gamma", "alpha+beta"], settings=Settings(workers=2))
    assert len({path.name for path in (pool.root / "journal").iterdir()} - before) <= 1
    assert list((pool.root / "tmp").iterdir()) == []
    wide = Settings(workers=2, max_length=17)
    with pytest.raises(Incompatible, match="longer than the model's context"):
        pool.evaluate(["alpha", "beta"], settings=wide)
    assert list((pool.root / "tmp").iterdir()) == []
