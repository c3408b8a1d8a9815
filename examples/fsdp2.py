"""A model sharded over the ranks (FSDP2) on real data, and a checkpoint that any number of ranks can take up.

torchrun --nproc-per-node 2 examples/fsdp2.py --folder checkpoints
"""

import argparse
import gc
from pathlib import Path

import torch
from data import digits, right_digits
from torch import distributed as dist
from torch import nn
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.functional import cross_entropy

from emonavi import EmoNavi


def main() -> None:
    """Train on the ranks that torchrun has started, from the last checkpoint on."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--small", action="store_true", help="60 steps instead of 600")
    parser.add_argument("--folder", type=Path, required=True, help="where the checkpoints are, or will be")
    args = parser.parse_args()
    torch.set_num_threads(1)
    dist.init_process_group("gloo")  # with GPUs: NCCL, and a mesh of "cuda"
    rank, world = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))
    mesh = init_device_mesh("cpu", (world,))
    for layer in (model[1], model):
        fully_shard(layer, mesh=mesh)
    optimizer = EmoNavi(model.parameters(), lr=1e-2)  # after sharding, as every optimizer
    saved = sorted(args.folder.glob("*/.metadata"))  # written last: without it a checkpoint is not whole
    if saved:
        weights, memories = get_state_dict(model, optimizer)
        state = {"model": weights, "optimizer": memories}
        dcp.load(state, checkpoint_id=saved[-1].parent)
        set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
    before = right_digits(model)[0]
    images, labels = digits()[0]
    generator = torch.Generator().manual_seed(optimizer.emotion.steps)
    for _ in range(60 if args.small else 600):
        mine = torch.randint(len(images), (64,), generator=generator).chunk(world)[rank]
        optimizer.zero_grad()
        cross_entropy(model(images[mine]), labels[mine]).backward()
        optimizer.step()
    after, right = right_digits(model)
    felt, steps = optimizer.emotion.loss, optimizer.emotion.steps
    weights, memories = get_state_dict(model, optimizer)
    dcp.save({"model": weights, "optimizer": memories}, checkpoint_id=args.folder / f"{steps:08d}")
    if rank == 0:
        print(f"held-out loss {before:.3f} -> {after:.3f}, {right:.0%} right; loss felt last {felt:.3f}")
        print(f"{steps} steps in all; saved by {world} ranks, and any number of them can go on")
    dist.barrier()  # who leaves first may not take the connections of the others along
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
    gc.collect()  # torch's cycles hold gloo's threads, which would abort the process where they outlive the interpreter
