"""Sweeps on a Ray cluster of two nodes on this machine, one of which is lost."""

from __future__ import annotations

import dataclasses
import json
import logging
import time
from collections import Counter, deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pools
import pytest

from poolreg import Pool
from poolreg.errors import ConfigError, PoolregError, Refused
from poolreg.evaluation import engines
from poolreg.evaluation.evaluate import Settings
from poolreg.evaluation.materials import Materials
from poolreg.evaluation.measure import Target
from poolreg.sharing.published_objects import ObjectsAt

ray = pytest.importorskip("ray", reason="Ray is not installed: pip install 'poolreg[ray]'")

from ray.cluster_utils import Cluster  # noqa: E402

from poolreg.evaluation import on_ray  # noqa: E402

pytestmark = [
    pytest.mark.slow,
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore"),  # Ray leaves files open
]

NAMES = ["alpha", "beta", "gamma", "delta", "epsilon", "zeta"]
SETTINGS = Settings(engine="ray", threads=1, device="cpu")
ON = ["alpha", "delta"]


@pytest.fixture(scope="module")
def six(tmp_path_factory) -> pools.Tiny:
    """A pool of six partitions; never change it."""
    return pools.tiny_pool(tmp_path_factory.mktemp("six"), dict.fromkeys(NAMES, 1))


@pytest.fixture(scope="module")
def here(six, tmp_path_factory) -> list[tuple[object, ...]]:
    """The table of the sweep, measured in this process."""
    with Pool.open(six.copy(tmp_path_factory.mktemp("here") / "pool")) as pool:
        return pool.sweep(pool.plan_sweep(on=ON, settings=Settings(threads=1))).rows


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """A head and another node with one core each, which this process is connected to."""
    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    made.add_node(num_cpus=1)
    ray.init(address=made.address, log_to_driver=False, logging_level=logging.ERROR)
    yield made
    ray.shutdown()
    made.shutdown()


@pytest.fixture
def pool(six, tmp_path) -> Iterator[Pool]:
    with Pool.open(six.copy(tmp_path / "pool")) as opened:
        yield opened


class Progress:
    """Calls something when so many results have come."""

    def __init__(self, count: int = 0, call: Any = None) -> None:
        self.total = self.done = 0
        self.left, self.call = count, call
        self.notes: list[str] = []

    def start(self, what: str, total: int, unit: str) -> None:  # noqa: ARG002
        self.total += total

    def advance(self, amount: int) -> None:
        self.done += amount
        self.left -= 1
        if self.left == 0:
            self.call()

    def note(self, text: str) -> None:
        self.notes.append(text)


def recorded(root: Path) -> Counter[str]:
    """How often each evaluation stands in the journal."""
    lines = [line for p in (root / "journal").iterdir() for line in p.read_bytes().splitlines()]
    records = [json.loads(line.split(b" ", 1)[1]) for line in lines]
    return Counter(record["id"] for record in records if record["kind"] == "evaluation")


def test_a_cluster_measures_the_same(cluster, pool, here):
    progress = Progress()
    planned = pool.plan_sweep(on=ON, settings=SETTINGS)
    assert pool.sweep(planned, progress=progress).rows == here
    assert progress.done == progress.total == planned.work.bytes
    assert len(list((pool.root / "journal").iterdir())) <= 2  # the driver alone wrote
    assert set(recorded(pool.root).values()) == {1}
    assert pool.plan_sweep(on=ON, settings=SETTINGS).work.evaluations == 0


