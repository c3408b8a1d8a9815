"""Lightning: what the optimizers feel, in the Trainer's own loggers.

::

    trainer = Trainer(callbacks=[EmotionCallback(stop=True)])
"""

from __future__ import annotations

from typing import Any

from emonavi.intake import listening
from emonavi.integrations import missing, readings

try:
    from lightning.pytorch import LightningModule, Trainer
    from lightning.pytorch.callbacks import Callback
except ModuleNotFoundError as error:
    raise missing(__name__, "lightning") from error

__all__ = ["EmotionCallback"]


class EmotionCallback(Callback):
    """Logs what each emonavi optimizer feels to the Trainer's loggers, every ``log_every_n_steps``.

    Where there are several, the second's tags begin with ``emo/1/`` and so on; other optimizers are passed over. Under
    a schedule the effective lr is that of the step to come.

    Args:
        stop: end the training once all of them say ``should_stop``; looked at after each step, which waits for the
            device. ``min_steps`` and ``min_epochs`` are kept.
    """

    def __init__(self, stop: bool = False) -> None:
        self.stop = stop
        self._step = 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Look whether there is an emonavi optimizer."""
        self._step = trainer.global_step
        if not _ours(trainer):
            names = ", ".join(type(o).__name__ for o in trainer.optimizers) or "none"
            raise TypeError(f"no optimizer that listens to a loss among {names}: return one in configure_optimizers()")

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Log, and stop where it was asked for; nothing inside an accumulation window."""
        # With several optimizers the step goes up by more than one in a batch, and may pass over the logging step.
        before, self._step = self._step, trainer.global_step
        every = getattr(trainer, "log_every_n_steps", 0)
        if every and self._step // every > before // every:
            felt = {
                tag if not i else tag.replace("emo/", f"emo/{i}/", 1): value
                for i, optimizer in enumerate(_ours(trainer))
                for tag, value in readings(optimizer).items()
            }
            for logger in trainer.loggers:
                logger.log_metrics(felt, step=self._step)
        if self.stop and self._step > before and all(o.should_stop for o in _ours(trainer)):
            trainer.should_stop = True


def _ours(trainer: Trainer) -> list[Any]:
    found = []
    for optimizer in trainer.optimizers:
        try:
            found.append(listening(optimizer))
        except TypeError:
            continue
    return found
