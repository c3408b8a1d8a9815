"""Which loss counts where several are known, what a step clears, and what happens without any."""

from __future__ import annotations

import math
import warnings

import numpy as np
import pytest
import torch
from cases import X, Y, close, loss_of, net

import emonavi
from emonavi import EmoFact, EmoLynx, EmoNavi

SIBLINGS = [EmoNavi, EmoFact, EmoLynx]


def give_gradients(model):
    """Gradients of the loss, in a way that tells nobody."""
    loss = loss_of(model)
    for p, g in zip(model.parameters(), torch.autograd.grad(loss, list(model.parameters())), strict=True):
        p.grad = g
    return float(loss.detach())


def felt(optimizer, **step):
    """Step, check that what is returned is what was felt, and give it."""
    returned = optimizer.step(**step)
    assert optimizer.emotion.loss == close(returned)
    return float(returned.detach() if isinstance(returned, torch.Tensor) else returned)


# Precedence -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sibling", SIBLINGS)
@pytest.mark.parametrize("given", [7.0, 7, torch.tensor(7.0), torch.tensor([[7.0]]), torch.tensor(7)])
def test_a_told_loss_beats_all_others(sibling, given):
    model = net()
    optimizer = sibling(model.parameters())
    loss_of(model).backward()
    optimizer.observe(5.0)
    assert felt(optimizer, loss=given) == 7.0


def test_a_told_loss_may_require_grad_and_be_changed_afterwards():
    model = net()
    optimizer = EmoNavi(model.parameters())
    loss = loss_of(model)
    loss.backward()
    before = float(loss.detach())
    optimizer.step(loss=loss)
    loss.detach().mul_(100)
    assert optimizer.emotion.loss == close(before)


def test_observed_beats_closure_and_captured():
    model = net()
    optimizer = EmoNavi(model.parameters())

    def closure():
        optimizer.zero_grad()
        loss = loss_of(model)
        loss.backward()
        return loss

    optimizer.observe(5.0)
    assert float(optimizer.step(closure)) == 5.0
    assert optimizer.emotion.loss == 5.0
    loss_of(model).backward()
    optimizer.observe(4.0)
    assert felt(optimizer) == 4.0


def test_observing_inside_the_closure_counts():
    model = net()
    optimizer = EmoNavi(model.parameters())

    def closure():
        optimizer.zero_grad()
        loss_of(model).backward()
        optimizer.observe(3.0)
        return 8.0

    optimizer.step(closure)
    assert optimizer.emotion.loss == 3.0


def test_several_observations_are_averaged_and_those_that_are_not_finite_left_out():
    model = net()
    optimizer = EmoNavi(model.parameters(), capture=False)
    give_gradients(model)
    for value in (1.0, torch.tensor(2.0), math.nan, torch.tensor(6.0), math.inf, torch.tensor(-math.inf)):
        optimizer.observe(value)
    assert felt(optimizer) == close(3.0)
    assert optimizer.emotion.ignored_losses == 0


@pytest.mark.parametrize(
    "kind", [float, np.float32, np.array, lambda x: np.array([[x]]), lambda x: torch.tensor([[x]])]
)
def test_a_loss_of_one_element_may_have_any_form(kind):
    model = net()
    optimizer = EmoNavi(model.parameters(), capture=False)
    give_gradients(model)
    optimizer.step(loss=kind(0.25))
    assert optimizer.emotion.loss == 0.25


def test_observations_of_different_types_keep_their_value():
    """The first one's dtype must not round the others."""
    model = net()
    for first in (torch.tensor(1), torch.tensor(1.0, dtype=torch.bfloat16), torch.tensor(1.0, dtype=torch.float16)):
        optimizer = EmoNavi(model.parameters(), capture=False)
        give_gradients(model)
        optimizer.observe(first)
        optimizer.observe(1.5)
        optimizer.observe(torch.tensor(90001.0))
        assert felt(optimizer) == close(90003.5 / 3)


def test_an_observed_loss_changed_in_place_before_the_step():
    """Trainers reduce the logged loss over replicas in place, or keep a running total in it."""
    model = net()
    optimizer = EmoNavi(model.parameters(), capture=False)
    give_gradients(model)
    loss = torch.tensor(2.0)
    optimizer.observe(loss)
    loss.mul_(100)
    assert felt(optimizer) == 2.0


