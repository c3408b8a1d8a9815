"""What every sibling promises, whatever its rule. One row of ``cases.py`` buys all of this."""

import copy
import math
import subprocess
import sys
import warnings
import weakref

import pytest
import torch
from cases import (
    CASES,
    SHAPES,
    Valley,
    both_emotions,
    configured,
    contents,
    differences,
    drive,
    felt,
    siblings,
    train,
    vector,
    ways,
    weights,
    write,
)
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import emonavi
from emonavi.active import Active
from emonavi.emotion import State
from emonavi.machine import Mood

ADAPTIVE = configured(lambda c: c.adaptive)
COUNTERS = ("group 0: emotion",)  # compared entry by entry where a test is about them


def run(case, steps=30, *, shapes=SHAPES, dtype=torch.float32, told=lambda x: x, scale=1.0, **kwargs):
    params = weights(dtype, shapes)
    optimizer = case.make(params, **kwargs)
    losses = train(optimizer, params, steps, loss=told, scale=scale)
    return optimizer, params, losses


def entries(optimizer, *without):
    """The adaptive emotion's vector by name."""
    named = optimizer._emotion.unpack(vector(optimizer).clone())._asdict()
    return {k: v for k, v in named.items() if k not in without}


# What is read-only ---------------------------------------------------------------------------------------------------


@configured()
@ways
def test_gradients_lr_and_layout_are_left_alone(case, config, foreach):
    params = [*weights(), torch.nn.Parameter(torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last))]
    params.append(torch.nn.Parameter(torch.randn(4, 6).t()))
    options = {"weight_decay": 0.1} | config.kwargs
    optimizer = case.make(params, foreach=foreach, **options)
    valley = Valley(params)
    for t in range(25):
        loss = valley.fill(params, t)
        if t == 15:
            params[0].grad *= 1e4  # an outlier is scaled down, but not in .grad
        held = [(p, p.grad, p.grad.clone(), p.dtype, p.stride(), p.data_ptr()) for p in params]
        optimizer.step(loss=loss)
        for p, grad, before, dtype, stride, place in held:
            assert p.grad is grad
            assert torch.equal(grad, before)
            assert (p.dtype, p.stride(), p.data_ptr()) == (dtype, stride, place)
    assert params[-2].is_contiguous(memory_format=torch.channels_last)
    for group in optimizer.param_groups:
        assert group["lr"] == case.lr
        assert {k: group[k] for k in options if k in group and k != "emotion"} == {
            k: v for k, v in options.items() if k in group and k != "emotion"
        }


@siblings
def test_gradients_are_left_alone_under_maximize_and_half_precision(case):
    for dtype, kwargs in ((torch.float32, {"maximize": True}), (torch.bfloat16, {}), (torch.float16, {})):
        params = weights(dtype)
        optimizer = case.make(params, **kwargs)
        valley = Valley(params)
        for t in range(3):
            loss = valley.fill(params, t)
            before = [p.grad.clone() for p in params]
            optimizer.step(loss=loss)
            assert all(torch.equal(p.grad, b) for p, b in zip(params, before, strict=True))


# Sameness ------------------------------------------------------------------------------------------------------------


@configured()
@ways
def test_two_runs_are_bitwise_equal(case, config, foreach):
    a, b = (run(case, foreach=foreach, **config.kwargs)[0] for _ in range(2))
    assert not differences(contents(a), contents(b))


@configured()
@ways
@pytest.mark.parametrize("k", [3])
def test_splitting_into_groups_changes_nothing(case, config, foreach, k):
    whole, params, _ = run(case, foreach=foreach, **config.kwargs)
    split = weights()
    cut = -(-len(split) // k)
    groups = [{"params": split[i : i + cut]} for i in range(0, len(split), cut)]
    parted = case.make(groups, foreach=foreach, **config.kwargs)
    train(parted, split, 30)
    assert all(torch.equal(a, b) for a, b in zip(params, split, strict=True))
    assert torch.equal(vector(whole), vector(parted))
    for a, b in zip(params, split, strict=True):
        assert not differences(dict(whole.state[a]), dict(parted.state[b]))


@configured(lambda c: c.adaptive)
@pytest.mark.parametrize(("a", "b"), [(1e-5, 2.0), (250.0, -4e3)])
def test_affine_invariance_in_the_loss(case, config, a, b):
    """The run does not change when a * loss + b is told. float64 roundings of the sum are all that differs."""
    _, params, losses = run(case, 45, **config.kwargs)
    other, mapped, _ = run(case, 45, told=lambda x: a * x + b, **config.kwargs)
    for p, q in zip(params, mapped, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)
    # and it proves itself: the loss did move the drive
    _, deaf, _ = run(case, 45, told=lambda x: 0 * x, **config.kwargs)
    assert any(not torch.equal(p, q) for p, q in zip(params, deaf, strict=True))
    assert other.emotion.loss == pytest.approx(a * losses[-1] + b)


@siblings
@ways
def test_gradients_scaled_along_with_the_loss_give_nearly_the_same_run(case, foreach):
    """A power of two near 1e-6, so that only eps can tell the difference."""
    scale, eps = 2.0**-20, 1e-12
    _, params, _ = run(case, 40, foreach=foreach, eps=eps)
    _, scaled, _ = run(case, 40, foreach=foreach, eps=eps, scale=scale, told=lambda x: scale * x)
    starts = weights()
    for p, q, start in zip(params, scaled, starts, strict=True):
        moved = float((p - start).detach().abs().max())
        assert moved > 1e-3
        assert float((p - q).detach().abs().max()) <= case.scaling_tolerance * moved


@both_emotions
@ways
def test_maximize_is_negated_gradients_and_losses(case, foreach, emotion):
    down, params, _ = run(case, 40, foreach=foreach, emotion=emotion)
    mirrored = weights()
    up = case.make(mirrored, foreach=foreach, emotion=emotion, maximize=True)
    valley = Valley(mirrored)
    for t in range(40):
        loss = valley.fill(mirrored, t)
        for p in mirrored:
            p.grad.neg_()
        up.step(loss=-loss)
    assert all(torch.equal(p, q) for p, q in zip(params, mirrored, strict=True))
    assert up.emotion.scalar == down.emotion.scalar


@siblings
def test_tensor_lr_equals_float_lr(case):
    runs = [run(case, lr=lr)[1] for lr in (2.0**-7, torch.tensor(2.0**-7), torch.tensor(2.0**-7, dtype=torch.float64))]
    for other in runs[1:]:
        assert all(torch.equal(p, q) for p, q in zip(runs[0], other, strict=True))


@siblings
def test_tensor_lr_is_read_at_each_step(case):
    lr = torch.tensor(2.0**-7)
    params = weights()
    optimizer = case.make(params, lr=lr)
    train(optimizer, params, 3)
    before = [p.detach().clone() for p in params]
    lr.zero_()
    train(optimizer, params, 1, start=3)
    assert all(torch.equal(p, b) for p, b in zip(params, before, strict=True))
    assert optimizer.param_groups[0]["lr"] is lr


@siblings
def test_named_parameters(case):
    model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.Linear(2, 1))
    optimizer = case.make(model.named_parameters())
    train(optimizer, list(model.parameters()), 3)
    assert optimizer.param_groups[0]["param_names"] == [n for n, _ in model.named_parameters()]
    assert optimizer.state_dict()["param_groups"][0]["param_names"]


