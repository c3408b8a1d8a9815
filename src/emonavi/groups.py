"""What a parameter group holds for the emotion, beside the user's options.

::

    lr_start, lr_peak            the lr that it began with, and the highest so far
    lr_floor, lr_ceiling         its ``min_lr`` and ``max_lr``
    emotion, emotion_constants   in the first group: the state vector, and the constants that are not the defaults
    shown                        in the first group: which weights the model has, ``"raw"``, or ``"shadow"`` in calm()
                                 and after eval()
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

__all__ = ["BOUNDS", "OF_THE_RUN", "no_peak", "of_the_run"]

BOUNDS = {"lr_floor": "min_lr", "lr_ceiling": "max_lr"}  # names of our own: OneCycleLR writes its plan into the others
OF_THE_RUN = ("lr_start", "lr_peak")


def of_the_run(lr: float | Tensor) -> dict[str, Any]:
    """What a group keeps of its lr from the beginning."""
    return {"lr_start": lr.detach().clone() if isinstance(lr, Tensor) else lr, "lr_peak": no_peak(lr)}


def no_peak(lr: float | Tensor) -> float | Tensor:
    """The highest lr before any step: 0, of the lr's kind, as a distributed checkpoint is loaded into what is there."""
    return torch.zeros_like(lr, requires_grad=False) if isinstance(lr, Tensor) else 0.0
