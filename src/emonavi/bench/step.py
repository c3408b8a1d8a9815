"""How long a step takes, beside torch's own optimizers and others, in one run.

Machines are noisy and so are their neighbours: the optimizers take turns, what counts is the ratio of medians, and the
time is that of the processor, which does not run while somebody else has it. An optimizer step on a CPU is bound by
memory: beside its time stands the share of the limit that it reaches, which is the time that the least bytes a rule has
to move would take at the bandwidth measured in the same turns. On a CUDA device the time is that between two events on
it, which holds the waits for a host that is slower than the device. With several threads it is the time that passes,
since the processor's is that of all of them together: it wants a machine that does nothing else.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import math
import os
import re
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import emonavi
from emonavi import page
from emonavi.bearer import Bearer
from emonavi.bench.provenance import hardware, made_on
from emonavi.bench.workers import torch_threads

__all__ = ["CONTENDERS", "LISTS", "Contender", "draw", "measure", "report"]

_GPT2_LAYER = [*[(768,)] * 4, (2304, 768), (2304,), (768, 768), (768,), (3072, 768), (3072,), (768, 3072), (768,)]
LISTS: dict[str, tuple[str, list[tuple[int, ...]]]] = {
    "one": ("64 M in one matrix", [(8192, 8192)]),
    "gpt2": ("GPT-2 small, 148 tensors", [(50257, 768), (1024, 768), *_GPT2_LAYER * 12, (768,), (768,)]),
    "tiny": ("400 tiny tensors", [(16, 4)] * 400),
    "lora": ("LoRA, 500 thin matrices", [(768, 4), (4, 768)] * 250),
}
LARGE = 1 << 24  # parameters: what fits a cache has no limit by memory
BANDWIDTH = "memory"  # the turn that measures it

_WARM_UP = 2  # turns before those that are timed; the last of them is for the memory

Build = Callable[[list[nn.Parameter]], torch.optim.Optimizer]


@dataclass(frozen=True)
class Contender:
    """An optimizer and how it is told to sweep. Those of one ``optimizer`` take turns on the same state.

    The kernels have theirs alone: what a step finds out serves the next one, unless another way comes between.
    """

    name: str
    optimizer: str
    flags: dict[str, Any] = field(default_factory=dict)
    clips: bool = False
    least: float = 0.0  # bytes of a float32 parameter in a large matrix that must be moved; 0: not known


def _ours(sibling: str, **options: Any) -> Build:
    return lambda params: emonavi.create(sibling, params, capture=False, **options)


def _peer(name: str) -> Build:
    return lambda params: getattr(__import__("pytorch_optimizer"), name)(params)


OPTIMIZERS: dict[str, Build] = {
    **{name + own: _ours(name) for name in ("EmoNavi", "EmoLynx", "EmoFact") for own in ("", " fused")},
    "EmoNavi shadow": _ours("EmoNavi", use_shadow=True),
    "AdamW": torch.optim.AdamW,
    "Emotional(AdamW)": lambda params: emonavi.Emotional(torch.optim.AdamW(params), capture=False),
    "Adafactor": torch.optim.Adafactor,
    **{f"{name} (pytorch_optimizer)": _peer(name) for name in ("EmoNavi", "Lion") if find_spec("pytorch_optimizer")},
}
_WAYS = {
    "fused": {"fused": True, "foreach": False},
    "foreach": {"fused": False, "foreach": True},
    "single": {"fused": False, "foreach": False},
}
# With the guard or with clipping the gradient is read once more.
CONTENDERS = [
    *(
        Contender(f"AdamW {way}{' + clip' if clips else ''}", "AdamW", flags, clips, 40.0 if clips else 28.0)
        for clips in (False, True)
        for way, flags in _WAYS.items()
    ),
    *(
        Contender(f"{name} {way}", name + " fused" * (way == "fused"), flags, least=least)
        for name, least in {"EmoNavi": 32.0, "EmoLynx": 24.0, "EmoFact": 16.0}.items()
        for way, flags in _WAYS.items()
    ),
    Contender("EmoNavi fused + shadow", "EmoNavi shadow", _WAYS["fused"], least=40.0),
    *(Contender(f"Emotional(AdamW {way})", "Emotional(AdamW)", _WAYS[way]) for way in ("fused", "foreach")),
    *(Contender(name, name) for name in OPTIMIZERS if name.startswith("Adafactor") or "pytorch_optimizer" in name),
]


def measure(
    shapes: Sequence[tuple[int, ...]], rounds: int = 15, device: str = "cpu", threads: int = 1
) -> dict[str, dict[str, Any]]:
    """Figures of each contender on parameters of the given shapes, which all of them move in turn.

    Returns:
        For each contender ``ms`` (median), ``ratio`` to AdamW fused, ``state_bytes`` for each parameter; ``extra`` (the
        largest memory that a step takes beside, over the bytes of the parameters; None where the system does not
        tell) and ``share`` of the limit for large lists; under :data:`BANDWIDTH` the ``gb_per_s``.
    """
    clock = time.process_time if threads == 1 else time.perf_counter
    torch.manual_seed(0)
    params = [nn.Parameter(torch.randn(shape, device=device)) for shape in shapes]
    for p in params:
        p.grad = torch.randn_like(p) * 1e-2
    optimizers = {name: build(params) for name, build in OPTIMIZERS.items()}
    steps = {c.name: _step(c, optimizers[c.optimizer], params) for c in CONTENDERS}
    count = sum(p.numel() for p in params)
    buffer = torch.zeros(max(count, LARGE), device=device)
    steps[BANDWIDTH] = lambda: buffer.add_(1.0)
    times: dict[str, list[float]] = {name: [] for name in steps}
    extra: dict[str, int | None] = {}
    with torch_threads(threads):
        for turn in range(_WARM_UP + rounds):
            for name, step in steps.items():
                if turn == _WARM_UP - 1:
                    extra[name] = _extra_memory(step) if device == "cpu" else _extra_on_device(step)
                    continue
                seconds = _seconds(step, clock) if device == "cpu" else _seconds_on_device(step)
                if turn >= _WARM_UP:
                    times[name].append(seconds)
    typical = {name: statistics.median(some) for name, some in times.items()}
    speed = 8 * len(buffer) / typical[BANDWIDTH]
    figures: dict[str, dict[str, Any]] = {BANDWIDTH: {"gb_per_s": speed / 1e9}}
    for c in CONTENDERS:
        found = figures[c.name] = {
            "ms": 1e3 * typical[c.name],
            "ratio": typical[c.name] / typical["AdamW fused"],
            "state_bytes": _state_bytes(optimizers[c.optimizer]),
        }
        peak = extra[c.name]
        if peak is not None and count >= LARGE:
            found["extra"] = peak / (4 * count)
        if c.least and count >= LARGE:
            found["share"] = c.least * count / speed / typical[c.name]
    return figures


def _step(contender: Contender, optimizer: Any, params: list[nn.Parameter]) -> Callable[[], Any]:
    """One step as its users make it."""
    ours = isinstance(optimizer, Bearer)
    theirs = type(optimizer).__name__ == "EmoNavi" and not ours

    def step() -> None:
        for group in optimizer.param_groups:
            group.update(contender.flags)
        if contender.clips:
            torch.nn.utils.clip_grad_norm_(params, 1e9)  # it reads the gradients and scales them by 1
        if ours:
            optimizer.step(loss=1.0)
        elif theirs:
            optimizer.step(lambda: 1.0)
        else:
            optimizer.step()

    return step


def _seconds(step: Callable[[], Any], clock: Callable[[], float]) -> float:
    """The time of a step by a clock."""
    start = clock()
    step()
    return clock() - start


def _seconds_on_device(step: Callable[[], Any]) -> float:
    """The CUDA device's time from the begin of a step to its end."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    begin.record()
    step()
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end)) / 1e3


