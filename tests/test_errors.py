"""Every refusal: its type, its words, and that it leaves everything as it was."""

import gc
import inspect
import math
import re

import numpy as np
import pytest
import torch
from cases import CASES, Valley, contents, differences, siblings, train, ways, weights

import emonavi
from emonavi.presets import PRESETS

SQUARE = dict  # any object without add_scalar
CONSTRUCTOR = [
    ({"lr": -1e-3}, ValueError, r"lr=-0\.001.*at least 0"),
    ({"lr": math.nan}, ValueError, r"lr=nan"),
    ({"lr": math.inf}, ValueError, r"lr=inf"),
    ({"lr": "fast"}, ValueError, r"lr='fast'"),
    ({"lr": None}, ValueError, r"lr=None"),
    ({"lr": torch.ones(2)}, ValueError, r"lr is a tensor of shape \(2,\)"),
    ({"lr": torch.tensor(-1.0)}, ValueError, r"lr=tensor\(-1"),
    ({"betas": (1.0, 0.9)}, ValueError, r"betas=\(1\.0, 0\.9\)"),
    ({"betas": (0.9, -0.1)}, ValueError, r"betas="),
    ({"betas": (0.9,)}, ValueError, r"betas="),
    ({"betas": (0.9, 0.9, 0.9)}, ValueError, r"betas="),
    ({"betas": 0.9}, ValueError, r"betas=0\.9"),
    ({"betas": (0.9, math.nan)}, ValueError, r"betas="),
    ({"eps": -1e-8}, ValueError, r"eps=-1e-08"),
    ({"eps": torch.ones(2)}, ValueError, r"eps=tensor\(\[1., 1.\]\): give a finite number of at least 0"),
    ({"betas": (torch.ones(2), 0.9)}, ValueError, r"betas=\(tensor"),
    ({"weight_decay": -0.1}, ValueError, r"weight_decay=-0\.1"),
    ({"weight_decay": math.inf}, ValueError, r"weight_decay=inf"),
    ({"max_norm": -1.0}, ValueError, r"max_norm=-1\.0"),
    ({"min_lr": -1.0}, ValueError, r"min_lr=-1\.0"),
    ({"max_lr": -1.0}, ValueError, r"max_lr=-1\.0"),
    ({"max_lr": 1e-5, "min_lr": 1e-4}, ValueError, r"max_lr=1e-05 is below min_lr=0\.0001"),
    ({"emotion": "v2"}, ValueError, r"unknown emotion 'v2'.*'adaptive'.*'v3'"),
    ({"emotion": 4}, ValueError, r"unknown emotion 4"),
    ({"emotion": {"begin": 1e-3}}, ValueError, r"emotion=\{'begin': 0.001\}: the constants of an emotion are start, "),
    ({"emotion": "{'start': -1}"}, ValueError, r"Emotion\(start=-1\): give a finite number"),
    ({"emotion": "{'start': "}, ValueError, r"unknown emotion"),
    ({"emotion": ["v1"]}, ValueError, r"unknown emotion \['v1'\]"),
    ({"emotion": emonavi.Emotion(start=-1)}, ValueError, r"Emotion\(start=-1\): give a finite number of at least 0"),
    ({"emotion": emonavi.Emotion(pace="slow")}, ValueError, r"Emotion\(pace='slow'\): give a finite number"),
    ({"emotion": emonavi.Emotion(spike=math.nan)}, ValueError, r"Emotion\(spike=nan\): give a finite number"),
    ({"use_shadow": "no"}, ValueError, r"use_shadow='no': give True or False"),
    ({"use_trust": 2}, ValueError, r"use_trust=2: give True or False"),
    ({"capture": "always"}, ValueError, r"capture='always'"),
    ({"on_missing_loss": "shout"}, ValueError, r"on_missing_loss='shout'"),
    ({"fused": True, "foreach": True}, ValueError, r"fused=True and foreach=True"),
    ({"fused": True, "capturable": True}, RuntimeError, r"fused=True: .*leave fused at None"),
    ({"writer": 3}, TypeError, r"writer=3 has no add_scalar"),
    ({"writer": SQUARE}, TypeError, r"add_scalar"),
    ({"learning_rate": 1e-3}, TypeError, r"unexpected keyword argument 'learning_rate'"),
    ({"use_shadows": True}, TypeError, r"unexpected keyword argument"),
    ({"amsgrad": True}, TypeError, r"unexpected keyword argument"),
    # A preset is asked for what it lacks.
    ({"emotion": "v1", "use_shadow": True}, ValueError, r"'v1' does not have use_shadow=True"),
    ({"emotion": "v1", "max_norm": 1.0}, ValueError, r"'v1' does not have max_norm=1\.0"),
    ({"emotion": "v3", "use_trust": True}, ValueError, r"'v3' does not have use_trust=True.*it has use_shadow"),
    ({"emotion": "v3", "min_lr": 1e-6}, ValueError, r"'v3' does not have min_lr"),
    ({"emotion": "v4", "max_lr": 1.0}, ValueError, r"'v4' does not have max_lr"),
]


