"""What the constructor, a group, a gradient and a checkpoint must be. Each error names the value and the remedy."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from emonavi.distributed import is_sharded
from emonavi.emotion import Emotion
from emonavi.lowbit import scale_of
from emonavi.machine import Machine
from emonavi.presets import PRESETS, Preset

__all__ = [
    "capture",
    "checkpoint",
    "emotion",
    "fits",
    "frozen",
    "gradients",
    "group",
    "memory",
    "on_missing_loss",
    "options",
    "parameters",
    "process_group",
    "rate",
    "same_optimizer",
    "same_shapes",
    "same_storage",
    "shared",
    "spelled",
    "whole",
    "writer",
]

# What an option is where the emotion does not have it.
NEUTRAL: dict[str, Any] = {"use_shadow": False, "use_trust": False, "max_norm": 0.0, "min_lr": 0.0, "max_lr": None}
NUMBERS = ("lr", "eps", "weight_decay", "max_norm", "min_lr", "max_lr")
# Whether None is a choice, too: that of the emotion, or of the version.
FLAGS = {
    **{"use_shadow": True, "use_trust": True, "foreach": True, "fused": True},
    **{"maximize": False, "capturable": False, "decoupled_weight_decay": False},
    "stochastic_rounding": False,
}
# What is felt is one for all groups, and so is how: a group that asks for something else would not be heard.
SHARED = ("use_shadow", "use_trust", "max_norm", "capturable", "state_dtype")
CONSTRUCTORS = ("emotion", "writer", "capture", "on_missing_loss", "process_group")
WORDS = {"true": True, "1": True, "false": False, "0": False}
# How a command line, or torch, may call the ways to store state.
STATE_DTYPES: dict[Any, str | None] = {
    **dict.fromkeys((None, "none", "fp32", "float32", "torch.float32", torch.float32)),
    **dict.fromkeys(("bf16", "bfloat16", "torch.bfloat16", torch.bfloat16), "bf16"),
    **dict.fromkeys(("8bit", "int8", "uint8", "torch.int8", "torch.uint8", torch.int8, torch.uint8), "8bit"),
}
DENSE_FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def emotion(given: str | Emotion | Preset, generations: Sequence[str] = tuple(PRESETS)) -> Machine:
    """The emotion of a name, or the one given. ``generations`` are those for which the rule was published."""
    if isinstance(given, Emotion):
        for constant, value in vars(given).items():
            if not 0 <= _as_float(value) < math.inf:
                raise ValueError(f"Emotion({constant}={value!r}): give a finite number of at least 0")
    known: dict[str, Machine] = {"adaptive": Emotion(), **{name: PRESETS[name] for name in generations}}
    names = ", ".join(map(repr, known))
    name = given.name if isinstance(given, Preset) else given
    if isinstance(name, str) and name in PRESETS and name not in generations:
        raise ValueError(f"emotion {name!r}: no such rule of this optimizer was published; choose from {names}")
    if isinstance(given, (Emotion, Preset)):
        return given
    if not isinstance(given, str) or given not in known:
        raise ValueError(f"unknown emotion {given!r}: choose from {names}, or pass an emonavi.Emotion")
    return known[given]


def options(machine: Machine, felt: dict[str, Any]) -> dict[str, Any]:
    """The emotion's options, each as given or else as the emotion has it by itself."""
    unknown = [f"{k}={v!r}" for k, v in felt.items() if v is not None and k not in machine.defaults]
    if unknown:
        has = ", ".join(machine.defaults) or "none of these options"
        raise ValueError(f"emotion {machine.name!r} does not have {', '.join(unknown)}: it has {has}; leave it out")
    own = NEUTRAL | machine.fixed | machine.defaults
    if own["min_lr"] > _as_float(felt["max_lr"]) >= 0:
        own["min_lr"] = felt["max_lr"]  # a wall below the default floor takes the floor with it
    return {k: own[k] if v is None else v for k, v in felt.items()}


