"""The emotion as a function of numbers: properties that hold whatever the constants of its policy are."""

import math
import subprocess
import sys

import numpy as np
import pytest
import torch
from cases import CASES, drive, felt, siblings, train, vector, weights
from hypothesis import assume, example, given
from hypothesis import strategies as st
from reference import PresetFeeling, running_mean

from emonavi.emotion import Emotion, State
from emonavi.machine import Options, Sums, Weights
from emonavi.monitor import Snapshot
from emonavi.presets import PRESETS

# A new option is off here until a test is about it.
CALM = dict.fromkeys(Options._fields, False) | {"lr": 0.0}
OPTIONS = Options(
    **(CALM | {"use_trust": True, "fall": 1.0, "max_norm": 1.0, "lowest_drive": 1e-3, "highest_drive": math.inf})
)
PLAIN = OPTIONS._replace(use_trust=False)
usual = st.floats(-10, 10).filter(lambda x: x == 0 or abs(x) > 1e-3)
series = st.lists(usual, min_size=2, max_size=60)
anything = st.floats(allow_nan=False, allow_infinity=False)
number = st.floats(width=64)


KIND = {"plain": False}


@pytest.fixture(params=[False, True], ids=["tensors", "plain"], scope="module", autouse=True)
def _kind(request):
    """The emotion is written once for 0-d tensors and for plain numbers: each property has to hold for both."""
    KIND["plain"] = request.param


def summed(grad_step, grad_grad, step_step, weight):
    return Sums(torch.stack([grad_step, grad_grad, step_step]), weight)


def given_as(x):
    """A number or flag as the emotion gets it."""
    return x if KIND["plain"] else torch.tensor(x, dtype=torch.bool if isinstance(x, bool) else torch.float64)


def fresh(machine=None):
    machine = machine or Emotion()
    return machine, machine.unpack(torch.tensor(machine.initial(), dtype=torch.float64), plain=KIND["plain"])


def feel(losses, machine=None, state=None):
    machine, start = fresh(machine)
    state = start if state is None else state
    states = []
    for loss in losses:
        state = machine.feel(state, given_as(loss), 0)
        states.append(state)
    return states


def step(machine, state, *, loss=None, norm=1.0, cosine=0.0, options=OPTIONS, tensors=3):
    """A whole step of the emotion alone, with the sums of a given cosine."""
    if loss is not None:
        state = machine.feel(state, given_as(loss), 0)
    state, acts, scale = machine.guard(state, given_as(norm), options)
    mood = machine.mood(state, acts, scale, options)
    ones = torch.ones(tensors, dtype=torch.float64)
    return machine.reflect(state, summed(cosine * ones, ones, ones, ones), acts, options), mood


def finite(state):
    return all(math.isfinite(x) for x in state)


# Feeling -------------------------------------------------------------------------------------------------------------


@given(series, st.floats(1e-3, 1e3), st.floats(-50, 50))
def test_feeling_ignores_scale_and_shift(losses, a, b):
    one, other = feel(losses), feel([a * x + b for x in losses])
    # Rounding of a * x + b is noise of its own; where the losses' noise is not far above it, it is heard.
    assume(max(losses) - min(losses) > 1e-2 and a * 1e-2 > 1e-6 * (abs(b) + a * 10))
    for x, y in zip(one, other, strict=True):
        if float(x.dev) * a > 1e-9 * (abs(b) + a):
            assert float(x.scalar) == pytest.approx(float(y.scalar), abs=1e-4)
            assert float(x.tension) == pytest.approx(float(y.tension), rel=1e-4, abs=1e-4)
        assert float(y.short) == pytest.approx(a * float(x.short), rel=1e-6, abs=1e-9 * (abs(b) + a * 10))


@given(series)
def test_scalar_is_bounded_and_is_its_formula(losses):
    for state in feel(losses):
        s = {k: float(v) for k, v in state._asdict().items()}
        assert -1 <= s["scalar"] <= 1
        dev = s["dev"]
        tension = (s["short"] - s["medium"]) / dev if dev else 0.0
        progress = (s["long"] - s["short"]) / dev if dev else 0.0
        assert s["tension"] == pytest.approx(tension, rel=1e-9, abs=1e-12)
        assert s["scalar"] == pytest.approx(math.tanh((tension - progress) / 2), rel=1e-9, abs=1e-12)