def lacking(case):
    return [generation for generation in PRESETS if generation not in case.generations]


# A generation that a sibling does not have is refused before its options are.
REFUSED = [(c, *row) for c in CASES for row in CONSTRUCTOR if row[0].get("emotion") not in lacking(c)]


@pytest.mark.parametrize(("case", "kwargs", "kind", "words"), REFUSED, ids=[f"{c.name}-{k}" for c, k, *_ in REFUSED])
def test_constructor(case, kwargs, kind, words):
    params = weights()
    backward = torch.autograd.backward
    with pytest.raises(kind, match=re.compile(words, re.DOTALL)) as error:
        case.cls(params, **kwargs)
    del error
    if torch.autograd.backward is not backward:
        gc.collect()  # the traceback held the half-made optimizer
    assert all(torch.equal(p, q) and p.grad is None for p, q in zip(params, weights(), strict=True))
    assert torch.autograd.backward is backward, "a constructor that failed left its ears on"


GROUP = [
    (lambda p: p[0], TypeError, "iterable|Tensor"),
    (lambda p: [], ValueError, "empty parameter list"),
    (lambda p: [{"params": p}, {"params": p[:1]}], ValueError, "more than one parameter group"),
    (lambda p: [{"params": p, "lr": -1.0}], ValueError, r"lr=-1\.0"),
    (lambda p: [{"params": p[:1]}, {"params": p[1:], "betas": (2, 0)}], ValueError, "betas"),
    (lambda p: [{"params": p, "max_lr": 1e-9}], ValueError, "below min_lr"),
    (lambda p: [{"params": p, "fused": True, "foreach": True}], ValueError, "fused=True"),
    # The emotion is one for all groups.
    (lambda p: [{"params": p, "use_shadow": True}], ValueError, "use_shadow=True in a group.*to the constructor"),
    (lambda p: [{"params": p[:1]}, {"params": p[1:], "max_norm": 0.0}], ValueError, r"max_norm=0\.0 in a group"),
    (lambda p: [{"params": p[:1]}, {"params": p[1:], "use_trust": "0"}], ValueError, "use_trust=False in a group"),
    (lambda p: [{"params": p, "capturable": True}], ValueError, "capturable=True in a group"),
    (lambda p: [{"params": p, "emotion": "v3"}], ValueError, "emotion='v3' in a group"),
    (lambda p: [{"params": p, "writer": "runs"}], ValueError, "writer='runs' in a group"),
    (lambda p: [{"lr": 0.1}], (KeyError, ValueError), "params"),
    (lambda p: [("a", p[0]), p[1]], (ValueError, TypeError), "named|tuple|all optimizer params"),
    (lambda p: ["weights"], TypeError, "Tensors"),
    (lambda p: [p[0] * 2], ValueError, "non-leaf"),
    (lambda p: [torch.nn.Parameter(torch.ones(2, dtype=torch.complex64))], ValueError, "complex64.*view_as_real"),
    (lambda p: [torch.ones(2, dtype=torch.int64)], ValueError, "int64"),
    (lambda p: [torch.ones(2, 2).to_sparse()], ValueError, "sparse|dense"),
]


@siblings
@pytest.mark.parametrize(("bad", "kind", "words"), GROUP, ids=[str(i) for i in range(len(GROUP))])
def test_parameters_and_groups(case, bad, kind, words):
    with pytest.raises(kind, match=words):
        case.make(bad(weights()))


def test_the_base_class_is_no_optimizer():
    with pytest.raises(TypeError, match=r"EmoOptimizer is the base class .*: use one of EmoNavi, .*emonavi\.create"):
        emonavi.EmoOptimizer(weights())


