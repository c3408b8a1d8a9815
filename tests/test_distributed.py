"""Two replicas that hear different losses feel, and do, the same.

All cases run in one pair of processes; the tests below compare what the two found.
"""

from __future__ import annotations

import copy
import math
import pickle
import warnings

import pytest
import torch
from ranks import run
from torch import distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel as DDP

from emonavi import EmoFact, EmoLynx, EmoNavi
from emonavi.distributed import Ranks

pytestmark = pytest.mark.skipif(
    not (dist.is_available() and dist.is_gloo_available()), reason="needs torch.distributed with gloo"
)
SIBLINGS = {"EmoNavi": EmoNavi, "EmoFact": EmoFact, "EmoLynx": EmoLynx}


def net(dtype=torch.float32):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3)).to(dtype)


def batches(steps, size, dtype=torch.float32):
    generator = torch.Generator().manual_seed(5)
    target = torch.randn(4, 3, generator=generator)
    for _ in range(steps):
        x = torch.randn(size, 4, generator=generator)
        yield x.to(dtype), torch.tanh(x @ target).to(dtype)


def share(batch, rank):
    return [part.chunk(2)[rank] for part in batch]


def loss_of(model, batch):
    return (model(batch[0]) - batch[1]).square().mean()


def outcome(model, optimizer, **more):
    tensors = [p.detach().clone() for p in model.parameters()]
    for s in optimizer.state.values():
        tensors += [v.clone() for v in s.values()]
    emotion = optimizer.emotion
    return {
        "tensors": tensors,
        "vector": optimizer.param_groups[0]["emotion"].clone(),
        "loss": emotion.loss,
        "scalar": emotion.scalar,
        "ignored": emotion.ignored_losses,
        "skipped": emotion.skipped_steps,
        "steps": emotion.steps,
        **more,
    }


def train(rank, *, sibling=EmoNavi, steps=30, tell=None, before=lambda model, step: None, model=None, **options):
    """Data-parallel training on this rank's half of each batch. ``tell(optimizer, loss, step)`` replaces capture."""
    model = DDP(net()) if model is None else model
    optimizer = sibling(model.parameters(), lr=1e-2, **options)
    losses = []
    for step, batch in enumerate(batches(steps, 8)):
        optimizer.zero_grad()
        loss = loss_of(model, share(batch, rank))
        loss.backward()
        losses.append(float(loss.detach()))
        before(model, step)
        if tell is not None:
            tell(optimizer, loss.detach(), step)
        optimizer.step()
    return outcome(model, optimizer, losses=losses)


# The cases, each run on both ranks ------------------------------------------------------------------------------------


def each_its_own_loss(rank, sibling):
    return train(rank, sibling=sibling, steps=200)


def preset(rank):
    return train(rank, emotion="v4", max_norm=0.0)


def with_a_shadow(rank):
    return train(rank, use_shadow=True)


def one_is_nan(rank):
    return train(rank, tell=lambda o, loss, step: o.observe(math.nan if rank == 1 and step % 3 == 0 else loss))


def one_is_always_nan(rank):
    return train(rank, steps=10, tell=lambda o, loss, step: o.observe(math.nan if rank == 1 else loss))


def all_are_nan_once(rank):
    return train(rank, steps=10, tell=lambda o, loss, step: o.observe(math.nan if step == 5 else loss))


def one_has_none(rank):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = train(rank, capture=False, tell=lambda o, loss, step: o.observe(loss) if rank == 0 else None)
    found["warnings"] = [str(w.message) for w in caught if "without a loss" in str(w.message)]
    return found


def nobody_has_one(rank):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = train(rank, capture=False)
    found["warnings"] = [str(w.message) for w in caught if "without a loss" in str(w.message)]
    return found


def one_spikes(rank):
    """A panic that only one rank's loss gives reason for is everybody's."""
    return train(rank, tell=lambda o, loss, step: o.observe(loss * (1e4 if rank == 1 and step == 20 else 1)))


def one_gradient_is_nan(rank):
    """On one rank only, behind the all-reduce that would have spread it."""

    def poison(model, step):
        if step == 10 and rank == 1:
            next(model.parameters()).grad.view(-1)[0] = math.nan

    return train(rank, before=poison)


def never(rank):
    return train(rank, process_group=None)


def own_group(rank):
    return train(rank, steps=200, process_group=dist.new_group([0, 1]))


def other_number_of_parts(rank):
    """At the end of an epoch one rank has fewer micro-batches left: its window is unusual, the other's is not."""
    model = DDP(net())
    optimizer = EmoNavi(model.parameters(), lr=1e-2)
    for step, batch in enumerate(batches(16, 8)):
        optimizer.zero_grad()
        parts = list(zip(*(t.chunk(2) for t in share(batch, rank)), strict=True))
        if step in (10, 11, 13) and rank == 1:
            parts = parts[:1]
        for part in parts[:-1]:
            with model.no_sync():
                (loss_of(model, part) / 2).backward()
        (loss_of(model, parts[-1]) / 2).backward()
        optimizer.step()
    return outcome(model, optimizer)


