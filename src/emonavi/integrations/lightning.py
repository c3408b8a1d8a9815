"""Lightning: what the optimizers feel, in the Trainer's own loggers.

::

    trainer = Trainer(callbacks=[EmotionCallback(stop=True)])
"""

from __future__ import annotations

from typing import Any

from emonavi.intake import listening
from emonavi.integrations import missing, readings

try:
    from lightning.pytorch import Callback, LightningModule, Trainer
except ModuleNotFoundError as error:
    try:  # the same under its old name, which may be there alone
        from pytorch_lightning import Callback, LightningModule, Trainer  # type: ignore[assignment]
    except ModuleNotFoundError:
        raise missing(__name__, "lightning") from error

__all__ = ["EmotionCallback"]


class EmotionCallback(Callback):
    """Logs what each emonavi optimizer feels to the Trainer's loggers, on the steps on which the losses are logged.

    That is every ``log_every_n_steps`` batches, or windows of accumulated ones, from 0 on, however many optimizers step
    in each. Where there are several, the second's tags begin with ``emo/1/`` and so on; other optimizers are passed
    over. Under a schedule the effective lr is that of the step to come.

    Where they have a shadow, it is what is validated, what a ModelCheckpoint saves after that, with the weights that
    train in the optimizer's part, and what the model has at the end.

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

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Show the shadow."""
        for optimizer in _ours(trainer, pl_module):
            optimizer.eval()

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Go on with the weights that train. Not sooner: checkpoints are saved after the validation."""
        for optimizer in _ours(trainer):
            optimizer.train()

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """The same after a validation inside of an epoch."""
        self.on_train_epoch_start(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Leave the model with the shadow."""
        self.on_validation_start(trainer, pl_module)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Log, and stop where it was asked for; nothing inside an accumulation window."""
        before, self._step = self._step, trainer.global_step
        stepped = self._step > before
        if self.stop and stepped and all(o.should_stop for o in _ours(trainer)):
            trainer.should_stop = True
        # Lightning's losses go by batches: global_step counts each of several optimizers. In manual optimization any
        # batch may be their turn, whether it stepped or not.
        turn = stepped or not pl_module.automatic_optimization
        if turn and trainer._logger_connector.should_update_logs:
            felt = {
                tag if not i else tag.replace("emo/", f"emo/{i}/", 1): value
                for i, optimizer in enumerate(_ours(trainer))
                for tag, value in readings(optimizer).items()
            }
            for logger in trainer.loggers:
                # Counted up only after this hook: still the number of the batch that has just ended.
                logger.log_metrics(felt, step=trainer.fit_loop.epoch_loop._batches_that_stepped)


def _ours(trainer: Trainer, module: LightningModule | None = None) -> list[Any]:
    """Our optimizers, only those of a module if it is given: a Trainer may validate another one than it trained."""
    found = []
    for optimizer in trainer.optimizers:
        try:
            found.append(listening(optimizer))
        except TypeError:
            continue
    if module is None:
        return found
    own = set(module.parameters())
    return [o for o in found if any(p in own for g in o.param_groups for p in g["params"])]
