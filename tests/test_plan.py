"""What a step keeps for the next one: nothing that has changed since, and no more than it says."""

import copy
import gc
import io
import shutil
import weakref
from functools import partial

import pytest
import torch
from cases import CASES, contents, differences, train, weights

import emonavi
from emonavi import kernels
from emonavi.kernels import cpu
from emonavi.kernels.plan import Plan

pytestmark = pytest.mark.skipif(shutil.which("cc") is None, reason="needs a C compiler")
kernels_of = pytest.mark.parametrize("case", [c for c in CASES if c.kernel], ids=lambda c: c.name)
SHAPES = [(6, 4), (4, 4), (5,), (7, 3), ()]


def grow(params, t, how=lambda grad: grad):
    for i, p in enumerate(params):
        p.grad = how(torch.sin(torch.arange(p.numel()) * (0.3 + i) + t).reshape(p.shape).to(p.dtype))


def every(optimizer):
    return [p for g in optimizer.param_groups for p in g["params"]]


# Each changes an optimizer between two steps, and may return another one that is to go on in its place.


def loaded(optimizer):
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))


def pickled(optimizer):
    stream = io.BytesIO()
    torch.save(optimizer, stream)
    stream.seek(0)
    return torch.load(stream, weights_only=False)


def another_group(optimizer):
    optimizer.add_param_group({"params": [torch.nn.Parameter(torch.ones(3, 2))], "lr": 0.1})


def moved_in_memory(optimizer):
    for p in every(optimizer):
        p.data = p.data.clone()


def another_dtype(optimizer):
    for p in every(optimizer):
        p.data = p.data.double()
        for name, value in optimizer.state[p].items():
            if value.dim():
                optimizer.state[p][name] = value.double()


def transposed_in_place(optimizer):
    p = every(optimizer)[1]
    p.data = p.data.t()


def another_parameter(optimizer):
    group = optimizer.param_groups[0]
    old = group["params"][0]
    group["params"][0] = torch.nn.Parameter(old.detach().clone() + 1)
    optimizer.state[group["params"][0]] = optimizer.state.pop(old)


def another_order(optimizer):
    optimizer.param_groups[0]["params"].reverse()


def states_replaced(optimizer):
    for state in optimizer.state.values():
        state.update({name: value.clone() for name, value in state.items()})


def states_elsewhere(optimizer):
    for state in optimizer.state.values():
        for value in state.values():
            value.data = value.data.clone()


def dicts_replaced(optimizer):
    for p in every(optimizer):
        optimizer.state[p] = {name: value.clone() for name, value in optimizer.state[p].items()}


def states_exchanged(optimizer):
    first, second = optimizer.param_groups[0]["params"][:2]
    for name in ("drive", "trust"):
        a, b = optimizer.state[first], optimizer.state[second]
        a[name], b[name] = b[name], a[name]


def states_dropped(optimizer):
    optimizer.state.clear()


def by_foreach(optimizer):
    optimizer.param_groups[0].update(fused=False, foreach=True)


def with_a_shadow(optimizer):
    optimizer.param_groups[0]["use_shadow"] = True


def groups_replaced(optimizer):
    optimizer.param_groups[0] = {**optimizer.param_groups[0], "betas": (0.0, 0.5), "weight_decay": 10.0}


def steeper(optimizer):
    optimizer.param_groups[0].update(lr=0.1, betas=(0.5, 0.6), weight_decay=0.5, maximize=True, eps=1e-3)


CHANGES = [
    loaded, copy.deepcopy, pickled, another_group, moved_in_memory, another_dtype, transposed_in_place,
    another_parameter, another_order, states_replaced, states_elsewhere, dicts_replaced,
    states_exchanged, states_dropped, groups_replaced, by_foreach, with_a_shadow, steeper, lambda optimizer: None,
]  # fmt: skip


@kernels_of
@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_whatever_has_changed_is_noticed(case, change):
    runs = []
    for keeps in (True, False):
        optimizer = case.make(weights(shapes=SHAPES))
        for t in range(6):
            if t == 3:
                optimizer = change(optimizer) or optimizer
            if not keeps:
                optimizer._plan = None
            grow(every(optimizer), t)
            optimizer.step(loss=1.0 / (1 + t))
        runs.append(contents(optimizer))
    assert differences(*runs) == []


