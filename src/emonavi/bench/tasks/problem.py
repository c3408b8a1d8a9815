"""What a task is, and where its randomness comes from.

The split into training and held-out data is the same for every seed; the seed decides the initial weights and the
batches. A batch depends on (seed, step) alone, so that a resumed run sees what the uninterrupted one saw, and no model
draws random numbers of its own: whoever needs noise finds it among the inputs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["Batch", "Problem", "Split", "Task", "choose", "epoch_batch", "generator", "initialised", "split"]

Tensors = Tensor | tuple[Tensor, ...]
Batch = tuple[Tensors, Tensors]  # inputs, targets
Split = tuple[Tensor, Tensor, Tensor, Tensor]  # train inputs, train targets, val inputs, val targets


@dataclass(frozen=True)
class Problem:
    """A fresh model (what requires a gradient is to be trained), its training batches and its held-out data.

    Inputs that are a tuple become the model's positional arguments. ``criterion`` gets the output and the targets as
    they are. ``score`` is for tasks whose training loss is no measure to compare by (it may be negative, or a sum of
    penalties): it gets the model and the held-out inputs and targets, and returns a positive scalar.
    """

    model: nn.Module
    criterion: Callable[[Any, Any], Tensor]
    batch: Callable[[int], Batch]
    held_out: Batch
    score: Callable[[nn.Module, Any, Any], Tensor] | None = None

    @property
    def params(self) -> list[nn.Parameter]:
        """What is to be trained."""
        return [p for p in self.model.parameters() if p.requires_grad]

    def loss(self, step: int) -> Tensor:
        """Training loss of the fresh batch of this step; call ``backward()`` on it."""
        return self._criterion(*self.batch(step))

    @torch.no_grad()
    def val(self) -> float:
        """Positive score on the held-out data, lower is better; no finite number if the run diverged."""
        inputs, targets = self.held_out
        self.model.eval()  # BatchNorm
        try:
            value = self._criterion(inputs, targets) if self.score is None else self.score(self.model, inputs, targets)
        finally:
            self.model.train()
        return value.item()

    def _criterion(self, inputs: Tensors, targets: Tensors) -> Tensor:
        return self.criterion(self.model(*inputs) if isinstance(inputs, tuple) else self.model(inputs), targets)


@dataclass(frozen=True)
class Task:
    """What is trained, for how long, and how to build it from a seed."""

    name: str
    title: str
    metric: str
    steps: int
    quick_steps: int
    build: Callable[[int], Problem]
    split: str = "dev"  # "dev": the library's constants may be tuned on it; "test": never
    needs: str = ""  # import names of the optional packages that it is made of, separated by blanks
    extra: str = "bench"  # of this package, which brings them


def generator(seed: int, stream: int, index: int) -> torch.Generator:
    """Return an independent random source for each (seed, stream, index), without touching torch's global one."""
    return torch.Generator().manual_seed((seed * 2 + stream) * 1_000_003 + index)


def initialised(seed: int, make: Callable[[], nn.Module]) -> nn.Module:
    """Build a model from a seed and leave torch's global random state as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return make()


def choose(seed: int, step: int, *, samples: int, size: int) -> Tensor:
    """Indices of this step's batch of a shuffled epoch; a last incomplete batch is dropped."""
    epoch, position = divmod(step, samples // size)
    order = torch.randperm(samples, generator=generator(seed, 0, epoch))
    return order[position * size : (position + 1) * size]


def epoch_batch(
    seed: int, step: int, *, inputs: Tensor, targets: Tensor, size: int, noise: float = 0.0
) -> tuple[Tensor, Tensor]:
    """Batch of a shuffled epoch, with fresh Gaussian noise on the inputs."""
    chosen = choose(seed, step, samples=len(inputs), size=size)
    x = inputs[chosen]
    if noise:
        x = x + noise * torch.randn(x.shape, generator=generator(seed, 1, step))
    return x, targets[chosen]


def split(inputs: Tensor, targets: Tensor) -> Split:
    """Hold out a third, drawn once and for all."""
    order = torch.randperm(len(inputs), generator=generator(0, 0, 0))
    val, train = order[: len(order) // 3], order[len(order) // 3 :]
    return inputs[train], targets[train], inputs[val], targets[val]
