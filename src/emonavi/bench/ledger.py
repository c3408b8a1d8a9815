"""A grid of measurements that may be killed at any time: an append-only file of results, and what fills it.

A *cell* is a ``NamedTuple`` of what defines a measurement, and a function makes a dict of a cell. The ledger holds one
line of JSON for each finished cell: the cell's fields, the function's figures and the seconds it took. Whoever starts
again measures what is missing. A line that a kill has torn is cut off at the next start.
"""

from __future__ import annotations

import contextlib
import json
import os
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Generic, TypeVar

from rich.console import Console, RenderableType
from rich.progress import BarColumn, Progress, TextColumn

from emonavi.bench.figures import json_line
from emonavi.bench.provenance import hardware
from emonavi.bench.workers import Failure, crew, stop_on_sigint

__all__ = ["Ledger", "Outcome", "Row", "execute", "fill", "read_rows"]

C = TypeVar("C", bound=tuple[Any, ...])  # a NamedTuple; cells with the same first field take about the same time
Row = dict[str, Any]

_LINE_EVERY = 5.0  # seconds between two lines where there is no terminal: a log of thousands of runs is not read


def read_rows(path: Path) -> list[Row]:
    """Read the finished measurements, in the order of writing; a torn last line is not one of them.

    Raises:
        ValueError: a line within the file is no JSON object.
    """
    return _parse(path)[0]


def _parse(path: Path) -> tuple[list[Row], int]:
    """Rows, and how many bytes of the file hold them."""
    rows: list[Row] = []
    sound = 0
    content = path.read_bytes() if path.exists() else b""
    for number, line in enumerate(content.splitlines(keepends=True), start=1):
        try:
            row = json.loads(line)
        except ValueError:
            row = None
        if line.endswith(b"\n") and isinstance(row, dict):
            rows.append(row)
            sound += len(line)
        elif sound + len(line) < len(content) or not _torn(line) or (row is not None and not rows):
            raise ValueError(f"{path}, line {number} is no JSON object: {line[:60]!r}; remove that line, or the file")
    return rows, sound


def _torn(line: bytes) -> bool:
    """Whether it may be the beginning of a row, and no line of a file that is somebody's own."""
    return line.startswith(b'{"') and not line.endswith(b"\n")


class Ledger(Generic[C]):
    """The results of a grid, by cell: the last row of a cell counts. One process writes at a time.

    Raises:
        ValueError: the file holds something else.
        RuntimeError: another process writes to it.
    """

    def __init__(self, path: Path, cell: type[C]) -> None:
        self.path = path
        self.log = path.with_name(f"{path.name}.log")  # what workers say; the ledger itself may be called x.log
        self._cell = cell
        self._fields: tuple[str, ...] = cell._fields  # type: ignore[attr-defined]
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
        self.rows: dict[C, Row] = {}
        try:
            _lock(self._file, path)
            rows, sound = _parse(path)
            for row in rows:
                self._note(row)
            os.ftruncate(self._file, sound)  # a torn last line; after all is known to be a ledger
        except (RuntimeError, ValueError):
            self.close()
            raise

    def _note(self, row: Row) -> None:
        try:
            cell = self._cell(**{name: row[name] for name in self._fields})
        except KeyError as error:
            what = f"{self.path} is a ledger of something else: a row lacks {error}; name another file"
            raise ValueError(what) from error
        # Another bench's row may have these fields, too, and more: each begins with its own.
        if (begin := tuple(row)[: len(self._fields)]) != self._fields:
            what = f"a row is of {', '.join(begin)}, ..., and not of {', '.join(self._fields)}"
            raise ValueError(f"{self.path} is a ledger of something else: {what}; name another file")
        self.rows[cell] = row

    def append(self, row: Row) -> None:
        """Write a row; when this returns, a kill cannot take it back."""
        os.write(self._file, json_line(row).encode())
        os.fsync(self._file)
        self._note(row)

    def missing(self, cells: Sequence[C]) -> list[C]:
        """Return those of the cells that have no row yet."""
        return [cell for cell in cells if cell not in self.rows]

    def close(self) -> None:
        """Let another process write."""
        os.close(self._file)


def _lock(file: int, path: Path) -> None:
    """Keep a second writer out; the lock goes with the process, however it ends."""
    try:
        import fcntl
    except ImportError:  # Windows
        return
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        raise RuntimeError(f"another process writes to {path}: wait for it, or name another file") from error


# --- Execution


@dataclass
class Outcome:
    """How an execution ended."""

    finished: int = 0
    failures: list[str] = field(default_factory=list)  # cells that gave no row, with the reason
    stopped: bool = False


def execute(
    cells: Sequence[C],
    measure: Callable[[C], Row],
    ledger: Ledger[C],
    *,
    workers: int,
    title: str,
    console: Console,
) -> Outcome:
    """Measure cells in their order, in spawned processes, and append what comes to the ledger until Ctrl-C.

    Args:
        cells: what to measure, whether or not the ledger has it already.
        measure: picklable, so of a module's top level. What it raises gives no row: the next start tries again.
        ledger: where the rows go.
        workers: processes.
        title: stands before the bar.
        console: where progress is shown: a bar in a terminal, else a line now and then.
    """
    outcome = Outcome()
    clock = _Clock(cells, ledger.rows, workers)
    waiting = iter(cells)
    with stop_on_sigint() as stopped, _shown(title, len(cells), clock, console) as show:
        stream, size = partial(_measured, measure), min(workers, len(cells))
        with contextlib.closing(crew(size, stream, ledger.log, lambda _: next(waiting, None), stopped)) as messages:
            for message in messages:
                if message is None or message.content is None:
                    show("")
                else:
                    show(_settle(message.job, message.content, ledger, clock, outcome))
    outcome.stopped = bool(stopped)
    return outcome


