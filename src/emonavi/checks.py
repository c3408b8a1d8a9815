"""Checks of options, groups, parameters and gradients. Each error names the value and the remedy."""

from __future__ import annotations

import ast
import contextlib
import dataclasses
import math
import os
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from emonavi.distributed import is_sharded
from emonavi.emotion import Emotion
from emonavi.machine import Machine
from emonavi.presets import PRESETS, Preset
from emonavi.spelling import plain, truth, word

__all__ = [
    "emotion",
    "fits",
    "frozen",
    "gradients",
    "group",
    "left",
    "mapping",
    "movable",
    "options",
    "parameters",
    "settings",
    "shared",
    "whole",
    "writer",
]

# Options that an emotion does not have are set to these.
NEUTRAL: dict[str, Any] = {"use_shadow": False, "use_trust": False, "max_norm": 0.0, "min_lr": 0.0, "max_lr": None}
# There is one emotion for all groups, so these are options of all groups: a group cannot have its own.
SHARED = ("use_shadow", "use_trust", "max_norm", "capturable", "state_dtype")
CONSTRUCTORS = ("emotion", "writer", "capture", "on_missing_loss", "process_group")
ROUNDING = 1e-12  # a cosine may end a little below 0
DENSE_FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def emotion(given: Any, generations: Sequence[str] = tuple(PRESETS)) -> Machine:
    """The emotion of a name or of constants, or the one given. ``generations``: those with a published rule."""
    if isinstance(given, str) and given.strip().startswith("{"):  # a dict, as a command line passes it
        with contextlib.suppress(ValueError, SyntaxError):
            given = ast.literal_eval(given.strip())
    if isinstance(given, Mapping):
        constants = [field.name for field in dataclasses.fields(Emotion)]
        if not set(given) <= set(constants):
            raise ValueError(f"emotion={given!r}: the constants of an emotion are {', '.join(constants)}")
        given = Emotion(**given)
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
        raise ValueError(
            f"unknown emotion {given!r}: choose from {names}, or pass an emonavi.Emotion or a dict of its constants"
        )
    return known[given]


def options(machine: Machine, asked: dict[str, Any]) -> dict[str, Any]:
    """The emotion's options, each as given, or else the emotion's default."""
    unknown = [f"{k}={v!r}" for k, v in asked.items() if v is not None and k not in machine.defaults]
    if unknown:
        has = ", ".join(machine.defaults) or "none of these options"
        raise ValueError(f"emotion {machine.name!r} does not have {', '.join(unknown)}: it has {has}; leave it out")
    own = NEUTRAL | machine.fixed | machine.defaults
    if own["min_lr"] > _as_float(asked["max_lr"]) >= 0:
        own["min_lr"] = asked["max_lr"]  # a max_lr below the default min_lr lowers that, too
    return {k: own[k] if v is None else v for k, v in asked.items()}


def settings(hears: str | bool, missing: str, group: Any) -> tuple[bool, str, Any]:
    """Check what is not part of a checkpoint: capture, on_missing_loss and process_group."""
    return capture(hears), on_missing_loss(missing), process_group(group)


def capture(given: str | bool) -> bool:
    """Whether to hear the loss at backward."""
    hears = True if word(given) == "auto" else truth(given)
    if hears is None:
        raise ValueError(f"capture={given!r}: choose 'auto' (hear the loss at backward) or False")
    return hears


def process_group(given: Any) -> Any:
    """``"auto"``, None, or the process group over which losses are averaged."""
    said = word(given)
    if said in ("auto", "none") or said is None:
        return "auto" if said == "auto" else None
    if torch.distributed.is_available() and isinstance(given, torch.distributed.ProcessGroup):
        return given
    raise ValueError(f"process_group={given!r}: choose 'auto' (the default group), None (never), or a process group")


def on_missing_loss(given: str) -> str:
    """Check what a step without a loss does."""
    if given not in ("warn", "ignore", "error"):
        raise ValueError(f"on_missing_loss={given!r}: choose 'warn', 'ignore' or 'error'")
    return given


def group(merged: dict[str, Any]) -> None:
    """Check the options of one group, merged with the defaults."""
    lr = merged["lr"]
    if isinstance(lr, Tensor) and lr.dim():
        raise ValueError(f"lr is a tensor of shape {tuple(lr.shape)}: it must have one element and no dimension")
    # An lr on a device is not read: that would wait.
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


def mapping(param_group: Any) -> None:
    """Raise if a parameter group is not a dict."""
    if not isinstance(param_group, dict):
        raise TypeError(f'a parameter group is a dict, {{"params": [...]}}: got a {type(param_group).__name__}')


def shared(own: dict[str, Any], defaults: dict[str, Any]) -> None:
    """Raise if a group asks for something that only the constructor can give."""
    for name in (*SHARED, *CONSTRUCTORS):
        value = own.get(name)
        if value is None or isinstance(value, Tensor) or (name in SHARED and value == defaults.get(name)):
            continue  # a tensor is the state vector of a group that another optimizer had
        raise ValueError(f"{name}={value!r} in a group: it is one for all groups; give it to the constructor")


def _at_least_zero(name: str, value: Any, otherwise: str = "") -> None:
    if not 0 <= _as_float(value) < math.inf:
        raise ValueError(
            f"{name}={value!r}: give a finite number of at least 0{', or ' + otherwise if otherwise else ''}"
        )


