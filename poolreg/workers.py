"""Run calls in spawned processes or in threads, with their progress shown as one.

Processes are spawned, never forked: a forked child would inherit locks, threads and database
connections. With one worker the calls run here, so a library user needs no `__main__` guard.
"""

from __future__ import annotations

import multiprocessing
import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import (
    FIRST_COMPLETED,
    Future,
    ProcessPoolExecutor,
    wait,
)
from concurrent.futures.process import BrokenProcessPool
from queue import SimpleQueue
from typing import Any, TypeVar

from poolreg.errors import PoolregError
from poolreg.progress import Progress

T = TypeVar("T")

_channel: Any = None  # of this worker process, to its parent


def run_jobs(
    call: Callable[..., T], jobs: Sequence[tuple[Any, ...]], *, workers: int, progress: Progress
) -> Iterator[T]:
    """Yield `call(*job, progress=…)` of each job, in order.

    The first error stops what has not begun, waits for what has, and is raised. Raises
    `PoolregError` for a worker that was killed.
    """
    workers = min(workers, len(jobs))
    if workers <= 1:
        for job in jobs:
            yield call(*job, progress=progress)
        return
    context = multiprocessing.get_context("spawn")
    channel = context.SimpleQueue()  # what is put there has arrived before the call's result
    with ProcessPoolExecutor(
        workers, mp_context=context, initializer=_begin, initargs=(channel,)
    ) as pool:
        futures = [pool.submit(_in_worker, call, job) for job in jobs]
        _watch(futures, channel, progress)
        try:
            for future in futures:
                yield future.result()
        except BrokenProcessPool as error:
            raise PoolregError(
                "a worker process was killed; what had been finished before is kept",
                hint="if memory ran out, use fewer workers; then run the command again",
            ) from error


def _watch(futures: Sequence[Future[Any]], channel: Any, progress: Progress) -> None:
    waiting = set(futures)
    while waiting:
        finished, waiting = wait(waiting, timeout=0.1, return_when=FIRST_COMPLETED)
        while not channel.empty():
            kind, value = channel.get()
            if kind == "advance":
                progress.advance(value)
            else:
                progress.note(value)
        for future in finished:
            if not future.cancelled() and future.exception():
                for other in waiting:
                    other.cancel()


def _begin(channel: Any) -> None:
    global _channel
    _channel = channel
    # One thread each: several processes with many threads would fight for the cores.
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ[name] = "1"
    os.environ["TOKENIZERS_PARALLELISM"] = "false"


def _in_worker(call: Callable[..., T], job: tuple[Any, ...]) -> T:
    return call(*job, progress=_Sent())


class _Sent:
    """Sends progress to the parent process, which knows the total."""

    def start(self, what: str, total: int, unit: str) -> None:
        """Nothing: the parent has announced the whole."""

    def advance(self, amount: int) -> None:
        """Send an advance."""
        _channel.put(("advance", amount))

    def note(self, text: str) -> None:
        """Send a note."""
        _channel.put(("note", text))


class _Stopped(Exception):
    """The user interrupted: nobody waits for this call."""


_PATIENCE = 2.0  # seconds for threads to end what they are at


def at_once(
    do: Callable[[T, Callable[[int], None]], None], items: Iterable[T], *, threads: int,
    progress: Callable[[int], None],
) -> None:  # fmt: skip
    """Call `do(item, tell)` for each item from a few threads, and raise the first error.

    After an error nothing new begins; what has begun is done to its end. `tell` passes amounts on
    to `progress`, one at a time; it is where a call ends when the user interrupts, so long work
    calls it often.
    """
    waiting, stop, turn = deque(items), threading.Event(), threading.Lock()
    ended: SimpleQueue[BaseException | None] = SimpleQueue()

    def tell(amount: int) -> None:
        with turn:
            if stop.is_set():
                raise _Stopped
            progress(amount)

    def taken() -> Iterator[T]:
        while True:
            with turn:
                if not waiting:
                    return
                item = waiting.popleft()
            yield item

    def work() -> None:
        try:
            for item in taken():
                do(item, tell)
        except BaseException as error:  # noqa: BLE001  raised below, in the caller's thread
            waiting.clear()
            ended.put(error)
        else:
            ended.put(None)

    # Daemons: a silent network may hold them long after nobody waits for them.
    crew = [threading.Thread(target=work, daemon=True) for _ in range(min(threads, len(waiting)))]
    for thread in crew:
        thread.start()
    try:
        errors = [ended.get() for _ in crew]
    except BaseException:
        stop.set()
        waiting.clear()
        for thread in crew:
            thread.join(_PATIENCE / len(crew))
        raise
    for error in filter(None, errors):
        raise error