def as_one_process(rank):
    """In float64: sums in another order differ by 1e-16, and a cosine near 0 must not make much of it."""
    model, alone = DDP(net(torch.float64)), net(torch.float64)
    optimizer = EmoNavi(model.parameters(), lr=1e-2)
    single = EmoNavi(alone.parameters(), lr=1e-2, process_group=None)
    for batch in batches(30, 8, torch.float64):
        for m, o, own in ((model, optimizer, share(batch, rank)), (alone, single, batch)):
            o.zero_grad()
            loss_of(m, own).backward()
            o.step()
    return outcome(model, optimizer, single=outcome(alone, single))


def without_a_collective_at_lr_0(rank):
    """The number of idle steps differs between the ranks: a collective in one of them would hang, or mix up."""
    model = DDP(net())
    optimizer = EmoNavi(model.parameters(), lr=1e-2)
    for step, batch in enumerate(batches(10, 8)):
        optimizer.zero_grad()
        loss_of(model, share(batch, rank)).backward()
        if step == 5:
            optimizer.param_groups[0]["lr"] = 0.0
            for _ in range(1 + 2 * rank):
                optimizer.step(loss=100.0 * rank)
            optimizer.param_groups[0]["lr"] = 1e-2
        optimizer.step()
    return outcome(model, optimizer)


def own_group_and_a_copy(rank):
    group = dist.new_group([0, 1])
    optimizer = EmoNavi(net().parameters(), lr=1e-2, process_group=group)
    copied = copy.deepcopy(optimizer)
    try:
        pickle.dumps(optimizer)
    except TypeError as error:
        return {"same": copied._process_group is group, "said": str(error)}


def a_copy_keeps_to_itself(rank):
    """What was told never to talk to others does not begin to when it is copied."""
    model = net()
    optimizer = EmoNavi(model.parameters(), lr=1e-2, process_group=None)
    model, optimizer = copy.deepcopy((model, optimizer))
    for batch in batches(3, 8):
        optimizer.zero_grad()
        loss = loss_of(model, share(batch, rank))
        loss.backward()
        optimizer.step()
    return outcome(model, optimizer, losses=[float(loss.detach())])


def a_group_made_anew(rank, meet):
    """As elastic training does within a process: the last case, since the groups of the others are gone with it."""
    model = net()
    optimizer = EmoNavi(model.parameters(), lr=1e-2)
    for step, batch in enumerate(batches(6, 8)):
        if step == 3:
            dist.barrier()
            dist.destroy_process_group()
            dist.init_process_group("gloo", init_method=meet, rank=rank, world_size=2)
        optimizer.zero_grad()
        loss = loss_of(model, batch)
        loss.backward()
        optimizer.step(loss=loss.detach() + rank)
    return outcome(model, optimizer, losses=[loss.item() + rank])


CASES = {f"each its own loss, {n}": (each_its_own_loss, cls) for n, cls in SIBLINGS.items()} | {
    f.__name__: (f,)
    for f in (
        preset, with_a_shadow, one_is_nan, one_is_always_nan, all_are_nan_once, one_has_none, nobody_has_one,
        one_spikes, one_gradient_is_nan, never, own_group, other_number_of_parts, as_one_process,
        a_copy_keeps_to_itself, own_group_and_a_copy, without_a_collective_at_lr_0,
    )
}  # fmt: skip


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """Both ranks' results of a case."""
    meet = (tmp_path_factory.mktemp("again") / "rendezvous").as_uri()
    return run(CASES | {"a_group_made_anew": (a_group_made_anew, meet)}, 2, tmp_path_factory.mktemp("replicas"))


def identical(one, two):
    assert torch.equal(one["vector"], two["vector"])
    assert len(one["tensors"]) == len(two["tensors"])
    assert all(torch.equal(a, b) for a, b in zip(one["tensors"], two["tensors"], strict=True))


SAME = [name for name in CASES if name not in ("never", "a_copy_keeps_to_itself", "own_group_and_a_copy")]


@pytest.mark.parametrize("name", SAME)
def test_replicas_are_identical_bit_for_bit(name, ranks):
    one, two = ranks(name)
    identical(one, two)
    assert all(t.isfinite().all() for t in one["tensors"])


