"""The published implementations' traces (``tests/golden``) against the presets, within 1e-10 (1e-5 in float32)."""

import json
from pathlib import Path

import pytest
import torch
from cases import CASES, siblings, ways

GOLDEN = Path(__file__).parent / "golden"
INPUTS = json.loads((GOLDEN / "inputs.json").read_text())
TRACES = json.loads((GOLDEN / "traces.json").read_text())
# v4 as published multiplies its feedback by 0: its scalar is 0 for ever, which a constant loss gives here as well.
PRESET = {"v1": "v1", "v3": "v3", "v4": "v4", "v41": "v4"}
MUTE = {"v4"}


def traces(optimizer):
    return [t for t in TRACES if t["optimizer"] == optimizer]


def named(trace):
    options = ",".join(f"{k}={v}" for k, v in trace["options"].items() if k != "lr")
    return f"{trace['generation']}-{trace['optimizer']}-{trace['losses']}-{trace['parameter']}-{options or 'plain'}"


RUNS = [(case, trace) for case in CASES for trace in traces(case.name)]


@pytest.mark.parametrize(("case", "trace"), RUNS, ids=[named(t) for _, t in RUNS])
@ways
def test_trace(case, trace, foreach):
    dtype, tolerance = case.golden
    assert str(dtype) == f"torch.{trace['dtype']}"
    kind, mute = trace["parameter"], trace["generation"] in MUTE
    p = torch.nn.Parameter(torch.tensor(INPUTS["init"][kind], dtype=dtype))
    optimizer = case.make([p], emotion=PRESET[trace["generation"]], foreach=foreach, **trace["options"])
    stopped = None
    assert len(trace["scalar"]) == len(trace["lr"]) == INPUTS["steps"]
    for t in range(INPUTS["steps"]):
        p.grad = torch.tensor(INPUTS["grads"][kind][t], dtype=dtype)
        optimizer.step(loss=1.0 if mute else INPUTS["losses"][trace["losses"]][t])
        assert optimizer.emotion.scalar == pytest.approx(trace["scalar"][t], abs=1e-10), t
        assert optimizer.effective_lr[0] == pytest.approx(trace["lr"][t], rel=1e-10), t
        assert optimizer.param_groups[0]["lr"] == trace["options"]["lr"]
        if str(t) in trace["params"]:
            wanted = torch.tensor(trace["params"][str(t)], dtype=dtype)
            torch.testing.assert_close(
                p.detach(), wanted, rtol=tolerance, atol=tolerance, msg=lambda m, t=t: f"{t}: {m}"
            )
        if optimizer.should_stop and stopped is None:
            stopped = t
    assert stopped == trace["should_stop_at"]
    if not mute:
        for name in ("short", "long"):
            assert getattr(optimizer.emotion, name) == pytest.approx(trace["ema"][name], rel=1e-10)


@siblings
def test_there_are_traces(case):
    """A renamed file or key must not make the suite pass by testing nothing."""
    assert len(traces(case.name)) >= (18 if len(case.generations) > 1 else 12)
    assert all(len(t["params"]) == 11 for t in traces(case.name))
