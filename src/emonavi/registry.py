"""The siblings, by name."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from emonavi.clan import EmoClan
from emonavi.fact import EmoFact
from emonavi.lynx import EmoLynx
from emonavi.navi import EmoNavi
from emonavi.neco import EmoNeco
from emonavi.optimizer import EmoOptimizer
from emonavi.zeal import EmoZeal

__all__ = ["SIBLINGS", "Sibling", "available", "create", "named"]


@dataclass(frozen=True)
class Sibling:
    """One optimizer of the family."""

    name: str
    cls: type[EmoOptimizer]
    kind: str
    state_bytes: str  # per float32 parameter
    description: str


SIBLINGS = {
    s.name: s
    for s in (
        Sibling("emonavi", EmoNavi, "Adam", "8", "the default: from scratch and for fine-tuning"),
        Sibling("emofact", EmoFact, "Adafactor", "under 0.2 for matrices", "when memory is short"),
        Sibling("emolynx", EmoLynx, "Lion", "4", "half of EmoNavi's memory"),
        Sibling("emoclan", EmoClan, "Adam", "8", "as EmoNavi, with steps of one size while the loss rises"),
        Sibling("emozeal", EmoZeal, "Adafactor", "4 for matrices", "near EmoNavi's losses at half of its memory"),
        Sibling("emoneco", EmoNeco, "Lion", "4", "no reason was found: EmoZeal needs no more and ends lower"),
    )
}


def available() -> list[str]:
    """Names that :func:`create` knows."""
    return list(SIBLINGS)


def create(name: str, params: Any, **options: Any) -> EmoOptimizer:
    """Construct a sibling by its name, in any case; options may be spelled as strings.

    Raises:
        ValueError: there is no sibling of that name, or an option is out of range.

    Example:
        >>> import torch, emonavi
        >>> type(emonavi.create("emolynx", [torch.nn.Parameter(torch.ones(2))], lr=1e-4)).__name__
        'EmoLynx'
    """
    return named(name).cls(params, **options)


def named(name: str) -> Sibling:
    """The sibling of a name, in any case."""
    sibling = SIBLINGS.get(str(name).lower())
    if sibling is None:
        raise ValueError(f"no optimizer {name!r}: choose from {', '.join(SIBLINGS)}")
    return sibling