@given(st.lists(st.floats(-1, 1), min_size=1, max_size=9))
def test_memories_are_means_from_the_first_loss(losses):
    """Up to ten losses no spike is judged, so that they are running means of the plain losses; exact in value."""
    state = feel(losses)[-1]
    offset = losses[0]
    for name, rate in (("short", 0.3), ("medium", 0.05), ("long", 0.01)):
        assert float(getattr(state, name)) + offset == pytest.approx(running_mean(losses, rate), abs=1e-9)
    assert float(state.long) + offset == pytest.approx(sum(losses) / len(losses), abs=1e-9)


def test_memories_are_means_in_a_long_run():
    generator = torch.Generator().manual_seed(0)
    losses = (torch.randn(300, generator=generator, dtype=torch.float64) * 0.1 + 2).tolist()
    state = feel(losses)[-1]
    for name, rate in (("short", 0.3), ("medium", 0.05), ("long", 0.01)):
        assert float(getattr(state, name)) + losses[0] == pytest.approx(running_mean(losses, rate), abs=1e-9)


@given(st.floats(-5, 5), st.lists(st.floats(0, 3), min_size=1, max_size=60))
def test_improvement_never_brakes(start, gains):
    """A loss that never rises: no tension, no brake, no panic, and a scalar that is not positive."""
    losses = [start]
    for gain in gains:
        losses.append(losses[-1] - gain)
    for state in feel(losses):
        assert float(state.log_drive) == 0.0
        assert float(state.panic) == 0.0
        assert float(state.scalar) <= 1e-9


@given(series)
def test_feeling_only_ever_brakes(losses):
    """The loss alone never raises the drive, and never takes more than its bound in one step."""
    last = 0.0
    for state in feel(losses):
        now = float(state.log_drive)
        assert last - Emotion().pace - 1e-12 <= now <= last
        last = now


def test_rising_losses_brake():
    states = feel([1.0 + 0.1 * (t % 2) for t in range(30)] + [1.0 + 0.3 * t for t in range(1, 12)])
    assert float(states[29].log_drive) > -0.2
    assert float(states[-1].log_drive) < float(states[29].log_drive) - 0.1
    assert float(states[-1].scalar) > 0.5


@given(st.lists(number, min_size=1, max_size=40))
@example([1.7e308, 1.0, -1.7e308, 1.0])
def test_no_loss_breaks_the_feeling(losses):
    state = feel(losses)[-1]
    assert finite(state)
    assert int(state.ignored_losses) == sum(not math.isfinite(x) for x in losses)
    assert int(state.losses) == sum(math.isfinite(x) for x in losses)
    assert -1 <= float(state.scalar) <= 1


def test_a_partial_accumulation_window_is_left_out():
    machine, state = fresh()
    for _ in range(5):
        state = machine.feel(state, given_as(4.0), 4)
    before = state
    state = machine.feel(state, given_as(1.0), 1)
    assert float(state.losses) == 5
    assert float(before.short) == float(state.short)
    state = machine.feel(state, given_as(4.0), 4)
    assert float(state.losses) == 6
    for _ in range(3):
        state = machine.feel(state, given_as(2.0), 2)
    assert float(state.losses) == 8  # what came twice in a row is the new usual


@pytest.mark.parametrize("sizes", [(1, 3, 2), (2, 3, 4), (1, 2), (5, 8, 2, 7, 3, 6)])
def test_windows_that_vary_are_heard(sizes):
    """As where they are filled up to so many tokens: at least every second loss is felt, whatever their numbers."""
    machine, state = fresh()
    for step in range(60):
        state = machine.feel(state, given_as(1.0), 1 if step == 0 else sizes[step % len(sizes)])
    assert float(state.losses) >= 30


# Drive ---------------------------------------------------------------------------------------------------------------

sums = st.tuples(number, number, number, st.floats(0, 1e3))


@given(st.lists(sums, min_size=1, max_size=5), st.lists(st.tuples(number, number), min_size=1, max_size=12))
def test_drive_stays_within_its_bounds_for_any_sums(tensors, steps):
    """NaN, inf, negative squares: whatever the sweep gives back, the emotion stays finite and bounded."""
    machine, state = fresh()
    columns = [torch.tensor(c, dtype=torch.float64) for c in zip(*tensors, strict=True)]
    low, high = 1e-3, 10.0
    options = OPTIONS._replace(lowest_drive=low, highest_drive=high)
    own, trust = torch.ones(len(tensors), dtype=torch.float64), torch.zeros(len(tensors), dtype=torch.float64)
    for count, (loss, norm) in enumerate(steps * 3):
        if abs(loss) < 1e150 or not math.isfinite(loss):
            state = machine.feel(state, given_as(loss), 0)
        state, acts, scale = machine.guard(state, given_as(abs(norm)), options)
        assert math.isfinite(float(machine.mood(state, acts, scale, options).drive))
        assert 0 <= float(scale) <= 1
        state = machine.reflect(state, summed(*columns), acts, options)
        counts = torch.full_like(own, float(count + 1))
        own, trust = machine.reflect_each(state, own, trust, counts, summed(*columns))
        assert math.log(low) - math.log(10) - 1 <= float(state.log_drive) <= math.log(high) + 1e-9
        assert float(state.log_drive) == float(state.log_drive)


