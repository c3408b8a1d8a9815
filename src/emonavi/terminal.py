"""``live``: one line in the terminal that shows what an optimizer feels while it trains. Needs rich."""

from __future__ import annotations

import math
from collections import deque
from time import monotonic
from types import TracebackType
from typing import TYPE_CHECKING, Any

import torch

from emonavi.intake import listening

if TYPE_CHECKING:
    from rich.console import Console
    from rich.live import Live
    from rich.text import Text

    from emonavi.monitor import Snapshot

__all__ = ["MOOD_STYLE", "Line", "live"]

MOOD_STYLE = {"growing": "green", "easing": "cyan", "braking": "yellow", "resting": "magenta", "done": "bold"}

_EVERY = 0.25  # seconds: reading the emotion waits for the device
_PLAIN_EVERY = 10.0  # seconds between lines where each one stays, as in a log file
_CELLS = 6  # length of the bar


def live(optimizer: Any, *, total: int | None = None, console: Console | None = None) -> Line:
    """Show in one line of the terminal what the optimizer feels, while a ``with`` block lasts.

    A step hook updates the line, at most four times a second; the training loop is not changed. Other output appears
    above it. If the output is not a terminal, a line is printed every ten seconds, and at the end. Of several
    processes, only rank 0 prints.

    From the left: the mood in a word; a bar that shows how far from calm it is (``Snapshot.agitation``: the size of the
    emotional scalar, full while it rests after a panic), with an arrow down or up if the loss moves beyond its noise;
    the short mean of the loss; the effective lr, lowest to highest group; drive; trust; steps, and steps per second. A
    narrow terminal shows the first of these.

    Args:
        optimizer: an :class:`~emonavi.EmoOptimizer` or a trainer's wrapper around one.
        total: the total number of steps, if it is known; shown beside the steps.
        console: where to write, a ``rich.console.Console``; None is standard output.

    Raises:
        ImportError: rich is not installed.
        TypeError: nothing inside ``optimizer`` has an emotion.

    Example:
        >>> import torch, emonavi
        >>> model = torch.nn.Linear(2, 1)
        >>> optimizer = emonavi.EmoNavi(model.parameters())
        >>> with emonavi.monitor.live(optimizer):  # doctest: +SKIP
        ...     for _ in range(1000):
        ...         optimizer.zero_grad()
        ...         model(torch.randn(8, 2)).square().mean().backward()
        ...         optimizer.step()
        growing ██░░░░↓ loss 0.0721 lr 1.8e-2 drive 17.6  trust +0.12 step 1000 2,431/s
    """
    try:
        from rich.console import Console
    except ImportError as error:
        raise ImportError("emonavi.monitor.live() needs rich: pip install rich") from error
    return Line(listening(optimizer), total, console or Console(highlight=False))


class Line:
    """What ``live`` returns: a context manager. Call ``update`` only where step hooks do not run."""

    def __init__(self, optimizer: Any, total: int | None, console: Console) -> None:
        self._optimizer = optimizer
        self._total = total
        self._console = console
        self._live: Live | None = None
        self._hook: torch.utils.hooks.RemovableHandle | None = None

    def __enter__(self) -> Line:
        if self._hook is not None:
            raise RuntimeError("this line is shown already: leave its with block first, or make another with live()")
        self._shown = -math.inf
        self._seen: deque[tuple[float, int]] = deque(maxlen=12)  # time and step: the speed is that of three seconds
        if torch.distributed.is_available() and torch.distributed.is_initialized() and torch.distributed.get_rank():
            return self
        if self._console.is_terminal and not self._console.is_dumb_terminal:
            from rich.live import Live

            self._live = Live(console=self._console, auto_refresh=False)  # no thread: only steps update it
            self._live.start()
        # Removed at the end of the block.
        self._hook = self._optimizer.register_step_post_hook(lambda *_: self.update())
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._hook is None:
            return
        self._hook.remove()
        self._hook = None
        try:
            if math.isfinite(self._shown):  # else there was no step
                self._show()
        finally:
            if self._live is not None:
                self._live.stop()
                self._live = None

    def update(self) -> None:
        """Show the current state, unless it was shown a moment ago. Does nothing outside the ``with`` block."""
        wait = _PLAIN_EVERY if self._live is None else _EVERY
        if self._hook is not None and monotonic() - self._shown >= wait:
            self._show()

    def _show(self) -> None:
        felt = self._optimizer.emotion
        self._shown = monotonic()  # after reading, which may have waited
        if self._seen and felt.steps < self._seen[-1][1]:
            self._seen.clear()  # a new stage began
        self._seen.append((self._shown, felt.steps))
        (start, first), (end, last) = self._seen[0], self._seen[-1]
        speed = (last - first) / (end - start) if end > start else math.nan
        text = self._text(felt, self._optimizer.effective_lr, speed)
        if self._live is None:
            self._console.print(text, soft_wrap=True)
        else:
            self._live.update(text, refresh=True)

    def _text(self, felt: Snapshot, rates: list[float], speed: float) -> Text:
        """As many parts as fit, the important ones first."""
        from rich.text import Text

        lr = _rate(min(rates)) if min(rates) == max(rates) else f"{_rate(min(rates))}..{_rate(max(rates))}"
        steps = f"step {felt.steps}" if self._total is None else f"{felt.steps}/{self._total}"
        pace = f"{speed:,.0f}/s" if speed >= 10 else f"{speed:.2g}/s"
        bar = Text.assemble((f"{felt.mood:7} ", MOOD_STYLE.get(felt.mood, "")), self._bar(felt))
        figures = (
            ("loss ", f"{felt.short:<6.3g}"), ("lr ", f"{lr:6}"), ("drive ", f"{felt.drive:<5.3g}"),
            ("trust ", f"{felt.trust:<+5.2f}"), ("", steps), ("", pace),
        )  # fmt: skip
        parts = [bar, *(Text.assemble((name, "dim"), value) for name, value in figures if "nan" not in value)]
        room = self._console.width if self._live is not None else math.inf
        while len(parts) > 1 and sum(map(len, parts)) + len(parts) - 1 > room:
            parts.pop()
        line = Text(" ").join(parts)
        line.no_wrap = True
        return line

    def _bar(self, felt: Snapshot) -> Text:
        from rich.text import Text

        plain = self._console.options.ascii_only
        (full, empty), (down, up) = ("#-", "v^") if plain else ("█░", "↓↑")
        filled = round(_CELLS * felt.agitation)
        rising = felt.scalar > 0
        arrow = " " if abs(felt.scalar) < 0.1 else up if rising else down
        style = MOOD_STYLE["resting"] if felt.mood == "resting" else "yellow" if rising else "blue"
        return Text.assemble((full * filled, style), (empty * (_CELLS - filled), "dim"), (arrow, style))


def _rate(lr: float) -> str:
    """1.2e-3 instead of 1.2e-03."""
    return f"{lr:.1e}".replace("e-0", "e-").replace("e+0", "e")
