r"""EmoFact: the Adafactor rule, without momentum, under an emotion.

For a tensor of two or more dimensions with gradient :math:`g`::

    exp_avg_row = beta1 exp_avg_row + (1 - beta1) trust sqrt(mean of g^2 over all dims but the first + floor)
    exp_avg_col = beta1 exp_avg_col + (1 - beta1) trust sqrt(mean of g^2 over the first dim + floor)
    denom       = sqrt(exp_avg_row exp_avg_col) / bias + eps            bias = 1 - beta1^k (1 in the presets)
    param       = decay param - step_size g / denom                     step_size = lr drive

with floor = eps^2, so that the scale of the loss does not matter (eps in the presets, as published). Vectors and
scalars follow the Adam rule of ``navi.py``; there ``trust`` scales what the first memory takes in.

Reflection has no momentum to compare g with, and the gradient of the step before alone is too noisy. It remembers a
sample of at most 4,096 coordinates of each matrix, spread over it::

    exp_avg_sample = 0.9 exp_avg_sample + 0.1 sample(g)

and compares in the rule's metric, each sum scaled up to the whole tensor: <g, m / d>, <g, g / d>, <m, m / d>.

Sources: Adafactor (Shazeer and Stern 2018, https://arxiv.org/abs/1804.04235); rule and emotion after muooon/EmoNavi.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from emonavi.navi import adam_scalars, emonavi
from emonavi.optimizer import EmoOptimizer
from emonavi.sweep import Reflected, dot, wide

__all__ = ["EmoFact", "emofact"]

SAMPLE = 4096  # coordinates of a matrix that reflection remembers: 16 KiB, whatever its size
SAMPLE_RATE = 0.1


class EmoFact(EmoOptimizer):
    __doc__ = EmoOptimizer.describe(
        """Adafactor-type optimizer that listens to the loss.

    State: one float32 for each row and each column of a matrix, and a sample of at most 16 KiB of each matrix for
    reflection; vectors keep 8 bytes per parameter.""",
        """
    Example:
        >>> import torch
        >>> from emonavi import EmoFact
        >>> model = torch.nn.Linear(4, 1)
        >>> optimizer = EmoFact(model.parameters())
        >>> model(torch.ones(8, 4)).square().mean().backward()
        >>> loss = optimizer.step()
        >>> sorted(optimizer.state[model.weight])
        ['drive', 'exp_avg_col', 'exp_avg_row', 'exp_avg_sample', 'step', 'trust']
    """,
    )

    def _layout(self, param: Tensor) -> tuple[str, ...]:
        if param.dim() < 2:
            return ("exp_avg", "exp_avg_sq")
        # The presets do not reflect, and so remember no sample.
        return ("exp_avg_row", "exp_avg_col", "exp_avg_sample")[: 3 if self._emotion.reflects else 2]

    def _init_state(self, param: Tensor) -> dict[str, Tensor]:
        if param.dim() < 2:
            return {name: torch.zeros_like(wide(param)) for name in self._layout(param)}
        like = wide(param.detach())
        shapes = {
            "exp_avg_row": (len(param), *(1 for _ in param.shape[1:])),
            "exp_avg_col": (1, *param.shape[1:]),
            "exp_avg_sample": sample(param.detach()).shape,
        }
        return {name: like.new_zeros(shapes[name]) for name in self._layout(param)}

    def _rule(self, layout: tuple[str, ...]) -> tuple[Callable[..., list[Reflected]], bool]:
        return (emonavi, True) if "exp_avg" in layout else (emofact, False)

    def _scalars(
        self, layout: tuple[str, ...], group: dict[str, Any], steps: Tensor, step_sizes: Tensor, trust: Tensor | None
    ) -> dict[str, Any]:
        corrects = self._emotion.corrects_bias
        if "exp_avg" in layout:
            return adam_scalars(group, steps, step_sizes, corrects) | {"grad_trust": trust}
        beta1, eps = group["betas"][0], group["eps"]
        biases = 1 - beta1**steps if corrects else torch.ones_like(steps)
        floor = eps * eps if corrects else eps
        return {"beta1": beta1, "eps": eps, "floor": floor, "step_sizes": step_sizes, "biases": biases, "trust": trust}


def sample(tensor: Tensor) -> Tensor:
    """At most :data:`SAMPLE` of a tensor's elements, spread over it."""
    # An odd stride does not run down one column of a matrix whose width is a power of two.
    stride = -(-tensor.numel() // SAMPLE)
    return tensor.reshape(-1)[:: stride + (stride > 1 and stride % 2 == 0)]


def emofact(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avg_rows: list[Tensor],
    exp_avg_cols: list[Tensor],
    exp_avg_samples: list[Tensor] | None = None,
    *,
    step_sizes: list[Tensor],
    decays: list[Tensor] | None,
    biases: list[Tensor],
    beta1: float,
    eps: float,
    floor: float,
    trust: Tensor | None = None,
    reflect: bool = True,
    foreach: bool = True,
) -> list[Reflected]:
    """Functional form of the rule for two or more dimensions; updates parameters and memories in place.

    Args:
        params: tensors of shape (r, ...) to move; ``grads`` is parallel to it, of equal shapes.
        exp_avg_rows: of shape (r, 1, ...); ``exp_avg_cols``: of shape (1, ...).
        exp_avg_samples: 1-D, as :func:`sample` gives them; needed to reflect.
        step_sizes: 0-d, for each tensor: the effective lr.
        decays: 0-d, for each tensor: the factor of weight decay, or None for none.
        biases: 0-d, for each tensor: ``1 - beta1^k``.
        floor: added to each mean of squares.
        trust: 0-d, scales what the memories take in.
        reflect: compute the sums of reflection.
        foreach: update the lists together instead of one tensor after the other.

    Returns:
        For each tensor the three 0-d sums of reflection; an empty list without ``reflect``.
    """
    rule = _multi_tensor_emofact if foreach else _single_tensor_emofact
    return rule(
        params, grads, exp_avg_rows, exp_avg_cols, exp_avg_samples, step_sizes=step_sizes, decays=decays,
        biases=biases, beta1=beta1, eps=eps, floor=floor, trust=trust, reflect=reflect,
    )  # fmt: skip


def _reflection(grad: Tensor, denom: Tensor, exp_avg_sample: Tensor) -> Reflected:
    """The sums of one tensor, and its memory of the gradient moved on."""
    some = sample(grad)
    metric = sample(denom)
    scale = grad.numel() / max(some.numel(), 1)
    scaled = some / metric
    sums = (dot(exp_avg_sample, scaled), dot(some, scaled), dot(exp_avg_sample, exp_avg_sample / metric))
    exp_avg_sample.lerp_(some, SAMPLE_RATE)
    return sums[0] * scale, sums[1] * scale, sums[2] * scale


def _single_tensor_emofact(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avg_rows: list[Tensor],
    exp_avg_cols: list[Tensor],
    exp_avg_samples: list[Tensor] | None,
    *,
    step_sizes: list[Tensor],
    decays: list[Tensor] | None,
    biases: list[Tensor],
    beta1: float,
    eps: float,
    floor: float,
    trust: Tensor | None,
    reflect: bool,
) -> list[Reflected]:
    reflected = []
    for i, (param, grad, row, col) in enumerate(zip(params, grads, exp_avg_rows, exp_avg_cols, strict=True)):
        square = grad * grad
        new_row = square.mean(dim=tuple(range(1, grad.dim())), keepdim=True).add_(floor).sqrt_()
        new_col = square.mean(dim=0, keepdim=True).add_(floor).sqrt_()
        row.lerp_(new_row if trust is None else new_row * trust, 1 - beta1)
        col.lerp_(new_col if trust is None else new_col * trust, 1 - beta1)

        denom = (row.sqrt().div_(biases[i]) * col.sqrt()).add_(eps)
        if reflect and exp_avg_samples is not None:
            reflected.append(_reflection(grad, denom, exp_avg_samples[i]))
        if decays is not None:
            param.mul_(decays[i])
        param.addcmul_(grad / denom, step_sizes[i], value=-1)
    return reflected


def _multi_tensor_emofact(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avg_rows: list[Tensor],
    exp_avg_cols: list[Tensor],
    exp_avg_samples: list[Tensor] | None,
    *,
    step_sizes: list[Tensor],
    decays: list[Tensor] | None,
    biases: list[Tensor],
    beta1: float,
    eps: float,
    floor: float,
    trust: Tensor | None,
    reflect: bool,
) -> list[Reflected]:
    squares = torch._foreach_mul(grads, grads)
    new_rows = [s.mean(dim=tuple(range(1, s.dim())), keepdim=True) for s in squares]
    new_cols = [s.mean(dim=0, keepdim=True) for s in squares]
    for news, olds in ((new_rows, exp_avg_rows), (new_cols, exp_avg_cols)):
        torch._foreach_add_(news, floor)
        torch._foreach_sqrt_(news)
        torch._foreach_lerp_(olds, news if trust is None else torch._foreach_mul(news, trust), 1 - beta1)

    rows = torch._foreach_sqrt(exp_avg_rows)
    torch._foreach_div_(rows, biases)
    denoms = torch._foreach_mul(rows, torch._foreach_sqrt(exp_avg_cols))
    torch._foreach_add_(denoms, eps)
    reflected = []
    if reflect and exp_avg_samples is not None:
        reflected = [_reflection(g, d, m) for g, d, m in zip(grads, denoms, exp_avg_samples, strict=True)]
    if decays is not None:
        torch._foreach_mul_(params, decays)
    torch._foreach_addcmul_(params, torch._foreach_div(grads, denoms), step_sizes, -1)
    return reflected
