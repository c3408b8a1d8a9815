r"""The adaptive emotion: a pure state machine on single numbers.

It has two senses. *Feeling*, in this file, uses the loss. *Reflection*, in ``reflection.py``, compares today's
gradient with the last step. Both move one multiplier on the user's learning rate, the *drive*. Nothing here knows a
parameter, a group or a device: each function takes a :class:`State` and returns a new one. On a device the numbers are
0-d tensors, and no function branches on a value, so that a step never waits; on the CPU they are plain numbers
(``scalars.py``).

Feeling, for a loss :math:`l` with :math:`x = l - l_\mathrm{first}`::

    short, medium, long   running means of x with rates 0.3, 0.05, 0.01 (the plain mean until 1/n reaches the rate)
    dev                   running mean of |x - short|, rate 0.02: the loss's own noise
    tension  = (short - medium) / dev         progress = (long - short) / dev
    scalar   = tanh((tension - progress) / 2)         > 0: the loss rises beyond its noise, < 0: it improves
    log drive -= min(0.05, 2/n) clip((tension - 1) / 2, 0, 1)    the brake, while the loss rises: x > short + dev / 2

For diagnosis it keeps the moments of recent scalars, from which ``optimizer.emotion`` computes skewness, kurtosis and
asymmetry. They do not act: two attempts to use them were no better (``docs/benchmarks.md``).

The emotion is unchanged when the loss is replaced by ``a * loss + b`` with ``a > 0``.

Source: the emotional scalar is an idea of muooon/EmoNavi.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from emonavi.machine import Mood, Options, Weights, keep, regular
from emonavi.reflection import KNOWN_AFTER, NEVER, Reflection, running_mean
from emonavi.scalars import Number, clamp, exp, isfinite, like, log, negate, number, sqrt, tanh, where

__all__ = ["Emotion", "State"]

LOG_TENTH = math.log(0.1)
LOG_HALF = math.log(0.5)
VERSION = 3.0
ENTRIES_OF_VERSION_2 = 38  # the same as today's first 38
REST_STEPS = 3
MOMENTS_RATE = 0.02  # rate of the scalar's moments: about the last fifty losses
ROUNDING = 4 * torch.finfo(torch.float32).eps  # relative resolution of a float32 loss
LARGEST = 1e150  # losses are clipped to this: the difference of larger ones could overflow
UNKNOWN_RMS = 0.01  # assumed if all weights are zero: below that of any trained network
PATIENCE = 10  # this many losses or norms come before their own spread decides about outliers
LEAST_SHIFT = 0.1  # of the log norm after an outlier: a spread of 0 would never let it move
UNKNOWN_SPREAD = 0.25  # deviation of the log norm until then: six of them are 4.5 times the usual norm


class State(NamedTuple):
    """The adaptive emotion's state: numbers, stored as one vector in ``param_groups[0]["emotion"]``."""

    code: Number  # which emotion it is: checkpoints of others are refused
    version: Number
    steps: Number  # real updates
    skipped_steps: Number
    ignored_losses: Number  # those not finite
    losses: Number  # losses felt
    window: Number  # usual number of backward calls in an accumulation window
    last_window: Number
    loss: Number
    first: Number
    short: Number
    medium: Number
    long: Number
    dev: Number
    near: Number  # mean over the last tenth of the run
    far: Number  # mean over the last 0.4 of the run
    calm: Number  # losses in a row with next to no progress
    scalar: Number
    tension: Number
    brake: Number  # how much today's tension cut the log drive
    record: Number  # highest excess of a loss over its short mean, in deviations; decays with 1/n
    log_drive: Number
    log_drive_peak: Number  # highest log drive before a schedule began to end the run
    free: Number  # log drive up to which growth needs no proof
    goal: Number  # log drive to return to after a panic
    rest: Number  # steps of rest left
    panic: Number  # 1 in a step with a panic
    lr_ref: Number
    reflections: Number
    trust: Number
    fast: Number
    noise: Number
    gain: Number  # of recent steps
    gain_mean: Number  # of all steps
    norms: Number
    grad_norm: Number
    log_norm: Number
    log_norm_var: Number
    last_scalar: Number  # the scalar at the last update
    scalar_mean: Number  # of recent scalars, and their central moments
    scalar_m2: Number
    scalar_m3: Number
    scalar_m4: Number
    scalar_size: Number  # mean of |scalar|


