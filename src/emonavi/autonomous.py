"""Autonomous training: workers train independently, and their weights are merged now and then.

Each worker has its own part of the data, and its own optimizer and emotion (``process_group=None``). After every H
steps, or only at the end, the weights become the mean of all workers' weights, or take an outer step towards it::

    mean   = sum_k n_k w_k / sum_k n_k            n_k: steps that worker k has made since its last merge
    w      = mean                                 without an outer optimizer
    w      = outer step from the last merged weights, with the gradient (last merged weights - mean)

So a worker that has just joined (n = 0) takes the mean and contributes nothing, as does one whose weights are not
finite. Workers that are sharded by FSDP2 merge each part with the same part of the others. torch's own averagers decide
when to merge, and communicate.

At a merge the emotion rests for a step, since the loss may jump for reasons outside the worker. Its drive, its memories
and the moments stay as they are, and are not sent.

Sources: local SGD (Stich 2019, https://arxiv.org/abs/1805.09767); the outer step is that of DiLoCo (Douillard et al.
2023, https://arxiv.org/abs/2311.08105).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from emonavi.bearer import Bearer
from emonavi.checks import DENSE_FLOATS
from emonavi.distributed import default_group, is_piece, local, other_parts, reshard
from emonavi.emotion import Emotion
from emonavi.sweep import wide

__all__ = ["Merger", "nesterov"]

# Rest only after this many steps alone: a drive that rests after every step never moves.
_REST_AFTER = 16


def nesterov(params: Sequence[Tensor], lr: float = 0.7, momentum: float = 0.9) -> torch.optim.Optimizer:
    """The outer optimizer of DiLoCo, with its published constants; for the ``outer`` of a :class:`Merger`.

    Args:
        params: the last merged weights, as the merger passes them.
        lr: outer learning rate.
        momentum: Nesterov momentum.

    Example:
        >>> import torch, emonavi
        >>> from emonavi.autonomous import Merger, nesterov
        >>> model = torch.nn.Linear(2, 1)
        >>> optimizer = emonavi.EmoNavi(model.parameters(), process_group=None)
        >>> merger = Merger(model, optimizer, outer=nesterov)
    """
    return torch.optim.SGD(list(params), lr=lr, momentum=momentum, nesterov=True)


class Merger:
    """Merges a worker's weights with those of the others: call :meth:`step` after each ``optimizer.step()``.

    Each worker sends the parameters that train, the model's floating-point buffers (BatchNorm's statistics) and the
    shadow if there is one: 4 bytes for each number (8 if a parameter is float64). Frozen weights, moments and the
    emotion are not sent.

    Args:
        model: the model. All workers begin with the same weights, for example from the same seed.
        optimizer: its optimizer, any torch optimizer. A sibling needs ``process_group=None``, or the group of the
            worker's own replicas.
        averager: one of ``torch.distributed.algorithms.model_averaging``; it decides at which steps which workers
            merge. None: nothing is merged before :meth:`merge`. If workers are sharded, its process group holds the
            ranks at the same place of each worker.
        outer: builds the outer optimizer from a list of tensors, as :func:`nesterov` does; None takes the mean. A
            worker that joins later first loads another's :meth:`state_dict`: the outer step begins at the last merged
            weights.

    Raises:
        ValueError: the optimizer averages its loss with the other workers at every step; there is an outer optimizer
            and the averager merges only a part of the workers; the averager would mix the shards of one worker; or the
            model is under FSDP1.

    Example:
        Without processes, since any means of sending a tensor will do. With processes: ``examples/autonomous.py``.

        >>> import torch, emonavi
        >>> from emonavi.autonomous import Merger
        >>> models = [torch.nn.Linear(2, 1) for _ in range(2)]
        >>> mergers = []
        >>> for model in models:
        ...     optimizer = emonavi.EmoNavi(model.parameters(), process_group=None)
        ...     merger = Merger(model, optimizer)
        ...     model(torch.ones(4, 2)).square().mean().backward()
        ...     loss = optimizer.step()
        ...     merged = merger.step()
        ...     mergers.append(merger)
        >>> mean = sum(merger.offer() for merger in mergers) / 2
        >>> for merger in mergers:
        ...     merger.accept(mean)
        >>> torch.equal(models[0].weight, models[1].weight)
        True
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        averager: Any = None,
        *,
        outer: Callable[[Sequence[Tensor]], torch.optim.Optimizer] | None = None,
    ) -> None:
        if isinstance(optimizer, Bearer) and optimizer._process_group == "auto":
            raise ValueError(
                "the optimizer has process_group='auto', and would average its loss with the other workers at every "
                "step: build it with process_group=None"
            )
        if outer is not None and len(getattr(averager, "period_process_group_dict", ())) > 1:
            raise ValueError(
                "outer= with an averager that merges a part of the workers: their last merged weights would differ; "
                "use a PeriodicModelAverager, or leave outer out"
            )
        self.model, self.optimizer, self.averager = model, optimizer, averager
        if any(is_piece(p) for p in self._params()):
            raise ValueError("the model is under FSDP1, whose weights are not merged: shard it with FSDP2")
        if averager is not None:
            self._check_shards(averager.process_group)
        self._alone = 0  # steps since the last merge
        if averager is not None and averager.step == 0:
            averager.step = 1  # it counts from 0, and would merge after the first step
        self._last = None if outer is None else _flat(self._params())
        self._outer = None if outer is None or self._last is None else outer([self._last])

    # When -------------------------------------------------------------------------------------------------------

    def step(self) -> bool:
        """Count a step, and merge if the averager says so. Returns whether it merged.

        Raises:
            RuntimeError: a worker is gone. Nothing has changed then: put a process group of the remaining workers into
                ``averager.process_group``, and the next step tries again.
        """
        self._refuse_inside_calm()
        self._alone += 1
        sent: list[Tensor] = []
        if self.averager is not None:
            self.averager.average_parameters(self._wire(sent))
        for mean in sent:
            self.accept(mean)
        return bool(sent)

    def merge(self) -> None:
        """Merge all workers now: at the end, or when one joins. All of them call it.

        Raises:
            RuntimeError: ``torch.distributed`` is not initialised, or a worker is gone, as in :meth:`step`. Nothing has
                changed then.
            ValueError: the model is sharded, and there is no averager that says with whom to merge.
        """
        everyone = default_group()
        if everyone is None:
            raise RuntimeError(
                "merge() needs torch.distributed: run under torchrun and call init_process_group() first, or carry "
                "offer() to the others and their mean to accept() by another way"
            )
        from torch.distributed.algorithms.model_averaging.utils import average_parameters_or_parameter_groups

        sent: list[Tensor] = []
        group = everyone if self.averager is None else self.averager.process_group
        self._check_shards(group)
        average_parameters_or_parameter_groups(self._wire(sent), group)
        self.accept(sent[0])

    def _check_shards(self, group: Any) -> None:
        others = other_parts(self._params(), group)
        if others:
            raise ValueError(
                f"the ranks {others} hold other parts of the same weights, and a merge would mix them up: give the "
                "merger an averager whose process_group holds the same place of each worker, as "
                'mesh["worker"].get_group() does where fully_shard() has mesh["shard"]'
            )

    def _wire(self, sent: list[Tensor]) -> Iterator[nn.Parameter]:
        """What an averager gets instead of parameters. It is read only if the averager merges.

        From the parameters themselves it would leave out those without a gradient, which may differ between workers,
        and the buffers.
        """
        flat = nn.Parameter(self.offer())
        flat.grad = flat.detach()
        sent.append(flat)
        yield flat

    # What -------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def offer(self) -> Tensor:
        """This worker's contribution to the mean: one 1-D tensor, of the same length on all workers.

        It is everything that is sent, times the steps since the last merge, followed by that number of steps. It is all
        zeros if there were none, or if a number is not finite.

        Raises:
            RuntimeError: the shadow stands in place of the weights, as inside of ``calm()``.
        """
        self._refuse_inside_calm()
        flat = _flat([*self._params(), *self._followers()])
        sound = flat.isfinite().all()
        return torch.where(sound, torch.cat([flat * self._alone, flat.new_full((1,), self._alone)]), 0.0)

    @torch.no_grad()
    def accept(self, mean: Tensor) -> None:
        """Set weights, buffers and shadow from the mean of all workers' offers.

        If no worker contributed anything, nothing changes.

        Args:
            mean: 1-D, as :meth:`offer` makes it.

        Raises:
            ValueError: the mean is of another model.
            RuntimeError: as for :meth:`offer`.
        """
        self._refuse_inside_calm()
        params, followers = ([local(t) for t in some] for some in (self._params(), self._followers()))
        sizes = [sum(t.numel() for t in some) for some in (params, followers)]
        if mean.shape != (sum(sizes) + 1,) or (self._last is not None and self._last.numel() != sizes[0]):
            raise ValueError(
                f"the mean has shape {tuple(mean.shape)}, this worker's offer ({sum(sizes) + 1},): all workers need "
                "the same model, of which the same trains, and an optimizer with the same options; with an outer step "
                "what trains does not change"
            )
        alone, self._alone = self._alone, 0
        if mean[-1] == 0:
            return
        weights, following = (mean[:-1] / mean[-1]).split(sizes)
        if self._outer is not None and self._last is not None:
            self._last.grad = self._last - weights.to(self._last)
            self._outer.step()
            weights = self._last
        _write(params, weights)
        _write(followers, following)
        reshard(self.model)
        bearer = self.optimizer
        if not isinstance(bearer, Bearer):
            return
        bearer._note_left()  # the shadow was merged as well
        if isinstance(bearer._emotion, Emotion) and alone >= _REST_AFTER:
            # Only this one panics. While it rests, a jump of the loss cuts no drive; each panic prolongs that.
            vector, place = bearer._vector(), bearer._emotion.index("rest")
            vector[place] = vector[place].clamp(min=1)

    def _refuse_inside_calm(self) -> None:
        if isinstance(self.optimizer, Bearer):
            self.optimizer._refuse_inside_calm("a merge")

    def _params(self) -> list[Tensor]:
        weights = [p for group in self.optimizer.param_groups for p in group["params"]]
        return [p for p in weights if p.requires_grad and p.dtype in DENSE_FLOATS]

    def _followers(self) -> list[Tensor]:
        """What always becomes the plain mean: buffers, and the shadow, even if it is not made yet."""
        buffers = [b for b in self.model.buffers() if b.is_floating_point()]
        if not self.optimizer.param_groups[0].get("use_shadow"):
            return buffers
        states = ((p, self.optimizer.state.get(p, {})) for p in self._params())
        return buffers + [state["shadow"] if "shadow" in state else p.detach().clone() for p, state in states]

    # Checkpoints ------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """The state of the averager and of the outer optimizer; save it with the model's and the optimizer's."""
        return {
            "alone": self._alone,
            "turn": None if self.averager is None else self.averager.step,
            "last": None if self._last is None else self._last.clone(),
            "outer": None if self._outer is None else self._outer.state_dict(),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from :meth:`state_dict`.

        Raises:
            ValueError: it was saved with an averager or an outer optimizer, and this has none, or the reverse.
        """
        own = self.state_dict()
        for name in ("turn", "outer"):
            if (own[name] is None) != (state_dict[name] is None):
                what = "an averager" if name == "turn" else "an outer optimizer"
                there, here = ("without", "with") if state_dict[name] is None else ("with", "without")
                raise ValueError(f"the checkpoint was saved {there} {what}, this merger is {here}: build both alike")
        self._alone = state_dict["alone"]
        if self.averager is not None:
            self.averager.step = state_dict["turn"]
        if self._outer is not None and self._last is not None:
            with torch.no_grad():
                self._last.copy_(state_dict["last"])
            self._outer.load_state_dict(state_dict["outer"])


def _flat(tensors: Sequence[Tensor]) -> Tensor:
    """All tensors, or this rank's parts of them, as one vector on the device of the first, in at least float32."""
    home = tensors[0].device
    return torch.cat([wide(local(t.detach())).to(home).reshape(-1) for t in tensors])


def _write(tensors: Sequence[Tensor], flat: Tensor) -> None:
    """Copy a vector back into the tensors that it was made of."""
    for tensor, part in zip(tensors, flat.split([t.numel() for t in tensors]), strict=True):
        tensor.copy_(part.view_as(tensor))
