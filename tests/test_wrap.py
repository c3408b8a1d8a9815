"""``Emotional``: what it promises around any optimizer, and that it leaves the optimizer what it is."""

import copy
import functools
import math
import pickle
import shutil
import warnings
import weakref
from dataclasses import dataclass
from typing import Any, ClassVar
from unittest import mock

import numpy as np
import pytest
import pytorch_optimizer
import torch
from cases import Odd, Valley, check_twin, contents, differences, drive, through_file, train, vector, weights, write
from hypothesis import given
from hypothesis import strategies as st
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from torch.optim.lr_scheduler import CosineAnnealingLR, OneCycleLR, ReduceLROnPlateau

import emonavi
from emonavi import displacement, kernels
from emonavi.displacement import SAMPLE, sample

SHAPES = ((6, 4), (5, 3), (90, 64))  # matrices, which all that is wrapped here can move; the last one is sampled
compiled = pytest.mark.skipif(shutil.which("cc") is None, reason="needs a C compiler")


@dataclass(frozen=True)
class Wrapped:
    """An optimizer to put an emotion around."""

    name: str
    build: Any
    lr: float = 1e-2

    def bare(self, params, **kwargs):
        return self.build(params, **({"lr": self.lr} | kwargs))

    def make(self, params, *, of=None, **options):
        quiet = {"on_missing_loss": "ignore", "capture": False}
        return emonavi.Emotional(self.bare(params, **(of or {})), **(quiet | options))


ALL = (
    Wrapped("AdamW", torch.optim.AdamW),
    Wrapped("SGD", functools.partial(torch.optim.SGD, momentum=0.9)),
    Wrapped("Adafactor", torch.optim.Adafactor),
    Wrapped("Muon", torch.optim.Muon),
    Wrapped("Lion", pytorch_optimizer.Lion),
)
each = pytest.mark.parametrize("wrapped", ALL, ids=lambda w: w.name)
ADAMW, SGD = ALL[0], ALL[1]


def matrices(dtype=torch.float32):
    return weights(dtype, SHAPES)


def run(wrapped, steps=30, *, told=lambda x: x, of=None, **options):
    params = matrices()
    optimizer = wrapped.make(params, of=of, **options)
    # While there is still a loss that can rise: SGD is at the bottom by the twentieth step.
    losses = train(optimizer, params, steps, loss=told, valley=Valley(params, rise=range(12, 18)))
    return optimizer, params, losses


def inside(optimizer):
    """Contents without the emotion's vector: what a skipped step must not touch."""
    return {k: v for k, v in contents(optimizer).items() if not k.endswith((": emotion", ": lr_peak"))}


# What stays the optimizer's ------------------------------------------------------------------------------------------


@each
def test_without_trust_and_losses_it_is_the_bare_optimizer_bit_by_bit(wrapped):
    params, others = matrices(), matrices()
    optimizer, bare = wrapped.make(params, use_trust=False), wrapped.bare(others)
    for t in range(20):
        for some, one in ((params, optimizer), (others, bare)):
            Valley(some).fill(some, t)
            one.step()
    assert all(torch.equal(p, q) for p, q in zip(params, others, strict=True))
    assert optimizer.emotion.steps == 20


@each
@pytest.mark.parametrize("tensor", [False, True], ids=["float", "tensor"])
def test_gradients_and_lr_are_left_alone(wrapped, tensor):
    if tensor and wrapped.name in ("Adafactor", "Muon"):
        pytest.skip("takes no lr that is a tensor with foreach")
    lr = torch.tensor(wrapped.lr) if tensor else wrapped.lr
    params = matrices()
    optimizer = wrapped.make(params, of={"lr": lr, **({"foreach": False} if tensor else {})})
    valley = Valley(params)
    acted = []
    optimizer.inner.register_step_pre_hook(lambda inner, *_: acted.append(float(inner.param_groups[0]["lr"])))
    for t in range(25):
        loss = valley.fill(params, t)
        if t == 15:
            params[0].grad *= 1e4  # an outlier is scaled down, but not in .grad
        held = [(p, p.grad, p.grad.clone()) for p in params]
        optimizer.step(loss=loss)
        for p, grad, before in held:
            assert p.grad is grad and torch.equal(grad, before)
        assert optimizer.param_groups[0]["lr"] is lr
    assert float(lr) == pytest.approx(wrapped.lr)
    assert len({round(math.log(a), 6) for a in acted}) > 10, "the drive never reached the optimizer"


@each
def test_an_outlier_is_scaled_down(wrapped):
    moved = {}
    for max_norm in (1.0, 0.0):
        optimizer, params, _ = run(wrapped, 20, told=None, max_norm=max_norm)
        valley = Valley(params)
        valley.fill(params, 20)
        for p in params:
            p.grad.mul_(1e6)
        seen = []
        optimizer.inner.register_step_pre_hook(lambda *_, p=params, s=seen: s.append(float(p[0].grad.norm())))
        optimizer.step()
        moved[max_norm] = seen[0] / float(params[0].grad.norm())
    assert moved[0.0] == 1.0
    assert moved[1.0] < 1e-2


@each
def test_lr_comes_back_after_an_error(wrapped):
    optimizer, params, _ = run(wrapped, 3)
    optimizer.inner.register_step_pre_hook(lambda *_: 1 / 0)
    Valley(params).fill(params, 3)
    with pytest.raises(ZeroDivisionError):
        optimizer.step(loss=1.0)
    assert optimizer.param_groups[0]["lr"] == wrapped.lr


def test_hooks_fire_once_on_each():
    params = matrices()
    optimizer = ADAMW.make(params)
    calls = []
    for name, one in (("outer", optimizer), ("inner", optimizer.inner)):
        one.register_step_pre_hook(lambda *_, n=name: calls.append(f"{n} pre"))
        one.register_step_post_hook(lambda *_, n=name: calls.append(f"{n} post"))
    train(optimizer, params, 1)
    assert calls == ["outer pre", "inner pre", "inner post", "outer post"]
    assert isinstance(optimizer, torch.optim.Optimizer)
    assert optimizer.param_groups is optimizer.inner.param_groups and optimizer.state is optimizer.inner.state
    optimizer.zero_grad()
    assert all(p.grad is None for p in params)


# The first step ------------------------------------------------------------------------------------------------------


@each
@pytest.mark.parametrize("lr", [1e-1, 1e2])
def test_the_first_step_is_a_small_share_of_the_weights_whatever_the_unit_of_lr(wrapped, lr):
    for scale in (1.0, 1e-3):
        params = matrices()
        optimizer = wrapped.make(params, of={"lr": lr / scale, "weight_decay": 0.0})
        before = [p.detach().clone() for p in params]
        Valley(params).fill(params, 0, scale)
        optimizer.step(loss=1.0)
        count = sum(p.numel() for p in params)
        moved = math.sqrt(
            sum(float((p.detach() - b).square().sum()) for p, b in zip(params, before, strict=True)) / count
        )
        rms = math.sqrt(sum(float(b.square().sum()) for b in before) / count)
        assert moved == pytest.approx(3e-3 * rms, rel=1e-2)


