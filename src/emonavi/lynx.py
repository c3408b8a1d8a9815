r"""EmoLynx: the Lion rule under an emotion.

With gradient :math:`g` and a ready ``step_size`` and ``decay`` for each tensor::

    direction = sign((1 - beta1) g + beta1 trust exp_avg)               trust: the preset v4 only
    param     = decay param - step_size direction                       step_size = lr drive fade
    exp_avg   = beta2 exp_avg + (1 - beta2) g

The fade, at most 1, is the recent gain over its mean so far (``reflection.py``; 1 in the presets): the size of a sign
does not depend on the gradient's. The fade is not part of ``effective_lr``, and ``min_lr`` does not bound it.

Reflection compares g with the sign of the memory before this update, in Lion's own metric:
<g, sign(exp_avg)> over sum |g|.

Sources: Lion (Chen et al. 2023, https://arxiv.org/abs/2302.06675); the emotion around it after muooon/EmoNavi.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from emonavi.active import highest
from emonavi.emotion import Emotion
from emonavi.machine import Mood
from emonavi.optimizer import EmoOptimizer
from emonavi.presets import Preset
from emonavi.scalars import like, where
from emonavi.spelling import spelled
from emonavi.sweep import Reflected, Rule, dot

__all__ = ["EmoLynx", "emolynx"]


class EmoLynx(EmoOptimizer):
    __doc__ = EmoOptimizer._describe(
        """Lion-type optimizer that listens to the loss. State: 4 bytes per float32 parameter.

    Lion has no denominator: ``eps`` is accepted so that the siblings can be exchanged, and ignored.""",
        """
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
        """
        decoupled_weight_decay: divide ``weight_decay`` by the lr that a group had when it was added, so that it does
            not depend on the choice of lr.""",
    )

    # Lion's memory is ten times as long as Adam's, so trust reaches 0 only at too large a step. Final loss over that of
    # the same rule tuned with cosine, on the dev task `digits`: 0.96 at 0.3, 1.25 at 0. Above 0.3 a long run freezes.
    _target = (0.3, 0.3)
    # A sign does not shrink with the gradient, so the lr must: a slower fall was 2 % worse on five dev tasks.
    _fall = 2.0
    # The step has the same size even where gradients vanish: on sixty memorised digits the final loss was 25 times that
    # of tuned Lion, and 3.3 times with this.
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
        decoupled_weight_decay: bool = False,
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
        own = spelled({"decoupled_weight_decay": decoupled_weight_decay})
        super().__init__(
            params, lr, betas, eps, weight_decay, emotion=emotion, use_shadow=use_shadow, use_trust=use_trust,
            max_norm=max_norm, min_lr=min_lr, max_lr=max_lr, writer=writer, capture=capture,
            on_missing_loss=on_missing_loss, process_group=process_group, maximize=maximize, foreach=foreach,
            fused=fused, capturable=capturable, state_dtype=state_dtype, stochastic_rounding=stochastic_rounding,
        )  # fmt: skip
        self.defaults.update(own)
        for group in self.param_groups:
            group.setdefault("decoupled_weight_decay", own["decoupled_weight_decay"])

    def _decay_rate(self, group: dict[str, Any]) -> float:
        rate = super()._decay_rate(group)
        if not group["decoupled_weight_decay"] or not rate:
            return rate
        start = group["lr_start"]
        # If a group begins at lr 0 (a warm-up), its highest lr so far is all that is known of the intended one.
        lr = where(start > 0, start, like(start, highest(group["lr"], group["lr_peak"])))
        decoupled: float = where(lr > 0, rate / where(lr > 0, lr, like(lr, 1.0)), like(lr, 0.0))
        return decoupled

    def _layout(self, param: Tensor) -> tuple[str, ...]:
        return ("exp_avg",)

    def _rule(self, layout: tuple[str, ...]) -> tuple[Rule, bool]:
        return emolynx, True

    def _scalars(
        self, layout: tuple[str, ...], group: dict[str, Any], steps: Tensor, step_size: Tensor, mood: Mood
    ) -> dict[str, Any]:
        beta1, beta2 = group["betas"]
        return {"beta1": beta1, "beta2": beta2, "step_size": step_size, "trust": mood.trust}


def emolynx(
    param: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    *,
    step_size: Tensor,
    decay: Tensor | None,
    beta1: float,
    beta2: float,
    trust: Tensor | None = None,
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
        trust: 0-d, scales the memory in the direction.
        reflect: compute the sums of reflection.

    Returns:
        The three sums of reflection, each of shape (n,), or None without ``reflect``.
    """
    reflected = None
    if reflect:
        size = dot(grad, grad.sign())
        reflected = dot(grad, exp_avg.sign()), size, size

    direction = torch.lerp(grad, exp_avg if trust is None else exp_avg * trust, beta1).sign_()
    if decay is not None:
        param.mul_(decay)
    param.addcmul_(direction, step_size, value=-1)
    exp_avg.lerp_(grad, 1 - beta2)
    return reflected
