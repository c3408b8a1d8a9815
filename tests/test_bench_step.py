"""``emonavi bench step``: that it measures what it says. Its figures are not a test's business."""

import json
import sys
from pathlib import Path

import pytest
import torch

from emonavi import cli, page
from emonavi.bench import capture, step


def test_every_contender_takes_its_turn(monkeypatch):
    monkeypatch.setattr(step, "LARGE", 1000)
    found = step.measure([(40, 30), (7,)], rounds=2)
    assert set(found) == {c.name for c in step.CONTENDERS} | {step.BANDWIDTH}
    assert found["AdamW fused"]["ratio"] == 1.0
    assert found[step.BANDWIDTH]["gb_per_s"] > 0
    for c in step.CONTENDERS:
        assert found[c.name]["ms"] > 0
        assert ("share" in found[c.name]) == bool(c.least)
    assert found["EmoNavi fused"]["state_bytes"] == 8.0 and found["EmoLynx fused"]["state_bytes"] == 4.0


def test_each_way_is_told_to_the_groups():
    told = []

    class Listening(torch.optim.SGD):
        def step(self, closure=None):
            told.append({k: self.param_groups[0][k] for k in ("fused", "foreach")})

    params = [torch.nn.Parameter(torch.ones(2))]
    for contender in step.CONTENDERS[:3]:
        step._step(contender, Listening(params), params)()
    assert told == [dict(fused=f, foreach=e) for f, e in ((True, False), (False, True), (False, False))]


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells")
def test_extra_memory_is_that_of_the_step():
    assert step._extra_memory(lambda: torch.ones(1 << 24)) == pytest.approx(1 << 26, rel=0.1)
    assert step._extra_memory(lambda: None) < 1 << 24


def test_report_writes_figures_and_a_picture(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(step, "LISTS", {"few": ("three", [(8, 4)] * 3)})
    lines = step.report(["few"], tmp_path / "step.json", rounds=1)
    assert any(line.startswith("  EmoFact single") for line in lines)
    kept = json.loads((tmp_path / "step.json").read_text())
    assert kept["lists"]["few"]["AdamW fused"]["ratio"] == 1.0 and kept["threads"] == 1
    assert (tmp_path / "step.png").read_bytes().startswith(b"\x89PNG")


def test_lists_are_chosen_by_name(monkeypatch):
    typer = pytest.importorskip("typer.testing")
    measured = []
    monkeypatch.setattr(step, "report", lambda lists, *_: measured.append(lists) or [])
    for model in ("one,", "Tiny, lora"):
        assert typer.CliRunner().invoke(cli.build(), ["bench", "step", "--model", model]).exit_code == 0
    assert measured == [["one"], ["tiny", "lora"]]
    result = typer.CliRunner().invoke(cli.build(), ["bench", "step", "--model", "one,many"])
    assert result.exit_code == 2 and "no list of shapes 'many': choose from one, gpt2, tiny, lora" in result.output


def test_the_picture_tells_ours_from_others_and_begins_at_1(tmp_path, monkeypatch):
    axes = pytest.importorskip("matplotlib.axes")
    figure = pytest.importorskip("matplotlib.figure")
    drawn, shown = {}, []

    def note(axis, starts, y, ends, color=None, **look):
        drawn[axis] = (y, starts, ends, color)

    monkeypatch.setattr(axes.Axes, "hlines", lambda axis, y, *ends, **look: note(axis, ends[0], y, ends[1], **look))
    monkeypatch.setattr(figure.Figure, "savefig", lambda sheet, path: shown.append(sheet))
    figures = json.loads((Path(__file__).parents[1] / "benchmarks" / "step-cpu.json").read_text())
    step.draw(figures, tmp_path / "step.png")
    for axis, (names, start, ratios, colours) in drawn.items():
        assert start == 1.0 and len(names) == len(ratios)
        blue = {name for name, colour in zip(names, colours, strict=True) if colour == page.PALETTE[0]}
        assert blue == {name for name in names if name.startswith("Emo") and "pytorch_optimizer" not in name}
        assert [label.get_text() for label in axis.get_xticklabels()][:4] == ["1", "2", "5", "10"]
    assert len(drawn) == 4 and any("Emotional" in name for name in names)
    assert [text.get_text() for text in shown[0].legends[0].get_texts()] == ["this library", "others"]


def test_threads_are_lent_and_given_back(monkeypatch):
    had, clocks = [], []
    monkeypatch.setattr(step, "CONTENDERS", step.CONTENDERS[:1])
    monkeypatch.setattr(
        step, "_seconds", lambda _, clock: had.append(torch.get_num_threads()) or clocks.append(clock) or 1
    )
    for threads in (1, 2):
        step.measure([(4, 3)], rounds=1, threads=threads)
    assert had[0] == 1 and had[-1] == 2 and torch.get_num_threads() == 1
    assert clocks[0] is step.time.process_time and clocks[-1] is step.time.perf_counter


@pytest.mark.parametrize("bench", [step, capture])
def test_threads_are_given_back_where_a_measurement_breaks_off(bench, monkeypatch):
    def fail(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(capture, "_backward", fail)
    monkeypatch.setattr(step, "_seconds", fail)
    torch.set_num_threads(2)
    try:
        with pytest.raises(KeyboardInterrupt):
            step.measure([(4, 3)]) if bench is step else capture.measure(width=2, layers=1)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(1)


def test_a_device_that_is_not_there_is_named():
    for device in ("cuda", "tpu") if not torch.cuda.is_available() else ("tpu",):
        with pytest.raises(ValueError, match=f"no device {device} to measure on: choose cpu, or cuda where"):
            step.report(["tiny"], device=device)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu_the_devices_time_and_memory_are_measured():
    assert step._seconds_on_device(lambda: torch.cuda._sleep(10_000_000)) > 1e-3
    assert step._extra_on_device(lambda: torch.ones(1 << 20, device="cuda")) == 1 << 22
    found = step.measure([(40, 30), (7,)], rounds=2, device="cuda")
    assert found["EmoNavi fused"]["state_bytes"] == 8.0
