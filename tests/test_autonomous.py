"""Workers that share nothing but a merge now and then: alone in one process, and four real ones.

The processes run all their cases in one start (starting them is what takes long); each returns plain tensors and
numbers on each rank, and the tests below compare them.
"""

from __future__ import annotations

import copy
import datetime
import math
import re
import subprocess
import sys
import traceback
from collections import OrderedDict
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.multiprocessing as mp
from torch import distributed as dist
from torch import nn

pytest.importorskip("rich")
import emonavi
from emonavi.autonomous import Merger, nesterov
from emonavi.bench import autonomous as bench
from emonavi.emotion import State

EXAMPLE = Path(__file__).parents[1] / "examples" / "autonomous.py"


def net(seed=0, dtype=torch.float32):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 3)).to(dtype)


def test_what_is_frozen_stays_at_home():
    model = net()
    model[0].requires_grad_(False)
    merger = Merger(model, emonavi.EmoNavi(model.parameters(), process_group=None))
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    buffers = sum(b.numel() for b in model.buffers() if b.is_floating_point())
    assert merger.offer().numel() == trained + buffers + 1
    outer = Merger(model, emonavi.EmoNavi(model.parameters(), process_group=None), outer=nesterov)
    outer.step()
    model[0].requires_grad_(True)
    with pytest.raises(ValueError, match="with an outer step what trains does not change"):
        outer.accept(outer.offer())
    assert outer._alone == 1


class Worker:
    """A model, its optimizer and its merger, on data of its own."""

    def __init__(self, rank, averager=None, outer=None, seed=0, build=emonavi.EmoNavi, **options):
        self.model = net(seed)
        options = {"lr": 1e-2} | ({} if build is torch.optim.AdamW else {"process_group": None}) | options
        self.optimizer = build(self.model.parameters(), **options)
        self.merger = Merger(self.model, self.optimizer, averager, outer=outer)
        self.source = torch.Generator().manual_seed(rank)

    def train(self, steps):
        for _ in range(steps):
            x = torch.randn(8, 4, generator=self.source)
            self.optimizer.zero_grad()
            loss = (self.model(x) - x[:, :3].tanh()).square().mean()
            loss.backward()
            self.optimizer.step()
            self.merged = self.merger.step()
        return self

    def weights(self):
        return torch.cat([t.detach().flatten().float() for t in self.model.state_dict().values()])

    def vector(self):
        return self.optimizer.param_groups[0]["emotion"].clone()

    def felt(self, name):
        return self.vector()[self.optimizer._emotion.index(name)].item()


def crew(count, **options):
    return [Worker(rank, **options) for rank in range(count)]


def exchange(workers):
    mean = torch.stack([w.merger.offer() / len(workers) for w in workers]).sum(0)
    for w in workers:
        w.merger.accept(mean)


# What is merged -------------------------------------------------------------------------------------------------------


def test_weights_and_buffers_become_the_mean_weighted_by_steps():
    one, two = (w.train(n) for w, n in zip(crew(2), (5, 15), strict=True))
    before = [copy.deepcopy(w.model.state_dict()) for w in (one, two)]
    moments = [s["exp_avg"].clone() for s in one.optimizer.state.values()]
    exchange([one, two])
    for name, tensor in one.model.state_dict().items():
        if tensor.is_floating_point():
            torch.testing.assert_close(tensor, (5 * before[0][name] + 15 * before[1][name]) / 20)
            assert torch.equal(tensor, two.model.state_dict()[name])
    assert one.model[1].num_batches_tracked == 5  # a count of its own batches
    assert all(torch.equal(a, s["exp_avg"]) for a, s in zip(moments, one.optimizer.state.values(), strict=True))


def test_the_emotion_keeps_its_drive_and_its_memories():
    one, two = (w.train(30) for w in crew(2))
    two.optimizer.param_groups[0]["emotion"][State._fields.index("log_drive")] -= 2
    before = [{n: w.felt(n) for n in State._fields if n != "rest"} for w in (one, two)]
    own = [s["drive"].clone() for s in one.optimizer.state.values()]
    exchange([one, two])
    assert [{n: w.felt(n) for n in State._fields if n != "rest"} for w in (one, two)] == before
    assert all(torch.equal(a, s["drive"]) for a, s in zip(own, one.optimizer.state.values(), strict=True))


