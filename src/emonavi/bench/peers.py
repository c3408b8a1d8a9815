"""Who is compared: a frozen table of optimizers, as they come from PyPI, at their defaults.

All are used as their documentation says: those that want a schedule get it (linear warm-up over 5 % of the steps, then
a cosine to 0, so they know the horizon; Prodigy's documentation wants the cosine without the warm-up), those that want
the loss get it, ScheduleFree is switched to its average for evaluation, Prodigy's lr is a multiplier of its own
estimate.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

import emonavi
from emonavi.bench.provenance import sources
from emonavi.registry import FAMILY

__all__ = ["CONTENDERS", "OWN_RULE", "YARDSTICK", "Contender", "choose", "missing"]

WARM_UP = 0.05

Params = list[nn.Parameter]


@dataclass(frozen=True)
class Contender:
    """An optimizer, how it is built and what it is given.

    ``package`` is what has to be installed; ``warm_up`` is None for a constant lr, else the share of the steps before
    the cosine; ``tuned`` marks the yardsticks, whose lr is always searched over half decades; ``shadow`` those that
    have a calm figure, too.
    """

    name: str
    package: str
    default_lr: float
    build: Callable[[Params, float], Any]
    step: Callable[[Any, Tensor], Any] = lambda optimizer, loss: optimizer.step()
    rate: Callable[[Any], float] = lambda optimizer: float(optimizer.param_groups[0]["lr"])
    warm_up: float | None = None
    tuned: bool = False
    shadow: bool = False

    @property
    def ours(self) -> bool:
        """Whether it is made by this library."""
        return self.package == "emonavi"

    def version(self) -> str:
        """Name its package with the version, ours with the state of the sources too."""
        mark = f" {sources()}" if self.ours else ""
        return f"{self.package} {version(self.package)}{mark}"

    def factor(self, step: int, steps: int) -> float:
        """Return the schedule's factor on the lr for a step, counted from 0."""
        if self.warm_up is None:
            return 1.0
        first = math.ceil(self.warm_up * steps)
        if step < first:
            return (step + 1) / first
        return 0.5 * (1 + math.cos(math.pi * (step - first) / (steps - first)))


def _peer(module: str, name: str, **options: Any) -> Callable[[Params, float], Any]:
    """Build a class of another package, imported only when it is wanted."""

    def build(params: Params, lr: float) -> Any:
        return getattr(__import__(module), name)(params, lr=lr, **options)

    return build


def _ours(name: str, **options: Any) -> Callable[[Params, float], Any]:
    return lambda params, lr: emonavi.create(name, params, lr=lr, **options)


def _adaptive(name: str) -> Contender:
    """A sibling as it comes, with a shadow for the calm figure."""
    return Contender(name, "emonavi", 1e-3, _ours(name, use_shadow=True), rate=_effective, shadow=True)


def _sgd(params: Params, lr: float) -> torch.optim.Optimizer:
    return torch.optim.SGD(params, lr=lr, momentum=0.9)


def _muon(params: Params, lr: float) -> Any:
    """Muon for matrices and AdamW for the rest, whose steps are equally long at one lr."""
    matrices, rest = ([p for p in params if (p.dim() == 2) == wanted] for wanted in (True, False))
    groups: list[Any] = [{"params": matrices, "use_muon": True}, {"params": rest, "use_muon": False}]
    return _peer("pytorch_optimizer", "Muon", adamw_lr=lr, use_adjusted_lr=True)([g for g in groups if g["params"]], lr)


def _emotional(name: str, default_lr: float, build: Callable[[Params, float], Any]) -> Contender:
    """The same optimizer, as it comes, under the emotion."""

    def wrapped(params: Params, lr: float) -> emonavi.Emotional:
        return emonavi.Emotional(build(params, lr), use_shadow=True)

    return Contender(f"Emotional({name})", "emonavi", default_lr, wrapped, rate=_effective, shadow=True)