@given(st.lists(st.tuples(st.floats(-1, 1), st.floats(1e-30, 1e30)), min_size=1, max_size=40))
def test_finite_inputs_give_finite_outputs(steps):
    machine, state = fresh()
    own, trust = torch.ones(2, dtype=torch.float64), torch.zeros(2, dtype=torch.float64)
    for count, (cosine, size) in enumerate(steps):
        state, acts, _ = machine.guard(state, given_as(size), OPTIONS)
        same = torch.full((2,), size, dtype=torch.float64)
        found = summed(cosine * same, same, same, torch.ones(2, dtype=torch.float64))
        state = machine.reflect(state, found, acts, OPTIONS)
        own, trust = machine.reflect_each(state, own, trust, torch.full_like(own, count + 1.0), found)
        assert finite(state)
        assert bool(own.isfinite().all()) and bool((own > 0).all())
        assert bool((own.log().abs() <= Emotion().tensor_range + 1e-9).all())
        assert abs(float(state.trust)) <= 1 + 1e-9
        assert bool((trust.abs() <= 1 + 1e-9).all())


@given(st.integers(-60, 60), st.integers(0, 30))
def test_reflection_ignores_the_scale_of_its_sums(exponent, seed):
    """Gradients times a power of two: <g,u> scales once, <g,g/d> and <m,u> as the metric does. The cosine does not."""
    generator = torch.Generator().manual_seed(seed)
    scale = 2.0**exponent
    runs = []
    for a in (1.0, scale):
        machine, state = fresh()
        noise = torch.randn(30, 3, generator=generator.manual_seed(seed), dtype=torch.float64)
        for row in noise:
            ones = torch.ones(3, dtype=torch.float64)
            found = summed(a * row.tanh(), a * ones, a * ones, ones)
            state = machine.reflect(state, found, given_as(True), OPTIONS)
        runs.append(state)
    assert float(runs[0].log_drive) == pytest.approx(float(runs[1].log_drive), abs=1e-9)
    assert float(runs[0].trust) == pytest.approx(float(runs[1].trust), abs=1e-9)


def test_agreement_raises_the_drive_and_opposition_lowers_it():
    ends = []
    for cosine in (0.8, -0.8):
        machine, state = fresh()
        for _ in range(30):
            state, _ = step(machine, state, cosine=cosine, options=OPTIONS._replace(lowest_drive=1e-6))
        ends.append(float(state.log_drive))
    assert ends[0] > 0.3
    assert ends[1] < -0.3


def test_tensors_without_weight_do_not_count():
    machine, state = fresh()
    both = summed(*(torch.tensor(x, dtype=torch.float64) for x in ([0.5, -9.0], [1.0, 9.0], [1.0, 9.0], [1.0, 0.0])))
    one = Sums(both.products[:, :1], both.weight[:1])
    a, b = (machine.reflect(state, s, given_as(True), OPTIONS) for s in (both, one))
    assert float(a.trust) == float(b.trust) == 0.5
    own, trust = machine.reflect_each(a, torch.ones(2), torch.zeros(2), torch.full((2,), 20.0), both)
    assert float(own[1]) == 1.0 and float(trust[1]) == 0.0


def began(blank, rms=0.02, lr=1e-2):
    """An emotion that has seen the weights."""
    machine, state = fresh()
    weights = Weights(torch.tensor(rms, dtype=torch.float64), torch.tensor(blank, dtype=torch.float64))
    options = OPTIONS._replace(lowest_drive=1e-8)
    return machine, machine.begin(state, weights, options._replace(lr=lr)), options


@pytest.mark.parametrize("blank", [0.0, 0.5])
def test_it_begins_with_the_same_numbers_on_a_device(blank):
    """To the last digits: a first drive a rounding below where growth is free would grow."""
    _, state, _ = began(blank)
    machine = Emotion()
    start = machine.unpack(torch.tensor(machine.initial(), dtype=torch.float64), plain=not KIND["plain"])
    rms, share, lr = (torch.tensor(x, dtype=torch.float64) for x in (0.02, blank, 1e-2))
    other = machine.begin(start, Weights(rms, share), OPTIONS._replace(lowest_drive=1e-8, lr=lr))
    for name in ("free", "log_drive", "lr_ref"):
        assert float(getattr(state, name)) == pytest.approx(float(getattr(other, name)), abs=1e-12)


