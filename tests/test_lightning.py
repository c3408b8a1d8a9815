"""Lightning and Fabric: the loss arrives in every precision and mode, runs resume exactly, and the loggers show it."""

from __future__ import annotations

import math

import pytest
import torch
from cases import contents, differences, keeping
from torch import nn

pytest.importorskip("lightning")
from lightning.fabric import Fabric
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import LearningRateMonitor, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.loggers.logger import DummyLogger
from lightning.pytorch.plugins.precision import MixedPrecision
from torch.utils.data import DataLoader, TensorDataset

import emonavi
from emonavi import EmoFact, EmoLynx, EmoNavi
from emonavi.integrations.lightning import EmotionCallback

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:lightning", "ignore::FutureWarning")
# Ten batches an epoch: with 4 accumulated the last window has 2.
X = torch.randn(40, 4, generator=torch.Generator().manual_seed(1))
Y = torch.tanh(X @ torch.randn(4, 3, generator=torch.Generator().manual_seed(2)))


class Net(LightningModule):
    """Keeps the loss of each batch as the model gives it."""

    def __init__(self, sibling=EmoNavi, **options):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))
        self.sibling, self.how = sibling, options
        self.true, self.felt = [], []

    def loss(self, batch):
        x, y = batch
        loss = (self.net(x).float() - y).square().mean()
        self.true.append(float(loss.detach()))
        return loss

    def training_step(self, batch, batch_idx):
        return self.loss(batch)

    def on_train_batch_end(self, *_):
        self.felt.append(self.inner.emotion.loss)

    def configure_optimizers(self):
        self.inner = keeping(self.sibling)(self.parameters(), lr=1e-2, **self.how)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(self.inner, 40)
        return [self.inner], [{"scheduler": schedule, "interval": "step"}]


def fit(model, folder, epochs=1, ckpt_path=None, **settings):
    how = {
        "accelerator": "cpu", "devices": 1, "logger": False, "enable_checkpointing": False,
        "enable_model_summary": False, "enable_progress_bar": False, "default_root_dir": str(folder),
        "max_epochs": epochs,
    }  # fmt: skip
    trainer = Trainer(**how | settings)
    loader = DataLoader(TensorDataset(X, Y), batch_size=4)
    trainer.fit(model, loader, ckpt_path=ckpt_path)
    return trainer


# The loss -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "64-true"])
@pytest.mark.parametrize("sibling", [EmoNavi, EmoFact, EmoLynx])
def test_the_loss_arrives(sibling, precision, tmp_path):
    model = Net(sibling)
    fit(model, tmp_path, precision=precision)
    assert len(model.true) == 10
    assert model.inner.losses == pytest.approx(model.true, rel=1e-6)
    assert model.felt == pytest.approx(model.true, rel=1e-6)


def half():
    """16-mixed on a CPU, where the Trainer would turn it into bf16: the plugin itself is given, with torch's scaler."""
    return {"plugins": [MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=1024.0))]}


def test_16_mixed(tmp_path):
    """Lightning calls no closure of ours here, and gives its own hooks the scaled loss: capture hears the true one."""
    seen = []

    class Hooked(Net):
        def on_before_backward(self, loss):
            seen.append(float(loss.detach()))

    model = Hooked()
    fit(model, tmp_path, **half())
    assert seen[0] == pytest.approx(1024 * model.true[0], rel=1e-3)
    assert model.inner.losses == pytest.approx(model.true, rel=1e-6)


@pytest.mark.parametrize("scaled", [False, True], ids=["fp32", "16-mixed"])
def test_accumulation_with_a_partial_last_window(scaled, tmp_path):
    model = Net()
    fit(model, tmp_path, epochs=2, accumulate_grad_batches=4, **(half() if scaled else {}))
    windows = [sum(model.true[i:j]) / 4 for i, j in ((0, 4), (4, 8), (8, 10), (10, 14), (14, 18), (18, 20))]
    if scaled:  # without a closure step() returns what was heard; else what Lightning's closure gave: the last part
        assert model.inner.losses == pytest.approx(windows, rel=1e-6)
    ends = [model.felt[i] for i in (3, 7, 9, 13, 17, 19)]
    assert ends == pytest.approx([windows[i] for i in (0, 1, 1, 3, 4, 4)], rel=1e-6)


class Manual(Net):
    automatic_optimization = False

    def __init__(self, way):
        super().__init__()
        self.automatic_optimization = False
        self.way = way

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()
        loss = self.loss(batch)
        optimizer.zero_grad()
        self.manual_backward(loss)
        self.way(optimizer, loss.detach())


