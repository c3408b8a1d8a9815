"""Thin bridges to trainers; each module imports its package, and ``emonavi`` imports none of them.

The loss needs no bridge: it is heard at backward in every trainer. These bring the options to the optimizer, and what
it feels to the trainer's own log. accelerate has no module here because it needs none.
"""

from __future__ import annotations

from typing import Any

from emonavi.intake import listening
from emonavi.monitor import tagged

__all__ = ["missing", "readings"]


def readings(optimizer: Any) -> dict[str, float]:
    """What an optimizer, or the one inside a wrapper, feels: by tag, as a writer gets it. Waits for the device.

    Example:
        >>> import torch, emonavi
        >>> optimizer = emonavi.EmoNavi([torch.nn.Parameter(torch.ones(2))], lr=1e-3)
        >>> readings(optimizer)["emo/lr/group_0"]
        0.001
    """
    inner = listening(optimizer)
    return tagged(inner.emotion, inner.effective_lr)


def missing(module: str, package: str) -> ImportError:
    """The error of an integration whose package is not there."""
    return ImportError(f'{module} needs {package}: pip install "{package}"')
