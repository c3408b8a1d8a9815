"""``emonavi bench step``: that it measures what it says. Its figures are not a test's business."""

import json
import sys

import pytest
import torch

from emonavi.bench import step


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
    with pytest.raises(ValueError, match="no list of shapes many: choose from few"):
        step.report(["many"])


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