def _effective(optimizer: Any) -> float:
    return float(optimizer.effective_lr[0])


_COSINE: dict[str, Any] = {"warm_up": WARM_UP, "tuned": True}
_PRODIGY: dict[str, Any] = {
    "build": _peer("prodigyopt", "Prodigy"),
    "rate": lambda optimizer: float(optimizer.param_groups[0]["d"] * optimizer.param_groups[0]["lr"]),
}
_LION = _peer("pytorch_optimizer", "Lion")

# Yardsticks first: a run that is cut short then has what the others are measured by.
CONTENDERS: dict[str, Contender] = {
    contender.name: contender
    for contender in (
        Contender("AdamW + cosine", "torch", 1e-3, torch.optim.AdamW, **_COSINE),
        Contender("Lion + cosine", "pytorch_optimizer", 1e-4, _LION, **_COSINE),
        Contender("EmoFact rule + cosine", "emonavi", 1e-3, _ours("EmoFact", use_trust=False), **_COSINE),
        *map(_adaptive, FAMILY),
        Contender("AdamW", "torch", 1e-3, torch.optim.AdamW),
        Contender("Prodigy", "prodigyopt", 1.0, **_PRODIGY),
        Contender("Prodigy + cosine", "prodigyopt", 1.0, **_PRODIGY, warm_up=0.0),
        Contender("ScheduleFree AdamW", "schedulefree", 2.5e-3, _peer("schedulefree", "AdamWScheduleFree")),
        Contender(
            *("MoMo-Adam", "momo-opt", 1e-2, _peer("momo", "MomoAdam")),
            step=lambda optimizer, loss: optimizer.step(loss=loss.detach()),
        ),
        Contender("Adafactor", "torch", 1e-2, torch.optim.Adafactor),
        Contender("Lion", "pytorch_optimizer", 1e-4, _LION),
        Contender("SGD", "torch", 1e-3, _sgd),
        Contender("Muon", "pytorch_optimizer", 2e-2, _muon),
        _emotional("AdamW", 1e-3, torch.optim.AdamW),
        _emotional("SGD", 1e-3, _sgd),
        _emotional("Muon", 2e-2, _muon),
        Contender(
            *("EmoNavi (pytorch_optimizer)", "pytorch_optimizer", 1e-3, _peer("pytorch_optimizer", "EmoNavi")),
            step=lambda optimizer, loss: optimizer.step(lambda: loss.detach()),  # no other way to hand the loss over
        ),
        *(
            Contender(f"EmoNavi {generation}", "emonavi", 1e-3, _ours("EmoNavi", emotion=generation), rate=_effective)
            for generation in ("v1", "v3", "v4")
        ),
    )
}

YARDSTICK = "AdamW + cosine"
# The siblings' own rules, tuned: what the emotion is worth, apart from the rule.
OWN_RULE = {"EmoNavi": YARDSTICK, "EmoLynx": "Lion + cosine", "EmoFact": "EmoFact rule + cosine"}

_MODULES = {"momo-opt": "momo"}  # where the module is not named like the package


def missing(names: list[str]) -> list[str]:
    """Packages that these contenders need and that are not installed."""
    packages = {CONTENDERS[name].package for name in names}
    return sorted(p for p in packages if find_spec(_MODULES.get(p, p)) is None)


def choose(wanted: str, known: Sequence[str], what: str) -> list[str]:
    """Read a list of names separated by commas; in any case, and ``name*`` stands for all that begin so.

    Raises:
        ValueError: a name is not known.
    """
    chosen: list[str] = []
    for typed in filter(None, (part.strip() for part in wanted.split(","))):
        word = typed.lower()
        found = [k for k in known if k.lower() == word or (word.endswith("*") and k.lower().startswith(word[:-1]))]
        if not found:
            raise ValueError(f"no {what} {typed!r}: choose from {', '.join(known)}")
        chosen += [name for name in found if name not in chosen]
    return chosen
