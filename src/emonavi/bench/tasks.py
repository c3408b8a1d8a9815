"""Four real tasks on data that every machine already has: nothing is downloaded, one run takes seconds on one core.

| name | model | data |
|---|---|---|
| ``digits`` | small convolutional net | scikit-learn's 8 x 8 digits under pixel noise |
| ``charlm`` | 2-block causal transformer | the sources of Python's own standard library |
| ``diabetes`` | MLP, raw targets (mse about 26 000 at first) | scikit-learn's diabetes |
| ``lora`` | rank-4 adapters on the frozen net of ``digits`` | the digits rotated and inverted |

The split is the same for every seed; the seed decides the initial weights and the batches. A batch depends on
(seed, step) alone, so that a resumed run sees what the uninterrupted one saw, and no model draws random numbers of its
own. Overfitting is held back by fresh noise on the training inputs. A third of the samples (``charlm``: every third
file) is held out, so that the validation loss is a stable figure.
"""

from __future__ import annotations

import math
import sysconfig
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["TASKS", "LoRA", "Problem", "Task"]

Batch = tuple[Tensor, Tensor]
Split = tuple[Tensor, Tensor, Tensor, Tensor]  # train inputs, train targets, val inputs, val targets

_PIXEL_NOISE = 0.4  # clean digits are learnt to a loss of a few hundredths, which a handful of samples decides
_FEATURE_NOISE = 0.3  # of standardised inputs: 295 samples are few for an MLP
_NOISY_COPIES = 4  # of each held-out digit: evens out the luck of one noise draw
_CONTEXT = 64
_ASCII = 128
_CORPUS_BYTES = 1_500_000


@dataclass(frozen=True)
class Problem:
    """A fresh model (what requires a gradient is to be trained), its training batches and its held-out data."""

    model: nn.Module
    criterion: Callable[[Tensor, Tensor], Tensor]
    batch: Callable[[int], Batch]
    held_out: Batch

    def loss(self, step: int) -> Tensor:
        """Training loss of the fresh batch of this step; call ``backward()`` on it."""
        inputs, targets = self.batch(step)
        return self.criterion(self.model(inputs), targets)

    @torch.no_grad()
    def val(self) -> float:
        """Loss on the held-out data."""
        inputs, targets = self.held_out
        return self.criterion(self.model(inputs), targets).item()


@dataclass(frozen=True)
class Task:
    """What is trained, for how long, and how to build it from a seed."""

    name: str
    title: str
    metric: str
    steps: int
    quick_steps: int
    build: Callable[[int], Problem]


# --- Randomness and batches


def _generator(seed: int, stream: int, index: int) -> torch.Generator:
    """Return an independent random source for each (seed, stream, index), without touching torch's global one."""
    return torch.Generator().manual_seed((seed * 2 + stream) * 1_000_003 + index)


def _initialised(seed: int, make: Callable[[], nn.Module]) -> nn.Module:
    """Build a model from a seed and leave torch's global random state as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return make()


def _epoch_batch(seed: int, step: int, *, inputs: Tensor, targets: Tensor, size: int, noise: float) -> Batch:
    """Batch of a shuffled epoch (a last incomplete batch is dropped), with fresh Gaussian noise on the inputs."""
    epoch, position = divmod(step, len(inputs) // size)
    order = torch.randperm(len(inputs), generator=_generator(seed, 0, epoch))
    chosen = order[position * size : (position + 1) * size]
    x = inputs[chosen]
    return x + noise * torch.randn(x.shape, generator=_generator(seed, 1, step)), targets[chosen]


def _split(inputs: Tensor, targets: Tensor) -> Split:
    """Hold out a third, drawn once and for all."""
    order = torch.randperm(len(inputs), generator=_generator(0, 0, 0))
    val, train = order[: len(order) // 3], order[len(order) // 3 :]
    return inputs[train], targets[train], inputs[val], targets[val]


def _sklearn_arrays(loader: str, **options: bool) -> tuple[Tensor, Tensor]:
    """Load the inputs and targets of one of scikit-learn's bundled data sets."""
    try:
        from sklearn import datasets
    except ImportError as error:
        raise ImportError(
            f'this task needs scikit-learn\'s data ({loader}): run `pip install "emonavi[demo]"`, '
            "or choose the task 'charlm', which needs nothing"
        ) from error
    data = getattr(datasets, loader)(**options)
    return torch.from_numpy(data.data).float(), torch.from_numpy(data.target)


# --- digits


class _DigitNet(nn.Sequential):
    """Small convolutional net. No BatchNorm: its statistics would blur comparisons. GELU: no dead units."""

    def __init__(self) -> None:
        super().__init__(
            *(nn.Conv2d(1, 16, 3, padding=1), nn.GELU()),
            *(nn.Conv2d(16, 32, 3, padding=1), nn.GELU(), nn.MaxPool2d(2), nn.Flatten()),
            *(nn.Linear(32 * 4 * 4, 64), nn.GELU()),
            nn.Linear(64, 10),
        )


@cache
def _digits_data(adapted: bool) -> Split:
    """Return the digits in [-1, 1], rotated by 90 degrees and inverted if ``adapted``; held-out inputs are noisy."""
    pixels, labels = _sklearn_arrays("load_digits")
    images = (pixels / 8 - 1).reshape(-1, 1, 8, 8)
    if adapted:
        images = -images.rot90(1, (2, 3))
    x, y, x_val, y_val = _split(images.contiguous(), labels.long())
    x_val, y_val = x_val.repeat(_NOISY_COPIES, 1, 1, 1), y_val.repeat(_NOISY_COPIES)
    x_val = x_val + _PIXEL_NOISE * torch.randn(x_val.shape, generator=_generator(0, 1, 0))
    return x, y, x_val, y_val


