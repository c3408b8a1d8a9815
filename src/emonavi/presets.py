r"""The published generations v1, v3 and v4 as emotions, reproduced as published.

For a loss :math:`l`, with both memories starting at the first loss::

    short = 0.3 l + 0.7 short         long = 0.01 l + 0.99 long
    scalar s = tanh(5 (short - long))                                        v1, v3
    scalar s = tanh(5 (short - long) / (1 + |previous s|))                   v4

    ratio r:  s > 0.6: 0.7 + 0.2 s;  s < -0.6: 0.1;  |s| > 0.3: 0.3;  else 0   v1
    ratio r:  |s| > 0.1: |s|;  else 0                                          v3, v4
    shadow:   the first r > 0 copies p; later ones move p by r to the shadow, then the shadow by 5 % (v4: 10 % of the
              trust) to p
    step:     lr (v1), lr (1 - |s|) (v3, v4), not corrected for bias
    trust:    1 - s^2 (v4 with ``use_trust``), else 1
    norm control (v4): avg = 0.9 avg + 0.1 norm(g); avg > max_norm multiplies lr by 0.95^(avg / max_norm), for good
    should_stop: the last 32 scalars have a mean |s| below 0.05 and a variance below 0.005

If a loss is large or falls fast, |s| is about 1 and the step of v3 and v4 about 0, so that training stops. The default
is :class:`~emonavi.emotion.Emotion`. Source: muooon/EmoNavi (Apache-2.0), whose formulas these are.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple, cast

import torch
from torch import Tensor

from emonavi.machine import Mood, Options, Sums, Weights, keep, regular
from emonavi.scalars import Number, exp, isfinite, like, negate, number, tanh, where

__all__ = ["PRESETS", "Preset", "PresetState"]

HISTORY = 32


class PresetState(NamedTuple):
    """A preset's state: numbers, and at the end of the vector a ring of the last 32 scalars."""

    code: Number
    version: Number
    steps: Number
    skipped_steps: Number
    ignored_losses: Number
    losses: Number
    window: Number
    last_window: Number
    loss: Number
    short: Number
    long: Number
    scalar: Number
    cast: Number  # 1 once the shadow holds a copy of the parameters
    ratio: Number  # of the coming update
    log_drive: Number  # of the norm control
    norm_avg: Number
    grad_norm: Number
    lr_ref: Number
    history: Tensor  # shape (32,), a ring indexed by ``losses``


