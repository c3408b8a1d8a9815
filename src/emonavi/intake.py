"""Which loss counts: told, observed, returned by a closure, or heard at backward (``capture.py``).

A loss that the user gives comes before one that was heard, and the two are never added. Nothing here waits for a
device: a loss stays a tensor.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from emonavi.distributed import is_piece, is_sharded, local
from emonavi.machine import Loss
from emonavi.scalars import widest

__all__ = ["Intake", "Mark", "listening", "observe", "unwrapped"]


class Mark(NamedTuple):
    """State of an intake before a backward."""

    captured: Tensor | None
    window: int
    seen: bool
    gradients: list[tuple[Tensor | None, int]]  # each with its version; empty if there are none
    steps: int
    freed: int


class Intake:
    """The pending losses of one optimizer.

    Args:
        params: returns the optimizer's parameters; called at each backward, since groups may be added later.
    """

    def __init__(self, params: Callable[[], Iterable[Tensor]]) -> None:
        self._params = params
        self._observed: list[Tensor | float] = []
        self._captured: Tensor | None = None
        self._window = 0
        self._seen = False  # whether a backward of the window has left a gradient
        self._heard = 0  # backward calls ever
        self._steps = 0  # that used the pending loss
        self.releases = False  # whether gradients are freed inside backward (``release.py``)
        self.freed = 0  # how many were, since the last step
        self.thread = threading.get_ident()  # in which the window began

    def observe(self, loss: Tensor | float) -> None:
        """Keep a loss for the next step; several are averaged."""
        self._observed.append(_detached(loss))

    def hear(self, loss: Tensor) -> None:
        """Add a back-propagated loss to the window; if all gradients were cleared, begin a new window.

        Gradients of shards that never were there have not been cleared: FSDP2 keeps them to itself until it reduces.
        """
        cleared = self._window and not self.freed and all(p.grad is None for p in self._params())
        if cleared and (self._seen or not self.has_shards()):
            self.drop()
        self._captured = loss if self._captured is None else self._captured + loss.to(self._captured.device)
        self._window += 1
        self._heard += 1

    def mark(self) -> Mark:
        """Note what is pending, and the gradients, before a backward."""
        grads = [p.grad for p in self._params()]
        there = [(g, _version(g)) for g in grads] if any(g is not None for g in grads) else []
        return Mark(self._captured, self._window, self._seen, there, self._steps, self.freed)

    def touched(self, since: Mark) -> bool:
        """Whether a backward changed the gradients, as far as can be seen.

        Gradients that are None before and after count as changed: a hook may have used and freed them.
        """
        if self._steps != since.steps or self.freed != since.freed:
            return True
        self._seen = self._seen or any(p.grad is not None for p in self._params())
        if not since.gradients:
            return not self.releases
        # One that changed is enough, and most often it is the first.
        grads = (p.grad for p in self._params())
        same = all(
            now is before and _version(now) == version
            for now, (before, version) in zip(grads, since.gradients, strict=False)
        )
        return not same or all(p.grad is None for p in self._params())

    def undo(self, to: Mark) -> None:
        """Restore the window saved by :meth:`mark`."""
        self._captured, self._window, self._seen = to.captured, to.window, to.seen

    def owned(self, variables: set[int]) -> set[int]:
        """Those of these leaves (by id) that are parameters."""
        return variables.intersection(id(p) for p in self._params())

    def has_shards(self) -> bool:
        """Whether a parameter may be sharded by FSDP, which differentiates a copy of it."""
        return any(is_sharded(p) or is_piece(p) for p in self._params())

    def take(self, told: Tensor | float | None, closure: Callable[[], Any] | None) -> tuple[Loss | None, Any]:
        """The loss that counts for this step, and what ``step()`` returns."""
        outright = None if told is None else Loss(_detached(told))
        before, returned = self._heard, None
        if closure is not None and not callable(closure):
            raise TypeError("step() takes a loss by its name: step(loss=loss); what may come without one is a closure")
        if closure is not None:
            with torch.enable_grad():
                returned = closure()
        if outright is not None:
            # A closure that returns None is fine: Lightning's manual optimization passes one that runs its hooks.
            if returned is not None:
                raise ValueError("step() got both a closure and loss=: pass the one that should count")
            return outright, told
        if self._observed:
            mean = _mean_of_finite(self._observed)
            return Loss(mean), mean
        ran_backward = self._captured is not None and self._heard != before
        if closure is not None and returned is not None and not ran_backward:
            return Loss(_detached(returned)), returned
        if self._captured is not None:
            return Loss(self._captured, self._window), self._captured if returned is None else returned
        return None, returned

    def clear(self) -> None:
        """Forget everything pending: a step has used it."""
        self._observed.clear()
        self.drop()
        self._steps += 1

    def drop(self) -> None:
        """Forget what was heard: its gradients are gone."""
        self._captured, self._window, self._seen, self.freed = None, 0, False, 0
        self.thread = threading.get_ident()


def _version(grad: Tensor | None) -> int:
    """How often a gradient was written to. FSDP2 adds to the local part of a DTensor."""
    return 0 if grad is None else local(grad)._version


def _detached(loss: Tensor | float) -> Tensor | float:
    """A loss as a float or a 0-d copy; ValueError unless it is one real number."""
    if not isinstance(loss, Tensor):
        given: Any = loss
        try:
            return float(given.item() if getattr(given, "size", 0) == 1 else given)  # numpy's may have dims
        except (OverflowError, TypeError, ValueError) as error:
            raise ValueError(f"a loss must be one real number, got {loss!r}") from error
    if loss.numel() != 1 or loss.is_complex():
        what = f"a tensor of shape {tuple(loss.shape)}, {loss.dtype}"
        raise ValueError(f"a loss must be one real number, got {what}: reduce it first, say by .mean()")
    return loss.detach().reshape(()).clone()


def _mean_of_finite(losses: Sequence[Tensor | float]) -> Tensor | float:
    """The mean of the finite losses; NaN where none is."""
    if len(losses) == 1:
        return losses[0]
    device = next((loss.device for loss in losses if isinstance(loss, Tensor)), torch.device("cpu"))
    stacked = torch.stack([torch.as_tensor(loss, device=device).to(widest(device)) for loss in losses])
    return stacked.where(stacked.isfinite(), torch.nan).nanmean()


# Attributes in which wrappers keep the optimizer: accelerate and many more; Lightning; timm's Lookahead; SAM; Opacus.
_WITHIN = ("optimizer", "_optimizer", "_base_optimizer", "base_optimizer", "original_optimizer")


def unwrapped(optimizer: Any) -> Any:
    """The optimizer at the bottom of a trainer's wrappers."""
    inner = optimizer
    for _ in range(8):  # nested wrappers; bounded, since a proxy may return itself
        below = next((vars(inner)[k] for k in _WITHIN if k in getattr(inner, "__dict__", {})), None)
        if below is None:
            break
        inner = below
    return inner


