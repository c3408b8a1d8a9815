"""Gradients released inside backward: the run is that of a plain reference, and gradients do not pile up."""

import copy
import gc
import math
import re
import subprocess
import sys
import warnings
import weakref
from pathlib import Path

import pytest
import torch
from cases import contents, differences, siblings, vector
from test_checkpoint import through_file

import emonavi
from emonavi.active import Active, Found, Roster, note_peaks
from emonavi.distributed import Ranks
from emonavi.machine import Sums
from emonavi.sweep import all_norms


def model_of(seed=0):
    torch.manual_seed(seed)
    return torch.nn.Sequential(torch.nn.Linear(6, 24), torch.nn.Tanh(), torch.nn.Linear(24, 24), torch.nn.Linear(24, 1))


def loss_of(model, t):
    generator = torch.Generator().manual_seed(t)
    x = torch.randn(16, 6, generator=generator)
    return (model(x) - x.prod(1, keepdim=True) - x[:, :1]).square().mean()


def made(case, **kwargs):
    model = model_of()
    return model, case.make(model.parameters(), foreach=False, **kwargs)


def active_of(optimizer, found):
    found = Found([p for p, _ in found], [i for _, i in found], [p.grad for p, _ in found])
    roster = Roster.of(found, optimizer.state, len(optimizer.param_groups), fused=False)
    return Active.of(roster, found.grads, optimizer.param_groups, optimizer._decay_rate, vector(optimizer))


@torch.no_grad()
def plain(optimizer, loss):
    """One step as gradient release makes it, with all gradients at hand: moved by the mood of the step before."""
    emotion, groups, state = optimizer._emotion, optimizer.param_groups, vector(optimizer)
    found = [(p, i) for i, g in enumerate(groups) for p in g["params"]]
    for p, _ in found:
        optimizer._make_state(p)
    active = active_of(optimizer, found)
    note_peaks(groups)
    options = active.options(groups, optimizer._target, optimizer._fall, optimizer._fades, plain=True)
    felt = emotion.unpack(state, plain=True)
    if not optimizer._begun:
        felt = emotion.begin(felt, optimizer._weights(state, Ranks()), options)
    mood = emotion.mood(felt, True, 1.0, options)._replace(follow=0.0)
    finite = [bool(p.grad.isfinite().all()) for p, _ in found]
    sums = torch.zeros(4, len(found), dtype=torch.float64)
    for i, (p, g) in enumerate(found):
        one = active_of(optimizer, [(p, g)])
        part = optimizer._sweep(one, optimizer._buckets(one, False), mood, finite[i], options, i)
        sums[:, i] = torch.cat([part.products[:, 0], part.weight])
    felt = emotion.feel(felt, loss, 1)
    felt, acts, _ = emotion.guard(felt, torch.linalg.vector_norm(all_norms(active.grads, state)), options)
    if groups[0]["use_shadow"]:
        after = emotion.mood(felt, acts, 1.0, options)
        for p, _ in found:
            shadow = optimizer.state[p]["shadow"]
            if after.pull:
                p.data.copy_(shadow)
            shadow.lerp_(p, after.follow)
    sums = Sums(sums[:3], sums[3])
    felt = emotion.reflect(felt, sums, acts, options)._replace(last_scalar=mood.scalar)
    each = emotion.reflect_each(felt, active.drive, active.trust, active.steps - 1, sums)
    active.keep(torch.tensor(finite), *each)
    state.copy_(emotion.pack(felt))
    optimizer._calls += 1


@siblings
@pytest.mark.parametrize(
    "kwargs", [{}, {"use_shadow": True}, {"use_trust": False, "state_dtype": "bf16", "weight_decay": 0.1}], ids=str
)
@pytest.mark.parametrize("bad", [None, "one tensor", "loss"], ids=str)
def test_equals_the_plain_reference_bit_by_bit(case, kwargs, bad):
    runs = []
    for released in (True, False):
        model, optimizer = made(case, capture=True, **kwargs)
        handle = emonavi.gradient_release(optimizer) if released else None
        spoil = {"one tensor": 12}.get(bad, -1)
        for t in range(18):
            hook = model[2].weight.register_hook(lambda g: g * math.nan) if t == spoil else None
            loss = loss_of(model, t) * (math.nan if bad == "loss" and t == 12 else 1.0)
            loss.backward()
            if released:
                assert all(p.grad is None for p in model.parameters())
                assert float(optimizer.step()) == pytest.approx(float(loss.detach()), nan_ok=True)
            else:
                plain(optimizer, loss.item())
                optimizer.zero_grad()
            if hook:
                hook.remove()
        if handle:
            handle.remove()
        runs.append(optimizer)
        assert (optimizer.emotion.steps, optimizer.emotion.skipped_steps) == ((17, 1) if bad else (18, 0))
        steps = {float(optimizer.state[p]["step"]) for p in model.parameters()}
        assert steps == {"one tensor": {17.0, 18.0}, "loss": {17.0}, None: {18.0}}[bad]
        assert all(bool(p.isfinite().all()) for p in model.parameters())
    for optimizer in runs:
        optimizer._intake.clear()
    assert differences(*map(contents, runs)) == []