# Losses --------------------------------------------------------------------------------------------------------------


@configured()
@ways
def test_step_without_a_loss(case, config, foreach):
    optimizer, params, _ = run(case, 40, told=None, foreach=foreach, **config.kwargs)
    assert optimizer.emotion.steps == 40
    assert math.isnan(optimizer.emotion.loss)
    assert optimizer.emotion.scalar == 0.0
    assert optimizer.emotion.ignored_losses == 0
    assert not optimizer.should_stop
    assert all(bool((p != s).any()) for p, s in zip(params, weights(), strict=True))


def with_losses(value):
    return {
        "float": float(value),
        "int": int(value),
        "0-d": torch.tensor(float(value)),
        "0-d that requires grad": torch.tensor(float(value), requires_grad=True),
        "one element": torch.tensor([float(value)]),
        "one element, two dimensions": torch.tensor([[float(value)]]),
        "bf16": torch.tensor(float(value), dtype=torch.bfloat16),
        "f16": torch.tensor(float(value), dtype=torch.float16),
        "f64": torch.tensor(float(value), dtype=torch.float64),
        "integer tensor": torch.tensor(int(value)),
    }


@siblings
@pytest.mark.parametrize("kind", with_losses(1))
def test_kinds_of_losses(case, kind):
    """Small whole numbers are exact in every dtype, so that every kind is the same run."""
    runs = []
    for which in ("float", kind):
        params = weights()
        optimizer = case.make(params)
        valley = Valley(params)
        for t in range(12):
            valley.fill(params, t)
            loss = with_losses((5 * t) % 7)[which]
            assert optimizer.step(loss=loss) is loss
        runs.append(contents(optimizer))
        assert optimizer.emotion.loss == (5 * 11) % 7
    assert not differences(*runs)


@siblings
@pytest.mark.parametrize("level", [0.0, -3.5])
def test_zero_and_negative_losses_train(case, level):
    """Relative forms freeze there; here the level does not matter at all."""
    _, constant, _ = run(case, 40, told=lambda _: level)
    _, unfed, _ = run(case, 40, told=None)
    assert all(torch.equal(p, q) for p, q in zip(constant, unfed, strict=True))


@both_emotions
@ways
@pytest.mark.parametrize("bad", [math.nan, -math.inf])
def test_a_loss_that_is_not_finite_is_counted_and_otherwise_ignored(case, foreach, bad, emotion):
    runs = []
    for at in ({12, 13}, set()):
        params = weights()
        optimizer = case.make(params, foreach=foreach, emotion=emotion)
        valley = Valley(params)
        for t in range(30):
            loss = valley.fill(params, t)
            optimizer.step(loss=bad if t in at else None if t in (12, 13) else loss)
        runs.append(optimizer)
    assert [o.emotion.ignored_losses for o in runs] == [2, 0]
    assert runs[0].emotion.skipped_steps == 0
    a, b = (entries(o, "ignored_losses") for o in runs)
    assert [k for k in a if not torch.equal(a[k], b[k])] == []
    assert not differences(contents(runs[0]), contents(runs[1]), ignore=COUNTERS)


@siblings
def test_first_loss_not_finite(case):
    optimizer, params, _ = run(case, 1, told=lambda _: math.nan)
    train(optimizer, params, 20, start=1)
    assert math.isfinite(optimizer.emotion.short)
    assert optimizer.emotion.ignored_losses == 1


@siblings
def test_closure(case):
    """Runs with grad, once; may return None; its value comes back."""
    runs = []
    for returns in (True, False):
        params = weights()
        optimizer = case.make(params)
        calls = []

        def closure(params=params, optimizer=optimizer, calls=calls, returns=returns):
            assert torch.is_grad_enabled()
            calls.append(1)
            optimizer.zero_grad()
            loss = sum((p * p).sum() for p in params)
            loss.backward()
            return loss if returns else None

        results = [optimizer.step(closure) for _ in range(5)]
        assert len(calls) == 5
        assert all((r is not None) == returns for r in results)
        assert not returns or float(results[-1].detach()) < float(results[0].detach())
        runs.append(optimizer)
    assert runs[0].emotion.loss > 0
    assert math.isnan(runs[1].emotion.loss)  # nothing is captured here, and None is no loss


@siblings
def test_closure_with_loss_is_refused(case):
    params = weights()
    optimizer = case.make(params)
    before = contents(optimizer)
    with pytest.raises(ValueError, match="both a closure and loss="):
        optimizer.step(lambda: 2.0, loss=1.0)
    assert not differences(before, contents(optimizer))


@siblings
@pytest.mark.parametrize("loss", [torch.ones(2), torch.ones(0), torch.tensor(1j)])
def test_a_loss_that_is_not_one_number_is_refused(case, loss):
    optimizer, _, _ = run(case, 3)
    before = contents(optimizer)
    with pytest.raises(ValueError, match="one real number"):
        optimizer.step(loss=loss)
    assert not differences(before, contents(optimizer))


@siblings
def test_missing_losses_are_told_once(case):
    params = weights()
    optimizer = case.make(params, on_missing_loss="warn")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        train(optimizer, params, 40, loss=None)
    assert [w.category for w in caught] == [UserWarning]
    assert "without a loss" in str(caught[0].message)
    assert caught[0].filename == train.__code__.co_filename, "the warning does not point at the user's line"
    optimizer = case.make(weights(), on_missing_loss="error")
    for p in (params := optimizer.param_groups[0]["params"]):
        p.grad = torch.ones_like(p)
    before = [p.detach().clone() for p in params]
    with pytest.raises(RuntimeError, match="no loss"):
        optimizer.step()
    assert all(torch.equal(p, b) for p, b in zip(params, before, strict=True))


# Gradients that are not finite ---------------------------------------------------------------------------------------