def test_a_group_that_was_put_in_the_place_of_the_first_has_the_emotion_at_a_merge():
    worker = Worker(0).train(20)
    groups = worker.optimizer.param_groups
    groups[0] = {name: value for name, value in groups[0].items() if name != "emotion"}
    exchange([worker])
    assert worker.felt("rest") == 1


def test_a_newcomer_takes_the_mean_and_gives_nothing():
    old = crew(2)
    for w in old:
        w.train(6)
    new = Worker(9, seed=9)
    alone = copy.deepcopy(old)
    exchange(alone)
    exchange([*old, new])
    torch.testing.assert_close(new.model[0].weight, alone[0].model[0].weight)
    assert torch.equal(new.model[0].weight, old[0].model[0].weight)
    new.train(3)
    assert new.optimizer.emotion.steps == 3


def test_a_worker_that_is_lost_poisons_nobody_and_is_healed():
    one, two = (w.train(4) for w in crew(2))
    good = one.model[0].weight.detach().clone()
    with torch.no_grad():
        two.model[0].weight[0, 0] = math.nan
    exchange([one, two])
    assert torch.equal(one.model[0].weight, good)
    assert torch.equal(two.model[0].weight, good)


def test_where_nobody_made_a_step_nothing_changes():
    one, two = Worker(0), Worker(1, seed=1)
    before = [w.weights() for w in (one, two)]
    exchange([one, two])
    assert all(torch.equal(a, w.weights()) for a, w in zip(before, (one, two), strict=True))


def test_frozen_weights_stay_at_home():
    worker = Worker(0)
    full = worker.merger.offer().numel()
    worker.model[0].requires_grad_(False)
    optimizer = emonavi.EmoNavi([p for p in worker.model.parameters() if p.requires_grad], process_group=None)
    frozen = sum(p.numel() for p in worker.model[0].parameters())
    assert Merger(worker.model, optimizer).offer().numel() == full - frozen
    quantized = torch.nn.Parameter(torch.ones(5, dtype=torch.int8), requires_grad=False)
    optimizer.add_param_group({"params": [quantized]})
    assert Merger(worker.model, optimizer).offer().numel() == full - frozen


def test_the_shadow_becomes_the_mean_too():
    one, two = (w.train(5) for w in crew(2, use_shadow=True))
    shadows = [[s["shadow"].clone() for s in w.optimizer.state.values()] for w in (one, two)]
    assert not torch.equal(shadows[0][0], shadows[1][0])
    exchange([one, two])
    for a, b, s in zip(*shadows, one.optimizer.state.values(), strict=True):
        torch.testing.assert_close(s["shadow"], (a + b) / 2)
    late = Worker(3, use_shadow=True)  # its shadow is still to be made, and yet its offer is of the same length
    exchange([one.train(1), two.train(1), late])
    assert torch.equal(late.model[0].weight, one.model[0].weight)


def test_16_bit_weights_are_averaged_in_float32():
    models = [nn.Linear(1, 1, bias=False).to(torch.bfloat16) for _ in range(2)]
    mergers = []
    for model, value in zip(models, (1.0, 1.0078125), strict=True):
        optimizer = torch.optim.AdamW(model.parameters())
        mergers.append(Merger(model, optimizer))
        mergers[-1].step()
        nn.init.constant_(model.weight, value)
    offers = [merger.offer() for merger in mergers]
    assert offers[0].dtype == torch.float32
    mean = (offers[0] + 3 * offers[1]) / 4  # as of four workers: 1.0059, which is nearer to 1.0078
    for merger in mergers:
        merger.accept(mean)
    assert models[0].weight.item() == 1.0078125


@pytest.mark.parametrize("build", [emonavi.EmoFact, emonavi.EmoLynx, torch.optim.AdamW])
def test_any_optimizer_goes(build):
    one, two = (w.train(4) for w in crew(2, build=build))
    exchange([one, two])
    assert torch.equal(one.model[0].weight, two.model[0].weight)
    assert one.train(2).weights().isfinite().all()


def test_a_preset_keeps_its_emotion():
    one, two = (w.train(4) for w in crew(2, emotion="v4"))
    before = one.vector()
    exchange([one, two])
    assert torch.equal(one.model[0].weight, two.model[0].weight)
    assert torch.equal(one.vector(), before)