def noisy(machine, state, options, cosine, steps=300):
    """Steps whose cosine is all noise, around the given one."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        seen = cosine + 0.3 * torch.randn((), generator=generator, dtype=torch.float64).clamp(-2, 2)
        state, _ = step(machine, state, cosine=seen, options=options)
    return state


def test_weights_that_are_zero_still_let_the_lr_grow_without_proof():
    """A LoRA begins in noise that proves nothing: half of it is 0, and its lr of 6e-5 would have no way up."""
    ends = {}
    for blank in (0.0, 0.5):
        machine, state, options = began(blank)
        assert 1e-2 * math.exp(float(state.log_drive)) == pytest.approx(6e-5, rel=1e-3)
        ends[blank] = 1e-2 * math.exp(float(noisy(machine, state, options, 0.0).log_drive))
    assert ends[0.0] < 3e-4  # what is learnt already is not risked
    assert 5e-4 < ends[0.5] < 2e-3  # 3e-2 of the rms is 6e-4


def test_growth_without_proof_stops_where_trust_objects():
    machine, state, options = began(0.5)
    end = noisy(machine, state, options, -0.3)
    assert float(end.log_drive) < float(state.log_drive)


def test_weights_that_are_all_zero_have_a_scale_to_begin_with():
    _, state, _ = began(1.0, rms=0.0)
    assert 1e-2 * math.exp(float(state.log_drive)) == pytest.approx(3e-5, rel=2e-3)


@pytest.mark.parametrize("target", [0.5, 0.0, -1.0])
def test_the_drive_rests_where_trust_is_at_the_rules_target(target):
    """In units of the cosine's own noise, however small that is: the more weights, the smaller are both."""
    for size in (1.0, 1e-3):
        changes = []
        for off in (-0.6, 0.6):
            machine, state = fresh()
            state = state._replace(noise=given_as(size**2), reflections=given_as(50.0))
            at = (max(target, 0.0) if off > 0 else target) + off
            state = state._replace(trust=given_as(at * size), fast=given_as(at * size))
            changes.append(float(machine._lean(state, OPTIONS._replace(target=target))))
        assert changes[0] < 0 < changes[1]
        assert size == 1.0 or max(map(abs, changes)) > 0.005  # not less than where the noise is large


@pytest.mark.parametrize("fall", [1.0, 2.0])
def test_under_noise_alone_the_lr_falls_with_age_and_no_faster(fall):
    """From age 200 to 1200, with the cosines of a run that noise rules, as `flow` has them: -0.65 deviations."""
    machine, state = fresh()
    state = state._replace(free=given_as(-20.0))
    generator = torch.Generator().manual_seed(0)
    options, logs = OPTIONS._replace(fall=fall, lowest_drive=1e-8), {}
    for t in range(1201):
        seen = 0.07 * (torch.randn((), generator=generator, dtype=torch.float64).clamp(-3, 3) - 0.65)
        state, _ = step(machine, state, cosine=seen, options=options)
        logs[t] = float(state.log_drive)
    assert 0.4 * fall * math.log(6) < logs[200] - logs[1200] < fall * math.log(6)


def test_a_step_clearly_too_long_is_shortened_at_any_age():
    machine, state = fresh()
    state = state._replace(free=given_as(-20.0))
    for _ in range(1000):
        state, _ = step(machine, state, cosine=0.0, options=OPTIONS)
    state = noisy(machine, state, OPTIONS, -0.9, steps=30)
    assert float(state.log_drive) < -1.0, "the clock allows for 0.03"


# Panic and healing ---------------------------------------------------------------------------------------------------


def calm_run(steps=20, machine=None, options=OPTIONS):
    machine, state = fresh(machine)
    for t in range(steps):
        state, _ = step(machine, state, loss=2.0 + 0.1 * math.sin(9.7 * t * t), norm=1.0, options=options)
    return machine, state


