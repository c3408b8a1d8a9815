"""A model that is sharded trains as the same model in one piece, and all its ranks agree to the last bit.

All cases run in one set of four processes, in float64, where sums in another order differ by 1e-16. Where two ranks
are enough, the other two do the same beside them.
"""

from __future__ import annotations

import math
from functools import cache

import pytest
import torch
from ranks import run
from torch import distributed as dist
from torch import nn

import emonavi
from emonavi import EmoFact, EmoLynx, EmoNavi
from emonavi.autonomous import Merger

pytestmark = pytest.mark.skipif(
    not (dist.is_available() and dist.is_gloo_available()), reason="needs torch.distributed with gloo"
)
WORLD, STEPS = 4, 20
SIBLINGS = {"EmoNavi": EmoNavi, "EmoFact": EmoFact, "EmoLynx": EmoLynx}
# How a model lies on the four ranks, and into how many shares a batch is cut.
WAYS = {"ddp 4": 4, "fsdp 4": 4, "fsdp 2": 2, "hsdp 2x2": 4, "tp 2": 1, "fsdp 2 x tp 2": 2}
REPLICATED = {"replicate 4": 4, "replicate 2 x tp 2": 2}
SHARES = WAYS | REPLICATED


class Net(nn.Module):
    """33, 130 and 3 rows do not divide by four: parts differ, and one rank of four has none of the last."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.up = nn.Linear(4, 33)
        self.norm = nn.LayerNorm(33)
        self.wide = nn.Linear(33, 130)  # more elements than EmoFact's sample has
        self.down = nn.Linear(130, 3)
        self.double()

    def forward(self, x):
        return self.down(torch.tanh(self.wide(self.norm(self.up(x)))))


@cache
def mesh_of(*shape):
    """A mesh of all ranks; the names are those of a machine's place and of a place in it."""
    from torch.distributed.device_mesh import init_device_mesh

    return init_device_mesh("cpu", shape, mesh_dim_names=("far", "near")[-len(shape) :])


