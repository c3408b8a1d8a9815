"""Training that survives the death of a rank, or of all: torchrun starts again, and the run goes on where it was saved.

torchrun --nproc-per-node 2 --max-restarts 3 examples/elastic.py --folder run

EMONAVI_DIE_AT=25 makes one rank die there, in its first life, to see it.
"""

import argparse
import gc
import os
from pathlib import Path
from typing import Any

import torch
from data import digits
from torch import distributed as dist
from torch import nn
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel as DDP

from emonavi import EmoNavi


def save(state: dict[str, Any], path: Path) -> None:
    """Write a checkpoint that is there as a whole, or not at all: whoever is killed meanwhile leaves the one before."""
    unfinished = path.with_suffix(".unfinished")
    with open(unfinished, "wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())  # the bytes before the name, or a power cut may leave the name of an empty file
    os.replace(unfinished, path)
    folder = os.open(path.parent, os.O_RDONLY)
    os.fsync(folder)
    os.close(folder)


def main() -> None:
    """Train on the ranks that torchrun has started, from the last checkpoint on."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--small", action="store_true", help="60 steps instead of 600")
    parser.add_argument("--folder", type=Path, required=True, help="where the checkpoint is, or will be")
    args = parser.parse_args()
    torch.set_num_threads(1)
    life = os.environ["TORCHELASTIC_RESTART_COUNT"]
    store, rank, world = next(dist.rendezvous("env://"))
    # Under a prefix: the addresses of the ranks of the life before are still in torchrun's store.
    dist.init_process_group("gloo", store=dist.PrefixStore(life, store), rank=rank, world_size=world)
    dies = int(os.environ.get("EMONAVI_DIE_AT", -1)) if life == "0" else -1
    torch.manual_seed(0)
    model = DDP(nn.Sequential(nn.Flatten(), nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10)))
    optimizer = EmoNavi(model.parameters(), lr=1e-2, use_shadow=True)
    args.folder.mkdir(parents=True, exist_ok=True)
    path, first = args.folder / "checkpoint.pt", 0
    if path.exists():
        state = torch.load(path, weights_only=True)
        model.module.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        first = state["step"]
    images, labels = digits()[0]
    for step in range(first, 60 if args.small else 600):
        # The batch depends on nothing but the step, so that a run that starts again sees what it would have seen.
        generator = torch.Generator().manual_seed(step)
        mine = torch.randint(len(images), (64,), generator=generator).chunk(world)[rank]
        optimizer.zero_grad()
        cross_entropy(model(images[mine]), labels[mine]).backward()
        optimizer.step()
        if (step + 1) % 10 == 0 and rank == 0:  # all ranks hold the same: one of them saves it
            save({"model": model.module.state_dict(), "optimizer": optimizer.state_dict(), "step": step + 1}, path)
        if step == dies and rank == world - 1:
            os._exit(1)
    if rank == 0:
        print(f"life {life}: {first} steps were taken up, {optimizer.emotion.steps} are done")
    dist.barrier()  # who leaves first may not take the connections of the others along
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
    gc.collect()  # torch's cycles hold gloo's threads, which would abort the process where they outlive the interpreter