@ADAPTIVE
@pytest.mark.parametrize(
    ("foreach", "capturable"),
    [(False, False), (True, False), (True, True), (None, False)],
    ids=["single", "foreach", "predicated", "kernel"],
)
@pytest.mark.parametrize(("bad", "k"), [(math.nan, 15), (math.inf, 15), (-math.inf, 0)])
def test_bad_gradient_skips_the_step_and_panics(case, config, foreach, capturable, bad, k):
    params = weights(shapes=SHAPES[:3])
    optimizer = case.make(params, foreach=foreach, capturable=capturable, **config.kwargs)
    valley = Valley(params, rise=range(0))
    for t in range(k):
        optimizer.step(loss=valley.fill(params, t))
    before, feelings = contents(optimizer), entries(optimizer)
    loss = valley.fill(params, k)
    params[0].grad[2, 1] = bad
    optimizer.step(loss=loss)
    snapshot = optimizer.emotion
    assert (snapshot.steps, snapshot.skipped_steps) == (k, 1)
    changed = {n.rpartition(": ")[2] for n in differences(before, contents(optimizer), ignore=("group",))}
    if config.shadow and k:
        # A panic restores the shadow: then, and only then, the parameters move, exactly there.
        changed -= {n for n in changed if n.startswith("parameter")}
        for p in params:
            assert torch.equal(p, optimizer.state[p]["shadow"])
    made = {n.rpartition(": ")[2] for n in contents(optimizer) if n.startswith("state")} if k == 0 else set()
    assert changed <= made
    for p in params:
        state = optimizer.state[p]
        assert float(state["step"]) == k
        if k == 0:
            assert (float(state["drive"]), float(state["trust"])) == (1.0, 0.0)
            assert all(not v.any() for n, v in state.items() if n not in ("drive", "shadow"))
    # Reflection and the norm's history have not seen this gradient.
    after = entries(optimizer)
    seen = ("steps", "reflections", "trust", "fast", "noise", "norms", "log_norm", "log_norm_var", "grad_norm")
    assert [n for n in seen if not torch.equal(after[n], feelings[n])] == []
    if not k:
        return
    was = math.exp(float(feelings["log_drive"]))
    lowest = min(felt_floor(optimizer), was)
    assert drive(optimizer) == pytest.approx(max(was / 10, lowest), rel=0.05)
    drives = []
    for t in range(k + 1, k + 11):
        optimizer.step(loss=valley.fill(params, t))
        drives.append(drive(optimizer))
        assert all(bool(p.isfinite().all()) for p in params)
    assert max(drives) >= 0.5 * was * (1 - 1e-6)
    assert optimizer.emotion.steps == k + 10


def felt_floor(optimizer):
    group = optimizer.param_groups[0]
    return group["lr_floor"] / group["lr"]


@configured(lambda c: not c.adaptive)
@ways
@pytest.mark.parametrize("capturable", [False, True], ids=["branching", "predicated"])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_bad_gradient_skips_the_step_of_a_preset(case, config, foreach, capturable, bad):
    params = weights(shapes=SHAPES[:3])
    optimizer = case.make(params, foreach=foreach, capturable=capturable, **config.kwargs)
    train(optimizer, params, 10)
    before = contents(optimizer)
    loss = Valley(params).fill(params, 10)
    params[0].grad[2, 1] = bad
    optimizer.step(loss=loss)
    assert (optimizer.emotion.steps, optimizer.emotion.skipped_steps) == (10, 1)
    assert differences(before, contents(optimizer), ignore=COUNTERS) == []


@siblings
def test_bad_gradients_in_a_row_do_not_cut_deeper(case):
    """A stretch of overflows is one panic, not ten; the drive comes back afterwards."""
    optimizer, params, losses = run(case, 15)
    was = drive(optimizer)
    for p in params:
        p.grad = torch.full_like(p, math.nan)
    for _ in range(12):
        optimizer.step(loss=losses[-1])
    assert optimizer.emotion.skipped_steps == 12
    assert drive(optimizer) == pytest.approx(was / 10, rel=0.05)
    valley = Valley(params, rise=range(0))
    drives = []
    for t in range(15, 27):
        optimizer.step(loss=valley.fill(params, t))
        drives.append(drive(optimizer))
    assert max(drives[:10]) >= 0.5 * was * (1 - 1e-6)


@siblings
def test_a_loss_spike_panics_and_heals(case):
    params = weights()
    optimizer = case.make(params)
    valley = Valley(params, rise=range(0))
    for t in range(30):
        loss = valley.fill(params, t)
        was = drive(optimizer)
        optimizer.step(loss=loss)
    valley.fill(params, 30)
    was = drive(optimizer)
    optimizer.step(loss=loss * 1e4)
    assert drive(optimizer) == pytest.approx(was / 10, rel=0.15)  # tension brakes a little on top
    assert optimizer.emotion.skipped_steps == 0
    drives = []
    for t in range(31, 60):
        optimizer.step(loss=valley.fill(params, t))
        drives.append(drive(optimizer))
    assert max(drives) >= 0.5 * was * (1 - 1e-6)


# Options that change in the middle -----------------------------------------------------------------------------------


@siblings
@ways
@pytest.mark.parametrize(
    ("option", "value"),
    [("lr", 1e-4), ("weight_decay", 2.0), ("betas", (0.5, 0.6)), ("lr_ceiling", 1e-5), ("lr_floor", 8e-3)],
)
def test_options_changed_in_the_middle_take_effect(case, foreach, option, value):
    runs = []
    for changes in (True, False):
        params = weights()
        optimizer = case.make([{"params": params[:3]}, {"params": params[3:]}], foreach=foreach, weight_decay=0.01)
        train(optimizer, params, 10)
        if changes:
            optimizer.param_groups[1][option] = value
        train(optimizer, params, 1, start=10)
        runs.append(contents(optimizer))
    changed = {n for n in differences(*runs, ignore=("group",)) if not n.endswith((": drive", ": trust"))}
    assert all(" 1." in n for n in changed), "a group felt the option of another"
    for i in range(len(SHAPES) - 3):
        assert {n for n in changed if f"1.{i}" in n}, f"tensor {i} did not feel {option}"


@siblings
@ways
def test_max_norm_scales_an_outlier_down_and_can_be_switched_off(case, foreach):
    """Against the run's own history; the direction stays, and 0 is off."""
    kept = {}
    for max_norm in (1.0, 0.25, 0.0):
        optimizer, params, _ = run(case, 20, foreach=foreach, told=None)
        optimizer.param_groups[0]["max_norm"] = max_norm
        before = {p: {k: v.clone() for k, v in optimizer.state[p].items()} for p in params}
        Valley(params).fill(params, 20)
        for p in params:
            p.grad.mul_(1e6)
        optimizer.step()
        # The vector's first memory took in (1 - beta) g: what is left of the outlier shows there.
        name, beta = "exp_avg", optimizer.param_groups[0]["betas"][0 if len(case.vector_state) > 1 else 1]
        took = (optimizer.state[params[1]][name] - beta * before[params[1]][name]) / (1 - beta)
        kept[max_norm] = float((took / params[1].grad).mean())
    assert kept[0.0] == pytest.approx(1.0, rel=1e-3)
    assert kept[0.25] < kept[1.0] < 1e-2


@siblings
@pytest.mark.parametrize("capturable", [False, True], ids=["branching", "predicated"])
def test_an_absurd_first_gradient_is_known_after_a_skipped_step(case, capturable):
    """The second gradient that can be used comes in a later call."""
    params = weights(shapes=((4,), (3, 2)))
    optimizer, memory = case.make(params, capturable=capturable), case.vector_state[-1]
    for size in (1e4, math.nan, 1.0, 1.0):
        for p in params:
            p.grad = torch.full_like(p, size)
        optimizer.step()
    assert float(optimizer.state[params[0]][memory].abs().max()) < 10


