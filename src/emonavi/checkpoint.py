"""Loading state exactly as it was saved, also that of another optimizer.

What does not fit is refused before anything changes, with an error that names the value and the remedy.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from emonavi import checks, lowbit
from emonavi.distributed import is_sharded
from emonavi.emotion import Emotion
from emonavi.groups import BOUNDS, OF_THE_RUN, no_peak
from emonavi.machine import KEPT, Machine
from emonavi.notices import callers_level
from emonavi.presets import PRESETS
from emonavi.spelling import FLAGS, NUMBERS

if TYPE_CHECKING:
    from emonavi.optimizer import EmoOptimizer

__all__ = [
    "LATER",
    "has_raw",
    "load_exactly",
    "loadable",
    "not_torn",
    "same_emotion",
    "same_optimizer",
    "same_shapes",
]

# Options that earlier versions did not have, with the values that match their behaviour.
LATER: dict[str, Any] = {"state_dtype": None, "stochastic_rounding": False}


def load_exactly(
    load: Callable[[dict[str, Any]], None],
    optimizer: torch.optim.Optimizer,
    state_dict: dict[str, Any],
    fitting: Callable[[dict[str, Any]], dict[str, Any]],
    as_placed: bool = False,
) -> None:
    """Load with torch's own ``load``, then restore each state tensor in the dtype that it was saved in.

    torch casts state to the parameter's dtype (pytorch#43706), which rounds the float32 memories of 16-bit
    parameters, and shares tensors with the dict. A resumed run would not be the same run. ``fitting`` returns the dict
    to load, or raises before anything changes. Tensors go to their parameter's device, or with ``as_placed`` to where
    torch puts them: the step counts of most optimizers stay on the CPU.
    """
    loaded: dict[str, Any] = {}

    def look(_: torch.optim.Optimizer, final: dict[str, Any]) -> dict[str, Any]:
        if not final.get("param_groups") or "state" not in final:
            held = ", ".join(map(str, final)) or "nothing"
            raise ValueError(f"this is no state dict of an optimizer, it holds {held}: pass what state_dict() returned")
        # This hook runs last, so it sees the dict that is loaded, even if another hook has replaced it.
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
                device = optimizer.state[p][name].device if as_placed else p.device
                optimizer.state[p][name] = value.detach().to(device, copy=True)


def loadable(state_dict: dict[str, Any], optimizer: EmoOptimizer) -> dict[str, Any]:
    """Return a checkpoint that this sibling can load; refuse one with another emotion or other memories.

    Raises:
        ValueError: the checkpoint is of another emotion, another optimizer or a model of other shapes, or has lost its
            emotion.
    """
    has_raw(state_dict)
    params = list(optimizer._params())
    layouts = [() if is_lazy(p) else optimizer._layout(p) for p in params]
    if "emotion" not in state_dict["param_groups"][0]:
        not_torn(state_dict, KEPT)
        state_dict = _taken_over(state_dict, optimizer, params, layouts) or state_dict
    same_emotion(state_dict, optimizer._emotion)
    _same_storage(state_dict, optimizer.param_groups[0]["state_dtype"])
    # Only our own of the defaults: torch and others may add to them.
    options = {*NUMBERS, *FLAGS, "betas"} & set(optimizer.defaults) - {*BOUNDS.values(), *LATER}
    same_optimizer(state_dict, options | {*BOUNDS, *OF_THE_RUN}, layouts)
    same_shapes(state_dict, params, optimizer._shapes)
    return state_dict


def _taken_over(
    state_dict: dict[str, Any], optimizer: EmoOptimizer, params: Sequence[Tensor], layouts: Sequence[tuple[str, ...]]
) -> dict[str, Any] | None:
    """Convert the checkpoint of an optimizer without an emotion: its memories, with this optimizer's options.

    The names are torch's, so this works for ``torch.optim.AdamW`` and for the published EmoNavi. The latter counts no
    steps: its memories are taken for old ones, without a bias to correct. Anything else in it is left out.

    Returns:
        A state dict to load, with a fresh emotion, or None where the other holds no such memories.
    """
    # Not from state_dict(), which runs the user's hooks.
    own = [{**g, "lr_peak": no_peak(g["lr"])} for g in optimizer.param_groups]
    own[0] |= {"emotion": optimizer._fresh(), "shown": "raw"}
    saved = [list(g["params"]) for g in state_dict["param_groups"]]
    if [len(ids) for ids in saved] != [len(g["params"]) for g in own]:
        return None
    groups = [{**g, "params": ids} for g, ids in zip(own, saved, strict=True)]
    places = [(i, 10 / (1 - max(g["betas"]))) for g in groups for i in g["params"]]  # steps without bias
    state: dict[Any, dict[str, Tensor]] = {}
    for (i, old), param, layout in zip(places, params, layouts, strict=True):
        kept = state_dict["state"].get(i)
        if not kept:
            continue  # a parameter without a gradient so far
        if any(getattr(kept.get(name), "shape", None) != param.shape for name in layout):
            return None
        scalars = KEPT | {"step": float(kept.get("step", old))}
        state[i] = {
            name: torch.tensor(value, dtype=torch.float32, device=param.device) for name, value in scalars.items()
        }
        memories = {name: kept[name] for name in layout}
        # The state of a sharded tensor is not converted to fewer bits.
        state[i] |= memories if is_sharded(param) else lowbit.filled(optimizer._memories(param), param, memories)
    if not state:
        return None
    names = ", ".join(dict.fromkeys(name for layout in layouts for name in layout))
    warnings.warn(
        f"the checkpoint is of an optimizer without an emotion: {names} of {len(state)} parameters were taken over, "
        "the emotion begins afresh, and all options, lr among them, stay as they were constructed; a scheduler that is "
        "resumed as well puts its own lr back",
        stacklevel=callers_level(),
    )
    return {"state": state, "param_groups": groups}


def not_torn(state_dict: dict[str, Any], ours: Collection[str]) -> None:
    """Raise if a checkpoint without an emotion has states of these names, which only we make."""
    kept = [state_dict["state"].get(i, ()) for g in state_dict["param_groups"] for i in g["params"]]
    if any(all(name in state for name in ours) for state in kept):
        raise ValueError(
            "the checkpoint has lost its emotion: it holds memories, but not the options of their group. In torch's "
            "nested layout the stages of a pipeline write theirs over each other: save and load with "
            "StateDictOptions(flatten_optimizer_state_dict=True)"
        )


def same_emotion(state_dict: dict[str, Any], machine: Machine) -> None:
    """Raise if a checkpoint was made with another emotion."""
    vector = state_dict["param_groups"][0].get("emotion")
    if not isinstance(vector, Tensor) or vector.dim() != 1 or len(vector) < 2:
        remedy = "load it into the optimizer that saved it, or start with a fresh one"
        raise ValueError(f"the checkpoint holds no emotion, as this optimizer's {machine.name!r}: {remedy}")
    machines: list[Machine] = [Emotion(), *PRESETS.values()]
    vector = machine.upgrade(vector)
    (code, version), own = vector[:2].tolist(), machine.initial()
    if [code, version, len(vector)] != [*own[:2], len(own)]:
        found = next((e.name for e in machines if e.code == code), f"unknown, code {code:g}")
        saved = f"the checkpoint was saved with emotion {found!r} (version {version:g}, {len(vector)} entries)"
        mine = f"this optimizer has {machine.name!r} (version {own[1]:g}, {len(own)} entries)"
        raise ValueError(f"{saved}, {mine}: construct it with the emotion, and the emonavi, that saved it")
    checks.emotion(state_dict["param_groups"][0].get("emotion_constants", "{}"))  # raises for unknown ones


def has_raw(state_dict: dict[str, Any]) -> None:
    """Raise if a checkpoint that was saved with the shadow in place of the weights has lost the weights."""
    shown = state_dict["param_groups"][0].get("shown", "raw")
    if shown == "shadow" and any("shadow" in kept and "raw" not in kept for kept in state_dict["state"].values()):
        raise ValueError(
            "the checkpoint was saved inside calm() or after eval(), and the weights that train are not there. A "
            "distributed checkpoint is loaded into what is there already: make the state by "
            "get_optimizer_state_dict(), and load optimizer and model inside of `with optimizer.calm():`"
        )


def _same_storage(state_dict: dict[str, Any], state_dtype: str | None) -> None:
    """Raise if a checkpoint has another ``state_dtype``."""
    saved = state_dict["param_groups"][0].get("state_dtype")
    if saved != state_dtype:
        raise ValueError(
            f"the checkpoint was saved with state_dtype={saved!r}, this optimizer has {state_dtype!r}: construct it "
            f"with state_dtype={saved!r}"
        )


def same_optimizer(state_dict: dict[str, Any], options: set[str], layouts: Sequence[tuple[str, ...]]) -> None:
    """Raise unless a checkpoint's groups have these options and its parameters, in turn, these memories."""
    groups = state_dict["param_groups"]
    lacking, foreign = sorted(options - set(groups[0])), list[str]()
    saved = [i for g in groups for i in g["params"]]
    # torch refuses another number of parameters.
    for i, layout in zip(saved, layouts, strict=False):
        kept = state_dict["state"].get(i)
        lacking += [name for name in (*layout, *KEPT) if kept and name not in kept]
        own = {*layout, *map(lowbit.scale_of, layout)}
        foreign += [name for name in kept or () if layout and name.startswith("exp_avg") and name not in own]
    if foreign and not lacking:
        what = f"it holds {', '.join(dict.fromkeys(foreign))} besides"
        raise ValueError(f"the checkpoint is of another optimizer: {what}; load it into the optimizer that saved it")
    if lacking:
        raise ValueError(
            f"the checkpoint is of another optimizer: it does not hold {', '.join(dict.fromkeys(lacking))}; load it "
            "into the optimizer that saved it, or start with a fresh one"
        )


def same_shapes(
    state_dict: dict[str, Any], params: Sequence[Tensor], shapes: Callable[[Tensor], dict[str, torch.Size]]
) -> None:
    """Raise if memories in a checkpoint have other shapes than here. torch does not compare them."""
    saved = [i for g in state_dict["param_groups"] for i in g["params"]]
    for place, (i, param) in enumerate(zip(saved, params, strict=False)):
        kept = state_dict["state"].get(i, {})
        own = shapes(param) if kept and not is_lazy(param) else {}  # a frozen one may be of any kind
        for name, memory in kept.items():
            if name in own and isinstance(memory, Tensor) and memory.shape != own[name]:
                what = f"{name} of parameter {place} is {tuple(memory.shape)}, here {tuple(own[name])}"
                raise ValueError(
                    f"the checkpoint is of a model of other shapes: {what}; load it with the model that it was saved "
                    "with, or start with a fresh optimizer"
                )