MANUAL = {
    "bare": (lambda optimizer, loss: optimizer.step(), 0),
    "loss": (lambda optimizer, loss: optimizer.step(loss=100 + loss), 100),
    "observe": (lambda optimizer, loss: (optimizer.observe(100 + loss), optimizer.step()), 100),
    "emonavi.observe": (lambda optimizer, loss: (emonavi.observe(optimizer, 100 + loss), optimizer.step()), 100),
}


@pytest.mark.parametrize("scaled", [False, True], ids=["fp32", "16-mixed"])
@pytest.mark.parametrize("way", MANUAL)
def test_manual_optimization(way, scaled, tmp_path):
    """What is told outright comes before what was heard; the bare step's closure returns None."""
    tell, more = MANUAL[way]
    model = Manual(tell)
    fit(model, tmp_path, **(half() if scaled else {}))
    assert model.felt == pytest.approx([more + loss for loss in model.true], rel=1e-6)


class Pair(LightningModule):
    """A GAN-like pair: two optimizers, of which each is to hear its own loss."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False
        torch.manual_seed(0)
        self.one, self.two = nn.Linear(4, 3), nn.Linear(3, 1)
        self.true, self.felt = [], []

    def training_step(self, batch, batch_idx):
        x, _ = batch
        losses = []
        for which, optimizer in enumerate(self.optimizers()):
            self.toggle_optimizer(optimizer)
            loss = (self.two(self.one(x)) - which).square().mean()
            optimizer.zero_grad()
            self.manual_backward(loss)
            optimizer.step()
            self.untoggle_optimizer(optimizer)
            losses.append(float(loss.detach()))
        self.true.append(losses)

    def on_train_batch_end(self, *_):
        self.felt.append([o.optimizer.emotion.loss for o in self.optimizers()])

    def configure_optimizers(self):
        return [EmoNavi(self.one.parameters()), EmoLynx(self.two.parameters())]


def test_two_optimizers_hear_their_own(tmp_path):
    model = Pair()
    fit(model, tmp_path)
    assert torch.tensor(model.felt) == pytest.approx(torch.tensor(model.true), rel=1e-6)


# Resuming -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scaled", [False, True], ids=["fp32", "16-mixed"])
@pytest.mark.parametrize("sibling", [EmoNavi, EmoFact, EmoLynx])
def test_a_resumed_run_is_the_uninterrupted_one(sibling, scaled, tmp_path):
    def run(epochs, ckpt_path=None):
        model = Net(sibling, use_shadow=True)
        how = half() if scaled else {}
        return model, fit(model, tmp_path, epochs, ckpt_path, accumulate_grad_batches=4, **how)

    whole, _ = run(2)
    first, trainer = run(1)
    trainer.save_checkpoint(tmp_path / "half.ckpt")  # read back with weights_only=True
    again, _ = run(2, str(tmp_path / "half.ckpt"))
    assert differences(contents(whole.inner), contents(again.inner)) == []
    assert again.inner.losses == whole.inner.losses[3:]
    # The comparison can fail: without the optimizer's part it is another run.
    checkpoint = torch.load(tmp_path / "half.ckpt", weights_only=True)
    fresh = keeping(sibling)(first.parameters(), lr=1e-2, use_shadow=True)
    torch.save(checkpoint | {"optimizer_states": [fresh.state_dict()]}, tmp_path / "half.ckpt")
    without, _ = run(2, str(tmp_path / "half.ckpt"))
    assert "group 0: emotion" in differences(contents(whole.inner), contents(without.inner))


# The shadow -----------------------------------------------------------------------------------------------------------


class Validated(Net):
    """Keeps what each validation saw."""

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.seen = []

    def validation_step(self, batch, batch_idx):
        state = self.inner.state
        shadows = [state[p]["shadow"] for p in self.net.parameters() if "shadow" in state.get(p, {})]
        self.seen.append([torch.equal(p, s) for p, s in zip(self.net.parameters(), shadows, strict=bool(shadows))])


def validated(folder, epochs, ckpt_path=None, bridge=True, **settings):
    """Validates after every fifth batch, and saves then."""
    model = Validated(use_shadow=True)
    saving = ModelCheckpoint(folder, "{step}", monitor=None, save_top_k=-1, save_on_train_epoch_end=False)
    how = {"enable_checkpointing": True, "val_check_interval": 5, "callbacks": [saving]}
    how["callbacks"] += [EmotionCallback()] if bridge else []
    model.val_dataloader = lambda: DataLoader(TensorDataset(X, Y), batch_size=40)
    return model, fit(model, folder, epochs, ckpt_path, **how | settings)


def test_the_shadow_is_validated_and_saved(tmp_path):
    model, trainer = validated(tmp_path, 2)
    assert model.seen[1:] == [[True] * 4] * 4
    assert not any(model.seen[0])  # the check before the first step: there is no shadow yet
    saved = torch.load(tmp_path / "step=15.ckpt", weights_only=True)
    kept = saved["optimizer_states"][0]["state"]
    assert all(torch.equal(p, kept[i]["shadow"]) for i, p in enumerate(saved["state_dict"].values()))
    plain = Net(use_shadow=True)
    fit(plain, tmp_path, 2)
    model.inner.train()
    assert differences(contents(plain.inner), contents(model.inner)) == []  # validation is no part of the run
    assert trainer.global_step == 20


@pytest.mark.parametrize("bridge", [True, False], ids=["with", "without"])
def test_a_run_resumes_exactly_from_a_saved_shadow(bridge, tmp_path):
    """Without the callback too: Lightning's steps evaluate the model themselves."""
    whole, _ = validated(tmp_path, 2)
    again, _ = validated(tmp_path / "again", 2, str(tmp_path / "step=10.ckpt"), bridge)
    for model in (whole, again):
        model.inner.train()
    assert differences(contents(whole.inner), contents(again.inner)) == []