@siblings
@pytest.mark.parametrize("max_norm", [1.0, 0.0])
@pytest.mark.parametrize(
    "how",
    [{"foreach": False}, {"foreach": True}, {"capturable": True}, {}, {"state_dtype": "8bit"}],
    ids=["single", "foreach", "predicated", "kernel", "8bit"],
)
def test_an_absurd_first_gradient_leaves_nothing(case, how, max_norm):
    """By the second gradient the memories are as if the first had been as long as that; with ``max_norm=0`` not."""
    runs, low = [], "state_dtype" in how
    for factor in (1e4, None):
        params = weights(shapes=(*SHAPES, (130, 67)))
        optimizer, valley, norms = case.make(params, lr=1e-4, max_norm=max_norm, **how), Valley(params), []
        for t in (0, 1):
            valley.fill(params, t)
            norms.append(math.sqrt(sum(float(g.square().sum()) for g in valley.grads)))
        for t in range(12):
            valley.fill(params, t)
            for p in params if t == 0 else ():
                p.grad.mul_(norms[1] / norms[0] if factor is None else factor)
            optimizer.step()
            if low and t == 1:
                break  # what is rounded at random soon differs
        runs.append((params, optimizer))
    (params, spoilt), (others, clean) = runs
    close = {"rtol": 0.13 if low else 1e-3, "atol": 1e-4 if low else 1e-6}
    alike = all(
        torch.allclose(spoilt.state[p][name].float(), clean.state[q][name].float(), **close)
        for p, q in zip(params, others, strict=True)
        for name in clean.state[q]
        if clean.state[q][name].dtype != torch.uint8
    )
    assert alike == (max_norm > 0)
    if max_norm and not low:
        assert all(torch.allclose(p, q, rtol=1e-4, atol=1e-6) for p, q in zip(params, others, strict=True))


@siblings
def test_max_norm_waits_for_ten_norms_and_ignores_what_is_usual(case):
    _, on, _ = run(case, 40, max_norm=1.0)
    _, off, _ = run(case, 40, max_norm=0.0)
    assert all(torch.equal(p, q) for p, q in zip(on, off, strict=True))


@configured()
@ways
@pytest.mark.parametrize("tensor", [False, True], ids=["float", "tensor"])
def test_lr_zero_for_all_groups_changes_nothing(case, config, foreach, tensor):
    optimizer, params, _ = run(case, 10, foreach=foreach, **config.kwargs)
    zero = torch.tensor(0.0) if tensor else 0.0
    optimizer.param_groups[0]["lr"] = zero
    before = contents(optimizer)
    train(optimizer, params, 5, start=10)
    assert differences(before, contents(optimizer)) == []


@siblings
@ways
def test_warmup_from_lr_zero_at_construction(case, foreach):
    """The first lr above 0 stands in for the one at construction, so that the run starts with its proper drive."""
    params = weights()
    optimizer = case.make(params, lr=0.0, foreach=foreach)
    train(optimizer, params, 3)
    assert all(torch.equal(p, q) for p, q in zip(params, weights(), strict=True))
    optimizer.param_groups[0]["lr"] = case.lr
    train(optimizer, params, 20, start=3)
    assert optimizer.emotion.steps == 20
    assert all(bool(p.isfinite().all()) and not torch.equal(p, q) for p, q in zip(params, weights(), strict=True))
    other = weights()
    straight = case.make(other, lr=case.lr, foreach=foreach)
    train(straight, other, 20, start=3)
    for p, q in zip(params, other, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-7)


@configured(lambda c: c.description.startswith(("adaptive", "v3")) and not c.shadow)
@ways
def test_lr_zero_for_one_group(case, config, foreach):
    """Its parameters stay where they are, bitwise, and do not enter reflection; the others train."""
    params = weights()
    kwargs = {"weight_decay": 0.1} | config.kwargs
    optimizer = case.make([{"params": params[:3]}, {"params": params[3:], "lr": 0.0}], foreach=foreach, **kwargs)
    train(optimizer, params, 20)
    start = weights()
    assert all(torch.equal(p, q) for p, q in zip(params[3:], start[3:], strict=True))
    assert not any(torch.equal(p, q) for p, q in zip(params[:3], start[:3], strict=True))
    assert all(float(optimizer.state[p]["trust"]) == 0.0 for p in params[3:])
    assert optimizer.effective_lr[1] == 0.0


@siblings
@ways
def test_effective_lr_stays_between_min_lr_and_max_lr(case, foreach):
    for low, high in ((2e-3, 4e-3), (5e-3, 5e-3), (0.0, 1e-6)):
        params = weights()
        optimizer = case.make(params, foreach=foreach, min_lr=low, max_lr=high, weight_decay=0.0)
        valley = Valley(params)
        for t in range(30):
            before = [p.detach().clone() for p in params]
            write(optimizer, log_drive=6.0 * math.sin(t))
            loss = valley.fill(params, t)
            optimizer.step(loss=loss)
            assert low * (1 - 1e-9) <= optimizer.effective_lr[0] <= high * (1 + 1e-9)
            if "exp_avg" in case.matrix_state and case.scaling_tolerance == 0.0:
                # Lion moves each weight by exactly its effective lr.
                for p, b in zip(params, before, strict=True):
                    assert float((p - b).detach().abs().max()) <= high * 1.001 + 3e-7
    params = weights()
    optimizer = case.make(params, lr=1e-4, min_lr=1e-2, foreach=foreach)
    train(optimizer, params, 10)
    assert optimizer.effective_lr[0] >= 1e-4 * (1 - 1e-9)  # min(min_lr, lr): the floor is not above the group's lr


@siblings
@ways
def test_without_trust_the_drive_starts_at_one_and_returns_to_it(case, foreach):
    params = weights()
    optimizer = case.make(params, use_trust=False, foreach=foreach)
    valley = Valley(params, rise=range(0))
    for t in range(15):
        valley.fill(params, t)
        optimizer.step(loss=1.0)
        assert drive(optimizer) == 1.0
        assert felt(optimizer, "trust") == 0.0
        assert all(float(optimizer.state[p]["drive"]) == 1.0 for p in params)
    # The level rises by far more than the losses' noise, and stays there.
    lowest = 1.0
    for t in range(15, 200):
        valley.fill(params, t)
        optimizer.step(loss=1.0 + 0.1 * min(t - 15, 15) + 0.05 * math.sin(9.7 * t * t))
        assert drive(optimizer) <= 1.0 + 1e-12
        lowest = min(drive(optimizer), lowest)
    assert lowest < 0.95, "rising losses did not brake"
    assert drive(optimizer) > 0.9


@siblings
def test_a_plateau_without_noise_does_not_brake_for_ever(case):
    """After a rise the loss stands still: tension has to end, or the drive falls until nothing moves."""
    params = weights()
    optimizer = case.make(params, use_trust=False)
    valley = Valley(params, rise=range(0))
    for t in range(15):
        valley.fill(params, t)
        optimizer.step(loss=1.0 + 0.05 * math.sin(9.7 * t * t))
    for t in range(15, 200):
        valley.fill(params, t)
        optimizer.step(loss=1.0 + 0.1 * min(t - 15, 15))
    assert drive(optimizer) > 0.9


@siblings
@ways
def test_weight_decay_follows_the_drive(case, foreach):
    """With zero gradients: p *= 1 - lr drive wd, whatever the tensor's own drive; of p a thousandth goes at most."""
    for moods, decay in (([1.0, 0.25, 3.0], 0.03), ([1.0, 30.0], 10.0)):
        params = weights(torch.float64)
        optimizer = case.make(params, weight_decay=decay, foreach=foreach, use_trust=False)
        expected = [p.detach().clone() for p in params]
        for t, mood in enumerate(moods):
            for p in params:
                p.grad = torch.zeros_like(p)
                if t:
                    optimizer.state[p]["drive"].fill_(1.7)
            if t:
                write(optimizer, log_drive=math.log(mood))
            optimizer.step(loss=1.0)
            for p, e in zip(params, expected, strict=True):
                e.mul_(max(0.999, 1 - case.lr * mood * decay))
                torch.testing.assert_close(p.detach(), e, rtol=1e-12, atol=0)


