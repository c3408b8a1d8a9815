"""Schedulers: lr is theirs alone, and what they do to it is not undone."""

from __future__ import annotations

import math
import warnings

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler as schedules

from emonavi import EmoFact, EmoLynx, EmoNavi, Emotional

SIBLINGS = [EmoNavi, EmoFact, EmoLynx]
STEPS = 150
X = torch.randn(32, 4, generator=torch.Generator().manual_seed(1))
Y = torch.tanh(X @ torch.randn(4, 3, generator=torch.Generator().manual_seed(2)))


def net(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))


def loss_of(model):
    return (model(X) - Y).square().mean()


def train(model, optimizer, steps, after=lambda loss: None):
    """Losses and drives of so many steps; ``after`` is called after each."""
    losses, drives = [], []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = loss_of(model)
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
        drives.append(optimizer.emotion.drive)
        after(losses[-1])
    return losses, drives


def sequential(o):
    warmup = schedules.LinearLR(o, start_factor=0.01, total_iters=20)
    return schedules.SequentialLR(o, [warmup, schedules.CosineAnnealingLR(o, STEPS - 20)], milestones=[20])


SCHEDULES = {
    "warm-up from 0": lambda o: schedules.LambdaLR(o, lambda step: min(1.0, step / 20)),
    "steps": lambda o: schedules.StepLR(o, 40, 0.3),
    "cosine": lambda o: schedules.CosineAnnealingLR(o, STEPS),
    "one cycle": lambda o: schedules.OneCycleLR(o, max_lr=o.param_groups[0]["lr"], total_steps=STEPS + 1),
    "plateau": lambda o: schedules.ReduceLROnPlateau(o, patience=5, factor=0.5),
    "sequential": sequential,
    "warm restarts": lambda o: schedules.CosineAnnealingWarmRestarts(o, 30),
    "exponential": lambda o: schedules.ExponentialLR(o, 0.99),
    "cyclic": lambda o: schedules.CyclicLR(o, 1e-3, 1e-2, step_size_up=20, cycle_momentum=False),
}


def lrs(groups):
    return [float(g["lr"]) for g in groups]


@pytest.mark.parametrize("sibling", SIBLINGS)
@pytest.mark.parametrize("make", SCHEDULES.values(), ids=SCHEDULES)
def test_lr_is_the_schedulers_alone_and_the_loss_falls(make, sibling):
    model, shadowed = net(), net()
    groups = [{"params": m.parameters(), "lr": lr} for m, lr in ((model[0], 1e-2), (model[2], 2e-2))]
    optimizer = sibling(groups, weight_decay=0.0)
    # The same schedule on torch's own optimizer says what lr has to be.
    groups = [{"params": m.parameters(), "lr": lr} for m, lr in ((shadowed[0], 1e-2), (shadowed[2], 2e-2))]
    witness = torch.optim.AdamW(groups)
    scheduler, reference = make(optimizer), make(witness)
    plateau = isinstance(scheduler, schedules.ReduceLROnPlateau)

    def after(loss):
        assert lrs(optimizer.param_groups) == lrs(witness.param_groups)
        betas = [g["betas"] for g in optimizer.param_groups]
        witness.step()
        scheduler.step(*[loss] * plateau)
        reference.step(*[loss] * plateau)
        if isinstance(scheduler, schedules.OneCycleLR):
            assert betas != [g["betas"] for g in optimizer.param_groups]  # it cycles them, and that is let be
            assert optimizer.param_groups[0]["betas"][0] == witness.param_groups[0]["betas"][0]

    losses, _ = train(model, optimizer, STEPS, after)
    assert all(map(math.isfinite, losses))
    assert losses[-1] < 0.35 * losses[0]
    if not isinstance(scheduler, schedules.CosineAnnealingWarmRestarts):  # whose restarts are there to shake it up
        assert min(losses[-20:]) <= 2 * min(losses)  # and stays down
    assert optimizer.emotion.skipped_steps == 0


@pytest.mark.parametrize("emotion", ["v1", "v3", "v4"])
def test_presets_leave_lr_to_the_scheduler(emotion):
    model = net()
    optimizer = EmoNavi(model.parameters(), lr=1e-2, emotion=emotion)
    scheduler = schedules.CosineAnnealingLR(optimizer, STEPS)

    def after(_):
        scheduler.step()
        assert optimizer.param_groups[0]["lr"] == scheduler.get_last_lr()[0]

    losses, _ = train(model, optimizer, STEPS, after)
    assert losses[-1] < losses[0]