def test_the_users_lr_is_kept_where_it_is_lower():
    params, others = matrices(), matrices()
    optimizer, bare = SGD.make(params, of={"lr": 1e-6}), SGD.bare(others, lr=1e-6)
    for some, one in ((params, optimizer), (others, bare)):
        Valley(some).fill(some, 0)
        one.step()
    assert drive(optimizer) == 1.0
    assert all(torch.equal(p, q) for p, q in zip(params, others, strict=True))


@each
def test_the_run_does_not_depend_on_an_lr_above_the_first_step(wrapped):
    """The first lr is found from the weights: two guesses above it are one run, up to rounding."""
    ends = []
    for lr in (0.1, 0.5):  # Adafactor takes no lr above its own 1 / sqrt(step)
        params = matrices()
        optimizer = wrapped.make(params, of={"lr": lr, "weight_decay": 0.0})
        train(optimizer, params, 12)
        ends.append((optimizer.effective_lr[0], params))
    assert ends[0][0] == pytest.approx(ends[1][0], rel=0.02)


# Reflection ----------------------------------------------------------------------------------------------------------


def test_samples_are_spread_bounded_and_the_same_whatever_the_layout():
    for shape in ((3,), (), (2048,), (2049,), (90, 64), (512, 256), (7, 5, 3, 3), (1000, 333)):
        tensor = torch.arange(float(math.prod(shape))).reshape(shape)
        some = sample(tensor)
        assert some.dim() == 1 and 0 < len(some) <= SAMPLE
        assert len(some) == tensor.numel() or len(some) > SAMPLE / 4
        assert len(some.unique()) == len(some)
        if tensor.numel() > SAMPLE:
            assert float(some.max() - some.min()) > 0.9 * (tensor.numel() - 16 * 3 * tensor.numel() / SAMPLE)
        if tensor.dim() == 2:
            assert torch.equal(sample(tensor.t().contiguous().t()), some)
        spread = torch.stack([tensor, tensor + 1], -1)[..., 0]  # every other number of its memory
        assert torch.equal(sample(spread), some)


@pytest.mark.parametrize("of_each", [displacement.sums_of_each, displacement._by_owner])
def test_sums_over_the_coordinates_of_each_tensor(of_each):
    terms, sizes = torch.arange(21.0).reshape(3, 7), [3, 1, 0, 3]
    expected = torch.stack([part.sum(1) for part in terms.split(sizes, 1)], 1)
    assert torch.equal(of_each(terms, torch.tensor(sizes)), expected)


def test_sums_of_reflection_equal_a_reference_in_float64():
    """Written out in numpy from the formulas."""
    generator = np.random.default_rng(0)
    n = 50
    memories = torch.zeros(3, n, dtype=torch.float64)
    last, grad_sq, step_sq = np.zeros(n), np.zeros(n), np.zeros(n)
    for t in range(6):
        grad, step = generator.normal(size=n), generator.normal(size=n)
        grad[:5] = 0.0
        step[3:9] = 0.0
        terms = displacement.reflect(memories, torch.tensor(grad), torch.tensor(step)).sum(1).tolist()
        expected = np.zeros(3)
        for i in range(n):
            if grad_sq[i] > 0 and step_sq[i] > 0:
                metric = math.sqrt(grad_sq[i] / step_sq[i])
                expected += [grad[i] * last[i], grad[i] ** 2 / metric, last[i] ** 2 * metric]
        np.testing.assert_allclose(terms, expected, rtol=1e-12)
        assert (t == 0) == (expected[1] == 0)
        grad_sq, step_sq, last = grad_sq * 0.99 + 0.01 * grad**2, step_sq * 0.99 + 0.01 * step**2, step


def several_steps(params, steps=3):
    """Samples, memories and sums as the wrapper has them, over steps that move each parameter by its own rate."""
    kept = [torch.zeros(3, len(sample(p)), dtype=torch.promote_types(p.dtype, torch.float32)) for p in params]
    rates, found = torch.linspace(0.0, 0.1, len(params), dtype=torch.float64), []
    for t in range(steps):
        grads = [torch.cos(torch.arange(p.numel()) + t).view_as(p).to(p) for p in params]
        grads[0].fill_(0.0)  # it knows no metric
        seen = [displacement.samples(tensors, rates) for tensors in (params, grads)]
        for p, grad, rate in zip(params, grads, rates.tolist(), strict=True):
            p.sub_(grad.sign() * (1 + grad), alpha=rate)
        found += [*seen, displacement.compared(kept, params, *seen, rates)]
    return found + kept


@compiled
@given(
    sizes=st.lists(st.integers(1, 40) | st.sampled_from([2048, 2049, 5000, 70_001]), min_size=1, max_size=5),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16]),
)
def test_the_kernel_of_samples_does_what_torch_does(sizes, dtype):
    by_kernel = several_steps([torch.linspace(-1, 1, n).to(dtype) for n in sizes])
    assert kernels.sampled([torch.ones(3, dtype=dtype)], torch.device("cpu")) is not None
    with mock.patch.multiple(kernels, sampled=mock.DEFAULT, compared=mock.DEFAULT) as none:
        for function in none.values():
            function.return_value = None
        expected = several_steps([torch.linspace(-1, 1, n).to(dtype) for n in sizes])
    assert [t.dtype for t in by_kernel if t.dim() == 1] == [t.dtype for t in expected if t.dim() == 1]
    for one, other in zip(by_kernel, expected, strict=True):
        torch.testing.assert_close(one.double(), other.double(), rtol=2e-5, atol=2e-5)


def test_what_the_kernel_of_samples_leaves_to_torch():
    plain, home = torch.ones(3, 4), torch.device("cpu")
    odd = [torch.ones(4, 3).t(), plain.to(torch.complex64), plain.as_subclass(Odd), torch.ones(3, 4, device="meta")]
    assert [kernels.sampled([p], home) for p in odd] == [None] * 4
    assert kernels.sampled([plain, plain.double()], home) is kernels.sampled([], home) is None
    kept, row, rate = [torch.zeros(3, 12, dtype=torch.float64)], torch.ones(12), torch.ones(1)
    assert kernels.compared(kept, [plain], row, row, rate) is None  # memories of another dtype than the parameter's
    assert kernels.compared([torch.zeros(12, 3).t()], [plain], row, row, rate) is None


class Seeing(emonavi.Emotion):
    """Keeps the sums that it is given."""

    sums: ClassVar[list[Any]] = []

    def reflect(self, state, sums, acted, options):
        self.sums.append(sums)
        return super().reflect(state, sums, acted, options)


