r"""EmoNavi: the Adam rule under an emotion.

With gradient :math:`g`, the bias corrections of step k (1 in the presets), and a ready ``step_size`` and ``decay`` for
each tensor::

    exp_avg    = beta1 exp_avg    + (1 - beta1) g
    exp_avg_sq = beta2 exp_avg_sq + (1 - beta2) trust g^2               trust: the preset v4 only
    denom      = sqrt(exp_avg_sq) / root + eps                          root = sqrt(1 - beta2^k)
    param      = decay param - step_size exp_avg / denom                step_size = lr drive / (1 - beta1^k)

Reflection compares g with the last step, u = exp_avg / denom as they were before this update, in Adam's own metric:
<g, u>, <g, g / denom>, <exp_avg, u>.

Sources: Adam (Kingma and Ba 2015, https://arxiv.org/abs/1412.6980) with decoupled weight decay (Loshchilov and Hutter
2019, https://arxiv.org/abs/1711.05101); the emotion around it after muooon/EmoNavi.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from emonavi.machine import Mood
from emonavi.optimizer import EmoOptimizer
from emonavi.sweep import Reflected, Rule, dot

__all__ = ["EmoNavi", "emonavi"]


class EmoNavi(EmoOptimizer):
    __doc__ = EmoOptimizer._describe(
        """Adam-type optimizer that listens to the loss. State: 8 bytes per float32 parameter.""",
        """
    Example:
        >>> import torch
        >>> from emonavi import EmoNavi
        >>> model = torch.nn.Linear(4, 1)
        >>> optimizer = EmoNavi(model.parameters())
        >>> for _ in range(3):
        ...     optimizer.zero_grad()
        ...     model(torch.ones(8, 4)).square().mean().backward()
        ...     loss = optimizer.step()
        >>> optimizer.emotion.steps
        3
    """,
    )

    def _layout(self, param: Tensor) -> tuple[str, ...]:
        return ("exp_avg", "exp_avg_sq")

    def _rule(self, layout: tuple[str, ...]) -> tuple[Rule, bool]:
        return emonavi, True

    def _scalars(
        self, layout: tuple[str, ...], group: dict[str, Any], steps: Tensor, step_size: Tensor, mood: Mood
    ) -> dict[str, Any]:
        return adam_scalars(group, steps, step_size, self._emotion.corrects_bias) | {"square_trust": mood.trust}


def adam_scalars(group: dict[str, Any], steps: Tensor, step_size: Tensor, corrects_bias: bool) -> dict[str, Any]:
    """Constants and bias corrections of the Adam rule for tensors at the given step counts (1-D)."""
    beta1, beta2 = group["betas"]
    root = last_root = torch.ones_like(steps)
    if corrects_bias:
        step_size = step_size / (1 - beta1**steps)
        root = torch.sqrt(1 - beta2**steps)
        last_root = torch.where(steps > 1, torch.sqrt(1 - beta2 ** (steps - 1)), 1.0)
    constants = {"beta1": beta1, "beta2": beta2, "eps": group["eps"]}
    return constants | {"step_size": step_size, "root": root, "last_root": last_root}


def emonavi(
    param: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    *,
    step_size: Tensor,
    decay: Tensor | None,
    root: Tensor,
    last_root: Tensor,
    beta1: float,
    beta2: float,
    eps: float,
    grad_trust: Tensor | None = None,
    square_trust: Tensor | None = None,
    reflect: bool = True,
) -> Reflected | None:
    """Functional form of the rule; updates the parameters and both memories in place.

    Args:
        param: a batch of n tensors to move, of shape (n, ...).
        grad: their gradients, of the same shape; not written to.
        exp_avg: their first memory, of the same shape.
        exp_avg_sq: their second memory, of the same shape.
        step_size: effective lr over ``1 - beta1^k``; 0-d, or of shape (n, 1, ...) for each tensor its own.
        decay: the factor of weight decay, shaped like ``step_size``, or None for none.
        root: ``sqrt(1 - beta2^k)``, shaped like ``step_size``.
        last_root: the same for the step before, 1 where there was none.
        beta1: decay rate of the first memory.
        beta2: decay rate of the second memory.
        eps: added to the denominator.
        grad_trust: 0-d, scales what enters the first memory.
        square_trust: 0-d, scales what enters the second memory.
        reflect: compute the sums of reflection.

    Returns:
        The three sums of reflection, each of shape (n,), or None without ``reflect``.
    """
    reflected = None
    if reflect:
        denom = exp_avg_sq.sqrt().div_(last_root).add_(eps)
        step = exp_avg / denom
        reflected = dot(grad, step), dot(grad, grad / denom), dot(exp_avg, step)

    exp_avg.lerp_(grad if grad_trust is None else grad * grad_trust, 1 - beta1)
    exp_avg_sq.mul_(beta2).addcmul_(grad if square_trust is None else grad * square_trust, grad, value=1 - beta2)

    denom = exp_avg_sq.sqrt().div_(root).add_(eps)
    if decay is not None:
        param.mul_(decay)
    param.addcmul_(exp_avg / denom, step_size, value=-1)
    return reflected