@pytest.mark.parametrize("options", [OPTIONS, PLAIN], ids=["trust", "no trust"])
@pytest.mark.parametrize("cause", ["gradient", "loss"])
def test_panic_cuts_to_a_tenth_rests_and_heals(options, cause):
    machine, state = calm_run(options=options)
    was = float(state.log_drive)
    trouble = {"gradient": {"norm": math.nan, "loss": 2.0}, "loss": {"loss": 500.0}}[cause]
    state, mood = step(machine, state, options=options, **trouble)
    assert math.log(float(mood.drive)) == pytest.approx(was - math.log(10), abs=0.06)
    assert float(mood.pull) == 1.0
    assert int(state.skipped_steps) == (cause == "gradient")
    drives = []
    for t in range(10):
        state, mood = step(machine, state, loss=2.0 + 0.1 * math.sin(9.7 * t * t), options=options)
        assert float(mood.pull) == 0.0
        drives.append(float(mood.drive))
    assert drives[0] == pytest.approx(drives[1], rel=0.06)
    assert drives[-1] <= math.exp(was) * 1.01
    # A loss that jumped leaves some tension behind; the gradient alone leaves none.
    for t in range(10 * (cause == "loss") * 3):
        state, _ = step(machine, state, loss=2.0 + 0.1 * math.sin(9.7 * t * t), options=options)
    # Half of the drive as it was when the panic came: the spike itself may have braked it by one step before.
    assert float(state.log_drive) >= was - math.log(2) - (machine.pace if cause == "loss" else 0) - 1e-6


@pytest.mark.parametrize("every", [2, 5, 10])
def test_gradients_that_are_spoilt_again_and_again_do_not_hold_the_drive_down(every):
    machine, state = calm_run()
    was = float(state.log_drive)
    for t in range(30 * every):
        norm = math.nan if t % every == 0 else 1.0
        state, _ = step(machine, state, loss=2.0 + 0.1 * math.sin(9.7 * t * t), norm=norm)
    assert int(state.skipped_steps) == 30
    assert float(state.log_drive) >= was - 1e-6


def test_a_rare_spoilt_gradient_is_a_panic_at_any_age():
    machine, state = calm_run()
    for _ in range(4):
        for t in range(60):
            state, mood = step(machine, state, loss=2.0 + 0.1 * math.sin(9.7 * t * t))
            assert float(mood.pull) == 0.0
        state, mood = step(machine, state, loss=2.0, norm=math.nan)
        assert float(mood.pull) == 1.0


def test_panic_needs_ten_losses():
    machine, state = fresh()
    for t in range(9):
        state, _ = step(machine, state, loss=1.0 + 0.01 * (t % 2))
    state, mood = step(machine, state, loss=1e6)
    assert float(mood.pull) == 0.0
    machine, state = fresh()
    for t in range(12):
        state, _ = step(machine, state, loss=1.0 + 0.01 * (t % 2))
    state, mood = step(machine, state, loss=1e6)
    assert float(mood.pull) == 1.0


def test_a_new_level_is_not_a_panic_for_ever():
    machine, state = calm_run()
    panics = 0
    for t in range(200):
        state, mood = step(machine, state, loss=200.0 + 0.1 * math.sin(9.7 * t * t))
        panics += float(mood.pull)
    assert 1 <= panics <= 40
    assert float(state.rest) == 0


@given(st.lists(st.floats(0.5, 2.0), min_size=10, max_size=40), st.floats(1.5, 1e9))
def test_outliers_are_scaled_down_to_the_history(norms, factor):
    machine, state = fresh()
    for norm in norms:
        state, _, scale = machine.guard(state, given_as(norm), OPTIONS)
        assert 0 < float(scale) <= 1
    limit = math.exp(float(state.log_norm) + 6 * math.sqrt(float(state.log_norm_var)))
    norm = factor * limit
    _, acts, scale = machine.guard(state, given_as(norm), OPTIONS)
    assert bool(acts)
    assert float(scale) * norm == pytest.approx(limit, rel=1e-9)
    _, _, off = machine.guard(state, given_as(norm), OPTIONS._replace(max_norm=0.0))
    assert float(off) == 1.0


@pytest.mark.parametrize("heard", [1, 2, 5, 9])
def test_an_absurd_gradient_is_scaled_down_before_the_spread_is_known(heard):
    machine, state = fresh()
    for _ in range(heard):
        state, _, scale = machine.guard(state, given_as(2.0), OPTIONS)
        assert float(scale) == 1.0
    _, _, usual = machine.guard(state, given_as(8.0), OPTIONS)
    assert float(usual) == 1.0, "norms may well quadruple at first"
    _, acts, scale = machine.guard(state, given_as(2e6), OPTIONS)
    assert bool(acts)
    assert float(scale) * 1e6 == pytest.approx(math.exp(6 * 0.25), rel=1e-9)
    _, _, off = machine.guard(state, given_as(2e6), OPTIONS._replace(max_norm=0.0))
    assert float(off) == 1.0