@siblings
def test_it_trains_as_well_as_the_normal_step(case):
    ends = []
    for released in (True, False):
        model, optimizer = made(case, capture=True)
        if released:
            emonavi.gradient_release(optimizer)
        for t in range(150):
            optimizer.zero_grad()
            loss_of(model, t).backward()
            optimizer.step()
        with torch.no_grad():
            ends.append(sum(float(loss_of(model, t)) for t in range(1000, 1010)))
    with torch.no_grad():
        first = sum(float(loss_of(model_of(), t)) for t in range(1000, 1010))
    assert max(ends) < 0.8 * first
    assert ends[0] == pytest.approx(ends[1], rel=0.1)


@siblings
def test_resumes_bit_by_bit(case):
    model, optimizer = made(case, capture=True, use_shadow=True)
    emonavi.gradient_release(optimizer)

    def run(model, optimizer, start):
        for t in range(start, start + 6):
            loss_of(model, t).backward()
            optimizer.step()

    run(model, optimizer, 0)
    twin, fresh = made(case, capture=True, use_shadow=True)
    twin.load_state_dict(copy.deepcopy(model.state_dict()))
    fresh.load_state_dict(through_file(optimizer.state_dict()))
    emonavi.gradient_release(fresh)
    run(model, optimizer, 6)
    run(twin, fresh, 6)
    assert differences(contents(optimizer), contents(fresh)) == []


@siblings
def test_one_gradient_at_a_time(case):
    """When the last gradient comes, those of the layers behind it are gone."""
    layers = [torch.nn.Linear(30, 30) for _ in range(6)]
    model = torch.nn.Sequential(*layers)
    optimizer = case.make(model.parameters())
    emonavi.gradient_release(optimizer)
    there = []
    layers[0].weight.register_hook(lambda _: there.append(sum(p.grad is not None for p in model.parameters())))
    model(torch.ones(2, 30)).sum().backward()
    optimizer.step()
    assert there == [0]


def test_lr_zero_moves_nothing_and_frees_all_the_same():
    model = model_of()
    optimizer = emonavi.EmoNavi(model.parameters(), lr=0.0)
    emonavi.gradient_release(optimizer)
    before = contents(optimizer)
    loss_of(model, 0).backward()
    optimizer.step()
    changed = differences(before, contents(optimizer))
    assert [n for n in changed if not n.startswith("state")] == []
    assert all(p.grad is None for p in model.parameters())
    assert optimizer.emotion.steps == 0