def test_only_unusable_observations_are_counted_and_not_felt():
    model = net()
    optimizer = EmoNavi(model.parameters(), capture=False)
    give_gradients(model)
    optimizer.step(loss=2.0)
    give_gradients(model)
    optimizer.observe(math.nan)
    optimizer.observe(math.inf)
    before = [p.detach().clone() for p in model.parameters()]
    assert not math.isfinite(optimizer.step())
    assert optimizer.emotion.loss == 2.0
    assert optimizer.emotion.ignored_losses == 1
    assert all(not torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_what_a_closure_back_propagates_beats_what_it_returns():
    """Lightning returns the last micro-batch only; the gradient is of the sum."""
    model = net()
    optimizer = EmoNavi(model.parameters())

    def closure():
        optimizer.zero_grad()
        parts = [loss_of(model, x, y) / 2 for x, y in zip(X.chunk(2), Y.chunk(2), strict=True)]
        for part in parts:
            part.backward()
        return parts[-1].detach()

    for _ in range(3):
        true = loss_of(model)
        returned = optimizer.step(closure)
        assert optimizer.emotion.loss == close(true, rel=1e-5)
        assert float(returned) != close(true, rel=1e-2)  # returned as is


@pytest.mark.parametrize("pending", ["lr 0", "backward"])
def test_what_a_closure_back_propagates_counts_after_a_window_of_the_same_length(pending):
    """A step that did nothing (a warm-up from 0), or a backward that was thrown away, leaves a window behind."""
    model = net()
    optimizer = EmoNavi(model.parameters())

    def closure():
        optimizer.zero_grad()
        parts = [loss_of(model, x, y) / 2 for x, y in zip(X.chunk(2), Y.chunk(2), strict=True)]
        for part in parts:
            part.backward()
        return parts[-1].detach()

    if pending == "lr 0":
        optimizer.param_groups[0]["lr"] = 0.0
        optimizer.step(closure)
        optimizer.param_groups[0]["lr"] = 1e-3
    else:
        closure()
    true = loss_of(model)
    optimizer.step(closure)
    assert optimizer.emotion.loss == close(true, rel=1e-5)


def test_micro_batches_before_the_closure_belong_to_its_sum():
    model = net()
    optimizer = EmoNavi(model.parameters())
    parts = [loss_of(model, x, y) / 2 for x, y in zip(X.chunk(2), Y.chunk(2), strict=True)]
    parts[0].backward()

    def closure():
        parts[1].backward()
        return parts[1].detach()

    optimizer.step(closure)
    assert optimizer.emotion.loss == close(sum(parts))


def test_a_closures_return_counts_where_it_ran_no_backward():
    model = net()
    optimizer = EmoNavi(model.parameters())
    loss_of(model).backward()  # the window is the weakest source
    assert optimizer.step(lambda: 9.0) == 9.0
    assert optimizer.emotion.loss == 9.0


@pytest.mark.parametrize("capture", ["auto", False])
def test_an_ordinary_closure(capture):
    model = net()
    optimizer = EmoNavi(model.parameters(), lr=1e-2, capture=capture)

    def closure():
        assert torch.is_grad_enabled()
        optimizer.zero_grad()
        loss = loss_of(model)
        loss.backward()
        return loss

    for _ in range(5):
        true = loss_of(model)
        assert float(optimizer.step(closure).detach()) == close(true)
        assert optimizer.emotion.loss == close(true)
    with torch.no_grad():
        optimizer.step(closure)


def test_a_closure_may_return_none():
    model = net()
    optimizer = EmoNavi(model.parameters())
    loss = loss_of(model)
    loss.backward()
    returned = optimizer.step(lambda: None)  # Lightning's manual optimization
    assert float(returned) == close(loss)
    assert optimizer.emotion.loss == close(loss)
    silent = EmoNavi(model.parameters(), capture=False)
    assert silent.step(lambda: None) is None
    assert silent.emotion.steps == 1
    assert math.isnan(silent.emotion.loss)


def test_the_captured_window_counts_where_there_is_nothing_else():
    model = net()
    optimizer = EmoNavi(model.parameters())
    loss = loss_of(model)
    loss.backward()
    assert felt(optimizer) == close(loss)


def test_both_a_closures_loss_and_a_told_one_are_refused():
    model = net()
    optimizer = EmoNavi(model.parameters())
    give_gradients(model)
    with pytest.raises(ValueError, match="both a closure and loss="):
        optimizer.step(lambda: 2.0, loss=1.0)
    assert optimizer.emotion.steps == 0


def test_a_closure_that_returns_none_runs_beside_a_told_loss():
    """So does Lightning: in manual optimization step(loss=...) comes with a closure around its hooks."""
    model = net()
    optimizer = EmoNavi(model.parameters())
    ran = []
    assert felt(optimizer, closure=lambda: ran.append(give_gradients(model)), loss=7.0) == 7.0
    assert len(ran) == 1
    assert optimizer.emotion.steps == 1


@pytest.mark.parametrize(
    "bad",
    [torch.ones(2), torch.ones(0), torch.tensor(1j), [0.5], np.ones(2), 1j, "low", 10**400],
    ids=lambda bad: f"{bad!r}"[:20],
)
def test_a_loss_must_be_one_real_number(bad):
    model = net()
    optimizer = EmoNavi(model.parameters())
    give_gradients(model)
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(ValueError, match="one real number"):
        optimizer.observe(bad)
    with pytest.raises(ValueError, match="one real number"):
        optimizer.step(loss=bad)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    assert optimizer.emotion.steps == 0


def test_loss_is_keyword_only_and_step_hooks_can_give_it():
    model = net()
    optimizer = EmoNavi(model.parameters(), capture=False)
    optimizer.register_step_pre_hook(lambda opt, args, kwargs: (args, {**kwargs, "loss": 6.0}))
    give_gradients(model)
    assert felt(optimizer) == 6.0
    with pytest.raises(TypeError):
        optimizer.step(None, 1.0)


# What a step clears --------------------------------------------------------------------------------------------------


def test_a_real_step_clears_every_source():
    model = net()
    optimizer = EmoNavi(model.parameters())
    loss_of(model).backward()
    optimizer.observe(5.0)
    optimizer.step(loss=7.0)
    assert optimizer.step() is None  # the gradients are still there, the losses are not
    assert optimizer.emotion.loss == 7.0
    optimizer.observe(5.0)
    loss_of(model).backward()
    assert felt(optimizer) == 5.0
    assert optimizer.step() is None


def test_observing_moves_nothing_before_the_step():
    model = net()
    optimizer = EmoNavi(model.parameters())
    before = optimizer.param_groups[0]["emotion"].clone()
    optimizer.observe(3.0)
    loss_of(model).backward()
    assert torch.equal(optimizer.param_groups[0]["emotion"], before)


@pytest.mark.parametrize("idle", ["no gradients", "lr 0", "lr 0 tensor", "no groups' parameters"])
def test_a_step_that_does_nothing_changes_nothing(idle):
    model = net()
    optimizer = EmoNavi(model.parameters(), lr=torch.tensor(1e-3) if "tensor" in idle else 1e-3)
    for _ in range(3):
        give_gradients(model)
        optimizer.step(loss=1.0)
    if "lr 0" in idle:
        optimizer.param_groups[0]["lr"] = 0 * optimizer.param_groups[0]["lr"]
        give_gradients(model)
    elif idle == "no gradients":
        optimizer.zero_grad()
    else:
        kept, optimizer.param_groups[0]["params"] = optimizer.param_groups[0]["params"], []
    vector = optimizer.param_groups[0]["emotion"].clone()
    params = [p.detach().clone() for p in model.parameters()]
    state = [{k: v.clone() for k, v in s.items()} for s in optimizer.state.values()]
    assert optimizer.step(loss=100.0) == 100.0
    if idle == "no groups' parameters":
        optimizer.param_groups[0]["params"] = kept
    assert torch.equal(optimizer.param_groups[0]["emotion"], vector)
    assert all(torch.equal(a, b) for a, b in zip(params, model.parameters(), strict=True))
    for before, after in zip(state, optimizer.state.values(), strict=True):
        assert all(torch.equal(before[k], after[k]) for k in before)


def test_a_step_at_lr_0_leaves_no_captured_loss_for_the_next_window():
    model = net()
    optimizer = EmoNavi(model.parameters())
    optimizer.param_groups[0]["lr"] = 0.0
    loss_of(model, 10 * X).backward()
    optimizer.step()
    optimizer.zero_grad()
    optimizer.param_groups[0]["lr"] = 1e-3
    loss = loss_of(model)
    loss.backward()
    assert felt(optimizer) == close(loss)


def test_a_told_loss_of_an_idle_step_is_not_kept():
    model = net()
    optimizer = EmoNavi(model.parameters(), capture=False)
    optimizer.step(loss=5.0)  # no gradients yet
    give_gradients(model)
    assert optimizer.step() is None


def test_reset_and_load_forget_what_is_pending():
    model = net()
    optimizer = EmoNavi(model.parameters())
    loss_of(model).backward()
    optimizer.observe(4.0)
    optimizer.reset_emotion()
    assert optimizer.step() is None
    loss_of(model).backward()
    optimizer.observe(4.0)
    optimizer.load_state_dict(optimizer.state_dict())
    assert optimizer.step() is None


# emonavi.observe through wrappers ------------------------------------------------------------------------------------


class Accelerated(torch.optim.Optimizer):
    """As accelerate's: holds the optimizer, forwards neither attributes nor keywords."""

    def __init__(self, optimizer):
        self.optimizer = optimizer

    def step(self, closure=None):
        self.optimizer.step(closure)


class Proxy:
    """As Fabric's: forwards every attribute."""

    def __init__(self, optimizer):
        self._optimizer = optimizer

    @property
    def optimizer(self):
        return self._optimizer

    def __getattr__(self, name):
        return getattr(self._optimizer, name)


class Lightning:
    """Lightning's trick: a class made on the fly, that is also a subclass of the optimizer's class."""

    def __init__(self, optimizer):
        self.__dict__ = {k: v for k, v in optimizer.__dict__.items() if k != "step"}
        self.__class__ = type("Lightning" + type(optimizer).__name__, (Lightning, type(optimizer)), {})
        self._optimizer = optimizer

    def step(self, closure=None, **kwargs):
        return self._optimizer.step(closure, **kwargs)


def within(name):
    """A wrapper that keeps the optimizer under this name."""

    class Wrapper:
        def __init__(self, optimizer):
            vars(self)[name] = optimizer
            self.step = optimizer.step

    return Wrapper


WRAPPERS = {
    "bare": lambda o: o,
    "accelerate": Accelerated,
    "proxy": Proxy,
    "lightning": Lightning,
    "nested": lambda o: Accelerated(Proxy(Accelerated(o))),
    "timm's Lookahead": within("_base_optimizer"),
    "SAM": within("base_optimizer"),
    "Opacus": within("original_optimizer"),
}


@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)
@pytest.mark.parametrize("sibling", SIBLINGS)
def test_observe_finds_the_optimizer_inside(wrap, sibling):
    model = net()
    optimizer = sibling(model.parameters(), capture=False)
    wrapper = wrap(optimizer)
    give_gradients(model)
    emonavi.observe(wrapper, 0.25)
    emonavi.observe(wrapper, torch.tensor([0.75], requires_grad=True))
    wrapper.step()
    assert optimizer.emotion.loss == 0.5
    assert optimizer.emotion.steps == 1


