r"""The adaptive emotion: a pure state machine on 0-d tensors.

It has two senses. *Feeling* hears the loss, *reflection* compares today's gradient with the step taken last. Both move
one multiplier on the user's learning rate, the *drive*. Nothing here knows a parameter, a group or a device: each
function takes a :class:`State` and returns a new one, without a branch on a value, so that a step never waits for an
accelerator and one code path serves eager mode, ``torch.compile`` and CUDA graphs.

Feeling, for a loss :math:`l` with :math:`x = l - l_\mathrm{first}`::

    short, medium, long   running means of x with rates 0.3, 0.05, 0.01 (the plain mean until 1/n reaches the rate)
    dev                   running mean of |x - short|, the loss's own noise
    tension  = (short - medium) / dev         progress = (long - short) / dev
    scalar   = tanh((tension - progress) / 2)         > 0: the loss rises beyond its noise, < 0: it improves
    log drive -= 0.05 clip((tension - 1) / 2, 0, 1)                                         the brake

Reflection, for the cosine :math:`c_t` between today's gradient and the optimizer's last step, in the rule's metric::

    trust += max(0.1, 1/n) (c_t - trust)      fast += max(0.3, 1/n) (c_t - fast)
    noise += max(0.1, 1/(n+1)) ((c_t - trust)^2 - noise)
    T      = 2.38 fast / sqrt(noise)                                    fast's own t-statistic
    slow   = min(0.05, 1/n) clip(trust / 0.1, -1, 1)                    within the noise: at most like n or 1/n
    sure   = 0.1 (clip((T - 2) / 4, 0, 1) - clip((-T - 2) / 4, 0, 1))   beyond doubt, in either direction
    log drive += sure where |sure| > |slow|, else slow

Everything is unchanged when the loss is replaced by ``a * loss + b`` with ``a > 0``.

Source: the emotional scalar is an idea of muooon/EmoNavi. Reflection is hypergradient descent (Baydin et al. 2018,
https://arxiv.org/abs/1703.04782), normalised to a cosine so that no scale enters.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, Protocol

import torch
from torch import Tensor

__all__ = ["Emotion", "Machine", "Mood", "Options", "State", "Sums"]

LOG_TENTH = math.log(0.1)
LOG_HALF = math.log(0.5)
NEVER = -1e9  # "no goal": finite, so that arithmetic on it stays defined
DRIVE_RANGE = (math.log(1e-8), math.log(1e6))
REST_STEPS = 3
HEAL_STEPS = 7  # with the three of rest: back at half the earlier drive within ten
PATIENCE = 10  # losses or norms heard before one can be called an outlier


class Options(NamedTuple):
    """What the user fixed or a schedule moved, as the emotion needs it (plain numbers or 0-d tensors)."""

    use_trust: bool
    use_shadow: bool
    max_norm: float
    lowest_drive: Tensor | float  # where the effective lr of every group reaches its floor
    highest_drive: Tensor | float  # where the effective lr of every group reaches max_lr
    decayed: Tensor | bool  # every group's lr is below half its peak: a schedule is ending the run


class Sums(NamedTuple):
    """What one sweep over the tensors gives back: 1-D tensors with one entry for each tensor that was stepped."""

    grad_step: Tensor  # <g, u>: today's gradient with the last step's direction
    grad_grad: Tensor  # <g, g> in the rule's metric
    step_step: Tensor  # <u, u> in the rule's metric
    weight: Tensor  # the tensor's effective lr; 0 where it takes no part


class Mood(NamedTuple):
    """The ready scalars of one update (0-d tensors)."""

    drive: Tensor  # multiplies lr, for the step and for weight decay
    scale: Tensor  # multiplies the step only
    trust: Tensor | None  # scales what a memory takes in (v4 only)
    grad_scale: Tensor  # outlier control
    pull: Tensor  # p moves this far to the shadow before the update: 1 = restored
    follow: Tensor  # then the shadow moves this far to p


class State(NamedTuple):
    """The adaptive emotion's memory: one 0-d tensor each, kept as one vector in ``param_groups[0]["emotion"]``."""

    code: Tensor  # which emotion this is: a checkpoint of another one is refused
    version: Tensor
    steps: Tensor  # real updates
    skipped_steps: Tensor
    ignored_losses: Tensor  # not finite
    losses: Tensor  # losses felt
    window: Tensor  # backward calls in a usual accumulation window
    last_window: Tensor
    loss: Tensor
    first: Tensor
    short: Tensor
    medium: Tensor
    long: Tensor
    dev: Tensor
    near: Tensor  # mean over the last tenth of the run
    far: Tensor  # mean over the last 0.4 of the run
    calm: Tensor  # steps since next to nothing is gained
    scalar: Tensor
    tension: Tensor
    log_drive: Tensor
    log_drive_peak: Tensor  # highest before a schedule began to end the run
    goal: Tensor  # log drive to return to after a panic
    rest: Tensor  # steps of rest left
    panic: Tensor  # 1 in the step that panics
    lr_ref: Tensor
    reflections: Tensor
    trust: Tensor
    fast: Tensor
    noise: Tensor
    norms: Tensor
    grad_norm: Tensor
    log_norm: Tensor
    log_norm_var: Tensor


