"""A model that is sharded trains as the same model in one piece, and all its ranks agree to the last bit.

All cases run in one set of four processes, in float64, where sums in another order differ by 1e-16. Where two ranks
are enough, the other two do the same beside them.
"""

from __future__ import annotations

import math

import pytest
import torch
from ranks import run
from torch import distributed as dist
from torch import nn

from emonavi import EmoFact, EmoLynx, EmoNavi
from emonavi.fact import SAMPLE

pytestmark = pytest.mark.skipif(
    not (dist.is_available() and dist.is_gloo_available()), reason="needs torch.distributed with gloo"
)
WORLD, STEPS = 4, 20
SIBLINGS = {"EmoNavi": EmoNavi, "EmoFact": EmoFact, "EmoLynx": EmoLynx}
# How a model lies on the four ranks, and into how many shares a batch is cut.
WAYS = {"ddp 4": 4, "fsdp 4": 4, "fsdp 2": 2, "hsdp 2x2": 4, "tp 2": 1, "fsdp 2 x tp 2": 2}


class Net(nn.Module):
    """Five, 33 and 3 rows do not divide by four: parts differ, and one rank of four has none of the last."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.up = nn.Linear(4, 33)
        self.norm = nn.LayerNorm(33)
        self.wide = nn.Linear(33, 130)  # more elements than EmoFact's sample has
        self.down = nn.Linear(130, 3)
        self.head = nn.Linear(3, 3)
        self.idle = nn.Linear(2, 2)  # never has a gradient
        self.double()

    def forward(self, x):
        return self.head(self.down(torch.tanh(self.wide(self.norm(self.up(x))))))


def laid(way, mixed=False):
    """A model on these ranks, and the place of this rank among those that share a batch."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    model, rank = Net(), dist.get_rank()
    square = init_device_mesh("cpu", (2, 2), mesh_dim_names=("far", "near"))
    if way == "ddp 4":
        return nn.parallel.DistributedDataParallel(model, find_unused_parameters=True), rank
    mesh = {"fsdp 4": init_device_mesh("cpu", (4,)), "fsdp 2": square["near"], "hsdp 2x2": square}.get(way)
    if "tp" in way:
        plan = {"wide": ColwiseParallel(), "down": RowwiseParallel()}
        parallelize_module(model, square["near"], plan)
        mesh = square["far"]
    if way != "tp 2":
        for part in (model.up, model.wide):
            fully_shard(part, mesh=mesh)
        fully_shard(model, mesh=mesh)
    return model, {"tp 2": 0, "fsdp 2": rank % 2, "fsdp 2 x tp 2": rank // 2}.get(way, rank)


def batches(steps, spoilt=()):
    generator = torch.Generator().manual_seed(5)
    target = torch.randn(4, 3, generator=generator)
    for step in range(steps):
        x = torch.randn(16, 4, generator=generator)
        yield x.double(), torch.tanh(x @ target).double() * (1e3 if step in spoilt else 1.0)


def train(model, optimizer, share=0, shares=1, steps=STEPS, between=lambda step: None, start=0):
    for step, batch in enumerate(batches(start + steps, spoilt=(14,))):
        if step < start:
            continue
        x, y = (t.chunk(shares)[share] for t in batch)
        optimizer.zero_grad()
        # A different loss on each rank: its share of the batch.
        (model(x) - y).square().mean().backward()
        between(step)
        optimizer.step()


def whole(tensor):
    """All of a tensor, wherever its parts lie."""
    tensor = tensor.detach()
    return (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).clone()


def outcome(model, optimizer, **more):
    """Everything that an optimizer and its model hold, each tensor in one piece."""
    state = {}
    for i, p in enumerate(model.parameters()):
        state |= {f"{i} {k}": whole(v) for k, v in optimizer.state.get(p, {}).items()}
    vector = optimizer.param_groups[0]["emotion"].clone()
    parameters = {f"{i}": whole(p) for i, p in enumerate(model.parameters())}
    emotion = optimizer.emotion
    counts = {"steps": emotion.steps, "skipped": emotion.skipped_steps, "ignored": emotion.ignored_losses}
    return {"tensors": {**parameters, **state, "emotion": vector}, **counts, **more}


# The cases, each run on all ranks -------------------------------------------------------------------------------------


def as_one(rank, way, sibling, options):
    """Train a laid out model; the first rank of all also trains it in one piece."""
    model, share = laid(way) if way else (Net(), 0)
    groups = [
        {"params": [p for n, p in model.named_parameters() if ("head" in n) == head], "weight_decay": 0.3 * head}
        for head in (False, True)
    ]
    optimizer = SIBLINGS[sibling](groups, lr=1e-2, **({} if way else {"process_group": None}), **options)
    shares = WAYS[way] if way else 1
    train(model, optimizer, share, shares, steps=STEPS // 2)
    shown = None
    if optimizer.param_groups[0]["use_shadow"]:
        with optimizer.calm():
            shown = {f"shown {i}": whole(p) for i, p in enumerate(model.parameters())}
    train(model, optimizer, share, shares, steps=STEPS - STEPS // 2, start=STEPS // 2)
    found = outcome(model, optimizer)
    found["tensors"] |= shown or {}
    return found


OPTIONS = {
    "adaptive": {"use_shadow": True},
    "tight": {"max_norm": 0.3, "max_lr": 2e-3, "foreach": False, "capturable": True},
    "v1": {"emotion": "v1"},
    "v3": {"emotion": "v3"},
    "v4": {"emotion": "v4", "use_shadow": True},
}
# Each way with the adaptive emotion; the presets, and the path without branches, where parts are smallest.
PLAN = [(way, "adaptive") for way in WAYS] + [("fsdp 4", name) for name in ("tight", "v1", "v3", "v4")]
NAMES = [(sibling, way, name) for sibling in SIBLINGS for way, name in PLAN]
CASES = {f"{s}, {way}, {name}": (as_one, way, s, OPTIONS[name]) for s, way, name in NAMES}
CASES |= {f"{s}, alone, {name}": (as_one, None, s, OPTIONS[name]) for s in SIBLINGS for name in OPTIONS}


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    return run(CASES, WORLD, tmp_path_factory.mktemp("shards"))


def unlike(one, two, within=0.0):
    """Names of the tensors that differ by more than that."""
    assert one.keys() == two.keys()
    return [n for n in one if not torch.allclose(one[n], two[n], rtol=0.0, atol=within, equal_nan=True)]


@pytest.mark.parametrize(("sibling", "way", "name"), NAMES)
def test_sharded_training_is_that_of_one_process(sibling, way, name, ranks):
    all_found = ranks(f"{sibling}, {way}, {name}")
    alone = ranks(f"{sibling}, alone, {name}")[0]
    for found in all_found:
        assert unlike(found["tensors"], all_found[0]["tensors"]) == [], "the ranks differ"
    assert all_found[0]["steps"] == STEPS
    one, two = ({k: v for k, v in found["tensors"].items() if k != "emotion"} for found in (all_found[0], alone))
    assert unlike(one, two, within=1e-9) == []


def test_the_parts_are_what_they_are_meant_to_be():
    assert Net().wide.weight.numel() > SAMPLE
    assert math.isnan(math.nan)
