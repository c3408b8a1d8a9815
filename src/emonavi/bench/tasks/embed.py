"""Embeddings: words and ratings, where most rows are rarely met, and views of a photograph that belong together."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from functools import cache, partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from emonavi.bench.tasks import data
from emonavi.bench.tasks.problem import Problem, Split, Task, epoch_batch, generator, initialised, split

__all__ = ["BY_NAME", "TASKS"]


# --- Skip-grams: which names occur near each other in source code

_WORDS = 2000
_NEGATIVES = 5
_REACH = 3


@cache
def _word_indices() -> tuple[Tensor, Tensor, Tensor]:
    """Train and held-out text as indices of its most frequent words, without the others; each word's count."""
    parts = [re.findall(r"[a-z]+", bytes(text.tolist()).decode().lower()) for text in data.source_code()]
    ranked = [word for word, _ in Counter(parts[0]).most_common(_WORDS)]
    index = {word: rank for rank, word in enumerate(ranked)}
    train, val = (torch.tensor([index[word] for word in part if word in index]) for part in parts)
    return train, val, torch.bincount(train, minlength=_WORDS).float()


class _SkipGram(nn.Module):
    """Words (n) and candidates (n, k) to logits (n, k): does the candidate occur near the word?"""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.words, self.contexts = nn.Embedding(_WORDS, width), nn.Embedding(_WORDS, width)
        for table in (self.words, self.contexts):
            nn.init.normal_(table.weight, std=0.1)  # torch's default of 1 would start with logits of +-6

    def forward(self, words: Tensor, candidates: Tensor) -> Tensor:
        logits: Tensor = (self.contexts(candidates) @ self.words(words).unsqueeze(2)).squeeze(2)
        return logits


def _skip_grams(
    text: Tensor, counts: Tensor, size: int, source: torch.Generator
) -> tuple[tuple[Tensor, Tensor], Tensor]:
    """Draw words, for each one that is near and five drawn as word2vec does (count to the power 3/4), and labels."""
    places = torch.randint(_REACH, len(text) - _REACH, (size,), generator=source)
    distance = torch.randint(1, _REACH + 1, (size,), generator=source)
    side = 2 * torch.randint(2, (size,), generator=source) - 1
    others = torch.multinomial(counts.pow(0.75), size * _NEGATIVES, replacement=True, generator=source)
    candidates = torch.cat([text[places + side * distance].unsqueeze(1), others.view(size, _NEGATIVES)], dim=1)
    labels = torch.zeros(candidates.shape)
    labels[:, 0] = 1
    return (text[places], candidates), labels


def _word2vec(seed: int) -> Problem:
    train, val, counts = _word_indices()

    def batch(step: int) -> tuple[tuple[Tensor, Tensor], Tensor]:
        return _skip_grams(train, counts, 512, generator(seed, 0, step))

    held_out = _skip_grams(val, counts, 8192, generator(0, 1, 0))
    return Problem(initialised(seed, _SkipGram), F.binary_cross_entropy_with_logits, batch, held_out)


# --- Ratings

_USERS, _ITEMS = 500, 300


@cache
def _ratings() -> Split:
    """Synthetic stars (n, 2) to (n): three tastes, Zipf's law for both users and items, noise of 0.5 stars."""
    source = generator(0, 0, 1)
    tastes = [torch.randn(count, 3, generator=source) for count in (_USERS, _ITEMS)]
    biases = [0.4 * torch.randn(count, generator=source) for count in (_USERS, _ITEMS)]
    ranks = [torch.arange(1, count + 1).pow(-0.8) for count in (_USERS, _ITEMS)]
    user, item = (torch.multinomial(weights, 30_000, replacement=True, generator=source) for weights in ranks)
    stars = 3.5 + biases[0][user] + biases[1][item] + 0.5 * (tastes[0][user] * tastes[1][item]).sum(1)
    return split(torch.stack([user, item], dim=1), stars + 0.5 * torch.randn(len(stars), generator=source))


