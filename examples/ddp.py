"""Replicas on real data, each with its own share of a batch and its own loss, that feel and do the same.

torchrun --nproc-per-node 2 examples/ddp.py
"""

import argparse
import gc

import torch
from data import digits, right_digits
from torch import distributed as dist
from torch import nn
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel as DDP

from emonavi import EmoNavi


def main() -> None:
    """Train on the ranks that torchrun has started."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--small", action="store_true", help="60 steps instead of 600")
    steps = 60 if parser.parse_args().small else 600
    torch.set_num_threads(1)
    # On GPUs it is "nccl", and each rank takes its own: torch.cuda.set_device(int(os.environ["LOCAL_RANK"])).
    dist.init_process_group("gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(0)
    model = DDP(nn.Sequential(nn.Flatten(), nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10)))
    optimizer = EmoNavi(model.parameters(), lr=1e-2)  # nothing else: it asks the other ranks by itself
    before = right_digits(model)[0]
    images, labels = digits()[0]
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        mine = torch.randint(len(images), (64,), generator=generator).chunk(world)[rank]
        optimizer.zero_grad()
        cross_entropy(model(images[mine]), labels[mine]).backward()
        optimizer.step()
    after, right = right_digits(model)
    emotion = optimizer.param_groups[0]["emotion"]
    mine = torch.cat([emotion, *(p.detach().double().flatten() for p in model.parameters())])
    all_of_them = [torch.empty_like(mine) for _ in range(world)]
    dist.all_gather(all_of_them, mine)
    if rank == 0:
        same, felt = all(torch.equal(mine, other) for other in all_of_them), optimizer.emotion.loss
        print(f"held-out loss {before:.3f} -> {after:.3f}, {right:.0%} right; loss felt last {felt:.3f}")
        print(f"{world} ranks with losses of their own are {'the same to the last bit' if same else 'different'}")
    dist.barrier()  # who leaves first may not take the connections of the others along
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
    gc.collect()  # torch's cycles hold gloo's threads, which would abort the process where they outlive the interpreter
