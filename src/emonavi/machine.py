"""What an emotion is to the optimizer, and what its machines share."""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from emonavi.scalars import Number, isfinite, like, negate, where

__all__ = ["KEPT", "Machine", "Mood", "Options", "Sums", "Weights", "keep", "regular"]


# The numbers in the state of each tensor, as they begin.
KEPT = {"step": 0.0, "drive": 1.0, "trust": 0.0}


class Options(NamedTuple):
    """What the user fixed or a schedule moved, as the emotion needs it (plain numbers or 0-d tensors)."""

    use_trust: bool
    use_shadow: bool
    max_norm: float
    lowest_drive: Number  # where the effective lr of every group reaches its floor
    highest_drive: Number  # where the effective lr of every group reaches max_lr
    hold: float  # the rule's target of trust, in standard deviations below 0
    fall: float  # within the noise the rule's lr falls no faster than age to the minus this
    fades: bool  # the rule's step has the same size whatever the gradient's
    # Of the groups in which something moves:
    decayed: Number  # every lr is below half its peak: a schedule is ending the run
    lr: Number  # the highest


class Weights(NamedTuple):
    """All that trains, before the first step (0-d tensors)."""

    rms: Tensor
    blank: Tensor  # share of them in tensors that are all zero


class Sums(NamedTuple):
    """What one sweep over the tensors gives back: 1-D tensors with one entry for each tensor that was stepped."""

    grad_step: Tensor  # <g, u>: today's gradient with the last step's direction
    grad_grad: Tensor  # <g, g> in the rule's metric
    step_step: Tensor  # <u, u> in the rule's metric
    weight: Tensor  # the tensor's effective lr; 0 where it takes no part


class Mood(NamedTuple):
    """The ready scalars of one update."""

    drive: Number  # multiplies lr, for the step and for weight decay
    scale: Number  # multiplies the step only
    trust: Number | None  # scales what a memory takes in (v4 only)
    grad_scale: Number  # outlier control
    pull: Number  # p moves this far to the shadow before the update: 1 = restored
    follow: Number  # then the shadow moves this far to p
    scalar: Number  # the emotional scalar, for rules that switch by it,
    last_scalar: Number  # and as it was at the last update, whose step reflection looks at


class Machine(Protocol):
    """What an emotion is to the optimizer: a state vector, and pure functions from state to state.

    A step calls ``begin`` (once in a run), ``give_way``, ``look_back``, ``feel`` (where there is a loss), ``guard``,
    ``mood``, ``reflect`` and ``reflect_each``, in this order. A state is a NamedTuple of numbers.
    """

    @property
    def name(self) -> str:
        """As the constructor takes it."""

    @property
    def code(self) -> int:
        """The first entry of the vector."""

    @property
    def defaults(self) -> dict[str, Any]:
        """The options that this emotion has."""

    @property
    def fixed(self) -> dict[str, Any]:
        """The options that it does not let anyone choose."""

    @property
    def keeps(self) -> float:
        """Share of the weights that a step's decay leaves at least."""

    @property
    def corrects_bias(self) -> bool:
        """Whether its rules correct the bias of their memories."""

    @property
    def reflects(self) -> bool:
        """Whether it uses the sums of reflection."""

    def initial(self) -> list[float]: ...
    def index(self, name: str) -> int: ...
    def upgrade(self, vector: Tensor) -> Tensor: ...
    def unpack(self, vector: Tensor, plain: bool = False) -> Any: ...
    def pack(self, state: Any) -> Tensor: ...
    def begin(self, state: Any, weights: Weights, lr: Tensor, options: Options) -> Any: ...
    def feel(self, state: Any, loss: Number, window: Number) -> Any: ...
    def give_way(self, state: Any, lr: Number, use_trust: bool) -> Any: ...
    def look_back(self, state: Any, norm: Number, options: Options) -> tuple[Any, Number]: ...
    def guard(self, state: Any, norm: Tensor, options: Options) -> tuple[Any, Number, Number]: ...
    def mood(self, state: Any, acts: Number, grad_scale: Number, options: Options) -> Mood: ...
    def reflect(self, state: Any, sums: Sums, acted: Number, options: Options) -> Any: ...
    def reflect_each(
        self, state: Any, drive: Tensor, trust: Tensor, count: Tensor, sums: Sums
    ) -> tuple[Tensor, Tensor]: ...
    def should_stop(self, state: Any) -> Number: ...
    def mood_word(self, values: dict[str, float], stop: bool) -> str: ...


def keep(flag: Number, new: Any, old: Any) -> Any:
    """``new`` where the flag is True, else ``old``, entry by entry."""
    if not isinstance(flag, Tensor):
        return new if flag else old
    changed = [i for i, (a, b) in enumerate(zip(new, old, strict=True)) if a is not b and a.dim() == 0]
    news, olds = (torch.stack([state[i] for i in changed]) for state in (new, old))
    kept = dict(zip(changed, torch.where(flag, news, olds).unbind(), strict=True))
    wide = {i: torch.where(flag, a, old[i]) for i, a in enumerate(new) if a.dim()}
    return type(new)._make((kept | wide).get(i, a) for i, a in enumerate(new))


def regular(state: Any, loss: Number, window: Number) -> tuple[Number, Number, Any]:
    """Whether a loss is finite and whether its accumulation window is a usual one, with the state that remembers both.

    A window with another number of backward calls than usual (the last, partial one of an epoch) holds a loss on
    another scale: it is left out. Two such in a row, of whatever numbers, are the new usual: where windows are filled
    up to so many tokens, each has a number of its own, and a run must not go deaf for that.
    """
    finite = isfinite(loss)
    calls = like(loss, window)
    odd = (calls > 0) & (state.window > 0) & (calls != state.window)
    usual = negate(odd) | (state.last_window != state.window)
    state = state._replace(
        window=where((calls > 0) & usual, calls, state.window),
        last_window=where(calls > 0, calls, state.last_window),
        ignored_losses=state.ignored_losses + negate(finite),
    )
    return finite, usual, state
