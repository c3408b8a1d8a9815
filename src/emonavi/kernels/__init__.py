"""Kernels: a rule's whole sweep over a bucket in one call. They are loaded when first needed.

A kernel has the name of its rule and must give the same results.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor

from emonavi.notices import callers_level

if TYPE_CHECKING:
    from emonavi.active import Roster
    from emonavi.kernels.cpu import Numbers
    from emonavi.kernels.plan import Plan
    from emonavi.sweep import Bucket

__all__ = ["Kernel", "choose", "compared", "follow", "numbers", "planned", "sampled", "squares", "wanted"]

# Called with (lists, scalars, grad_scale, acts, seeds) as in Bucket.move, for a whole bucket. Returns the sums of
# reflection of each tensor, or None if the scalars do not ask for them. It may be called again with other gradients of
# the same kind.
Kernel: TypeAlias = Callable[
    [Mapping[str, list[Tensor]], dict[str, Any], Any, Any, "Tensor | None"], "tuple[Tensor, Tensor, Tensor] | None"
]


def choose(
    rule: Callable[..., Any], lists: Mapping[str, list[Tensor]], group: Mapping[str, Any], predicated: bool
) -> Kernel | None:
    """The kernel that sweeps a bucket, or None for the rule itself, by foreach or tensor by tensor.

    ======  =======  ==========================  ==========================================
    fused   foreach  is there a kernel for it?   swept by
    ======  =======  ==========================  ==========================================
    None    None     yes, for the CPU            the kernel
    None    None     no, or for CUDA             foreach
    None    True     (not asked)                 foreach
    None    False    (not asked)                 tensor by tensor
    False   any      (not asked)                 foreach, or tensor by tensor for ``False``
    True    any      yes                         the kernel
    True    any      no                          nothing: raises
    ======  =======  ==========================  ==========================================

    Args:
        rule: the functional form.
        lists: the bucket's parallel lists, "param" first; those left out are not checked.
        group: options of its group.
        predicated: control flow may not depend on tensor values.

    Raises:
        RuntimeError: the group says ``fused=True``, and there is no kernel for this bucket.
    """
    if not wanted(group, lists["param"][0].device):
        return None
    kernel = _kernel(rule, lists, predicated)
    if not isinstance(kernel, str):
        return kernel
    if group["fused"]:
        raise RuntimeError(f"fused=True: {kernel}; leave fused at None, and foreach is used where there is no kernel")
    if not predicated:
        _say_missing()
    return None


@lru_cache(maxsize=1)
def _say_missing() -> None:
    """Warn once that the kernels are missing, and why."""
    from emonavi.kernels.build import library

    why = library()
    if isinstance(why, str):
        slower = "without kernels steps are slower (fused=False silences this)"
        warnings.warn(f"{why}; {slower}", stacklevel=callers_level())


def wanted(group: Mapping[str, Any], device: torch.device) -> bool:
    """Whether a group's flags ask for kernels, or allow them. By default only on the CPU: CUDA's ran on no GPU yet."""
    return bool(group["fused"]) or (group["fused"] is None and group["foreach"] is None and device.type == "cpu")


def _kernel(rule: Callable[..., Any], lists: Mapping[str, list[Tensor]], predicated: bool) -> Kernel | str:
    """The kernel for a bucket, or why there is none."""
    device = lists["param"][0].device.type
    if device == "cpu":
        from emonavi.kernels import cpu

        return cpu.kernel(rule, lists, predicated)
    if device == "cuda":
        from emonavi.kernels import cuda

        return cuda.kernel(rule, lists)
    return f"there are no kernels for {device}"


# Helpers around the sweep that replace one torch call per tensor.


def squares(tensors: Sequence[Tensor], by_rows: bool = False) -> Tensor | None:
    """Sum of squares of each tensor, all of one device and dtype; None if there is no kernel for it.

    ``by_rows`` adds up matrices in the order of the kernel that gathers their rows and columns.
    """
    if tensors[0].is_cpu:
        from emonavi.kernels import cpu

        return cpu.squares(tensors, by_rows)
    if tensors[0].is_cuda:
        from emonavi.kernels import cuda

        return cuda.squares(tensors)
    return None


def follow(params: Sequence[Tensor], shadows: Sequence[Tensor], rate: float) -> bool:
    """Move each shadow by ``rate`` towards its parameter. Returns False, and moves nothing, if there is no kernel."""
    if not params[0].is_cpu:
        return False
    from emonavi.kernels import cpu

    return cpu.follow(params, shadows, rate)


def numbers(tensors: Sequence[Tensor]) -> Numbers | None:
    """Reads and writes many 0-d tensors at once; None if there is no kernel for it."""
    if not tensors or not tensors[0].is_cpu:
        return None
    from emonavi.kernels import cpu

    return cpu.Numbers.of(tensors)


def sampled(tensors: Sequence[Tensor], home: torch.device) -> Tensor | None:
    """The samples of all tensors, concatenated (``displacement.py``); None if there is no kernel for it."""
    if not tensors or home.type != "cpu" or not tensors[0].is_cpu:
        return None
    from emonavi.kernels import samples

    return samples.samples(tensors)


def compared(
    kept: Sequence[Tensor], params: Sequence[Tensor], before: Tensor, grads: Tensor, per_rate: Tensor
) -> Tensor | None:
    """Compare gradients with the step before (``displacement.py``); None if there is no kernel for it."""
    if not params or not before.is_cpu or not params[0].is_cpu:
        return None
    from emonavi.kernels import samples

    return samples.compared(kept, params, before, grads, per_rate)


def planned(
    roster: Roster,
    buckets: Sequence[Bucket],
    states: Mapping[Tensor, dict[str, Any]],
    groups: Sequence[Mapping[str, Any]],
) -> Plan | None:
    """A plan for the next steps, or None if they must look for themselves."""
    if roster.numbers is None:
        return None
    from emonavi.kernels.plan import Plan

    return Plan.of(roster, buckets, states, groups)
