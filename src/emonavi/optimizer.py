"""EmoOptimizer: groups, buckets, state and how the siblings move.

One step is, in order: which loss counts (``intake``), what the emotion makes of it (``emotion``), whether this gradient
may act (the guard), one sweep over the tensors (a rule file), and what the sweep says about the last step (reflection).
The emotion knows only numbers, a rule only tensors and ready scalars. This file connects the two.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy
from torch.optim.optimizer import ParamsT

from emonavi import checks, kernels, lowbit, shadow
from emonavi.active import Active, Found, Roster, note_peaks
from emonavi.bearer import Bearer
from emonavi.checkpoint import LATER, load_exactly, loadable
from emonavi.distributed import Ranks, agreed, hand_on, is_part, is_piece, is_sharded, local, local_grad
from emonavi.emotion import Emotion
from emonavi.groups import BOUNDS, of_the_run
from emonavi.kernels import choose, wanted
from emonavi.machine import KEPT, Loss, Mood, Options, Sums
from emonavi.memories import fresh, together
from emonavi.presets import PRESETS, Preset
from emonavi.release import Release
from emonavi.scalars import Number
from emonavi.spelling import spelled
from emonavi.sweep import Bucket, Reflected, Rule, all_norms, gather, integers, no_sums

__all__ = ["EmoOptimizer"]

if TYPE_CHECKING:
    from emonavi.kernels.plan import Plan

EARLY = 20  # calls of step() by which the second finite gradient has come, even if some before it were not finite


class EmoOptimizer(Bearer):
    """Base of the siblings. A sibling adds its state, its scalars and its rule; see ``navi.py``.

    Args:
        params: iterable of parameters, of ``(name, parameter)`` pairs, or of dicts that define groups.
        lr: first guess of the learning rate; the emotion multiplies it by its drive. A float or a 0-d tensor.
        betas: decay rates of the first and the second memory.
        eps: added to the denominator (EmoLynx ignores it).
        weight_decay: decoupled weight decay, times the effective lr; at most a thousandth of the weights in a step.
        emotion: ``"adaptive"``, a published generation (``"v1"``, ``"v3"``, ``"v4"``, where the sibling has it), an
            :class:`~emonavi.Emotion`, or a dict of its constants, ``{"start": 1e-3}``. The next five options, where
            they are None, take the emotion's defaults; adaptive: False, True, 1.0, 1e-6 and no upper bound.
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
            ``torch.distributed`` is initialised, or the mesh that sharded parameters were cut from. None is never,
            except over shards, which must feel the same loss.
        maximize: climb instead of descend.
        foreach: update lists of tensors in cache-sized pieces (True) or tensor by tensor (False). None: as ``fused``.
        fused: update each list of tensors by one kernel. True raises if there is none, False never uses one. None
            uses one on the CPU if there is one and ``foreach`` is None; otherwise it updates lists of tensors, unless
            ``foreach`` is False.
        capturable: never branch on a tensor's value, not even on the CPU (on other devices this always holds).
        state_dtype: how the memories of large tensors are stored: None (float32), ``"bf16"`` (or ``torch.bfloat16``),
            or ``"8bit"`` (or ``"int8"``). The arithmetic stays float32.
        stochastic_rounding: round 16-bit parameters and low-bit memories at random, so that steps smaller than a bit
            add up. False rounds to the nearest, which loses them.

    Raises:
        ValueError: an option is out of range, or the emotion does not have it. Strings that spell a number, a flag or
            None are accepted, since command lines have nothing else.
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
        emotion: str | Mapping[str, float] | Emotion | Preset = "adaptive",
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
        state_dtype: str | torch.dtype | None = None,
        stochastic_rounding: bool = True,
    ) -> None:
        if type(self) is EmoOptimizer:
            from emonavi.registry import FAMILY  # it imports this module

            raise TypeError(
                f"EmoOptimizer is the base class and has no rule: use one of {', '.join(FAMILY)}, or "
                "emonavi.create(name, params)"
            )
        if isinstance(params, torch.nn.Module):
            raise TypeError("params is the model itself: pass model.parameters()")
        machine = checks.emotion(emotion, self._generations)
        asked = spelled({
            "use_shadow": use_shadow, "use_trust": use_trust, "max_norm": max_norm, "min_lr": min_lr, "max_lr": max_lr,
        })  # fmt: skip
        defaults = spelled({
            "lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, **checks.options(machine, asked),
            "maximize": maximize, "foreach": foreach, "fused": fused, "capturable": capturable,
            "state_dtype": state_dtype, "stochastic_rounding": stochastic_rounding,
        })  # fmt: skip
        settings = checks.settings(capture, on_missing_loss, process_group)
        self._emotion = machine  # add_param_group() needs it
        super().__init__(params, defaults)
        for group in self.param_groups:
            group |= of_the_run(group["lr"])  # anew: the groups may have been another optimizer's
        self._setup(machine, *settings)
        # Made here and of fixed shape: distributed checkpoints lose state that appears later, or elsewhere.
        self.param_groups[0]["emotion"] = self._fresh()
        self._put_in_group()
        self.writer = writer

    def _setup(self, *settings: Any) -> None:
        super()._setup(*settings)
        self._is_loaded = False  # and no step has followed
        self._release: Release | None = None
        self._plan: Plan | None = None  # of the last step, if the next may use it

    @classmethod
    def _describe(cls, head: str, example: str, option: str = "") -> str:
        """A sibling's docstring: its own head, example and option around the shared text."""
        shared = (EmoOptimizer.__doc__ or "").partition("\n\n")[2]  # None under python -OO
        options, raises, errors = shared.rstrip().partition("\n\n    Raises:")
        return f"{head}\n\n{options}{option}{raises}{errors}\n{example}"

    # What a sibling adds ----------------------------------------------------------------------------------------

    def _layout(self, param: Tensor) -> tuple[str, ...]:
        """Names of the state tensors of a parameter, in the order that its rule takes them."""
        raise NotImplementedError

    def _rule(self, layout: tuple[str, ...]) -> tuple[Rule, bool]:
        """The rule for a layout, and whether it is elementwise."""
        raise NotImplementedError

    def _scalars(
        self, layout: tuple[str, ...], group: dict[str, Any], steps: Tensor, step_size: Tensor, mood: Mood
    ) -> dict[str, Any]:
        """The rule's scalars: 1-D, one value for each tensor of the bucket, or one number for all.

        A float may be branched on, a 0-d tensor may not.
        """
        raise NotImplementedError

    def _needs_whole(self, param: Tensor) -> bool:
        """Whether the rule needs more of a sharded tensor than the local part."""
        return False

    def _wholes(self, active: Active, grad_scale: Number) -> dict[int, Any]:
        """For each sharded tensor that needs it (by place): statistics of the whole tensor, reduced over ranks."""
        return {}

    # Generations for which a rule of this name was published.
    _generations: tuple[str, ...] = tuple(PRESETS)
    # Target of trust, in standard deviations of the cosine, without and with a shadow. With Adam's momentum 0 is that
    # of an exact line search.
    _target = (0.0, 0.0)
    # Within the noise the lr falls no faster than age^-fall. Under noise alone it falls with two thirds of that, here
    # age^-1: the sum of all lrs is then unbounded, and a run can go as far as it must (Robbins and Monro 1951). At 2
    # long runs stop moving before their end; at 1 raw weights are noisier (dev tasks, docs/benchmarks.md).
    _fall = 1.5
    # Whether the size of the rule's step does not depend on the size of gradients, of today's or of any before.
    _fades = False
    # Whether the guard's norms add up matrices row by row, in the same pass in which the kernel gathers their rows.
    _by_rows = False

    def _decay_rate(self, group: dict[str, Any]) -> float:
        """Weight decay for each unit of effective lr."""
        return float(group["weight_decay"])

    # The step ---------------------------------------------------------------------------------------------------

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As in ``torch.optim``. With gradients released, it ends the step of a backward that failed midway."""
        if self._release is not None and self._release.pending:
            self._release.close(self._intake.take(None, None)[0], told=False)
        super().zero_grad(set_to_none)

    def _end_release(self, heard: Loss | None) -> bool:
        return self._release is not None and self._release.close(heard)

    def _stay(self, found: Found) -> None:
        """Make the state only: distributed checkpoints create it by a step at lr 0."""
        self._make_states(found.params)
        self._intake.clear()

    def _move(self, found: Found, heard: Loss | None) -> None:
        """Make a step of the parameters that have a gradient."""
        vector, ranks = self._vector(), self._peers()
        predicated = self._is_predicated(vector.device)
        active, buckets, heard, norm = self._lined_up(found, heard, predicated)
        state, options = self._opening(active, ranks, predicated)
        state, first_scale = self._emotion.look_back(state, norm, options)
        # On a device the host does not know which of the first steps were skipped; if nothing is due, the scale is 1.
        if self._calls < EARLY if predicated else first_scale != 1:
            active.scale_memories(first_scale, self._layout)
        state = self._feel(state, heard, vector)
        state, acts, grad_scale = self._emotion.guard(state, norm, options)
        mood = self._emotion.mood(state, acts, grad_scale, options)
        self._lean(active, mood, self._fuses(predicated))
        sums = self._sweep(active, buckets, mood, acts, options)
        if self._emotion.reflects and options.use_trust:
            sums = sums._replace(products=ranks.whole(sums.products, active.roster.whole))
        state = self._emotion.reflect(state, sums, acts, options)
        active.keep(acts, *self._emotion.reflect_each(state, active.drive, active.trust, active.steps - 1, sums))
        self._end(vector, state, acts)

    def _lined_up(
        self, found: Found, heard: Loss | None, predicated: bool
    ) -> tuple[Active, Sequence[Bucket], Loss | None, Tensor]:
        """Who moves, in which buckets, and the loss and the norm that all ranks agree on.

        Raises before anything moves.
        """
        vector, ranks = self._vector(), self._peers()
        everything = all(map(Tensor.numel, found.params))
        moved = found if everything else found.where([bool(p.numel()) or is_piece(p) for p in found.params])
        if self._plan is not None and self._plan.fits(moved, self.state, self.param_groups):
            buckets = self._plan.filled(moved.grads)
            heard, norm = agreed(heard, self._plan.norms(buckets), moved.params, ranks)
            self._missing.note(heard)
            return self._active(self._plan.roster, moved.grads), buckets, heard, norm
        self._plan = None
        self._check_fit(found.params)
        grads = [local_grad(p) for p in moved.params]
        fused = any(wanted(group, vector.device) for group in self.param_groups)
        norms = all_norms(grads, vector, fused and (vector.is_cuda or not predicated), self._by_rows)
        heard, norm = agreed(heard, norms, moved.params, ranks)
        self._missing.note(heard)
        self._make_states(found.params)
        if self._is_loaded:
            hand_on(moved.params, [self.state[p] for p in moved.params], ranks)
            self._is_loaded = False
        roster = Roster.of(moved, self.state, len(self.param_groups), fused and not predicated)
        active = self._active(roster, grads)
        buckets = self._buckets(active, predicated)
        self._plan = kernels.planned(roster, buckets, self.state, self.param_groups)
        return active, buckets, heard, norm

    def _active(self, roster: Roster, grads: list[Tensor]) -> Active:
        return Active.of(roster, grads, self.param_groups, self._decay_rate, self._vector())

    def _opening(self, active: Active, ranks: Ranks, predicated: bool) -> tuple[Any, Options]:
        """The emotion's state and options at the beginning of a step."""
        vector, plain = self._vector(), not predicated
        note_peaks(self.param_groups)
        options = active.options(self.param_groups, self._target, self._fall, self._fades, plain)
        state: Any = self._emotion.unpack(vector, plain=plain)
        if not self._begun:
            state = self._emotion.begin(state, self._weights(vector, ranks), options)
        return self._emotion.give_way(state, options.lr, options.use_trust), options

    def _is_predicated(self, device: torch.device) -> bool:
        """Whether control flow may not depend on tensor values.

        So it is on every device but the CPU, and with ``capturable=True``.
        """
        return device.type != "cpu" or bool(self.param_groups[0]["capturable"])

    def _fuses(self, predicated: bool) -> bool:
        """Whether a kernel may do work that spans all groups: every group allows it."""
        return not predicated and all(wanted(group, torch.device("cpu")) for group in self.param_groups)

    def _make_states(self, params: Sequence[Tensor]) -> None:
        """Make the state of parameters where it is missing; without ``use_shadow`` drop the shadows of all."""
        if not self.param_groups[0]["use_shadow"]:
            shadow.drop(self._params(), self.state)
        for p in params:
            self._make_state(p)

    def _make_state(self, param: Tensor) -> None:
        """Make the missing state of a parameter."""
        state: dict[str, Any] = self.state[param]
        if not state:
            state.update(together(KEPT, param.device))
            state.update(self._memories(param))
        if self.param_groups[0]["use_shadow"]:
            shadow.make(param, state)

    def _memories(self, param: Tensor) -> dict[str, Tensor]:
        """Fresh memories of a parameter, as stored."""
        return lowbit.stored(fresh(param, self._layout(param)), param, self.param_groups[0]["state_dtype"])

    def _shapes(self, param: Tensor) -> dict[str, torch.Size]:
        """Shapes of a parameter's memories, by name, as stored."""
        like = param.detach() if is_sharded(param) else torch.empty_like(param, device="meta")
        shapes = {name: memory.shape for name, memory in self._memories(like).items()}
        return shapes | {"shadow": param.shape, "raw": param.shape}

    def _buckets(self, active: Active, predicated: bool) -> list[Bucket]:
        """The step's tensors in buckets. Raises before anything moves."""
        found = []
        for (index, *_, layout), places in active.buckets(self._layout, self._needs_whole).items():
            group, lists = self.param_groups[index], active.lists(places, layout)
            rule, cut = self._rule(layout)
            whole = self._needs_whole(active.roster.whole[places[0]])
            kernel = None if whole else choose(rule, lists, group, predicated)
            at = integers(tuple(places), active.lr.device)
            found.append(Bucket(rule, group, layout, places, at, lists, cut, kernel))
        return found

    def _sweep(
        self, active: Active, buckets: Sequence[Bucket], mood: Mood, acts: Number, options: Options, first: int = 0
    ) -> Sums:
        """Move every tensor, bucket by bucket, and gather the sums for reflection."""
        own_lr, step_sizes, decays = active.rates(mood, self._emotion.least_decay)
        # The first step of a tensor has none before it to compare with.
        weight = torch.where(active.steps > 1, own_lr, 0.0)
        if not isinstance(acts, Tensor) and not acts:
            return no_sums(weight)
        reflect = self._emotion.reflects and options.use_trust
        parts: list[tuple[Tensor, Reflected]] = []
        wholes = self._wholes(active, mood.grad_scale)
        for bucket in buckets:
            group, at = bucket.group, bucket.at
            scalars = self._scalars(bucket.layout, group, active.steps[at], step_sizes[at], mood)
            scalars |= {"decay": decays[at] if group["weight_decay"] else None, "reflect": reflect}
            if bucket.places[0] in wholes:
                scalars["whole"] = wholes[bucket.places[0]]
            rounds = group["stochastic_rounding"] and lowbit.narrow(bucket.lists)
            seeds = lowbit.seeds(active.steps[at], at + first).to(bucket.lists["param"][0].device) if rounds else None
            scale = -mood.grad_scale if group["maximize"] else mood.grad_scale
            reflected = bucket.move(scalars, scale, acts, seeds)
            if reflected is not None:
                parts.append((at, reflected))
        return gather(parts, weight)

    # Groups and checkpoints -------------------------------------------------------------------------------------

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of parameters. They start with their own step count and drive; the emotion continues.

        Args:
            param_group: ``"params"`` and the group's own options, as in ``torch.optim``.

        Raises:
            ValueError: an option is out of range, or is one for all groups; or the rule cannot move a parameter.
            RuntimeError: ``fused=True``, and there is no kernel. Nothing has changed then.
        """
        checks.mapping(param_group)
        for ours, name in BOUNDS.items():
            if ours in param_group:  # a group that was removed and comes back
                param_group.setdefault(name, param_group[ours])
        param_group.update(spelled(param_group))  # in the caller's dict, which torch fills in and keeps as well
        for name in checks.SHARED:
            if param_group.get(name, 0) is None:
                del param_group[name]  # None leaves it to the emotion
        checks.shared(param_group, self.defaults)
        checks.group({**self.defaults, **param_group})
        super().add_param_group(param_group)
        self._ranks = self._left = None
        group = self.param_groups[-1]
        try:
            self._check_group(group)
        except (RuntimeError, TypeError, ValueError):
            self.param_groups.pop()
            raise
        group |= of_the_run(group["lr"]) | group
        group |= {ours: group.pop(name) for ours, name in BOUNDS.items()}

    def _check_group(self, group: dict[str, Any]) -> None:
        """Raise if the rule, or a kernel that is asked for, cannot move a group's tensors."""
        checks.parameters(group["params"])
        checks.whole(group["params"], group["state_dtype"])
        for p in group["params"]:
            if checks.frozen(p) or is_lazy(p):
                continue  # frozen: it may be of any kind; lazy: it has no shape yet
            rule, elementwise = self._rule(self._layout(p))
            whole = self._needs_whole(p)
            if is_part(p) and not whole and not elementwise:
                what = f"a parameter of shape {tuple(p.shape)} is a part of a sharded one"
                raise ValueError(f"{what}, of which {type(self).__name__} needs all: use EmoNavi, EmoFact or EmoLynx")
            if group["fused"] and whole:
                remedy = "leave fused at None, and foreach is used for it"
                raise RuntimeError(f"fused=True: there is no kernel for a sharded matrix; {remedy}")
            if group["fused"]:
                choose(rule, {"param": [local(p)]}, group, self._is_predicated(p.device))

    def reset_emotion(self) -> None:
        super().reset_emotion()
        for state in self.state.values():
            for name in ("drive", "trust"):
                if name in state:
                    state[name].fill_(KEPT[name])

    def _refuse_midway(self, what: str) -> None:
        if self._release is not None:
            self._release.refuse(what)

    def state_dict(self) -> dict[str, Any]:
        """As in ``torch.optim``; the emotion is in the first group.

        Raises:
            RuntimeError: between backward and ``step()`` with gradients released.
        """
        self._refuse_midway("state_dict()")
        self._put_in_group()
        return super().state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As in ``torch.optim``, but state keeps the dtype that it was saved in, so that resuming is exact.

        From an optimizer without an emotion, such as AdamW, the memories are taken over if this rule has the same. A
        warning says so.

        Raises:
            ValueError: the checkpoint is of another emotion, of an optimizer with other memories or other options, or
                of a model of other shapes; nothing has changed then. The checkpoint of a sibling with the same memories
                and options is accepted.
            RuntimeError: as for :meth:`state_dict`.
        """
        self._refuse_midway("load_state_dict()")
        had_shadow, held = self.param_groups[0]["use_shadow"], self._held()
        load_exactly(super().load_state_dict, self, state_dict, lambda final: loadable(final, self))
        self._is_loaded, self._plan = True, None
        for p, state in self.state.items():
            state.update(together({name: state[name] for name in KEPT if name in state}, p.device))
        self._resume(had_shadow, held)

    def __getstate__(self) -> dict[str, Any]:
        self._refuse_midway("copying")
        self._put_in_group()
        return {**super().__getstate__(), "_settings": self._settings()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        settings = state.pop("_settings", None)
        super().__setstate__(state)
        for group in self.param_groups:
            for name, value in LATER.items():
                group.setdefault(name, value)
        if settings is not None:  # unpickled or copied: torch keeps groups and state only
            self._setup(*settings)
            self._resume()