@pytest.mark.parametrize("sibling", SIBLINGS)
def test_the_loss_felt_is_the_mean(sibling, ranks):
    one, two = ranks(f"each its own loss, {sibling}")
    assert one["losses"] != two["losses"]
    assert one["loss"] == two["loss"] == pytest.approx((one["losses"][-1] + two["losses"][-1]) / 2)
    assert one["scalar"] != 0
    assert one["steps"] == 200


def test_a_default_group_that_is_made_anew_is_asked(ranks):
    one, two = ranks("a_group_made_anew")
    identical(one, two)
    assert one["steps"] == 6
    assert one["loss"] == two["loss"] == pytest.approx((one["losses"][0] + two["losses"][0]) / 2)


def test_a_loss_that_is_not_finite_leaves_the_others_to_be_felt(ranks):
    one, two = ranks("one_is_always_nan")
    assert one["loss"] == two["loss"] == pytest.approx(one["losses"][-1])
    assert one["ignored"] == two["ignored"] == 0
    one, _ = ranks("all_are_nan_once")
    assert one["ignored"] == 1
    assert one["steps"] == 10


def test_a_rank_without_a_loss_feels_the_others(ranks):
    one, two = ranks("one_has_none")
    assert one["loss"] == two["loss"] == pytest.approx(one["losses"][-1])
    assert two["scalar"] != 0


def test_a_rank_without_a_loss_is_not_told_that_none_is_felt(ranks):
    """The last stage of a pipeline alone has a loss; the others do feel it."""
    one, two = ranks("one_has_none")
    assert one["warnings"] == []
    assert two["warnings"] == []


def test_no_rank_has_a_loss(ranks):
    for found in ranks("nobody_has_one"):
        assert math.isnan(found["loss"])
        assert (found["scalar"], found["ignored"], found["steps"]) == (0.0, 0, 30)
        assert len(found["warnings"]) == 1


def test_a_copy_asks_the_same_group_and_a_pickle_cannot(ranks):
    """Both would else ask all the world: another run, or a wait without an end."""
    for found in ranks("own_group_and_a_copy"):
        assert found["same"]
        assert "construct the optimizer anew with its process_group" in found["said"]


def test_a_gradient_that_is_not_finite_is_skipped_by_both(ranks):
    for found in ranks("one_gradient_is_nan"):
        assert (found["skipped"], found["steps"]) == (1, 29)


def test_without_a_group_each_feels_its_own(ranks):
    one, two = ranks("never")
    assert one["loss"] == pytest.approx(one["losses"][-1])
    assert two["loss"] == pytest.approx(two["losses"][-1])
    assert not torch.equal(one["vector"], two["vector"])


def test_a_copy_of_an_optimizer_without_a_group_has_none_either(ranks):
    for found in ranks("a_copy_keeps_to_itself"):
        assert found["loss"] == pytest.approx(found["losses"][-1])


def test_a_group_of_ones_own_is_the_default_group_here(ranks):
    identical(ranks("own_group")[0], ranks("each its own loss, EmoNavi")[0])


def test_two_ranks_train_as_one_process_with_the_same_batches(ranks):
    for found in ranks("as_one_process"):
        single = found["single"]
        assert found["loss"] == pytest.approx(single["loss"], rel=1e-9)
        torch.testing.assert_close(found["vector"], single["vector"], rtol=1e-5, atol=1e-7)
        for a, b in zip(found["tensors"], single["tensors"], strict=True):
            # drive and trust of a tensor are float32; a cosine that rounds the other way there moves the rest a little
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("group", ["auto", None])
def test_whom_to_ask_is_found_out_once(group, monkeypatch):
    """Where the answer is nobody, too: to look takes a walk over all parameters."""
    model, asked, find = net(), [], Ranks.of.__func__
    monkeypatch.setattr(Ranks, "of", classmethod(lambda cls, *args: asked.append(1) or find(cls, *args)))
    optimizer = EmoNavi(model.parameters(), process_group=group)
    for batch in batches(4, 8):
        optimizer.zero_grad()
        loss_of(model, batch).backward()
        optimizer.step()
    assert len(asked) == 1


def test_in_a_single_process_no_group_is_needed():
    model = net()
    optimizer = EmoNavi(model.parameters(), process_group="auto")
    loss_of(model, next(batches(1, 8))).backward()
    assert optimizer.step() is not None


def test_calm_refuses_to_run_a_model_under_fsdp1():
    """It may go on with weights that it gathered before; to save inside the block needs no model."""
    model = net()
    optimizer = EmoNavi(model.parameters(), use_shadow=True)
    loss_of(model, next(batches(1, 8))).backward()
    optimizer.step()
    for p in model.parameters():
        p._fsdp_flattened = True  # as FSDP1 marks them
    with pytest.raises(ValueError, match=r"under FSDP1.* save inside calm\(\)"), optimizer.calm(model):
        pass
    with optimizer.calm():
        pass