@siblings
@pytest.mark.parametrize(
    ("bad", "kind", "words"),
    [
        ({"lr": -1.0}, ValueError, r"lr=-1\.0"),
        ({"betas": (1.0, 0.0)}, ValueError, "betas"),
        ({"params": [torch.nn.Parameter(torch.ones(2, dtype=torch.complex64))]}, ValueError, "complex64"),
        ({"params": "same"}, ValueError, "more than one parameter group"),
        ({"fused": True, "foreach": True}, ValueError, "fused"),
    ],
    ids=str,
)
def test_add_param_group(case, bad, kind, words):
    """The other shape of groups: added later. Nothing is added by halves."""
    params = weights()
    optimizer = case.make(params)
    train(optimizer, params, 3)
    before = contents(optimizer)
    with pytest.raises(TypeError, match=r"a parameter group is a dict, .*: got a list"):
        optimizer.add_param_group([torch.nn.Parameter(torch.ones(3))])
    group = {"params": [torch.nn.Parameter(torch.ones(3))]} | bad
    if group["params"] == "same":
        group["params"] = params[:1]
    with pytest.raises(kind, match=words):
        optimizer.add_param_group(group)
    assert len(optimizer.param_groups) == 1
    assert differences(before, contents(optimizer)) == []
    train(optimizer, params, 2, start=3)


@siblings
def test_sparse_gradient(case):
    params = weights()
    optimizer = case.make(params)
    train(optimizer, params, 3)
    loss = Valley(params).fill(params, 3)
    params[0].grad = params[0].grad.to_sparse()
    before = contents(optimizer)
    with pytest.raises(RuntimeError, match="sparse=False"):
        optimizer.step(loss=loss)
    assert differences(before, contents(optimizer)) == []


@siblings
def test_sparse_gradient_at_the_first_step(case):
    params = weights()
    optimizer = case.make(params)
    loss = Valley(params).fill(params, 0)
    params[2].grad = params[2].grad.to_sparse()
    before = contents(optimizer)
    with pytest.raises(RuntimeError, match="sparse=False"):
        optimizer.step(loss=loss)
    assert differences(before, contents(optimizer)) == []


@siblings
@pytest.mark.parametrize("lr", [math.nan, math.inf, "1e-3", None, torch.tensor(math.nan)], ids=str)
def test_an_lr_that_is_no_number(case, lr):
    """As a scheduler may leave it. Nothing is left of weights that have moved by it."""
    params = weights()
    optimizer = case.make(params)
    train(optimizer, params, 3)
    optimizer.param_groups[0]["lr"] = lr
    before = contents(optimizer)
    with pytest.raises(ValueError, match=r"lr=.* in a group: .* a finite number"):
        train(optimizer, params, 1, start=3)
    optimizer.param_groups[0]["lr"] = before["group 0: lr"] = 0  # NaN equals nothing, itself included
    assert differences(before, contents(optimizer)) == []
    for lr in (1e-3, np.float32(1e-3), -1e-20, 0):  # a cosine may end a little below 0
        optimizer.param_groups[0]["lr"] = lr
        train(optimizer, params, 1, start=3)
    assert all(p.isfinite().all() for p in params)


@siblings
@ways
@pytest.mark.parametrize("shape", [(600, 4), (2, 4), (4, 6)], ids=str)
def test_data_of_another_shape(case, foreach, shape):
    """A kernel would write past the end of what is smaller; torch looks at neither."""
    params = weights()
    optimizer = case.make(params, foreach=foreach, use_shadow=True)
    train(optimizer, params, 3)
    params[0].data = torch.ones(shape)
    before = contents(optimizer)
    with pytest.raises(RuntimeError, match=r"has a gradient of shape .*: call zero_grad"):
        optimizer.step(loss=1.0)
    params[0].grad = torch.ones(shape)
    with pytest.raises(RuntimeError, match=r"has exp_avg.* of shape .*del optimizer\.state"):
        optimizer.step(loss=1.0)
    assert differences(before, contents(optimizer)) == []
    del optimizer.state[params[0]]
    optimizer.step(loss=1.0)
    assert optimizer.state[params[0]]["step"] == 1


@siblings
@ways
def test_an_expanded_parameter(case, foreach):
    """torch would notice it only when the parameters before it have moved."""
    params = [*weights(), torch.nn.Parameter(torch.ones(1, 3).expand(4, 3))]
    optimizer = case.make(params, foreach=foreach)
    before = contents(optimizer)
    with pytest.raises(RuntimeError, match=r"shape \(4, 3\) is expanded, .*clone"):
        train(optimizer, params, 1)
    assert differences(before, contents(optimizer)) == []


