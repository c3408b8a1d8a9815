"""Memories and parameters of fewer bits: they follow float32, resume bit by bit, and weigh what they should."""

import math
import warnings

import pytest
import torch
from cases import Valley, contents, differences, siblings, train, ways, weights
from test_checkpoint import resumed, through_accelerate, through_file
from test_contract import Peak
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

import emonavi
from emonavi import checks, lowbit
from emonavi.registry import SIBLINGS

STORED = pytest.mark.parametrize("state_dtype", ["bf16", "8bit"])
# Two that stay float32, one that ends inside a block, and two that share a piece; BIG are cut, in the last two by rows.
SHAPES = ((70, 67), (5,), (), (4100,), (64, 80), (64, 80))
BIG = ((300, 501), (301, 500), (40, 37, 10, 10))


def big():
    """Parameters of more than one piece: contiguous, transposed and channels_last."""
    flat, across, pixels = weights(torch.bfloat16, BIG)
    return [
        torch.nn.Parameter(p)
        for p in (flat.detach(), across.detach().t(), pixels.detach().to(memory_format=torch.channels_last))
    ]


def low(optimizer, params):
    """The dtypes of the memories that have one value for each element."""
    memories = [
        optimizer.state[p][name] for p in params for name in ("exp_avg", "exp_avg_sq") if name in optimizer.state[p]
    ]
    return {m.dtype for m in memories}


# Rounding -----------------------------------------------------------------------------------------------------------


def bits(t, n=1, count=4096, start=0):
    return lowbit.noise(lowbit.seeds(torch.full((n,), float(t)), torch.arange(n)), start, count)


@pytest.mark.parametrize("kind", ["bf16", "fp16", "exp_avg", "exp_avg_sq"])
def test_random_rounding_keeps_the_mean_and_the_nearest_does_not(kind):
    """The mean of many roundings nears the value as chance has it; to the nearest, it never does."""
    generator = torch.Generator().manual_seed(0)
    value = torch.randn(1, 4096, generator=generator).exp()
    value = value if kind == "exp_avg_sq" else value * torch.randn(1, 4096, generator=generator).sign()
    name = kind if kind.startswith("exp") else "param"
    if name == "param":
        stored = {name: torch.zeros(1, 4096, dtype=torch.bfloat16 if kind == "bf16" else torch.float16)}
    else:
        stored = {name: torch.zeros(1, 4096, dtype=torch.uint8), f"{name}_scale": torch.zeros(1, 16)}
        stored["param"] = torch.zeros(1, 4096)

    def rounded(random):
        values = lowbit.unpack(stored)
        lowbit.pack(values | {name: value.clone()}, stored, random)
        return lowbit.unpack(stored)[name].double()

    count = 300
    off = (sum(rounded(bits(t)) for t in range(count)) / count - value) / value
    nearest = (rounded(None) - value) / value
    gap = {"bf16": 2**-7, "fp16": 2**-10, "exp_avg": 0.16, "exp_avg_sq": 0.126}[kind]  # between levels, at most
    assert float(off.mean().abs()) < 5 * gap / math.sqrt(12 * count * 4096)
    assert float(off.square().mean().sqrt()) < gap / math.sqrt(6 * count)
    assert float(nearest.square().mean().sqrt()) > 3 * float(off.square().mean().sqrt())
    assert float(nearest.abs().max()) <= gap / 2


def test_random_bits_do_not_depend_on_the_cut_and_differ_from_step_to_step_and_tensor_to_tensor():
    whole = bits(3, n=2)
    assert torch.equal(torch.cat([bits(3, 2, 96, 0), bits(3, 2, 4000, 96)], 1), whole)
    huge = 1 << 33
    assert torch.equal(bits(3, 2, 10, huge + 6), bits(3, 2, 16, huge)[:, 6:])
    own = (whole * -1640531535).double()  # as pack() uses them, times an odd number

    def related(a, b):
        return abs(float(torch.corrcoef(torch.stack([a, b]))[0, 1]))

    other = (bits(4) * -1640531535).double()
    assert related(own[0], own[1]) < 0.07 and related(own[0], other[0]) < 0.07
    assert all(related(own[0, lag:], own[0, :-lag]) < 0.07 for lag in (1, 2, 3, 64, 256))


def test_levels_of_eight_bits():
    codes = torch.arange(256, dtype=torch.uint8)[None]
    one = torch.ones(1, 1)
    square, first = (
        lowbit.unpack({"param": one, n: codes, f"{n}_scale": one})[n][0] for n in ("exp_avg_sq", "exp_avg")
    )
    assert bool((square.diff() > 0).all()) and float(square[-1]) == 1.0
    assert float((square.diff() / square[:-1]).max()) <= 0.125
    assert torch.equal(first[:128], -first[128:])
    assert bool((first[:128].diff() > 0).all()) and float(first[0]) == 0.0 and float(first[127]) == pytest.approx(1.0)
    # What chance rounds up from next to nothing finds a denominator that holds it down.
    assert float(first[1] / square[0].sqrt()) < 1 / 8
    # A block of zeros is zeros.
    assert not lowbit.unpack({"param": one, "exp_avg_sq": codes, "exp_avg_sq_scale": 0 * one})["exp_avg_sq"].any()


