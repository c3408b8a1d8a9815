"""Each rule against its float64 reference, through the functional form and through the class, in several moods."""

import math
from statistics import fmean

import numpy as np
import pytest
import torch
from cases import CASES, SHAPES, Valley, configured, contents, felt, siblings, train, vector, ways, weights, write
from reference import PresetFeeling, PresetShadow, first_drive, running_mean

from emonavi.fact import sample
from emonavi.navi import emonavi

STEPS = 25
BIG = (130, 67)  # more than the 4,096 coordinates that EmoFact's reflection remembers
CALM = [1.0] * STEPS
BRAKING = [0.8**t for t in range(STEPS)]
GROWING = [1e-3 * 1.3**t for t in range(STEPS)]
MOODS = pytest.mark.parametrize("moods", [CALM, BRAKING, GROWING], ids=["calm", "braking", "growing"])


def numpy(tensor):
    return tensor.detach().double().numpy().copy()


def places(case, shape):
    """The coordinates that EmoFact samples: their choice is free, what is computed from them is not."""
    if len(shape) < 2 or "exp_avg_sample" not in case.matrix_state:
        return {}
    return {"places": sample(torch.arange(math.prod(shape)).view(1, *shape))[0].numpy()}


def close(actual, expected, rtol):
    # Sums of some hundred terms of both signs: the absolute part allows for cancellation.
    np.testing.assert_allclose(numpy(actual), expected, rtol=rtol, atol=rtol)


# float64 differs from the reference by the order of operations only. float32 (eps 1.2e-7) by some roundings a step, of
# which the memories keep about ten steps' worth, and a division; signs can flip only where Lion's blend is all but 0.
PRECISION = pytest.mark.parametrize(
    ("dtype", "rtol"), [(torch.float64, 1e-11), (torch.float32, 2e-5)], ids=["f64", "f32"]
)


@siblings
@PRECISION
@pytest.mark.parametrize("stacked", [False, True], ids=["one", "batch"])
@pytest.mark.parametrize("shape", [(6, 4), (3, 2, 2, 2), (1, 7), BIG], ids=str)
def test_functional_form_equals_reference(case, stacked, dtype, rtol, shape):
    """The matrix rule on three tensors, with forced step sizes, decay and trust; sums of reflection included."""
    own = [0.5, 2.0, 1.0]
    params = [p.detach() for p in weights(dtype, [shape] * 3)]
    expected = [numpy(p) for p in params]
    references = [case.reference(shape, betas=case.betas, eps=1e-8, **places(case, shape)) for _ in own]
    memories = {
        k: torch.stack([torch.tensor(r.state()[k], dtype=dtype) for r in references]) for k in case.matrix_state
    }
    valley, param = Valley(params), torch.stack(params)
    for t, mood in enumerate([*CALM[:8], *BRAKING[:8], *GROWING[-9:]]):
        valley.fill(list(param), t)
        grad = torch.stack(valley.grads).to(dtype)
        before = grad.clone()
        rates = [1e-2 * mood * r for r in own]
        decays = [1 - 0.1 * r for r in rates]
        trust = 1 - 0.5 * math.sin(t) ** 2
        scalars = case.scalars(case.betas, torch.tensor(rates, dtype=dtype), t + 1, torch.tensor(trust, dtype=dtype))
        scalars["decay"] = torch.tensor(decays, dtype=dtype)
        scalar, last = math.sin(t), math.sin(t - 1) if t else 0.0
        scalars |= case.switch(scalar, last) if case.switch else {}
        parts = [slice(None)] if stacked else [slice(i, i + 1) for i in range(len(own))]
        sums = []
        for part in parts:
            some = {
                k: v[part].view(-1, *[1] * len(shape)) if isinstance(v, torch.Tensor) and v.dim() else v
                for k, v in scalars.items()
            }
            three = case.rule(param[part], grad[part], *(m[part] for m in memories.values()), **some)
            sums += zip(*(s.tolist() for s in three), strict=True)
        for i, reference in enumerate(references):
            expected[i], wanted = reference.update(
                expected[i], numpy(before[i]), rates[i], decays[i], trust, **case.at(scalar)
            )
            assert sums[i] == pytest.approx(wanted, rel=50 * rtol, abs=200 * rtol)
            close(param[i], expected[i], rtol)
            for name, value in reference.state().items():
                close(memories[name][i], value, rtol)
        assert torch.equal(before, grad)


