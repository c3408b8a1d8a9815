"""The live line: what it says, when it reads, and that nothing of it remains."""

from __future__ import annotations

import contextlib
import os
import re
import sys
import types
from dataclasses import replace

import pytest
import torch

from emonavi import EmoNavi, monitor, terminal

rich_console = pytest.importorskip("rich.console")


class Clock:
    """Time that only goes on when it is told to."""

    def __init__(self, monkeypatch):
        self.now = 100.0
        monkeypatch.setattr(terminal, "monotonic", lambda: self.now)


@pytest.fixture
def clock(monkeypatch):
    return Clock(monkeypatch)


@pytest.fixture
def sheet(monkeypatch):
    monkeypatch.delenv("TERM", raising=False)  # a dumb terminal is none
    with open(os.devnull, "w", encoding="utf-8") as nowhere:
        yield lambda wide=100, **how: rich_console.Console(file=nowhere, record=True, width=wide, **how)


def make(**options):
    weight = torch.nn.Parameter(torch.ones(3))
    optimizer = EmoNavi([weight], **options)

    def step(loss=None):
        optimizer.zero_grad()
        weight.square().sum().backward()
        optimizer.step(loss=loss)

    return optimizer, step


def test_a_log_file_gets_a_line_now_and_then(clock, sheet):
    optimizer, step = make()
    console = sheet()
    with monitor.live(optimizer, console=console):
        for _ in range(101):
            step()
            clock.now += 0.5
    lines = console.export_text().splitlines()
    assert [int(line.split("step ")[1].split()[0]) for line in lines] == [1, 21, 41, 61, 81, 101, 101]
    assert all("\x1b" not in line for line in lines)
    assert "/s" not in lines[0]  # no speed from a single step
    assert lines[1].endswith(" 2/s")
    assert lines[-1].startswith(optimizer.emotion.mood)
    assert f"drive {optimizer.emotion.drive:.3g}" in lines[-1]


def test_a_terminal_is_refreshed_four_times_a_second_at_most(clock, sheet, monkeypatch):
    optimizer, step = make()
    reads = []
    monkeypatch.setattr(EmoNavi, "emotion", property(lambda _: reads.append(1) or monitor.Snapshot.of(*state(_))))
    console = sheet(force_terminal=True)
    with monitor.live(optimizer, console=console, total=1000) as line:
        del reads[:]
        for _ in range(1000):
            step()
            line.update()  # by hand, too, it is no more often
            clock.now += 1 / 100
    assert 40 <= len(reads) <= 41
    assert "1000/1000" in console.export_text()


def state(optimizer):
    return optimizer._emotion, optimizer._vector()


@pytest.mark.parametrize("error", [None, KeyboardInterrupt, ValueError])
def test_nothing_remains_and_errors_pass(clock, sheet, error):
    optimizer, step = make()
    console = sheet(force_terminal=True)
    shown = monitor.live(optimizer, console=console)
    for _ in range(2):  # it can be entered again
        raised = None
        try:
            with shown:
                step()
                if error:
                    raise error
        except BaseException as caught:
            raised = type(caught)
        assert raised is error
        assert not optimizer._optimizer_step_post_hooks
        before = console.export_text()
        assert "trust" in before
    step()
    shown.update()
    assert console.export_text() == ""


def test_no_step_no_line(sheet):
    optimizer, _ = make()
    console = sheet()
    with monitor.live(optimizer, console=console):
        pass
    assert console.export_text() == ""


def test_watching_changes_nothing(sheet):
    ends = []
    for watched in (True, False):
        optimizer, step = make()
        if watched:
            with monitor.live(optimizer, console=sheet()):
                [step() for _ in range(9)]
        else:
            [step() for _ in range(9)]
        ends.append(optimizer.state_dict())
    assert torch.equal(ends[0]["param_groups"][0]["emotion"], ends[1]["param_groups"][0]["emotion"])
    assert ends[0]["param_groups"][0].keys() == ends[1]["param_groups"][0].keys()


def line_of(console, snapshot, rates=(1.234e-5,), speed=148.2):
    stub = types.SimpleNamespace(emotion=snapshot, effective_lr=list(rates))
    line = terminal.Line(stub, None, console)
    line._live = object() if console.is_terminal else None
    return line._text(snapshot, list(rates), speed)


@pytest.fixture
def felt():
    optimizer, step = make()
    step()
    return replace(
        optimizer.emotion, mood="braking", short=0.123456, drive=12.345, trust=-0.125, scalar=0.5, steps=12345
    )


