"""Tensors of every kind: many, empty, strided, of few bits."""

import math

import pytest
import torch
from cases import SHAPES, Valley, contents, differences, drive, felt, siblings, train, ways, weights
from hypothesis import given, settings
from hypothesis import strategies as st

# As in test_reference: sums of reflection are taken piece by piece, so that the drive differs by roundings.
SAME = {"rtol": 2e-5, "atol": 2e-6}


@siblings
@ways
def test_ten_thousand_tiny_parameters(case, foreach):
    """Equal to one long vector where the rule is elementwise; here: it runs, moves all, and counts each."""
    count = 10_000 if foreach else 1_000
    params = [torch.nn.Parameter(torch.full((2,), 1.0 + i / count)) for i in range(count)]
    optimizer = case.make(params, foreach=foreach)
    for _ in range(2):
        for p in params:
            p.grad = p.detach().clone()
        optimizer.step(loss=1.0)
    assert all(bool((p < 1.0 + i / count).all()) for i, p in enumerate(params))
    assert {float(optimizer.state[p]["step"]) for p in params} == {2.0}


@siblings
@pytest.mark.parametrize("first", [True, False])
def test_a_layer_without_memory(case, first):
    """A meta parameter may be in the list, as in torch.optim; a gradient there is refused, except at lr 0."""
    real, ghost = torch.nn.Parameter(torch.ones(3)), torch.nn.Parameter(torch.ones(3, device="meta"))
    optimizer = case.make([ghost, real] if first else [real, ghost])
    real.grad = torch.ones(3)
    optimizer.step(loss=1.0)
    assert optimizer.emotion.steps == 1 and bool((real < 1).all())
    ghost.grad = torch.ones(3, device="meta")
    with pytest.raises(RuntimeError, match=r"on the meta device.*to_empty"):
        optimizer.step(loss=1.0)
    assert optimizer.emotion.steps == 1
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    optimizer.step()


@siblings
def test_lazy_modules_may_be_built_later(case):
    """As in torch.optim: a parameter may have no shape yet, and be of a part that is used later still."""
    model = torch.nn.Sequential(torch.nn.LazyLinear(3), torch.nn.LazyLinear(2))
    optimizer = case.make(model.parameters())
    for used in (model[0], model[0], model):
        optimizer.zero_grad()
        used(torch.ones(2, 4)).square().sum().backward()
        optimizer.step(loss=1.0)
    assert [float(optimizer.state[p]["step"]) for p in model.parameters()] == [3, 3, 1, 1]


def strided():
    """Pairs of a parameter that does not lie in memory row by row, and the same one that does."""
    base = torch.arange(48.0).sin()
    return {
        "transposed": base[:24].view(4, 6).t(),
        "slice of rows": base.view(8, 6)[::2],
        "slice of columns": base.view(6, 8)[:, 1:7:2],
        "permuted conv": base.view(2, 4, 3, 2).permute(3, 0, 1, 2),
        "channels_last": base.view(2, 4, 3, 2).contiguous(memory_format=torch.channels_last),
        "offset vector": base[5:17],
        "strided vector": base[1::3],
        "row of one": base[:6].view(1, 6),
    }


@siblings
@ways
@pytest.mark.parametrize("kind", strided())
@pytest.mark.parametrize("shadow", [False, True], ids=["plain", "shadow"])
def test_strided_parameters(case, foreach, kind, shadow):
    """The layout of a parameter does not change its run, but for the order in which sums are taken."""
    shape = strided()[kind].shape
    plain = [torch.nn.Parameter(strided()[kind].detach().clone(memory_format=torch.contiguous_format))]
    odd_tensor = strided()[kind]
    holder = odd_tensor.untyped_storage()
    odd = [torch.nn.Parameter(odd_tensor)]
    outside = _outside(odd[0], holder)
    runs = [case.make(p, foreach=foreach, use_shadow=shadow, weight_decay=0.1) for p in (plain, odd)]
    valley = Valley(plain)
    stride = odd[0].stride()
    for t in range(25):
        loss = valley.fill(plain, t)
        # Half of the time the gradient lies as the parameter does, half of the time it does not.
        odd[0].grad = torch.empty_strided(shape, stride).copy_(plain[0].grad) if t % 2 else plain[0].grad.clone()
        for optimizer in runs:
            optimizer.step(loss=loss)
        torch.testing.assert_close(odd[0].detach(), plain[0].detach(), rtol=1e-4, atol=1e-5)
    assert odd[0].stride() == stride
    assert torch.equal(outside, _outside(odd[0], holder)), "the step wrote beside the parameter"


def _outside(tensor, storage):
    """The memory around a strided tensor."""
    everything = torch.empty(0).set_(storage).clone()
    mask = torch.ones(len(everything), dtype=torch.bool)
    inside = torch.empty(0, dtype=torch.int64).set_(
        torch.arange(len(everything)).untyped_storage(), tensor.storage_offset(), tensor.shape, tensor.stride()
    )
    mask[inside.reshape(-1)] = False
    return everything[mask]


