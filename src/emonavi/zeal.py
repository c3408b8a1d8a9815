r"""EmoZeal: the Adafactor rule with momentum, under an emotion.

For a tensor of two or more dimensions with gradient :math:`g`, a ready ``step_size`` and ``decay``, and the bias
corrections of step k::

    exp_avg     = beta1 exp_avg     + (1 - beta1) g
    exp_avg_row = beta2 exp_avg_row + (1 - beta2) sqrt(mean of g^2 over all dims but the first + eps^2)
    exp_avg_col = beta2 exp_avg_col + (1 - beta2) sqrt(mean of g^2 over the first dim + eps^2)
    denom       = sqrt(exp_avg_row exp_avg_col) / root^2 + eps          root^2 = 1 - beta2^k
    u           = exp_avg / (1 - beta1^k) / denom
    signed      = clip(2 scalar, 0, 1)
    param       = decay param - lr drive ((1 - signed) u + signed 0.5 sign(exp_avg))

There are three differences to ``fact.py``. It has a memory of the gradient, which makes it as steady as Adam at half of
Adam's state. The memory of rows and columns is longer to match. And it steps by sign while the loss rises beyond its
noise (``clan.py``), since a coordinate whose row and column are mostly zero would take a step of many times lr. Vectors
and scalars follow the Adam rule of ``navi.py``. Reflection compares g with the last step in the rule's metric, with the
denominator d of that time: <g, u>, <g, g / d>, <u, u d>.

As published (``emotion="v3"``) it is the rule of ``fact.py`` after one more step, which depends on today's gradient
only, because the published memory stays zero. With blend = (1 - beta1) g that step is sign(g) if \|scalar\| is above
0.6, else blend / (1 + \|blend\|) (norm(g) + eps) if it is above 0.1.

Sources: Adafactor (Shazeer and Stern 2018, https://arxiv.org/abs/1804.04235), which has momentum as well; the
published rule and the emotion after muooon/EmoNavi.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from emonavi.clan import signed_scalars, signed_step
from emonavi.fact import emofact
from emonavi.machine import Mood
from emonavi.navi import adam_scalars, emonavi
from emonavi.optimizer import EmoOptimizer
from emonavi.scalars import Number, number
from emonavi.sweep import Reflected, Rule, dot

__all__ = ["EmoZeal", "emozeal", "emozeal_v3"]


class EmoZeal(EmoOptimizer):
    __doc__ = EmoOptimizer._describe(
        """Adafactor-type optimizer with momentum that listens to the loss: near EmoNavi, at half of its state.

    State: 4 bytes per float32 parameter of a matrix, and one float32 for each of its rows and columns; vectors keep 8
    bytes per parameter. ``emotion`` is ``"adaptive"`` or ``"v3"``, for which the rule was published.""",
        """
    Example:
        >>> import torch
        >>> from emonavi import EmoZeal
        >>> model = torch.nn.Linear(4, 1)
        >>> optimizer = EmoZeal(model.parameters())
        >>> model(torch.ones(8, 4)).square().mean().backward()
        >>> loss = optimizer.step()
        >>> sorted(optimizer.state[model.weight])
        ['drive', 'exp_avg', 'exp_avg_col', 'exp_avg_row', 'step', 'trust']
    """,
    )

    _generations = ("v3",)

    def _layout(self, param: Tensor) -> tuple[str, ...]:
        if param.dim() < 2:
            return ("exp_avg", "exp_avg_sq")
        # The published rule has a memory of the gradient that stays zero, and is not stored.
        return ("exp_avg", "exp_avg_row", "exp_avg_col")[0 if self._emotion.reflects else 1 :]

    def _rule(self, layout: tuple[str, ...]) -> tuple[Rule, bool]:
        if "exp_avg_sq" in layout:
            return emonavi, True
        return (emozeal if self._emotion.reflects else emozeal_v3), False

    def _scalars(
        self, layout: tuple[str, ...], group: dict[str, Any], steps: Tensor, step_size: Tensor, mood: Mood
    ) -> dict[str, Any]:
        own = adam_scalars(group, steps, step_size, self._emotion.corrects_bias)
        if "exp_avg_sq" in layout:
            return own
        if self._emotion.reflects:
            return own | signed_scalars(group, steps, mood)
        size = abs(mood.scalar)
        published = {"step_size": step_size, "bias": own["root"], "beta1": own["beta1"], "eps": own["eps"]}
        return published | {"sign": number(size > 0.6), "soft": number((size > 0.1) & (size <= 0.6))}


def emozeal(
    param: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_row: Tensor,
    exp_avg_col: Tensor,
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
    """Functional form of the rule for two or more dimensions; updates parameters and memories in place.

    Args:
        param: a batch of n tensors to move, of shape (n, r, ...).
        grad: their gradients, of the same shape; not written to.
        exp_avg: their memory of the gradient, of the same shape.
        exp_avg_row: their memory of rows, of shape (n, r, 1, ...).
        exp_avg_col: their memory of columns, of shape (n, 1, ...).
        step_size: effective lr over ``bias``; 0-d, or of shape (n, 1, 1, ...) for each tensor its own.
        decay: the factor of weight decay, shaped like ``step_size``, or None for none.
        root: ``sqrt(1 - beta2^k)``, shaped like ``step_size``.
        last_root: the same for the step before, 1 where there was none.
        bias: ``1 - beta1^k``, shaped like ``step_size``.
        last_bias: the same for the step before.
        beta1: decay rate of the memory of the gradient.
        beta2: decay rate of the memories of rows and columns.
        eps: added to the denominator; its square to each mean of squares.
        signed: share of the signed step, 0 to 1; a plain number may be branched on, a 0-d tensor is not.
        last_signed: the same for the step before.
        reflect: compute the sums of reflection.

    Returns:
        The three sums of reflection, each of shape (n,), or None without ``reflect``.
    """
    reflected = None
    if reflect:
        denom = torch.mul(exp_avg_row.sqrt().div_(last_root * last_root), exp_avg_col.sqrt()).add_(eps)
        step = signed_step(exp_avg / denom, exp_avg, last_signed, last_bias)
        reflected = dot(grad, step), dot(grad, grad / denom), dot(step, step * denom)

    exp_avg.lerp_(grad, 1 - beta1)
    square = grad * grad
    for memory, dims in ((exp_avg_row, tuple(range(2, grad.dim()))), (exp_avg_col, (1,))):
        memory.lerp_(square.mean(dim=dims, keepdim=True).add_(eps * eps).sqrt_(), 1 - beta2)

    denom = torch.mul(exp_avg_row.sqrt().div_(root * root), exp_avg_col.sqrt(), out=square).add_(eps)
    if decay is not None:
        param.mul_(decay)
    step = torch.div(exp_avg, denom, out=denom)
    param.addcmul_(signed_step(step, exp_avg, signed, bias), step_size, value=-1)
    return reflected


def emozeal_v3(
    param: Tensor,
    grad: Tensor,
    exp_avg_row: Tensor,
    exp_avg_col: Tensor,
    *,
    step_size: Tensor,
    decay: Tensor | None,
    bias: Tensor,
    beta1: float,
    eps: float,
    sign: Number,
    soft: Number,
    reflect: bool = False,
) -> None:
    """Functional form of the published rule for two or more dimensions.

    ``sign`` and ``soft`` are 1 if that step comes before the rule of :func:`~emonavi.fact.emofact`, else 0; the other
    arguments are that rule's. It does not reflect.
    """
    if isinstance(sign, Tensor) or sign:
        param.addcmul_(grad.sign(), step_size * sign, value=-1)
    if isinstance(soft, Tensor) or soft:
        param.addcmul_(softsign((1 - beta1) * grad, grad, eps), step_size * soft, value=-1)
    emofact(
        param, grad, exp_avg_row, exp_avg_col, step_size=step_size, decay=decay, bias=bias, beta1=beta1, eps=eps,
        floor=eps, reflect=False,
    )  # fmt: skip


def softsign(blend: Tensor, grad: Tensor, eps: float) -> Tensor:
    """The published soft sign of a batch of shape (n, ...), times the norm of each tensor's gradient."""
    norm = dot(grad, grad).sqrt_().add_(eps)
    return blend / (1 + blend.abs()) * norm.view(-1, *(1 for _ in grad.shape[1:]))
