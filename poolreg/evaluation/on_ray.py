"""Measuring on the machines of a Ray cluster.

Each worker is an actor with a `Bench` of its own: the live model (and, on a GPU, the models that it
averages) stay where they are from run to run, which tasks could not promise. Runs of targets are
handed to workers that are there, and each result comes back as soon as it is measured. When a
worker is lost with its machine, what it had not sent is handed to another, and a new one takes its
place as soon as there is room. Only the driver writes, so every result is there once.
"""

from __future__ import annotations

import contextlib
import logging
import os
import time
from collections import Counter, deque
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from poolreg.errors import ConfigError, MissingPackage, PoolregError
from poolreg.evaluation.engines import cut
from poolreg.evaluation.evaluate import Settings
from poolreg.evaluation.materials import Materials
from poolreg.evaluation.measure import Bench, Family, Measured, Target
from poolreg.progress import Progress

_TRIES = 3  # times that a target may go down with its worker, or that all workers may be lost
_LOST = 10  # workers in a row that may be lost however few there are: some start on dying machines
_LOOK = 20.0  # seconds after which a silent cluster is looked at
_PATIENCE = 600.0  # seconds that a cluster without room for a worker has to get a machine

Given = tuple[Materials, dict[str, Family], Settings]


def measured(
    given: Given, targets: Sequence[Target], progress: Progress
) -> Generator[tuple[Measured, ...]]:
    """Yield what the targets score, in the order in which they are done.

    Uses the cluster that RAY_ADDRESS names or this machine belongs to, else starts one here.
    Raises `MissingPackage` without Ray, `ConfigError` where no worker fits, now or after machines
    were lost, `PoolregError` when workers are lost again and again, and what measuring raises.
    """
    materials, families, settings = given
    with _connected() as ray:
        needs, room = _needs(ray, settings)
        workers = min(settings.workers or room, len(targets))
        alone = replace(settings, threads=settings.threads or 1)
        shared = ray.put((materials, families, alone))
        actor = ray.remote(**needs)(_Worker)
        course = _Course(
            ray, hire=lambda: actor.remote(shared), room=lambda: _needs(ray, settings),
            waiting=deque(cut(targets, workers)), workers=workers, progress=progress,
        )  # fmt: skip
        try:
            for rows in course.results():
                progress.advance(sum(row.utf8_bytes for row in rows))
                yield rows
        finally:
            course.dismiss()


@contextlib.contextmanager
def _connected() -> Iterator[Any]:
    # A local cluster that Ray starts here would tell its makers so.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        import ray
    except ImportError as error:
        raise MissingPackage("Ray is not installed", hint="pip install 'poolreg[ray]'") from error
    if ray.is_initialized():
        yield ray
        return
    try:
        ray.init(log_to_driver=False, logging_level=logging.ERROR)
    except (ConnectionError, RuntimeError) as error:  # nobody answers; another version of Ray
        raise ConfigError(
            f"the Ray cluster cannot be joined: {str(error).strip().partition(chr(10))[0]}",
            hint="check RAY_ADDRESS, or start a cluster with: ray start --head",
        ) from error
    try:
        yield ray
    finally:
        ray.shutdown()


