"""The loss, heard at backward.

Trainers call ``optimizer.step()`` and keep the loss to themselves. While at least one optimizer listens,
``torch.autograd.backward`` and ``GradScaler.scale`` are wrapped, so that each listener learns *the sum of the scalar
losses back-propagated since its gradients were last cleared*: the function whose gradient is in ``.grad``. That sum is
what trainers log, also with gradient accumulation, loss scaling and several optimizers.

Listeners are told before backward runs, because hooks may call step() inside it. A single listener in the same thread
always hears; with several, or from another thread, only those whose parameters the graph reaches. If no gradient
changed, the loss is withdrawn. When the last listener is gone, torch is restored.
"""

from __future__ import annotations

import sys
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._compile import _disable_dynamo
from torch._subclasses.fake_tensor import is_fake
from torch.nn import Parameter

from emonavi.intake import Intake, Mark

__all__ = ["listen"]

_UNSCALED = "_emonavi_unscaled"

_listeners: weakref.WeakSet[Intake] = weakref.WeakSet()
_lock = threading.RLock()
_originals: list[tuple[Any, str, Any, Any]] = []  # (where, name, original, ours)


def listen(intake: Intake) -> None:
    """Let an intake hear every backward; the first one wraps torch."""
    with _lock:
        _listeners.add(intake)
        # However it is freed, the last one to go restores torch.
        weakref.finalize(intake, _leave)
        _install()


def _leave() -> None:
    with _lock:
        # Not len(): while finalizers run, it still counts what is being freed.
        if any(True for _ in _listeners) or not _originals:
            return
        for where, name, original, ours in _originals:
            # If somebody has wrapped our wrapper since, it must stay; it then only calls the original.
            if vars(where).get(name) is ours:
                setattr(where, name, original)
        _originals.clear()


def _install() -> None:
    """Wrap what is not wrapped yet."""
    _wrap(torch.autograd, "backward", _hearing_backward)
    _wrap(torch.amp.GradScaler, "scale", _tagging_scale)
    # It overrides scale. It is not imported here, since that is slow: who uses it has imported it.
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


@dataclass(eq=False)  # compared by identity: two threads may have equal losses
class _Running:
    """A running backward: its loss, and who was told, with what each had pending before."""

    value: Tensor
    told: dict[Intake, Mark]
    thread: int  # of the call; on a device, a nested backward runs in another one

    def tell(self, intake: Intake) -> None:
        """Tell an intake, once."""
        if intake not in self.told:
            self.told[intake] = intake.mark()
            intake.hear(self.value)

    def take_back(self, failed: bool) -> None:
        """Withdraw the loss: if backward failed, from all, else from those whose gradients did not change."""
        for intake, mark in self.told.items():
            if failed or not intake.touched(mark):
                intake.undo(mark)


_running: list[_Running] = []
_inside = threading.local()


def _hearing_backward(original: Callable[..., None]) -> Callable[..., None]:
    # Dynamo must not trace into it: a compiled train step has a graph break at backward anyway.
    @_disable_dynamo
    def backward(
        tensors: Any,
        grad_tensors: Any = None,
        retain_graph: bool | None = None,
        create_graph: bool = False,
        grad_variables: Any = None,
        inputs: Any = None,
    ) -> None:
        # Iterators can be read only once: hand on what was read.
        tensors, inputs = _again(tensors), _again(inputs)
        grads = _again(grad_variables if grad_tensors is None else grad_tensors)
        with _heard(tensors, grads, inputs):
            return original(tensors, grads, retain_graph, create_graph, None, inputs)

    backward.__doc__ = original.__doc__
    return backward


def _again(given: Any) -> Any:
    """An iterator as a tuple; all else as it is."""
    return tuple(given) if isinstance(given, Iterator) else given


@contextmanager
def _heard(tensors: Any, grads: Any, inputs: Any) -> Iterator[None]:
    """Tell the listeners before any hook runs; withdraw the loss if backward fails or changes no gradient."""
    if getattr(_inside, "now", False) and torch._C._current_graph_task_id() == -1:
        yield  # nested in another wrapper of ours (with somebody else's between them), which has told them
        return
    if torch._C._current_graph_task_id() != -1:
        # Inside a running backward (re-entrant checkpointing) the roots are not losses. But they lead to parameters
        # that the outer graph does not reach: their owners hear the outer loss, if only one backward is running.
        if len(_running) == 1:
            _tell(_running[0], [root for root in _listed(tensors) if isinstance(root, Tensor)])
        yield
        return
    running = _announced(tensors, grads, inputs)
    if running is not None:
        _running.append(running)
    _inside.now = True
    try:
        yield
        if running is not None:
            running.take_back(failed=False)
    except BaseException:
        if running is not None:
            running.take_back(failed=True)
        raise
    finally:
        _inside.now = False
        if running is not None:
            _running.remove(running)