def _extra_on_device(step: Callable[[], Any]) -> int:
    """Bytes by which a step lifts the peak of what torch holds on the CUDA device."""
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    return torch.cuda.max_memory_allocated() - before


def _extra_memory(step: Callable[[], Any]) -> int | None:
    """Bytes by which a step lifts the peak of the process's memory; None where the system does not tell (Linux does).

    Resident memory sees every allocator, torch's and that of C; tracemalloc and torch's profiler see one each.
    """
    try:
        with contextlib.suppress(AttributeError):
            ctypes.CDLL(None).malloc_trim(0)  # what was freed must not be there to be taken again
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
        before = _memory("VmRSS")
        step()
        return max(0, _memory("VmHWM") - before)
    except (OSError, TypeError):
        step()
        return None


def _memory(name: str) -> int:
    """A line of this process's status, in bytes."""
    found = re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text(encoding="utf-8"))
    if found is None:
        raise OSError(f"no {name} in /proc/self/status")
    return 1024 * int(found[1])


def _state_bytes(optimizer: torch.optim.Optimizer) -> float:
    """Bytes of state tensors per parameter, the per-tensor scalars left out."""
    held: int = sum(t.nbytes for s in optimizer.state.values() for t in s.values() if isinstance(t, Tensor) and t.dim())
    count: int = sum(p.numel() for g in optimizer.param_groups for p in g["params"])
    return held / count


