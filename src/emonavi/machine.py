"""The interface between an emotion and the optimizer, and what the emotions share."""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from emonavi.scalars import Number, isfinite, like, negate, where

__all__ = ["KEPT", "Loss", "Machine", "Mood", "Options", "Sums", "Weights", "keep", "regular"]


# The scalars in the state of each tensor, with their initial values.
KEPT = {"step": 0.0, "drive": 1.0, "trust": 0.0}


class Options(NamedTuple):
    """Options and lrs as the emotion needs them (plain numbers or 0-d tensors)."""

    use_trust: bool
    max_norm: float
    lowest_drive: Number  # where the effective lr of every group reaches its floor
    highest_drive: Number  # where the effective lr of every group reaches max_lr
    target: float  # the rule's target of trust, in standard deviations of the cosine
    fall: float  # within the noise the lr falls no faster than age^-fall
    fades: bool  # the size of the rule's step does not depend on that of gradients
    # Over the groups in which something moves:
    decayed: Number  # every lr is below half its peak: a schedule is ending the run
    lr: Number  # the highest lr


class Loss(NamedTuple):
    """The loss of one step, and of how many backward calls it is the sum (0: not captured)."""

    value: Tensor | float
    window: int | Tensor = 0


class Weights(NamedTuple):
    """Statistics of all weights that train, before the first step (0-d tensors)."""

    rms: Tensor
    blank: Tensor  # share of weights in all-zero tensors


class Sums(NamedTuple):
    """Result of one sweep over the n tensors of a step."""

    # Shape (3, n), in the rule's metric: <g, u>, today's gradient with the last step's direction; <g, g>; and <u, u>.
    products: Tensor
    weight: Tensor  # shape (n,): the tensor's effective lr; 0 where it takes no part


class Mood(NamedTuple):
    """The scalars of one update, ready to use."""

    drive: Number  # multiplies lr, for the step and for weight decay
    scale: Number  # multiplies the step only
    trust: Number | None  # scales what a memory takes in (v4 only)
    grad_scale: Number  # multiplies the gradient: below 1 for an outlier
    pull: Number  # before the update, p moves by this share to the shadow; 1 restores it
    follow: Number  # then the shadow moves by this share to p
    scalar: Number  # the emotional scalar, for rules that depend on it
    last_scalar: Number  # the same at the last update, whose step reflection looks at


class Machine(Protocol):
    """What the optimizer needs of an emotion: a state vector, and pure functions from state to state.

    A step calls ``begin`` (once in a run), ``give_way``, ``look_back``, ``feel`` (where there is a loss), ``guard``,
    ``mood``, ``reflect`` and ``reflect_each``, in this order; ``Emotional`` calls ``begin`` only after its first step,
    and no ``look_back`` or ``reflect_each``. A state is a NamedTuple of numbers.
    """

    @property
    def name(self) -> str:
        """The constructor's name for it."""

    @property
    def code(self) -> int:
        """The first entry of the vector."""

    @property
    def defaults(self) -> dict[str, Any]:
        """The options that this emotion has, with their defaults."""

    @property
    def fixed(self) -> dict[str, Any]:
        """The options that it has at a fixed value."""

    @property
    def constants(self) -> dict[str, float]:
        """Its constants that are not the defaults."""

    @property
    def least_decay(self) -> float:
        """Lower bound on the factor by which a step's weight decay multiplies the weights."""

    @property
    def corrects_bias(self) -> bool:
        """Whether its rules correct the bias of their memories."""

    @property
    def reflects(self) -> bool:
        """Whether it uses reflection."""

    def having(self, constants: dict[str, float]) -> Machine: ...
    def initial(self) -> list[float]: ...
    def index(self, name: str) -> int: ...
    def upgrade(self, vector: Tensor) -> Tensor: ...
    def unpack(self, vector: Tensor, plain: bool = False) -> Any: ...
    def pack(self, state: Any) -> Tensor: ...
    def begin(self, state: Any, weights: Weights, options: Options) -> Any: ...
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
    """Whether a loss is finite, whether its accumulation window is usual, and the state that remembers both.

    A window with an unusual number of backward calls (the last, partial one of an epoch) has a loss on another scale,
    and is left out. The second one in a row counts, whatever its number, and is the new usual one: where windows are
    filled up to a number of tokens, each has its own number of calls, and the run must still hear losses.
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