def _digits(seed: int, make: Callable[[], nn.Module] = _DigitNet, adapted: bool = False) -> Problem:
    x, y, x_val, y_val = _digits_data(adapted)
    batch = partial(_epoch_batch, seed, inputs=x, targets=y, size=32, noise=_PIXEL_NOISE)
    return Problem(_initialised(seed, make), F.cross_entropy, batch, (x_val, y_val))


# --- lora


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


@cache
def _pretrained() -> dict[str, Tensor]:
    """Weights of the digits net after the budget of ``digits`` under AdamW; trained once per process."""
    problem = _digits(0)
    optimizer = torch.optim.AdamW(problem.model.parameters(), lr=1e-3)
    for step in range(TASKS["digits"].steps):
        optimizer.zero_grad()
        problem.loss(step).backward()
        optimizer.step()
    return {name: tensor.detach().clone() for name, tensor in problem.model.state_dict().items()}


def _adapters() -> nn.Module:
    model = _DigitNet()
    model.load_state_dict(_pretrained())
    return nn.Sequential(*(LoRA(m) if isinstance(m, (nn.Conv2d, nn.Linear)) else m for m in model))


def _lora(seed: int) -> Problem:
    return _digits(seed, make=_adapters, adapted=True)


# --- diabetes


@cache
def _diabetes_data() -> Split:
    """Standardised inputs (by the training part's statistics), targets as they are."""
    x, y, x_val, y_val = _split(*_sklearn_arrays("load_diabetes", scaled=False))
    mean, std = x.mean(0), x.std(0)
    return (x - mean) / std, y.float(), (x_val - mean) / std, y_val.float()


def _regressor() -> nn.Module:
    return nn.Sequential(nn.Linear(10, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 1), nn.Flatten(0))


def _diabetes(seed: int) -> Problem:
    x, y, x_val, y_val = _diabetes_data()
    batch = partial(_epoch_batch, seed, inputs=x, targets=y, size=32, noise=_FEATURE_NOISE)
    return Problem(_initialised(seed, _regressor), F.mse_loss, batch, (x_val, y_val))


# --- charlm


class _Block(nn.Module):
    """Pre-norm transformer block."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm_attention, self.norm_mlp = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        parts = self.qkv(self.norm_attention(x)).chunk(3, dim=-1)
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in parts)
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(attended.transpose(1, 2).flatten(2))
        mixed: Tensor = x + self.mlp(self.norm_mlp(x))
        return mixed


class _CharTransformer(nn.Module):
    """Next-character model over ASCII; returns logits with the vocabulary in dimension 1, as cross entropy wants."""

    def __init__(self, width: int = 64, heads: int = 4, blocks: int = 2) -> None:
        super().__init__()
        self.characters = nn.Embedding(_ASCII, width)
        self.positions = nn.Parameter(torch.randn(_CONTEXT, width) / math.sqrt(width))
        self.blocks = nn.Sequential(*(_Block(width, heads) for _ in range(blocks)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, _ASCII)

    def forward(self, text: Tensor) -> Tensor:
        x = self.characters(text) + self.positions[: text.shape[1]]
        logits: Tensor = self.head(self.norm(self.blocks(x)))
        return logits.transpose(1, 2)


@cache
def _corpus() -> tuple[Tensor, Tensor]:
    """Train and held-out text as ASCII codes: every third module of the standard library is held out."""
    folder = Path(sysconfig.get_path("stdlib"))
    # Names with a leading underscore include generated files that differ between machines.
    files = sorted(path for path in folder.glob("*.py") if not path.name.startswith("_"))
    parts, size = ([b""], [b""]), 0
    for index, path in enumerate(files):
        if size >= _CORPUS_BYTES:
            break
        source = path.read_bytes()
        parts[index % 3 == 2].append(source)
        size += len(source)
    train, val = (torch.tensor(list(b"".join(part))).clamp_(max=_ASCII - 1) for part in parts)
    if min(len(train), len(val)) <= _CONTEXT:
        raise RuntimeError(f"no standard library sources in {folder}: use a Python that ships its .py files")
    return train, val


def _windows(text: Tensor, count: int, generator: torch.Generator) -> Batch:
    starts = torch.randint(len(text) - _CONTEXT, (count, 1), generator=generator)
    window = text[starts + torch.arange(_CONTEXT + 1)]
    return window[:, :-1], window[:, 1:]


def _charlm(seed: int) -> Problem:
    train, val = _corpus()

    def batch(step: int) -> Batch:
        return _windows(train, 16, _generator(seed, 0, step))

    held_out = _windows(val, 256, _generator(0, 1, 0))
    return Problem(_initialised(seed, _CharTransformer), F.cross_entropy, batch, held_out)


TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        Task("digits", "digits, convolutional net", "cross entropy", 370, 124, _digits),
        Task("charlm", "Python source, character transformer", "nats per character", 250, 84, _charlm),
        Task("diabetes", "diabetes, MLP on raw targets", "mean squared error", 360, 120, _diabetes),
        Task("lora", "LoRA: digits rotated and inverted", "cross entropy", 370, 124, _lora),
    )
}