# What it feels at a merge ---------------------------------------------------------------------------------------------


def jump(worker):
    """A step whose loss is far beyond anything in the worker's history, as after a merge with strangers."""
    worker.optimizer.zero_grad()
    loss = worker.model(torch.randn(8, 4, generator=worker.source)).square().mean() + 100
    loss.backward()
    worker.optimizer.step()


@pytest.mark.parametrize("rests", [True, False])
def test_a_loss_that_jumps_at_a_merge_is_no_panic(rests, monkeypatch):
    """Without the rest it is one."""
    monkeypatch.setattr("emonavi.autonomous._REST_AFTER", 16 if rests else 1000)
    one, two = (w.train(64) for w in crew(2))
    exchange([one, two])
    before = one.felt("log_drive")
    for _ in range(5):  # longer than a rest: reflection and the brake may move the drive a little, as they do any time
        jump(one)
    change = one.felt("log_drive") - before
    assert change > -0.5 if rests else change < -1.5


def test_a_loss_that_jumps_later_still_is_one():
    one, two = (w.train(64) for w in crew(2))
    exchange([one, two])
    one.train(5)
    before = one.felt("log_drive")
    jump(one)
    assert one.felt("log_drive") - before == pytest.approx(math.log(0.1), abs=0.06)


def test_who_merges_at_every_step_does_not_rest():
    one, two = crew(2)
    for _ in range(12):
        exchange([one.train(1), two.train(1)])
        assert one.felt("rest") == 0
    exchange([one.train(40), two.train(40)])
    assert one.felt("rest") == 1


def test_stacking_begins_with_the_weights_and_a_fresh_emotion():
    first = Worker(0).train(40)
    second = Worker(1)
    second.model.load_state_dict(first.model.state_dict())
    second.optimizer.load_state_dict(first.optimizer.state_dict())
    second.optimizer.reset_emotion()
    assert second.optimizer.emotion.steps == 0
    assert second.optimizer.effective_lr == [1e-2]
    second.train(20)
    assert second.optimizer.emotion.steps == 20
    assert second.optimizer.emotion.skipped_steps == 0


# The outer step -------------------------------------------------------------------------------------------------------


def test_an_outer_step_of_one_without_momentum_is_the_mean():
    plain, stepped = crew(2), crew(2, outer=lambda params: torch.optim.SGD(params, lr=1.0))
    for _ in range(2):
        for workers in (plain, stepped):
            exchange([w.train(3) for w in workers])
    torch.testing.assert_close(stepped[0].weights(), plain[0].weights())


def test_the_outer_step_is_nesterovs():
    workers = crew(2, outer=nesterov, build=torch.optim.AdamW)
    last, momentum = workers[0].model[0].weight.detach().clone(), 0.0
    for _ in range(3):
        for w in workers:
            w.train(4)
        gradient = last - sum(w.model[0].weight.detach() for w in workers) / 2
        momentum = 0.9 * momentum + gradient
        exchange(workers)
        last = last - 0.7 * (gradient + 0.9 * momentum)
        torch.testing.assert_close(workers[1].model[0].weight.detach(), last)


def test_a_run_that_is_resumed_is_the_same_run():
    whole, parts = crew(2, outer=nesterov), crew(2, outer=nesterov)
    for workers in (whole, parts):
        exchange([w.train(3) for w in workers])
        for steps, w in enumerate(workers, start=2):
            w.train(steps)
    resumed = crew(2, outer=nesterov)
    for old, new in zip(parts, resumed, strict=True):
        for part in ("model", "optimizer", "merger"):
            getattr(new, part).load_state_dict(copy.deepcopy(getattr(old, part).state_dict()))
        new.source.set_state(old.source.get_state())
    for workers in (whole, resumed):
        exchange([w.train(2) for w in workers])
    assert torch.equal(whole[0].weights(), resumed[0].weights())


# What is refused ------------------------------------------------------------------------------------------------------


def test_an_optimizer_that_talks_at_every_step_is_refused():
    model = net()
    for optimizer in (emonavi.EmoNavi(model.parameters()), emonavi.Emotional(torch.optim.SGD(model.parameters()))):
        with pytest.raises(ValueError, match=r"process_group='auto'.*process_group=None"):
            Merger(model, optimizer)