class Machine(Protocol):
    """What an emotion is to the optimizer: a state vector, and pure functions from state to state.

    A step calls ``begin`` (once in a run), ``feel`` (where there is a loss), ``guard``, ``mood``, ``reflect`` and
    ``reflect_each``, in this order. A state is a NamedTuple of tensors.
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
    def corrects_bias(self) -> bool:
        """Whether its rules correct the bias of their memories."""

    @property
    def reflects(self) -> bool:
        """Whether it uses the sums of reflection."""

    def initial(self) -> list[float]: ...
    def index(self, name: str) -> int: ...
    def unpack(self, vector: Tensor) -> Any: ...
    def pack(self, state: Any) -> Tensor: ...
    def begin(self, state: Any, rms: Tensor, lr: Tensor, options: Options) -> Any: ...
    def feel(self, state: Any, loss: Tensor, window: int) -> Any: ...
    def guard(self, state: Any, norm: Tensor, options: Options) -> tuple[Any, Tensor, Tensor]: ...
    def mood(self, state: Any, acts: Tensor, grad_scale: Tensor, options: Options) -> Mood: ...
    def reflect(self, state: Any, sums: Sums, acted: Tensor, options: Options) -> Any: ...
    def reflect_each(
        self, state: Any, drive: Tensor, trust: Tensor, count: Tensor, sums: Sums
    ) -> tuple[Tensor, Tensor]: ...
    def should_stop(self, state: Any) -> Tensor: ...
    def mood_word(self, values: dict[str, float], stop: bool) -> str: ...


def keep(flag: Tensor, new: Any, old: Any) -> Any:
    """``new`` where the flag is True, else ``old``."""
    changed = [i for i, (a, b) in enumerate(zip(new, old, strict=True)) if a is not b and a.dim() == 0]
    news, olds = (torch.stack([state[i] for i in changed]) for state in (new, old))
    kept = dict(zip(changed, torch.where(flag, news, olds).unbind(), strict=True))
    wide = {i: torch.where(flag, a, old[i]) for i, a in enumerate(new) if a.dim()}
    return type(new)._make((kept | wide).get(i, a) for i, a in enumerate(new))


def regular(state: Any, loss: Tensor, window: int) -> tuple[Tensor, Tensor, Any]:
    """Whether a loss is finite and whether its accumulation window is a usual one, with the state that remembers both.

    A window with another number of backward calls than usual (the last, partial one of an epoch) holds a loss on
    another scale: it is left out, until that number comes twice in a row and so is the new usual.
    """
    calls = torch.full_like(loss, float(window))
    finite = torch.isfinite(loss)
    usual = (calls == 0) | (state.window == 0) | (calls == state.window)
    settled = (calls > 0) & ((state.window == 0) | (calls == state.last_window))
    return (
        finite,
        usual,
        state._replace(
            window=torch.where(settled, calls, state.window),
            last_window=torch.where(calls > 0, calls, state.last_window),
            ignored_losses=state.ignored_losses + ~finite,
        ),
    )


def _mean(old: Tensor, new: Tensor, rate: float, count: Tensor) -> Tensor:
    """Running mean of the given rate that is the plain mean of all values until there are 1/rate of them."""
    return old + torch.clamp(1 / count.clamp(min=1), min=rate) * (new - old)


@dataclass(frozen=True)
class Emotion:
    """Constants of the adaptive emotion. The defaults are the measured policy; each field says why it is there.

    Args:
        start: the first effective lr is this share of the weights' rms (or the user's lr, if that is lower), because
            one Adam step then moves weights by a tenth of a percent.
        pace: largest change of the log drive per step within the noise; after 1/pace steps it falls like 1/step.
        sure: largest change per step where trust is beyond doubt: it opens a run, re-opens it after a plateau, and
            backs off from a step that is clearly too long.
        tensor_pace: the same for one tensor's own drive; slower than the global one, so that the two do not fight.
        tensor_range: bound on one tensor's log drive.
        brake: largest cut of the log drive per step by tension.
        spike: a loss this many deviations above its short memory is a panic.
        outlier: a log gradient norm this many standard deviations above its mean is scaled down (times ``max_norm``).
        done: ``should_stop`` once the last stretch gave less than this share of all progress so far.
        shadow_horizon: the shadow averages over this share of the run so far.

    Example:
        >>> import torch, emonavi
        >>> weights = [torch.nn.Parameter(torch.ones(3))]
        >>> gentle = emonavi.Emotion(start=1e-4)
        >>> emonavi.EmoNavi(weights, emotion=gentle).emotion.steps
        0
    """

    start: float = 1e-3
    pace: float = 0.05
    sure: float = 0.10
    tensor_pace: float = 0.02
    tensor_range: float = 2.0
    brake: float = 0.05
    spike: float = 10.0
    outlier: float = 6.0
    done: float = 0.01
    shadow_horizon: float = 0.1

    name: ClassVar[str] = "adaptive"
    code: ClassVar[int] = 1
    corrects_bias: ClassVar[bool] = True
    reflects: ClassVar[bool] = True
    defaults: ClassVar[dict[str, Any]] = {
        "use_shadow": False,
        "use_trust": True,
        "max_norm": 1.0,
        "min_lr": 1e-6,
        "max_lr": None,
    }
    fixed: ClassVar[dict[str, Any]] = {}

    def initial(self) -> list[float]:
        """The state vector before anything was felt."""
        start = dict.fromkeys(State._fields, 0.0)
        start |= {"code": float(self.code), "version": 1.0, "goal": NEVER, "log_drive_peak": NEVER, "noise": 0.04}
        return list(start.values())

    def index(self, name: str) -> int:
        """Place of an entry in the vector."""
        return State._fields.index(name)

    def unpack(self, vector: Tensor) -> State:
        """View the vector as named 0-d tensors."""
        return State(*vector.unbind())

    def pack(self, state: State) -> Tensor:
        """One vector from named 0-d tensors."""
        return torch.stack(state)

    def begin(self, state: State, rms: Tensor, lr: Tensor, options: Options) -> State:
        """Set the first drive from the rms of the weights; ``lr`` stands in for an lr of 0 at construction."""
        lr_ref = torch.where(state.lr_ref > 0, state.lr_ref, lr)
        log_drive = torch.zeros_like(rms)
        if options.use_trust:
            log_drive = torch.log(torch.clamp((self.start * rms + 1e-8) / lr_ref, max=1.0))
        return state._replace(lr_ref=lr_ref, log_drive=self._bounded(log_drive, options))

    def feel(self, state: State, loss: Tensor, window: int) -> State:
        """Take in a loss that is the sum of ``window`` backward calls (0: not known, always taken)."""
        finite, usual, state = regular(state, loss, window)
        felt = finite & usual
        n = state.losses + felt
        first = torch.where(felt & (n == 1), loss, state.first)
        x = torch.where(felt, loss, first) - first

        # Below the resolution of a float32 loss a deviation is rounding, not noise.
        dev = torch.maximum(state.dev, 4 * torch.finfo(torch.float32).eps * loss.abs())
        known = (state.losses >= PATIENCE) & (state.dev > 0)
        panic = felt & known & (x - state.short > self.spike * dev)
        # One absurd loss must not own the memories; a new level is still reached fast, since dev grows with it.
        x = torch.where(known, torch.clamp(x, state.short - self.spike * dev, state.short + self.spike * dev), x)

        short = _mean(state.short, x, 0.3, n)
        medium = _mean(state.medium, x, 0.05, n)
        long = _mean(state.long, x, 0.01, n)
        deviation = torch.where(n > 1, _mean(state.dev, (x - state.short).abs(), 0.05, n - 1), state.dev)
        near = state.near + (x - state.near) / (0.1 * (n - 1) + 1)
        far = state.far + (x - state.far) / (0.4 * (n - 1) + 1)
        calm = torch.where((near < 0) & (far - near < -self.done * near), state.calm + 1, 0.0)

        ratio = torch.where(deviation > 0, 1 / deviation, 0.0)
        tension = (short - medium) * ratio
        scalar = torch.tanh((tension - (long - short) * ratio) / 2)
        # During rest the drive is already cut: braking again would punish the same spike twice.
        brake = torch.where(state.rest > 0, 0.0, self.brake * torch.clamp((tension - 1) / 2, 0, 1))

        new = state._replace(
            losses=n, loss=loss, first=first, short=short, medium=medium, long=long, dev=deviation, near=near, far=far,
            calm=calm, tension=tension, scalar=scalar, log_drive=state.log_drive - brake, panic=panic.to(x.dtype),
        )  # fmt: skip
        felt_state: State = keep(felt, new, state)
        return felt_state

    def guard(self, state: State, norm: Tensor, options: Options) -> tuple[State, Tensor, Tensor]:
        """Judge a gradient norm: the new state, whether the update may act, and the factor on the gradient."""
        finite = torch.isfinite(norm)
        log_norm = torch.log(torch.clamp(norm, min=1e-300))
        limit = state.log_norm + self.outlier * options.max_norm * torch.sqrt(state.log_norm_var)
        outlier = (state.norms >= PATIENCE) & (log_norm > limit) & (options.max_norm > 0)
        grad_scale = torch.where(outlier & finite, torch.exp(limit - log_norm), 1.0)

        taken = torch.where(outlier, limit, log_norm)
        n = state.norms + 1
        off = taken - state.log_norm
        new = state._replace(
            norms=n,
            grad_norm=norm,
            log_norm=_mean(state.log_norm, taken, 0.05, n),
            log_norm_var=torch.where(n > 1, _mean(state.log_norm_var, off * off, 0.05, n - 1), 0.0),
        )
        new = keep(finite & (norm > 0), new, state)
        return self._alarm(new, finite), finite, grad_scale

    def _alarm(self, state: State, finite: Tensor) -> State:
        """Panic: cut the drive to a tenth, remember where to return to, rest. A panic while resting cuts no deeper."""
        panic = (state.panic > 0) | ~finite
        fresh = panic & (state.rest == 0)
        goal = torch.where(state.log_drive >= state.goal, state.log_drive + LOG_HALF, state.goal)
        return state._replace(
            panic=panic.to(state.panic.dtype),
            goal=torch.where(fresh, goal, state.goal),
            log_drive=torch.where(fresh, state.log_drive + LOG_TENTH, state.log_drive),
            rest=torch.where(panic, float(REST_STEPS), state.rest),
            skipped_steps=state.skipped_steps + ~finite,
        )

    def mood(self, state: State, acts: Tensor, grad_scale: Tensor, options: Options) -> Mood:
        """Read the state as the scalars of the coming update, which ``acts`` or is skipped."""
        horizon = torch.where(acts, 1 / (self.shadow_horizon * (state.steps + 1) + 1), 0.0)
        # A panic restores the shadow even where the gradient is of no use.
        return Mood(torch.exp(state.log_drive), torch.ones_like(horizon), None, grad_scale, state.panic, horizon)

    def mood_word(self, values: dict[str, float], stop: bool) -> str:
        """One word for what it feels like now."""
        lean = values["trust"]
        words = {
            "done": stop,
            "resting": values["rest"] > 0,
            "braking": values["tension"] > 1.5,
            "growing": lean > 0.03,
            "easing": lean < -0.03,
        }
        return next((word for word, holds in words.items() if holds), "steady")

    def reflect(self, state: State, sums: Sums, acted: Tensor, options: Options) -> State:
        """Learn from the cosine between today's gradient and the last step; ``acted`` is False for a skipped update."""
        state = state._replace(panic=torch.zeros_like(state.panic), steps=state.steps + acted)
        power = (sums.weight * sums.grad_grad).sum() * (sums.weight * sums.step_step).sum()
        seen = acted & (power > 0)
        cosine = torch.where(seen, (sums.weight * sums.grad_step).sum() * torch.rsqrt(power), 0.0)

        n = state.reflections + 1
        trust = _mean(state.trust, cosine, 0.1, n)
        fast = _mean(state.fast, cosine, 0.3, n)
        noise = _mean(state.noise, (cosine - trust) ** 2, 0.1, n + 1)
        new = state._replace(reflections=n, trust=trust, fast=fast, noise=noise)
        new = keep(seen, new, state)
        return self._drive(new, seen, acted, sums, options)

    def _drive(self, state: State, seen: Tensor, acted: Tensor, sums: Sums, options: Options) -> State:
        """Move the drive: rest, return after a panic, or follow trust."""
        if options.use_trust:
            # 2.38 = sqrt((2 - 0.3) / 0.3): sd of one cosine over sd of its fast mean.
            t_value = 2.38 * state.fast * torch.rsqrt(torch.clamp(state.noise, min=1e-12))
            sure = self.sure * torch.sign(t_value) * torch.clamp((t_value.abs() - 2) / 4, 0, 1)
            # Noise pulls the greedy optimum down at once. A run without a horizon has no clock but its own age: within
            # the noise the drive moves no faster than the age to the power of 1 or -1.
            pace = torch.clamp(1 / state.reflections.clamp(min=1), max=self.pace)
            slow = pace * torch.clamp(state.trust / 0.1, -1, 1)
            change = torch.where(sure.abs() > slow.abs(), sure, slow)
            change = torch.where(seen & (state.reflections > 3), change, 0.0)
        else:
            change = torch.clamp(-state.log_drive, -self.pace, self.pace) * (state.tension < 1)
        resting = state.rest > 0
        healing = ~resting & (state.log_drive < state.goal - 1e-6)
        heal = torch.clamp(state.goal - state.log_drive, max=(LOG_HALF - LOG_TENTH) / HEAL_STEPS)
        change = torch.where(healing, heal * (state.tension < 1), change)
        change = torch.where(resting, 0.0, change)

        log_drive = self._bounded(state.log_drive + torch.where(acted, change, 0.0), options)
        decayed = torch.as_tensor(options.decayed, device=log_drive.device) & (state.log_drive_peak > NEVER)
        log_drive = torch.where(decayed, torch.minimum(log_drive, state.log_drive_peak), log_drive)
        peak = torch.where(decayed, state.log_drive_peak, torch.maximum(state.log_drive_peak, log_drive))
        return state._replace(
            log_drive=log_drive,
            log_drive_peak=peak,
            rest=torch.where(acted, torch.clamp(state.rest - 1, min=0), state.rest),
            goal=torch.where(resting | healing, state.goal, NEVER),
        )

    def _bounded(self, log_drive: Tensor, options: Options) -> Tensor:
        """Keep the drive where it still changes the effective lr, so that it turns at once when it has to."""
        low = torch.log(torch.as_tensor(options.lowest_drive, dtype=log_drive.dtype, device=log_drive.device))
        high = torch.log(torch.as_tensor(options.highest_drive, dtype=log_drive.dtype, device=log_drive.device))
        return torch.clamp(torch.clamp(log_drive, min=low), max=high).clamp(*DRIVE_RANGE)

    def reflect_each(
        self, state: State, drive: Tensor, trust: Tensor, count: Tensor, sums: Sums
    ) -> tuple[Tensor, Tensor]:
        """The same reflection for each tensor's own drive and trust (1-D, one entry a tensor)."""
        power = sums.grad_grad * sums.step_step
        seen = (sums.weight > 0) & (power > 0)
        cosine = torch.where(seen, sums.grad_step * torch.rsqrt(power), 0.0)
        trust = torch.where(seen, _mean(trust, cosine, 0.1, count), trust)
        change = self.tensor_pace * torch.clamp((trust - state.trust) / 0.1, -1, 1)
        log_drive = torch.clamp(torch.log(drive) + change, -self.tensor_range, self.tensor_range)
        return torch.where(seen & (count > 7), torch.exp(log_drive), drive), trust

    def should_stop(self, state: State) -> Tensor:
        """True while the last stretch gave next to nothing of all progress, for long enough."""
        return state.calm > torch.clamp(0.05 * state.losses, min=64)
