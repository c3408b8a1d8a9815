r"""Reflection for an unknown rule: from the displacement of a sample of the parameters.

The sample of a tensor has at most 2,048 coordinates, in blocks of a cache line that are spread over it. With a
gradient :math:`g` and the step that the optimizer took last, u = (param before - param after) / effective lr::

    metric   = sqrt(grad_sq / step_sq)           coordinates where either is still 0 take no part
    <g, u>, <g, g / metric>, <u, u metric>       the sums of reflection, scaled up to the whole tensor
    grad_sq += 0.01 (g^2 - grad_sq)
    step_sq += 0.01 (u^2 - step_sq)

The metric estimates what the optimizer divides gradients by: Adam's denominator up to a factor (all its steps have
about the same size, so step_sq is about constant), 1 for SGD, and something in between for others. A factor on the
metric does not change a cosine. That both memories start at 0 cancels in the ratio.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from emonavi import kernels
from emonavi.sweep import wide

__all__ = ["RATE", "ROWS", "SAMPLE", "compared", "places", "reflect", "sample", "samples", "sums_of_each"]

SAMPLE = 2048  # coordinates of a tensor, at most
BLOCK = 16  # float32 numbers in a cache line: a sample of single ones costs a tenth of a step, of blocks a hundredth
ROWS = 3  # u, grad_sq and step_sq: 24 KiB for a large tensor, 48 of float64
RATE = 0.01


def sample(tensor: Tensor) -> Tensor:
    """At most :data:`SAMPLE` elements of a tensor, spread over it, 1-D; all of a small one. A view if possible.

    Example:
        >>> sample(torch.ones(6, 4)).shape, sample(torch.ones(1024, 1024)).shape
        (torch.Size([24]), torch.Size([2048]))
    """
    flat = tensor.detach().reshape(-1)
    blocks, length, apart = places(flat.numel())
    if blocks == 1:
        return flat
    # One view of all blocks: with many tensors, the cost is in the number of calls.
    step = flat.stride(0)
    return flat.as_strided((blocks, length), (apart * step, step)).reshape(-1)


def places(size: int) -> tuple[int, int, int]:
    """The sample of a tensor of this size: number of blocks, their length, and the distance between their starts.

    Example:
        >>> places(24), places(1 << 20)
        ((1, 24, 0), (128, 16, 8208))
    """
    if size <= SAMPLE:
        return 1, size, 0
    blocks = size // BLOCK
    # Odd: it would otherwise stay in one column of a matrix whose width is a power of two.
    stride = -(-blocks * BLOCK // SAMPLE) | 1
    return -(-blocks // stride), BLOCK, stride * BLOCK


def samples(tensors: Sequence[Tensor], home: Tensor) -> Tensor:
    """The samples of all tensors, concatenated: a copy, on the device of ``home``, in float32 or wider."""
    gathered = kernels.sampled(tensors, home.device)
    if gathered is not None:
        return gathered
    parts = [sample(t) for t in tensors]
    return wide(torch.cat(parts if all(p.device == home.device for p in parts) else [p.to(home.device) for p in parts]))


def compared(kept: Sequence[Tensor], params: Sequence[Tensor], before: Tensor, grads: Tensor, rates: Tensor) -> Tensor:
    """Compare the gradients of a step with the step before, and remember this step.

    Args:
        kept: the memories of each tensor, of shape (3, sample); updated in place.
        params: the tensors as the step has left them.
        before: their samples, as :func:`samples` gives them, before the step.
        grads: samples of its gradients.
        rates: the effective lr of each tensor, 1-D; 0 where it did not step.

    Returns:
        The sums of reflection over each whole tensor, shape (3, tensors), in the dtype of ``rates``.
    """
    sizes = [memories.shape[1] for memories in kept]
    per_rate = torch.where(rates > 0, 1 / rates, 0.0).to(before.dtype)
    sums = kernels.compared(kept, params, before, grads, per_rate)
    if sums is None:
        counts = torch.tensor(sizes, device="cpu").to(rates.device, non_blocking=True)
        steps = before - samples(params, rates)
        steps *= per_rate.repeat_interleave(counts, output_size=len(steps))
        memories = torch.cat([m.to(rates.device) for m in kept], 1)
        terms = reflect(memories, grads.to(memories), steps.to(memories))
        torch._foreach_copy_(list(kept), list(memories.split(sizes, 1)))
        sums = sums_of_each(terms, counts)
    whole = rates.new_tensor([p.numel() / size for p, size in zip(params, sizes, strict=True)])
    return sums.to(rates.dtype) * whole


def sums_of_each(terms: Tensor, sizes: Tensor) -> Tensor:
    """Sum over the coordinates of each tensor.

    Args:
        terms: of all samples, concatenated, shape (3, n).
        sizes: of the samples; integers with the sum n.

    Returns:
        The sums, shape (3, tensors).
    """
    if terms.is_cpu:  # five times as fast
        return torch.segment_reduce(terms, "sum", lengths=sizes.expand(len(terms), -1).contiguous(), axis=1)
    return _by_owner(terms, sizes)


def _by_owner(terms: Tensor, sizes: Tensor) -> Tensor:
    """The same by index_add, for devices without segment_reduce."""
    owners = torch.arange(len(sizes), device=sizes.device).repeat_interleave(sizes, output_size=terms.shape[1])
    return terms.new_zeros(len(terms), len(sizes)).index_add(1, owners, terms)


def reflect(memories: Tensor, grad: Tensor, step: Tensor) -> Tensor:
    """Compare a gradient with the step before, and remember the step taken with it.

    Args:
        memories: u, grad_sq and step_sq of n coordinates, shape (3, n); updated in place.
        grad: the gradient of the step, of shape (n,).
        step: (before - after) / effective lr, of shape (n,).

    Returns:
        The terms of <g, u>, <g, g> and <u, u> in the metric, shape (3, n).
    """
    last, grad_sq, step_sq = memories.unbind()
    known = (grad_sq > 0) & (step_sq > 0)
    metric = torch.where(known, grad_sq / step_sq, 1.0).sqrt_()
    terms = torch.stack([grad * last, grad * grad / metric, last * last * metric])
    grad_sq.lerp_(grad * grad, RATE)
    step_sq.lerp_(step * step, RATE)
    last.copy_(step)
    return torch.where(known, terms, 0.0)