# It proves itself ---------------------------------------------------------------------------------------------------


@STORED
def test_a_second_memory_forgets_at_random_and_stalls_to_the_nearest(state_dtype):
    """beta2 = 0.999 and a gradient that ends: after 300 steps 74 % of it is left."""
    left = {}
    for stochastic in (True, False):
        weight = torch.nn.Parameter(torch.ones(64, 64))
        optimizer = emonavi.EmoNavi(
            [weight], use_trust=False, max_norm=0.0, capture=False, on_missing_loss="ignore", state_dtype=state_dtype,
            stochastic_rounding=stochastic,
        )  # fmt: skip
        weight.grad = torch.ones_like(weight)
        optimizer.step()
        weight.grad.zero_()
        weight.grad.view(-1)[:: lowbit.BLOCK] = math.sqrt(
            1e-3
        )  # one in each block stays as it is, and with it the scale
        for _ in range(300):
            optimizer.step()
        kept = {k: v[None] for k, v in optimizer.state[weight].items() if k.startswith("exp_avg_sq")}
        squares = lowbit.unpack({"param": weight[None], **kept})["exp_avg_sq"].view(-1, lowbit.BLOCK)
        left[stochastic] = float(squares[:, 1:].mean()) / 1e-3
        assert float(squares[:, 0].mean()) == pytest.approx(1e-3, rel=0.05)
    assert left[True] == pytest.approx(0.999**300, rel=0.03)
    assert left[False] == pytest.approx(1.0, rel=0.01), "to the nearest it moved, too: the test shows nothing"


@siblings
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_steps_smaller_than_a_bit_add_up(case, dtype):
    """100 steps of a 20th of the least change that the dtype knows: five such changes, and none to the nearest."""
    moved = {}
    least = torch.finfo(dtype).eps / 2  # below 1
    for stochastic in (True, False):
        weight = torch.nn.Parameter(torch.ones(48, 48, dtype=dtype))
        optimizer = case.make(
            [weight], lr=least / 20, use_trust=False, weight_decay=0.0, stochastic_rounding=stochastic
        )
        weight.grad = torch.ones_like(weight)
        for _ in range(100):
            optimizer.step()
        moved[stochastic] = float((1 - weight.detach().double()).mean()) / least
    assert moved[False] == 0.0
    assert moved[True] == pytest.approx(5.0, abs=0.3)


@siblings
@STORED
def test_a_low_bit_run_follows_the_float32_run(case, state_dtype):
    """In bfloat16 and with few-bit memories the run ends where it does in float32; to the nearest it hardly moves."""

    def end(dtype=torch.bfloat16, **kwargs):
        params = weights(dtype, ((64, 64), (4100,)))
        optimizer = case.make(params, lr=1e-3, use_trust=False, **kwargs)
        train(optimizer, params, 80)
        start = weights(shapes=((64, 64), (4100,)))
        moved = torch.cat([(p.detach().float() - q.detach()).flatten() for p, q in zip(params, start, strict=True)])
        return moved, low(optimizer, params)

    whole, kept = end(torch.float32)
    assert kept <= {torch.float32}
    few, kept = end(state_dtype=state_dtype)
    assert kept == {torch.bfloat16 if state_dtype == "bf16" else torch.uint8}
    stalled, _ = end(state_dtype=state_dtype, stochastic_rounding=False)

    def along(run):
        return float(run @ whole / (whole @ whole))

    assert along(few) == pytest.approx(1.0, abs=0.06)
    assert along(stalled) < 0.8


def test_no_step_beyond_what_float32_makes():
    """Gradients of 14 decades within a block, drawn anew at each step: no denominator vanishes."""
    longest = {}
    for state_dtype in (None, "8bit"):
        generator = torch.Generator().manual_seed(0)
        sizes = torch.exp(5 * torch.randn(64, 64, generator=generator))
        weight = torch.nn.Parameter(torch.zeros(64, 64))
        optimizer = emonavi.EmoNavi(
            [weight], lr=1.0, use_trust=False, max_norm=0.0, eps=0.0, weight_decay=0.0, capture=False,
            on_missing_loss="ignore", state_dtype=state_dtype,
        )  # fmt: skip
        longest[state_dtype] = 0.0
        for _ in range(60):
            before = weight.detach().clone()
            weight.grad = sizes * torch.randn(64, 64, generator=generator)
            optimizer.step()
            longest[state_dtype] = max(longest[state_dtype], float((weight.detach() - before).abs().max()))
    assert 0 < longest["8bit"] < 2 * longest[None]