def test_a_fit_ends_with_the_shadow(tmp_path):
    """Also without a validation. That of another model leaves the trained one alone."""
    model, other = Net(use_shadow=True), Validated()
    trainer = fit(model, tmp_path, callbacks=[EmotionCallback()])
    other.inner, params = model.inner, list(model.net.parameters())
    assert all(torch.equal(p, model.inner.state[p]["shadow"]) for p in params)
    model.inner.train()
    trainer.validate(other, DataLoader(TensorDataset(X, Y), batch_size=40), verbose=False)
    assert not any(torch.equal(p, model.inner.state[p]["shadow"]) for p in params)


# Fabric ---------------------------------------------------------------------------------------------------------------

FABRIC = {
    "bare": (lambda optimizer, loss: optimizer.step(), 0),
    "closure": (lambda optimizer, loss: optimizer.step(lambda: 100 + loss), 100),
    "observe": (lambda optimizer, loss: (optimizer.observe(100 + loss), optimizer.step()), 100),
    "emonavi.observe": (lambda optimizer, loss: (emonavi.observe(optimizer, 100 + loss), optimizer.step()), 100),
}


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize("way", FABRIC)
def test_fabric(way, precision):
    fabric = Fabric(accelerator="cpu", devices=1, precision=precision)
    torch.manual_seed(0)
    net = nn.Linear(4, 3)
    inner = EmoNavi(net.parameters(), lr=1e-2)
    model, optimizer = fabric.setup(net, inner)
    tell, more = FABRIC[way]
    for i in range(4):
        loss = (model(X[i::4]).float() - Y[i::4]).square().mean()
        optimizer.zero_grad()
        fabric.backward(loss)
        tell(optimizer, loss.detach())
        assert inner.emotion.loss == pytest.approx(more + float(loss.detach()), rel=1e-6)
    assert inner.emotion.steps == 4


def test_fabric_resumes_exactly(tmp_path):
    def run(start, stop, load=None, save=None):
        fabric = Fabric(accelerator="cpu", devices=1)
        torch.manual_seed(0)
        net = nn.Linear(4, 3)
        inner = EmoNavi(net.parameters(), lr=1e-2, use_shadow=True)
        model, optimizer = fabric.setup(net, inner)
        state = {"model": model, "optimizer": optimizer}
        if load:
            fabric.load(load, state)
        for i in range(start, stop):
            optimizer.zero_grad()
            fabric.backward((model(X[i::8]) - Y[i::8]).square().mean())
            optimizer.step()
        if save:
            fabric.save(save, state)
        return contents(inner)

    run(0, 4, save=tmp_path / "state.ckpt")
    assert differences(run(0, 8), run(4, 8, load=tmp_path / "state.ckpt")) == []
    assert differences(run(0, 8), run(4, 8)) != []


# The integration ------------------------------------------------------------------------------------------------------


class Notebook(DummyLogger):
    def __init__(self):
        super().__init__()
        self.rows, self.steps = [], {}

    def log_metrics(self, metrics, step=None):
        if any(key.startswith("emo/") for key in metrics):
            self.rows.append((step, metrics))
        for key in metrics:
            self.steps.setdefault(key, []).append(step)