def _tagging_scale(original: Callable[..., Any]) -> Callable[..., Any]:
    def scale(self: Any, outputs: Any) -> Any:
        outputs = _again(outputs)
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


def _listed(given: Any) -> list[Any]:
    """Roots or inputs as a list. A GradientEdge is one root, although it is a tuple."""
    if isinstance(given, (Tensor, torch.autograd.graph.GradientEdge)):
        return [given]
    return list(given.values() if isinstance(given, dict) else given)


def _announced(tensors: Any, grads: Any, inputs: Any) -> _Running | None:
    """Tell the loss that is about to be back-propagated to the listeners that the roots reach."""
    roots = _listed(tensors)
    weights = [grads] * len(roots) if grads is None or isinstance(grads, Tensor) else list(grads)
    losses = [(root, weight) for root, weight in zip(roots, weights, strict=False) if _is_loss(root, weight)]
    if not losses:
        return None
    with _lock, torch.no_grad():
        # At least float32, to add up a window. A new tensor, since the caller may change its loss in place later.
        values = [_unscaled(root, weight) for root, weight in losses]
        dtype = torch.promote_types(values[0].dtype, torch.float32)
        value = torch.stack([v.to(values[0].device, dtype) for v in values]).sum()
        running = _Running(value, {}, threading.get_ident())
        if inputs is not None:
            leaves = {id(t) for t in _listed(inputs)}
            for intake in [one for one in _listeners if one.owned(leaves)]:
                running.tell(intake)
        else:
            _tell(running, [root for root, _ in losses])
    return running


def _is_loss(root: Any, weight: Tensor | None) -> bool:
    """Whether a root is one number that can be read: not a GradientEdge, nor a meta or fake tensor."""
    if not isinstance(root, Tensor) or root.is_meta or is_fake(root):
        return False
    one = root.numel() == 1 and (weight is None or weight.numel() == 1)
    return one and root.requires_grad and root.is_floating_point()


def _tell(running: _Running, roots: Sequence[Tensor]) -> None:
    """Tell a loss to the listeners whose parameters the roots reach; a single one hears always."""
    with _lock, torch.no_grad():
        listeners = list(_listeners)
        if len(listeners) > 1 or any(one.thread != running.thread for one in listeners):
            leaves, weights = _leaves(roots)
            owned = {one: one.owned(leaves) for one in listeners}
            owners = [one for one in listeners if owned[one]]
            if not running.told:
                # Not those of other threads: their own backward may be writing the gradients that are looked at here.
                here = [one for one in listeners if one.thread == running.thread]
                # FSDP's graph ends in Parameters of its own: where one is nobody's, those with shards hear, too.
                if weights.difference(*owned.values()):
                    owners += [one for one in here if one.has_shards() and one not in owners]
                owners = owners or here
            listeners = owners
        for intake in listeners:
            running.tell(intake)


def _unscaled(root: Tensor, weight: Tensor | None) -> Tensor:
    """The loss of a root: before loss scaling, and times the weight given as ``backward(gradient=...)``."""
    value = getattr(root, _UNSCALED, root).detach().reshape(())
    return value if weight is None else value * weight.detach().reshape(())


def _leaves(roots: Sequence[Tensor]) -> tuple[set[int], set[int]]:
    """Ids of the leaves that the roots' graph reaches, and of the Parameters among them."""
    seen: set[Any] = set()
    leaves = {id(root) for root in roots if root.grad_fn is None}
    weights = {id(root) for root in roots if root.grad_fn is None and isinstance(root, Parameter)}
    stack = [root.grad_fn for root in roots if root.grad_fn is not None]
    while stack:
        node = stack.pop()
        if node in seen:
            continue
        seen.add(node)
        below = node.next_functions
        if below:
            stack.extend([one for one, _ in below if one is not None])
        elif (variable := getattr(node, "variable", None)) is not None:  # at leaves only: a missing attribute is slow
            leaves.add(id(variable))
            if isinstance(variable, Parameter):
                weights.add(id(variable))
    return leaves, weights