def observe(optimizer: Any, loss: Tensor | float) -> None:
    """Tell an optimizer, or a wrapper around one, the loss of its next step.

    ``AcceleratedOptimizer``, ``LightningOptimizer``, DeepSpeed, Lookahead, SAM and Opacus hold the real optimizer in an
    attribute; it is found there.

    Args:
        optimizer: an :class:`~emonavi.EmoOptimizer` or a wrapper around one.
        loss: a number or a tensor of one element.

    Raises:
        TypeError: nothing inside ``optimizer`` listens to a loss.

    Example:
        >>> import torch, emonavi
        >>> weight = torch.nn.Parameter(torch.ones(2))
        >>> optimizer = emonavi.EmoNavi([weight])
        >>> weight.grad = torch.ones(2)
        >>> emonavi.observe(optimizer, 0.25)
        >>> optimizer.step()
        0.25
    """
    listening(optimizer).observe(loss)


def listening(optimizer: Any) -> Any:
    """The emonavi optimizer that this is, or that it wraps.

    Raises:
        TypeError: there is none.
    """
    inner = unwrapped(optimizer)
    if not isinstance(getattr(inner, "_intake", None), Intake):
        # Name what is inside too: a user may not know the trainer's wrapper.
        around = "" if inner is optimizer else f" around {type(inner).__name__}"
        raise TypeError(
            f"{type(optimizer).__name__}{around} holds no optimizer that listens to a loss: pass the emonavi optimizer "
            "itself"
        )
    return inner