def test_the_emotion_reaches_the_loggers(tmp_path):
    model, one = Net(), Notebook()
    two = CSVLogger(str(tmp_path), name="csv", version=0)
    fit(model, tmp_path, callbacks=[EmotionCallback()], logger=[one, two], log_every_n_steps=5)
    assert [step for step, _ in one.rows] == [4, 9]
    last = one.rows[-1][1]
    assert last["emo/drive"] == model.inner.emotion.drive
    assert last["emo/lr/group_0"] == pytest.approx(model.inner.effective_lr[0])
    assert {"emo/scalar", "emo/trust"} <= last.keys()
    assert all(math.isfinite(value) for value in last.values())
    assert "emo/scalar" in (tmp_path / "csv/version_0/metrics.csv").read_text()


def test_nothing_is_logged_inside_an_accumulation_window(tmp_path):
    notebook = Notebook()
    how = {"logger": notebook, "log_every_n_steps": 1, "accumulate_grad_batches": 4}
    fit(Net(), tmp_path, callbacks=[EmotionCallback()], **how)
    assert [step for step, _ in notebook.rows] == [0, 1, 2]


def test_each_of_several_has_its_own_tags(tmp_path):
    model, notebook = Pair(), Notebook()
    fit(model, tmp_path, callbacks=[EmotionCallback()], logger=notebook, log_every_n_steps=5)
    assert [step for step, _ in notebook.rows] == [4, 9]  # of batches, with two steps in each
    one, two = model.optimizers()
    last = notebook.rows[-1][1]
    assert last["emo/drive"] == one.optimizer.emotion.drive
    assert last["emo/1/drive"] == two.optimizer.emotion.drive


class Logged(Net):
    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        self.log("train_loss", loss)
        return loss


class LoggedPair(Pair):
    """Steps in every other batch only."""

    def training_step(self, batch, batch_idx):
        if batch_idx % 2 == 0:
            super().training_step(batch, batch_idx)
        self.log("train_loss", self.true[-1][0])


@pytest.mark.parametrize("kind, accumulated", [(Logged, 1), (Logged, 4), (LoggedPair, 1)])
@pytest.mark.parametrize("every", [1, 2, 4])
def test_the_emotion_is_logged_where_the_losses_are(kind, accumulated, every, tmp_path):
    notebook = Notebook()
    callbacks = [EmotionCallback(), LearningRateMonitor()] if accumulated == 1 else [EmotionCallback()]
    how = {"logger": notebook, "log_every_n_steps": every, "accumulate_grad_batches": accumulated}
    fit(kind(), tmp_path, epochs=2, callbacks=callbacks, **how)
    steps = {key: at for key, at in notebook.steps.items() if key == "train_loss" or key.startswith(("emo/", "lr-"))}
    whole = 20 if accumulated == 1 else 6
    assert steps["emo/drive"] == steps["train_loss"] == list(range(every - 1, whole, every))
    assert len(steps) > 3
    # LearningRateMonitor also looks at the beginning of an epoch, which is no concern of ours.
    assert all(set(steps["emo/drive"]) <= set(at) for at in steps.values())


def test_a_resumed_run_goes_on_along_the_same_axis(tmp_path):
    first, again = Notebook(), Notebook()
    trainer = fit(Logged(), tmp_path, callbacks=[EmotionCallback()], logger=first, log_every_n_steps=4)
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    callbacks, last = [EmotionCallback()], str(tmp_path / "half.ckpt")
    fit(Logged(), tmp_path, 2, last, callbacks=callbacks, logger=again, log_every_n_steps=4)
    assert [first.steps[key] for key in ("emo/drive", "train_loss")] == [[3, 7]] * 2
    assert [again.steps[key] for key in ("emo/drive", "train_loss")] == [[11, 15, 19]] * 2


def test_it_stops_where_it_was_asked_to(tmp_path):
    class Done(EmoNavi):
        @property
        def should_stop(self):
            return self.emotion.steps >= 3

    for stop, steps in ((True, 3), (False, 10)):
        notebook = Notebook()
        how = {"logger": notebook, "log_every_n_steps": 10}
        trainer = fit(Logged(Done), tmp_path, callbacks=[EmotionCallback(stop=stop)], **how)
        assert trainer.global_step == steps
        # Lightning logs the losses of the batch at which it is told to stop.
        assert notebook.steps["emo/drive"] == notebook.steps["train_loss"] == [steps - 1]


def test_another_optimizer_is_refused(tmp_path):
    class Other(Net):
        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=1e-3)

    with pytest.raises(TypeError, match=r"among SGD: return one in configure_optimizers"):
        fit(Other(), tmp_path, callbacks=[EmotionCallback()])
