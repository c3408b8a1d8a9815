"""Loading state as it was saved."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

__all__ = ["load_exactly"]


def load_exactly(
    load: Callable[[dict[str, Any]], None],
    optimizer: torch.optim.Optimizer,
    state_dict: dict[str, Any],
    check: Callable[[dict[str, Any]], None],
) -> None:
    """Load with torch's own ``load``, then restore each state tensor in the dtype that it was saved in.

    torch casts state to the parameter's dtype (pytorch#43706), which rounds the float32 memories of 16-bit
    parameters, and shares tensors with the dict. A resumed run would then not be the same run. ``check`` raises where
    the dict does not fit, before anything changes.
    """
    loaded: dict[str, Any] = {}

    def look(_: torch.optim.Optimizer, final: dict[str, Any]) -> None:
        # Hooks registered by others may have replaced the dict: this one runs last and sees what is loaded.
        check(final)
        loaded.update(final)

    handle = optimizer.register_load_state_dict_pre_hook(look)
    try:
        load(state_dict)
    finally:
        handle.remove()
    saved = [i for g in loaded["param_groups"] for i in g["params"]]
    params = [p for g in optimizer.param_groups for p in g["params"]]
    for i, p in zip(saved, params, strict=True):
        for name, value in loaded["state"].get(i, {}).items():
            if isinstance(value, Tensor):
                optimizer.state[p][name] = value.detach().to(p.device, copy=True)
