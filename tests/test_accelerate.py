"""accelerate needs no integration: the loss arrives through its wrapper, and runs resume exactly."""

from __future__ import annotations

import pytest
import torch
from cases import contents, differences, keeping
from torch import nn

pytest.importorskip("accelerate")
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from torch.utils.data import DataLoader, TensorDataset

import emonavi
from emonavi import EmoFact, EmoLynx, EmoNavi

SIBLINGS = [EmoNavi, EmoFact, EmoLynx]
# Ten micro-batches in an epoch, so that with 4 in a window the last one has 2.
X = torch.randn(40, 4, generator=torch.Generator().manual_seed(1))
Y = torch.tanh(X @ torch.randn(4, 3, generator=torch.Generator().manual_seed(2)))


def forget():
    """accelerate keeps one state in a process."""
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


@pytest.fixture(autouse=True)
def _own_state():
    forget()
    yield
    forget()


class Loop:
    """A training loop as accelerate's examples have it, with the losses worked out a second time by hand."""

    def __init__(self, sibling=EmoNavi, accumulate=4, scaler=None, told=None, **options):
        forget()
        self.accelerator = Accelerator(cpu=True, gradient_accumulation_steps=accumulate)
        self.accelerator.scaler = scaler
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))
        self.inner = keeping(sibling)(model.parameters(), lr=1e-2, **options)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(self.inner, 20)
        loader = DataLoader(TensorDataset(X, Y), batch_size=4)
        self.model, self.optimizer, self.loader, self.schedule = self.accelerator.prepare(
            model, self.inner, loader, schedule
        )
        self.accumulate, self.told = accumulate, told
        self.true, self.felt = [], []

    def epoch(self, start=0, stop=10, before=None):
        window = 0.0
        for i, (x, y) in enumerate(self.loader):
            if not start <= i < stop:
                continue
            if before is not None:
                before(i)
            with self.accelerator.accumulate(self.model):
                loss = (self.model(x) - y).square().mean()
                window += float(loss.detach()) / self.accumulate
                self.accelerator.backward(loss)
                if self.told is not None:
                    self.told(self, loss.detach())
                self.optimizer.step()
                self.schedule.step()
                self.optimizer.zero_grad()
            if self.accelerator.sync_gradients:
                self.true.append(window)
                self.felt.append(self.inner.emotion.loss)
                window = 0.0

    def contents(self):
        return contents(self.inner)


@pytest.mark.parametrize("sibling", SIBLINGS)
def test_the_loss_arrives_and_a_partial_window_is_held(sibling):
    loop = Loop(sibling)
    loop.epoch(), loop.epoch()
    assert loop.inner.losses == pytest.approx(loop.true, rel=1e-6)
    # accelerate divides by the nominal count: the last two of an epoch are half a loss, and are not felt.
    felt = [loop.true[i] for i in (0, 1, 1, 3, 4, 4)]
    assert loop.felt == pytest.approx(felt, rel=1e-6)


def test_without_accumulation():
    loop = Loop(accumulate=1)
    loop.epoch()
    assert loop.inner.losses == pytest.approx(loop.true, rel=1e-6)
    assert len(loop.true) == 10


@pytest.mark.parametrize("sibling", SIBLINGS)
def test_under_loss_scaling(sibling):
    """accelerate makes no scaler on a CPU, so it is given torch's own, and steps through it as it does on a GPU."""
    loop = Loop(sibling, scaler=torch.amp.GradScaler("cpu", init_scale=4096.0))
    # The first prepare() bound the wrapper to the accelerator's scaler.
    assert loop.optimizer.scaler is loop.accelerator.scaler
    loop.epoch()
    assert loop.felt == pytest.approx([loop.true[i] for i in (0, 1, 1)], rel=1e-6)
    assert not loop.optimizer.step_was_skipped


def test_an_overflow_under_loss_scaling_leaves_nothing_behind():
    def poison(loop, loss):
        if not loop.true:
            loop.model[0].weight.grad.fill_(torch.inf)

    loop = Loop(scaler=torch.amp.GradScaler("cpu", init_scale=1024.0), told=poison)
    loop.epoch(stop=4)
    assert loop.optimizer.step_was_skipped
    assert loop.inner.emotion.steps == 0
    loop.epoch(start=4, stop=8)
    assert loop.inner.emotion.loss == pytest.approx(loop.true[1], rel=1e-6)