def strided(grad):
    return torch.stack([grad, grad], -1)[..., 0]


def missing(grad):
    return None if grad.dim() == 1 else grad


def read_negated(grad):
    return torch._neg_view(-grad)


class Odd(torch.Tensor):
    pass


def odd(grad):
    return grad.as_subclass(Odd)


@kernels_of
@pytest.mark.parametrize(
    "how",
    [strided, missing, read_negated, lambda grad: grad.as_subclass(Odd)],
    ids=["strided", "missing", "neg", "odd"],
)
def test_gradients_of_another_kind_are_noticed(case, how):
    runs = []
    for keeps in (True, False):
        params = weights(shapes=SHAPES)
        optimizer = case.make(params)
        for t in range(6):
            if not keeps:
                optimizer._plan = None
            grow(params, t, how if t == 3 else lambda grad: grad)
            optimizer.step(loss=1.0)
        runs.append(contents(optimizer))
    assert differences(*runs) == []


@kernels_of
def test_another_parameter_in_the_place_of_one_alike_is_noticed(case):
    runs = []
    for keeps in (True, False):
        params = weights(shapes=[(4, 3), (4, 3)])
        optimizer = case.make(params)
        for t in range(5):
            if not keeps:
                optimizer._plan = None
            grow(params, t)
            if t:  # at first all have a gradient, so that there is state for each
                params[t % 2].grad = None
            optimizer.step(loss=1.0)
        runs.append(contents(optimizer))
    assert differences(*runs) == []


@kernels_of
def test_another_group_of_the_same_parameter_is_noticed(case):
    runs = []
    for keeps in (True, False):
        a, b, c = weights(shapes=[(4, 3), (4, 3), (4, 3)])
        optimizer = case.make([{"params": [a, b]}, {"params": [c], "lr": 0.1}])
        for t in range(4):
            if not keeps:
                optimizer._plan = None
            if t == 2:
                optimizer.param_groups[1]["params"].insert(0, optimizer.param_groups[0]["params"].pop())
            grow([a, b, c], t)
            optimizer.step(loss=1.0)
        runs.append(contents(optimizer))
    assert differences(*runs) == []


@kernels_of
def test_what_has_not_changed_is_found_out_once(case, monkeypatch):
    asked = []
    monkeypatch.setattr("emonavi.optimizer.choose", lambda *args: asked.append(1) or kernels.choose(*args))
    params = weights(shapes=SHAPES)
    optimizer = case.make(params)
    for t in range(4):
        grow(params, t)
        optimizer.step(loss=1.0)
        asked.append("step")
    assert asked.index("step") > 0 and asked[asked.index("step") :] == ["step"] * 4


@kernels_of
def test_no_gradient_is_held_between_steps(case):
    params = weights(shapes=SHAPES)
    optimizer = case.make(params)
    for t in range(2):
        grow(params, t)
        held = [weakref.ref(p.grad) for p in params]
        optimizer.step(loss=1.0)
        optimizer.zero_grad()
        gc.collect()
        assert [ref() for ref in held] == [None] * len(params)


@kernels_of
def test_memories_of_before_a_load_are_not_held(case):
    params = weights(shapes=SHAPES)
    optimizer = case.make(params)
    grow(params, 0)
    optimizer.step(loss=1.0)
    held = [weakref.ref(t) for p in params for t in optimizer.state[p].values()]
    loaded(optimizer)
    gc.collect()
    assert [ref() for ref in held] == [None] * len(held)


@kernels_of
def test_numbers_whose_storage_moves_are_noticed(case):
    """As when a tensor is sent to another process: it stays the same object, and its old memory is freed."""
    params = weights(shapes=SHAPES)
    optimizer = case.make(params)
    for t in range(8):
        grow(params, t)
        optimizer.step(loss=1.0)
        if t == 3:
            for state in optimizer.state.values():
                for value in state.values():
                    value.share_memory_()
    assert [int(optimizer.state[p]["step"]) for p in params] == [8] * len(params)