def test_what_it_says(sheet, felt):
    console = sheet(80, force_terminal=True)
    text = line_of(console, felt)
    assert text.plain == "braking ███░░░↑ loss 0.123  lr 1.2e-5 drive 12.3  trust -0.12 step 12345 148/s"
    assert len(text) <= 80
    assert line_of(console, replace(felt, scalar=-0.04, mood="steady")).plain.startswith("steady  ░░░░░░  loss")
    assert line_of(console, replace(felt, scalar=-0.99)).plain.startswith("braking ██████↓")
    assert line_of(console, replace(felt, scalar=-0.2, mood="resting")).plain.startswith("resting ██████↓")
    nan = float("nan")
    assert line_of(console, replace(felt, trust=nan, short=nan), speed=nan).plain.endswith(
        "lr 1.2e-5 drive 12.3  step 12345"
    )
    assert "lr 1.0e-5..3.0e-2 " in line_of(sheet(200), felt, (1e-5, 3e-2, 1e-3)).plain


@pytest.mark.parametrize("width", [20, 40, 60, 79])
def test_a_narrow_terminal_gets_the_first_parts(sheet, felt, width):
    text = line_of(sheet(width, force_terminal=True), felt)
    assert len(text) <= width
    assert text.plain.startswith("braking ███░░░↑")
    assert len(line_of(sheet(width), felt)) > 70, "a log file has room"


def test_ascii_terminals(felt):
    with open(os.devnull, "w", encoding="ascii") as nowhere:
        assert line_of(rich_console.Console(file=nowhere), felt).plain.startswith("braking ###---^ loss")


def test_agitation_is_a_plain_function_of_the_snapshot(felt):
    assert felt.agitation == 0.5
    assert replace(felt, scalar=-0.75).agitation == 0.75
    assert replace(felt, scalar=0.0, mood="resting").agitation == 1.0


def test_wrappers_are_looked_into(sheet):
    optimizer, step = make()
    console = sheet()
    with monitor.live(types.SimpleNamespace(optimizer=optimizer), console=console):
        step()
    assert "drive" in console.export_text()
    plain = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=0.1)
    with pytest.raises(TypeError, match="SGD holds no optimizer that listens"):
        monitor.live(plain)


@pytest.mark.parametrize("emotion", ["v1", "v3", "v4"])
def test_presets(sheet, emotion):
    optimizer, step = make(emotion=emotion)
    console = sheet()
    with monitor.live(optimizer, console=console):
        step(1.0)
    said = console.export_text()
    assert "loss 1" in said and "trust" not in said


def test_of_many_processes_the_first_speaks(sheet, monkeypatch):
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 1)
    optimizer, _ = make()
    console = sheet()
    with monitor.live(optimizer, console=console) as line:
        line.update()
        assert not optimizer._optimizer_step_post_hooks
    assert console.export_text() == ""


def test_a_new_stage_has_a_speed_of_its_own(clock, sheet):
    optimizer, step = make()
    console = sheet()
    with monitor.live(optimizer, console=console):
        for stage in range(2):
            for _ in range(30):
                step()
                clock.now += 1
            if not stage:
                optimizer.reset_emotion()
    assert "-" not in console.export_text().rstrip().splitlines()[-1].split()[-1]


def test_without_rich_the_remedy_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "rich.console", None)
    with pytest.raises(ImportError, match=r"live\(\) needs rich: pip install rich"):
        monitor.live(make()[0])


@pytest.mark.skipif(os.name != "posix", reason="a pseudo terminal")
def test_a_real_terminal(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    keyboard, screen = os.openpty()
    with os.fdopen(screen, "w", encoding="utf-8") as file:
        optimizer, step = make()
        console = rich_console.Console(file=file, width=80)
        with monitor.live(optimizer, total=5, console=console):
            for i in range(5):
                step()
                console.print("batch", i)
    shown = all_of(keyboard).decode()
    os.close(keyboard)
    assert "\x1b[2K" in shown, "the line is rewritten in its place"
    assert all(f"batch {i}" in console_free(shown) for i in range(5))
    assert "5/5" in shown.rsplit("\x1b[2K", 1)[-1]


def all_of(keyboard):
    """What was written to a terminal that is closed by now; one read may give a part of it."""
    parts = []
    with contextlib.suppress(OSError):  # at the end Linux raises, others give nothing
        while part := os.read(keyboard, 100_000):
            parts.append(part)
    return b"".join(parts)


def console_free(shown):
    """Text without the escape sequences of a terminal."""
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown)


def test_entered_twice(sheet):
    """A second hook would never be removed."""
    optimizer, step = make()
    with monitor.live(optimizer, console=sheet()) as line:
        with pytest.raises(RuntimeError, match="shown already"), line:
            pass
        step()
    assert not optimizer._optimizer_step_post_hooks