def test_sums_stand_for_the_whole_tensor_and_the_first_step_has_none():
    """SGD on constant gradients, where every coordinate is like the sampled ones: u is g, the metric 1."""
    Seeing.sums.clear()
    big, small = torch.nn.Parameter(torch.ones(90, 64)), torch.nn.Parameter(torch.ones(2, 2))
    optimizer = emonavi.Emotional(torch.optim.SGD([big, small], lr=1e-4), emotion=Seeing(), on_missing_loss="ignore")
    for _ in range(2):
        big.grad, small.grad = torch.full_like(big, 0.5), torch.full_like(small, 0.25)
        optimizer.step()
    first, second = Seeing.sums
    assert first.products.abs().sum() == 0
    expected = torch.tensor([5760 * 0.25, 4 * 0.0625], dtype=torch.float64)
    for found in second.products:
        torch.testing.assert_close(found, expected, rtol=1e-2, atol=0)
    assert second.weight.tolist() == pytest.approx([1e-4] * 2)


def published(params):
    return pytorch_optimizer.EmoNavi(params, use_shadow=True)


class Averaging(torch.optim.SGD):
    """Keeps a shadow of its own."""

    def step(self, closure=None):
        super().step(closure)
        for p in self.param_groups[0]["params"]:
            state = self.state[p]
            state["made"] = state.get("made", 0) + ("shadow" not in state)
            state.setdefault("shadow", p.detach().clone())


def test_what_the_optimizer_calls_a_shadow_is_left_alone():
    params = weights()
    inner = Averaging(params, lr=0.01)
    for p in params:
        p.grad = torch.ones_like(p)
    inner.step()
    optimizer = emonavi.Emotional(inner)
    train(optimizer, params, 4, start=1)
    assert [inner.state[p]["made"] for p in params] == [1] * len(params)


def test_samples_of_another_model_crash_nothing():
    """Of the same number of elements, loaded behind the wrapper's back: a kernel would write past the end."""
    for sizes in ((100, 2000), (2000, 100)):
        params = [torch.nn.Parameter(torch.ones(n)) for n in sizes]
        optimizer = emonavi.Emotional(torch.optim.SGD(params, lr=0.01))
        train(optimizer, params, 2)
        kept = [optimizer.state[p]["step_sample"] for p in params]
        some = displacement.samples(params, torch.ones(2))
        assert kernels.compared(kept[::-1], params, some, some, torch.ones(2)) is None


def test_a_second_wrapper_does_not_take_over_what_the_first_one_saw():
    """The optimizer may have gone on alone in between."""
    params = weights()
    inner = torch.optim.AdamW(params)
    train(emonavi.Emotional(inner, use_shadow=True), params, 3)
    again = emonavi.Emotional(inner, use_shadow=True)
    assert not any({"shadow", "step_sample"} & set(state) for state in inner.state.values())
    with again.calm():
        pass


def metric_of(optimizer, p):
    _, grad_sq, step_sq = optimizer.state[p]["step_sample"]
    return (grad_sq / step_sq).sqrt()


def test_the_metric_is_what_the_optimizer_divides_by():
    """Adam's denominator and SGD's 1, each up to a factor; gradients differ from coordinate to coordinate by 1e4."""
    spread = {}
    for wrapped in (ADAMW, SGD):
        p = torch.nn.Parameter(torch.ones(40, 40))
        optimizer = wrapped.make([p], of={"lr": 1e-5, "weight_decay": 0.0})
        scales = torch.logspace(-2, 2, p.numel()).view_as(p)
        for _ in range(150):
            p.grad = scales * torch.randn_like(p)
            optimizer.step()
        found = metric_of(optimizer, p)
        divided = optimizer.state[p]["exp_avg_sq"].sqrt().flatten() if wrapped is ADAMW else torch.ones_like(found)
        ratio = (found / divided).log()
        spread[wrapped.name] = float(ratio.std())
    assert max(spread.values()) < 0.4 < math.log(1e4)


def test_around_adamw_it_is_emonavi():
    """The same rule and nearly the same reflection: the drives stay together while they grow by a hundred."""
    shapes = SHAPES[:2]
    params, others = weights(shapes=shapes), weights(shapes=shapes)
    valley, other = Valley(params, noise=1.0), Valley(others, noise=1.0)
    wrapped = ADAMW.make(params)
    sibling = emonavi.EmoNavi(others, lr=ADAMW.lr, capture=False, emotion=emonavi.Emotion(tensor_pace=0.0))
    apart, drives = [], []
    for t in range(60):
        wrapped.step(loss=valley.fill(params, t))
        sibling.step(loss=other.fill(others, t))
        drives.append(drive(sibling))
        apart.append(abs(math.log(drive(wrapped) / drive(sibling))))
    assert max(drives) / min(drives) > 20
    assert max(apart) < 0.7
    assert abs(math.log(float(params[0].detach().norm() / others[0].detach().norm()))) < 0.1


@pytest.mark.parametrize("group", ["torch's", "an attribute"])
def test_maximize_is_negated_gradients_and_losses(group):
    wrapped = SGD if group == "torch's" else ALL[4]
    runs = []
    for sign in (1, -1):
        params = matrices()
        optimizer = wrapped.make(params, of={"maximize": sign < 0})
        valley = Valley(params)
        for t in range(30):
            loss = valley.fill(params, t)
            for p in params:
                p.grad.mul_(sign)
            optimizer.step(loss=sign * loss)
        runs.append((params, optimizer))
    assert all(torch.equal(p, q) for p, q in zip(runs[0][0], runs[1][0], strict=True))
    assert torch.equal(vector(runs[0][1])[8:], vector(runs[1][1])[8:]) or runs[0][1].emotion.trust == pytest.approx(
        runs[1][1].emotion.trust
    )


@each
def test_memory_of_the_sample(wrapped):
    """At most 24 KiB for a tensor: a fiftieth of what AdamW and its matrix of 512 x 512 take."""
    big = torch.nn.Parameter(torch.randn(512, 512))
    small = torch.nn.Parameter(torch.randn(8, 16))
    optimizer = wrapped.make([big, small])
    for p in (big, small):
        p.grad = torch.randn_like(p)
    optimizer.step(loss=1.0)
    assert optimizer.state[big]["step_sample"].nbytes <= 24 * 1024
    assert optimizer.state[small]["step_sample"].nbytes == 3 * 4 * small.numel()
    assert optimizer.state[big]["step_sample"].untyped_storage().nbytes() <= 24 * 1024
    assert "step_sample" not in wrapped_state_without_trust(wrapped)


def wrapped_state_without_trust(wrapped):
    p = torch.nn.Parameter(torch.randn(8, 16))
    optimizer = wrapped.make([p], use_trust=False)
    p.grad = torch.randn_like(p)
    optimizer.step(loss=1.0)
    return optimizer.state[p]


