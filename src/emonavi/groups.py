"""What a parameter group holds for the emotion, beside the user's options.

::

    lr_start, lr_peak            the lr that it began with, and the highest so far
    lr_floor, lr_ceiling         its ``min_lr`` and ``max_lr``
    emotion, emotion_constants   in the first group: the state vector, and the constants that are not the defaults
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

__all__ = ["BOUNDS", "OF_THE_RUN", "of_the_run"]

BOUNDS = {"lr_floor": "min_lr", "lr_ceiling": "max_lr"}  # names of our own: OneCycleLR writes its plan into the others
OF_THE_RUN = ("lr_start", "lr_peak")


def of_the_run(lr: float | Tensor) -> dict[str, Any]:
    """What a group keeps of its lr from the beginning."""
    if isinstance(lr, Tensor):  # the peak will be one, too: a distributed checkpoint is loaded into what is there
        return {"lr_start": lr.detach().clone(), "lr_peak": torch.zeros_like(lr, requires_grad=False)}
    return {"lr_start": lr, "lr_peak": 0.0}