@configured(lambda c: "decoupled_weight_decay" in c.kwargs)
def test_decoupled_weight_decay_divides_by_the_lr_at_construction(case, config):
    """lr 0.01 with decay 1e-3, decoupled, is lr 0.01 with decay 0.1; a scheduler then scales it."""
    runs = []
    for kwargs in ({"weight_decay": 1e-3, "decoupled_weight_decay": True}, {"weight_decay": 0.1}):
        params = weights(torch.float64)
        optimizer = case.make(params, lr=1e-2, **kwargs)
        train(optimizer, params, 5)
        optimizer.param_groups[0]["lr"] = 5e-3
        train(optimizer, params, 5, start=5)
        runs.append(params)
    for p, q in zip(*runs, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-12)


@siblings
def test_a_schedule_in_its_end_phase_is_not_undone(case):
    """Once every lr is below half its peak, the drive may not exceed its earlier maximum."""
    params = weights()
    optimizer = case.make(params)
    valley = Valley(params, noise=0.0)
    for t in range(20):
        optimizer.step(loss=valley.fill(params, t))
    highest = max(felt(optimizer, "log_drive_peak"), felt(optimizer, "log_drive"))
    optimizer.param_groups[0]["lr"] = case.lr * 0.4
    for t in range(20, 80):
        optimizer.step(loss=valley.fill(params, t))
        assert felt(optimizer, "log_drive") <= highest + 1e-12
    free = weights()
    other = case.make(free)
    for t in range(80):
        other.step(loss=valley.fill(free, t))
    assert felt(other, "log_drive") > highest, "nothing wanted to grow: the test shows nothing"


# Shadow --------------------------------------------------------------------------------------------------------------


@siblings
def test_shadow_is_a_slow_average(case):
    """Made at the first step from the weights as they were; then inside what the weights have been."""
    params = weights()
    optimizer = case.make(params, use_shadow=True)
    valley = Valley(params)
    lows, highs = [p.detach().clone() for p in params], [p.detach().clone() for p in params]
    for t in range(40):
        optimizer.step(loss=valley.fill(params, t))
        for p, low, high in zip(params, lows, highs, strict=True):
            torch.minimum(low, p.detach(), out=low)
            torch.maximum(high, p.detach(), out=high)
            shadow = optimizer.state[p]["shadow"]
            assert bool((shadow >= low - 1e-6).all()) and bool((shadow <= high + 1e-6).all())


@pytest.mark.parametrize("make", [*CASES, "Emotional", "released"], ids=lambda m: getattr(m, "name", m))
def test_the_shadow_of_what_does_not_move_follows(make):
    """Of an expert that seldom has a gradient, of a layer that is frozen for good: calm() shows them as they are."""
    params = weights()
    if make == "Emotional":
        optimizer = emonavi.Emotional(torch.optim.SGD(params, lr=1e-2), use_shadow=True)
    else:
        case = CASES[0] if make == "released" else make
        optimizer = case.make(params, use_shadow=True, capture=make == "released")
    if make == "released":
        emonavi.gradient_release(optimizer)
    idle = params[0]

    def step(t, moving):
        if make == "released":
            sum((p * (p.detach() - 1)).sum() for p in moving).backward()
            optimizer.step()
            return
        optimizer.zero_grad()
        for p in moving:
            p.grad = p.detach() - 1
        optimizer.step(loss=1 / (1 + t))

    for t in range(8):
        step(t, params)
    assert not torch.equal(optimizer.state[idle]["shadow"], idle)
    for t in range(8, 12):
        before, weight = optimizer.state[idle]["shadow"].clone(), idle.detach().clone()
        step(t, params[1:])
        assert torch.equal(weight, idle)
        expected = torch.lerp(before, weight, 1 / (0.1 * (t + 1) + 1))
        torch.testing.assert_close(optimizer.state[idle]["shadow"], expected)


def wrapped(params, **options):
    return emonavi.Emotional(torch.optim.AdamW(params), **options)


all_makers = pytest.mark.parametrize(
    "make", [*(case.make for case in CASES), wrapped], ids=[*(case.name for case in CASES), "Emotional"]
)


@all_makers
def test_a_shadow_that_was_off_begins_at_todays_weights(make):
    """A NaN would else throw the run back to where it was switched off."""
    params = weights()
    optimizer = make(params, use_shadow=True)
    train(optimizer, params, 5)
    optimizer.param_groups[0]["use_shadow"] = False
    for p in params:
        p.grad = torch.ones_like(p)
    with (
        pytest.raises(RuntimeError, match=r"set param_groups\[0\]\['use_shadow'\] = True and make a step"),
        optimizer.calm(),
    ):
        pass
    optimizer.step(loss=1.0)
    assert not any("shadow" in s for s in optimizer.state.values())
    for p in params:
        p.data += 10.0
    optimizer.param_groups[0]["use_shadow"] = True
    with pytest.raises(RuntimeError, match="no shadow to show: the next step makes it"), optimizer.calm():
        pass
    optimizer.step(loss=1.0)
    for p in params:
        assert (optimizer.state[p]["shadow"] - p).abs().max() < 1


@all_makers
def test_a_step_at_lr_zero_drops_the_shadow_too(make):
    params = weights()
    optimizer = make(params, use_shadow=True)
    train(optimizer, params, 3)
    optimizer.param_groups[0] |= {"use_shadow": False, "lr": 0.0}
    optimizer.step(loss=1.0)
    assert not any("shadow" in s for s in optimizer.state.values())


@pytest.mark.parametrize("make", [*CASES, "Emotional"], ids=lambda m: getattr(m, "name", m))
@pytest.mark.parametrize("bounds", [{"lr": 1e-6}, {"lr": 1e-3, "max_lr": 1e-5}], ids=["floor", "wall"])
def test_a_step_without_a_group_does_not_move_its_lr(make, bounds):
    """The bounds of the others would force the drive that all share to where it suits only them."""
    params = weights()
    groups = [{"params": params[:2], "lr": 1e-3}, {"params": params[2:], **bounds}]
    if make == "Emotional":
        optimizer = emonavi.Emotional(torch.optim.AdamW([{k: g[k] for k in ("params", "lr")} for g in groups]))
        optimizer.param_groups[1]["lr_ceiling"] = bounds.get("max_lr")
    else:
        optimizer = make.make(groups)
    train(optimizer, params, 15)
    before = optimizer.effective_lr[0]
    for p in params[:2]:
        p.grad = None
    optimizer.step(loss=1.0)
    assert 0.8 < optimizer.effective_lr[0] / before < 1.25