# Feeling -------------------------------------------------------------------------------------------------------------


@each
@pytest.mark.parametrize(("a", "b"), [(1e-5, 2.0), (250.0, -4e3)])
def test_affine_invariance_in_the_loss(wrapped, a, b):
    _, params, _ = run(wrapped, 45)
    _, mapped, _ = run(wrapped, 45, told=lambda x: a * x + b)
    for p, q in zip(params, mapped, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-5)
    _, deaf, _ = run(wrapped, 45, told=lambda x: 0 * x)  # and it proves itself: the loss did move the drive
    assert any(not torch.equal(p, q) for p, q in zip(params, deaf, strict=True))


@each
@pytest.mark.parametrize("shadow", [False, True], ids=["plain", "shadow"])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_bad_gradient_changes_nothing_and_is_counted(wrapped, shadow, bad):
    optimizer, params, _ = run(wrapped, 15, use_shadow=shadow)
    before, was = inside(optimizer), drive(optimizer)
    loss = Valley(params).fill(params, 15)
    params[0].grad[2, 1] = bad
    optimizer.step(loss=loss)
    assert (optimizer.emotion.steps, optimizer.emotion.skipped_steps) == (15, 1)
    changed = differences(before, inside(optimizer))
    if shadow:  # a panic restores it
        changed = [n for n in changed if not n.startswith("parameter")]
        assert all(torch.equal(p, optimizer.state[p]["shadow"]) for p in params)
    assert changed == []
    assert drive(optimizer) < 0.5 * was
    drives = [drive(optimizer)]
    for t in range(16, 27):
        optimizer.step(loss=Valley(params, rise=range(0)).fill(params, t))
        drives.append(drive(optimizer))
    assert max(drives) >= 0.5 * was * (1 - 1e-6)
    assert all(bool(p.isfinite().all()) for p in params)


@each
def test_a_bad_gradient_before_the_first_step(wrapped):
    """Nothing is made and no drive is cut, since none was found yet."""
    params, straight = matrices(), matrices()
    optimizer, other = wrapped.make(params), wrapped.make(straight)
    Valley(params).fill(params, 0)
    params[0].grad[0, 0] = math.nan
    optimizer.step(loss=1.0)
    assert (optimizer.emotion.steps, optimizer.emotion.skipped_steps) == (0, 1)
    assert all(torch.equal(p, q) for p, q in zip(params, straight, strict=True))
    assert not any(optimizer.state.get(p) for p in params)
    train(optimizer, params, 8, loss=None)
    train(other, straight, 8, loss=None)
    assert all(torch.equal(p, q) for p, q in zip(params, straight, strict=True))


def test_a_missing_loss_is_told():
    params = matrices()
    optimizer = SGD.make(params, on_missing_loss="warn")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        train(optimizer, params, 12, loss=None)
    assert [str(w.message)[:9] for w in caught] == ["Emotional"]
    optimizer = SGD.make(params, on_missing_loss="error")
    before = [p.detach().clone() for p in params]
    with pytest.raises(RuntimeError, match="no loss"):
        train(optimizer, params, 1, loss=None)
    assert all(torch.equal(p, b) for p, b in zip(params, before, strict=True))


def test_ways_to_tell_the_loss():
    """Captured at backward, observed through a wrapper, returned by a closure."""
    for way in ("capture", "observe", "closure"):
        weight = torch.nn.Parameter(torch.ones(3))
        inner = torch.optim.SGD([weight], lr=0.1)
        optimizer = emonavi.Emotional(inner, capture="auto" if way == "capture" else False)

        def closure(weight=weight, optimizer=optimizer):
            optimizer.zero_grad()
            loss = weight.square().sum()
            loss.backward()
            return loss

        if way == "closure":
            assert float(optimizer.step(closure).detach()) == 3.0
        else:
            closure()
            if way == "observe":
                emonavi.observe(optimizer, 3.0)
            optimizer.step()
        assert optimizer.emotion.loss == 3.0


def test_the_loss_is_the_mean_of_the_replicas(monkeypatch):
    """The siblings' own way is taken, with the process group that was given; theirs is tested with real replicas."""
    asked = []

    def agreed(heard, norms, params, ranks):
        asked.append((heard.value, ranks))
        return heard._replace(value=7.0), torch.linalg.vector_norm(norms)

    monkeypatch.setattr("emonavi.wrap.agreed", agreed)
    optimizer, _, losses = run(SGD, 3, process_group=None)
    assert [value for value, _ in asked] == losses and asked[0][1] == optimizer._peers()
    assert optimizer.emotion.loss == 7.0


# Checkpoints ---------------------------------------------------------------------------------------------------------


@each
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_save_load_continue(wrapped, dtype):
    params, straight = matrices(dtype), matrices(dtype)
    optimizer, uninterrupted = (wrapped.make(p, use_shadow=True) for p in (params, straight))
    valley = Valley(params)
    for t in range(24):
        if t in (1, 9, 17):
            copies = [torch.nn.Parameter(p.detach().clone()) for p in params]
            fresh = wrapped.make(copies, use_shadow=True)
            fresh.load_state_dict(through_file(optimizer.state_dict()))
            params, optimizer = copies, fresh
            assert differences(contents(optimizer), contents(uninterrupted)) == []
        optimizer.step(loss=valley.fill(params, t))
        uninterrupted.step(loss=valley.fill(straight, t))
    assert differences(contents(optimizer), contents(uninterrupted)) == []
    assert optimizer.emotion.steps == 24


@each
@pytest.mark.parametrize("way", [lambda o: pickle.loads(pickle.dumps(o)), copy.deepcopy], ids=["pickle", "deepcopy"])
def test_pickle_and_deepcopy(wrapped, way):
    if wrapped.name == "Lion":
        pytest.skip("pytorch_optimizer's own attributes do not survive: a bare Lion cannot step after a copy either")
    optimizer, params, _ = run(wrapped, 12, use_shadow=True)
    check_twin(way(optimizer), optimizer, params, start=12)


@each
def test_a_checkpoint_of_the_bare_optimizer_goes_on_under_a_fresh_emotion(wrapped):
    params = matrices()
    bare = wrapped.bare(params)
    for t in range(5):
        Valley(params).fill(params, t)
        bare.step()
    optimizer = wrapped.make([torch.nn.Parameter(p.detach().clone()) for p in params], use_shadow=True, max_lr=3.0)
    with pytest.warns(UserWarning, match="alone: it goes on under a fresh emotion"):
        optimizer.load_state_dict(through_file(bare.state_dict()))
    moments = [n for n in contents(bare) if n.startswith("state")]
    ours = contents(optimizer)
    assert all(n in ours and torch.equal(torch.as_tensor(ours[n]), torch.as_tensor(contents(bare)[n])) for n in moments)
    assert optimizer.param_groups[0]["lr_ceiling"] == 3.0
    copies = optimizer.param_groups[0]["params"]
    train(optimizer, copies, 4, start=5)
    assert optimizer.emotion.steps == 4
    back = wrapped.bare(copies)
    back.load_state_dict(optimizer.state_dict())  # and the other way round
    Valley(copies).fill(copies, 9)
    back.step()


