"""Which loss counts: told, observed, returned by a closure, or heard at backward.

Trainers call ``optimizer.step()`` and keep the loss to themselves. While at least one optimizer listens,
``torch.autograd.backward`` and ``GradScaler.scale`` are wrapped, so that each listener learns *the sum of the scalar
losses back-propagated since its gradients were last cleared*: the function whose gradient is in ``.grad``. That sum is
what trainers log, gradient accumulation, loss scaling and several optimizers included. When the last listener is gone,
torch is as it was. Nothing here waits for a device: a loss stays a tensor.
"""

from __future__ import annotations

import sys
import threading
import weakref
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._compile import _disable_dynamo

__all__ = ["Intake", "Loss", "observe"]

_UNSCALED = "_emonavi_unscaled"


class Loss(NamedTuple):
    """The loss of one step and the number of backward calls that it sums (0: not captured)."""

    value: Tensor | float
    window: int = 0


class Intake:
    """The pending losses of one optimizer.

    Args:
        params: gives the optimizer's parameters; read at each backward, so that groups added later are heard too.
    """

    def __init__(self, params: Callable[[], Iterable[Tensor]]) -> None:
        self._params = params
        self._observed: list[Tensor | float] = []
        self._captured: Tensor | None = None
        self._window = 0

    def observe(self, loss: Tensor | float) -> None:
        """Set a loss aside for the next step; several are averaged."""
        self._observed.append(_detached(loss))

    def hear(self, loss: Tensor) -> None:
        """Add a back-propagated loss to the window; cleared gradients begin a new one."""
        if self._window and all(p.grad is None for p in self._params()):
            self._captured, self._window = None, 0
        loss = loss.detach()
        # The caller may go on to change its loss in place (running totals do): the sum must be a tensor of its own.
        self._captured = loss.clone() if self._captured is None else self._captured + loss.to(self._captured.device)
        self._window += 1

    def owns(self, variables: set[int]) -> bool:
        """Whether any of these leaves (by id) is one of the parameters."""
        return any(id(p) in variables for p in self._params())

    def take(self, told: Tensor | float | None, closure: Callable[[], Any] | None) -> tuple[Loss | None, Any]:
        """The loss that counts for this step, and what the step is to return."""
        if told is not None:
            return Loss(_detached(told)), told
        before, returned = self._window, None
        if closure is not None:
            with torch.enable_grad():
                returned = closure()
        if self._observed:
            mean = _mean_of_finite(self._observed)
            return Loss(mean), mean
        ran_backward = self._captured is not None and self._window != before
        if closure is not None and returned is not None and not ran_backward:
            return Loss(_detached(returned)), returned
        if self._captured is not None:
            return Loss(self._captured, self._window), self._captured if returned is None else returned
        return None, returned

    def clear(self) -> None:
        """Forget what is pending: a step has used it."""
        self._observed.clear()
        self._captured, self._window = None, 0


def _detached(loss: Tensor | float) -> Tensor | float:
    """A loss of one element, safe from later changes in place."""
    if not isinstance(loss, Tensor):
        return float(loss)
    if loss.numel() != 1 or loss.is_complex():
        what = f"a tensor of shape {tuple(loss.shape)}, {loss.dtype}"
        raise ValueError(f"a loss must be one real number, got {what}: reduce it first, say by .mean()")
    return loss.detach().reshape(()).clone()


def _mean_of_finite(losses: Sequence[Tensor | float]) -> Tensor | float:
    """The mean of the finite losses; NaN where none is."""
    if not any(isinstance(loss, Tensor) for loss in losses):
        losses = [torch.tensor(loss, dtype=torch.float64) for loss in losses]
    home = next(loss for loss in losses if isinstance(loss, Tensor))
    stacked = torch.stack([torch.as_tensor(loss, device=home.device).to(home.dtype) for loss in losses])
    return stacked.where(stacked.isfinite(), torch.nan).nanmean()


