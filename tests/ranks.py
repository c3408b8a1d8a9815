"""Several processes that train together: cases that all of them run, and what each of them found.

Starting a process is what takes long (importing torch), so that a module starts its ranks once and runs all its cases
in them. A case is a function that is given the rank and returns a dict of plain tensors and numbers.
"""

from __future__ import annotations

import datetime
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing as mp
from torch import distributed as dist

Cases = dict[str, tuple[Any, ...]]  # each a function and what it is given behind the rank


def run(cases: Cases, world: int, folder: Path) -> Callable[[str], list[dict[str, Any]]]:
    """Run all cases on ``world`` ranks; what is returned gives, for a case, what each rank found."""
    context = mp.spawn(_rank, args=(cases, world, str(folder)), nprocs=world, join=False)
    limit = 300
    while limit and not context.join(timeout=1):
        limit -= 1
    for process in context.processes:
        if process.is_alive():
            process.kill()
    assert limit, "the ranks hang"
    results = [torch.load(folder / f"rank{rank}.pt", weights_only=False) for rank in range(world)]

    def of(name: str) -> list[dict[str, Any]]:
        for rank, found in enumerate(results):
            assert name in found, f"rank {rank} did not come so far: an earlier case failed"
            assert "error" not in found[name], found[name]["error"]
        return [found[name] for found in results]

    return of


def _rank(rank: int, cases: Cases, world: int, folder: str) -> None:
    torch.set_num_threads(1)
    limit = datetime.timedelta(seconds=60)  # a collective that one rank left out becomes an error
    meet = f"file://{folder}/rendezvous"
    dist.init_process_group("gloo", init_method=meet, rank=rank, world_size=world, timeout=limit)
    found: dict[str, Any] = {}
    try:
        for name, (case, *given) in cases.items():
            try:
                found[name] = case(rank, *given)
                dist.barrier()
            except Exception:
                found[name] = {"error": traceback.format_exc()}
                break  # out of step with the other ranks
    finally:
        torch.save(found, f"{folder}/rank{rank}.pt")
    dist.destroy_process_group()