def test_objects_by_digest_where_the_folder_is_not_seen(cluster, pool, here, tmp_path, monkeypatch):
    """As on machines that share no folder: each fetches what it needs from where it was pushed."""
    real = engines._given

    def elsewhere(*args: Any) -> tuple[Materials, Any]:
        materials, families = real(*args)
        return dataclasses.replace(materials, root=Path("/not/seen/there")), families

    monkeypatch.setattr(engines, "_given", elsewhere)
    with pytest.raises(Refused, match=r"/not/seen/there is not seen on .*\n.*--objects URL"):
        pool.sweep(pool.plan_sweep(on=ON, settings=SETTINGS))
    assert not recorded(pool.root)

    pool.push(f"file://{tmp_path}/place")
    published = dataclasses.replace(SETTINGS, published=ObjectsAt(f"file://{tmp_path}/place"))
    rows = pool.sweep(pool.plan_sweep(on=ON, settings=published)).rows
    assert rows == here


def test_an_error_that_is_not_ours_says_where_it_was(cluster, pool, monkeypatch):
    class Broken(on_ray._Worker):
        def ready(self) -> None:
            self._given = 1 / 0

    monkeypatch.setattr(on_ray, "_Worker", Broken)
    with pytest.raises(ZeroDivisionError, match="in ready"):
        pool.evaluate(["alpha"], ON, settings=SETTINGS)


def test_an_error_arrives_whole_and_the_rest_is_kept(cluster, pool, six, tmp_path):
    folder = pools.unit_folder(tmp_path / "u", six.seed, 50)
    pools.set_tensors(folder, lm_head__weight=("F32", np.full((272, 16), 3e38, np.float32)))
    pool.add_model(folder, name="wild")
    with pytest.raises(Refused, match="not finite") as caught:
        pool.evaluate(["alpha", "beta", "gamma", "delta", "wild"], ON, settings=SETTINGS)
    assert caught.value.hint
    assert set(recorded(pool.root).values()) <= {1}
    with pytest.raises(ConfigError, match="no room for a worker: it has 2 CPUs and 0 GPUs"):
        pool.evaluate(["zeta"], settings=dataclasses.replace(SETTINGS, device="cuda"))


@pytest.fixture
def slow(monkeypatch) -> None:
    """Workers so slow that a sweep is not over before a node is gone."""

    class Slow(on_ray._Worker):  # not a class of this module, which the nodes cannot import
        def measure(self, targets: Any) -> Any:
            for rows in super().measure(targets):
                time.sleep(0.3)
                yield rows

    monkeypatch.setattr(on_ray, "_Worker", Slow)


def test_a_node_is_lost_in_the_middle(cluster, pool, here, slow, monkeypatch):
    """What it had not sent is measured elsewhere, once; a new worker comes where there is room."""
    lost: list[list[str]] = []
    real = on_ray._Course._lose

    def lose(self: Any, thing: Any) -> None:
        before = [*self.waiting]
        real(self, thing)
        lost.append([t.label for run in self.waiting if run not in before for t in run])

    hand_out = on_ray._Course._hand_out
    begun: list[int] = []

    def together(self: Any) -> None:
        if begun or not self.starting:
            hand_out(self)
            begun.append(len(self.busy))

    monkeypatch.setattr(on_ray._Course, "_lose", lose)
    monkeypatch.setattr(on_ray._Course, "_hand_out", together)
    other = cluster.add_node(num_cpus=1)
    cluster.wait_for_nodes()

    def kill() -> None:
        cluster.remove_node(other, allow_graceful=False)

    planned = pool.plan_sweep(on=ON, settings=dataclasses.replace(SETTINGS, workers=3))
    rows = pool.sweep(planned, progress=Progress(4, kill)).rows
    assert begun[0] == 3
    assert rows == here
    assert len(lost) == 1
    assert lost[0]
    evaluations = recorded(pool.root)
    assert len(evaluations) == len(here)
    assert set(evaluations.values()) == {1}


