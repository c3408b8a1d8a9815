"""The Triton programs: equal to the rules, to the last bit the same again, and nothing waits.

Without a GPU they are run by Triton's interpreter on CPU tensors (``conftest.py`` asks for it), and compiled for a GPU
that is not there. With one, the same tests run what was compiled, on it.
"""

import math
import os
import subprocess
import sys

import pytest
import torch
from cases import CASES, contents, train, weights
from test_kernels import GROUP, lists, placed

from emonavi import kernels, lowbit, sweep
from emonavi.clan import emoclan
from emonavi.emotion import State
from emonavi.fact import emofact
from emonavi.navi import emonavi
from emonavi.sweep import Bucket

pytest.importorskip("triton")
from emonavi.kernels import cuda

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
on_gpu = pytest.mark.skipif(DEVICE == "cpu", reason="needs a CUDA device")
kernels_of = pytest.mark.parametrize("case", [c for c in CASES if c.on_cuda], ids=lambda c: c.name)
SIZES = ((5,), (0,), (64,), (7, 19), (), (3, 11))  # several chunks, whole and not; one block, whole and not
MATRICES = ((5, 1), (9, 20), (3, 35), (2, 2, 8))  # several tiles, whole and not
FEW = ((6, 4), (5,), ())
# The operations are the rule's in its order, in float32; torch's own sums of squares are off by more. The interpreter
# cuts what bfloat16 cannot hold, where a GPU rounds it.
ROUNDINGS = {torch.float32: 1e-5, torch.bfloat16: 2.0**-7, torch.float16: 2.0**-10}
dtypes = pytest.mark.parametrize("dtype", list(ROUNDINGS), ids=str)


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Chunks and blocks so small that small tensors have several."""
    for name, size in {"CHUNK": 64, "BLOCK": 32, "BAND": 4, "WIDTH": 16, "LINES": 32}.items():
        monkeypatch.setattr(cuda, name, size)


@pytest.fixture
def taken(monkeypatch):
    """Where there is no GPU: optimizers take the programs for CPU tensors, too. Counts the buckets that they get."""
    calls = []

    def kernel(rule, lists, predicated):
        found = cuda.kernel(rule, lists)
        return found if isinstance(found, str) else lambda *given: [calls.append(1), found(*given)][1]

    monkeypatch.setattr(kernels, "_kernel", kernel)
    monkeypatch.setattr("emonavi.sweep.squares", lambda tensors, by_rows: cuda.squares(tensors))
    return calls


def shapes_of(case):
    return SIZES if case.matrix_state == case.vector_state else MATRICES


def columns(case, dtype, how="plain", shapes=None):
    """The parallel lists of a bucket, as they come in the middle of a run."""
    generator, made = torch.Generator().manual_seed(0), {}
    for shape in shapes or shapes_of(case):
        param = torch.empty(shape, dtype=dtype)
        row = {"param": param, "grad": param, **case.make([param])._memories(param)}
        for name, like in row.items():
            drawn = torch.randn(like.shape, generator=generator, dtype=torch.float64)
            drawn = drawn if name in ("param", "grad", "exp_avg", "exp_avg_sample") else drawn.abs()
            made.setdefault(name, []).append(placed(drawn.to(like.dtype).to(DEVICE), how))
    return made


def scalars_of(case, bucket, trust=None):
    rates = torch.linspace(1e-3, 1e-1, len(bucket["param"]), dtype=torch.float64, device=DEVICE)
    return case.scalars(case.betas, rates, 3, trust) | {"decay": 1 - rates, "reflect": True}


def moved(case, bucket, scalars, kernel, grad_scale=1.0, acts=True, seeds=None):
    """Copies of a bucket's lists after a move, with what it reflects of each tensor."""
    held = {name: [t.clone(memory_format=torch.preserve_format) for t in column] for name, column in bucket.items()}
    made, n = cuda.kernel(case.rule, held) if kernel else None, len(bucket["param"])
    scale = torch.tensor(grad_scale, dtype=torch.float64, device=DEVICE)
    swept = Bucket(case.rule, {"foreach": False}, (), list(range(n)), torch.arange(n), held, cut=False, kernel=made)
    sums = swept.move(scalars, scale, torch.tensor(acts, device=DEVICE), seeds)
    return held, None if sums is None else torch.stack(sums).T.tolist()


