"""Processes that work through jobs one after another, each with one torch thread; jobs and answers travel by pipe.

A job that raises, or a worker that dies, costs that one job only.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import traceback
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

import torch

__all__ = ["Failure", "Message", "Worker", "crew", "stop_on_sigint", "torch_threads"]

Stream = Callable[[Any], Iterable[Any]]  # from a job to its messages; has to be picklable, so of a module's top level


@dataclass(frozen=True)
class Failure:
    """The last message of a job that ended with an exception, or with the death of its process."""

    reason: str


def _work(connection: Connection, stream: Stream, log: Path) -> None:
    """Do what the parent sends until it sends None or is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal signals the whole group; the parent decides
    with log.open("a") as file:
        os.dup2(file.fileno(), 2)  # warnings would tear the live display apart
    torch.set_num_threads(1)
    # Either end of the pipe may go first: then nobody is left to tell.
    with contextlib.suppress(EOFError, BrokenPipeError, ConnectionResetError):
        while (job := connection.recv()) is not None:
            try:
                for message in stream(job):
                    connection.send(message)
            except Exception as error:
                traceback.print_exc()
                connection.send(Failure(f"{type(error).__name__}: {error}"))


@contextlib.contextmanager
def torch_threads(count: int) -> Iterator[None]:
    """Let this process compute with so many threads inside the ``with`` block."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class Worker:
    """A process, its pipe and the job it is at; what it writes to stderr goes to ``log``."""

    def __init__(self, stream: Stream, log: Path) -> None:
        self.job: Any = None
        self.connection, theirs = multiprocessing.get_context("spawn").Pipe()
        arguments = (theirs, stream, log)
        self.process = multiprocessing.get_context("spawn").Process(target=_work, args=arguments, daemon=True)
        # Inherited by the child, which has to survive a Ctrl-C while it still imports torch.
        before = signal.signal(signal.SIGINT, signal.SIG_IGN)
        try:
            self.process.start()
        finally:
            signal.signal(signal.SIGINT, before)
        theirs.close()

    def begin(self, job: Any) -> None:
        """Send a job; its messages come back."""
        self.job = job
        # A dead worker is found at the next receive.
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            self.connection.send(job)

    def receive(self) -> Any:
        """Return the next message; of a dead process, a Failure."""
        try:
            return self.connection.recv()
        except (EOFError, ConnectionResetError):
            self.process.join(5)
            return Failure(f"the worker process died (exit code {self.process.exitcode})")

    def end(self) -> None:
        """Stop at once: an unfinished job gives no result."""
        self.process.terminate()
        self.process.join(5)
        self.connection.close()


class Message(NamedTuple):
    """What came of a job, and from which worker of a crew; None at its begin."""

    slot: int
    job: Any
    content: Any


def crew(
    size: int,
    stream: Stream,
    log: Path,
    take: Callable[[int], Any],
    stopped: Sequence[Any],
    ends: Callable[[Any], bool] = lambda content: True,
) -> Generator[Message | None, None, None]:
    """Keep workers busy until no job is left, or ``stopped`` is no longer empty. Close it to stop at once.

    Args:
        size: how many workers.
        stream: what they do with a job.
        log: where their stderr goes.
        take: the next job for a worker, by its number; None if there is none.
        stopped: see :func:`stop_on_sigint`.
        ends: whether a message is the last one of its job. A Failure always is.

    Yields:
        Each message, and None several times a second.
    """
    workers = [Worker(stream, log) for _ in range(size)]
    try:
        while not stopped:
            for slot, worker in enumerate(workers):
                if worker.job is None and (job := take(slot)) is not None:
                    if not worker.process.is_alive():
                        worker.end()
                        worker = workers[slot] = Worker(stream, log)
                    worker.begin(job)
                    yield Message(slot, job, None)
            slots = {worker.connection: slot for slot, worker in enumerate(workers) if worker.job is not None}
            if not slots:
                return
            for ready in wait(list(slots), timeout=0.1):
                slot = slots[ready]  # type: ignore[index]
                worker = workers[slot]
                message = Message(slot, worker.job, worker.receive())
                if isinstance(message.content, Failure) or ends(message.content):
                    worker.job = None
                yield message
            yield None
    finally:
        for worker in workers:
            worker.end()


@contextlib.contextmanager
def stop_on_sigint() -> Iterator[list[int]]:
    """Yield a list that is empty until Ctrl-C. A second Ctrl-C interrupts at once.

    Set explicitly, because a process that a shell starts in the background ignores SIGINT from birth.
    """
    seen: list[int] = []

    def note(signum: int, _frame: FrameType | None) -> None:
        seen.append(signum)
        signal.signal(signal.SIGINT, signal.default_int_handler)

    before = signal.signal(signal.SIGINT, note)
    try:
        yield seen
    finally:
        signal.signal(signal.SIGINT, before)