@pytest.mark.parametrize("name", [*emonavi.available(), "Adamax"])
def test_checkpoints_of_others_with_an_emotion(name):
    optimizer, params, _ = run(ADAMW, 3)
    others = matrices()
    if name == "Adamax":
        other = emonavi.Emotional(torch.optim.Adamax(others), capture=False)
    else:
        other = emonavi.create(name, others, capture=False)
    train(other, others, 2)
    before = contents(optimizer)
    with pytest.raises(ValueError, match=r"of another optimizer, of (a sibling|Emotional\(Adamax\))"):
        optimizer.load_state_dict(through_file(other.state_dict()))
    assert differences(before, contents(optimizer)) == []
    saved = optimizer.state_dict()
    del saved["param_groups"][0]["inner"]  # as an earlier version saved it
    optimizer.load_state_dict(saved)
    assert optimizer.param_groups[0]["inner"] == "AdamW"
    train(optimizer, params, 2, start=3)


def test_a_model_whose_precision_changes():
    optimizer, params, _ = run(SGD, 3)
    for p in params:
        p.grad = None
        p.data = p.data.double()
    train(optimizer, params, 3, start=3)
    assert optimizer.emotion.steps == 6


def test_parameters_of_another_shape():
    """Refused at load, and where data were replaced before anything moves."""
    optimizer, params, _ = run(SGD, 3)
    others = weights(shapes=[(6, 5), *SHAPES[1:]])
    other = SGD.make(others, capture=False)
    train(other, others, 2)
    before = contents(optimizer)
    with pytest.raises(ValueError, match=r"other shapes: momentum_buffer of parameter 0 is \(6, 5\), here \(6, 4\)"):
        optimizer.load_state_dict(through_file(other.state_dict()))
    assert differences(before, contents(optimizer)) == []
    params[0].grad = None
    params[0].data = torch.ones(6, 5)
    Valley(params).fill(params, 3)
    before = contents(optimizer)
    with pytest.raises(RuntimeError, match=r"a parameter of shape \(6, 5\) has (step_sample|momentum_buffer) of shape"):
        optimizer.step(loss=1.0)
    assert differences(before, contents(optimizer)) == []


def test_groups_given_to_the_wrapped_optimizer_itself():
    params = matrices()
    optimizer = emonavi.Emotional(torch.optim.AdamW(params[:1], lr=1e-2), max_lr=0.5, capture=False)
    optimizer.inner.add_param_group({"params": params[1:2], "lr": 1e-3})
    assert len(optimizer.effective_lr) == 2
    optimizer.inner.add_param_group({"params": params[2:], "lr": 1e-3})
    optimizer.reset_emotion()
    with pytest.raises(ValueError, match="state_dtype='bf16' in a group"):
        optimizer.add_param_group({"params": weights(), "state_dtype": "bf16"})
    train(optimizer, params, 2)
    assert [g["lr_ceiling"] for g in optimizer.param_groups] == [0.5] * 3
    optimizer.param_groups.clear()
    optimizer.add_param_group({"params": params})
    train(optimizer, params, 2, start=2)
    assert optimizer.param_groups[0]["lr_ceiling"] == 0.5 and optimizer.emotion.steps == 4
    optimizer.param_groups.clear()
    optimizer.inner.add_param_group({"params": params})
    with pytest.raises(RuntimeError, match="no shadow to show"), optimizer.calm():
        pass
    optimizer.param_groups.clear()
    optimizer.inner.add_param_group({"params": params})
    copy.deepcopy(optimizer)
    train(optimizer, params, 2, start=4)
    assert optimizer.emotion.steps == 6


def test_constants_of_the_emotion_are_in_the_checkpoint():
    params, again = matrices(), matrices()
    optimizer = ADAMW.make(params, emotion={"sure": 0.02})
    train(optimizer, params, 3)
    other = ADAMW.make(again)
    other.load_state_dict(through_file(optimizer.state_dict()))
    assert other._emotion == emonavi.Emotion(sure=0.02)
    # Put around anew, it begins with the constants that the new wrapper is given.
    assert emonavi.Emotional(optimizer.inner).param_groups[0]["emotion_constants"] == "{}"


def test_checkpoints_that_do_not_fit():
    optimizer, params, _ = run(ADAMW, 3)
    before = contents(optimizer)
    stranger = SGD.bare(matrices())
    with pytest.raises(ValueError, match=r"of another optimizer: it does not hold betas, eps"):
        optimizer.load_state_dict(stranger.state_dict())
    saved = through_file(optimizer.state_dict())
    saved["param_groups"][0]["emotion"][1] -= 1
    with pytest.raises(ValueError, match=r"version 2, .*that saved it"):
        optimizer.load_state_dict(saved)
    assert differences(before, contents(optimizer)) == []
    train(optimizer, params, 2, start=3)