def spelled(given: dict[str, Any]) -> dict[str, Any]:
    """Options in their own types where they are spelled as strings, or as 0 and 1, as command lines have them.

    Numbers of numpy become Python's: ``weights_only=True`` would not load a checkpoint that holds them.

    Numbers that are none stay as they are: :func:`group` names them together with what they should be.

    Raises:
        ValueError: a flag is neither true nor false.

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


def _state_dtype(given: Any) -> str | None:
    word = given.strip().lower() if isinstance(given, str) else given
    if not isinstance(word, (str, torch.dtype, type(None))) or word not in STATE_DTYPES:
        raise ValueError(f"state_dtype={given!r}: choose None (float32), 'bf16' or '8bit'")
    return STATE_DTYPES[word]


def _pair(given: Any) -> Any:
    parts = given
    if isinstance(given, str):
        parts = given.strip().removeprefix("(").removesuffix(")").removesuffix(",").split(",")
    elif hasattr(given, "tolist"):
        parts = given.tolist()
    if not isinstance(parts, (list, tuple)):
        return given
    numbers = tuple(_number(part) for part in parts)
    return given if any(isinstance(n, str) for n in numbers) else numbers


def _plain(given: Any) -> Any:
    """A scalar of numpy as Python's; all else as it is."""
    alone = getattr(given, "shape", None) == () and not isinstance(given, Tensor)
    return given.item() if alone else given


def _flag(name: str, given: Any) -> bool | None:
    none, given = FLAGS[name], _plain(given)
    word = given.strip().lower() if isinstance(given, str) else None
    if none and (given is None or word == "none"):
        return None
    if word in WORDS:
        return WORDS[word]
    if isinstance(given, (bool, int)) and given in (0, 1):
        return bool(given)
    raise ValueError(f"{name}={given!r}: give True or False{', or None to leave the choice' if none else ''}")


def _number(given: Any, none: bool = False) -> Any:
    if not isinstance(given, str):
        return _plain(given)
    if none and given.strip().lower() == "none":
        return None
    try:
        return float(given)
    except ValueError:
        return given


def capture(given: str | bool) -> bool:
    """Whether to hear the loss at backward."""
    word = given.strip().lower() if isinstance(given, str) else _plain(given)
    if word == "auto":
        return True
    if isinstance(word, str) and word in WORDS:
        return WORDS[word]
    if isinstance(word, (bool, int)) and word in (0, 1):
        return bool(word)
    raise ValueError(f"capture={given!r}: choose 'auto' (hear the loss at backward) or False")


def process_group(given: Any) -> Any:
    """Over which replicas the loss is averaged."""
    word = given.strip().lower() if isinstance(given, str) else given
    if word in ("auto", "none") or word is None:
        return "auto" if word == "auto" else None
    if torch.distributed.is_available() and isinstance(given, torch.distributed.ProcessGroup):
        return given
    raise ValueError(f"process_group={given!r}: choose 'auto' (the default group), None (never), or a process group")


def on_missing_loss(given: str) -> str:
    """What a step without a loss does."""
    if given not in ("warn", "ignore", "error"):
        raise ValueError(f"on_missing_loss={given!r}: choose 'warn', 'ignore' or 'error'")
    return given


def group(merged: dict[str, Any]) -> None:
    """The options of one group, its own and the defaults together."""
    lr = merged["lr"]
    if isinstance(lr, Tensor) and lr.dim():
        raise ValueError(f"lr is a tensor of shape {tuple(lr.shape)}: it must have one element and no dimension")
    # A device's lr is the user's own schedule: reading it here would wait for it.
    _at_least_zero("lr", 0.0 if isinstance(lr, Tensor) and lr.device.type != "cpu" else lr)
    betas = merged["betas"]
    pair = isinstance(betas, Sequence) and not isinstance(betas, str) and len(betas) == 2
    if not pair or not all(0 <= _as_float(b) < 1 for b in betas):
        raise ValueError(f"betas={betas!r}: give two numbers from 0 up to, but not including, 1")
    for name in ("eps", "weight_decay", "max_norm", "min_lr"):
        _at_least_zero(name, merged[name])
    if merged["max_lr"] is not None:
        _at_least_zero("max_lr", merged["max_lr"], "None for no upper bound")
        if merged["max_lr"] < merged["min_lr"]:
            raise ValueError(
                f"max_lr={merged['max_lr']!r} is below min_lr={merged['min_lr']!r}: raise one or lower the other"
            )
    if merged["fused"] and merged["foreach"]:
        raise ValueError("fused=True and foreach=True exclude each other: leave one at None")