def close(found, expected, dtype):
    for name, column in expected.items():
        rtol = ROUNDINGS[dtype] if name == "param" else 1e-6
        for a, b in zip(found[name], column, strict=True):
            torch.testing.assert_close(a, b, rtol=rtol, atol=rtol, msg=lambda m, name=name: f"{name}: {m}")


def bits(held):
    return [t.tolist() for column in held.values() for t in column]


# What is computed ----------------------------------------------------------------------------------------------------

WAYS = {
    "plain": {}, "no decay": {"decay": None}, "no reflection": {"reflect": False}, "trust": {"trust": 0.7},
    "bold betas": {"beta1": 0.3, "beta2": 0.6}, "no eps": {"eps": 0.0},
}  # fmt: skip


@kernels_of
@pytest.mark.parametrize(
    ("dtype", "way"),
    [*((torch.float32, way) for way in WAYS), (torch.bfloat16, "plain"), (torch.float16, "no reflection")],
    ids=str,
)
def test_a_program_is_the_rule(case, dtype, way):
    bucket, own = columns(case, dtype), dict(WAYS[way])
    trust = own.pop("trust", None)
    trust = None if trust is None else torch.tensor(trust, dtype=torch.float64, device=DEVICE)
    given = scalars_of(case, bucket, trust)
    given |= {name: value for name, value in own.items() if name in given}  # not all have two betas, or eps
    (plain, expected), (found, sums) = (moved(case, bucket, given, kernel, -0.5) for kernel in (False, True))
    close(found, plain, dtype)
    assert bits({"grad": found["grad"]}) == bits({"grad": bucket["grad"]})
    assert bits(found) != bits(bucket)
    if not given["reflect"]:
        assert sums is expected is None
    else:
        assert sums == [pytest.approx(own, rel=2e-6, abs=1e-6) for own in expected]
    if way == "plain":
        again = moved(case, bucket, given, True, -0.5)
        assert bits(again[0]) == bits(found) and again[1] == sums


@kernels_of
@pytest.mark.parametrize("how", ["unaligned", "transposed", "strided"])
def test_tensors_lie_in_memory_as_they_please(case, how):
    bucket = columns(case, torch.float32, how)
    (plain, expected), (found, sums) = (
        moved(case, bucket, scalars_of(case, bucket), kernel) for kernel in (False, True)
    )
    close(found, plain, torch.float32)
    assert sums == [pytest.approx(own, rel=2e-6, abs=1e-6) for own in expected]


@kernels_of
@pytest.mark.parametrize(
    ("dtype", "how"),
    [(torch.bfloat16, "plain"), (torch.bfloat16, "transposed"), (torch.float16, "plain")],
    ids=str,
)
def test_rounding_at_random_takes_the_same_bits(case, dtype, how):
    bucket = columns(case, dtype, how)
    given = scalars_of(case, bucket)
    places = torch.arange(len(bucket["param"]), device=DEVICE)
    seeds = lowbit.seeds(torch.full_like(places, 3), places)
    runs = [
        moved(case, bucket, given, kernel, seeds=some)[0]
        for kernel, some in ((False, None), (False, seeds), (True, seeds))
    ]
    nearest, plain, found = (torch.cat([t.flatten() for t in held["param"]]) for held in runs)
    assert (found != nearest).float().mean() > 0.2
    # A float32 of a last bit off may fall on the other side.
    assert (found != plain).float().mean() < 0.01


