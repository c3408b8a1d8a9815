r"""Reflection: how the cosine between today's gradient and the last step moves the drive.

After a panic (``emotion.py``) the drive rests and then returns; until it is back, trust does not move it.

For the cosine :math:`c_t` between today's gradient and the optimizer's last step, in the rule's metric::

    trust += max(0.1, 1/n) (c_t - trust)      fast += max(0.3, 1/n) (c_t - fast)
    noise += max(0.1, 1/(n+1)) ((c_t - trust)^2 - noise)
    T      = 2.38 (fast - up) / sqrt(noise)          fast's own t-statistic; up = max(target, 0), and T' from the target
    slow   = min(0.05, 2/n) clip((trust - up) / scale, 0, 1)            within the noise: on a logarithmic clock,
           - min(0.05, fall/n) clip((target - trust) / scale, 0, 1)     scale = min(0.1, sqrt(noise))
    sure   = 0.1 (clip((T - 2) / 4, 0, 1) - clip((-T' - 4) / 4, 0, 1))  beyond doubt
    free   = 0.1 clip((T0 + 1) / 2, 0, 1)                               while the lr is too low to do harm; T0 from 0
    log drive += sure if |sure| > |slow|, else slow; at least free      only downwards if nothing is left to gain

Under noise alone trust settles half a standard deviation below 0, so the threshold of ``sure`` is higher downwards.
Target and fall depend on the rule. The target, in standard deviations of the cosine, is 0 for Adam, below 0 for a rule
without momentum (EmoFact), above 0 for one with a long memory (EmoLynx): the longer the rule's memory, the larger the
lr at which trust reaches 0; hence the target above 0. The gain is the largest first-order improvement that a step of lr
1 could have had, from the same sums; below a hundredth of its mean so far nothing is left to gain. A rule whose step
size does not depend on the gradient's size (EmoLynx) is faded: its step, but not its weight decay, is multiplied by
min(1, gain / mean gain).

Source: hypergradient descent (Baydin et al. 2018, https://arxiv.org/abs/1703.04782), normalised to a cosine so that no
scale enters.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from emonavi.machine import Options, Sums, keep
from emonavi.scalars import Number, clamp, isfinite, like, log, negate, rsqrt, sqrt, where

if TYPE_CHECKING:
    from emonavi.emotion import State

__all__ = ["KNOWN_AFTER", "NEVER", "Reflection", "running_mean"]

NEVER = -1e9  # "no goal": finite, so that arithmetic on it stays defined
KNOWN_AFTER = 3  # cosines: trust and gain say nothing before
# sqrt((2 - 0.3) / 0.3): standard deviation of one cosine over that of its mean with rate 0.3.
FAST_T = 2.38
DRIVE_RANGE = (math.log(1e-8), math.log(1e6))
# Per step: with three steps of rest, the drive is back at half of its earlier value within ten.
HEAL_RATE = (math.log(0.5) - math.log(0.1)) / 7


def running_mean(old: Number, new: Number, rate: float, count: Number) -> Number:
    """The plain mean of the first 1/rate values, then an exponential running mean of that rate."""
    return old + clamp(1 / clamp(count, 1.0), rate) * (new - old)


class Reflection:
    """Base class of :class:`~emonavi.Emotion`, which defines the state and explains these constants."""

    pace: float
    clock: float
    sure: float
    tensor_pace: float
    nothing: float
    tensor_range: float

    def reflect(self, state: State, sums: Sums, acted: Number, options: Options) -> State:
        """Learn from the cosine between today's gradient and the last step; ``acted`` is False for a skipped update."""
        last = where(acted, state.scalar, state.last_scalar)
        state = state._replace(panic=like(state.code, 0.0), steps=state.steps + acted, last_scalar=last)
        weighted = (sums.products * sums.weight).sum(1)
        grad_step, grad_grad, step_step = weighted.unbind() if isinstance(state.code, Tensor) else weighted.tolist()
        # Independent of lr: a drive that was cut must not look like a run with nothing left to gain.
        most = like(state.code, sums.weight.max()) if len(sums.weight) else like(state.code, 0.0)
        # Two roots: the product of two sums of squares may overflow or underflow.
        gain = sqrt(clamp(grad_grad, 0.0)) * sqrt(clamp(step_step, 0.0)) / clamp(most, 1e-300)
        cosine = grad_step * _rsqrt(grad_grad) * _rsqrt(step_step)
        seen = acted & (gain > 0) & isfinite(gain) & isfinite(cosine)
        cosine, gain = where(seen, clamp(cosine, -1.0, 1.0), 0.0), where(seen, gain, 0.0)

        n = state.reflections + 1
        trust = running_mean(state.trust, cosine, 0.1, n)
        fast = running_mean(state.fast, cosine, 0.3, n)
        noise = running_mean(state.noise, (cosine - trust) * (cosine - trust), 0.1, n + 1)
        new = state._replace(
            reflections=n, trust=trust, fast=fast, noise=noise,
            gain=running_mean(state.gain, gain, 0.1, n), gain_mean=running_mean(state.gain_mean, gain, 0.0, n),
        )  # fmt: skip
        new = keep(seen, new, state)
        # A brake is for one loss: it must not go on if no further loss is heard.
        return self._drive(new, seen, acted, options)._replace(brake=like(state.code, 0.0))

    def _drive(self, state: State, seen: Number, acted: Number, options: Options) -> State:
        """Move the drive: rest, return after a panic, or follow trust."""
        if options.use_trust:
            change = self._lean(state, options)
            change = where(seen & (state.reflections > KNOWN_AFTER), change, 0.0)
        else:
            change = clamp(-state.log_drive, -self.pace, self.pace) * (state.brake == 0)
        resting = state.rest > 0
        healing = negate(resting) & (state.log_drive < state.goal - 1e-6)
        heal = clamp(state.goal - state.log_drive, high=HEAL_RATE)
        change = where(healing, heal * (state.brake == 0), change)
        change = where(resting, 0.0, change)

        log_drive = self._bounded(state.log_drive + where(acted, change, 0.0), options)
        decayed = options.decayed & (state.log_drive_peak > NEVER)
        log_drive = where(decayed, clamp(log_drive, high=state.log_drive_peak), log_drive)
        peak = where(decayed, state.log_drive_peak, clamp(state.log_drive_peak, log_drive))
        return state._replace(
            log_drive=log_drive,
            log_drive_peak=peak,
            rest=where(acted, clamp(state.rest - 1, 0.0), state.rest),
            goal=where(resting | healing, state.goal, NEVER),
        )

    def _lean(self, state: State, options: Options) -> Number:
        """The change of the log drive that trust asks for."""
        deviation = sqrt(clamp(state.noise, 1e-12))
        target = options.target * deviation
        # Growth needs a positive trust even if the target is below 0: a step too long can ruin a network.
        up = clamp(target, 0.0)
        t_above, t_below = FAST_T * (state.fast - up) / deviation, FAST_T * (target - state.fast) / deviation
        # Noise alone keeps fast near -0.65 deviations, T' near -1.5: with a threshold of 2, noise would lower the lr.
        sure = self.sure * (clamp((t_above - 2) / 4, 0.0, 1.0) - clamp((t_below - 4) / 4, 0.0, 1.0))
        # The more weights there are, the smaller are both the cosine and its noise.
        scale = clamp(deviation, high=0.1)
        above, below = clamp((state.trust - up) / scale, 0.0, 1.0), clamp((target - state.trust) / scale, 0.0, 1.0)
        slow = self._pace(state, self.clock) * above - self._pace(state, options.fall) * below
        change = where(abs(sure) > abs(slow), sure, slow)
        free = self.sure * clamp((FAST_T * state.fast / deviation + 1) / 2, 0.0, 1.0)
        harmless = (state.log_drive < state.free) & (state.brake == 0) & (free > 0)
        change = where(harmless, clamp(change, free), change)
        return where(self._nothing_to_gain(state), clamp(change, high=0.0), change)

    def _nothing_to_gain(self, state: State) -> Number:
        """Whether the training loss is at its floor: there growth would only overfit."""
        return state.gain < self.nothing * state.gain_mean

    def _pace(self, state: State, clock: float) -> Number:
        """Largest change of the log drive within the noise."""
        return clamp(clock / clamp(state.reflections, 1.0), high=self.pace)

    def _bounded(self, log_drive: Number, options: Options) -> Number:
        """Keep the drive where it still changes the effective lr, so that it can turn at once."""
        low, high = log(like(log_drive, options.lowest_drive)), log(like(log_drive, options.highest_drive))
        return clamp(clamp(log_drive, low, high), *DRIVE_RANGE)

    def reflect_each(
        self, state: State, drive: Tensor, trust: Tensor, count: Tensor, sums: Sums
    ) -> tuple[Tensor, Tensor]:
        """The same for each tensor's own drive and trust (1-D, one entry for each tensor)."""
        grad_step, grad_grad, step_step = sums.products
        cosine = grad_step * _rsqrt(grad_grad) * _rsqrt(step_step)
        seen = (sums.weight > 0) & (grad_grad > 0) & (step_step > 0) & torch.isfinite(cosine)
        cosine = torch.where(seen, torch.clamp(cosine, -1, 1), 0.0)
        trust = torch.where(seen, running_mean(trust, cosine, 0.1, count), trust)
        change = self.tensor_pace * self._pace(state, self.clock) * torch.clamp((trust - state.trust) / 0.1, -1, 1)
        log_drive = torch.clamp(torch.log(drive) + change, -self.tensor_range, self.tensor_range)
        return torch.where(seen & (count > 7), torch.exp(log_drive), drive), trust


def _rsqrt(x: Number) -> Number:
    """One over the square root; finite for 0, so that its product with 0 is 0."""
    return rsqrt(clamp(x, 1e-300))
