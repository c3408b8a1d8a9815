"""What an optimizer feels, as plain numbers: a snapshot to read, and a recorder that writes it step by step.

``live``, a line in the terminal, is defined in ``terminal.py``; ``trajectory``, the path of the weights, in
``trajectory.py``.
"""

from __future__ import annotations

import contextlib
import math
import os
import warnings
import weakref
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from emonavi.machine import Machine
from emonavi.notices import callers_level
from emonavi.terminal import live
from emonavi.trajectory import trajectory

__all__ = ["LAYOUT", "Recorder", "Snapshot", "live", "tagged", "trajectory"]

ROUNDING = 1e-24  # a variance of the scalar below this is rounding
RING = 50  # steps that wait on a device before they are written

# TensorBoard's tab "Custom Scalars", as add_custom_scalars takes it: charts of tags, which are regular expressions.
LAYOUT: dict[str, dict[str, list[Any]]] = {
    "emonavi": {
        "feeling: scalar, tension": ["Multiline", ["emo/scalar$", "emo/tension$"]],
        "reflection: trust": ["Multiline", ["emo/trust$"]],  # in one chart with a drive of 10 it would look like 0
        "reflection: drive": ["Multiline", ["emo/drive$"]],
        "effective lr of each group": ["Multiline", [r"emo/lr/group_\d+$"]],
        "loss: short and long memory": ["Multiline", ["emo/loss_short$", "emo/loss_long$"]],
        "gradient norm": ["Multiline", ["emo/grad_norm$"]],
        "should_stop": ["Multiline", ["emo/should_stop$"]],
    }
}
_laid_out: weakref.WeakSet[Any] = weakref.WeakSet()  # writers that have the layout
_last: dict[Any, weakref.ref[Recorder]] = {}  # who wrote last, by where it is written


@dataclass(frozen=True)
class Snapshot:
    """What the optimizer feels.

    ``mood`` is one word for it. Of the adaptive emotion: ``"done"`` (``should_stop``), ``"resting"`` (after a panic,
    until the drive is back), ``"braking"`` (the loss rises beyond its noise), ``"growing"`` or ``"easing"`` (trust is
    above 0.03, or below -0.03), else ``"steady"``. Of the published generations: ``"done"``, ``"tense"`` (scalar above
    0.3), ``"eager"`` (below -0.3), else ``"steady"``.

    ``loss`` is the loss last felt (NaN before any), ``short``, ``medium`` and ``long`` are its running means,
    ``scalar`` is the emotional scalar in [-1, 1]: positive while the loss rises, negative while it improves.
    ``tension`` is how far the short mean is above the medium one, in units of the loss's own noise. ``trust`` is the
    smoothed cosine between each gradient and the step before it: positive means that steps were too short. ``drive``
    multiplies lr. ``grad_norm`` is the norm of the last gradient. What an emotion does not have is NaN.

    ``steps`` counts the steps that moved the weights, ``skipped_steps`` those left out because the gradient was not
    finite, and ``ignored_losses`` the losses that were not finite. ``should_stop`` is that of the optimizer: the last
    stretch of the run gave next to nothing of its progress.

    ``skewness``, ``kurtosis`` and ``asymmetry`` describe the scalar over the last fifty losses, for diagnosis only.
    Skewness above 0: mostly calm, with a few large rises; below 0: with a few large improvements. Kurtosis is 3 for a
    normal distribution; if it is far above, a few losses stand out from the others. Both are NaN while the scalar has
    not changed. Asymmetry, from -1 to 1, is the mean of the scalar over the mean of its absolute value: -1 if the loss
    only improves, 0 if rises and improvements balance, 1 if it only rises.
    """

    mood: str
    loss: float
    short: float
    medium: float
    long: float
    scalar: float
    tension: float
    trust: float
    drive: float
    grad_norm: float
    steps: int
    skipped_steps: int
    ignored_losses: int
    should_stop: bool
    skewness: float = math.nan
    kurtosis: float = math.nan
    asymmetry: float = math.nan

    @property
    def agitation(self) -> float:
        """How far from calm, 0 to 1: 1 while it rests after a panic, else ``abs(scalar)``.

        0: the loss moves within its own noise. Towards 1: it moves far beyond its noise, down (``scalar < 0``) or up.
        """
        return 1.0 if self.mood == "resting" else abs(self.scalar)

    @classmethod
    def of(cls, emotion: Machine, vector: Tensor) -> Snapshot:
        """Read the state vector of an emotion."""
        state: Any = emotion.unpack(vector, plain=True)
        values: dict[str, float] = {k: v for k, v in state._asdict().items() if not isinstance(v, Tensor)}
        stop = bool(emotion.should_stop(state))
        offset = values.get("first", 0.0)  # the adaptive emotion stores losses relative to the first
        memories = {
            k: values[k] + offset if values["losses"] and k in values else math.nan for k in ("short", "medium", "long")
        }
        return cls(
            mood=emotion.mood_word(values, stop),
            loss=values["loss"] if values["losses"] else math.nan,
            **memories,
            scalar=values["scalar"],
            tension=values.get("tension", math.nan),
            trust=values.get("trust", math.nan),
            drive=math.exp(values["log_drive"]),
            grad_norm=values["grad_norm"],
            steps=int(values["steps"]),
            skipped_steps=int(values["skipped_steps"]),
            ignored_losses=int(values["ignored_losses"]),
            should_stop=stop,
            **_shape(values),
        )


