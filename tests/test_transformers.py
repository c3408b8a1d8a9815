"""Hugging Face Trainer: the loss arrives unedited, runs resume exactly, and the Trainer's reports show the emotion."""

from __future__ import annotations

import itertools
import json
import re
import warnings
from pathlib import Path

import pytest
import torch
from cases import contents, differences, keeping

pytest.importorskip("transformers")
pytest.importorskip("accelerate")
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments

from emonavi import EmoFact, EmoLynx, EmoNavi
from emonavi.integrations.transformers import EmotionCallback, optimizer_cls_and_kwargs

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:torch.utils.data", "ignore::FutureWarning")
# 22 samples in batches of 2: eleven micro-batches, so that with 4 in a group the last group of an epoch has 3.
TOKENS = torch.randint(0, 32, (22, 9), generator=torch.Generator().manual_seed(3))
DATA = [{"input_ids": row, "labels": row} for row in TOKENS]


def llama():
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=32, max_position_embeddings=16, **sizes))


Told = keeping(EmoNavi)


class Witness(Trainer):
    """Keeps the loss of each micro-batch as the Trainer itself adds it up."""

    def training_step(self, *args, **kwargs):
        loss = super().training_step(*args, **kwargs)
        self.seen = [*getattr(self, "seen", []), float(loss)]
        return loss


def arguments(folder, **settings):
    how = {
        "per_device_train_batch_size": 2, "gradient_accumulation_steps": 4, "num_train_epochs": 2, "logging_steps": 1,
        "learning_rate": 1e-2, "save_strategy": "no", "report_to": [], "disable_tqdm": True, "use_cpu": True,
        "lr_scheduler_type": "cosine", "seed": 7,
    }  # fmt: skip
    return TrainingArguments(str(folder), **how | settings)


def trainer_of(folder, cls=Told, callbacks=(), kind=Witness, options=None, data=DATA, held_out=None, **settings):
    args = arguments(folder, **settings)
    how = optimizer_cls_and_kwargs(cls, args, **(options or {}))
    return kind(llama(), args, None, data, held_out, optimizer_cls_and_kwargs=how, callbacks=list(callbacks))


def inner(trainer):
    return trainer.optimizer.optimizer


def logged(trainer):
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def grouped(values, sizes):
    values = iter(values)
    return [sum(itertools.islice(values, size)) for size in sizes]


# The loss -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("average_tokens", [True, False], ids=["by tokens", "by batches"])
def test_the_heard_loss_is_the_logged_one(average_tokens, tmp_path):
    """With and without the division by the number of tokens, and in the partial group at the end of an epoch."""
    trainer = trainer_of(tmp_path)
    trainer.model_accepts_loss_kwargs = average_tokens
    trainer.train()
    heard = inner(trainer).losses
    assert len(heard) == 6
    assert heard == pytest.approx(logged(trainer), abs=1e-5)
    assert heard == pytest.approx(grouped(trainer.seen, [4, 4, 3] * 2), rel=1e-6)
    assert heard[0] == pytest.approx(3.5, abs=0.2)  # log 32: a mean, not a sum over four


def test_the_first_loss_is_the_models_own(tmp_path):
    """Independent of the Trainer's books: the mean over the tokens of the first group, worked out by hand."""
    trainer = trainer_of(tmp_path, max_steps=1, train_sampling_strategy="sequential")
    model = llama()
    rows = TOKENS[:8]
    logits = model(rows).logits[:, :-1]
    true = torch.nn.functional.cross_entropy(logits.reshape(-1, 32), rows[:, 1:].reshape(-1))
    trainer.train()
    assert inner(trainer).losses == pytest.approx([float(true.detach())], rel=1e-6)
    assert inner(trainer).emotion.loss == pytest.approx(float(true.detach()), rel=1e-6)