def report(
    models: Sequence[str] = tuple(LISTS),
    out: Path | None = None,
    rounds: int = 15,
    device: str = "cpu",
    threads: int = 1,
) -> list[str]:
    """Measure lists on ``"cpu"`` or ``"cuda"``.

    Returns the lines of a table, and writes figures as JSON and a picture where ``out`` says.
    """
    if device not in ("cpu", "cuda") or (device == "cuda" and not torch.cuda.is_available()):
        raise ValueError(f"no device {device} to measure on: choose cpu, or cuda where torch.cuda.is_available()")
    place = hardware() if device == "cpu" else f"{torch.cuda.get_device_name()}, {hardware()}"
    figures: dict[str, Any] = {**made_on(), "hardware": place, "threads": threads, "rounds": rounds}
    figures |= {"device": device, "load": {}, "lists": {}}
    clock = "time of the device" if device != "cpu" else "processor time" if threads == 1 else "elapsed time"
    many = f"{threads} thread{'s' * (threads > 1)}"
    lines = [f"{place}, torch {torch.__version__}, {many}, {clock}, medians of {rounds}"]
    for model in models:
        what, shapes = LISTS[model]
        result = figures["lists"][model] = measure(shapes, rounds, device=device, threads=threads)
        load = figures["load"][model] = os.getloadavg()[0]
        lines += ["", f"{what}; memory {result[BANDWIDTH]['gb_per_s']:.1f} GB/s, load {load:.1f}"]
        lines += [f"  {'':28} {'ms':>9} {'ratio':>7} {'of limit':>9} {'extra':>7} {'state bytes':>12}"]
        lines += [_line(name, r) for name, r in result.items() if name != BANDWIDTH]
    if out is not None:
        out.write_text(json.dumps(figures, indent=1) + "\n")
        draw(figures, out.with_suffix(".png"))
    return lines


def _line(name: str, figures: dict[str, Any]) -> str:
    share = f"{figures['share']:9.0%}" if "share" in figures else f"{'':9}"
    extra = f"{figures['extra']:7.1%}" if "extra" in figures else f"{'':7}"
    return f"  {name:28} {figures['ms']:9.2f} {figures['ratio']:7.2f} {share} {extra} {figures['state_bytes']:12.3f}"


def draw(figures: dict[str, Any], path: Path) -> None:
    """A picture of the ratios to AdamW fused: a panel for each list, a point for each contender."""
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    lists = figures["lists"]
    columns = min(2, len(lists))
    rows = math.ceil(len(lists) / columns)
    picture = Figure(figsize=(2 + 4 * columns, 4.6 * rows + 0.4), dpi=100, layout="constrained")
    axes = picture.subplots(rows, columns, squeeze=False, sharey=True).flatten()
    for axis, (model, result) in zip(axes, lists.items(), strict=False):
        names = [name for name in result if name != BANDWIDTH][::-1]
        ratios = [result[name]["ratio"] for name in names]
        colours = [page.PALETTE[0] if _is_ours(name) else page.GREY for name in names]
        axis.hlines(names, 1.0, ratios, color=colours, linewidth=1.5)  # from 1: a length has to mean something
        axis.scatter(ratios, names, color=colours, zorder=3)
        low, high = min(ratios) / 1.15, max(ratios) * 1.15
        page.prepare(axis, low, high, True, page.ticks(low, high, plain=True), "x")
        axis.axvline(1.0, color="black", linewidth=0.8)
        axis.set(title=LISTS[model][0], xlabel="time of a step over AdamW fused")
    for axis in axes[len(lists) :]:
        axis.set_axis_off()
    key = [Patch(color=page.PALETTE[0], label="this library"), Patch(color=page.GREY, label="others")]
    picture.legend(handles=key, loc="outside lower center", ncols=2, frameon=False)
    picture.savefig(path)


def _is_ours(name: str) -> bool:
    return name.startswith("Emo") and "pytorch_optimizer" not in name