def test_observe_as_a_method_of_lightnings_wrapper():
    model = net()
    optimizer = EmoNavi(model.parameters(), capture=False)
    wrapper = Lightning(optimizer)
    give_gradients(model)
    wrapper.observe(0.25)
    wrapper.step()
    assert optimizer.emotion.loss == 0.25
    give_gradients(model)
    wrapper.step(loss=0.75)
    assert wrapper.emotion.loss == optimizer.emotion.loss == 0.75


DEAF = {
    "object": object(),
    "None": None,
    "number": 3,
    "wrapped SGD": Accelerated(torch.optim.SGD([torch.ones(1)], 0.1)),
    "wrapped object": Proxy(object()),
}


@pytest.mark.parametrize("deaf", DEAF.values(), ids=DEAF)
def test_observe_refuses_what_does_not_listen_and_names_the_remedy(deaf):
    with pytest.raises(TypeError, match=rf"{type(deaf).__name__} .*pass the emonavi optimizer"):
        emonavi.observe(deaf, 1.0)


def test_the_refusal_names_what_the_wrapper_holds():
    with pytest.raises(TypeError, match=r"^Accelerated around SGD holds no optimizer that listens"):
        emonavi.observe(DEAF["wrapped SGD"], 1.0)
    with pytest.raises(TypeError, match=r"^int holds no optimizer that listens"):
        emonavi.observe(DEAF["number"], 1.0)