def test_distributed_checkpoint():
    """Saved whole and loaded into a fresh optimizer, whose state torch makes by a step at lr 0."""
    models = [torch.nn.Linear(4, 5) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    first, second = (ADAMW.make(m.parameters(), use_shadow=True) for m in models)
    train(first, list(models[0].parameters()), 8)
    saved = through_file(get_optimizer_state_dict(models[0], first))
    models[1].load_state_dict(models[0].state_dict())
    set_optimizer_state_dict(models[1], second, saved)
    assert differences(contents(first), contents(second)) == []
    for model, optimizer in zip(models, (first, second), strict=True):
        train(optimizer, list(model.parameters()), 4, start=8)
    assert differences(contents(first), contents(second)) == []


def test_hooks_of_checkpoints():
    optimizer, _, _ = run(ADAMW, 3)
    calls = []
    optimizer.register_state_dict_pre_hook(lambda one: calls.append(type(one).__name__))
    optimizer.register_state_dict_post_hook(lambda one, made: {"wrapped": made})
    saved = optimizer.state_dict()
    assert set(saved) == {"wrapped"}
    fresh = ADAMW.make(matrices())
    fresh.register_load_state_dict_pre_hook(lambda one, given: given["wrapped"])
    fresh.register_load_state_dict_post_hook(lambda one: calls.append("loaded"))
    fresh.load_state_dict(saved)
    assert calls == ["AdamW", "loaded"]
    assert fresh.emotion.steps == 3


# Schedulers, groups, stages ------------------------------------------------------------------------------------------


@each
def test_schedulers(wrapped):
    params = matrices()
    optimizer = wrapped.make(params)
    scheduler = CosineAnnealingLR(optimizer, T_max=40)
    for t in range(20):
        optimizer.step(loss=Valley(params).fill(params, t))
        assert optimizer.effective_lr == pytest.approx([optimizer.param_groups[0]["lr"] * drive(optimizer)])
        scheduler.step()
    assert optimizer.param_groups[0]["lr"] == pytest.approx(wrapped.lr / 2)
    plateau = ReduceLROnPlateau(optimizer, factor=0.1, patience=0)
    plateau.step(1.0)
    plateau.step(1.0)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(wrapped.lr / 20)


def test_one_cycle_moves_the_momentum_of_the_wrapped_optimizer():
    params = matrices()
    optimizer = SGD.make(params)
    scheduler = OneCycleLR(optimizer, max_lr=1.0, total_steps=10)
    seen = []
    for t in range(9):
        optimizer.step(loss=Valley(params).fill(params, t))
        scheduler.step()
        seen.append(optimizer.inner.param_groups[0]["momentum"])
    assert len(set(seen)) > 3
    assert optimizer.emotion.steps == 9


@each
def test_lr_zero_feels_nothing_and_moves_nothing(wrapped):
    optimizer, params, _ = run(wrapped, 5)
    optimizer.param_groups[0]["lr"] = 0.0
    before, emotion = [p.detach().clone() for p in params], vector(optimizer).clone()
    train(optimizer, params, 3, start=5)
    assert all(torch.equal(p, b) for p, b in zip(params, before, strict=True))
    assert torch.equal(vector(optimizer), emotion)
    params[0].grad[0, 0] = math.nan
    held = inside(optimizer)
    optimizer.step(loss=1.0)
    assert differences(held, inside(optimizer)) == [], "a bad gradient reached the memories at lr 0"


@each
def test_groups(wrapped):
    """Each keeps its share of the drive; one that is added later joins, one with a wall of its own is stopped by it."""
    params = matrices()
    optimizer = wrapped.make([{"params": params[:1]}, {"params": params[1:2], "lr": wrapped.lr / 10}])
    train(optimizer, params[:2], 6, valley=Valley(params[:2]))
    first, second = optimizer.effective_lr
    assert first == pytest.approx(10 * second)
    optimizer.add_param_group({"params": [params[2]]})
    assert optimizer.param_groups[2]["lr_start"] == wrapped.lr
    was = params[2].detach().clone()
    train(optimizer, params, 6, start=6, valley=Valley(params))
    assert not torch.equal(params[2], was)
    assert optimizer.emotion.steps == 12
    optimizer.param_groups[1]["lr_ceiling"] = 1e-7
    assert optimizer.effective_lr[1] == 1e-7
    with pytest.raises(ValueError, match="one for all groups"):
        optimizer.add_param_group({"params": [torch.nn.Parameter(torch.ones(2, 2))], "use_trust": False})
    with pytest.raises(ValueError, match="only real floating-point"):
        optimizer.add_param_group({"params": [torch.ones(2, 2, dtype=torch.complex64)]})
    assert len(optimizer.param_groups) == 3


def test_lazy_modules_may_be_built_later():
    model = torch.nn.Sequential(torch.nn.LazyLinear(3), torch.nn.LazyLinear(2))
    optimizer = SGD.make(model.parameters())
    for used in (model[0], model):
        optimizer.zero_grad()
        used(torch.ones(2, 4)).square().sum().backward()
        optimizer.step()
    assert optimizer.emotion.steps == 2


@each
def test_frozen_parameters_of_any_kind(wrapped):
    frozen = [torch.nn.Parameter(torch.ones(2, 2, dtype=torch.int8), requires_grad=False)]
    runs = []
    for beside in ([], frozen):
        params = matrices()
        optimizer = wrapped.make([*beside, *params])
        train(optimizer, params, 6)
        runs.append(params)
    assert all(torch.equal(p, q) for p, q in zip(*runs, strict=True))
    frozen[0].grad = torch.ones_like(frozen[0])
    before = contents(optimizer)
    with pytest.raises(ValueError, match="int8: only real floating-point ones"):
        optimizer.step()
    assert differences(before, contents(optimizer)) == []


@each
def test_calm_and_reset(wrapped):
    optimizer, params, _ = run(wrapped, 20, use_shadow=True)
    before = contents(optimizer)
    shadows = [optimizer.state[p]["shadow"].clone() for p in params]
    assert any(not torch.equal(p, s) for p, s in zip(params, shadows, strict=True))
    with optimizer.calm():
        assert all(torch.equal(p, s) for p, s in zip(params, shadows, strict=True))
        for what in (optimizer.step, optimizer.reset_emotion):
            with pytest.raises(RuntimeError, match="inside calm"):
                what()
    assert differences(before, contents(optimizer)) == []
    optimizer.reset_emotion()
    assert optimizer.emotion.steps == 0
    changed = {n.rpartition(": ")[2] for n in differences(before, contents(optimizer))}
    assert changed <= {"emotion", "lr_peak", "shadow"}
    train(optimizer, params, 3, start=20)


def test_a_shadow_follows_slowly_and_changes_nothing_by_being_there():
    _, plain, _ = run(SGD, 20)
    optimizer, shadowed, _ = run(SGD, 20, use_shadow=True)
    assert all(torch.equal(p, q) for p, q in zip(plain, shadowed, strict=True))
    for p, start in zip(shadowed, matrices(), strict=True):
        path, left = (p - start).detach(), (optimizer.state[p]["shadow"] - start).detach()
        assert 0.05 < float(left.norm() / path.norm()) < 0.99


@each
def test_walls(wrapped):
    params = matrices()
    optimizer = wrapped.make(params, min_lr=2e-3, max_lr=4e-3)
    acted = []
    optimizer.inner.register_step_pre_hook(lambda inner, *_: acted.append(inner.param_groups[0]["lr"]))
    for t in range(12):
        write(optimizer, log_drive=6.0 * math.sin(t))
        optimizer.step(loss=Valley(params).fill(params, t))
        if t:
            assert 2e-3 * (1 - 1e-9) <= acted[-1] <= 4e-3 * (1 + 1e-9)
    assert {2e-3, 4e-3} <= {round(a, 12) for a in acted}


# Surroundings --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fused", [False, True])
def test_grad_scaler(fused):
    """A fused optimizer would unscale by itself, after the guard; the scaler must not ask it to."""
    ends = []
    for scales in (True, False):
        torch.manual_seed(0)
        layer = torch.nn.Linear(4, 2)
        optimizer = emonavi.Emotional(torch.optim.AdamW(layer.parameters(), lr=1e-2, fused=fused))
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, enabled=scales)
        for step in range(6):
            optimizer.zero_grad()
            loss = layer(torch.ones(3, 4)).square().mean()
            scaler.scale(loss).backward()
            if scales and step == 3:
                layer.weight.grad[0, 0] = math.inf
            if scales or step != 3:
                scaler.step(optimizer)
                scaler.update()
        assert optimizer.emotion.steps == 5
        assert optimizer.emotion.grad_norm < 100
        ends.append(layer.weight.detach().clone())
    torch.testing.assert_close(ends[0], ends[1], rtol=1e-5, atol=1e-6)