@siblings
def test_groups_of_another_optimizer_bring_no_past(case):
    """Their options, not what a schedule once made of their lr."""
    params = weights()
    old = case.make(params, lr=1e-3)
    old.param_groups[0]["lr"] = 1.0
    train(old, params, 3)
    old.param_groups[0]["lr"] = 1e-3
    new = case.cls([{**group} for group in old.param_groups])
    assert (new.param_groups[0]["lr_start"], new.param_groups[0]["lr_peak"]) == (1e-3, 0.0)
    assert new.emotion.steps == 0


def test_bounds_hold_for_each_tensors_own_drive():
    own, one = torch.tensor([0.2, 1.0, 5.0], dtype=torch.float64), torch.ones(3, dtype=torch.float64)
    active = Active(None, [], one, 0.5 * one, 2 * one, 0 * one, one, own, one)
    rates = active.rates(Mood(1.0, 1.0, None, 1.0, 0.0, 0.0, 0.0, 0.0))[0]
    assert rates.tolist() == [0.5, 1.0, 2.0]


@pytest.mark.parametrize("make", [*CASES, "Emotional"], ids=lambda m: getattr(m, "name", m))
def test_a_panic_moves_no_group_at_lr_zero(make):
    params = weights()
    groups = [{"params": params[:2]}, {"params": params[2:]}]
    if make == "Emotional":
        optimizer = emonavi.Emotional(torch.optim.SGD(groups, lr=1e-2), use_shadow=True)
    else:
        optimizer = make.make(groups, use_shadow=True)
    train(optimizer, params, 12)
    optimizer.param_groups[0]["lr"] = 0.0
    still, moving = [p.detach().clone() for p in params[:2]], params[2].detach().clone()
    for p in params:
        p.grad = torch.full_like(p, math.nan)
    optimizer.step(loss=1.0)
    assert all(torch.equal(p, q) for p, q in zip(params[:2], still, strict=True))
    assert not torch.equal(params[2], moving)  # there it was restored


@siblings
def test_a_shadow_does_not_change_a_calm_run_by_itself_being_there(case):
    """The shadow is a copy beside the weights: without a panic the update reads it only through the policy."""
    _, plain, _ = run(case, 20, use_trust=False)
    _, shadowed, _ = run(case, 20, use_trust=False, use_shadow=True)
    assert all(torch.equal(p, q) for p, q in zip(plain, shadowed, strict=True))


# Stages and groups ---------------------------------------------------------------------------------------------------


@configured()
def test_reset_emotion(case, config):
    """Weights and moments as they are, the emotion as new."""
    optimizer, params, _ = run(case, 25, **config.kwargs)
    before = contents(optimizer)
    fresh = case.make(weights(), **config.kwargs)
    optimizer.reset_emotion()
    changed = differences(before, contents(optimizer))
    assert {n.rpartition(": ")[2] for n in changed} <= {"emotion", "lr_peak", "drive", "trust", "shadow"}
    assert torch.equal(vector(optimizer), vector(fresh))
    for p in params:
        assert (float(optimizer.state[p]["drive"]), float(optimizer.state[p]["trust"])) == (1.0, 0.0)
        assert float(optimizer.state[p]["step"]) == 25
        if "shadow" in optimizer.state[p]:
            assert torch.equal(optimizer.state[p]["shadow"], p)
    assert optimizer.emotion.steps == 0
    assert not optimizer.should_stop
    train(optimizer, params, 5, start=25)
    assert optimizer.emotion.steps == 5
    assert optimizer.emotion.scalar != 0.0


@siblings
@ways
def test_frozen_parameters_and_all_none(case, foreach):
    params = weights()
    params[1].requires_grad_(False)
    optimizer = case.make(params, foreach=foreach)
    before = contents(optimizer)
    optimizer.step(loss=1.0)  # no gradient anywhere: not a step
    assert differences(before, contents(optimizer)) == []
    valley = Valley(params)
    for t in range(5):
        valley.fill(params, t)
        params[1].grad = None
        optimizer.step(loss=1.0)
    assert torch.equal(params[1], weights()[1])
    assert params[1] not in optimizer.state or not optimizer.state[params[1]]
    assert optimizer.emotion.steps == 5


@siblings
@ways
def test_frozen_parameters_of_any_kind(case, foreach):
    """As in a LoRA on a quantized model, all of whose parameters are passed."""
    kinds = (torch.int8, torch.float8_e4m3fn, torch.complex64)
    frozen = [torch.nn.Parameter(torch.ones(3, 2).to(kind), requires_grad=False) for kind in kinds]
    frozen.append(torch.nn.Parameter(torch.eye(2).to_sparse(), requires_grad=False))
    runs = []
    for beside in ([], frozen):
        params = weights()
        optimizer = case.make([*beside, *params], foreach=foreach, use_shadow=True)
        train(optimizer, params, 12)
        fresh = case.make([*beside, *params], foreach=foreach, use_shadow=True)
        fresh.load_state_dict(optimizer.state_dict())
        train(fresh, params, 3, start=12)
        runs.append(params)
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))
    params[0].grad, frozen[0].grad = torch.ones_like(params[0]), torch.ones_like(frozen[0])
    before = contents(fresh)
    with pytest.raises(ValueError, match=r"int8: only real floating-point ones .* without a gradient"):
        fresh.step(loss=1.0)
    assert differences(before, contents(fresh), ignore=(" 0.1", " 0.3")) == []  # not to be compared by nan_to_num


@siblings
def test_leaf_tensors_that_do_not_require_grad(case):
    """torch's optimizers move any leaf that has a .grad."""
    tensors = [torch.ones(3), torch.ones(2, 2)]
    optimizer = case.make(tensors)
    for t in tensors:
        t.grad = torch.ones_like(t)
    optimizer.step(loss=1.0)
    assert all(bool((t < 1).all()) for t in tensors)


@siblings
@ways
def test_empty_group_and_a_gradient_that_appears_late(case, foreach):
    params = weights()
    late = params[2]
    optimizer = case.make([{"params": []}, {"params": params}, {"params": []}], foreach=foreach)
    valley = Valley(params)
    for t in range(12):
        loss = valley.fill(params, t)
        if t < 8:
            late.grad = None
        optimizer.step(loss=loss)
        assert torch.equal(late, weights()[2]) == (t < 8)
    assert float(optimizer.state[late]["step"]) == 4
    assert float(optimizer.state[params[0]]["step"]) == 12
    assert len(optimizer.effective_lr) == 3
    assert optimizer.emotion.steps == 12


@configured()
@ways
def test_group_added_later(case, config, foreach):
    """It has its own step count (bias correction) and drive; the emotion goes on and the old tensors do not notice."""
    # Presets freeze where |scalar| is near 1: losses near 0 keep it small.
    optimizer, params, _ = run(case, 12, told=lambda x: 1e-3 * x, foreach=foreach, **config.kwargs)
    steps = optimizer.emotion.steps
    added = torch.nn.Parameter(torch.full((4, 3), 2.0))
    before = vector(optimizer).clone()
    walls = {"max_lr": None} if config.adaptive else {}
    optimizer.add_param_group({"params": [added], "weight_decay": 0.0} | walls)
    assert torch.equal(before, vector(optimizer))
    everything = [*params, added]
    valley = Valley(everything)
    valley.fill(everything, 12)
    optimizer.step(loss=1e-2)
    assert optimizer.emotion.steps == steps + 1
    state = optimizer.state[added]
    assert (float(state["step"]), float(state["drive"])) == (1.0, 1.0)
    assert float(optimizer.state[params[0]]["step"]) == 13
    assert len(optimizer.effective_lr) == 2
    moved = float((added.detach() - 2).abs().max())
    assert moved > 0
    if config.adaptive:
        # Corrected for its own first step; uncorrected, the first Adam steps are 3 to 7 times as long.
        was = math.exp(float(before[State._fields.index("log_drive")]))
        assert moved <= 3.5 * optimizer.param_groups[0]["lr"] * max(1.0, was)
    train(optimizer, everything, 5, start=13)
    assert float(state["step"]) == 6


