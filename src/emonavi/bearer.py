"""Bearer: what every optimizer with an emotion is to its user, whoever moves the tensors.

The emotion's vector and what can be read from it, what can be told, the shadow in the place of the weights, the writer.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch._compile import _disable_dynamo  # unlike torch.compiler.disable, it does not import dynamo (1.5 s)
from torch.nn.parameter import is_lazy

from emonavi import checks
from emonavi.active import Found, bounded, per_tensor
from emonavi.capture import listen
from emonavi.distributed import Ranks, default_group, is_piece, local
from emonavi.intake import Intake, Loss
from emonavi.machine import Machine, Weights
from emonavi.monitor import Recorder, Snapshot
from emonavi.notices import IDLE, IGNORED, SKIPPED, Missing, Streak
from emonavi.scalars import Number, exp, like
from emonavi.sweep import all_norms, lean, to_home, widest

__all__ = ["Bearer"]


class _Shared:
    """A process group on its way into a copy, which asks the same one; it cannot leave the process."""

    def __init__(self, group: Any) -> None:
        self.group = group

    def __deepcopy__(self, memo: Any) -> _Shared:
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        raise TypeError(
            "a process group cannot be pickled, and without it this would be another run: construct the optimizer anew "
            "with its process_group, and load_state_dict() there"
        )


class Bearer(torch.optim.Optimizer):
    """Base of the siblings and of the wrapper: all of an optimizer with an emotion but how it moves."""

    def _setup(self, machine: Machine, capture: bool, on_missing_loss: str, process_group: Any) -> None:
        """Set what is not part of a checkpoint."""
        self._emotion = machine
        self._capture = capture
        name = type(self).__name__
        self._missing = Missing(on_missing_loss, name)
        self._process_group = process_group.group if isinstance(process_group, _Shared) else process_group
        self._ranks: Ranks | None = None  # who is asked in a step; None: not found out yet
        self._world: Any = None  # under this default group
        self._known: dict[Tensor, torch.Size] = {}  # shapes whose memories are known to fit
        self._is_calm = False
        self._calls = 0  # steps, real and skipped
        self._is_loaded = False
        self._skipped, self._ignored, self._idle = (Streak(what, name) for what in (SKIPPED, IGNORED, IDLE))
        self._felt: Tensor | None = None  # the vector as it was last read
        self._recorder: Recorder | None = None
        me = weakref.ref(self)  # an intake that held its optimizer would keep it alive

        def params() -> Iterator[Tensor]:
            alive = me()
            return alive._params() if alive is not None else iter(())

        self._intake = Intake(params)
        if capture:
            listen(self._intake)

    def _settings(self) -> tuple[Machine, bool, str, Any]:
        """What a copy is set up with."""
        group = self._process_group
        shared = group if group in (None, "auto") else _Shared(group)
        return self._emotion, self._capture, self._missing.action, shared

    def __repr__(self) -> str:
        """As in ``torch.optim``, without forty numbers of the emotion's state: :attr:`emotion` tells them by name."""
        lines = [f"{type(self).__name__} ("]
        for i, group in enumerate(self.param_groups):
            lines.append(f"Parameter Group {i}")
            lines += [f"    {k}: {v}" for k, v in sorted(group.items()) if k not in ("params", "emotion")]
        return "\n".join([*lines, ")"])

    # What can be read -------------------------------------------------------------------------------------------

    @property
    def emotion(self) -> Snapshot:
        """A snapshot of what the optimizer feels, as plain numbers. Reading it waits for the device."""
        return Snapshot.of(self._emotion, self._vector())

    @property
    def should_stop(self) -> bool:
        """True while there is next to nothing left to learn; it can turn False again. Waits for the device."""
        vector = self._vector()
        return bool(self._emotion.should_stop(self._emotion.unpack(vector, plain=True)))

    @property
    def effective_lr(self) -> list[float]:
        """Lr times drive for each group, within ``min_lr`` and ``max_lr``. Waits for the device."""
        self._prepare()
        vector = self._vector()
        if not self._begun:
            return self._effective_lr(vector, 0.0).tolist()
        # A schedule may have raised lr since the last step.
        lr = torch.stack([like(vector[0], g["lr"]) for g in self._training()]).max()
        state = self._emotion.give_way(self._emotion.unpack(vector), lr, bool(self.param_groups[0]["use_trust"]))
        return self._effective_lr(vector, state.log_drive).tolist()

    def _effective_lr(self, vector: Tensor, log_drive: Number) -> Tensor:
        one_each = [1] * len(self.param_groups)
        lr, low, wall = (
            per_tensor([g[k] for g in self.param_groups], one_each, vector) for k in ("lr", "lr_floor", "lr_ceiling")
        )
        return bounded(lr, exp(log_drive), low, wall)

    def _training(self) -> list[dict[str, Any]]:
        """The groups in which something trains; all, where nothing does."""
        return [g for g in self.param_groups if any(p.requires_grad for p in g["params"])] or self.param_groups

    # What can be told -------------------------------------------------------------------------------------------

    def observe(self, loss: Tensor | float) -> None:
        """Set the loss of the next step aside; several observations are averaged. Nothing moves before ``step()``.

        Args:
            loss: a number or a tensor of one element.

        Raises:
            ValueError: it is not one real number.
        """
        self._intake.observe(loss)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As in ``torch.optim``. Gradients that are filled with zeros, too, begin a new window of losses."""
        super().zero_grad(set_to_none)
        self._intake.drop()

    def reset_emotion(self) -> None:
        """Begin a new stage (another task, stacked training): weights and moments stay, the emotion is fresh.

        Raises:
            RuntimeError: inside :meth:`calm`, or between backward and ``step()`` with gradients released.
        """
        self._refuse_midway("reset_emotion()")
        self._vector().copy_(self._fresh(anew=True))
        self._calls = 0
        self._intake.clear()
        with torch.no_grad():
            for group in self.param_groups:
                group["lr_peak"] = 0.0
                for p in group["params"]:
                    state = self.state.get(p, {})
                    for name, value in (("drive", 1.0), ("trust", 0.0), ("shadow", p)):
                        if name in state:
                            state[name].copy_(value) if isinstance(value, Tensor) else state[name].fill_(value)

    @contextmanager
    def calm(self) -> Iterator[None]:
        """Put the shadow in the place of the weights, for evaluation; the weights return at the end, whatever happens.

        Before the first step the shadow is what the weights are. While it lasts, a copy of the weights is held; what is
        to be kept of the shadow is saved, or copied, inside the block. BatchNorm's statistics are not averaged: where a
        model has them, ``torch.optim.swa_utils.update_bn`` sets them from data.

        Raises:
            RuntimeError: there is no shadow, or the block is entered twice, or ``step()`` or ``state_dict()`` is
                called inside it.

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
        wanted = self.param_groups[0]["use_shadow"]
        pairs = [(p, s["shadow"]) for p in self._params() if wanted and "shadow" in (s := self.state.get(p, {}))]
        if not pairs and (self._begun or not wanted):
            remedy = (
                "the next step makes it"
                if wanted
                else "construct with use_shadow=True; in a run that was loaded, and brought its own options, set "
                "param_groups[0]['use_shadow'] = True and make a step"
            )
            raise RuntimeError(f"calm() has no shadow to show: {remedy}")
        shown, shadows = ([local(pair[i].detach()) for pair in pairs] for i in (0, 1))
        held = [p.clone() for p in shown]
        self._is_calm = True
        try:
            _copy(shown, shadows)
            yield
        finally:
            _copy([local(p.detach()) for p, _ in pairs], held)  # where they lie now: the block may have moved them
            self._is_calm = False

    def _refuse_inside_calm(self, what: str) -> None:
        if self._is_calm:
            raise RuntimeError(f"{what} inside calm(): the weights there are the shadow's; leave the block first")

    def _refuse_midway(self, what: str) -> None:
        """Raise where the state at hand is not one between two steps."""
        self._refuse_inside_calm(what)

    @property
    def writer(self) -> Any:
        """Where the emotion is written to; not part of a checkpoint. A string is a TensorBoard log directory."""
        return None if self._recorder is None else self._recorder.writer

    @writer.setter
    def writer(self, writer: Any) -> None:
        given = None if writer is None else checks.writer(writer)  # None for "None", too
        recorder = None if given is None else Recorder(given, self._emotion)
        old, self._recorder = self._recorder, recorder  # the new one is known to work: until then the old one goes on
        if old is not None:
            old.close()  # last: a writer that fails once more must not stay for that

    def flush(self) -> None:
        """Write what is waiting to be written."""
        if self._recorder is not None:
            self._recorder.flush()

    @_disable_dynamo
    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None, *, loss: Tensor | float | None = None) -> Any:
        """Perform one optimization step.

        Args:
            closure: re-evaluates the model, under ``enable_grad``, and may return the loss.
            loss: the loss of this step, where it is at hand: a number or a tensor of one element. Without it the
                loss is the one observed, or captured at backward. A step without any loss is legal.

        Returns:
            The loss that counted, or what the closure returned, or None.

        Raises:
            ValueError: both ``loss`` and a closure that returns one are given, the loss is not one number, an lr is no
                finite number, or a parameter with a gradient is no real floating-point one. Nothing has changed then.
            RuntimeError: a gradient is sparse, a parameter is of another shape than its state, or the optimizer is
                inside :meth:`calm`. Nothing has changed then.
        """
        self._refuse_inside_calm("step()")
        self._prepare()
        heard, returned = self._intake.take(loss, closure)
        if not self._end_release(heard):
            found = self._found()
            if self._moves(found):
                self._move(found, heard)
            elif found.params:
                self._stay(found)
        return returned

    def _prepare(self) -> None:
        """Bring in order what is to be read or moved."""

    def _end_release(self, heard: Loss | None) -> bool:
        """End a step that backward has made. Returns whether it was one."""
        return False

    def _move(self, found: Found, heard: Loss | None) -> None:
        """The step of parameters that have a gradient."""
        raise NotImplementedError

    def _stay(self, found: Found) -> None:
        """The step of parameters that have a gradient, at an lr of 0."""
        raise NotImplementedError

    # What steps share -------------------------------------------------------------------------------------------

    def _found(self) -> Found:
        """Parameters that have a gradient."""
        params: list[Any] = list(self._params())
        groups = [i for i, g in enumerate(self.param_groups) for _ in g["params"]]
        found = Found(params, groups, [p.grad for p in params])
        if any([g is None for g in found.grads]):
            # A piece that has nothing here has no gradient either, but it moves elsewhere, and all ranks count it.
            away = [is_piece(p) and p.requires_grad and not p.numel() for p in params]
            found = found.where([g is not None or a for g, a in zip(found.grads, away, strict=True)])
        checks.gradients(found.grads)
        self._idle.note(not found.params)
        return found

    def _drop_shadows(self) -> None:
        """Where they are switched off: one that stood still would be taken for today's when it is switched on again."""
        for p in self._params():
            self.state.get(p, {}).pop("shadow", None)

    def _follow_idle(self, moved: list[Tensor], follow: Number, fused: bool) -> None:
        """Let the shadow of what did not move follow, too.

        Else a weight that seldom has a gradient, or is frozen by now, would be seen by calm() as it was long ago.
        """
        busy = set(moved)
        kinds: dict[Any, list[tuple[Tensor, Tensor]]] = {}
        for p in self._params():
            shadow = self.state.get(p, {}).get("shadow") if p not in busy else None
            if shadow is not None and not p.is_meta:
                own, here = local(shadow), local(p.detach())
                here = here.to(own.device)
                kinds.setdefault((here.device, here.dtype, own.dtype), []).append((here, own))
        for pairs in kinds.values():
            params, shadows = map(list, zip(*pairs, strict=True))
            lean(params, shadows, 0.0, follow, isinstance(follow, Tensor), fused)

    def _shapes(self, param: Tensor) -> dict[str, torch.Size]:
        """Of what is kept of a parameter, as it is stored."""
        raise NotImplementedError

    def _check_fit(self, params: list[Tensor]) -> None:
        """Raise where a parameter has no memory, or is not of the shape that its state and its gradient have."""
        checks.memory(params)
        for p in params:
            if self._known.get(p) != p.shape:  # a kernel would read and write past the end of what is smaller
                checks.fits(p, self.state.get(p, {}), self._shapes(p))
                self._known[p] = p.shape
        if len(self._known) > sum(len(g["params"]) for g in self.param_groups):
            self._known = {p: p.shape for p in params}  # some were replaced: they must not be kept alive

    def _moves(self, found: Found) -> bool:
        """Whether anything is to move. An lr that lives on a device is never read: it counts as not 0."""
        rates = [g["lr"] for g in self.param_groups]
        for lr in rates:
            if not isinstance(lr, Tensor) or lr.device.type == "cpu":
                checks.rate(lr)
        moving = [(isinstance(lr, Tensor) and lr.device.type != "cpu") or bool(lr != 0) for lr in rates]
        return any(moving[i] and (p.numel() or is_piece(p)) for p, i in zip(found.params, found.groups, strict=True))

    def _note_skipped(self, acts: Number) -> None:
        if not isinstance(acts, Tensor):  # to know, it would have to wait for the device
            self._skipped.note(not acts)

    def _feel(self, state: Any, heard: Loss | None, vector: Tensor) -> Any:
        """The state after a loss, which is taken as a number to be made small; the same where none was heard."""
        if heard is None:
            return state
        loss = heard.value
        value = to_home(loss, vector).detach() if isinstance(loss, Tensor) else vector.new_full((), loss)
        felt = self._emotion.feel(state, -value if self.param_groups[0]["maximize"] else value, heard.window)
        if not isinstance(felt.code, Tensor):
            self._ignored.note(felt.ignored_losses > state.ignored_losses)
        return felt

    def _end(self, vector: Tensor, state: Any) -> None:
        """Keep what a step has felt."""
        vector.copy_(self._emotion.pack(state))
        self._calls += 1
        self._intake.clear()
        if self._recorder is not None:
            self._recorder.record(vector, self._effective_lr(vector, state.log_drive))

    # The state vector -------------------------------------------------------------------------------------------

    @property
    def _begun(self) -> bool:
        return self._calls > 0

    def _note_begun(self) -> None:
        """Whether a real step was made, read from a state that was loaded."""
        self.param_groups[0]["emotion"] = self._emotion.upgrade(self._vector())
        state = self._emotion.unpack(self._vector())
        self._calls = int(state.steps + state.skipped_steps)

    def _fresh(self, anew: bool = False) -> Tensor:
        """The state vector before anything was felt; ``anew`` in a new stage, which knows its own lr only."""
        self._prepare()
        device = self._home()
        vector = torch.tensor(self._emotion.initial(), dtype=widest(device), device=device)
        # Of what trains. Where a schedule has lowered the lr already, that of the constructor is the user's.
        names = ("lr",) if anew else ("lr", "lr_start", "lr_peak")
        rates = [like(vector[0], g[name]) for g in self._training() for name in names]
        vector[self._emotion.index("lr_ref")] = torch.stack(rates).max()
        return vector

    def _home(self) -> torch.device:
        """The device of the first parameter; the CPU where it has no memory yet."""
        device: torch.device = next((p.device for p in self._params()), torch.device("cpu"))
        return torch.device("cpu") if device.type == "meta" else device

    def _vector(self) -> Tensor:
        """The emotion's state, where the first parameter is: a model may move after construction.

        A first group that somebody took out, or moved back, leaves it to the one that is the first now.
        """
        group = self.param_groups[0]
        vector: Tensor | None = group.get("emotion", self._felt)
        if vector is None:
            vector = self._fresh()
        if vector.device != self._home():
            vector = vector.to(self._home(), widest(self._home()))
        self._felt = group["emotion"] = vector
        return vector

    def _peers(self) -> Ranks:
        """Who is asked in a step; found out once, since a process group may have to be made."""
        world = default_group()
        if self._ranks is None or world is not self._world:
            self._ranks, self._world = Ranks.of(self._params(), self._process_group), world
        return self._ranks

    def _params(self) -> Iterator[Tensor]:
        return (p for g in self.param_groups for p in g["params"])

    def _weights(self, vector: Tensor, ranks: Ranks) -> Weights:
        """What all weights that train are like."""
        weights = [p for p in self._params() if not (p.is_meta or is_lazy(p))]
        weights = [p for p in weights if p.dtype in checks.DENSE_FLOATS and (p.numel() or is_piece(p))]
        trained = [p for p in weights if p.requires_grad] or weights
        here = [local(p) for p in trained]
        norms, sizes = all_norms(here, vector), vector.new_tensor([p.numel() for p in here])
        squares, counts = ranks.whole(torch.stack([norms * norms, sizes]), trained)
        norms = squares.sqrt()
        return Weights(
            rms=torch.linalg.vector_norm(norms) / counts.sum().sqrt(),
            blank=((norms == 0) * counts).sum() / counts.sum(),
        )


def _copy(to: list[Tensor], source: list[Tensor]) -> None:
    if to:
        torch._foreach_copy_(to, source)
