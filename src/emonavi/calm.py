"""Which weights the model has: those that train, or the shadow's in their place.

``calm()`` shows the shadow inside of a block, ``eval()`` until ``train()``, as trainers call them. The weights that
train are in the state then, and in checkpoints.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from emonavi import shadow
from emonavi.distributed import is_piece, is_sharded, reshard
from emonavi.notices import callers_level

__all__ = ["Calm"]

_ELSEWHERE = -1  # no sum of versions: the weights are known to be another's


class Calm(torch.optim.Optimizer):
    """Base of :class:`~emonavi.bearer.Bearer`, which says whether a run has begun."""

    def _setup(self, *settings: Any) -> None:
        self._is_calm = False  # whether the shadow stands in place of the weights
        self._blocks = 0  # of calm(), that are open
        # Versions of the parameters, to see whether anyone has written to them: of each that the shadow has replaced,
        # and of all as the optimizer left them, added up; empty and None where that is not known.
        self._shown: dict[Tensor, int] = {}
        self._left: int | None = None
        self._was_written = False  # when the shadow was put in their place

    @property
    def _begun(self) -> bool:
        """Hook: whether there was a step."""
        raise NotImplementedError

    def _prepare(self) -> None:
        """Hook: adopt groups added directly to the wrapped optimizer."""

    def _params(self) -> Iterator[Tensor]:
        return (p for g in self.param_groups for p in g["params"])

    @contextmanager
    def calm(self, model: nn.Module | None = None) -> Iterator[None]:
        """Put the shadow in place of the weights, for evaluation. The weights return at the end, also after an error.

        Before the first step the shadow equals the weights. The block holds a copy of the weights, which is in
        ``state_dict()`` as well. To keep the shadow, save or copy it inside the block. BatchNorm's statistics are not
        averaged: if a model has them, ``torch.optim.swa_utils.update_bn`` sets them from data.

        Args:
            model: a model under FSDP2 (``fully_shard``) or ``replicate()`` that is run inside the block. Both keep
                weights that they have gathered, those of the last evaluation say, and would go on with them; given the
                model, they gather anew at both ends of the block. Saving needs no model.

        Raises:
            RuntimeError: there is no shadow, or ``step()`` or ``reset_emotion()`` is called inside the block.
            ValueError: the model is under FSDP1, whose gathered weights cannot be dropped.

        Example:
            >>> import torch, emonavi
            >>> model = torch.nn.Linear(2, 1)
            >>> optimizer = emonavi.EmoNavi(model.parameters(), use_shadow=True)
            >>> model(torch.ones(4, 2)).sum().backward()
            >>> _ = optimizer.step()
            >>> with optimizer.calm():
            ...     evaluated = model(torch.ones(1, 2))
        """
        self._refuse_midway("calm()")
        self._settle()
        params, was_calm = self._shadowed(), self._is_calm
        wanted = self.param_groups[0]["use_shadow"]
        if not params and (self._begun or not wanted):
            remedy = (
                "the next step makes it"
                if wanted
                else "construct with use_shadow=True; in a run that was loaded, and brought its own options, set "
                "param_groups[0]['use_shadow'] = True and make a step"
            )
            raise RuntimeError(f"calm() has no shadow to show: {remedy}")
        if model is not None and any(is_piece(p) for p in params):
            raise ValueError(
                "calm(model) of a model under FSDP1, which may go on with weights that it gathered before: save inside "
                "calm() and evaluate what was saved, or shard with FSDP2's fully_shard()"
            )
        self._blocks += 1
        try:
            if not was_calm:
                self._show(params)
            reshard(model)
            yield
        finally:
            self._blocks -= 1
            if not was_calm:
                self._hide()
            reshard(model)

    def eval(self) -> None:
        """Put the shadow in place of the weights until :meth:`train`, as schedule-free optimizers do.

        Trainers that know those call both by themselves, Hugging Face's among them: they evaluate the shadow, and save
        it afterwards. The weights that train are in ``state_dict()`` then, so that a run resumes exactly. Elsewhere
        :meth:`calm` is safer, since it ends by itself.

        Nothing happens without a shadow, before the first step, where the shadow equals the weights, or inside of a
        block. Nor where the weights were written to since the last step, as when a trainer loads its best ones: the
        shadow is not theirs. Nor where they are sharded: the model would go on with weights that it gathered before,
        for which there is ``calm(model)``. A warning tells of the last two, but not where an ``eval()`` came between
        the step and the writing.

        Raises:
            RuntimeError: between backward and ``step()`` with gradients released.

        Example:
            >>> import torch, emonavi
            >>> model = torch.nn.Linear(2, 1)
            >>> optimizer = emonavi.EmoNavi(model.parameters(), use_shadow=True)
            >>> model(torch.ones(4, 2)).sum().backward()
            >>> _ = optimizer.step()
            >>> optimizer.eval()
            >>> evaluated = model(torch.ones(1, 2))
            >>> optimizer.train()
        """
        self._refuse_midway("eval()")
        self._settle()
        params = self._shadowed()
        if self._is_calm or not params or self._left == _ELSEWHERE:
            return
        if any(is_sharded(p) or is_piece(p) for p in params):
            what, remedy = "the weights are sharded", "evaluate inside calm(model)"
        elif self._is_written:
            what, remedy = "the weights were written to since the last step", "calm() shows the last step's shadow"
        else:
            self._show(params)
            return
        warnings.warn(f"{what}: eval() leaves them as they are; {remedy}", stacklevel=callers_level())

    def train(self) -> None:
        """Put back the weights that :meth:`eval` replaced; nothing happens where it replaced none, or inside a block.

        What was written to in between, as by a trainer that loads its best weights, stays, and a warning says so. A
        model whose forward pass writes to its weights (``nn.Embedding(max_norm=...)``) is evaluated inside
        :meth:`calm`.
        """
        if not self._blocks:
            self._go_on()

    def _go_on(self, stale: bool = False) -> None:
        """After eval(), go on with the weights that train; ``stale`` says that there is a gradient of the shadow's."""
        if not self._is_calm:
            return
        if not self._leave():
            what = "weights were written to since eval(): train() leaves them as they are"
            warnings.warn(f"{what}, and drops what trained in their place before", stacklevel=callers_level())
        elif stale:
            what = "step() after eval(), whose gradient is that of the shadow's weights: call train() before the"
            warnings.warn(f"{what} forward pass, also after a checkpoint that was saved so", stacklevel=callers_level())

    def _take_shown(self, held: Mapping[Tensor, Tensor]) -> None:
        """Go on with what a checkpoint shows, or the weights held; the model is loaded as well, before or after."""
        self._note_shown(self.param_groups[0].get("shown") == "shadow")
        if not self._is_calm:
            shadow.put_back(held)
        self._shown, self._left, self._was_written = {}, None, False

    @property
    def _is_written(self) -> bool:
        """Whether the weights were written to since the last step, as far as is known."""
        return self._left not in (None, shadow.versions(self.state))

    def _note_left(self) -> None:
        """The weights are as the optimizer leaves them, and the shadow is theirs."""
        self._left = shadow.versions(self.state) if self.param_groups[0].get("use_shadow") else None

    def _shadowed(self) -> list[Tensor]:
        """Parameters that have a shadow; none where it is switched off."""
        self._prepare()
        wanted = self.param_groups[0]["use_shadow"]
        return [p for p in self._params() if "shadow" in self.state.get(p, {})] if wanted else []

    def _show(self, params: list[Tensor]) -> None:
        """Put the shadow in place of the weights."""
        self._was_written = self._is_written
        self._note_shown(True)
        try:
            shadow.show(params, self.state)
        except BaseException:  # memory may run out
            self._hide()
            raise
        self._shown = {p: p._version for p in params}

    def _hide(self) -> None:
        """Put the weights back."""
        shadow.hide(self.state)
        self._shown = {}
        self._note_shown(False)
        if not self._was_written:
            self._note_left()

    def _is_shown(self, param: Tensor, by_value: bool = True) -> bool:
        """Whether the shadow is in a parameter's place, also if it was put back there by someone else."""
        state, version = self.state[param], self._shown.get(param)
        if param.shape != state["raw"].shape:
            return False
        if param._version == version:
            return True
        return (by_value or version is None) and shadow.is_shown(param, state)

    def _leave(self) -> bool:
        """Put the weights back, but leave those that were written to since. Returns whether none were."""
        written = [p for p in shadow.replaced(self.state) if not self._is_shown(p)]
        shadow.forget(written, self.state)
        self._was_written |= bool(written)
        self._hide()
        if written:
            self._left = _ELSEWHERE
        return not written

    def _settle(self) -> None:
        """After eval(), find out whether the shadow is still shown."""
        if self._is_calm and not self._blocks and not all(map(self._is_shown, shadow.replaced(self.state))):
            self._leave()

    def _held(self) -> dict[Tensor, Tensor]:
        """The weights that the shadow has replaced, but those that were written to since: a model was loaded."""
        return {p: self.state[p]["raw"] for p in shadow.replaced(self.state) if self._is_shown(p, by_value=False)}

    def _note_shown(self, is_calm: bool) -> None:
        """Also in the first group, for checkpoints: distributed ones keep only what is there from the beginning."""
        self._is_calm = is_calm
        self.param_groups[0]["shown"] = "shadow" if is_calm else "raw"

    def _refuse_inside_calm(self, what: str) -> None:
        if self._is_calm or self._blocks:
            where = "inside calm(): leave the block first" if self._blocks else "after eval(): call train() first"
            raise RuntimeError(f"{what} {where}; the weights are the shadow's")

    def _refuse_midway(self, what: str) -> None:
        """Hook: raise if a step is under way, so that the state is incomplete."""