def test_a_tensor_lr_is_changed_in_place_by_the_scheduler_only():
    model = net()
    lr = torch.tensor(1e-2)
    optimizer = EmoNavi(model.parameters(), lr=lr)
    scheduler = schedules.StepLR(optimizer, 10, 0.5)
    inside = optimizer.param_groups[0]["lr"]
    losses, _ = train(model, optimizer, 50, lambda _: scheduler.step())
    assert optimizer.param_groups[0]["lr"] is inside
    assert float(inside) == pytest.approx(1e-2 * 0.5**5)
    assert losses[-1] < losses[0]


def test_effective_lr_is_lr_times_drive():
    model = net()
    optimizer = EmoNavi(model.parameters(), lr=1e-2, min_lr=0.0)
    scheduler = schedules.StepLR(optimizer, 10, 0.5)
    for _ in range(4):
        train(model, optimizer, 10, lambda _: scheduler.step())
        expected = optimizer.param_groups[0]["lr"] * optimizer.emotion.drive
        assert optimizer.effective_lr == [pytest.approx(expected, rel=1e-6)]


# What lr rises above all that it was --------------------------------------------------------------------------------


class Straight:
    """A way on which reflection finds every step too short."""

    def __init__(self, sibling, lr, kind=float):
        self.weight, self.kind = nn.Parameter(torch.full((50,), 3.0)), kind
        self.optimizer = sibling([{"params": [self.weight]}], lr=kind(lr), weight_decay=0.0, min_lr=0.0)

    def grows(self, steps, factor=1.0):
        """By how much drive and effective lr grow in so many steps, each of which begins with another lr."""
        group = self.optimizer.param_groups[0]
        before = self.optimizer.emotion.drive, self.optimizer.effective_lr[0]
        for _ in range(steps):
            group["lr"] = self.kind(float(group["lr"]) * factor)
            self.optimizer.zero_grad()
            (self.weight - 1).square().sum().backward()
            self.optimizer.step()
        return self.optimizer.emotion.drive / before[0], self.optimizer.effective_lr[0] / before[1]


kinds = pytest.mark.parametrize("kind", [float, torch.tensor])


WARM_UPS = {
    "on a line from 0": lambda k: min(1.0, k / 20),
    "exponential": lambda k: min(1.0, 1e-4 * 1.5**k),
    "ten times too high": lambda k: min(10.0, 1e-3 * 1.3**k),
}


@pytest.mark.parametrize("sibling", [*SIBLINGS, "Emotional"])
@pytest.mark.parametrize("shape", WARM_UPS.values(), ids=WARM_UPS)
@kinds
@pytest.mark.parametrize("lr", [1e-3, 1e-1])
def test_a_warm_up_changes_nothing(sibling, shape, kind, lr):
    """It is trust that warms a run up. A cycle that raised lr while the drive grew killed adapters for good."""
    courses = []
    for factor in (lambda k: 1.0, shape):
        model = net()
        if sibling == "Emotional":
            optimizer = Emotional(torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9), min_lr=0.0)
        else:
            optimizer = sibling(model.parameters(), lr=kind(lr), min_lr=0.0)
        course = []
        for k in range(60):
            lr_now = lr * factor(k)
            optimizer.param_groups[0]["lr"] = kind(lr_now) if sibling != "Emotional" else lr_now
            if lr_now:  # a step at lr 0 is none
                optimizer.zero_grad()
                loss_of(model).backward()
                optimizer.step()
                course.append(optimizer.effective_lr[0])
        courses.append(course)
    constant, warmed = courses
    assert warmed == pytest.approx(constant[: len(warmed)], rel=2e-3)  # float32, and a run that follows its own course


@pytest.mark.parametrize("sibling", SIBLINGS)
@kinds
def test_a_jump_above_all_that_lr_was_is_not_taken(sibling, kind):
    """``OneCycleLR(optimizer, max_lr=10)`` around a default lr: the drive gives way, and trust raises what acts."""
    way, still = Straight(sibling, 1e-3, kind), Straight(sibling, 1e-3, kind)
    for a in (way, still):
        a.grows(10)
    assert way.grows(1, 1e4)[1] == pytest.approx(still.grows(1)[1], rel=1e-3)
    assert way.grows(10)[1] == pytest.approx(still.grows(10)[1], rel=1e-3)
    assert torch.allclose(way.weight, still.weight, rtol=1e-3)
    # Below that peak a schedule scales again what was found.
    before = way.optimizer.effective_lr[0]
    way.optimizer.param_groups[0]["lr"] = kind(7.0)
    assert way.optimizer.effective_lr[0] == pytest.approx(0.7 * before, rel=1e-4)
    # What will act is told before it does.
    way.optimizer.param_groups[0]["lr"] = kind(1e5)
    assert way.optimizer.effective_lr[0] == pytest.approx(before, rel=1e-4)


