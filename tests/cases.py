"""The siblings as a table, and a small task to train them on.

A sibling is one :class:`OptimizerCase` here and one reference in ``reference/``. What is special about one is a field
of its case, never an ``if`` on its name.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from reference import ClanReference, FactReference, LynxReference, NaviReference, NecoReference, ZealReference
from torch import Tensor, nn
from torch.nn import Parameter

import emonavi
from emonavi.clan import emoclan
from emonavi.emotion import State
from emonavi.fact import emofact
from emonavi.lynx import emolynx
from emonavi.navi import emonavi as emonavi_rule
from emonavi.neco import emoneco
from emonavi.zeal import emozeal


@dataclass(frozen=True)
class Config:
    """One way to construct a sibling."""

    description: str
    kwargs: dict[str, Any] = field(default_factory=dict)
    adaptive: bool = True
    shadow: bool = False

    @property
    def emotion(self) -> str:
        return self.kwargs.get("emotion", "adaptive")


def _navi_scalars(betas: tuple[float, float], rates: Tensor, k: int, trust: Tensor) -> dict[str, Any]:
    beta1, beta2 = betas
    return {
        "step_size": rates / (1 - beta1**k),
        "root": torch.full_like(rates, math.sqrt(1 - beta2**k)),
        "last_root": torch.full_like(rates, math.sqrt(1 - beta2 ** (k - 1)) if k > 1 else 1.0),
        "beta1": beta1, "beta2": beta2, "eps": 1e-8, "square_trust": trust,
    }  # fmt: skip


def _fact_scalars(betas: tuple[float, float], rates: Tensor, k: int, trust: Tensor) -> dict[str, Any]:
    bias = torch.full_like(rates, 1 - betas[0] ** k)
    return {"step_size": rates, "bias": bias, "beta1": betas[0], "eps": 1e-8, "floor": 1e-16, "trust": trust}


def _lynx_scalars(betas: tuple[float, float], rates: Tensor, k: int, trust: Tensor) -> dict[str, Any]:
    return {"step_size": rates, "beta1": betas[0], "beta2": betas[1], "trust": trust}


def _clan_scalars(betas: tuple[float, float], rates: Tensor, k: int, trust: Tensor) -> dict[str, Any]:
    adam = _navi_scalars(betas, rates, k, trust)
    del adam["square_trust"]  # of v4, which has no such rule
    bias, last_bias = (torch.full_like(rates, 1 - betas[0] ** steps) for steps in (k, k - 1))
    return adam | {"bias": bias, "last_bias": last_bias}


def _neco_scalars(betas: tuple[float, float], rates: Tensor, k: int, trust: Tensor) -> dict[str, Any]:
    return {"step_size": rates, "beta1": betas[0], "beta2": betas[1]}


def _signed(scalar: float, last: float) -> dict[str, Any]:
    return {"signed": min(1.0, max(0.0, 2 * scalar)), "last_signed": min(1.0, max(0.0, 2 * last))}


def _hard(scalar: float, last: float) -> dict[str, Any]:
    return {name.replace("signed", "hard"): share for name, share in _signed(scalar, last).items()}


@dataclass(frozen=True)
class OptimizerCase:
    """One sibling: how to make it and what is to be expected of it."""

    name: str
    cls: type
    rule: Callable[..., Any]  # functional form for matrices
    reference: type
    betas: tuple[float, float]
    configs: tuple[Config, ...]
    scalars: Callable[..., dict[str, Any]]  # what the functional form takes, from the rates and the step
    matrix_state: tuple[str, ...]
    vector_state: tuple[str, ...]
    matrix_bytes: float  # state bytes per weight of a large float32 matrix, at most
    matrix_extra: int  # bytes per matrix whatever its size, at most
    vector_bytes: float
    lr: float = 1e-2
    generations: tuple[str, ...] = ("v1", "v3", "v4")  # for which a rule was published
    golden: tuple[torch.dtype, float] = (torch.float64, 1e-10)  # dtype of its traces, and how near they are met
    # Where it switches rules by the scalar: what the functional form takes for today's and for the last update's.
    switch: Callable[[float, float], dict[str, Any]] | None = None
    first_step: float | None = 1.0  # of a vector under the adaptive emotion, in lrs; None: it depends on the gradient
    kernel: bool = False  # there is one for the CPU
    on_cuda: bool = False  # there is one for CUDA
    fades: bool = False  # steps are shorter where gradients are smaller than they used to be
    # Largest relative deviation in the run when all gradients are scaled by 2^-20 (eps is the one thing that feels it).
    scaling_tolerance: float = 1e-3

    def at(self, scalar: float) -> dict[str, float]:
        """What its reference takes of the scalar."""
        return {"scalar": scalar} if self.switch else {}

    def make(self, params: Any, **kwargs: Any) -> Any:
        """The optimizer; it is not to warn of missing losses, nor to hear any by itself."""
        quiet = {"lr": self.lr, "on_missing_loss": "ignore", "capture": False}
        return self.cls(params, **(quiet | kwargs))


SHARED = (
    Config("adaptive"),
    Config("adaptive, decay and other betas", {"weight_decay": 0.3, "betas": (0.8, 0.95)}),
    Config("adaptive, shadow", {"use_shadow": True}, shadow=True),
    Config("adaptive, without trust", {"use_trust": False}),
    Config("adaptive, walls", {"max_norm": 0.5, "max_lr": 2e-3, "min_lr": 1e-4}),
    Config("v1", {"emotion": "v1"}, adaptive=False, shadow=True),
    Config("v3", {"emotion": "v3"}, adaptive=False),
    Config("v4", {"emotion": "v4"}, adaptive=False),
    Config("v4, shadow", {"emotion": "v4", "use_shadow": True}, adaptive=False, shadow=True),
)

# The ones that switch share all but the rule with their sisters: less of what costs time.
LEFT_OUT = ("adaptive, without trust", "adaptive, walls")
ONLY_V3 = tuple(c for c in SHARED if c.emotion in ("adaptive", "v3") and c.description not in LEFT_OUT)
ONLY_V3 += (Config("v3, shadow", {"emotion": "v3", "use_shadow": True}, adaptive=False, shadow=True),)

CASES = (
    OptimizerCase(
        name="EmoNavi", cls=emonavi.EmoNavi, rule=emonavi_rule, reference=NaviReference, scalars=_navi_scalars,
        kernel=True, on_cuda=True, betas=(0.9, 0.999),
        configs=SHARED, matrix_state=("exp_avg", "exp_avg_sq"), vector_state=("exp_avg", "exp_avg_sq"),
        matrix_bytes=8, matrix_extra=0, vector_bytes=8,
    ),
    OptimizerCase(
        name="EmoFact", cls=emonavi.EmoFact, rule=emofact, reference=FactReference, scalars=_fact_scalars,
        kernel=True, on_cuda=True, betas=(0.9, 0.999),
        configs=SHARED, matrix_state=("exp_avg_row", "exp_avg_col", "exp_avg_sample"),
        vector_state=("exp_avg", "exp_avg_sq"), matrix_bytes=0.2, matrix_extra=16 * 1024, vector_bytes=8,
    ),
    OptimizerCase(
        name="EmoLynx", cls=emonavi.EmoLynx, rule=emolynx, reference=LynxReference, scalars=_lynx_scalars,
        kernel=True, on_cuda=True, betas=(0.9, 0.99),
        configs=(*SHARED, Config("adaptive, decoupled decay", {"weight_decay": 1e-3, "decoupled_weight_decay": True})),
        matrix_state=("exp_avg",), vector_state=("exp_avg",), matrix_bytes=4, matrix_extra=0, vector_bytes=4,
        scaling_tolerance=0.0, fades=True,
    ),
    OptimizerCase(
        name="EmoClan", cls=emonavi.EmoClan, rule=emoclan, reference=ClanReference, scalars=_clan_scalars,
        betas=(0.9, 0.999),
        configs=ONLY_V3, matrix_state=("exp_avg", "exp_avg_sq"), vector_state=("exp_avg", "exp_avg_sq"),
        matrix_bytes=8, matrix_extra=0, vector_bytes=8,
        # As published its second memories are float32, whatever the parameter's dtype.
        generations=("v3",), golden=(torch.float64, 1e-5), switch=_signed,
    ),
    OptimizerCase(
        name="EmoZeal", cls=emonavi.EmoZeal, rule=emozeal, reference=ZealReference, scalars=_clan_scalars,
        betas=(0.9, 0.999),
        configs=ONLY_V3, matrix_state=("exp_avg", "exp_avg_row", "exp_avg_col"),
        vector_state=("exp_avg", "exp_avg_sq"), matrix_bytes=4, matrix_extra=4 * (1024 + 768),
        vector_bytes=8,
        generations=("v3",), golden=(torch.float32, 1e-5), switch=_signed,
    ),
    OptimizerCase(
        name="EmoNeco", cls=emonavi.EmoNeco, rule=emoneco, reference=NecoReference, scalars=_neco_scalars,
        betas=(0.9, 0.99),
        configs=ONLY_V3, matrix_state=("exp_avg",), vector_state=("exp_avg",), matrix_bytes=4, matrix_extra=0,
        vector_bytes=4, fades=True, scaling_tolerance=1e-6, first_step=None,
        generations=("v3",), golden=(torch.float32, 1e-5), switch=_hard,
    ),
)  # fmt: skip

siblings = pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
both_emotions = pytest.mark.parametrize(  # each sibling with the adaptive one and with its latest generation
    ("case", "emotion"),
    [(case, emotion) for case in CASES for emotion in ("adaptive", case.generations[-1])],
    ids=lambda value: getattr(value, "name", value),
)
# None is the kernel, where a C compiler is at hand.
ways = pytest.mark.parametrize("foreach", [False, True, None], ids=["single", "foreach", "kernel"])


def configured(only: Callable[[Config], bool] = lambda _: True) -> Any:
    """Every sibling in each of its configurations that ``only`` lets through."""
    pairs = [(case, config) for case in CASES for config in case.configs if only(config)]
    return pytest.mark.parametrize(
        ("case", "config"), pairs, ids=[f"{case.name}-{config.description}" for case, config in pairs]
    )


SHAPES = ((6, 4), (5,), (3, 2, 2, 2), (), (1, 7), (9, 1))


def weights(dtype: torch.dtype = torch.float32, shapes: Any = SHAPES, seed: int = 0) -> list[Parameter]:
    """Parameters of several shapes; the same ones for each call."""
    generator = torch.Generator().manual_seed(seed)
    return [Parameter(torch.randn(s, generator=generator, dtype=torch.float64).to(dtype)) for s in shapes]


X = torch.randn(16, 4, generator=torch.Generator().manual_seed(1))
Y = torch.tanh(X @ torch.randn(4, 3, generator=torch.Generator().manual_seed(2)))


def net(seed: int = 0) -> nn.Module:
    """A small network for :data:`X` and :data:`Y`."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))