def test_an_outer_step_of_a_part_of_the_workers_is_refused():
    model = net()
    optimizer = emonavi.EmoNavi(model.parameters(), process_group=None)
    averager = SimpleNamespace(step=0, period_process_group_dict={2: None, 4: None})
    with pytest.raises(ValueError, match="a part of the workers"):
        Merger(model, optimizer, averager, outer=nesterov)
    assert averager.step == 0


def test_the_mean_of_another_model_is_refused_and_nothing_changes():
    worker = Worker(0).train(3)
    before = worker.weights(), worker.vector(), worker.merger.state_dict()
    with pytest.raises(ValueError, match=r"shape \(7,\).*same model"):
        worker.merger.accept(torch.ones(7))
    assert torch.equal(worker.weights(), before[0])
    assert torch.equal(worker.vector(), before[1])
    assert worker.merger.state_dict() == before[2]


def test_a_merge_needs_the_others():
    with pytest.raises(RuntimeError, match="init_process_group"):
        Worker(0).merger.merge()


def test_a_checkpoint_without_an_outer_optimizer_is_refused():
    plain, stepped = Worker(0), Worker(0, outer=nesterov)
    with pytest.raises(ValueError, match="saved without an outer optimizer, this merger is with"):
        stepped.merger.load_state_dict(plain.merger.state_dict())
    with pytest.raises(ValueError, match="saved with an outer optimizer, this merger is without"):
        plain.merger.load_state_dict(stepped.merger.state_dict())


# Four processes -------------------------------------------------------------------------------------------------------


def periodic(period, group):
    from torch.distributed.algorithms.model_averaging.averagers import PeriodicModelAverager

    return PeriodicModelAverager(period, process_group=group)


def counted(work):
    """How many collectives there were."""
    calls, real = [], dist.all_reduce

    def count(*args, **more):
        calls.append(args[0].numel())
        return real(*args, **more)

    dist.all_reduce = count
    try:
        work()
    finally:
        dist.all_reduce = real
    return calls


def as_simulated(rank, groups, outer):
    """Two workers of the bench, as processes: ranks 0 and 1."""
    cell = simulated("outer" if outer else "mean")
    if rank > 1:
        return {}
    problem = bench.shard(cell.task, cell.seed, rank, 2)
    optimizer = emonavi.EmoNavi(problem.model.parameters(), lr=cell.lr, process_group=None)
    averager = periodic(cell.period, groups["pair"])
    merger = Merger(problem.model, optimizer, averager, outer=nesterov if outer else None)
    merged = []

    def train():
        for step in range(cell.steps):
            optimizer.zero_grad()
            problem.loss(step).backward()
            optimizer.step()
            merged.append(merger.step())
        merger.merge()

    calls = counted(train)
    return {"val": problem.val(), "calls": calls, "merged": merged}


def hierarchy(rank, groups):
    """Pairs merge every second step, all four every fourth."""
    from torch.distributed.algorithms.model_averaging.hierarchical_model_averager import HierarchicalModelAverager

    worker = Worker(rank, HierarchicalModelAverager(OrderedDict([(2, 2), (4, 4)])))
    return {f"after {n}": worker.train(1).weights() for n in (1, 2, 3, 4)}


