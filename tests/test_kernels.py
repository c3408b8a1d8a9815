"""The C kernels: equal to the rules, the same for any number of threads, and not missed where there is no compiler."""

import math
import os
import shutil
import subprocess
import sys
import warnings

import pytest
import torch
from cases import CASES, Odd, contents, differences, train, weights
from hypothesis import given
from hypothesis import strategies as st

from emonavi import EmoNavi, kernels
from emonavi.emotion import State
from emonavi.fact import emofact, sample
from emonavi.kernels import build, cpu
from emonavi.navi import emonavi

compiled = pytest.mark.skipif(shutil.which("cc") is None, reason="needs a C compiler")
GROUP = {"fused": None, "foreach": None, "capturable": False}
kernels_of = pytest.mark.parametrize("case", [c for c in CASES if c.kernel], ids=lambda c: c.name)


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache of libraries, and no library loaded yet; afterwards the usual one again."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("CC", "cc -O0")  # soon done
    for found in (build.library, kernels._say_missing):
        found.cache_clear()
    yield tmp_path / "cache" / "emonavi"
    monkeypatch.undo()
    for found in (build.library, kernels._say_missing):
        found.cache_clear()


def lists(dtype=torch.float32, state=torch.float32):
    made = {name: [torch.ones(3, dtype=dtype)] for name in ("param", "grad")}
    return made | {name: [torch.ones(3, dtype=state)] for name in ("exp_avg", "exp_avg_sq")}


# Who sweeps ----------------------------------------------------------------------------------------------------------


@compiled
@pytest.mark.parametrize(
    ("fused", "foreach", "taken"),
    [(None, None, True), (True, None, True), (True, False, True), (None, True, False), (None, False, False),
     (False, None, False), (False, True, False)],
)  # fmt: skip
def test_which_flags_take_the_kernel(fused, foreach, taken):
    kernel = kernels.choose(emonavi, lists(), GROUP | {"fused": fused, "foreach": foreach}, False)
    assert (kernel is not None) == taken


@compiled
@pytest.mark.parametrize(
    ("bucket", "predicated", "why"),
    [
        (lists(state=torch.bfloat16), False, "exp_avg as plain tensors of torch.float32"),
        (lists() | {"grad": [torch.ones(3, dtype=torch.float64)]}, False, "grad as plain tensors"),
        (lists() | {"param": [torch.ones(3).as_subclass(Odd)]}, False, "param as plain tensors"),
        (lists() | {"param": [torch.ones(3, device="meta")]}, False, "no kernels for meta"),
        (lists(), True, "capturable=True"),
    ],
    ids=["state", "grad", "subclass", "device", "predicated"],
)
def test_what_no_kernel_takes(bucket, predicated, why):
    """Left to foreach by itself, and refused with the reason where the kernel was asked for."""
    assert kernels.choose(emonavi, bucket, GROUP, predicated) is None
    with pytest.raises(RuntimeError, match=f"fused=True: .*{why}.*leave fused at None"):
        kernels.choose(emonavi, bucket, GROUP | {"fused": True}, predicated)


@compiled
def test_a_rule_of_somebody_else_has_no_kernel():
    class Own(EmoNavi):
        def _rule(self, layout):
            return (lambda *tensors, **scalars: calls.append(1)), True

    calls, params = [], weights()
    train(Own(params, capture=False, on_missing_loss="ignore"), params, 2)
    assert calls
    with pytest.raises(RuntimeError, match="no kernel for"):
        Own(params, fused=True)


@kernels_of
def test_without_a_compiler_everything_works_by_foreach(case, cache, monkeypatch):
    monkeypatch.setenv("CC", "/nowhere/cc")
    runs = []
    for foreach in (None, True):
        params = weights()
        runs.append(case.make(params, foreach=foreach))
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            train(runs[-1], params, 5)
        assert ["no C compiler '/nowhere/cc'" in str(w.message) for w in said] == ([] if foreach else [True])  # once
        runs[-1].param_groups[0]["foreach"] = None
    assert not differences(*map(contents, runs))
    with pytest.raises(RuntimeError, match=r"fused=True: there is no C compiler '/nowhere/cc': install one .* in CC"):
        case.make(weights(), fused=True)
    with pytest.raises(RuntimeError, match="no C compiler"):
        runs[0].add_param_group({"params": [torch.nn.Parameter(torch.ones(2))], "fused": True})
    assert len(runs[0].param_groups) == 1