def test_the_example_measures():
    example = Path(__file__).parents[1] / "examples" / "gradient_release.py"
    command = [sys.executable, example, "--small", "--way", "released-8bit"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr[-2000:]
    assert re.search(r"released-8bit +\d+ MB, +\d+\.\d\d bytes for each parameter; loss 0\.9", result.stdout)


def test_a_missing_loss_that_is_an_error_can_still_be_told():
    model = model_of()
    optimizer = emonavi.EmoNavi(model.parameters(), capture=False, on_missing_loss="error")
    emonavi.gradient_release(optimizer)
    loss_of(model, 0).backward()
    with pytest.raises(RuntimeError, match="no loss"):
        optimizer.step()
    optimizer.step(loss=1.0)
    assert optimizer.emotion.steps == 1
    assert {float(optimizer.state[p]["step"]) for p in model.parameters()} == {1.0}


def test_what_is_refused():
    model = model_of()
    optimizer = emonavi.EmoNavi(model.parameters())
    handle = emonavi.gradient_release(optimizer)
    with pytest.raises(RuntimeError, match="released already"):
        emonavi.gradient_release(optimizer)
    loss_of(model, 0).backward()
    for what, name in ((optimizer.state_dict, "state_dict"), (handle.remove, "remove")):
        with pytest.raises(RuntimeError, match=rf"{name}\(\) between backward and step\(\)"):
            what()
    weights = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(RuntimeError, match="a second gradient of one parameter before step"):
        loss_of(model, 1).backward()
    assert all(torch.equal(p, w) for p, w in zip(model.parameters(), weights, strict=True))
    optimizer.zero_grad()
    optimizer.step()
    handle.remove()
    loss_of(model, 2).backward()
    assert all(p.grad is not None for p in model.parameters())
    assert optimizer.emotion.steps == 1
    optimizer.step()
    assert optimizer.emotion.steps == 2
    with pytest.raises(ValueError, match=r"emotion 'v4'.*emotion='adaptive'"):
        emonavi.gradient_release(emonavi.EmoNavi(model_of().parameters(), emotion="v4"))
    with pytest.raises(TypeError, match="holds no optimizer that listens"):
        emonavi.gradient_release(torch.optim.SGD(model_of().parameters()))


def test_a_release_that_was_removed_leaves_a_later_one_alone():
    model = model_of()
    optimizer = emonavi.EmoNavi(model.parameters())
    first = emonavi.gradient_release(optimizer)
    first.remove()
    second = emonavi.gradient_release(optimizer)
    first.remove()
    loss_of(model, 0).backward()
    optimizer.step()
    assert optimizer._release is second and optimizer._intake.releases
    assert optimizer.emotion.steps == 1 and all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("what", ["reset_emotion", "load_state_dict", "deepcopy", "calm"])
def test_nothing_comes_between_backward_and_step(what):
    model = model_of()
    optimizer = emonavi.EmoNavi(model.parameters(), use_shadow=True)
    emonavi.gradient_release(optimizer)
    loss_of(model, 0).backward()
    optimizer.step()
    saved = optimizer.state_dict()
    loss_of(model, 1).backward()
    with pytest.raises(RuntimeError, match="between backward and step"):
        if what == "deepcopy":
            copy.deepcopy(optimizer)
        elif what == "calm":
            optimizer.calm().__enter__()
        else:
            getattr(optimizer, what)(*([saved] if what == "load_state_dict" else []))
    optimizer.step()
    assert optimizer.emotion.steps == 2


def test_tensors_alike_are_not_rounded_alike():
    params = [torch.nn.Parameter(torch.ones(4096, dtype=torch.bfloat16)) for _ in range(2)]
    optimizer = emonavi.EmoNavi(params, lr=1e-3, capture=False, on_missing_loss="ignore")
    emonavi.gradient_release(optimizer)
    for _ in range(3):
        sum((p.float() * torch.linspace(-1, 1, 4096)).sum() for p in params).backward()
        optimizer.step()
    assert (params[0] == params[1]).float().mean() < 0.9


def test_a_loss_observed_at_lr_0_does_not_stay():
    model = model_of()
    optimizer = emonavi.EmoNavi(model.parameters(), lr=1e-3, capture=False)
    emonavi.gradient_release(optimizer)
    for lr, loss in ((0.0, 100.0), (1e-3, 1.0)):
        optimizer.param_groups[0]["lr"] = lr
        loss_of(model, 0).backward()
        optimizer.observe(loss)
        optimizer.step()
    assert optimizer.emotion.loss == 1.0


def test_a_switching_rule_reflects_on_the_step_that_it_took():
    model = model_of()
    optimizer = emonavi.EmoClan(model.parameters())
    emonavi.gradient_release(optimizer)
    for t in range(6):
        moved_by = optimizer.emotion.scalar
        loss = loss_of(model, t) * (5 if t > 3 else 1)
        loss.backward()
        optimizer.step()
        kept = vector(optimizer)[optimizer._emotion.index("last_scalar")]
        assert float(kept) == pytest.approx(moved_by)
    assert optimizer.emotion.scalar != pytest.approx(moved_by)


def test_nothing_is_kept_alive():
    model = model_of()
    optimizer = emonavi.EmoNavi(model.parameters())
    handle = emonavi.gradient_release(optimizer)
    loss_of(model, 0).backward()
    optimizer.step()
    left = [weakref.ref(x) for x in (optimizer, model[0].weight)]
    del model, optimizer, handle
    gc.collect()
    assert [ref() for ref in left] == [None, None]


def test_a_step_at_lr_0_looks_once_for_what_moves(monkeypatch):
    model = model_of()
    optimizer = emonavi.EmoNavi(model.parameters(), lr=0.0)
    looked = []
    monkeypatch.setattr(Found, "moves", lambda found, groups: looked.append(len(found.params)) or False)
    emonavi.gradient_release(optimizer)
    for t in range(2):
        loss_of(model, t).backward()
        assert looked == [6]
        looked.clear()
        optimizer.step()
        looked.clear()


def test_another_models_backward_before_the_step_is_not_heard():
    model, other = model_of(), model_of(1)
    optimizer = emonavi.EmoNavi(model.parameters())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        handle = emonavi.gradient_release(optimizer)
        for t in range(3):
            loss = loss_of(model, t)
            loss.backward()
            (1e3 * loss_of(other, t)).backward()
            optimizer.step()
            assert optimizer.emotion.loss == pytest.approx(loss.item())
        handle.remove()
    loss = loss_of(model, 3)
    loss.backward()
    optimizer.step()
    assert optimizer.emotion.loss == pytest.approx(loss.item())


@siblings
def test_steps_that_are_all_skipped_are_warned_of(case):
    model, optimizer = made(case, capture=True)
    model[2].weight.register_hook(lambda g: g * math.nan)
    emonavi.gradient_release(optimizer)
    with pytest.warns(UserWarning, match="skipped 20 steps in a row") as caught:
        for t in range(30):
            loss_of(model, t).backward()
            optimizer.step()
    assert len(caught) == 1
    assert optimizer.emotion.skipped_steps == 30


class Fails(torch.autograd.Function):
    """A backward that fails half way, as for want of memory."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        raise MemoryError


def test_a_backward_that_failed_is_ended_by_zero_grad():
    torch.manual_seed(0)
    model, optimizer = model_of(), None
    optimizer = emonavi.EmoNavi(model.parameters(), use_shadow=True)
    emonavi.gradient_release(optimizer)
    for t in range(3):
        loss_of(model, t).backward()
        optimizer.step()
    x = torch.ones(4, 6)
    with pytest.raises(MemoryError):
        model[3](Fails.apply(model[2](model[1](model[0](x))))).square().mean().backward()
    with pytest.raises(RuntimeError, match=r"zero_grad\(\) after one that failed"):
        loss_of(model, 3).backward()
    optimizer.zero_grad()
    for t in range(3, 6):
        loss_of(model, t).backward()
        optimizer.step()
        optimizer.zero_grad()  # after a step that has ended it ends nothing
    assert optimizer.emotion.steps == 7


def test_lr_zero_in_mid_run_is_no_step_without_gradients(recwarn):
    model = torch.nn.Linear(3, 1)
    optimizer = emonavi.EmoNavi(model.parameters())
    emonavi.gradient_release(optimizer)
    for t in range(25):
        optimizer.param_groups[0]["lr"] = 1e-3 if t < 2 else 0.0
        model(torch.ones(4, 3)).square().mean().backward()
        optimizer.step()
    assert not [w for w in recwarn if "had a gradient" in str(w.message)]


@pytest.mark.parametrize("capturable", [False, True])
def test_zero_grad_ends_a_step_that_a_panic_restores(capturable):
    model = model_of()
    optimizer = emonavi.EmoNavi(model.parameters(), use_shadow=True, capturable=capturable)
    emonavi.gradient_release(optimizer)
    for t in range(30):
        loss_of(model, t).backward()
        optimizer.step()
    (loss_of(model, 30) * 1e8).backward()
    optimizer.zero_grad()
    assert optimizer.emotion.steps == 31 and optimizer.emotion.mood == "resting"
    shadows = [optimizer.state[p]["shadow"] for p in model.parameters()]
    assert all(torch.allclose(p, s) for p, s in zip(model.parameters(), shadows, strict=True))


def test_a_spoilt_step_leaves_the_shadow_and_restores_it():
    model = model_of()
    optimizer = emonavi.EmoNavi(model.parameters(), use_shadow=True)
    emonavi.gradient_release(optimizer)
    for t in range(20):
        loss_of(model, t).backward()
        optimizer.step()
    before = [optimizer.state[p]["shadow"].clone() for p in model.parameters()]
    next(model.parameters()).register_hook(lambda grad: grad * torch.nan)  # the last that backward comes to
    loss_of(model, 20).backward()
    optimizer.step()
    assert optimizer.emotion.skipped_steps == 1
    for p, shadow in zip(model.parameters(), before, strict=True):
        assert torch.equal(optimizer.state[p]["shadow"], shadow) and torch.equal(p, shadow)


def test_a_parameter_that_came_later_is_said_to_stay():
    model, later = model_of(), torch.nn.Parameter(torch.ones(2))
    optimizer = emonavi.EmoNavi(model.parameters())
    emonavi.gradient_release(optimizer)
    optimizer.add_param_group({"params": [later]})
    with pytest.warns(UserWarning, match="added or thawed since gradient_release.. has a gradient, and is not moved"):
        (loss_of(model, 0) + later.sum()).backward()
        optimizer.step()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        (loss_of(model, 1) + later.sum()).backward()
        optimizer.step()
