"""Gradient release: each tensor is moved inside backward, as soon as its gradient is there, and the gradient is freed.

So there is never more than a few gradients at a time. A step that begins before backward has ended cannot know the loss
or the norm of all gradients. It goes by what was felt up to the step before::

    backward    for each tensor: move by the mood of the step before, note the sums and the norm, free the gradient
    step()      feel the loss, judge the norm of all, reflect, as ever; a panic restores the shadow here

What differs from the normal step: the loss of step t acts from step t + 1 on, as reflection does anyway; a gradient
that is not finite keeps its own tensor where it is, but not those that moved before it; no outlier is scaled down
(``max_norm``), for what is one shows only when all have moved; and the shadow follows at the end of a step.
"""

from __future__ import annotations

import warnings
import weakref
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from emonavi import checks
from emonavi.active import Active, Found, Roster
from emonavi.distributed import Ranks, default_group, unless_alone
from emonavi.emotion import Emotion
from emonavi.intake import listening
from emonavi.machine import Loss, Mood, Options, Sums
from emonavi.notices import callers_level
from emonavi.scalars import Number
from emonavi.sweep import all_norms

if TYPE_CHECKING:
    from emonavi.optimizer import EmoOptimizer

__all__ = ["Release", "gradient_release"]


class _Begun(NamedTuple):
    """What the tensors of one backward move by."""

    vector: Tensor
    state: Any
    options: Options
    mood: Mood
    predicated: bool


class _Moved(NamedTuple):
    """What is left of a tensor that was moved."""

    norm: Tensor
    acts: Number
    sums: Sums


class Release:
    """Hooks that move an optimizer's tensors during backward; made by :func:`gradient_release`."""

    def __init__(self, optimizer: EmoOptimizer) -> None:
        self._optimizer = optimizer
        self._begun: _Begun | None = None
        self._idle = False  # a backward at lr 0
        self._warned = False
        self._moved: dict[Tensor, _Moved] = {}
        self._groups = {p: i for i, g in enumerate(optimizer.param_groups) for p in g["params"] if p.requires_grad}
        self._places = {p: place for place, p in enumerate(self._groups)}
        # Python's collector does not see through a hook: one that held the optimizer would keep it and its model alive.
        move = weakref.WeakMethod(self._move)

        def hook(param: Tensor) -> None:
            if (alive := move()) is not None:
                alive(param)

        self._handles = [p.register_post_accumulate_grad_hook(hook) for p in self._groups]
        optimizer._release = self
        optimizer._intake.releases = True

    @property
    def pending(self) -> bool:
        """Whether tensors have moved that no ``step()`` has counted."""
        return self._begun is not None

    def remove(self) -> None:
        """Back to normal steps.

        Raises:
            RuntimeError: a backward has moved tensors, and no ``step()`` has followed.
        """
        self.refuse("remove()")
        for handle in self._handles:
            handle.remove()
        if self._optimizer._release is self:  # not another one's, made since
            self._optimizer._release = None
            self._optimizer._intake.releases = False

    def refuse(self, what: str) -> None:
        """Raise where a step has begun and not ended."""
        if self.pending:
            raise RuntimeError(f"{what} between backward and step(), with gradients released: call step() first")

    def _begin(self) -> _Begun | None:
        """The mood of the step before, which this one goes by; None where every lr is 0."""
        optimizer, vector = self._optimizer, self._optimizer._vector()
        params = list(self._groups)
        everything = Found(params, list(self._groups.values()), [p.detach() for p in params])
        if not everything.moves(optimizer.param_groups):
            return None
        optimizer._check_fit(params)
        optimizer._make_states(params)
        active = self._active(everything)
        predicated = optimizer._is_predicated(vector.device)
        state, options = optimizer._opening(active, Ranks(), predicated)
        yes, one = (vector.new_ones(()) > 0, vector.new_ones(())) if predicated else (True, 1.0)
        return _Begun(vector, state, options, optimizer._emotion.mood(state, yes, one, options), predicated)

    @torch.no_grad()
    def _move(self, param: Tensor) -> None:
        """The hook: one tensor's update."""
        optimizer = self._optimizer
        if optimizer._is_calm:
            param.grad = None  # that of the shadow's weights: the next one is not to be added to it
        optimizer._refuse_inside_calm("a backward that releases gradients")
        if param in self._moved:
            raise RuntimeError(
                "a second gradient of one parameter before step(), with gradients released: they cannot accumulate. "
                "Call step() after each backward, or the optimizer's zero_grad() after one that failed; checkpoint "
                "with use_reentrant=False, or remove() the release"
            )
        checks.gradients([param.grad])
        begun = self._begun = self._begun or (None if self._idle else self._begin())
        if begun is not None and param.grad is not None and param.numel():
            active = self._active(Found([param], [self._groups[param]], [param.grad]))
            norm = all_norms(active.grads, begun.vector)[0]
            acts = torch.isfinite(norm) if begun.predicated else bool(torch.isfinite(norm))
            buckets = optimizer._buckets(active, begun.predicated)
            sums = optimizer._sweep(active, buckets, begun.mood, acts, begun.options, self._places[param])
            self._moved[param] = _Moved(norm, acts, sums)
        self._idle = begun is None
        param.grad = None
        optimizer._intake.freed += 1

    def _active(self, found: Found) -> Active:
        optimizer = self._optimizer
        roster = Roster.of(found, optimizer.state, len(optimizer.param_groups), fused=False)
        return optimizer._active(roster, found.grads)

    @torch.no_grad()  # zero_grad() comes here, too
    def close(self, heard: Loss | None, told: bool = True) -> bool:
        """End the step that backward began. Returns whether it was one.

        ``told`` is False where nobody could tell its loss: a missing one is then no mistake.
        """
        # In the order of the groups: backward's own is the other way round, and sums would differ in their last bits.
        begun, moved = self._begun, {p: self._moved[p] for p in self._groups if p in self._moved}
        optimizer = self._optimizer
        if begun is not None and moved and told:
            optimizer._missing.note(heard)  # may raise: the step can then be told its loss
        self._begun, self._moved = None, {}
        idle, self._idle = self._idle, False
        if begun is None or not moved:
            if idle:
                optimizer._intake.clear()  # as a normal step at lr 0
            return idle
        self._warn_of_left_out()
        vector = begun.vector
        emotion: Any = optimizer._emotion
        active = self._active(Found(list(moved), [self._groups[p] for p in moved], [p.detach() for p in moved]))
        state = optimizer._feel(begun.state, heard, vector)
        norm = torch.linalg.vector_norm(torch.stack([m.norm for m in moved.values()]))
        state, acts, _ = emotion.guard(state, norm, begun.options)
        mood = emotion.mood(state, acts, begun.mood.grad_scale, begun.options)
        optimizer._lean(active, mood, optimizer._fuses(begun.predicated))
        sums = Sums(*(torch.cat(column, -1) for column in zip(*(m.sums for m in moved.values()), strict=True)))
        # The tensors moved by the mood of the step before.
        state = emotion.reflect(state, sums, acts, begun.options)._replace(last_scalar=begun.mood.scalar)
        stepped = torch.stack([torch.as_tensor(m.acts, device=m.norm.device) for m in moved.values()])
        active.keep(stepped, *emotion.reflect_each(state, active.drive, active.trust, active.steps - 1, sums))
        optimizer._end(vector, state, acts)
        return True

    def _warn_of_left_out(self) -> None:
        """Say once that a parameter which was added or thawed later has a gradient, and does not move."""
        if not self._warned and any(p.grad is not None for p in self._optimizer._params() if p not in self._groups):
            self._warned = True
            warnings.warn(
                "a parameter that was added or thawed since gradient_release() has a gradient, and is not moved: "
                "remove() the release and make it anew",
                stacklevel=callers_level(),
            )