def shared(own: dict[str, Any], defaults: dict[str, Any]) -> None:
    """A group's own options ask for nothing that only the constructor can give."""
    for name in (*SHARED, *CONSTRUCTORS):
        value = own.get(name)
        if value is None or isinstance(value, Tensor) or (name in SHARED and value == defaults[name]):
            continue  # a tensor is the emotion of a group that another optimizer had
        raise ValueError(f"{name}={value!r} in a group: it is one for all groups; give it to the constructor")


def _at_least_zero(name: str, value: Any, otherwise: str = "") -> None:
    if not 0 <= _as_float(value) < math.inf:
        raise ValueError(
            f"{name}={value!r}: give a finite number of at least 0{', or ' + otherwise if otherwise else ''}"
        )


def _as_float(value: Any) -> float:
    """A number as one; NaN for what is none. True is a slip, and not 1."""
    is_number = isinstance(value, (int, float, Tensor)) and not isinstance(value, bool)
    return float(value) if is_number else math.nan


def frozen(param: Tensor) -> bool:
    """Whether it is a part of a model that does not train, and so may be of any kind: quantized, say."""
    return isinstance(param, Parameter) and not param.requires_grad


def parameters(params: Sequence[Tensor]) -> None:
    """Parameters that the rules can move, beside frozen ones."""
    for p in params:
        if not frozen(p):
            _movable(p)


def _movable(param: Tensor) -> None:
    if param.dtype in DENSE_FLOATS and param.layout == torch.strided:
        return  # before its shape is asked for, which a lazy module's has not yet
    what = f"a parameter of shape {tuple(param.shape)}"
    if param.dtype not in DENSE_FLOATS:
        remedy = "view a complex one as real with torch.view_as_real, leave others out or without a gradient"
        raise ValueError(f"{what} is {param.dtype}: only real floating-point ones can be optimized; {remedy}")
    raise ValueError(f"{what} is {param.layout}: only dense ones can be optimized; use to_dense()")


def whole(params: Sequence[Tensor], state_dtype: str | None) -> None:
    """Parameters whose blocks of 8-bit state lie on one rank."""
    for p in params:
        if state_dtype == "8bit" and is_sharded(p):
            what = f"state_dtype='8bit' with a DTensor, a parameter of shape {tuple(p.shape)}"
            raise ValueError(f"{what}: a shard would end inside a block; choose 'bf16' or None")


def gradients(grads: Sequence[Tensor | None]) -> None:
    """Gradients that the rules can take in."""
    for grad in grads:
        if grad is not None and grad.layout is not torch.strided:
            what = f"a gradient of shape {tuple(grad.shape)} is {grad.layout}"
            raise RuntimeError(f"{what}: only dense ones can be used; build the embedding with sparse=False")


def rate(lr: Any) -> None:
    """An lr as a scheduler, or the user, has left it in a group."""
    if not math.isfinite(_as_float(_plain(lr))):
        raise ValueError(f"lr={lr!r} in a group: a step needs a finite number; see who wrote it, or set it anew")


def memory(params: Sequence[Tensor]) -> None:
    """Parameters with a gradient that lie somewhere, and that the rules can move."""
    for p in params:
        _movable(p)
        if p.is_meta:
            what = f"a parameter of shape {tuple(p.shape)} is on the meta device, where nothing can be moved"
            raise RuntimeError(f"{what}: load the model first, or give it memory with model.to_empty(device=...)")