# The same bits ------------------------------------------------------------------------------------------------------


@siblings
@STORED
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_save_load_continue(case, state_dtype, dtype):
    params, straight = weights(dtype, SHAPES), weights(dtype, SHAPES)
    kwargs = {"state_dtype": state_dtype, "use_shadow": True}
    optimizer, uninterrupted = case.make(params, **kwargs), case.make(straight, **kwargs)
    valley = Valley(params)
    for t in range(15):
        if t in (4, 9):
            way = through_file if t == 4 else through_accelerate
            params, optimizer = resumed(case, params, optimizer, way, kwargs)
        optimizer.step(loss=valley.fill(params, t))
        uninterrupted.step(loss=valley.fill(straight, t))
        assert differences(contents(optimizer), contents(uninterrupted)) == []
    assert any(m != torch.float32 for m in low(optimizer, params))


@siblings
@STORED
@pytest.mark.parametrize("flat", [False, True], ids=["nested", "flattened"])
def test_distributed_checkpoint(case, state_dtype, flat):
    def made():
        torch.manual_seed(3)
        layers = [torch.nn.Linear(64, 70), torch.nn.LayerNorm(70), torch.nn.Linear(70, 4200)]
        model = torch.nn.Sequential(*layers).bfloat16()
        return model, list(model.parameters()), case.make(model.parameters(), state_dtype=state_dtype)

    options = StateDictOptions(flatten_optimizer_state_dict=flat)
    model, params, optimizer = made()
    train(optimizer, params, 3)
    other, copies, fresh = made()
    other.load_state_dict(model.state_dict())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        saved = through_file(get_optimizer_state_dict(model, optimizer, options=options))
        set_optimizer_state_dict(other, fresh, saved, options=options)
    assert differences(contents(fresh), contents(optimizer)) == []
    train(fresh, copies, 2, start=3)
    train(optimizer, params, 2, start=3)
    assert differences(contents(fresh), contents(optimizer)) == []


@siblings
@pytest.mark.parametrize("state_dtype", [None, "bf16", "8bit"])
def test_single_equals_foreach_bit_by_bit(case, state_dtype):
    """Without reflection (its sums are taken piece by piece) nothing may depend on how tensors are cut or stacked."""
    runs = []
    for foreach in (False, True):
        params = [*weights(torch.bfloat16, SHAPES), *(big() if "exp_avg" in case.matrix_state else [])]
        runs.append(case.make(params, foreach=foreach, use_trust=False, max_norm=0.0, state_dtype=state_dtype))
        train(runs[-1], params, 3)
    for optimizer in runs:
        optimizer.param_groups[0]["foreach"] = None
    assert differences(*map(contents, runs)) == []


@siblings
@ways
@STORED
def test_splitting_into_groups_changes_nothing(case, foreach, state_dtype):
    whole, split = weights(torch.bfloat16, SHAPES), weights(torch.bfloat16, SHAPES)
    one = case.make(whole, foreach=foreach, state_dtype=state_dtype)
    two = case.make([{"params": split[:2]}, {"params": split[2:]}], foreach=foreach, state_dtype=state_dtype)
    train(one, whole, 8)
    train(two, split, 8)
    for p, q in zip(whole, split, strict=True):
        assert torch.equal(p, q)
        assert differences(dict(one.state[p]), dict(two.state[q])) == []


@siblings
@STORED
def test_no_generator_is_touched_or_asked(case, state_dtype):
    runs = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        params = weights(torch.bfloat16, SHAPES)
        optimizer = case.make(params, state_dtype=state_dtype)
        before = torch.get_rng_state()
        train(optimizer, params, 4)
        assert torch.equal(torch.get_rng_state(), before)
        runs.append(contents(optimizer))
    assert differences(*runs) == []


@siblings
@STORED
@pytest.mark.parametrize(
    ("foreach", "capturable"), [(False, False), (True, False), (True, True)], ids=["single", "foreach", "predicated"]
)
def test_a_bad_gradient_leaves_every_bit(case, state_dtype, foreach, capturable):
    params = weights(torch.bfloat16, SHAPES)
    optimizer = case.make(params, foreach=foreach, capturable=capturable, state_dtype=state_dtype)
    train(optimizer, params, 4)
    before = contents(optimizer)
    Valley(params).fill(params, 4)
    params[0].grad[3, 3] = torch.nan
    optimizer.step(loss=1.0)
    assert optimizer.emotion.skipped_steps == 1
    assert {n.rpartition(": ")[2] for n in differences(before, contents(optimizer), ignore=("group",))} <= {"drive"}
    train(optimizer, params, 1, start=5)
    assert all(bool(p.isfinite().all()) for p in params)


