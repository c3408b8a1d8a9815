"""Which loss an optimizer hears at backward, and that torch is left as it was found."""

from __future__ import annotations

import copy
import gc
import math
import pickle
import threading
import warnings
import weakref
from types import FunctionType

import pytest
import torch
from cases import X, Y, close, loss_of, net
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.fsdp.sharded_grad_scaler import ShardedGradScaler
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from emonavi import EmoFact, EmoLynx, EmoNavi, Emotional, capture, intake

SIBLINGS = [EmoNavi, EmoFact, EmoLynx]


@pytest.fixture(autouse=True)
def alone():
    """Optimizers that other tests left alive (a failed test's traceback holds them) must not listen here."""

    def silence():
        if capture._listeners:
            gc.collect()
        for stray in [*capture._listeners, intake.Intake(list)]:  # the last was none: torch is restored at any rate
            capture._listeners.discard(stray)
            capture._leave()

    silence()
    backward = torch.autograd.backward
    yield
    silence()
    torch.autograd.backward = backward  # a failed test may have left its own


def heard(optimizer):
    """The loss that a step returns, as a number; None where nothing was heard."""
    loss = optimizer.step()
    return None if loss is None else float(loss)


# Every way to run backward ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("sibling", SIBLINGS)
@pytest.mark.parametrize(
    "run",
    [
        lambda loss: loss.backward(),
        lambda loss: torch.autograd.backward(loss),
        lambda loss: torch.autograd.backward([loss]),
        lambda loss: torch.autograd.backward((loss,), (None,)),
        lambda loss: torch.autograd.backward(tensors=loss, grad_tensors=None, retain_graph=False),
        lambda loss: loss.backward(retain_graph=True),
        lambda loss: loss.backward(torch.ones(())),
    ],
    ids=["method", "function", "list", "tuple", "keywords", "retain", "one"],
)
def test_a_backward_is_heard(run, sibling):
    model = net()
    optimizer = sibling(model.parameters())
    loss = loss_of(model)
    run(loss)
    assert math.isnan(optimizer.emotion.loss)  # only a step feels
    assert heard(optimizer) == close(loss)
    assert optimizer.emotion.loss == close(loss)