def test_a_partial_group_is_held(tmp_path):
    trainer = trainer_of(tmp_path)
    felt = []

    class Look(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            felt.append(kwargs["optimizer"].optimizer.emotion.loss)

    trainer.add_callback(Look())
    trainer.train()
    heard = inner(trainer).losses
    assert felt == pytest.approx([heard[0], heard[1], heard[1], heard[3], heard[4], heard[4]], rel=1e-6)


def test_bf16(tmp_path):
    trainer = trainer_of(tmp_path, bf16=True)
    trainer.train()
    assert inner(trainer).losses == pytest.approx(logged(trainer), rel=1e-5)


def test_clipping_and_checkpointing_leave_the_loss(tmp_path):
    plain = trainer_of(tmp_path, max_steps=1)
    plain.train()
    other = trainer_of(tmp_path, max_steps=1, max_grad_norm=1e-3, gradient_checkpointing=True)
    other.train()
    assert inner(other).losses == pytest.approx(inner(plain).losses, rel=1e-6)


# Resuming -------------------------------------------------------------------------------------------------------------


def everything(trainer):
    return contents(inner(trainer))


@pytest.mark.parametrize("at", [2, 3], ids=["inside an epoch", "between epochs"])
@pytest.mark.parametrize("cls", [EmoNavi, EmoFact, EmoLynx])
def test_a_resumed_run_is_the_uninterrupted_one(cls, at, tmp_path):
    options = {"use_shadow": True}
    whole = trainer_of(tmp_path, cls, options=options, save_strategy="steps", save_steps=at)
    whole.train()
    again = trainer_of(tmp_path, cls, options=options, save_strategy="no")
    again.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{at}"))
    assert differences(everything(whole), everything(again)) == []
    assert logged(again)[at:] == logged(whole)[at:]
    assert inner(again).emotion.steps == 6
    # The comparison can fail: without the optimizer's part of the checkpoint it is another run.
    (tmp_path / f"checkpoint-{at}" / "optimizer.pt").unlink()
    without = trainer_of(tmp_path, cls, options=options, save_strategy="no")
    without.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{at}"))
    assert differences(everything(whole), everything(without)) != []


@pytest.mark.parametrize("scheduler", ["written into", "as it is", "removed"])
def test_a_checkpoint_of_adamw(scheduler, tmp_path):
    """As docs/migrating.md has it; the other two ways are there so that it is known when they change."""
    before = arguments(tmp_path, save_strategy="steps", save_steps=2, max_steps=2, learning_rate=5e-5)
    Trainer(llama(), before, train_dataset=DATA).train()
    file = tmp_path / "checkpoint-2" / "scheduler.pt"
    if scheduler == "removed":
        file.unlink()
    if scheduler == "written into":
        page = (Path(__file__).parents[1] / "docs/migrating.md").read_text(encoding="utf-8")
        code = re.search(r"```python\n(file = .*?)```", page, re.S)[1]
        exec(code.replace("out/checkpoint-500/scheduler.pt", file.as_posix()), {"torch": torch})
    settings = {"learning_rate": 1e-3, "lr_scheduler_type": "constant", "max_steps": 3}
    trainer = trainer_of(tmp_path, EmoNavi, **settings)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.train(resume_from_checkpoint=str(file.parent))
    told = [str(w.message) for w in caught if "an optimizer without an emotion" in str(w.message)]
    steps = {float(state["step"]) for state in inner(trainer).state.values()}
    assert steps == ({1.0} if scheduler == "removed" else {3.0})  # with the memories, and without
    assert len(told) == (scheduler != "removed")
    assert all("a scheduler that is resumed as well puts its own lr back" in text for text in told)
    assert {g["lr"] for g in inner(trainer).param_groups} == {5e-5 if scheduler == "as it is" else 1e-3}


def test_a_save_at_every_step_changes_nothing(tmp_path):
    plain, saving = trainer_of(tmp_path / "a"), trainer_of(tmp_path / "b", save_strategy="steps", save_steps=1)
    plain.train(), saving.train()
    assert differences(everything(plain), everything(saving)) == []


# The shadow -----------------------------------------------------------------------------------------------------------


def shadowed(folder, cls=EmoNavi, callbacks=(), **settings):
    """Evaluates and saves every second of six steps."""
    how = {"eval_strategy": "steps", "eval_steps": 2, "save_strategy": "steps", "save_steps": 2, **settings}
    return trainer_of(folder, cls, callbacks, options={"use_shadow": True}, held_out=DATA[:6], **how)


def held_out(trainer):
    return [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]


def loss_of(state):
    model = llama()
    model.load_state_dict(state)
    rows = TOKENS[:6]
    with torch.no_grad():
        return float(model(rows, labels=rows).loss)


@pytest.mark.parametrize("cls", [EmoNavi, EmoLynx])
def test_the_trainer_evaluates_and_saves_the_shadow(cls, tmp_path):
    class Look(TrainerCallback):
        raw, calm = [], []

        def on_step_end(self, args, state, control, model, optimizer, **kwargs):
            self.raw.append(loss_of(model.state_dict()))
            with optimizer.optimizer.calm():
                self.calm.append(loss_of(model.state_dict()))

    trainer, look = shadowed(tmp_path, cls), Look()
    trainer.add_callback(look)
    trainer.train()
    assert held_out(trainer) == pytest.approx(look.calm[1::2], rel=1e-6)
    assert held_out(trainer) != pytest.approx(look.raw[1::2], rel=1e-6)
    for step in (2, 4, 6):
        saved = LlamaForCausalLM.from_pretrained(tmp_path / f"checkpoint-{step}").state_dict()
        assert loss_of(saved) == pytest.approx(look.calm[step - 1], rel=1e-6)
    plain = trainer_of(tmp_path / "plain", cls, options={"use_shadow": True})
    plain.train()
    inner(trainer).train()
    assert differences(everything(plain), everything(trainer)) == []  # evaluation is no part of the run


@pytest.mark.parametrize("at", [2, 4])
def test_a_run_resumes_exactly_from_a_saved_shadow(at, tmp_path):
    whole = shadowed(tmp_path)
    whole.train()
    again = shadowed(tmp_path, save_strategy="no")
    again.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{at}"))
    assert differences(everything(whole), everything(again)) == []
    assert held_out(again) == held_out(whole)
    assert logged(again) == logged(whole)


def test_the_best_weights_are_not_replaced_by_the_last_shadow(tmp_path):
    """The Trainer loads them at the end, and may evaluate them."""
    best = {"load_best_model_at_end": True, "metric_for_best_model": "eval_loss", "greater_is_better": True}
    trainer = shadowed(tmp_path, eval_steps=4, save_steps=4, **best)
    trainer.train()
    assert trainer.state.best_global_step == 4 < trainer.state.global_step
    assert trainer.evaluate()["eval_loss"] == pytest.approx(trainer.state.best_metric, rel=1e-6)
    trainer.save_model(tmp_path / "chosen")
    saved = [LlamaForCausalLM.from_pretrained(tmp_path / name).state_dict() for name in ("chosen", "checkpoint-4")]
    assert differences(*saved) == []


def test_the_best_weights_are_trained_on(tmp_path):
    """And not the last ones, which the evaluation before had put aside."""
    best = {"load_best_model_at_end": True, "metric_for_best_model": "eval_loss", "greater_is_better": True}
    trainer = shadowed(tmp_path, eval_steps=4, save_steps=4, **best)
    trainer.train()
    chosen = [p.detach().clone() for p in trainer.model.parameters()]

    class Look(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, model, **kwargs):
            self.seen = getattr(self, "seen", [p.detach().clone() for p in model.parameters()])

    look = Look()
    trainer.add_callback(look)
    with pytest.warns(UserWarning, match=r"since eval\(\): train\(\) leaves them as they are"):
        trainer.train()  # without an evaluation of them in between
    assert all(torch.equal(p, c) for p, c in zip(look.seen, chosen, strict=True))


def test_a_notebook_goes_on_from_a_checkpoint(tmp_path):
    trainer, other = shadowed(tmp_path), shadowed(tmp_path / "other", save_strategy="no")
    trainer.train()
    for each in (trainer, other):
        each.args.save_strategy = "no"
        each.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
        inner(each).train()
    assert differences(everything(trainer), everything(other)) == []


class Forgetful(Witness):
    """A step of its own, without ``optimizer.train()``."""

    def training_step(self, model, inputs, *args, **kwargs):
        loss = self.compute_loss(model.train(), inputs)
        self.accelerator.backward(loss)
        return loss.detach()


def test_a_trainer_with_a_step_of_its_own(tmp_path):
    """The callback lets it go on with the weights that train, and leaves the shadow at the end."""
    runs = []
    for strategy in ("steps", "no"):
        how = {"options": {"use_shadow": True}, "held_out": DATA[:6], "eval_strategy": strategy, "eval_steps": 2}
        trainer = trainer_of(tmp_path, EmoNavi, [EmotionCallback()], Forgetful, **how)
        trainer.train()
        assert all(torch.equal(p, inner(trainer).state[p]["shadow"]) for p in trainer.model.parameters())
        inner(trainer).train()
        runs.append(everything(trainer))
    assert differences(*runs) == []


def test_weights_that_were_loaded_are_evaluated_as_they_are(tmp_path):
    trainer = trainer_of(tmp_path, options={"use_shadow": True})
    trainer.train()
    trainer.model.load_state_dict(llama().state_dict())
    with pytest.warns(UserWarning, match="written to since the last step"):
        found = trainer.evaluate(DATA[:6])["eval_loss"]
    assert found == pytest.approx(loss_of(llama().state_dict()), rel=1e-6)


# The integration ------------------------------------------------------------------------------------------------------


def test_the_arguments_reach_the_optimizer(tmp_path):
    set_by_user = {"learning_rate": 3e-4, "adam_beta1": 0.8, "adam_epsilon": 1e-7, "weight_decay": 0.05}
    trainer = trainer_of(tmp_path, "emonavi", options={"use_shadow": "True"}, max_steps=1, **set_by_user)
    trainer.train()
    decay, no_decay = inner(trainer).param_groups
    assert (decay["betas"], decay["eps"], decay["weight_decay"]) == ((0.8, 0.999), 1e-7, 0.05)
    assert (decay["lr_start"], no_decay["weight_decay"], decay["use_shadow"]) == (3e-4, 0.0, True)


def test_adams_default_betas_are_not_lions(tmp_path):
    cls, kwargs = optimizer_cls_and_kwargs("EmoLynx", arguments(tmp_path))
    assert cls is EmoLynx
    assert cls(llama().parameters(), **kwargs).defaults["betas"] == (0.9, 0.99)
    _, kwargs = optimizer_cls_and_kwargs(EmoLynx, arguments(tmp_path, adam_beta2=0.95))
    assert cls(llama().parameters(), **kwargs).defaults["betas"] == (0.9, 0.95)


def test_optim_args_come_from_a_command_line(tmp_path):
    said = "use_shadow=True, betas=(0.9, 0.99),max_norm=0.0,emotion='adaptive', "
    args = arguments(tmp_path, optim_args=said, learning_rate=1e-4)
    cls, kwargs = optimizer_cls_and_kwargs("emonavi", args, max_norm=2.0)
    optimizer = cls(llama().parameters(), **kwargs)
    assert [optimizer.defaults[k] for k in ("lr", "use_shadow", "max_norm")] == [1e-4, True, 2.0]
    for bad in ("use_shadow", "=True"):
        with pytest.raises(ValueError, match=r"optim_args=.*name=value"):
            optimizer_cls_and_kwargs("emonavi", arguments(tmp_path, optim_args=bad))
    with pytest.raises(ValueError, match="no optimizer 'adamw'"):
        optimizer_cls_and_kwargs("adamw", args)


KEYS = ("emo/scalar", "emo/trust", "emo/drive", "emo/lr/group_0", "emo/lr/group_1")


def test_the_emotion_reaches_what_the_trainer_reports_to(tmp_path, monkeypatch):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "tb"))
    trainer = trainer_of(tmp_path, report_to=["tensorboard"])
    EmotionCallback().attach(trainer)
    readings = []

    class Look(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            optimizer = kwargs["optimizer"].optimizer
            readings.append((optimizer.emotion, optimizer.effective_lr))

    trainer.add_callback(Look())
    trainer.train()
    board = EventAccumulator(str(tmp_path / "tb")).Reload()
    for key in KEYS:
        assert [event.step for event in board.Scalars(f"train/{key}")] == [1, 2, 3, 4, 5, 6]
    drives = [event.value for event in board.Scalars("train/emo/drive")]
    assert drives == pytest.approx([felt.drive for felt, _ in readings], rel=1e-6)
    lrs = [event.value for event in board.Scalars("train/emo/lr/group_1")]
    assert lrs == pytest.approx([lr[1] for _, lr in readings], rel=1e-6)
    history = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert [entry["emo/scalar"] for entry in history] == pytest.approx([felt.scalar for felt, _ in readings])
    assert not any("emo/scalar" in entry for entry in trainer.state.log_history if "loss" not in entry)
    json.dumps(trainer.state.log_history)  # as a checkpoint writes it


def test_a_callback_that_comes_too_late_says_so(tmp_path, monkeypatch):
    pytest.importorskip("tensorboard")
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "tb"))
    trainer = trainer_of(tmp_path, callbacks=[EmotionCallback()], report_to=["tensorboard"], max_steps=1)
    with pytest.warns(UserWarning, match=r"tensorboard.*EmotionCallback\(\)\.attach\(trainer\)"):
        trainer.train()
    assert "emo/drive" in trainer.state.log_history[0]


def test_it_stops_where_it_was_asked_to(tmp_path):
    class Done(EmoNavi):
        @property
        def should_stop(self):
            return self.emotion.steps >= 3

    for stop, steps in ((True, 3), (False, 6)):
        trainer = trainer_of(tmp_path, Done, callbacks=[EmotionCallback(stop=stop)])
        trainer.train()
        assert trainer.state.global_step == steps


def test_another_optimizer_is_refused(tmp_path):
    trainer = Trainer(llama(), arguments(tmp_path), train_dataset=DATA, callbacks=[EmotionCallback()])
    remedy = r"optimizer_cls_and_kwargs=optimizer_cls_and_kwargs\(\"emonavi\", args\), or optimizers=\("
    with pytest.raises(TypeError, match=rf"AdamW is not an emonavi optimizer; give the Trainer {remedy}"):
        trainer.train()


def test_a_trainer_that_only_logs_is_left_alone(tmp_path):
    trainer = trainer_of(tmp_path, EmoNavi)
    EmotionCallback().attach(trainer)
    trainer.log({"loss": 1.0})
    assert [entry["loss"] for entry in trainer.state.log_history] == [1.0]
    assert "emo/drive" not in trainer.state.log_history[0]
