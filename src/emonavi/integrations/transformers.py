"""Hugging Face Trainer: the optimizer from TrainingArguments, and what it feels in the Trainer's own log.

::

    how = optimizer_cls_and_kwargs("emonavi", args)
    trainer = Trainer(model, args, train_dataset=data, optimizer_cls_and_kwargs=how)
    EmotionCallback().attach(trainer)
"""

from __future__ import annotations

import re
import warnings
from typing import Any

from emonavi.intake import listening, unwrapped
from emonavi.integrations import missing, readings
from emonavi.optimizer import EmoOptimizer
from emonavi.registry import named

try:
    from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
except ModuleNotFoundError as error:
    raise missing(__name__, "transformers") from error

__all__ = ["EmotionCallback", "optimizer_cls_and_kwargs"]

_ADAMS_BETAS = (0.9, 0.999)


def optimizer_cls_and_kwargs(
    name_or_cls: str | type[EmoOptimizer], args: TrainingArguments, **options: Any
) -> tuple[type[EmoOptimizer], dict[str, Any]]:
    """What ``Trainer(optimizer_cls_and_kwargs=...)`` takes, with lr, betas, eps and weight decay from the arguments.

    ``args.optim_args`` ("use_shadow=True, max_norm=0.0") comes before those, and ``options`` before both. Where the
    arguments hold Adam's betas, which are their default, the sibling's own count.

    Args:
        name_or_cls: a sibling, or its name.
        args: the Trainer's arguments.
        options: the sibling's.

    Raises:
        ValueError: there is no sibling of that name, or ``optim_args`` is not ``name=value, ...``.

    Example:
        >>> args = TrainingArguments("out", learning_rate=1e-4, optim_args="max_norm=0.0", report_to="none")
        >>> cls, kwargs = optimizer_cls_and_kwargs("emolynx", args, use_shadow=True)
        >>> cls.__name__, kwargs["lr"], kwargs["max_norm"], kwargs["use_shadow"]
        ('EmoLynx', 0.0001, '0.0', True)
    """
    cls = named(name_or_cls).cls if isinstance(name_or_cls, str) else name_or_cls
    kwargs: dict[str, Any] = {"lr": args.learning_rate, "eps": args.adam_epsilon, "weight_decay": args.weight_decay}
    betas = (args.adam_beta1, args.adam_beta2)
    if betas != _ADAMS_BETAS:
        kwargs["betas"] = betas
    return cls, {**kwargs, **_spelled_out(args.optim_args), **options}


def _spelled_out(optim_args: str | None) -> dict[str, str]:
    # A comma inside betas=(0.9, 0.99) ends nothing.
    parts = re.split(r",(?=\s*\w+\s*=)|,\s*$", optim_args or "")
    pairs = [part.partition("=") for part in parts if part.strip()]
    if not all(name.strip() and equals for name, equals, _ in pairs):
        raise ValueError(f"optim_args={optim_args!r}: write it as 'name=value, name=value'")
    return {name.strip(): value.strip().strip("'\"") for name, _, value in pairs}


class EmotionCallback(TrainerCallback):
    """Logs what the optimizer feels wherever the Trainer reports to, at each of its logging steps.

    Callbacks of the user run after those that report to TensorBoard, W&B or MLflow, too late to add to what these
    get. :meth:`attach` puts this one before them. In ``Trainer(callbacks=[...])`` it reaches the log history and the
    console only, and says so. Under a schedule the effective lr is that of the step to come.

    Where the optimizer has a shadow, which the Trainer evaluates by itself, the model has it at the end of the training
    as well.

    Args:
        stop: end the training once ``optimizer.should_stop``; looked at after each step, which waits for the device.
    """

    def __init__(self, stop: bool = False) -> None:
        self.stop = stop
        self._comes_first = False

    def attach(self, trainer: Trainer) -> EmotionCallback:
        """Put it before the Trainer's other callbacks."""
        trainer.callback_handler.callbacks.insert(0, self)
        self._comes_first = True
        return self

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Look whether there is an emonavi optimizer."""
        try:
            listening(kwargs["optimizer"])
        except TypeError:
            name = type(unwrapped(kwargs["optimizer"])).__name__
            raise TypeError(
                f"EmotionCallback has nothing to log: {name} is not an emonavi optimizer; give the Trainer "
                'optimizer_cls_and_kwargs=optimizer_cls_and_kwargs("emonavi", args), or optimizers=(an emonavi '
                "optimizer, None)"
            ) from None
        if args.report_to and not self._comes_first:
            warnings.warn(
                f"EmotionCallback in callbacks=[...] runs after the reports to {', '.join(args.report_to)}, which "
                "get nothing from it: use EmotionCallback().attach(trainer) instead",
                stacklevel=2,
            )

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Add to the logs of training; those of evaluation stay as they are."""
        logs = kwargs["logs"]
        if "loss" in logs and kwargs.get("optimizer") is not None:  # a Trainer that has not trained has none
            felt = readings(kwargs["optimizer"])
            logs.update(felt)
            state.log_history[-1].update(felt)

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Go on with the weights that train: a Trainer with a step of its own may not do so."""
        listening(kwargs["optimizer"]).train()

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Leave the model with the shadow."""
        listening(kwargs["optimizer"]).eval()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Stop where it was asked for."""
        if self.stop and listening(kwargs["optimizer"]).should_stop:
            control.should_training_stop = True