# What it weighs -----------------------------------------------------------------------------------------------------


def test_state_bytes():
    """Measured, as ``emonavi list`` prints them: 1 byte and a float32 for 256 of them."""
    eighth = 1 + 4 / 256
    for name, held in {"emonavi": (8, 4, 2 * eighth), "emolynx": (4, 2, eighth)}.items():
        assert tuple(SIBLINGS[name].state_bytes(how) for how in (None, "bf16", "8bit")) == held
    assert SIBLINGS["emofact"].state_bytes("8bit") == SIBLINGS["emofact"].state_bytes() < 0.03


@siblings
@STORED
def test_small_tensors_and_what_is_no_memory_of_elements_keep_float32(case, state_dtype):
    params = weights(torch.bfloat16, ((63, 65), (64, 64), (1, 5000)))
    optimizer = case.make(params, state_dtype=state_dtype, use_shadow=True)
    train(optimizer, params, 1)
    kept = [{n for n, v in optimizer.state[p].items() if v.dtype != torch.float32} for p in params]
    stored = set(case.matrix_state) & {"exp_avg", "exp_avg_sq"}
    assert kept == [set(), stored, stored]
    assert optimizer.state[params[0]].keys() == {*case.matrix_state, "step", "drive", "trust", "shadow"}


@pytest.mark.parametrize("kwargs", [{}, {"state_dtype": "bf16"}, {"state_dtype": "8bit"}], ids=str)
def test_temporaries_do_not_grow_with_the_model(kwargs):
    """A piece's worth: under 8 MiB, which is 2 % of a model of 400 MB."""
    params = [torch.nn.Parameter(torch.zeros(1024, 1024, dtype=torch.bfloat16)) for _ in range(2)]
    optimizer = emonavi.EmoNavi(params, capture=False, **kwargs)
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer.step(loss=1.0)
    with Peak() as peak:
        optimizer.step(loss=1.0)
    assert 0 < peak.peak < 8 * 2**20, f"{peak.peak / 2**20:.1f} MiB of temporaries"


# Options ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spelled", "meant"),
    [
        *((s, None) for s in (None, "None", "float32", torch.float32)),
        *((s, "bf16") for s in ("bf16", " BF16 ", "bfloat16", "torch.bfloat16", torch.bfloat16)),
        *((s, "8bit") for s in ("8bit", "int8", "uint8", torch.int8, torch.uint8)),
    ],
    ids=str,
)
def test_spellings(spelled, meant):
    for name in emonavi.available():
        assert emonavi.create(name, weights(), state_dtype=spelled).param_groups[0]["state_dtype"] == meant
    assert emonavi.create("emonavi", weights(), stochastic_rounding="0").param_groups[0]["stochastic_rounding"] is False


@pytest.mark.parametrize("bad", ["fp8", "", 8, True, torch.float16, ["bf16"]])
def test_nonsense_is_refused(bad):
    with pytest.raises(ValueError, match=r"state_dtype=.*choose None \(float32\), 'bf16' or '8bit'"):
        emonavi.EmoNavi(weights(), state_dtype=bad)
    with pytest.raises(ValueError, match=r"stochastic_rounding=.*: give True or False"):
        emonavi.EmoNavi(weights(), stochastic_rounding=bad if bad is not True else None)
    with pytest.raises(ValueError, match="state_dtype='bf16' in a group: it is one for all groups"):
        emonavi.EmoNavi([{"params": weights(), "state_dtype": "bf16"}])


@siblings
def test_a_checkpoint_of_another_storage_is_refused(case):
    params, others = weights(shapes=SHAPES), weights(shapes=SHAPES)
    optimizer, other = case.make(params), case.make(others, state_dtype="8bit")
    train(optimizer, params, 2)
    train(other, others, 2)
    before = contents(optimizer)
    with pytest.raises(ValueError, match="saved with state_dtype='8bit', this optimizer has None: construct it with"):
        optimizer.load_state_dict(other.state_dict())
    assert differences(before, contents(optimizer)) == []
    with pytest.raises(ValueError, match="saved with state_dtype=None, this optimizer has '8bit'"):
        other.load_state_dict(optimizer.state_dict())


def test_eight_bits_of_a_shard_are_refused():
    """Its blocks would not end where a shard ends, and a checkpoint could not be cut anew."""
    shard = type("Shard", (), {"shape": (64, 64), "device_mesh": "a mesh"})()  # a DTensor is known by its class
    with pytest.raises(ValueError, match=r"state_dtype='8bit' with a DTensor, .*choose 'bf16' or None"):
        checks.whole([shard], "8bit")
    checks.whole([shard], "bf16")
    checks.whole([torch.ones(2)], "8bit")
