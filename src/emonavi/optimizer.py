"""EmoOptimizer: groups, buckets, state and the library's only ``step()``.

One step is, in order: which loss counts (``intake``), what it feels like (``emotion``), may this gradient act (the
guard), one sweep over the tensors (a rule file), what the sweep says of the last step (reflection). The emotion knows
numbers only and a rule knows tensors and ready scalars only; this is the one place that knows both.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch._compile import _disable_dynamo  # unlike torch.compiler.disable, it does not import dynamo (1.5 s)

from emonavi import checks
from emonavi.active import Active, bounded, per_tensor
from emonavi.capture import listen
from emonavi.checkpoint import load_exactly, taken_over
from emonavi.distributed import Ranks, agreed, hand_on, is_piece, local, local_grad
from emonavi.emotion import Emotion
from emonavi.intake import Intake, Missing
from emonavi.machine import Machine, Mood, Options, Sums, Weights
from emonavi.monitor import Recorder, Snapshot
from emonavi.presets import Preset
from emonavi.scalars import Number
from emonavi.sweep import Reflected, Rule, all_norms, gather, to_home, wide

__all__ = ["EmoOptimizer"]

ParamsT: TypeAlias = Iterable[Any]


class EmoOptimizer(torch.optim.Optimizer):
    """Base of the siblings. A sibling adds its state, its scalars and its rule; see ``navi.py``.

    Args:
        params: iterable of parameters, of ``(name, parameter)`` pairs, or of dicts that define groups.
        lr: first guess of the learning rate; the emotion multiplies it by its drive. A float or a 0-d tensor.
        betas: decay rates of the first and the second memory.
        eps: added to the denominator.
        weight_decay: decoupled weight decay; it follows the drive.
        emotion: ``"adaptive"``, a published generation (``"v1"``, ``"v3"``, ``"v4"``), or an :class:`~emonavi.Emotion`.
        use_shadow: keep a float32 copy of the parameters that follows them slowly: a panic restores it and
            :meth:`calm` evaluates with it. 4 bytes per parameter.
        use_trust: let reflection set the drive. False: the drive starts at 1, and only brake and panic move it.
        max_norm: how tightly outlying gradients are scaled down, against the run's own history; smaller is tighter,
            0 is off. In ``"v4"``: the norm above which the lr shrinks for good.
        min_lr: the effective lr does not fall below this, or below the group's lr where that is lower.
        max_lr: the effective lr does not rise above this.
        writer: an object with ``add_scalar(tag, value, step)``, or a log directory for TensorBoard.
        capture: ``"auto"`` hears the loss at backward; False only takes the losses it is told.
        on_missing_loss: ``"warn"`` (once, after several steps), ``"ignore"`` or ``"error"``.
        process_group: over which the ranks' losses are averaged: ``"auto"`` is the default group once
            ``torch.distributed`` is initialised, or the mesh that sharded parameters were cut from. None is never, but
            for shards, which must feel one loss.
        maximize: climb instead of descend.
        foreach: update lists of tensors in cache-sized pieces (None: yes) or tensor by tensor (False).
        fused: not available yet; True raises.
        capturable: never branch on a tensor's value, on the CPU too (on other devices it is always so).

    Raises:
        ValueError: an option is out of range, or the emotion does not have it. Strings that spell a number, a flag or
            None are taken for it, since command lines know nothing else.
        TypeError: an option is unknown or of the wrong type.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
        *,
        emotion: str | Emotion | Preset = "adaptive",
        use_shadow: bool | None = None,
        use_trust: bool | None = None,
        max_norm: float | None = None,
        min_lr: float | None = None,
        max_lr: float | None = None,
        writer: Any = None,
        capture: str | bool = "auto",
        on_missing_loss: str = "warn",
        process_group: Any = "auto",
        maximize: bool = False,
        foreach: bool | None = None,
        fused: bool | None = None,
        capturable: bool = False,
    ) -> None:
        machine = checks.emotion(emotion)
        felt = checks.spelled({
            "use_shadow": use_shadow, "use_trust": use_trust, "max_norm": max_norm, "min_lr": min_lr, "max_lr": max_lr,
        })  # fmt: skip
        defaults = checks.spelled({
            "lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, **checks.options(machine, felt),
            "maximize": maximize, "foreach": foreach, "fused": fused, "capturable": capturable,
        })  # fmt: skip
        hears, missing, group = (
            checks.capture(capture), checks.on_missing_loss(on_missing_loss), checks.process_group(process_group),
        )  # fmt: skip
        super().__init__(params, defaults)
        self._setup(machine, hears, missing, group)
        # Made here and of fixed shape: state that appears later, or elsewhere, is lost by distributed checkpoints.
        self.param_groups[0]["emotion"] = self._fresh()
        self.writer = writer

    def _setup(self, machine: Machine, capture: bool, on_missing_loss: str, process_group: Any) -> None:
        """Set what is not part of a checkpoint."""
        self._begun = False
        self._emotion = machine
        self._capture = capture
        self._missing = Missing(on_missing_loss)
        self._process_group = process_group
        self._ranks = Ranks()
        self._is_calm = False
        self._is_loaded = False
        self._recorder: Recorder | None = None
        me = weakref.ref(self)  # an intake that held its optimizer would keep it alive

        def params() -> Iterator[Tensor]:
            alive = me()
            return (p for g in alive.param_groups for p in g["params"]) if alive is not None else iter(())

        self._intake = Intake(params)
        if capture:
            listen(self._intake)

    @classmethod
    def describe(cls, head: str, example: str) -> str:
        """A sibling's docstring: its own head and example around the arguments that all share."""
        shared = (EmoOptimizer.__doc__ or "").partition("\n\n")[2]  # None under python -OO
        return f"{head}\n\n{shared.rstrip()}\n{example}"

    # What a sibling adds ----------------------------------------------------------------------------------------

    def _layout(self, param: Tensor) -> tuple[str, ...]:
        """Names of the state tensors of a parameter, in the order that its rule takes them."""
        raise NotImplementedError

    def _init_state(self, param: Tensor) -> dict[str, Tensor]:
        """The state tensors of a parameter, under the names of its layout."""
        raise NotImplementedError

    def _rule(self, layout: tuple[str, ...]) -> tuple[Rule, bool]:
        """The rule for a layout, and whether it is elementwise."""
        raise NotImplementedError

    def _scalars(
        self, layout: tuple[str, ...], group: dict[str, Any], steps: Tensor, step_size: Tensor, trust: Tensor | None
    ) -> dict[str, Any]:
        """The rule's scalars: a 1-D tensor holds one value for each tensor of the bucket, all else goes to each."""
        raise NotImplementedError

    def _wholes(self, active: Active, grad_scale: Number) -> list[Any]:
        """For each tensor, what its rule has to know of the parts of a sharded gradient on other ranks; else None."""
        return active.wholes

    # Target of trust, in standard deviations below 0. With Adam's momentum, 0 is the exact line search.
    _hold = 0.0
    # Whether the rule's step has the same size whatever the gradient's, now and over the last thousand steps.
    _fades = False

    def _decay_rate(self, group: dict[str, Any]) -> float:
        """Weight decay for each unit of effective lr."""
        return float(group["weight_decay"])

    # The step ---------------------------------------------------------------------------------------------------

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
            ValueError: both ``loss`` and a closure that returns one are given, or the loss is not one number.
            RuntimeError: a gradient is sparse, or the optimizer is inside :meth:`calm`. Nothing has changed then.
        """
        self._refuse_inside_calm("step()")
        heard, returned = self._intake.take(loss, closure)
        found, vector = self._found(), self._vector()
        moves = self._moves(found)
        if moves:
            checks.memory([p for p, _ in found])
            moved = [(p, i) for p, i in found if p.numel() or is_piece(p)]
            params, grads = [p for p, _ in moved], [local_grad(p) for p, _ in moved]
            ranks = self._peers()
            heard, norm = agreed(heard, all_norms(grads, vector), params, ranks)
            self._missing.note(heard, type(self).__name__)
        # Made without a move, too: distributed checkpoints make state by a step at lr 0.
        for p, _ in found:
            self._make_state(p)
        if not moves:
            if found:
                self._intake.clear()
            return returned
        if self._is_loaded:
            hand_on(params, [self.state[p] for p in params], ranks)
            self._is_loaded = False
        active = Active.of(moved, grads, self.state, self.param_groups, self._decay_rate, vector)
        # On the CPU nothing has to wait for a value: the emotion is computed in plain numbers, and may be branched on.
        predicated = vector.device.type != "cpu" or bool(self.param_groups[0]["capturable"])
        state: Any = self._emotion.unpack(vector, plain=not predicated)
        options = active.options(self.param_groups, self._hold, self._fades)
        if not self._begun:
            state = self._emotion.begin(state, self._weights(vector, ranks), active.lr.max(), options)
        if heard is not None:
            state = self._emotion.feel(state, self._signed(heard.value, vector), heard.window)
        state, acts, grad_scale = self._emotion.guard(state, norm, options)
        mood = self._emotion.mood(state, acts, grad_scale, options)
        sums = self._sweep(active, mood, acts, options, predicated)
        if self._emotion.reflects and options.use_trust:
            grad_step, grad_grad, step_step = ranks.whole(torch.stack(sums[:3]), params).unbind()
            sums = Sums(grad_step, grad_grad, step_step, sums.weight)
        state = self._emotion.reflect(state, sums, acts, options)
        active.keep(acts, *self._emotion.reflect_each(state, active.drive, active.trust, active.steps - 1, sums))
        vector.copy_(self._emotion.pack(state))
        self._begun = True
        self._intake.clear()
        if self._recorder is not None:
            self._recorder.record(vector, self._effective_lr(vector))
        return returned

    def _found(self) -> list[tuple[Tensor, int]]:
        """Parameters that have a gradient, with the place of their group."""
        every = ((p, i) for i, g in enumerate(self.param_groups) for p in g["params"])
        # A piece that has nothing here has no gradient either, but it moves elsewhere, and all ranks count it.
        found = [(p, i) for p, i in every if p.grad is not None or (is_piece(p) and p.requires_grad and not p.numel())]
        for p, _ in found:
            checks.gradient(p)
        return found

    def _moves(self, found: list[tuple[Tensor, int]]) -> bool:
        """Whether anything is to move. An lr that lives on a device is never read: it counts as not 0."""
        rates = (self.param_groups[i]["lr"] for i in {i for p, i in found if p.numel() or is_piece(p)})
        return any(bool(lr != 0) if not isinstance(lr, Tensor) or lr.device.type == "cpu" else True for lr in rates)

    def _make_state(self, param: Tensor) -> None:
        """Make the state of a parameter where it is missing."""
        state: dict[str, Any] = self.state[param]
        if not state:
            for name, value in (("step", 0.0), ("drive", 1.0), ("trust", 0.0)):
                state[name] = torch.full((), value, dtype=torch.float32, device=param.device)
            state.update(self._init_state(param))
        if "shadow" not in state and self.param_groups[0]["use_shadow"]:
            state["shadow"] = wide(param.detach()).clone()

    def _sweep(self, active: Active, mood: Mood, acts: Number, options: Options, predicated: bool) -> Sums:
        """Move every tensor, bucket by bucket, and gather what reflection needs."""
        own_lr, step_sizes, decays = active.rates(mood)
        reflect = self._emotion.reflects and options.use_trust
        skip = not predicated and not bool(acts)
        if not skip:
            active = active._replace(wholes=self._wholes(active, mood.grad_scale))
        parts: list[tuple[list[int], Reflected]] = []
        for (index, *_, layout), places in active.buckets(self._layout).items():
            group = self.param_groups[index]
            rule, cut = self._rule(layout)
            how = {"cut": cut, "foreach": group["foreach"] is not False, "predicated": predicated}
            bucket = active.bucket(places, layout, **how)
            if options.use_shadow:
                bucket.lean([active.states[i]["shadow"] for i in places], mood.pull, mood.follow)
            if skip:
                continue
            at = torch.tensor(places, device="cpu").to(active.lr.device, non_blocking=True)
            scalars = self._scalars(layout, group, active.steps[at], step_sizes[at], mood.trust)
            scalars |= {"decay": decays[at] if self._decay_rate(group) else None, "reflect": reflect}
            if (whole := active.wholes[places[0]]) is not None:
                scalars["whole"] = whole
            parts += bucket.move(rule, scalars, -mood.grad_scale if group["maximize"] else mood.grad_scale, acts)
        # The first step of a tensor has none before it to be compared with.
        return gather(parts, torch.where(active.steps > 1, own_lr, 0.0))

    def _signed(self, loss: Tensor | float, vector: Tensor) -> Tensor:
        """The loss as the emotion takes it: a number to be made small."""
        value = to_home(loss, vector).detach() if isinstance(loss, Tensor) else vector.new_full((), loss)
        return -value if self.param_groups[0]["maximize"] else value

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
        return self._effective_lr(self._vector()).tolist()

    def _effective_lr(self, vector: Tensor) -> Tensor:
        drive = vector[self._emotion.index("log_drive")].exp() if self._begun else vector.new_ones(())
        one_each = [1] * len(self.param_groups)
        lr, low, wall = (
            per_tensor([g[k] for g in self.param_groups], one_each, vector) for k in ("lr", "lr_floor", "lr_ceiling")
        )
        return bounded(lr, drive, low, wall)

    # What can be told -------------------------------------------------------------------------------------------

    def observe(self, loss: Tensor | float) -> None:
        """Set the loss of the next step aside; several observations are averaged. Nothing moves before ``step()``."""
        self._intake.observe(loss)

    def reset_emotion(self) -> None:
        """Begin a new stage (another task, stacked training): weights and moments stay, the emotion is fresh."""
        self._refuse_inside_calm("reset_emotion()")
        self._vector().copy_(self._fresh())
        self._begun = False
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

        While it lasts, a copy of the weights is held. BatchNorm's statistics are not averaged: where a model has
        them, ``torch.optim.swa_utils.update_bn`` sets them from data.

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
        self._refuse_inside_calm("calm()")
        pairs = [
            (p, s["shadow"]) for g in self.param_groups for p in g["params"] if "shadow" in (s := self.state.get(p, {}))
        ]
        if not pairs:
            raise RuntimeError("calm() has no shadow to show: construct with use_shadow=True and make a step first")
        shown, shadows = ([local(t.detach()) for t in some] for some in zip(*pairs, strict=True))
        held = [p.clone() for p in shown]
        self._is_calm = True
        try:
            torch._foreach_copy_(shown, shadows)
            yield
        finally:
            torch._foreach_copy_(shown, held)
            self._is_calm = False

    def _refuse_inside_calm(self, what: str) -> None:
        if self._is_calm:
            raise RuntimeError(f"{what} inside calm(): the weights there are the shadow's; leave the block first")

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

    # Groups and checkpoints -------------------------------------------------------------------------------------

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of parameters. They start with their own step count and drive; the emotion continues."""
        param_group.update(checks.spelled(param_group))  # torch, too, fills in the caller's dict and keeps it
        for name in checks.SHARED:
            if param_group.get(name, 0) is None:
                del param_group[name]  # the choice is left to the emotion
        checks.shared(param_group, self.defaults)
        checks.group({**self.defaults, **param_group})
        super().add_param_group(param_group)
        self._ranks = Ranks()
        group = self.param_groups[-1]
        try:
            checks.parameters(group["params"])
        except (TypeError, ValueError):
            self.param_groups.pop()
            raise
        group.setdefault("lr_start", group["lr"].clone() if isinstance(group["lr"], Tensor) else group["lr"])
        group.setdefault("lr_peak", 0.0)
        # Under names of our own: OneCycleLR writes its plan into "min_lr" and "max_lr".
        group["lr_floor"], group["lr_ceiling"] = group.pop("min_lr"), group.pop("max_lr")

    def state_dict(self) -> dict[str, Any]:
        """As in ``torch.optim``; the emotion is in the first group."""
        self._refuse_inside_calm("state_dict()")
        return super().state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As in ``torch.optim``, but state keeps the dtype that it was saved in, so that resuming is exact.

        Of an optimizer without an emotion, as AdamW is, the memories are taken over where they are this rule's. A
        warning says so.

        Raises:
            ValueError: the checkpoint is of another emotion or of another optimizer; nothing has changed then.
        """
        self._refuse_inside_calm("load_state_dict()")
        load_exactly(super().load_state_dict, self, state_dict, self._fitting)
        self._is_loaded = True
        self._note_begun()
        self._intake.clear()

    def _fitting(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        """Make of a checkpoint what can be loaded; refuse that of another emotion, or with other memories."""
        params = [p for g in self.param_groups for p in g["params"]]
        layouts = [self._layout(p) for p in params]
        if "emotion" not in (state_dict.get("param_groups") or [{}])[0]:
            groups = [{**g, "lr_peak": 0.0} for g in super().state_dict()["param_groups"]]
            groups[0]["emotion"] = self._fresh()
            own = {"param_groups": groups}
            state_dict = taken_over(state_dict, own, [p.shape for p in params], layouts) or state_dict
        checks.checkpoint(state_dict, self._emotion)
        # Of the defaults only our own: torch, and whoever else, may add to them.
        options = {*checks.NUMBERS, *checks.FLAGS, "betas"} & set(self.defaults) - {"min_lr", "max_lr"}
        options |= {"lr_floor", "lr_ceiling", "lr_start", "lr_peak"}
        checks.same_optimizer(state_dict, options, layouts)
        return state_dict

    def __getstate__(self) -> dict[str, Any]:
        self._refuse_inside_calm("copying")
        group = None if self._process_group is None else "auto"  # a process group cannot be copied
        settings = (self._emotion, self._capture, self._missing.action, group)
        return {**super().__getstate__(), "_settings": settings}

    def __setstate__(self, state: dict[str, Any]) -> None:
        settings = state.pop("_settings", None)
        super().__setstate__(state)
        if settings is not None:  # unpickled or copied: torch keeps groups and state only
            self._setup(*settings)
            self._note_begun()

    def _note_begun(self) -> None:
        """Whether a real step was made, read from the state."""
        state = self._emotion.unpack(self._vector())
        self._begun = bool(state.steps + state.skipped_steps > 0)

    def _fresh(self) -> Tensor:
        """The state vector before anything was felt."""
        device = self._home()
        vector = torch.tensor(self._emotion.initial(), dtype=_widest(device), device=device)
        # The highest so far: a stage that begins at the low end of a schedule must not take that for the user's lr.
        rates = [torch.as_tensor(g[k]).to(vector) for g in self.param_groups for k in ("lr", "lr_start", "lr_peak")]
        vector[self._emotion.index("lr_ref")] = torch.stack(rates).max()
        return vector

    def _home(self) -> torch.device:
        """The device of the first parameter; the CPU where it has no memory yet."""
        device: torch.device = next((p.device for g in self.param_groups for p in g["params"]), torch.device("cpu"))
        return torch.device("cpu") if device.type == "meta" else device

    def _vector(self) -> Tensor:
        """The emotion's state, where the first parameter is: a model may move after construction."""
        vector: Tensor = self.param_groups[0]["emotion"]
        if vector.device != self._home():
            vector = self.param_groups[0]["emotion"] = vector.to(self._home(), _widest(self._home()))
        return vector

    def _peers(self) -> Ranks:
        """Who is asked in a step; found out once, since a process group may have to be made."""
        if self._ranks == Ranks():
            self._ranks = Ranks.of((p for g in self.param_groups for p in g["params"]), self._process_group)
        return self._ranks

    def _weights(self, vector: Tensor, ranks: Ranks) -> Weights:
        """What all weights that train are like."""
        weights: list[Tensor] = [p for g in self.param_groups for p in g["params"] if not p.is_meta]
        weights = [p for p in weights if p.numel() or is_piece(p)]
        trained = [p for p in weights if p.requires_grad] or weights
        here = [local(p) for p in trained]
        norms, sizes = all_norms(here, vector), vector.new_tensor([p.numel() for p in here])
        squares, counts = ranks.whole(torch.stack([norms * norms, sizes]), trained)
        norms = squares.sqrt()
        return Weights(
            rms=torch.linalg.vector_norm(norms) / counts.sum().sqrt(),
            blank=((norms == 0) * counts).sum() / counts.sum(),
        )


def _widest(device: torch.device) -> torch.dtype:
    return torch.float32 if device.type == "mps" else torch.float64
