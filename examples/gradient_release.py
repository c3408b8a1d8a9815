"""Gradient release: how much memory a step takes when gradients are freed inside backward.

    python examples/gradient_release.py            # 134 M parameters; needs 3 GB
    python examples/gradient_release.py --small    # 8 M parameters

Each way trains in a process of its own, whose peak of resident memory is read at the end.
"""

import argparse
import resource
import subprocess
import sys

import torch
from torch import nn

import emonavi

WAYS = {"normal": {}, "released": {}, "released-8bit": {"state_dtype": "8bit"}}


def peak():
    """Peak of this process's resident memory so far, in MB (macOS counts in bytes)."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e6


def train(way, width, depth, steps=4):
    """Learn the identity; returns the number of parameters and the last loss."""
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(width, width, bias=False) for _ in range(depth)))
    optimizer = emonavi.EmoNavi(model.parameters(), **WAYS[way])
    if way != "normal":
        emonavi.gradient_release(optimizer)
    for _ in range(steps):
        optimizer.zero_grad()
        x = torch.randn(8, width)
        (model(x) - x).square().mean().backward()
        loss = optimizer.step()
    return sum(p.numel() for p in model.parameters()), float(loss)


def main():
    """Run each way in a process of its own."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--small", action="store_true", help="a few seconds")
    parser.add_argument("--way", choices=WAYS, help="only this one, in this process")
    given = parser.parse_args()
    width, depth = (1024, 8) if given.small else (2048, 32)
    if given.way:
        train(given.way, 64, 2)  # what torch loads at a first step is no one's memory
        before = peak()
        count, loss = train(given.way, width, depth)
        grown = peak() - before
        print(f"{given.way:13} {grown:7.0f} MB, {1e6 * grown / count:5.2f} bytes for each parameter; loss {loss:.4f}")
        return
    for way in WAYS:
        subprocess.run([sys.executable, __file__, *sys.argv[1:], "--way", way], check=True)


if __name__ == "__main__":
    main()