def loss_of(model: nn.Module, x: Tensor = X, y: Tensor = Y) -> Tensor:
    return (model(x) - y).square().mean()


def close(value: Any, rel: float = 1e-6) -> Any:
    """What a number or a tensor of one element is to be compared with."""
    return pytest.approx(float(value.detach() if isinstance(value, Tensor) else value), rel=rel)


class Odd(Tensor):
    """A subclass of torch's tensor, which no kernel takes."""


class Valley:
    """A quadratic with a fresh noise at every step, in closed form: training without autograd, the same each time.

    Step t depends on t and on the parameters only, so that a run can be continued anywhere. The told loss rises
    between the steps of ``rise``, as after a bad batch, so that the brake has something to do.
    """

    def __init__(self, params: list[Tensor], noise: float = 0.3, rise: range = range(20, 26), seed: int = 1):
        generator = torch.Generator().manual_seed(seed)
        self.noise = noise
        self.rise = rise
        self.targets = [torch.randn(p.shape, generator=generator, dtype=torch.float64) for p in params]

    def fill(self, params: list[Tensor], t: int, scale: float = 1.0) -> float:
        """Set the gradients of step t; returns its loss."""
        generator = torch.Generator().manual_seed(1000 + t)
        loss, self.grads = 0.0, []
        for p, target in zip(params, self.targets, strict=True):
            noise = self.noise * torch.randn(p.shape, generator=generator, dtype=torch.float64)
            off = p.detach().double() - target
            self.grads.append((scale * (off + noise)).to(p.dtype))
            if p.is_leaf:
                p.grad = self.grads[-1]
            loss += float((0.5 * off * off + off * noise).sum())
        return loss + (0.5 * (t - self.rise.start + 1) * loss if t in self.rise else 0.0)