@pytest.mark.parametrize("sibling", SIBLINGS)
def test_an_lr_that_was_raised_before_the_first_step(sibling):
    """As by the constructor of OneCycleLR."""
    effective = []
    for lr in (1e-1, 10.0):
        way = Straight(sibling, 1e-3)
        way.optimizer.param_groups[0]["lr"] = lr
        way.grows(1)
        effective.append(way.optimizer.effective_lr[0])
    assert effective[0] == pytest.approx(effective[1], rel=1e-3)  # 0.3 % of the weights


@pytest.mark.parametrize("make", [*SIBLINGS, "Emotional"])
@pytest.mark.parametrize("idle", ["no gradient", "frozen", "empty"])
def test_a_group_in_which_nothing_moves_does_not_decide(make, idle):
    """Neither over the first drive, nor over whether a schedule warms up or ends the run."""
    lrs = []
    for extra in (False, True):
        weight = nn.Parameter(torch.full((50,), 3.0))
        groups = [{"params": [weight], "lr": 1e-2}]
        rest = nn.Parameter(torch.ones(3), requires_grad=idle != "frozen")
        if extra:
            groups.append({"params": [] if idle == "empty" else [rest], "lr": 0.0 if idle == "no gradient" else 100.0})
        if make == "Emotional":
            optimizer = Emotional(torch.optim.SGD(groups, lr=1e-2), min_lr=0.0)
        else:
            optimizer = make(groups, weight_decay=0.0, min_lr=0.0)
        course = []
        for lr in [1e-2 * 1.03**k for k in range(20)] + [1e-2 * 0.8**k for k in range(30)]:
            optimizer.param_groups[0]["lr"] = lr
            optimizer.zero_grad()
            (weight - 1).square().sum().backward()
            optimizer.step()
            course.append(optimizer.effective_lr[0])
        lrs.append(course)
    assert lrs[1] == pytest.approx(lrs[0], rel=0.05 if idle == "no gradient" else 1e-6)  # it counts in the first rms


@pytest.mark.parametrize("sibling", SIBLINGS)
def test_a_new_stage_begins_at_its_own_lr(sibling):
    """After ``reset_emotion()`` the highest lr of the stage before is no measure."""
    way, fresh = Straight(sibling, 1.0), Straight(sibling, 1e-3)
    way.grows(30)
    with torch.no_grad():
        way.weight.fill_(3.0)
    way.optimizer.param_groups[0]["lr"] = 1e-3
    way.optimizer.state.clear()
    way.optimizer.reset_emotion()
    way.grows(1)
    fresh.grows(1)
    assert way.optimizer.effective_lr == pytest.approx(fresh.optimizer.effective_lr, rel=1e-6)


# A decay stays a decay ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lr", [1e-2, 3e-3])
def test_no_last_bit_of_an_lr_decides(lr):
    """A cosine is at half its peak in its middle, give or take a rounding."""

    def drives(start):
        weight = nn.Parameter(torch.full((50,), 3.0))
        optimizer = EmoNavi([weight], lr=start, weight_decay=0.0)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 30)
        for _ in range(18):
            optimizer.zero_grad()
            (weight - 1).square().sum().backward()
            optimizer.step()
            schedule.step()
        return optimizer.emotion.drive

    as_float = drives(lr)
    assert drives(torch.tensor(lr)) == pytest.approx(as_float, rel=1e-5)
    assert drives(torch.tensor(lr, dtype=torch.float64)) == pytest.approx(as_float, rel=1e-5)


