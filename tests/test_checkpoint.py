"""A run that is saved, loaded and continued is the run that was not interrupted, bit by bit."""

import collections
import copy
import pickle
import types
import warnings

import pytest
import torch
from cases import (
    CASES,
    Valley,
    both_emotions,
    check_twin,
    configured,
    contents,
    differences,
    siblings,
    through_file,
    train,
    vector,
    weights,
    write,
)
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

import emonavi

STEPS, EVERY = 32, 10
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)


def through_accelerate(state_dict):
    """What accelerate's prepared optimizer does: every tensor of the state dict is moved, containers are rebuilt."""

    def move(value):
        if isinstance(value, torch.Tensor):
            return value.to("cpu", copy=True)
        if isinstance(value, dict):
            return type(value)({k: move(v) for k, v in value.items()})
        if isinstance(value, (list, tuple)):
            return type(value)(move(v) for v in value)
        return value

    return move(state_dict)


def resumed(case, params, optimizer, way, kwargs):
    """New parameters and a new optimizer that continue from these."""
    copies = [torch.nn.Parameter(p.detach().clone()) for p in params]
    fresh = case.make(copies, **kwargs)
    fresh.load_state_dict(way(optimizer.state_dict()))
    return copies, fresh


@configured()
@DTYPES
def test_save_load_continue(case, config, dtype):
    params, straight = weights(dtype), weights(dtype)
    optimizer, uninterrupted = case.make(params, **config.kwargs), case.make(straight, **config.kwargs)
    valley = Valley(params)
    for t in range(STEPS):
        if t and t % EVERY == 0:
            params, optimizer = resumed(case, params, optimizer, through_file, config.kwargs)
            assert differences(contents(optimizer), contents(uninterrupted)) == []
        optimizer.step(loss=valley.fill(params, t))
        uninterrupted.step(loss=valley.fill(straight, t))
    assert differences(contents(optimizer), contents(uninterrupted)) == []
    assert optimizer.emotion == uninterrupted.emotion or optimizer.emotion.steps == STEPS


@configured()
def test_accelerate_and_deepcopied_dicts(case, config):
    params = weights()
    optimizer = case.make(params, **config.kwargs)
    train(optimizer, params, 12)
    for way in (through_accelerate, copy.deepcopy, dict):
        copies, other = resumed(case, params, optimizer, way, config.kwargs)
        assert differences(contents(other), contents(optimizer)) == []
        before = contents(optimizer)
        train(other, copies, 3, start=12)
        assert differences(before, contents(optimizer)) == [], "the loaded optimizer shares memory with the dict"


@configured()
@pytest.mark.parametrize("way", [lambda o: pickle.loads(pickle.dumps(o)), copy.deepcopy], ids=["pickle", "deepcopy"])
def test_pickle_and_deepcopy_of_the_optimizer(case, config, way):
    params = weights(torch.bfloat16)
    optimizer = case.make(params, **config.kwargs)
    train(optimizer, params, 12)
    check_twin(way(optimizer), optimizer, params, start=12)


BOLD = {"sure": 0.02, "done": 0.05}


@siblings
def test_constants_of_the_emotion_are_in_the_checkpoint(case):
    """So a run that was begun with some of its own is resumed without naming them again."""
    params, straight = weights(), weights()
    optimizer, uninterrupted = case.make(params, emotion=BOLD), case.make(straight, emotion=BOLD)
    train(optimizer, params, 12)
    train(uninterrupted, straight, 12)
    for _ in range(2):
        writer = types.SimpleNamespace(add_scalar=lambda *_: None)
        params, optimizer = resumed(case, params, optimizer, through_file, {"writer": writer})
        assert optimizer._emotion == emonavi.Emotion(**BOLD) == optimizer._recorder._emotion
    train(optimizer, params, 12, start=12)
    train(uninterrupted, straight, 12, start=12)
    assert differences(contents(optimizer), contents(uninterrupted)) == []
    assert "emotion_constants: {'sure': 0.02, 'done': 0.05}" in repr(optimizer)