def test_writer_and_live_figures():
    class Writer:
        def __init__(self):
            self.seen = []

        def add_scalar(self, tag, value, step):
            self.seen.append((tag, step))

    writer = Writer()
    run(SGD, 4, writer=writer)
    assert [step for tag, step in writer.seen if tag == "emo/drive"] == [1, 2, 3, 4]
    assert ("emo/lr/group_0", 4) in writer.seen


def test_nothing_is_kept_alive():
    optimizer, params, _ = run(SGD, 3)
    gone = weakref.ref(optimizer)
    del optimizer
    assert gone() is None
    assert params[0].grad is not None


class NoLr(torch.optim.Optimizer):
    def __init__(self, params):
        super().__init__(params, {"rate": 1.0})

    def step(self, closure=None):
        return None


def weight():
    return [torch.nn.Parameter(torch.ones(2, 2))]


@pytest.mark.parametrize(
    ("build", "options", "error", "match"),
    [
        (lambda: torch.optim.AdamW, {}, TypeError, "is no torch optimizer: construct one"),
        (
            lambda: pytorch_optimizer.Lookahead(SGD.bare(weight())),
            {},
            ValueError,
            "Lookahead does not load state dicts",
        ),
        (lambda: published(weight()), {}, ValueError, "EmoNavi has use_shadow of its own"),
        (lambda: emonavi.EmoNavi(weight()), {}, ValueError, "EmoNavi has an emotion already"),
        (lambda: emonavi.Emotional(SGD.bare(weight())), {}, ValueError, "Emotional has an emotion already"),
        (lambda: torch.optim.LBFGS(weight()), {}, ValueError, "LBFGS evaluates the model by itself"),
        (lambda: NoLr(weight()), {}, ValueError, "a group of NoLr has no lr"),
        (
            lambda: SGD.bare(weight()),
            {"emotion": "v4"},
            ValueError,
            "emotion='v4': the published generations are rules",
        ),
        (lambda: SGD.bare(weight()), {"emotion": "happy"}, ValueError, "unknown emotion 'happy'"),
        (lambda: SGD.bare(weight()), {"max_norm": -1.0}, ValueError, r"max_norm=-1.0: give a finite number"),
        (lambda: SGD.bare(weight()), {"max_lr": 1e-3, "min_lr": 1e-2}, ValueError, "is below min_lr"),
        (lambda: SGD.bare(weight()), {"use_trust": "maybe"}, ValueError, "use_trust='maybe'"),
        (lambda: SGD.bare(weight()), {"capture": "never"}, ValueError, "capture='never'"),
        (lambda: SGD.bare(weight()), {"on_missing_loss": "cry"}, ValueError, "on_missing_loss='cry'"),
        (lambda: SGD.bare(weight()), {"process_group": 3}, ValueError, "process_group=3"),
        (lambda: SGD.bare(weight()), {"writer": 3}, TypeError, "no add_scalar"),
        (lambda: SGD.bare(weight()), {"lr": 3}, TypeError, "unexpected keyword argument 'lr'"),
        (lambda: SGD.bare([torch.ones(2, dtype=torch.complex64)]), {}, ValueError, "only real floating-point"),
    ],
)
def test_constructor_errors(build, options, error, match):
    with pytest.raises(error, match=match):
        emonavi.Emotional(build(), **options)


def test_sparse_gradients_are_refused():
    embedding = torch.nn.Embedding(4, 2, sparse=True)
    optimizer = emonavi.Emotional(torch.optim.SGD(embedding.parameters(), lr=0.1))
    embedding(torch.tensor([1])).sum().backward()
    with pytest.raises(RuntimeError, match="only dense ones"):
        optimizer.step()


# What it is for ------------------------------------------------------------------------------------------------------


def trained(build, lr, wrap, steps=120):
    """Final loss of a small network on scikit-learn's digits, over all of them."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    x, y = torch.tensor(digits.data, dtype=torch.float32) / 16, torch.tensor(digits.target)
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(64, 32), torch.nn.ReLU(), torch.nn.Linear(32, 10))
    optimizer = build(net.parameters(), lr=lr)
    if wrap:
        optimizer = emonavi.Emotional(optimizer)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(1))
    for step in range(steps):
        rows = order[torch.arange(64 * step, 64 * step + 64) % len(x)]
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(net(x[rows]), y[rows]).backward()
        optimizer.step()
    with torch.no_grad():
        loss = float(torch.nn.functional.cross_entropy(net(x), y))
    return min(loss, 100.0) if math.isfinite(loss) else 100.0


@pytest.mark.parametrize("wrapped", ALL[:2], ids=lambda w: w.name)
def test_four_decades_of_lr_on_real_digits(wrapped):
    """Final loss (2.3 untrained) at five lrs: learnt at one or two of them bare, at all of them wrapped."""
    lrs = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)
    bare, ours = ([trained(wrapped.build, lr, wrap) for lr in lrs] for wrap in (False, True))
    learnt = [sum(loss <= 0.25 for loss in losses) for losses in (bare, ours)]
    assert learnt[0] <= 2, bare
    assert learnt[1] == 5, (ours, bare)


def test_steps_stay_on_the_host():
    """Where torch keeps them when it loads: on a device each one would be waited for in every step."""
    params = weights(shapes=SHAPES)
    optimizer = emonavi.Emotional(torch.optim.Adam(params))
    Valley(params).fill(params, 0)
    optimizer.step(loss=1.0)
    saved = copy.deepcopy(optimizer.state_dict())
    ghosts = [torch.nn.Parameter(torch.empty_like(p, device="meta")) for p in params]
    other = emonavi.Emotional(torch.optim.Adam(ghosts))
    other.load_state_dict(saved)
    assert {other.state[p]["step"].device.type for p in ghosts} == {"cpu"}
    assert {other.state[p]["exp_avg"].device.type for p in ghosts} == {"meta"}


def test_groups_and_state_can_be_assigned():
    """As in torch, and as Lightning's fine-tuning callback does after a restart."""
    params = weights(shapes=SHAPES)
    optimizer = emonavi.Emotional(torch.optim.AdamW(params[:2], lr=1e-2))
    train(optimizer, params[:2], 3)
    groups, state = optimizer.param_groups, optimizer.state
    optimizer.param_groups = [dict(g) for g in groups]
    optimizer.state = state.copy()
    assert optimizer.inner.param_groups is optimizer.param_groups is not groups
    assert optimizer.inner.state is optimizer.state is not state
    train(optimizer, params[:2], 2, start=3)
    assert optimizer.emotion.steps == 5


