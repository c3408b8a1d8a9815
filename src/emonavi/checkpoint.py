"""Loading state as it was saved, and what another optimizer saved."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from emonavi.intake import callers_level
from emonavi.machine import KEPT

__all__ = ["load_exactly", "taken_over"]


def load_exactly(
    load: Callable[[dict[str, Any]], None],
    optimizer: torch.optim.Optimizer,
    state_dict: dict[str, Any],
    fitting: Callable[[dict[str, Any]], dict[str, Any]],
) -> None:
    """Load with torch's own ``load``, then restore each state tensor in the dtype that it was saved in.

    torch casts state to the parameter's dtype (pytorch#43706), which rounds the float32 memories of 16-bit
    parameters, and shares tensors with the dict. A resumed run would then not be the same run. ``fitting`` returns the
    dict to load, or raises where there is none, before anything changes.
    """
    loaded: dict[str, Any] = {}

    def look(_: torch.optim.Optimizer, final: dict[str, Any]) -> dict[str, Any]:
        # Hooks registered by others may have replaced the dict: this one runs last and sees what is loaded.
        loaded.update(fitting(final))
        return loaded

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


def taken_over(
    state_dict: dict[str, Any],
    own: dict[str, Any],
    shapes: Sequence[torch.Size],
    layouts: Sequence[tuple[str, ...]],
    stored: Callable[[int, dict[str, Tensor]], dict[str, Tensor]],
) -> dict[str, Any] | None:
    """The checkpoint of an optimizer without an emotion as one of this: its memories under the own options.

    The names are torch's, so that this holds for ``torch.optim.AdamW`` as for the published EmoNavi. That one counts no
    steps: its memories pass for old ones, whose bias is gone.

    Args:
        state_dict: of the other optimizer. What it holds beside memories, under whatever keys, is left out.
        own: state dict of this one as it was made, with a fresh emotion.
        shapes: of the parameters in turn.
        layouts: names of their memories in turn.
        stored: makes of a parameter's place and its memories what is kept of them.

    Returns:
        A state dict to load, or None where the other holds no such memories.
    """
    saved = [list(g["params"]) for g in state_dict["param_groups"]]
    if [len(ids) for ids in saved] != [len(g["params"]) for g in own["param_groups"]]:
        return None
    groups = [{**g, "params": ids} for g, ids in zip(own["param_groups"], saved, strict=True)]
    state: dict[Any, dict[str, Tensor]] = {}
    old = [10 / (1 - max(g["betas"])) for g in groups for _ in g["params"]]
    for place, (i, shape, layout, unknown) in enumerate(
        zip([i for ids in saved for i in ids], shapes, layouts, old, strict=True)
    ):
        kept = state_dict["state"].get(i)
        if not kept:
            continue  # it never had a gradient
        if any(getattr(kept.get(name), "shape", None) != shape for name in layout):
            return None
        scalars = KEPT | {"step": float(kept.get("step", unknown))}
        state[i] = {name: torch.tensor(value, dtype=torch.float32) for name, value in scalars.items()}
        state[i] |= stored(place, {name: kept[name] for name in layout})
    if not state:
        return None
    names = ", ".join(dict.fromkeys(name for layout in layouts for name in layout))
    warnings.warn(
        f"the checkpoint is of an optimizer without an emotion: {names} of {len(state)} parameters were taken over, "
        "the emotion begins afresh, and all options, lr among them, stay as they were constructed",
        stacklevel=callers_level(),
    )
    return {"state": state, "param_groups": groups}