@siblings
def test_constants_of_another_run(case):
    class Mine(emonavi.Emotion):
        pass

    bold, plain = case.make(weights(), emotion=BOLD).state_dict(), case.make(weights()).state_dict()
    other = case.make(weights(), emotion=Mine(sure=0.3))
    for saved, constants in ((bold, BOLD), (plain, {})):
        with pytest.warns(UserWarning, match=r"constants of the emotion are taken, .* and not {'"):
            other.load_state_dict(saved)
        assert other._emotion == Mine(**constants)  # a class of the user's own stays
    other.load_state_dict(bold)  # silently: nobody had chosen others
    del plain["param_groups"][0]["emotion_constants"]  # an earlier version
    other.load_state_dict(plain)
    assert other.state_dict()["param_groups"][0]["emotion_constants"] == str(BOLD)
    bold["param_groups"][0]["emotion_constants"] = "{'surely': 0.3}"
    before = contents(other)
    with pytest.raises(ValueError, match=r"'surely': 0\.3.*constants of an emotion are start, "):
        other.load_state_dict(bold)
    assert differences(before, contents(other)) == []


@pytest.mark.parametrize("flat", [False, True], ids=["nested", "flattened"])
@pytest.mark.filterwarnings("ignore:the checkpoint's constants", "ignore:torch.distributed is disabled")
def test_constants_in_a_distributed_checkpoint(flat, tmp_path):
    options = StateDictOptions(flatten_optimizer_state_dict=flat)
    for place, (theirs, mine) in enumerate(((BOLD, {}), ({}, BOLD), (BOLD, {"sure": 0.02}), ({}, {}))):
        model, other = model_of(), model_of()
        first, second = (
            emonavi.EmoNavi(m.parameters(), emotion=c, capture=False) for m, c in ((model, theirs), (other, mine))
        )
        train(first, list(model.parameters()), 3)
        path = tmp_path / str(place)
        dcp.save({"o": get_optimizer_state_dict(model, first, options=options)}, checkpoint_id=path, no_dist=True)
        held = {"o": get_optimizer_state_dict(other, second, options=options)}
        dcp.load(held, checkpoint_id=path, no_dist=True)
        set_optimizer_state_dict(other, second, held["o"], options=options)
        assert second._emotion == emonavi.Emotion(**theirs)
        assert differences(contents(second), contents(first), ignore=("param",)) == []


@siblings
def test_a_run_whose_first_group_was_replaced_is_saved_with_its_emotion(case):
    params = weights()
    optimizer = case.make(params)
    train(optimizer, params, 3)
    groups = optimizer.param_groups
    groups[0] = {name: value for name, value in groups[0].items() if not name.startswith("emotion")}
    again = case.make(weights())
    again.load_state_dict(through_file(optimizer.state_dict()))
    assert again.emotion.steps == 3


@siblings
def test_a_skipped_first_step_and_a_fresh_optimizer_resume(case):
    for steps in ("none", "skipped"):
        params, straight = weights(), weights()
        optimizer, uninterrupted = case.make(params), case.make(straight)
        if steps == "skipped":
            for some, one in ((params, optimizer), (straight, uninterrupted)):
                Valley(some).fill(some, 0)
                some[0].grad.fill_(torch.nan)
                one.step(loss=1.0)
        params, optimizer = resumed(case, params, optimizer, through_file, {})
        train(optimizer, params, 5, start=1)
        train(uninterrupted, straight, 5, start=1)
        assert differences(contents(optimizer), contents(uninterrupted)) == []


# torch.distributed.checkpoint, in one process ------------------------------------------------------------------------


def model_of(dtype=torch.float32):
    torch.manual_seed(3)
    layers = [torch.nn.Linear(4, 5), torch.nn.LayerNorm(5), torch.nn.Linear(5, 2)]
    return torch.nn.Sequential(*layers).to(dtype)