def test_an_absurd_first_gradient_is_forgotten_with_its_loss():
    """What the first gradient was is known by the second: its factor makes it as long as that."""
    machine, state = fresh()
    state, scale = machine.look_back(machine.feel(state, given_as(1e3), 0), given_as(2e6), OPTIONS)
    assert float(scale) == 1.0, "nothing lies behind the first step"
    state, _, scale = machine.guard(state, given_as(2e6), OPTIONS)
    assert float(scale) == 1.0
    unknown, scale = machine.look_back(state, given_as(math.nan), OPTIONS)
    assert float(scale) == 1.0 and [float(x) for x in unknown] == [float(x) for x in state]
    for options, norm in ((OPTIONS, 1e6), (OPTIONS._replace(max_norm=0.0), 2.0)):
        kept, scale = machine.look_back(state, given_as(norm), options)
        assert float(scale) == 1.0 and float(kept.norms) == float(kept.losses) == 1.0
    state, scale = machine.look_back(state, given_as(2.0), OPTIONS)
    assert float(scale) == pytest.approx(1e-6, rel=1e-9)
    _, untouched = fresh()
    state, untouched = (
        machine.guard(machine.feel(s, given_as(1.0), 0), given_as(2.0), OPTIONS)[0] for s in (state, untouched)
    )
    assert [float(x) for x in state] == pytest.approx([float(x) for x in untouched], rel=1e-12)
    for norm in (2.0, 2e-6):
        _, scale = machine.look_back(state, given_as(norm), OPTIONS)
    assert float(scale) == pytest.approx(1e-6, rel=1e-9), "the next gradient is the second now"


def test_outliers_in_a_row_do_not_open_the_gate():
    machine, state = fresh()
    for t in range(40):
        state, _, _ = machine.guard(state, given_as(2.0 + 0.1 * (t % 2)), OPTIONS)
    limit = math.exp(float(state.log_norm) + 6 * math.sqrt(float(state.log_norm_var)))
    for _ in range(5):
        state, _, scale = machine.guard(state, given_as(200.0), OPTIONS)
        assert float(scale) * 200 < 1.5 * limit


def test_a_new_level_of_the_norm_is_accepted_in_time():
    machine, state = fresh()
    for t in range(40):
        state, _, _ = machine.guard(state, given_as(2.0 + 0.1 * (t % 2)), OPTIONS)
    scales = []
    for t in range(80):
        state, _, scale = machine.guard(state, given_as(200.0 + 10 * (t % 2)), OPTIONS)
        scales.append(float(scale))
    assert min(scales[60:]) == 1.0


# should_stop ---------------------------------------------------------------------------------------------------------


@given(st.lists(st.floats(-5, 5), min_size=1, max_size=64))
def test_should_stop_not_in_the_first_64_losses(losses):
    machine = Emotion()
    assert not any(bool(machine.should_stop(s)) for s in feel(losses))


def test_should_stop_not_in_the_first_64_losses_of_a_plateau():
    """The hardest case: everything is gained in the first step."""
    machine = Emotion()
    states = feel([1.0, *[0.0] * 300])
    assert not any(bool(machine.should_stop(s)) for s in states[:64])
    assert bool(machine.should_stop(states[-1]))


@pytest.mark.parametrize(("a", "b"), [(1.0, 100.0), (1.0, -100.0), (1e-3, 7.0)])
def test_should_stop_ignores_scale_and_shift(a, b):
    losses = [math.exp(-t / 10) + 1e-3 * math.sin(9.7 * t * t) for t in range(300)]
    machine = Emotion()
    one, other = (
        [bool(machine.should_stop(s)) for s in feel([k * x + c for x in losses])] for k, c in ((1, 0), (a, b))
    )
    assert one == other
    assert any(one) and not all(one)


def test_should_stop_after_a_plateau_and_back():
    machine = Emotion()
    falling = [math.exp(-t / 10) for t in range(60)]
    flat = [falling[-1] + 1e-4 * math.sin(9.7 * t * t) for t in range(400)]
    states = feel(falling + flat)
    assert not any(bool(machine.should_stop(s)) for s in states[:64])
    assert bool(machine.should_stop(states[-1]))
    again = feel([flat[-1] - 0.01 * t for t in range(100)], state=states[-1])
    assert not bool(machine.should_stop(again[-1]))
    steady = feel([-0.01 * t for t in range(400)])
    assert not any(bool(machine.should_stop(s)) for s in steady)


