"""Processes that work through jobs one after another, each with one torch thread; jobs and answers travel by pipe.

A job that raises, or a worker that dies, costs that one job only.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import traceback
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from types import FrameType
from typing import Any

import torch

__all__ = ["Failure", "Worker", "stop_on_sigint", "torch_threads"]

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