def _shape(values: dict[str, float]) -> dict[str, float]:
    """Skewness, kurtosis and asymmetry of the scalar, if the emotion keeps its moments."""
    variance, size = values.get("scalar_m2", 0.0), values.get("scalar_size", 0.0)
    shape = {"asymmetry": values["scalar_mean"] / size} if size else {}
    if variance > ROUNDING:
        shape |= {"skewness": values["scalar_m3"] / variance**1.5, "kurtosis": values["scalar_m4"] / variance**2}
    return shape


class Recorder:
    """Writes the emotion to anything with ``add_scalar(tag, value, step)``.

    On the CPU each step is written at once. On a device, where reading waits, the steps are kept there and written
    every 50 steps, by ``flush()``, and when the recorder is freed.

    A writer that also has ``add_custom_scalars`` gets ``LAYOUT``, once, at construction. TensorBoard shows the layout
    that a run wrote last, so add a layout of your own later; it may include this one:
    ``writer.add_custom_scalars({**emonavi.monitor.LAYOUT, **mine})``.

    Example:
        Anything can be a writer, here a list; ``docs/watching.md`` has the same for Weights & Biases and MLflow.

        >>> import torch, emonavi
        >>> class Rows(list):
        ...     def add_scalar(self, tag, value, step):
        ...         self.append((tag, step))
        >>> rows = Rows()
        >>> weight = torch.nn.Parameter(torch.ones(2))
        >>> optimizer = emonavi.EmoNavi([weight], writer=rows)
        >>> weight.square().sum().backward()
        >>> _ = optimizer.step()
        >>> ("emo/drive", 1) in rows
        True
    """

    def __init__(self, writer: Any, emotion: Machine) -> None:
        self.writer = writer
        self._emotion = emotion
        self._ring: list[tuple[Tensor, Tensor]] = []
        # Of a SummaryWriter, its folder: two of them for one folder write into one run.
        folder = vars(writer).get("log_dir") if hasattr(writer, "__dict__") else None
        self._place = os.path.realpath(folder) if isinstance(folder, (str, os.PathLike)) else id(writer)
        self._began = self._warned = False
        # Not a bound method: it would keep the recorder alive.
        self._finalizer = weakref.finalize(self, _finish, self._ring, writer, emotion)
        _lay_out(writer)

    def record(self, vector: Tensor, effective_lr: Tensor) -> None:
        """Record the state after a step."""
        self._ring.append((vector.clone(), effective_lr))
        self._share()
        if vector.device.type == "cpu" or len(self._ring) >= RING:
            _write(self._ring, self.writer, self._emotion)

    def _share(self) -> None:
        """Warn once where two write in turns. One who follows on another, as after a resume, may have its place."""
        last = _last[self._place]() if self._place in _last else None
        if last is self:
            return
        if last is not None and self._began and not (self._warned or last._warned):
            self._warned = last._warned = True
            where = self._place if isinstance(self._place, str) else repr(self.writer)
            warnings.warn(
                f"two optimizers write to {where}, and their scalars overwrite each other: give each a writer of its "
                "own, as writer='runs/generator' and writer='runs/discriminator'",
                stacklevel=callers_level(),
            )
        _last[self._place] = weakref.ref(self)
        self._began = True

    def close(self) -> None:
        """Write what is waiting, for the last time."""
        self._finalizer()

    def flush(self) -> None:
        """Write what is waiting."""
        _finish(self._ring, self.writer, self._emotion)


def _finish(ring: list[tuple[Tensor, Tensor]], writer: Any, emotion: Machine) -> None:
    _write(ring, writer, emotion)
    if callable(getattr(writer, "flush", None)):
        writer.flush()  # a SummaryWriter writes in a thread that the end of a script does not wait for


def _lay_out(writer: Any) -> None:
    if not callable(getattr(writer, "add_custom_scalars", None)):
        return
    with contextlib.suppress(TypeError):  # an unhashable writer gets the layout each time
        if writer in _laid_out:
            return  # of a second optimizer too: its owner may have changed the layout since
        _laid_out.add(writer)
    writer.add_custom_scalars(LAYOUT)


def _write(ring: list[tuple[Tensor, Tensor]], writer: Any, emotion: Machine) -> None:
    if not ring:
        return
    for vector in torch.stack([vector for vector, _ in ring]).cpu():
        rates = ring[0][1].tolist()
        felt = Snapshot.of(emotion, vector)
        for tag, value in tagged(felt, rates).items():
            writer.add_scalar(tag, value, felt.steps)
        del ring[0]  # only now: if the writer raises (a full disk), the step is tried again


def tagged(felt: Snapshot, effective_lr: list[float]) -> dict[str, float]:
    """The numbers to plot, by tag, without those that the emotion does not have."""
    values = {f"emo/lr/group_{i}": rate for i, rate in enumerate(effective_lr)}
    values |= {
        "emo/scalar": felt.scalar, "emo/trust": felt.trust, "emo/drive": felt.drive, "emo/tension": felt.tension,
        "emo/loss_short": felt.short, "emo/loss_long": felt.long, "emo/grad_norm": felt.grad_norm,
        "emo/should_stop": float(felt.should_stop),
    }  # fmt: skip
    return {tag: value for tag, value in values.items() if not math.isnan(value)}
