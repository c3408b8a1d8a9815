"""What optimizers felt, read back from the TensorBoard event files that ``writer=`` makes, by TensorBoard's own reader.

A step that stands there twice, as after a crash and a resume, counts as it was written last.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

__all__ = ["Curve", "Run", "label", "read", "reading"]

_POINTS = 300  # stretches that a curve is drawn in, each by its lowest and its highest value


class Curve(NamedTuple):
    """One line of a panel."""

    name: str
    steps: list[int]
    values: list[float]

    def thinned(self) -> Curve:
        """Few enough points for a light page, with every spike."""
        stride = math.ceil(len(self.steps) / _POINTS)
        if stride <= 2:
            return self
        kept: set[int] = {0, len(self.steps) - 1}
        for start in range(0, len(self.steps), stride):
            stretch = range(start, min(start + stride, len(self.steps)))
            kept |= {min(stretch, key=self.values.__getitem__), max(stretch, key=self.values.__getitem__)}
        at = sorted(kept)
        return Curve(self.name, [self.steps[i] for i in at], [self.values[i] for i in at])

    def smoothed(self, log: bool) -> Curve:
        """Its mean over the steps around each, of the logarithms where ``log``; gaps stay and do not enter.

        As many steps before as after: the mean neither lags nor differs from the curve at the ends.
        """
        known = [math.log(v) if log else v for v in self.values if math.isfinite(v)]
        reach = max(min(10, len(known) // 20), len(known) // 100)
        means = []
        for at in range(len(known)):
            near = min(reach, at, len(known) - 1 - at)
            mean = sum(known[at - near : at + near + 1]) / (2 * near + 1)
            means.append(math.exp(mean) if log else mean)
        in_order = iter(means)
        return self._replace(values=[next(in_order) if math.isfinite(v) else math.nan for v in self.values])


@dataclass(frozen=True)
class Run:
    """The emotion in one folder of event files."""

    label: str
    tags: dict[str, dict[int, float]]  # tag -> value at each step, in order

    def stops(self) -> list[tuple[int, int]]:
        """Stretches of steps in which ``should_stop`` was True; interruptions of a hundredth of the run are bridged."""
        points = self.tags.get("emo/should_stop", {})
        true = [step for step, value in points.items() if value > 0]
        bridge = max(1, max(points, default=0) // 100)
        stretches: list[tuple[int, int]] = []
        for step in true:
            near = bool(stretches) and step - stretches[-1][1] <= bridge
            stretches[-1:] = [(stretches[-1][0], step)] if near else [*stretches[-1:], (step, step)]
        return stretches

    def last(self, tag: str) -> float:
        """The last value under a tag; nan where there is none."""
        return next(reversed(self.tags.get(tag, {0: math.nan}).values()))

    @property
    def steps(self) -> int:
        """The last step."""
        return max(max(points) for points in self.tags.values())


def read(folder: Path, most: float = math.inf) -> list[Run]:
    """Read every folder of event files at or below ``folder`` that holds an emotion.

    Raises:
        ValueError: there is no such folder, or no event file in it; the event files hold no emotion, or cannot be
            read, or lie in a folder whose name is not UTF-8; they are of more than ``most`` runs.
    """
    with reading(folder):
        homes = sorted({file.parent for file in folder.rglob("*tfevents*") if file.is_file()})
    if not homes:
        raise ValueError(f"{folder} holds no event files (*tfevents*): name the directory that writer= writes to")
    odd = [str(home) for home in homes if str(home).encode(errors="ignore").decode() != str(home)]
    if odd:
        raise ValueError(f"TensorBoard cannot read {odd[0]!r}, whose name is not UTF-8: rename it")
    runs: list[Run] = []
    for home in homes:
        with reading(home):
            tags = _read(home)
        if tags:
            runs.append(Run(label(home, folder), tags))
        if len(runs) > most:  # before the others are read, which may take minutes
            raise ValueError(
                f"{folder} holds more than {most} runs, too many for lines that differ: name a folder with fewer runs"
            )
    if not runs:
        raise ValueError(
            f"the event files in {folder} hold no tag emo/...: construct the optimizer with a writer, as in "
            f'EmoNavi(params, writer="{folder}")'
        )
    return runs


@contextmanager
def reading(folder: Path) -> Iterator[None]:
    """Read a folder inside.

    Raises:
        ValueError: it is none, or something in it cannot be read.
    """
    try:
        next(folder.iterdir(), None)  # a search would find nothing, and not say why
        yield
    except OSError as error:
        reasons = {
            FileNotFoundError: "does not exist",
            NotADirectoryError: "is a file: name the folder that it lies in",
        }
        other = f"cannot be read: {(error.strerror or str(error)).lower()}"
        raise ValueError(f"{os.fsdecode(error.filename or folder)} {reasons.get(type(error), other)}") from error


def label(home: Path, folder: Path) -> str:
    """Name of a run: its folder, as seen from the one that was asked for.

    That one itself has its own name, or is "." where a folder in it has the same name.
    """
    name = folder.resolve().name
    return name if home == folder and not (folder / name).exists() else home.relative_to(folder).as_posix()


def _read(home: Path) -> dict[str, dict[int, float]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    # 0 keeps every scalar; of pictures and the like, which may be large, the least.
    sizes = {kind: 1 for kind in ("compressedHistograms", "images", "audio", "histograms", "tensors")}
    events = EventAccumulator(str(home), size_guidance={**sizes, "scalars": 0})
    events.Reload()
    # Hugging Face's Trainer puts train/ before every tag that its callbacks log.
    tags = {
        t.removeprefix("train/"): t for t in events.Tags()["scalars"] if t.removeprefix("train/").startswith("emo/")
    }
    found = {}
    for tag in sorted(tags, key=_natural):
        last = {e.step: e.value for e in events.Scalars(tags[tag])}  # in the order of writing
        found[tag] = dict(sorted(last.items()))
    return found


def _natural(tag: str) -> list[Any]:
    """Sorts group_10 behind group_9."""
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", tag)]