def laid(way):
    """A model on these ranks, and the place of this rank among those that share a batch."""
    from torch.distributed._composable.replicate_with_fsdp import replicate
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    model, rank, square = Net(), dist.get_rank(), mesh_of(2, 2)
    if way == "ddp 4":
        return nn.parallel.DistributedDataParallel(model), rank
    mesh = {"fsdp 2": square["near"], "hsdp 2x2": square}.get(way, mesh_of(4))
    if "tp" in way:
        plan = {"wide": ColwiseParallel(), "down": RowwiseParallel()}
        parallelize_module(model, square["near"], plan)
        mesh = square["far"]
    if way.startswith("ddp"):
        model = nn.parallel.DistributedDataParallel(model, device_mesh=mesh)
    elif way != "tp 2":
        apply = replicate if way in REPLICATED else fully_shard
        apply(model.wide, mesh=mesh)
        apply(model, mesh=mesh)
    return model, {"tp 2": 0, "fsdp 2": rank % 2}.get(way, rank // 2 if "x tp" in way else rank)


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


def made(sibling, model, **options):
    """With a group of its own for the norm, and decay there, so that a model has two."""
    named = list(model.named_parameters())
    groups = [[p for n, p in named if ("norm" in n) == norm] for norm in (False, True)]
    given = [{"params": groups[0]}, {"params": groups[1], "weight_decay": 0.3}]
    return getattr(emonavi, sibling)(given, lr=1e-2, **options)


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


OPTIONS = {
    "adaptive": {"use_shadow": True},
    "begun anew": {"use_shadow": True},
    "tight": {"max_norm": 0.3, "max_lr": 2e-3, "foreach": False, "capturable": True},
    "v1": {"emotion": "v1"},
    "v3": {"emotion": "v3"},
    "v4": {"emotion": "v4", "use_shadow": True},
}


def as_one(rank, way, sibling, name):
    """Train a model that is laid out in a way, or in one piece, which the first rank does for all."""
    if way is None and rank:
        return {}
    model, share = laid(way) if way else (Net(), 0)
    optimizer = made(sibling, model, **OPTIONS[name], **({} if way else {"process_group": None}))
    shares, half, shown = SHARES.get(way, 1), STEPS // 2, {}
    train(model, optimizer, share, shares, steps=half)
    if optimizer.param_groups[0]["use_shadow"]:
        with optimizer.calm():
            shown = {f"shown {i}": whole(p) for i, p in enumerate(model.parameters())}
    if name == "begun anew":
        optimizer.reset_emotion()
    train(model, optimizer, share, shares, start=half, steps=half)
    found = outcome(model, optimizer)
    return {**found, "tensors": found["tensors"] | shown}


def in_parts(rank, way, how):
    """Four micro-batches a step, which the ranks reduce at each or at the last one; one in the middle is absurd."""
    if way is None and rank:
        return {}
    model, share = laid(way) if way else (Net(), slice(None))
    optimizer = made("EmoNavi", model, **({} if way else {"process_group": None}))
    felt, lrs = [], []
    for step, batch in enumerate(batches(12)):
        optimizer.zero_grad(set_to_none=how != "set to 0")
        parts = [t.unflatten(0, (WORLD, 4))[share].movedim(-2, 0) for t in batch]
        for part, (x, y) in enumerate(zip(*parts, strict=True)):
            if how == "no sync":
                model.set_requires_gradient_sync(part == 3)
            if how == "no all-reduce":
                model.set_requires_all_reduce(part == 3)
            absurd = 1e3 if (step, part) == (10, 1) else 1.0
            ((model(x) - y * absurd).square().mean() / 4).backward()
        optimizer.step()
        vector = optimizer.param_groups[0]["emotion"]
        felt.append([optimizer.emotion.loss, float(vector[optimizer._emotion.index("window")])])
        lrs += optimizer.effective_lr[:1]
    return outcome(model, optimizer, felt=felt, lrs=lrs)


def backbone_and_head(rank):
    """Two optimizers in one graph: a sharded backbone and a plain head; and a critic that nobody else is to hear."""
    from torch.distributed.fsdp import fully_shard

    torch.manual_seed(0)
    back, head, critic = nn.Sequential(nn.Linear(4, 8), nn.Tanh()), nn.Linear(8, 3), nn.Linear(8, 1)
    fully_shard(back, mesh=mesh_of(4))
    optimizers = [EmoNavi(m.parameters(), lr=1e-2) for m in (back, head, critic)]
    for x, y in batches(4):
        x, y = (t.float().chunk(WORLD)[rank] for t in (x, y))
        for optimizer in optimizers:
            optimizer.zero_grad()
        features = back(x)
        judged = 100 + critic(features.detach()).square().mean()
        judged.backward()
        loss = (head(features) - y).square().mean()
        loss.backward()
        for p in [*head.parameters(), *critic.parameters()]:
            dist.all_reduce(p.grad)
            p.grad /= WORLD
        for optimizer in optimizers:
            optimizer.step()
    true = torch.stack([loss.detach(), judged.detach()])
    dist.all_reduce(true)
    return {"felt": [o.emotion.loss for o in optimizers], "true": (true / WORLD).tolist()}


def evaluated(rank, way):
    """Forward passes without a backward before, inside and after calm(), and the training that goes on."""
    if way is None and rank:
        return {}
    model, share = laid(way) if way else (Net(), 0)
    optimizer = made("EmoNavi", model, use_shadow=True, **({} if way else {"process_group": None}))
    x, seen = next(batches(1))[0], {}

    def look(when):
        with torch.no_grad():
            seen[when] = model(x).clone()

    for turn in range(2):
        train(model, optimizer, share, SHARES.get(way, 1), start=6 * turn, steps=6)
        look(f"before, {turn}")
        with optimizer.calm(model):
            look(f"inside, {turn}")
        look(f"after, {turn}")
        with optimizer.calm(model):
            look(f"inside, before training goes on, {turn}")
    found = outcome(model, optimizer)
    return {**found, "tensors": found["tensors"] | seen}


def localized(rank):
    """DistributedDataParallel makes plain tensors of tensor-parallel parameters, which look like whole ones."""
    model, _ = laid("ddp 2 x tp 2")
    said = []
    for build in (EmoNavi, lambda params: emonavi.Emotional(torch.optim.SGD(params))):
        with pytest.raises(ValueError, match="made plain") as caught:
            build(model.parameters())
        said.append(str(caught.value))
    return {"said": said}


def narrow(rank):
    """A process group that holds only some of the ranks over which a parameter is sharded."""
    found = {}
    for name in ("far", "near"):
        model, share = laid("hsdp 2x2")
        optimizer = made("EmoNavi", model, process_group=mesh_of(2, 2)[name].get_group())
        begin = [whole(p) for p in model.parameters()]
        with pytest.raises(ValueError, match=r"process_group holds the ranks .* drift apart; give a group of all"):
            train(model, optimizer, share, WORLD, steps=1)
        found[name] = all(torch.equal(a, whole(b)) for a, b in zip(begin, model.parameters(), strict=True))
    return found


def workers(rank):
    """Two workers of two shards each, without a group: other losses, and another number of steps."""
    model, share = laid("fsdp 2")
    worker = rank // 2
    optimizer = made("EmoNavi", model, process_group=None)
    train(model, optimizer, share, 2, steps=3 + 2 * worker, between=lambda step: optimizer.observe(rank))
    return outcome(model, optimizer, loss=optimizer.emotion.loss)


@torch.no_grad()
def weights_of(model, optimizer, x):
    """What workers have in common after a merge, and what the model makes of it."""
    found = {f"{i}": whole(p) for i, p in enumerate(model.parameters())}
    shadows = {f"shadow {i}": whole(optimizer.state[p]["shadow"]) for i, p in enumerate(model.parameters())}
    return found | shadows | {"seen": model(x).clone()}


def merged(rank):
    """The same two workers, whose weights are merged part by part; the first rank does it with whole models."""
    from torch.distributed.algorithms.model_averaging.averagers import PeriodicModelAverager

    model, share = laid("fsdp 2")
    optimizer = made("EmoNavi", model, use_shadow=True, process_group=None)
    mixed = "hold other parts of the same weights"
    for group in (None, mesh_of(2, 2)["near"].get_group()):
        with pytest.raises(ValueError, match=mixed):
            Merger(model, optimizer, PeriodicModelAverager(3, process_group=group))
    with pytest.raises(ValueError, match=mixed):
        Merger(model, optimizer).merge()
    merger = Merger(model, optimizer, PeriodicModelAverager(3, process_group=mesh_of(2, 2)["far"].get_group()))
    x = next(batches(1))[0]
    for step in range(6):
        train(model, optimizer, share, 2, start=10 * (rank // 2) + step, steps=1)
        with torch.no_grad():
            model(x)  # it leaves the root's weights gathered
        merger.step()
    found = weights_of(model, optimizer, x)
    if rank:
        return {"tensors": found}
    crew = [Net(), Net()]
    alone = [made("EmoNavi", one, use_shadow=True, process_group=None) for one in crew]
    mergers = [Merger(*pair) for pair in zip(crew, alone, strict=True)]
    for step in range(6):
        for worker, each in enumerate(mergers):
            train(each.model, each.optimizer, start=10 * worker + step, steps=1)
            each.step()
        if step in (2, 5):
            mean = sum(each.offer() for each in mergers) / 2
            for each in mergers:
                each.accept(mean)
    return {"tensors": found, "alone": weights_of(crew[0], alone[0], x)}


def spoilt(rank, way):
    """One rank has no loss to speak of every third step, and one, once, a gradient that is not finite."""
    model, share = laid(way)
    optimizer = made("EmoNavi", model)

    def between(step):
        optimizer.observe(math.nan if rank == 1 and step % 3 == 0 else 1.0 + rank)
        if step == 5 and rank == 2:
            part = next(model.parameters()).grad
            getattr(part, "to_local", lambda: part)()[0] = math.nan

    train(model, optimizer, share, WAYS[way], steps=10, between=between)
    return outcome(model, optimizer, loss=optimizer.emotion.loss)


def stage(last):
    """One of two stages of a pipeline, each sharded over two ranks, and its optimizer."""
    from torch.distributed.fsdp import fully_shard

    torch.manual_seed(0)
    model = nn.ModuleDict({"last" if last else "first": nn.Linear(4, 3 if last else 5).double()})
    fully_shard(next(iter(model.values())), mesh=mesh_of(2, 2)["near"])
    return model, EmoNavi(model.parameters(), lr=1e-2, capture=False)


def train_stage(rank, model, optimizer, steps):
    """Only the last stage has a loss."""
    (layer,) = model.values()
    for step in steps:
        optimizer.zero_grad()
        layer(torch.full((2, 4), 1.0 + step + rank, dtype=torch.float64)).square().sum().backward()
        if rank >= 2:
            optimizer.observe(10.0 / (1 + step) + rank)
        optimizer.step()
    return outcome(model, optimizer, loss=optimizer.emotion.loss, norm=optimizer.emotion.grad_norm)


def staged(rank):
    return train_stage(rank, *stage(rank >= 2), range(8))


def stages_saved(rank, flat, folder):
    """Both stages in one checkpoint; what each takes up from it, or why it cannot."""
    from torch.distributed import checkpoint as dcp
    from torch.distributed.checkpoint import state_dict as dsd

    options = dsd.StateDictOptions(flatten_optimizer_state_dict=flat)
    model, optimizer = stage(rank >= 2)
    train_stage(rank, model, optimizer, range(4))
    saved = dsd.get_optimizer_state_dict(model, optimizer, options=options)
    dcp.save({"optimizer": saved}, checkpoint_id=f"{folder}/stages-{flat}")
    other, fresh = stage(rank >= 2)
    saved = {"optimizer": dsd.get_optimizer_state_dict(other, fresh, options=options)}
    dcp.load(saved, checkpoint_id=f"{folder}/stages-{flat}")
    try:
        dsd.set_optimizer_state_dict(other, fresh, saved["optimizer"], options=options)
    except ValueError as error:
        return {"said": str(error)}
    other.load_state_dict(model.state_dict())
    return {"then": [outcome(model, optimizer)["tensors"], outcome(other, fresh)["tensors"]], "said": ""}


def partial(rank):
    """A replicated parameter whose gradient is a sum that nobody has made yet, as sequence parallelism leaves it."""
    from torch.distributed.tensor import DTensor, Partial, Replicate, distribute_tensor

    begin = torch.linspace(-1, 1, 6, dtype=torch.float64).view(2, 3)
    one, two = nn.Parameter(distribute_tensor(begin, mesh_of(4), [Replicate()])), nn.Parameter(begin.clone())
    optimizers = [EmoNavi([one], lr=1e-2), EmoNavi([two], lr=1e-2, process_group=None)]
    for step in range(4):
        one.grad = DTensor.from_local(begin * (rank + step), mesh_of(4), [Partial()])
        two.grad = begin * (0 + 1 + 2 + 3 + 4 * step)
        for optimizer in optimizers:
            optimizer.step(loss=1.0 / (1 + step))
    return {"tensors": {"sharded": whole(one)}, "plain": two.detach()}


def apart(rank):
    """Parameters that are cut over two meshes of two, neither of which holds the other."""
    from torch.distributed.tensor import Shard, distribute_tensor

    meshes = mesh_of(2, 2)["far"], mesh_of(2, 2)["near"]
    params = [nn.Parameter(distribute_tensor(torch.ones(4, 2), mesh, [Shard(0)])) for mesh in meshes]
    optimizer = EmoNavi(params, lr=1e-2)
    for p in params:
        p.grad = torch.ones_like(p)
    with pytest.raises(ValueError, match=r"sharded over the ranks \[\d, \d\] .* shard all over one mesh"):
        optimizer.step(loss=1.0)
    return {"same": all(bool((p.to_local() == 1).all()) for p in params), "state": len(optimizer.state)}


def asks(rank, way, sibling, options):
    """How many numbers each collective of the third step has."""
    model, share = laid(way)
    optimizer, sizes, plain = made(sibling, model, **options), [], dist.all_reduce

    def counted(tensor, *args, **kwargs):
        sizes.append(tensor.numel())
        return plain(tensor, *args, **kwargs)

    def between(step):
        sizes.clear()
        dist.all_reduce = counted

    try:
        for start in range(3):
            train(model, optimizer, share, WAYS[way], start=start, steps=1, between=between)
            dist.all_reduce = plain
    finally:
        dist.all_reduce = plain
    return {"sizes": sizes}


def loaded(rank, sibling, kind):
    """Four ranks save, load what they saved into a fresh model, and go on; so do those that saved it."""
    from torch.distributed.checkpoint import state_dict as dsd

    options = dsd.StateDictOptions(**KINDS[kind])
    model, share = laid("fsdp 4")
    optimizer = made(sibling, model, use_shadow=True)
    train(model, optimizer, share, WORLD, steps=4)
    weights = dsd.get_model_state_dict(model, options=options)
    saved = dsd.get_optimizer_state_dict(model, optimizer, options=options)
    if kind.startswith("full"):
        assert all(not hasattr(v, "device_mesh") for v in weights.values())
    fresh, _ = laid("fsdp 4")
    for p in fresh.parameters():
        nn.init.zeros_(p)
    other = made(sibling, fresh, use_shadow=True)
    dsd.set_model_state_dict(fresh, weights, options=options)
    dsd.set_optimizer_state_dict(fresh, other, saved, options=options)
    then = [outcome(model, optimizer), outcome(fresh, other)]
    for m, o in ((model, optimizer), (fresh, other)):
        train(m, o, share, WORLD, start=4, steps=4)
    return {"then": then, "later": [outcome(model, optimizer), outcome(fresh, other)]}


def first_generation(rank, original, strategy):
    """FSDP1: plain tensors that are pieces of flat ones. It saves, loads into a fresh model, and both go on."""
    from torch.distributed.fsdp import FullyShardedDataParallel as FSDP
    from torch.distributed.fsdp import ShardingStrategy

    how = {"use_orig_params": original, "sharding_strategy": ShardingStrategy[strategy]}
    how["device_mesh"] = mesh_of(2, 2) if strategy == "HYBRID_SHARD" else mesh_of(4)

    def laid_out():
        model = FSDP(Net(), device_id=torch.device("cpu"), **how)
        return model, EmoNavi(model.parameters(), lr=1e-2)

    model, optimizer = laid_out()
    train(model, optimizer, rank, WORLD, steps=5)
    fresh, other = laid_out()
    fresh.load_state_dict(model.state_dict())
    other.load_state_dict(FSDP.optim_state_dict_to_load(fresh, other, FSDP.optim_state_dict(model, optimizer)))
    for m, o in ((model, optimizer), (fresh, other)):
        train(m, o, rank, WORLD, start=5, steps=5)
    found = {"steps": other.emotion.steps}
    for name, m, o in (("straight", model, optimizer), ("tensors", fresh, other)):
        with FSDP.summon_full_params(m):
            found[name] = {n: p.detach().flatten().clone() for n, p in m.named_parameters()}
        found[name]["emotion"] = o.param_groups[0]["emotion"].clone()
    if rank == 0:
        alone = Net()
        optimizer = EmoNavi(alone.parameters(), lr=1e-2, process_group=None)
        train(alone, optimizer, steps=10)
        found["alone"] = torch.cat([p.detach().flatten() for p in alone.parameters()])
    return found


def zero(rank):
    """ZeRO-1: each rank has an optimizer of some of the parameters, and hands them to the others."""
    from torch.distributed.optim import ZeroRedundancyOptimizer

    model, share = laid("ddp 4")
    optimizer = ZeroRedundancyOptimizer(model.parameters(), optimizer_class=EmoNavi, lr=1e-2)
    train(model, optimizer, share, WORLD)
    optimizer.consolidate_state_dict()
    saved = [optimizer.state_dict() if rank == 0 else None]
    dist.broadcast_object_list(saved)
    other = ZeroRedundancyOptimizer(model.parameters(), optimizer_class=EmoNavi, lr=1e-2)
    other.load_state_dict(saved[0])
    mine, back = (
        {f"{i} {k}": v for i, p in enumerate(model.parameters()) for k, v in one.optim.state.get(p, {}).items()}
        for one in (optimizer, other)
    )
    return {
        "tensors": {f"{i}": whole(p) for i, p in enumerate(model.parameters())},
        "memories": (mine, back),
        "felt": optimizer.optim.emotion.loss,
        "steps": other.optim.emotion.steps,
    }


def sharded_loss(rank):
    """What tensor parallelism leaves of a loss may be a DTensor, of which each rank holds a part of the sum."""
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    torch.manual_seed(0)
    weight, x = torch.randn(8, 3, dtype=torch.float64), torch.randn(5, 3, dtype=torch.float64)
    felt = []
    for told in (False, True):
        mesh = mesh_of(WORLD)
        w = nn.Parameter(distribute_tensor(weight, mesh, [Shard(0)]))
        optimizer = EmoNavi([w])
        loss = (distribute_tensor(x, mesh, [Replicate()]) @ w.T).square().mean()
        loss.backward()
        optimizer.step(**({"loss": loss} if told else {}))
        felt.append(optimizer.emotion.loss)
    return {"felt": felt, "true": float((x @ weight.T).square().mean())}


def resharded(rank, sibling, folder):
    """One process, two, four, and one again, each taking up what those before it saved."""
    from torch.distributed import checkpoint as dcp
    from torch.distributed.checkpoint import state_dict as dsd

    def everything(model, optimizer):
        return {"model": dsd.get_model_state_dict(model), "optimizer": dsd.get_optimizer_state_dict(model, optimizer)}

    pair = [dist.new_group(ranks) for ranks in ((0, 1), (2, 3))][rank // 2]
    each = 20 if sibling == "EmoNavi" else 5
    for turn, (way, group) in enumerate(((None, None), ("fsdp 2", pair), ("fsdp 4", None), (None, None))):
        model, share = laid(way) if way else (Net(), 0)
        optimizer = made(sibling, model, use_shadow=True, **({} if way else {"process_group": None}))
        how = {"process_group": group, "no_dist": way is None}
        if turn:
            state = everything(model, optimizer)
            dcp.load(state, checkpoint_id=f"{folder}/{sibling}-{turn - 1}", **how)
            dsd.set_model_state_dict(model, state["model"])
            dsd.set_optimizer_state_dict(model, optimizer, state["optimizer"])
        train(model, optimizer, share, WAYS.get(way, 1), start=each * turn, steps=each)
        if rank < WAYS.get(way, 1):
            dcp.save(everything(model, optimizer), checkpoint_id=f"{folder}/{sibling}-{turn}", **how)
        dist.barrier()
    found = outcome(model, optimizer)
    if rank == 0:
        straight = Net()
        steady = made(sibling, straight, use_shadow=True, process_group=None)
        train(straight, steady, steps=4 * each)
        found["straight"] = outcome(straight, steady)
    return found


# Each way with the adaptive emotion; the presets, and the path without branches, where parts are smallest. EmoLynx has
# nothing that EmoNavi has not.
NAMES = [(sibling, way, "adaptive") for sibling in ("EmoNavi", "EmoFact") for way in WAYS]
NAMES += [("EmoLynx", way, "adaptive") for way in ("ddp 4", "fsdp 4", "fsdp 2", "fsdp 2 x tp 2")]
NAMES += [(sibling, "fsdp 4", name) for sibling in ("EmoNavi", "EmoFact") for name in ("tight", "v4")]
NAMES += [("EmoNavi", "fsdp 4", "v1"), ("EmoLynx", "fsdp 4", "v3"), ("EmoFact", "fsdp 4", "begun anew")]
NAMES += [("EmoClan", "fsdp 4", "adaptive")]
# Replicas may be DTensors, too. They hold all of a tensor, so that they are for every sibling.
NAMES += [(sibling, "replicate 4", "adaptive") for sibling in ("EmoNavi", "EmoFact", "EmoZeal", "EmoNeco")]
NAMES += [(sibling, "replicate 2 x tp 2", "adaptive") for sibling in ("EmoNavi", "EmoFact")]
PARTS = [(way, how) for way in ("fsdp 4", "replicate 4") for how in ("each", "no sync")]
PARTS += [("fsdp 4", "set to 0"), ("hsdp 2x2", "no all-reduce")]
EVALUATED = ("fsdp 4", "replicate 4")
FSDP1 = [(original, how) for original in (True, False) for how in ("FULL_SHARD", "HYBRID_SHARD")]
SPOILT = ("ddp 4", "fsdp 4", "hsdp 2x2")
ASKS = {
    ("ddp 4", "EmoNavi"): [5],
    ("ddp 4", "EmoFact"): [5],
    ("fsdp 4", "EmoNavi"): [5, 3 * 8],
    ("fsdp 4", "EmoLynx"): [5, 3 * 8],
    # A number for each column, and the sample: every third element of the large matrix, all of the others.
    ("fsdp 4", "EmoFact"): [5, (4 + 33 + 130) + (33 * 4 + 33 * 130 // 3 + 130 * 3), 3 * 8],
}
KINDS = {
    "nested": {},
    "flattened": {"flatten_optimizer_state_dict": True},
    "full": {"full_state_dict": True},
    "full, from rank 0": {"full_state_dict": True, "cpu_offload": True, "broadcast_from_rank0": True},
}
LOADED = [("EmoNavi", kind) for kind in KINDS] + [("EmoFact", kind) for kind in ("nested", "full, from rank 0")]


def cases(folder):
    found = {f"{s}, {way}, {name}": (as_one, way, s, name) for s, way, name in NAMES}
    found |= {f"{s}, alone, {name}": (as_one, None, s, name) for s, _, name in NAMES}
    found |= {f"spoilt, {way}": (spoilt, way) for way in SPOILT}
    found |= {f"asks, {way}, {s}": (asks, way, s, {}) for way, s in ASKS}
    found |= {"asks, fsdp 4, v4": (asks, "fsdp 4", "EmoNavi", {"emotion": "v4"})}
    found |= {f"loaded, {s}, {kind}": (loaded, s, kind) for s, kind in LOADED}
    found |= {f"in parts, {way}, {how}": (in_parts, way, how) for way, how in [*PARTS, (None, "each")]}
    found |= {f"evaluated, {way}": (evaluated, way) for way in (*EVALUATED, None)}
    found["zero"] = (zero,)
    alone = (staged, partial, apart, sharded_loss, backbone_and_head, localized, narrow, workers, merged)
    found |= {f.__name__: (f,) for f in alone}
    found |= {f"first generation, {original}, {how}": (first_generation, original, how) for original, how in FSDP1}
    found |= {f"stages saved, {flat}": (stages_saved, flat, folder) for flat in (False, True)}
    return found | {f"resharded, {s}": (resharded, s, folder) for s in SIBLINGS}


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shards")
    return run(cases(str(folder)), WORLD, folder)


def unlike(one, two, within=0.0):
    """Names of the tensors that differ by more than that."""
    assert one.keys() == two.keys()
    return [n for n in one if not torch.allclose(one[n], two[n], rtol=0.0, atol=within, equal_nan=True)]


def agree(all_found):
    for found in all_found:
        assert unlike(found["tensors"], all_found[0]["tensors"]) == [], "the ranks differ"
    return all_found[0]


@pytest.mark.parametrize(("sibling", "way", "name"), NAMES)
def test_sharded_training_is_that_of_one_process(sibling, way, name, ranks):
    found = agree(ranks(f"{sibling}, {way}, {name}"))
    alone = ranks(f"{sibling}, alone, {name}")[0]
    assert found["steps"] == (STEPS // 2 if name == "begun anew" else STEPS)
    assert unlike(found["tensors"], alone["tensors"], within=1e-9) == []


@pytest.mark.parametrize(("way", "how"), PARTS)
def test_micro_batches_are_felt_as_those_of_one_process(way, how, ranks):
    """However the ranks reduce them. The second of four is a panic once."""
    found, alone = agree(ranks(f"in parts, {way}, {how}")), ranks("in parts, None, each")[0]
    assert found["felt"] == [pytest.approx(one, rel=1e-9) for one in alone["felt"]]
    assert {window for _, window in found["felt"]} == {4}
    assert found["lrs"][10] < 0.5 * found["lrs"][9]
    assert unlike(found["tensors"], alone["tensors"], within=1e-9) == []


def test_a_sharded_backbone_hears_the_loss_of_its_plain_head(ranks):
    for found in ranks("backbone_and_head"):
        back, head, critic = found["felt"]
        assert [back, head] == pytest.approx(found["true"][:1] * 2)
        assert critic == pytest.approx(found["true"][1])


@pytest.mark.parametrize("way", EVALUATED)
def test_a_model_is_run_inside_calm_as_that_of_one_process(way, ranks):
    found, alone = agree(ranks(f"evaluated, {way}")), ranks("evaluated, None")[0]
    assert unlike(found["tensors"], alone["tensors"], within=1e-9) == []


def test_what_ddp_has_made_of_tensor_parallel_parameters_is_refused(ranks):
    for found in ranks("localized"):
        assert all("fully_shard(model" in said and "replicate(model" in said for said in found["said"])


def test_a_group_of_some_of_the_shards_is_refused(ranks):
    assert ranks("narrow") == [{"far": True, "near": True}] * WORLD


def test_without_a_group_shards_ask_each_other_only(ranks):
    for worker, pair in enumerate((ranks("workers")[:2], ranks("workers")[2:])):
        found = agree(pair)
        assert (found["steps"], found["loss"]) == (3 + 2 * worker, 2 * worker + 0.5)


def test_sharded_workers_merge_as_whole_ones(ranks):
    found = agree(ranks("merged"))
    assert unlike(found["tensors"], found["alone"], within=1e-9) == []


@pytest.mark.parametrize("way", SPOILT)
def test_what_is_not_finite_on_one_rank_is_left_out_by_all(way, ranks):
    found = agree(ranks(f"spoilt, {way}"))
    assert (found["steps"], found["skipped"], found["ignored"]) == (9, 1, 0)
    assert found["loss"] == pytest.approx((1 + 3 + 4) / 3)  # the last step's, without rank 1
    assert all(t.isfinite().all() for t in found["tensors"].values())


def test_stages_feel_the_loss_of_the_last_one(ranks):
    found = ranks("staged")
    assert {one["loss"] for one in found} == {10.0 / 8 + 2.5}
    for stage in (found[:2], found[2:]):
        agree(stage)
    assert found[0]["norm"] != found[2]["norm"]


def test_stages_of_a_pipeline_in_one_checkpoint(ranks):
    """Flattened, each has its own. Nested, one has lost its emotion to the other, and is told so."""
    for found in ranks("stages saved, True"):
        assert unlike(*found["then"]) == []
    said = [found["said"] for found in ranks("stages saved, False")]
    assert sum("lost its emotion" in what for what in said) == 2


def test_a_gradient_of_partial_sums_is_added_up(ranks):
    found = ranks("partial")
    torch.testing.assert_close(agree(found)["tensors"]["sharded"], found[0]["plain"], rtol=0.0, atol=1e-12)


def test_a_loss_in_parts_is_heard_as_a_whole(ranks):
    for found in ranks("sharded_loss"):
        assert found["felt"] == pytest.approx([found["true"]] * 2)


def test_meshes_that_nothing_holds_together_are_refused(ranks):
    assert all(found == {"same": True, "state": 0} for found in ranks("apart"))


@pytest.mark.parametrize(("way", "sibling"), ASKS)
def test_collectives_of_a_step(way, sibling, ranks):
    assert [found["sizes"] for found in ranks(f"asks, {way}, {sibling}")] == [ASKS[way, sibling]] * WORLD


def test_a_preset_does_not_reflect_and_asks_once(ranks):
    assert ranks("asks, fsdp 4, v4")[0]["sizes"] == [5]


@pytest.mark.parametrize(("sibling", "kind"), LOADED)
def test_a_checkpoint_of_shards_is_the_run_that_goes_on(sibling, kind, ranks):
    for found in ranks(f"loaded, {sibling}, {kind}"):
        for one, two in (found["then"], found["later"]):
            assert unlike(one["tensors"], two["tensors"]) == []
        assert found["later"][1]["steps"] == 8


@pytest.mark.parametrize("sibling", SIBLINGS)
def test_a_checkpoint_is_taken_up_by_another_number_of_ranks(sibling, ranks):
    found = agree(ranks(f"resharded, {sibling}"))
    assert found["steps"] == found["straight"]["steps"]
    assert unlike(found["tensors"], found["straight"]["tensors"], within=1e-9) == []


@pytest.mark.parametrize(("original", "how"), FSDP1)
def test_fsdp1_trains_and_resumes(original, how, ranks):
    """With original parameters torch 2.13 gives back a wrong exp_avg, AdamW's too; without, one drive is for all."""
    found = agree(ranks(f"first generation, {original}, {how}"))
    assert found["steps"] == 10
    if original:
        together = torch.cat([t for n, t in found["straight"].items() if n != "emotion"])
        torch.testing.assert_close(together, found["alone"], rtol=0.0, atol=1e-9)
    else:
        assert unlike(found["tensors"], found["straight"]) == []


def test_zero_1_keeps_the_replicas_the_same(ranks):
    agree(ranks("zero"))
    assert len({found["felt"] for found in ranks("zero")}) == 1
    for found in ranks("zero"):
        mine, back = found["memories"]
        assert mine and unlike(mine, back) == []
        assert found["steps"] == STEPS
