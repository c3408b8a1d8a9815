"""Each example runs as a user runs it, on its small data: the loss falls, and the optimizer feels it."""

from __future__ import annotations

import json
import math
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch

EXAMPLES = Path(__file__).parents[1] / "examples"
SENTENCE = re.compile(r"held-out loss (\S+) -> (\S+), \d+% right; loss felt last (\S+)")


def ran(script, *options):
    result = subprocess.run(
        [sys.executable, EXAMPLES / script, "--small", *options], capture_output=True, text=True, timeout=600
    )
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stdout


@pytest.mark.parametrize("script", sorted(path.name for path in EXAMPLES.glob("*.py") if path.name != "data.py"))
def test_each_example_says_how_it_is_used(script, monkeypatch, capsys):
    """Without its data, and without torchrun."""
    needs = {"minilm_lora.py": "peft", "efficientnet_lora.py": "efficientnet_lite_pytorch", "compare.py": "prodigyopt"}
    pytest.importorskip("sklearn")
    pytest.importorskip(needs.get(script, "sklearn"))
    monkeypatch.setattr(sys, "argv", [script, "--help"])
    monkeypatch.syspath_prepend(EXAMPLES)
    with pytest.raises(SystemExit) as left:
        runpy.run_path(str(EXAMPLES / script), run_name="__main__")
    said = capsys.readouterr().out
    assert left.value.code == 0
    assert said.startswith("usage: ") and "--small" in said
    for choices in re.findall(r"{(.*?)}", said):
        assert " " not in choices


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
    assert all(0 < r["loss"] < 10 and 0 <= r["forgotten"] < 10 for r in found["runs"])
    out.write_text(json.dumps(found | {"runs": found["runs"][1:]}))
    ran(*command)
    again = json.loads(out.read_text())["runs"]
    assert sorted(r["loss"] for r in again) == sorted(r["loss"] for r in found["runs"])


def test_ranks_of_adapters():
    pytest.importorskip("sklearn")
    head, adamw, navi = (line.split() for line in ran("rank.py").splitlines())
    assert head[-3:] == ["stable", "entropy", "norm"]
    assert (adamw[:2], navi[:2]) == (["lora", "AdamW"], ["lora", "EmoNavi"])
    for row in (adamw, navi):
        stable, entropy, norm = map(float, row[-3:])
        assert 1 <= stable <= entropy <= 4 and norm > 0  # the adapters' rank is 4


def test_what_a_rank_is():
    """By hand: equal singular values are as many directions as there are, one alone is one."""
    measure = runpy.run_path(str(EXAMPLES / "rank.py"))["ranks"]
    assert measure(torch.eye(3)) == pytest.approx((3, 3, math.sqrt(3)))
    assert measure(torch.ones(4, 2)) == pytest.approx((1, 1, math.sqrt(8)))
    assert measure(torch.diag(torch.tensor([2.0, 1.0])))[0] == pytest.approx(5 / 4)
    assert measure(torch.zeros(2, 2)) == (0, 0, 0)


def test_a_fresh_optimizer_in_the_middle():
    pytest.importorskip("sklearn")
    rows = [line.split() for line in ran("afresh.py").splitlines()]
    assert [row[1:3] for row in rows] == [["EmoNavi", "new"], ["EmoNavi", "reset"], ["AdamW", "new"]]
    assert all(0.5 < float(row[4].rstrip(",")) < 2 for row in rows)


def test_each_example_is_short():
    scripts = [path for path in EXAMPLES.glob("*.py") if path.name not in ("data.py", "compare.py")]
    assert scripts
    assert all(len(path.read_text().splitlines()) <= 80 for path in scripts)