def _needs(ray: Any, settings: Settings) -> tuple[dict[str, float], int]:
    """Return what a worker takes of its machine, and how many workers the cluster has room for."""
    machines = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    cpus, gpus = (sum(there.get(kind, 0) for there in machines) for kind in ("CPU", "GPU"))
    needs = {"CPU": float(settings.threads or 1)}
    wanted = settings.device.partition(":")[0]
    if wanted == "cuda" or (wanted == "auto" and gpus):
        needs["GPU"] = 1.0
    # A worker is on one machine, so what several have left over is no room.
    room = sum(
        min(int(there.get(kind, 0) // count) for kind, count in needs.items()) for there in machines
    )
    if room < 1:
        raise ConfigError(
            f"the Ray cluster has no room for a worker: it has {cpus:g} CPUs and {gpus:g} GPUs",
            hint="start more machines, or larger ones, or choose other --threads or --device",
        )
    return {f"num_{kind.lower()}s": count for kind, count in needs.items()}, room


class _Worker:
    """An actor: one process, on some machine, with a bench."""

    def __init__(self, given: Given) -> None:
        self._given = given

    def ready(self) -> None:
        """Set up the bench; raises `Refused` where the pool's objects cannot be read."""
        self._bench = Bench(*self._given)

    def measure(self, targets: Sequence[Target]) -> Iterator[tuple[Measured, ...]]:
        """Yield nothing, to say that this has begun, and then what the targets score."""
        yield ()
        yield from self._bench(targets)


@dataclass(eq=False)
class _Busy:
    """A worker, the generator of what it sends, and what it has not sent yet of its run."""

    worker: Any
    stream: Any
    rest: Sequence[Target]
    begun: bool = False


@dataclass(eq=False)
class _Course:
    """Hands runs to workers as they get ready, and again those that were lost."""

    ray: Any
    hire: Callable[[], Any]
    room: Callable[[], object]  # raises `ConfigError` where no worker fits
    waiting: deque[Sequence[Target]]
    workers: int
    progress: Progress
    starting: dict[Any, Any] = field(default_factory=dict)  # what says that it is there → worker
    idle: list[Any] = field(default_factory=list)
    busy: dict[Any, _Busy] = field(default_factory=dict)  # by its stream
    lost: Counter[str] = field(default_factory=Counter)  # workers, by the subject they were at
    in_vain: int = 0  # workers lost since the last result
    error: BaseException | None = None

    def results(self) -> Iterator[tuple[Measured, ...]]:
        """Yield all results; after an error nothing new begins, and it is raised at the end."""
        for _ in range(self.workers):
            self._start()
        heard = time.monotonic()
        while self.busy or (self.waiting and not self.error):
            there, _ = self.ray.wait([*self.busy, *self.starting], timeout=_LOOK)
            if there:
                heard = time.monotonic()
            elif not self.busy:
                self._look(time.monotonic() - heard)
            for thing in there:
                if rows := self._take(thing):
                    yield rows
            self._hand_out()
        if self.error:
            raise self.error

    def dismiss(self) -> None:
        """End all workers."""
        at_work = [one.worker for one in self.busy.values()]
        for worker in (*self.starting.values(), *self.idle, *at_work):
            self.ray.kill(worker)

    def _look(self, silent: float) -> None:
        """See whether it is worth to go on waiting for machines, which others may be using."""
        self.progress.note("waiting for room on the cluster")
        if silent >= _PATIENCE:
            self.room()

    def _start(self) -> None:
        worker = self.hire()
        self.starting[worker.ready.remote()] = worker

    def _hand_out(self) -> None:
        while self.idle and self.waiting and not self.error:
            worker, run = self.idle.pop(), self.waiting.popleft()
            stream = worker.measure.options(num_returns="streaming").remote(run)
            self.busy[stream] = _Busy(worker, stream, run)

    def _take(self, thing: Any) -> tuple[Measured, ...]:
        """Take in what a worker says: that it is there, its next results, or that it is done."""
        errors = self.ray.exceptions
        try:
            if thing not in self.starting:
                return self._next(self.busy[thing])
            self.ray.get(thing)
            self.idle.append(self.starting.pop(thing))
        except errors.RayTaskError as error:
            # One of ours says it all; of any other it matters where it was.
            known = isinstance(error.cause, PoolregError)
            self.error = self.error or (error.cause if known else error)
            self._part_with(thing)
        except errors.RayError:
            self._lose(thing)
        return ()

    def _next(self, one: _Busy) -> tuple[Measured, ...]:
        try:
            rows: tuple[Measured, ...] = self.ray.get(next(one.stream))
        except StopIteration:
            del self.busy[one.stream]
            self.idle.append(one.worker)
            return ()
        if one.begun:
            one.rest = one.rest[1:]
            self.in_vain = 0
        one.begun = True
        return rows

    def _lose(self, thing: Any) -> None:
        """Let others do what a lost worker did not do, and have a new one take its place."""
        one = self._part_with(thing)
        self.in_vain += 1
        if one and one.rest:
            self.waiting.appendleft(one.rest)
            # One that had not begun was lost before, with its machine, and its target is blameless.
            self.lost[one.rest[0].subject] += one.begun
            if self.lost[one.rest[0].subject] == _TRIES:
                self.error = self.error or _worn_out(one.rest[0])
        if self.in_vain >= max(_LOST, _TRIES * self.workers):
            self.error = self.error or _nobody_stays(self.in_vain)
        if not self.error:
            self._start()

    def _part_with(self, thing: Any) -> _Busy | None:
        """End a worker, which may only be out of reach, and return what it was at."""
        one = self.busy.pop(thing, None)
        self.ray.kill(one.worker if one else self.starting.pop(thing))
        return one


def _worn_out(target: Target) -> PoolregError:
    return PoolregError(
        f"{_TRIES} workers were lost while they measured {target.label}; what had been finished "
        "before is kept",
        hint="if memory ran out there, give each worker a larger machine, or more --threads so "
        "that fewer share one; then run the command again",
    )


def _nobody_stays(count: int) -> PoolregError:
    return PoolregError(
        f"{count} workers in a row were lost before any had a result; what had been finished "
        "before is kept",
        hint="look into Ray's logs, below /tmp/ray on the machines: memory may have run out "
        "there, or another poolreg or torch is installed",
    )
