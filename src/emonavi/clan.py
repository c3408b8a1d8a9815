r"""EmoClan: the rules of its sisters, chosen by the emotional scalar.

Under the adaptive emotion it is the Adam rule of ``navi.py``. While the loss rises beyond its noise, its step turns
into one of the same size for all weights, so that no single weight dominates. With Adam's bias-corrected direction
:math:`u` and its first memory::

    signed = clip(2 scalar, 0, 1)
    step   = (1 - signed) u + signed 0.5 sign(exp_avg)
    param  = decay param - lr drive step

``signed`` grows from 0 without a jump, so that no update depends on the last digit of a loss. Half a unit is between
the sizes of Adam's steps under noise alone (0.23) and without noise (1). Reflection compares the gradient with the last
step, mixed as it was then, in Adam's metric: with Adam's denominator d, <g, u>, <g, g / d>, <u, u d>.

As published (``emotion="v3"``) it has the memories of three rules, each updated only when it is chosen: for \|scalar\|
above 0.6 the Lion rule of ``lynx.py``, above 0.3 the Adafactor rule of ``fact.py``, else the Adam rule.

Sources: the idea of a clan and the published rules are from muooon/EmoNavi; for the single rules see their files.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from emonavi.fact import emofact
from emonavi.lynx import emolynx
from emonavi.machine import Mood
from emonavi.navi import adam_scalars, emonavi
from emonavi.optimizer import EmoOptimizer
from emonavi.scalars import Number, clamp, number
from emonavi.sweep import Reflected, Rule, dot

__all__ = ["EmoClan", "emoclan", "emoclan_v3", "signed_step"]

SIGNED = 0.5  # size of a signed step
LYNX_BETAS = (0.9, 0.99)  # of the published Lion rule, whatever the constructor's betas


class EmoClan(EmoOptimizer):
    __doc__ = EmoOptimizer._describe(
        """Adam-type optimizer that steps by sign while the loss rises. State: 8 bytes per float32 parameter.

    In calm runs it matches EmoNavi within the noise of a run. ``emotion`` is ``"adaptive"`` or ``"v3"``, for which the
    rule was published, with three sets of memories: 12 bytes for matrices, 20 for vectors.""",
        """
    Example:
        >>> import torch
        >>> from emonavi import EmoClan
        >>> model = torch.nn.Linear(4, 1)
        >>> optimizer = EmoClan(model.parameters())
        >>> model(torch.ones(8, 4)).square().mean().backward()
        >>> loss = optimizer.step()
        >>> sorted(optimizer.state[model.weight])
        ['drive', 'exp_avg', 'exp_avg_sq', 'step', 'trust']
    """,
    )

    _generations = ("v3",)

    def _layout(self, param: Tensor) -> tuple[str, ...]:
        if self._emotion.reflects:
            return ("exp_avg", "exp_avg_sq")
        fact = ("exp_avg_row", "exp_avg_col") if param.dim() > 1 else ("fact_exp_avg", "fact_exp_avg_sq")
        return ("exp_avg", "exp_avg_sq", *fact, "lynx_exp_avg")

    def _rule(self, layout: tuple[str, ...]) -> tuple[Rule, bool]:
        if self._emotion.reflects:
            return emoclan, True
        return emoclan_v3, "exp_avg_row" not in layout

    def _scalars(
        self, layout: tuple[str, ...], group: dict[str, Any], steps: Tensor, step_size: Tensor, mood: Mood
    ) -> dict[str, Any]:
        own = adam_scalars(group, steps, step_size, self._emotion.corrects_bias)
        if self._emotion.reflects:
            return own | signed_scalars(group, steps, mood)
        size = abs(mood.scalar)
        fact, lynx = (size > 0.3) & (size <= 0.6), size > 0.6
        return own | {"navi": number(size <= 0.3), "fact": number(fact), "lynx": number(lynx)}


def signed_scalars(group: dict[str, Any], steps: Tensor, mood: Mood) -> dict[str, Any]:
    """What :func:`signed_step` needs, at this step and at the one before: bias corrections, and shares of the sign."""
    beta1 = group["betas"][0]
    biases = {"bias": 1 - beta1**steps, "last_bias": 1 - beta1 ** (steps - 1)}
    return biases | {"signed": rising(mood.scalar), "last_signed": rising(mood.last_scalar)}


def rising(scalar: Number) -> Number:
    """How far the loss rises beyond its noise: 0 for a scalar up to 0, 1 from 0.5 on."""
    return clamp(2 * scalar, 0.0, 1.0)


def signed_step(step: Tensor, exp_avg: Tensor, signed: Number, bias: Tensor) -> Tensor:
    """The step, interpolated by the share ``signed`` towards a step by the memory's sign."""
    if not isinstance(signed, Tensor) and not signed:
        return step
    return torch.lerp(step, SIGNED * bias * exp_avg.sign(), signed)


