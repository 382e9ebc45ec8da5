"""Run calls in spawned processes or in threads, with their progress shown as one.

Processes are spawned, never forked: a forked child would inherit locks, threads and database
connections. With one worker the calls run here, so a library user needs no `__main__` guard.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import pickle
import signal
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from multiprocessing.connection import Connection, wait
from queue import SimpleQueue
from typing import Any, TypeVar

from poolreg.errors import PoolregError
from poolreg.progress import Progress

T = TypeVar("T")

Do = Callable[..., Iterable[T]]  # do(run, progress=…) yields one result for each job of a run


def run_jobs(
    call: Callable[..., T], jobs: Sequence[tuple[Any, ...]], *, workers: int, progress: Progress
) -> Iterator[T]:
    """Yield `call(*job, progress=…)` of each job, in order; errors are those of `stream`."""
    runs = [[numbered] for numbered in enumerate(jobs)]
    arrived: dict[int, T] = {}
    following = 0
    for number, result in stream(_Calls, (call,), runs, workers=workers, progress=progress):
        arrived[number] = result
        while following in arrived:
            yield arrived.pop(following)
            following += 1


class _Calls:
    """Does numbered jobs by calling a function."""

    def __init__(self, call: Callable[..., Any]) -> None:
        self._call = call

    def __call__(
        self, run: Iterable[tuple[int, tuple[Any, ...]]], *, progress: Progress
    ) -> Iterator[tuple[int, Any]]:
        for number, job in run:
            yield number, self._call(*job, progress=progress)


def stream(
    start: Callable[..., Do[T]], given: tuple[Any, ...], runs: Sequence[Sequence[Any]], *,
    workers: int, progress: Progress,
) -> Generator[T]:  # fmt: skip
    """Yield the results of all jobs as they come.

    Each worker calls `start(*given)` once and then what that returned with one run of jobs after
    the other, and `progress`. After an error nothing new is handed out, what has begun is done to
    its end, and the error is raised. Raises `PoolregError` for a worker that was killed.
    """
    workers = min(workers, len(runs))
    if workers <= 1:
        do = start(*given)
        for run in runs:
            yield from do(run, progress=progress)
        return
    waiting, error = deque(runs), None
    with _crew(workers, (start, given)) as idle:
        busy: list[Any] = []
        while busy or (waiting and not error):
            while waiting and idle and not error:
                busy.append(idle.pop())
                _send(busy[-1], waiting.popleft())
            for worker in wait(busy):
                kind, value = _received(worker)
                if kind == "result":
                    yield value
                elif kind == "advance":
                    progress.advance(value)
                elif kind == "note":
                    progress.note(value)
                else:
                    busy.remove(worker)
                    error = error or value
                    if kind == "done":
                        idle.append(worker)
    if error:
        raise error


def _send(worker: Any, run: Sequence[Any]) -> None:
    with contextlib.suppress(OSError):  # it was killed: the next reading says so
        worker.send(run)


def _received(worker: Any) -> tuple[str, Any]:
    try:
        kind, value = worker.recv()
    except (EOFError, OSError):
        return "lost", PoolregError(
            "a worker process was killed; what had been finished before is kept",
            hint="if memory ran out, use fewer workers; then run the command again",
        )
    return kind, value


@contextlib.contextmanager
def _crew(count: int, begin: tuple[Any, ...]) -> Iterator[list[Any]]:
    """Yield the connections to so many new processes, which are gone after the block."""
    context = multiprocessing.get_context("spawn")
    crew = []
    try:
        for _ in range(count):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(theirs,), daemon=True)
            with _deaf():
                process.start()
            theirs.close()
            crew.append((process, ours))
        for _, ours in crew:
            _send(ours, begin)
        yield [ours for _, ours in crew]
    finally:
        for process, ours in crew:
            ours.close()
            process.terminate()
        until = time.monotonic() + _PATIENCE
        for process, _ in crew:
            process.join(max(0.0, until - time.monotonic()))
        for process, _ in crew:
            process.kill()
            process.join(_PATIENCE)


@contextlib.contextmanager
def _deaf() -> Iterator[None]:
    """Have processes that are started in the block not hear Ctrl-C: this one decides about it."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _serve(parent: Connection) -> None:
    """Do what the parent process sends until it ends."""
    # One thread each: several processes with many threads would fight for the cores.
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ[name] = "1"
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    do: Do[Any] | None = None
    with contextlib.suppress(EOFError, BrokenPipeError, ConnectionResetError):
        start, given = parent.recv()
        # Only now: an import that an exception cuts off complains, and nothing is to be tidied yet.
        signal.signal(signal.SIGTERM, lambda *_: sys.exit())
        while True:
            run = parent.recv()
            try:
                do = do or start(*given)
                for result in do(run, progress=_Sent(parent)):
                    parent.send(("result", result))
                parent.send(("done", None))
            except (SystemExit, BrokenPipeError, ConnectionResetError):
                return
            except BaseException as error:  # noqa: BLE001  raised in the parent
                parent.send(("done", _portable(error)))


def _portable(error: BaseException) -> BaseException:
    """Return an error that can be sent to another process, which does not see where it was."""
    if not isinstance(error, PoolregError):
        error.add_note(f"In a worker process:\n{traceback.format_exc()}")
    try:
        pickle.loads(pickle.dumps(error))  # noqa: S301  our own
    except Exception:  # noqa: BLE001  whatever its class does
        return PoolregError(f"{type(error).__name__}: {error}")
    return error


class _Sent:
    """Sends progress to the parent process, which knows the total."""

    def __init__(self, parent: Connection) -> None:
        self._parent = parent

    def start(self, what: str, total: int, unit: str) -> None:
        """Nothing: the parent has announced the whole."""

    def advance(self, amount: int) -> None:
        """Send an advance."""
        self._parent.send(("advance", amount))

    def note(self, text: str) -> None:
        """Send a note."""
        self._parent.send(("note", text))


class _Stopped(Exception):
    """The user interrupted: nobody waits for this call."""


_PATIENCE = 2.0  # seconds for all workers together to end what they are at


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
