"""Warnings of what goes on from step to step and may not show otherwise."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path

import torch

__all__ = ["IDLE", "IGNORED", "SKIPPED", "Missing", "Streak", "callers_level"]

UNFED_STEPS = 5  # real steps without a loss before the warning: a trainer's dry run is no reason for one
IN_A_ROW = 20  # of other things
SKIPPED = """{name} has skipped {n} steps in a row, because a gradient, or its square, was not finite: nothing moves. \
torch.autograd.set_detect_anomaly(True) names the operation that the first NaN comes from"""
IGNORED = """{name} has ignored {n} losses in a row that are not finite: it trains by gradients alone. \
Look for infinity and NaN in what the model puts out, and in its weights"""
IDLE = """in {n} calls of step() no parameter of this {name} had a gradient, and nothing moves. \
Was it made from another model, or before the model was copied, or wrapped by PEFT?"""


class Streak:
    """Warns of what happens in step after step, each time that it begins anew; ``name`` is of the optimizer."""

    def __init__(self, message: str, name: str) -> None:
        self._message = message.format(name=name, n=IN_A_ROW)
        self._length = 0

    def note(self, happened: bool) -> None:
        """Count a step in which it has happened, or has not."""
        self._length = self._length + 1 if happened else 0
        if self._length == IN_A_ROW:
            warnings.warn(self._message, stacklevel=callers_level())


class Missing:
    """What is done about steps that have no loss.

    Args:
        action: ``"warn"`` (once), ``"ignore"`` or ``"error"``.
        name: of the optimizer.
    """

    def __init__(self, action: str, name: str) -> None:
        self.action = action
        self._name = name
        self._unfed = 0
        self._warned = False

    def note(self, heard: object) -> None:
        """Count a real step with the loss that it heard, or None."""
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
    """How far up the stack, for a warning, the code is that is neither torch's nor ours."""
    ours = tuple(str(Path(module.__file__ or "").parent) for module in (torch, sys.modules[__package__]))
    level, frame = 1, sys._getframe(1)
    while frame.f_back is not None and frame.f_code.co_filename.startswith(ours):
        level, frame = level + 1, frame.f_back
    return level