def emoclan(
    param: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    *,
    step_size: Tensor,
    decay: Tensor | None,
    root: Tensor,
    last_root: Tensor,
    bias: Tensor,
    last_bias: Tensor,
    beta1: float,
    beta2: float,
    eps: float,
    signed: Number = 0.0,
    last_signed: Number = 0.0,
    reflect: bool = True,
) -> Reflected | None:
    """Functional form of the rule; updates the parameters and both memories in place.

    Args:
        param: a batch of n tensors to move, of shape (n, ...).
        grad: their gradients, of the same shape; not written to.
        exp_avg: their first memory, of the same shape.
        exp_avg_sq: their second memory, of the same shape.
        step_size: effective lr over ``bias``; 0-d, or of shape (n, 1, ...) for each tensor its own.
        decay: the factor of weight decay, shaped like ``step_size``, or None for none.
        root: ``sqrt(1 - beta2^k)``, shaped like ``step_size``.
        last_root: the same for the step before, 1 where there was none.
        bias: ``1 - beta1^k``, shaped like ``step_size``.
        last_bias: the same for the step before.
        beta1: decay rate of the first memory.
        beta2: decay rate of the second memory.
        eps: added to the denominator.
        signed: share of the signed step, 0 to 1; a plain number may be branched on, a 0-d tensor is not.
        last_signed: the same for the step before.
        reflect: compute the sums of reflection.

    Returns:
        The three sums of reflection, each of shape (n,), or None without ``reflect``.
    """
    reflected = None
    if reflect:
        denom = exp_avg_sq.sqrt().div_(last_root).add_(eps)
        step = signed_step(exp_avg / denom, exp_avg, last_signed, last_bias)
        reflected = dot(grad, step), dot(grad, grad / denom), dot(step, step * denom)

    exp_avg.lerp_(grad, 1 - beta1)
    exp_avg_sq.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)

    denom = exp_avg_sq.sqrt().div_(root).add_(eps)
    if decay is not None:
        param.mul_(decay)
    param.addcmul_(signed_step(exp_avg / denom, exp_avg, signed, bias), step_size, value=-1)
    return reflected


def emoclan_v3(
    param: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    fact_first: Tensor,
    fact_second: Tensor,
    lynx_exp_avg: Tensor,
    *,
    step_size: Tensor,
    decay: Tensor | None,
    root: Tensor,
    last_root: Tensor,
    beta1: float,
    beta2: float,
    eps: float,
    navi: Number,
    fact: Number,
    lynx: Number,
    reflect: bool = False,
) -> None:
    """Functional form of the published rule: one of ``navi``, ``fact`` and ``lynx`` is 1 and acts, the others are 0.

    ``fact_first`` and ``fact_second`` are the memories of rows and columns, or for vectors those of Adam; the other
    arguments are those of :func:`emoclan`. It does not reflect.
    """
    shared: dict[str, Any] = {"step_size": step_size, "decay": decay, "reflect": False}
    adam = shared | {"root": root, "last_root": last_root, "beta1": beta1, "beta2": beta2, "eps": eps}
    matrix = shared | {"bias": root, "beta1": beta1, "eps": eps, "floor": eps}
    lion = shared | dict(zip(("beta1", "beta2"), LYNX_BETAS, strict=True))
    factored = param.dim() > 2
    for chosen, rule, memories, scalars in (
        (navi, emonavi, (exp_avg, exp_avg_sq), adam),
        (fact, emofact if factored else emonavi, (fact_first, fact_second), matrix if factored else adam),
        (lynx, emolynx, (lynx_exp_avg,), lion),
    ):
        if not isinstance(chosen, Tensor):
            if chosen:
                rule(param, grad, *memories, **scalars)
            continue
        # Without waiting for a choice on a device: all rules run, and those not chosen are undone.
        before = [tensor.clone() for tensor in (param, *memories)]
        rule(param, grad, *memories, **scalars)
        for tensor, old in zip((param, *memories), before, strict=True):
            tensor.copy_(torch.where(chosen > 0, tensor, old))