def gradient_release(optimizer: Any) -> Release:
    """Move each tensor inside backward and free its gradient at once; the loop stays as it is.

    ``step()`` then ends the step: it feels the loss, and moves nothing but what a panic restores. Parameters that are
    added or thawed later take part after ``remove()`` and another call.

    Args:
        optimizer: an :class:`~emonavi.EmoOptimizer` with the adaptive emotion, or a wrapper around one.

    Returns:
        A handle whose ``remove()`` ends it.

    Raises:
        TypeError: ``optimizer`` is an :class:`~emonavi.Emotional`, which cannot move one tensor alone.
        ValueError: the emotion is a published generation, whose losses act in their own step.
        RuntimeError: it is released already, or there are several processes (each would move by its own gradient).

    Example:
        >>> import torch, emonavi
        >>> model = torch.nn.Linear(2, 1)
        >>> optimizer = emonavi.EmoNavi(model.parameters())
        >>> handle = emonavi.gradient_release(optimizer)
        >>> model(torch.ones(4, 2)).square().mean().backward()
        >>> model.weight.grad is None
        True
        >>> loss = optimizer.step()
        >>> handle.remove()
    """
    from emonavi.optimizer import EmoOptimizer

    inner = listening(optimizer)
    if not isinstance(inner, EmoOptimizer):
        raise TypeError(f"{type(inner).__name__} moves all tensors at once: only a sibling's gradients can be released")
    if not isinstance(inner._emotion, Emotion):
        remedy = "construct the optimizer with emotion='adaptive'"
        raise ValueError(f"gradients cannot be released with emotion {inner._emotion.name!r}: {remedy}")
    if inner._release is not None:
        raise RuntimeError("the gradients of this optimizer are released already: remove() the first release")
    if unless_alone(default_group()) is not None:
        raise RuntimeError("gradients cannot be released in several processes: each rank would move by its own")
    return Release(inner)