@pytest.mark.parametrize("sibling", SIBLINGS)
def test_reflection_does_not_undo_a_decay(sibling):
    """Below half its peak lr, the drive may not exceed its earlier maximum, however short the steps have become."""
    torch.manual_seed(0)
    weight = nn.Parameter(torch.full((50,), 3.0))
    optimizer = sibling([weight], lr=1e-2, weight_decay=0.0, min_lr=0.0)
    peaks = []

    def run(steps):
        drives = []
        for _ in range(steps):
            optimizer.zero_grad()
            (weight - 1).square().sum().backward()  # a straight way: reflection finds every step too short
            optimizer.step()
            drives.append(optimizer.emotion.drive)
        return drives

    peaks.append(max(run(25)))
    for factor in (0.3, 0.1, 0.01):
        optimizer.param_groups[0]["lr"] = 1e-2 * factor
        after = run(30)
        assert max(after) <= peaks[0] * (1 + 1e-9)
        assert optimizer.emotion.trust > 0.1  # reflection did want more: the test would fail without the rule
        assert optimizer.effective_lr[0] <= 1e-2 * factor * peaks[0] * (1 + 1e-6)
    optimizer.param_groups[0]["lr"] = 1e-2
    assert max(run(40)) > peaks[0]  # back above half the peak, it is free again


def test_a_decay_of_one_group_of_two_does_not_bind():
    """The rule holds where every group is being ended: one group alone may be warmed or cooled for other reasons."""
    one, two = (nn.Parameter(torch.full((20,), 3.0)) for _ in range(2))
    optimizer = EmoNavi([{"params": [one]}, {"params": [two]}], lr=1e-2, weight_decay=0.0, min_lr=0.0)

    def run(steps):
        for _ in range(steps):
            optimizer.zero_grad()
            ((one - 1).square().sum() + (two - 1).square().sum()).backward()
            optimizer.step()
        return optimizer.emotion.drive

    before = run(15)
    optimizer.param_groups[0]["lr"] = 1e-3
    assert run(15) > before


@pytest.mark.parametrize("sibling", SIBLINGS)
@pytest.mark.parametrize("lowest", [1e-7, 1e-9])
def test_a_dip_of_lr_does_not_change_what_the_drive_found(sibling, lowest):
    """A scheduler scales what the drive found: a cosine's end before a warm restart is no reason to raise it.

    Where lr is below ``min_lr``, ``min_lr`` has nothing to hold up.
    """
    torch.manual_seed(0)
    weight = nn.Parameter(torch.randn(50))
    optimizer = sibling([weight], lr=0.1, weight_decay=0.0)
    noise = torch.Generator().manual_seed(4)
    drives = []

    def run(steps):
        for _ in range(steps):
            optimizer.zero_grad()
            (weight * torch.randn(50, generator=noise)).sum().backward()
            optimizer.step(loss=1.0)
            drives.append(optimizer.emotion.drive)

    run(30)
    state = optimizer.state_dict()
    index = optimizer._emotion.index("log_drive")
    state["param_groups"][0]["emotion"][index] += math.log(0.01)  # it has come down from its highest by now
    optimizer.load_state_dict(state)
    run(1)
    before = drives[-1]
    optimizer.param_groups[0]["lr"] = lowest
    run(2)
    optimizer.param_groups[0]["lr"] = 0.1
    run(1)
    assert before / 1.5 < drives[-1] < 1.5 * before


@pytest.mark.parametrize("sibling", SIBLINGS)
def test_a_warm_up_does_not_change_where_the_drive_starts(sibling):
    starts = []
    for first in (0.1, 1e-7):
        torch.manual_seed(0)
        weight = nn.Parameter(torch.randn(50))
        optimizer = sibling([weight], lr=0.1)
        for lr in (first, 0.1):
            optimizer.param_groups[0]["lr"] = lr
            optimizer.zero_grad()
            (weight * torch.randn(50)).sum().backward()
            optimizer.step(loss=1.0)
        starts.append(optimizer.emotion.drive)
    assert starts[0] / 1.5 < starts[1] < 1.5 * starts[0]


# lr 0 --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sibling", SIBLINGS)
@pytest.mark.parametrize("tensor", [False, True])
def test_a_step_at_lr_0_changes_nothing(sibling, tensor):
    model = net()
    optimizer = sibling(model.parameters(), lr=torch.tensor(1e-2) if tensor else 1e-2, use_shadow=True)
    train(model, optimizer, 5)
    before = [p.detach().clone() for p in model.parameters()]
    vector = optimizer.param_groups[0]["emotion"].clone()
    kept = [{k: v.clone() for k, v in s.items()} for s in optimizer.state.values()]
    optimizer.param_groups[0]["lr"] = torch.tensor(0.0) if tensor else 0.0
    train(model, optimizer, 3)
    assert all(torch.equal(p, q) for p, q in zip(before, model.parameters(), strict=True))
    assert torch.equal(vector, optimizer.param_groups[0]["emotion"])
    for old, new in zip(kept, optimizer.state.values(), strict=True):
        assert all(torch.equal(old[k], new[k]) for k in old)


