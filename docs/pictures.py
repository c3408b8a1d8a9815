"""Make the pictures of the pages, from real runs: ``python docs/pictures.py`` (three minutes of one core).

``--steps`` shortens the runs, ``--out`` names another folder than ``docs/pictures``.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

import emonavi
from emonavi import page
from emonavi.bench.figures import running_mean
from emonavi.bench.tasks import TASKS
from emonavi.pca import draw

LRS = ("1e-5", "1e-4", "1e-3", "1e-2", "1e-1", "1")


def train(optimizer, problem, steps, spoilt=-1):
    """Train; the loss of one step may be spoilt, and its gradient with it. Returns what was felt, step by step."""
    felt = []
    for step in range(steps):
        optimizer.zero_grad()
        (problem.loss(step) * (1000.0 if step == spoilt else 1.0)).backward()
        optimizer.step()
        felt.append((optimizer.emotion, optimizer.effective_lr[0]))
    return felt


def build(name, **options):
    """Return a fresh EmoNavi on a task, and the task's problem."""
    torch.manual_seed(0)
    problem = TASKS[name].build(0)
    return emonavi.EmoNavi(problem.params, **options), problem


def sheet(titles):
    """Return a figure with two panels a row, in the house's look."""
    figure = Figure(figsize=(7.2, 3.0 * len(titles) / 2), dpi=100, layout="constrained")
    FigureCanvasAgg(figure)
    axes = list(figure.subplots(len(titles) // 2, 2, squeeze=False).flat)
    for axis, title in zip(axes, titles, strict=True):
        axis.set_title(title, fontsize=11)
        axis.set_xlabel("step")
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    return figure, axes


def curve(axis, values, colour, label=None, width=1.2):
    """Draw one value a step, the first at step 1."""
    values = list(values)
    axis.plot(range(1, len(values) + 1), values, color=colour, label=label, lw=width)


def any_lr(out, steps):
    """Draw the effective lr and the loss of a training from six first guesses; those that give the same run once."""
    figure, (rates, losses) = sheet(("effective lr", "training loss"))
    names, runs = {}, {}
    for lr in LRS:
        felt = train(*build("digits", lr=float(lr)), steps)
        heard = tuple(feeling.loss for feeling, _ in felt)
        names.setdefault(heard, []).append(lr)
        runs[heard] = [rate for _, rate in felt]
    for (heard, rate), colour in zip(runs.items(), page.PALETTE, strict=False):
        first, *others = names[heard]
        curve(rates, rate, colour, f"lr {first} to {others[-1]} (the same run)" if others else f"lr {first}", 1.6)
        curve(losses, running_mean(list(heard)), colour, width=1.6)
    rates.set_yscale("log")
    losses.set_yscale("log")
    figure.legend(*rates.get_legend_handles_labels(), loc="outside lower center", ncols=6, frameon=False, fontsize=9)
    figure.savefig(out / "any-lr.png")


def senses(out, steps):
    """Draw the two senses of one run: the loss in units of its noise, and the cosine with the last step."""
    titles = ("loss and its memories", "feeling: the scalar", "reflection: trust", "drive")
    figure, (losses, feeling, trust, drive) = sheet(titles)
    felt = [felt for felt, _ in train(*build("digits"), steps)]
    for name, colour in zip(("loss", "short", "medium", "long"), (page.GREY, *page.PALETTE), strict=False):
        curve(losses, (getattr(f, name) for f in felt), colour, name, 0.6 if name == "loss" else 1.4)
    losses.legend(frameon=False, fontsize=8)
    for axis, name in ((feeling, "scalar"), (trust, "trust"), (drive, "drive")):
        curve(axis, (getattr(f, name) for f in felt), page.PALETTE[0], width=1.0)
        axis.axhline(1.0 if name == "drive" else 0.0, color=page.GREY, lw=0.8)
    figure.savefig(out / "senses.png")


def panic(out, steps):
    """Draw a run in which one loss, with its gradient, is a thousand times too large, beside the undisturbed one."""
    figure, (losses, drive) = sheet((f"training loss, x 1000 at step {steps // 2 + 1}", "drive"))
    for spoilt, colour, name in ((-1, page.GREY, "undisturbed"), (steps // 2, page.PALETTE[4], "spoilt")):
        felt = [felt for felt, _ in train(*build("digits"), steps, spoilt)]
        curve(losses, (f.loss for f in felt), colour, width=1.0)
        curve(drive, (f.drive for f in felt), colour, name, 1.4)
    losses.set_yscale("log")
    drive.set_yscale("log")
    drive.set_xlim(steps // 2 - min(20, steps // 4), steps // 2 + min(40, steps // 4))
    drive.legend(frameon=False, fontsize=8)
    figure.savefig(out / "panic.png")


def ways(out, steps):
    """Draw the way of the weights under each sibling and AdamW, as ``emonavi plot --pca`` does."""
    with tempfile.TemporaryDirectory() as folder:
        for cls in (*(emonavi.registry.SIBLINGS[name].cls for name in emonavi.available()), torch.optim.AdamW):
            torch.manual_seed(0)
            problem = TASKS["digits"].build(0)
            optimizer = cls(problem.params, lr=1e-3)
            with emonavi.monitor.trajectory(optimizer, Path(folder) / cls.__name__):
                for step in range(steps):
                    optimizer.zero_grad()
                    problem.loss(step).backward()
                    optimizer.step()
        picture, lines = draw(Path(folder), Path(folder))
        picture.rename(out / "ways.png")
    print("\n".join(lines))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=TASKS["digits"].steps)
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("pictures"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    options.out.mkdir(parents=True, exist_ok=True)
    for make in (any_lr, senses, panic, ways):
        make(options.out, options.steps)
        print(f"{make.__name__}: {make.__doc__}")