class _Ratings(nn.Module):
    """Matrix factorisation with biases: (n, 2) users and items to (n) stars."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.users, self.items = nn.Embedding(_USERS, width), nn.Embedding(_ITEMS, width)
        self.user_bias, self.item_bias = nn.Embedding(_USERS, 1), nn.Embedding(_ITEMS, 1)
        self.mean = nn.Parameter(torch.zeros(()))
        for table in (self.users, self.items, self.user_bias, self.item_bias):
            nn.init.normal_(table.weight, std=0.1)

    def forward(self, pairs: Tensor) -> Tensor:
        user, item = pairs.unbind(1)
        agreement = (self.users(user) * self.items(item)).sum(1)
        stars: Tensor = self.mean + agreement + (self.user_bias(user) + self.item_bias(item)).squeeze(1)
        return stars


def _factorisation(seed: int, arrays: Callable[[], Split] = _ratings) -> Problem:
    x, y, x_val, y_val = arrays()
    batch = partial(epoch_batch, seed, inputs=x, targets=y, size=256)
    return Problem(initialised(seed, _Ratings), F.mse_loss, batch, (x_val, y_val))


# --- Pixels: the same model told of handwriting, in its raw shades of grey


@cache
def _pixels() -> Split:
    """Images and places (n, 2) to shades (n) from 0 to 16, of which a third is held out."""
    shades = 8 * (data.digit_images()[0][:_USERS].flatten(1) + 1)
    pairs = torch.cartesian_prod(torch.arange(len(shades)), torch.arange(shades.shape[1]))
    order = torch.randperm(len(pairs), generator=generator(0, 0, 2))
    return split(pairs[order], shades.flatten()[order])


# --- Contrast: two noisy, shifted views of the same place in a photograph

_VIEW = 16  # pixels
_SHIFT = 4
_PLACES = 64  # that each view is told from


@cache
def _china() -> tuple[Tensor, Tensor]:
    """China below its sky at half its resolution in [-1, 1], (3, height, width); the right third is held out."""
    image = F.avg_pool2d(2 * data.photograph("china.jpg")[:, 140:] - 1, 2)
    return image[:, :, :210], image[:, :, 210:]


def _views(image: Tensor, groups: int, source: torch.Generator) -> tuple[tuple[Tensor, Tensor], Tensor]:
    """Two crops (groups, 64, 768) of each random place, a few pixels apart and noisy; the target is their own place."""
    windows = image.unfold(1, _VIEW, 1).unfold(2, _VIEW, 1)  # (3, rows, columns, 16, 16)
    count = groups * _PLACES
    row, column = (
        torch.randint(places - _SHIFT, (count,), generator=source) for places in (windows.shape[1], windows.shape[2])
    )
    views = []
    for _ in range(2):
        down, right = torch.randint(_SHIFT + 1, (2, count), generator=source)
        crop = windows[:, row + down, column + right].transpose(0, 1).reshape(groups, _PLACES, -1)
        views.append(crop + 0.1 * torch.randn(crop.shape, generator=source))
    return (views[0], views[1]), torch.arange(_PLACES).expand(groups, -1)


class _Similarity(nn.Module):
    """Two batches of views (groups, 64, 768) to the cosines of their embeddings over a temperature of 0.1.

    They are (groups, 64, 64), each row a candidate from the second batch and each column a view of the first, because
    cross entropy wants the candidates in dimension 1.
    """

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.embed = nn.Sequential(nn.Linear(3 * _VIEW * _VIEW, 128), nn.ReLU(), nn.Linear(128, width))

    def forward(self, views: Tensor, candidates: Tensor) -> Tensor:
        views, candidates = (F.normalize(self.embed(part), dim=-1) for part in (views, candidates))
        return candidates @ views.mT / 0.1


def _contrast(seed: int) -> Problem:
    train, val = _china()

    def batch(step: int) -> tuple[tuple[Tensor, Tensor], Tensor]:
        return _views(train, 1, generator(seed, 0, step))

    return Problem(initialised(seed, _Similarity), F.cross_entropy, batch, _views(val, 16, generator(0, 1, 0)))


_COMPLETION = partial(_factorisation, arrays=_pixels)
BY_NAME = (
    Task("pixels", "matrix factorisation of digits", "mean squared error", 400, 134, _COMPLETION, needs="sklearn"),
)
TASKS = (
    Task("word2vec", "Python source, skip-grams", "binary cross entropy", 400, 134, _word2vec),
    Task("ratings", "matrix factorisation of stars", "mean squared error", 400, 134, _factorisation, "test"),
    Task("contrast", "china, contrastive embedding", "cross entropy", 400, 134, _contrast, "test", "sklearn"),
)
