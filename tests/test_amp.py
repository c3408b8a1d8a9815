"""Loss scaling: the loss felt is the one before GradScaler, and a step that it skips leaves nothing behind."""

from __future__ import annotations

import pytest
import torch
from cases import X, Y, close, loss_of, net
from torch import nn
from torch.distributed.fsdp.sharded_grad_scaler import ShardedGradScaler

from emonavi import EmoFact, EmoLynx, EmoNavi


@pytest.fixture(params=["GradScaler", "ShardedGradScaler", "disabled"])
def scaler(request):
    enabled = request.param != "disabled"
    if request.param == "ShardedGradScaler":
        return ShardedGradScaler("cpu", init_scale=4096.0, process_group=None)
    return torch.amp.GradScaler("cpu", init_scale=4096.0, enabled=enabled)


@pytest.fixture
def plain_scaler():
    return torch.amp.GradScaler("cpu", init_scale=4096.0)


@pytest.mark.parametrize("sibling", [EmoNavi, EmoFact, EmoLynx])
def test_the_loss_is_the_unscaled_one(sibling, plain_scaler):
    model = net()
    optimizer = sibling(model.parameters())
    for _ in range(3):
        loss = loss_of(model)
        plain_scaler.scale(loss).backward()
        returned = plain_scaler.step(optimizer)
        plain_scaler.update()
        assert float(returned) == close(loss)
        assert optimizer.emotion.loss == close(loss)
        optimizer.zero_grad()


def test_every_scaler(scaler):
    model = net()
    optimizer = EmoNavi(model.parameters())
    loss = loss_of(model)
    scaled = scaler.scale(loss)
    scaled.backward()
    for p in model.parameters():  # ShardedGradScaler.step needs a process group: unscale by hand
        p.grad /= float(scaled.detach() / loss.detach())
    optimizer.step()
    assert optimizer.emotion.loss == close(loss)


def test_accumulation_with_division_before_scaling(plain_scaler):
    model = net()
    optimizer = EmoNavi(model.parameters())
    parts = [loss_of(model, x, y) / 4 for x, y in zip(X.chunk(4), Y.chunk(4), strict=True)]
    for part in parts:
        plain_scaler.scale(part).backward()
    plain_scaler.step(optimizer)
    assert optimizer.emotion.loss == close(sum(parts))


@pytest.mark.parametrize("kind", [list, tuple, iter])
def test_several_losses_scaled_together(kind, scaler):
    model = net()
    optimizer = EmoNavi(model.parameters())
    losses = [loss_of(model), loss_of(model, 2 * X)]
    torch.autograd.backward(list(scaler.scale(kind(losses))))
    optimizer.step()
    assert optimizer.emotion.loss == close(sum(losses))


def test_nested_lists_of_losses(plain_scaler):
    model = net()
    optimizer = EmoNavi(model.parameters())
    losses = [loss_of(model), loss_of(model, 2 * X), loss_of(model, 3 * X)]
    (one, two), three = plain_scaler.scale([losses[:2], losses[2]])
    torch.autograd.backward([one, two, three])
    optimizer.step()
    assert optimizer.emotion.loss == close(sum(losses))


def test_a_half_precision_loss(plain_scaler):
    model = net()
    optimizer = EmoNavi(model.parameters())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = (model(X) - Y).square().mean()
    plain_scaler.scale(loss).backward()
    plain_scaler.step(optimizer)
    assert optimizer.emotion.loss == close(loss)


def test_a_scaled_loss_that_overflows_its_dtype_is_felt_as_it_was():
    weight = nn.Parameter(torch.tensor(1.0))
    optimizer = EmoNavi([weight])
    scaled = ShardedGradScaler("cpu", init_scale=65536.0, process_group=None).scale((weight * 3).half())
    assert torch.isinf(scaled)
    scaled.backward()
    weight.grad.fill_(1.0)
    optimizer.step()
    assert optimizer.emotion.loss == 3.0


def test_changing_the_loss_after_scaling_does_not_reach_what_was_heard(plain_scaler):
    model = net()
    optimizer = EmoNavi(model.parameters())
    loss = loss_of(model)
    before = float(loss.detach())
    plain_scaler.scale(loss).backward()
    loss.detach().zero_()
    plain_scaler.step(optimizer)
    assert optimizer.emotion.loss == close(before)


