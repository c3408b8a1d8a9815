r"""EmoNeco: the Lion rule with a soft sign, under an emotion.

With gradient :math:`g` and a ready ``step_size`` and ``decay`` for each tensor::

    blend   = (1 - beta1) g + beta1 exp_avg
    soft    = 2 blend / (|blend| + mean |blend|)        the mean over the tensor
    hard    = clip(2 scalar, 0, 1)
    param   = decay param - step_size ((1 - hard) soft + hard sign(blend))          step_size = lr drive fade
    exp_avg = beta2 exp_avg + (1 - beta2) g

A sign moves every weight by the same amount, even one that hardly matters. The soft sign is 1 where \|blend\| equals
its mean, less where it is smaller, and at most 2. While the loss rises beyond its noise, the step is Lion's sign. If a
loss ends at 0, it still needs Lion's fade (``lynx.py``). Reflection compares g with the last step u, the soft sign of
the memory before this update, relative to the largest possible agreement: <g, u> over sum |g| |u|.

As published (``emotion="v3"``), ``soft`` is blend / (1 + \|blend\|) (norm(g) + eps) if \|scalar\| is above 0.2 and at
most 0.5; otherwise the step is the sign, but only for weights whose gradient and blend have the same sign.

Sources: Lion (Chen et al. 2023, https://arxiv.org/abs/2302.06675); the published rule and the emotion after
muooon/EmoNavi.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from emonavi.clan import rising
from emonavi.emotion import Emotion
from emonavi.machine import Mood
from emonavi.optimizer import EmoOptimizer
from emonavi.presets import Preset
from emonavi.scalars import Number, number
from emonavi.sweep import Reflected, Rule, dot
from emonavi.zeal import softsign

__all__ = ["EmoNeco", "emoneco", "emoneco_v3"]


class EmoNeco(EmoOptimizer):
    __doc__ = EmoOptimizer._describe(
        """Lion-type optimizer with a soft sign that listens to the loss.

    State: 4 bytes per float32 parameter. EmoZeal needs no more and ended lower on 23 of 27 tasks: this one only
    completes the family. ``emotion`` is ``"adaptive"`` or ``"v3"``, for which the rule was published.""",
        """
    Example:
        >>> import torch
        >>> from emonavi import EmoNeco
        >>> model = torch.nn.Linear(4, 1)
        >>> optimizer = EmoNeco(model.parameters(), lr=1e-4)
        >>> model(torch.ones(8, 4)).square().mean().backward()
        >>> loss = optimizer.step()
        >>> sorted(optimizer.state[model.weight])
        ['drive', 'exp_avg', 'step', 'trust']
    """,
    )

    _generations = ("v3",)
    # As EmoLynx: the same memory, and steps whose size does not depend on that of gradients.
    _target = (0.3, 0.3)
    _fall = 2.0
    _fades = True

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.99),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
        *,
        emotion: str | Mapping[str, float] | Emotion | Preset = "adaptive",
        use_shadow: bool | None = None,
        use_trust: bool | None = None,
        max_norm: float | None = None,
        min_lr: float | None = None,
        max_lr: float | None = None,
        writer: Any = None,
        capture: str | bool = "auto",
        on_missing_loss: str = "warn",
        process_group: Any = "auto",
        maximize: bool = False,
        foreach: bool | None = None,
        fused: bool | None = None,
        capturable: bool = False,
        state_dtype: str | torch.dtype | None = None,
        stochastic_rounding: bool = True,
    ) -> None:
        super().__init__(
            params, lr, betas, eps, weight_decay, emotion=emotion, use_shadow=use_shadow, use_trust=use_trust,
            max_norm=max_norm, min_lr=min_lr, max_lr=max_lr, writer=writer, capture=capture,
            on_missing_loss=on_missing_loss, process_group=process_group, maximize=maximize, foreach=foreach,
            fused=fused, capturable=capturable, state_dtype=state_dtype, stochastic_rounding=stochastic_rounding,
        )  # fmt: skip

    def _layout(self, param: Tensor) -> tuple[str, ...]:
        return ("exp_avg",)

    def _rule(self, layout: tuple[str, ...]) -> tuple[Rule, bool]:
        return (emoneco if self._emotion.reflects else emoneco_v3), False

    def _scalars(
        self, layout: tuple[str, ...], group: dict[str, Any], steps: Tensor, step_size: Tensor, mood: Mood
    ) -> dict[str, Any]:
        beta1, beta2 = group["betas"]
        own = {"beta1": beta1, "beta2": beta2, "step_size": step_size}
        if self._emotion.reflects:
            return own | {"hard": rising(mood.scalar), "last_hard": rising(mood.last_scalar)}
        size = abs(mood.scalar)
        return own | {"eps": group["eps"], "soft": number((size > 0.2) & (size <= 0.5))}


def emoneco(
    param: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    *,
    step_size: Tensor,
    decay: Tensor | None,
    beta1: float,
    beta2: float,
    hard: Number = 0.0,
    last_hard: Number = 0.0,
    reflect: bool = True,
) -> Reflected | None:
    """Functional form of the rule; updates the parameters and the memory in place.

    Args:
        param: a batch of n tensors to move, of shape (n, ...).
        grad: their gradients, of the same shape; not written to.
        exp_avg: their memory, of the same shape.
        step_size: effective lr; 0-d, or of shape (n, 1, ...) for each tensor its own.
        decay: the factor of weight decay, shaped like ``step_size``, or None for none.
        beta1: weight of the memory in the direction.
        beta2: decay rate of the memory.
        hard: share of the sign, 0 to 1; a plain number may be branched on, a 0-d tensor is not.
        last_hard: the same for the step before.
        reflect: compute the sums of reflection.

    Returns:
        The three sums of reflection, each of shape (n,), or None without ``reflect``.
    """
    reflected = None
    if reflect:
        step = _direction(exp_avg, last_hard)
        most = dot(grad.abs(), step.abs())
        reflected = dot(grad, step), most, most

    direction = _direction(torch.lerp(grad, exp_avg, beta1), hard)
    if decay is not None:
        param.mul_(decay)
    param.addcmul_(direction, step_size, value=-1)
    exp_avg.lerp_(grad, 1 - beta2)
    return reflected


def _direction(blend: Tensor, hard: Number) -> Tensor:
    """The soft sign of a batch of shape (n, ...), interpolated by the share ``hard`` towards the sign."""
    if not isinstance(hard, Tensor) and hard == 1:
        return blend.sign()
    size = blend.abs()
    mean = size.mean(dim=tuple(range(1, size.dim())), keepdim=True) if size.dim() > 1 else size
    soft = 2 * blend / (size + mean).clamp_(min=torch.finfo(blend.dtype).tiny)
    return torch.lerp(soft, blend.sign(), hard) if isinstance(hard, Tensor) or hard else soft


def emoneco_v3(
    param: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    *,
    step_size: Tensor,
    decay: Tensor | None,
    beta1: float,
    beta2: float,
    eps: float,
    soft: Number,
    reflect: bool = False,
) -> None:
    """Functional form of the published rule; ``soft`` is 1 for its soft sign, 0 for the sign where both agree.

    ``eps`` is added to the norm; the other arguments are those of :func:`emoneco`. It does not reflect.
    """
    blend = torch.lerp(grad, exp_avg, beta1)
    if isinstance(soft, Tensor):
        direction = torch.where(soft > 0, softsign(blend, grad, eps), _agreed(blend, grad))
    else:
        direction = softsign(blend, grad, eps) if soft else _agreed(blend, grad)
    if decay is not None:
        param.mul_(decay)
    param.addcmul_(direction, step_size, value=-1)
    exp_avg.lerp_(grad, 1 - beta2)


def _agreed(blend: Tensor, grad: Tensor) -> Tensor:
    """The sign of the blend where the gradient has the same sign, else 0."""
    return torch.where(blend.sign() == grad.sign(), blend.sign(), 0.0)
