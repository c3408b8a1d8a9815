"""The path of the weights through a training run, as a small file: a sample of them at some of the steps.

``emonavi plot --pca`` draws it. The file is a dict, which ``torch.load(path, weights_only=True)`` reads.
"""

from __future__ import annotations

import io
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from emonavi.intake import unwrapped
from emonavi.notices import callers_level

__all__ = ["FILE", "Trajectory", "trajectory"]

FILE = "emonavi-weights.pt"
RECORDS = 256  # at most; when there are more, every other one is dropped and the distance between them doubles


class Trajectory:
    """Samples of the weights that an optimizer trains: at each record the same coordinates, drawn at random.

    Args:
        optimizer: any ``torch.optim.Optimizer``; what requires a gradient in its groups is sampled.
        coordinates: how many numbers each record has; all weights if there are fewer. At most 256 records of 1000
            numbers are a megabyte.

    Raises:
        ValueError: fewer than two numbers are trained, or fewer than two coordinates are asked for.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, coordinates: int = 1000) -> None:
        if coordinates < 2:
            raise ValueError(f"coordinates is {coordinates}: two at least are needed for a plane")
        self._params: list[Tensor] = [
            p for g in optimizer.param_groups for p in g["params"] if p.requires_grad and p.numel()
        ]
        if not self._params:
            raise ValueError("nothing in this optimizer requires a gradient: there is no way to follow")
        self._sizes = [p.numel() for p in self._params]
        total = sum(self._sizes)
        if total < 2:
            raise ValueError("all that this optimizer trains is one number: two at least are needed for a plane")
        generator = torch.Generator().manual_seed(0)
        # With replacement: a permutation of a billion weights would take longer than the run.
        drawn = torch.randint(total, (coordinates,), generator=generator, device="cpu").sort().values
        chosen = torch.arange(total, device="cpu") if total <= coordinates else drawn
        self._places: list[Tensor] = []
        first = 0
        for p in self._params:
            inside = chosen[(chosen >= first) & (chosen < first + p.numel())] - first
            self._places.append(inside.to(p.device))
            first += p.numel()
        self._weights: list[Tensor] = []
        self._steps: list[int] = []
        self._step, self._every = 0, 1
        self._ended = False
        self._note()

    def resume(self, folder: str | Path) -> None:
        """Go on with the record that ``folder`` holds, if there is one with more than a start: no step of it is lost.

        Warns where the weights are not those that it ends with: the steps since a checkpoint count twice then.

        Raises:
            ValueError: what lies there is no record, or one of other weights.
        """
        path, here = Path(folder) / FILE, self._weights[-1]
        if not path.exists():
            return
        remedy = "name another folder, or take that file away"
        total = sum(self._sizes)
        try:
            held = torch.load(path, weights_only=True)
            steps, weights = held["steps"].tolist(), held["weights"]
            of, every, count = held.get("of", total), held.get("every", 1), weights.shape[1]
        except Exception as error:
            raise ValueError(f"{path} is no record of weights ({type(error).__name__}): {remedy}") from error
        if len(steps) != len(weights):
            raise ValueError(f"{path} has {len(steps)} steps and {len(weights)} records of weights: {remedy}")
        if len(steps) < 2:
            return  # of a run that was killed: no way is lost
        if (count, of) != (len(here), total):
            raise ValueError(f"{path} records {count} of {of} weights, and not {len(here)} of {total}: {remedy}")
        if not torch.allclose(weights[-1], here, rtol=0, atol=0, equal_nan=True):
            warnings.warn(
                f"{path} goes on after step {steps[-1]}, but from other weights than it ended with. After a resume "
                "from an older checkpoint that is right; give another run a folder of its own",
                stacklevel=4,  # over trajectory() and contextlib
            )
        self._weights, self._steps, self._step, self._every = list(weights), steps, steps[-1], every

    def record(self, *_: Any) -> None:
        """Count a step, and take a sample if one is due. Only then it waits for the device."""
        self._step += 1
        if self._step % self._every == 0:
            self._note()
        if len(self._steps) > RECORDS:
            del self._weights[1::2], self._steps[1::2]
            self._every *= 2

    def _note(self) -> None:
        """Take a sample; none any more once a weight has another size, where its places would mean other numbers."""
        if self._ended:
            return
        if [p.numel() for p in self._params] != self._sizes:
            self._ended = True
            what = f"a weight has another size than at step {self._steps[-1]}"
            warnings.warn(f"{what}: the record of the weights ends there", stacklevel=callers_level())
            return
        taken = [
            p.detach().reshape(-1)[at.to(p.device)].float().cpu()
            for p, at in zip(self._params, self._places, strict=True)
        ]
        self._weights.append(torch.cat(taken))
        self._steps.append(self._step)

    def save(self, folder: str | Path) -> Path:
        """Write the samples, with that of the last step, into a folder; return the path of the file.

        The file holds ``steps`` of shape (records,) and ``weights`` of shape (records, coordinates), float32. For
        :meth:`resume` it has ``of``, how many weights there are in all, and ``every``, the steps between two records.
        """
        if self._steps[-1] != self._step:
            self._note()
        held = {"steps": torch.tensor(self._steps), "weights": torch.stack(self._weights)}
        content = io.BytesIO()
        torch.save({**held, "of": sum(self._sizes), "every": self._every}, content)
        path = Path(folder) / FILE
        path.parent.mkdir(parents=True, exist_ok=True)
        beside = path.with_name(f"{FILE}.{os.getpid()}")
        try:  # a disk that is full, or a kill, must not take what was there before
            beside.write_bytes(content.getvalue())
            os.replace(beside, path)
        finally:
            beside.unlink(missing_ok=True)
        return path


@contextmanager
def trajectory(
    optimizer: torch.optim.Optimizer, folder: str | Path, *, coordinates: int = 1000
) -> Iterator[Trajectory]:
    """Record the path of the weights inside the block; write it into ``folder`` at the end, also after an error.

    A step hook takes the records, so the loop needs no other change, and any torch optimizer will do. A folder that
    holds a record is continued, so that a resumed run keeps its first part; give each run a folder of its own.
    ``emonavi plot --pca FOLDER`` draws all runs at or below a folder. For the arguments see :class:`Trajectory`.

    Raises:
        OSError: ``folder`` cannot be written. This is checked at once, not after the training.
        ValueError: ``folder`` holds the record of another network, one with other ``coordinates``, or a damaged one.

    Example:
        >>> import tempfile, torch, emonavi
        >>> weight = torch.nn.Parameter(torch.ones(3))
        >>> optimizer = emonavi.EmoNavi([weight])
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     with emonavi.monitor.trajectory(optimizer, folder):
        ...         for _ in range(5):
        ...             optimizer.zero_grad()
        ...             weight.square().sum().backward()
        ...             _ = optimizer.step()
        ...     torch.load(f"{folder}/emonavi-weights.pt", weights_only=True)["weights"].shape
        torch.Size([6, 3])
    """
    optimizer = unwrapped(optimizer)
    recorded = Trajectory(optimizer, coordinates)
    recorded.resume(folder)
    recorded.save(folder)
    hook = optimizer.register_step_post_hook(recorded.record)
    try:
        yield recorded
    finally:
        hook.remove()
        recorded.save(folder)
