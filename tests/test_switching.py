"""The siblings that switch rules by the emotional scalar: every branch, and that none hangs on a rounding."""

import copy
import math

import pytest
import torch
from cases import CASES, Valley, drive, felt, train, vector, ways, weights, write

import emonavi


def numpy(tensor):
    return tensor.detach().double().numpy().copy()


SWITCHING = pytest.mark.parametrize("case", [c for c in CASES if c.switch], ids=lambda c: c.name)
TRUTH = pytest.mark.parametrize("capturable", [False, True], ids=["branching", "predicated"])
# Within each published band, on its borders, and beyond them by less than float32 can tell.
EDGES = (0.1, 0.2, 0.3, 0.5, 0.6)
SCALARS = (0.0, 0.05, 0.15, 0.25, 0.4, 0.55, 0.7, -0.25, -0.7, *EDGES, *(math.nextafter(e, 1) for e in EDGES))


def published(case, dtype, scalars, **kwargs):
    """A run of v3 with the scalar forced, and what the parameters were after each step."""
    params = weights(dtype)
    optimizer = case.make(params, emotion="v3", weight_decay=0.1, **kwargs)
    place, valley, course = optimizer._emotion.index("scalar"), Valley(params), []
    for t, scalar in enumerate(scalars):
        vector(optimizer)[place] = scalar
        valley.fill(params, t)
        grads = [numpy(p.grad) for p in params]
        optimizer.step()
        course.append((grads, [numpy(p) for p in params]))
    return optimizer, params, course


@SWITCHING
@TRUTH
@ways
def test_every_published_branch(case, foreach, capturable):
    optimizer, params, course = published(case, torch.float64, SCALARS, foreach=foreach, capturable=capturable)
    references = [case.reference(p.shape, betas=case.betas, eps=1e-8, corrects_bias=False) for p in params]
    expected = [numpy(p) for p in weights(torch.float64)]
    for scalar, (grads, moved) in zip(SCALARS, course, strict=True):
        for i, reference in enumerate(references):
            rate = case.lr * (1 - abs(scalar))
            expected[i], _ = reference.update(expected[i], grads[i], rate, 1 - case.lr * 0.1, scalar=scalar)
            assert moved[i] == pytest.approx(expected[i], rel=1e-10, abs=1e-10), f"scalar {scalar}, tensor {i}"
    for p, reference in zip(params, references, strict=True):
        for name, value in reference.state().items():
            assert numpy(optimizer.state[p][name]) == pytest.approx(value, rel=1e-10, abs=1e-10), name


@SWITCHING
def test_the_published_bands_differ(case):
    """What the branches do is not the same: a threshold that is never crossed would go unnoticed."""
    sides = {}
    for edge in EDGES:
        ends = [published(case, torch.float32, [0.5] * 3 + [s])[1] for s in (edge, math.nextafter(edge, 1))]
        sides[edge] = any(float((a - b).detach().abs().max()) > 1e-5 for a, b in zip(*ends, strict=True))
    has = {"EmoClan": {0.3, 0.6}, "EmoZeal": {0.1, 0.6}, "EmoNeco": {0.2, 0.5}}[case.name]
    assert {edge for edge, differs in sides.items() if differs} == has


def adaptive(case, scalar, steps=12, **kwargs):
    """A run whose last step is made at the given scalar, and how far each tensor moved in it."""
    params = weights(torch.float64)
    optimizer = case.make(params, weight_decay=0.0, max_norm=0.0, **kwargs)
    train(optimizer, params, steps, loss=None)
    before = [p.detach().clone() for p in params]
    write(optimizer, scalar=scalar)
    train(optimizer, params, 1, start=steps, loss=None)
    return optimizer, [p.detach() - b for p, b in zip(params, before, strict=True)]


def matrices(moves):
    return [m for m in moves if m.dim() > 1]


@SWITCHING
@TRUTH
@ways
def test_a_loss_that_rises_makes_all_steps_of_a_matrix_one_size(case, foreach, capturable):
    how = {"foreach": foreach, "capturable": capturable, "use_trust": False}
    sizes = {}
    for scalar in (-1.0, 0.9):
        _, moves = adaptive(case, scalar, **how)
        sizes[scalar] = [float(m.abs().min() / m.abs().max()) for m in matrices(moves)]
    assert sizes[0.9] == pytest.approx([1.0] * len(sizes[0.9]), rel=1e-9)
    assert max(sizes[-1.0]) < 0.9


@SWITCHING
@TRUTH
def test_the_share_grows_without_a_jump(case, capturable):
    """Between a scalar on either side of 0 and of 1/2, where the share begins and ends, lies no more than a rounding:
    a loss whose last digits differ, on another machine say, makes the same run."""
    for edge in (0.0, 0.5):
        below, above = (
            matrices(adaptive(case, edge + off, capturable=capturable, use_trust=False)[1]) for off in (-1e-9, 1e-9)
        )
        for a, b in zip(below, above, strict=True):
            assert 0 < float((a - b).abs().max()) < 1e-8
    low, high = (matrices(adaptive(case, s, capturable=capturable, use_trust=False)[1]) for s in (0.0, 0.5))
    assert all(float((a - b).abs().max()) > 1e-4 for a, b in zip(low, high, strict=True)), "it does not switch at all"


@SWITCHING
def test_reflection_sees_the_step_as_it_was_taken(case):
    """A signed step is compared with the next gradient as a signed one, though the scalar is another by then."""
    optimizer, _ = adaptive(case, 0.9)
    twin = copy.deepcopy(optimizer)
    write(twin, last_scalar=0.0)
    for one in (optimizer, twin):
        write(one, scalar=0.0)
        train(one, one.param_groups[0]["params"], 1, start=13, loss=None)
    assert abs(optimizer.emotion.trust - twin.emotion.trust) > 1e-4
    # An update that was skipped is not the last one.
    write(optimizer, scalar=0.7)
    for p in optimizer.param_groups[0]["params"]:
        p.grad = torch.full_like(p, math.nan)
    optimizer.step()
    assert felt(optimizer, "last_scalar") == 0.0


@pytest.mark.parametrize("foreach", [False, True])
def test_the_clan_is_emonavi_until_the_loss_rises(foreach):
    runs = []
    for sibling in (emonavi.EmoNavi, emonavi.EmoClan):
        params = weights()
        optimizer = sibling(params, lr=1e-2, foreach=foreach, use_trust=False, on_missing_loss="ignore")
        train(optimizer, params, 30, loss=None)
        runs.append((optimizer, params))
    (navi, some), (clan, others) = runs
    assert all(torch.equal(p, q) for p, q in zip(some, others, strict=True))
    for one, params in runs:
        for t in range(20):
            train(one, params, 1, start=30 + t, loss=lambda _, t=t: 1.0 + math.sin(t) + max(0, t - 12))
    assert clan.emotion.scalar > 0.5
    assert not any(torch.equal(p, q) for p, q in zip(some, others, strict=True))
    assert drive(navi) <= 1.0