@kernels_of
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_an_update_that_does_not_act_writes_nothing(case, bad):
    bucket = columns(case, torch.float32)
    bucket["grad"][3].fill_(bad)
    found, sums = moved(case, bucket, scalars_of(case, bucket), True, acts=False)
    for name in found.keys() - {"grad"}:
        assert bits({name: found[name]}) == bits({name: bucket[name]})
    assert sums == [[0.0] * 3] * len(bucket["param"])


def test_a_sample_of_a_large_matrix(monkeypatch):
    """Every third element, tiles of the usual size, and a width that 16 divides."""
    monkeypatch.undo()
    (case,) = (c for c in CASES if c.rule is emofact)
    bucket = columns(case, torch.float32, shapes=((64, 80), (4, 16)))
    assert bucket["exp_avg_sample"][0].numel() == -(-64 * 80 // 3)
    (plain, expected), (found, sums) = (
        moved(case, bucket, scalars_of(case, bucket), kernel) for kernel in (False, True)
    )
    close(found, plain, torch.float32)
    assert sums == [pytest.approx(own, rel=2e-6, abs=1e-6) for own in expected]


@dtypes
def test_sums_of_squares(dtype):
    torch.manual_seed(1)
    sizes = (1, 31, 32, 0, 33, 64, 65, 1000)
    tensors = [torch.randn(n, dtype=torch.float64).to(dtype).to(DEVICE) for n in sizes]
    tensors[-1] = tensors[-1].view(50, 20).t()[::2]
    found = cuda.squares(tensors)
    assert found.tolist() == pytest.approx([float((t.double() ** 2).sum()) for t in tensors], rel=2e-6)
    assert found.dtype == torch.float64 and found.tolist() == cuda.squares(tensors).tolist()
    for bad in (math.nan, math.inf, -math.inf):
        tensors[2][-1] = bad
        assert [math.isfinite(s) for s in cuda.squares(tensors).tolist()] == [i != 2 for i in range(len(sizes))]


def test_what_16_bits_cannot_hold_the_squares_can():
    assert cuda.squares([torch.full((3,), 6e4, dtype=torch.float16, device=DEVICE)]).item() == pytest.approx(
        3 * float(torch.tensor(6e4, dtype=torch.float16)) ** 2
    )


# A whole run ---------------------------------------------------------------------------------------------------------

FEELINGS = {
    "adaptive": {"weight_decay": 0.1}, "v4, uphill": {"emotion": "v4", "use_shadow": True, "maximize": True},
    "capturable": {"capturable": True},
}  # fmt: skip


@kernels_of
@pytest.mark.parametrize("feeling", FEELINGS)
def test_a_run_is_that_of_foreach(case, feeling, taken):
    runs = []
    for flags in ({"fused": True}, {"fused": False, "foreach": True}):
        params = [torch.nn.Parameter(p.detach().to(DEVICE)) for p in weights(shapes=FEW)]
        optimizer = case.make(params, **flags, **FEELINGS[feeling])
        train(optimizer, params, 10)
        runs.append(contents(optimizer))
        assert len(taken) == 10 * len(
            {optimizer._layout(p) for p in params}
        )  # each step of the first run, and none of the second
    if feeling == "adaptive":
        assert runs[0]["group 0: emotion"][State._fields.index("gain")] > 0
    for name, value in runs[1].items():
        if isinstance(value, torch.Tensor):
            torch.testing.assert_close(
                runs[0][name], value, rtol=1e-4, atol=1e-5, msg=lambda m, name=name: f"{name}: {m}"
            )


@kernels_of
def test_a_bad_gradient_is_skipped(case, taken):
    params = [torch.nn.Parameter(p.detach().to(DEVICE)) for p in weights(shapes=FEW)]
    optimizer = case.make(params, fused=True, capturable=True)
    train(optimizer, params, 2)
    before = contents(optimizer)
    params[0].grad[0, 0] = math.nan
    optimizer.step(loss=1.0)
    after = contents(optimizer)
    changed = [n for n, v in before.items() if isinstance(v, torch.Tensor) and not torch.equal(v, after[n])]
    assert changed == ["group 0: emotion"] and optimizer.emotion.skipped_steps == 1


@kernels_of
def test_autograd_sees_that_a_parameter_has_moved(case, taken):
    weight = torch.nn.Parameter(torch.ones(3, device=DEVICE))
    loss = (weight * weight).sum()
    loss.backward(retain_graph=True)
    case.make([weight], fused=True).step(loss=1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


# Who sweeps ----------------------------------------------------------------------------------------------------------


class Odd(torch.Tensor):
    pass


@pytest.mark.parametrize(
    ("bucket", "why"),
    [
        (lists(state=torch.bfloat16), "exp_avg as plain tensors of torch.float32"),
        (lists(torch.float64, torch.float64), "float32, bfloat16 and float16, and not of torch.float64"),
        (lists() | {"param": [torch.ones(3).as_subclass(Odd)]}, "param as plain tensors"),
        (lists() | {"grad": [torch.ones(3, device="meta")]}, "grad as plain tensors of torch.float32 on cpu"),
    ],
    ids=["state", "float64", "subclass", "device"],
)
def test_what_no_program_takes(bucket, why):
    assert why in cuda.kernel(emonavi, bucket)


@kernels_of
def test_no_program_runs_beyond_the_end_of_a_tensor(case):
    whole = columns(case, torch.float32)
    assert not isinstance(cuda.kernel(case.rule, whole), str)
    for name in whole.keys() - {"param"}:
        short = whole | {name: [*whole[name][:-1], whole[name][-1].flatten()[1:]]}
        assert f"has no use for {name} of " in cuda.kernel(case.rule, short)


def test_without_triton_the_reason_is_given(monkeypatch):
    monkeypatch.setattr(cuda, "MISSING", "Triton cannot be imported (No module named 'triton')")
    assert "No module named 'triton'" in cuda.kernel(emonavi, lists())
    assert "no kernel for emoclan on CUDA" in cuda.kernel(emoclan, lists())


def test_on_a_gpu_the_programs_are_taken_where_they_are_asked_for():
    device = torch.device("cuda")
    assert kernels.wanted(GROUP | {"fused": True}, device)
    assert not kernels.wanted(GROUP, device) and kernels.wanted(GROUP, torch.device("cpu"))


def test_it_is_known_what_may_be_fetched_16_bytes_at_a_time():
    whole = torch.ones(40, device=DEVICE)
    assert [cuda._Table.of([[whole, some]]).aligned for some in (whole[4:], whole[1:])] == [True, False]


def test_numbers_go_to_a_device_by_value():
    """As a captured graph needs it."""
    numbers = (0, 3, 0x7F12_3456_7890_ABC0, -1)
    assert sweep._by_value(numbers, torch.device(DEVICE)).tolist() == list(numbers)


# Compiled ------------------------------------------------------------------------------------------------------------

COMPILE = """
import torch
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

import emonavi
from emonavi import kernels
from emonavi.kernels import cuda

class Absent:
    get_current_device = get_current_stream = staticmethod(lambda *_: 0)
    get_current_target = staticmethod(lambda: GPUTarget("cuda", 90, 32))

def compiled(program, *given, **named):
    code = run(program, *given, **(named | {"warmup": True})).asm["ptx"]  # compiles and launches nothing
    print(program.__name__, code.count("ld.global.v4"), code.count("st.global.v4"), "atom" in code)

driver.set_active(Absent())
run, JITFunction.run = JITFunction.run, compiled
kernels._kernel = lambda rule, lists, predicated: cuda.kernel(rule, lists)
weight = torch.nn.Parameter(torch.ones(64, 64, dtype=torch.bfloat16))
weight.grad = torch.ones_like(weight)
cuda.squares([weight.grad])
for sibling in (emonavi.EmoNavi, emonavi.EmoLynx, emonavi.EmoFact):
    sibling([weight], fused=True, capturable=True, capture=False).step(loss=1.0)
"""


def test_a_step_compiles_for_a_gpu_that_is_not_there(tmp_path):
    """With the arguments that it has, to programs that fetch 16 bytes at a time, and add nothing in any order."""
    environment = os.environ | {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", COMPILE], env=environment, capture_output=True, text=True, check=True)
    found = dict(line.split(maxsplit=1) for line in done.stdout.splitlines())
    # Eight elements of 16 bits are one vector, of float32 two: gradient, parameter, and each memory.
    vectors = {
        "squares": "1 0", "emonavi": "6 5", "emolynx": "4 3", "add_up": "0 0",
        "gather": "1 0", "remember": "0 0", "sample": "0 0", "move": "2 1",
    }  # fmt: skip
    assert found == {name: f"{count} False" for name, count in vectors.items()}


# On a GPU only -------------------------------------------------------------------------------------------------------


def on_device():
    """Parameters, two of which foreach stacks."""
    params = [torch.nn.Parameter(p.detach().to(DEVICE)) for p in weights(shapes=(*FEW, (5,)))]
    for p in params:
        p.grad = torch.zeros_like(p)
    return params, torch.ones((), device=DEVICE)


def prepare(params, loss, t):
    """Gradients and loss of step t, where they lay."""
    for i, p in enumerate(params):
        p.grad.copy_(torch.sin(torch.arange(p.numel(), device=DEVICE) * (0.1 + i) + t // 3).view(p.shape))
    loss.fill_(1 / (1 + t))


@on_gpu
@kernels_of
@pytest.mark.parametrize("fused", [True, False])
def test_a_step_waits_for_nothing(case, fused):
    params, loss = on_device()
    optimizer = case.make(params, fused=fused)
    for t in range(4):
        prepare(params, loss, t)
        torch.cuda.set_sync_debug_mode("error" if t > 1 else "default")
        try:
            optimizer.step(loss=loss)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert optimizer.emotion.steps == 4


@on_gpu
@kernels_of
@pytest.mark.parametrize("kwargs", [{"fused": True}, {"fused": True, "use_shadow": True}, {"fused": False}], ids=str)
def test_a_captured_step_is_replayed(case, kwargs):
    """Everything but the host's own numbers, as a float lr is one, goes on from replay to replay."""
    runs = []
    for captured in (True, False):
        params, loss = on_device()
        optimizer = case.make(params, **kwargs)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for t in range(3):
                prepare(params, loss, t)
                optimizer.step(loss=loss)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        if captured:
            with torch.cuda.graph(graph):
                optimizer.step(loss=loss)
        for t in range(3, 10):
            prepare(params, loss, t)
            graph.replay() if captured else optimizer.step(loss=loss)
        torch.cuda.synchronize()
        runs.append(contents(optimizer))
    for name, value in runs[1].items():
        if isinstance(value, torch.Tensor):
            torch.testing.assert_close(runs[0][name], value, rtol=1e-6, atol=1e-7)


@on_gpu
@kernels_of
@dtypes
def test_large_tensors_in_chunks_of_the_usual_size(case, dtype, monkeypatch):
    monkeypatch.undo()
    bucket = columns(case, dtype, shapes=((3, cuda.CHUNK + 339), (700, 257), (1, 1), (1, cuda.CHUNK), (129, 1031)))
    (plain, expected), (found, sums) = (
        moved(case, bucket, scalars_of(case, bucket), kernel) for kernel in (False, True)
    )
    close(found, plain, dtype)
    assert sums == [pytest.approx(own, rel=1e-4, abs=1e-4) for own in expected]


@on_gpu
def test_more_elements_than_32_bits_count():
    many = torch.ones((1 << 31) + 5, dtype=torch.float16, device=DEVICE)
    assert cuda.squares([many]).item() == len(many)