def observe(optimizer: Any, loss: Tensor | float) -> None:
    """Tell an optimizer, or anything that wraps one, the loss of its next step.

    ``AcceleratedOptimizer``, ``LightningOptimizer``, DeepSpeed and Lookahead-like wrappers hold the real optimizer in
    an attribute; it is found there.

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
    inner = optimizer
    for _ in range(8):  # wrappers of wrappers; a bound, because a proxy may answer for ever
        below = next((vars(inner)[k] for k in ("optimizer", "_optimizer") if k in getattr(inner, "__dict__", {})), None)
        if below is None:
            break
        inner = below
    if not isinstance(getattr(inner, "_intake", None), Intake):
        raise TypeError(
            f"{type(optimizer).__name__} holds no optimizer that listens to a loss: pass the emonavi optimizer itself"
        )
    inner.observe(loss)


# Capture ----------------------------------------------------------------------------------------------------------

_listeners: weakref.WeakSet[Intake] = weakref.WeakSet()
_lock = threading.RLock()
_originals: list[tuple[Any, str, Any, Any]] = []  # (where, name, original, ours)


def listen(intake: Intake) -> None:
    """Let an intake hear every backward; torch is wrapped for the first one."""
    with _lock:
        _listeners.add(intake)
        # Freed by the garbage collector or by hand: either way the last one to go restores torch.
        weakref.finalize(intake, _leave)
        _install()


def unlisten(intake: Intake) -> None:
    """Stop hearing; torch is restored when nobody listens."""
    with _lock:
        _listeners.discard(intake)
        _leave()


def _leave() -> None:
    with _lock:
        if len(_listeners) or not _originals:
            return
        for where, name, original, ours in _originals:
            # Somebody may have wrapped our wrapper since: then it has to stay, and passes everything through.
            if vars(where).get(name) is ours:
                setattr(where, name, original)
        _originals.clear()


def _install() -> None:
    """Wrap what is not wrapped yet."""
    _wrap(torch.autograd, "backward", _hearing_backward)
    _wrap(torch.amp.GradScaler, "scale", _tagging_scale)
    # It overrides scale. Whoever uses it has imported it; importing it here would cost everybody else.
    sharded = sys.modules.get("torch.distributed.fsdp.sharded_grad_scaler")
    if sharded is not None:
        _wrap(sharded.ShardedGradScaler, "scale", _tagging_scale)


def _wrap(where: Any, name: str, wrapper: Callable[[Any], Any]) -> None:
    if any(place is where and known == name for place, known, _, _ in _originals):
        return
    original = vars(where)[name]
    ours = wrapper(original)
    _originals.append((where, name, original, ours))
    setattr(where, name, ours)


def _hearing_backward(original: Callable[..., None]) -> Callable[..., None]:
    # Dynamo must not trace into the wrapper: a compiled train step breaks its graph at backward anyway.
    @_disable_dynamo
    def backward(tensors: Any, grad_tensors: Any = None, *args: Any, **kwargs: Any) -> None:
        # Inside a running backward (re-entrant checkpointing) the roots are not losses. The engine's own mark is
        # exact for each thread, where a counter would mix up two threads that train at once.
        if _listeners and torch._C._current_graph_task_id() == -1:
            _announce(tensors, grad_tensors, kwargs.get("inputs"))
        return original(tensors, grad_tensors, *args, **kwargs)

    backward.__doc__ = original.__doc__
    return backward


def _tagging_scale(original: Callable[..., Any]) -> Callable[..., Any]:
    def scale(self: Any, outputs: Any) -> Any:
        scaled = original(self, outputs)
        _tag(scaled, outputs)
        return scaled

    scale.__doc__ = original.__doc__
    return scale


def _tag(scaled: Any, outputs: Any) -> None:
    if isinstance(scaled, Tensor):
        if scaled is not outputs:
            setattr(scaled, _UNSCALED, outputs.detach())
    elif isinstance(scaled, (list, tuple)) and isinstance(outputs, (list, tuple)):
        for one, unscaled in zip(scaled, outputs, strict=True):
            _tag(one, unscaled)


def _announce(tensors: Any, grad_tensors: Any, inputs: Any) -> None:
    """Tell the listeners that the roots reach what is about to be back-propagated (at entry, before any hook runs)."""
    roots = [tensors] if isinstance(tensors, Tensor) else list(tensors)
    weights = (
        [grad_tensors] * len(roots) if grad_tensors is None or isinstance(grad_tensors, Tensor) else list(grad_tensors)
    )
    losses = [
        (root, weight)
        for root, weight in zip(roots, weights, strict=False)
        if root.requires_grad and root.numel() == 1 and root.is_floating_point()
    ]
    if not losses:
        return
    with _lock, torch.no_grad():
        listeners = list(_listeners)
        if inputs is not None:
            leaves = {id(t) for t in ([inputs] if isinstance(inputs, Tensor) else inputs)}
            listeners = [one for one in listeners if one.owns(leaves)]
        elif len(listeners) > 1:
            leaves = _leaves([root for root, _ in losses])
            # FSDP's graph holds unsharded stand-ins: where no leaf is anybody's, the loss is everybody's.
            listeners = [one for one in listeners if one.owns(leaves)] or listeners
        value = torch.stack([_unscaled(root, weight) for root, weight in losses]).sum()
        for one in listeners:
            one.hear(value)


def _unscaled(root: Tensor, weight: Tensor | None) -> Tensor:
    """The loss behind a root: before loss scaling, and weighted where ``backward(gradient=...)`` weights it."""
    value = getattr(root, _UNSCALED, root).detach().reshape(())
    return value if weight is None else value * weight.detach().reshape(())


def _leaves(roots: Sequence[Tensor]) -> set[int]:
    """Ids of the leaves that the roots' graph reaches."""
    seen: set[Any] = set()
    leaves = {id(root) for root in roots if root.grad_fn is None}
    stack = [root.grad_fn for root in roots if root.grad_fn is not None]
    while stack:
        node = stack.pop()
        if node in seen:
            continue
        seen.add(node)
        variable = getattr(node, "variable", None)
        if variable is not None:
            leaves.add(id(variable))
        stack.extend(below for below, _ in node.next_functions if below is not None)
    return leaves