@siblings
@ways
@pytest.mark.parametrize("edit", ["taken out", "moved back", "all replaced"])
def test_the_first_group_may_be_edited(case, foreach, edit):
    """As where layers are frozen for good. The emotion, which is kept there, goes on in the one that is first then."""
    params = weights()
    optimizer = case.make([{"params": params[:2]}, {"params": params[2:]}], foreach=foreach)
    train(optimizer, params, 12)
    before = vector(optimizer).clone()
    first = optimizer.param_groups.pop(0)
    if edit == "taken out":
        for p in first["params"]:
            del optimizer.state[p]  # as for any of torch's optimizers
    elif edit == "moved back":
        optimizer.param_groups.append(first)
    else:
        optimizer.param_groups.clear()
        optimizer.add_param_group({"params": params, "foreach": foreach})
    assert optimizer.emotion.steps == 12
    assert torch.equal(before, vector(optimizer))
    train(optimizer, params, 3, start=12)
    assert optimizer.emotion.steps == 15
    fresh = case.make([{"params": g["params"]} for g in optimizer.param_groups], foreach=foreach)
    fresh.load_state_dict(optimizer.state_dict())
    assert torch.equal(vector(fresh), vector(optimizer))


def test_decoupled_decay_of_a_run_that_begins_at_lr_zero():
    """The first lr above 0 stands for the one that is meant, and in its own step already."""
    weight = torch.nn.Parameter(torch.ones(3))
    optimizer = emonavi.EmoLynx([weight], lr=0.0, weight_decay=0.1, decoupled_weight_decay=True, use_trust=False)
    group = optimizer.param_groups[0]
    for lr in (1e-3, 2e-3):
        group["lr"] = lr
        assert optimizer._decay_rate(group) * lr == pytest.approx(0.1)
        weight.grad = torch.ones(3)
        optimizer.step()


@siblings
def test_a_group_that_comes_back_is_as_it_was(case):
    """Taken out and given to ``add_param_group`` again, as where layers are frozen for a while."""
    params = weights()
    optimizer = case.make([{"params": params[:2]}, {"params": params[2:], "min_lr": 1e-5, "max_lr": 1e-3}])
    train(optimizer, params, 3)
    group = optimizer.param_groups.pop()
    before = {k: v for k, v in group.items() if k != "params"}
    optimizer.add_param_group(group)
    after = optimizer.param_groups[-1]
    assert {k: after[k] for k in before} == before
    assert (after["lr_floor"], after["lr_ceiling"]) == (1e-5, 1e-3)
    assert "min_lr" not in after
    group = optimizer.param_groups.pop()
    optimizer.add_param_group(group | {"max_lr": 1e-2})  # what is said there counts
    assert optimizer.param_groups[-1]["lr_ceiling"] == 1e-2


@siblings
@pytest.mark.parametrize("emotion", ["adaptive", "published"])
def test_a_default_device_is_not_asked(case, emotion):
    """As while a large model is built on the meta device."""
    params = weights()
    generations = emonavi.create(case.name, weights())._generations
    kwargs = {} if emotion == "adaptive" or not generations else {"emotion": generations[-1]}
    optimizer = case.make(params, **kwargs)
    for p in params:
        p.grad = torch.ones_like(p)
    torch.set_default_device("meta")
    try:
        optimizer.step(loss=1.0)
        optimizer.step(loss=0.5)
        assert vector(optimizer).device.type == "cpu"
    finally:
        torch.set_default_device(None)
    assert optimizer.emotion.steps == 2


@siblings
@ways
def test_a_replaced_parameter_is_not_kept_alive(case, foreach):
    """As where an embedding is resized."""
    params = weights()
    optimizer = case.make(params, foreach=foreach)
    train(optimizer, params, 3)
    old = weakref.ref(params[0])
    del optimizer.state[params[0]]
    params[0] = optimizer.param_groups[0]["params"][0] = torch.nn.Parameter(torch.ones(9, 4))
    train(optimizer, params, 2, start=3)
    assert old() is None
    assert optimizer.state[params[0]]["step"] == 2


@siblings
def test_effective_lr_is_lr_times_drive_for_each_group(case):
    params = weights()
    optimizer = case.make([{"params": params[:2], "lr": 1e-2}, {"params": params[2:], "lr": 3e-3}])
    assert optimizer.effective_lr == pytest.approx([1e-2, 3e-3]) or optimizer.effective_lr[0] <= 1e-2
    train(optimizer, params, 8)
    assert optimizer.effective_lr == pytest.approx([1e-2 * drive(optimizer), 3e-3 * drive(optimizer)])
    optimizer.param_groups[1]["lr"] = 1e-3
    assert optimizer.effective_lr[1] == pytest.approx(1e-3 * drive(optimizer))


# What is seen from outside -------------------------------------------------------------------------------------------


@configured()
def test_snapshot(case, config):
    optimizer = case.make(weights(), **config.kwargs)
    snapshot = optimizer.emotion
    assert (snapshot.steps, snapshot.skipped_steps, snapshot.ignored_losses, snapshot.should_stop) == (0, 0, 0, False)
    assert math.isnan(snapshot.loss) and math.isnan(snapshot.short)
    optimizer, params, losses = run(case, 10, **config.kwargs)
    before = contents(optimizer)
    snapshot = optimizer.emotion
    assert snapshot.loss == pytest.approx(losses[-1])
    assert min(losses) <= snapshot.short <= max(losses)
    assert min(losses) <= snapshot.long <= max(losses)
    assert snapshot.steps == 10
    assert -1 <= snapshot.scalar <= 1
    assert snapshot.drive > 0
    assert isinstance(snapshot.mood, str)
    assert snapshot.grad_norm == pytest.approx(
        math.sqrt(sum(float((p.grad.double() ** 2).sum()) for p in params)), rel=1e-5
    )
    assert math.isnan(snapshot.trust) != config.adaptive
    with pytest.raises(AttributeError):
        snapshot.drive = 1.0
    assert differences(before, contents(optimizer)) == [], "reading changed something"


@siblings
def test_hooks_fire_once(case):
    params = weights()
    optimizer = case.make(params)
    calls = []
    optimizer.register_step_pre_hook(lambda *_: calls.append("pre"))
    optimizer.register_step_post_hook(lambda *_: calls.append("post"))
    train(optimizer, params, 2)
    assert calls == ["pre", "post"] * 2