def test_observe_ends_where_wrappers_go_in_circles():
    one = Accelerated(None)
    one.optimizer = Accelerated(one)
    with pytest.raises(TypeError, match="holds no optimizer"):
        emonavi.observe(one, 1.0)


# Without a loss ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sibling", SIBLINGS)
def test_two_hundred_steps_without_a_loss(sibling):
    model = net()
    optimizer = sibling(model.parameters(), lr=1e-3)
    losses = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(200):
            losses.append(give_gradients(model))
            assert optimizer.step() is None
            assert not optimizer.should_stop
    assert [w.category for w in caught] == [UserWarning]
    assert "without a loss" in str(caught[0].message)
    assert "observe" in str(caught[0].message)  # the remedy
    assert min(losses[50:]) < 0.75 * min(losses[:50])  # it goes on improving long after the warning
    assert losses[-1] < 0.3 * losses[0]
    emotion = optimizer.emotion
    assert emotion.steps == 200
    assert (emotion.scalar, emotion.ignored_losses) == (0.0, 0)
    assert emotion.drive != 1.0
    assert math.isnan(emotion.loss)


def emotional_sgd(params):
    return emonavi.Emotional(torch.optim.SGD(params, lr=0.1))


@pytest.mark.parametrize("make", [*SIBLINGS, emotional_sgd], ids=lambda make: make.__name__)
def test_steps_that_are_all_skipped_are_warned_of(make):
    """As with a NaN from sqrt(0): the loss looks well, and nothing moves."""
    params = list(net().parameters())
    optimizer = make(params)

    def step(value):
        params[0].grad = torch.full_like(params[0], value)
        optimizer.step(loss=1.0)

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for value in [*[math.nan] * 19, 1.0] * 2 + [math.nan] * 19:
            step(value)
    with pytest.warns(UserWarning, match="skipped 20 steps in a row.*set_detect_anomaly") as caught:
        for _ in range(30):
            step(math.inf)
    assert len(caught) == 1
    assert caught[0].filename == __file__


