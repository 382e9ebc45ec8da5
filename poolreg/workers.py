"""Run calls in spawned processes or in threads, with their progress shown as one.

Processes are spawned, never forked: a forked child would inherit locks, threads and database
connections. With one worker the calls run here, so a library user needs no `__main__` guard.
"""

from __future__ import annotations

import multiprocessing
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import (
    FIRST_COMPLETED,
    Future,
    ProcessPoolExecutor,
    ThreadPoolExecutor,
    as_completed,
    wait,
)
from concurrent.futures.process import BrokenProcessPool
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
    """Another call failed, or the user interrupted: nobody waits for this one."""


def at_once(
    do: Callable[[T, Callable[[int], None]], None], items: Iterable[T], *, threads: int,
    progress: Callable[[int], None],
) -> None:  # fmt: skip
    """Call `do(item, tell)` for each item from a few threads; the first error ends all of them.

    `tell` passes amounts on to `progress`, one at a time. It is where a call ends that is no
    longer wanted, so long work calls it often.
    """
    stop, turn = threading.Event(), threading.Lock()

    def tell(amount: int) -> None:
        with turn:
            if stop.is_set():
                raise _Stopped
            progress(amount)

    with ThreadPoolExecutor(threads) as pool:
        futures = [pool.submit(do, item, tell) for item in items]
        try:
            for future in as_completed(futures):
                future.result()
        except BaseException:
            stop.set()
            pool.shutdown(wait=False, cancel_futures=True)
            raise