def test_a_compiler_that_fails_is_named(cache, monkeypatch):
    monkeypatch.setenv("CC", shutil.which("false"))
    assert "could not be made" in build.library() and "false" in build.library()
    assert not list(cache.glob("*"))


@compiled
@pytest.mark.parametrize("launcher", ["env", "nice -n 1"])
def test_a_launcher_before_the_compiler(launcher, cache, monkeypatch):
    monkeypatch.setenv("CC", f"{launcher} cc -O0")
    assert not isinstance(build.library(), str)


def make_in_processes(count):
    """Have the library made by as many processes at once; returns their exit codes."""
    code = f"import runpy; assert not isinstance(runpy.run_path({build.__file__!r})['library'](), str)"
    started = [subprocess.Popen([sys.executable, "-S", "-c", code]) for _ in range(count)]
    return [process.wait() for process in started]


# The library ---------------------------------------------------------------------------------------------------------


@compiled
@pytest.mark.parametrize("umask", [0o022, 0o002])
def test_a_library_is_made_once_and_found_again(cache, monkeypatch, umask):
    before = os.umask(umask)
    try:
        assert not isinstance(build.library(), str)
    finally:
        os.umask(before)
    (made,) = cache.iterdir()
    build.library.cache_clear()
    monkeypatch.setattr(build, "_compile", lambda *_: pytest.fail("compiled again"))
    assert not isinstance(build.library(), str)
    monkeypatch.undo()
    assert made.stat().st_mode & 0o022 == 0


@compiled
def test_a_broken_library_is_made_anew(cache):
    assert make_in_processes(1) == [0]
    (made,) = cache.iterdir()
    whole = made.read_bytes()
    made.write_bytes(b"no library")
    assert not isinstance(build.library(), str)
    assert made.read_bytes() == whole


@compiled
@pytest.mark.parametrize("share", [0.0, 0.2, 0.5, 0.8, 0.95])
def test_a_library_that_was_cut_short_is_made_anew(cache, share):
    """The loader would take much of one, and the process would die of SIGBUS: so in processes of their own."""
    assert make_in_processes(1) == [0]
    (made,) = cache.iterdir()
    whole = made.read_bytes()
    os.truncate(made, int(share * len(whole)))
    assert make_in_processes(3) == [0] * 3
    (anew,) = cache.iterdir()
    assert anew.read_bytes() == whole


@compiled
def test_a_library_that_others_can_write_is_not_loaded(cache, monkeypatch):
    build.library()
    cache.chmod(0o777)
    build.library.cache_clear()
    loaded = []
    monkeypatch.setattr(build.ctypes, "CDLL", lambda path: loaded.append(path))
    build.library()
    assert len(loaded) == 1 and not loaded[0].startswith(str(cache))


@compiled
def test_without_a_cache_the_library_is_made_and_nothing_left(cache, tmp_path, monkeypatch):
    (tmp_path / "cache").write_text("a file in the way")
    monkeypatch.setattr(build.tempfile, "tempdir", str(tmp_path))
    assert not isinstance(build.library(), str)
    assert [p.name for p in tmp_path.iterdir()] == ["cache"]


@compiled
def test_many_processes_make_one_library(cache):
    assert make_in_processes(3) == [0] * 3
    assert len(list(cache.iterdir())) == 1


def test_importing_the_library_compiles_nothing(cache):
    code = "import sys, emonavi; assert not [m for m in sys.modules if m.startswith('emonavi.kernels.')]"
    subprocess.run([sys.executable, "-c", code], check=True)
    assert not cache.exists()


# What is computed ----------------------------------------------------------------------------------------------------

# The same operations in the same order as the rule, but for a few roundings a step (rules.h says which); parameters of
# 16 bits round the result of theirs, where a float32 of a last bit off may fall on the other side.
ROUNDINGS = {torch.float64: 1e-11, torch.float32: 1e-5, torch.bfloat16: 2.0**-7, torch.float16: 2.0**-10}