def test_the_warning_points_at_the_line_that_called_step():
    model = net()
    optimizer = EmoNavi(model.parameters(), capture=False)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(30):
            give_gradients(model)
            optimizer.step()
    assert [w.filename for w in caught] == [__file__]


def test_the_warning_does_not_come_back_after_a_loss_now_and_then():
    model = net()
    optimizer = EmoNavi(model.parameters(), capture=False)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for step in range(60):
            give_gradients(model)
            optimizer.step(**({"loss": 1.0} if step % 20 == 19 else {}))
    assert len(caught) == 1


@pytest.mark.parametrize("emotion", ["v1", "v3", "v4"])
def test_presets_without_a_loss_do_not_stop(emotion):
    model = net()
    optimizer = EmoNavi(model.parameters(), emotion=emotion, on_missing_loss="ignore")
    for _ in range(60):
        give_gradients(model)
        optimizer.step()
    assert optimizer.emotion.scalar == 0.0
    assert not optimizer.should_stop


def test_a_missing_loss_is_never_felt_as_zero():
    model = net()
    optimizer = EmoNavi(model.parameters(), on_missing_loss="ignore", capture=False)
    for _ in range(20):
        give_gradients(model)
        optimizer.step(loss=5.0)
    before = optimizer.emotion
    for _ in range(20):
        give_gradients(model)
        optimizer.step()
    after = optimizer.emotion
    assert (after.loss, after.short, after.medium, after.long, after.scalar) == (
        before.loss,
        before.short,
        before.medium,
        before.long,
        before.scalar,
    )


def test_ignore_is_silent():
    model = net()
    optimizer = EmoNavi(model.parameters(), on_missing_loss="ignore")
    for _ in range(30):  # warnings are errors in this suite
        give_gradients(model)
        optimizer.step()
    assert optimizer.emotion.steps == 30