def test_no_machine_is_left(cluster, pool, slow, monkeypatch):
    """A cluster that lost all machines that a worker fits on is not waited for without end."""
    monkeypatch.setattr(on_ray, "_LOOK", 0.5)
    monkeypatch.setattr(on_ray, "_PATIENCE", 2.0)
    large = cluster.add_node(num_cpus=2)
    cluster.wait_for_nodes()

    def kill() -> None:
        cluster.remove_node(large, allow_graceful=False)

    planned = pool.plan_sweep(on=ON, settings=dataclasses.replace(SETTINGS, threads=2, workers=1))
    progress = Progress(4, kill)
    # Two machines with a core each are no room for a worker that takes two.
    with pytest.raises(ConfigError, match="no room for a worker: it has 2 CPUs and 0 GPUs"):
        pool.sweep(planned, progress=progress)
    assert "waiting for room on the cluster" in progress.notes
    assert len(recorded(pool.root)) >= 4 * len(ON)
    assert set(recorded(pool.root).values()) == {1}


def test_workers_that_never_get_ready(cluster, pool, monkeypatch):
    """They are not started again without end."""

    class Stillborn(on_ray._Worker):
        def ready(self) -> None:
            import os

            os._exit(1)

    monkeypatch.setattr(on_ray, "_Worker", Stillborn)
    monkeypatch.setattr(on_ray, "_LOST", 1)
    monkeypatch.setattr(on_ray, "_TRIES", 2)
    two = dataclasses.replace(SETTINGS, workers=2)
    with pytest.raises(PoolregError, match=r"4 workers in a row were lost before any had a result"):
        pool.evaluate(["alpha", "beta", "gamma"], ON, settings=two)
    assert not recorded(pool.root)


def test_a_target_that_kills_its_workers_is_given_up(cluster, pool, monkeypatch):
    """Not tried for ever, and what others measured is kept."""

    class Deadly(on_ray._Worker):
        def measure(self, targets: Any) -> Any:
            import os

            labels = ["", *(target.label for target in targets)]
            for label, rows in zip(labels, super().measure(targets), strict=True):
                if label == "beta":
                    os._exit(1)
                yield rows

    monkeypatch.setattr(on_ray, "_Worker", Deadly)
    with pytest.raises(PoolregError, match=r"3 workers were lost while they measured beta"):
        pool.evaluate(["alpha", "beta", "gamma"], ON, settings=SETTINGS)
    assert set(recorded(pool.root).values()) <= {1}


def test_workers_that_died_idle_are_no_targets_fault():
    """A machine that is lost with many workers near the end: only one was at anything."""

    class Ray:
        """Enough of Ray for workers that live or are dead already."""

        class exceptions:
            class RayTaskError(Exception):
                cause = None

            class RayError(Exception):
                pass

        def wait(self, things: list[Any], timeout: float) -> tuple[list[Any], list[Any]]:  # noqa: ARG002
            return things[:1], things[1:]

        def get(self, thing: Any) -> Any:
            if thing is None:
                raise self.exceptions.RayError
            return thing

        def kill(self, worker: Any) -> None:
            killed.append(worker)

    class Worker:
        def __init__(self, *, dead: bool = False) -> None:
            self.dead, self.ready, self.measure = dead, self, self

        def options(self, **_: Any) -> Worker:
            return self

        def remote(self, run: Any = ()) -> Any:
            return iter([None] if self.dead else [(), *((target.subject,) for target in run)])

    killed: list[Any] = []
    run = [Target(str(n), "", "", (), ()) for n in range(5)]
    progress = Progress()
    course = on_ray._Course(
        Ray(), hire=Worker, room=lambda: None, waiting=deque([run]), workers=8, progress=progress
    )
    course.idle = [Worker(dead=True) for _ in range(7)]
    course._hand_out()
    assert [subject for (subject,) in course.results()] == ["0", "1", "2", "3", "4"]
    assert len(killed) == 7


def test_a_cluster_that_does_not_answer(pool, monkeypatch):
    def init(**_: Any) -> None:
        raise ConnectionError("Could not find any running Ray instance.\nPlease specify one")

    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", init)
    with pytest.raises(ConfigError, match=r"cannot be joined: Could not find.*\n.*RAY_ADDRESS"):
        pool.evaluate(["alpha"], settings=SETTINGS)