def test_bf16():
    accelerator = Accelerator(cpu=True, mixed_precision="bf16")
    torch.manual_seed(0)
    model, optimizer = accelerator.prepare(nn.Linear(4, 3), EmoNavi(nn.Linear(1, 1).parameters()))
    optimizer.optimizer.add_param_group({"params": list(model.parameters())})
    for i in range(3):
        loss = (model(X[i::3]).float() - Y[i::3]).square().mean()
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        assert optimizer.optimizer.emotion.loss == pytest.approx(float(loss.detach()), rel=1e-6)


@pytest.mark.parametrize("scaled", [False, True], ids=["plain", "scaler"])
def test_observe_through_the_wrapper(scaled):
    """What is told outright, the mean over the window, comes before what was heard."""
    scaler = torch.amp.GradScaler("cpu", init_scale=256.0) if scaled else None
    loop = Loop(told=lambda loop, loss: emonavi.observe(loop.optimizer, 100 + loss), scaler=scaler)
    loop.epoch()
    # Two of two are a whole mean: nothing has to be held.
    wholes = [100 + loop.true[0], 100 + loop.true[1], 100 + 2 * loop.true[2]]
    assert loop.felt == pytest.approx(wholes, rel=1e-6)


def test_a_closure_through_the_wrapper():
    accelerator = Accelerator(cpu=True)
    torch.manual_seed(0)
    model = nn.Linear(4, 3)
    model, optimizer = accelerator.prepare(model, EmoNavi(model.parameters()))
    loss = (model(X) - Y).square().mean()
    accelerator.backward(loss)
    optimizer.step(lambda: 7.0)
    assert optimizer.optimizer.emotion.loss == 7.0


# Resuming -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scaled", [False, True], ids=["plain", "scaler"])
@pytest.mark.parametrize("sibling", SIBLINGS)
def test_a_resumed_run_is_the_uninterrupted_one(sibling, scaled, tmp_path):
    def loop():
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0) if scaled else None
        return Loop(sibling, use_shadow=True, scaler=scaler)

    whole = loop()
    whole.epoch(), whole.epoch()
    saving = loop()
    saving.epoch()
    saving.accelerator.save_state(tmp_path)  # read back with weights_only=True
    again = loop()
    again.accelerator.load_state(tmp_path)
    again.epoch()
    assert differences(whole.contents(), again.contents()) == []
    assert again.felt == whole.felt[3:]
    # The comparison can fail: the parameters alone are not enough.
    without = loop()
    without.model.load_state_dict(saving.model.state_dict())
    without.epoch()
    assert "group 0: emotion" in differences(whole.contents(), without.contents())


def test_a_checkpoint_in_the_middle_of_a_window(tmp_path):
    """Saving there disturbs nothing; gradients are in no checkpoint, so a resumed run does the window again."""
    whole = Loop()
    whole.epoch()
    saving = Loop()
    saving.epoch(before=lambda i: saving.accelerator.save_state(tmp_path) if i == 6 else None)
    assert differences(whole.contents(), saving.contents()) == []
    assert saving.inner.losses == whole.inner.losses
    again = Loop()
    again.accelerator.load_state(tmp_path)
    again.accelerator.step = 4  # the count of micro-batches is in the checkpoint: back to where the window began
    again.epoch(start=4)
    assert differences(whole.contents(), again.contents()) == []
    assert again.felt == whole.felt[1:]


def test_loading_in_the_middle_of_a_window_forgets_what_was_heard(tmp_path):
    loop = Loop()
    loop.epoch(stop=4)
    loop.accelerator.save_state(tmp_path)
    loop.epoch(start=4, stop=6)
    loop.accelerator.load_state(tmp_path)
    for p in loop.model.parameters():
        p.grad = None
    loop.accelerator.step = 4
    loop.epoch(start=4)
    assert loop.inner.losses[1:2] == pytest.approx(loop.true[1:2], rel=1e-6)


def test_preparing_is_no_loading():
    """prepare() loads the fresh state into the optimizer once; it must count for nothing."""
    loop = Loop()
    assert loop.inner.emotion.steps == 0
    assert loop.inner.effective_lr == [1e-2]