@pytest.mark.parametrize("resumed", [False, True])
def test_scalars_that_move_in_memory_are_followed(resumed):
    """As by share_memory_(), which frees what was there, for workers that step one optimizer."""
    params = weights(shapes=SHAPES)
    optimizer = emonavi.EmoNavi(params, capture=False, on_missing_loss="ignore")
    train(optimizer, params, 3)
    if resumed:
        optimizer.load_state_dict(optimizer.state_dict())
        train(optimizer, params, 1, start=3)
    assert optimizer._plan is not None
    steps = 4 if resumed else 3
    for p in params:
        optimizer.state[p]["drive"].share_memory_()
    train(optimizer, params, 2, start=steps)
    assert {float(optimizer.state[p]["step"]) for p in params} == {steps + 2.0}


def test_a_shape_that_changes_in_place_is_noticed():
    """Where the rule has rows and columns."""
    params = weights(shapes=SHAPES)
    optimizer = emonavi.EmoFact(params, capture=False)
    for t in range(3):
        grow(params, t)
        optimizer.step(loss=1.0)
    params[0].grad = None
    params[0].data = params[0].data.reshape(4, 6)
    grow(params, 3)
    before = contents(optimizer)
    with pytest.raises(RuntimeError, match=r"a parameter of shape \(4, 6\) has exp_avg"):
        optimizer.step(loss=1.0)
    assert differences(before, contents(optimizer)) == []


@kernels_of
def test_what_users_keep_in_a_state_is_left_alone(case):
    params = weights(shapes=SHAPES)
    optimizer = case.make(params)
    for t in range(4):
        scale = 1e6 if t == 0 else 1.0  # the first is known by the second, and taken out
        grow(params, t, partial(torch.mul, scale))
        optimizer.step(loss=1.0)
        if t == 0:
            optimizer.state[params[0]] |= {"tag": "mine", "own": torch.ones(3)}
    assert optimizer.state[params[0]]["tag"] == "mine"
    assert torch.equal(optimizer.state[params[0]]["own"], torch.ones(3))


@kernels_of
@pytest.mark.parametrize("name", ["param", "grad", "exp_avg"])
def test_a_tensor_of_another_size_is_no_kernels(case, name):
    """C would read or write beyond its end."""
    params = weights(shapes=[(5,)])
    optimizer = case.make(params, fused=True)
    for t in range(2):
        grow(params, t)
        optimizer.step(loss=1.0)
    if name == "param":
        params[0].data = torch.ones(9)
        params[0].grad = torch.ones(9)
    elif name == "grad":
        params[0].data = torch.ones(9)
    else:
        optimizer.state[params[0]]["exp_avg"] = torch.ones(2)
    with pytest.raises(RuntimeError, match=r"one size|size of tensor|shape"):
        optimizer.step(loss=1.0)


def test_a_kernel_takes_the_gradients_of_each_call():
    lists = {name: [torch.zeros(3)] for name in ("param", "grad", "exp_avg", "exp_avg_sq")}
    group = {"fused": True, "foreach": None, "capturable": False, "stochastic_rounding": True}
    from emonavi.navi import emonavi

    kernel = kernels.choose(emonavi, lists, group, False)
    one = torch.ones(1, dtype=torch.float64)
    scalars = {"step_size": one, "root": one, "last_root": one, "beta1": 0.0, "beta2": 0.0, "eps": 0.0, "decay": None}
    for sign in (1.0, -1.0):
        kernel(lists | {"grad": [torch.full((3,), sign)]}, scalars | {"reflect": False}, 1.0, True, None)
    assert lists["param"][0].tolist() == [0.0] * 3
    assert isinstance(kernel, cpu.Sweep)


def test_a_parameter_without_elements_leaves_the_plan_in_place(monkeypatch):
    params = [*weights(), torch.nn.Parameter(torch.ones(0))]
    optimizer = emonavi.EmoNavi(params, capture=False)
    made = []
    monkeypatch.setattr(kernels, "planned", lambda *args: made.append(Plan.of(*args)) or made[-1])
    for _ in range(3):
        for p in params:
            p.grad = torch.ones_like(p)
        optimizer.step(loss=1.0)
    assert len(made) == 1 and made[0] is not None