def train(
    optimizer: Any,
    params: list[Tensor],
    steps: int,
    *,
    start: int = 0,
    loss: Callable[[float], Any] | None = lambda x: x,
    scale: float = 1.0,
    valley: Valley | None = None,
) -> list[float]:
    """Train on a valley; ``loss`` maps the valley's loss to the one that is told (None: none is told)."""
    valley = valley or Valley(params)
    losses = []
    for t in range(start, start + steps):
        losses.append(valley.fill(params, t, scale))
        optimizer.step(loss=None if loss is None else loss(losses[-1]))
    return losses


def through_file(state_dict: Any) -> Any:
    """torch.save and torch.load as a careful user does it."""
    file = io.BytesIO()
    torch.save(state_dict, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def check_twin(twin: Any, optimizer: Any, params: list[Tensor], start: int) -> None:
    """A copy of an optimizer at step ``start`` has parameters of its own, and trains on like the original."""
    copies = [p for g in twin.param_groups for p in g["params"]]
    assert not {id(p) for p in copies} & {id(p) for p in params}
    assert differences(contents(twin), contents(optimizer)) == []
    train(twin, copies, 5, start=start)
    train(optimizer, params, 5, start=start)
    assert differences(contents(twin), contents(optimizer)) == []


def vector(optimizer: Any) -> Tensor:
    return optimizer.param_groups[0]["emotion"]


def felt(optimizer: Any, name: str) -> float:
    """An entry of the adaptive emotion's vector."""
    return float(vector(optimizer)[State._fields.index(name)])


def write(optimizer: Any, **entries: float) -> None:
    """Set entries of the adaptive emotion's vector."""
    for name, value in entries.items():
        vector(optimizer)[State._fields.index(name)] = value


def drive(optimizer: Any) -> float:
    return math.exp(felt(optimizer, "log_drive"))


def contents(optimizer: Any) -> dict[str, Any]:
    """A copy of everything that an optimizer holds: parameters, state tensors, emotion, options."""

    def copied(value: Any) -> Any:
        return value.detach().clone() if isinstance(value, Tensor) else value

    found = {}
    for i, group in enumerate(optimizer.param_groups):
        found |= {f"group {i}: {k}": copied(v) for k, v in group.items() if k != "params"}
        for j, p in enumerate(group["params"]):
            found[f"parameter {i}.{j}"] = copied(p)
            found |= {f"state {i}.{j}: {k}": copied(v) for k, v in optimizer.state.get(p, {}).items()}
    return found


def keeping(sibling: type) -> type:
    """A sibling that keeps what each of its steps returned, the loss that counted, in ``losses``."""

    class Keeping(sibling):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self.losses: list[float] = []

        def step(self, closure: Any = None, *, loss: Any = None) -> Any:
            counted = super().step(closure, loss=loss)
            self.losses.append(math.nan if counted is None else float(counted))
            return counted

    return Keeping


def differences(a: dict[str, Any], b: dict[str, Any], ignore: tuple[str, ...] = ()) -> list[str]:
    """Names under which two contents are not bitwise equal (NaN equals NaN)."""

    def same(x: Any, y: Any) -> bool:
        if not isinstance(x, Tensor) or not isinstance(y, Tensor):
            return type(x) is type(y) and bool(x == y)
        return x.dtype == y.dtype and x.shape == y.shape and torch.equal(x.nan_to_num(7e7), y.nan_to_num(7e7))

    names = [n for n in a.keys() | b.keys() if not any(i in n for i in ignore)]
    return sorted(n for n in names if n not in a or n not in b or not same(a[n], b[n]))