@configured()
def test_repr(case, config):
    text = repr(case.make(weights(), **config.kwargs))
    assert text.startswith(f"{case.name} (")
    for option in ("lr: 0.01", "betas", "weight_decay", "foreach"):
        assert option in text
    assert "tensor(" not in text, "the emotion's state is no option"


@siblings
def test_nothing_is_kept_alive(case):
    optimizer, params, _ = run(case, 3)
    gone = weakref.ref(optimizer)
    del optimizer
    assert gone() is None
    assert params[0].grad is not None


@siblings
def test_writer_gets_the_documented_tags(case):
    class Writer:
        def __init__(self):
            self.seen = []

        def add_scalar(self, tag, value, step):
            self.seen.append((tag, value, step))

    writer = Writer()
    run(case, 12, writer=writer)
    last = {tag: value for tag, value, step in writer.seen if step == 12}
    tags = {"lr/group_0", "scalar", "trust", "drive", "tension", "loss_short", "loss_long", "grad_norm", "should_stop"}
    assert set(last) == {f"emo/{t}" for t in tags}
    assert all(isinstance(v, float) for v in last.values())
    assert [s for t, _, s in writer.seen if t == "emo/drive"] == list(range(1, 13))


class Peak(TorchDispatchMode):
    """Bytes of the tensors alive at once among those that operators made."""

    def __init__(self):
        super().__init__()
        self.alive, self.peak, self.held = 0, 0, {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        given = {t.untyped_storage().data_ptr() for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        for t in tree_leaves(result):
            if isinstance(t, torch.Tensor):
                place = t.untyped_storage().data_ptr()
                if place in self.held:
                    self.held[place][0] += 1
                elif place not in given and place:
                    self.held[place] = [1, t.untyped_storage().nbytes()]
                    self.alive += self.held[place][1]
                    self.peak = max(self.peak, self.alive)
                else:
                    continue
                weakref.finalize(t, self._freed, place)
        return result

    def _freed(self, place):
        entry = self.held.get(place)
        if entry is not None:
            entry[0] -= 1
            if not entry[0]:
                self.alive -= entry[1]
                del self.held[place]


@siblings
@pytest.mark.parametrize("kwargs", [{}, {"capturable": True}, {"use_shadow": True}], ids=str)
def test_peak_memory_of_a_foreach_step(case, kwargs):
    """Temporaries of a step stay well below the parameters' bytes: they do not grow with the model."""
    params = [torch.nn.Parameter(torch.randn(256, 256)) for _ in range(256)]  # 64 MiB
    optimizer = case.make(params, foreach=True, **kwargs)
    for p in params:
        p.grad = torch.randn_like(p)
    optimizer.step(loss=1.0)
    size = sum(p.numel() * p.element_size() for p in params)
    with Peak() as peak:
        optimizer.step(loss=1.0)
    assert 0 < peak.peak < size / 4, f"{peak.peak / 2**20:.1f} MiB of temporaries for {size / 2**20:.0f} MiB"


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells the peak of resident memory")
def test_resident_memory_of_a_first_foreach_step():
    """Nothing held from piece to piece breaks up the memory that each piece leaves to the next."""
    code = """
import torch, emonavi
from emonavi.bench.step import _extra_memory
param = torch.nn.Parameter(torch.randn(4096, 4096))
param.grad = torch.randn(4096, 4096)
optimizer = emonavi.EmoNavi([param], foreach=True, capture=False)
print(_extra_memory(lambda: optimizer.step(loss=1.0)) / param.nbytes)
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert 1.9 < float(run.stdout) < 2.8, "the memories alone are twice the parameter"


@siblings
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float32])
def test_shadow_of_a_model_whose_precision_changes(case, dtype):
    params = weights(dtype=torch.float64 if dtype == torch.float32 else torch.float32)
    optimizer = case.make(params, use_shadow=True)
    train(optimizer, params, 3)
    for p in params:
        p.grad = None
        p.data = p.data.to(dtype)
    train(optimizer, params, 30, start=3)
    train(optimizer, params, 1, start=33, loss=lambda x: 1e9)  # a panic restores the shadow
    assert felt(optimizer, "rest") > 0
    with optimizer.calm():
        assert all(bool(p.isfinite().all()) for p in params)
    assert optimizer.emotion.steps == 34


@siblings
def test_deepcopy_is_another_run(case):
    optimizer, _, _ = run(case, 5)
    before = contents(optimizer)
    twin = copy.deepcopy(optimizer)
    train(twin, twin.param_groups[0]["params"], 5, start=5)
    assert differences(before, contents(optimizer)) == []
    assert twin.emotion.steps == 10


@siblings
def test_a_group_at_lr_zero_with_the_only_gradient_is_no_step(case):
    a, b = (torch.nn.Parameter(torch.ones(2)) for _ in range(2))
    optimizer = case.make([{"params": [a], "lr": 0.0}, {"params": [b], "lr": 0.0}])
    optimizer.param_groups[1]["lr"] = 1e-3
    a.grad = torch.ones(2)
    optimizer.step(loss=1.0)
    assert a.tolist() == [1.0, 1.0]
    assert optimizer.emotion.steps == 0


@siblings
def test_the_drive_heals_where_no_loss_is_heard_any_more(case):
    weight = torch.nn.Parameter(torch.ones(4))
    optimizer = case.make([weight], lr=1e-3, use_trust=False, capture=False, on_missing_loss="ignore")
    for step in range(40):
        weight.grad = torch.ones(4)
        optimizer.step(loss=1.0 + 0.01 * math.sin(9.7 * step * step) + 0.02 * max(0, step - 20))
    assert optimizer.emotion.drive < 0.99
    for _ in range(60):
        weight.grad = torch.ones(4)
        optimizer.step()
    assert optimizer.emotion.drive == pytest.approx(1.0)


@siblings
def test_a_loss_that_is_taken_for_a_closure(case):
    params = weights()
    optimizer = case.make(params)
    for p in params:
        p.grad = torch.ones_like(p)
    for loss in (torch.tensor(1.0), 1.0):
        with pytest.raises(TypeError, match=r"step\(loss=loss\)"):
            optimizer.step(loss)
    assert optimizer.emotion.steps == 0


@siblings
def test_losses_that_are_never_finite_are_warned_of_once(case):
    params = weights()
    optimizer = case.make(params)
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        for t in range(60):
            for p in params:
                p.grad = torch.ones_like(p)
            optimizer.step(loss=1.0 if t == 5 else math.nan)
    assert [w for w in heard if "ignored 20 losses in a row" in str(w.message)] == heard[:1]
    assert len(heard) == 1 and heard[0].filename == __file__


@siblings
def test_parameters_without_a_gradient_are_warned_of_each_time_that_it_begins(case):
    """Made from another model, or too early; or the model was wrapped, copied or frozen since: nothing would move."""
    params = weights()
    optimizer = case.make(params)
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        for _ in range(50):
            optimizer.step(loss=1.0)
        for p in params:
            p.grad = torch.ones_like(p)
        for _ in range(2):
            optimizer.step(loss=1.0)
        optimizer.zero_grad()
        for _ in range(50):
            optimizer.step(loss=1.0)
    assert ["no parameter of this" in str(w.message) for w in heard] == [True, True]
    assert heard[0].filename == heard[1].filename == __file__
