"""Base class of the siblings and ``Emotional``.

``step()``, the emotion's state vector, the writer, and what users read and tell.
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch._compile import _disable_dynamo  # unlike torch.compiler.disable, it does not import dynamo (1.5 s)
from torch.nn.parameter import is_lazy

from emonavi import checks, shadow
from emonavi.active import Active, Found, bounded, per_tensor
from emonavi.calm import Calm
from emonavi.capture import listen
from emonavi.distributed import Ranks, default_group, is_piece, local
from emonavi.groups import no_peak
from emonavi.intake import Intake
from emonavi.machine import Loss, Machine, Mood, Weights
from emonavi.monitor import Recorder, Snapshot
from emonavi.notices import IDLE, IGNORED, SKIPPED, Missing, Streak, callers_level
from emonavi.scalars import Number, exp, like, widest
from emonavi.sweep import all_norms, to_home

__all__ = ["Bearer"]


class _Shared:
    """Carries a process group into a deep copy, which uses the same one; pickling it is refused."""

    def __init__(self, group: Any) -> None:
        self.group = group

    def __deepcopy__(self, memo: Any) -> _Shared:
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        raise TypeError(
            "a process group cannot be pickled, and without it this would be another run: construct the optimizer anew "
            "with its process_group, and load_state_dict() there"
        )


class Bearer(Calm):
    """Base class of the siblings and of the wrapper. Subclasses say how the tensors move."""

    def _setup(self, machine: Machine, capture: bool, on_missing_loss: str, process_group: Any) -> None:
        """Set what is not part of a checkpoint."""
        super()._setup()
        self._emotion = machine
        self._capture = capture
        name = type(self).__name__
        self._missing = Missing(on_missing_loss, name)
        self._process_group = process_group.group if isinstance(process_group, _Shared) else process_group
        self._ranks: Ranks | None = None  # None: not determined yet
        self._world: Any = None  # the default group when they were determined
        self._known: dict[Tensor, torch.Size] = {}  # shapes that state is known to fit
        self._calls = 0  # steps, real and skipped
        self._skipped, self._ignored, self._idle = (Streak(what, name) for what in (SKIPPED, IGNORED, IDLE))
        self._last_vector: Tensor | None = None  # the vector as it was last read
        self._recorder: Recorder | None = None
        me = weakref.ref(self)  # an intake that held its optimizer would keep it alive

        def params() -> Iterator[Tensor]:
            alive = me()
            return alive._params() if alive is not None else iter(())

        self._intake = Intake(params)
        if capture:
            listen(self._intake)

    def _settings(self) -> tuple[Machine, bool, str, Any]:
        """Arguments of ``_setup()`` for a copy."""
        group = self._process_group
        shared = group if group in (None, "auto") else _Shared(group)
        return self._emotion, self._capture, self._missing.action, shared

    def __repr__(self) -> str:
        """As in ``torch.optim``, but without the emotion's state vector; :attr:`emotion` shows it by name."""
        hidden = {"params", "emotion", "shown"}
        hidden |= set() if self._emotion.constants else {"emotion_constants"}
        lines = [f"{type(self).__name__} ("]
        for i, group in enumerate(self.param_groups):
            lines.append(f"Parameter Group {i}")
            lines += [f"    {k}: {v}" for k, v in sorted(group.items()) if k not in hidden]
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
        lr, floor, ceiling = (
            per_tensor([g[k] for g in self.param_groups], one_each, vector) for k in ("lr", "lr_floor", "lr_ceiling")
        )
        return bounded(lr, exp(log_drive), floor, ceiling)

    def _training(self) -> list[dict[str, Any]]:
        """Groups with a parameter that requires a gradient; all groups if there is none."""
        return [g for g in self.param_groups if any(p.requires_grad for p in g["params"])] or self.param_groups

    # What can be told -------------------------------------------------------------------------------------------

    def observe(self, loss: Tensor | float) -> None:
        """Tell the loss of the next step; several observations are averaged. Nothing moves before ``step()``.

        Args:
            loss: a number or a tensor of one element.

        Raises:
            ValueError: it is not one real number.
        """
        self._intake.observe(loss)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As in ``torch.optim``. It also begins a new window of losses, even with ``set_to_none=False``."""
        super().zero_grad(set_to_none)
        self._intake.drop()

    def reset_emotion(self) -> None:
        """Begin a new stage (another task, stacked training): weights and moments stay, the emotion starts afresh.

        Raises:
            RuntimeError: inside :meth:`calm`, or between backward and ``step()`` with gradients released.
        """
        self._refuse_midway("reset_emotion()")
        if self._blocks:
            self._refuse_inside_calm("reset_emotion()")
        self.train()
        self._vector().copy_(self._fresh(anew=True))
        self._calls = 0
        self._intake.clear()
        with torch.no_grad():
            for group in self.param_groups:
                group["lr_peak"] = no_peak(group["lr"])
            for p in self._shadowed():
                self.state[p]["shadow"].copy_(p)
        self._note_left()

    @property
    def writer(self) -> Any:
        """Where the emotion is written; not part of a checkpoint. A string is a TensorBoard log directory.

        Setting it raises TypeError for what has no ``add_scalar``, ValueError for a string that names no directory,
        ImportError without TensorBoard and OSError where the directory cannot be written; the old one then stays.
        """
        return None if self._recorder is None else self._recorder.writer

    @writer.setter
    def writer(self, writer: Any) -> None:
        given = None if writer is None else checks.writer(writer)  # None for "None", too
        recorder = None if given is None else Recorder(given, self._emotion)
        old, self._recorder = self._recorder, recorder  # only now that the new one is known to work
        if old is not None:
            old.close()  # last: if this fails, the new one is in place

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
            loss: the loss of this step, if it is at hand: a number or a tensor of one element. Without it, the loss
                is the one observed, or captured at backward. A step without any loss is legal.

        Returns:
            The loss that counted, or what the closure returned, or None.

        Raises:
            ValueError: both ``loss`` and a closure that returns one are given, the loss is not one number, an lr, a
                bound or a weight decay in a group is no finite number of at least 0, or a parameter with a gradient is
                not real floating-point. Nothing has changed then.
            TypeError: the closure cannot be called.
            RuntimeError: a gradient is sparse, a parameter is of another shape than its state or on the meta device,
                no loss is known and ``on_missing_loss="error"``, or the optimizer is inside :meth:`calm`. Nothing has
                changed then.
        """
        if self._blocks:
            self._refuse_inside_calm("step()")
        self._go_on(stale=closure is None)
        self._prepare()
        heard, returned = self._intake.take(loss, closure)
        if not self._end_release(heard):
            found = Found.of(self.param_groups)
            self._idle.note(not found.params)
            if found.moves(self.param_groups):
                self._move(found, heard)
            elif found.params:
                was_written = self._is_written
                self._stay(found)
                if not was_written:
                    self._note_left()
        return returned

    def _end_release(self, heard: Loss | None) -> bool:
        """With gradients released: end the step that backward began. Returns whether there was one."""
        return False

    def _move(self, found: Found, heard: Loss | None) -> None:
        """Make a step of the parameters that have a gradient."""
        raise NotImplementedError

    def _stay(self, found: Found) -> None:
        """Make the state, and move nothing: every lr is 0."""
        raise NotImplementedError

    # What steps share -------------------------------------------------------------------------------------------

    def _shapes(self, param: Tensor) -> dict[str, torch.Size]:
        """Shapes of a parameter's state tensors, by name, as stored."""
        raise NotImplementedError

    def _check_fit(self, params: list[Tensor]) -> None:
        """Raise if a parameter cannot be moved, or if its gradient or its state has another shape."""
        checks.movable(params)
        for p in params:
            if self._known.get(p) != p.shape:  # a kernel would run past the end of a smaller tensor
                checks.fits(p, self.state.get(p, {}), self._shapes(p))
                self._known[p] = p.shape
        if len(self._known) > sum(len(g["params"]) for g in self.param_groups):
            self._known = {p: p.shape for p in params}  # some were replaced: let go of them

    def _feel(self, state: Any, heard: Loss | None, vector: Tensor) -> Any:
        """The state after a loss, negated for ``maximize``; unchanged if there was no loss."""
        if heard is None:
            return state
        loss = heard.value
        value = to_home(loss, vector).detach() if isinstance(loss, Tensor) else vector.new_full((), loss)
        felt = self._emotion.feel(state, -value if self.param_groups[0]["maximize"] else value, heard.window)
        if not isinstance(felt.code, Tensor):
            self._ignored.note(felt.ignored_losses > state.ignored_losses)
        return felt

    def _lean(self, active: Active, mood: Mood, fused: bool) -> None:
        """Move weights and shadows towards each other; the shadows of weights without a gradient follow as well."""
        if self.param_groups[0]["use_shadow"]:
            active.lean(mood, fused)
            shadow.follow_idle(self._params(), self.state, active.roster.whole, mood.follow, fused)

    def _end(self, vector: Tensor, state: Any, acts: Number) -> None:
        """Store the state after a step, which ``acts`` or was skipped, and record it."""
        vector.copy_(self._emotion.pack(state))
        self._calls += 1
        self._note_left()
        self._intake.clear()
        if self._recorder is not None:
            self._recorder.record(vector, self._effective_lr(vector, state.log_drive))
        if not isinstance(acts, Tensor):  # to know, it would have to wait for the device
            self._skipped.note(not acts)

    def _put_in_group(self) -> None:
        """Put into the first group, which may be another one than it was, what a checkpoint needs.

        The emotion's constants as a string: torch's distributed checkpoints take a dict apart.
        """
        self._vector()
        self._note_shown(self._is_calm)
        self.param_groups[0]["emotion_constants"] = str(self._emotion.constants)

    def _take_options(self, had_shadow: bool) -> None:
        """Go on with the constants of the checkpoint that was loaded, as with the options in its groups."""
        if had_shadow and not self.param_groups[0]["use_shadow"]:
            remedy = "set param_groups[0]['use_shadow'] = True to begin one at the next step"
            warnings.warn(f"the checkpoint's use_shadow=False is taken: {remedy}", stacklevel=callers_level())
        mine, stored = self._emotion.constants, self.param_groups[0].get("emotion_constants")
        saved = mine if stored is None else checks.emotion(stored).constants  # an earlier version did not store them
        if saved == mine:
            return
        if mine:
            what = f"the checkpoint's constants of the emotion are taken, {saved}, and not {mine}"
            warnings.warn(what, stacklevel=callers_level())
        self._emotion = self._emotion.having(saved)
        if self._recorder is not None:
            writer, self._recorder = self._recorder.writer, None
            self._recorder = Recorder(writer, self._emotion)

    # The state vector -------------------------------------------------------------------------------------------

    @property
    def _begun(self) -> bool:
        return self._calls > 0

    def _resume(self, had_shadow: bool = False, held: Mapping[Tensor, Tensor] | None = None) -> None:
        """Go on with a state that was loaded or copied, in an optimizer that had a shadow, and held weights, or not."""
        self.param_groups[0]["emotion"] = self._emotion.upgrade(self._vector())
        state = self._emotion.unpack(self._vector())
        self._calls = int(state.steps + state.skipped_steps)
        self._take_shown(held or {})
        self._intake.clear()
        self._take_options(had_shadow)

    def _fresh(self, anew: bool = False) -> Tensor:
        """A fresh state vector.

        With ``anew`` (reset), ``lr_ref`` is today's lr only; else also the constructor's and the peak.
        """
        self._prepare()
        device = self._home()
        vector = torch.tensor(self._emotion.initial(), dtype=widest(device), device=device)
        # Of groups that train. If a schedule has lowered the lr already, the constructor's is the one the user chose.
        names = ("lr",) if anew else ("lr", "lr_start", "lr_peak")
        rates = [like(vector[0], g[name]) for g in self._training() for name in names]
        vector[self._emotion.index("lr_ref")] = torch.stack(rates).max()
        return vector

    def _home(self) -> torch.device:
        """The device of the first parameter; the CPU if that is meta."""
        device: torch.device = next((p.device for p in self._params()), torch.device("cpu"))
        return torch.device("cpu") if device.type == "meta" else device

    def _vector(self) -> Tensor:
        """The emotion's state, where the first parameter is: a model may move after construction.

        If the user replaced the first group, the vector moves to the group that is first now.
        """
        group = self.param_groups[0]
        vector: Tensor | None = group.get("emotion", self._last_vector)
        if vector is None:
            vector = self._fresh()
        if vector.device != self._home():
            vector = vector.to(self._home(), widest(self._home()))
        self._last_vector = group["emotion"] = vector
        return vector

    def _peers(self) -> Ranks:
        """The process groups of a step, determined once: one may have to be created."""
        world = default_group()
        if self._ranks is None or world is not self._world:
            self._ranks, self._world = Ranks.of(self._params(), self._process_group), world
        return self._ranks

    def _weights(self, vector: Tensor, ranks: Ranks) -> Weights:
        """RMS of all weights that train, and the share of them in all-zero tensors."""
        weights = [p for p in self._params() if not (p.is_meta or is_lazy(p))]
        weights = [p for p in weights if p.dtype in checks.DENSE_FLOATS and (p.numel() or is_piece(p))]
        trained = [p for p in weights if p.requires_grad] or weights
        here = [local(p) for p in trained]
        norms, sizes = all_norms(here, vector), vector.new_tensor([p.numel() for p in here])
        squares, counts = ranks.whole(torch.stack([norms * norms, sizes]), trained)
        finite = squares.isfinite()  # a tensor with an infinity, as in a mask, says nothing of the scale
        norms, counts = torch.where(finite, squares, 0.0).sqrt(), torch.where(finite, counts, 0.0)
        count = counts.sum().clamp(min=1)
        return Weights(rms=torch.linalg.vector_norm(norms) / count.sqrt(), blank=((norms == 0) * counts).sum() / count)
