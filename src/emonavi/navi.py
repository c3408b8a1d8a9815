r"""EmoNavi: the Adam rule under an emotion.

With gradient :math:`g`, the bias corrections of step k (1 in the presets), and a ready ``step_size`` and ``decay`` for
each tensor::

    exp_avg    = beta1 exp_avg    + (1 - beta1) g
    exp_avg_sq = beta2 exp_avg_sq + (1 - beta2) trust g^2               trust: the preset v4 only
    denom      = sqrt(exp_avg_sq) / root + eps                          root = sqrt(1 - beta2^k)
    param      = decay param - step_size exp_avg / denom                step_size = lr drive / (1 - beta1^k)

Reflection compares g with the step taken last, u = exp_avg / denom as they stood before this update, in Adam's own
metric: <g, u>, <g, g / denom>, <exp_avg, u>.

Sources: Adam (Kingma and Ba 2015, https://arxiv.org/abs/1412.6980) with decoupled weight decay (Loshchilov and Hutter
2019, https://arxiv.org/abs/1711.05101); the emotion around it after muooon/EmoNavi.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from emonavi.optimizer import EmoOptimizer
from emonavi.sweep import Reflected, dot, wide

__all__ = ["EmoNavi", "emonavi"]


class EmoNavi(EmoOptimizer):
    __doc__ = EmoOptimizer.describe(
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

    def _init_state(self, param: Tensor) -> dict[str, Tensor]:
        return {name: torch.zeros_like(wide(param)) for name in self._layout(param)}

    def _rule(self, layout: tuple[str, ...]) -> tuple[Callable[..., list[Reflected]], bool]:
        return emonavi, True

    def _scalars(
        self, layout: tuple[str, ...], group: dict[str, Any], steps: Tensor, step_sizes: Tensor, trust: Tensor | None
    ) -> dict[str, Any]:
        return adam_scalars(group, steps, step_sizes, self._emotion.corrects_bias) | {"square_trust": trust}


def adam_scalars(group: dict[str, Any], steps: Tensor, step_sizes: Tensor, corrects_bias: bool) -> dict[str, Any]:
    """Constants and bias corrections of the Adam rule for tensors at the given step counts (1-D)."""
    beta1, beta2 = group["betas"]
    roots = last_roots = torch.ones_like(steps)
    if corrects_bias:
        step_sizes = step_sizes / (1 - beta1**steps)
        roots = torch.sqrt(1 - beta2**steps)
        last_roots = torch.where(steps > 1, torch.sqrt(1 - beta2 ** (steps - 1)), 1.0)
    constants = {"beta1": beta1, "beta2": beta2, "eps": group["eps"]}
    return constants | {"step_sizes": step_sizes, "roots": roots, "last_roots": last_roots}


def emonavi(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    *,
    step_sizes: list[Tensor],
    decays: list[Tensor] | None,
    roots: list[Tensor],
    last_roots: list[Tensor],
    beta1: float,
    beta2: float,
    eps: float,
    grad_trust: Tensor | None = None,
    square_trust: Tensor | None = None,
    reflect: bool = True,
    foreach: bool = True,
) -> list[Reflected]:
    """Functional form of the rule; updates the parameters and both memories in place.

    Args:
        params: tensors to move; ``grads``, ``exp_avgs`` and ``exp_avg_sqs`` are parallel to it, of equal shapes.
        step_sizes: 0-d, for each tensor: effective lr over ``1 - beta1^k``.
        decays: 0-d, for each tensor: the factor of weight decay, or None for none.
        roots: 0-d, for each tensor: ``sqrt(1 - beta2^k)``; ``last_roots``: the same for the step before.
        grad_trust: 0-d, scales what the first memory takes in; ``square_trust``: what the second does.
        reflect: compute the three dot products.
        foreach: update the lists together instead of one tensor after the other.

    Returns:
        For each tensor the three 0-d sums of reflection; an empty list without ``reflect``.
    """
    rule = _multi_tensor_emonavi if foreach else _single_tensor_emonavi
    return rule(
        params, grads, exp_avgs, exp_avg_sqs, step_sizes=step_sizes, decays=decays, roots=roots, last_roots=last_roots,
        beta1=beta1, beta2=beta2, eps=eps, grad_trust=grad_trust, square_trust=square_trust, reflect=reflect,
    )  # fmt: skip


def _single_tensor_emonavi(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    *,
    step_sizes: list[Tensor],
    decays: list[Tensor] | None,
    roots: list[Tensor],
    last_roots: list[Tensor],
    beta1: float,
    beta2: float,
    eps: float,
    grad_trust: Tensor | None,
    square_trust: Tensor | None,
    reflect: bool,
) -> list[Reflected]:
    reflected = []
    for i, (param, grad, exp_avg, exp_avg_sq) in enumerate(zip(params, grads, exp_avgs, exp_avg_sqs, strict=True)):
        if reflect:
            denom = exp_avg_sq.sqrt().div_(last_roots[i]).add_(eps)
            step = exp_avg / denom
            reflected.append((dot(grad, step), dot(grad, grad / denom), dot(exp_avg, step)))

        first = grad if grad_trust is None else grad * grad_trust
        exp_avg.lerp_(first, 1 - beta1)
        second = grad if square_trust is None else grad * square_trust
        exp_avg_sq.mul_(beta2).addcmul_(second, grad, value=1 - beta2)

        denom = exp_avg_sq.sqrt().div_(roots[i]).add_(eps)
        if decays is not None:
            param.mul_(decays[i])
        param.addcmul_(exp_avg / denom, step_sizes[i], value=-1)
    return reflected


def _multi_tensor_emonavi(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    *,
    step_sizes: list[Tensor],
    decays: list[Tensor] | None,
    roots: list[Tensor],
    last_roots: list[Tensor],
    beta1: float,
    beta2: float,
    eps: float,
    grad_trust: Tensor | None,
    square_trust: Tensor | None,
    reflect: bool,
) -> list[Reflected]:
    reflected = []
    if reflect:
        denoms = torch._foreach_sqrt(exp_avg_sqs)
        torch._foreach_div_(denoms, last_roots)
        torch._foreach_add_(denoms, eps)
        steps = torch._foreach_div(exp_avgs, denoms)
        scaled = torch._foreach_div(grads, denoms)
        reflected = [
            (dot(g, u), dot(g, s), dot(m, u)) for g, u, s, m in zip(grads, steps, scaled, exp_avgs, strict=True)
        ]

    firsts = grads if grad_trust is None else torch._foreach_mul(grads, grad_trust)
    torch._foreach_lerp_(exp_avgs, firsts, 1 - beta1)
    seconds = grads if square_trust is None else torch._foreach_mul(grads, square_trust)
    torch._foreach_mul_(exp_avg_sqs, beta2)
    torch._foreach_addcmul_(exp_avg_sqs, seconds, grads, 1 - beta2)

    denoms = torch._foreach_sqrt(exp_avg_sqs)
    torch._foreach_div_(denoms, roots)
    torch._foreach_add_(denoms, eps)
    if decays is not None:
        torch._foreach_mul_(params, decays)
    torch._foreach_addcmul_(params, torch._foreach_div(exp_avgs, denoms), step_sizes, -1)
    return reflected