def test_one_group_at_lr_0_stands_still_and_the_other_moves():
    model = net()
    groups = [{"params": model[0].parameters(), "lr": 0.0}, {"params": model[2].parameters()}]
    optimizer = EmoNavi(groups, lr=1e-2)
    before = [p.detach().clone() for p in model.parameters()]
    train(model, optimizer, 5)
    same = [torch.equal(p, q) for p, q in zip(before, model.parameters(), strict=True)]
    assert same == [True, True, False, False]


@pytest.mark.parametrize("lr", [1.0, 1e-2, 1e-5])
def test_warm_up_from_0_at_any_lr(lr):
    model = net()
    optimizer = EmoNavi(model.parameters(), lr=lr)
    scheduler = schedules.LambdaLR(optimizer, lambda step: min(1.0, step / 50))
    before = [p.detach().clone() for p in model.parameters()]
    losses, _ = train(model, optimizer, 1, lambda _: scheduler.step())
    assert all(torch.equal(p, q) for p, q in zip(before, model.parameters(), strict=True))
    assert optimizer.emotion.steps == 0
    rest, _ = train(model, optimizer, 200, lambda _: scheduler.step())
    assert rest[-1] < 0.6 * losses[0]
    assert max(rest) < 1.5 * losses[0]


# The order of the two step() -----------------------------------------------------------------------------------------


def test_the_order_warning_is_torchs_and_only_where_it_is_due():
    model = net()
    optimizer = EmoNavi(model.parameters())
    scheduler = schedules.StepLR(optimizer, 10)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(model, optimizer, 3, lambda _: scheduler.step())
    late = EmoNavi(model.parameters())
    wrong = schedules.StepLR(late, 10)
    with pytest.warns(UserWarning, match="lr_scheduler.step"):
        wrong.step()


def test_a_scheduler_lets_loss_and_closure_through():
    model = net()
    optimizer = EmoNavi(model.parameters(), capture=False)
    scheduler = schedules.StepLR(optimizer, 10)
    loss_of(model).backward()
    assert optimizer.step(loss=0.5) == 0.5
    scheduler.step()
    assert optimizer.step(lambda: 0.25) == 0.25
    assert optimizer.emotion.loss == 0.25


def test_resuming_optimizer_and_scheduler_goes_on_as_if_nothing_had_happened():
    def pair(model):
        optimizer = EmoNavi(model.parameters(), lr=1e-2)
        return optimizer, schedules.OneCycleLR(optimizer, 1e-2, total_steps=60)

    model = net()
    optimizer, scheduler = pair(model)
    train(model, optimizer, 25, lambda _: scheduler.step())
    other = net(7)
    other.load_state_dict(model.state_dict())
    optimizer2, scheduler2 = pair(other)
    optimizer2.load_state_dict(optimizer.state_dict())
    scheduler2.load_state_dict(scheduler.state_dict())
    train(model, optimizer, 25, lambda _: scheduler.step())
    train(other, optimizer2, 25, lambda _: scheduler2.step())
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), other.parameters(), strict=True))
    assert optimizer.emotion == optimizer2.emotion


@pytest.mark.parametrize("sibling", SIBLINGS)
def test_one_cycle_does_not_move_the_walls(sibling):
    """It writes its own plan into the groups under "min_lr" and "max_lr"."""
    optimizer = sibling(net().parameters(), lr=1e-2, min_lr=1e-5, max_lr=0.5)
    schedules.OneCycleLR(optimizer, max_lr=1e-2, total_steps=50)
    assert (optimizer.param_groups[0]["lr_floor"], optimizer.param_groups[0]["lr_ceiling"]) == (1e-5, 0.5)


@pytest.mark.parametrize("sibling", SIBLINGS)
def test_a_stage_that_begins_at_the_low_end_of_a_schedule_starts_gently(sibling):
    model = net()
    optimizer = sibling(model.parameters(), lr=1.0)
    scheduler = schedules.CosineAnnealingWarmRestarts(optimizer, 30)
    for step in range(90):
        if step == 29:
            optimizer.reset_emotion()
        optimizer.zero_grad()
        loss = loss_of(model)
        loss.backward()
        optimizer.step()
        scheduler.step()
        if step in (29, 30, 31):
            assert optimizer.effective_lr[0] < 1e-2
    assert float(loss.detach()) < 10
