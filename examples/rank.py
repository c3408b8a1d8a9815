"""How many directions does a LoRA use? Effective ranks of what its adapters have learnt, under several optimizers.

    python examples/rank.py             # writes benchmarks/rank-cpu.json, four minutes of one core
    python examples/rank.py --small     # one task, two optimizers, few steps

Stable rank: sum of the squared singular values over the largest squared. Entropy rank: exp of the entropy of the
singular values as shares. Both are between 1 and the adapter's rank, 4; means over the adapters.
"""

import argparse
import json
from pathlib import Path

import torch

import emonavi
from emonavi.bench.provenance import made_on
from emonavi.bench.tasks import TASKS, LoRA

RUNS = [(torch.optim.AdamW, lr) for lr in (1e-3, 3e-3, 1e-2)]
RUNS += [(emonavi.registry.SIBLINGS[name].cls, 1e-3) for name in emonavi.available()]


def learnt(layer):
    """The correction that an adapter adds to its frozen layer, as a matrix."""
    return layer.scale * layer.up.weight.flatten(1) @ layer.down.weight.flatten(1)


def ranks(matrix):
    """Stable rank, entropy rank and Frobenius norm; without a correction 0, 0, 0."""
    values = torch.linalg.svdvals(matrix.double())
    if not values.max() > 0:
        return 0.0, 0.0, 0.0
    shares = values / values.sum()
    entropy = -torch.special.xlogy(shares, shares).sum()
    return (values.square().sum() / values.max().square()).item(), entropy.exp().item(), values.norm().item()


def train(task, cls, lr, steps):
    """Train the adapters of a task and measure them."""
    torch.manual_seed(0)
    problem = task.build(0)
    optimizer = cls(problem.params, lr=lr)
    for step in range(steps):
        optimizer.zero_grad()
        problem.loss(step).backward()
        optimizer.step()
    found = [ranks(learnt(m)) for m in problem.model.modules() if isinstance(m, LoRA)]
    stable, entropy, norm = torch.tensor(found).mean(0).tolist()
    row = {"task": task.name, "optimizer": cls.__name__, "lr": lr, "loss": problem.val()}
    return row | {"stable": stable, "entropy": entropy, "norm": norm}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--small", action="store_true", help="one task, two optimizers, 20 steps, and nothing is written"
    )
    small = parser.parse_args().small
    torch.set_num_threads(1)
    rows = []
    print(f"{'task':10} {'optimizer':10} {'lr':>6} {'loss':>7} {'stable':>7} {'entropy':>8} {'norm':>7}")
    for name in ("lora",) if small else ("lora", "lora-text", "lora-vit"):
        for cls, lr in RUNS[2:4] if small else RUNS:
            row = train(TASKS[name], cls, lr, 20 if small else TASKS[name].steps)
            rows.append(row)
            print("{task:10} {optimizer:10} {lr:6g} {loss:7.3f} {stable:7.2f} {entropy:8.2f} {norm:7.2f}".format(**row))
    if not small:
        record = {"command": "python examples/rank.py", **made_on(), "runs": rows}
        out = Path(__file__).parents[1] / "benchmarks" / "rank-cpu.json"
        out.write_text(json.dumps(record, indent=1) + "\n")