@pytest.mark.parametrize("use_shadow", [False, True])
def test_error_raises_before_anything_changes(use_shadow):
    model = net()
    optimizer = EmoNavi(model.parameters(), on_missing_loss="error", use_shadow=use_shadow)
    give_gradients(model)
    params = [p.detach().clone() for p in model.parameters()]
    vector = optimizer.param_groups[0]["emotion"].clone()
    with pytest.raises(RuntimeError, match=r"no loss.*step\(loss=loss\)"):
        optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(params, model.parameters(), strict=True))
    assert torch.equal(optimizer.param_groups[0]["emotion"], vector)
    optimizer.step(loss=1.0)
    assert optimizer.emotion.steps == 1


def test_error_leaves_no_state_behind():
    """A shadow made now would be of weights that may still change before the first real step."""
    model = net()
    optimizer = EmoNavi(model.parameters(), on_missing_loss="error", use_shadow=True)
    give_gradients(model)
    with pytest.raises(RuntimeError, match="no loss"):
        optimizer.step()
    assert not optimizer.state_dict()["state"]


def test_error_does_not_mind_a_step_that_does_nothing():
    """torch.distributed.checkpoint makes state by a step with zero gradients at lr 0."""
    model = net()
    optimizer = EmoNavi(model.parameters(), on_missing_loss="error")
    optimizer.step()
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.param_groups[0]["lr"] = 0.0
    optimizer.step(closure=None)
    assert optimizer.state


def test_idle_and_fed_steps_do_not_count_toward_the_warning():
    model = net()
    optimizer = EmoNavi(model.parameters(), capture=False)
    for step in range(40):
        optimizer.zero_grad()
        optimizer.step()
        give_gradients(model)
        optimizer.step(**({"loss": 1.0} if step % 4 == 0 else {}))
    assert optimizer.emotion.steps == 40


# By whichever way it arrives, it is felt ------------------------------------------------------------------------------


def by_told(model, optimizer, x, y):
    loss = loss_of(model, x, y)
    loss.backward()
    optimizer.step(loss=loss)


def by_closure(model, optimizer, x, y):
    def closure():
        optimizer.zero_grad()
        loss = loss_of(model, x, y)
        loss.backward()
        return loss

    optimizer.step(closure)


def by_observe(model, optimizer, x, y):
    loss = loss_of(model, x, y)
    loss.backward()
    optimizer.observe(loss)
    optimizer.step()


def by_module_observe(model, optimizer, x, y):
    loss = loss_of(model, x, y)
    loss.backward()
    wrapper = Accelerated(optimizer)
    emonavi.observe(wrapper, loss.item())
    wrapper.step()


def by_capture(model, optimizer, x, y):
    loss_of(model, x, y).backward()
    optimizer.step()


SCALER = torch.amp.GradScaler("cpu", init_scale=1024.0)


def by_scaler(model, optimizer, x, y):
    SCALER.scale(loss_of(model, x, y)).backward()
    SCALER.step(optimizer)
    SCALER.update()


def by_accumulation(model, optimizer, x, y):
    for a, b in zip(x.chunk(2), y.chunk(2), strict=True):
        (loss_of(model, a, b) / 2).backward()
    optimizer.step()


WAYS = [by_told, by_closure, by_observe, by_module_observe, by_capture, by_scaler, by_accumulation]


@pytest.mark.parametrize("sibling", SIBLINGS)
@pytest.mark.parametrize("way", WAYS)
def test_the_scalar_lives_over_two_hundred_steps(way, sibling):
    model = net()
    hears = way in (by_capture, by_scaler, by_accumulation)
    optimizer = sibling(model.parameters(), capture="auto" if hears else False)
    generator = torch.Generator().manual_seed(3)
    scalars, wrong = [], 0
    for step in range(200):
        pick = torch.randint(len(X), (8,), generator=generator)
        if step % 20 == 0:
            true = float(loss_of(model, X[pick], Y[pick]).detach())
        way(model, optimizer, X[pick], Y[pick])
        wrong += step % 20 == 0 and optimizer.emotion.loss != close(true, rel=1e-5)
        scalars.append(optimizer.emotion.scalar)
        optimizer.zero_grad()
    assert wrong == 0
    assert max(map(abs, scalars)) > 0.1
    assert optimizer.emotion.steps == 200
    assert len(set(scalars)) > 50