def test_first_memory_trust_equals_reference():
    """EmoFact's vectors: ``grad_trust`` scales what the first memory takes in."""
    fact = next(c for c in CASES if c.matrix_state != c.vector_state)
    reference = fact.reference((5,), betas=(0.9, 0.999), eps=1e-8, corrects_bias=False)
    p, m, v = (torch.ones(1, 5, dtype=torch.float64) * x for x in (1.0, 0.0, 0.0))
    expected = numpy(p[0])
    one = torch.ones((), dtype=torch.float64)
    for t in range(STEPS):
        g = torch.sin(torch.arange(5.0, dtype=torch.float64) + t)
        sums = emonavi(
            p, g[None], m, v, step_size=one * 0.01, decay=None, root=one, last_root=one, beta1=0.9, beta2=0.999,
            eps=1e-8, grad_trust=one * 0.7, reflect=False,
        )  # fmt: skip
        assert sums is None
        expected, _ = reference.update(expected, numpy(g), 0.01, 1.0, 0.7)
        close(p[0], expected, 1e-12)


@siblings
@MOODS
@pytest.mark.parametrize(
    ("foreach", "capturable"),
    [(False, False), (True, False), (True, True), (None, False)],
    ids=["single", "foreach", "predicated", "kernel"],
)
def test_class_equals_reference_with_the_drive_forced(case, foreach, moods, capturable):
    """The whole step: bias correction, the tensors' own drives, decay that follows the drive, and trust."""
    shapes = (*SHAPES, BIG)
    params = weights(torch.float64, shapes)
    lr, decay = 1e-2, 0.1
    optimizer = case.make(
        params, lr=lr, weight_decay=decay, max_norm=0.0, min_lr=0.0, foreach=foreach, capturable=capturable
    )
    references = [case.reference(s, betas=case.betas, eps=1e-8, **places(case, s)) for s in shapes]
    expected = [numpy(p) for p in params]
    valley, trust, gains = Valley(params), 0.0, []
    for t, mood in enumerate(moods):
        # A rule that knows no size of gradients steps less far where they are smaller than they used to be.
        fade = min(1.0, running_mean(gains, 0.1) / fmean(gains)) if case.fades and len(gains) > 3 else 1.0
        own = [float(optimizer.state[p]["drive"]) if t else 1.0 for p in params]
        if t:
            write(optimizer, log_drive=math.log(mood), rest=0.0, goal=-1e9, panic=0.0, scalar=math.sin(t))
        else:
            mood = first_drive(params, lr)
        valley.fill(params, t)
        grads = [numpy(p.grad) for p in params]
        optimizer.step()
        sums = np.zeros(3)
        for i, reference in enumerate(references):
            rate = lr * mood * own[i]
            expected[i], three = reference.update(
                expected[i], grads[i], rate * fade, max(0.999, 1 - lr * mood * decay), **case.at(math.sin(t))
            )
            # Each tensor's step is weighted by its effective lr.
            sums += rate * np.array(three)
            close(params[i], expected[i], 1e-7)  # the tensors' own drives are kept in float32
            for name, value in reference.state().items():
                close(optimizer.state[params[i]][name], value, 1e-7)
            assert float(optimizer.state[params[i]]["step"]) == t + 1
        if t:
            gains.append(math.sqrt(sums[1] * sums[2]) / max(lr * mood * o for o in own))
            trust += max(0.1, 1 / len(gains)) * (sums[0] / math.sqrt(sums[1] * sums[2]) - trust)
        assert felt(optimizer, "trust") == pytest.approx(trust, abs=1e-6)
        assert felt(optimizer, "grad_norm") == pytest.approx(math.sqrt(sum((g**2).sum() for g in grads)), rel=1e-12)
    assert not case.fades or fade < 0.999, "the step never faded: the test shows nothing of it"
    assert any(abs(d - 1) > 1e-3 for d in own), "the tensors' own drives never moved: the test shows nothing"


@siblings
@ways
def test_start_is_a_small_share_of_the_weights_rms(case, foreach):
    """drive = min(1, (3e-3 rms + 1e-8) / lr_ref), lr_ref the largest lr at construction."""
    for lr in (1e-5, 1e-2, 1.0):
        params = weights()
        optimizer = case.make(
            [{"params": params[:2], "lr": lr}, {"params": params[2:], "lr": lr / 10}], foreach=foreach, min_lr=0.0
        )
        wanted = first_drive(params, lr)
        before = [p.detach().clone() for p in params]
        optimizer.param_groups[0]["weight_decay"] = optimizer.param_groups[1]["weight_decay"] = 0.0
        train(optimizer, params, 1)
        # The first bias-corrected step of a rule is lr sign(g), but for a matrix under EmoFact and a soft sign, whose
        # steps are of that order.
        moved = (params[1].detach() - before[1]).abs()
        if case.first_step is None:
            assert 0.1 * lr * wanted < float(moved.max()) <= 2 * lr * wanted + 1e-7
        else:
            torch.testing.assert_close(
                moved, torch.full_like(moved, lr * wanted * case.first_step), rtol=1e-2, atol=1e-7
            )