@pytest.mark.parametrize("shape", [(), (1,), (1, 1, 1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_losses_of_one_element_and_any_float_dtype(shape, dtype):
    model = net()
    optimizer = EmoNavi(model.parameters())
    loss = loss_of(model).to(dtype).reshape(shape)
    loss.backward(torch.ones_like(loss))
    returned = optimizer.step()
    assert returned.shape == ()
    assert not returned.requires_grad
    assert optimizer.emotion.loss == float(loss.detach())


def test_gradient_weights_the_loss():
    model = net()
    optimizer = EmoNavi(model.parameters())
    loss = loss_of(model)
    loss.backward(gradient=torch.tensor(0.25))
    assert heard(optimizer) == close(0.25 * loss)


def test_several_roots_are_summed_each_with_its_weight():
    model = net()
    optimizer = EmoNavi(model.parameters())
    one, two, three = loss_of(model), loss_of(model, 2 * X), loss_of(model, 3 * X).reshape(1)
    torch.autograd.backward([one, two, three], [None, torch.tensor(0.5), torch.tensor([2.0])])
    assert heard(optimizer) == close(one + 0.5 * two + 2 * three)


def test_roots_of_different_dtypes_are_summed():
    model = net()
    optimizer = EmoNavi(model.parameters())
    one, two = loss_of(model), loss_of(model.double(), X.double(), Y.double())
    model.float()
    torch.autograd.backward([one, two])
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    assert heard(optimizer) == close(one.detach() + two.detach())


def test_non_scalar_roots_are_not_losses():
    model = net()
    optimizer = EmoNavi(model.parameters())
    out = model(X)
    out.backward(torch.ones_like(out))
    assert heard(optimizer) is None
    optimizer.zero_grad()
    out, loss = model(X), loss_of(model)
    torch.autograd.backward([out, loss], [torch.ones_like(out), None])
    assert heard(optimizer) == close(loss)


def test_a_root_without_grad_is_torchs_own_error_and_is_not_heard():
    model = net()
    optimizer = EmoNavi(model.parameters())
    with pytest.raises(RuntimeError, match="does not require grad"):
        torch.tensor(3.0).backward()
    loss = loss_of(model)
    loss.backward()
    assert heard(optimizer) == close(loss)


def test_a_complex_root_is_not_a_loss():
    model = net()
    optimizer = EmoNavi(model.parameters())
    root = (loss_of(model) * torch.tensor(1j)).sum()
    root.backward(torch.ones_like(root))
    assert heard(optimizer) is None


def test_autograd_grad_is_not_heard():
    model = net()
    optimizer = EmoNavi(model.parameters())
    loss = loss_of(model)
    penalty = sum(g.square().sum() for g in torch.autograd.grad(loss, list(model.parameters()), create_graph=True))
    (loss + penalty).backward()
    assert heard(optimizer) == close(loss + penalty)
    for p, g in zip(model.parameters(), torch.autograd.grad(loss_of(model), list(model.parameters())), strict=True):
        p.grad = g
    assert heard(optimizer) is None


# inputs= ----------------------------------------------------------------------------------------------------------

INPUTS = {
    "tensor": lambda m: m[0].weight,
    "list": lambda m: [m[0].weight, m[0].bias],
    "tuple": lambda m: (m[0].weight,),
    "generator": lambda m: m[0].parameters(),
    "dict": lambda m: dict(m[0].named_parameters()),
}


@pytest.mark.parametrize("give", INPUTS.values(), ids=INPUTS)
@pytest.mark.parametrize("positional", [False, True], ids=["keyword", "positional"])
def test_inputs_say_who_hears(give, positional):
    model = net()
    first, last = EmoNavi(model[0].parameters()), EmoNavi(model[2].parameters())
    loss = loss_of(model)
    if positional:
        torch.autograd.backward(loss, None, None, False, None, give(model))
    else:
        torch.autograd.backward(loss, inputs=give(model))
    assert model[0].weight.grad is not None  # what was asked of torch is done
    assert model[2].weight.grad is None
    for p in model[2].parameters():
        p.grad = torch.ones_like(p)
    assert heard(first) == close(loss)
    assert heard(last) is None


@pytest.mark.parametrize("give", INPUTS.values(), ids=INPUTS)
def test_inputs_of_the_only_listener(give):
    model = net()
    optimizer = EmoNavi(model.parameters())
    loss = loss_of(model)
    loss.backward(inputs=give(model))
    assert heard(optimizer) == close(loss)


def test_inputs_that_are_nobodys():
    model = net()
    optimizer = EmoNavi(model.parameters())
    x = X.clone().requires_grad_()
    loss_of(model, x).backward(inputs=[x])  # saliency, adversarial examples
    assert x.grad is not None
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    assert heard(optimizer) is None


# What torch accepts as roots has to go on working --------------------------------------------------------------------


def test_a_generator_of_roots_still_gives_gradients():
    model = net()
    optimizer = EmoNavi(model.parameters())
    one, two = loss_of(model), loss_of(model, 2 * X)
    torch.autograd.backward(loss for loss in (one, two))
    assert all(p.grad is not None for p in model.parameters())
    assert heard(optimizer) == close(one + two)


@pytest.mark.parametrize("wrap", [lambda edge: edge, lambda edge: [edge]], ids=["edge", "list"])
def test_gradient_edges_as_roots_still_work(wrap):
    """torch.distributed.pipelining runs backward from edges."""
    model = net()
    optimizer = EmoNavi(model.parameters())
    out = model(X)
    torch.autograd.backward(wrap(torch.autograd.graph.get_gradient_edge(out)), torch.ones_like(out))
    assert all(p.grad is not None for p in model.parameters())
    assert heard(optimizer) is None


def test_a_backward_that_fails_is_not_counted():
    model = net()
    optimizer = EmoNavi(model.parameters())
    loss = loss_of(model)
    loss.backward()
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()
    assert heard(optimizer) == close(loss)


# Windows ------------------------------------------------------------------------------------------------------------


def test_the_parts_of_an_accumulated_loss_are_summed():
    model = net()
    optimizer = EmoNavi(model.parameters())
    for _ in range(3):
        parts = [loss_of(model, x, y) / 4 for x, y in zip(X.chunk(4), Y.chunk(4), strict=True)]
        for part in parts:
            part.backward()
        assert heard(optimizer) == close(sum(parts))
        optimizer.zero_grad()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_long_accumulation_of_16_bit_losses_is_not_lost_to_rounding(dtype):
    weight = nn.Parameter(torch.ones(()))
    optimizer = EmoNavi([weight])
    for _ in range(2000):
        part = (weight * 1e-3).to(dtype)
        part.backward()
    assert heard(optimizer) == close(2000 * float(part.detach()), rel=1e-4)


def run_window(model, optimizer, parts, of=4):
    """One step over some of the micro-batches of an epoch, each divided by the usual number of them."""
    losses = [loss_of(model, x, y) / of for x, y in zip(X.chunk(4)[:parts], Y.chunk(4)[:parts], strict=True)]
    for loss in losses:
        loss.backward()
    returned = float(optimizer.step())
    optimizer.zero_grad()
    assert returned == close(sum(losses))
    return returned


@pytest.mark.parametrize("emotion", ["adaptive", "v4"])
def test_a_partial_last_window_is_held(emotion):
    model = net()
    optimizer = EmoNavi(model.parameters(), emotion=emotion)
    for _ in range(6):
        last = run_window(model, optimizer, 4)
    before, steps = optimizer.emotion, optimizer.emotion.steps
    run_window(model, optimizer, 2)
    after = optimizer.emotion
    assert after.steps == steps + 1
    assert after.ignored_losses == 0
    assert (after.loss, after.short, after.long, after.scalar) == (
        before.loss,
        before.short,
        before.long,
        before.scalar,
    )
    assert before.loss == close(last)
    assert optimizer.emotion.loss == close(last)
    loss = run_window(model, optimizer, 4)
    assert optimizer.emotion.loss == close(loss)


def test_a_new_accumulation_count_is_adopted_when_it_comes_twice():
    model = net()
    optimizer = EmoNavi(model.parameters())
    for _ in range(4):
        usual = run_window(model, optimizer, 4, of=4)
    run_window(model, optimizer, 2, of=2)
    assert optimizer.emotion.loss == close(usual)
    run_window(model, optimizer, 2, of=2)
    for _ in range(2):
        loss = run_window(model, optimizer, 2, of=2)
        assert optimizer.emotion.loss == close(loss)


def test_partial_windows_now_and_then_are_never_adopted():
    model = net()
    optimizer = EmoNavi(model.parameters())
    for _ in range(4):
        for _ in range(3):
            usual = run_window(model, optimizer, 4)
        run_window(model, optimizer, 1)
        assert optimizer.emotion.loss == close(usual)


@pytest.mark.parametrize("clear", ["optimizer", "optimizer, in place", "model", "by hand"])
@pytest.mark.parametrize("make", [EmoNavi, lambda p: Emotional(torch.optim.SGD(p, lr=0.1))], ids=["own", "around"])
def test_cleared_gradients_begin_a_new_window(clear, make):
    model = net()
    optimizer = make(model.parameters())
    loss_of(model, 5 * X).backward()
    if clear == "by hand":
        for p in model.parameters():
            p.grad = None
    elif clear == "optimizer, in place":
        optimizer.zero_grad(set_to_none=False)
    else:
        (optimizer if clear == "optimizer" else model).zero_grad()
    loss = loss_of(model)
    loss.backward()
    assert heard(optimizer) == close(loss)


def test_gradients_that_stay_continue_the_window():
    model = net()
    optimizer = EmoNavi(model.parameters())
    one, two = loss_of(model), loss_of(model, 2 * X)
    one.backward()
    two.backward()
    assert heard(optimizer) == close(one + two)
    three = loss_of(model)
    three.backward()  # without zero_grad: the step has closed the window
    assert heard(optimizer) == close(three)


def test_zeroed_instead_of_dropped_gradients():
    model = net()
    optimizer = EmoNavi(model.parameters())
    for _ in range(4):
        loss = loss_of(model)
        loss.backward()
        assert heard(optimizer) == close(loss)
        optimizer.zero_grad(set_to_none=False)


def test_a_loss_changed_in_place_after_backward():
    model = net()
    optimizer = EmoNavi(model.parameters())
    losses = []
    for x in (X, 2 * X):
        loss = loss_of(model, x)
        loss.backward()
        losses.append(float(loss.detach()))
        loss.detach().mul_(1000)  # a running total kept in the loss itself, or an in-place reduction over replicas
    returned = optimizer.step()
    assert float(returned) == close(sum(losses))
    returned.add_(7)  # nor does the returned tensor reach into the optimizer
    assert optimizer.emotion.loss == close(sum(losses))


def test_a_frozen_model_does_not_hold_the_window_open():
    model = net()
    model[0].requires_grad_(False)
    optimizer = EmoNavi(model.parameters())
    for _ in range(3):
        loss = loss_of(model)
        loss.backward()
        assert heard(optimizer) == close(loss)
        optimizer.zero_grad()


# Several optimizers -----------------------------------------------------------------------------------------------


def bce(logits, target):
    return nn.functional.binary_cross_entropy_with_logits(logits, torch.full_like(logits, target))


@pytest.mark.parametrize("clear", ["model", "optimizer", "optimizer, in place"])
def test_gan_with_two_optimizers(clear):
    torch.manual_seed(0)
    d, g = nn.Linear(4, 1), nn.Linear(2, 4)
    opt_d, opt_g = EmoNavi(d.parameters()), EmoNavi(g.parameters())
    how = {"set_to_none": clear != "optimizer, in place"}
    for _ in range(5):
        (d if clear == "model" else opt_d).zero_grad(**how)
        real = bce(d(X), 1.0)
        real.backward()
        fake_x = g(torch.randn(8, 2))
        fake = bce(d(fake_x.detach()), 0.0)
        fake.backward()
        assert heard(opt_d) == close(real + fake)
        (g if clear == "model" else opt_g).zero_grad(**how)
        fooled = bce(d(fake_x), 1.0)  # reaches the discriminator too, which clears its gradients before its next turn
        fooled.backward()
        assert heard(opt_g) == close(fooled)


def test_gan_where_the_discriminator_has_another_optimizer():
    torch.manual_seed(0)
    d, g = nn.Linear(4, 1), nn.Linear(2, 4)
    opt_d, opt_g = torch.optim.SGD(d.parameters(), 0.1), EmoNavi(g.parameters())
    for _ in range(4):
        d.zero_grad()
        fake_x = g(torch.randn(8, 2))
        (bce(d(X), 1.0) + bce(d(fake_x.detach()), 0.0)).backward()
        opt_d.step()
        g.zero_grad()
        fooled = bce(d(fake_x), 1.0)
        fooled.backward()
        assert heard(opt_g) == close(fooled)


def as_fsdp_has(model):
    """A copy that is in the graph in place of a model, whose parameters look as those of FSDP1 do."""
    stand_in = copy.deepcopy(model)
    for p in model.parameters():
        p._fsdp_flattened = True
    return stand_in


@pytest.mark.parametrize("sharded", [True, False])
def test_gradients_that_are_kept_back_do_not_end_a_window(sharded):
    """FSDP2 keeps them back until it reduces, at the last micro-batch. Others that are None have been cleared."""
    model = net()
    optimizer = EmoNavi(model.parameters())
    stand_in = as_fsdp_has(model) if sharded else copy.deepcopy(model)
    for _ in range(2):
        parts = [loss_of(stand_in, x, y) / 2 for x, y in zip(X.chunk(2), Y.chunk(2), strict=True)]
        for part in parts:
            part.backward()
        for p, q in zip(model.parameters(), stand_in.parameters(), strict=True):
            p.grad, q.grad = q.grad, None
        assert heard(optimizer) == close(sum(parts) if sharded else parts[-1])
        model.zero_grad()


def test_a_sharded_backbone_and_a_plain_head_hear_what_reaches_both():
    torch.manual_seed(0)
    back, head, critic = nn.Linear(4, 5), nn.Linear(5, 3), nn.Linear(5, 1)
    optimizers = [EmoNavi(m.parameters()) for m in (back, head, critic)]
    stand_in = as_fsdp_has(back)
    for _ in range(3):
        made = stand_in(X).detach().requires_grad_()  # as for a gradient penalty: a leaf that is nobody's
        judged = critic(made).square().mean()
        judged.backward()
        loss = (head(stand_in(X)) - Y).square().mean()
        loss.backward()
        for p, q in zip(back.parameters(), stand_in.parameters(), strict=True):
            p.grad, q.grad = q.grad, None
        assert [heard(o) for o in optimizers] == [close(one) for one in (loss, loss, judged)]
        for optimizer in optimizers:
            optimizer.zero_grad()


def test_four_optimizers_on_one_model_hear_the_whole_loss():
    torch.manual_seed(0)
    model = nn.Sequential(*[nn.Linear(4, 4) for _ in range(4)])
    optimizers = [EmoNavi(layer.parameters()) for layer in model]
    for _ in range(3):
        parts = [model(x).square().mean() / 2 for x in X.chunk(2)]
        for part in parts:
            part.backward()
        for optimizer in optimizers:
            assert heard(optimizer) == close(sum(parts))
            optimizer.zero_grad()


def test_unrelated_models_hear_their_own_loss_only():
    one, two = net(0), net(1)
    opt_one, opt_two = EmoNavi(one.parameters()), EmoLynx(two.parameters())
    for _ in range(3):
        loss_one, loss_two = loss_of(one), loss_of(two, 3 * X)
        loss_one.backward()
        loss_two.backward()
        assert heard(opt_two) == close(loss_two)
        assert heard(opt_one) == close(loss_one)
        opt_one.zero_grad()
        opt_two.zero_grad()


def test_an_optimizer_of_parameters_added_later_hears():
    one, two = net(0), net(1)
    opt_one, opt_two = EmoNavi(one.parameters()), EmoNavi([nn.Parameter(torch.ones(1))])
    opt_two.add_param_group({"params": list(two.parameters())})
    loss = loss_of(two)
    loss.backward()
    for p in one.parameters():
        p.grad = torch.ones_like(p)
    assert heard(opt_two) == close(loss)
    assert heard(opt_one) is None


def test_a_loss_that_reaches_no_parameter_is_everybodys():
    """FSDP's graph holds stand-ins of the parameters, and the gradients arrive by other ways."""
    model = net()
    optimizers = [EmoNavi(model[0].parameters()), EmoNavi(model[2].parameters())]
    stand_in = copy.deepcopy(model)
    loss = loss_of(stand_in)
    loss.backward()
    for p, q in zip(model.parameters(), stand_in.parameters(), strict=True):
        p.grad = q.grad
    assert [heard(o) for o in optimizers] == [close(loss)] * 2


def test_one_optimizer_for_each_parameter_stepped_while_backward_runs():
    """Gradient release: each must feel the loss at entry, before its gradient exists."""
    model = net()
    optimizers = {p: EmoNavi([p], lr=1e-2) for p in model.parameters()}
    felt = []

    def release(p):
        felt.append(heard(optimizers[p]))
        optimizers[p].zero_grad()

    for p in model.parameters():
        p.register_post_accumulate_grad_hook(release)
    first = float(loss_of(model).detach())
    for step in range(60):
        felt.clear()
        loss = loss_of(model)
        loss.backward()
        assert felt == [close(loss)] * 4
        assert {o.emotion.steps for o in optimizers.values()} == {step + 1}
    assert float(loss_of(model).detach()) < 0.9 * first


# Checkpointing, compilation, threads --------------------------------------------------------------------------------


class Deep(nn.Module):
    def __init__(self, reentrant):
        super().__init__()
        torch.manual_seed(0)
        self.trunk = nn.ModuleList(nn.Linear(4, 4) for _ in range(2))
        self.head = nn.Linear(4, 3)
        self.reentrant = reentrant

    def forward(self, x):
        if self.reentrant:
            x = x.clone().requires_grad_()
        for block in self.trunk:
            x = checkpoint(lambda x, block=block: torch.tanh(block(x)), x, use_reentrant=self.reentrant)
        return self.head(x)


@pytest.mark.parametrize("reentrant", [False, True], ids=["saved tensors", "reentrant"])
def test_checkpointing_does_not_change_the_loss(reentrant):
    model = Deep(reentrant)
    optimizer = EmoNavi(model.parameters())
    for _ in range(3):
        parts = [loss_of(model, x, y) / 2 for x, y in zip(X.chunk(2), Y.chunk(2), strict=True)]
        for part in parts:
            part.backward()
        assert heard(optimizer) == close(sum(parts))
        optimizer.zero_grad()


@pytest.mark.parametrize("reentrant", [False, True], ids=["saved tensors", "reentrant"])
def test_checkpointed_scalars_inside_are_not_losses(reentrant):
    torch.manual_seed(0)
    scale = nn.Parameter(torch.ones(1))
    optimizer = EmoNavi([scale])
    loss = checkpoint(lambda s: s * 3, scale * 1.0, use_reentrant=reentrant).square().sum()
    loss.backward()
    assert heard(optimizer) == close(9.0)


@pytest.mark.parametrize("reentrant", [False, True], ids=["saved tensors", "reentrant"])
def test_checkpointed_blocks_with_an_optimizer_each_hear(reentrant):
    """Fused optimizer groups with gradient checkpointing: sd-scripts' way to fit SDXL, and it checkpoints re-entrantly.

    A re-entrant block hides its parameters from the outer graph.
    """
    model = Deep(reentrant)
    optimizers = [EmoNavi(block.parameters()) for block in (*model.trunk, model.head)]
    for _ in range(2):
        loss = loss_of(model)
        loss.backward()
        assert [heard(o) for o in optimizers] == [close(loss)] * 3
        model.zero_grad()


def test_a_hook_that_runs_backward_inside_backward_is_not_a_loss():
    model, side = net(), nn.Parameter(torch.ones(()))
    optimizer = EmoNavi(model.parameters())

    def hook(grad):
        with torch.enable_grad():
            (side * 100).backward()

    out = model(X)
    out.register_hook(hook)
    loss = (out - Y).square().mean()
    loss.backward()
    assert float(side.grad) == 100.0
    assert heard(optimizer) == close(loss)


def test_two_threads_hear_their_own():
    models = [net(0), net(1)]
    optimizers = [EmoNavi(m.parameters()) for m in models]
    wrong, barrier = [], threading.Barrier(2, timeout=30)

    def train(which):
        try:
            for step in range(40):
                barrier.wait()
                parts = [loss_of(models[which], (1 + which + step % 3) * x) / 2 for x in (X, -X)]
                for part in parts:
                    part.backward()
                told, true = float(optimizers[which].step()), float(sum(parts).detach())
                if abs(told - true) > 1e-5 * true:
                    wrong.append((which, step, told, true))
                optimizers[which].zero_grad()
        except Exception as error:
            wrong.append((which, error))
            barrier.abort()

    threads = [threading.Thread(target=train, args=(i,)) for i in range(2)]
    for t in threads:
        t.start()
    for t in threads:
        t.join(60)
    assert not wrong
    assert [o.emotion.steps for o in optimizers] == [40, 40]


def test_another_thread_is_not_heard():
    """Nor are gradients looked at that a backward may be writing. A loss of these parameters is heard from anywhere."""
    model, other = net(0), net(1)
    optimizer = EmoNavi(model.parameters())

    def elsewhere(work):
        thread = threading.Thread(target=work)
        thread.start()
        thread.join(30)

    for _ in range(3):
        optimizer.zero_grad()
        out = model(X)
        out.register_hook(lambda grad: elsewhere(lambda: (1e3 * loss_of(other)).backward()))
        loss = (out - Y).square().mean()
        loss.backward()
        assert heard(optimizer) == close(loss)
    optimizer.zero_grad()
    loss = loss_of(model)
    elsewhere(loss.backward)
    assert heard(optimizer) == close(loss)
    optimizer.zero_grad()
    inputs = X.clone().requires_grad_()  # the graph shows no parameter: what is nested in it does
    loss = (checkpoint(model, inputs, use_reentrant=True) - Y).square().mean()
    elsewhere(loss.backward)
    assert heard(optimizer) == close(loss)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_compiled_model_is_heard(backend):
    model = net()
    optimizer = EmoNavi(model.parameters())
    compiled = torch.compile(model, backend=backend)
    try:
        for _ in range(3):
            loss = loss_of(compiled)
            loss.backward()
            assert heard(optimizer) == close(loss)
            optimizer.zero_grad()
    finally:
        torch.compiler.reset()


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # torch looks at it
def test_a_compiled_train_step_is_heard():
    model = net()
    optimizer = EmoNavi(model.parameters(), lr=1e-2)

    @torch.compile(backend="eager")
    def train_step(x, y):
        loss = (model(x) - y).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    try:
        for step in range(3):
            loss = train_step(X, Y)
            assert optimizer.emotion.loss == close(loss)
            assert optimizer.emotion.steps == step + 1
    finally:
        torch.compiler.reset()


# Torch is left as it was --------------------------------------------------------------------------------------------

PATCHED = [(torch.autograd, "backward"), (torch.amp.GradScaler, "scale"), (ShardedGradScaler, "scale")]


def in_place():
    return [vars(where)[name] for where, name in PATCHED]


def are_torchs_own(functions):
    modules = [f.__module__ for f in functions if isinstance(f, FunctionType)]
    return modules == ["torch.autograd", "torch.amp.grad_scaler", "torch.distributed.fsdp.sharded_grad_scaler"]


def test_torch_is_wrapped_while_one_listens_and_whole_again_after():
    before = in_place()
    assert are_torchs_own(before)
    one = EmoNavi(net().parameters())
    during = in_place()
    assert all(a is not b for a, b in zip(before, during, strict=True))
    two = EmoFact(net().parameters())
    assert all(a is b for a, b in zip(in_place(), during, strict=True))  # wrapped once, however many listen
    del one
    gc.collect()
    assert all(a is b for a, b in zip(in_place(), during, strict=True))
    del two
    gc.collect()
    assert all(a is b for a, b in zip(in_place(), before, strict=True))


@pytest.mark.parametrize("sibling", SIBLINGS)
def test_an_optimizer_is_freed_without_the_garbage_collector(sibling):
    before = in_place()
    model = net()
    gc.disable()
    try:
        optimizer = sibling(model.parameters(), use_shadow=True)
        for _ in range(3):
            loss_of(model).backward()
            optimizer.step()
            optimizer.zero_grad()
        optimizer.step(lambda: None)
        with optimizer.calm():
            assert optimizer.emotion.steps == 3
        optimizer.load_state_dict(optimizer.state_dict())
        gone = weakref.ref(optimizer)
        del optimizer
        assert gone() is None
        assert all(a is b for a, b in zip(in_place(), before, strict=True))
    finally:
        gc.enable()


def test_capture_false_never_wraps():
    before = in_place()
    model = net()
    optimizer = EmoNavi(model.parameters(), capture=False)
    copies = [copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))]
    assert all(a is b for a, b in zip(in_place(), before, strict=True))
    other = EmoNavi(net().parameters())  # another one that listens does not make it listen
    loss_of(model).backward()
    assert heard(optimizer) is None
    del other, copies
    gc.collect()
    assert all(a is b for a, b in zip(in_place(), before, strict=True))


COPIES = {"copy": copy.deepcopy, "pickle": lambda what: pickle.loads(pickle.dumps(what))}


@pytest.mark.parametrize("duplicate", COPIES.values(), ids=COPIES)
def test_copies_listen_and_leave(duplicate):
    before = in_place()
    model = net()
    optimizer = EmoNavi(model.parameters())
    model2, optimizer2 = duplicate((model, optimizer))
    loss, loss2 = loss_of(model), loss_of(model2, 2 * X)
    loss.backward()
    loss2.backward()
    assert heard(optimizer) == close(loss)
    assert heard(optimizer2) == close(loss2)
    del optimizer
    loss2 = loss_of(model2)
    model2.zero_grad()
    loss2.backward()
    assert heard(optimizer2) == close(loss2)
    del optimizer2
    gc.collect()
    assert all(a is b for a, b in zip(in_place(), before, strict=True))


def test_a_pending_loss_does_not_travel_with_a_copy():
    model = net()
    optimizer = EmoNavi(model.parameters())
    loss_of(model).backward()
    _, twin = copy.deepcopy((model, optimizer))
    assert heard(twin) is None
    assert heard(optimizer) is not None


@pytest.mark.parametrize("duplicate", COPIES.values(), ids=COPIES)
def test_copies_keep_their_settings(duplicate):
    """process_group=None means never: a copy that talks to the other replicas, who do not answer, would hang."""
    model = net()
    optimizer = duplicate(EmoNavi(model.parameters(), capture=False, on_missing_loss="error", process_group=None))
    for p in optimizer.param_groups[0]["params"]:
        p.grad = torch.ones_like(p)
    with pytest.raises(RuntimeError, match="no loss"):
        optimizer.step()
    assert optimizer._process_group is None


def wrapped_by_somebody():
    """What a profiler or a debugger does; returns its own wrapper and the number of calls that it saw."""
    inner, calls = torch.autograd.backward, []

    def theirs(*args, **kwargs):
        calls.append(1)
        return inner(*args, **kwargs)

    torch.autograd.backward = theirs
    return theirs, calls


def test_a_wrapper_around_ours_stays_and_works_when_we_go():
    model = net()
    optimizer = EmoNavi(model.parameters())
    theirs, calls = wrapped_by_somebody()
    loss = loss_of(model)
    loss.backward()
    assert heard(optimizer) == close(loss)
    del optimizer
    gc.collect()
    assert torch.autograd.backward is theirs
    model.zero_grad()
    loss_of(model).backward()
    assert all(p.grad is not None for p in model.parameters())
    assert len(calls) == 2


@pytest.mark.parametrize("parts", [1, 3])
def test_a_loss_is_counted_once_when_we_come_back_around_their_wrapper(parts):
    model = net()
    first = EmoNavi(model.parameters())
    _, calls = wrapped_by_somebody()
    del first
    gc.collect()
    optimizer = EmoNavi(model.parameters())
    for _ in range(2):
        losses = [loss_of(model, x, y) / parts for x, y in zip(X.chunk(parts), Y.chunk(parts), strict=True)]
        for loss in losses:
            loss.backward()
        assert heard(optimizer) == close(sum(losses))
        optimizer.zero_grad()
    assert len(calls) == 2 * parts


def test_their_wrapper_taken_away_while_we_listen():
    before = in_place()
    model = net()
    first = EmoNavi(model.parameters())
    ours = torch.autograd.backward
    wrapped_by_somebody()
    del first
    gc.collect()
    torch.autograd.backward = ours  # they restore what they found, after we had gone
    second = EmoNavi(model.parameters())
    losses = [loss_of(model), loss_of(model, 2 * X)]
    for loss in losses:
        loss.backward()
    assert heard(second) == close(sum(losses))
    del second
    gc.collect()
    loss_of(model).backward()
    assert all(a is b for a, b in zip(in_place()[1:], before[1:], strict=True))


def test_the_wrappers_look_like_torchs_own():
    doc = torch.autograd.backward.__doc__
    optimizer = EmoNavi(net().parameters())
    assert torch.autograd.backward.__doc__ == doc
    assert torch.autograd.backward.__name__ == "backward"
    assert torch.amp.GradScaler.scale.__name__ == "scale"
    del optimizer


def test_backward_of_others_is_untouched_by_a_listener():
    """Gradients with a listener equal those without one, bit for bit, and no warning is made."""
    model = net()
    loss_of(model).backward()
    without = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    optimizer = EmoNavi(net(5).parameters())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loss_of(model).backward()
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), without, strict=True))
    del optimizer


