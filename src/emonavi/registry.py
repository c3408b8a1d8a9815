"""The siblings, by name."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch.optim.optimizer import ParamsT

from emonavi.clan import EmoClan
from emonavi.fact import EmoFact
from emonavi.lynx import EmoLynx
from emonavi.navi import EmoNavi
from emonavi.neco import EmoNeco
from emonavi.optimizer import EmoOptimizer
from emonavi.zeal import EmoZeal

__all__ = ["FAMILY", "SIBLINGS", "Sibling", "available", "create", "named"]


@dataclass(frozen=True)
class Sibling:
    """One optimizer of the family."""

    name: str
    cls: type[EmoOptimizer]
    kind: str
    description: str

    def state_bytes(self, state_dtype: str | None = None) -> float:
        """Bytes of state for each element of a large matrix, measured on the tensors that a step makes."""
        matrix = torch.zeros(1024, 1024)
        matrix.grad = torch.zeros_like(matrix)
        optimizer = self.cls([matrix], lr=0.0, capture=False, state_dtype=state_dtype)
        optimizer.step()  # at lr 0 it only makes the state
        held: int = sum(t.nbytes for t in optimizer.state[matrix].values() if t.dim())
        return held / matrix.numel()


SIBLINGS = {
    s.name: s
    for s in (
        Sibling("emonavi", EmoNavi, "Adam", "the default, also for fine-tuning"),
        Sibling("emofact", EmoFact, "Adafactor", "when memory is short"),
        Sibling("emolynx", EmoLynx, "Lion", "half of emonavi's memory"),
        Sibling("emoclan", EmoClan, "Adam", "as emonavi; steps of one size in a bad stretch"),
        Sibling("emozeal", EmoZeal, "Adafactor", "near emonavi's losses in half its memory"),
        Sibling("emoneco", EmoNeco, "Lion", "for completeness: emozeal ends lower"),
    )
}

FAMILY = tuple(s.cls.__name__ for s in SIBLINGS.values())


def available() -> list[str]:
    """Names that :func:`create` knows.

    Example:
        >>> import emonavi
        >>> emonavi.available()[:3]
        ['emonavi', 'emofact', 'emolynx']
    """
    return list(SIBLINGS)


def create(name: str, params: ParamsT, **options: Any) -> EmoOptimizer:
    """Construct a sibling by its name, upper or lower case; options may be strings.

    Raises:
        ValueError: there is no sibling of that name, or an option is out of range.
        TypeError: the sibling has no such option, or one is of the wrong type.

    Example:
        >>> import torch, emonavi
        >>> type(emonavi.create("emolynx", [torch.nn.Parameter(torch.ones(2))], lr=1e-4)).__name__
        'EmoLynx'
    """
    return named(name).cls(params, **options)


def named(name: str) -> Sibling:
    """The sibling of that name, upper or lower case."""
    sibling = SIBLINGS.get(str(name).lower())
    if sibling is None:
        raise ValueError(f"no optimizer {name!r}: choose from {', '.join(SIBLINGS)}")
    return sibling
