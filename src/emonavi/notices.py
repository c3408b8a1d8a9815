"""Warnings about problems that go on from step to step and would not show otherwise."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path

import torch

__all__ = ["IDLE", "IGNORED", "SKIPPED", "Missing", "Streak", "callers_level"]

UNFED_STEPS = 5  # steps without a loss before the warning: a trainer's dry run must not cause it
IN_A_ROW = 20  # steps before the other warnings
SKIPPED = """{name} has skipped {n} steps in a row, because a gradient, or its square, was not finite: nothing moves. \
torch.autograd.set_detect_anomaly(True) names the operation that the first NaN comes from"""
IGNORED = """{name} has ignored {n} losses in a row that are not finite: it trains by gradients alone. \
Look for infinity and NaN in what the model puts out, and in its weights"""
IDLE = """in {n} calls of step() no parameter of this {name} had a gradient, and nothing moves. \
Was it made from another model, or before the model was copied, or wrapped by PEFT?"""


class Streak:
    """Warns once whenever something happens in 20 steps in a row; ``name`` is the optimizer's."""

    def __init__(self, message: str, name: str) -> None:
        self._message = message.format(name=name, n=IN_A_ROW)
        self._length = 0

    def note(self, happened: bool) -> None:
        """Count a step in which it happened, or did not."""
        self._length = self._length + 1 if happened else 0
        if self._length == IN_A_ROW:
            warnings.warn(self._message, stacklevel=callers_level())


class Missing:
    """What to do about steps without a loss.

    Args:
        action: ``"warn"`` (once), ``"ignore"`` or ``"error"``.
        name: the optimizer's.
    """

    def __init__(self, action: str, name: str) -> None:
        self.action = action
        self._name = name
        self._unfed = 0
        self._warned = False

    def note(self, heard: object) -> None:
        """Count a step with its loss, or None."""
        self._unfed = 0 if heard is not None else self._unfed + 1
        if heard is not None or self.action == "ignore":
            return
        remedy = "pass step(loss=loss), call optimizer.observe(loss), or leave capture='auto' on"
        if self.action == "error":
            raise RuntimeError(f"step() has no loss: {remedy}")
        if self._unfed >= UNFED_STEPS and not self._warned:
            self._warned = True
            warnings.warn(
                f"{self._name} has made {UNFED_STEPS} steps without a loss. Reflection goes on, but the loss is not "
                f"felt and should_stop cannot be told: {remedy} (on_missing_loss='ignore' silences this)",
                stacklevel=callers_level(),
            )


def callers_level() -> int:
    """The ``stacklevel`` of a warning that points to the first caller outside torch and emonavi."""
    ours = tuple(str(Path(module.__file__ or "").parent) for module in (torch, sys.modules[__package__]))
    level, frame = 1, sys._getframe(1)
    while frame.f_back is not None and frame.f_code.co_filename.startswith(ours):
        level, frame = level + 1, frame.f_back
    return level