def _moments(state: State, scalar: Number, count: Number) -> dict[str, Number]:
    """Running central moments of the scalar, after ``count`` of them.

    The new point gets the weight w. The moments are central: differences of raw moments would lose all digits if the
    scalar hardly moves. Source: the pairwise update of P. Pebay (2008), for one point of weight w.
    """
    w = clamp(1 / clamp(count, 1.0), MOMENTS_RATE)
    off = scalar - state.scalar_mean
    m2, m3, m4 = state.scalar_m2, state.scalar_m3, state.scalar_m4
    share, square = w * off, off * off
    return {
        "scalar_mean": state.scalar_mean + share,
        "scalar_m2": (1 - w) * (m2 + share * off),
        "scalar_m3": (1 - w) * (m3 - 3 * share * m2 + share * (1 - 2 * w) * square),
        "scalar_m4": (1 - w)
        * (m4 - 4 * share * m3 + 6 * share * share * m2 + share * off * square * (1 - 3 * w + 3 * w * w)),
        "scalar_size": state.scalar_size + w * (abs(scalar) - state.scalar_size),
    }


@dataclass(frozen=True)
class Emotion(Reflection):
    """Constants of the adaptive emotion. The defaults were chosen by measurement; each field says what it is for.

    Args:
        start: the first effective lr is this share of the weights' rms (or the user's lr, if that is lower): one Adam
            step then moves weights by a third of a percent. With a third of that, runs on batches of two end while the
            lr still grows; with three times that, they overshoot.
        blank: if a tenth or more of the weights that train is still zero (LoRA's B, zero-initialised branches), the lr
            grows to this share of the rms unless trust is against it; otherwise to ``start``. In zeros nothing can be
            lost, and while they are small their gradients are too noisy for trust to tell.
        pace: largest change of the log drive per step within the noise, in the first steps.
        clock: later that change is at most clock/step upwards and fall/step downwards; ``fall`` depends on the rule.
            Noise always pulls the greedy optimum down, and a run of unknown length has no clock but its own age: so
            within the noise the lr moves no faster than age^-fall and age^2.
        sure: largest change per step when trust is beyond doubt: at the start of a run, after a plateau, or away from a
            step that is clearly too long.
        tensor_pace: the pace of one tensor's own drive, as a share; below 1, so that the two drives do not fight.
        nothing: the drive does not grow while the gain is below this share of its mean: it would grow for ever once a
            training loss is at its floor. Adam's gain falls with the square of the gradient: a squared error at
            a twentieth of its start is not at its floor yet.
        tensor_range: bound on one tensor's log drive.
        spike: a loss this many deviations above its short mean is a panic, unless the run has seen half of that.
        outlier: a log gradient norm this many standard deviations (times ``max_norm``) above its mean is scaled down.
        spoilt: above this share of skipped steps, a gradient that is not finite is no panic: it comes with the data,
            and one in ten steps would keep the drive down for ever. The step is skipped all the same.
        done: ``should_stop`` once the last stretch gave less than this share of all progress so far, and also less than
            five deviations of the loss, or a fifth of that share. For a loss that approaches 0, the rest is a small
            share of its progress and yet most of what is left to gain; there the noise shrinks with the loss.
        shadow_horizon: the shadow averages over this share of the run so far.

    Example:
        >>> import torch, emonavi
        >>> weights = [torch.nn.Parameter(torch.ones(3))]
        >>> gentle = emonavi.Emotion(start=1e-4)
        >>> emonavi.EmoNavi(weights, emotion=gentle).emotion.steps
        0
    """

    start: float = 3e-3
    blank: float = 3e-2
    pace: float = 0.05
    clock: float = 2.0
    sure: float = 0.10
    tensor_pace: float = 0.4
    nothing: float = 0.01
    tensor_range: float = 2.0
    spike: float = 10.0
    outlier: float = 6.0
    spoilt: float = 0.02
    done: float = 0.014
    shadow_horizon: float = 0.1

    name: ClassVar[str] = "adaptive"
    code: ClassVar[int] = 1
    corrects_bias: ClassVar[bool] = True
    reflects: ClassVar[bool] = True
    # Bounds weight decay at any lr. A decay as strong as the gradient is in balance with it, and reflection mistakes
    # that for steps that are too short: a linear fit left its solution again and again, at an lr of 1000.
    least_decay: ClassVar[float] = 0.999
    defaults: ClassVar[dict[str, Any]] = {
        "use_shadow": False,
        "use_trust": True,
        "max_norm": 1.0,
        "min_lr": 1e-6,
        "max_lr": None,
    }
    fixed: ClassVar[dict[str, Any]] = {}

    @property
    def constants(self) -> dict[str, float]:
        """Those that are not the defaults, for checkpoints."""
        own = {field.name: float(getattr(self, field.name)) for field in dataclasses.fields(Emotion)}
        return {name: value for name, value in own.items() if value != getattr(Emotion, name)}

    def having(self, constants: dict[str, float]) -> Emotion:
        """The same emotion with these constants; the others are the defaults."""
        defaults: dict[str, Any] = {field.name: field.default for field in dataclasses.fields(Emotion)}
        return dataclasses.replace(self, **defaults | constants)

    def initial(self) -> list[float]:
        """The state vector at the start of a run."""
        start = dict.fromkeys(State._fields, 0.0)
        start |= {"code": float(self.code), "version": VERSION, "goal": NEVER, "log_drive_peak": NEVER, "noise": 0.04}
        return list(start.values())

    def index(self, name: str) -> int:
        """Place of an entry in the vector."""
        return State._fields.index(name)

    def upgrade(self, vector: Tensor) -> Tensor:
        """Convert a vector of an earlier version; entries that it lacks begin as in a fresh one."""
        if vector[:2].tolist() != [self.code, 2.0] or len(vector) != ENTRIES_OF_VERSION_2:
            return vector
        upgraded = torch.cat([vector, vector.new_tensor(self.initial()[ENTRIES_OF_VERSION_2:])])
        upgraded[self.index("version")] = VERSION
        return upgraded

    def unpack(self, vector: Tensor, plain: bool = False) -> State:
        """The vector's entries by name: views, or numbers if ``plain``."""
        return State._make(vector.tolist() if plain else vector.unbind())

    def pack(self, state: State) -> Tensor:
        """Put the entries into one vector."""
        if isinstance(state.code, Tensor):
            return torch.stack(state)
        return torch.tensor(state, dtype=torch.float64, device="cpu")

    def begin(self, state: State, weights: Weights, options: Options) -> State:
        """Set the first drive from the scale of the weights.

        ``options.lr`` is today's, which a schedule may have lowered; ``lr_ref`` has held the user's since construction.
        """
        lr_ref = like(state.code, options.lr)
        user = clamp(state.lr_ref, lr_ref)
        rms, blank = like(state.code, weights.rms), like(state.code, weights.blank)
        rms = where(rms > 0, rms, UNKNOWN_RMS)
        free = log((where(blank < 0.1, self.start, self.blank) * rms + 1e-8) / lr_ref)
        log_drive = like(state.code, 0.0)
        if options.use_trust:
            log_drive = log(clamp(self.start * rms + 1e-8, high=user) / lr_ref)
        return state._replace(lr_ref=lr_ref, free=free, log_drive=self._bounded(log_drive, options))

    def give_way(self, state: State, lr: Number, use_trust: bool) -> State:
        """Where the lr exceeds its highest value so far, divide the drive by the excess.

        A scheduler scales the lr that the drive has found, but above the highest lr so far nothing was found. So a
        warm-up, or a peak of any height, changes nothing: trust does the warming up.
        """
        lr = like(state.code, lr)
        known = (state.lr_ref > 0) & (state.steps + state.skipped_steps > 0) & use_trust
        above = log(clamp(lr / where(known, state.lr_ref, math.inf), 1.0))
        peak, goal = state.log_drive_peak, state.goal
        return state._replace(
            lr_ref=clamp(state.lr_ref, lr),
            log_drive=state.log_drive - above,
            free=state.free - above,
            log_drive_peak=where(peak > NEVER, peak - above, peak),
            goal=where(goal > NEVER, goal - above, goal),
        )

    def feel(self, state: State, loss: Number, window: Number) -> State:
        """Feel a loss that is the sum of ``window`` backward calls (0: unknown, always accepted)."""
        loss = like(state.code, loss)
        finite, usual, state = regular(state, loss, window)
        felt = finite & usual
        loss = clamp(loss, -LARGEST, LARGEST)
        n = state.losses + felt
        first = where(felt & (n == 1), loss, state.first)
        x = where(felt, loss, first) - first

        # Deviations below the resolution of a float32 loss are rounding, not noise.
        dev = clamp(state.dev, ROUNDING * abs(loss))
        known = (state.losses >= PATIENCE) & (state.dev > 0)
        # Heavy-tailed losses never stop spiking: what the run has survived before is no panic.
        excess = where(known, clamp((x - state.short) / clamp(dev, 1e-300), 0.0, 1e6), 0.0)
        panic = felt & known & (excess > clamp(2 * state.record, self.spike))
        record = clamp(state.record * (1 - 1 / clamp(n, 1.0)), excess)
        # One absurd loss must not dominate the means. A new level is still reached fast, since dev grows with it.
        x = where(known, clamp(x, state.short - self.spike * dev, state.short + self.spike * dev), x)

        short = running_mean(state.short, x, 0.3, n)
        medium = running_mean(state.medium, x, 0.05, n)
        long = running_mean(state.long, x, 0.01, n)
        deviation = where(n > 1, running_mean(state.dev, abs(x - state.short), 0.02, n - 1), state.dev)
        near = state.near + (x - state.near) / (0.1 * (n - 1) + 1)
        far = state.far + (x - state.far) / (0.4 * (n - 1) + 1)
        gained, limit = far - near, -self.done * near
        spent = (near < 0) & (gained < limit) & ((gained < 5 * deviation) | (gained < limit / 5))
        calm = where(spent, state.calm + 1, 0.0)

        noisy = deviation > 1e-300  # below that the reciprocal is infinite
        ratio = where(noisy, 1 / where(noisy, deviation, 1.0), 0.0)
        tension = (short - medium) * ratio
        scalar = tanh((tension - (long - short) * ratio) / 2)
        # Tension outlasts a spike: no brake for a loss that falls again or has settled, nor while the drive rests from
        # the same spike.
        rises = (x - state.short > deviation / 2) & (state.rest == 0)
        brake = where(rises, self._pace(state, self.clock) * clamp((tension - 1) / 2, 0.0, 1.0), 0.0)

        new = state._replace(
            losses=n, loss=loss, first=first, short=short, medium=medium, long=long, dev=deviation, near=near, far=far,
            calm=calm, tension=tension, scalar=scalar, brake=brake, record=record, log_drive=state.log_drive - brake,
            panic=number(panic), **_moments(state, scalar, n),
        )  # fmt: skip
        felt_state: State = keep(felt, new, state)
        return felt_state

    def look_back(self, state: State, norm: Number, options: Options) -> tuple[State, Number]:
        """Judge the first gradient by the second. If it was an outlier, forget it, and scale it down in the memories.

        In its own step there was nothing to compare it with, and Adam's second memory would keep it for the whole run.
        Returns the state and the factor for the memories.
        """
        norm = like(state.code, norm)
        ratio = log(clamp(norm, 1e-300)) - state.log_norm
        usual = isfinite(norm) & (norm > 0)
        absurd = (state.norms == 1) & usual & (ratio < -self.outlier * options.max_norm * UNKNOWN_SPREAD)
        absurd = absurd & (options.max_norm > 0)
        # Forget its loss as well: compared with that, anything would look like progress.
        forgotten = state._replace(norms=where(absurd, 0.0, state.norms), losses=where(absurd, 0.0, state.losses))
        return forgotten, where(absurd, exp(clamp(ratio, high=0.0)), 1.0)

    def guard(self, state: State, norm: Tensor, options: Options) -> tuple[State, Number, Number]:
        """Judge a gradient norm: the new state, whether the update may act, and the factor on the gradient."""
        norm = like(state.code, norm)
        finite = isfinite(norm)
        log_norm = log(clamp(norm, 1e-300))
        # Absurd gradients also come in the first steps, and then the moments would keep them for the whole run.
        deviation = sqrt(state.log_norm_var)
        deviation = where(state.norms < PATIENCE, clamp(deviation, UNKNOWN_SPREAD), deviation)
        limit = state.log_norm + self.outlier * options.max_norm * deviation
        outlier = (state.norms > 0) & (log_norm > limit) & (options.max_norm > 0)
        grad_scale = where(outlier & finite, exp(clamp(limit - log_norm, high=0.0)), 1.0)

        # An outlier enters the mean at its limit, so that several in a row widen the limit until they pass. A new level
        # of a hundred times the old one is accepted after 25 to 50 steps, even if all norms before were equal.
        widened = clamp(clamp(limit, high=state.log_norm + 2 * deviation), state.log_norm + LEAST_SHIFT)
        taken = where(outlier, clamp(widened, high=log_norm), log_norm)
        n = state.norms + 1
        off = taken - state.log_norm
        new = state._replace(
            norms=n,
            grad_norm=norm,
            log_norm=running_mean(state.log_norm, taken, 0.05, n),
            log_norm_var=where(n > 1, running_mean(state.log_norm_var, off * off, 0.05, n - 1), 0.0),
        )
        new = keep(finite & (norm > 0), new, state)
        return self._alarm(new, finite), finite, grad_scale

    def _alarm(self, state: State, finite: Number) -> State:
        """In a panic cut the drive to a tenth, remember its value, and rest. A panic while resting does not cut again.

        Heavy-tailed losses spike every few hundred steps, and growth by the clock would not make up for each cut. So
        the drive returns to its full value, or to half of it if the loss spikes again before.
        """
        news = negate(finite) & (state.skipped_steps < 1 + self.spoilt * state.steps)
        panic = (state.panic > 0) | news
        fresh = panic & (state.rest == 0)
        again = (state.log_drive < state.goal) & (state.panic > 0)
        goal = clamp(state.goal, state.log_drive) + where(again, LOG_HALF, 0.0)
        return state._replace(
            panic=number(panic),
            goal=where(fresh, goal, state.goal),
            log_drive=where(fresh, state.log_drive + LOG_TENTH, state.log_drive),
            rest=where(panic, float(REST_STEPS), state.rest),
            skipped_steps=state.skipped_steps + negate(finite),
        )

    def mood(self, state: State, acts: Number, grad_scale: Number, options: Options) -> Mood:
        """The scalars of the coming update; ``acts`` is False if it is skipped."""
        fade = like(state.code, 1.0)
        if options.fades:  # a rule whose step size does not depend on gradients would go on when nothing is to gain
            share = clamp(state.gain / clamp(state.gain_mean, 1e-300), high=1.0)
            fade = where(state.reflections > KNOWN_AFTER, share, fade)
        return Mood(
            drive=exp(state.log_drive),
            scale=fade,
            trust=None,
            grad_scale=grad_scale,
            pull=state.panic,  # restores the shadow even if the gradient is not finite
            follow=where(acts, 1 / (self.shadow_horizon * (state.steps + 1) + 1), 0.0),
            scalar=state.scalar,
            last_scalar=state.last_scalar,
        )

    def mood_word(self, values: dict[str, float], stop: bool) -> str:
        """One word for the state."""
        lean = values["trust"]
        words = {
            "done": stop,
            "resting": values["rest"] > 0 or values["goal"] > NEVER,  # until the drive is back
            "braking": values["tension"] > 1.5 and values["scalar"] > 0,
            "growing": lean > 0.03,
            "easing": lean < -0.03,
        }
        return next((word for word, holds in words.items() if holds), "steady")

    def should_stop(self, state: State) -> Number:
        """True once, for long enough, the last stretch has given next to nothing of all progress."""
        return state.calm > clamp(0.05 * state.losses, 64.0)