# Single-tensor against foreach: the same operations in the same order, but sums over pieces of a tensor are taken piece
# by piece, so that reflection (and through the drive everything) may differ by roundings of the dot products.
SAME = {"rtol": 2e-5, "atol": 2e-6}


def compared(a, b, **tolerance):
    a, b = contents(a), contents(b)
    assert a.keys() == b.keys()
    for name in a:
        if isinstance(a[name], torch.Tensor):
            torch.testing.assert_close(a[name], b[name], msg=lambda m, name=name: f"{name}: {m}", **tolerance)


@configured()
def test_single_equals_foreach_and_kernel(case, config):
    runs = []
    for foreach in (False, True, None):
        params = weights(shapes=(*SHAPES, BIG, (300, 250)))
        runs.append(case.make(params, foreach=foreach, **config.kwargs))
        train(runs[-1], params, 30)
    for other in runs[1:]:
        for optimizer in (runs[0], other):
            optimizer.param_groups[0]["foreach"] = None
        compared(runs[0], other, **SAME)


@configured()
def test_predicated_path_is_the_normal_path(case, config):
    """Predicated, the emotion is computed on 0-d tensors, else in plain numbers: float64 both, so that it differs by
    the last bits of tanh, exp and log, and the float32 tensors by no more than a rounding here and there."""
    runs = []
    for capturable in (False, True):
        params = weights()
        runs.append(case.make(params, foreach=True, capturable=capturable, **config.kwargs))
        train(runs[-1], params, 30)
    for optimizer in runs:
        optimizer.param_groups[0]["capturable"] = False
    compared(*runs, rtol=1e-6, atol=1e-7)


@configured(lambda c: not c.adaptive)
@ways
def test_preset_equals_reference(case, config, foreach):
    """Presets with and without shadow on losses small enough that the scalar does not saturate."""
    generation, lr = config.emotion, 1e-2
    params = weights(torch.float64)
    optimizer = case.make(params, lr=lr, weight_decay=0.1, foreach=foreach, **config.kwargs)
    references = [case.reference(p.shape, betas=case.betas, eps=1e-8, corrects_bias=False) for p in params]
    shadows = [PresetShadow(generation) for _ in params]
    feeling = PresetFeeling(generation, lr=lr)
    expected = [numpy(p) for p in params]
    valley = Valley(params)
    moods = set()
    for t in range(60):
        loss = 0.01 * valley.fill(params, t) if t < 45 else 0.1
        feeling.feel(loss)
        moods.add((feeling.ratio > 0, abs(feeling.scalar) > 0.6))
        grads = [numpy(p.grad) for p in params]
        optimizer.step(loss=loss)
        for i, (reference, shadow) in enumerate(zip(references, shadows, strict=True)):
            p = shadow.lean(expected[i], feeling.ratio, feeling.trust) if config.shadow else expected[i]
            # Decay is not scaled by the scalar.
            decay = 1 - feeling.lr * 0.1
            size = feeling.lr * feeling.step_size / feeling.lr
            expected[i], _ = reference.update(p, grads[i], size, decay, feeling.trust, **case.at(feeling.scalar))
            close(params[i], expected[i], 1e-10)
            if shadow.value is not None:
                close(optimizer.state[params[i]]["shadow"], shadow.value, 1e-6)
        feeling.end_step(math.sqrt(sum((g**2).sum() for g in grads)))
        snapshot = optimizer.emotion
        assert snapshot.scalar == pytest.approx(feeling.scalar, abs=1e-10)
        assert (snapshot.short, snapshot.long) == pytest.approx((feeling.short, feeling.long), rel=1e-10)
        assert optimizer.effective_lr[0] == pytest.approx(feeling.lr, rel=1e-10)
        assert optimizer.should_stop == feeling.should_stop
        assert optimizer.param_groups[0]["lr"] == lr
    assert {True, False} <= {leans for leans, _ in moods}, "the scalar never crossed a threshold: nothing was shown"
    assert len(vector(optimizer)) > 32
