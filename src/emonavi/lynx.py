r"""EmoLynx: the Lion rule under an emotion.

With gradient :math:`g` and a ready ``step_size`` and ``decay`` for each tensor::

    direction = sign((1 - beta1) g + beta1 trust exp_avg)               trust: the preset v4 only
    param     = decay param - step_size direction                       step_size = lr drive
    exp_avg   = beta2 exp_avg + (1 - beta2) g

Reflection compares g with the sign of the memory as it stood before this update, in Lion's own metric:
<g, sign(exp_avg)> over sum |g|.

Sources: Lion (Chen et al. 2023, https://arxiv.org/abs/2302.06675); the emotion around it after muooon/EmoNavi.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from emonavi.emotion import Emotion
from emonavi.optimizer import EmoOptimizer, ParamsT
from emonavi.presets import Preset
from emonavi.sweep import Reflected, dot, wide

__all__ = ["EmoLynx", "emolynx"]


class EmoLynx(EmoOptimizer):
    __doc__ = EmoOptimizer.describe(
        """Lion-type optimizer that listens to the loss. State: 4 bytes per float32 parameter.""",
        """
        decoupled_weight_decay: divide ``weight_decay`` by the lr that a group had when it was added, so that it does
            not depend on the choice of lr.

    Lion divides by nothing: ``eps`` is here so that the siblings can be exchanged.

    Example:
        >>> import torch
        >>> from emonavi import EmoLynx
        >>> model = torch.nn.Linear(4, 1)
        >>> optimizer = EmoLynx(model.parameters(), lr=1e-4)
        >>> model(torch.ones(8, 4)).square().mean().backward()
        >>> loss = optimizer.step()
        >>> optimizer.emotion.steps
        1
    """,
    )

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.99),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
        *,
        emotion: str | Emotion | Preset = "adaptive",
        use_shadow: bool | None = None,
        use_trust: bool | None = None,
        max_norm: float | None = None,
        min_lr: float | None = None,
        max_lr: float | None = None,
        decoupled_weight_decay: bool = False,
        writer: Any = None,
        capture: str | bool = "auto",
        on_missing_loss: str = "warn",
        process_group: Any = "auto",
        maximize: bool = False,
        foreach: bool | None = None,
        fused: bool | None = None,
        capturable: bool = False,
    ) -> None:
        super().__init__(
            params, lr, betas, eps, weight_decay, emotion=emotion, use_shadow=use_shadow, use_trust=use_trust,
            max_norm=max_norm, min_lr=min_lr, max_lr=max_lr, writer=writer, capture=capture,
            on_missing_loss=on_missing_loss, process_group=process_group, maximize=maximize, foreach=foreach,
            fused=fused, capturable=capturable,
        )  # fmt: skip
        self.defaults["decoupled_weight_decay"] = bool(decoupled_weight_decay)
        for group in self.param_groups:
            group.setdefault("decoupled_weight_decay", bool(decoupled_weight_decay))

    def _decay_rate(self, group: dict[str, Any]) -> float:
        rate = super()._decay_rate(group)
        return rate / group["lr_start"] if group["decoupled_weight_decay"] and rate else rate

    def _layout(self, param: Tensor) -> tuple[str, ...]:
        return ("exp_avg",)

    def _init_state(self, param: Tensor) -> dict[str, Tensor]:
        return {"exp_avg": torch.zeros_like(wide(param))}

    def _rule(self, layout: tuple[str, ...]) -> tuple[Callable[..., list[Reflected]], bool]:
        return emolynx, True

    def _scalars(
        self, layout: tuple[str, ...], group: dict[str, Any], steps: Tensor, step_sizes: Tensor, trust: Tensor | None
    ) -> dict[str, Any]:
        beta1, beta2 = group["betas"]
        return {"beta1": beta1, "beta2": beta2, "step_sizes": step_sizes, "trust": trust}


def emolynx(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    *,
    step_sizes: list[Tensor],
    decays: list[Tensor] | None,
    beta1: float,
    beta2: float,
    trust: Tensor | None = None,
    reflect: bool = True,
    foreach: bool = True,
) -> list[Reflected]:
    """Functional form of the rule; updates the parameters and the memory in place.

    Args:
        params: tensors to move; ``grads`` and ``exp_avgs`` are parallel to it, of equal shapes.
        step_sizes: 0-d, for each tensor: the effective lr.
        decays: 0-d, for each tensor: the factor of weight decay, or None for none.
        trust: 0-d, scales the memory in the direction.
        reflect: compute the sums of reflection.
        foreach: update the lists together instead of one tensor after the other.

    Returns:
        For each tensor the three 0-d sums of reflection; an empty list without ``reflect``.
    """
    rule = _multi_tensor_emolynx if foreach else _single_tensor_emolynx
    return rule(
        params, grads, exp_avgs, step_sizes=step_sizes, decays=decays, beta1=beta1, beta2=beta2, trust=trust,
        reflect=reflect,
    )  # fmt: skip


def _single_tensor_emolynx(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    *,
    step_sizes: list[Tensor],
    decays: list[Tensor] | None,
    beta1: float,
    beta2: float,
    trust: Tensor | None,
    reflect: bool,
) -> list[Reflected]:
    reflected = []
    for i, (param, grad, exp_avg) in enumerate(zip(params, grads, exp_avgs, strict=True)):
        if reflect:
            size = grad.abs().sum()
            reflected.append((dot(grad, exp_avg.sign()), size, size))

        memory = exp_avg if trust is None else exp_avg * trust
        direction = torch.lerp(grad, memory, beta1).sign_()
        if decays is not None:
            param.mul_(decays[i])
        param.addcmul_(direction, step_sizes[i], value=-1)
        exp_avg.lerp_(grad, 1 - beta2)
    return reflected


def _multi_tensor_emolynx(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    *,
    step_sizes: list[Tensor],
    decays: list[Tensor] | None,
    beta1: float,
    beta2: float,
    trust: Tensor | None,
    reflect: bool,
) -> list[Reflected]:
    reflected = []
    if reflect:
        sizes = [size.sum() for size in torch._foreach_abs(grads)]
        signs = torch._foreach_sign(exp_avgs)
        reflected = [(dot(g, s), size, size) for g, s, size in zip(grads, signs, sizes, strict=True)]

    memories = exp_avgs if trust is None else torch._foreach_mul(exp_avgs, trust)
    directions = torch._foreach_sign(torch._foreach_lerp(grads, memories, beta1))
    if decays is not None:
        torch._foreach_mul_(params, decays)
    torch._foreach_addcmul_(params, directions, step_sizes, -1)
    torch._foreach_lerp_(exp_avgs, grads, 1 - beta2)
    return reflected