def test_a_sole_listener_leaves_other_models_losses_out():
    """A discriminator on torch's own optimizer: its loss does not reach the generator's gradients."""
    mine, other = net(0), net(1)
    optimizer = EmoNavi(mine.parameters())
    stranger = torch.optim.AdamW(other.parameters())
    for _ in range(3):
        loss = loss_of(mine)
        loss.backward()
        (1000 + loss_of(other)).backward()
        stranger.step()
        assert float(optimizer.step()) == close(loss)
        optimizer.zero_grad()
        stranger.zero_grad()


def test_hearing_reads_no_value():
    """Reading one would wait for the device. Parts, a weight and a scaler's loss are heard on the way."""

    class NoReading(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            assert func is not torch.ops.aten._local_scalar_dense.default, "a value was read"
            return func(*args, **(kwargs or {}))

    scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
    models = [net(), net(1)]
    optimizers = [EmoNavi(m.parameters()) for m in models]  # two: the graph is walked, too
    losses = [loss_of(m) for m in (*models, *models)]
    scaled = scaler.scale(losses[3])  # the scaler's own business
    with NoReading():
        losses[0].backward()
        torch.autograd.backward([losses[1], losses[2]], [None, torch.tensor(0.5)])
        scaled.backward()
    with pytest.raises(AssertionError, match="a value was read"), NoReading():
        losses[0].detach().item()
    pair = losses[1] + 0.5 * losses[2]  # back-propagated together, and so heard together
    assert heard(optimizers[0]) == close(losses[0] + pair)
    assert heard(optimizers[1]) == close(pair + losses[3])


@pytest.mark.parametrize("cls", SIBLINGS)
def test_a_model_without_memory_says_nothing(cls):
    """Between a backward and its step another model may be looked at on the meta device, or with fake tensors."""
    model, other = nn.Linear(4, 1), nn.Linear(4, 1, device="meta")
    optimizer = cls(model.parameters())
    loss = model(X).square().mean()
    loss.backward()
    other(X.to("meta")).sum().backward()
    with FakeTensorMode():
        nn.Linear(4, 1)(torch.ones(2, 4)).sum().backward()
    optimizer.step()
    assert optimizer.emotion.loss == pytest.approx(loss.item())


def test_a_gradient_of_another_shape_is_refused_by_torch():
    weight = nn.Parameter(torch.ones(3))
    EmoNavi([weight])
    with pytest.raises(RuntimeError, match="shape"):
        weight.sum().backward(gradient=torch.ones(3))