@pytest.mark.parametrize("give", [lambda loss: loss, lambda loss: loss.item()], ids=["tensor", "number"])
def test_step_forwards_a_told_loss(give, plain_scaler):
    model = net()
    optimizer = EmoNavi(model.parameters(), capture=False)
    loss = loss_of(model)
    plain_scaler.scale(loss).backward()
    plain_scaler.step(optimizer, loss=give(loss.detach()))
    assert optimizer.emotion.loss == close(loss)


def test_unscale_and_clip(plain_scaler):
    model, twin = net(), net()
    optimizer, plain = EmoNavi(model.parameters()), EmoNavi(twin.parameters())
    for _ in range(4):
        loss = loss_of(model)
        plain_scaler.scale(loss).backward()
        plain_scaler.unscale_(optimizer)
        norm = nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        assert norm > 0.1
        plain_scaler.step(optimizer)
        plain_scaler.update()
        assert optimizer.emotion.loss == close(loss)
        loss_of(twin).backward()
        nn.utils.clip_grad_norm_(twin.parameters(), 0.1)
        plain.step()
        optimizer.zero_grad()
        plain.zero_grad()
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("told", ["captured", "loss=", "closure"])
def test_an_overflow_leaves_nothing_behind(told, plain_scaler):
    model = net()
    optimizer = EmoNavi(model.parameters())

    def train(x, bad):
        loss = loss_of(model, x)
        plain_scaler.scale(loss).backward()
        if bad:
            model[0].weight.grad[0, 0] = torch.inf
        if told == "loss=":
            plain_scaler.step(optimizer, loss=loss)
        elif told == "closure":
            plain_scaler.step(optimizer, lambda: loss)
        else:
            plain_scaler.step(optimizer)
        plain_scaler.update()
        optimizer.zero_grad()
        return loss.detach()

    train(X, bad=False)
    vector, scale = optimizer.param_groups[0]["emotion"].clone(), plain_scaler.get_scale()
    params = [p.detach().clone() for p in model.parameters()]
    train(50 * X, bad=True)
    assert plain_scaler.get_scale() < scale  # it did overflow
    assert torch.equal(optimizer.param_groups[0]["emotion"], vector)
    assert all(torch.equal(p, q) for p, q in zip(params, model.parameters(), strict=True))
    loss = train(X, bad=False)
    assert optimizer.emotion.loss == close(loss)
    assert (optimizer.emotion.steps, optimizer.emotion.skipped_steps) == (2, 0)


def test_an_overflow_in_the_middle_of_accumulation(plain_scaler):
    model = net()
    optimizer = EmoNavi(model.parameters())

    def window(factor):
        parts = [loss_of(model, factor * x, y) / 2 for x, y in zip(X.chunk(2), Y.chunk(2), strict=True)]
        for part in parts:
            plain_scaler.scale(part).backward()
        if factor > 1:
            model[0].weight.grad[0, 0] = torch.nan
        plain_scaler.step(optimizer)
        plain_scaler.update()
        optimizer.zero_grad()
        return sum(parts).detach()

    for factor in (1, 1, 50, 1):
        loss = window(factor)
    assert optimizer.emotion.loss == close(loss)
    assert optimizer.emotion.steps == 3


def test_two_optimizers_with_one_scaler(plain_scaler):
    models = [net(0), net(1)]
    optimizers = [EmoNavi(m.parameters()) for m in models]
    losses = [loss_of(models[0]), loss_of(models[1], 2 * X)]
    for loss in losses:
        plain_scaler.scale(loss).backward()
    models[1][0].weight.grad[0, 0] = torch.inf  # one of two overflows
    for optimizer in optimizers:
        plain_scaler.step(optimizer)
    assert optimizers[0].emotion.loss == close(losses[0])
    assert [o.emotion.steps for o in optimizers] == [1, 0]


def test_training_goes_on_under_a_scaler_that_starts_too_high():
    """The usual start: the first steps overflow until the scale has come down."""
    model = net()
    optimizer = EmoNavi(model.parameters(), lr=1e-2)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127)
    losses = []
    for _ in range(150):
        loss = 64 * loss_of(model)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert 0 < 150 - optimizer.emotion.steps < 20  # some were skipped, by the scaler
    assert optimizer.emotion.skipped_steps == optimizer.emotion.ignored_losses == 0
    assert optimizer.emotion.loss == close(losses[-1])
    assert losses[-1] < 0.8 * losses[0]