@siblings
@ways
def test_expanded_gradients(case, foreach):
    """``sum().backward()`` leaves gradients with stride 0: they are read, never written."""
    params, plain = weights(shapes=SHAPES[:3]), weights(shapes=SHAPES[:3])
    a, b = case.make(params, foreach=foreach), case.make(plain, foreach=foreach)
    for t in range(12):
        for p, q in zip(params, plain, strict=True):
            one = torch.tensor(1.0 + 0.3 * t)
            p.grad = one.expand(p.shape)
            q.grad = one.expand(p.shape).clone()
        a.step(loss=1.0)
        b.step(loss=1.0)
        assert all(p.grad.stride() == (0,) * p.dim() for p in params)
    for p, q in zip(params, plain, strict=True):
        torch.testing.assert_close(p, q, **SAME)


@siblings
@ways
def test_zero_size_and_zero_dim(case, foreach):
    shapes = [(0,), (), (3, 0), (1,), (0, 4), (2, 3)]
    params = weights(shapes=shapes)
    optimizer = case.make(params, foreach=foreach, use_shadow=True)
    start = [p.detach().clone() for p in params]
    train(optimizer, params, 15)
    for p, s in zip(params, start, strict=True):
        assert p.shape == s.shape
        assert p.numel() == 0 or not torch.equal(p, s)
    full = [(), (1,), (2, 3)]
    alone = [torch.nn.Parameter(s.clone()) for s in start if s.numel()]
    assert [tuple(p.shape) for p in alone] == full
    valley = Valley(params)
    valley.targets = [t for t in valley.targets if t.numel()]
    other = case.make(alone, foreach=foreach, use_shadow=True)
    only_empty = case.make(weights(shapes=[(0,), (0, 3)]), foreach=foreach)
    for p in only_empty.param_groups[0]["params"]:
        p.grad = torch.zeros_like(p)
    only_empty.step(loss=1.0)
    assert only_empty.emotion.steps == 0
    train(other, alone, 3)
    assert other.emotion.steps == 3
    with optimizer.calm():
        pass


@siblings
@ways
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_sixteen_bits_follow_float32(case, foreach, dtype):
    """State is float32; the parameters are the float32 run's but for their own rounding, step by step."""
    few, wide = weights(dtype), [torch.nn.Parameter(p.detach().float()) for p in weights(dtype)]
    a, b = case.make(few, foreach=foreach, stochastic_rounding=False), case.make(wide, foreach=foreach)
    valley = Valley(few)
    for t in range(10):
        loss = valley.fill(few, t)
        with torch.no_grad():
            for p, q in zip(few, wide, strict=True):
                q.copy_(p.float())
                q.grad = p.grad.float()
        a.step(loss=loss)
        b.step(loss=loss)
        for p, q in zip(few, wide, strict=True):
            assert p.dtype == dtype
            assert torch.equal(p, q.detach().to(dtype))
            assert {v.dtype for v in a.state[p].values()} == {torch.float32}
    assert differences({"e": a.param_groups[0]["emotion"]}, {"e": b.param_groups[0]["emotion"]}) == []


@siblings
@ways
def test_float64_is_computed_in_float64(case, foreach):
    params = weights(torch.float64)
    optimizer = case.make(params, foreach=foreach, use_shadow=True)
    train(optimizer, params, 3)
    for p in params:
        kept = {k: v.dtype for k, v in optimizer.state[p].items() if v.dim() or k not in ("step", "drive", "trust")}
        assert set(kept.values()) == {torch.float64}


@siblings
@ways
def test_float16_does_not_overflow(case, foreach):
    """Squares of 300 overflow in 16 bits, and eps vanishes there."""
    params = [
        torch.nn.Parameter(torch.full((40, 40), 2.0, dtype=torch.float16)),
        torch.nn.Parameter(torch.ones(9).half()),
    ]
    optimizer = case.make(params, foreach=foreach)
    for t in range(6):
        for p in params:
            p.grad = torch.full_like(p, 300.0 if t % 2 else 1e-7)
        optimizer.step(loss=1.0)
    assert optimizer.emotion.skipped_steps == 0
    assert all(bool(p.isfinite().all()) for p in params)
    assert bool((params[0] < 2).all())


@siblings
@ways
def test_mixed_dtypes_in_one_optimizer(case, foreach):
    kinds = [torch.float32, torch.bfloat16, torch.float64, torch.float16]
    params = [p for d in kinds for p in weights(d)]
    optimizer = case.make(params, foreach=foreach, use_shadow=True)
    losses = train(optimizer, params, 40)
    assert [p.dtype for p in params] == [d for d in kinds for _ in SHAPES]
    assert losses[-1] < losses[0]
    assert optimizer.emotion.skipped_steps == 0