@dataclass(frozen=True)
class Preset:
    """One published generation; a :class:`~emonavi.machine.Machine`, as ``Emotion`` is."""

    name: str
    code: int
    defaults: dict[str, Any]
    habituates: bool = False  # v4: a scalar far from 0 reduces the next one
    shrinks: bool = True  # the step shrinks by 1 - |s|
    staged: bool = False  # v1: the ratio has stages
    follows: float = 0.05
    fixed: dict[str, Any] = field(default_factory=dict)  # options with a fixed value

    corrects_bias: ClassVar[bool] = False
    reflects: ClassVar[bool] = False
    least_decay: ClassVar[float] = 0.0
    constants: ClassVar[dict[str, float]] = {}  # none can be chosen

    def having(self, constants: dict[str, float]) -> Preset:
        """The same; see ``Emotion``."""
        return self

    def initial(self) -> list[float]:
        """The state vector at the start of a run."""
        start = dict.fromkeys(PresetState._fields[:-1], 0.0) | {"code": float(self.code), "version": 1.0}
        return [*start.values(), *[0.0] * HISTORY]

    def index(self, name: str) -> int:
        """Place of an entry in the vector."""
        return PresetState._fields.index(name)

    def upgrade(self, vector: Tensor) -> Tensor:
        """Convert a vector of an earlier version; there is none."""
        return vector

    def unpack(self, vector: Tensor, plain: bool = False) -> PresetState:
        """The vector's entries by name: views, or numbers if ``plain``; the history stays a tensor."""
        entries = vector[:-HISTORY]
        return PresetState._make([*(entries.tolist() if plain else entries.unbind()), vector[-HISTORY:]])

    def pack(self, state: PresetState) -> Tensor:
        """Put the entries into one vector."""
        entries = state[:-1]
        plain = not isinstance(state.code, Tensor)
        first = torch.tensor(entries, dtype=torch.float64, device="cpu") if plain else torch.stack(entries)
        return torch.cat([first, state.history])

    def begin(self, state: PresetState, weights: Weights, options: Options) -> PresetState:
        """Nothing changes: presets begin at the user's lr."""
        return state

    def feel(self, state: PresetState, loss: Number, window: Number) -> PresetState:
        """Feel a loss that is the sum of ``window`` backward calls."""
        loss = like(state.code, loss)
        finite, usual, state = regular(state, loss, window)
        felt = finite & usual
        short = where(state.losses == 0, loss, 0.3 * loss + 0.7 * state.short)
        long = where(state.losses == 0, loss, 0.01 * loss + 0.99 * state.long)
        habit = 1 + abs(state.scalar) if self.habituates else 1.0
        scalar = tanh(5 * (short - long) / habit)
        place = torch.arange(HISTORY, device=state.history.device) == state.losses % HISTORY
        new = state._replace(
            losses=state.losses + 1, loss=loss, short=short, long=long, scalar=scalar,
            ratio=self._ratio(scalar), history=torch.where(place, scalar, state.history),
        )  # fmt: skip
        return cast(PresetState, keep(felt, new, state))

    def _ratio(self, s: Number) -> Number:
        if not self.staged:
            return where(abs(s) > 0.1, abs(s), 0.0)
        mild = 0.3 * number(abs(s) > 0.3)
        return where(s > 0.6, 0.7 + 0.2 * s, where(s < -0.6, 0.1, mild))

    def give_way(self, state: PresetState, lr: Number, use_trust: bool) -> PresetState:
        """Nothing changes: a published drive multiplies any lr."""
        return state

    def look_back(self, state: PresetState, norm: Number, options: Options) -> tuple[PresetState, Number]:
        """Nothing changes: the published generations do not judge the first gradient."""
        return state, like(state.code, 1.0)

    def guard(self, state: PresetState, norm: Tensor, options: Options) -> tuple[PresetState, Number, Number]:
        """Skip gradients that are not finite, an addition of this library; the published generations have no guard."""
        norm = like(state.code, norm)
        finite = isfinite(norm)
        avg = 0.9 * state.norm_avg + 0.1 * norm
        new = keep(finite, state._replace(norm_avg=avg, grad_norm=norm), state)
        return new._replace(skipped_steps=state.skipped_steps + negate(finite)), finite, like(norm, 1.0)

    def mood(self, state: PresetState, acts: Number, grad_scale: Number, options: Options) -> Mood:
        """The scalars of the coming update; ``acts`` is False if it is skipped."""
        one = like(state.scalar, 1.0)
        trust = 1 - state.scalar**2 if options.use_trust else None
        follow = self.follows * (one if trust is None else trust)
        leans = acts & (state.ratio > 0)
        return Mood(
            drive=exp(state.log_drive),
            scale=1 - abs(state.scalar) if self.shrinks else one,
            trust=trust,
            grad_scale=grad_scale,
            pull=where(leans & (state.cast > 0), state.ratio, 0.0),
            # The first time the shadow becomes a copy: it moves all the way.
            follow=where(leans, where(state.cast > 0, follow, one), 0.0),
            scalar=state.scalar,
            last_scalar=state.scalar,  # presets do not reflect
        )

    def mood_word(self, values: dict[str, float], stop: bool) -> str:
        """One word for the state."""
        if stop:
            return "done"
        return "tense" if values["scalar"] > 0.3 else "eager" if values["scalar"] < -0.3 else "steady"

    def reflect(self, state: PresetState, sums: Sums, acted: Number, options: Options) -> PresetState:
        """Norm control: it only lowers the drive, from the next step on."""
        ratchet = like(state.code, 0.0)
        if options.max_norm > 0:
            excess = state.norm_avg / options.max_norm
            ratchet = where(acted & (excess > 1), excess * math.log(0.95), 0.0)
        return state._replace(
            steps=state.steps + acted,
            cast=where(acted & (state.ratio > 0), like(state.code, 1.0), state.cast),
            log_drive=state.log_drive + ratchet,
        )

    def reflect_each(
        self, state: PresetState, drive: Tensor, trust: Tensor, count: Tensor, sums: Sums
    ) -> tuple[Tensor, Tensor]:
        """Nothing changes: presets have no drive or trust for single tensors."""
        return drive, trust

    def should_stop(self, state: PresetState) -> Number:
        """The published rule, over steps with a loss."""
        quiet = (state.history.abs().mean() < 0.05) & (state.history.var(correction=0) < 0.005)
        return quiet & (state.losses >= HISTORY)


PRESETS = {
    "v1": Preset("v1", 101, {}, shrinks=False, staged=True, fixed={"use_shadow": True}),
    "v3": Preset("v3", 103, {"use_shadow": False}),
    "v4": Preset(
        "v4",
        104,
        {"use_shadow": False, "use_trust": True, "max_norm": 1.0, "min_lr": 1e-6},
        habituates=True,
        follows=0.1,
    ),
}
