"""Replicas that feel the same: one small all-reduce of the loss."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from emonavi.intake import Loss

__all__ = ["agreed_loss"]


def agreed_loss(heard: Loss | None, home: Tensor, process_group: Any) -> Loss | None:
    """The mean of the finite losses of all replicas, the same on each.

    Each rank of data-parallel training has a loss of its own; steered by it alone, replicas would drift apart. Their
    gradients are already the same, so that everything else is. A rank without a loss, or with one that is not finite,
    takes part with nothing: a collective that one rank leaves out hangs the others.

    Args:
        heard: this rank's loss, or None.
        home: gives device and dtype of the collective.
        process_group: ``"auto"``, None (never), or a process group.
    """
    if process_group is None or not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return heard
    group = None if process_group == "auto" else process_group
    if torch.distributed.get_world_size(group) == 1:
        return heard
    value, window = home.new_full((), torch.nan), 0.0
    if heard is not None:
        value = heard.value.to(value) if isinstance(heard.value, Tensor) else home.new_full((), heard.value)
        window = float(heard.window)
    finite = torch.isfinite(value)
    heard_here = value.new_full((), float(heard is not None))
    mine = [torch.where(finite, value, 0.0), finite.to(value), heard_here, value.new_full((), window)]
    total = torch.stack(mine)
    torch.distributed.all_reduce(total, group=group)
    if home.device.type == "cpu" and not total[2]:
        return None  # no rank has a loss: nothing is missing that could be counted as ignored
    # The windows of all ranks together: where one rank's is partial, the mean is on another scale for all.
    return Loss(total[0] / total[1], total[3])
