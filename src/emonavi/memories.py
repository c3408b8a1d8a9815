"""The memories of a parameter: tensors that a rule keeps in its state, by their names."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from emonavi.distributed import local, placed

__all__ = ["fresh", "sample_size", "sample_stride", "together"]

SAMPLE = 4096  # coordinates of a matrix that reflection remembers: 16 KiB, whatever its size


def sample_stride(count: int) -> int:
    """Distance between sampled elements of ``count``. Odd, so as not to stay in one column of a width like 512."""
    return max(1, -(-count // SAMPLE)) | 1


def sample_size(count: int) -> int:
    """How many of ``count`` elements are sampled."""
    return -(-count // sample_stride(count))


def fresh(param: Tensor, layout: tuple[str, ...]) -> dict[str, Tensor]:
    """Zeros under these names: shaped as a matrix's rows, columns or sample if so named, else as the parameter."""
    here, dims = local(param.detach()), range(1, param.dim())
    kind = torch.promote_types(here.dtype, torch.float32)

    def made(name: str) -> Tensor:
        if name == "exp_avg_row":
            return placed(here.new_zeros((len(here), *(1 for _ in dims)), dtype=kind), param, (0,))
        if name == "exp_avg_col":
            return placed(here.new_zeros((1, *here.shape[1:]), dtype=kind), param, dims)
        if name == "exp_avg_sample":
            return here.new_zeros(sample_size(param.numel()), dtype=kind)
        return torch.zeros_like(param, dtype=kind, requires_grad=False)

    return {name: made(name) for name in layout}


def together(scalars: Mapping[str, float | Tensor], device: torch.device) -> dict[str, Tensor]:
    """Numbers, or 0-d tensors, as 0-d float32 tensors that lie side by side: a step reads them faster."""
    joined = torch.empty(len(scalars), dtype=torch.float32, device=device)
    return {name: joined[place].fill_(value) for place, (name, value) in enumerate(scalars.items())}
