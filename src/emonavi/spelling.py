"""Options as command lines give them: strings for numbers, flags and None, and 0 and 1 for flags."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

__all__ = ["FLAGS", "NUMBERS", "plain", "spelled", "truth", "word"]

NUMBERS = ("lr", "eps", "weight_decay", "max_norm", "min_lr", "max_lr")
# Flags, and whether None is allowed: the emotion, or this version of the library, then decides.
FLAGS = dict.fromkeys(("use_shadow", "use_trust", "foreach", "fused"), True) | dict.fromkeys(
    ("maximize", "capturable", "decoupled_weight_decay", "stochastic_rounding"), False
)
WORDS = {"true": True, "1": True, "false": False, "0": False}
# Spellings of state_dtype, in command lines and in torch.
STATE_DTYPES: dict[Any, str | None] = {
    **dict.fromkeys((None, "none", "fp32", "float32", "torch.float32", torch.float32)),
    **dict.fromkeys(("bf16", "bfloat16", "torch.bfloat16", torch.bfloat16), "bf16"),
    **dict.fromkeys(("8bit", "int8", "uint8", "torch.int8", "torch.uint8", torch.int8, torch.uint8), "8bit"),
}


def spelled(given: dict[str, Any]) -> dict[str, Any]:
    """Convert options to their own types where they are strings, or 0 and 1, as in command lines.

    Numpy's numbers become Python's: ``weights_only=True`` would not load a checkpoint with them.

    A number that cannot be read stays as it is: ``checks.group`` reports it with what it should be.

    Raises:
        ValueError: a flag is neither true nor false, or there is no such ``state_dtype``.

    Example:
        >>> spelled({"lr": "1e-3", "betas": "0.9,0.99", "use_shadow": "True", "foreach": 0, "max_lr": "None"})
        {'lr': 0.001, 'betas': (0.9, 0.99), 'use_shadow': True, 'foreach': False, 'max_lr': None}
    """
    meant = dict(given)
    for name, value in given.items():
        if name in FLAGS:
            meant[name] = _flag(name, value)
        elif name in NUMBERS:
            meant[name] = _number(value, none=name in ("max_norm", "min_lr", "max_lr"))
        elif name == "betas":
            meant[name] = _pair(value)
        elif name == "state_dtype":
            meant[name] = _state_dtype(value)
    return meant


def word(given: Any) -> Any:
    """A string in lower case without spaces around it; anything else unchanged."""
    return given.strip().lower() if isinstance(given, str) else given


def plain(given: Any) -> Any:
    """A numpy scalar as Python's; anything else unchanged."""
    alone = getattr(given, "shape", None) == () and not isinstance(given, Tensor)
    return given.item() if alone else given


def truth(given: Any) -> bool | None:
    """The flag as a bool; None if it is neither true nor false."""
    said = word(plain(given))
    if isinstance(said, str):
        return WORDS.get(said)
    return bool(said) if isinstance(said, (bool, int)) and said in (0, 1) else None


def _flag(name: str, given: Any) -> bool | None:
    may_be_none, given = FLAGS[name], plain(given)
    if may_be_none and (given is None or (isinstance(given, str) and word(given) == "none")):
        return None
    said = truth(given)
    if said is None:
        raise ValueError(f"{name}={given!r}: give True or False{', or None to leave the choice' * may_be_none}")
    return said


def _number(given: Any, none: bool = False) -> Any:
    if not isinstance(given, str):
        return plain(given)
    if none and word(given) == "none":
        return None
    try:
        return float(given)
    except ValueError:
        return given


def _pair(given: Any) -> Any:
    parts = given
    if isinstance(given, str):
        parts = given.strip().strip("()[]").removesuffix(",").split(",")
    elif hasattr(given, "tolist"):
        parts = given.tolist()
    if not isinstance(parts, (list, tuple)):
        return given
    numbers = tuple(_number(part) for part in parts)
    return given if any(isinstance(n, str) for n in numbers) else numbers


def _state_dtype(given: Any) -> str | None:
    said = word(given)
    if not isinstance(said, (str, torch.dtype, type(None))) or said not in STATE_DTYPES:
        raise ValueError(f"state_dtype={given!r}: choose None (float32), 'bf16' or '8bit'")
    return STATE_DTYPES[said]
