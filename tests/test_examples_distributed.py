"""The examples for several processes run under torchrun; what is killed goes on where it was saved."""

from __future__ import annotations

import signal
import subprocess
import sys

import pytest
import torch
from test_examples import EXAMPLES, SENTENCE
from torch import distributed as dist
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import main as torchrun

pytestmark = pytest.mark.skipif(
    not (dist.is_available() and dist.is_gloo_available()), reason="needs torch.distributed with gloo"
)


@pytest.fixture
def ran(capfd, monkeypatch):
    """Run an example under torchrun, whose own process is this one: what it printed."""
    pytest.importorskip("sklearn")

    def run(script, *options, ranks=2, restarts=0, **environment):
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        how = ["--standalone", "--nproc-per-node", str(ranks), "--max-restarts", str(restarts)]
        command = [*how, str(EXAMPLES / script), "--small", *options]
        try:
            torchrun(command)
        except ChildFailedError:
            # Gloo's threads abort a process at its exit, once in some hundred runs and with AdamW, too.
            if "terminate called without an active exception" not in capfd.readouterr().err:
                raise
            torchrun(command)
        for name in environment:
            monkeypatch.delenv(name)
        return capfd.readouterr().out

    return run


def test_replicas(ran):
    printed = ran("ddp.py")
    before, after, _ = map(float, SENTENCE.search(printed).groups())
    assert after < before / 2
    assert "2 ranks with losses of their own are the same to the last bit" in printed


def test_shards_and_their_checkpoint(ran, tmp_path):
    """Two ranks save, and one takes it up."""
    first, second = (ran("fsdp2.py", "--folder", str(tmp_path), ranks=ranks) for ranks in (2, 1))
    found = (map(float, SENTENCE.search(text).groups()) for text in (first, second))
    (before, middle, felt), (again, after, felt_after) = found
    assert middle == again and max(middle, after) < before / 2 and felt_after < felt
    assert "120 steps in all" in second


def checkpoint(folder):
    return torch.load(folder / "checkpoint.pt", weights_only=True)


def flat(state):
    """All tensors and numbers of nested dicts and lists, in order."""
    if isinstance(state, dict):
        return [leaf for key in state for leaf in flat(state[key])]
    return [leaf for value in state for leaf in flat(value)] if isinstance(state, (list, tuple)) else [state]


def test_a_rank_that_dies_costs_nothing(ran, tmp_path):
    """It dies between two checkpoints; the run ends with what the undisturbed one ends with."""
    printed = ran("elastic.py", "--folder", str(tmp_path / "died"), restarts=1, EMONAVI_DIE_AT="25")
    assert "life 1: 20 steps were taken up, 60 are done" in printed
    assert "life 0: 0 steps were taken up, 60 are done" in ran("elastic.py", "--folder", str(tmp_path / "lived"))
    died, lived = (flat(checkpoint(tmp_path / name)) for name in ("died", "lived"))
    assert len(died) == len(lived) >= 50
    for one, two in zip(died, lived, strict=True):
        assert torch.equal(one, two) if isinstance(one, torch.Tensor) else one == two


KILLED = """
import os, signal, sys
from pathlib import Path
import torch
import elastic

def die(*args, **kwargs):
    os.kill(os.getpid(), signal.SIGKILL)

def half(state, file):
    plain(state, file)
    file.flush()
    file.truncate(file.tell() // 2)
    die()

plain, when, path = torch.save, sys.argv[1], Path(sys.argv[2])
elastic.save({"step": 10, "weights": torch.ones(1000)}, path)
if when == "half written":
    torch.save = half
else:
    os.replace = die
elastic.save({"step": 20, "weights": torch.zeros(1000)}, path)
"""


@pytest.mark.parametrize("when", ["half written", "not yet in its place"])
def test_what_is_killed_while_it_writes_leaves_the_checkpoint_before(when, tmp_path):
    pytest.importorskip("sklearn")
    command = [sys.executable, "-c", KILLED, when, str(tmp_path / "checkpoint.pt")]
    result = subprocess.run(command, capture_output=True, text=True, timeout=600, cwd=EXAMPLES)
    assert result.returncode == -signal.SIGKILL, result.stderr[-3000:]
    state = checkpoint(tmp_path)
    assert state["step"] == 10
    assert torch.equal(state["weights"], torch.ones(1000))
    assert len(list(tmp_path.iterdir())) == 2, "the unfinished one lies beside it, and the next replaces it"
