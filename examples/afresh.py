"""What does it cost to go on in the middle of a run with nothing handed over but the weights?

    python examples/afresh.py           # writes benchmarks/afresh-cpu.json, six minutes of one core
    python examples/afresh.py --small   # one task, two optimizers, few steps

At half of the steps the optimizer is thrown away and a new one made (*new*), or only its emotion is made afresh by
``reset_emotion()`` (*reset*), or neither (*whole*). Same batches; lr 1e-3.
"""

import argparse
import json
import math
from pathlib import Path

import torch

import emonavi
from emonavi.bench.provenance import made_on
from emonavi.bench.tasks import TASKS

NAMES = ("digits", "diabetes", "flow", "lora", "density")
OPTIMIZERS = [*(emonavi.registry.SIBLINGS[name].cls for name in emonavi.available()), torch.optim.AdamW]


def run(task, cls, how, steps):
    """Train; the held-out losses at half of the steps and every fiftieth of them from there on."""
    torch.manual_seed(0)
    problem = task.build(0)
    optimizer = cls(problem.params, lr=1e-3)
    losses = []
    for step in range(steps):
        if step == steps // 2 and how == "new":
            optimizer = cls(problem.params, lr=1e-3)
        if step == steps // 2 and how == "reset":
            optimizer.reset_emotion()
        if step >= steps // 2 and (step - steps // 2) % max(1, steps // 50) == 0:
            losses.append(problem.val())
        optimizer.zero_grad()
        problem.loss(step).backward()
        optimizer.step()
    return [*losses, problem.val()]


def compare(name, cls, how, steps, whole):
    """A broken run beside the whole one: its end, its worst, and when its loss is below the break's again."""
    losses = run(TASKS[name], cls, how, steps)
    below = next((place for place, loss in enumerate(losses[1:], start=1) if loss < losses[0]), None)
    row = {"task": name, "optimizer": cls.__name__, "how": how, "end": losses[-1] / whole[-1]}
    ratios = [ratio for a, b in zip(losses, whole, strict=True) if math.isfinite(ratio := a / b)]
    row |= {"worst": max(ratios), "not_finite": len(losses) - len(ratios)}
    return row | {"back": below and below * max(1, steps // 50), "steps": steps}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--small", action="store_true", help="one task, two optimizers, 20 steps, and nothing is written"
    )
    small = parser.parse_args().small
    torch.set_num_threads(1)
    rows = []
    for name in ("digits",) if small else NAMES:
        for cls in OPTIMIZERS[:: len(OPTIMIZERS) - 1] if small else OPTIMIZERS:
            steps = 20 if small else TASKS[name].steps
            whole = run(TASKS[name], cls, "whole", steps)
            for how in ("new", "reset") if hasattr(cls, "reset_emotion") else ("new",):
                rows.append(compare(name, cls, how, steps, whole))
                said = "{task:9} {optimizer:8} {how:6} end {end:.2f}, worst {worst:.2f} of the whole run's; first below"
                print((said + " the break's loss after {back} of {steps} steps").format(**rows[-1]), flush=True)
    if not small:
        record = {"command": "python examples/afresh.py", **made_on(), "runs": rows}
        out = Path(__file__).parents[1] / "benchmarks" / "afresh-cpu.json"
        out.write_text(json.dumps(record, indent=1, allow_nan=False) + "\n")