def test_a_group_that_comes_back_is_as_it_was():
    """The end of a schedule, too, is still its end."""
    params = weights(shapes=SHAPES)
    optimizer = emonavi.Emotional(torch.optim.SGD(params[:1], lr=1e-2))
    optimizer.add_param_group({"params": params[1:2], "lr": 1e-2, "min_lr": 1e-5, "max_lr": 1e-3})
    train(optimizer, params[:2], 3)
    optimizer.param_groups[1]["lr"] = 1e-4
    group = optimizer.param_groups.pop()
    optimizer.add_param_group(group)
    after = optimizer.param_groups[-1]
    assert (after["lr_floor"], after["lr_ceiling"], after["lr_peak"], after["lr_start"]) == (1e-5, 1e-3, 1e-2, 1e-2)
    with pytest.raises(TypeError, match=r"a parameter group is a dict, .*: got a list"):
        optimizer.add_param_group([params[2]])


def test_a_group_has_bounds_of_its_own():
    params = weights(shapes=SHAPES)
    optimizer = emonavi.Emotional(torch.optim.SGD(params[:1], lr=1e-2), min_lr=1e-5)
    optimizer.add_param_group({"params": params[1:2], "lr": 1e-2, "min_lr": 0.0, "max_lr": 1e-3})
    assert [(g["lr_floor"], g["lr_ceiling"]) for g in optimizer.param_groups] == [(1e-5, None), (0.0, 1e-3)]
    with pytest.raises(ValueError, match="max_lr=-3"):
        optimizer.add_param_group({"params": params[2:], "max_lr": -3.0})
    assert len(optimizer.param_groups) == 2


class Crowded(torch.optim.Optimizer):
    """Keeps things under names that the siblings use."""

    def __init__(self, params, lr=0.1):
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure=None):
        for p in self.param_groups[0]["params"]:
            if not self.state[p]:
                self.state[p] |= {name: torch.full((2,), 7.0) for name in ("shadow", "trust", "drive")}
            p.sub_(p.grad, alpha=self.param_groups[0]["lr"])


def test_what_an_optimizer_calls_as_the_siblings_do_stays_its_own():
    params, again = matrices(), matrices()
    optimizer = emonavi.Emotional(Crowded(params), capture=False)
    train(optimizer, params, 2)
    optimizer.reset_emotion()
    train(optimizer, params, 1)
    other = emonavi.Emotional(Crowded(again), capture=False)
    other.load_state_dict(through_file(optimizer.state_dict()))
    for o, some in ((optimizer, params), (other, again)):
        for p in some:
            assert all(o.state[p][name].tolist() == [7.0, 7.0] for name in ("shadow", "trust", "drive"))


@pytest.mark.parametrize("wrapped", [ADAMW, SGD], ids=lambda w: w.name)
def test_an_infinite_weight_stays_as_it_is(wrapped):
    """As in a learnt mask; its gradient is 0."""
    lrs = []
    for hidden in (True, False):
        mask, other = torch.nn.Parameter(torch.ones(3, 3)), torch.nn.Parameter(torch.ones(4))
        masked = torch.ones(3, 3).triu(1) > 0 if hidden else torch.zeros(3, 3) > 0
        mask.data.masked_fill_(masked, -torch.inf)
        optimizer = wrapped.make([mask, other], use_shadow=True)
        for _ in range(4):
            mask.grad, other.grad = torch.ones(3, 3).masked_fill(masked, 0.0), torch.ones(4)
            optimizer.step(loss=1.0)
        for held in (mask, optimizer.state[mask]["shadow"]):
            assert torch.equal(held.isinf(), masked) and not held.isnan().any()
        assert optimizer.emotion.skipped_steps == 0
        lrs.append(optimizer.effective_lr[0])
    assert lrs[0] == pytest.approx(lrs[1], rel=1e-3)  # the size of its step is known all the same


OF_TORCH = (
    *("ASGD", "Adadelta", "Adagrad", "Adam", "AdamW", "Adamax"),
    *("Muon", "NAdam", "RAdam", "RMSprop", "Rprop", "SGD"),
)


@pytest.mark.parametrize("name", OF_TORCH)
def test_shapes_of_torchs_memories_are_compared(name):
    params, others = ([torch.nn.Parameter(torch.ones(shape))] for shape in ((3, 4), (4, 3)))
    options = {"momentum": 0.9} if name == "SGD" else {}
    optimizer, other = (emonavi.Emotional(getattr(torch.optim, name)(p, **options)) for p in (params, others))
    params[0].grad = torch.ones(3, 4)
    optimizer.step(loss=1.0)
    with pytest.raises(ValueError, match=r"of other shapes: .* of parameter 0 is \(3, 4\), here \(4, 3\)"):
        other.load_state_dict(optimizer.state_dict())


def test_a_momentum_that_is_none():
    """As torch stored it once, for SGD without momentum."""
    params = matrices()
    inner = torch.optim.SGD(params, lr=0.1)
    for p in params:
        inner.state[p]["momentum_buffer"] = None
    saved = through_file(inner.state_dict())
    optimizer = emonavi.Emotional(inner, capture=False)
    train(optimizer, params, 2)
    with pytest.warns(UserWarning, match="goes on under a fresh emotion"):
        optimizer.load_state_dict(saved)


def test_a_checkpoint_of_a_model_of_other_shapes():
    """Its samples may be of the same size."""
    params, others = ([torch.nn.Parameter(torch.ones(1024, n))] for n in (1024, 2048))
    optimizer, other = ADAMW.make(params), ADAMW.make(others)
    assert len(sample(params[0])) == len(sample(others[0]))
    params[0].grad = torch.ones_like(params[0])
    optimizer.step(loss=1.0)
    for saved in (optimizer, optimizer.inner):
        with pytest.raises(ValueError, match=r"exp_avg of parameter 0 is \(1024, 1024\), here \(1024, 2048\)"):
            other.load_state_dict(saved.state_dict())
    assert not other.state


def test_wrapping_adds_nothing_to_the_defaults():
    optimizer = Crowded(matrices())
    emonavi.Emotional(optimizer)
    assert optimizer.defaults == {"lr": 0.1}


@pytest.mark.parametrize("kind", ["sibling", "wrapper"])
def test_options_of_an_added_group_may_be_spelled(kind):
    optimizer = emonavi.EmoNavi(matrices()) if kind == "sibling" else ADAMW.make(matrices())
    for spelt, lr, low, wall in (
        ({"lr": "1e-3", "min_lr": "1e-5"}, 1e-3, 1e-5, None),
        ({"lr": 1e-3, "max_lr": "None"}, 1e-3, 1e-6, None),
    ):
        optimizer.add_param_group({"params": matrices(), **spelt})
        group = optimizer.param_groups[-1]
        assert (group["lr"], group["lr_floor"], group["lr_ceiling"]) == (lr, low, wall)
