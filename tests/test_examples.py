"""Each example runs as a user runs it, on its small data: the loss falls, and the optimizer feels it."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"
SENTENCE = re.compile(r"held-out loss (\S+) -> (\S+), \d+% right; loss felt last (\S+)")


def ran(script, *options):
    result = subprocess.run(
        [sys.executable, EXAMPLES / script, "--small", *options], capture_output=True, text=True, timeout=600
    )
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stdout


@pytest.mark.parametrize("command", ["minilm_lora.py", "minilm_lora.py --trainer", "efficientnet_lora.py"])
def test_the_loss_falls(command):
    pytest.importorskip("peft" if "minilm" in command else "efficientnet_lite_pytorch")
    before, after, felt = map(float, SENTENCE.search(ran(*command.split())).groups())
    assert after < before
    assert math.isfinite(felt)


def test_the_comparison_is_written_and_taken_up_again(tmp_path):
    pytest.importorskip("efficientnet_lite_pytorch")
    pytest.importorskip("prodigyopt")
    pytest.importorskip("transformers")
    out = tmp_path / "found.json"
    command = ["compare.py", "efficientnet", "--steps", "3", "--resume", "--out", str(out)]
    ran(*command)
    found = json.loads(out.read_text())
    assert {"command", "hardware", "versions", "steps", "seeds"} < found.keys()
    assert {r["optimizer"] for r in found["runs"]} > {"EmoNavi"}
    assert all(0 < r["loss"] < 10 and 0 <= r["forgotten"] < 1 for r in found["runs"])
    out.write_text(json.dumps(found | {"runs": found["runs"][1:]}))
    ran(*command)
    again = json.loads(out.read_text())["runs"]
    assert sorted(r["loss"] for r in again) == sorted(r["loss"] for r in found["runs"])


def test_each_example_is_short():
    scripts = [path for path in EXAMPLES.glob("*.py") if path.name not in ("data.py", "compare.py")]
    assert scripts
    assert all(len(path.read_text().splitlines()) <= 80 for path in scripts)