def fits(param: Tensor, state: Mapping[str, Any], shapes: Mapping[str, torch.Size]) -> None:
    """State and gradient of the shapes that a parameter's own asks for, and each element in a place of its own.

    The data may have been replaced since the parameter was taken in.
    """
    what = f"a parameter of shape {tuple(param.shape)}"
    if param.grad is not None and param.grad.shape != param.shape:
        raise RuntimeError(f"{what} has a gradient of shape {tuple(param.grad.shape)}: call zero_grad() first")
    if any(size > 1 and not stride for size, stride in zip(param.shape, param.stride(), strict=True)):
        raise RuntimeError(f"{what} is expanded, so that its elements share memory: make it of a clone()")
    for name, shape in {**shapes, "shadow": param.shape}.items():
        if name in state and state[name].shape != shape:
            remedy = "where its data were replaced, del optimizer.state[parameter] lets it begin afresh"
            raise RuntimeError(f"{what} has {name} of shape {tuple(state[name].shape)}: {remedy}")


def checkpoint(state_dict: dict[str, Any], machine: Machine) -> None:
    """A checkpoint that was made with this emotion."""
    groups = state_dict.get("param_groups") or [{}]
    vector = groups[0].get("emotion")
    if not isinstance(vector, Tensor):
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


def same_storage(state_dict: dict[str, Any], state_dtype: str | None) -> None:
    """A checkpoint whose memories are stored alike."""
    saved = state_dict["param_groups"][0].get("state_dtype")
    if saved != state_dtype:
        raise ValueError(
            f"the checkpoint was saved with state_dtype={saved!r}, this optimizer has {state_dtype!r}: construct it "
            f"with state_dtype={saved!r}"
        )


def same_optimizer(state_dict: dict[str, Any], options: set[str], layouts: Sequence[tuple[str, ...]]) -> None:
    """A checkpoint of the same optimizer: its groups have these options, and its parameters in turn these memories."""
    groups = state_dict["param_groups"]
    lacking, foreign = sorted(options - set(groups[0])), list[str]()
    saved = [i for g in groups for i in g["params"]]
    # Another number of parameters is torch's to refuse.
    for i, layout in zip(saved, layouts, strict=False):
        kept = state_dict["state"].get(i)
        lacking += [name for name in layout if kept and name not in kept]
        own = {*layout, *map(scale_of, layout)}
        foreign += [name for name in kept or () if layout and name.startswith("exp_avg") and name not in own]
    if foreign and not lacking:
        what = f"it holds {', '.join(dict.fromkeys(foreign))} besides"
        raise ValueError(f"the checkpoint is of another optimizer: {what}; load it into the optimizer that saved it")
    if lacking:
        raise ValueError(
            f"the checkpoint is of another optimizer: it does not hold {', '.join(dict.fromkeys(lacking))}; load it "
            "into the optimizer that saved it, or start with a fresh one"
        )


def same_shapes(state_dict: dict[str, Any], shapes: Sequence[Mapping[str, torch.Size]]) -> None:
    """A checkpoint of a model of the same shapes. torch does not compare them."""
    saved = [i for g in state_dict["param_groups"] for i in g["params"]]
    for place, (i, own) in enumerate(zip(saved, shapes, strict=False)):
        for name, memory in state_dict["state"].get(i, {}).items():
            if name in own and memory.shape != own[name]:
                what = f"{name} of parameter {place} is {tuple(memory.shape)}, here {tuple(own[name])}"
                raise ValueError(
                    f"the checkpoint is of a model of other shapes: {what}; load it with the model that it was saved "
                    "with, or start with a fresh optimizer"
                )


def writer(given: Any) -> Any:
    """An object with ``add_scalar``; a path becomes a TensorBoard writer on that directory."""
    if isinstance(given, (str, os.PathLike)):
        path = os.path.expanduser(given)  # no shell has done it where a trainer's command line passes the string
        if path.strip().lower() == "none":
            return None
        if not path.strip() or path.strip().lower() in WORDS:
            raise ValueError(f"writer={given!r}: name a log directory for TensorBoard, or leave it out")
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise ImportError(f"writer={given!r} needs TensorBoard: pip install tensorboard") from error
        try:
            return SummaryWriter(log_dir=path)
        except OSError as error:
            remedy = "name a directory that can be written"
            raise type(error)(error.errno, f"writer={given!r}: {error.strerror}; {remedy}", path) from error
    if not callable(getattr(given, "add_scalar", None)):
        raise TypeError(
            f"writer={given!r} has no add_scalar(tag, value, step): pass a SummaryWriter or a log directory"
        )
    return given