def test_should_stop_waits_while_a_small_loss_still_falls():
    """A hundredth of all progress is most of what is left to gain where a loss comes near to nothing."""
    machine = Emotion()

    def stop(floor):
        losses = [(math.exp(-t / 60) + floor) * (1 + 0.1 * math.sin(9.7 * t * t)) for t in range(2000)]
        return next(t for t, s in enumerate(feel(losses)) if bool(machine.should_stop(s)))

    assert 500 < stop(floor=0.2) < 700, "beside its noise, what is left is nothing"
    assert 900 < stop(floor=0.0) < 1300, "three thousandths are left even of the mean over the last stretch"


@pytest.mark.parametrize(
    ("case", "emotion"),
    [(case, emotion) for case in CASES for emotion in ("adaptive", *case.generations)],
    ids=lambda value: getattr(value, "name", value),
)
def test_should_stop_never_from_missing_losses(case, emotion):
    params = weights(shapes=[(3,)])
    optimizer = case.make(params, emotion=emotion)
    for _ in range(200):
        for p in params:
            p.grad = torch.ones_like(p)
        optimizer.step()
    assert not optimizer.should_stop
    optimizer.step(loss=1.0)
    assert not optimizer.should_stop
    optimizer.param_groups[0]["lr"] = 0.0
    for _ in range(200):
        optimizer.step(loss=1.0)
    assert not optimizer.should_stop, "steps at lr 0 do not count"


# Presets -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PRESETS)
@given(st.lists(st.tuples(st.floats(-2, 2), st.floats(0, 5)), min_size=1, max_size=80))
def test_presets_are_their_formulas(name, steps):
    machine, state = fresh(PRESETS[name])
    reference = PresetFeeling(name, lr=1.0, min_lr=0.0)
    options = OPTIONS._replace(use_trust=name == "v4", max_norm=1.0 if name == "v4" else 0.0)
    for loss, norm in steps:
        state = machine.feel(state, given_as(loss), 0)
        reference.feel(loss)
        state, acts, scale = machine.guard(state, given_as(norm), options)
        mood = machine.mood(state, acts, scale, options)
        assert float(state.scalar) == pytest.approx(reference.scalar, abs=1e-10)
        assert float(mood.drive * mood.scale) == pytest.approx(reference.step_size, rel=1e-9, abs=1e-300)
        assert float(state.ratio) == pytest.approx(reference.ratio, abs=1e-10)
        if mood.trust is not None:
            assert float(mood.trust) == pytest.approx(reference.trust, abs=1e-10)
        assert float(scale) == 1.0
        nothing = torch.zeros(1, dtype=torch.float64)
        state = machine.reflect(state, summed(nothing, nothing, nothing, nothing), acts, options)
        reference.end_step(norm)
        assert bool(machine.should_stop(state)) == reference.should_stop


@pytest.mark.parametrize("name", ["adaptive", *PRESETS])
def test_vector_roundtrip(name):
    machine = PRESETS.get(name, Emotion())
    values = torch.arange(float(len(machine.initial())), dtype=torch.float64)
    state = machine.unpack(values)
    assert torch.equal(machine.pack(state), values)
    for i, entry in enumerate(type(state)._fields):
        if state[i].dim() == 0:
            assert machine.index(entry) == i == float(state[i])
    codes = [m.code for m in (Emotion(), *PRESETS.values())]
    assert len(set(codes)) == len(codes)


@siblings
def test_own_emotion_object(case):
    """An Emotion of one's own is used: another start is another first drive."""
    drives = []
    for start in (1e-3, 1e-4):
        params = weights()
        optimizer = case.make(params, lr=1.0, emotion=Emotion(start=start))
        train(optimizer, params, 1)
        drives.append(drive(optimizer))
        assert len(vector(optimizer)) == len(State._fields)
        assert felt(optimizer, "code") == Emotion.code
    assert drives[0] == pytest.approx(10 * drives[1], rel=1e-3)


# Import --------------------------------------------------------------------------------------------------------------

IMPORT = """
import sys, torch
from torch.amp import GradScaler
def look():
    kept = {"backward": torch.autograd.backward, "scale": GradScaler.scale, "tensor": torch.Tensor.backward}
    kept |= {f"optimizer {k}": v for k, v in vars(torch.optim.Optimizer).items() if k != "_abc_impl"}
    kept |= {f"torch {k}": v for k, v in vars(torch).items()}
    kept |= {f"autograd {k}": v for k, v in vars(torch.autograd).items()}
    return kept | {"dtype": torch.get_default_dtype(), "grad": torch.is_grad_enabled()}
before, loaded = look(), set(sys.modules)
import emonavi
after = look()
print(sorted(k for k in before if before[k] is not after.get(k) and before[k] != after.get(k)))
new = {m for m in set(sys.modules) - loaded}
heavy = "torch._dynamo torch._inductor rich matplotlib tensorboard typer sklearn plotly triton".split()
print(sorted(m for m in new if any(m == h or m.startswith(h + ".") for h in heavy)))
"""