@siblings
@pytest.mark.parametrize("state_dtype", [None, "bf16", "8bit"])
@pytest.mark.parametrize("shape", [(600, 40), (20, 400), (400, 20)], ids=str)
def test_checkpoint_of_another_shape(case, state_dtype, shape):
    """As of a model with another vocabulary. Refused before anything changes."""
    mine, theirs = weights(shapes=((400, 20), (5,))), weights(shapes=(shape, (5,)))
    optimizer, other = (case.make(some, state_dtype=state_dtype, use_shadow=True) for some in (mine, theirs))
    train(optimizer, mine, 2)
    train(other, theirs, 2)
    before = contents(optimizer)
    if shape == (400, 20):
        optimizer.load_state_dict(other.state_dict())
        return
    with pytest.raises(ValueError, match=r"of a model of other shapes: exp_avg.* of parameter 0 is .*, here "):
        optimizer.load_state_dict(other.state_dict())
    assert differences(before, contents(optimizer)) == []


@siblings
@pytest.mark.parametrize("given", [{}, {"state": {}}, {"model": 1, "optimizer": 2}, {"state": {}, "param_groups": []}])
def test_what_is_no_state_dict(case, given):
    """Such as a whole checkpoint, in which it lies under another name."""
    params = weights()
    held = ", ".join(given) or "nothing"
    for optimizer in (case.make(params), emonavi.Emotional(torch.optim.SGD(params, lr=0.1))):
        before = contents(optimizer)
        with pytest.raises(ValueError, match=f"no state dict of an optimizer, it holds {held}:"):
            optimizer.load_state_dict(given)
        assert differences(before, contents(optimizer)) == []


@siblings
def test_bad_writer_leaves_the_old_one(case):
    class Writer:
        def add_scalar(self, tag, value, step):
            pass

    good = Writer()
    optimizer = case.make(weights(), writer=good)
    with pytest.raises(TypeError, match="add_scalar"):
        optimizer.writer = 3
    assert optimizer.writer is good


@siblings
def test_a_closure_that_raises_leaves_everything(case):
    params = weights()
    optimizer = case.make(params)
    train(optimizer, params, 3)
    before = contents(optimizer)

    def closure():
        raise ZeroDivisionError("mine")

    with pytest.raises(ZeroDivisionError, match="mine"):
        optimizer.step(closure)
    assert differences(before, contents(optimizer)) == []
    train(optimizer, params, 1, start=3)


def test_observe_and_create():
    with pytest.raises(TypeError, match="holds no optimizer"):
        emonavi.observe(torch.optim.SGD(weights(), lr=0.1), 1.0)
    with pytest.raises(ValueError, match=r"no optimizer 'adam'.*emonavi"):
        emonavi.create("adam", weights())
    with pytest.raises(TypeError, match="unexpected keyword"):
        emonavi.create("emonavi", weights(), momentum=0.9)


@pytest.mark.parametrize(
    ("case", "emotion"), [(c, e) for c in CASES for e in lacking(c)], ids=lambda v: getattr(v, "name", v)
)
def test_generations_without_a_published_rule(case, emotion):
    for given in (emotion, PRESETS[emotion]):
        with pytest.raises(ValueError, match=rf"'{emotion}': no such rule .* published; choose from 'adaptive', 'v3'"):
            case.make(weights(), emotion=given)


def test_siblings_take_the_same_options():
    """The signatures are one, so that siblings can be exchanged; none swallows what it does not know."""
    kinds = {inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL}
    first = inspect.signature(CASES[0].cls).parameters
    for case in CASES:
        parameters = inspect.signature(case.cls).parameters
        assert not {p.kind for p in parameters.values()} & kinds
        assert set(first) <= set(parameters)
        assert [p.kind for n, p in parameters.items() if n in first] == [p.kind for p in first.values()]
        same = {n: p.default for n, p in parameters.items() if n in first and n != "betas"}
        assert same == {n: p.default for n, p in first.items() if n != "betas"}
        assert parameters["betas"].default == case.betas


@siblings
def test_the_published_usage_lines_run(case):
    class SummaryWriter:
        def add_scalar(self, tag, value, step):
            pass

    for kwargs in (
        {"lr": 1e-4, "use_shadow": False},
        {"use_trust": False},
        {"max_norm": 0.0},
        {"min_lr": 1e-6},
        {"writer": SummaryWriter()},
    ):
        case.cls(torch.nn.Linear(2, 2).parameters(), **kwargs)