@siblings
def test_large_and_tiny_gradients_keep_everything_finite(case):
    for size in (1e-30, 1e-12, 1e12, 1e18):
        params = weights()
        optimizer = case.make(params)
        train(optimizer, params, 15, scale=size)
        assert optimizer.emotion.skipped_steps == 0
        assert all(bool(p.isfinite().all()) for p in params), size
        assert all(bool(v.isfinite().all()) for p in params for v in optimizer.state[p].values()), size
        assert 0 < drive(optimizer) < 1e6
        assert abs(felt(optimizer, "trust")) <= 1 + 1e-6


dims = st.lists(st.integers(1, 9), min_size=0, max_size=4).map(tuple)


@siblings
@settings(max_examples=25)
@given(shapes=st.lists(dims, min_size=1, max_size=6), decay=st.sampled_from([0.0, 0.1]), shadow=st.booleans())
def test_foreach_and_kernel_equal_single_for_any_shapes(case, shapes, decay, shadow):
    runs = []
    for foreach in (False, True, None):
        params = weights(shapes=shapes)
        optimizer = case.make(params, foreach=foreach, weight_decay=decay, use_shadow=shadow)
        train(optimizer, params, 8)
        runs.append(contents(optimizer))
    a = runs[0]
    for b in runs[1:]:
        assert a.keys() == b.keys()
        for name in a:
            if isinstance(a[name], torch.Tensor):
                torch.testing.assert_close(a[name], b[name], msg=lambda m, name=name: f"{name}: {m}", **SAME)


@siblings
def test_cut_tensors_equal_whole_ones(case):
    """Above the size of a piece, elementwise rules cut tensors; single never does."""
    shapes = [(70_001,), (33_000, 3), (4, 40_000), (32_768,), (32_769,)]
    runs = []
    for foreach in (False, True, None):
        params = weights(shapes=shapes)
        optimizer = case.make(params, foreach=foreach)
        for t in range(4):
            for i, p in enumerate(params):
                p.grad = torch.sin(p.detach() * (t + 1) + i)
            optimizer.step(loss=1.0)
        runs.append(params)
    for p, *others in zip(*runs, strict=True):
        for q in others:
            torch.testing.assert_close(p, q, **SAME)


@siblings
@pytest.mark.parametrize("foreach", [False, True, None], ids=["single", "foreach", "kernel"])
def test_a_default_device_is_for_new_tensors_of_the_users(case, foreach):
    """A kernel is given memory of its own, wherever the user's new tensors go."""
    runs = []
    for device in ("cpu", "meta"):
        params = weights(shapes=SHAPES)
        with torch.device(device):
            optimizer = case.make(params, foreach=foreach)
            for _ in range(3):
                for p in params:
                    p.grad = p.detach().clone()
                optimizer.step(loss=1.0)
        runs.append(contents(optimizer))
    assert differences(*runs) == []


WAYS = ({}, {"fused": False}, {"capturable": True})


@siblings
@pytest.mark.parametrize("kwargs", WAYS, ids=str)
@pytest.mark.parametrize("since", [0, 1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_an_infinite_weight_stays_as_it_is(case, kwargs, since, dtype):
    """As in a mask, whose gradient is 0 there; of the scale of the weights it says nothing."""
    plain, mask = (torch.nn.Parameter(torch.full(shape, 0.1, dtype=dtype)) for shape in ((4, 4), (4,)))
    optimizer = case.make([plain, mask], lr=1.0, use_shadow=True, **kwargs)
    for t in range(8):
        if t == since:
            mask.data[0] = -torch.inf
        for p in (plain, mask):
            p.grad = torch.ones_like(p).masked_fill(p.isinf(), 0.0)
        if t == 6:
            plain.grad[0, 0] = torch.nan  # a panic, which restores the shadow
        optimizer.step(loss=1.0)
    hidden = [True, False, False, False]
    assert mask.isinf().tolist() == hidden and not mask.isnan().any()
    shadow = optimizer.state[mask]["shadow"]
    assert shadow.isinf().tolist() == hidden and not shadow.isnan().any()
    assert optimizer.emotion.skipped_steps == 1 and not plain.isnan().any()
    assert optimizer.effective_lr[0] < 0.01


@siblings
def test_what_is_left_in_a_group_is_looked_at(case):
    params = weights()
    for name, value in (("lr", -0.1), ("weight_decay", math.nan), ("lr_floor", math.nan), ("lr_ceiling", -1.0)):
        optimizer = case.make(params)
        train(optimizer, params, 2)
        optimizer.param_groups[0][name] = value
        Valley(params).fill(params, 2)
        before = contents(optimizer)
        with pytest.raises(ValueError, match=f"{name}={value} in a group: a step needs a finite number of at least 0"):
            optimizer.step(loss=1.0)
        optimizer.param_groups[0][name] = before[f"group 0: {name}"] = 0  # NaN equals nothing, itself included
        assert differences(before, contents(optimizer)) == []