def placed(values, how):
    """The same values at an odd address, transposed, or every other element of more."""
    if how == "unaligned":
        return torch.empty(values.numel() + 1, dtype=values.dtype)[1:].view(values.shape).copy_(values)
    if how == "transposed" and values.dim() > 1:
        return values.transpose(0, 1).contiguous().transpose(0, 1)
    if how == "strided" and values.dim():
        return torch.empty(*values.shape, 2, dtype=values.dtype)[..., 0].copy_(values)
    return values.clone()


def same_by_both(case, shapes, how, grads_how, dtype, kwargs, steps=5):
    """Single and kernel on the same gradients, as they come; everything that each holds in the end must be close."""
    runs = []
    for fused in (None, True):
        params = [torch.nn.Parameter(placed(p.detach(), how)) for p in weights(dtype, shapes)]
        optimizer = case.make(params, fused=fused, foreach=False, **({"stochastic_rounding": False} | kwargs))
        generator = torch.Generator().manual_seed(3)
        for t in range(steps):
            for p in params:
                # Most of it as the step before, so that reflection has something to find.
                p.grad = placed((torch.randn(p.shape, generator=generator) + t % 3).to(dtype), grads_how)
            optimizer.step(loss=0.01 * t)
        runs.append(contents(optimizer))
    single, fused = runs
    for name, value in single.items():
        if isinstance(value, torch.Tensor):
            rounded = name.startswith("parameter") or name.endswith("shadow")  # which follows the parameter
            rtol = ROUNDINGS[dtype] if rounded else min(1e-5, 10 * ROUNDINGS[dtype])
            if name.startswith("group"):
                rtol *= 10  # torch's own norm of a large tensor of 16 bits is off in the fifth digit
            torch.testing.assert_close(
                fused[name].double(), value.double(), rtol=rtol, atol=rtol, msg=lambda m, name=name: f"{name}: {m}"
            )


dims = st.lists(st.integers(1, 40), min_size=0, max_size=3).map(tuple)
layouts = st.sampled_from(["plain", "unaligned", "transposed", "strided"])
ways_to_feel = [
    *({"emotion": e} for e in ("v1", "v3", "v4")), {}, {"maximize": True}, {"use_trust": False},
    {"weight_decay": 0.3}, {"betas": (0.3, 0.6)}, {"eps": 0.1}, {"use_shadow": True}, {"min_lr": 1e-2},
    {"stochastic_rounding": True},
]  # fmt: skip


@compiled
@kernels_of
@given(
    shapes=st.lists(dims, min_size=1, max_size=4), how=layouts, grads_how=layouts,
    dtype=st.sampled_from(list(ROUNDINGS)), kwargs=st.sampled_from(ways_to_feel),
)  # fmt: skip
def test_the_kernel_is_the_rule(case, shapes, how, grads_how, dtype, kwargs):
    same_by_both(case, shapes, how, grads_how, dtype, kwargs)


@compiled
@kernels_of
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_large_tensors_in_many_pieces(case, dtype):
    """More than a piece, a band and a block, and none of them whole."""
    shapes = [(3 * (1 << 16) + 1017,), (700, 257), (129, 1031), (5, 70_001), (30_001, 7), (300, 8), (301, 40)]
    same_by_both(case, shapes, "plain", "plain", dtype, {"weight_decay": 0.1}, steps=3)