def _measured(measure: Callable[[C], Row], cell: C) -> Iterator[Row]:
    """In the worker: the whole row of a cell."""
    started = time.perf_counter()
    figures = measure(cell)
    yield {**cell._asdict(), **figures, "seconds": round(time.perf_counter() - started, 3)}  # type: ignore[attr-defined]


def _settle(cell: C, answer: Row | Failure, ledger: Ledger[C], clock: _Clock, outcome: Outcome) -> str:
    """Book a worker's answer, and say what it was."""
    name = " ".join(map(str, cell))
    if isinstance(answer, Failure):
        clock.note(cell, None)
        outcome.failures.append(f"{name}: {answer.reason}")
        return outcome.failures[-1]
    ledger.append(answer)
    outcome.finished += 1
    clock.note(cell, answer["seconds"])
    return f"{name}  {answer['seconds']:.1f} s"


class _Clock:
    """Estimates the time left: each waiting cell takes as long as its kind usually does, as far as that is known."""

    def __init__(self, cells: Sequence[C], rows: dict[C, Row], workers: int) -> None:
        self.workers = workers
        self.ahead = Counter(cell[0] for cell in cells)
        self.seconds: dict[Any, list[float]] = {}
        self.done = 0
        for cell, row in rows.items():  # of earlier starts
            self.seconds.setdefault(cell[0], []).append(row["seconds"])

    def note(self, cell: Any, seconds: float | None) -> None:
        """Note that a cell is finished, and how long it took (None: it failed)."""
        self.ahead[cell[0]] -= 1
        self.done += 1
        if seconds is not None:
            self.seconds.setdefault(cell[0], []).append(seconds)

    def left(self) -> str:
        """Write the time left as hours, minutes and seconds."""
        if not self.seconds:
            return "-:--"
        usual = {kind: statistics.mean(some) for kind, some in self.seconds.items()}
        unknown = statistics.mean(usual.values())
        total = sum(count * usual.get(kind, unknown) for kind, count in self.ahead.items()) / self.workers
        hours, rest = divmod(int(total), 3600)
        return f"{hours}:{rest // 60:02d}:{rest % 60:02d}" if hours else f"{rest // 60}:{rest % 60:02d}"


@contextlib.contextmanager
def _shown(title: str, total: int, clock: _Clock, console: Console) -> Iterator[Callable[[str], None]]:
    """Yield what shows progress, given what has just happened ("" is nothing)."""
    if console.is_terminal and console.file.isatty():
        columns = (TextColumn("{task.description}"), BarColumn(None), TextColumn("{task.completed}/{task.total}"))
        with Progress(*columns, TextColumn("left {task.fields[left]}"), console=console, transient=True) as bar:
            only = bar.add_task(title, total=total, left="-:--")
            yield lambda _: bar.update(only, completed=clock.done, left=clock.left())
        return
    console.print(f"{title}: {total} runs", soft_wrap=True)
    said = time.monotonic()

    def line(what: str) -> None:
        nonlocal said
        if what and (time.monotonic() - said > _LINE_EVERY or clock.done == total):
            said = time.monotonic()
            console.print(f"[{clock.done}/{total}] left {clock.left()}  {what}", soft_wrap=True)

    yield line


# --- A whole bench


def fill(
    ledger: Ledger[C],
    cells: Sequence[C],
    measure: Callable[[C], Row],
    found: Callable[[list[Row]], Iterable[RenderableType]],
    *,
    todo: Sequence[C] | None = None,
    workers: int,
    title: str,
    command: str,
    console: Console,
) -> int:
    """Measure what is missing, say how that went and what is known now, and close the ledger.

    Args:
        ledger: where the rows are.
        cells: the whole grid.
        measure: makes the figures of a cell, see :func:`execute`.
        found: what to say of the rows of the grid.
        todo: cells to measure, if not those without a row.
        workers: processes.
        title: stands before the bar.
        command: what goes on after Ctrl-C.
        console: where all this is said.

    Returns:
        The exit code: 0, 1 where some cells gave no row, 130 after Ctrl-C.
    """
    out = ledger.path
    todo = ledger.missing(cells) if todo is None else todo
    try:
        console.print(f"{len(cells)} runs, {len(cells) - len(todo)} of them in {out}; {hardware()}", soft_wrap=True)
        outcome = execute(todo, measure, ledger, workers=workers, title=title, console=console)
    finally:
        ledger.close()
    for failure in outcome.failures[:10]:
        console.print(f"no result: {failure}", soft_wrap=True)
    if outcome.failures:
        console.print(f"{len(outcome.failures)} runs gave no result; tracebacks: {ledger.log}", soft_wrap=True)
    for said in found([ledger.rows[cell] for cell in cells if cell in ledger.rows]):
        console.print(said, soft_wrap=True)
    if outcome.stopped:
        left = len(todo) - outcome.finished
        console.print(f"Stopped, {left} runs are left; everything finished is in {out}. To go on:", soft_wrap=True)
        console.print(f"  {command}", soft_wrap=True)
        return 130
    return 1 if outcome.failures else 0