def joined(rank, groups):
    """Rank 3 comes after four steps of the others, with weights of its own."""
    worker = Worker(rank, seed=rank // 3)
    worker.train(0 if rank == 3 else 4)
    before = worker.weights()
    worker.merger.merge()
    return {"before": before, "after": worker.weights(), "then": worker.train(2).weights()}


def left(rank, groups):
    """Rank 3 goes without a word; the others find out at the merge, and go on without it."""
    worker = Worker(rank, periodic(4, groups["all"])).train(3)
    if rank == 3:
        return {}
    before = worker.weights()
    try:
        worker.train(1)
        error = ""
    except RuntimeError as caught:
        error = type(caught).__name__
    alone = worker.weights()
    # Only those who are left: the default group would wait for all.
    worker.merger.averager.process_group = dist.new_group([0, 1, 2], use_local_synchronization=True)
    worker.train(1)
    return {"error": error, "moved": not torch.equal(before, alone), "merged": worker.merged, "after": worker.weights()}


CASES = {
    "mean": (as_simulated, False), "outer": (as_simulated, True), "hierarchy": (hierarchy,), "joined": (joined,),
    "left": (left,),
}  # fmt: skip


def simulated(scheme):
    return bench.Cell("charlm", "EmoNavi", 1e-3, 2, scheme, 4, 10, 1, 0)


def worker_process(rank, folder):
    torch.set_num_threads(1)
    limit = datetime.timedelta(seconds=60)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=4, timeout=limit)
    # A pair for each, also where it is of no use: a group that only those who are left make needs as many before it.
    groups = {"pair": dist.new_subgroups(2)[0], "all": dist.new_group(timeout=datetime.timedelta(seconds=8))}
    found = {}
    try:
        for name, (case, *given) in CASES.items():
            found[name] = case(rank, groups, *given)
            if name != "left":
                dist.barrier()
    except Exception:
        found["error"] = traceback.format_exc()
    torch.save(found, f"{folder}/rank{rank}.pt")


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    if not (dist.is_available() and dist.is_gloo_available()):
        pytest.skip("needs torch.distributed with gloo")
    folder = tmp_path_factory.mktemp("workers")
    context = mp.spawn(worker_process, args=(str(folder),), nprocs=4, join=False)
    limit = 240
    while limit and not context.join(timeout=1):
        limit -= 1
    for process in context.processes:
        if process.is_alive():
            process.kill()
    assert limit, "the workers hang"
    found = [torch.load(folder / f"rank{rank}.pt", weights_only=False) for rank in range(4)]
    for each in found:
        assert "error" not in each, each["error"]
    return found


@pytest.mark.parametrize("scheme", ["mean", "outer"])
def test_processes_come_to_the_same_weights_as_the_simulation(ranks, scheme):
    row = bench.measure(simulated(scheme))
    assert ranks[0][scheme]["val"] == ranks[1][scheme]["val"] == row["val"]
    assert row["alone"] != row["val"]


def test_nothing_is_sent_but_at_a_merge(ranks):
    for found in ranks[:2]:
        assert len(found["mean"]["calls"]) == 3
        assert [step for step, merged in enumerate(found["mean"]["merged"], 1) if merged] == [4, 8]


def test_what_is_said_to_be_sent_is_what_is_sent(ranks):
    row = bench.measure(simulated("mean"))
    assert [4 * n for n in ranks[0]["mean"]["calls"]] == row["sent"] * row["times"]


def test_a_hierarchy_merges_pairs_before_it_merges_all(ranks):
    first, second, _, fourth = ([found["hierarchy"][f"after {n}"] for found in ranks] for n in (1, 2, 3, 4))
    assert not torch.equal(first[0], first[1])
    assert torch.equal(second[0], second[1]) and torch.equal(second[2], second[3])
    assert not torch.equal(second[0], second[2])
    assert all(torch.equal(fourth[0], other) for other in fourth[1:])


def test_a_worker_that_joins_has_the_weights_of_the_others(ranks):
    found = [each["joined"] for each in ranks]
    # A count of batches is not merged.
    floats = torch.cat([torch.full((t.numel(),), t.is_floating_point()) for t in net().state_dict().values()])
    mean = sum(each["before"] for each in found[:3]) / 3
    torch.testing.assert_close(found[3]["after"][floats], mean[floats])
    assert torch.equal(found[3]["after"][floats], found[0]["after"][floats])
    assert found[3]["then"].isfinite().all() and not torch.equal(found[3]["then"], found[0]["then"])


def test_workers_go_on_without_one_that_left(ranks):
    found = [each["left"] for each in ranks[:3]]
    assert all(each["error"] and each["moved"] and each["merged"] for each in found)
    assert torch.equal(found[0]["after"], found[1]["after"]) and torch.equal(found[0]["after"], found[2]["after"])


def test_the_example_runs_under_torchrun():
    pytest.importorskip("sklearn")
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    result = subprocess.run([*launch, EXAMPLE, "--small"], capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr[-3000:]
    said = re.findall(r"held-out loss (\S+) -> (\S+), \d+% right", result.stdout)
    assert len(said) == 2 and said[0] == said[1]  # each has the merged weights
    assert float(said[0][1]) < 0.5 * float(said[0][0])