@compiled
@kernels_of
@pytest.mark.parametrize("how", ["plain", "transposed"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_random_rounding_takes_the_same_bits(case, dtype, how):
    """Of some hundred thousand elements that mostly lie between two neighbours all but a few go the same way."""
    shapes = [(3, 5), (7001, 10), (12, 13), (300, 257), (70_001,), (16, 33, 9)]
    runs = []
    for fused, rounds in ((None, True), (True, True), (True, False)):
        params = [torch.nn.Parameter(placed(p.detach(), how)) for p in weights(dtype, shapes)]
        optimizer = case.make(params, lr=1e-3, fused=fused, foreach=True if fused is None else None)
        optimizer.param_groups[0]["stochastic_rounding"] = rounds
        for p in params:
            p.grad = placed(torch.cos(torch.arange(p.numel())).view(p.shape).to(dtype), how)
        optimizer.step(loss=1.0)
        runs.append([p.detach() for p in params])
    for random, by_kernel, nearest in zip(*runs, strict=True):
        assert (by_kernel != random).sum() <= 1 + 1e-3 * random.numel()
        assert (nearest != random).sum() > 0.02 * random.numel()


@compiled
@pytest.mark.parametrize("dtype", list(cpu.DTYPES), ids=str)
@pytest.mark.parametrize("rate", [0.01, 0.7, 1.0])
def test_the_shadow_follows_as_torch_has_it(dtype, rate):
    params = weights(dtype, [(70_001,), (3, 5), ()])
    shadows = [torch.sin(torch.arange(p.numel())).view(p.shape).to(cpu.DTYPES[dtype]) for p in params]
    expected = [torch.lerp(s, p.detach().to(s.dtype), rate) for p, s in zip(params, shadows, strict=True)]
    assert kernels.follow(params, shadows, rate)
    for found, wanted in zip(shadows, expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-7)
    before = [s.clone() for s in shadows]
    for other in (
        [torch.stack([s, s], -1)[..., 0] for s in shadows], [s.to(torch.complex64) for s in shadows],
        [s[:1] if s.dim() else s for s in shadows],
    ):  # fmt: skip
        assert not kernels.follow(params, other, rate)
    assert all(map(torch.equal, shadows, before))


@compiled
@kernels_of
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_threads_change_no_bit(case, dtype):
    runs = []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            params = weights(dtype, [(300_001,), (700, 600), (3, 4), (150, 2000)])
            optimizer = case.make(params, fused=True)
            for t in range(3):
                for i, p in enumerate(params):
                    p.grad = torch.sin(torch.arange(p.numel()) * (0.1 + i) + t).view(p.shape).to(dtype)
                optimizer.step(loss=1.0)
            runs.append(contents(optimizer))
    finally:
        torch.set_num_threads(1)
    assert runs[0]["group 0: emotion"][State._fields.index("gain")] > 0
    assert differences(runs[0], runs[1]) == differences(runs[0], runs[2]) == []


def matrices(shapes, dtype=torch.float64):
    """What the rule of matrices takes, as one bucket."""
    torch.manual_seed(3)
    columns = {name: [torch.randn(s, dtype=dtype) for s in shapes] for name in ("param", "grad")}
    columns["exp_avg_row"] = [torch.rand(len(p), *(1 for _ in p.shape[1:]), dtype=dtype) for p in columns["param"]]
    columns["exp_avg_col"] = [torch.rand(1, *p.shape[1:], dtype=dtype) for p in columns["param"]]
    return columns | {"exp_avg_sample": [torch.randn_like(sample(p[None])[0]) for p in columns["param"]]}


@compiled
def test_what_is_gathered_of_matrices_serves_one_move():
    """As it came: the guard's scale is known later. The gradients of the next move are gathered anew, asked or not."""
    bucket = matrices([(5, 3), (6, 4, 2), (200, 40)])
    kernel = cpu.kernel(emofact, bucket, False)
    expected = {name: [t.clone() for t in column] for name, column in bucket.items()}
    numbers = {"beta1": 0.9, "eps": 1e-8, "floor": 1e-16, "trust": None, "decay": None, "reflect": True}
    vectors = {name: torch.tensor([0.1, 0.2, 0.3], dtype=torch.float64) for name in ("step_size", "bias")}
    for scale, first in ((0.5, True), (-3.0, False), (1.0, True)):
        if first:
            norms = torch.stack(torch._foreach_norm(bucket["grad"]))
            torch.testing.assert_close(kernel.squares(bucket), norms.square())
        found = kernel(bucket, numbers | vectors, scale, True, None)
        for i in range(3):
            row = [column[i].clone() if name == "grad" else column[i] for name, column in expected.items()]
            row[1] *= scale
            wanted = emofact(*(t[None] for t in row), **numbers, **{k: v[i] for k, v in vectors.items()})
            torch.testing.assert_close([sums[i] for sums in found], [sums[0] for sums in wanted])
        torch.testing.assert_close(bucket, expected, rtol=1e-12, atol=1e-12)
        for column in (bucket["grad"], expected["grad"]):
            for grad in column:
                grad.cos_()


@compiled
@pytest.mark.parametrize("dtype", list(ROUNDINGS), ids=str)
def test_sums_of_squares_by_rows(dtype):
    """The order is that of the kernel of matrices, bit by bit, or a resumed run would not go on as one that went on."""
    bucket = matrices([(1, 1), (3, 31), (130, 2), (200, 1031), (7, 32)], torch.float32)
    bucket = {k: [t.to(dtype if k in ("param", "grad") else cpu.DTYPES[dtype]) for t in c] for k, c in bucket.items()}
    found = cpu.squares([*bucket["grad"], torch.ones(3, dtype=dtype), torch.ones(0, 2, dtype=dtype)], by_rows=True)
    assert found.tolist() == [*cpu.kernel(emofact, bucket, False).squares(bucket).tolist(), 3.0, 0.0]
    for square, grad in zip(found[:5].tolist(), bucket["grad"], strict=True):
        assert square == pytest.approx(float((grad.double() ** 2).sum()), rel=1e-12 if dtype == torch.float64 else 2e-6)
    bucket["grad"][3][5, 7] = math.nan
    assert not math.isfinite(cpu.squares(bucket["grad"], by_rows=True)[3])


@compiled
@pytest.mark.parametrize("dtype", list(ROUNDINGS), ids=str)
def test_sums_of_squares(dtype):
    torch.manual_seed(1)
    for n in (1, 15, 16, 17, 1025, 200_003):
        values = torch.randn(n, dtype=torch.float64).to(dtype)
        (found,) = cpu.squares([values]).tolist()
        assert found == pytest.approx(
            float((values.double() ** 2).sum()), rel=1e-12 if dtype == torch.float64 else 2e-6
        )
    for bad in (math.nan, math.inf, -math.inf):
        values[-1] = bad
        assert not math.isfinite(cpu.squares([values]).item())
    view = torch.randn(6, 4, dtype=torch.float64).to(dtype).t()[::2]
    assert cpu.squares([view]).item() == pytest.approx(float((view.double() ** 2).sum()), rel=2e-6)


@compiled
@kernels_of
def test_a_gradient_with_a_negative_bit_is_read_as_it_is(case):
    """The imaginary part of a conjugate is negated in name only."""
    runs = []
    for lazily in (True, False):
        params = weights(shapes=[(5, 4), (7,)])
        optimizer = case.make(params, fused=True, stochastic_rounding=False)
        for p in params:
            p.grad = torch.complex(torch.zeros_like(p), torch.sin(p.detach() * 3)).conj().imag
            assert p.grad.is_neg()
            if not lazily:
                p.grad = p.grad.resolve_neg()
        optimizer.step(loss=1.0)
        runs.append(contents(optimizer))
    assert differences(*runs) == []


@compiled
@kernels_of
def test_autograd_sees_that_a_parameter_has_moved(case):
    weight = torch.nn.Parameter(torch.ones(3))
    loss = (weight * weight).sum()
    loss.backward(retain_graph=True)
    case.make([weight], fused=True).step(loss=1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_a_compiled_step_compiles_no_more_than_twice():
    """Whatever lr and drive do. The step is not traced at all: what is counted is the empty graph around it."""
    from torch._dynamo.testing import CompileCounter

    counter, params = CompileCounter(), weights()
    optimizer = EmoNavi(params, on_missing_loss="ignore", capture=False)
    step = torch.compile(optimizer.step, backend=counter)
    drives = []
    for t in range(8):
        for p in params:
            p.grad = torch.sin(p.detach() + t)
        optimizer.param_groups[0]["lr"] = 1e-3 * (t + 1)
        step(loss=1.0 / (t + 1))
        drives.append(optimizer.emotion.drive)
    torch.compiler.reset()
    assert optimizer.emotion.steps == 8 and len(set(drives)) > 4
    assert counter.frame_count <= 2


@compiled
@kernels_of
def test_betas_and_eps_may_be_tensors(case):
    runs = []
    for kind in (float, torch.tensor):
        params = weights()
        optimizer = case.make(params, betas=tuple(map(kind, case.betas)), eps=kind(1e-6), fused=True)
        train(optimizer, params, 3)
        runs.append(params)
    for a, b in zip(*runs, strict=True):
        torch.testing.assert_close(a, b)