def _as_float(value: Any) -> float:
    """A number as a float; NaN for anything else. True is a mistake, and not 1."""
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return float(value) if is_number or (isinstance(value, Tensor) and value.numel() == 1) else math.nan


def frozen(param: Tensor) -> bool:
    """Whether a parameter does not train, so that it may be of any kind, for example quantized."""
    return isinstance(param, Parameter) and not param.requires_grad


def parameters(params: Sequence[Tensor]) -> None:
    """Raise if the rules cannot move a parameter that is not frozen."""
    for p in params:
        if not frozen(p):
            _real_and_dense(p)
            _not_localized(p)


def _real_and_dense(param: Tensor) -> None:
    if param.dtype in DENSE_FLOATS and param.layout == torch.strided:
        return  # first: a lazy parameter has no shape yet
    what = f"a parameter of shape {tuple(param.shape)}"
    if param.dtype not in DENSE_FLOATS:
        remedy = "view a complex one as real with torch.view_as_real, leave others out or without a gradient"
        raise ValueError(f"{what} is {param.dtype}: only real floating-point ones can be optimized; {remedy}")
    raise ValueError(f"{what} is {param.layout}: only dense ones can be optimized; use to_dense()")


def _not_localized(param: Tensor) -> None:
    """Raise for the plain tensor that DistributedDataParallel makes of a tensor-parallel parameter."""
    if hasattr(param, "_st_info"):
        raise ValueError(
            f"a parameter of shape {tuple(param.shape)} is a part of a tensor-parallel one that "
            "DistributedDataParallel has made plain: taken for the whole, it would let the ranks drift apart. After "
            'parallelize_module() use fully_shard(model, mesh=mesh["dp"]), or replicate(model, mesh=mesh["dp"]) of '
            "torch.distributed._composable.replicate_with_fsdp, in its place"
        )


def whole(params: Sequence[Tensor], state_dtype: str | None) -> None:
    """Raise if a block of 8-bit state would lie on several ranks."""
    for p in params:
        if state_dtype == "8bit" and is_sharded(p):
            what = f"state_dtype='8bit' with a DTensor, a parameter of shape {tuple(p.shape)}"
            raise ValueError(f"{what}: a shard would end inside a block; choose 'bf16' or None")


def gradients(grads: Sequence[Tensor | None]) -> None:
    """Raise if a gradient is not dense."""
    for grad in grads:
        if grad is not None and grad.layout is not torch.strided:
            what = f"a gradient of shape {tuple(grad.shape)} is {grad.layout}"
            raise RuntimeError(f"{what}: only dense ones can be used; build the embedding with sparse=False")


def left(group: Mapping[str, Any]) -> None:
    """Raise if what a scheduler or the user has left in a group is no number to step by; a device is not asked."""
    for name in ("lr", "lr_floor", "lr_ceiling", "weight_decay"):
        value = group.get(name)
        # A wrapped optimizer's weight decay may be anything; no ceiling may be infinity, too.
        given = name == "lr" or (isinstance(value, (int, float)) and not (name == "lr_ceiling" and value == math.inf))
        on_device = isinstance(value, Tensor) and value.device.type != "cpu"
        if given and not on_device and not -ROUNDING <= _as_float(plain(value)) < math.inf:
            what = f"{name}={value!r} in a group: a step needs a finite number of at least 0"
            raise ValueError(f"{what}; see who wrote it (a scheduler that ran past its end?), or set it anew")


def movable(params: Sequence[Tensor]) -> None:
    """Raise if the rules cannot move a parameter that has a gradient, or if it is on the meta device."""
    for p in params:
        _real_and_dense(p)
        if p.is_meta:
            what = f"a parameter of shape {tuple(p.shape)} is on the meta device, where nothing can be moved"
            raise RuntimeError(f"{what}: load the model first, or give it memory with model.to_empty(device=...)")


def fits(param: Tensor, state: Mapping[str, Any], shapes: Mapping[str, torch.Size]) -> None:
    """Raise if gradient or state do not fit a parameter's shape, or if its elements share memory.

    The parameter's data may have been replaced since it was added.
    """
    what = f"a parameter of shape {tuple(param.shape)}"
    if param.grad is not None and param.grad.shape != param.shape:
        raise RuntimeError(f"{what} has a gradient of shape {tuple(param.grad.shape)}: call zero_grad() first")
    if any(size > 1 and not stride for size, stride in zip(param.shape, param.stride(), strict=True)):
        raise RuntimeError(f"{what} is expanded, so that its elements share memory: make it of a clone()")
    for name, shape in shapes.items():
        if getattr(state.get(name), "shape", shape) != shape:
            remedy = "where its data were replaced, del optimizer.state[parameter] lets it begin afresh"
            raise RuntimeError(f"{what} has {name} of shape {tuple(state[name].shape)}: {remedy}")


def writer(given: Any) -> Any:
    """Return an object with ``add_scalar``; a path becomes a TensorBoard writer of that directory."""
    if isinstance(given, (str, os.PathLike)):
        path = os.path.expanduser(given)  # in a trainer's command line the shell may not have done it
        if word(path) == "none":
            return None
        if not path.strip() or truth(path) is not None:
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