@configured()
@pytest.mark.parametrize("flat", [False, True], ids=["nested", "flattened"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_distributed_checkpoint(case, config, flat, dtype):
    options = StateDictOptions(flatten_optimizer_state_dict=flat)
    model = model_of(dtype)
    optimizer = case.make(model.parameters(), **config.kwargs)
    params = list(model.parameters())
    train(optimizer, params, 8)
    saved = through_file(get_optimizer_state_dict(model, optimizer, options=options))

    other = model_of(dtype)
    other.load_state_dict(model.state_dict())
    fresh = case.make(other.parameters(), **config.kwargs)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        set_optimizer_state_dict(other, fresh, saved, options=options)
    assert differences(contents(fresh), contents(optimizer)) == []
    train(fresh, list(other.parameters()), 6, start=8)
    train(optimizer, params, 6, start=8)
    assert differences(contents(fresh), contents(optimizer)) == []


@configured()
def test_distributed_checkpoint_of_a_fresh_optimizer_moves_nothing(case, config):
    """torch makes the missing state by a step of its own at lr 0, with zero gradients and no loss."""
    model = model_of()
    optimizer = case.make(model.parameters(), on_missing_loss="warn", **config.kwargs)
    before = [p.detach().clone() for p in model.parameters()]
    emotion = vector(optimizer).clone()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(8):
            get_optimizer_state_dict(model, optimizer)
    assert all(torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))
    assert torch.equal(vector(optimizer), emotion)
    assert (optimizer.emotion.steps, optimizer.emotion.skipped_steps) == (0, 0)
    assert optimizer.param_groups[0]["lr"] == case.lr
    straight = model_of()
    other = case.make(straight.parameters(), **config.kwargs)
    train(optimizer, list(model.parameters()), 6)
    train(other, list(straight.parameters()), 6)
    assert differences(contents(optimizer), contents(other)) == []


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@pytest.mark.parametrize("flat", [False, True], ids=["nested", "flattened"])
@pytest.mark.parametrize("wrapped", [False, True], ids=["sibling", "wrapped"])
def test_a_tensor_lr_in_a_distributed_checkpoint(wrapped, flat, tmp_path):
    """It is loaded into what a fresh optimizer has: where that is a float, a tensor cannot be."""

    def made():
        model, lr = model_of(), torch.tensor(1e-2)
        if wrapped:
            return model, emonavi.Emotional(torch.optim.AdamW(model.parameters(), lr=lr), capture=False)
        return model, emonavi.EmoNavi(model.parameters(), lr=lr, capture=False)

    def state(model, optimizer):
        return get_optimizer_state_dict(model, optimizer, options=options)

    options = StateDictOptions(flatten_optimizer_state_dict=flat)
    (model, optimizer), (other, fresh) = made(), made()
    train(optimizer, list(model.parameters()), 3)
    dcp.save(state(model, optimizer), checkpoint_id=tmp_path, no_dist=True)
    saved = state(other, fresh)
    dcp.load(saved, checkpoint_id=tmp_path, no_dist=True)
    set_optimizer_state_dict(other, fresh, saved, options=options)
    other.load_state_dict(model.state_dict())
    train(optimizer, list(model.parameters()), 3, start=3)
    train(fresh, list(other.parameters()), 3, start=3)
    assert differences(contents(fresh), contents(optimizer)) == []


def test_a_tensor_lr_has_a_peak_of_its_kind_from_the_beginning():
    params = weights()
    stranger, optimizer = torch.optim.AdamW(params), emonavi.EmoNavi(params, lr=torch.tensor(1e-2), capture=False)
    assert torch.equal(optimizer.param_groups[0]["lr_peak"], torch.tensor(0.0))
    train(optimizer, params, 2)
    optimizer.reset_emotion()
    assert torch.equal(optimizer.param_groups[0]["lr_peak"], torch.tensor(0.0))
    train(optimizer, params, 2)
    stranger.step()
    with pytest.warns(UserWarning, match="taken over"):
        optimizer.load_state_dict(stranger.state_dict())
    assert torch.equal(optimizer.param_groups[0]["lr_peak"], torch.tensor(0.0))


# What does not fit ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("wrapped", [False, True], ids=["sibling", "wrapped"])
def test_a_checkpoint_that_has_lost_its_emotion(wrapped):
    """As torch's nested layout loses it, with all options, where the stages of a pipeline have names of their own."""
    params = weights()
    optimizer = emonavi.EmoNavi(params, capture=False)
    if wrapped:
        optimizer = emonavi.Emotional(torch.optim.AdamW(params), capture=False)
    train(optimizer, params, 3)
    torn, before = optimizer.state_dict(), contents(optimizer)
    torn["param_groups"] = [{"params": group["params"]} for group in torn["param_groups"]]
    with pytest.raises(ValueError, match=r"lost its emotion.*flatten_optimizer_state_dict=True"):
        optimizer.load_state_dict(torn)
    assert differences(before, contents(optimizer)) == []


PAIRS = (("adaptive", "v4"), ("v4", "adaptive"), ("v3", "v4"), ("v1", "v3"), ("adaptive", "v3"), ("v3", "adaptive"))


@pytest.mark.parametrize(
    ("case", "mine", "theirs"),
    [(c, *pair) for c in CASES for pair in PAIRS if {*pair} <= {"adaptive", *c.generations}],
    ids=lambda value: getattr(value, "name", value),
)
def test_checkpoint_of_another_emotion(case, mine, theirs):
    params, others = weights(), weights()
    optimizer, other = case.make(params, emotion=mine), case.make(others, emotion=theirs)
    train(optimizer, params, 5)
    train(other, others, 5)
    before = contents(optimizer)
    with pytest.raises(ValueError) as error:
        optimizer.load_state_dict(through_file(other.state_dict()))
    assert repr(mine) in str(error.value) and repr(theirs) in str(error.value)
    assert differences(before, contents(optimizer)) == []
    train(optimizer, params, 2, start=5)


@siblings
@pytest.mark.parametrize("stranger", [torch.optim.AdamW, torch.optim.SGD])
def test_checkpoint_of_a_stranger(case, stranger):
    params = weights()
    optimizer = case.make(params)
    train(optimizer, params, 3)
    before = contents(optimizer)
    with pytest.raises(ValueError, match=r"no emotion.*'adaptive'|'adaptive'.*no emotion"):
        optimizer.load_state_dict(stranger(weights(), lr=0.1).state_dict())
    assert differences(before, contents(optimizer)) == []


def fits(saved, optimizer):
    """Whether the memories of one are enough for the other: EmoNavi and EmoClan have the same."""
    one, other = ([o._layout(p) for p in weights()] for o in (saved, optimizer))
    return all(set(mine) <= set(theirs) for theirs, mine in zip(one, other, strict=True))


@both_emotions
@pytest.mark.parametrize("published", [False, True], ids=["AdamW", "published"])
def test_memories_of_an_optimizer_without_an_emotion(case, emotion, published):
    """torch's AdamW; or the published EmoNavi, which counts no steps and keeps its emotion under keys of text."""
    params = weights()
    stranger = torch.optim.AdamW(params, lr=0.3, weight_decay=0.0)
    for t in range(5):
        Valley(params).fill(params, t)
        stranger.step()
    saved = stranger.state_dict()
    if published:
        saved["state"] = {i: {**s, "shadow": s["exp_avg"], "ema": {"short": 1.0}} for i, s in saved["state"].items()}
        for s in saved["state"].values():
            del s["step"]
        saved["state"] |= {"ema": {"short": 1.0, "long": 2.0}, "scalar_hist": collections.deque([0.1], maxlen=32)}
    optimizer = case.make(params, emotion=emotion)
    train(optimizer, params, 3)
    before = contents(optimizer)
    if not set(optimizer._layout(params[0])) <= {"exp_avg", "exp_avg_sq"}:
        with pytest.raises(ValueError, match=r"no emotion"):
            optimizer.load_state_dict(saved)
        assert differences(before, contents(optimizer)) == []
        return
    with pytest.warns(UserWarning, match=r"exp_avg.* of 6 parameters were taken over, the emotion begins afresh"):
        optimizer.load_state_dict(saved)
    assert all(isinstance(p, torch.Tensor) for p in optimizer.state)
    assert (optimizer.param_groups[0]["lr"], optimizer.emotion.steps) == (case.lr, 0)
    for i, p in enumerate(params):
        memories = {k: v for k, v in optimizer.state[p].items() if v.dim() or k.startswith("exp")}
        assert set(memories) == set(optimizer._layout(p))
        assert all(torch.equal(v, saved["state"][i][k]) for k, v in memories.items())
        # A memory whose age is not known is not taken for a fresh one, or the first step would be ten times too long.
        assert optimizer.state[p]["step"] == (5 if not published else pytest.approx(10 / (1 - case.betas[1])))
    train(optimizer, params, 3, start=5)
    assert optimizer.emotion.steps == 3


@siblings
def test_memories_of_a_model_of_another_shape(case):
    stranger = torch.optim.AdamW(weights(shapes=((4, 6), (5,))), lr=0.1)
    for p in stranger.param_groups[0]["params"]:
        p.grad = torch.ones_like(p)
    stranger.step()
    params = weights(shapes=((6, 4), (5,)))
    optimizer = case.make(params)
    before = contents(optimizer)
    with pytest.raises(ValueError, match="no emotion"):
        optimizer.load_state_dict(stranger.state_dict())
    assert differences(before, contents(optimizer)) == []


@siblings
@pytest.mark.parametrize("steps", [0, 5])
@pytest.mark.parametrize("other", emonavi.available())
def test_checkpoint_of_a_sibling(case, other, steps):
    """It has the same emotion, but other memories: refused at once, and not by a KeyError in the step after."""
    params, others = weights(), weights()
    optimizer, sibling = case.make(params), emonavi.create(other, others)
    train(optimizer, params, 3)
    train(sibling, others, steps)
    before, saved = contents(optimizer), through_file(sibling.state_dict())
    if type(sibling) is type(optimizer):
        for _ in range(2):  # torch adds to the defaults when it loads
            optimizer.load_state_dict(saved)
    elif (steps and not fits(sibling, optimizer)) or type(optimizer) is emonavi.EmoLynx:
        with pytest.raises(ValueError, match=r"of another optimizer: .* not hold (exp_avg|decoupled_weight_decay)"):
            optimizer.load_state_dict(saved)
        assert differences(before, contents(optimizer)) == []
    train(optimizer, params, 2, start=5)


@both_emotions
def test_checkpoint_of_another_version(case, emotion):
    """Its numbers may mean something else, though they are as many."""
    params = weights()
    optimizer = case.make(params, emotion=emotion)
    before, saved = contents(optimizer), through_file(optimizer.state_dict())
    saved["param_groups"][0]["emotion"][1] -= 1
    with pytest.raises(
        ValueError, match=r"\(version [02], \d+ entries\).*\(version [13], \d+ entries\).*that saved it"
    ):
        optimizer.load_state_dict(saved)
    assert differences(before, contents(optimizer)) == []


@siblings
def test_checkpoint_of_version_2(case):
    """It lacks the scalar's history only, which begins anew; what the drive hangs on is all there."""
    params, straight = weights(), weights()
    optimizer, uninterrupted = case.make(params), case.make(straight)
    train(optimizer, params, 12)
    train(uninterrupted, straight, 12)
    saved = through_file(optimizer.state_dict())
    entries = saved["param_groups"][0]["emotion"]
    saved["param_groups"][0]["emotion"] = torch.cat([entries[:1], entries.new_tensor([2.0]), entries[2:38]])
    copies, resumed_one = resumed(case, params, optimizer, lambda _: saved, {})
    for one in (resumed_one, uninterrupted):
        write(one, last_scalar=0.0)  # for which version 2 had no rule
    train(resumed_one, copies, 8, start=12)
    train(uninterrupted, straight, 8, start=12)
    assert differences(contents(resumed_one), contents(uninterrupted), ignore=("emotion",)) == []
    mine, theirs = (vector(o)[: len(entries) - 6] for o in (resumed_one, uninterrupted))
    assert torch.equal(mine, theirs)
    assert resumed_one.emotion.kurtosis != uninterrupted.emotion.kurtosis
    assert case.make(copies).load_state_dict(through_file(resumed_one.state_dict())) is None


@siblings
def test_checkpoint_with_other_groups(case):
    params = weights()
    optimizer = case.make(params)
    train(optimizer, params, 3)
    before = contents(optimizer)
    other = weights()
    two = case.make([{"params": other[:2]}, {"params": other[2:]}])
    with pytest.raises(ValueError, match="different number of parameter groups"):
        optimizer.load_state_dict(two.state_dict())
    assert differences(before, contents(optimizer)) == []
    train(optimizer, params, 2, start=3)


@siblings
def test_load_hooks_may_replace_the_dict(case):
    params, others = weights(torch.bfloat16), weights(torch.bfloat16)
    optimizer, other = case.make(params), case.make(others)
    train(optimizer, params, 10)
    saved, calls = optimizer.state_dict(), []
    copies = [torch.nn.Parameter(p.detach().clone()) for p in params]
    fresh = case.make(copies)
    fresh.register_load_state_dict_pre_hook(lambda _, given: given["wrapped"])
    fresh.register_load_state_dict_post_hook(lambda _: calls.append("post"))
    fresh.load_state_dict({"wrapped": saved})
    assert calls == ["post"]
    assert differences(contents(fresh), contents(optimizer)) == []
    other.register_state_dict_post_hook(lambda _, made: {"wrapped": made})
    assert set(other.state_dict()) == {"wrapped"}


@siblings
def test_the_emotion_is_numbers_in_the_first_group(case):
    """Where every route of a checkpoint keeps it: fixed shape, from construction on, in the first group only."""
    params = weights()
    optimizer = case.make([{"params": params[:2]}, {"params": params[2:]}])
    first = vector(optimizer)
    assert isinstance(first, torch.Tensor)
    assert "emotion" not in optimizer.param_groups[1]
    shape, place = first.shape, first.data_ptr()
    train(optimizer, params, 10)
    assert (vector(optimizer).shape, vector(optimizer).data_ptr()) == (shape, place)
    assert all(isinstance(k, int) for k in optimizer.state_dict()["state"])
    assert all(isinstance(k, torch.Tensor) for k in optimizer.state)


# Memory --------------------------------------------------------------------------------------------------------------


@siblings
@pytest.mark.parametrize("shadow", [False, True], ids=["plain", "shadow"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_state_bytes(case, shadow, dtype):
    """Measured, not declared: every tensor that is in the state, beside the three scalars of a tensor."""
    matrix = torch.nn.Parameter(torch.randn(1024, 768).to(dtype))
    small = torch.nn.Parameter(torch.randn(16, 8).to(dtype))
    line = torch.nn.Parameter(torch.randn(50_000).to(dtype))
    optimizer = case.make([matrix, small, line], use_shadow=shadow)
    for p in (matrix, small, line):
        p.grad = torch.randn_like(p)
    optimizer.step(loss=1.0)

    def size(p):
        state = optimizer.state[p]
        scalars = {k for k, v in state.items() if v.dim() == 0}
        assert scalars == {"step", "drive", "trust"}
        storages = {v.untyped_storage().data_ptr(): v.untyped_storage().nbytes() for v in state.values() if v.dim()}
        return sum(storages.values()) - (4 * p.numel() if shadow else 0)

    names = {"shadow"} if shadow else set()
    assert {k for k, v in optimizer.state[matrix].items() if v.dim()} == set(case.matrix_state) | names
    assert {k for k, v in optimizer.state[line].items() if v.dim()} == set(case.vector_state) | names
    assert 0 < size(matrix) <= case.matrix_bytes * matrix.numel() + case.matrix_extra
    assert size(small) <= max(case.matrix_bytes, 1.0) * small.numel() + case.matrix_extra
    assert size(line) == case.vector_bytes * line.numel()
    if shadow:
        assert optimizer.state[matrix]["shadow"].dtype == torch.float32


@siblings
def test_a_checkpoint_from_before_an_option_was_there(case):
    """The options that came later are then as they were: the run goes on bit by bit."""
    params = weights()
    optimizer = case.make(params, stochastic_rounding=False)
    train(optimizer, params, 4)
    saved = through_file(optimizer.state_dict())
    copies = [torch.nn.Parameter(p.detach().clone()) for p in params]
    for group in saved["param_groups"]:
        del group["state_dtype"], group["stochastic_rounding"]
    again = case.make(copies)
    again.load_state_dict(saved)
    for o, some in ((optimizer, params), (again, copies)):
        train(o, some, 3, start=4)
    assert differences(contents(optimizer), contents(again)) == []


@pytest.mark.parametrize("state_dtype", [None, "bf16", "8bit"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_memories_taken_over_are_stored_as_its_own(dtype, state_dtype):
    params = weights(dtype, [(80, 64), (5,)])
    stranger = torch.optim.AdamW(params)
    for p in params:
        p.grad = torch.ones_like(p)
    stranger.step()
    optimizer = emonavi.EmoNavi(params, state_dtype=state_dtype, capture=False, on_missing_loss="ignore")
    with pytest.warns(UserWarning, match="taken over"):
        optimizer.load_state_dict(stranger.state_dict())
    for p in params:
        fresh = optimizer._memories(p)
        kept = {k: v for k, v in optimizer.state[p].items() if k in fresh}
        assert {k: v.dtype for k, v in kept.items()} == {k: v.dtype for k, v in fresh.items()}
        assert all(bool(v.any()) for v in kept.values())
    optimizer.step()


@pytest.mark.parametrize("name", ["emonavi", "emoclan", "emozeal"])
def test_checkpoint_of_a_wrapped_optimizer(name):
    """It has this emotion, and some of these memories, but not what a sibling keeps for each tensor."""
    wrapped, params = weights(), weights()
    other = emonavi.Emotional(torch.optim.AdamW(wrapped), capture=False)
    optimizer = emonavi.create(name, params, capture=False)
    train(other, wrapped, 2)
    train(optimizer, params, 2)
    before = contents(optimizer)
    with pytest.raises(ValueError, match=r"of another optimizer: it does not hold .*drive, trust"):
        optimizer.load_state_dict(through_file(other.state_dict()))
    assert differences(before, contents(optimizer)) == []


def test_memories_that_the_rule_has_no_use_for():
    params = weights()
    optimizer = emonavi.EmoNavi(params, capture=False)
    train(optimizer, params, 2)
    other = emonavi.EmoNeco(weights(), capture=False)
    before = contents(other)
    with pytest.raises(ValueError, match="of another optimizer: it holds exp_avg_sq besides"):
        other.load_state_dict(optimizer.state_dict())
    assert differences(before, contents(other)) == []


@siblings
def test_parameters_without_a_shape_or_of_any_kind_are_loaded_past(case):
    """Lazy modules that are not built yet, and frozen parts that no rule could move."""
    model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.LazyLinear(2))
    model.register_parameter("quantized", torch.nn.Parameter(torch.ones(4, 3, dtype=torch.int8), requires_grad=False))
    sparse = torch.eye(3).to_sparse()
    model.register_parameter("sparse", torch.nn.Parameter(sparse, requires_grad=False))
    optimizer = case.make(model.parameters())
    model[0](torch.ones(1, 3)).sum().backward()
    optimizer.step(loss=1.0)
    saved = through_file(optimizer.state_dict())
    optimizer.load_state_dict(saved)
    assert len(optimizer.state) == 2 and optimizer.emotion.steps == 1


def test_hooks_on_saving_are_the_users_alone():
    """An optimizer that takes over AdamW's memories asks nobody how it would be saved itself."""
    params = weights()
    adamw = torch.optim.AdamW(params)
    Valley(params).fill(params, 0)
    adamw.step()
    optimizer = emonavi.EmoNavi(params)
    optimizer.register_state_dict_post_hook(lambda _, state: {"optimizer": state})
    with pytest.warns(UserWarning, match="fresh emotion|begins"):
        optimizer.load_state_dict(adamw.state_dict())
    assert torch.equal(optimizer.state[params[0]]["exp_avg"], adamw.state[params[0]]["exp_avg"])


@siblings
@pytest.mark.parametrize("vector", [torch.zeros(0), torch.zeros(2, 2), 1.0], ids=["empty", "matrix", "number"])
def test_a_damaged_emotion(case, vector):
    params = weights()
    optimizer = case.make(params)
    train(optimizer, params, 2)
    before, saved = contents(optimizer), through_file(optimizer.state_dict())
    saved["param_groups"][0]["emotion"] = vector
    with pytest.raises(ValueError, match="the checkpoint holds no emotion"):
        optimizer.load_state_dict(saved)
    assert differences(before, contents(optimizer)) == []


@siblings
def test_a_shadow_of_another_shape(case):
    params = weights()
    optimizer = case.make(params, use_shadow=True)
    train(optimizer, params, 2)
    saved = through_file(optimizer.state_dict())
    saved["state"][0]["shadow"] = torch.zeros(3)
    with pytest.raises(ValueError, match=r"of other shapes: shadow of parameter 0 is \(3,\), here"):
        optimizer.load_state_dict(saved)
