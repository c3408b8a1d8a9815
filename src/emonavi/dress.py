"""Validate an optimizer for wrapping, add our options to its groups, and check its checkpoints."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

import torch

from emonavi import checks
from emonavi.bearer import Bearer
from emonavi.checkpoint import has_raw, not_torn, same_emotion, same_optimizer, same_shapes
from emonavi.distributed import is_piece, is_sharded
from emonavi.emotion import Emotion
from emonavi.groups import BOUNDS, OF_THE_RUN, of_the_run

if TYPE_CHECKING:
    from emonavi.wrap import Emotional

__all__ = ["OPTIONS", "adaptive", "check", "dress", "fitting", "wrappable"]

# Keys of each group, as the siblings have them.
OPTIONS = ("use_shadow", "use_trust", "max_norm", *BOUNDS)
# For checks.group(): options that the wrapped optimizer has checked itself.
_ITS_OWN = {"betas": (0.0, 0.0), "eps": 0.0, "weight_decay": 0.0, "fused": None}
_NO_CLOSURE = inspect.Parameter("closure", inspect.Parameter.KEYWORD_ONLY, default=None)


def adaptive(given: Any) -> Emotion:
    """The adaptive emotion; ValueError for a published generation."""
    machine = checks.emotion(given)
    if not isinstance(machine, Emotion):
        raise ValueError(
            f"emotion={given!r}: the published generations are rules, too, and cannot be put around another one; "
            "choose 'adaptive', pass an emonavi.Emotion, or use a sibling"
        )
    return machine


def wrappable(optimizer: Any) -> None:
    """Raise if an optimizer cannot be wrapped: it must step without a closure, at the lr that is in its groups."""
    name = type(optimizer).__name__
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise TypeError(f"{optimizer!r} is no torch optimizer: construct one, and pass it")
    if isinstance(optimizer, Bearer):
        raise ValueError(f"{name} has an emotion already: use it as it is")
    if inspect.signature(optimizer.step).parameters.get("closure", _NO_CLOSURE).default is inspect.Parameter.empty:
        raise ValueError(f"{name} evaluates the model by itself: only what can step without a closure can be wrapped")
    if not hasattr(optimizer, "_optimizer_load_state_dict_pre_hooks"):
        remedy = "wrap the optimizer inside it, and put it around that"
        raise ValueError(f"{name} does not load state dicts as torch.optim does, so that no run could resume: {remedy}")
    for group in optimizer.param_groups:
        clash = [option for option in OPTIONS if option in group and "inner" not in group]  # else a wrapper's
        if clash:
            what = f"{name} has {', '.join(clash)} of its own, where the emotion keeps its options"
            raise ValueError(f"{what}: it cannot be wrapped; use it as it is, or a sibling")
    if any("lr" not in group for group in optimizer.param_groups):
        raise ValueError(f"a group of {name} has no lr: there is nothing that a drive could multiply")


def check(group: dict[str, Any], max_norm: Any, min_lr: Any, max_lr: Any) -> None:
    """Raise if a group's lr, our options or its parameters are not usable."""
    checks.group({**_ITS_OWN, "lr": group["lr"], "max_norm": max_norm, "min_lr": min_lr, "max_lr": max_lr})
    checks.parameters(group["params"])
    if any(is_sharded(p) or is_piece(p) for p in group["params"]):
        what = "a parameter is sharded, or a DTensor"
        raise ValueError(f"{what}: around those there is no wrapper; use EmoNavi, EmoFact or EmoLynx")


def dress(optimizer: torch.optim.Optimizer, group: dict[str, Any], options: dict[str, Any]) -> None:
    """Add to a group of a wrapped optimizer what the emotion needs there."""
    group |= of_the_run(group["lr"]) | group | options
    group.setdefault("maximize", bool(getattr(optimizer, "maximize", False)))
    group["inner"] = type(optimizer).__name__


def fitting(state_dict: dict[str, Any], wrapper: Emotional) -> dict[str, Any]:
    """Return the checkpoint; raise ValueError if its emotion, its optimizer or its shapes are not the wrapper's."""
    has_raw(state_dict)
    # Flags, and options that are None, may come from a later version: torch fills them in.
    options = {k for k, v in wrapper.defaults.items() if v is not None and not isinstance(v, bool)}
    saved, name = state_dict["param_groups"][0], type(wrapper.inner).__name__
    if "emotion" in saved:
        same_emotion(state_dict, wrapper._emotion)
        # An earlier version did not store the name. A sibling's groups have an option that a wrapper's never have.
        siblings = "stochastic_rounding" in saved and "stochastic_rounding" not in wrapper.param_groups[0]
        if siblings or saved.get("inner", name) != name:
            whose = "a sibling" if siblings else f"Emotional({saved['inner']})"
            what = f"the checkpoint is of another optimizer, of {whose}"
            raise ValueError(f"{what}: load it into the one that saved it, or start with a fresh one")
        options |= {*OPTIONS, *OF_THE_RUN}
    else:
        not_torn(state_dict, ["step_sample"])
    same_optimizer(state_dict, options, [])
    same_shapes(state_dict, list(wrapper._params()), wrapper._shapes)
    return state_dict
