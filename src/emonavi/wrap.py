"""Emotional: the same emotion around any torch optimizer.

The wrapped optimizer keeps its rule, its state and its groups. Each of its steps is surrounded by the sequence of
``optimizer.py``, with three differences: the effective lr is in the groups only during the step, the optimizer never
sees a gradient that is not finite, and reflection uses the displacement of a sample of the parameters
(``displacement.py``).
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from emonavi import checks, shadow
from emonavi.active import Active, Found, Roster, note_peaks
from emonavi.bearer import Bearer
from emonavi.checkpoint import load_exactly
from emonavi.displacement import ROWS, compared, sample, samples
from emonavi.distributed import Ranks, agreed
from emonavi.dress import OPTIONS, adaptive, check, dress, fitting, wrappable
from emonavi.emotion import UNKNOWN_RMS, Emotion
from emonavi.groups import BOUNDS, OF_THE_RUN
from emonavi.machine import KEPT, Loss, Mood, Options, Sums, Weights
from emonavi.notices import callers_level
from emonavi.scalars import Number, exp
from emonavi.spelling import spelled
from emonavi.sweep import all_norms, no_sums, wide

__all__ = ["Emotional"]

# Target of trust and fall of the lr (see optimizer.py), for any rule. EmoNavi's fall of 1.5 is no better around AdamW
# and worse around SGD (docs/benchmarks.md).
_TARGET, _FALL = (0.0, 0.0), 2.0
# Memories in torch's own optimizers that have the shape of their parameter.
_OF_ONE_SHAPE = (
    *("acc_delta", "ax", "exp_avg", "exp_avg_sq", "exp_inf", "grad_avg", "max_exp_avg_sq", "momentum_buffer", "prev"),
    *("square_avg", "step_size", "sum"),
)


class Emotional(Bearer):
    """Any torch optimizer, with an emotion that listens to the loss and sets its lr.

    Groups, state, defaults and checkpoints are those of the wrapped optimizer, which is available as ``inner``. Its own
    checkpoints load as well, with a fresh emotion. State: at most 24 KiB more for each tensor (float64: 48).

    Args:
        optimizer: the optimizer to wrap. Its lr is the first guess; the first step is scaled so that it moves the
            weights by a third of a percent at most.
        emotion: ``"adaptive"``, an :class:`~emonavi.Emotion`, or a dict of its constants. The published generations
            include a rule, and are for the siblings only.
        use_shadow: keep a float32 copy of the parameters that follows them slowly: a panic restores it and
            :meth:`calm` evaluates with it. 4 bytes per parameter.
        use_trust: let reflection set the drive. False: the drive starts at 1, and only brake and panic move it.
        max_norm: how tightly outlying gradients are scaled down, against the run's own history; smaller is tighter,
            0 is off.
        min_lr: the effective lr does not fall below this, or below the group's lr where that is lower.
        max_lr: the effective lr does not rise above this.
        writer: an object with ``add_scalar(tag, value, step)``, or a log directory for TensorBoard.
        capture: ``"auto"`` hears the loss at backward; False only takes the losses it is told.
        on_missing_loss: ``"warn"`` (once, after several steps), ``"ignore"`` or ``"error"``.
        process_group: over which the replicas' losses are averaged: ``"auto"`` is the default group once
            ``torch.distributed`` is initialised, None is never.

    Raises:
        ValueError: an option is out of range; or the optimizer needs a closure, has an emotion already, or has no lr in
            its groups.
        TypeError: an option is unknown or of the wrong type, or ``optimizer`` is not a torch optimizer.

    Example:
        >>> import torch, emonavi
        >>> model = torch.nn.Linear(4, 1)
        >>> optimizer = emonavi.Emotional(torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9))
        >>> for _ in range(3):
        ...     optimizer.zero_grad()
        ...     model(torch.ones(8, 4)).square().mean().backward()
        ...     loss = optimizer.step()
        >>> optimizer.emotion.steps, [group["lr"] for group in optimizer.param_groups]
        (3, [0.1])
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        *,
        emotion: str | Mapping[str, float] | Emotion = "adaptive",
        use_shadow: bool | None = None,
        use_trust: bool | None = None,
        max_norm: float | None = None,
        min_lr: float | None = None,
        max_lr: float | None = None,
        writer: Any = None,
        capture: str | bool = "auto",
        on_missing_loss: str = "warn",
        process_group: Any = "auto",
    ) -> None:
        machine = adaptive(emotion)
        own = checks.options(machine, spelled({
            "use_shadow": use_shadow, "use_trust": use_trust, "max_norm": max_norm, "min_lr": min_lr, "max_lr": max_lr,
        }))  # fmt: skip
        settings = checks.settings(capture, on_missing_loss, process_group)
        wrappable(optimizer)
        for group in optimizer.param_groups:
            check(group, own["max_norm"], own["min_lr"], own["max_lr"])
        self.inner = optimizer
        defaults = dict(optimizer.defaults)
        super().__setstate__({})  # makes torch's hooks only: groups and state are the wrapped optimizer's
        optimizer.defaults = defaults  # torch adds one
        self._setup(machine, *settings)
        own |= {ours: own.pop(name) for ours, name in BOUNDS.items()}
        for group in self.param_groups:
            # Left by an earlier wrapper; the optimizer may have moved since without it.
            for name in OF_THE_RUN:
                group.pop(name, None)
            earlier = group["params"] if "inner" in group else []
            if earlier:
                shadow.hide(optimizer.state)
            for p in earlier:
                for name in ("step_sample", "shadow"):
                    optimizer.state.get(p, {}).pop(name, None)
            dress(optimizer, group, own)
        self._own = own
        self._had_shadow = bool(own["use_shadow"])
        self.param_groups[0]["emotion"] = self._fresh()
        self._put_in_group()
        self.writer = writer

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The wrapped optimizer's own."""
        return self.inner.param_groups

    @param_groups.setter  # as Lightning's fine-tuning does after a restart
    def param_groups(self, groups: list[dict[str, Any]]) -> None:
        self.inner.param_groups = groups

    @property
    def state(self) -> Any:
        """The wrapped optimizer's own, with a ``step_sample`` and perhaps a ``shadow`` for each tensor."""
        return self.inner.state

    @state.setter
    def state(self, state: Any) -> None:
        self.inner.state = state

    @property
    def defaults(self) -> dict[str, Any]:  # type: ignore[override]
        """The wrapped optimizer's own."""
        return self.inner.defaults

    # The step ---------------------------------------------------------------------------------------------------

    def _move(self, found: Found, heard: Loss | None) -> None:
        """Make a step of the parameters that have a gradient."""
        vector = self._vector()
        self._check_fit(found.params)
        found = found.where([bool(p.numel()) for p in found.params])
        heard, norm = agreed(heard, all_norms(found.grads, vector, fused=vector.is_cpu), found.params, self._peers())
        self._missing.note(heard)
        active = _alike(found, self.state, self.param_groups, vector)
        note_peaks(self.param_groups)
        options = active.options(self.param_groups, _TARGET, _FALL, fades=False, plain=True)
        state: Any = self._emotion.unpack(vector, plain=True)
        state = self._emotion.give_way(state, options.lr, options.use_trust)
        before = self._feel(state, heard, vector)
        state, acts, grad_scale = self._emotion.guard(before, norm, options)
        if not acts and not state.steps:
            state = before._replace(skipped_steps=state.skipped_steps)  # before the first step there is no drive to cut
        mood = self._emotion.mood(state, acts, grad_scale, options)
        self._lean(active, mood, fused=True)
        sums = no_sums(active.lr)
        if acts:
            state, sums = self._step_inner(active, mood, state, options)
        self._end(vector, self._emotion.reflect(state, sums, acts, options), acts)

    def _stay(self, found: Found) -> None:
        """Let the wrapped optimizer step at lr 0: distributed checkpoints create state that way."""
        if bool(torch.isfinite(all_norms(found.grads, self._vector())).all()):
            self.inner.step()
            self._make_states(found.params)
        self._intake.clear()

    def _step_inner(self, active: Active, mood: Mood, state: Any, options: Options) -> tuple[Any, Sums]:
        """Let the wrapped optimizer step, and compare the gradient with the step before."""
        params, rates = active.roster.params, active.rates(mood)[0]
        first = self._weights(rates, Ranks()) if not state.steps else None
        copies = [p.clone() for p in params] if first is not None and options.use_trust else []
        # Sampled before the step, since some optimizers write to the gradients.
        seen = (samples(active.grads, rates), samples(params, rates)) if options.use_trust else None
        with self._acting(active, rates, mood.grad_scale):
            self.inner.step()
        if first is not None:
            rms = torch.where(first.rms > 0, first.rms, UNKNOWN_RMS) / _reach(active, copies, rates)
            state = self._emotion.begin(state, Weights(rms, first.blank), options)
            user, rates = rates, active.rates(mood._replace(drive=exp(state.log_drive)))[0]
            for p, copy, share in zip(params, copies, (rates / user).nan_to_num().tolist(), strict=False):
                p.copy_(torch.where(p == copy, p, torch.lerp(copy, p, share)))  # of two infinities it makes NaN
        self._make_states(params)
        return state, no_sums(rates) if seen is None else self._reflected(active, *seen, rates)

    @contextmanager
    def _acting(self, active: Active, rates: Tensor, grad_scale: Number) -> Iterator[None]:
        """Put the effective lr, and the scaled gradients if they are an outlier, in place of the user's."""
        acting = dict(zip(active.roster.groups, rates.tolist(), strict=True))
        lrs = {i: self.param_groups[i]["lr"] for i in acting}
        scaled = list(zip(active.roster.params, active.grads, strict=True)) if grad_scale != 1 else []
        try:
            for i, lr in lrs.items():
                self.param_groups[i]["lr"] = torch.full_like(lr, acting[i]) if isinstance(lr, Tensor) else acting[i]
            for p, grad in scaled:
                p.grad = grad * grad_scale
            yield
        finally:
            for i, lr in lrs.items():
                self.param_groups[i]["lr"] = lr
            for p, grad in scaled:
                p.grad = grad

    def _make_states(self, params: list[Tensor]) -> None:
        """Make missing state of the emotion. After the optimizer's step: it makes its own only where state is empty."""
        group = self.param_groups[0]
        if self._had_shadow and not group["use_shadow"]:
            shadow.drop(self._params(), self.state)  # only then: the optimizer may keep something of that name
        self._had_shadow = bool(group["use_shadow"])
        for p in params:
            state = self.state[p]
            if group["use_trust"] and "step_sample" not in state:
                state["step_sample"] = wide(p.detach()).new_zeros(ROWS, len(sample(p)))
            if group["use_shadow"]:
                shadow.make(p, state)

    def _shapes(self, param: Tensor) -> dict[str, torch.Size]:
        size = len(sample(torch.empty_like(param, device="meta")))
        shapes = {"step_sample": torch.Size((ROWS, size))}
        if type(self.inner).__module__.startswith("torch.optim"):
            shapes |= dict.fromkeys(_OF_ONE_SHAPE, param.shape)
        if self.param_groups[0]["use_shadow"]:  # without, the optimizer may keep something of that name
            shapes |= {"shadow": param.shape, "raw": param.shape}
        return shapes

    def _reflected(self, active: Active, grads: Tensor, before: Tensor, rates: Tensor) -> Sums:
        """The sums of reflection for each tensor, from samples. Also remembers the step."""
        params, groups = active.roster.params, active.roster.groups
        kept = [self.state[p]["step_sample"] for p in params]
        products = compared(kept, params, before, grads, rates)
        products[0] *= rates.new_tensor([-1.0 if self.param_groups[i]["maximize"] else 1.0 for i in groups])
        return Sums(products, rates)

    # Groups and checkpoints -------------------------------------------------------------------------------------

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As the wrapped optimizer does. It also begins a new window of losses."""
        self.inner.zero_grad(set_to_none)
        self._intake.drop()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of parameters to the wrapped optimizer; the emotion continues.

        Args:
            param_group: ``"params"`` and the group's own options: the wrapped optimizer's, ``min_lr`` and ``max_lr``.

        Raises:
            ValueError: an option is out of range, or is one for all groups; or a parameter cannot be moved. Nothing has
                changed then.
            TypeError: it is no dict.
        """
        checks.mapping(param_group)
        names = ("lr", "use_shadow", "use_trust", "max_norm", *BOUNDS.values())
        param_group.update(spelled({name: param_group[name] for name in names if name in param_group}))
        own = self._options()
        checks.shared({k: v for k, v in param_group.items() if k != "capturable"}, own)
        self.inner.add_param_group(param_group)
        self._left = None
        group = self.param_groups[-1]
        for ours, name in BOUNDS.items():
            given = group.pop(name, None)
            own[ours] = group.get(ours, own[ours]) if given is None else given
        try:
            check(group, own["max_norm"], own["lr_floor"], own["lr_ceiling"])
        except (TypeError, ValueError):
            self.param_groups.pop()
            raise
        dress(self.inner, group, own)

    def _prepare(self) -> None:
        """Adopt groups that were added directly to the wrapped optimizer."""
        for group in self.param_groups:
            if "lr_floor" not in group:
                own = self._options()
                check(group, own["max_norm"], own["lr_floor"], own["lr_ceiling"])
                dress(self.inner, group, own)

    def _options(self) -> dict[str, Any]:
        """Our options as the first group holds them; without a group, as they were last."""
        first = next(iter(self.param_groups), {})
        if "lr_floor" in first:
            self._own = {name: first[name] for name in OPTIONS}
        return dict(self._own)

    def eval(self) -> None:
        """As a sibling's; a wrapped optimizer that has modes of its own, as schedule-free ones, is put into its."""
        if _has_modes(self.inner):
            self.inner.eval()  # type: ignore[attr-defined]
        else:
            super().eval()

    def train(self) -> None:
        """As a sibling's; a wrapped optimizer that has modes of its own, as schedule-free ones, is put into its."""
        super().train()
        if _has_modes(self.inner):
            self.inner.train()  # type: ignore[attr-defined]

    def state_dict(self) -> dict[str, Any]:
        """The wrapped optimizer's; the emotion is in the first group."""
        self._put_in_group()
        return self.inner.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load into the wrapped optimizer, with each state tensor in the dtype that it was saved in.

        A checkpoint of the wrapped optimizer alone is accepted; a warning says that the emotion is a fresh one.

        Raises:
            ValueError: the checkpoint is of another emotion, of another optimizer or of a model of other shapes;
                nothing has changed then.
        """
        own, held = self._options(), self._held()
        load_exactly(
            self.inner.load_state_dict, self.inner, state_dict, lambda final: fitting(final, self), as_placed=True
        )
        name = type(self.inner).__name__
        for group in self.param_groups:
            group["inner"] = name  # an earlier version did not store it
        if "emotion" not in self.param_groups[0]:
            for group in self.param_groups:
                dress(self.inner, group, own)
            self.param_groups[0]["emotion"] = self._fresh()
            what = f"the checkpoint is of {name} alone: it goes on under a fresh emotion"
            warnings.warn(what, stacklevel=callers_level())
        self._had_shadow = bool(self.param_groups[0]["use_shadow"])
        self._resume(own["use_shadow"], held)

    def register_state_dict_pre_hook(self, hook: Any, prepend: bool = False) -> Any:
        """Register on the wrapped optimizer, which makes the dict; the hook gets that optimizer."""
        return self.inner.register_state_dict_pre_hook(hook, prepend)

    def register_state_dict_post_hook(self, hook: Any, prepend: bool = False) -> Any:
        """Register on the wrapped optimizer, which makes the dict; the hook gets that optimizer."""
        return self.inner.register_state_dict_post_hook(hook, prepend)

    def register_load_state_dict_pre_hook(self, hook: Any, prepend: bool = False) -> Any:
        """Register on the wrapped optimizer, which loads; the hook gets that optimizer."""
        return self.inner.register_load_state_dict_pre_hook(hook, prepend)

    def register_load_state_dict_post_hook(self, hook: Any, prepend: bool = False) -> Any:
        """Register on the wrapped optimizer, which loads; the hook gets that optimizer."""
        return self.inner.register_load_state_dict_post_hook(hook, prepend)

    def __getstate__(self) -> dict[str, Any]:
        self._prepare()
        self._put_in_group()
        return {"inner": self.inner, "_settings": self._settings()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        settings = state.pop("_settings")
        super().__setstate__(state)
        self._setup(*settings)
        self._options()
        self._had_shadow = bool(self.param_groups[0]["use_shadow"])
        self._resume()


def _has_modes(optimizer: Any) -> bool:
    return all(callable(getattr(optimizer, name, None)) for name in ("eval", "train"))


def _alike(found: Found, states: Any, groups: list[dict[str, Any]], vector: Tensor) -> Active:
    """Active tensors of a wrapped step. They have no drive of their own, since one lr serves the whole group."""
    own = {p: states.get(p, {}) for p in found.params}  # looked up, an empty one would come into being
    roster = Roster.of(found, own, len(groups), fused=False)
    kept = [vector.new_full((len(found.params),), value) for value in KEPT.values()]
    return Active.of(roster, found.grads, groups, lambda group: 0.0, vector, kept)


def _reach(active: Active, copies: list[Tensor], rates: Tensor) -> float:
    """Size of a first step per unit of lr: rms over the coordinates with a gradient. Adam's is 1."""
    moved, count = 0.0, 0
    for p, copy, grad, rate in zip(active.roster.params, copies, active.grads, rates.tolist(), strict=False):
        if rate:
            step = torch.where(p == copy, 0.0, wide(p) - wide(copy))  # of two infinities: none
            moved += (float(torch.linalg.vector_norm(step)) / rate) ** 2
            count += int(grad.count_nonzero())
    return math.sqrt(moved / count) if moved and count else 1.0
