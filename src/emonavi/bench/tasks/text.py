"""Next-character models: a causal transformer on source code, a gated recurrent network on English."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from emonavi.bench.tasks import data
from emonavi.bench.tasks.problem import Problem, Task, generator, initialised
from emonavi.bench.tasks.transformer import Block

__all__ = ["CHARLM", "TASKS", "CharTransformer", "next_character"]

_CONTEXT = 64
_ASCII = 128


class CharTransformer(nn.Module):
    """Next-character model over ASCII; returns logits with the vocabulary in dimension 1, as cross entropy wants."""

    def __init__(self, width: int = 64, heads: int = 4, blocks: int = 2) -> None:
        super().__init__()
        self.characters = nn.Embedding(_ASCII, width)
        self.positions = nn.Parameter(torch.randn(_CONTEXT, width) / math.sqrt(width))
        self.blocks = nn.Sequential(*(Block(width, heads, is_causal=True) for _ in range(blocks)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, _ASCII)

    def forward(self, text: Tensor) -> Tensor:
        x = self.characters(text) + self.positions[: text.shape[1]]
        logits: Tensor = self.head(self.norm(self.blocks(x)))
        return logits.transpose(1, 2)


class _CharGRU(nn.Module):
    """The same with a recurrent network: (n, time) to (n, vocabulary, time)."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.characters = nn.Embedding(_ASCII, width)
        self.recurrence = nn.GRU(width, width, batch_first=True)
        self.head = nn.Linear(width, _ASCII)

    def forward(self, text: Tensor) -> Tensor:
        states, _ = self.recurrence(self.characters(text))
        logits: Tensor = self.head(states)
        return logits.transpose(1, 2)


def _windows(text: Tensor, count: int, source: torch.Generator, context: int) -> tuple[Tensor, Tensor]:
    starts = torch.randint(len(text) - context, (count, 1), generator=source)
    window = text[starts + torch.arange(context + 1)]
    return window[:, :-1], window[:, 1:]


def next_character(
    seed: int, make: Callable[[], nn.Module], corpus: tuple[Tensor, Tensor], context: int = _CONTEXT
) -> Problem:
    """Train ``make()`` on random windows of the corpus' first part; 256 windows of the second are held out."""
    train, val = corpus

    def batch(step: int) -> tuple[Tensor, Tensor]:
        return _windows(train, 16, generator(seed, 0, step), context)

    held_out = _windows(val, 256, generator(0, 1, 0), context)
    return Problem(initialised(seed, make), F.cross_entropy, batch, held_out)


def _charlm(seed: int) -> Problem:
    return next_character(seed, CharTransformer, data.source_code())


def _gru(seed: int) -> Problem:
    return next_character(seed, _CharGRU, data.prose(), context=32)


CHARLM = Task("charlm", "Python source, character transformer", "nats per character", 250, 84, _charlm)
TASKS = (CHARLM, Task("gru", "Python's help, character GRU", "nats per character", 300, 100, _gru, "test"))