def test_import_changes_nothing_in_torch_and_imports_nothing_heavy():
    """A failure here shows what it was: the names that changed, the modules that came along."""
    result = subprocess.run([sys.executable, "-c", IMPORT], capture_output=True, text=True, check=True)
    assert result.stdout.splitlines() == ["[]", "[]"]


def test_heavy_tailed_losses_do_not_panic_for_ever():
    """Every few hundred steps such a loss is ten deviations above its memory, though nothing is wrong."""
    machine = Emotion()
    state = machine.unpack(torch.tensor(machine.initial(), dtype=torch.float64), plain=True)
    losses = torch.rand(20_000, generator=torch.Generator().manual_seed(0)).pow(-0.4).tolist()
    panics = 0
    for loss in losses:
        state = machine.feel(state, loss, 0)
        panics += state.panic > 0
        state = state._replace(panic=0.0)
    assert 1 <= panics <= 12
    assert machine.feel(state, 1e6, 0).panic > 0  # a true one still is


@pytest.mark.parametrize("count", [4, 7, 50, 300])
def test_moments_of_the_scalar(count):
    """Central moments of all scalars until there are fifty, of the last fifty or so from then on."""
    generator = np.random.default_rng(count)
    states = feel(np.cumsum(generator.normal(size=count) ** 3).tolist())
    scalars = np.array([float(s.scalar) for s in states])
    weight = np.zeros(count)
    for n in range(1, count + 1):
        share = max(0.02, 1 / n)
        weight[:n] *= 1 - share
        weight[n - 1] = share
    off = scalars - weight @ scalars
    m2, m3, m4 = (float(weight @ off**k) for k in (2, 3, 4))
    last = states[-1]
    kept = [float(x) for x in (last.scalar_m2, last.scalar_m3, last.scalar_m4)]
    assert kept == pytest.approx([m2, m3, m4], rel=1e-9, abs=1e-15)
    snapshot = Snapshot.of(Emotion(), torch.stack([torch.as_tensor(x, dtype=torch.float64) for x in last]))
    assert snapshot.skewness == pytest.approx(m3 / m2**1.5, rel=1e-6)
    assert snapshot.kurtosis == pytest.approx(m4 / m2**2, rel=1e-6)
    assert snapshot.asymmetry == pytest.approx(weight @ scalars / (weight @ np.abs(scalars)), rel=1e-9)


def test_the_shape_of_feelings_says_what_it_claims():
    """Spikes among calm losses: skewed to the rises, and heavy-tailed. A steady fall: all improvement."""

    def shape(losses):
        last = feel(losses)[-1]
        return Snapshot.of(Emotion(), torch.stack([torch.as_tensor(x, dtype=torch.float64) for x in last]))

    noise = [math.sin(9.7 * t * t) for t in range(200)]
    usual, spiky = shape(noise), shape([x + (12.0 if t % 60 == 30 else 0.0) for t, x in enumerate(noise)])
    assert spiky.skewness > usual.skewness + 0.5
    assert spiky.kurtosis > usual.kurtosis + 0.5
    assert shape([-0.1 * t for t in range(200)]).asymmetry == pytest.approx(-1)
    assert abs(usual.asymmetry) < 0.5
    still = shape([1.0] * 20)
    assert all(math.isnan(x) for x in (still.skewness, still.kurtosis, still.asymmetry))
    preset = PRESETS["v3"]
    assert math.isnan(Snapshot.of(preset, torch.tensor(preset.initial(), dtype=torch.float64)).kurtosis)


@given(st.floats(-3, 3), st.sampled_from([3.0, 100.0, 1e4]))
def test_a_new_level_of_gradients_is_accepted_where_all_were_the_same(level, times):
    """A spread of zero must not freeze what is usual: each gradient would be cut to the old one for the whole run."""
    machine, state = fresh()
    scale = 0.0
    for step in range(12 + 80):
        norm = 10**level * (1 if step < 12 else times)
        state, _, scale = machine.guard(state, torch.tensor(norm, dtype=torch.float64), OPTIONS)
    assert float(scale) == 1.0
    assert float(state.log_norm) > math.log(10**level)
