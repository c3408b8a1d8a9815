"""Workers that train alone on their own part of the handwritten digits, and merge every 32 steps.

torchrun --nproc-per-node 2 examples/autonomous.py              # on one machine
torchrun --nnodes 2 --nproc-per-node 1 --rdzv-backend c10d --rdzv-endpoint HOST:29400 examples/autonomous.py
"""

import argparse

import torch
from sklearn.datasets import load_digits
from torch import distributed as dist
from torch import nn
from torch.distributed.algorithms.model_averaging.averagers import PeriodicModelAverager
from torch.nn import functional as F

import emonavi
from emonavi.autonomous import Merger, nesterov


def data(rank, workers):
    """This worker's own digits, and the held-out ones, which are everyone's."""
    pixels, labels = map(torch.from_numpy, load_digits(return_X_y=True))
    x, y = pixels.float() / 8 - 1, labels.long()
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    held_out, mine = order[:600], order[600:][rank::workers]
    return (x[mine], y[mine]), (x[held_out], y[held_out])


@torch.no_grad()
def evaluate(model, examples):
    """Mean loss, and the share that is right."""
    found = model(examples[0])
    return F.cross_entropy(found, examples[1]).item(), (found.argmax(1) == examples[1]).float().mean().item()


def train(model, optimizer, merger, examples, steps):
    """The plain loop, and one line more."""
    x, y = examples
    for _ in range(steps):
        batch = torch.randint(len(x), (32,))
        optimizer.zero_grad()
        F.cross_entropy(model(x[batch]), y[batch]).backward()
        optimizer.step()
        merged = merger.step()
    if not merged:
        merger.merge()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="80 steps instead of 400")
    parser.add_argument("--outer", action="store_true", help="DiLoCo's outer step instead of the mean")
    args = parser.parse_args()
    dist.init_process_group("gloo")  # nothing is sent before the first merge
    torch.set_num_threads(1)
    rank, workers = dist.get_rank(), dist.get_world_size()
    mine, held_out = data(rank, workers)
    torch.manual_seed(0)  # all begin with the same weights ...
    model = nn.Sequential(nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 10))
    torch.manual_seed(1 + rank)  # ... and go their own ways
    optimizer = emonavi.EmoNavi(model.parameters(), process_group=None)  # an emotion of its own
    merger = Merger(model, optimizer, PeriodicModelAverager(period=32), outer=nesterov if args.outer else None)
    before, _ = evaluate(model, held_out)
    train(model, optimizer, merger, mine, 80 if args.small else 400)
    after, right = evaluate(model, held_out)
    felt = f"loss felt last {optimizer.emotion.loss:.3f}, drive {optimizer.emotion.drive:.3f}"
    print(f"worker {rank}: held-out loss {before:.3f} -> {after:.3f}, {right:.0%} right; {felt}", flush=True)
    dist.barrier()  # who leaves first may not take the connections of the others along
    dist.destroy_process_group()
