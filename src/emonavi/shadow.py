"""The shadow: a float32 copy of each parameter, in its state, that follows it slowly (``docs/emotion.md``).

A panic pulls the parameters to it, and ``calm()`` and ``eval()`` show it in their place. What trains is in the state
then, as ``raw``.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from emonavi import kernels
from emonavi.distributed import local
from emonavi.pieces import pieces
from emonavi.scalars import Number, like
from emonavi.sweep import wide

__all__ = [
    *("drop", "follow_idle", "forget", "hide", "is_shown", "lean", "make", "put_back", "replaced", "show", "versions"),
]

States = Mapping[Tensor, dict[str, Any]]  # an optimizer's ``state``


def make(param: Tensor, state: dict[str, Any]) -> None:
    """Make a parameter's shadow if it is missing."""
    if "shadow" not in state:
        state["shadow"] = wide(param.detach()).clone()


def drop(params: Iterable[Tensor], states: States) -> None:
    """Drop the shadows when they are switched off: an old one would count as current if switched on again."""
    for p in params:
        states.get(p, {}).pop("shadow", None)


def show(params: Sequence[Tensor], states: States) -> None:
    """Put the shadows in place of these parameters, which have one, and keep the parameters in the states."""
    raw = [p.detach().clone() for p in params]  # all of them before the first is kept: memory may run out
    for p, kept in zip(params, raw, strict=True):
        states[p]["raw"] = kept
    _copy(params, [states[p]["shadow"] for p in params])


def hide(states: States) -> None:
    """Put back the parameters that :func:`show` kept."""
    held = replaced(states)
    put_back({p: states[p]["raw"] for p in held})
    forget(held, states)


def put_back(raw: Mapping[Tensor, Tensor]) -> None:
    """Give parameters their values again."""
    _copy(list(raw), list(raw.values()))


def forget(params: Iterable[Tensor], states: States) -> None:
    """Drop what :func:`show` kept of these parameters, which stay as they are."""
    for p in params:
        states[p].pop("raw", None)


def replaced(states: States) -> list[Tensor]:
    """The parameters that :func:`show` has kept."""
    return [p for p, state in states.items() if "raw" in state]


def is_shown(param: Tensor, state: Mapping[str, Any]) -> bool:
    """Whether a parameter has the values of its shadow, or these in 16 bits, as a model may have been saved.

    Waits for the device.
    """
    if "shadow" not in state:
        return True
    here, shown = local(param.detach()), local(state["shadow"]).to(param.device)
    return any(torch.equal(here, shown.to(kind).to(here)) for kind in (here.dtype, torch.float16, torch.bfloat16))


def versions(states: States) -> int:
    """A number that is another one once a parameter was written to, other than through ``.data``."""
    return sum(p._version for p in states if isinstance(p, Tensor))


@torch.no_grad()
def _copy(to: Sequence[Tensor], source: Sequence[Tensor]) -> None:
    if to:
        torch._foreach_copy_([local(t.detach()) for t in to], [local(t.detach()) for t in source])


def follow_idle(
    params: Iterable[Tensor], states: States, moved: Collection[Tensor], follow: Number, fused: bool
) -> None:
    """Let the shadows of parameters that did not move follow as well.

    Otherwise calm() would show an old value of a weight that seldom has a gradient, or is frozen by now.
    """
    busy, pairs = set(moved), []
    for p in params:
        shadow = states.get(p, {}).get("shadow") if p not in busy else None
        if shadow is not None and not p.is_meta:
            own = local(shadow)
            pairs.append((local(p.detach()).to(own.device), own))
    lean(pairs, 0.0, follow, fused)


def lean(pairs: Sequence[tuple[Tensor, Tensor]], pull: Number, follow: Number, fused: bool) -> None:
    """Move parameters by ``pull`` towards their shadows, then the shadows by ``follow`` towards them.

    ``fused`` uses a kernel if there is one.
    """
    pulls, follows = (isinstance(rate, Tensor) or rate != 0 for rate in (pull, follow))
    if not (pulls or follows):
        return
    kinds: dict[Any, list[tuple[Tensor, Tensor]]] = {}
    for param, shadow in pairs:
        kinds.setdefault((param.device, param.dtype, shadow.dtype), []).append((param, shadow))
    for alike in kinds.values():
        params, shadows = map(list, zip(*alike, strict=True))
        if not fused or pulls or not kernels.follow(params, shadows, float(follow)):
            _lean_alike(params, shadows, pull if pulls else None, follow if follows else None)


def _lean_alike(params: list[Tensor], shadows: list[Tensor], pull: Number | None, follow: Number | None) -> None:
    """The same by torch, for parameters of one device and dtype, and shadows of one; None moves nothing."""
    for piece in pieces({"param": params, "shadow": shadows}, cut=True, stack=True):
        param, shadow = piece.batch["param"], piece.batch["shadow"]
        weights = wide(param).to(shadow.dtype)
        if pull is not None:
            param.copy_(_finite(torch.lerp(weights, shadow, like(shadow, pull)), weights))
            piece.write_back(["param"])
            weights = wide(param).to(shadow.dtype)
        if follow is not None:
            shadow.lerp_(weights, like(shadow, follow))
            if isinstance(follow, Tensor) or not shadow.sum().isfinite():  # on a device nobody looks
                shadow.copy_(_finite(shadow, weights))
            piece.write_back(["shadow"])


def _finite(moved: Tensor, weights: Tensor) -> Tensor:
    """What has moved, but the weights where it is not finite: between infinities, as in a mask, lerp makes NaN."""
    return torch.where(moved.isfinite(), moved, weights)
